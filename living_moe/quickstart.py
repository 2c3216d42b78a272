"""`living-moe quickstart`: the whole story on a small scale, from text that the interpreter carries.

A small Mixtral learns the first domain with Transformers' own class (the stand-in for a hub checkpoint). It is saved,
grafted, and learns a second domain as a living model; beside it the plain Mixtral is fine-tuned on the same batches. A
table says what each knows of both domains before and after. The living model is saved, loaded through
`AutoModelForCausalLM`, and generates. Every figure printed is measured in the run that prints it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from living_moe.configuration.errors import CheckpointError, TrainingError
from living_moe.conversion import convert
from living_moe.modeling_living_moe import LifecycleEvent, LivingMoeForCausalLM
from living_moe.modeling_living_moe.lifecycle.lineage import LINEAGE_NAME
from living_moe.records import parameter_counts
from living_moe.texts import documentation, read_text, source_code
from living_moe.training.data import BlockLoader
from living_moe.training.evaluation import Evaluation, evaluate_blocks, in_eval_mode
from living_moe.training.loop import Hook, LivingTrainer, StepRecord
from living_moe.training.malloc import tune_malloc
from living_moe.training.observatory.lineage_page import PAGE_NAME, write_lineage_page
from living_moe.training.observatory.pictures import Scene, draw_pictures
from living_moe.training.observatory.recorder import Recorder
from living_moe.training.observatory.records import LOG_NAME, RUN_NAME, read_run
from living_moe.training.observatory.vitals_log import VITALS_NAME
from living_moe.training.optimizers import LivingAdamW
from living_moe.training.reporting import JsonLog

#: Steps averaged on either side of an event.
AROUND = 20


@dataclass(frozen=True)
class Sizes:
    """Scale of the quickstart. The default runs in under five minutes on two cores."""

    characters: int = 2_000_000
    vocabulary: int = 4096
    block: int = 128
    batch: int = 16
    hidden: int = 128
    layers: int = 4
    experts: int = 8
    pretrain_steps: int = 400
    finetune_steps: int = 220
    pretrain_lr: float = 2e-3
    finetune_lr: float = 2e-3
    living_lr: float = 3e-3
    eval_blocks: int = 96
    lifecycle: dict[str, Any] = field(default_factory=lambda: {"interval": 5, "warmup_steps": 5, "patience": 1})


SMOKE = replace(Sizes(), characters=200_000, pretrain_steps=12, finetune_steps=12, eval_blocks=8)


@dataclass(frozen=True)
class Domain:
    """Token blocks of one text, (N, S) each; every twentieth group of eight blocks is held out."""

    name: str
    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Jump:
    """Loss on one fixed batch right before and right after the events of one step, nats."""

    step: int
    events: int
    before: float
    after: float


@dataclass
class Result:
    """One row of the table."""

    name: str
    first_before: Evaluation
    second_before: Evaluation
    first_after: Evaluation
    second_after: Evaluation
    experts: list[int]
    total: int
    trainable: int
    seconds: float

    @property
    def forgotten(self) -> float:
        """Nats lost on the first domain."""
        return self.first_after.loss - self.first_before.loss


def quickstart(
    output: Path,
    *,
    first: Path | None = None,
    second: Path | None = None,
    seed: int = 0,
    smoke: bool = False,
    sizes: Sizes | None = None,
    console: Console | None = None,
) -> dict[str, Result]:
    """Run it. Files go to `output`, which is replaced if an earlier quickstart wrote it.

    Args:
        output: Gets `base/`, `living/`, `living-trained/`, `figures/`, `results.json`, and the records of the living
            model's run, which `living-moe watch` and `lineage` open.
        first, second: Text files of the two domains; None takes the interpreter's documentation, and its source code.
        seed: Of weights, data order and lifecycle.
        smoke: A few steps only.
        sizes: Scale; overrides `smoke`.

    Returns:
        "plain" and "living": the rows of the table.

    Raises:
        CheckpointError: `output` holds something else.
        TrainingError: A text is unreadable or too short.
    """
    console = console or Console()
    sizes = sizes or (SMOKE if smoke else Sizes())
    started = time.perf_counter()
    prepare_output(output)
    tuned = tune_malloc()
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"seed {seed}, malloc {'tuned' if tuned else 'as it is'}"
    )
    torch.manual_seed(seed)
    tokenizer, domains = read_domains(first, second, sizes)
    for domain in domains:
        console.print(f"{domain.name}: {domain.train.numel():,} training tokens, {domain.held_out.numel():,} held out")

    base = pretrain(domains[0], sizes, seed, console)
    base.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    del base

    living = convert(
        output / "base",
        output / "living",
        preset="frozen-graft",
        calibration=domains[0].train,
        lifecycle={**sizes.lifecycle, "seed": seed},
    )
    rows = {
        "plain": learn_second(MixtralForCausalLM.from_pretrained(output / "base"), domains, sizes, seed, console),
        "living": learn_second(living, domains, sizes, seed, console, living_model=living, records=output),
    }
    console.print(results_table(rows, domains))
    plain, life = rows["plain"], rows["living"]
    console.print(
        f"The living model forgot {life.forgotten:+.3f} nats of the first domain (plain fine-tuning "
        f"{plain.forgotten:+.3f}) and is {life.second_after.loss - plain.second_after.loss:+.3f} nats from plain "
        f"fine-tuning on the second, at equal tokens."
    )
    record(living, domains, rows["living"])
    living.save_pretrained(output / "living-trained")
    tokenizer.save_pretrained(output / "living-trained")
    check_reload(living, output / "living-trained", tokenizer, domains, console)
    run = read_run(output / "living-trained")
    pictures, _ = draw_pictures(Scene(run), output / "figures")
    page = write_lineage_page(run, output / "figures" / PAGE_NAME)
    console.print(f"Pictures of the population's life: {', '.join(path.name for path in [*pictures, page])}")
    seconds = time.perf_counter() - started
    (output / "results.json").write_text(
        json.dumps({name: asdict(row) | {"forgotten": row.forgotten} for name, row in rows.items()}, indent=2)
    )
    console.print(f"Done in {seconds:.0f} s. Look closer: living-moe inspect {output / 'living-trained'}")
    return rows


def prepare_output(output: Path) -> None:
    """Make room for the run: an earlier quickstart's directory is cleared, anything else is refused."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        ours = output.is_dir() and {entry.name for entry in output.iterdir()} <= {
            "base", "living", "living-trained", "figures", "results.json",
            RUN_NAME, LOG_NAME, LINEAGE_NAME, VITALS_NAME,
        }  # fmt: skip
        if not ours:
            raise CheckpointError(f"{output} holds other files; choose another directory with --output.")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)


