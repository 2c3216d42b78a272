"""The escape of one block: what its experts said, seen from another space, added through a gate.

    out = x + fade * tanh(gate) * (back(process(forward(x))) - x)

The gate starts at zero (ReZero, Bachlechner et al. 2020, arXiv:2003.04887), so entering changes no output by a bit.
`process` does not start as the identity but a little off it: the gate's gradient is the inner product of the difference
and the loss's gradient, so were both the difference and the gate zero, nothing would ever move. The gate moves first,
and with it the rest begins to learn. `fade` is 1, and goes to 0 when the block leaves; then the block closes, its gate
is zero again, and what the map has learned stays for the next time.

A closed block computes nothing, and its parameters are those of a module that is not there: no gradient, or, on several
ranks, where DistributedDataParallel waits for one, a gradient of zero. All of them have one dimension, so by the usual
rule no weight decay moves them meanwhile.

Acts on each token by itself. The module must not decide when to go or to return (detector.py).

T tokens, H features, F = H // 2 + 1 frequencies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from living_moe.configuration.errors import CheckpointError
from living_moe.configuration.sections import EscapeConfig
from living_moe.modeling_living_moe.distributed import world_size
from living_moe.modeling_living_moe.escape.spaces import FourierSpace, PoincareBall, at_least_fp32

CLOSED, OPEN, LEAVING = range(3)
STATES = ("closed", "open", "leaving")
#: Standard deviation of the maps' parameters around those of the identity, at the start.
OFF_IDENTITY = 0.05


class PoincareMap(nn.Module):
    """There, a Möbius product with a diagonal matrix, a gyro-translation, and back.

    The product alone would be a linear map of the tangent space in disguise; by the translation the token's length
    decides how far each direction turns.
    """

    def __init__(self, features: int, settings: EscapeConfig, seed: int):
        super().__init__()
        self.seed = seed
        self.ball = PoincareBall(settings.curvature)
        self.factor, self.translation = (nn.Parameter(torch.empty(features)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Factors about 1, a translation of about `OFF_IDENTITY`; leaves alone what a checkpoint has loaded."""
        features = len(self.factor)
        factor, translation = drawn(2, features, self.seed)
        init.copy_(self.factor, 1 + factor)
        init.copy_(self.translation, translation * features**-0.5)

    def forward(self, x_TH: Tensor) -> Tensor:
        point_TH, scale_T1 = self.ball(x_TH)
        point_TH = self.ball.stretch(at_least_fp32(self.factor), point_TH)
        by_1H = self.ball.exp0(at_least_fp32(self.translation).unsqueeze(0))
        return self.ball.back(self.ball.add(by_1H, point_TH), scale_T1)


