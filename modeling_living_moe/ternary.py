"""Experts of 1.58 bits: ternary weights, 8-bit activations (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).

A matrix of weights becomes q * scale with q in {-1, 0, 1} and one scale, its mean magnitude; an expert has three
matrices: gate, up, down. A token becomes integers of [-127, 127] times its largest magnitude / 127, before gate and up
and again before down.

- Training (`TernarySlab`): the parameters stay latent floats, every pass multiplies by their quantised values, and the
  straight-through estimator gives the latents the gradient of those values (Bengio et al. 2013, arXiv:1308.3432).
- Storage and inference (`PackedTernary`): five trits to a byte, 1.6 bits per weight. An expert is unpacked when tokens
  reach it, and computes the bits that the latents it was packed from compute with the "eager" implementation.
- Conversion (`ternarize_`): thresholds and scales fitted to calibration tokens, written back as latents.

Knows no populations: spare slots are zeros, stay zeros, and cost their bytes.

T tokens, K experts per token, C slots, H hidden, I intermediate, R x N one matrix, B packed bytes of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.active_experts import ACTIVE
from living_moe.modeling_living_moe.experts import BesideASpare, ExpertSlab, needs_a_spare
from living_moe.modeling_living_moe.population import KeepsDtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TRITS_PER_BYTE = 5
#: The byte of five zeros.
ZEROS_BYTE = 121
#: What ternary experts run with. Other kernels may fuse the activation and leave no place to quantise before down.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", ACTIVE)
#: Keeps divisions by the scale of zeros finite; far below any scale of weights that are not.
TINY = torch.finfo(torch.float32).tiny
#: Elements quantised at a time (whole matrices, at least one): temporaries of 2 MiB each stay in a CPU's cache.
CHUNK = 2**19
#: What `ternarize_` tries: thresholds in units of a matrix's mean magnitude. BitNet's is 0.5; for normal weights the
#: smallest error is at 0.77, for heavier tails above (Li, Liu 2016, arXiv:1605.04711).
THRESHOLDS = tuple(step / 10 for step in range(2, 18))

Activation = Callable[[Tensor], Tensor]


# -- quantisers --------------------------------------------------------------------------------------------------------


def ternary_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean quantisation of each matrix: q = clamp(round(weight / scale), -1, 1), ties to even.

    Args:
        weight: (..., R, N), any float dtype; computed in fp32. Not differentiated.

    Returns:
        q: int8 (..., R, N).
        scale: fp32 (...), mean magnitude of each matrix; its bits do not depend on how many matrices come together. A
            matrix of zeros has scale 0 and q = 0; one that holds NaN or infinity has no finite scale.
    """
    weight = weight.detach().float()
    scale = _absmean(weight)
    return (weight / scale.clamp(min=TINY)[..., None, None]).round_().clamp_(-1, 1).to(torch.int8), scale


def _absmean(weight: Tensor) -> Tensor:
    """Mean magnitude over the last two dimensions, fp32.

    One matrix at a time: torch adds one matrix in another order than many, and a scale that differs in its last bit can
    turn a weight at the threshold. Packed and latent experts must agree however they are batched.
    """
    means = [matrix.abs().mean() for matrix in weight.reshape(-1, *weight.shape[-2:])]
    return torch.stack(means).view(weight.shape[:-2]) if means else weight.new_empty(weight.shape[:-2])


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q * scale, (..., R, N), rounded once from fp32 to `dtype`."""
    return (q * scale[..., None, None]).to(dtype)


class _StraightThrough(torch.autograd.Function):
    """The quantiser's value, exactly; the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return quantize(latent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_quantize(weight: Tensor) -> Tensor:
    """The ternary values of latent weights, q * scale bit for bit, with the straight-through gradient.

    Args:
        weight: (..., R, N), any float dtype.

    Returns:
        (..., R, N), contiguous, dtype of `weight`.
    """
    return _StraightThrough.apply(weight, _ternary_values)


