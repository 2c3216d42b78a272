"""Experts whose cost follows the experts that received tokens: the "active" experts implementation.

Sorts the token-expert pairs by expert and multiplies contiguous segments, as Transformers' `grouped_mm` does, but
loops over the active experts only, and can keep a persistent gradient buffer of which it writes their rows only. A
layer of 1,024 slots that uses 64 then pays for 64, not for a gradient of 1,024 that is zero almost everywhere.

**The direct gradient** (opt-in: `slab.direct_grad = True`; the idea is Megatron-LM's `main_grad`). Normally the
backward pass returns a dense gradient. With the direct gradient it writes the rows into a buffer that *is*
`parameter.grad` and returns None to autograd. What holds then:

- After any number of backward passes `parameter.grad` equals what autograd would have accumulated. Between them it may
  be scaled, clipped or zeroed in place (in-place edits are seen through the tensor's version counter), set to None, or
  replaced by another tensor; the parameter may be resized, cast or replaced. Never written around the version counter
  (`parameter.grad.data`).
- After `zero_grad(set_to_none=True)` the next backward takes the same buffer up again: a reference to an old
  `parameter.grad` kept across steps sees the new values. Clone what you keep.
- `torch.autograd.grad` does not see the weights (their gradient is None) and still writes `parameter.grad`.
- The dense gradient is returned instead, without being asked, where somebody must see it pass through autograd: the
  parameter has hooks, is not a plain leaf `nn.Parameter` (parametrised by PEFT, a DTensor), already holds a gradient
  that is not the buffer, or torch.distributed runs with more than one process.

Knows no populations: rows that no token names are never read. Not differentiable twice; breaks a compiled graph; waits
for the device once per call to learn the segment lengths.

T tokens, K experts per token, C slots, H hidden, I intermediate, N = T*K pairs, S <= N pairs of this slab.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from living_moe.configuration.errors import ConfigurationError

#: What `config._experts_implementation` (or `model.set_experts_implementation`) says to choose this implementation.
ACTIVE = "active"

SILU_CLASSES = (nn.SiLU, type(ACT2FN["silu"]))

#: Maps gate_up (S, 2I) to the experts' hidden units (S, I).
GateFunction = Callable[[Tensor], Tensor]


def register_active_experts() -> None:
    """Make `experts_implementation="active"` known to Transformers. Safe to call more than once."""
    ALL_EXPERTS_FUNCTIONS.register(ACTIVE, active_experts_forward)


@torch.compiler.disable
def active_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of each token's experts, computed for the active experts only.

    Args:
        self: A slab with `num_experts` (C), `gate_up_proj (C, 2I, H)`, `down_proj (C, H, I)` and `act_fn`.
        hidden_states: (T, H), any float dtype. T may be 0.
        top_k_index: int64 (T, K), rows of this slab. An index >= C is a pair of another slab: it is skipped, adds
            nothing, and its weight and token get a zero gradient from it.
        top_k_weights: (T, K), any float dtype.

    Returns:
        (T, H) in the dtype of `hidden_states`. The sum over K runs in the wider of the weights' and the products'
        dtypes; in fp32 without skipped pairs the result is `grouped_mm`'s bit for bit. Under autocast the matrix
        products run in the autocast dtype.

    Raises:
        ConfigurationError: The experts have biases, transposed weights, no gate, a norm of their own, or an
            activation with parameters.
    """
    gate_fn = _gate_function(self)
    device_type = hidden_states.device.type
    dtype = self.gate_up_proj.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    return _ActiveExperts.apply(
        hidden_states,
        top_k_index,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        gate_fn,
        dtype,
        bool(getattr(self, "direct_grad", False)),
    )


