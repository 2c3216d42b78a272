"""Split the overloaded, adapt the frozen that are in demand, remove the starved.

Loads are multiples of the uniform share. An expert must be over (or under) its threshold for `patience` decisions in a
row; newborns are immune until `min_age_steps`. A newborn halves its parent's load, so with `split_load` above twice
`death_load` a split never makes a candidate for death.
"""

from __future__ import annotations

import torch

from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.operations import Reason
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.population import ROOT_FIELD


@torch.no_grad()
def propose_by_load(block: LivingMoeBlock, config: LifecycleConfig) -> list[Proposal]:
    """Proposals for one layer; advances its hysteresis counters."""
    proposals: list[Proposal] = []
    rows: dict[str, dict[str, list[float]]] = {}
    columns = ("load", "foreign_load", "age", "overloaded", "starved")
    for slab in block.population.alive:
        table = block.vitals.table(slab)
        rows[slab] = {name: getattr(table, name).tolist() for name in columns}
    has_fields = block.num_fields > 0
    population = block.population
    # The uniform share of a field is over the experts its tokens can reach, not over those its newborns replace.
    reachable = {field: population.reachable(field) for field in {member.field for member in population.members}}
    for member in population.members:
        values = {name: rows[member.slab][name][member.row] for name in columns}
        values["load"] *= reachable[member.field] / len(population.members)
        # A frozen expert outside its field cannot learn, so any real demand there is unmet.
        adapts = has_fields and member.slab == "frozen" and member.field == ROOT_FIELD
        metric, threshold = ("foreign_load", config.adapt_load) if adapts else ("load", config.split_load)
        born = member.parent >= 0
        mature = not born or values["age"] >= config.min_age_steps
        frozen = member.slab == "frozen"
        over = values[metric] > threshold and (adapts or (mature and not frozen))
        under = values["load"] < config.death_load and mature and not frozen
        overloaded = values["overloaded"] + 1 if over else 0
        starved = values["starved"] + 1 if under else 0
        table = block.vitals.table(member.slab)
        table.overloaded[member.row], table.starved[member.row] = int(overloaded), int(starved)
        if overloaded >= config.patience:
            reason = Reason(metric, values[metric], threshold)
            urgency = values[metric] / max(threshold, 1e-9)
            proposals.append(Proposal("split", block.layer, (member.uid,), reason, urgency))
        elif starved >= config.patience:
            reason = Reason("load", values["load"], config.death_load)
            urgency = 1.0 - values["load"] / max(config.death_load, 1e-9)
            proposals.append(Proposal("death", block.layer, (member.uid,), reason, urgency))
    return proposals
