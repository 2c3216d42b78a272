"""From proposals to a plan: the events of one lifecycle step after global limits, alike on every rank.

Policies say what they would like; the planner keeps what the budgets, cooldowns and bounds allow, in one
deterministic order. Applies nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.lifecycle.operations import Reason


@dataclass(frozen=True)
class Proposal:
    """One event a policy would like.

    Attributes:
        urgency: Orders proposals, highest first, across all layers.
        displaced: Load whose tokens others must serve afterwards, in multiples of the uniform share (deaths).
        added_bytes: Of expert weights, by a split or a merge into a wider tier.
        tier_up: Whether a merge lays hidden units beside each other instead of averaging them.
        frozen_until: Of a "preserve": the optimizer step at which the preserver may thaw.
        lifetime: Multiple of the cooldown that the layer must have rested.
    """

    kind: str
    layer: int
    uids: tuple[int, ...]
    reason: Reason
    urgency: float
    displaced: float = 0.0
    added_bytes: int = 0
    tier_up: bool = False
    frozen_until: int = 0
    lifetime: float = 1.0


@dataclass(frozen=True)
class LayerState:
    """What the limits of one layer depend on.

    Attributes:
        births: uid -> (parent, steps since its birth) of the newborns alive.
    """

    experts: int
    top_k: int
    steps_since_event: int
    births: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def are_young_siblings(self, first: int, second: int, bar: int) -> bool:
        """Whether one was born of the other, or both of one parent, less than `bar` steps ago."""
        (parent, age), (other_parent, other_age) = (self.births.get(uid, (-1, bar)) for uid in (first, second))
        if parent == other_parent >= 0:
            return min(age, other_age) < bar
        return (parent == second and age < bar) or (other_parent == first and other_age < bar)


@dataclass
class Budget:
    """What one lifecycle step may still spend."""

    events: int
    bytes_left: int | None
    displaced: float
    experts: list[int] = field(default_factory=list)


def plan(
    proposals: Sequence[Proposal], layers: Sequence[LayerState], config: LifecycleConfig, bytes_left: int | None
) -> list[Proposal]:
    """Proposals that the limits allow, most urgent first.

    Args:
        proposals: Of all layers, in any order.
        layers: State of each living layer.
        bytes_left: What `experts.memory_budget_mib` still allows; None is no bound.
    """
    budget = Budget(config.max_events_per_step, bytes_left, config.death_load, [layer.experts for layer in layers])
    chosen: list[Proposal] = []
    touched: set[tuple[int, int]] = set()
    for proposal in sorted(proposals, key=lambda p: (-p.urgency, p.layer, p.uids, p.kind)):
        if len(chosen) >= budget.events:
            break
        state = layers[proposal.layer]
        if state.steps_since_event < config.cooldown_steps * proposal.lifetime:
            continue
        if any((proposal.layer, uid) in touched for uid in proposal.uids):
            continue
        if not _fits(proposal, state, config, budget):
            continue
        touched.update((proposal.layer, uid) for uid in proposal.uids)
        chosen.append(proposal)
    return chosen


def _fits(proposal: Proposal, state: LayerState, config: LifecycleConfig, budget: Budget) -> bool:
    """Whether bounds allow it; if so, charge the budget."""
    count = budget.experts[proposal.layer]
    if budget.bytes_left is not None and 0 < proposal.added_bytes > budget.bytes_left:
        return False
    if proposal.kind in ("split", "preserve"):
        if config.max_experts is not None and count + 1 > config.max_experts:
            return False
        budget.experts[proposal.layer] += 1
    elif proposal.kind in ("death", "merge"):
        bar = config.sibling_merge_bar_steps
        if any(state.are_young_siblings(*pair, bar) for pair in itertools.combinations(proposal.uids, 2)):
            return False
        lost = len(proposal.uids) - (proposal.kind == "merge")
        floor = config.min_experts if config.min_experts is not None else state.top_k + 1
        if count - lost < floor or proposal.displaced > budget.displaced:
            return False
        budget.displaced -= proposal.displaced
        budget.experts[proposal.layer] -= lost
    if budget.bytes_left is not None:
        budget.bytes_left -= proposal.added_bytes
    return True