def _gate_function(experts: Any) -> GateFunction | None:
    """The experts' gate; None for silu(gate) * up, whose derivative needs no autograd."""
    act_fn = getattr(experts, "act_fn", None)
    unsupported = (
        not getattr(experts, "has_gate", True)
        or getattr(experts, "has_bias", False)
        or getattr(experts, "is_transposed", False)
        or getattr(experts, "has_post_expert_norm", False)
        or (isinstance(act_fn, nn.Module) and next(act_fn.parameters(), None) is not None)
    )
    if unsupported:
        raise ConfigurationError(
            f"experts_implementation={ACTIVE!r} computes gated experts without biases, transposed weights, norms or "
            f"activation parameters, and {type(experts).__name__} has one of these; use 'grouped_mm' or 'eager'."
        )
    apply_gate = getattr(type(experts), "_apply_gate", None)
    # A gate of the family's own (clamped, interleaved) replaces the interface's default.
    if apply_gate is not None and apply_gate.__module__ != use_experts_implementation.__module__:
        return experts._apply_gate
    if act_fn is F.silu or isinstance(act_fn, SILU_CLASSES):
        return None

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return experts.act_fn(gate) * up

    return gated


class _ActiveExperts(torch.autograd.Function):
    """Forward and backward over the segments of the active experts."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        gate_fn: GateFunction | None,
        dtype: torch.dtype,
        direct_grad: bool,
    ) -> Tensor:
        capacity, hidden = gate_up_proj.shape[0], hidden_TH.shape[1]
        tokens, top_k = index_TK.shape
        # Pairs of other slabs sort to the end: one extra bin counts them, nothing else touches them.
        bins_N = index_TK.reshape(-1).clamp(max=capacity)
        order_N = torch.sort(bins_N, stable=True)[1]
        counts = torch.bincount(bins_N, minlength=capacity + 1)[:capacity].tolist()
        active = [row for row, count in enumerate(counts) if count]
        sizes = [counts[row] for row in active]
        pairs = sum(sizes)
        token_S = order_N[:pairs] // top_k

        x_SH = hidden_TH[token_S].to(dtype)
        gate_up_SI = x_SH.new_empty(pairs, gate_up_proj.shape[1])
        out_NH = x_SH.new_empty(tokens * top_k, hidden)
        out_NH[pairs:].zero_()
        with torch.autocast(hidden_TH.device.type, enabled=False):
            _segments_mm(x_SH.split(sizes), gate_up_proj.transpose(1, 2), active, gate_up_SI.split(sizes))
            if gate_fn is None:
                gate, up = gate_up_SI.chunk(2, dim=-1)
                silu_SI = F.silu(gate)
                units_SI = silu_SI * up
            else:
                silu_SI, units_SI = None, gate_fn(gate_up_SI)
            _segments_mm(units_SI.split(sizes), down_proj.transpose(1, 2), active, out_NH[:pairs].split(sizes))

        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        out_TKH = out_NH[place_N].view(tokens, top_k, hidden)
        ctx.save_for_backward(
            x_SH, gate_up_SI, silu_SI, units_SI, out_TKH, weights_TK, gate_up_proj, down_proj, order_N, place_N
        )
        ctx.parameters = (gate_up_proj, down_proj)
        ctx.active, ctx.sizes, ctx.gate_fn, ctx.direct_grad = active, sizes, gate_fn, direct_grad
        ctx.hidden_dtype = hidden_TH.dtype
        return (out_TKH * weights_TK.unsqueeze(-1)).sum(dim=1).to(hidden_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_SH, gate_up_SI, silu_SI, units_SI, out_TKH, weights_TK, *saved = ctx.saved_tensors
        gate_up_proj, down_proj, order_N, place_N = saved
        active, sizes = ctx.active, ctx.sizes
        tokens, top_k, hidden = out_TKH.shape
        pairs, dtype = x_SH.shape[0], x_SH.dtype
        needs_x, _, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad[:5]
        grad_x = grad_weights = grad_gate_up = grad_down = None

        with torch.autocast(grad_TH.device.type, enabled=False):
            if needs_weights:
                wide = torch.promote_types(out_TKH.dtype, weights_TK.dtype)
                grad_weights = torch.bmm(out_TKH.to(wide), grad_TH.to(wide).unsqueeze(2)).squeeze(2)
                grad_weights = grad_weights.to(weights_TK.dtype)

            token_S = order_N[:pairs] // top_k
            weight_S1 = weights_TK.reshape(-1)[order_N[:pairs]].unsqueeze(1)
            grad_SH = (grad_TH[token_S] * weight_S1).to(dtype)
            if needs_x or needs_gate_up:
                grad_units_SI = torch.empty_like(units_SI)
                _segments_mm(grad_SH.split(sizes), down_proj, active, grad_units_SI.split(sizes))
            if needs_down:
                grad_down = _weight_gradient(
                    ctx.parameters[1], grad_SH, units_SI, active, sizes, direct=ctx.direct_grad
                )
            if needs_x or needs_gate_up:
                grad_gate_up_SI = _gate_backward(grad_units_SI, gate_up_SI, silu_SI, ctx.gate_fn)
            if needs_x:
                grad_NH = x_SH.new_empty(tokens * top_k, hidden)
                grad_NH[pairs:].zero_()
                _segments_mm(grad_gate_up_SI.split(sizes), gate_up_proj, active, grad_NH[:pairs].split(sizes))
                grad_x = grad_NH[place_N].view(tokens, top_k, hidden).sum(dim=1).to(ctx.hidden_dtype)
            if needs_gate_up:
                grad_gate_up = _weight_gradient(
                    ctx.parameters[0], grad_gate_up_SI, x_SH, active, sizes, direct=ctx.direct_grad
                )
        return grad_x, None, grad_weights, grad_gate_up, grad_down, None, None, None


def _segments_mm(inputs: Sequence[Tensor], weights: Tensor, active: Sequence[int], outputs: Sequence[Tensor]) -> None:
    """outputs[i] = inputs[i] @ weights[active[i]] for every segment."""
    rows = _rows(weights, active)
    if weights.dtype == (inputs[0].dtype if inputs else weights.dtype):
        for row, segment, output in zip(active, inputs, outputs, strict=True):
            torch.mm(segment, rows[row], out=output)
    else:
        for row, segment, output in zip(active, inputs, outputs, strict=True):
            torch.mm(segment, rows[row].to(segment.dtype), out=output)


def _rows(weights: Tensor, active: Collection[int]) -> Any:
    """Something that indexed by a row in `active` gives a view of it."""
    # All rows at once are cheaper than many one by one, and dearer than a few of very many.
    return weights.unbind(0) if 8 * len(active) > len(weights) else weights


def _gate_backward(
    grad_units_SI: Tensor, gate_up_SI: Tensor, silu_SI: Tensor | None, gate_fn: GateFunction | None
) -> Tensor:
    """Gradient of gate_up (S, 2I) from the gradient of the hidden units (S, I), which it may overwrite."""
    if silu_SI is None:
        assert gate_fn is not None
        with torch.enable_grad():
            gate_up_SI = gate_up_SI.detach().requires_grad_()
            units_SI = gate_fn(gate_up_SI)
        return torch.autograd.grad(units_SI, gate_up_SI, grad_units_SI)[0]
    gate, up = gate_up_SI.chunk(2, dim=-1)
    grad_SI = torch.empty_like(gate_up_SI)
    grad_gate, grad_up = grad_SI.chunk(2, dim=-1)
    torch.mul(grad_units_SI, silu_SI, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_units_SI.mul_(up), gate, grad_input=grad_gate)
    return grad_SI


def _weight_gradient(
    parameter: Tensor, left_S: Tensor, right_S: Tensor, active: Sequence[int], sizes: Sequence[int], *, direct: bool
) -> Tensor | None:
    """Per active row, left_segment^T @ right_segment: returned dense, or written to the direct gradient (then None)."""
    segments = zip(active, left_S.t().split(sizes, dim=1), right_S.split(sizes), strict=True)
    same_dtype = left_S.dtype == parameter.dtype
    buffer = GradientRows.take_up(parameter, active) if direct else None
    if buffer is None:
        dense = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        _zero_rows(dense, set(range(parameter.shape[0])).difference(active))
        target, filled = dense, set()
    else:
        target, filled = buffer.rows, buffer.filled
    out_rows = _rows(target, active)
    for row, left, right in segments:
        if row in filled:
            # addmm_ has no mixed-dtype form.
            out_rows[row].addmm_(left, right) if same_dtype else out_rows[row].add_(torch.mm(left, right))
        elif same_dtype:
            torch.mm(left, right, out=out_rows[row])
        else:
            out_rows[row].copy_(torch.mm(left, right))
    if buffer is None:
        return target
    buffer.note_written(active)
    return None


def _zero_rows(tensor: Tensor, rows: set[int]) -> None:
    if len(rows) == tensor.shape[0]:
        tensor.zero_()
        return
    views = _rows(tensor, rows)
    for row in rows:
        views[row].zero_()


class GradientRows:
    """The direct gradient of one parameter: a buffer as large as it, and which rows of it may be nonzero.

    See the module's docstring for the contract. One object per parameter, which it does not keep alive.
    """

    _of_parameter: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __init__(self, parameter: Tensor):
        self.rows = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        #: Rows that may hold something else than zero.
        self.filled: set[int] = set()
        #: Version counter of `rows` after our last write; any other value means that somebody else wrote.
        self._version = self.rows._version

    @classmethod
    def take_up(cls, parameter: Tensor, active: Sequence[int]) -> GradientRows | None:
        """The parameter's buffer, installed as its `.grad` and ready to be written in rows `active`.

        Rows in `filled` are to be added to; the other active rows may hold anything and are to be overwritten.

        Returns:
            None where the direct gradient must not be used; the caller returns a dense gradient then.
        """
        if not _may_bypass_autograd(parameter):
            return None
        found = cls._of_parameter.get(parameter)
        if found is None or not found._fits(parameter):
            if parameter.grad is not None:
                return None
            found = cls._of_parameter[parameter] = cls(parameter)
        elif parameter.grad is not None and parameter.grad is not found.rows:
            return None
        found._look()
        if parameter.grad is None:
            _zero_rows(found.rows, found.filled.difference(active))
            found.filled = set()
            parameter.grad = found.rows
        return found

    @classmethod
    def of(cls, parameter: Tensor) -> GradientRows | None:
        """The buffer that is the parameter's `.grad`, with `filled` up to date; None if its gradient is another."""
        found = cls._of_parameter.get(parameter)
        if found is None or parameter.grad is not found.rows:
            return None
        found._look()
        return found

    def note_written(self, rows: Sequence[int] = ()) -> None:
        """After writing to `rows`, or scaling the gradient; nothing else may have been written in between."""
        self.filled.update(rows)
        self._version = self.rows._version

    def _look(self) -> None:
        """Believe no row to be zero if somebody else wrote."""
        if self.rows._version != self._version:
            self.filled = set(range(self.rows.shape[0]))

    def _fits(self, parameter: Tensor) -> bool:
        return (self.rows.shape, self.rows.dtype, self.rows.device) == (
            parameter.shape,
            parameter.dtype,
            parameter.device,
        )


