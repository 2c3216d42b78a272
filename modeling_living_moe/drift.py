"""Has the stream of text changed, and where in the cycle of self-protection is the model?

Every optimizer step gives one value of each signal: the loss, the entropy of routing, its density, interference, and
the share of tokens outside the root field. Each is compared with what it was lately, in standard deviations, and a
two-sided CUSUM (Page 1954, Biometrika 41; Hinkley 1971, Biometrika 58) adds up what lies beyond an allowance:

    z = (x - level) / deviation,    up = max(0, up + z - ALLOWANCE),    down = max(0, down - z - ALLOWANCE)

A shift begins when a sum exceeds `THRESHOLD`; then everything is learned anew, and the shift is over when all has been
quiet for `QUIET` steps. `deviation` is the root mean square distance from a level that lags behind, so of a signal that
only goes its steady way (a loss that falls, a router that sharpens) |z| stays below 1, within the allowance: training
itself is no shift. A single outlier is none either, as |z| counts at most `CLIP`.

The phase of the cycle follows from shifts, births and deaths, and the loss:

    1 stability          a shift begins -> 2
    2 new data           an expert splits -> 3, the shift is over without a split -> 6
    3 self-preservation  no split for SETTLED steps and the loss is falling again (or all is quiet) -> 4
    4 specialisation     a split -> 3, experts merge or die -> 5, quiet -> 6, another shift begins -> 2
    5 consolidation      a split -> 3, quiet -> 6, another shift begins -> 2
    6 new equilibrium    quiet for another QUIET steps -> 1, another shift begins -> 2

A step only keeps its evidence (deferred.py); who looks waits for the device once, for all steps since the last look.
Every rank computes the same from the same sums. Changes no population and no threshold; policies read `phase` and
`vigilance`.

K steps, E alive experts in slot order.
"""

from __future__ import annotations

import itertools
import math
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import initialization as init

from living_moe.modeling_living_moe.deferred import Deferred
from living_moe.modeling_living_moe.signals import load_entropy

#: What is watched, in the order of every tensor with an entry per signal.
WATCHED = ("loss", "entropy", "density", "interference", "outside_root")
LOSS = WATCHED.index("loss")
PHASES = ("stability", "new_data", "self_preservation", "specialisation", "consolidation", "new_equilibrium")
STABILITY, NEW_DATA, SELF_PRESERVATION, SPECIALISATION, CONSOLIDATION, NEW_EQUILIBRIUM = range(1, 7)

#: Measurements that the level and the deviation remember, and how many a signal needs before it can raise an alarm: the
#: level's lag behind a trend must have settled by then.
LEVEL_MEMORY, MEMORY, WARM_UP = 30, 200, 100
#: Standard deviations. The allowance is above 1, so that no steady trend adds up. In simulations a shift by 3 was found
#: after 5 steps in the median and within 20 in 99.8 % of 5,000; independent normals exceeded the threshold in none of
#: two million steps, and a loss that falls exponentially, by 5 to 100 deviations over 20 to 200 steps, in none of 2,700
#: runs.
ALLOWANCE, THRESHOLD, CLIP = 1.25, 6.0, 3.0
#: Steps without a sum above half the threshold after which a shift is over; longer than the warm-up.
QUIET = 150
#: Steps without a split after which self-preservation may be over.
SETTLED = 20
#: Rate of the average by which the loss is said to fall, and by how many standard deviations it must have.
LOSS_RATE, RECOVERY = 0.2, 1.0
#: Forward passes whose losses are kept apart, in case nobody ever lives a step.
MOST_PASSES = 64
#: A signal that varies by less than this share of itself is a constant with rounding errors.
CONSTANT = 1e-6


#: Phase, what happens in it, the next phase; the first rule that applies.
RULES = (
    (STABILITY, "alarm", NEW_DATA),
    (NEW_DATA, "split", SELF_PRESERVATION),
    (NEW_DATA, "quiet", NEW_EQUILIBRIUM),
    (SELF_PRESERVATION, "settled", SPECIALISATION),
    (SPECIALISATION, "alarm", NEW_DATA),
    (SPECIALISATION, "split", SELF_PRESERVATION),
    (SPECIALISATION, "lost", CONSOLIDATION),
    (SPECIALISATION, "quiet", NEW_EQUILIBRIUM),
    (CONSOLIDATION, "alarm", NEW_DATA),
    (CONSOLIDATION, "split", SELF_PRESERVATION),
    (CONSOLIDATION, "quiet", NEW_EQUILIBRIUM),
    (NEW_EQUILIBRIUM, "alarm", NEW_DATA),
    (NEW_EQUILIBRIUM, "quiet again", STABILITY),
)


