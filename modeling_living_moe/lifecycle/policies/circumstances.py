"""What a policy needs to know beyond its layer's tables. The same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from living_moe.configuration.sections import ExpertsConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.vitals import Sample

if TYPE_CHECKING:
    from living_moe.modeling_living_moe.lifecycle.operations import Surroundings


@dataclass(frozen=True)
class Circumstances:
    """Of one decision.

    Attributes:
        around: What operations on the layer would be told: step, budgets.
        vigilance: At least 1; what a policy divides its thresholds for splits by. Above 1 while the data shift.
        memory: Share of `experts.memory_budget_mib` in use; 0 without a budget.
        choices: Which experts a layer's sample of recent tokens reached, of all ranks, int64 (S, K), negative where a
            place was not used; None if it has none. A collective, as `sample` is.
        sample: The whole sample.
        improvement: Relative fall of the average loss in 1,000 steps (trend.py); None: not known, or not asked for.
    """

    around: Surroundings
    vigilance: float = 1.0
    memory: float = 0.0
    choices: Callable[[LivingMoeBlock], Tensor | None] = lambda block: None
    improvement: float | None = None
    sample: Callable[[LivingMoeBlock], Sample | None] = lambda block: None

    @property
    def experts(self) -> ExpertsConfig:
        return self.around.experts


def lifetime(block: LivingMoeBlock, slab: str, exponent: float) -> float:
    """How much longer than experts of tier 0 those of a slab take to be judged: their width's ratio ** `exponent`."""
    return float((block.experts.width(slab) / block.experts.intermediate_size) ** exponent)


__all__ = ["Circumstances", "lifetime"]
