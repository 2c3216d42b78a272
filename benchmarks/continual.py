"""Continual learning: domains in sequence at equal tokens, a living model beside what else one would do.

    python benchmarks/continual.py --profile small \
        --domains english=prose.txt python= shakespeare=plays.txt german_law=law.txt [--workers 2] [--save]

A small Mixtral learns the first domain from scratch; that base is the same for all arms of a seed. Each arm then learns
the others one after the other, every stage with the same blocks of text, steps and schedule, and no text comes back,
until in a last short stage the second domain returns. `NAME=` without a file is the source code of Python's standard
library; without `--domains` there are two, its documentation and its source code.

Arms. *dense* is a Mixtral with one expert as wide as all experts of a token together: equal active parameters. All
others start from the same sparse base:

- *sequential* fine-tunes everything;
- *low learning rate* does at a tenth of the rate (after the first stage every weight is old);
- *EWC* is online EWC (Schwarz et al. 2018, arXiv:1805.10370): a quadratic pull to the weights at the end of the last
  stage, weighted by the summed diagonal of the empirical Fisher information, mean squared gradient of a block's loss;
  its strength was chosen by hand (see `EWC_STRENGTH`);
- *5 % replay* replaces a twentieth of the rows by blocks that the base and earlier stages have trained on;
- *LoRA* freezes the base and trains one adapter through all stages (peft), on attention and head, of the ranks that
  the living model's deltas have;
- *frozen + 1 expert per task* freezes all there is; each stage adds an expert and its router row to every layer, copies
  of the layer's most used one, and trains those alone;
- *full expansion* copies the base for every domain and is told at test time which domain it is asked about;
- *joint* learns from scratch, on the blocks of all stages shuffled;
- *living* is `convert(base, preset="frozen-graft")`, calibrated on the first domain. It reads the stream without labels
  of domains and with one optimizer; its ablations leave out the deltas (both, those on attention, that on the head),
  or the births; one lets newborns split for load inside their fields as the preset `grow` does.

Metrics, in nats per token of held-out text. R[i][j] is the loss on domain j after stage i, T the last stage, b[j] the
loss of the untrained model.

- *final average*: mean over j of R[T][j].
- *forgetting*: mean over j < T of R[T][j] - min over j <= i < T of R[i][j] (Chaudhry et al. 2018, arXiv:1801.10112).
  Lower is better.
- *backward transfer*: mean over j < T of R[j][j] - R[T][j] (Lopez-Paz & Ranzato 2017, arXiv:1706.08840, whose sign it
  has: what later domains gave to earlier ones is positive, what they took negative).
- *forward transfer*: mean over j > 0 of b[j] - R[j-1][j], what a domain gains from those before it. Higher is better.
- *when learned*: mean over j > 0 of R[j][j]; a method that forgets nothing because it learns nothing shows here.
- *mixed documents*: loss on the later half of blocks whose earlier half is of another domain, mean over ordered pairs.
  The first token of the later half, which nothing announces, is not counted. *switching*: that loss less the loss on
  the same tokens after their own text.
- *parameters added* to the base's. Spare slots do not count.
- *routing drift*: share of the first domain's held-out tokens whose set of experts, by identity, at the end is not what
  it was after the first stage, mean over layers.

Cells are kept in benchmarks/results/continual.jsonl and not run again; bases in the system's folder for temporary
files.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cell, Result, machine, markdown_table, mean_and_deviation, run_cells
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from living_moe import LivingMoeForCausalLM, convert
from living_moe.quickstart import Domain, Sizes, encode, make_domain, train_tokenizer
from living_moe.records import parameter_counts
from living_moe.texts import documentation, read_text, source_code
from living_moe.training.data import BlockLoader
from living_moe.training.evaluation import evaluate_blocks, in_eval_mode
from living_moe.training.loop import LivingTrainer
from living_moe.training.malloc import tune_malloc
from living_moe.training.optimizers import LivingAdamW

RESULTS = Path(__file__).parent / "results"
TOP_K = 2
OPTIMIZER: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.9, 0.95)}
LOW_RATE = 0.1
REPLAY_SHARE = 0.05
#: The lower final average of 1e4 and 1e6 (5.46, 5.52) in stages of 60 steps, one seed, four domains.
EWC_STRENGTH = 1e4
LORA_RANK, LORA_HEAD_RANK = 64, 128
#: A field is in use when this share of the held-out tokens of some domain is in it.
IN_USE = 0.01

#: Sections of each living arm, on top of the preset's.
LIVING: dict[str, dict[str, dict[str, Any]]] = {
    "living": {},
    "living, no deltas": {"receptive_field": {"attention_rank": 0, "head_rank": 0}},
    "living, no attention deltas": {"receptive_field": {"attention_rank": 0}},
    "living, no head delta": {"receptive_field": {"head_rank": 0}},
    "living, no births": {"lifecycle": {"enabled": False}},
    "living, splits in fields": {"lifecycle": {"split_load": 1.6}},
}


@dataclass(frozen=True)
class Profile:
    """Scale of a run. `sizes.finetune_steps` are the steps of each stage after the first.

    Attributes:
        return_steps: Steps of the last stage, in which the second domain returns.
        mixed_blocks: Blocks per ordered pair of domains.
        fisher_blocks: Blocks a stage's Fisher information is estimated from.
        seeds: Of weights, data and lifecycle.
        orders: Numbers of orders, see `arrangement`.
    """

    sizes: Sizes
    return_steps: int
    mixed_blocks: int
    fisher_blocks: int
    seeds: tuple[int, ...]
    orders: tuple[int, ...]


_SMALL = Sizes(vocabulary=2048, pretrain_steps=300, finetune_steps=130, eval_blocks=96)
PROFILES = {
    "smoke": Profile(
        replace(
            _SMALL, characters=200_000, vocabulary=512, hidden=32, layers=2, pretrain_steps=8, finetune_steps=8,
            eval_blocks=8,
        ),
        return_steps=6, mixed_blocks=4, fisher_blocks=4, seeds=(0,), orders=(0,),
    ),
    "small": Profile(_SMALL, return_steps=30, mixed_blocks=16, fisher_blocks=128, seeds=(0, 1), orders=(0,)),
    "full": Profile(
        replace(_SMALL, characters=4_000_000, pretrain_steps=1000, finetune_steps=500, eval_blocks=192),
        return_steps=60, mixed_blocks=48, fisher_blocks=512, seeds=(0, 1, 2, 3, 4), orders=(0, 1, 2),
    ),
}  # fmt: skip


# -- domains -----------------------------------------------------------------------------------------------------------


def read_source(file: str | None, limit: int) -> str:
    """Text of a domain: a file, "" for the interpreter's source code, None for its documentation."""
    if file is None:
        return documentation(limit)
    return read_text(Path(file), limit) if file else source_code(limit)


