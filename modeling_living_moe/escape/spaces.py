"""Other spaces for a token's features, and the ways there and back: a Poincaré ball, and frequencies.

Each way keeps a scale per token aside, so that what is done in the space sees numbers of moderate size, and so that
going there and back is the identity for tokens from 1e-30 to 1e30 (tests/modeling/escape/test_spaces.py).

*Poincaré ball* of curvature -c (Nickel & Kiela 2017, arXiv:1705.08039; Ganea et al. 2018, arXiv:1805.09112). The
exponential map at the origin sends a tangent vector of length r to the radius tanh(√c r) / √c, which rounds to the
boundary from √c r = 9 on in fp32, and there is no way back from there. So a token is shortened first: with s its root
mean square, it is divided by σ √H, σ = 1 + √c s / REACH. Then √c r < REACH for every token and every c, and tanh(REACH)
= 0.964 is far from 1. σ is kept beside the point and multiplied in on the way back. That is a choice with a price: all
long tokens come to lie near the radius tanh(REACH), so the ball tells their directions apart, and their lengths only as
far as σ leaves them different.

*Fourier*: the real FFT over features, orthonormal, of the token divided by 1 + s. Phases are kept: the spectrum is the
complex one.

Both act on one token's features. Nothing here may look along the sequence. Computed in fp32 or wider, whatever comes.

T tokens, H features, F = H // 2 + 1 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

#: √c times the longest tangent vector that a token becomes.
REACH = 2.0
#: √c times the longest tangent vector that the exponential map tells from a longer one: tanh(5) = 0.9999.
FARTHEST = 5.0
#: Largest √c |p| of a point; rounding may put the sum of two points on the boundary or beyond.
INSIDE = 1.0 - 1e-5
#: Bound on |log c|.
MOST_LOG_CURVATURE = 8.0


class PoincareBall(nn.Module):
    """Points p with √c |p| < 1, and the space's own operations.

    Args:
        curvature: c > 0 at the start; it is learned as log c.
    """

    def __init__(self, curvature: float = 1.0):
        super().__init__()
        self.start = curvature
        self.log_curvature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The curvature at the start; leaves alone what a checkpoint has loaded."""
        start = torch.tensor([self.start], dtype=torch.float32, device="cpu").log()
        init.copy_(self.log_curvature, start)

    @property
    def curvature(self) -> Tensor:
        """c, (1,), fp32 or wider."""
        log = at_least_fp32(self.log_curvature)
        # The gradient passes the bound, so that what was carried beyond it can come back.
        return (log + (log.clamp(-MOST_LOG_CURVATURE, MOST_LOG_CURVATURE) - log).detach()).exp()

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Points (T, H), and the scale (T, 1) that `back` needs."""
        root = self.curvature.sqrt()
        scale_T1 = 1.0 + root * root_mean_square(x_TH) / REACH
        return self.exp0(x_TH / scale_T1 / x_TH.shape[-1] ** 0.5), scale_T1

    def back(self, point_TH: Tensor, scale_T1: Tensor) -> Tensor:
        """The token whose point this is, (T, H)."""
        return self.log0(point_TH) * point_TH.shape[-1] ** 0.5 * scale_T1

    def exp0(self, tangent_TH: Tensor) -> Tensor:
        """Exponential map at the origin: tanh(√c r) / (√c r) times the tangent vector of length r."""
        root = self.curvature.sqrt()
        far_T1 = root * length(tangent_TH)
        return tangent_TH * over(torch.tanh(far_T1.clamp(max=FARTHEST)), far_T1, -1 / 3)

    def log0(self, point_TH: Tensor) -> Tensor:
        """Logarithm at the origin, its inverse: atanh(√c |p|) / (√c |p|) times the point."""
        root = self.curvature.sqrt()
        near_T1 = (root * length(point_TH)).clamp(max=INSIDE)
        return point_TH * over(torch.atanh(near_T1), near_T1, 1 / 3)

    def stretch(self, factor_H: Tensor, point_TH: Tensor) -> Tensor:
        """Möbius product with a diagonal matrix: exp0(factor * log0(p))."""
        return self.exp0(factor_H * self.log0(point_TH))

    def add(self, left_TH: Tensor, right_TH: Tensor) -> Tensor:
        """Möbius addition, left ⊕ right: the gyro-translation of `right` by `left`, which keeps all distances."""
        c = self.curvature
        dot_T1 = (left_TH * right_TH).sum(dim=-1, keepdim=True)
        left_T1, right_T1 = (each.square().sum(dim=-1, keepdim=True) for each in (left_TH, right_TH))
        top_TH = (1 + 2 * c * dot_T1 + c * right_T1) * left_TH + (1 - c * left_T1) * right_TH
        sum_TH = top_TH / (1 + 2 * c * dot_T1 + c.square() * left_T1 * right_T1).clamp_min(1e-12)
        radius_T1 = c.sqrt() * length(sum_TH)
        return sum_TH * (INSIDE / radius_T1.clamp(min=INSIDE))


class FourierSpace:
    """Spectra of tokens, complex (T, F)."""

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Spectra (T, F), and the scale (T, 1) that `back` needs."""
        scale_T1 = 1.0 + root_mean_square(x_TH)
        return torch.fft.rfft(x_TH / scale_T1, dim=-1, norm="ortho"), scale_T1

    def back(self, spectrum_TF: Tensor, scale_T1: Tensor, features: int) -> Tensor:
        """The token whose spectrum this is, (T, features)."""
        return torch.fft.irfft(spectrum_TF, n=features, dim=-1, norm="ortho") * scale_T1


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def length(x_TH: Tensor) -> Tensor:
    """Euclidean length (T, 1), also where squares would overflow or vanish; its gradient at 0 is 0."""
    largest_T1 = x_TH.detach().abs().amax(dim=-1, keepdim=True)
    some_T1 = largest_T1 > 0
    unit_TH = x_TH / largest_T1.where(some_T1, 1.0)
    square_T1 = unit_TH.square().sum(dim=-1, keepdim=True)
    return torch.where(some_T1, largest_T1 * square_T1.where(some_T1, 1.0).sqrt(), 0.0)


def root_mean_square(x_TH: Tensor) -> Tensor:
    """(T, 1), as `length`."""
    return length(x_TH / x_TH.shape[-1] ** 0.5)


def over(value: Tensor, argument: Tensor, curve: float) -> Tensor:
    """f(a) / a for an odd f with f'(0) = 1 and third coefficient `curve`, also at 0."""
    small = argument < 1e-3
    return torch.where(small, 1.0 + curve * argument.square(), value / argument.where(~small, 1.0))


__all__ = ["FourierSpace", "PoincareBall", "at_least_fp32", "length", "root_mean_square"]
