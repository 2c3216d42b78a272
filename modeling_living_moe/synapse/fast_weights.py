"""Experts with two timescales: a slab whose rows compute with slow weights and with fast ones on top.

Slow weights are the slab's own parameters. Fast weights are a gain per hidden unit and a low-rank map beside
`down_proj` (Hinton, Plaut 1987; Ba et al. 2016, arXiv:1610.06258):

    h = act(gate(x)) * up(x),    y = W ((1 + g d) * h) + g O (V h)

with W = `down_proj`, d the fast gains (I), O (H, R) the eligibility trace, V (R, I) fixed random signs (`sensors`) and
g the section's `postsynaptic_gain`. Every experts implementation of `IMPLEMENTATIONS` runs it, grouped as ever: gains
act where a kernel applies the gate, and the trace is R more hidden units beside `down_proj`.

Both parts are linear in what `down_proj` is, so any share of them moves into it without a change of function (`fold`).
The module keeps no state and decides nothing; what writes fast weights is `postsynaptic.py`.

T tokens, K experts per token, C slots, H hidden, I intermediate, R rank of the trace, N pairs of token and expert.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.active_experts import ACTIVE
from living_moe.modeling_living_moe.experts import BesideASpare, ExpertSlab, needs_a_spare
from living_moe.modeling_living_moe.ternary import renumber

#: Implementations that apply the gate through the slab, where the gains act.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", ACTIVE)
#: "grouped_mm" wants rows of whole 16 bytes: hidden units, trace included, come in multiples of this.
ALIGNED = 8


class FastRows(NamedTuple):
    """Fast weights of a slab as a pass reads them, fp32: g times the gains d (C, I), g times the trace (C, H, R)."""

    gain_CI: Tensor
    trace_CHR: Tensor


@functools.lru_cache(maxsize=64)
def sensors(rank: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """V (R, I): random signs over sqrt(R), the same for every expert of that width, on every machine.

    The mean of V^T V over draws is the identity, so a trace of products with V h is an unbiased sketch, of R columns,
    of the one with h itself.
    """
    # A tensor made under inference_mode could not take part in training later.
    with torch.inference_mode(False):
        generator = torch.Generator(device="cpu").manual_seed(rank * 2**20 + width)
        signs = torch.randint(2, (rank, width), generator=generator, device="cpu") * 2 - 1
        return (signs.double() * rank**-0.5).to(device, dtype)


def fold(down: Tensor, gain: Tensor, trace: Tensor, share: Tensor | float, g: float) -> tuple[Tensor, Tensor, Tensor]:
    """Move a share of the fast weights into the slow ones; the expert's function stays.

    With D = 1 + g d and D' = 1 + g (1 - s) d: W' = (W D + s g O V) / D', d' = (1 - s) d, O' = (1 - s) O, because then
    W' D' + g O' V = W D + g O V.

    Args:
        down: (..., H, I), any float dtype; computed in fp32 or wider.
        gain, trace: (..., I), (..., H, R), fp32.
        share: s in [0, 1], one for all or one per expert (...).
        g: Gain of the section; every 1 + g d is positive.

    Returns:
        down, gain and trace, in their dtypes.
    """
    wide = torch.promote_types(down.dtype, torch.float32)
    shares = torch.as_tensor(share, dtype=gain.dtype, device=gain.device)
    rest = 1.0 - shares
    before, after = 1.0 + g * gain, 1.0 + g * rest.unsqueeze(-1) * gain
    sense = sensors(trace.shape[-1], down.shape[-1], down.device, wide)
    moved = (g * shares[..., None, None] * trace).to(wide) @ sense
    folded = (down.to(wide) * before.unsqueeze(-2) + moved) / after.unsqueeze(-2)
    return folded.to(down.dtype), rest.unsqueeze(-1) * gain, rest[..., None, None] * trace


class FastWeightSlab(ExpertSlab):
    """A slab whose rows compute with fast weights while `fast` holds some; without them it is an `ExpertSlab`."""

    #: Set by the pool around each call.
    fast: FastRows | None = None

    def forward(self, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """As `ExpertSlab.forward`, under any of `IMPLEMENTATIONS`.

        Raises:
            ConfigurationError: The configured implementation has no place for gains between gate and down_proj.
        """
        config: Any = self.config
        name = config._experts_implementation or "eager"
        if name not in IMPLEMENTATIONS:
            raise ConfigurationError(
                f"experts_implementation={name!r} has no place for the gains of hidden units before down_proj, which "
                f"synapse.postsynaptic needs; use one of {', '.join(IMPLEMENTATIONS)}."
            )
        spare = bool(self._is_expert_parallel) and needs_a_spare(self)
        if self.fast is None:
            if spare:
                return ALL_EXPERTS_FUNCTIONS[name](BesideASpare(self), hidden_TH, 2 * rows_TK, weights_TK)
            return super().forward(hidden_TH, rows_TK, weights_TK)
        if name == "eager":
            return self._eager(hidden_TH, rows_TK, weights_TK, self.fast)
        gate_up, down, (gain_CI, trace_CHR) = self.gate_up_proj, self.down_proj, self.fast
        if name == ACTIVE:
            hit, rows_TK = renumber(rows_TK, self.num_experts)
            if len(hit) < self.num_experts:
                gate_up, down = gate_up.index_select(0, hit), down.index_select(0, hit)  # type: ignore[assignment]
                gain_CI, trace_CHR = gain_CI[hit], trace_CHR[hit]
        rank = trace_CHR.shape[-1]
        extra_CHR = F.pad(trace_CHR, (0, -(down.shape[-1] + rank) % ALIGNED)).to(down.dtype)
        down = torch.cat([down, extra_CHR], dim=-1)  # type: ignore[assignment]
        if spare:
            beside = BesideASpare(self, gate_up, down)
            gate_up, down = beside.gate_up_proj, beside.down_proj  # type: ignore[assignment]
            gain_CI, rows_TK = F.pad(gain_CI, (0, 0, 0, 1)), 2 * rows_TK
        rows_N = rows_TK.reshape(-1)
        if name != "batched_mm":
            rows_N = rows_N.sort().values
        rows_N = rows_N.clamp(max=max(len(gate_up) - 1, 0))
        view: Any = _WithFastUnits(self, gate_up, down, 1.0 + gain_CI, rows_N, rank)
        return ALL_EXPERTS_FUNCTIONS[name](view, hidden_TH, rows_TK, weights_TK)

    def _eager(self, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor, fast: FastRows) -> Tensor:
        output_TH = torch.zeros_like(hidden_TH)
        gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        for row in rows_TK.unique().tolist():
            if row >= self.num_experts:
                continue
            token, place = torch.where(rows_TK == row)
            gate, up = F.linear(hidden_TH[token], gate_up[row]).chunk(2, dim=-1)
            units = self.act_fn(gate) * up
            sense = sensors(fast.trace_CHR.shape[-1], units.shape[-1], units.device, units.dtype)
            own = F.linear(units * (1.0 + fast.gain_CI[row]).to(units.dtype), down[row])
            recalled = F.linear(F.linear(units, sense), fast.trace_CHR[row].to(units.dtype))
            output_TH.index_add_(0, token, ((own + recalled) * weights_TK[token, place, None]).to(output_TH.dtype))
        if self.trainable and torch.is_grad_enabled() and not output_TH.requires_grad:
            # Without a token too the weights take part, with a zero gradient: DDP waits for one on every rank.
            output_TH = output_TH + 0.0 * (self.gate_up_proj[0, 0, 0] + self.down_proj[0, 0, 0])
        return output_TH


class _WithFastUnits:
    """What an experts implementation sees of a slab with fast weights: more hidden units, and gains on the others.

    `rows_N` names the expert of every pair, in the order in which the implementation hands pairs to the gate.
    """

    def __init__(self, slab: ExpertSlab, gate_up: Tensor, down: Tensor, gain_CI: Tensor, rows_N: Tensor, rank: int):
        self._slab = slab
        self.gate_up_proj, self.down_proj = gate_up, down
        self.num_experts = len(gate_up)
        self._gain_CI, self._rows_N, self._rank = gain_CI, rows_N, rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slab, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        units_NI = self._slab.act_fn(gate) * up
        width = units_NI.shape[-1]
        # "active" leaves out the pairs of other slabs, which come last.
        gain_NI = self._gain_CI.to(units_NI.dtype)[self._rows_N[: len(units_NI)]]
        sense = sensors(self._rank, width, units_NI.device, units_NI.dtype)
        extra_NR = F.pad(F.linear(units_NI, sense), (0, self.down_proj.shape[-1] - width - self._rank))
        return torch.cat([units_NI * gain_NI, extra_NR], dim=-1)


__all__ = ["IMPLEMENTATIONS", "FastRows", "FastWeightSlab", "fold", "sensors"]