@lru_cache(maxsize=1)
def read_domains(sources: tuple[tuple[str, str | None], ...], profile: str) -> list[Domain]:
    """All domains as blocks, as given, under one tokenizer trained on all."""
    sizes = PROFILES[profile].sizes
    texts = [read_source(file, sizes.characters) for _, file in sources]
    tokenizer = train_tokenizer(texts, sizes.vocabulary)
    return [make_domain(name, encode(tokenizer, text), sizes) for (name, _), text in zip(sources, texts, strict=True)]


def arrangement(number: int, count: int) -> list[int]:
    """Order `number` of `count` domains: 0 as given, 1 reversed, then both from the second domain on, and so on."""
    order = [(start + number // 2) % count for start in range(count)]
    return order[::-1] if number % 2 else order


def spread(blocks: Tensor, count: int) -> Tensor:
    """At most `count` blocks, evenly spread."""
    if count >= len(blocks):
        return blocks
    return blocks[[number * len(blocks) // count for number in range(count)]]


@dataclass(frozen=True)
class Task:
    """What every arm of a cell is given: domains in their order, scale, seed."""

    profile: Profile
    domains: list[Domain]
    seed: int

    @classmethod
    def of(cls, cell: Cell) -> Task:
        sources = tuple((name, file) for name, file in cell["domains"])
        domains = read_domains(sources, cell["profile"])
        order = arrangement(cell["order"], len(domains))
        return cls(PROFILES[cell["profile"]], [domains[number] for number in order], cell["seed"])

    @property
    def sizes(self) -> Sizes:
        return self.profile.sizes

    def blocks(self, position: int, steps: int, *, again: bool = False) -> Tensor:
        """What a stage trains on, (steps * B, S), in order; the same for every arm.

        Args:
            position: Of the domain.
            again: The domain has been here before; another order, then.
        """
        train = self.domains[position].train
        generator = torch.Generator().manual_seed(1000 * self.seed + 2 * position + again)
        rows: list[Tensor] = []
        while sum(map(len, rows)) < steps * self.sizes.batch:
            rows.append(torch.randperm(len(train), generator=generator))
        return train[torch.cat(rows)[: steps * self.sizes.batch]]

    def held_out(self, position: int) -> Tensor:
        return spread(self.domains[position].held_out, self.sizes.eval_blocks)

    def steps(self, position: int) -> int:
        return self.sizes.finetune_steps if position else self.sizes.pretrain_steps


# -- models ------------------------------------------------------------------------------------------------------------


def new_model(kind: str, sizes: Sizes, seed: int) -> MixtralForCausalLM:
    """An untrained Mixtral; `kind` "dense" has one expert, as wide as the TOP_K of a token in "moe" together."""
    sparse = kind == "moe"
    config = MixtralConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden * (1 if sparse else TOP_K),
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=sizes.experts if sparse else 1,
        num_experts_per_tok=TOP_K if sparse else 1,
        max_position_embeddings=4 * sizes.block,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        router_aux_loss_coef=0.01,
    )
    torch.manual_seed(seed)
    return MixtralForCausalLM(config)


def train(model: nn.Module, optimizer: Optimizer, blocks: Tensor, lr: float, batch: int) -> None:
    """One stage: each block once, in order; the same schedule for every arm."""
    steps = len(blocks) // batch
    # The warm-up of OneCycleLR must take more than one step.
    scheduler = OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, pct_start=max(0.1, 2 / (steps + 1)))
    data = BlockLoader(blocks, batch, seed=None)
    LivingTrainer(model, data, optimizer, scheduler, max_steps=steps, max_grad_norm=1.0).run()


def adamw(parameters: Iterable[nn.Parameter], lr: float, **settings: Any) -> AdamW:
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return AdamW(trainable, lr=lr, fused=True, **{**OPTIMIZER, **settings})


def from_scratch(model: MixtralForCausalLM, blocks: Tensor, sizes: Sizes) -> None:
    """Train an untrained model, with Mixtral's load balancing, which is off unless router logits are output."""
    model.config.output_router_logits = model.config.num_local_experts > 1
    train(model, adamw(model.parameters(), sizes.pretrain_lr), blocks, sizes.pretrain_lr, sizes.batch)
    model.config.output_router_logits = False


def base_model(kind: str, task: Task) -> tuple[MixtralForCausalLM, list[float]]:
    """The model after the first stage, from the cache if it is there; and the untrained one's loss on every domain."""
    model = new_model(kind, task.sizes, task.seed)
    digest = hashlib.sha256(repr((kind, task.seed, asdict(task.sizes), OPTIMIZER, torch.__version__)).encode())
    for domain in task.domains:
        digest.update(domain.train.numpy().tobytes())
    folder = Path(tempfile.gettempdir()) / "living-moe-continual"
    file = folder / f"{digest.hexdigest()[:24]}.pt"
    if not file.exists():
        untrained = losses([model] * len(task.domains), task)
        from_scratch(model, task.blocks(0, task.steps(0)), task.sizes)
        folder.mkdir(exist_ok=True)
        partial_file = file.with_suffix(f".{os.getpid()}")
        torch.save({"state": model.state_dict(), "untrained": untrained}, partial_file)
        partial_file.replace(file)
        return model, untrained
    kept = torch.load(file, weights_only=True)
    model.load_state_dict(kept["state"])
    return model, kept["untrained"]


def number_of_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -- arms --------------------------------------------------------------------------------------------------------------


class Learner:
    """One arm: everything is fine-tuned. Others change what they must.

    Args:
        task: Domains, sizes, seed.
        base: The model after the first stage; the learner's own from here on.
        rate: Multiple of the learning rate.
    """

    def __init__(self, task: Task, base: MixtralForCausalLM, *, rate: float = 1.0):
        self.task = task
        self.batch = task.sizes.batch
        self.lr = rate * task.sizes.finetune_lr
        self.model: nn.Module = base

    def model_for(self, position: int) -> nn.Module:
        """Who is asked about a domain; only arms that are told which one look at `position`."""
        return self.model

    def learn(self, position: int, blocks: Tensor) -> None:
        train(self.model, adamw(self.model.parameters(), self.lr), blocks, self.lr, self.batch)

    def parameters(self) -> int:
        return number_of_parameters(self.model)


class Replay(Learner):
    """A share of the rows, at random places, are blocks that were trained on before."""

    def __init__(self, task: Task, base: MixtralForCausalLM):
        super().__init__(task, base)
        self.past = {0: task.blocks(0, task.steps(0))}

    def learn(self, position: int, blocks: Tensor) -> None:
        generator = torch.Generator().manual_seed(1000 * self.task.seed + 500 + position)
        old = torch.cat([past for earlier, past in self.past.items() if earlier != position])
        count = round(REPLAY_SHARE * len(blocks))
        places = torch.randperm(len(blocks), generator=generator)[:count]
        mixed = blocks.clone()
        mixed[places] = old[torch.randint(len(old), (count,), generator=generator)]
        super().learn(position, mixed)
        self.past[position] = blocks


class Penalised(nn.Module):
    """A model whose loss has a term for every weight that leaves its place."""

    def __init__(self, model: nn.Module, places: dict[str, Tensor], weights: dict[str, Tensor]):
        super().__init__()
        self.model = model
        self.places = places
        self.weights = weights

    def forward(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        pulls = [
            (self.weights[name] * (parameter - self.places[name]).square()).sum()
            for name, parameter in self.model.named_parameters()
        ]
        outputs.loss = outputs.loss + 0.5 * EWC_STRENGTH * torch.stack(pulls).sum()
        return outputs


class Ewc(Learner):
    def __init__(self, task: Task, base: MixtralForCausalLM):
        super().__init__(task, base)
        self.fisher = {name: torch.zeros_like(parameter) for name, parameter in base.named_parameters()}
        self.places: dict[str, Tensor] = {}
        self.consolidate(task.blocks(0, task.steps(0)))

    def consolidate(self, blocks: Tensor) -> None:
        chosen = spread(blocks, self.task.profile.fisher_blocks)
        with in_eval_mode(self.model):
            for block in chosen.split(1):
                self.model.zero_grad()
                self.model(input_ids=block, labels=block, use_cache=False).loss.backward()
                for name, parameter in self.model.named_parameters():
                    if parameter.grad is not None:
                        self.fisher[name] += parameter.grad.square() / len(chosen)
        self.model.zero_grad()
        self.places = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def learn(self, position: int, blocks: Tensor) -> None:
        pulled = Penalised(self.model, self.places, self.fisher)
        train(pulled, adamw(self.model.parameters(), self.lr), blocks, self.lr, self.batch)
        self.consolidate(blocks)


class Lora(Learner):
    def __init__(self, task: Task, base: MixtralForCausalLM):
        super().__init__(task, base)
        torch.manual_seed(task.seed)
        config = LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_RANK,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
            rank_pattern={"lm_head": LORA_HEAD_RANK},
            alpha_pattern={"lm_head": LORA_HEAD_RANK},
        )
        self.model = get_peft_model(base, config)


class OneExpert(Learner):
    """All is frozen but, in every layer, the row of an expert that the domain's stage has added."""

    def __init__(self, task: Task, base: MixtralForCausalLM):
        super().__init__(task, base)
        base.requires_grad_(False)
        self.rows: dict[int, int] = {}

    def learn(self, position: int, blocks: Tensor) -> None:
        if position not in self.rows:
            self.rows[position] = self.add_expert(blocks[: self.batch])
        rows = self.rows[position]
        parameters = self.row_parameters()
        for parameter in parameters:
            parameter.requires_grad_()
        handles = [parameter.register_hook(partial(only_row, rows)) for parameter in parameters]
        # A row without gradient stays what it is, bit for bit, unless it decays.
        train(self.model, adamw(parameters, self.lr, weight_decay=0.0), blocks, self.lr, self.batch)
        for handle in handles:
            handle.remove()

    def add_expert(self, blocks: Tensor) -> int:
        """Append a copy of the expert most used on `blocks` to every layer; returns its number."""
        used = [int(chosen.flatten().bincount().argmax()) for chosen in chosen_experts(self.model, blocks)]
        layers: Any = self.model.model.layers  # type: ignore[union-attr]
        for layer, parent in zip(layers, used, strict=True):
            experts, gate = layer.mlp.experts, layer.mlp.gate
            for module, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (gate, "weight")):
                rows = getattr(module, name).detach()
                setattr(module, name, nn.Parameter(torch.cat([rows, rows[parent : parent + 1]]), requires_grad=False))
            experts.num_experts = gate.num_experts = len(gate.weight)
        return len(layers[0].mlp.gate.weight) - 1

    def row_parameters(self) -> list[nn.Parameter]:
        layers: Any = self.model.model.layers  # type: ignore[union-attr]
        return [
            parameter
            for layer in layers
            for parameter in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight)
        ]


