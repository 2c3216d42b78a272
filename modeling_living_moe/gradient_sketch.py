"""Whether an expert is pulled two ways: its gradient now against where its gradients went before.

PCGrad (Yu et al. 2020, arXiv:2001.06782) calls gradients with a negative cosine conflicting; Borsani et al. 2025
(arXiv:2506.06130) add that gradients of very different length conflict too. One batch says little, so both are moving
averages, read in zones, as in GCond (arXiv:2509.07252).

The gradients of the past are kept as a count sketch (Charikar, Chen, Farach-Colton 2002): every coordinate is added,
with a pseudo-random sign, to one of `SKETCH` buckets. It is linear, so the sketch of a running mean is the running mean
of sketches, and inner products of sketches estimate those of the gradients without bias. For independent signs the
variance of <sketch(a), sketch(b)> is at most (|a|² |b|² + <a, b>²) / SKETCH where no coordinate dominates, so the
standard error of a cosine is 0.06 near 0 and at most 0.09. Here places of a stride share patterns of signs; the largest
error found for that is 0.11, of outer products of positive vectors (`tests/modeling/test_gradient_sketch.py`). 1 KB per
expert instead of a second gradient.

Signs and buckets depend on a coordinate's place in the expert only, so sketches of different steps and ranks fit.

C capacity, E alive experts, P parameters of an expert.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Floats per expert.
SKETCH = 256
#: Coordinates a stride apart share a bucket. A prime, so that a column of a matrix (whose rows are 256 or 1,024 long)
#: is spread over all buckets; hidden dimensions that dominate a gradient would otherwise collide with themselves.
STRIDE = 251
#: Strides that one matrix product adds up (a chunk), and patterns of signs among which each place in a stride picks
#: one: so gradients are read once, with no copy, and most signs are still independent.
STRIDES, PATTERNS = 64, 8
CHUNK = STRIDES * STRIDE
#: Chunks after which patterns are used again, with the buckets moved and the signs turned as a hash says.
PERIOD = 64
#: A cosine between gradients that have nothing to do with each other has this standard deviation in the sketch.
NOISE = SKETCH**-0.5
#: Below two standard deviations of noise a cosine says nothing.
NEUTRAL = 2 * NOISE
#: GCond's bound between conflicts that are mended by projection and those in which one side must win.
STRONG = -0.5


@dataclass(frozen=True)
class _Hashes:
    """Signs +1 and -1, fp32, and picked patterns, int64: the same on every rank, device and version.

    Of a full chunk: its patterns, the sign of each place in a stride, and the pattern it picks. `rest` is for the end
    of a tensor, where each coordinate has a sign of its own.
    """

    pattern: Tensor  # (PERIOD, PATTERNS, STRIDES)
    sign: Tensor  # (PERIOD, STRIDE)
    picked: Tensor  # (PERIOD, STRIDE)
    rest: Tensor  # (STRIDES, STRIDE)


@functools.cache
def _hashes(device: torch.device) -> _Hashes:
    sizes = [PERIOD * PATTERNS * STRIDES, PERIOD * STRIDE, PERIOD * STRIDE, CHUNK]
    place = torch.arange(sum(sizes))
    # The finaliser of MurmurHash3 (Appleby); int64 products wrap, and only their low 32 bits are used.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = ((place ^ (place >> shift)) * factor) & 0xFFFFFFFF
    pattern, sign, picked, rest = (place ^ (place >> 16)).split(sizes)

    def signs(bits: Tensor, *shape: int) -> Tensor:
        return (2 * (bits & 1) - 1).to(device, torch.float32).view(*shape)

    return _Hashes(
        signs(pattern, PERIOD, PATTERNS, STRIDES),
        signs(sign, PERIOD, STRIDE),
        (picked % PATTERNS).to(device).view(PERIOD, STRIDE),
        signs(rest, STRIDES, STRIDE),
    )


def _turn(chunk: int) -> tuple[int, float]:
    """Shift of the buckets and sign of a chunk."""
    draw = random.Random(chunk)
    return draw.randrange(SKETCH), draw.choice((-1.0, 1.0))


@torch.no_grad()
def sketch_rows(gradients: Sequence[Tensor], count: int, filled: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Count sketch and L2 norm of each expert's gradient.

    Args:
        gradients: Of an expert's tensors, in a fixed order, each (C, ...), any float dtype.
        count: E; only the first E rows are read.
        filled: The rows, ascending, in which any gradient is not zero, if that is known: no other is read.

    Returns:
        sketch: fp32 (E, SKETCH).
        norm: fp32 (E,), exact.
    """
    device = gradients[0].device
    rows_read = None if filled is None else [row for row in filled if row < count]
    if rows_read is not None and 2 * len(rows_read) <= count:
        place = torch.tensor(rows_read, dtype=torch.int64, device=device)
        few = sketch_rows([gradient.index_select(0, place) for gradient in gradients], len(rows_read))
        sketch, norm = (part.new_zeros(count, *part.shape[1:]).index_copy_(0, place, part) for part in few)
        return sketch, norm
    hashes = _hashes(device)
    sketch = torch.zeros(count, SKETCH, dtype=torch.float32, device=device)
    squares = torch.zeros(count, dtype=torch.float32, device=device)
    chunk = 0
    for gradient in gradients:
        rows = gradient[:count].flatten(1)
        wide = torch.promote_types(rows.dtype, torch.float32)
        squares += torch.linalg.vector_norm(rows, dim=1, dtype=wide).square().to(squares)
        for start in range(0, rows.shape[1], CHUNK):
            part = rows[:, start : start + CHUNK]
            sums = _sums(part, hashes, chunk % PERIOD) if part.shape[1] == CHUNK else _rest_sums(part, hashes)
            shift, sign = _turn(chunk)
            head = min(STRIDE, SKETCH - shift)
            sketch[:, shift : shift + head].add_(sums[:, :head], alpha=sign)
            sketch[:, : STRIDE - head].add_(sums[:, head:], alpha=sign)
            chunk += 1
    return sketch, squares.sqrt()


def _sums(part: Tensor, hashes: _Hashes, chunk: int) -> Tensor:
    """Signed sums over the strides of a full chunk (E, CHUNK), fp32 (E, STRIDE)."""
    experts = part.shape[0]
    pattern = hashes.pattern[chunk].to(part.dtype).expand(experts, -1, -1)
    sums = torch.bmm(pattern, part.unflatten(1, (STRIDES, STRIDE)))
    picked = hashes.picked[chunk].expand(experts, 1, -1)
    return sums.gather(1, picked).squeeze(1).float() * hashes.sign[chunk]


def _rest_sums(part: Tensor, hashes: _Hashes) -> Tensor:
    """The same for the end of a tensor, (E, fewer than CHUNK)."""
    whole = torch.nn.functional.pad(part.float(), (0, -part.shape[1] % STRIDE)).unflatten(1, (-1, STRIDE))
    return (whole * hashes.rest[: whole.shape[1]]).sum(dim=1)


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
