"""A chaotic next-token task: symbols of one site of a ring of coupled logistic maps.

The coupled map lattice of Kaneko 1984 (Prog. Theor. Phys. 72, 480): with f(x) = r x (1 - x), site i of N moves by

    x_i <- (1 - e) f(x_i) + e / 2 (f(x_(i-1)) + f(x_(i+1)))

Each trajectory has an r of its own, which nobody tells the learner. Only site 0 is seen, cut into bins of equal width
over [0, 1]: the next symbol follows from the last few as far as those tell r and where the other sites are (Takens
1981), so there is always more to learn and never everything: chaos makes new information at a rate of the sum of its
positive Lyapunov exponents (Pesin; `entropy_rate`), and what a few symbols leave open is counted (`least_loss`). The
stream is endless, deterministic in its seed, needs no download, and any learner may be given as many fresh symbols as
it has steps.

N sites, B trajectories, S steps, W symbols of context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import datasets
import torch
from torch import Tensor

from living_moe.configuration.errors import TrainingError

#: Steps before the first symbol. Some hundreds lead near the attractor, but in some trajectories chaos is transient:
#: for thousands of steps more and more of them come to rest in a period.
TRANSIENT = 5000


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
    _check(trajectories, steps, sites, growth, coupling, seed)
    _check_count("symbols", symbols, 2)
    x_BN, r_B1 = _start(trajectories, sites, growth, seed)
    seen = torch.empty(trajectories, steps, dtype=torch.int64)
    for step in range(-TRANSIENT, steps):
        if step >= 0:
            seen[:, step] = (x_BN[:, 0] * symbols).long().clamp_(max=symbols - 1)
        x_BN = _moved(x_BN, r_B1, coupling)
    return seen


def _check(trajectories: int, steps: int, sites: int, growth: tuple[float, float], coupling: float, seed: int) -> None:
    """Raise `TrainingError` for what makes no trajectory."""
    for name, value, least in (("trajectories", trajectories, 1), ("steps", steps, 1), ("sites", sites, 1)):
        _check_count(name, value, least)
    _check_count("seed", seed, 0)
    if not isinstance(growth, Sequence) or len(growth) != 2:
        raise TrainingError(f"growth must be two numbers, the least and the largest, got {growth!r}.")
    for name, number, most in (("growth", growth[0], 4), ("growth", growth[1], 4), ("coupling", coupling, 1)):
        if not isinstance(number, Real) or not 0 <= number <= most:
            raise TrainingError(f"{name} must be in [0, {most}], got {number!r}.")
    if growth[0] > growth[1]:
        raise TrainingError(f"growth must be the least and the largest, got {growth!r}; swap them.")


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise TrainingError(f"{name} must be an int of at least {least}, got {value!r}.")


def _start(trajectories: int, sites: int, growth: tuple[float, float], seed: int) -> tuple[Tensor, Tensor]:
    """Points (B, N) and r (B, 1), fp64."""
    generator = torch.Generator().manual_seed(int(seed))
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

    By Pesin's identity the entropy rate of symbols that tell all points of the ring apart in the long run, and so the
    least loss of a learner that has seen all of their past. Symbols of one site do that where the ring is small (for
    two sites it was seen); where they do not, they bring less, and this is a bound from above. Exponents by QR
    (Benettin et al. 1980).

    Args:
        As `chaotic_symbols`.

    Raises:
        TrainingError: As `chaotic_symbols`.
    """
    _check(trajectories, steps, sites, growth, coupling, seed)
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


def least_loss(context: int, trajectories: int, steps: int, **settings: Any) -> float:
    """Nats of the next symbol that its last `context` do not tell: what no predictor from them can fall below.

    The conditional entropy of all windows of a sample, by counting them: on these very windows the least mean loss of
    any function of the context. Of the same trajectories for ever it is a bound from below, as few windows make it
    smaller than it is; give it millions.

    Args:
        context: W.
        settings: As `chaotic_symbols`.

    Raises:
        TrainingError: Words of W + 1 symbols are more than int64 can number, or a setting is out of its range.
    """
    symbols = settings.get("symbols", 32)
    _check_count("symbols", symbols, 2)
    _check_count("context", context, 0)
    _check_count("steps", steps, 1)
    if (context + 1) * math.log2(symbols) > 63:
        raise TrainingError(f"context must be at most {int(63 / math.log2(symbols)) - 1}, got {context}.")
    windows = chaotic_symbols(trajectories, steps + context, **settings).unfold(1, context + 1, 1).flatten(0, 1)
    known = (windows[:, :-1] * symbols ** torch.arange(context)).sum(1)
    return _entropy(known * symbols + windows[:, -1]) - _entropy(known)


def _entropy(words: Tensor) -> float:
    """Nats of a sample of words, int64 (any,)."""
    counts = words.unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * share.log()).sum())


def chaotic_dataset(trajectories: int, steps: int, *, block_size: int, **settings: Any) -> datasets.Dataset:
    """The same as a dataset of `input_ids`, one block of consecutive symbols a row, for a causal language model.

    Args:
        trajectories, steps, settings: As `chaotic_symbols`.
        block_size: Symbols of a row; what is left at the end of a trajectory is dropped.

    Raises:
        TrainingError: A number is outside of its range, or a trajectory is shorter than one block.
    """
    _check_count("steps", steps, 1)
    if not isinstance(block_size, Integral) or not 1 <= block_size <= steps:
        raise TrainingError(f"chaotic_dataset: block_size must be in [1, {steps}], got {block_size!r}.")
    symbols_BS = chaotic_symbols(trajectories, steps, **settings)
    rows = symbols_BS[:, : steps // block_size * block_size].reshape(-1, block_size)
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


__all__ = ["chaotic_dataset", "chaotic_symbols", "entropy_rate", "least_loss"]
