"""What the live page shows of a run, kept up to date at little cost, and sent only where it has changed.

`Live.state` reads what was appended to the run's records since the last call and returns plain JSON values in parts:
`status` always, `population`, `timeline`, `events` and `board` when they are not those the caller knows. A population
is the last snapshot with the events since; a timeline has a fixed number of points however long the run.

Reads only. E experts of a snapshot, L losses, B edges of a timeline.
"""

from __future__ import annotations

import json
import math
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from living_moe.configuration.errors import LivingMoeError, RecordsError
from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent
from living_moe.training.checkpointing import newest_model
from living_moe.training.observatory.records import Follower, Run
from living_moe.training.observatory.states import (
    FROZEN,
    HEALTHY,
    NEWBORN,
    STATE_COLUMNS,
    STATES,
    ages_of,
    lifecycle_of,
    states_of,
)
from living_moe.training.observatory.trackers import leaderboard
from living_moe.training.observatory.vitals_log import Array, NewestSnapshot, Snapshot
from living_moe.training.reporting import event_line

#: Points of a timeline, event lines, and experts of the leaderboard that are sent.
POINTS, LINES, LEADERS = 240, 60, 12
#: Seconds between two looks at the files, however many pages ask.
PAUSE = 0.4
#: Kinds of events that timelines tell apart.
SHOWN_KINDS = ("split", "merge", "death", "freeze", "thaw", "other")
_COLUMNS = (*STATE_COLUMNS, "router_weight", "interference")
#: Steps over which the shown loss is averaged.
_LOSS_WINDOW = 20
_LETTERS = tuple(name[0] for name in STATES)