def read_domains(
    first: Path | None, second: Path | None, sizes: Sizes
) -> tuple[PreTrainedTokenizerFast, tuple[Domain, Domain]]:
    """Both texts as blocks, under one byte-level BPE tokenizer trained on both."""
    limit = sizes.characters
    texts = [
        documentation(limit) if first is None else read_text(first, limit),
        source_code(limit) if second is None else read_text(second, limit),
    ]
    names = [
        "Python's documentation" if first is None else first.stem,
        "Python's source code" if second is None else second.stem,
    ]
    if first is not None and second is not None and names[0] == names[1]:
        names = [f"{path.resolve().parent.name}/{path.name}" for path in (first, second)]
    tokenizer = train_tokenizer(texts, sizes.vocabulary)
    domains = [make_domain(name, encode(tokenizer, text), sizes) for name, text in zip(names, texts, strict=True)]
    return tokenizer, (domains[0], domains[1])


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text[:1_000_000] for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Token ids of a long text, in pieces of whole lines."""
    lines = text.splitlines(keepends=True)
    pieces = ["".join(lines[start : start + 1000]) for start in range(0, len(lines), 1000)]
    encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


def make_domain(name: str, ids: Tensor, sizes: Sizes) -> Domain:
    count = len(ids) // sizes.block
    blocks = ids[: count * sizes.block].view(count, sizes.block)
    held = torch.arange(count) // 8 % 20 == 7
    if held.sum() < 8 or (~held).sum() < sizes.batch:
        raise TrainingError(f"{name} has only {count} blocks of {sizes.block} tokens; give more text.")
    return Domain(name, blocks[~held], blocks[held])


def pretrain(domain: Domain, sizes: Sizes, seed: int, console: Console) -> MixtralForCausalLM:
    """The stand-in for a hub checkpoint: a small Mixtral, trained by the family's own class."""
    config = MixtralConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=sizes.experts,
        num_experts_per_tok=2,
        max_position_embeddings=4 * sizes.block,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        # Mixtral's load-balancing loss is off unless router logits are output.
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config)
    train(model, domain, sizes.pretrain_steps, sizes.pretrain_lr, sizes, seed, f"Mixtral learns {domain.name}", console)
    model.config.output_router_logits = False
    return model


