"""Short lives for tests: models that split and die within a dozen steps, data, optimizers, and how to compare runs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from factories import VOCAB, living_model
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from transformers import get_scheduler

from living_moe import LivingMoeForCausalLM
from living_moe.training.data import BlockLoader
from living_moe.training.loop import LivingTrainer, StepRecord
from living_moe.training.optimizers import LivingAdamW

#: Optimizer steps of runs in several processes.
STEPS = 14
#: A lifecycle that acts every other step.
BUSY = dict(
    interval=2, warmup_steps=2, cooldown_steps=0, min_age_steps=3, patience=2, split_load=1.3, death_load=0.55,
    max_events_per_step=2, max_experts=14, noise_std=0.05, adapt_load=0.1,
)  # fmt: skip


def busy_model(
    preset: str = "grow",
    *,
    lifecycle: dict[str, Any] | None = None,
    experts: dict[str, Any] | None = None,
    **overrides: Any,
) -> LivingMoeForCausalLM:
    """A tiny living Mixtral with dropout and jitter, so that a wrong random state shows."""
    overrides = {"attention_dropout": 0.1, "router_jitter_noise": 0.05, **overrides}
    sections = {"lifecycle": {**BUSY, **(lifecycle or {})}, "experts": experts or {}}
    return living_model("mixtral", preset, sections=sections, **overrides)


def calm_model(preset: str = "grow") -> LivingMoeForCausalLM:
    """The same without random numbers in the forward pass, so that many processes can be compared with one.

    The preset "ternary" is "grow" with ternary experts.
    """
    experts = {"ternary_tiers": [0]} if preset == "ternary" else None
    preset = "grow" if preset == "ternary" else preset
    return busy_model(preset, experts=experts, attention_dropout=0.0, router_jitter_noise=0.0)


def escaping_model() -> LivingMoeForCausalLM:
    """A calm model without a lifecycle whose first layer goes to another space at step 4 and begins to return at 8."""
    model = living_model(
        "mixtral",
        sections={
            "lifecycle": {"enabled": False},
            "vitals": {"phi_every": 2, "grad_norm_every": 1, "phi_tokens": 64},
            "escape": {"space": "poincare", "window": 2, "patience": 1, "loss_tolerance": 0.9, "grad_tolerance": 9.0,
                       "max_steps": 4, "leave_steps": 3},
        },
    )  # fmt: skip
    model.living_block(0).vitals.phi_record.fill_(10.0)
    model.living_block(0).vitals.phi_count.fill_(5)
    return model


def blocks(number: int = 48, length: int = 16, seed: int = 5) -> Tensor:
    """Token blocks, (number, length), of a skewed distribution: routers have something to prefer."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, VOCAB - 2, dtype=torch.float32).pow(1.5)
    return 3 + torch.multinomial(weights, number * length, replacement=True, generator=generator).view(number, length)


OPTIMIZERS = {
    "living_adamw": lambda model: LivingAdamW(model, lr=1e-2),
    "adamw": lambda model: AdamW(trainable(model), lr=1e-2),
    "adamw_fused": lambda model: AdamW(trainable(model), lr=1e-2, fused=True),
    "sgd": lambda model: SGD(trainable(model), lr=1e-1, momentum=0.9),
    "adafactor": lambda model: Adafactor(trainable(model), lr=1e-2),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build(model: LivingMoeForCausalLM, *, optimizer: str = "living_adamw", max_steps: int = 16, **kwargs: Any) -> Any:
    """A trainer whose records pile up in `trainer.records`."""
    stepper = OPTIMIZERS[optimizer](model)
    data = kwargs.pop("data", None) or BlockLoader(blocks(), 4, seed=3)
    scheduler = get_scheduler("cosine", stepper, num_warmup_steps=2, num_training_steps=max_steps)
    records: list[StepRecord] = []
    hooks = [lambda trainer, record: records.append(record), *kwargs.pop("hooks", [])]
    trainer: Any = LivingTrainer(model, data, stepper, scheduler, max_steps=max_steps, hooks=hooks, **kwargs)
    trainer.records = records
    return trainer


def life(model: LivingMoeForCausalLM, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Everything a run has made of a model and an optimizer, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Any] = {f"model/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for group in () if optimizer is None else optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{names[id(parameter)]}/{key}"] = copy.deepcopy(value)
    found["order"] = [] if optimizer is None else [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    found["lineage"] = list(model.lineage)
    return found


def signals(model: Any) -> list[dict[str, list[float]]]:
    """What a model's vitals say beyond load, layer by layer."""
    names = ("interference", "loss_fast", "loss_slow", "conflict_cos", "conflict_magnitude", "grad_norm")
    return [
        {name: model.vitals(layer)[name].tolist() for name in names}
        | {name: [float(value)] for name, value in model.routing(layer).items()}
        for layer in range(len(model.expert_counts))
    ]


def assert_same_life(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def kinds(records: list[StepRecord]) -> list[str]:
    return [event.kind for record in records for event in record.events]