class Live:
    """A run as the live page shows it.

    Args:
        path: Directory of a run or a checkpoint; it may come later.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._versions = count(1)
        self._looked = -math.inf
        self._follower: Follower | None = None
        self._waiting = ""
        self._begin(None)

    def state(self, known: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Everything the page needs and does not know yet.

        Args:
            known: The `versions` of its parts, as the last answer gave them.
        """
        known = known or {}
        with self._lock:
            self._look()
            answer: dict[str, Any] = {"status": self._status(), "versions": dict(self._version)}
            for name, make in self._makers.items():
                if known.get(name) != self._version[name]:
                    if name not in self._parts:
                        self._parts[name] = None if self._run is None else make(self._run)
                    answer[name] = self._parts[name]
            return answer

    # -- following -----------------------------------------------------------------------------------------------------

    def _begin(self, run: Run | None) -> None:
        """Forget what was derived from other records."""
        self._run = run
        self._makers: dict[str, Callable[[Run], Any]] = {
            "population": self._population,
            "timeline": self._timeline,
            "events": self._lines,
            "board": self._board,
        }
        self._version = {name: str(next(self._versions)) for name in self._makers}
        self._parts: dict[str, Any] = {}
        self._lifecycle = LifecycleConfig() if run is None else lifecycle_of(run.header)
        self._newest: NewestSnapshot | None = None
        self._snapshot: Snapshot | None = None
        self._known_entries = self._known_events = 0
        self._loss_steps, self._losses = array("q"), array("d")
        self._change_steps, self._changes, self._born_less_gone = array("q"), array("q"), 0
        self._steps_of: dict[str, array[int]] = {kind: array("q") for kind in SHOWN_KINDS}
        self._since: list[LifecycleEvent] = []
        self._model: tuple[Path, int] | None = None
        self._measured: dict[str, Any] | None = None

    def _look(self) -> None:
        if time.monotonic() - self._looked < PAUSE:
            return
        try:
            if self._follower is None:
                self._follower, new = Follower(self.path), True
            else:
                new = self._follower.follow()
            if self._follower.run is not self._run:
                self._begin(self._follower.run)
            if new:
                self._take(self._follower.run)
            self._look_at_model()
            self._waiting = ""
        except (LivingMoeError, OSError) as error:
            # A run that has not begun, or whose files are just being replaced.
            self._waiting, self._follower = str(error), None
            self._begin(None)
        self._looked = time.monotonic()

    def _take(self, run: Run) -> None:
        """Take notice of what is new in the records."""
        for entry in run.log[self._known_entries :]:
            loss = entry.get("loss")
            if isinstance(loss, (int, float)) and math.isfinite(loss):
                self._loss_steps.append(int(entry["lived"]))
                self._losses.append(float(loss))
        events = [event for event in run.events[self._known_events :] if event.kind not in ("grow", "shrink")]
        self._known_entries, self._known_events = len(run.log), len(run.events)
        for event in events:
            self._steps_of[event.kind if event.kind in self._steps_of else "other"].append(event.step)
            if change := change_of(event):
                self._change_steps.append(event.step)
                self._changes.append(change)
                self._born_less_gone += change
        self._since += events
        snapshot = self._next_snapshot(run)
        if snapshot is not None:
            self._snapshot = snapshot
            self._renew("board")
        if self._snapshot is not None:
            known = self._snapshot.step
            self._since = [event for event in self._since if event.step > known]
        if snapshot is not None or events:
            self._renew("population")
        if events:
            self._renew("events")
        self._renew("timeline")

    def _next_snapshot(self, run: Run) -> Snapshot | None:
        if run.saved is not None or run.vitals is None:
            return run.saved
        if self._newest is None:
            self._newest = NewestSnapshot(run.vitals, _COLUMNS)
            # Where the last lines are broken, an earlier one is better than none.
            return self._newest() or run.latest(_COLUMNS)
        return self._newest()

    def _look_at_model(self) -> None:
        """What was measured of the newest saved model's experts, if anything was."""
        place, seen = newest_model(self.path), None
        if place is not None:
            try:
                seen = place, (place / "config.json").stat().st_mtime_ns
            except FileNotFoundError:
                # Old checkpoints are deleted as new ones come.
                return
        if seen != self._model:
            self._model, self._measured = seen, None if place is None else measured_of(place)
            self._renew("board")

    def _renew(self, name: str) -> None:
        self._version[name] = str(next(self._versions))
        self._parts.pop(name, None)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        run, name = self._run, self.path.resolve().name
        if run is None:
            return {"name": name, "state": "waiting", "waiting": self._waiting, "notes": []}
        begun = bool(run.log or run.events or self._snapshot is not None)
        losses = self._losses[-_LOSS_WINDOW:]
        signals: dict[str, Any] = next(
            (entry["signals"] for entry in reversed(run.log[-50:]) if "signals" in entry), {}
        )
        return {
            "name": name,
            "state": run.state if begun else "waiting",
            "waiting": "" if begun else f"{name} has begun and recorded no step yet.",
            "notes": list(run.notes),
            "step": run.last_step,
            "done": run.log[-1]["step"] if run.log else None,
            "max_steps": run.header.get("max_steps"),
            "loss": sum(losses) / len(losses) if losses else None,
            "experts": founders_of(run) + self._born_less_gone,
            "layers": run.header.get("layers"),
            "events": sum(map(len, self._steps_of.values())),
            "phase": signals.get("phase"),
            "family": run.header.get("family"),
            "preset": run.header.get("preset"),
            "model": None if self._model is None else self._model[0].name,
        }

    def _population(self, run: Run) -> dict[str, Any]:
        layers = population_of(run, self._snapshot, self._since, self._lifecycle)
        states = "".join("".join(layer.state) for layer in layers)
        return {
            "step": None if self._snapshot is None else self._snapshot.step,
            "layers": [layer.to_dict() for layer in layers],
            "counts": {name: states.count(letter) for name, letter in zip(STATES, _LETTERS, strict=True)},
            "limits": {name: getattr(self._lifecycle, name) for name in ("split_load", "death_load", "min_age_steps")},
        }

    def _timeline(self, run: Run) -> dict[str, Any]:
        change_L, step_L = np.array(self._changes, np.int64), np.array(self._change_steps, np.int64)
        columns = {kind: np.array(steps, np.int64) for kind, steps in self._steps_of.items() if steps}
        loss_steps_L = np.array(self._loss_steps, np.int64)
        last = run.last_step
        first = min([last, *(int(column.min()) for column in (loss_steps_L, *columns.values()) if len(column))])
        edges_B = np.unique(np.linspace(first, max(last, first + 1), POINTS).round().astype(np.int64))
        order = np.argsort(step_L, kind="stable")
        total = founders_of(run) + np.concatenate([[0], change_L[order].cumsum()])
        return {
            "steps": edges_B.tolist(),
            "experts": total[np.searchsorted(step_L[order], edges_B, side="right")].tolist(),
            "loss": loss_curve(loss_steps_L, np.array(self._losses), edges_B),
            "events": {kind: np.histogram(column, edges_B)[0].tolist() for kind, column in columns.items()},
        }

    def _lines(self, run: Run) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = []
        for event in reversed(run.events):
            if len(shown) == LINES:
                break
            if event.kind not in ("grow", "shrink"):
                shown.append({"kind": event.kind if event.kind in SHOWN_KINDS else "other", "line": event_line(event)})
        return shown

    def _board(self, run: Run) -> dict[str, Any]:
        busiest = None
        if self._snapshot is not None and ages_of(self._snapshot).any():
            try:
                columns, rows = leaderboard(self._snapshot, LEADERS)
                busiest = {"step": self._snapshot.step, "columns": columns, "rows": rows}
            except RecordsError:
                # Records of another version lack a column.
                busiest = None
        return {"busiest": busiest, "measured": self._measured}


