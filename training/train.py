"""Trains a living model from the command line.

    accelerate launch -m living_moe.training.train --model MODEL --data-files text.txt --output-dir run
    python -m living_moe.training.train --config run.yaml --lifecycle.interval 5
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m living_moe.training.train ...

The last form starts several processes on a machine without GPUs, where `accelerate launch --num_processes 2` alone
starts one and says nothing. The script says in how many processes it trains.

`--model` is a living checkpoint, or a source checkpoint that is grafted first. Text comes from the hub or from local
files; checkpoints resume as the same run. What was trained on and what was measured goes into the model's provenance,
which its card tells. `python -m living_moe.training.train --help` lists every argument with its unit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast, set_seed
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, get_scheduler
from transformers.utils import logging

from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.errors import ConfigurationError, LivingMoeError, TrainingError
from living_moe.modeling_living_moe import LivingMoeForCausalLM
from living_moe.training.arguments import LATEST, TrainArguments, parse_arguments
from living_moe.training.checkpointing import latest_checkpoint, load_model
from living_moe.training.data import BlockLoader, TokenBlocks, load_text, read_blocks, tokenize
from living_moe.training.evaluation import Evaluation, evaluate_blocks
from living_moe.training.grafting import graft
from living_moe.training.loop import LivingTrainer, StepRecord, living_accelerator
from living_moe.training.malloc import tune_malloc
from living_moe.training.observatory.recorder import Recorder
from living_moe.training.observatory.records import LOG_NAME
from living_moe.training.observatory.trackers import PROJECT, Trackers, tracker_names, tracker_options
from living_moe.training.optimizers import LivingAdamW
from living_moe.training.reporting import JsonLog, Progress, describe_events

FINAL = "final"
#: Self-sampled calibration text: sequences, and tokens of each.
SAMPLE_ROWS, SAMPLE_TOKENS = 64, 256


@dataclass
class Run:
    """What a finished run leaves.

    Attributes:
        model: In evaluation mode.
        output_dir: Holds `final/` (model and tokenizer), the run's records (see observatory/records.py), what was sent
            to TensorBoard, and checkpoints if asked for.
        losses: Training loss of each step of this process's part of the run, nats per token.
        evaluations: File -> before and after training; `before` is None if the run was resumed.
    """

    model: LivingMoeForCausalLM
    output_dir: Path
    losses: list[float]
    evaluations: dict[str, tuple[Evaluation | None, Evaluation]]


def train(arguments: TrainArguments) -> Run:
    """Run the script; every process calls it.

    Raises:
        LivingMoeError: With what was wrong, the value, and the remedy.
    """
    names = tracker_names(arguments.report_to)
    output_dir = Path(arguments.output_dir)
    accelerator = living_accelerator(
        gradient_accumulation=arguments.gradient_accumulation,
        mixed_precision=arguments.mixed_precision,
        log_with=names or None,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "tensorboard")),
    )
    say = say_on(accelerator)
    if arguments.tune_malloc and accelerator.device.type == "cpu" and not tune_malloc():
        say("the C library is not glibc: --tune-malloc has no effect here")
    set_seed(arguments.seed)
    resumed = resume_directory(arguments)

    model = build_model(arguments, resumed)
    tokenizer = build_tokenizer(arguments, resumed)
    require_fit(arguments, model, tokenizer)
    with accelerator.main_process_first():
        blocks, name = training_blocks(arguments, tokenizer)
        held_out = {file: blocks_of([file], arguments, tokenizer) for file in arguments.eval_data_files}
    data = BlockLoader(
        blocks,
        arguments.batch_size,
        seed=arguments.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    if arguments.gradient_checkpointing:
        # The newer name of the two; Transformers before it had the older only.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    place: nn.Module = model
    place.to(accelerator.device)
    if resumed is None:
        calibrate(model, arguments, tokenizer, accelerator, say)

    optimizer = build_optimizer(arguments, model)
    scheduler = get_scheduler(
        arguments.lr_scheduler,
        optimizer,
        num_warmup_steps=arguments.warmup_steps,
        num_training_steps=arguments.max_steps,
    )
    trainer = LivingTrainer(
        model,
        data,
        optimizer,
        scheduler,
        accelerator=accelerator,
        max_steps=arguments.max_steps,
        max_grad_norm=arguments.max_grad_norm,
    )
    # Up to here every process drew the same numbers; dropout is each one's own.
    set_seed(arguments.seed, device_specific=True)
    if resumed is not None:
        trainer.resume(resumed)
        say(f"resuming {resumed} at step {trainer.step}")

    def measure() -> dict[str, Evaluation]:
        return {
            file: evaluate_blocks(model, part, batch_size=arguments.batch_size, max_blocks=arguments.max_eval_blocks)
            for file, part in held_out.items()
        }

    if names:
        accelerator.init_trackers(PROJECT, init_kwargs=tracker_options(output_dir.resolve().name, trainer.step))
    main_process = accelerator.is_main_process
    trackers = Trackers(accelerator.trackers if names and main_process else [], model)
    log = JsonLog(output_dir / LOG_NAME, after=trainer.step, written=main_process, listeners=[trackers.entry])
    progress = Progress(arguments.max_steps, every=arguments.log_steps, shown=accelerator.is_main_process)
    losses: list[float] = []
    before = None
    if resumed is None:
        before = measure()
        record_training(model, name, before)
        for file, result in before.items():
            say(f"before training, {file}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")

    def evaluate_now(trainer: LivingTrainer, record: StepRecord) -> None:
        if not arguments.eval_steps or record.step % arguments.eval_steps or record.step == arguments.max_steps:
            return
        for file, result in measure().items():
            progress.say(f"step {record.step}, {file}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")
            log.write({"step": record.step, "evaluated": file, "eval_loss": result.loss})

    def save_now(trainer: LivingTrainer, record: StepRecord) -> None:
        if arguments.save_steps and record.step % arguments.save_steps == 0:
            trainer.save(output_dir / f"checkpoint-{record.step}", tokenizer=tokenizer, keep=arguments.keep_checkpoints)

    recorder = Recorder(
        output_dir,
        model,
        max_steps=arguments.max_steps,
        step=trainer.step,
        every=arguments.snapshot_steps,
        written=main_process,
        listeners=[trackers.snapshot],
    )
    trainer.hooks = [lambda _, record: losses.append(record.loss), progress, recorder, log, evaluate_now, save_now]
    say(
        f"training in {accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} on {name}: "
        f"{blocks.num_tokens:,} tokens in {len(blocks):,} blocks of {blocks.block_size}; experts {model.expert_counts}"
    )
    try:
        with quiet_saving():
            trainer.run()
        recorder.close()
    finally:
        progress.close()
        trackers.finish()

    after = measure()
    record_perplexities(model, after)
    model.eval()
    if accelerator.is_main_process:
        model.save_pretrained(output_dir / FINAL)
        tokenizer.save_pretrained(output_dir / FINAL)
        if arguments.push_to_hub:
            model.push_to_hub(arguments.push_to_hub)  # type: ignore[arg-type]
            tokenizer.push_to_hub(arguments.push_to_hub)
    accelerator.wait_for_everyone()
    evaluations = {file: (None if before is None else before[file], result) for file, result in after.items()}
    for line in summary(model, losses, evaluations, output_dir / FINAL):
        say(line)
    return Run(model, output_dir, losses, evaluations)


def say_on(accelerator: Accelerator) -> Callable[[str], None]:
    """Prints on the main process only."""

    def say(line: str) -> None:
        if accelerator.is_main_process:
            print(line, file=sys.stderr, flush=True)

    return say


@contextmanager
def quiet_saving() -> Iterator[None]:
    """Transformers shows a bar for every save; it would tear ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resume_directory(arguments: TrainArguments) -> Path | None:
    if arguments.resume_from is None:
        return None
    if arguments.resume_from == LATEST:
        return latest_checkpoint(arguments.output_dir)
    return Path(arguments.resume_from)


