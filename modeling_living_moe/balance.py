"""Balance without gradients: selection biases that rise where too few tokens come and fall where too many do.

After DeepSeek-V3 (arXiv:2412.19437) and Wang et al. 2024 (arXiv:2408.15664): once per optimizer step, from counts
summed over micro-batches and ranks, each bias takes a step of fixed size towards balance, and all are recentred, so
that they never drift together. Members of a clade share its step: which of them serves is not for a bias to say. So
does a tombstone whose heir is among them, by whose address the clade is reached as well.

E alive experts in slot order, D tombstones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from living_moe.modeling_living_moe.population import NOBODY, Population


@torch.no_grad()
def balance_step(population: Population, received_E: Tensor, rate: float) -> None:
    """Move the selection biases by `rate` against the clades' loads; a step without tokens moves nothing."""
    alive = population.alive
    clade_E, _ = population.clades
    clades, place_E = clade_E.unique(return_inverse=True)
    load = torch.zeros(len(clades), dtype=received_E.dtype, device=received_E.device)
    load.index_add_(0, place_E, received_E)
    step_E = torch.sign(load.mean() - load)[place_E].float() * rate
    bias_E = torch.cat([population.table(slab).bias[:count] for slab, count in alive.items()]) + step_E
    center = bias_E.mean()
    happened = received_E.sum() > 0
    first = 0
    for slab, count in alive.items():
        bias = population.table(slab).bias
        bias[:count] = torch.where(happened, bias_E[first : first + count] - center, bias[:count])
        first += count
    if population.tombstones:
        heirs = torch.tensor([a.server for a in population.addresses[first:]], device=step_E.device)
        step_D = torch.where(heirs == NOBODY, 0.0, step_E[heirs.clamp(min=0)])
        population.tombstone_bias += torch.where(happened, step_D - center, 0.0)
    population.biases_moved()


__all__ = ["balance_step"]
