"""Split the overloaded, adapt the frozen that are in demand, remove the starved; split where all have become alike.

Loads are multiples of a uniform share: of the clades for overload, of the experts for starvation. An expert must be
over (or under) its threshold for `patience` decisions in a row; newborns are immune until `min_age_steps`, and so is
whoever's receptive field had no token since the last decision: that is no evidence. A newborn halves its parent's
load, so with `split_load` above twice `death_load` a split never makes a candidate for death.

Wider experts take longer to show what they are worth, and so do those with little traffic: minimum age and patience
grow with an expert's width (`lifecycle.lifetime_exponent`), and time in which it received less than its share counts
less towards the age at which it may split.

With `lifecycle.phi_trigger`, a layer whose Φ has collapsed splits its most loaded trainable expert too (alikeness.py).
"""

from __future__ import annotations

import torch

from living_moe.configuration.sections import LifecycleConfig
from living_moe.configuration.slabs import is_frozen
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.operations import Reason
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.lifecycle.policies.alikeness import Fertile, with_split_of_alike
from living_moe.modeling_living_moe.lifecycle.policies.circumstances import Circumstances, lifetime
from living_moe.modeling_living_moe.population import ROOT_FIELD


@torch.no_grad()
def propose_by_load(block: LivingMoeBlock, config: LifecycleConfig, now: Circumstances) -> list[Proposal]:
    """Proposals for one layer; advances its hysteresis counters."""
    proposals: list[Proposal] = []
    fertile: list[Fertile] = []
    rows: dict[str, dict[str, list[float]]] = {}
    columns = ("load", "foreign_load", "age", "idle", "overloaded", "starved")
    for slab in block.population.alive:
        table = block.vitals.table(slab)
        rows[slab] = {name: getattr(table, name).tolist() for name in columns}
    has_fields = block.has_fields
    population = block.population
    # Shares are of the experts that a field's tokens can reach, not of those its newborns replace. A split does not
    # move tokens between clades, so overload is measured against a clade's uniform share: that stays where it is while
    # the population grows, and growth ends when every member's part is small enough.
    fields = {member.field for member in population.members}
    reachable = {field: population.reachable(field) for field in fields}
    clades = {field: population.num_open(field) for field in fields}
    for member in population.members:
        values = {name: rows[member.slab][name][member.row] for name in columns}
        if values["idle"] >= config.interval:
            continue
        per_expert = values["load"] * reachable[member.field] / len(population.members)
        values["load"] *= clades[member.field] / len(population.members)
        frozen = is_frozen(member.slab)
        # A frozen expert outside its field cannot learn, so any real demand there is unmet.
        adapts = has_fields and frozen and member.field == ROOT_FIELD
        metric, threshold = ("foreign_load", config.adapt_load) if adapts else ("load", config.split_load)
        born = member.parent >= 0
        longer = lifetime(block, member.slab, config.lifetime_exponent)
        old = not born or values["age"] >= config.min_age_steps * longer
        mature = not born or values["age"] * min(1.0, values["load"]) >= config.min_age_steps * longer
        over = values[metric] > threshold and (adapts or (mature and not frozen))
        under = per_expert < config.death_load and old and not frozen
        overloaded = values["overloaded"] + 1 if over else 0
        starved = values["starved"] + 1 if under else 0
        rows[member.slab]["overloaded"][member.row], rows[member.slab]["starved"][member.row] = overloaded, starved
        cost = block.experts.bytes_per_expert(member.slab)
        if mature and not frozen:
            fertile.append(Fertile(values["load"], member.uid, cost, longer))
        if overloaded >= config.patience * longer:
            reason = Reason(metric, values[metric], threshold, held=int(overloaded) * config.interval)
            urgency = values[metric] / max(threshold, 1e-9)
            proposals.append(
                Proposal("split", block.layer, (member.uid,), reason, urgency, added_bytes=cost, lifetime=longer)
            )
        elif starved >= config.patience * longer:
            reason = Reason("load", per_expert, config.death_load, held=int(starved) * config.interval)
            urgency = 1.0 - per_expert / max(config.death_load, 1e-9)
            proposals.append(Proposal("death", block.layer, (member.uid,), reason, urgency, displaced=per_expert))
    for slab, values_of in rows.items():
        for name in ("overloaded", "starved"):
            column = getattr(block.vitals.table(slab), name)
            column.copy_(torch.tensor(values_of[name], dtype=column.dtype))
    return with_split_of_alike(proposals, fertile, block, config)