def only_row(row: int, grad: Tensor) -> Tensor:
    masked = torch.zeros_like(grad)
    masked[row] = grad[row]
    return masked


class Expansion(Learner):
    """A whole model per domain."""

    def __init__(self, task: Task, base: MixtralForCausalLM):
        super().__init__(task, base)
        self.models: dict[int, nn.Module] = {0: base}

    def model_for(self, position: int) -> nn.Module:
        return self.models.get(position, self.model)

    def learn(self, position: int, blocks: Tensor) -> None:
        if position not in self.models:
            self.models[position] = copy.deepcopy(self.model)
        model = self.models[position]
        train(model, adamw(model.parameters(), self.lr), blocks, self.lr, self.batch)

    def parameters(self) -> int:
        return sum(map(number_of_parameters, self.models.values()))


class Living(Learner):
    """The stream goes through one model with one optimizer; nobody tells it where domains begin."""

    def __init__(self, task: Task, base: MixtralForCausalLM, *, sections: dict[str, dict[str, Any]]):
        super().__init__(task, base)
        self.lr = task.sizes.living_lr
        lifecycle = {**task.sizes.lifecycle, "seed": task.seed, **sections.get("lifecycle", {})}
        overrides: dict[str, Any] = {**sections, "lifecycle": lifecycle}
        torch.manual_seed(task.seed)
        self.living = convert(
            base,
            preset="frozen-graft",
            calibration=task.domains[0].train,
            **overrides,
        )
        self.model = self.living
        self.optimizer: LivingAdamW | None = None

    def learn(self, position: int, blocks: Tensor) -> None:
        blocks = self.read_until_something_learns(blocks)
        if not len(blocks):
            return
        if self.optimizer is None:
            self.optimizer = LivingAdamW(self.living, lr=self.lr, **OPTIMIZER)
        train(self.living, self.optimizer, blocks, self.lr, self.batch)

    def read_until_something_learns(self, blocks: Tensor) -> Tensor:
        """Without deltas nothing takes gradients before the first birth: live without them; returns the blocks left."""
        self.living.train()
        while len(blocks) and not any(parameter.requires_grad for parameter in self.living.parameters()):
            with torch.no_grad():
                self.living(input_ids=blocks[: self.batch], use_cache=False)
            self.living.take_step_tokens()
            self.living.lifecycle_step()
            blocks = blocks[self.batch :]
        return blocks

    def parameters(self) -> int:
        return parameter_counts(self.living)["total"]