def learn_second(
    model: Any,
    domains: tuple[Domain, Domain],
    sizes: Sizes,
    seed: int,
    console: Console,
    *,
    living_model: LivingMoeForCausalLM | None = None,
    records: Path | None = None,
) -> Result:
    """Fine-tune on the second domain; a row of the table. A living model's run is recorded in `records`."""
    name = "plain Mixtral" if living_model is None else "living Mixtral"
    before = [measure(model, domain, sizes) for domain in domains]
    meter = None if living_model is None else JumpMeter(living_model, domains[1].train[: sizes.batch])
    started = time.perf_counter()
    title = f"{name} learns {domains[1].name}"
    lr = sizes.finetune_lr if living_model is None else sizes.living_lr
    losses = train(model, domains[1], sizes.finetune_steps, lr, sizes, seed + 1, title, console, records=records)
    seconds = time.perf_counter() - started - (0.0 if meter is None else meter.seconds)
    after = [measure(model, domain, sizes) for domain in domains]
    if living_model is None:
        total = sum(parameter.numel() for parameter in model.parameters())
        experts, trainable = [sizes.experts] * sizes.layers, total
    else:
        counts = parameter_counts(living_model)
        experts, total, trainable = living_model.expert_counts, counts["total"], counts["trainable"]
    if meter is not None:
        meter.stop()
        console.print(meter.report(losses))
    return Result(name, before[0], before[1], after[0], after[1], experts, total, trainable, seconds)


def measure(model: nn.Module, domain: Domain, sizes: Sizes) -> Evaluation:
    return evaluate_blocks(model, domain.held_out, batch_size=sizes.batch, max_blocks=sizes.eval_blocks)


def train(
    model: Any,
    domain: Domain,
    steps: int,
    lr: float,
    sizes: Sizes,
    seed: int,
    title: str,
    console: Console,
    *,
    records: Path | None = None,
) -> list[float]:
    """Train for `steps`; returns the losses. The same optimizer settings for every model.

    Args:
        records: Directory for the records of a living model's run.
    """
    settings: dict[str, Any] = {"lr": lr, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizer: Optimizer
    if isinstance(model, LivingMoeForCausalLM):
        optimizer = LivingAdamW(model, **settings)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)
    scheduler = OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.1)
    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, note="")

        def follow(trainer: LivingTrainer, step: StepRecord) -> None:
            losses.append(step.loss)
            experts = f", experts {'/'.join(map(str, step.experts))}" if step.experts else ""
            progress.update(task, advance=1, note=f"loss {step.loss:.3f}{experts}")

        hooks: list[Hook] = [follow]
        if records is not None:
            recorder = Recorder(records, model, max_steps=steps, every=10)
            hooks += [recorder, JsonLog(records / LOG_NAME)]
        data = BlockLoader(domain.train, sizes.batch, seed=seed)
        LivingTrainer(model, data, optimizer, scheduler, max_steps=steps, max_grad_norm=1.0, hooks=hooks).run()
        if records is not None:
            recorder.close()
    return losses


