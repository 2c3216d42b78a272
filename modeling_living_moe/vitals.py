"""What is measured per expert while a model trains: load, routing weight, gradients, interference, loss, age.

Observation costs two scatter-adds per layer and never waits for the device. Counts go to plain tensors, not
buffers: DistributedDataParallel would overwrite buffers with rank 0's. Once per optimizer step they are summed over
ranks, and folded into moving averages, alike on every rank, when somebody looks (deferred.py). Evaluation and
recomputation under gradient checkpointing observe nothing. The signals of a sample of tokens and of gradients are
measured every few steps only (`signals.py`, `gradient_sketch.py`); each has a count of its measurements, so that
averages start unbiased.

C capacity, E alive experts in slot order, T tokens, S sampled tokens, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from living_moe.configuration.sections import MOST_FIELDS
from living_moe.configuration.slabs import SLABS
from living_moe.modeling_living_moe.deferred import Deferred
from living_moe.modeling_living_moe.distributed import rank, world_size
from living_moe.modeling_living_moe.gradient_sketch import SKETCH, similarity
from living_moe.modeling_living_moe.population import RowTable
from living_moe.modeling_living_moe.signals import credit_shares, load_entropy

if TYPE_CHECKING:
    from living_moe.modeling_living_moe.phi import Phi

#: Step of the last event of a layer that had none.
LONG_AGO = -1_000_000_000
#: Columns that `model.vitals(layer)` shows.
SHOWN = (
    "load", "router_weight", "grad_norm", "foreign_load", "age", "tokens", "interference", "loss_fast", "loss_slow",
    "divergence", "conflict_cos", "conflict_magnitude",
)  # fmt: skip
#: Columns that average what is measured now and then, and the column that counts the measurements.
COUNTED_BY = {
    "interference": "sampled", "loss_fast": "credited", "loss_slow": "credited", "loss_noise": "credited",
    "conflict_cos": "compared", "conflict_magnitude": "compared", "sketch": "compared",
}  # fmt: skip
#: Columns of experts whose router has synapses, in the order of `synapse.router.Economy`.
ECONOMY = ("energy", "depletion")
#: Of a layer.
PHI = ("phi", "differentiation", "integration", "phi_level", "phi_peak", "phi_record")
#: Decay per measurement of Φ's level: one sample of tokens is off by a few hundredths, and a maximum of such numbers is
#: the largest error. The level is trusted from as many measurements on as it remembers.
PHI_DECAY, PHI_SETTLED = 0.8, 5
#: Rows sampled per layer and forward, over all ranks: the "recent queries" a split divides.
SAMPLE_ROWS = 256


class Sample(NamedTuple):
    """Some tokens of a layer's last forward, in the order of their places."""

    hidden_SH: Tensor
    #: int64; -1 where a place was not used, for padding, and where the expert has died since.
    choices_SK: Tensor
    fields_S: Tensor
    weights_SK: Tensor


