"""Selection by vitality: the overloaded split, the starved die, and growth must pay.

The mitosis and apoptosis of the "living MoE" seed (preset `ouroboros`), by the rules its text states:

- **Split**: vitality (`vitality.py`) above `lifecycle.split_load` for `patience` decisions. The newborn is the parent
  mutated by `lifecycle.noise_std` of each tensor's RMS, and takes over part of its tokens.
- **Death**: vitality below `lifecycle.death_load` for `patience` decisions, whatever the load was before.
- **Cap**: never more than `lifecycle.max_experts`; and where `lifecycle.cap_improvement` is given, the present size is
  the cap while the loss (trend.py) improves by less. The contrary, growing where the loss stagnates, has no end: the
  best loss there is is a stagnation, and every newborn adds to the reason for the next. So a population earns its
  growth, and what a stagnation calls for is another kind of change. Without a trend (no loss is known, or too few
  steps of it) there is no such cap.

Both thresholds are multiples of the uniform share of the layer's experts, not of its clades as in the policy `load`:
here growth by competition is wanted, and ends by the caps. Newborns are immune until `min_age_steps`, and who had no
token of its field since the last decision is not judged. A split halves load and gradient share of the parent, so with
`split_load` above twice `death_load` it never makes a candidate for death. The planner's limits hold as for any policy:
those who die in one step had together no more vitality than `death_load`. (Load, of which one that starves may have
up to `death_load / (1 - vitality_gradient)`, would keep some of the starved alive for good.)

With `lifecycle.phi_trigger`, a layer whose Φ has collapsed splits too, cap or no cap: the cap asks whether more experts
pay, and a collapse says that those there are do not (alikeness.py).
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
from living_moe.modeling_living_moe.lifecycle.vitality import vitality_of

TINY = 1e-9


@torch.no_grad()
def propose_darwinian(block: LivingMoeBlock, config: LifecycleConfig, now: Circumstances) -> list[Proposal]:
    """Proposals for one layer; advances its hysteresis counters."""
    columns = ("age", "idle", "overloaded", "starved")
    tables = {slab: block.vitals.table(slab) for slab in block.population.alive}
    rows = {slab: {name: getattr(table, name).tolist() for name in columns} for slab, table in tables.items()}
    proposals: list[Proposal] = []
    fertile: list[Fertile] = []
    for member, shares in zip(block.population.members, vitality_of(block, config.vitality_gradient), strict=True):
        values = {name: rows[member.slab][name][member.row] for name in columns}
        if is_frozen(member.slab) or values["idle"] >= config.interval:
            continue
        longer = lifetime(block, member.slab, config.lifetime_exponent)
        judged = member.parent < 0 or values["age"] >= config.min_age_steps * longer
        over = judged and shares.vitality > config.split_load
        under = judged and shares.vitality < config.death_load
        overloaded = values["overloaded"] + 1 if over else 0
        starved = values["starved"] + 1 if under else 0
        for name, count in (("overloaded", overloaded), ("starved", starved)):
            if count != values[name]:
                getattr(tables[member.slab], name)[member.row] = count
        cost = block.experts.bytes_per_expert(member.slab)
        if judged:
            fertile.append(Fertile(shares.load, member.uid, cost, longer))
        patience, vitality, uids = config.patience * longer, shares.vitality, (member.uid,)
        if overloaded >= patience and _may_grow(config, now):
            reason = Reason("vitality", round(vitality, 6), config.split_load)
            urgency = vitality / max(config.split_load, TINY)
            proposals.append(Proposal("split", block.layer, uids, reason, urgency, added_bytes=cost, lifetime=longer))
        elif starved >= patience:
            reason = Reason("vitality", round(vitality, 6), config.death_load)
            urgency = 1.0 - vitality / max(config.death_load, TINY)
            proposals.append(Proposal("death", block.layer, uids, reason, urgency, displaced=vitality))
    return with_split_of_alike(proposals, fertile, block, config)


def _may_grow(config: LifecycleConfig, now: Circumstances) -> bool:
    """Whether the loss falls fast enough, as far as one knows."""
    wanted = config.cap_improvement
    return wanted is None or now.improvement is None or now.improvement >= wanted
