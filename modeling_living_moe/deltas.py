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

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.distributed import world_size
from living_moe.modeling_living_moe.receptive_field import FieldGate

#: Child of a decoder layer's `self_attn` that holds its deltas.
FIELD_DELTAS = "field_deltas"


class GateHolder:
    """Where the gate of the forward pass under way is left, for the deltas of one attention module to read."""

    def __init__(self) -> None:
        self.gate: FieldGate | None = None


class DownMaps(nn.ParameterList):
    """First factors, (R, in_features) per newborn field."""

    def reset_parameters(self) -> None:
        """Normal of variance 1 / in_features; leaves alone what a checkpoint has loaded."""
        # Transformers' initialisers skip tensors that `from_pretrained` has already filled; torch's own do not.
        for down in self:
            init.normal_(down, mean=0.0, std=down.shape[-1] ** -0.5)


class UpMaps(nn.ParameterList):
    """Second factors, (out_features, R) per newborn field."""

    def reset_parameters(self) -> None:
        """Zero; leaves alone what a checkpoint has loaded."""
        for up in self:
            init.zeros_(up)


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
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down, self.up = DownMaps(), UpMaps()
        for _ in range(num_fields):
            self.down.append(nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype)))
            self.up.append(nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def num_fields(self) -> int:
        return len(self.down)

    def new_field(self, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Maps (R, in_features) and (out_features, R) of one more field, like the others; not yet in the module."""
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(self.rank, self.in_features, generator=generator, dtype=torch.float32, device="cpu")
        like = self.down[0]
        down = nn.Parameter((drawn * self.in_features**-0.5).to(like), requires_grad=like.requires_grad)
        return down, nn.Parameter(like.new_zeros(self.out_features, self.rank), requires_grad=like.requires_grad)

    def append(self, down: nn.Parameter, up: nn.Parameter) -> None:
        """Take up what `new_field` made."""
        self.down.append(down)
        self.up.append(up)

    def keep(self, num_fields: int) -> None:
        """Drop the deltas of the fields after the first `num_fields`."""
        self.down, self.up = self.down[:num_fields], self.up[:num_fields]

    def reset_parameters(self) -> None:
        """Initial values of both factors; leaves alone what a checkpoint has loaded."""
        self.down.reset_parameters()
        self.up.reset_parameters()

    @torch.no_grad()
    def resize_output(self, out_features: int) -> None:
        """Follow a linear map that changed its number of outputs; the delta of a new output is zero."""
        if self.out_features == out_features:
            return
        kept = min(self.out_features, out_features)
        for number, old in enumerate(self.up):
            up = old.new_zeros(out_features, self.rank)
            up[:kept] = old[:kept]
            self.up[number] = nn.Parameter(up, requires_grad=old.requires_grad)
        self.out_features = out_features

    def forward(self, x: Tensor, out: Tensor, field_index: Tensor, fields: Sequence[int] | None = None) -> Tensor:
        """Add to `out` the update of each token's field.

        Args:
            x: Input of the linear map, shape (..., in_features).
            out: Its output, shape (..., out_features), any float dtype.
            field_index: int64, one field per token, shape (...) or any shape of as many elements in the same order.
            fields: Those that take part in the graph; None is all. A token of another keeps `out`.

        Returns:
            Shape and dtype of `out`; bit for bit `out` where the field is 0.
        """
        index = field_index.reshape(x.shape[:-1]).unsqueeze(-1)
        result = out
        for field in range(1, self.num_fields + 1) if fields is None else fields:
            down, up = self.down[field - 1], self.up[field - 1]
            update = F.linear(F.linear(x.to(down.dtype), down), up)
            result = torch.where(index == field, result + update.to(out.dtype), result)
        return result

    def of_gate(self, x: Tensor, out: Tensor, index: Tensor, present: Sequence[int]) -> Tensor:
        """`forward` for a gate's tokens: fields without a token stay out of the graph, and get no gradient.

        But in training on several ranks all take part: DDP waits for every parameter's gradient (zero where there is no
        token).
        """
        if self.training and world_size() > 1:
            result: Tensor = self(x, out, index.to(x.device))
            return result
        if not present:
            return out
        result = self(x, out, index.to(x.device), present)
        return result

    def after_linear(self, linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Forward hook of the linear map: apply the gate in the holder."""
        gate = None if self.holder is None else self.holder.gate
        (x,) = args
        if gate is None:
            return self.of_gate(x, out, torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device), ())
        return self.of_gate(x, out, gate.index, gate.present)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"num_fields={self.num_fields}"
        )


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