# -- numbers -----------------------------------------------------------------------------------------------------------


@dataclass
class Circles:
    """One layer's experts in parallel lists, sorted by uid.

    Attributes:
        load: In multiples of the uniform share; None where not measured yet.
        state: First letters of `STATES`.
        born, parent: Step and uid; 0 and -1 for founders.
    """

    layer: int
    uid: list[int] = field(default_factory=list)
    load: list[float | None] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    born: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)

    def add(self, uid: int, state: int, born: int, parent: int, load: float | None = None) -> None:
        for column, value in zip(self._columns, (uid, load, _LETTERS[state], born, parent), strict=True):
            column.append(value)

    def remove(self, uid: int) -> None:
        if uid in self.uid:
            place = self.uid.index(uid)
            for column in self._columns:
                del column[place]

    def becomes(self, uid: int, state: int) -> None:
        if uid in self.uid:
            self.state[self.uid.index(uid)] = _LETTERS[state]

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "state": "".join(self.state)}

    @property
    def _columns(self) -> tuple[list[Any], ...]:
        return self.uid, self.load, self.state, self.born, self.parent


def population_of(
    run: Run, snapshot: Snapshot | None, since: Sequence[LifecycleEvent], lifecycle: LifecycleConfig
) -> list[Circles]:
    """Who is alive now: the last snapshot with the events since; without one, what the events tell."""
    if snapshot is None:
        return _population_of_lives(run, lifecycle)
    measured_E = (ages_of(snapshot) > 0).tolist()
    loads = zip(_values(snapshot, "load", 0.0), measured_E, strict=True)
    columns: dict[str, list[Any]] = {
        "uid": snapshot["uid"].tolist(),
        "load": [round(load, 3) if measured else None for load, measured in loads],
        "state": [_LETTERS[state] for state in states_of(snapshot, lifecycle).tolist()],
        "born": _values(snapshot, "born", 0),
        "parent": _values(snapshot, "parent", -1),
    }
    layers = {}
    for layer in np.unique(snapshot.layer_E).tolist():
        first, end = np.searchsorted(snapshot.layer_E, [layer, layer + 1])
        layers[layer] = Circles(layer, **{name: column[first:end] for name, column in columns.items()})
    for event in since:
        if event.layer < 0:
            continue
        circles = layers.setdefault(event.layer, Circles(event.layer))
        if event.kind == "split":
            for uid in event.children:
                circles.add(uid, NEWBORN, event.step, event.parents[0] if event.parents else -1)
        elif event.kind in ("death", "merge"):
            for uid in set(event.parents) - set(event.children if event.kind == "merge" else ()):
                circles.remove(uid)
        elif event.kind in ("freeze", "thaw"):
            for uid in event.parents:
                circles.becomes(uid, FROZEN if event.kind == "freeze" else HEALTHY)
    return [layers[layer] for layer in sorted(layers)]


