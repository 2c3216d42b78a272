"""Vitality: how much an expert is used and how much there is to learn for it, in multiples of the uniform share.

    vitality_i = (1 - g) * load_i + g * |gradient_i| / mean |gradient|

with g = `lifecycle.vitality_gradient`. Both parts are moving averages of what was measured (vitals.py), and both
average 1 over the experts they are shares of, so 1 is an expert like any other, whatever the number of experts, tokens
or the scale of the loss; of E experts of which a token takes K, one can have up to (1 - g) E / K + g E. Thresholds in
these units can be reached in any layer with some more experts than places. (As the seed of the idea has it, mitosis and
apoptosis go by such a score; a threshold on raw norms or counts fires always or never.)

Frozen experts take no gradients, and before the first reading nobody has any: then vitality is the load. Reads vitals,
changes nothing.

E alive experts in slot order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from living_moe.configuration.slabs import is_frozen
from living_moe.modeling_living_moe.block import LivingMoeBlock


@dataclass(frozen=True)
class Vitality:
    """Of one expert, in multiples of the uniform share. `gradient` is None where there is none to speak of."""

    load: float
    gradient: float | None
    vitality: float


def vitality_of(block: LivingMoeBlock, gradient_weight: float) -> list[Vitality]:
    """Vitality of each expert (E,). Waits for the device.

    Sums are exact (`math.fsum`), so the order of the experts does not matter to the last bit.

    Args:
        gradient_weight: Share of the gradient signal, g.
    """
    population = block.population
    tables = {slab: block.vitals.table(slab) for slab in population.alive}
    loads = {slab: table.load.tolist() for slab, table in tables.items()}
    norms = {slab: table.grad_norm.tolist() for slab, table in tables.items() if not is_frozen(slab)}
    # Loads are shares of the tokens of an expert's own field among all experts; here among those it can reach.
    reachable = {field: population.reachable(field) for field in {member.field for member in population.members}}
    learning = [norms[member.slab][member.row] for member in population.members if member.slab in norms]
    mean = math.fsum(learning) / len(learning) if learning else 0.0
    found = []
    for member in population.members:
        load = loads[member.slab][member.row] * reachable[member.field] / len(population.members)
        gradient = norms[member.slab][member.row] / mean if member.slab in norms and mean > 0 else None
        mixed = load if gradient is None else (1 - gradient_weight) * load + gradient_weight * gradient
        found.append(Vitality(load, gradient, mixed))
    return found


__all__ = ["Vitality", "vitality_of"]