ARMS: dict[str, Callable[[Task, MixtralForCausalLM], Learner]] = {
    "dense, sequential": Learner,
    "moe, sequential": Learner,
    "moe, low learning rate": partial(Learner, rate=LOW_RATE),
    "moe, EWC": Ewc,
    "moe, 5 % replay": Replay,
    "moe, LoRA": Lora,
    "moe, frozen + 1 expert per task": OneExpert,
    "moe, full expansion": Expansion,
    "joint": Learner,
    **{name: partial(Living, sections=sections) for name, sections in LIVING.items()},
}


# -- measurements ------------------------------------------------------------------------------------------------------


def losses(models: Sequence[nn.Module], task: Task) -> list[float]:
    """Held-out loss on every domain, each of its own model."""
    return [
        evaluate_blocks(model, task.held_out(position), batch_size=task.sizes.batch).loss
        for position, model in enumerate(models)
    ]


@torch.no_grad()
def later_half_loss(model: nn.Module, blocks: Tensor, batch: int) -> float:
    """Loss on the later half of each block but for its first token."""
    half = blocks.shape[1] // 2
    sums = []
    with in_eval_mode(model):
        for ids in blocks.split(batch):
            logits = model(input_ids=ids, use_cache=False).logits[:, half:-1]
            sums.append(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, half + 1 :].flatten(), reduction="sum"))
    return float(torch.stack(sums).sum()) / blocks[:, half + 1 :].numel()