#: Which signals a merge or the end of a clade moves.
MOVED_BY_MERGES = [name in ("entropy", "interference") for name in WATCHED]
#: Buffers with an entry per signal, and those of a single number.
PER_SIGNAL = ("level", "variance", "up", "down", "count")
SINGLE = (
    "phase", "began", "calm", "since_split", "shifting", "alarms", "fast", "peak", "deviation", "relearn",
)  # fmt: skip


class LayerEvidence(NamedTuple):
    """What one layer shows in one step, of all ranks."""

    #: Clade of each alive expert, int64, and a number above all of them.
    clade_E: Tensor
    clades: int
    #: As `Vitals.pending` and `Vitals.pending_signals` (None: not sampled).
    counts: Tensor
    signals: Tensor | None
    #: Tokens behind the counts, 0-dim; None where each has used all its `places`.
    tokens: Tensor | None
    places: int
    #: As `Vitals.pending_economy`; None without synapses. The detector does not read it.
    economy: Tensor | None = None


class Passes(NamedTuple):
    """The forward passes of one step."""

    #: Loss of each, nats per token, 0-dim. One that is no number does not count.
    losses: tuple[Tensor, ...] = ()
    #: Tokens outside the root field, and all tokens, int64 (2,) each.
    outside: tuple[Tensor, ...] = ()
    #: Of passes beside these: losses summed, losses, tokens outside the root field, tokens; (4,).
    summed: Tensor | None = None


class StepEvidence(NamedTuple):
    """What one step shows, of all ranks."""

    step: int
    layers: tuple[LayerEvidence, ...]
    passes: Passes


@dataclass
class _State:
    """The buffers as numbers."""

    level: list[float]
    variance: list[float]
    up: list[float]
    down: list[float]
    count: list[int]
    events: list[int]
    phase: int
    began: int
    calm: int
    since_split: int
    shifting: bool
    alarms: int
    fast: float
    peak: float
    deviation: float
    relearn: bool


