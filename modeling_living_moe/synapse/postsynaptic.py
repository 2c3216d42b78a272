"""The postsynaptic side: what makes an expert's fast weights, and when they become slow ones.

A token that an expert served is *presynaptic*, the layer's input at the next token of the same text is *postsynaptic*:
the fast weights learn what followed (Hebb; pre before post, as spike-timing-dependent plasticity has it). With h the
expert's hidden units, x' that next input less the mean input of the pass, both of length one, b = W^T x' of length one:

    NMDA-like coincidence     d drive = sum over tokens I b * h,   O drive = sum over tokens x' (V h)^T
    fast gains (AMPA)         d <- clamp(fast_decay d + rate I b h, +-GAIN_MOST)
    eligibility trace (PSD)   O <- trace_decay O + rate |W|_F / sqrt(I) x' (V h)^T, |O|_F <= TRACE_MOST |W|_F / sqrt(I)
    calcium                   C <- C + (1 - CALCIUM_DECAY) (c - C), c = the expert's share of the layer's |w h|
    CaMKII / PP1              a switch with two stable states, see `switch_step`
    BDNF                      B <- BDNF_DECAY B + (1 - BDNF_DECAY) max(m - 1/2, 0)
    consolidation             s = slow_rate (1 + bdnf_scale B) max(2 m - 1, 0) of d and O moves into W (`fold`)

|W|_F / sqrt(I) is how long the expert's output is for a hidden vector of length one without a direction of its own: so
`rate` is a share of the expert's own output, whatever its weights. Time passes for an expert only in steps that bring
it tokens; one without any stays as it is to the last bit.

In training evidence of a sample of tokens waits in plain tensors, is summed over ranks once per optimizer step, and
acts from the next pass on. Frozen experts do not change: neither their slow weights nor their fast ones. Under
`model.plastic()` (and `synapse.postsynaptic_inference`) every pass without gradients learns at its end, frozen experts
too, with `plastic_rate`; switch and slow weights stay. Any other evaluation touches nothing. Pairs are neighbours of
one pass: a pass of one token teaches nothing.

The module must not choose experts, nor read labels. The dispatch is `fast_weights.py`'s.

B batch, S sequence, T = B * S tokens, N sampled tokens, K experts per token, C slots, E alive rows of a slab, H hidden,
I intermediate, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import initialization as init

from living_moe.configuration.sections import SynapseConfig
from living_moe.configuration.slabs import SLABS, is_frozen, tier_of
from living_moe.modeling_living_moe.experts import ExpertPool, ExpertSlab
from living_moe.modeling_living_moe.population import KeepsDtype, RowTable
from living_moe.modeling_living_moe.signals import spread
from living_moe.modeling_living_moe.synapse.fast_weights import FastRows, fold, sensors

#: Rates per step of the switch: CaMKII's by calcium, by itself, and PP1's against it; the seed's where it has them.
CAMKII_UP, CAMKII_AUTO, CAMKII_DOWN = 0.05, 0.04, 0.02
#: Square of the active share at which autophosphorylation is at half its rate.
CAMKII_HALF_SQUARED = 0.5
#: Active share of PP1 that calcium does not call for.
PP1_BASAL = 0.3
PP1_DECAY, BDNF_DECAY, CALCIUM_DECAY = 0.985, 0.985, 0.85
#: Multiples of the mean activity beyond which calcium saturates.
CALCIUM_MOST = 8.0
#: Bounds of the fast weights: of a gain, and of the trace in lengths of the expert's output.
GAIN_MOST, TRACE_MOST = 0.5, 1.0
#: Columns that `model.postsynapse(layer)` shows.
SHOWN = ("calcium", "camkii", "pp1", "bdnf")


class PostsynapticTable(RowTable):
    """The postsynaptic side of the experts of one slab."""

    columns = {
        # Moving average of activity, multiples of the layer's mean; active shares of CaMKII and PP1; BDNF in [0, 0.5].
        "calcium": (torch.float32, 0.0),
        "camkii": (torch.float32, 0.0),
        "pp1": (torch.float32, 1.0),
        "bdnf": (torch.float32, 0.0),
    }
    calcium: Tensor
    camkii: Tensor
    pp1: Tensor
    bdnf: Tensor
    gain: Tensor
    trace: Tensor

    def __init__(self, capacity: int, hidden_size: int, width: int, rank: int):
        super().__init__(capacity)
        # (C, I) fast gains of the hidden units; (C, H, R) eligibility trace.
        self.register_buffer("gain", torch.zeros(capacity, width, dtype=torch.float32))
        self.register_buffer("trace", torch.zeros(capacity, hidden_size, rank, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.zeros_(self.gain)
        init.zeros_(self.trace)


#: Every tensor of a `PostsynapticTable`, each with a row per slot.
ROW_TENSORS = (*PostsynapticTable.columns, "gain", "trace")


@dataclass
class Evidence:
    """What the tokens of one or more passes say to the alive experts of a slab; sums, so that ranks add up.

    Attributes:
        count_E: Tokens. activity_E: Sum of routing weight times length of the hidden units.
        gain_EI, trace_EHR: The drives of the module's equations, without rates.
    """

    count_E: Tensor
    activity_E: Tensor
    gain_EI: Tensor
    trace_EHR: Tensor

    @staticmethod
    def none(experts: int, hidden_size: int, width: int, rank: int, device: torch.device) -> Evidence:
        shapes = (experts,), (experts,), (experts, width), (experts, hidden_size, rank)
        return Evidence(*(torch.zeros(shape, device=device, dtype=torch.float32) for shape in shapes))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.count_E, self.activity_E, self.gain_EI, self.trace_EHR


@dataclass(frozen=True)
class Rates:
    """Per step, of the fast weights."""

    rate: float
    fast_decay: float
    trace_decay: float


# -- the laws ----------------------------------------------------------------------------------------------------------


def switch_step(
    calcium: Tensor, camkii: Tensor, pp1: Tensor, bdnf: Tensor, camkii_threshold: float, pp1_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the CaMKII/PP1 switch and of BDNF (Lisman 1985; Zhabotinsky 2000), any shape, fp32.

    m <- m + CAMKII_UP [C > theta_c] (1 - m) + CAMKII_AUTO m^2 / (1/2 + m^2) (1 - m) - CAMKII_DOWN p m
    p <- PP1_DECAY p + (1 - PP1_DECAY) (PP1_BASAL + (1 - PP1_BASAL) [C < theta_p])

    Autophosphorylation needs active neighbours, which is what makes two stable states, near 0 and 0.79, while calcium
    lies between the thresholds. Above theta_c only the upper one is left, below theta_p only the lower one. All shares
    stay within [0, 1]: each step is a sum of pulls towards 0 and towards 1 whose rates sum to less than 1.

    Returns:
        camkii m, pp1 p, bdnf.
    """
    up = CAMKII_UP * (calcium > camkii_threshold) + CAMKII_AUTO * camkii**2 / (CAMKII_HALF_SQUARED + camkii**2)
    camkii_next = camkii + up * (1.0 - camkii) - CAMKII_DOWN * pp1 * camkii
    wanted = PP1_BASAL + (1.0 - PP1_BASAL) * (calcium < pp1_threshold)
    pp1_next = PP1_DECAY * pp1 + (1.0 - PP1_DECAY) * wanted
    bdnf_next = BDNF_DECAY * bdnf + (1.0 - BDNF_DECAY) * F.relu(camkii_next - 0.5)
    return camkii_next, pp1_next, bdnf_next


