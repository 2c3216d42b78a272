"""The merges a layer would bear: drafted, and measured on recent tokens before anybody asks for them.

E alive experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from living_moe.configuration.errors import PopulationError
from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle import operations
from living_moe.modeling_living_moe.lifecycle.affinity import displacement
from living_moe.modeling_living_moe.lifecycle.operations import Reason
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.lifecycle.policies.circumstances import Circumstances, lifetime
from living_moe.modeling_living_moe.population import Member


@dataclass(frozen=True)
class MergeWish:
    """Two experts that a policy would merge, and what for: a measure, its value, the threshold it is above."""

    members: tuple[Member, Member]
    metric: str
    value: float
    threshold: float
    urgency: float
    tier_up: bool = False


def measured_merges(
    block: LivingMoeBlock, wishes: Iterable[MergeWish], config: LifecycleConfig, now: Circumstances
) -> Iterator[Proposal]:
    """Proposals of those wishes that displace no more than a death may (`lifecycle.death_load`)."""
    wishes = list(wishes)
    # The tokens themselves are gathered only where a merge is in sight, by every rank alike.
    sample = now.sample(block) if wishes else None
    if sample is None:
        return
    for wish in wishes:
        uids = [member.uid for member in wish.members]
        reason = Reason(wish.metric, round(wish.value, 6), wish.threshold)
        try:
            draft, event = operations.merge(block, uids, now.around, reason, tier_up=wish.tier_up)
        except PopulationError:
            # A bound that the operation knows: no room, no tier, too few left.
            continue
        displaced = displacement(block, sample, draft, event.children[0], uids)
        if displaced > config.death_load:
            continue
        slabs = [member.slab for member in wish.members]
        added = block.experts.bytes_per_expert(draft.find(event.children[0])[0])
        added -= sum(map(block.experts.bytes_per_expert, slabs))
        yield Proposal(
            "merge",
            block.layer,
            tuple(uids),
            reason,
            wish.urgency,
            displaced=displaced,
            added_bytes=added,
            tier_up=wish.tier_up,
            lifetime=max(lifetime(block, slab, config.lifetime_exponent) for slab in slabs),
        )


__all__ = ["MergeWish", "measured_merges"]
