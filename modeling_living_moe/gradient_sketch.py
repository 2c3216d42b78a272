"""Whether an expert is pulled two ways: its gradient now against where its gradients went before.

PCGrad (Yu et al. 2020, arXiv:2001.06782) calls gradients with a negative cosine conflicting; Borsani et al. 2025
(arXiv:2506.06130) add that gradients of very different length conflict too. One batch says little, so both are moving
averages, read in zones, as in GCond (arXiv:2509.07252).

The gradients of the past are kept as a count sketch (Charikar, Chen, Farach-Colton 2002): every coordinate is added,
with a pseudo-random sign, to one of `SKETCH` buckets. It is linear, so the sketch of a running mean is the running mean
of sketches, and inner products of sketches estimate those of the gradients without bias. For independent signs the
variance of <sketch(a), sketch(b)> is at most (|a|² |b|² + <a, b>²) / SKETCH where no coordinate dominates, so the
standard error of a cosine is at most sqrt(2 / SKETCH) = 0.09. 1 KB per expert instead of two gradients.

Signs and buckets depend on a coordinate's place in the expert only: the same on every rank, device and version.

C capacity, E alive experts, P parameters of an expert.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

#: Floats per expert.
SKETCH = 256
#: Coordinates a stride apart share a bucket. A prime, so that a column of a matrix (whose rows are 256 or 1,024 long)
#: is spread over all buckets; hidden dimensions that dominate a gradient would otherwise collide with themselves.
STRIDE = 251
#: Coordinates that are added up together: they and the products with their signs stay in the processor's cache.
CHUNK = 16 * STRIDE
#: Chunks after which the table of signs is used again, with the buckets moved and the signs turned as a hash says.
PERIOD = 128
#: A cosine between gradients that have nothing to do with each other has this standard deviation in the sketch.
NOISE = SKETCH**-0.5
#: Below two standard deviations of noise a cosine says nothing.
NEUTRAL = 2 * NOISE
#: GCond's bound between conflicts that are mended by projection and those in which one side must win.
STRONG = -0.5


@functools.cache
def _signs(device: torch.device) -> Tensor:
    """+1 and -1, fp32 (PERIOD, CHUNK / STRIDE, STRIDE): 2 MB on each device that trains."""
    place = torch.arange(PERIOD * CHUNK)
    # The finaliser of MurmurHash3 (Appleby); int64 products wrap, and only their low 32 bits are used.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = ((place ^ (place >> shift)) * factor) & 0xFFFFFFFF
    bit = (place ^ (place >> 16)) & 1
    return (2 * bit - 1).to(device, torch.float32).view(PERIOD, -1, STRIDE)


def _turn(period: int) -> tuple[int, float]:
    """Shift of the buckets and sign of a period of the table."""
    draw = random.Random(period)
    return draw.randrange(SKETCH), draw.choice((-1.0, 1.0)) if period else 1.0


@torch.no_grad()
def sketch_rows(gradients: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Count sketch and L2 norm of each expert's gradient, in one pass over memory.

    Args:
        gradients: Of an expert's tensors, in a fixed order, each (C, ...), any float dtype.
        count: E; only the first E rows are read.

    Returns:
        sketch: fp32 (E, SKETCH).
        norm: fp32 (E,), exact.
    """
    device = gradients[0].device
    signs = _signs(device)
    sketch = torch.zeros(count, SKETCH, device=device)
    squares = torch.zeros(count, device=device)
    chunk = 0
    for gradient in gradients:
        rows = gradient[:count].flatten(1)
        for start in range(0, rows.shape[1], CHUNK):
            part = rows[:, start : start + CHUNK]
            squares += torch.linalg.vector_norm(part, dim=1, dtype=torch.float32).square()
            full = part.shape[1] // STRIDE * STRIDE
            shift, sign = _turn(chunk // PERIOD)
            # Each chunk moves the buckets on, so that the idle 5 of the 256 move as well.
            shift = (shift + 97 * chunk) % SKETCH
            table = signs[chunk % PERIOD]
            sums = (part[:, :full].unflatten(1, (-1, STRIDE)) * table[: full // STRIDE]).sum(dim=1)
            if rest := part.shape[1] - full:
                sums[:, :rest] += part[:, full:] * table[full // STRIDE, :rest]
            _add_rolled(sketch, sums, shift, sign)
            chunk += 1
    return sketch, squares.sqrt()


def _add_rolled(sketch: Tensor, sums: Tensor, shift: int, sign: float) -> None:
    """Add `sums` (E, STRIDE) to the buckets from `shift` on, around the end."""
    head = min(STRIDE, SKETCH - shift)
    sketch[:, shift : shift + head].add_(sums[:, :head], alpha=sign)
    sketch[:, : STRIDE - head].add_(sums[:, head:], alpha=sign)


def similarity(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and magnitude similarity 2 |a| |b| / (|a|² + |b|²) of the rows of two (E, ...); 0 where a row is zero."""
    inner, lengths = (one * other).sum(-1), one.norm(dim=-1) * other.norm(dim=-1)
    energy = one.square().sum(-1) + other.square().sum(-1)
    tiny = torch.finfo(lengths.dtype).tiny
    cosine = (inner / lengths.clamp_min(tiny)).clamp(-1.0, 1.0)
    return cosine * (lengths > 0), 2 * lengths / energy.clamp_min(tiny)


def conflict_zone(cosine: float) -> str:
    """Name of the zone a (smoothed) cosine lies in: aligned, neutral, mild conflict or strong conflict.

    Neutral is what a sketch of unrelated gradients gives in 19 of 20 cases.
    """
    if cosine <= STRONG:
        return "strong conflict"
    if cosine <= -NEUTRAL:
        return "mild conflict"
    return "neutral" if cosine < NEUTRAL else "aligned"


__all__ = ["NEUTRAL", "SKETCH", "STRONG", "conflict_zone", "similarity", "sketch_rows"]