def fast_step(
    gain: Tensor, trace: Tensor, gain_drive: Tensor, trace_drive: Tensor, length: Tensor, rates: Rates
) -> tuple[Tensor, Tensor]:
    """One step of gains (..., I) and traces (..., H, R), bounded whatever drives them; a drive that is no number is 0.

    Args:
        length: |W|_F / sqrt(I) of the experts, (...).
    """
    gain_drive, trace_drive = (torch.nan_to_num(drive, 0.0, 0.0, 0.0) for drive in (gain_drive, trace_drive))
    # A drive alone cannot be more than the bound over its rate; cut first, the sum cannot overflow.
    most = 4.0 / max(rates.rate, 1e-6)
    gain = (rates.fast_decay * gain + rates.rate * gain_drive.clamp(-most, most)).clamp(-GAIN_MOST, GAIN_MOST)
    norm = torch.linalg.vector_norm(trace_drive.double(), dim=(-2, -1)).clamp_min(most)
    kept = (most / norm).to(trace.dtype)[..., None, None]
    trace = rates.trace_decay * trace + rates.rate * length[..., None, None] * (kept * trace_drive)
    bound = TRACE_MOST * length
    size = torch.linalg.vector_norm(trace, dim=(-2, -1))
    trace = trace * (bound / size.clamp_min(1e-30)).clamp(max=1.0)[..., None, None]
    return gain, trace