def mixed_documents(learner: Learner, task: Task) -> tuple[float, float]:
    """Loss after a switch inside the block, and what the switch costs, means over ordered pairs of domains."""
    chosen = [spread(domain.held_out, task.profile.mixed_blocks) for domain in task.domains]
    half, batch = task.sizes.block // 2, task.sizes.batch
    mixed, pure = [], []
    for position, blocks in enumerate(chosen):
        model = learner.model_for(position)
        for other, before in enumerate(chosen):
            if other != position:
                count = min(len(before), len(blocks))
                switching = torch.cat([before[:count, :half], blocks[:count, half:]], dim=1)
                mixed.append(later_half_loss(model, switching, batch))
                pure.append(later_half_loss(model, blocks[:count], batch))
    return statistics.fmean(mixed), statistics.fmean(mixed) - statistics.fmean(pure)


@torch.no_grad()
def chosen_experts(model: nn.Module, blocks: Tensor) -> list[Tensor]:
    """Per layer the experts of each token, (tokens, K), ascending: uids of a living model, rows of another."""
    living = model if isinstance(model, LivingMoeForCausalLM) else None
    routers: list[nn.Module]
    if living is not None:
        routers = [block.router for block in living.living_blocks]
    else:
        routers = [module for module in model.modules() if isinstance(module, MixtralTopKRouter)]
    kept: list[list[Tensor]] = [[] for _ in routers]

    def keep(into: list[Tensor], module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        into.append(output[2])

    handles = [router.register_forward_hook(partial(keep, into)) for router, into in zip(routers, kept, strict=True)]
    with in_eval_mode(model):
        for ids in blocks.split(16):
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    chosen = [torch.cat(rows) for rows in kept]
    if living is not None:
        chosen = [torch.tensor(living.expert_uids(layer))[index] for layer, index in enumerate(chosen)]
    return [index.sort(dim=-1).values for index in chosen]


def drift(before: list[Tensor], after: list[Tensor]) -> float:
    """Share of the tokens that go to other experts now, mean over layers."""
    changed = [(old != new).any(dim=-1).float().mean() for old, new in zip(before, after, strict=True)]
    return float(torch.stack(changed).mean())


@torch.no_grad()
def population(learner: Learner, task: Task) -> Result:
    """Of a living model: experts alive, fields in use, and the share of held-out tokens outside the root field."""
    if not isinstance(learner, Living):
        return {}
    fields = learner.living.model.fields
    assert fields is not None
    used: set[int] = set()
    result: Result = {"experts": float(sum(learner.living.expert_counts))}
    for position in range(len(task.domains)):
        index = fields(task.held_out(position)).index
        result[f"open/{position}"] = float((index > 0).float().mean())
        used |= {field for field in index.unique().tolist() if (index == field).float().mean() >= IN_USE}
    return result | {"fields": float(len(used - {0}))}


def summarise(matrix: list[list[float]], untrained: list[float]) -> Result:
    """The metrics of the module's docstring from R (T + 1, T + 1) and b (T + 1)."""
    last = len(matrix) - 1
    end = matrix[last]
    best = [min(matrix[stage][j] for stage in range(j, last)) for j in range(last)]
    return {
        "final": statistics.fmean(end),
        "forgetting": statistics.fmean(end[j] - best[j] for j in range(last)),
        "backward": statistics.fmean(matrix[j][j] - end[j] for j in range(last)),
        "forward": statistics.fmean(untrained[j] - matrix[j - 1][j] for j in range(1, last + 1)),
        "learned": statistics.fmean(matrix[j][j] for j in range(1, last + 1)),
    }


# -- cells -------------------------------------------------------------------------------------------------------------


def run_base(cell: Cell) -> Result:
    """Put a base in the cache, so that no two arms train it at a time."""
    tune_malloc()
    task = Task.of(cell)
    model, untrained = base_model(cell["base"], task)
    after = losses([model] * len(task.domains), task)
    return named("untrained", untrained) | named("R/0", after)


def run_arm(cell: Cell) -> Result:
    tune_malloc()
    task = Task.of(cell)
    if cell["arm"] == "joint":
        return run_joint(task)
    kind = "dense" if cell["arm"].startswith("dense") else "moe"
    base, untrained = base_model(kind, task)
    base_parameters = number_of_parameters(base)
    learner = ARMS[cell["arm"]](task, base)
    positions = range(len(task.domains))

    def measured() -> list[float]:
        return losses([learner.model_for(position) for position in positions], task)

    routing = chosen_experts(learner.model_for(0), task.held_out(0))
    matrix = [measured()]
    for position in positions[1:]:
        learner.learn(position, task.blocks(position, task.steps(position)))
        matrix.append(measured())
    result = summarise(matrix, untrained) | named("untrained", untrained)
    for stage, row in enumerate(matrix):
        result |= named(f"R/{stage}", row)
    result["mixed"], result["switching"] = mixed_documents(learner, task)
    result |= {"base_parameters": float(base_parameters), "added": float(learner.parameters() - base_parameters)}
    if kind == "moe":
        result["drift"] = drift(routing, chosen_experts(learner.model_for(0), task.held_out(0)))
    result |= population(learner, task)
    learner.learn(1, task.blocks(1, task.profile.return_steps, again=True))
    after = population(learner, task)
    return result | named("return", measured()) | {f"return_{name}": value for name, value in after.items()}


def run_joint(task: Task) -> Result:
    """The blocks of all stages, shuffled."""
    model = new_model("moe", task.sizes, task.seed)
    blocks = torch.cat([task.blocks(position, task.steps(position)) for position in range(len(task.domains))])
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(task.seed))
    from_scratch(model, blocks[order], task.sizes)
    end = losses([model] * len(task.domains), task)
    mixed, switching = mixed_documents(Learner(task, model), task)
    count = float(number_of_parameters(model))
    figures = {"final": statistics.fmean(end), "mixed": mixed, "switching": switching}
    return figures | named("R", end) | {"base_parameters": count, "added": 0.0}