class FourierMap(nn.Module):
    """There, a complex factor per frequency, a bend of amplitudes that keeps phases, and back."""

    def __init__(self, features: int, settings: EscapeConfig, seed: int):
        super().__init__()
        self.seed = seed
        self.space = FourierSpace()
        self.real, self.imaginary, self.bend = (nn.Parameter(torch.empty(features // 2 + 1)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Factors about 1 + 0i, bends about 0; leaves alone what a checkpoint has loaded."""
        real, imaginary, bend = drawn(3, len(self.real), self.seed)
        init.copy_(self.real, 1 + real)
        init.copy_(self.imaginary, imaginary)
        init.copy_(self.bend, bend)

    def forward(self, x_TH: Tensor) -> Tensor:
        spectrum_TF, scale_T1 = self.space.forward(x_TH)
        spectrum_TF = spectrum_TF * torch.complex(at_least_fp32(self.real), at_least_fp32(self.imaginary))
        power_TF = spectrum_TF.real.square() + spectrum_TF.imag.square()
        spectrum_TF = spectrum_TF * (1 + at_least_fp32(self.bend) * power_TF / (1 + power_TF))
        return self.space.back(spectrum_TF, scale_T1, x_TH.shape[-1])


class Now(NamedTuple):
    """State of an escape, on the host."""

    state: int
    since: int
    left: int
    rest_until: int

    @classmethod
    def of(cls, state: Tensor, since: Tensor, left: Tensor, rest_until: Tensor) -> Now:
        """From the buffers of an escape, by one transfer.

        Raises:
            CheckpointError: They hold no state an escape can be in.
        """
        now = cls(*torch.stack([state, since, left, rest_until]).tolist())
        if not CLOSED <= now.state <= LEAVING or (now.left > 0) != (now.state == LEAVING):
            raise CheckpointError(
                f"escape.state is {now.state} with escape.left {now.left}: the state is one of {CLOSED} to {LEAVING} "
                f"({', '.join(STATES)}), and steps are left while leaving only. The checkpoint was edited or is broken."
            )
        return now


class Escape(nn.Module):
    """The escape of one block.

    State, int64 buffers, alike on every rank: `state` (closed, open, leaving), `since` (the optimizer step at which it
    began), `left` (steps until it closes, while leaving), `rest_until` (no opening before that step).

    Args:
        features: H.
        settings: `space` is poincare or fourier.
        layer: Of the block; it draws the map's first parameters.
    """

    state: Tensor
    since: Tensor
    left: Tensor
    rest_until: Tensor

    def __init__(self, features: int, settings: EscapeConfig, layer: int = 0):
        super().__init__()
        self.settings = settings
        self.map = {"poincare": PoincareMap, "fourier": FourierMap}[settings.space](features, settings, layer)
        self.gate = nn.Parameter(torch.zeros(1))
        for name in Now._fields:
            self.register_buffer(name, torch.tensor(0))
        self._now: Now | None = None

    def reset_parameters(self) -> None:
        """Closed; leaves alone what a checkpoint has loaded."""
        init.zeros_(self.gate)
        for name in Now._fields:
            init.zeros_(getattr(self, name))
        self._now = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._now = None

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) -> (T, H), same dtype."""
        now = self.now
        if now.state == CLOSED:
            waiting = [parameter for parameter in self.parameters() if parameter.requires_grad]
            if self.training and torch.is_grad_enabled() and waiting and world_size() > 1:
                taking_part: Tensor = _TakePart.apply(x_TH, *waiting)
                return taking_part
            return x_TH
        fade = now.left / self.settings.leave_steps if now.state == LEAVING else 1.0
        with torch.autocast(device_type=x_TH.device.type, enabled=False):
            wide_TH = at_least_fp32(x_TH)
            # A token that overflowed, or of which the other space makes one that does, stays here: it takes no part in
            # the map, so that it spoils no gradient of the others'.
            wide_TH = wide_TH.where(wide_TH.isfinite().all(dim=-1, keepdim=True), 0.0)
            away_TH = (self.map(wide_TH) - wide_TH).to(x_TH.dtype)
            away_TH = away_TH.where((away_TH.isfinite() & x_TH.isfinite()).all(dim=-1, keepdim=True), 0.0)
            gate = fade * torch.tanh(at_least_fp32(self.gate))
        through: Tensor = _Through.apply(x_TH, away_TH, gate)
        return through

    # -- life ------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> Now:
        """The state; waits for the device once after it was loaded.

        Raises:
            CheckpointError: What was loaded is none.
        """
        if self._now is None:
            self._now = Now.of(self.state, self.since, self.left, self.rest_until)
        return self._now

    @torch.no_grad()
    def _become(self, now: Now) -> None:
        for name, value in now._asdict().items():
            getattr(self, name).fill_(value)
        self._now = now

    @torch.no_grad()
    def open(self, step: int) -> None:
        """Enter: no output changes."""
        self.gate.zero_()
        self._become(Now(OPEN, step, 0, 0))

    def leave(self, step: int) -> None:
        """Begin to leave: `settings.leave_steps` calls of `tick` from now it is closed."""
        self._become(Now(LEAVING, step, self.settings.leave_steps, 0))

    @torch.no_grad()
    def tick(self, step: int) -> bool:
        """One optimizer step passes; whether the block has closed by it."""
        now = self.now
        if now.state != LEAVING:
            return False
        if now.left > 1:
            self._become(now._replace(left=now.left - 1))
            return False
        self.gate.zero_()
        # What is left of a gradient would, zeroed in place, be one of zero at each step to come: optimizers that decay
        # vectors would shrink the map meanwhile.
        for parameter in self.parameters():
            parameter.grad = None
        self._become(Now(CLOSED, step, 0, step + self.settings.rest_steps))
        return True


class _Through(torch.autograd.Function):
    """x + gate * away; at a gate of zero x itself, bit for bit, and the gate's gradient all the same."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, away_TH: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(away_TH, gate)
        return torch.where(gate == 0, x_TH, x_TH + gate.to(x_TH.dtype) * away_TH)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        away_TH, gate = ctx.saved_tensors
        by_gate = (grad_TH.to(gate.dtype) * away_TH.to(gate.dtype)).sum().view(1)
        return grad_TH, gate.to(grad_TH.dtype) * grad_TH, by_gate


class _TakePart(torch.autograd.Function):
    """x itself; every parameter given gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x_TH.view_as(x_TH)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, ...]:
        return grad_TH, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def drawn(rows: int, features: int, seed: int) -> Tensor:
    """Normal numbers, the same wherever and in whatever order modules are initialised."""
    generator = torch.Generator().manual_seed(seed)
    return OFF_IDENTITY * torch.randn(rows, features, generator=generator, device="cpu", dtype=torch.float32)


__all__ = ["CLOSED", "LEAVING", "OPEN", "STATES", "Escape", "FourierMap", "PoincareMap"]