def filled_rows(parameters: Sequence[Tensor]) -> list[int] | None:
    """Rows, ascending, in which any of these direct gradients may hold something; None where that is not known."""
    buffers = [GradientRows.of(parameter) for parameter in parameters]
    if any(buffer is None for buffer in buffers):
        return None
    return sorted(set().union(*(buffer.filled for buffer in buffers if buffer is not None)))


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients together, 0-dim: `torch.nn.utils.get_total_norm`, of direct gradients the rows alone
    that may hold something."""
    parts: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            parts += _filled_rows(parameter.grad, GradientRows.of(parameter))
    return torch.nn.utils.get_total_norm(parts)


@torch.no_grad()
def scale_gradients(parameters: Sequence[Tensor], factor: float) -> None:
    """Multiply all gradients, of direct gradients the rows alone that may hold something."""
    parts: list[Tensor] = []
    buffers: list[GradientRows] = []
    for parameter in parameters:
        if parameter.grad is not None:
            buffer = GradientRows.of(parameter)
            buffers += [] if buffer is None else [buffer]
            parts += _filled_rows(parameter.grad, buffer)
    if parts:
        torch._foreach_mul_(parts, factor)
    for buffer in buffers:
        buffer.note_written()


def _filled_rows(grad: Tensor, buffer: GradientRows | None) -> list[Tensor]:
    """The gradient in as few pieces as hold all that is not zero."""
    if buffer is None or 2 * len(buffer.filled) > len(grad):
        return [grad]
    return [grad[row] for row in sorted(buffer.filled)]


def _may_bypass_autograd(parameter: Tensor) -> bool:
    """Whether nobody but `parameter.grad` waits for this gradient."""
    return (
        type(parameter) is nn.Parameter
        and parameter.is_leaf
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
        and not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    )