def named(prefix: str, values: Iterable[float]) -> Result:
    return {f"{prefix}/{number}": value for number, value in enumerate(values)}


# -- tables ------------------------------------------------------------------------------------------------------------

Rows = list[tuple[Cell, Result]]


def by_arm(rows: Rows, arms: Iterable[str]) -> dict[str, list[Result]]:
    """Results of each of `arms` that was run, in their order."""
    found = {arm: [result for cell, result in rows if cell["arm"] == arm] for arm in arms}
    return {arm: results for arm, results in found.items() if results}


def shown(results: list[Result], figure: str | Callable[[Result], float], digits: int = 3) -> str:
    """Mean and deviation of a figure, a dash where an arm has none."""
    get = (lambda result: result[figure]) if isinstance(figure, str) else figure
    try:
        return mean_and_deviation([get(result) for result in results], digits)
    except KeyError:
        return "–"


def added(results: list[Result]) -> str:
    """ "0.52 M (13 %)", means."""
    millions = statistics.fmean(result["added"] for result in results) / 1e6
    share = statistics.fmean(result["added"] / result["base_parameters"] for result in results)
    return f"{millions:.2f} M ({share:.0%})"


def metrics_table(rows: Rows, arms: Iterable[str]) -> str:
    """One line per arm."""
    names = ("final", "forgetting", "backward", "forward", "learned", "mixed", "switching")
    lines = [
        [
            arm,
            *(shown(results, name) for name in names),
            added(results),
            shown(results, lambda result: 100 * result["drift"], 1),
            shown(results, "seconds", 0),
        ]
        for arm, results in by_arm(rows, arms).items()
    ]
    header = [
        "arm", "final average", "forgetting", "backward transfer", "forward transfer", "when learned",
        "mixed documents", "switching", "parameters added", "routing drift, %", "seconds",
    ]  # fmt: skip
    return markdown_table(header, lines)


