"""Health: whether an expert is used, rested, consolidated and grown up; what the policy `synaptic_health` goes by.

    health = utilisation * energy * CaMKII * maturity,  each in [0, 1]

- Utilisation, min(1, load): load in multiples of the uniform share of the experts that its tokens can reach (as for
  `vitality.py`), so 1 is a fair share or more. Overload is another question, which the policy asks by itself.
- Energy: of the edges that lead to it, left after use (vital `energy`); 1 without synapses of the router.
- CaMKII, (1 + m / m_on) / 2 and at most 1, with m the active share and m_on the switch's upper stable state; 1 without
  a postsynaptic side. From a half on, because a switch is closed at birth and opens for those above the mean only: it
  says that nothing was consolidated yet, not that the expert is of no use.
- Maturity, age / (age + `lifecycle.min_age_steps`), the latter times its tier's lifetime; 1 for roots, which were there
  before. It rises with age. The prototypes' falls, so that the oldest die first, and with them what a pretrained model
  knows.

Reads tables, changes nothing. E alive experts in slot order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.policies.circumstances import lifetime
from living_moe.modeling_living_moe.lifecycle.vitality import vitality_of

#: Active share of CaMKII in the upper state of the switch at rest (see `synapse.postsynaptic.switch_step`).
CAMKII_ON = 0.79


class Health(NamedTuple):
    """Of one expert; `load` in multiples of the uniform share, the others in [0, 1]."""

    load: float
    utilisation: float
    energy: float
    camkii: float
    maturity: float

    @property
    def health(self) -> float:
        return self.utilisation * self.energy * self.camkii * self.maturity


def health_of(block: LivingMoeBlock, config: LifecycleConfig) -> list[Health]:
    """Health of each expert (E,). Waits for the device."""
    population, side = block.population, block.postsynaptic
    tables = {slab: block.vitals.table(slab) for slab in population.alive}
    ages = {slab: table.age.tolist() for slab, table in tables.items()}
    energies = _columns({slab: table.energy for slab, table in tables.items()} if block.router.synapse else {})
    switches = _columns({slab: side.table(slab).camkii for slab in tables} if side is not None else {})
    found = []
    for member, share in zip(population.members, vitality_of(block, 0.0), strict=True):
        slab, row = member.slab, member.row
        grown = config.min_age_steps * lifetime(block, slab, config.lifetime_exponent)
        age = ages[slab][row]
        found.append(
            Health(
                load=share.load,
                utilisation=min(1.0, max(0.0, share.load)),
                energy=energies[slab][row] if slab in energies else 1.0,
                camkii=0.5 * (1.0 + min(1.0, switches[slab][row] / CAMKII_ON)) if slab in switches else 1.0,
                maturity=1.0 if member.parent < 0 or not grown else age / (age + grown),
            )
        )
    return found


def _columns(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {slab: torch.nan_to_num(tensor, 0.0).clamp(0.0, 1.0).tolist() for slab, tensor in tensors.items()}


__all__ = ["CAMKII_ON", "Health", "health_of"]