class DriftDetector(Deferred[StepEvidence]):
    """Watches the signals of one model, and holds its phase.

    State, in buffers: `level`, `variance`, `count`, `up` and `down` per signal; `phase` (1..6), `began` (step at which
    it began), `calm` (steps since a sum was high), `since_split`; `shifting`, `alarms` (shifts so far); `fast`, `peak`
    and `deviation` of the loss; `events` (splits, then merges and deaths, since the last step), `relearn`.
    """

    level: Tensor
    variance: Tensor
    count: Tensor
    up: Tensor
    down: Tensor
    phase: Tensor
    began: Tensor
    calm: Tensor
    since_split: Tensor
    shifting: Tensor
    alarms: Tensor
    fast: Tensor
    peak: Tensor
    deviation: Tensor
    events: Tensor
    relearn: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, value in self._first_values():
            self.register_buffer(name, value)
        #: Since the last step, on this rank.
        self.passes = Passes()

    @staticmethod
    def _first_values() -> list[tuple[str, Tensor]]:
        signals = len(WATCHED)
        per_signal = [(name, torch.zeros(signals, dtype=torch.float32)) for name in ("level", "variance", "up", "down")]
        of_loss = [(name, torch.tensor(0.0, dtype=torch.float32)) for name in ("fast", "peak", "deviation")]
        return [
            *per_signal,
            *of_loss,
            ("count", torch.zeros(signals, dtype=torch.int64)),
            ("phase", torch.tensor(STABILITY)),
            ("began", torch.tensor(0)),
            ("calm", torch.tensor(QUIET)),
            ("since_split", torch.tensor(SETTLED)),
            ("shifting", torch.tensor(False)),
            ("alarms", torch.tensor(0)),
            ("events", torch.zeros(2, dtype=torch.int64)),
            ("relearn", torch.tensor(False)),
        ]

    def reset_parameters(self) -> None:
        """A life that begins in stability; leaves alone what a checkpoint has loaded."""
        for name, value in self._first_values():
            init.copy_(getattr(self, name), value)

    # -- observing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe_loss(self, loss: Tensor) -> None:
        """Count the loss of one forward pass, nats per token; one that is no number does not count."""
        # A copy: it is read steps later, and who it belongs to may have gone on to add to it.
        self._observe(self.passes._replace(losses=(*self.passes.losses, loss.detach().clone())))

    @torch.no_grad()
    def observe_fields(self, field: Tensor, token_mask: Tensor | None) -> None:
        """Count the tokens of one forward pass, (B, T) both, by whether they are outside the root field."""
        real = torch.ones_like(field, dtype=torch.bool) if token_mask is None else token_mask.to(field.device)
        tokens = torch.stack([((field > 0) & real).sum(), real.sum()])
        self._observe(self.passes._replace(outside=(*self.passes.outside, tokens)))

    def _observe(self, passes: Passes) -> None:
        if len(passes.losses) + len(passes.outside) >= MOST_PASSES:
            passes = Passes(summed=sums_of([passes], self.level.device)[0])
        self.passes = passes

    def take(self) -> Passes:
        """What was observed on this rank since the last step, and forget it."""
        passes, self.passes = self.passes, Passes()
        return passes

    @torch.no_grad()
    def note(self, kind: str) -> None:
        """Remember an event until the next step. What a merge or the end of a clade moves is not the stream's doing."""
        if kind in ("split", "merge", "death"):
            self.events[0 if kind == "split" else 1] += 1
        if kind in ("merge", "part"):
            self.relearn.fill_(True)

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, values: Tensor, known: Tensor, step: int) -> None:
        """Take one optimizer step's signals at once. `defer` takes them as a `StepEvidence`, and later.

        Args:
            values: (signals,), in the order of `WATCHED`, of all ranks.
            known: Bool (signals,), whether each was measured in this step.
            step: Of the model's life.
        """
        self._take_steps(values[None], known[None], [step])

    def _fold(self, backlog: list[StepEvidence]) -> None:
        # A group is of one population.
        for _, group in itertools.groupby(backlog, lambda each: [id(layer.clade_E) for layer in each.layers]):
            evidence = list(group)
            values, known = signals_of(evidence, self.level.device)
            self._take_steps(values, known, [each.step for each in evidence])

    @torch.no_grad()
    def _take_steps(self, values_KS: Tensor, known_KS: Tensor, steps: list[int]) -> None:
        state, values_KS = self._read(), values_KS.float()
        known_KS = known_KS & values_KS.isfinite()
        for values, known, step in zip(values_KS.tolist(), known_KS.tolist(), steps, strict=True):
            _live(state, values, known, step)
            # What buffers hold between steps, so that nothing depends on when somebody looks.
            for name in ("level", "variance", "up", "down"):
                setattr(state, name, array("f", getattr(state, name)).tolist())
            state.fast, state.peak, state.deviation = array("f", [state.fast, state.peak, state.deviation])
        self._write(state)

    def _read(self) -> _State:
        """One transfer from the device."""
        buffers = [getattr(self, name) for name in (*PER_SIGNAL, "events", *SINGLE)]
        widest = torch.float32 if self.level.device.type == "mps" else torch.float64
        flat = torch.cat([buffer.to(widest).view(-1) for buffer in buffers]).tolist()
        found: dict[str, Any] = {}
        for name, buffer in zip((*PER_SIGNAL, "events", *SINGLE), buffers, strict=True):
            kind = float if buffer.is_floating_point() else bool if buffer.dtype == torch.bool else int
            numbers = [kind(number) for number in flat[: buffer.numel()]]
            flat = flat[buffer.numel() :]
            found[name] = numbers if buffer.dim() else numbers[0]
        return _State(**found)

    def _write(self, state: _State) -> None:
        for name in (*PER_SIGNAL, "events", *SINGLE):
            buffer = getattr(self, name)
            buffer.copy_(torch.tensor(getattr(state, name), dtype=buffer.dtype))

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def phase_name(self) -> str:
        """Waits for the device."""
        return PHASES[int(self.phase) - 1]


def _live(state: _State, values: list[float], known: list[bool], step: int) -> None:
    """One step of the detector."""
    signals = range(len(WATCHED))
    if state.relearn:
        _forget(state, MOVED_BY_MERGES)
        state.relearn = False
    spread = [math.sqrt(variance) for variance in state.variance]
    for i in signals:
        if known[i] and state.count[i] >= WARM_UP and spread[i] > CONSTANT * abs(state.level[i]):
            z = min(CLIP, max(-CLIP, (values[i] - state.level[i]) / max(spread[i], 1e-30)))
            state.up[i] = max(0.0, state.up[i] + z - ALLOWANCE)
            state.down[i] = max(0.0, state.down[i] - z - ALLOWANCE)
    highest = max(*state.up, *state.down)
    alarm = highest > THRESHOLD
    _follow_loss(state, values[LOSS] if known[LOSS] else None, alarm, spread[LOSS])
    for i in signals:
        if known[i]:
            # A distance is from the level before, so a lag counts as deviation; the first value has no such distance.
            away, count = values[i] - state.level[i], state.count[i]
            if count:
                state.variance[i] += max(1 / count, 1 / MEMORY) * (away * away - state.variance[i])
            # Running means, then moving averages.
            state.level[i] += max(1 / (count + 1), 1 / LEVEL_MEMORY) * away
            state.count[i] += 1
    if alarm:
        _forget(state, [True] * len(WATCHED))
        state.alarms += not state.shifting
    state.calm = 0 if highest > THRESHOLD / 2 else state.calm + 1
    quiet = state.calm >= QUIET
    state.shifting = (state.shifting or alarm) and not quiet
    _change_phase(state, alarm, quiet, step)