# -- what the run is made of -------------------------------------------------------------------------------------------


def build_model(arguments: TrainArguments, resumed: Path | None) -> LivingMoeForCausalLM:
    """The checkpoint resumed from, a living checkpoint, or a graft; with the sections the arguments change."""
    loading: dict[str, Any] = dict(arguments.sections)
    if arguments.experts_implementation is not None:
        loading["experts_implementation"] = arguments.experts_implementation
    if resumed is not None:
        return load_model(resumed, **loading)
    try:
        config = AutoConfig.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read a model config from {arguments.model}: {error}") from error
    if not isinstance(config, LivingMoeConfig):
        return graft(arguments.model, preset=arguments.preset or "frozen-graft", **loading)
    if arguments.preset is not None:
        raise ConfigurationError(
            f"preset is {arguments.preset!r} but {arguments.model} is a living checkpoint already; leave preset out, "
            f"and change single fields, e.g. --lifecycle.interval 5."
        )
    model: LivingMoeForCausalLM = LivingMoeForCausalLM.from_pretrained(arguments.model, **loading)
    return model


def build_tokenizer(arguments: TrainArguments, resumed: Path | None) -> PreTrainedTokenizerBase:
    source = arguments.tokenizer or (str(resumed) if resumed is not None else arguments.model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"cannot load a tokenizer from {source} ({reason}); name one with --tokenizer.") from error
    return tokenizer