def _values(snapshot: Snapshot, name: str, missing: float) -> list[Any]:
    """A column, or what stands for one that was not written."""
    found: list[Any] = snapshot.columns[name].tolist() if name in snapshot.columns else [missing] * len(snapshot)
    return found


def _population_of_lives(run: Run, lifecycle: LifecycleConfig) -> list[Circles]:
    layers: dict[int, Circles] = {}
    for (layer, uid), life in sorted(run.lives().items()):
        if life.fate != "alive":
            continue
        turns = [event.kind for event in life.events if event.kind in ("freeze", "thaw") and uid in event.parents]
        young = life.parent is not None and run.last_step - life.born < lifecycle.min_age_steps
        state = FROZEN if turns[-1:] == ["freeze"] else NEWBORN if young else HEALTHY
        parent = -1 if life.parent is None else life.parent
        layers.setdefault(layer, Circles(layer)).add(uid, state, life.born, parent)
    return [layers[layer] for layer in sorted(layers)]


def change_of(event: LifecycleEvent) -> int:
    """By how many experts an event changes its layer."""
    return {"split": 1, "death": -1, "merge": 1 - len(event.parents)}.get(event.kind, 0)


def founders_of(run: Run) -> int:
    """How many experts there were before the first event."""
    if founders := run.founders():
        return sum(map(len, founders))
    # Where only the lineage is left: who is named and never born was there.
    return sum(life.parent is None for life in run.lives().values())


def loss_curve(steps_L: Array, loss_L: Array, edges_B: Array) -> dict[str, list[float | None]]:
    """Mean, lowest and highest loss between each two edges (the last included); None where there is none."""
    order = np.argsort(steps_L, kind="stable")
    steps_L, loss_L = steps_L[order], loss_L[order]
    starts, ends = (np.searchsorted(steps_L, edges) for edges in (edges_B[:-1], edges_B[1:]))
    ends[-1] = len(steps_L)
    some = np.flatnonzero(ends > starts)
    curves: dict[str, list[float | None]] = {}
    for name, reduce in (("mean", np.add), ("low", np.minimum), ("high", np.maximum)):
        values: list[float | None] = [None] * len(starts)
        if len(some):
            found = reduce.reduceat(loss_L, starts[some])
            # The last stretch goes on to the end of the losses by itself; the others end where the next begins.
            found = found / (ends - starts)[some] if name == "mean" else found
            for place, value in zip(some.tolist(), found.tolist(), strict=True):
                values[place] = round(value, 5)
        curves[name] = values
    return curves


def measured_of(model: Path) -> dict[str, Any] | None:
    """The leaderboard that `living-moe experts --record` left in a saved model; None where there is none."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        found = config["provenance"]["leaderboard"]
        rows = [[_finite(row.get(name)) for name in _MEASURED] for row in found["rows"]]
        return {"step": found["step"], "columns": list(_MEASURED), "rows": rows[:LEADERS]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


_MEASURED = ("layer", "uid", "load", "contribution", "sensitivity", "specialisation", "reads")


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Live", "change_of", "loss_curve", "population_of"]