def _forget(state: _State, which: list[bool]) -> None:
    for name in PER_SIGNAL:
        values = getattr(state, name)
        for place, gone in enumerate(which):
            if gone:
                values[place] = type(values[place])(0)


def _follow_loss(state: _State, loss: float | None, alarm: bool, deviation: float) -> None:
    """`fast` follows the loss, `peak` is its highest value since the last alarm."""
    if loss is not None:
        first = not state.count[LOSS] and not state.alarms
        state.fast = loss if first else state.fast + LOSS_RATE * (loss - state.fast)
    state.peak = state.fast if alarm else max(state.peak, state.fast)
    if alarm and not state.shifting:
        state.deviation = deviation


def _change_phase(state: _State, alarm: bool, quiet: bool, step: int) -> None:
    split, lost = (number > 0 for number in state.events)
    state.since_split = 0 if split else state.since_split + 1
    recovering = state.fast < state.peak - RECOVERY * state.deviation or quiet
    conditions = {
        "alarm": alarm,
        "split": split,
        "lost": lost,
        "quiet": quiet,
        "settled": state.since_split >= SETTLED and recovering,
        "quiet again": quiet and step - state.began >= QUIET,
    }
    for source, name, target in RULES:
        if source == state.phase and conditions[name]:
            state.phase, state.began = target, step
            break
    state.events = [0, 0]


def signals_of(evidence: list[StepEvidence], device: torch.device) -> tuple[Tensor, Tensor]:
    """The model's signals of K steps of one population, (K, signals) in the order of `WATCHED`, and whether each was
    measured.
    """
    sums = sums_of([each.passes for each in evidence], device)
    entropies, densities, routed, pulled = [], [], [], sums.new_zeros(len(evidence), 2)
    for layers in zip(*(each.layers for each in evidence), strict=True):
        received_KE = torch.stack([layer.counts[0] for layer in layers])
        pairs = received_KE.sum(dim=1)
        if layers[0].tokens is None:
            tokens = pairs / layers[0].places
        else:
            tokens = torch.stack([layer.tokens for layer in layers]).to(pairs)
        # Of clades: splits, which hand tokens on within one, keep it.
        of_clades = pairs.new_zeros(len(evidence), layers[0].clades)
        of_clades.scatter_add_(1, layers[0].clade_E.expand_as(received_KE), received_KE)
        entropies.append(load_entropy(of_clades).to(device))
        densities.append((pairs / tokens.clamp_min(1)).to(device))
        routed.append((pairs > 0).to(device))
        sampled = [k for k, layer in enumerate(layers) if layer.signals is not None]
        if sampled:
            rows = torch.stack([layers[k].signals[:2].sum(dim=1) for k in sampled])
            pulled[sampled] += rows.to(pulled)
    everywhere = torch.stack(routed).all(dim=0).to(sums)
    entropy, density = (torch.stack(values).mean(dim=0).to(sums) for values in (entropies, densities))
    totals = torch.stack([sums[:, 0], entropy, density, pulled[:, 0], sums[:, 2]], dim=1)
    counts = torch.stack([sums[:, 1], everywhere, everywhere, pulled[:, 1], sums[:, 3]], dim=1)
    return totals / counts.clamp_min(torch.finfo(torch.float32).tiny), counts > 0


def sums_of(passes: list[Passes], device: torch.device) -> Tensor:
    """Of K steps: losses summed, losses, tokens outside the root field, tokens; (K, 4), fp64 where there is one."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(len(passes), 4, dtype=dtype, device=device)
    for first, name in ((0, "losses"), (2, "outside")):
        step_P = [step for step, each in enumerate(passes) for _ in getattr(each, name)]
        if step_P:
            found = torch.stack([one.to(device) for each in passes for one in getattr(each, name)]).to(dtype)
            if name == "losses":
                known = found.isfinite()
                found = torch.stack([torch.where(known, found, 0.0), known.to(dtype)], dim=1)
            sums[:, first : first + 2].index_add_(0, torch.tensor(step_P, device=device), found)
    for step, each in enumerate(passes):
        if each.summed is not None:
            sums[step] += each.summed.to(sums)
    return sums


__all__ = ["PHASES", "WATCHED", "DriftDetector", "LayerEvidence", "Passes", "StepEvidence", "signals_of", "sums_of"]