def training_blocks(arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenBlocks, str]:
    """The training text in blocks, and what to call it."""
    if arguments.dataset is None:
        name = ", ".join(Path(file).name for file in arguments.data_files)
        return blocks_of(arguments.data_files, arguments, tokenizer, split=arguments.split), name
    rows = load_text(arguments.dataset, config=arguments.dataset_config, split=arguments.split)
    blocks = tokenize(
        rows,
        tokenizer,
        arguments.block_size,
        text_column=arguments.text_column,
        append_eos=arguments.append_eos,
    )
    return blocks, arguments.dataset


def blocks_of(
    files: Sequence[str], arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase, split: str = "train"
) -> TokenBlocks:
    """Local files in blocks."""
    return read_blocks(
        files,
        tokenizer,
        arguments.block_size,
        split=split,
        text_column=arguments.text_column,
        append_eos=arguments.append_eos,
    )


def require_fit(arguments: TrainArguments, model: LivingMoeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `TrainingError` if the tokenizer or the block size is too large for the model."""
    backbone = model.config.backbone_config
    if len(tokenizer) > backbone.vocab_size:
        raise TrainingError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {backbone.vocab_size} embeddings; use the "
            f"model's own tokenizer, or call model.resize_token_embeddings({len(tokenizer)}) and save it."
        )
    positions = getattr(backbone, "max_position_embeddings", None)
    if positions is not None and arguments.block_size > positions:
        raise TrainingError(
            f"block_size is {arguments.block_size} but the model was made for {positions} positions; lower it."
        )


def build_optimizer(arguments: TrainArguments, model: LivingMoeForCausalLM) -> Optimizer:
    """The optimizer of that name over the model's trainable parameters; norms and biases do not decay."""
    lr, decay = arguments.lr, arguments.weight_decay
    if arguments.optimizer == "living_adamw":
        return LivingAdamW(model, lr=lr, weight_decay=decay)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if arguments.optimizer == "sgd":
        return SGD(groups, lr=lr, momentum=0.9)
    if arguments.optimizer == "adafactor":
        return Adafactor(groups, lr=lr)
    return AdamW(groups, lr=lr, fused=True if arguments.optimizer == "adamw_fused" else None)


# -- calibration -------------------------------------------------------------------------------------------------------


def calibrate(
    model: LivingMoeForCausalLM,
    arguments: TrainArguments,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> None:
    """Show a model with receptive fields what it knew before: the text given, else text of its own making."""
    fields = model.model.fields
    if arguments.calibration_file is not None:
        with accelerator.main_process_first():
            blocks = blocks_of([arguments.calibration_file], arguments, tokenizer)
        model.calibrate(blocks.tokens(0, blocks.num_tokens))
        say(f"calibrated receptive fields on {arguments.calibration_file}: {blocks.num_tokens:,} tokens")
    elif fields is not None and not bool(fields.calibrated):
        ids = sample_text(model, accelerator)
        model.calibrate(ids)
        say(
            f"receptive fields need text of what the model knew before, and there is no --calibration-file: calibrated "
            f"on {ids.numel():,} tokens that the model itself wrote. Real text of the old domain protects it better."
        )


@torch.no_grad()
def sample_text(model: LivingMoeForCausalLM, accelerator: Accelerator) -> Tensor:
    """Text the model itself generates, int64 (rows, tokens), the same on every process."""
    backbone = model.config.backbone_config
    length = min(SAMPLE_TOKENS, backbone.max_position_embeddings - 1)
    start = backbone.bos_token_id
    shape = (SAMPLE_ROWS, 1)
    if start is None:
        prompt = torch.randint(backbone.vocab_size, shape, device=model.device)
    else:
        prompt = torch.full(shape, start, device=model.device)
    training = model.training
    ids = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,
        min_new_tokens=length,
        max_new_tokens=length,
        pad_token_id=backbone.pad_token_id if backbone.pad_token_id is not None else 0,
    )
    model.train(training)
    sampled: Tensor = broadcast(ids[:, 1:].contiguous())
    return sampled


# -- records -----------------------------------------------------------------------------------------------------------


def record_training(model: LivingMoeForCausalLM, dataset: str, before: dict[str, Evaluation]) -> None:
    """Note in the model's provenance what it is about to train on, and what it scores now."""
    provenance = model.config.provenance
    datasets = list(provenance.get("datasets", []))
    if dataset not in datasets:
        datasets.append(dataset)
    rows = list(provenance.get("perplexities", []))
    rows += [
        {"dataset": Path(file).name, "before": result.perplexity, "after": None} for file, result in before.items()
    ]
    model.config.provenance = {**provenance, "datasets": datasets, "perplexities": rows}


def record_perplexities(model: LivingMoeForCausalLM, after: dict[str, Evaluation]) -> None:
    """Fill in what the run's rows, the last ones of their names, score after training."""
    rows = [dict(row) for row in model.config.provenance.get("perplexities", [])]
    for file, result in after.items():
        mine = [row for row in rows if row["dataset"] == Path(file).name]
        if not mine:
            mine = [{"dataset": Path(file).name, "before": None}]
            rows += mine
        mine[-1]["after"] = result.perplexity
    model.config.provenance = {**model.config.provenance, "perplexities": rows}


def summary(
    model: LivingMoeForCausalLM,
    losses: Sequence[float],
    evaluations: dict[str, tuple[Evaluation | None, Evaluation]],
    directory: Path,
) -> list[str]:
    """The lines a run ends with."""
    lines = []
    if losses:
        last = losses[-min(20, len(losses)) :]
        lines.append(f"trained {len(losses)} steps; mean loss of the last {len(last)}: {sum(last) / len(last):.4f}")
    for file, (before, after) in evaluations.items():
        was = "" if before is None else f"{before.perplexity:.2f} -> "
        lines.append(f"perplexity on {file}: {was}{after.perplexity:.2f}")
    lines.append(f"experts per layer: {model.expert_counts}; events: {describe_events(list(model.lineage)) or 'none'}")
    lines.append(f"model written to {directory}")
    return lines


def main(argv: Sequence[str] | None = None) -> Run:
    """Entry point: train with the arguments of the command line."""
    return train(parse_arguments(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    try:
        main()
    except LivingMoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