def _ternary_values(weight: Tensor) -> Tensor:
    values = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    matrices = max(1, CHUNK // (weight.shape[-1] * weight.shape[-2]))
    latents = weight.reshape(-1, *weight.shape[-2:]).split(matrices)
    for latent, value in zip(latents, values.view(-1, *weight.shape[-2:]).split(matrices), strict=True):
        q, scale = ternary_quantize(latent)
        value.copy_(q).mul_(scale[:, None, None])  # what `dequantize` gives, without its temporaries
    return values


def quantize_activations(hidden: Tensor) -> Tensor:
    """Each token rounded to 8 bits by its largest magnitude, with the straight-through gradient.

    Args:
        hidden: (..., H), any float dtype; computed in fp32.

    Returns:
        (..., H), dtype of `hidden`: integers of [-127, 127] times the token's largest magnitude / 127.
    """
    return _StraightThrough.apply(hidden, _eight_bit_values)


def _eight_bit_values(hidden: Tensor) -> Tensor:
    wide = hidden.float()
    step = wide.abs().amax(dim=-1, keepdim=True) / 127
    return (wide / step.clamp(min=TINY)).round_().mul_(step).to(hidden.dtype)


# -- packing -----------------------------------------------------------------------------------------------------------


def pack(q: Tensor) -> Tensor:
    """Five trits to a byte, in base 3, each matrix padded with zeros to whole bytes.

    Args:
        q: (..., R, N) of -1, 0, 1, any dtype.

    Returns:
        uint8 (..., B), B = ceil(R * N / 5).

    Raises:
        ConfigurationError: `q` holds another value.
    """
    if not ((q == 0) | (q.abs() == 1)).all():
        raise ConfigurationError(
            f"pack takes -1, 0 and 1, got values in [{q.min().item()}, {q.max().item()}]; quantise first "
            f"(ternary_quantize)."
        )
    digits = q.flatten(-2).to(torch.int8) + 1
    digits = F.pad(digits, (0, -digits.shape[-1] % TRITS_PER_BYTE), value=1).to(torch.uint8)
    first, *others = digits.unflatten(-1, (-1, TRITS_PER_BYTE)).unbind(-1)
    packed = first.clone()
    for digit in others:
        packed.mul_(3).add_(digit)
    return packed


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`: uint8 (..., B) -> int8 (..., R, N) for `shape` = (R, N)."""
    trits = _trits(packed.device).index_select(0, packed.reshape(-1).int())
    return trits.view(*packed.shape[:-1], -1)[..., : shape[0] * shape[1]].unflatten(-1, shape)


def unpack_values(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`dequantize(unpack(packed, shape), scale, dtype)`, contiguous, at the price of one look-up per byte.

    Args:
        packed: uint8 (M, B), M matrices.
        scale: fp32 (M,).
    """
    # One table per matrix, with its scale already in.
    tables = dequantize(_trits(packed.device), scale, dtype).view(-1, TRITS_PER_BYTE)
    first = torch.arange(0, len(tables), 256, dtype=torch.int32, device=packed.device)
    values = tables.index_select(0, (packed + first[:, None]).view(-1)).view(len(packed), -1)
    return values[:, : shape[0] * shape[1]].contiguous().view(-1, *shape)


def _trits(device: torch.device) -> Tensor:
    """int8 (256, 5): what each byte holds. 243 to 255 hold nothing that `pack` writes."""
    powers = torch.tensor([81, 27, 9, 3, 1], device=device)
    return (torch.arange(256, device=device)[:, None] // powers % 3 - 1).to(torch.int8)


# -- experts -----------------------------------------------------------------------------------------------------------


def ternary_experts_forward(
    hidden_TH: Tensor,
    rows_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    expert: Callable[[int], tuple[Tensor, Tensor]],
    act_fn: Activation,
) -> Tensor:
    """Weighted sum of each token's ternary experts, one expert with tokens after the other.

    Args:
        hidden_TH: Tokens, any float dtype; quantised here.
        rows_TK: int64; rows >= `num_experts` are pairs of another slab and add nothing.
        weights_TK: Routing weights, any float dtype.
        num_experts: C.
        expert: Ternary values of a row, gate_up (2I, H) and down (H, I); asked once for each row that has tokens. What
            computes them (latents, packed bytes) decides what is differentiated.

    Returns:
        (T, H), dtype of `hidden_TH`.
    """
    output_TH = torch.zeros_like(hidden_TH)
    hidden_TH = quantize_activations(hidden_TH)
    # By place, then by token within a row, as ExpertSlab adds them up.
    rows_N = rows_TK.t().reshape(-1).clamp(max=num_experts)
    counts = torch.bincount(rows_N, minlength=num_experts + 1).tolist()
    order_N = torch.sort(rows_N, stable=True)[1]
    tokens = (order_N % max(1, len(hidden_TH))).split(counts)
    weights = weights_TK.t().reshape(-1)[order_N].split(counts)
    for row, count in enumerate(counts[:num_experts]):
        if not count:
            continue
        gate_up, down = expert(row)
        gate, up = F.linear(hidden_TH[tokens[row]], gate_up).chunk(2, dim=-1)
        expert_out = F.linear(quantize_activations(act_fn(gate) * up), down)
        output_TH.index_add_(0, tokens[row], (expert_out * weights[row][:, None]).to(output_TH.dtype))
    return output_TH


def _gate_and_up(gate_up: Tensor) -> Tensor:
    """(..., 2I, H) as two matrices (..., 2, I, H)."""
    return gate_up.unflatten(-2, (2, -1))


def _fake_quantize_gate_up(gate_up: Tensor) -> Tensor:
    return fake_quantize(_gate_and_up(gate_up)).flatten(-3, -2)


def ternary_row(row: Tensor, role: str) -> Tensor:
    """What one expert's latents compute with; `row` is (2I, H) where `role` is gate_up_proj, (H, I) for down_proj."""
    return _fake_quantize_gate_up(row) if role == "gate_up_proj" else fake_quantize(row)


def fitted_row(row: Tensor, role: str) -> Tensor:
    """Latents whose ternary values are as near as can be to one expert's float weights, as in `ternary_row`."""
    matrices = row.chunk(2) if role == "gate_up_proj" else (row,)
    return torch.cat([_fit(matrix.float(), None, matrix.float()) for matrix in matrices]).to(row.dtype)


class TernarySlab(ExpertSlab):
    """A slab whose parameters are latent: every pass computes with their ternary values and 8-bit activations.

    The parameters are ExpertSlab's in name, shape and meaning of their rows: surgery, optimizers and checkpoints need
    not know. A split copies latents and is exact; a mean of latents (a merge) is quantised like any other.
    """

    def forward(self, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """As `ExpertSlab.forward`, quantised, under any of `IMPLEMENTATIONS`.

        "eager" and "active" quantise the rows that have tokens and wait for the device once to learn which;
        "batched_mm" and "grouped_mm" quantise the whole slab and never wait.

        Raises:
            ConfigurationError: The configured implementation has no place to quantise before down.
        """
        config: Any = self.config
        name = config._experts_implementation or "eager"
        if name not in IMPLEMENTATIONS:
            raise ConfigurationError(
                f"experts_implementation={name!r} cannot quantise the activations before down_proj, which ternary "
                f"experts need; use one of {', '.join(IMPLEMENTATIONS)}."
            )
        if name == "eager":
            return self._eager(hidden_TH, rows_TK, weights_TK)
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if name == ACTIVE:
            hit, rows_TK = renumber(rows_TK, self.num_experts)
            if len(hit) < self.num_experts:
                gate_up, down = gate_up.index_select(0, hit), down.index_select(0, hit)
        gate_up, down = _fake_quantize_gate_up(gate_up), fake_quantize(down)
        if self._is_expert_parallel and needs_a_spare(self):
            spare = BesideASpare(self, gate_up, down)
            gate_up, down, rows_TK = spare.gate_up_proj, spare.down_proj, 2 * rows_TK
        quantised: Any = _QuantisedSlab(self, gate_up, down)
        implementation = ALL_EXPERTS_FUNCTIONS[name]
        return implementation(quantised, quantize_activations(hidden_TH), rows_TK, weights_TK)

    def _eager(self, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)

        def expert(row: int) -> tuple[Tensor, Tensor]:
            return _fake_quantize_gate_up(gate_up[row]), fake_quantize(down[row])

        output_TH = ternary_experts_forward(hidden_TH, rows_TK, weights_TK, self.num_experts, expert, self.act_fn)
        if self.trainable and torch.is_grad_enabled() and not output_TH.requires_grad:
            # Without a token too the weights take part, with a zero gradient: DDP waits for one on every rank.
            output_TH = output_TH + 0.0 * (self.gate_up_proj[0, 0, 0] + self.down_proj[0, 0, 0])
        return output_TH


class _QuantisedSlab:
    """What an experts implementation sees of a `TernarySlab`: ternary values, and a gate that gives 8-bit units."""

    def __init__(self, slab: TernarySlab, gate_up_proj: Tensor, down_proj: Tensor):
        self._slab = slab
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.num_experts = len(gate_up_proj)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slab, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return quantize_activations(self._slab.act_fn(gate) * up)


def renumber(rows_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rows that have tokens, ascending, and `rows_TK` counted among them; other slabs' pairs get their number."""
    rows_TK = rows_TK.clamp(max=num_experts)
    hit = torch.bincount(rows_TK.reshape(-1), minlength=num_experts + 1)[:num_experts].nonzero().flatten()
    place = rows_TK.new_full((num_experts + 1,), len(hit))
    place[hit] = torch.arange(len(hit), device=hit.device)
    return hit, place[rows_TK]


def packed_bytes(hidden_size: int, intermediate_size: int) -> int:
    """Bytes of one packed expert: three matrices, each with its scale."""
    return 3 * (-(-hidden_size * intermediate_size // TRITS_PER_BYTE) + 4)


class PackedTernary(KeepsDtype):
    """A slab that is its packed weights and scales, 1.6 bits per weight, in memory and in a state dict.

    Every buffer has the slots as its first dimension, and each slot's matrices start at a byte of their own. Without
    parameters; input and routing weights take gradients, bit for bit those of the latents' "eager" implementation.

    Args:
        capacity: C. All slots are zeros.
        hidden_size, intermediate_size: H and I.
        act_fn: The expert's activation, or Transformers' name of it.
    """

    gate_up_packed: Tensor  # uint8 (C, 2, B)
    gate_up_scale: Tensor  # fp32 (C, 2)
    down_packed: Tensor  # uint8 (C, B)
    down_scale: Tensor  # fp32 (C,)

    def __init__(self, capacity: int, hidden_size: int, intermediate_size: int, act_fn: str | nn.Module):
        super().__init__()
        self.num_experts = capacity
        self.hidden_dim = hidden_size
        self.intermediate_dim = intermediate_size
        self.act_fn: Any = ACT2FN[act_fn] if isinstance(act_fn, str) else act_fn
        num_bytes = -(-hidden_size * intermediate_size // TRITS_PER_BYTE)
        self.register_buffer("gate_up_packed", torch.full((capacity, 2, num_bytes), ZEROS_BYTE, dtype=torch.uint8))
        self.register_buffer("gate_up_scale", torch.zeros(capacity, 2, dtype=torch.float32))
        self.register_buffer("down_packed", torch.full((capacity, num_bytes), ZEROS_BYTE, dtype=torch.uint8))
        self.register_buffer("down_scale", torch.zeros(capacity, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Zeros in every slot that no checkpoint has filled."""
        for name, buffer in self.named_buffers():
            init.constant_(buffer, ZEROS_BYTE if name.endswith("packed") else 0)

    @classmethod
    @torch.no_grad()
    def from_slab(cls, slab: ExpertSlab) -> PackedTernary:
        """Pack a slab's weights as `ternary_quantize` quantises them, on the slab's device."""
        packed = cls(slab.num_experts, slab.hidden_dim, slab.intermediate_dim, slab.act_fn)
        packed = packed.to(slab.gate_up_proj.device)
        # Slot by slot: a slab's temporaries would take more memory than the slab.
        for row in range(slab.num_experts):
            q, scale = ternary_quantize(_gate_and_up(slab.gate_up_proj[row]))
            packed.gate_up_packed[row], packed.gate_up_scale[row] = pack(q), scale
            q, scale = ternary_quantize(slab.down_proj[row])
            packed.down_packed[row], packed.down_scale[row] = pack(q), scale
        return packed

    def forward(self, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """As `TernarySlab.forward` with "eager", bit for bit; experts are unpacked to the dtype of `hidden_TH`."""

        def expert(row: int) -> tuple[Tensor, Tensor]:
            return self.values(row, hidden_TH.dtype)

        return ternary_experts_forward(hidden_TH, rows_TK, weights_TK, self.num_experts, expert, self.act_fn)

    def values(self, row: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One slot's ternary values: gate_up (2I, H) and down (H, I)."""
        hidden, inner = self.hidden_dim, self.intermediate_dim
        gate_up = unpack_values(self.gate_up_packed[row], self.gate_up_scale[row], (inner, hidden), dtype)
        down = unpack_values(self.down_packed[row, None], self.down_scale[row, None], (hidden, inner), dtype)
        return gate_up.flatten(0, 1), down[0]

    def latents(self, row: int) -> tuple[Tensor, Tensor]:
        """fp32 latents of one slot, gate_up (2I, H) and down (H, I), to go on training from.

        Their quantisation is the slot's q, and its scale to the rounding of a mean in fp32.
        """
        hidden, inner = self.hidden_dim, self.intermediate_dim
        gate_up = unpack(self.gate_up_packed[row], (inner, hidden)).float()
        down = unpack(self.down_packed[row], (hidden, inner)).float()
        parts = [latent_weights(q, 0.5, scale) for q, scale in zip(gate_up, self.gate_up_scale[row], strict=True)]
        return torch.cat(parts), latent_weights(down, 0.5, self.down_scale[row])

    @torch.no_grad()
    def to_slab(self, config: PreTrainedConfig, dtype: torch.dtype, *, trainable: bool) -> TernarySlab:
        """Latents of all slots, on this slab's device; the inverse of `from_slab` as far as `latents` says."""
        slab = TernarySlab(config, self.num_experts, self.hidden_dim, self.intermediate_dim, trainable=trainable)
        slab = slab.to(self.down_scale.device, dtype).train(self.training)
        for row in range(self.num_experts):
            slab.gate_up_proj[row], slab.down_proj[row] = self.latents(row)
        return slab

    def row_select(self, rows: Sequence[int]) -> PackedTernary:
        """A slab of `len(rows)` slots: slot i is this one's slot `rows[i]`, or zeros where that is negative."""
        selected = type(self)(len(rows), self.hidden_dim, self.intermediate_dim, self.act_fn)
        selected = selected.to(self.gate_up_packed.device).train(self.training)
        taken = [place for place, row in enumerate(rows) if row >= 0]
        sources = [row for row in rows if row >= 0]
        for ours, theirs in zip(selected.buffers(), self.buffers(), strict=True):
            ours[taken] = theirs[sources]
        return selected

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and padding, all slots."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"


# -- conversion --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TernaryReport:
    """Relative errors |ternary - float| / |float| (Frobenius) per slot, fp32 (C,).

    Of the expert's outputs over its calibration tokens, activations quantised too; of its weights, where it had no
    tokens. 0 for slots of zeros.

    Attributes:
        absmean_C: With the plain absmean quantiser.
        calibrated_C: With what `ternarize_` wrote; never larger.
    """

    absmean_C: Tensor
    calibrated_C: Tensor


def latent_weights(weight: Tensor, threshold: float | Tensor, scale: float | Tensor) -> Tensor:
    """Weights that absmean quantisation takes to q = sign(weight) * (|weight| > threshold) and to `scale`.

    A monotone map of the magnitudes: those that become 0 go below scale / 2, in proportion; the others go above, as
    far as it takes to make the mean magnitude `scale`. So training goes on with the float weights' order of magnitudes.

    Args:
        weight: (R, N), any float dtype.
        threshold, scale: Positive.

    Returns:
        fp32 (R, N), also good rounded to bf16: its q is exact, its scale is so up to the rounding of a mean.
    """
    weight = weight.float()
    magnitude = weight.abs()
    excess = (magnitude - threshold).clamp(min=0)
    if not excess.any():
        return torch.zeros_like(weight)
    # A margin of 4 % on both sides of scale / 2, so that no rounding moves a weight across.
    above = excess > 0
    shape = torch.where(above, 0.52, 0.48 * magnitude / threshold)
    stretch = (1 - _absmean(shape)) / _absmean(excess)
    return (shape + excess * stretch) * scale * weight.sign()


@torch.no_grad()
def ternarize_(slab: ExpertSlab, hidden_TH: Tensor | None = None, rows_TK: Tensor | None = None) -> TernaryReport:
    """Turn float experts into latents of ternary ones, in place, with thresholds and scales fitted to their tokens.

    For each matrix: of `THRESHOLDS`, the one with the smallest squared error of the matrix's outputs, each with the
    scale that is best for it (least squares, closed form). Down is fitted last, on the quantised units that gate and up
    give, to the float expert's outputs. Where the expert as a whole comes out no better than with plain absmean, its
    weights stay as they are, so the calibration never loses on its own tokens.

    Args:
        slab: Its weights are replaced by latents of the same dtype, to be used as a `TernarySlab` or packed.
        hidden_TH, rows_TK: Tokens and their rows, as the slab receives them; rows >= C are of another slab. Without
            them, and for rows that no token names, the errors are the weights' own.

    Raises:
        ConfigurationError: One of the two is missing, or they disagree on T.
    """
    if (hidden_TH is None) != (rows_TK is None) or (
        hidden_TH is not None and rows_TK is not None and len(hidden_TH) != len(rows_TK)
    ):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (hidden_TH, rows_TK)]
        raise ConfigurationError(
            f"ternarize_ needs a row of experts for each token, got hidden states {shapes[0]} and rows {shapes[1]}; "
            f"pass what the slab receives, or neither."
        )
    errors = torch.zeros(2, slab.num_experts, device=slab.gate_up_proj.device)
    for row in range(slab.num_experts):
        weights = (slab.gate_up_proj[row], slab.down_proj[row])
        tokens = None
        if hidden_TH is not None and rows_TK is not None and (rows_TK == row).any():
            tokens = hidden_TH[(rows_TK == row).any(dim=-1)].float()
        exact = [part.float() for part in (*weights[0].chunk(2), weights[1])]
        fitted = _fit_expert(exact, tokens, slab.act_fn)
        # Measured as they will be: rounded to the slab's dtype.
        found = (torch.cat(fitted[:2]).to(weights[0].dtype), fitted[2].to(weights[1].dtype))
        before, after = (
            _relative_error(exact, [part.float() for part in (*gate_up.chunk(2), down)], tokens, slab.act_fn)
            for gate_up, down in (weights, found)
        )
        if after < before:
            weights[0].copy_(found[0])
            weights[1].copy_(found[1])
        errors[0, row], errors[1, row] = before, torch.minimum(before, after)
    return TernaryReport(*errors)


def _fit_expert(exact: Sequence[Tensor], tokens: Tensor | None, act_fn: Activation) -> list[Tensor]:
    """Latents of gate, up and down. `tokens`: fp32 (T, H), or None."""
    if tokens is None:
        return [_fit(weight, None, weight) for weight in exact]
    seen = quantize_activations(tokens)
    latents = [_fit(weight, seen, tokens @ weight.T) for weight in exact[:2]]
    gate, up = (seen @ fake_quantize(latent).T for latent in latents)
    units = quantize_activations(act_fn(gate) * up)
    return [*latents, _fit(exact[2], units, _expert_output(exact, tokens, act_fn))]


def _fit(weight: Tensor, inputs: Tensor | None, target: Tensor) -> Tensor:
    """Latents of one matrix: least |target - inputs @ (q * scale).T|, or least |target - q * scale| without inputs."""
    unit = _absmean(weight)
    best, best_gain = weight, 0.0
    for threshold in (unit * share for share in THRESHOLDS):
        q = weight.sign() * (weight.abs() > threshold)
        outputs = q if inputs is None else inputs @ q.T
        fit, power = float((outputs * target).sum()), float(outputs.square().sum())
        # Scale fit / power leaves the error |target|^2 - fit^2 / power.
        if fit > 0 and (gain := fit**2 / power) > best_gain:
            best, best_gain = latent_weights(weight, threshold, fit / power), gain
    return best


def _relative_error(
    exact: Sequence[Tensor], latents: Sequence[Tensor], tokens: Tensor | None, act_fn: Activation
) -> Tensor:
    values = [fake_quantize(latent) for latent in latents]
    if tokens is None:
        wanted, found = (torch.cat([part.flatten() for part in parts]) for parts in (exact, values))
    else:
        wanted = _expert_output(exact, tokens, act_fn)
        gate, up = (quantize_activations(tokens) @ value.T for value in values[:2])
        found = quantize_activations(act_fn(gate) * up) @ values[2].T
    return (found - wanted).norm() / wanted.norm().clamp(min=TINY)


def _expert_output(exact: Sequence[Tensor], tokens: Tensor, act_fn: Activation) -> Tensor:
    gate, up, down = exact
    return (act_fn(tokens @ gate.T) * (tokens @ up.T)) @ down.T