def return_table(rows: Rows, arms: Iterable[str], last: int) -> str:
    """The second domain returns: what that teaches, what it costs, what grows. One line per arm."""

    def others(result: Result) -> float:
        """What the domains that are not back lose meanwhile."""
        kept = [position for position in range(last + 1) if position != 1]
        return statistics.fmean(result[f"return/{j}"] - result[f"R/{last}/{j}"] for j in kept)

    def open_elsewhere(result: Result) -> float:
        return 100 * statistics.fmean(result[f"return_open/{position}"] for position in range(1, last + 1))

    lines = [
        [
            arm,
            shown(results, "R/1/1"),
            shown(results, f"R/{last}/1"),
            shown(results, "return/1"),
            shown(results, others),
            shown(results, "experts", 1),
            shown(results, lambda result: result["return_experts"] - result["experts"], 1),
            shown(results, "fields", 1),
            shown(results, lambda result: result["return_fields"] - result["fields"], 1),
            shown(results, lambda result: 100 * result["return_open/0"], 1),
            shown(results, open_elsewhere, 1),
        ]
        for arm, results in by_arm(rows, arms).items()
        if "return/1" in results[0]
    ]
    header = [
        "arm", "when learned", "when it returns", "after its return", "others lose", "experts", "experts grown",
        "fields in use", "fields grown", "open on the first domain, %", "open on the others, %",
    ]  # fmt: skip
    return markdown_table(header, lines)


