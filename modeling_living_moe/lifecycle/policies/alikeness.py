"""A split where the experts of a layer have become alike: what a collapse of Φ asks of any policy.

A population of equal functions gains a different one: the most loaded of those that may split does, with mutation
(`lifecycle.noise_std`). One collapse is answered once, as the split changes what Φ is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.operations import Reason
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.phi import phi_collapsed


@dataclass(frozen=True)
class Fertile:
    """An expert that may split."""

    load: float
    uid: int
    added_bytes: int
    lifetime: float


def with_split_of_alike(
    proposals: list[Proposal], fertile: list[Fertile], block: LivingMoeBlock, config: LifecycleConfig
) -> list[Proposal]:
    """The proposals of a layer, and one more where its Φ is below `lifecycle.phi_trigger` of its running maximum."""
    if config.phi_trigger is None or not fertile:
        return proposals
    phi, peak = block.vitals.phi_level, block.vitals.phi_peak
    if not phi_collapsed(phi, peak, config.phi_trigger):
        return proposals
    chosen = max(fertile, key=lambda each: (each.load, -each.uid))
    split = Proposal(
        "split",
        block.layer,
        (chosen.uid,),
        Reason("phi", float(phi), config.phi_trigger * float(peak)),
        1.0,
        added_bytes=chosen.added_bytes,
        lifetime=chosen.lifetime,
    )
    return [proposal for proposal in proposals if proposal.uids != (chosen.uid,)] + [split]


__all__ = ["Fertile", "with_split_of_alike"]
