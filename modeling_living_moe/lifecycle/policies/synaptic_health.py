"""Selection by health: healthy experts that have too much to do may split, sick ones may die, weak and alike may merge.

The structural plasticity of the synaptic MoE (its prototypes, with thresholds that can be reached). Health h is a
product of four factors in [0, 1] (`health.py`). An expert must be eligible, then chance decides, with a probability per
decision of

    split    hazard * sigmoid(slope * (h - split_health))     load above `split_load` for `patience` decisions
    death    hazard * sigmoid(slope * (death_health - h))     h below `death_health` for `patience` decisions
    merge    hazard * sigmoid(slope * (merge_health - (h1 + h2) / 2))   both below `merge_health`, cosine of keys at
                                                              least `merge_cosine`, alike in slab and field

so whoever is at a threshold goes with half of `hazard`, and what is clear beyond it with most of that: h runs from 0 to
1, so with a slope of 12 each of them reaches over 0.7 of it for some h. Chance is a number drawn from
(seed, step, layer, kind, uids): the same on every rank, in a resumed run as in one that was not cut off, and with
nothing to save.

Load is measured as in the policy `load`, against a clade's uniform share, so that growth ends. Newborns are immune
until `min_age_steps`, and who had no token of its field since the last decision is not judged. As for any policy no
death and no merge displaces more than `death_load`; merges are measured on recent tokens first (`merging.py`), outputs
included, and siblings have to part before (`sibling_merge_bar_steps`). Works without synapses, whose factors are 1.

E alive experts, D length of a key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from living_moe.configuration.sections import LifecycleConfig
from living_moe.configuration.slabs import is_frozen
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.operations import Reason, seed_of
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.lifecycle.policies.alikeness import Fertile, with_split_of_alike
from living_moe.modeling_living_moe.lifecycle.policies.circumstances import Circumstances, lifetime
from living_moe.modeling_living_moe.lifecycle.policies.health import Health, health_of
from living_moe.modeling_living_moe.lifecycle.policies.merging import MergeWish, measured_merges
from living_moe.modeling_living_moe.population import Member

#: What a draw is for.
SPLIT, DEATH, MERGE = range(3)
#: Splits come before merges, merges before deaths; all that of a split is at least 1.
MERGE_URGENCY, DEATH_URGENCY = 0.5, 0.1
#: Merges tried per layer and decision, each with a run of the experts.
TRIED_PAIRS = 4


@torch.no_grad()
def propose_by_health(block: LivingMoeBlock, config: LifecycleConfig, now: Circumstances) -> list[Proposal]:
    """Proposals for one layer; advances its hysteresis counters."""
    population = block.population
    columns = ("age", "idle", "overloaded", "starved")
    tables = {slab: block.vitals.table(slab) for slab in population.alive}
    rows = {slab: {name: getattr(table, name).tolist() for name in columns} for slab, table in tables.items()}
    fields = {member.field for member in population.members}
    # What `load` is of the experts reached, times this, is of the clades.
    by_clade = {field: population.num_open(field) / population.reachable(field) for field in fields}
    proposals: list[Proposal] = []
    fertile: list[Fertile] = []
    mature: list[tuple[Member, Health]] = []
    for member, found in zip(population.members, health_of(block, config), strict=True):
        values = {name: rows[member.slab][name][member.row] for name in columns}
        if is_frozen(member.slab) or values["idle"] >= config.interval:
            continue
        longer = lifetime(block, member.slab, config.lifetime_exponent)
        judged = member.parent < 0 or values["age"] >= config.min_age_steps * longer
        load, health = found.load * by_clade[member.field], found.health
        overloaded = values["overloaded"] + 1 if judged and load > config.split_load else 0
        starved = values["starved"] + 1 if judged and health < config.death_health else 0
        for name, count in (("overloaded", overloaded), ("starved", starved)):
            if count != values[name]:
                getattr(tables[member.slab], name)[member.row] = count
        cost, patience, uids = block.experts.bytes_per_expert(member.slab), config.patience * longer, (member.uid,)
        if judged:
            fertile.append(Fertile(load, member.uid, cost, longer))
            mature.append((member, found))
        if overloaded >= patience and happens(block, config, now, SPLIT, uids, health - config.split_health):
            reason = Reason("health", round(health, 6), config.split_health, held=overloaded * config.interval)
            urgency = load / max(config.split_load, 1e-9)
            proposals.append(Proposal("split", block.layer, uids, reason, urgency, added_bytes=cost, lifetime=longer))
        elif starved >= patience and happens(block, config, now, DEATH, uids, config.death_health - health):
            reason = Reason("health", round(health, 6), config.death_health, held=starved * config.interval)
            urgency = DEATH_URGENCY * (1.0 - health / config.death_health)
            proposals.append(Proposal("death", block.layer, uids, reason, urgency, displaced=found.load))
    busy = {proposal.uids[0] for proposal in proposals}
    wishes = _wishes(block, config, now, [each for each in mature if each[0].uid not in busy])
    proposals += measured_merges(block, itertools.islice(wishes, TRIED_PAIRS), config, now)
    return with_split_of_alike(proposals, fertile, block, config)


def chance(config: LifecycleConfig, beyond: float) -> float:
    """Probability of an event per decision, `beyond` its threshold by so much health."""
    # The logistic function, by one that cannot overflow.
    return config.hazard * 0.5 * (1.0 + math.tanh(0.5 * config.health_slope * beyond))


def happens(
    block: LivingMoeBlock, config: LifecycleConfig, now: Circumstances, kind: int, uids: tuple[int, ...], beyond: float
) -> bool:
    """Whether chance lets an event happen at this step."""
    drawn = seed_of(config.seed, now.around.step, block.layer, kind, *uids) / 2**62
    return drawn < chance(config, beyond)


def _wishes(
    block: LivingMoeBlock, config: LifecycleConfig, now: Circumstances, mature: list[tuple[Member, Health]]
) -> Iterator[MergeWish]:
    """Weak experts with like keys that chance brings together, the most alike first."""
    weak = [(member, found.health) for member, found in mature if found.health < config.merge_health]
    if len(weak) < 2:
        return
    keys_ED = torch.stack([block.router.keys[member.slab][member.row].float() for member, _ in weak])
    keys_ED = F.normalize(keys_ED, dim=-1)
    cosine_EE = (keys_ED @ keys_ED.T).tolist()
    found = []
    for (one, (first, health)), (other, (second, other_health)) in itertools.combinations(enumerate(weak), 2):
        alike = (first.field, first.slab) == (second.field, second.slab)
        if not alike or cosine_EE[one][other] < config.merge_cosine:
            continue
        uids = min(first.uid, second.uid), max(first.uid, second.uid)
        beyond = config.merge_health - (health + other_health) / 2
        if happens(block, config, now, MERGE, uids, beyond):
            found.append((cosine_EE[one][other], uids, (first, second)))
    for cosine, _, members in sorted(found, key=lambda each: (-each[0], each[1])):
        urgency = MERGE_URGENCY * (1.0 + cosine) / 2.0
        yield MergeWish(members, "cosine of keys", cosine, config.merge_cosine, urgency)


__all__ = ["chance", "happens", "propose_by_health"]
