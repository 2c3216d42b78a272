"""A chaotic next-token task: symbols of one site of a ring of coupled logistic maps.

The coupled map lattice of Kaneko 1984 (Prog. Theor. Phys. 72, 480): with f(x) = r x (1 - x), site i of N moves by

    x_i <- (1 - e) f(x_i) + e / 2 (f(x_(i-1)) + f(x_(i+1)))

At r = 3.9 each site alone is chaotic (Lyapunov exponent 0.5 nats a step), and the ring is as well. Only site 0 is seen,
cut into bins of equal width over [0, 1]: the next symbol follows from the last few as far as those tell where the other
sites are (Takens 1981), so there is always more to learn and never everything. The stream is endless, deterministic in
its seed, needs no download, and any learner may be given as many fresh symbols as it has steps.

N sites, B trajectories, S steps, W symbols of context.
"""

from __future__ import annotations

import datasets
import torch
from torch import Tensor

from living_moe.configuration.errors import TrainingError

#: Steps before the first symbol, for which a trajectory takes to reach the attractor.
TRANSIENT = 200


def chaotic_symbols(
    trajectories: int,
    steps: int,
    *,
    symbols: int = 32,
    sites: int = 3,
    growth: float = 3.9,
    coupling: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Symbols of trajectories that start at random points.

    Args:
        trajectories: B.
        steps: S.
        symbols: Size of the alphabet.
        sites: N, of which the first is seen.
        growth: r, in (0, 4]; chaos from 3.57 on.
        coupling: e, in [0, 1]; 0 leaves each site alone.
        seed: Of the starting points. Equal arguments give equal symbols.

    Returns:
        int64 (B, S), in [0, symbols).

    Raises:
        TrainingError: A number is outside of its range.
    """
    ranges = {
        "trajectories": (trajectories, 1, None), "steps": (steps, 1, None), "symbols": (symbols, 2, None),
        "sites": (sites, 1, None), "growth": (growth, 0, 4), "coupling": (coupling, 0, 1),
    }  # fmt: skip
    for name, (value, least, most) in ranges.items():
        if not (least <= value and (most is None or value <= most)):
            span = f"at least {least}" if most is None else f"in [{least}, {most}]"
            raise TrainingError(f"chaotic_symbols: {name} must be {span}, got {value}.")
    generator = torch.Generator().manual_seed(seed)
    # A trajectory that starts exactly on a fixed point would stay there.
    x_BN = 0.05 + 0.9 * torch.rand(trajectories, sites, generator=generator, dtype=torch.float64)
    seen = torch.empty(trajectories, steps, dtype=torch.int64)
    for step in range(-TRANSIENT, steps):
        if step >= 0:
            seen[:, step] = (x_BN[:, 0] * symbols).long().clamp_(max=symbols - 1)
        f_BN = growth * x_BN * (1 - x_BN)
        x_BN = (1 - coupling) * f_BN + coupling / 2 * (f_BN.roll(1, dims=1) + f_BN.roll(-1, dims=1))
    return seen


def chaotic_dataset(trajectories: int, steps: int, *, block_size: int, **settings: float | int) -> datasets.Dataset:
    """The same as a dataset of `input_ids`, one block of consecutive symbols a row, for a causal language model.

    Args:
        trajectories, steps, settings: As `chaotic_symbols`.
        block_size: Symbols of a row; what is left at the end of a trajectory is dropped.

    Raises:
        TrainingError: A number is outside of its range, or a trajectory is shorter than one block.
    """
    if not 1 <= block_size <= steps:
        raise TrainingError(f"chaotic_dataset: block_size must be in [1, {steps}], got {block_size}.")
    symbols_BS = chaotic_symbols(trajectories, steps, **settings)  # type: ignore[arg-type]
    rows = symbols_BS[:, : steps // block_size * block_size].reshape(-1, block_size)
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


__all__ = ["chaotic_dataset", "chaotic_symbols"]