# -- command line ------------------------------------------------------------------------------------------------------


def parse_domain(value: str) -> tuple[str, str]:
    name, equals, file = value.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=FILE; NAME= is the interpreter's source code.")
    if file and not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {file}.")
    return name, str(Path(file).resolve()) if file else ""


def settings_digest(profile: Profile) -> str:
    """Tells results of other settings apart."""
    scale = {name: value for name, value in asdict(profile).items() if name not in ("seeds", "orders")}
    constants = [TOP_K, OPTIMIZER, LOW_RATE, REPLAY_SHARE, EWC_STRENGTH, LORA_RANK, LORA_HEAD_RANK, IN_USE]
    return hashlib.sha256(json.dumps([scale, constants], sort_keys=True).encode()).hexdigest()[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="small")
    parser.add_argument("--domains", type=parse_domain, nargs="+", metavar="NAME=FILE", help="two or more text files")
    parser.add_argument("--arms", choices=ARMS, nargs="+", metavar="ARM", default=list(ARMS), help="only these arms")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the profile's")
    parser.add_argument("--orders", type=int, nargs="+", help="0 as given, 1 reversed, 2 from the second on, ...")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/continual.md")
    options = parser.parse_args()
    profile = PROFILES[options.profile]
    sources = options.domains or [("documentation", None), ("source code", "")]
    names = [name for name, _ in sources]
    if len(names) < 2 or len(set(names)) < len(names):
        parser.error("--domains needs two or more, of different names.")
    seeds, orders = options.seeds or list(profile.seeds), options.orders or list(profile.orders)

    common = {
        "profile": options.profile,
        "settings": settings_digest(profile),
        "domains": [list(source) for source in sources],
    }
    lives = [{**common, "seed": seed, "order": order} for seed in seeds for order in orders]
    kinds = {"dense" if arm.startswith("dense") else "moe" for arm in options.arms if arm != "joint"}
    path = RESULTS / "continual.jsonl"
    bases = [{**life, "base": kind} for life in lives for kind in sorted(kinds)]
    run_cells(bases, run_base, path, workers=options.workers)
    # An arm of the living model is told apart by its own settings, so that a new arm leaves the others known.
    arms = [{"arm": arm} | ({"config": LIVING[arm]} if arm in LIVING else {}) for arm in ARMS if arm in options.arms]
    cells = [{**life, **arm} for life in lives for arm in arms]
    rows = run_cells(cells, run_arm, path, workers=options.workers)

    sizes, last = profile.sizes, len(sources) - 1
    shown_orders = "; ".join(" → ".join(names[number] for number in arrangement(order, len(names))) for order in orders)
    parts = [
        "# Continual learning",
        f"Profile {options.profile}: {shown_orders}. {sizes.pretrain_steps} steps of {sizes.batch} x {sizes.block} "
        f"tokens on the first domain, {sizes.finetune_steps} on each other, {profile.return_steps} when the second "
        f"returns. Seeds {', '.join(map(str, seeds))}; nats, mean ± standard deviation. {machine()}.",
        "## Arms",
        metrics_table(rows, [arm for arm in ARMS if arm not in LIVING or arm == "living"]),
        "## What of the living model is needed",
        metrics_table(rows, LIVING),
        "## The second domain returns",
        return_table(rows, ARMS, last),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text, flush=True)
    if options.save:
        (RESULTS / "continual.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