class VitalsTable(RowTable):
    """Measurements of the experts of one slab."""

    columns = {
        # Moving average of tokens received, in multiples of the uniform share (1.0 is balanced) of the tokens of the
        # expert's own field; of all tokens where that is the root.
        "load": (torch.float32, 0.0),
        # Moving average of the mean routing weight per received token.
        "router_weight": (torch.float32, 0.0),
        # Moving average of the L2 norm of the expert's gradient (both projections).
        "grad_norm": (torch.float32, 0.0),
        # Like `load`, but only tokens of another field than the expert's own: demand it cannot learn from.
        "foreign_load": (torch.float32, 0.0),
        # Optimizer steps lived (with tokens of the expert's field), and tokens received (pairs of token and expert).
        "age": (torch.int64, 0),
        # Optimizer steps in a row in which no token was in the expert's field.
        "idle": (torch.int64, 0),
        "tokens": (torch.int64, 0),
        # Decisions in a row that found the expert overloaded, starved, or cannibalised (hysteresis of the policy).
        "overloaded": (torch.int64, 0),
        "starved": (torch.int64, 0),
        "cannibalised": (torch.int64, 0),
        # Optimizer step at which a preserver may thaw; 0 for everybody else.
        "thaw_at": (torch.int64, 0),
        # Moving average of |own output - mixture| / |own output| over the sampled tokens it served, and steps measured.
        "interference": (torch.float32, 0.0),
        "sampled": (torch.int64, 0),
        # Fast and slow moving average of the loss of its tokens, nats per token, and the steps that brought some.
        "loss_fast": (torch.float32, 0.0),
        "loss_slow": (torch.float32, 0.0),
        "credited": (torch.int64, 0),
        # Moving average of a measurement's squared distance from the slow average, nats squared: what chance does.
        "loss_noise": (torch.float32, 0.0),
        # Moving averages of how its gradient compares with its running mean, the gradients read, that mean's sketch.
        "conflict_cos": (torch.float32, 0.0),
        "conflict_magnitude": (torch.float32, 0.0),
        "compared": (torch.int64, 0),
        "sketch": (torch.float32, 0.0),
        # Moving averages of what the router's synapses have left: energy, and the share of docked vesicles that is
        # gone; means over texts, at the ends of chunks. A rested edge's until measured.
        "energy": (torch.float32, 1.0),
        "depletion": (torch.float32, 0.0),
    }
    load: Tensor
    router_weight: Tensor
    grad_norm: Tensor
    foreign_load: Tensor
    age: Tensor
    idle: Tensor
    tokens: Tensor
    overloaded: Tensor
    starved: Tensor
    cannibalised: Tensor
    thaw_at: Tensor
    interference: Tensor
    sampled: Tensor
    loss_fast: Tensor
    loss_slow: Tensor
    credited: Tensor
    loss_noise: Tensor
    conflict_cos: Tensor
    conflict_magnitude: Tensor
    compared: Tensor
    sketch: Tensor
    energy: Tensor
    depletion: Tensor

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.sketch = torch.zeros(capacity, SKETCH, dtype=torch.float32)

    @property
    def divergence(self) -> Tensor:
        """Fast minus slow average of the credited loss, nats (C,): above 0 the expert loses what it could do."""
        return self.loss_fast - self.loss_slow


class StepCounts(NamedTuple):
    """One optimizer step of one layer, of all ranks."""

    #: As `Vitals.pending`.
    counts: Tensor
    #: Alive rows per slab.
    alive: dict[str, int]
    #: Tokens behind the counts, 0-dim; None where each has used all its `places` (0: not known, density stays).
    tokens: Tensor | None
    places: int
    #: As `Vitals.pending_economy`; None where routers have no synapses.
    economy: Tensor | None


