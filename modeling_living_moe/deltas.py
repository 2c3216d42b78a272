"""Low-rank deltas on linear maps that open with the receptive field of a token.

Frozen experts alone do not stop forgetting: attention and the head move too. So a newborn field owns low-rank updates
(Hu et al. 2021, LoRA, arXiv:2106.09685) of the attention projections and of the head, which act on the tokens of that
field only. A token of field 0, the root, keeps the output of the source's own map bit for bit.

The linear maps stay the source family's modules, with their names and state-dict keys; a delta hears of the token's
field from a `GateHolder`, because the family's attention passes no argument through to its projections.

F newborn fields (numbered 1..F), R rank, ... any leading token shape. The module must not decide which field a token is
in (receptive_field.py), nor when a field is born.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.receptive_field import FieldGate

#: Child of a decoder layer's `self_attn` that holds its deltas.
FIELD_DELTAS = "field_deltas"


class GateHolder:
    """Where the gate of the forward pass under way is left, for the deltas of one attention module to read."""

    def __init__(self) -> None:
        self.gate: FieldGate | None = None


class FieldDelta(nn.Module):
    """A low-rank update of one linear map per newborn field: `out + up_f @ down_f @ x` for a token of field f.

    A newborn delta is exactly zero (`up` starts at zero), so the birth of a field changes no output.

    Args:
        in_features: Width of the map's input.
        out_features: Width of the map's output.
        rank: R, at least 1 (typical 16 to 128).
        num_fields: F, newborn fields.
        holder: Read by `after_linear`; not needed where `forward` is called with the field index.
        device: Of the parameters; None is torch's present default.
        dtype: Of the parameters; None is torch's present default.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        num_fields: int = 1,
        *,
        holder: GateHolder | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.holder = holder
        self.down = nn.Parameter(torch.empty(num_fields, rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(num_fields, out_features, rank, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero `up`, normal `down` of variance 1 / in_features; leaves alone what a checkpoint has loaded."""
        # Transformers' initialisers skip tensors that `from_pretrained` has already filled; torch's own do not.
        init.normal_(self.down, mean=0.0, std=self.down.shape[-1] ** -0.5)
        init.zeros_(self.up)

    @torch.no_grad()
    def resize_output(self, out_features: int) -> None:
        """Follow a linear map that changed its number of outputs; the delta of a new output is zero."""
        old = self.up
        if old.shape[1] == out_features:
            return
        kept = min(old.shape[1], out_features)
        up = old.new_zeros(old.shape[0], out_features, old.shape[2])
        up[:, :kept] = old[:, :kept]
        self.up = nn.Parameter(up, requires_grad=old.requires_grad)

    def forward(self, x: Tensor, out: Tensor, field_index: Tensor) -> Tensor:
        """Add to `out` the update of each token's field.

        Args:
            x: Input of the linear map, shape (..., in_features).
            out: Its output, shape (..., out_features), any float dtype.
            field_index: int64, one field per token, shape (...) or any shape of as many elements in the same order.

        Returns:
            Shape and dtype of `out`; bit for bit `out` where the field is 0. Every field takes part in the graph, also
            one without a token, so that all parameters get a gradient (zero there) and DDP never waits for one.
        """
        index = field_index.reshape(x.shape[:-1]).unsqueeze(-1)
        x = x.to(self.down.dtype)
        result = out
        for field, (down, up) in enumerate(zip(self.down.unbind(0), self.up.unbind(0), strict=True), start=1):
            update = F.linear(F.linear(x, down), up)
            result = torch.where(index == field, result + update.to(out.dtype), result)
        return result

    def after_linear(self, linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Forward hook of the linear map: apply the gate in the holder, or return `out` untouched when all is closed.

        In training the delta always takes part, so that the graph is the same whatever the gate says; when compiled
        too, since a branch on the gate would break the graph.
        """
        gate = None if self.holder is None else self.holder.gate
        (x,) = args
        if gate is None:
            if not self.training:
                return out
            index = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        elif self.training or torch.compiler.is_compiling() or gate.any_open():
            index = gate.index.to(x.device)
        else:
            return out
        result: Tensor = self(x, out, index)
        return result

    def extra_repr(self) -> str:
        fields, rank, in_features = self.down.shape
        return f"in_features={in_features}, out_features={self.up.shape[1]}, rank={rank}, num_fields={fields}"


def attach_deltas(decoder_layer: nn.Module, names: list[str], rank: int, num_fields: int) -> None:
    """Give the linear maps of a decoder layer's attention a delta each, and leave the maps where they are.

    Adds to `decoder_layer.self_attn` the child `field_deltas`, with one `FieldDelta` per map under "<name>_delta" (the
    bare name would be matched by adapters that target it), and `gate_holder`, whose `gate` the caller sets before each
    pass (again before a recomputation).

    Args:
        decoder_layer: Has `self_attn`.
        names: Attributes of `self_attn` that are `nn.Linear`, such as "q_proj".
        rank: R of the deltas.
        num_fields: F.

    Raises:
        ConfigurationError: A name is no linear map of this attention, or it has deltas already. Nothing is changed.
    """
    attention = decoder_layer.get_submodule("self_attn")
    if hasattr(attention, FIELD_DELTAS):
        raise ConfigurationError(f"{type(attention).__name__} has field deltas already; attach them once.")
    linears = {}
    for name in names:
        linear = getattr(attention, name, None)
        if not isinstance(linear, nn.Linear):
            known = ", ".join(key for key, module in attention.named_children() if isinstance(module, nn.Linear))
            raise ConfigurationError(
                f"{type(attention).__name__}.{name} must be an nn.Linear to get a field delta, got "
                f"{type(linear).__name__}. Its linear maps: {known}."
            )
        linears[name] = linear
    holder = GateHolder()
    deltas = nn.ModuleDict()
    for name, linear in linears.items():
        delta = FieldDelta(
            linear.in_features,
            linear.out_features,
            rank,
            num_fields,
            holder=holder,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        # A bound method, not a closure: `copy.deepcopy` and pickle follow it to the copy's own delta.
        linear.register_forward_hook(delta.after_linear)
        deltas[f"{name}_delta"] = delta
    deltas.train(attention.training)
    attention.gate_holder = holder  # type: ignore[assignment]
    attention.add_module(FIELD_DELTAS, deltas)


__all__ = ["FieldDelta", "GateHolder", "attach_deltas"]
