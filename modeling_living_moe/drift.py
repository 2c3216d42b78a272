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

Everything is a tensor: a step never waits for the device, and every rank computes the same from the same sums. Changes
no population and no threshold; policies read `phase` and `vigilance`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import initialization as init

from living_moe.modeling_living_moe.population import KeepsDtype

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


@functools.cache
def _rules(device: torch.device) -> tuple[Tensor, Tensor]:
    """Phases that the rules lead from, and to."""
    source, target = zip(*((source, target) for source, _, target in RULES), strict=True)
    return torch.tensor(source, device=device), torch.tensor(target, device=device)


@functools.cache
def _moved_by_merges(device: torch.device) -> Tensor:
    """Which signals a merge or the end of a clade moves."""
    return torch.tensor([name in ("entropy", "interference") for name in WATCHED], device=device)


class DriftDetector(KeepsDtype):
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
        #: Loss summed over forward passes, passes, tokens outside the root field, tokens: (4,); not summed over ranks.
        self.pending: Tensor | None = None

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
        known = loss.isfinite()
        self._add(0, loss.where(known, torch.zeros_like(loss)), known)

    @torch.no_grad()
    def observe_fields(self, field: Tensor, token_mask: Tensor | None) -> None:
        """Count the tokens of one forward pass, (B, T) both, by whether they are outside the root field."""
        real = torch.ones_like(field, dtype=torch.bool) if token_mask is None else token_mask.to(field.device)
        self._add(2, ((field > 0) & real).sum(), real.sum())

    def _add(self, place: int, value: Tensor, count: Tensor) -> None:
        pending = self.take()
        pending[place : place + 2] += torch.stack([value.detach(), count]).to(pending)
        self.pending = pending

    def take(self) -> Tensor:
        """What is pending, (4,), and forget it."""
        pending, self.pending = self.pending, None
        if pending is None:
            dtype = torch.float32 if self.level.device.type == "mps" else torch.float64
            return torch.zeros(4, dtype=dtype, device=self.level.device)
        return pending.to(self.level.device)

    @torch.no_grad()
    def note(self, kind: str) -> None:
        """Remember an event until the next step. What a merge or the end of a clade moves is not the stream's doing."""
        if kind in ("split", "merge", "death"):
            self.events[0 if kind == "split" else 1] += 1
        if kind in ("merge", "part"):
            self.relearn.fill_(True)

    # -- one step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, values: Tensor, known: Tensor, step: int) -> None:
        """Take one optimizer step's signals.

        Args:
            values: (signals,), in the order of `WATCHED`, of all ranks.
            known: Bool (signals,), whether each was measured in this step.
            step: Of the model's life.
        """
        values, known = values.to(self.level), known.to(self.level.device) & values.to(self.level).isfinite()
        self._forget(_moved_by_merges(known.device) & self.relearn)
        self.relearn.fill_(False)

        spread = self.variance.sqrt()
        z = ((values - self.level) / spread.clamp_min(1e-30)).clamp(-CLIP, CLIP)
        watched = known & (self.count >= WARM_UP) & (spread > CONSTANT * self.level.abs())
        z = z.where(watched, torch.zeros_like(z))
        for total, toward in ((self.up, z), (self.down, -z)):
            total.copy_(torch.where(watched, (total + toward - ALLOWANCE).clamp(min=0.0), total))
        highest = torch.maximum(self.up, self.down).max()
        alarm = highest > THRESHOLD
        self._follow_loss(values[LOSS], known[LOSS], alarm, spread[LOSS])
        self._learn(values, known)
        self._forget(alarm.expand_as(known))

        self.calm.copy_(torch.where(highest > THRESHOLD / 2, 0, self.calm + 1))
        self.alarms += alarm & ~self.shifting
        quiet = self.calm >= QUIET
        self.shifting.copy_((self.shifting | alarm) & ~quiet)
        self._change_phase(alarm, quiet, step)

    def _learn(self, values: Tensor, known: Tensor) -> None:
        """Let values join level and variance: running means, then moving averages."""
        # A distance is from the level before, so a lag counts as deviation; the first value has no such distance.
        away = (values - self.level).where(known, torch.zeros_like(values))
        rate = (1.0 / self.count.clamp(min=1)).clamp(min=1.0 / MEMORY) * (known & (self.count > 0))
        self.variance.lerp_(away.square(), rate)
        self.level += (1.0 / (self.count + 1.0)).clamp(min=1.0 / LEVEL_MEMORY) * away
        self.count += known

    def _forget(self, which: Tensor) -> None:
        for buffer in (self.level, self.variance, self.up, self.down, self.count):
            buffer.masked_fill_(which, 0)

    def _follow_loss(self, loss: Tensor, known: Tensor, alarm: Tensor, deviation: Tensor) -> None:
        """`fast` follows the loss, `peak` is its highest value since the last alarm."""
        first = (self.count[LOSS] == 0) & (self.alarms == 0)
        fast = torch.where(first, loss, torch.lerp(self.fast, loss, LOSS_RATE))
        self.fast.copy_(torch.where(known, fast, self.fast))
        self.peak.copy_(torch.where(alarm, self.fast, torch.maximum(self.peak, self.fast)))
        self.deviation.copy_(torch.where(alarm & ~self.shifting, deviation, self.deviation))

    def _change_phase(self, alarm: Tensor, quiet: Tensor, step: int) -> None:
        split, lost = self.events > 0
        self.since_split.copy_(torch.where(split, 0, self.since_split + 1))
        recovering = (self.fast < self.peak - RECOVERY * self.deviation) | quiet
        conditions = {
            "alarm": alarm,
            "split": split,
            "lost": lost,
            "quiet": quiet,
            "settled": (self.since_split >= SETTLED) & recovering,
            "quiet again": quiet & (step - self.began >= QUIET),
        }
        source, target = _rules(self.phase.device)
        applies = (source == self.phase) & torch.stack([conditions[name] for _, name, _ in RULES])
        is_first = applies & (applies.cumsum(0) == 1)
        new = torch.where(applies.any(), (target * is_first).sum(), self.phase)
        self.began.copy_(torch.where(new != self.phase, step, self.began))
        self.phase.copy_(new)
        self.events.zero_()

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def phase_name(self) -> str:
        """Waits for the device."""
        return PHASES[int(self.phase) - 1]


def step_signals(layers: list[tuple[Tensor, Tensor, Tensor, Tensor]], evidence: Tensor) -> tuple[Tensor, Tensor]:
    """The model's signals of one step, in the order of `WATCHED`, and which of them were measured.

    Args:
        layers: Per layer, on one device, entropy of the clades' loads (nats), routed pairs, tokens, and signals (4, E)
            as in `Vitals.pending_signals`.
        evidence: `DriftDetector.take`, summed over ranks.
    """
    some = [pairs > 0 for _, pairs, _, _ in layers]
    routed = torch.stack(some).all()
    entropy = torch.stack([entropy for entropy, _, _, _ in layers]).mean()
    density = torch.stack([pairs / tokens.clamp_min(1) for _, pairs, tokens, _ in layers]).mean()
    pulled = torch.stack([signals[:2].sum(dim=1) for *_, signals in layers]).sum(dim=0)
    sums = torch.stack([evidence[0], entropy, density, pulled[0], evidence[2]])
    one = torch.ones_like(sums[0])
    counts = torch.stack([evidence[1], one * routed, one * routed, pulled[1], evidence[3]])
    return sums / counts.clamp_min(torch.finfo(torch.float32).tiny), counts > 0


__all__ = ["PHASES", "WATCHED", "DriftDetector", "step_signals"]
