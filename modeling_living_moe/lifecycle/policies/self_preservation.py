"""Self-preservation: who is being overwritten splits and protects itself; fragments merge; preservers thaw.

The rules of MicroExperts on top of the policy `load` (overload splits, starvation kills):

- **Preserve.** An expert is being cannibalised when its tokens' loss rises (the fast average is above the slow one by
  more than chance makes it) and others pull the mixture away from what it says (interference), or its gradients run
  against their own direction (conflict).
  It splits: the preserver keeps its weights and is frozen for a time in proportion to its load; the adapter takes the
  gradients. While the data shift (`Circumstances.vigilance`), smaller signs are enough.
- **Thaw.** A preserver whose time is over thaws once the data have settled.
- **Merge**, by one of three forces: *fragments*, weak experts that serve the same tokens; *tier gravity*, experts of
  any load that nearly always serve the same tokens; *memory*, the weakest where the budget is nearly used up. The first
  two lay hidden units beside each other in a wider tier where there is one. No merge may displace more than a death
  may: the change of the layer's output is measured on recent tokens first.

Nobody is born of nothing: every birth is a split.

E alive experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from living_moe.configuration.sections import LifecycleConfig
from living_moe.configuration.slabs import is_frozen, tier_of
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.affinity import coactivation
from living_moe.modeling_living_moe.lifecycle.operations import Reason
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.lifecycle.policies.circumstances import Circumstances, lifetime
from living_moe.modeling_living_moe.lifecycle.policies.load import propose_by_load
from living_moe.modeling_living_moe.lifecycle.policies.merging import MergeWish, measured_merges
from living_moe.modeling_living_moe.population import Member

#: A preserver stays frozen at most this many times `lifecycle.preserve_steps`, at least a quarter of it.
LONGEST, SHORTEST = 4.0, 0.25
#: Standard errors by which a loss must have risen.
CERTAINTY = 3.0
#: Preserving comes before growing, and both before consolidation.
PRESERVE_URGENCY, MERGE_URGENCY, THAW_URGENCY = 100.0, 0.1, 0.01
#: Pairs of a layer whose merge is tried on the sample at each decision, the most coactive or weakest first.
TRIED_PAIRS = 4
#: Fewest sampled tokens that say anything about who serves whom.
FEWEST_TOKENS = 16


@torch.no_grad()
def propose_self_preserving(block: LivingMoeBlock, config: LifecycleConfig, now: Circumstances) -> list[Proposal]:
    """Proposals for one layer; advances its hysteresis counters."""
    proposals = propose_by_load(block, config, now)
    proposals += _preserve(block, config, now)
    proposals += _thaw(block, now)
    wishes = itertools.islice(_wishes(block, config, now), TRIED_PAIRS)
    proposals += measured_merges(block, wishes, config, now)
    return proposals


def _preserve(block: LivingMoeBlock, config: LifecycleConfig, now: Circumstances) -> Iterator[Proposal]:
    for member in block.population.members:
        if is_frozen(member.slab):
            continue
        table, row = block.vitals.table(member.slab), member.row
        divergence = float(table.loss_fast[row] - table.loss_slow[row])
        interference, conflict = float(table.interference[row]), float(table.conflict_cos[row])
        # A fast average is one of few measurements, of few tokens each: it must rise by more than chance makes it.
        decay = block.vitals.fast_decay
        chance = CERTAINTY * float(table.loss_noise[row] * (1 - decay) / (1 + decay)) ** 0.5
        threshold = max(config.split_divergence, chance) / now.vigilance
        attacked = (
            interference > config.split_interference / now.vigilance or conflict < config.split_conflict / now.vigilance
        )
        longer = lifetime(block, member.slab, config.lifetime_exponent)
        born = member.parent >= 0
        mature = not born or int(table.age[row]) >= config.min_age_steps * longer
        idle = int(table.idle[row]) >= config.interval
        cannibalised = divergence > threshold and attacked and mature and not idle
        in_a_row = int(table.cannibalised[row]) + 1 if cannibalised else 0
        table.cannibalised[row] = in_a_row
        if in_a_row >= config.patience * longer:
            importance = min(max(float(table.load[row]), SHORTEST), LONGEST)
            yield Proposal(
                "preserve",
                block.layer,
                (member.uid,),
                Reason("divergence", round(divergence, 6), round(threshold, 6), held=in_a_row * config.interval),
                PRESERVE_URGENCY + divergence,
                added_bytes=block.experts.bytes_per_expert(member.slab),
                frozen_until=now.around.step + round(config.preserve_steps * importance),
                lifetime=longer,
            )


def _thaw(block: LivingMoeBlock, now: Circumstances) -> Iterator[Proposal]:
    if now.vigilance > 1.0:
        return
    for member in block.population.members:
        until = int(block.vitals.table(member.slab).thaw_at[member.row]) if is_frozen(member.slab) else 0
        if 0 < until <= now.around.step:
            reason = Reason("steps frozen", float(now.around.step), float(until))
            yield Proposal("thaw", block.layer, (member.uid,), reason, THAW_URGENCY)


# -- merges ------------------------------------------------------------------------------------------------------------


def _wish(members: tuple[Member, Member], force: str, value: float, threshold: float, tier_up: bool) -> MergeWish:
    """A merge that one of the forces asks for."""
    return MergeWish(members, force, value, threshold, MERGE_URGENCY * value / threshold, tier_up)


def _wishes(block: LivingMoeBlock, config: LifecycleConfig, now: Circumstances) -> Iterator[MergeWish]:
    choices_SK = now.choices(block)
    if choices_SK is None:
        return
    members = block.population.members
    tables = {slab: block.vitals.table(slab) for slab in block.population.alive}
    load = {m.uid: float(tables[m.slab].load[m.row]) for m in members}

    def may_merge(member: Member) -> bool:
        longer = lifetime(block, member.slab, config.lifetime_exponent)
        age, idle = (int(getattr(tables[member.slab], name)[member.row]) for name in ("age", "idle"))
        old = member.parent < 0 or age >= config.min_age_steps * longer
        return old and not is_frozen(member.slab) and idle < config.interval

    free = [member for member in members if may_merge(member)]
    for share, first, second in _coactive(choices_SK, members, free, config.merge_coactivation):
        room = tier_of(first.slab) < now.experts.max_tier
        if load[first.uid] < config.merge_load > load[second.uid]:
            yield _wish((first, second), "fragments", share, config.merge_coactivation, room)
        elif room and share >= config.gravity_coactivation:
            yield _wish((first, second), "tier gravity", share, config.gravity_coactivation, True)
    if now.memory >= config.memory_pressure:
        free.sort(key=lambda member: (load[member.uid], member.uid))
        for first, second in itertools.combinations(free[: TRIED_PAIRS + 1], 2):
            if first.field == second.field and first.slab == second.slab:
                yield _wish((first, second), "memory", now.memory, config.memory_pressure, False)


def _coactive(
    choices_SK: Tensor, members: list[Member], free: list[Member], least: float
) -> Iterator[tuple[float, Member, Member]]:
    """Pairs alike in slab and field of which at least that share of the tokens of one reach both, most first."""
    together_EE = coactivation(choices_SK, len(members))
    alone_E = together_EE.diagonal()
    # Whoever serves next to nothing of the sample shows nothing.
    fewer_EE = torch.minimum(alone_E, alone_E[:, None])
    share_EE = torch.where(fewer_EE >= FEWEST_TOKENS, together_EE / fewer_EE.clamp_min(1.0), 0.0).triu(diagonal=1)
    free_at = {member.index: member for member in free}
    found = []
    for one, other in (share_EE >= least).nonzero().tolist():
        first, second = free_at.get(one), free_at.get(other)
        if first is not None and second is not None and (first.field, first.slab) == (second.field, second.slab):
            found.append((float(share_EE[one, other]), first, second))
    yield from sorted(found, key=lambda each: (-each[0], each[1].uid, each[2].uid))
