"""A chaotic next-token task: symbols of one site of a ring of coupled logistic maps.

The coupled map lattice of Kaneko 1984 (Prog. Theor. Phys. 72, 480): with f(x) = r x (1 - x), site i of N moves by

    x_i <- (1 - e) f(x_i) + e / 2 (f(x_(i-1)) + f(x_(i+1)))

Each trajectory has an r of its own, which nobody tells the learner. Only site 0 is seen, cut into bins of equal width
over [0, 1]: the next symbol follows from the last few as far as those tell r and where the other sites are (Takens
1981), so there is always more to learn and never everything. No learner can get below the rate at which chaos makes new
information, which is the sum of the positive Lyapunov exponents (Pesin; `entropy_rate`). The stream is endless,
deterministic in its seed, needs no download, and any learner may be given as many fresh symbols as it has steps.

N sites, B trajectories, S steps, W symbols of context.
"""

from __future__ import annotations

from typing import Any

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
    sites: int = 2,
    growth: tuple[float, float] = (3.6, 4.0),
    coupling: float = 0.05,
    seed: int = 0,
) -> Tensor:
    """Symbols of trajectories that start at random points.

    Args:
        trajectories: B.
        steps: S.
        symbols: Size of the alphabet.
        sites: N, of which the first is seen.
        growth: The least and the largest r, in [0, 4]; chaos from 3.57 on. Each trajectory draws its own in between.
        coupling: e, in [0, 1]; 0 leaves each site alone.
        seed: Of the starting points. Equal arguments give equal symbols.

    Returns:
        int64 (B, S), in [0, symbols).

    Raises:
        TrainingError: A number is outside of its range.
    """
    ranges = {
        "trajectories": (trajectories, 1, None), "steps": (steps, 1, None), "symbols": (symbols, 2, None),
        "sites": (sites, 1, None), "growth": (min(growth), 0, 4), "largest growth": (max(growth), 0, 4),
        "coupling": (coupling, 0, 1),
    }  # fmt: skip
    for name, (value, least, most) in ranges.items():
        if not (least <= value and (most is None or value <= most)):
            span = f"at least {least}" if most is None else f"in [{least}, {most}]"
            raise TrainingError(f"chaotic_symbols: {name} must be {span}, got {value}.")
    x_BN, r_B1 = _start(trajectories, sites, growth, seed)
    seen = torch.empty(trajectories, steps, dtype=torch.int64)
    for step in range(-TRANSIENT, steps):
        if step >= 0:
            seen[:, step] = (x_BN[:, 0] * symbols).long().clamp_(max=symbols - 1)
        x_BN = _moved(x_BN, r_B1, coupling)
    return seen


def _start(trajectories: int, sites: int, growth: tuple[float, float], seed: int) -> tuple[Tensor, Tensor]:
    """Points (B, N) and r (B, 1), fp64."""
    generator = torch.Generator().manual_seed(seed)
    # A trajectory that starts exactly on a fixed point would stay there.
    x_BN = 0.05 + 0.9 * torch.rand(trajectories, sites, generator=generator, dtype=torch.float64)
    share_B1 = torch.rand(trajectories, 1, generator=generator, dtype=torch.float64)
    return x_BN, growth[0] + (growth[1] - growth[0]) * share_B1


def _moved(x_BN: Tensor, r_B1: Tensor, coupling: float) -> Tensor:
    f_BN = r_B1 * x_BN * (1 - x_BN)
    return (1 - coupling) * f_BN + coupling / 2 * (f_BN.roll(1, dims=1) + f_BN.roll(-1, dims=1))


def entropy_rate(
    trajectories: int,
    steps: int,
    *,
    sites: int = 2,
    growth: tuple[float, float] = (3.6, 4.0),
    coupling: float = 0.05,
    seed: int = 0,
) -> float:
    """Nats of new information a step, on average: the sum of the positive Lyapunov exponents of each trajectory.

    By Pesin's identity the entropy rate of the finest symbols, so a bound from below for the loss of any learner that
    sees all sites, and nearly so for one that sees the first. Exponents by QR (Benettin et al. 1980).

    Args:
        As `chaotic_symbols`.
    """
    x_BN, r_B1 = _start(trajectories, sites, growth, seed)
    eye_NN = torch.eye(sites, dtype=torch.float64)
    mix_NN = (1 - coupling) * eye_NN + coupling / 2 * (eye_NN.roll(1, dims=1) + eye_NN.roll(-1, dims=1))
    basis_BNN, sums_BN = eye_NN.expand(trajectories, -1, -1), torch.zeros_like(x_BN)
    for step in range(-TRANSIENT, steps):
        stretched_BNN = mix_NN @ ((r_B1 * (1 - 2 * x_BN)).unsqueeze(-1) * basis_BNN)
        basis_BNN, upper_BNN = torch.linalg.qr(stretched_BNN)
        if step >= 0:
            sums_BN += upper_BNN.diagonal(dim1=1, dim2=2).abs().clamp_min(1e-300).log()
        x_BN = _moved(x_BN, r_B1, coupling)
    return float((sums_BN / steps).clamp_min(0).sum(dim=1).mean())


def chaotic_dataset(trajectories: int, steps: int, *, block_size: int, **settings: Any) -> datasets.Dataset:
    """The same as a dataset of `input_ids`, one block of consecutive symbols a row, for a causal language model.

    Args:
        trajectories, steps, settings: As `chaotic_symbols`.
        block_size: Symbols of a row; what is left at the end of a trajectory is dropped.

    Raises:
        TrainingError: A number is outside of its range, or a trajectory is shorter than one block.
    """
    if not 1 <= block_size <= steps:
        raise TrainingError(f"chaotic_dataset: block_size must be in [1, {steps}], got {block_size}.")
    symbols_BS = chaotic_symbols(trajectories, steps, **settings)
    rows = symbols_BS[:, : steps // block_size * block_size].reshape(-1, block_size)
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


__all__ = ["chaotic_dataset", "chaotic_symbols", "entropy_rate"]