def share_to_consolidate(camkii: Tensor, bdnf: Tensor, slow_rate: float, bdnf_scale: float) -> Tensor:
    """Share of the fast weights that becomes slow in a step: 0 unless CaMKII is more than half active, at most 1."""
    return (slow_rate * (1.0 + bdnf_scale * bdnf) * F.relu(2.0 * camkii - 1.0)).clamp(max=1.0)


def lengths_of(down: Tensor, rows: Tensor, alive: int) -> Tensor:
    """|W|_F of some of the first `alive` rows, fp32. Reading a few too many rows costs less than copying most."""
    if 2 * len(rows) >= alive:
        return torch.linalg.vector_norm(down[:alive], dim=(-2, -1), dtype=torch.float32)[rows]
    return torch.linalg.vector_norm(down[rows], dim=(-2, -1), dtype=torch.float32)


def what_follows(hidden_BSH: Tensor, mask_BS: Tensor | None, follows_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean input of a pass, and of which tokens something follows.

    Args:
        mask_BS: Bool, False for padding; None is no padding.
        follows_BS: Bool, whether the next token goes on with the text of this one; None is always.

    Returns:
        mean_H: fp32.
        known_T: Bool.
    """
    hidden = hidden_BSH.detach().float()
    mask = hidden.isfinite().all(-1)
    if mask_BS is not None:
        mask = mask & mask_BS
    known = mask & F.pad(mask[:, 1:], (0, 1))
    if follows_BS is not None:
        known = known & follows_BS
    mean = hidden.where(mask.unsqueeze(-1), torch.zeros_like(hidden[:1, :1])).sum(dim=(0, 1)) / mask.sum().clamp_min(1)
    return mean, known.reshape(-1)


def directions_after(hidden_TH: Tensor, place_N: Tensor, known_N: Tensor, mean_H: Tensor) -> Tensor:
    """The postsynaptic direction of some tokens: the next token's input less the mean one, of length one, fp32 (N, H);
    0 where nothing follows."""
    next_NH = hidden_TH[(place_N + 1).clamp(max=len(hidden_TH) - 1)].float()
    next_NH = next_NH.where(known_N.unsqueeze(-1), mean_H)
    return F.normalize(next_NH - mean_H, dim=-1)


@torch.no_grad()
def evidence_of(
    slab: ExpertSlab, hidden_NH: Tensor, after_NH: Tensor, rows_NK: Tensor, weights_NK: Tensor, experts: int, rank: int
) -> Evidence:
    """What some tokens say to the first `experts` rows of a slab; rows beyond them are pairs of others.

    Computes the hidden units anew, and waits for the device once to learn how many pairs each expert has. What an
    expert's weights take part in is done expert by expert, the rest for all pairs at once.
    """
    width, hidden_size = slab.intermediate_dim, slab.hidden_dim
    evidence = Evidence.none(experts, hidden_size, width, rank, hidden_NH.device)
    rows_P = rows_NK.flatten()
    rows_P, order_P = torch.where((rows_P >= 0) & (rows_P < experts), rows_P, experts).sort(stable=True)
    counts_E = torch.bincount(rows_P, minlength=experts + 1)[:experts]
    counts = counts_E.tolist()
    order_P = order_P[: sum(counts)]
    if not len(order_P):
        return evidence
    token_P = order_P // rows_NK.shape[1]
    hits = [(row, count) for row, count in enumerate(counts) if count]
    rows, sizes = [row for row, _ in hits], [count for _, count in hits]
    sense = sensors(rank, width, hidden_NH.device)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        hidden_PH, after_PH = hidden_NH[token_P].to(slab.gate_up_proj.dtype), after_NH[token_P]
        after = after_PH.split(sizes)
        gate_up = [F.linear(h, slab.gate_up_proj[row]) for row, h in zip(rows, hidden_PH.split(sizes), strict=True)]
        gate, up = torch.cat(gate_up).chunk(2, dim=-1)
        units_PI = torch.nan_to_num((slab.act_fn(gate) * up).float(), 0.0, 0.0, 0.0)
        back = [x @ slab.down_proj[row].float() for row, x in zip(rows, after, strict=True)]
        unit_PI = F.normalize(units_PI, dim=-1)
        gain_PI = unit_PI * F.normalize(torch.cat(back), dim=-1)
        activity_P = weights_NK.flatten()[order_P].float() * units_PI.norm(dim=-1)
        parts = (part.split(sizes) for part in (gain_PI, activity_P, unit_PI @ sense.T))
        for row, x, gains, activities, sensed in zip(rows, after, *parts, strict=True):
            evidence.gain_EI[row] = width * gains.sum(0)
            evidence.activity_E[row] = activities.sum()
            evidence.trace_EHR[row] = x.T @ sensed
    evidence.count_E += counts_E
    return evidence


# -- one layer ---------------------------------------------------------------------------------------------------------


class Postsynapse(KeepsDtype):
    """The postsynaptic side of one layer: a `PostsynapticTable` per slab, and the evidence that waits.

    Args:
        capacities: Slots per slab.
        pool: Says how wide experts are.
        settings: The section `synapse`.
    """

    def __init__(self, capacities: Mapping[str, int], pool: ExpertPool, settings: SynapseConfig):
        super().__init__()
        self.settings = settings
        self.hidden_size, self.rank = pool.hidden_size, settings.postsynaptic_rank
        self.intermediate_size, self.tier_factor = pool.intermediate_size, pool.tier_factor
        for name in SLABS:
            if capacity := capacities.get(name, 0):
                self.add_module(name, self.new_table(name, capacity))
        #: Steps that wrote fast weights; until the first, passes read none.
        self.register_buffer("writes", torch.tensor(0))
        self._is_blank: bool | None = None
        #: By whether it is of training, by slab: what a training pass has seen must not be learned as read.
        self.pending: dict[bool, dict[str, Evidence]] = {}

    writes: Tensor

    def reset_parameters(self) -> None:
        init.zeros_(self.writes)
        self._is_blank = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_blank = None

    def width(self, slab: str) -> int:
        return self.intermediate_size * self.tier_factor ** tier_of(slab)

    def new_table(self, slab: str, capacity: int) -> PostsynapticTable:
        return PostsynapticTable(capacity, self.hidden_size, self.width(slab), self.rank)

    def table(self, slab: str) -> PostsynapticTable:
        return self.get_submodule(slab)  # type: ignore[return-value]

    @property
    def is_blank(self) -> bool:
        """Whether nothing was ever written, so that passes need not read. Asked of the device once."""
        if self._is_blank is None:
            self._is_blank = not bool(self.writes > 0)
        return self._is_blank

    def read(self, slab: str) -> FastRows | None:
        """The fast weights of a slab as passes read them; None where they cannot make a difference."""
        g = self.settings.postsynaptic_gain
        if g == 0 or self.is_blank:
            return None
        table = self.table(slab)
        return FastRows(g * table.gain, g * table.trace)

    def forget(self) -> None:
        """Drop what was seen since the last step."""
        self.pending = {}

    @torch.no_grad()
    def observe(
        self,
        pool: ExpertPool,
        hidden_BSH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        alive: dict[str, int],
        mask_BS: Tensor | None,
        follows_BS: Tensor | None,
        *,
        training: bool,
    ) -> None:
        """Add one pass to the evidence: of a sample of its tokens and to trainable experts in training, else of all."""
        mean_H, known_T = what_follows(hidden_BSH, mask_BS, follows_BS)
        hidden_TH = hidden_BSH.detach().reshape(-1, hidden_BSH.shape[-1])
        if training:
            sample = spread(len(hidden_TH), self.settings.postsynaptic_tokens, known_T, hidden_TH.device)
            place_N, known_N = sample.position_S, sample.real_S
        else:
            place_N, known_N = torch.arange(len(hidden_TH), device=hidden_TH.device), known_T
        index_NK = index_TK[place_N].masked_fill(~known_N.unsqueeze(-1), -1)
        hidden_NH, weights_NK = hidden_TH[place_N], weights_TK.detach()[place_N]
        after_NH = directions_after(hidden_TH, place_N, known_N, mean_H)
        for name, rows_NK, _ in pool.rows(index_NK, alive):
            if training and is_frozen(name):
                continue
            new = evidence_of(pool.weights(name), hidden_NH, after_NH, rows_NK, weights_NK, alive[name], self.rank)
            waiting = self.pending.setdefault(training, {})
            old = waiting.get(name)
            if old is None:
                waiting[name] = new
            else:
                for total, part in zip(old.tensors(), new.tensors(), strict=True):
                    total += part

    def take(self, alive: dict[str, int], *, training: bool) -> dict[str, Evidence]:
        """The evidence since the last call, of the slabs that learn; zeros where this rank saw nothing."""
        taken = self.pending.pop(training, {})
        return {
            name: taken.get(name)
            or Evidence.none(count, self.hidden_size, self.width(name), self.rank, self.writes.device)
            for name, count in alive.items()
            if not (training and is_frozen(name))
        }

    @torch.no_grad()
    def learn(self, pool: ExpertPool, evidence: Mapping[str, Evidence], *, training: bool) -> None:
        """One step of everything, from evidence summed over ranks. Rows without tokens keep every bit.

        In training slow weights change too, by what consolidates; slabs whose weights take no gradients (PEFT, a
        switch of `trainable`) are left alone then, fast weights too, as frozen ones are.
        """
        settings = self.settings
        rate = settings.postsynaptic_rate if training else settings.postsynaptic_plastic_rate
        rates = Rates(rate, settings.postsynaptic_fast_decay, settings.postsynaptic_trace_decay)
        learners = sum(len(part.count_E) for part in evidence.values())
        total = sum((part.activity_E.sum() for part in evidence.values()), torch.zeros_like(self.writes).float())
        for name, part in evidence.items():
            hit = torch.nonzero(part.count_E > 0)[:, 0]
            weight = pool.weights(name).down_proj
            if not len(hit) or (training and not weight.requires_grad):
                continue
            table, down = self.table(name), weight.detach()
            length = lengths_of(down, hit, len(part.count_E)) * self.width(name) ** -0.5
            drives = part.gain_EI[hit], part.trace_EHR[hit]
            gain, trace = fast_step(table.gain[hit], table.trace[hit], *drives, length, rates)
            if training:
                activity = torch.nan_to_num(part.activity_E[hit] * learners / total.clamp_min(1e-30), 0.0)
                calcium = table.calcium[hit]
                calcium = calcium + (1.0 - CALCIUM_DECAY) * (activity.clamp(0.0, CALCIUM_MOST) - calcium)
                camkii, pp1, bdnf = switch_step(
                    calcium,
                    table.camkii[hit],
                    table.pp1[hit],
                    table.bdnf[hit],
                    settings.postsynaptic_camkii_threshold,
                    settings.postsynaptic_pp1_threshold,
                )
                for column, value in zip(SHOWN, (calcium, camkii, pp1, bdnf), strict=True):
                    getattr(table, column)[hit] = value
                g, slow, scale = settings.postsynaptic_gain, settings.postsynaptic_slow_rate, settings.postsynaptic_bdnf
                share = share_to_consolidate(camkii, bdnf, slow, scale)
                moves = torch.nonzero(share > 0)[:, 0]
                if g and len(moves):
                    rows, fast = hit[moves], (gain[moves], trace[moves])
                    down[rows], gain[moves], trace[moves] = fold(down[rows], *fast, share[moves], g)
            table.gain[hit], table.trace[hit] = gain, trace
        self.wake()

    def wake(self) -> None:
        """Passes read fast weights from now on."""
        self.writes += 1
        self._is_blank = False

    @torch.no_grad()
    def folded(self, slab: str, row: int, down_HI: Tensor) -> Tensor:
        """`down_proj` of an expert as it would be with all its fast weights in it."""
        table = self.table(slab)
        return fold(down_HI, table.gain[row], table.trace[row], 1.0, self.settings.postsynaptic_gain)[0]

    def has_fast_weights(self, alive: Mapping[str, int]) -> bool:
        """Whether any expert computes otherwise than its slow weights alone would."""
        parts = [part for name in alive if (part := self.read(name)) is not None]
        return any(bool(tensor.any()) for part in parts for tensor in part)

    def clear(self) -> None:
        """Forget all fast weights and evidence; switch and slow weights stay."""
        for name in SLABS:
            if name in self._modules:
                self.table(name).gain.zero_()
                self.table(name).trace.zero_()
        self.pending = {}


def carry_over(
    table: PostsynapticTable,
    number: int,
    sources: Sequence[tuple[PostsynapticTable, int, float]],
    *,
    merged: bool,
) -> None:
    """The postsynaptic side of one expert after an event: its source's, all of it.

    A merged expert's weights were made of folded ones, so it starts without fast weights; of calcium, switch and BDNF
    it has the mean of its sources (table, row, weight).
    """
    for name in PostsynapticTable.columns:
        values = [getattr(source, name)[row] * (weight if merged else 1.0) for source, row, weight in sources]
        getattr(table, name)[number] = sum(values) if merged else values[0]
    if not merged:
        source, row, _ = sources[0]
        table.gain[number], table.trace[number] = source.gain[row], source.trace[row]


__all__ = ["Evidence", "Postsynapse", "PostsynapticTable", "Rates", "carry_over", "fast_step", "switch_step"]
