"""Experts over time, from a run's records: tracks of measurements, resilience, forgetting.

Reads records, measures nothing. T snapshots, E experts that were alive in any of them, sorted by layer, then uid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from living_moe.training.collapse import DEAD_LOAD
from living_moe.training.observatory.records import Run
from living_moe.training.observatory.vitals_log import Array

#: Measurements are recorded to about this share of their value (vitals_log.py): smaller changes of a loss are unknown.
ROUNDING = 2 ** (1 / 32) - 1
#: Snapshots that tracks keep, so that a long run fits in memory and in a picture.
MOST_SNAPSHOTS = 400


@dataclass(frozen=True)
class Tracks:
    """Measurements of every expert over a run's snapshots.

    Attributes:
        steps_T: int64, optimizer steps.
        of: Snapshots of the run; more than T where some were left out, evenly.
        layer_E, uid_E: int64, who.
        columns: fp32 (T, E) each; NaN where the expert was not alive, or the column not written.
    """

    steps_T: Array
    of: int
    layer_E: Array
    uid_E: Array
    columns: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def has(self, name: str) -> bool:
        """Whether anything was written in a column."""
        return name in self.columns and bool(np.isfinite(self.columns[name]).any())

    @property
    def layers(self) -> list[int]:
        return [int(layer) for layer in np.unique(self.layer_E)]

    def of_layer(self, layer: int) -> Array:
        """Places of a layer's experts, int64."""
        return np.flatnonzero(self.layer_E == layer)

    @property
    def sampled(self) -> str:
        """What a picture says where snapshots were left out; else nothing."""
        return "" if len(self.steps_T) == self.of else f"{len(self.steps_T)} of {self.of} snapshots, evenly spread"


def tracks(run: Run, columns: Iterable[str], *, most: int = MOST_SNAPSHOTS) -> Tracks:
    """Tracks of some columns over at most `most` snapshots of a run, evenly spread, the first and the last among them.

    Args:
        columns: Of snapshots; one that was not written is NaN throughout.
    """
    names = list(columns)
    steps = run.vitals_steps
    wanted = {steps[int(place)] for place in np.linspace(0, len(steps) - 1, min(most, len(steps))).round()}
    kept = [snapshot for snapshot in run.snapshots(names) if snapshot.step in wanted]
    identities = (
        np.unique(np.concatenate([snapshot.identity_E for snapshot in kept])) if kept else np.empty(0, np.int64)
    )
    table = {name: np.full((len(kept), len(identities)), np.nan, np.float32) for name in names}
    for place, snapshot in enumerate(kept):
        at = np.searchsorted(identities, snapshot.identity_E)
        for name in names:
            if name in snapshot.columns:
                table[name][place, at] = snapshot[name]
    layer_E, uid_E = identities >> 44, identities & ((1 << 44) - 1)
    return Tracks(np.array([snapshot.step for snapshot in kept], np.int64), len(steps), layer_E, uid_E, table)


@dataclass(frozen=True)
class Resilience:
    """How an expert has held out.

    Attributes:
        born, died: Steps; `died` is the last step known of while it lives.
        fate: "alive", "death" or "merge".
        load: Mean over the snapshots of its life, in multiples of the uniform share.
        variation: Standard deviation of the load over its mean: 0 for a steady one. None without load.
        starved: Share of its snapshots in which its load was at most `DEAD_LOAD`.
        forgotten: The credited loss of its tokens now, less the lowest it ever was (slow averages), nats per token:
            above 0 it has lost what it could do, or is sent harder tokens. None where it was not measured.
    """

    layer: int
    uid: int
    born: int
    died: int
    fate: str
    load: float
    variation: float | None
    starved: float
    forgotten: float | None


def resilience(run: Run, *, most: int = MOST_SNAPSHOTS) -> dict[tuple[int, int], Resilience]:
    """By (layer, uid), of every expert in any snapshot."""
    over_time = tracks(run, ("load", "loss_slow"), most=most)
    lives = run.lives()
    load_TE, lost_TE = over_time["load"].astype(np.float64), forgotten_by_expert(over_time)
    found = {}
    seen_E = np.isfinite(load_TE).sum(0)
    mean_E = np.nansum(load_TE, axis=0) / np.maximum(seen_E, 1)
    spread_E = np.sqrt(np.nansum((load_TE - mean_E) ** 2, axis=0) / np.maximum(seen_E, 1))
    starved_E = (load_TE <= DEAD_LOAD).sum(0) / np.maximum(seen_E, 1)
    for place, (layer, uid) in enumerate(zip(over_time.layer_E.tolist(), over_time.uid_E.tolist(), strict=True)):
        life = lives.get((layer, uid))
        lost_T = lost_TE[np.isfinite(lost_TE[:, place]), place]
        found[layer, uid] = Resilience(
            layer=layer,
            uid=uid,
            born=0 if life is None else life.born,
            died=run.last_step if life is None else life.died,
            fate="alive" if life is None else life.fate,
            load=float(mean_E[place]),
            variation=float(spread_E[place] / mean_E[place]) if mean_E[place] > 0 else None,
            starved=float(starved_E[place]),
            forgotten=float(lost_T[-1]) if len(lost_T) else None,
        )
    return found


def forgotten_by_expert(over_time: Tracks) -> Array:
    """The credited loss of each expert's tokens less its lowest so far, fp64 (T, E), nats; NaN where not measured.

    Of the slow averages (`loss_slow`): the fast ones are of few tokens each, and their lowest is luck. What is within
    the rounding of the records counts as 0.
    """
    # 0 is what an average holds before its first measurement.
    loss_TE = np.where(over_time["loss_slow"] > 0, over_time["loss_slow"], np.nan).astype(np.float64)
    if not len(loss_TE):
        return loss_TE
    lost_TE: Array = loss_TE - np.fmin.accumulate(loss_TE, axis=0)
    return np.where(lost_TE <= 1.5 * ROUNDING * loss_TE, 0.0 * lost_TE, lost_TE)


@dataclass(frozen=True)
class ForgettingCurve:
    """Loss on one held-out text over a run, nats per token, and how much of the best of it so far was lost again."""

    text: str
    steps: list[int]
    loss: list[float]
    forgotten: list[float]


def forgetting_curves(run: Run) -> list[ForgettingCurve]:
    """One curve for each text that the run's log has evaluations of, in the order of their first."""
    by_text: dict[str, tuple[list[int], list[float]]] = {}
    for entry in run.evaluations:
        steps, losses = by_text.setdefault(str(entry.get("evaluated", "")), ([], []))
        steps.append(int(entry["lived"]))
        losses.append(float(entry["eval_loss"]))
    return [
        ForgettingCurve(text, steps, losses, (np.array(losses) - np.minimum.accumulate(losses)).tolist())
        for text, (steps, losses) in by_text.items()
    ]


__all__ = [
    "ForgettingCurve",
    "Resilience",
    "Tracks",
    "forgetting_curves",
    "forgotten_by_expert",
    "resilience",
    "tracks",
]