class Vitals(Deferred[StepCounts]):
    """Vitals of one layer: a `VitalsTable` per slab, and the pending counts of the present step.

    Args:
        capacities: Slots per slab.
        decay: Per step, of the moving averages.
        fast_decay, slow_decay: Per step that brings an expert credit, of the averages of its credited loss.
    """

    def __init__(self, capacities: dict[str, int], decay: float, *, fast_decay: float = 0.9, slow_decay: float = 0.99):
        super().__init__()
        self.decay, self.fast_decay, self.slow_decay = decay, fast_decay, slow_decay
        for name in SLABS:
            if capacity := capacities.get(name, 0):
                self.add_module(name, VitalsTable(capacity))
        #: Steps folded so far, and the step of the layer's last event.
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("last_event", torch.tensor(LONG_AGO))
        # Moving averages: experts per token, and the entropy of the experts' shares of the load over its largest value.
        self.register_buffer("density", torch.tensor(0.0, dtype=torch.float32))
        self.register_buffer("entropy", torch.tensor(0.0, dtype=torch.float32))
        # The last measurement of Φ and its two factors; Φ's moving average, and the largest that was since the last
        # split for a collapse, and since the last escape. A split that did not help must not hide from the escape that
        # Φ is still low.
        for name in PHI:
            self.register_buffer(name, torch.tensor(0.0, dtype=torch.float32))
        #: Measurements of Φ in its level.
        self.register_buffer("phi_count", torch.tensor(0))
        #: `phi_evidence` of the forward passes since the last step, not summed over ranks.
        self.pending_phi: Tensor | None = None
        #: Rows tokens, routing weight, foreign tokens, all tokens of the expert's field (of every field for the root's)
        #: per alive expert: (4, E), fp64; tokens are pairs of token and expert.
        self.pending: Tensor | None = None
        #: Rows interference summed, places it was measured at, loss times share, shares: (4, E), fp64.
        self.pending_signals: Tensor | None = None
        #: Sums of `ECONOMY` over texts and chunks, and how many these are in the third row: (3, E), fp64.
        self.pending_economy: Tensor | None = None
        #: Tokens that chose them, int64 scalar; counted where tokens may leave places unused.
        self.pending_tokens: Tensor | None = None
        #: Tokens per alive expert since the optimizer last asked, int64 (E,).
        self.since_step: Tensor | None = None
        self.sample: Sample | None = None

    steps: Tensor
    last_event: Tensor
    density: Tensor
    entropy: Tensor
    phi: Tensor
    differentiation: Tensor
    integration: Tensor
    phi_level: Tensor
    phi_peak: Tensor
    phi_record: Tensor
    phi_count: Tensor

    def reset_parameters(self) -> None:
        """Nothing lived yet; leaves alone what a checkpoint has loaded."""
        init.zeros_(self.steps)
        init.constant_(self.last_event, LONG_AGO)
        init.zeros_(self.density)
        init.zeros_(self.entropy)
        for name in PHI:
            init.zeros_(getattr(self, name))
        init.zeros_(self.phi_count)

    def table(self, slab: str) -> VitalsTable:
        return self.get_submodule(slab)  # type: ignore[return-value]

    @torch.no_grad()
    def observe(
        self,
        hidden_TH: Tensor,
        weights_TK: Tensor,
        index_TK: Tensor,
        num_experts: int,
        token_mask_T: Tensor | None,
        field_T: Tensor | None,
        fields_E: Tensor | None,
        *,
        full: bool = True,
    ) -> None:
        """Count one forward.

        Args:
            field_T: The field of each token; None is the root.
            fields_E: The field of each expert; None is the root.
            full: Whether every place is used; unused ones have a negative index.
        """
        tokens, top_k = index_TK.shape
        index = index_TK.flatten()
        dtype = count_dtype(index.device)
        if token_mask_T is None:
            ones = torch.ones(index.shape, dtype=dtype, device=index.device)
        else:
            ones = token_mask_T.to(dtype).repeat_interleave(top_k)
        if not full:
            real = torch.full((), tokens, device=index.device) if token_mask_T is None else token_mask_T.sum()
            self.pending_tokens = real if self.pending_tokens is None else self.pending_tokens + real
            ones, index = ones * (index >= 0), index.clamp(min=0)
        foreign = torch.zeros_like(ones)
        if field_T is not None and fields_E is not None:
            foreign = (fields_E[index] != field_T.repeat_interleave(top_k)) * ones
        rows = [ones, weights_TK.flatten() * ones, foreign]
        counts = torch.zeros(4, num_experts, dtype=dtype, device=index.device)
        counts[:3].scatter_add_(1, index.expand(3, -1), torch.stack(rows))
        counts[3] = ones.sum()
        if field_T is not None and fields_E is not None:
            # Of each expert's own field; the root's experts serve every field that has no heir of theirs.
            of_field = torch.zeros(MOST_FIELDS + 1, dtype=dtype, device=index.device)
            of_field.scatter_add_(0, field_T.repeat_interleave(top_k), ones)
            counts[3] = torch.where(fields_E == 0, counts[3], of_field[fields_E])
        received = counts[0].long()
        self.pending = counts if self.pending is None else self.pending + counts
        self.since_step = received if self.since_step is None else self.since_step + received
        # Every n-th token of all ranks' tokens, so that many processes sample what one would.
        stride = max(1, math.ceil(tokens * world_size() / SAMPLE_ROWS))
        first = -rank() * tokens % stride
        chosen_TK = index_TK if token_mask_T is None else index_TK.masked_fill(~token_mask_T.unsqueeze(-1), -1)
        fields_S = torch.zeros_like(chosen_TK[:, 0]) if field_T is None else field_T
        parts = (hidden_TH.detach(), chosen_TK, fields_S, weights_TK.detach())
        self.sample = Sample(*(part[first::stride].clone() for part in parts))

    @torch.no_grad()
    def observe_interference(self, index_SK: Tensor, ratio_SK: Tensor, known_SK: Tensor, num_experts: int) -> None:
        """Add a sample's interference; places that are not `known_SK` do not count."""
        self._add_signal(0, index_SK, ratio_SK * known_SK, known_SK, num_experts)

    @torch.no_grad()
    def credit(self, index_SK: Tensor, weights_SK: Tensor, loss_S: Tensor, known_S: Tensor, num_experts: int) -> None:
        """Credit each sampled token's loss to the experts that served it, by their shares of its routing weight."""
        share_SK = credit_shares(index_SK, weights_SK) * known_S.unsqueeze(1)
        self._add_signal(2, index_SK, share_SK * loss_S.unsqueeze(1), share_SK, num_experts)

    def _add_signal(self, row: int, index_SK: Tensor, value_SK: Tensor, count_SK: Tensor, num_experts: int) -> None:
        if self.pending_signals is None:
            dtype = count_dtype(index_SK.device)
            self.pending_signals = torch.zeros(4, num_experts, dtype=dtype, device=index_SK.device)
        if self.pending_signals.is_inference() and not torch.is_inference_mode_enabled():
            self.pending_signals = self.pending_signals.clone()
        added = torch.stack([value_SK.flatten(), count_SK.flatten()]).to(self.pending_signals.dtype)
        self.pending_signals[row : row + 2].scatter_add_(1, index_SK.flatten().clamp(min=0).expand(2, -1), added)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.steps.device
        super()._apply(fn, recurse)
        if self.steps.device != before:
            # Evidence of a step that began on another device could not be added to.
            self.forget()
        return self

    def forget(self) -> None:
        """Drop what was observed since the last step."""
        self.pending = self.pending_signals = self.pending_tokens = self.since_step = self.sample = None
        self.pending_phi = self.pending_economy = None

    def loads(self, alive: dict[str, int]) -> Tensor:
        """Moving average of the load of the alive experts, fp32 (E,)."""
        return torch.cat([self.table(slab).load[:count] for slab, count in alive.items()])

    @torch.no_grad()
    def observe_economy(self, sums_2E: Tensor, count: Tensor) -> None:
        """Add a pass's sums of `ECONOMY` over `count` (0-dim) texts and chunks."""
        sums = torch.cat([sums_2E, count.expand(1, sums_2E.shape[1])]).to(count_dtype(sums_2E.device))
        self.pending_economy = sums if self.pending_economy is None else self.pending_economy + sums

    def observe_phi(self, evidence: Tensor) -> None:
        """Add one forward pass's `phi_evidence`."""
        self.pending_phi = evidence if self.pending_phi is None else self.pending_phi + evidence

    @torch.no_grad()
    def fold_phi(self, found: Phi, measured: Tensor) -> None:
        """Take one step's Φ, of all ranks, if it was `measured` (bool, 0-dim)."""
        for name, value in found._asdict().items():
            getattr(self, name).copy_(torch.where(measured, value, getattr(self, name)))
        rate = (1.0 / (self.phi_count + 1.0)).clamp(min=1.0 - PHI_DECAY) * measured
        self.phi_level.lerp_(self.phi, rate.to(self.phi))
        self.phi_count += measured
        reached = measured & (self.phi_count >= PHI_SETTLED)
        for peak in (self.phi_peak, self.phi_record):
            peak.copy_(torch.where(reached, torch.maximum(peak, self.phi_level), peak))

    @torch.no_grad()
    def answer_collapse(self) -> None:
        """A split was the answer to a low Φ: level and peak begin anew with the next measurement. The old level would
        go on falling towards where Φ already is, and the same collapse would be answered again and again.
        """
        self.phi_peak.zero_()
        self.phi_count.zero_()

    @torch.no_grad()
    def come_home(self) -> None:
        """An escape was the answer, and is over: the record begins anew, too."""
        self.answer_collapse()
        self.phi_record.zero_()

    def follow(self, new_index: list[int], size: int) -> None:
        """Carry counts and sample over to a new slot order: old index -> new index, -1 for the dead; `size` alive."""
        alive = [old for old, new in enumerate(new_index) if new >= 0]
        places = [new_index[old] for old in alive]

        def moved(counts: Tensor) -> Tensor:
            result = counts.new_zeros((*counts.shape[:-1], size))
            result[..., places] = counts[..., alive]
            return result

        if self.pending is not None:
            self.pending = moved(self.pending)
        if self.pending_signals is not None:
            self.pending_signals = moved(self.pending_signals)
        if self.pending_economy is not None:
            self.pending_economy = moved(self.pending_economy)
        # Of pairs of experts that are others now; the next measurement is of these.
        self.pending_phi = None
        if self.since_step is not None:
            self.since_step = moved(self.since_step)
        if self.sample is not None:
            choices_SK = self.sample.choices_SK
            # The last entry is what -1, a place nobody alive had, leads to.
            moved_to = torch.tensor([*new_index, -1], device=choices_SK.device)
            self.sample = self.sample._replace(choices_SK=moved_to[choices_SK])

    @torch.no_grad()
    def fold(
        self,
        counts: Tensor,
        alive: dict[str, int],
        grad_norms: dict[str, Tensor] | None = None,
        *,
        tokens: Tensor | None = None,
        places: int = 0,
        signals: Tensor | None = None,
        sketches: dict[str, Tensor] | None = None,
        economy: Tensor | None = None,
    ) -> None:
        """Take one optimizer step's counts (4, E), summed over ranks, into the moving averages.

        Experts of a field that no token was in have not lived this step: nothing of theirs moves.

        Args:
            counts: As `pending`.
            alive: Alive rows per slab.
            grad_norms: (alive,) per trainable slab, or None on steps that do not read gradients.
            tokens: Number of tokens behind the counts, 0-dim; None: as many as `places` of each make the counts.
            places: Experts per token where tokens use them all; 0 and no `tokens` leaves density and entropy alone.
            signals: As `pending_signals`; None on steps that sample nothing.
            sketches: (alive, SKETCH) per trainable slab, of the gradients whose norms are given.
            economy: As `pending_economy`; None where routers have no synapses.
        """
        step = StepCounts(counts, dict(alive), tokens, places, economy)
        if self.backlog and self.backlog[0].alive != step.alive:
            self.settle()
        if grad_norms is None and signals is None and sketches is None:
            self.defer(step)
            return
        backlog, self.backlog = [*self.backlog, step], []
        rate_E = self._fold_counts(backlog)
        first = 0
        for slab, count in alive.items():
            table = self.table(slab)
            if grad_norms is not None and slab in grad_norms:
                norms, read = table.grad_norm[:count], grad_norms[slab].float()
                # An overflow, as of a gradient that a scaler throws away, must not stay in the average for good.
                norms.copy_(torch.where(read.isfinite(), torch.lerp(norms, read, rate_E[first : first + count]), norms))
            if signals is not None:
                self._fold_signals(table, signals[:, first : first + count], count)
            if sketches is not None and slab in sketches:
                self._fold_sketches(table, sketches[slab], count)
            first += count

    def _fold(self, backlog: list[StepCounts]) -> None:
        self._fold_counts(backlog)

    def _fold_counts(self, backlog: list[StepCounts]) -> Tensor:
        """Fold K steps of the same experts; returns the rate at which the last one's averages moved, (E,)."""
        alive, places = backlog[0].alive, backlog[0].places
        counts = torch.stack([step.counts for step in backlog])
        received, weight, foreign, of_field = counts.unbind(1)
        experts = received.shape[1]
        total_K = received.sum(dim=1)
        some_K = total_K > 0
        # A running mean until the window is full, so that early averages are not biased towards zero.
        before_K = self.steps + some_K.cumsum(0) - some_K.long()
        learn_K = (1.0 - torch.clamp(before_K / (before_K + 1.0), max=self.decay)).float()
        lived = of_field > 0
        uniform = experts / of_field.clamp_min(1.0)
        rate = learn_K[:, None] * lived
        known = weight.isfinite()
        values = [received * uniform, foreign * uniform, weight.where(known, 0.0) / received.clamp_min(1.0)]
        rates = [rate, rate, learn_K[:, None] * ((received > 0) & known)]
        names = ["load", "foreign_load", "router_weight"]
        measured = [step.economy for step in backlog if step.economy is not None]
        if measured:
            *sums, times = torch.stack(measured).unbind(1)
            names += ECONOMY
            values += [value / times.clamp_min(1.0) for value in sums]
            rates += [learn_K[:, None] * (times > 0)] * len(sums)
        tables = [(self.table(slab), count) for slab, count in alive.items()]
        state = [torch.cat([getattr(table, name)[:count] for table, count in tables]) for name in names]
        if places or backlog[0].tokens is not None:
            tokens_K = (
                total_K / places
                if backlog[0].tokens is None
                else torch.stack([step.tokens for step in backlog if step.tokens is not None])
            )
            entropy_K = load_entropy(received) / math.log(experts) if experts > 1 else torch.ones_like(total_K)
            values.append(torch.stack([total_K / tokens_K.clamp_min(1), entropy_K], dim=1))
            rates.append((learn_K * some_K)[:, None].expand(-1, 2))
            state.append(torch.stack([self.density, self.entropy]))
        now, sizes = torch.cat(state), [len(part) for part in state]
        for value, rate_now in zip(torch.cat(values, 1).float().unbind(), torch.cat(rates, 1).unbind(), strict=True):
            now = torch.lerp(now, value, rate_now)
        averages = now.split(sizes)
        # Time passes for all in a step without any token.
        aged_E = (lived | ~some_K[:, None]).sum(dim=0)
        # Whether an expert has not lived from this step on, to the last.
        waiting = (~lived).long().flip(0).cumprod(0).flip(0)
        idle_E = waiting.sum(dim=0)
        tokens_E = received.long().sum(dim=0)
        first = 0
        for table, count in tables:
            here = slice(first, first + count)
            for name, average in zip(names, averages, strict=False):
                getattr(table, name)[:count] = average[here]
            table.age[:count] += aged_E[here]
            table.idle[:count].mul_(waiting[0, here]).add_(idle_E[here])
            table.tokens[:count] += tokens_E[here]
            first += count
        if len(averages) > len(names):
            self.density.copy_(averages[-1][0])
            self.entropy.copy_(averages[-1][1])
        self.steps += some_K.sum()
        return rate[-1]

    def _fold_signals(self, table: VitalsTable, signals: Tensor, count: int) -> None:
        """One step's signals (4, count) of the experts of a slab."""
        for row, decays in (
            (0, {"interference": self.decay}),
            (2, {"loss_fast": self.fast_decay, "loss_slow": self.slow_decay}),
        ):
            value = (signals[row] / signals[row + 1].clamp_min(torch.finfo(torch.float32).tiny)).float()
            seen = signals[row + 1] > 0
            if row == 2:
                distance = (value - table.loss_slow[:count]).square()
                # The first measurement has nothing to be compared with.
                _average(table, "loss_noise", distance, seen & (table.credited[:count] > 0), self.slow_decay, late=1)
            for name, decay in decays.items():
                _average(table, name, value, seen, decay)
            getattr(table, COUNTED_BY[next(iter(decays))])[:count] += seen

    def _fold_sketches(self, table: VitalsTable, sketch: Tensor, count: int) -> None:
        """Compare one step's gradients with the running mean, then let them join it. None is no evidence."""
        size = sketch.square().sum(-1)
        seen = (size > 0) & size.isfinite()
        sketch = sketch.where(seen.unsqueeze(-1), 0.0)
        compared = table.compared[:count]
        for name, value in zip(
            ("conflict_cos", "conflict_magnitude"), similarity(sketch, table.sketch[:count]), strict=True
        ):
            # The first gradient has nothing to be compared with.
            _average(table, name, value, seen & (compared > 0), self.decay, late=1)
        _average(table, "sketch", sketch, seen, self.decay)
        compared += seen


def _average(table: VitalsTable, name: str, value: Tensor, seen: Tensor, decay: float, *, late: int = 0) -> None:
    """Let a value join the moving average of those experts it was measured for; a running mean until it is full.

    `late` is how many of the measurements counted so far brought no value.
    """
    old = getattr(table, name)[: len(value)]
    count = (getattr(table, COUNTED_BY[name])[: len(value)] - late).clamp(min=0).float()
    rate = (1.0 - (count / (count + 1.0)).clamp(max=decay)) * seen
    old.copy_(torch.lerp(old, value, rate if value.dim() == 1 else rate.unsqueeze(1)))


def count_dtype(device: torch.device) -> torch.dtype:
    """fp64 keeps long accumulations exact; Apple's devices have none."""
    return torch.float32 if device.type == "mps" else torch.float64
