"""The training room: loop and script, Trainer callback, optimizer and its surgery, checkpoints, evaluation.

Public names are imported when first used: optimizer surgery alone must not bring accelerate and datasets along.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from living_moe.training import train
    from living_moe.training.callback import LivingMoeCallback
    from living_moe.training.loop import LivingTrainer
    from living_moe.training.optimizers import LivingAdamW

_HOMES = {
    "LivingAdamW": "living_moe.training.optimizers",
    "LivingMoeCallback": "living_moe.training.callback",
    "LivingTrainer": "living_moe.training.loop",
}

__all__ = ["LivingAdamW", "LivingMoeCallback", "LivingTrainer", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("living_moe.training.train")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
