"""What experts know: slabs of SwiGLU weights, and the pool of a layer's slabs.

A slab honours the Transformers experts contract (`use_experts_implementation`), so eager, batched_mm, grouped_mm and
every registered kernel run it. Never decides who lives: rows beyond the alive prefix are spare and never addressed.

C slots of a slab, H hidden, I intermediate, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import ExpertsConfig
from living_moe.configuration.slabs import SLABS, is_frozen, tier_of
from living_moe.modeling_living_moe.population import sort_slabs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from living_moe.modeling_living_moe.synapse.postsynaptic import Postsynapse
    from living_moe.modeling_living_moe.ternary import PackedTernary


@use_experts_implementation
class ExpertSlab(nn.Module):
    """`num_experts` slots of weights: `gate_up_proj (C, 2I, H)`, `down_proj (C, H, I)`.

    Args:
        config: The backbone's config object itself (not a copy): it carries the experts implementation.
        capacity: C.
        hidden_size, intermediate_size: H and I.
        trainable: Whether the weights take gradients. Frozen slabs have none, by construction.
    """

    #: Opt-in contract of the "active" implementation, see `active_experts.py`.
    direct_grad: bool = False

    def __init__(
        self, config: PreTrainedConfig, capacity: int, hidden_size: int, intermediate_size: int, *, trainable: bool
    ):
        super().__init__()
        self.num_experts = capacity
        self.hidden_dim = hidden_size
        self.intermediate_dim = intermediate_size
        self.trainable = trainable
        # Zeros, not uninitialised memory: spare rows must never hold NaN. On the meta device they cost nothing.
        self.gate_up_proj = nn.Parameter(
            torch.zeros(capacity, 2 * intermediate_size, hidden_size), requires_grad=trainable
        )
        self.down_proj = nn.Parameter(torch.zeros(capacity, hidden_size, intermediate_size), requires_grad=trainable)
        self.act_fn = ACT2FN[config.hidden_act]
        if next(self.act_fn.parameters(), None) is not None:
            raise ConfigurationError(
                f"hidden_act is {config.hidden_act!r}, which has parameters of its own: they would belong to a slab "
                f"and not to an expert, and no event could move them. Take one without, such as 'silu'."
            )

    def forward(self, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of the experts in `rows_TK`; rows >= C are pairs of another slab and add nothing.

        This body is the "eager" implementation; the decorator dispatches to the configured one.
        """
        output_TH = torch.zeros_like(hidden_TH)
        with torch.no_grad():
            mask_CKT = F.one_hot(rows_TK, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = mask_CKT[: self.num_experts].sum(dim=(-1, -2)).nonzero().flatten().tolist()
        # unbind: indexing a slab row by row would make one zero gradient of the whole slab per row.
        gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        for row in hit:
            place, token = torch.where(mask_CKT[row])
            gate, up = F.linear(hidden_TH[token], gate_up[row]).chunk(2, dim=-1)
            expert_out = F.linear(self.act_fn(gate) * up, down[row])
            output_TH.index_add_(0, token, (expert_out * weights_TK[token, place, None]).to(output_TH.dtype))
        if not hit and self.trainable:
            # Without a token too the weights take part, with a zero gradient: DDP waits for one on every rank.
            output_TH = output_TH + 0.0 * (self.gate_up_proj[0, 0, 0] + self.down_proj[0, 0, 0])
        return output_TH


def init_experts(slab: ExpertSlab, std: float, settings: ExpertsConfig) -> None:
    """Initial weights of every slot, as `experts.init` says. Gate, up and down projections are drawn one by one.

    Args:
        slab: Takes the weights; what a checkpoint has loaded is left alone.
        std: Of the default's entries, where `experts.init_gain` does not say otherwise.
    """
    for weight in (slab.gate_up_proj, slab.down_proj):
        if weight.is_meta or getattr(weight, "_is_hf_initialized", False):
            continue
        fan_in = weight.shape[-1]
        if settings.init in ("default", "pretrained"):
            init.normal_(weight, mean=0.0, std=std if settings.init_gain is None else settings.init_gain * fan_in**-0.5)
            continue
        drawn = torch.empty_like(weight, dtype=torch.float32)
        gain = 1.0 if settings.init_gain is None else settings.init_gain
        for matrix in (m for row in drawn for m in (row.chunk(2) if weight is slab.gate_up_proj else (row,))):
            if settings.init == "orthogonal":
                # As nn.init.orthogonal_, but every entry has the variance of the other kinds.
                nn.init.orthogonal_(matrix, gain=gain * max(matrix.shape) ** 0.5 * fan_in**-0.5)
            else:
                kept = torch.rand_like(matrix) >= settings.init_sparsity
                scale = gain * (fan_in * (1.0 - settings.init_sparsity)) ** -0.5
                matrix.copy_(torch.randn_like(matrix) * scale * kept)
        init.copy_(weight, drawn)


def unwrapped(module: nn.Module) -> ExpertSlab | PackedTernary:
    """The slab itself, also where PEFT has wrapped it (`target_parameters`)."""
    while (inner := getattr(module, "base_layer", None)) is not None:
        module = inner
    return module  # type: ignore[return-value]


def needs_a_spare(slab: ExpertSlab) -> bool:
    """Whether a slab that shares its layer with others has too few slots for "grouped_mm".

    It counts tokens per slot by `torch.histc` from 0 to C - 1. For one slot that range is empty, which means the range
    of the data: the other slabs' pairs are counted, and computed, too. Masked later, they only cost time and roundings;
    but then a model that was saved without its spare slots is not the same to the last bit.
    """
    config: Any = slab.config
    return slab.num_experts == 1 and config._experts_implementation == "grouped_mm"


class BesideASpare:
    """What "grouped_mm" sees of a slab with one slot: a second one, of zeros. Rows of other slabs are 2 or more."""

    def __init__(self, slab: ExpertSlab, gate_up_proj: Tensor | None = None, down_proj: Tensor | None = None):
        self._slab = slab
        self.num_experts = 2
        self.gate_up_proj, self.down_proj = (
            torch.cat([weight, torch.zeros_like(weight)])
            for weight in (
                slab.gate_up_proj if gate_up_proj is None else gate_up_proj,
                slab.down_proj if down_proj is None else down_proj,
            )
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slab, name)


class ExpertPool(nn.Module):
    """The slabs of one layer, in slot order. Child modules are named after the slabs they hold.

    Args:
        config: The backbone's config object itself.
        capacities: Slots per slab.
        hidden_size, intermediate_size: H, and I of tier 0.
        tier_factor: Width of a tier in widths of the one below.
        ternary_tiers: Tiers whose experts are ternary.
        packed: Whether those are packed.
        two_timescales: Whether experts may have fast weights beside their parameters.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        capacities: dict[str, int],
        hidden_size: int,
        intermediate_size: int,
        tier_factor: int = 1,
        ternary_tiers: Collection[int] = (),
        packed: bool = False,
        two_timescales: bool = False,
    ):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.tier_factor = tier_factor
        self.ternary_tiers = frozenset(ternary_tiers)
        self.packed = packed and bool(ternary_tiers)
        self.two_timescales = two_timescales
        #: The block's fast weights, if it has any; a list, so that they are no child here.
        self.fast: list[Postsynapse] = []
        for name in SLABS:
            if capacity := capacities.get(name, 0):
                self.add_module(name, self.new_slab(name, capacity))

    def new_slab(self, name: str, capacity: int) -> ExpertSlab | PackedTernary:
        """A slab of zeros, of the kind its tier has."""
        from living_moe.modeling_living_moe.synapse.fast_weights import FastWeightSlab
        from living_moe.modeling_living_moe.ternary import PackedTernary, TernarySlab

        if self.is_packed(name):
            return PackedTernary(capacity, self.hidden_size, self.width(name), self.config.hidden_act)
        plain = FastWeightSlab if self.two_timescales else ExpertSlab
        kind = TernarySlab if self.is_ternary(name) else plain
        return kind(self.config, capacity, self.hidden_size, self.width(name), trainable=not is_frozen(name))

    def is_ternary(self, name: str) -> bool:
        return tier_of(name) in self.ternary_tiers

    def is_packed(self, name: str) -> bool:
        return self.packed and self.is_ternary(name)

    def width(self, name: str) -> int:
        """I of a slab's experts."""
        return self.intermediate_size * self.tier_factor ** tier_of(name)

    def row_shape(self, name: str, role: str) -> tuple[int, int]:
        """Shape of one expert's weights; `role` is gate_up_proj or down_proj."""
        width = self.width(name)
        return (2 * width, self.hidden_size) if role == "gate_up_proj" else (self.hidden_size, width)

    def bytes_per_expert(self, name: str) -> int:
        """Bytes of one expert's weights in a slab."""
        if self.is_packed(name):
            from living_moe.modeling_living_moe.ternary import packed_bytes

            return packed_bytes(self.hidden_size, self.width(name))
        size: int = next(self.parameters()).element_size()
        return 3 * self.hidden_size * self.width(name) * size

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        sort_slabs(self._modules)

    def slab(self, name: str) -> ExpertSlab | PackedTernary:
        return unwrapped(self.get_submodule(name))

    def weights(self, name: str) -> ExpertSlab:
        """The slab as one that has parameters; those of packed slabs are never asked for."""
        slab = self.slab(name)
        assert isinstance(slab, ExpertSlab), f"slab {name!r} is packed"
        return slab

    def is_wrapped(self, name: str) -> bool:
        module = self._modules.get(name)
        return module is not None and hasattr(module, "base_layer")

    def rows(self, index_TK: Tensor, alive: dict[str, int]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Per slab the row of every pair, (T, K), C where it is of another slab or of none; and which those are."""
        first = 0
        for name, count in alive.items():
            rows_TK = index_TK - first
            elsewhere_TK = (rows_TK < 0) | (rows_TK >= count)
            yield name, rows_TK.masked_fill(elsewhere_TK, self.slab(name).num_experts), elsewhere_TK
            first += count

    def forward(
        self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, alive: dict[str, int], *, full: bool = True
    ) -> Tensor:
        """Weighted sum over each token's experts.

        Args:
            hidden_TH: Tokens, any float dtype.
            index_TK: int64, experts in slot order (0 <= index < sum of `alive`); negative where a place is not used.
            weights_TK: Routing weights.
            alive: Alive rows per slab, in slot order.
            full: Whether every place is used.

        Returns:
            (T, H), dtype of `hidden_TH`.
        """
        if len(alive) == 1 and full:
            # One slab: exactly the call the source family makes, so a graft is exact bit for bit.
            return self._slab_output(next(iter(alive)), hidden_TH, index_TK, weights_TK)
        output: Any = None
        for name, rows_TK, elsewhere_TK in self.rows(index_TK, alive):
            slab = self.slab(name)
            # Pairs of another slab, or of none, are what expert-parallel dispatch calls sentinels: skipped.
            module = self.get_submodule(name)
            weights = weights_TK.masked_fill(elsewhere_TK, 0.0)
            slab._is_expert_parallel = True  # type: ignore[assignment]
            if type(module) is ExpertSlab and needs_a_spare(module):
                grouped_mm: Any = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
                part = grouped_mm(BesideASpare(module), hidden_TH, 2 * rows_TK, weights)
            else:
                part = self._slab_output(name, hidden_TH, rows_TK, weights)
            slab._is_expert_parallel = False  # type: ignore[assignment]
            output = part if output is None else output + part
        return output

    def _slab_output(self, name: str, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """One slab's part, with the fast weights of its rows if there are any."""
        fast = self.fast[0].read(name) if self.fast else None
        module, slab = self.get_submodule(name), self.slab(name)
        if fast is None:
            return module(hidden_TH, rows_TK, weights_TK)
        slab.fast = fast  # type: ignore[assignment]
        try:
            return module(hidden_TH, rows_TK, weights_TK)
        finally:
            slab.fast = None  # type: ignore[assignment]
