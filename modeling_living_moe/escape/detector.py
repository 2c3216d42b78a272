"""Does training stagnate? Loss and gradient norm, each compared between one window of steps and the one before.

A window is `escape.window` optimizer steps. At its end, with m and m' the means of the loss over this window and over
the one before, and g and g' those of the norm of all experts' gradients (as the optimizer saw them, so after clipping;
read every `vitals.grad_norm_every` steps):

    flat     |m - m'| <= loss_tolerance |m'|  and  |g - g'| <= grad_tolerance g'
    falling  m' - m > loss_tolerance |m'|

Training stagnates when `escape.patience` windows in a row were flat: neither the loss nor the gradient has a trend. A
window in which one of them was not measured is neither. A loss that rises is not flat: that is for the drift detector.

Rules, applied by `lifecycle_step` at the end of a window:

    closed   stagnation and Φ of the layer below `collapse` times its record, and rested -> open (event "escape")
    open     one whole window has passed and the loss is falling, or `max_steps` have -> leaving (event "return")
    leaving  `leave_steps` later -> closed; it rests for `rest_steps`, and Φ's level, peak and record begin anew

Everything is a tensor until a window ends, and the same on every rank. Opens and closes nothing by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import initialization as init

from living_moe.configuration.sections import EscapeConfig
from living_moe.modeling_living_moe.population import KeepsDtype

#: What is watched, in the order of every tensor with an entry for each.
LOSS, GRADIENT = range(2)


class StagnationDetector(KeepsDtype):
    """Watches the loss and the gradient norm of one model.

    State, in buffers with an entry for loss and gradient each: `total` and `count` of the present window, `mean` of the
    last one, `known`, whether it has one; `flat`, windows in a row; `fall`, of the loss in the last window, relative.
    """

    total: Tensor
    count: Tensor
    mean: Tensor
    known: Tensor
    flat: Tensor
    fall: Tensor

    def __init__(self, settings: EscapeConfig):
        super().__init__()
        self.settings = settings
        for name, value in self._first_values():
            self.register_buffer(name, value)

    @staticmethod
    def _first_values() -> list[tuple[str, Tensor]]:
        return [
            ("total", torch.zeros(2, dtype=torch.float32)),
            ("count", torch.zeros(2, dtype=torch.int64)),
            ("mean", torch.zeros(2, dtype=torch.float32)),
            ("known", torch.zeros(2, dtype=torch.bool)),
            ("flat", torch.tensor(0)),
            ("fall", torch.tensor(0.0, dtype=torch.float32)),
        ]

    def reset_parameters(self) -> None:
        """Nothing seen yet; leaves alone what a checkpoint has loaded."""
        for name, value in self._first_values():
            init.copy_(getattr(self, name), value)

    @torch.no_grad()
    def observe(self, which: int, value: Tensor, known: Tensor | bool = True) -> None:
        """Count one step's loss or gradient norm, 0-dim, of all ranks; one that is no number does not count."""
        known = value.isfinite() & known
        self.total[which] += torch.where(known, value, 0.0).to(self.total)
        self.count[which] += known.to(self.count)

    @torch.no_grad()
    def end_window(self) -> None:
        """Compare the window with the one before it, and begin the next."""
        some = self.count > 0
        mean = self.total / self.count.clamp(min=1)
        both = some & self.known
        change = (mean - self.mean) / self.mean.abs().clamp_min(torch.finfo(torch.float32).tiny)
        change = change.where(mean != self.mean, torch.zeros_like(change))
        tolerance = change.new_tensor([self.settings.loss_tolerance, self.settings.grad_tolerance])
        is_flat = (both & (change.abs() <= tolerance)).all()
        self.flat.copy_(torch.where(is_flat, self.flat + 1, 0))
        self.fall.copy_(torch.where(both[LOSS], -change[LOSS], 0.0))
        self.mean.copy_(mean)
        self.known.copy_(some)
        self.total.zero_()
        self.count.zero_()

    def stagnates(self) -> Tensor:
        """Bool, 0-dim; as of the end of the last window."""
        return self.flat >= self.settings.patience

    def falling(self) -> Tensor:
        """Bool, 0-dim; as of the end of the last window."""
        return self.fall > self.settings.loss_tolerance


__all__ = ["GRADIENT", "LOSS", "StagnationDetector"]