class JumpMeter:
    """Measures what events do to the loss: stands in for `model.decide_events` while a model trains."""

    def __init__(self, model: LivingMoeForCausalLM, batch: Tensor):
        self.model = model
        self.batch = batch
        self.jumps: list[Jump] = []
        self.seconds = 0.0
        self._decide: Callable[..., list[LifecycleEvent]] = model.decide_events
        self._first = model.steps_lived
        model.decide_events = self  # type: ignore[method-assign]

    def stop(self) -> None:
        del self.model.decide_events

    def __call__(self, optimizer: Optimizer | None = None) -> list[LifecycleEvent]:
        decides = self.model.steps_lived % self.model.config.lifecycle.interval == 0
        before = self._loss() if decides else 0.0
        events = self._decide(optimizer)
        if events:
            self.jumps.append(Jump(self.model.steps_lived - self._first, len(events), before, self._loss()))
        return events

    @torch.no_grad()
    def _loss(self) -> float:
        started = time.perf_counter()
        with in_eval_mode(self.model):
            loss = float(self.model(input_ids=self.batch, labels=self.batch).loss)
        self.seconds += time.perf_counter() - started
        return loss

    def report(self, losses: Sequence[float]) -> str:
        """One sentence on the events of a run, from its training losses."""
        if not self.jumps:
            return "No event happened."
        total = sum(jump.events for jump in self.jumps)
        worst = max(jump.after / jump.before for jump in self.jumps)
        around = [
            (sum(losses[jump.step : jump.step + AROUND]) / AROUND)
            / (sum(losses[jump.step - AROUND : jump.step]) / AROUND)
            for jump in self.jumps
            if AROUND <= jump.step <= len(losses) - AROUND
        ]
        after = f"{max(around):.4f}" if around else "not measured (too few steps)"
        return (
            f"{total} events at {len(self.jumps)} steps. Loss on a fixed batch right after / right before: at most "
            f"{worst:.6f}. Mean training loss of the {AROUND} steps after / before: at most {after}."
        )


def results_table(rows: dict[str, Result], domains: tuple[Domain, Domain]) -> Table:
    table = Table(title="Held-out loss in nats (perplexity)")
    table.add_column("")
    for row in rows.values():
        table.add_column(row.name, justify="right")

    def add(label: str, show: Callable[[Result], str]) -> None:
        table.add_row(label, *(show(row) for row in rows.values()))

    def scored(evaluation: Evaluation) -> str:
        return f"{evaluation.loss:.3f} ({evaluation.perplexity:.1f})"

    first, second = (domain.name for domain in domains)
    add(f"{first}, before", lambda row: scored(row.first_before))
    add(f"{first}, after", lambda row: scored(row.first_after))
    add(f"{first}, forgotten", lambda row: f"{row.forgotten:+.3f}")
    add(f"{second}, before", lambda row: scored(row.second_before))
    add(f"{second}, after", lambda row: scored(row.second_after))
    add("experts per layer", lambda row: ", ".join(map(str, row.experts)))
    add("parameters", lambda row: f"{row.total:,}")
    add("trainable parameters", lambda row: f"{row.trainable:,}")
    add("seconds", lambda row: f"{row.seconds:.0f}")
    return table


def record(living: LivingMoeForCausalLM, domains: tuple[Domain, Domain], row: Result) -> None:
    """Leave in the model what its card will say."""
    living.config.provenance |= {
        "datasets": [domain.name for domain in domains],
        "perplexities": [
            {"dataset": domains[0].name, "before": row.first_before.perplexity, "after": row.first_after.perplexity},
            {"dataset": domains[1].name, "before": row.second_before.perplexity, "after": row.second_after.perplexity},
        ],
    }


@torch.no_grad()
def check_reload(
    living: LivingMoeForCausalLM,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerFast,
    domains: tuple[Domain, Domain],
    console: Console,
) -> None:
    """Load what was saved, compare logits, and let it write."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path)
    living.eval()
    prompt = domains[1].held_out[:1, :24]
    same = torch.equal(loaded(input_ids=prompt).logits, living(input_ids=prompt).logits)
    console.print(
        f"Saved and loaded through AutoModelForCausalLM: experts {loaded.expert_counts}, "
        f"{len(loaded.lineage)} lineage records, logits {'equal bit for bit' if same else 'DIFFERENT'}."
    )
    if not same:
        raise CheckpointError(f"the model loaded from {path} computes other logits than the one that was saved.")
    written = loaded.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=True, top_k=20, pad_token_id=0
    )
    console.print(f"It continues {tokenizer.decode(prompt[0])!r} with {tokenizer.decode(written[0, 24:])!r}")
