"""Sends a run to experiment trackers through Accelerate: TensorBoard where it is installed, trackio and W&B by name.

    accelerator = living_accelerator(log_with=["tensorboard"], project_dir="run")
    accelerator.init_trackers(PROJECT)
    trackers = Trackers(accelerator.trackers, model)
    JsonLog(..., listeners=[trackers.entry]); Recorder(..., listeners=[trackers.snapshot])

The records come first: what is sent are lines of the log, events and snapshots, as they are written. Means and counts
go to every tracker, histograms to those named above, curves and the projector's embeddings to TensorBoard.

A decision's curve asks how well the policy's score at one snapshot told what happened until the next: precision over
recall of splits, merges and deaths, 0.5 being the policy's threshold.

Changes neither model nor records. E experts of a snapshot, D length of a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import LifecycleConfig, did_you_mean
from living_moe.modeling_living_moe import LivingMoePreTrainedModel
from living_moe.modeling_living_moe.drift import PHASES
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent
from living_moe.training.collapse import DEAD_LOAD, measures_of_load
from living_moe.training.observatory.states import scores_of
from living_moe.training.observatory.vitals_log import EXACT, Array, Snapshot, identity
from living_moe.training.reporting import event_line

TRACKERS = ("tensorboard", "trackio", "wandb")
#: What trackers call all runs of living models.
PROJECT = "living-moe"
#: Kinds of events a policy decides on, whose scores are compared with what happened.
DECISIONS = ("split", "merge", "death")
#: Most pairs of score and outcome kept per kind, and most numbers of one layer's keys shown in full.
_MOST_PAIRS, _MOST_NUMBERS = 100_000, 1_000_000
_LEADERS = 20


def tracker_names(report_to: str | Iterable[str]) -> list[str]:
    """Trackers by name: "auto" is TensorBoard where it is installed, "none" nothing; several are divided by commas.

    Raises:
        ConfigurationError: A name is unknown, or its package is not installed.
    """
    given = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    names = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    available = {str(name.value) for name in get_available_trackers()}
    if names == ["auto"]:
        return ["tensorboard"] if "tensorboard" in available else []
    if names in ([], ["none"]):
        return []
    for name in names:
        if name not in TRACKERS:
            raise ConfigurationError(f"report_to is {name!r}.{did_you_mean(name, (*TRACKERS, 'auto', 'none'))}")
        if name not in available:
            raise ConfigurationError(
                f"report_to is {name!r}, whose package is not installed; run `pip install living_moe[{name}]`, or set "
                f"report_to to none."
            )
    return names


def open_trackers(names: Sequence[str], directory: Any, run_name: str) -> list[GeneralTracker]:
    """Accelerate's trackers, started, where there is no `Accelerator` to ask. Call `finish` on each at the end."""
    trackers = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        options = tracker_options(run_name).get(name, {})
        tracker = kind(PROJECT, directory, **options) if kind.requires_logging_directory else kind(PROJECT, **options)
        tracker.start()
        trackers.append(tracker)
    return trackers


def tracker_options(run_name: str, step: int = 0) -> dict[str, dict[str, Any]]:
    """`init_kwargs` of `Accelerator.init_trackers`: the run's name; what follows the step resumed from is purged."""
    named = {"name": run_name}
    return {"tensorboard": {"purge_step": step + 1} if step else {}, "trackio": dict(named), "wandb": dict(named)}


class Trackers:
    """What a living model's run sends to trackers.

    Args:
        trackers: Started ones of Accelerate.
        model: The model in training; None where snapshots come from elsewhere (no full keys then).
        lifecycle: Thresholds of the policy; default the model's.
    """

    def __init__(
        self,
        trackers: Sequence[GeneralTracker],
        model: LivingMoePreTrainedModel | None,
        lifecycle: LifecycleConfig | None = None,
    ):
        self.trackers = list(trackers)
        self.model = model
        assert lifecycle is not None or model is not None
        self.lifecycle: LifecycleConfig = lifecycle if lifecycle is not None else model.config.lifecycle  # type: ignore[union-attr]
        self.decisions = Decisions(self.lifecycle)
        self._phase: str | None = None
        self._next_embedding = 0

    def entry(self, entry: Mapping[str, Any]) -> None:
        """A line of the log: numbers, population, routing, signals, phase; its events as text."""
        if not self.trackers:
            return
        step = int(entry.get("lived", entry["step"]))
        events = [LifecycleEvent.from_dict(event) for event in entry.get("events", ())]
        if events:
            self.events(events, step)
        if "eval_loss" in entry:
            self._scalars({f"eval_loss/{entry['evaluated']}": entry["eval_loss"]}, step)
        if "signals" in entry or "routing" in entry:
            self._scalars(scalars_of(entry), step)
            phase = entry.get("signals", {}).get("phase")
            if phase is not None and phase != self._phase:
                self._phase = phase
                self._text("phase", f"step {step}: {phase}", step)

    def events(self, events: Sequence[LifecycleEvent], step: int) -> None:
        """Events in words, and as evidence for the decisions' curves."""
        self.decisions.happened(events)
        self._text("lineage", "\n\n".join(map(event_line, events)), step)

    def snapshot(self, snapshot: Snapshot) -> None:
        """All experts: vitals as means and histograms, loads per layer, leaderboard, decisions, keys."""
        if not self.trackers:
            return
        step = snapshot.step
        columns = {
            name: column
            for name, column in snapshot.columns.items()
            if (name not in EXACT and not name.startswith("key_")) or name == "key_distance"
        }
        numbers = {f"vitals/{name}/mean": float(column.mean()) for name, column in columns.items()}
        numbers |= layer_scalars(snapshot)
        self.decisions.follow(snapshot)
        curves = {kind: self.decisions.pairs(kind) for kind in DECISIONS}
        for kind, (scores, outcomes) in curves.items():
            if outcomes.any():
                numbers[f"decisions/{kind}/average_precision"] = average_precision(scores, outcomes)
        self._scalars(numbers, step)
        self._histograms({f"vitals/{name}": column for name, column in columns.items()}, step)
        self._table("leaderboard", *leaderboard(snapshot), step)
        for writer in self._tensorboards():
            for kind, (scores, outcomes) in curves.items():
                if outcomes.any():
                    writer.add_pr_curve(f"decisions/{kind}", outcomes, scores, global_step=step)
        if step >= self._next_embedding:
            # Each is a copy of the keys on disk: ever further apart.
            self._next_embedding = max(2 * step, 1000)
            self._embeddings(snapshot)

    def finish(self) -> None:
        """The keys as they are now; ends all trackers."""
        if self.trackers and self.model is not None:
            from living_moe.training.observatory.saved import snapshot_of

            self._embeddings(snapshot_of(self.model))
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []

    # -- kinds of things sent --------------------------------------------------------------------------------------

    def _scalars(self, numbers: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(dict(numbers), step=step)

    def _text(self, name: str, text: str, step: int) -> None:
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                tracker.tracker.add_text(name, text, global_step=step)
            elif tracker.name in ("trackio", "wandb"):
                rows = [[step, line] for line in text.split("\n\n")]
                tracker.log({name: import_module(tracker.name).Table(columns=["step", name], data=rows)}, step=step)

    def _histograms(self, columns: Mapping[str, Array], step: int) -> None:
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                for name, column in columns.items():
                    tracker.tracker.add_histogram(name, column, global_step=step)
            elif tracker.name in ("trackio", "wandb"):
                kind = import_module(tracker.name).Histogram
                tracker.log({f"{name}/histogram": kind(column) for name, column in columns.items()}, step=step)

    def _table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                lines = [" | ".join(map(str, row)) for row in (columns, ["---"] * len(columns), *rows)]
                tracker.tracker.add_text(name, "\n".join(lines), global_step=step)
            elif tracker.name in ("trackio", "wandb"):
                table = import_module(tracker.name).Table(columns=list(columns), data=[list(row) for row in rows])
                tracker.log({name: table}, step=step)

    def _embeddings(self, snapshot: Snapshot) -> None:
        """The routers' keys of every layer, for TensorBoard's projector."""
        header = ["uid", "layer", "clade", "field", "tier", "frozen", "load", "age"]
        for writer in self._tensorboards():
            for layer in range(int(snapshot.layer_E.max()) + 1):
                experts = snapshot.of_layer(layer)
                keys_ED = self._keys(experts, layer)
                if keys_ED is None or len(keys_ED) < 2:
                    continue
                shown = {name: experts[name].astype(int) for name in header if name not in ("layer", "load")}
                shown |= {"layer": experts.layer_E, "load": experts["load"].round(4)}
                columns = [shown[name].tolist() for name in header]
                writer.add_embedding(
                    keys_ED,
                    metadata=[list(map(str, row)) for row in zip(*columns, strict=True)],
                    metadata_header=header,
                    global_step=snapshot.step,
                    tag=f"keys_of_layer_{layer:02d}",
                )

    def _keys(self, experts: Snapshot, layer: int) -> Array | None:
        """(E, D), by uid; the few directions of the snapshot where they would be too many numbers."""
        if self.model is not None:
            block = self.model.living_block(layer)
            size = len(experts) * block.router.d_key
            if size <= _MOST_NUMBERS and block.population.uids:
                keys_ED = block.router.keys(block.population.alive).detach().float().cpu().numpy()
                order: Array = np.argsort(block.population.uids, kind="stable")
                return keys_ED[order]
        names = sorted(name for name in experts.columns if name.startswith("key_"))
        return np.stack([experts[name] for name in names], axis=1) if names else None

    def _tensorboards(self) -> list[Any]:
        return [tracker.tracker for tracker in self.trackers if tracker.name == "tensorboard"]


class Decisions:
    """Scores of the policy, and what came of them.

    Args:
        lifecycle: The policy's thresholds.
    """

    def __init__(self, lifecycle: LifecycleConfig):
        self.lifecycle = lifecycle
        self._events: list[LifecycleEvent] = []
        self._before: Snapshot | None = None
        self._pairs: dict[str, tuple[list[Array], list[Array]]] = {kind: ([], []) for kind in DECISIONS}

    def happened(self, events: Iterable[LifecycleEvent]) -> None:
        self._events += [event for event in events if event.kind in DECISIONS]

    def follow(self, snapshot: Snapshot) -> None:
        """The next snapshot: what happened since the one before is the outcome of its scores."""
        if self._before is not None:
            for kind, score_E in scores_of(self._before, self.lifecycle).items():
                hit = [
                    identity(event.layer, uid)
                    for event in self._events
                    if event.kind == kind and event.step > self._before.step
                    for uid in event.parents
                ]
                outcomes = np.isin(self._before.identity_E, np.array(hit, np.int64))
                scores, happened = self._pairs[kind]
                scores.append(score_E)
                happened.append(outcomes)
                while sum(map(len, scores)) > _MOST_PAIRS and len(scores) > 1:
                    del scores[0], happened[0]
        self._before, self._events = snapshot, []

    def pairs(self, kind: str) -> tuple[Array, Array]:
        """Scores, 0 to 1, and whether it happened, of the newest decisions."""
        scores, outcomes = self._pairs[kind]
        if not scores:
            return np.empty(0), np.empty(0, bool)
        return np.concatenate(scores), np.concatenate(outcomes)


def average_precision(scores: Array, outcomes: Array) -> float:
    """Mean of the precision at each recall, 0 to 1; ties count as one threshold. At least one outcome is true."""
    order = np.argsort(-scores, kind="stable")
    scores, outcomes = scores[order], outcomes[order].astype(float)
    last = np.append(np.diff(scores) != 0, True)
    found = outcomes.cumsum()[last]
    shown = np.flatnonzero(last) + 1.0
    return float((np.diff(found, prepend=0.0) * (found / shown)).sum() / found[-1])


def scalars_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log, by the names trackers show."""
    names = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}
    numbers = {shown: float(entry[name]) for name, shown in names.items() if entry.get(name) is not None}
    experts: Sequence[int] = entry.get("experts", ())
    numbers["population/total"] = float(sum(experts))
    numbers |= {f"population/layer_{layer:02d}": float(count) for layer, count in enumerate(experts)}
    numbers |= {f"routing/{name}": float(value) for name, value in entry.get("routing", {}).items()}
    signals = entry.get("signals", {})
    numbers |= {f"signals/{name}": float(value) for name, value in signals.items() if not isinstance(value, str)}
    if signals.get("phase") in PHASES:
        numbers["signals/phase"] = PHASES.index(signals["phase"]) + 1.0
    return numbers


def layer_scalars(snapshot: Snapshot) -> dict[str, float]:
    """Measures of each layer's loads, and how far its experts specialise: the mean routing weight of an expert at the
    tokens it serves, where 1/top_k is shared evenly and 1 is alone (of families that normalise the weights).
    """
    numbers: dict[str, float] = {}
    for layer in range(int(snapshot.layer_E.max()) + 1):
        experts = snapshot.of_layer(layer)
        load_E = experts["load"].astype(float)
        for name, value in measures_of_load(load_E, DEAD_LOAD).items():
            numbers[f"{name}/layer_{layer:02d}"] = value
        weight_E = experts["router_weight"].astype(float)
        if load_E.sum() > 0:
            numbers[f"specialisation/layer_{layer:02d}"] = float((load_E * weight_E).sum() / load_E.sum())
    return numbers


def leaderboard(snapshot: Snapshot, top: int = _LEADERS) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the busiest experts of all layers, most loaded first."""
    columns = ["rank", "layer", "uid", "load", "router_weight", "interference", "divergence", "age", "frozen"]
    order = np.lexsort((snapshot["uid"], snapshot.layer_E, -snapshot["load"]))[:top]
    rows: list[list[Any]] = []
    for rank, place in enumerate(order, start=1):
        measured = [round(float(snapshot[name][place]), 4) for name in columns[3:7]]
        age = round(float(snapshot["age"][place]))
        frozen = "yes" if snapshot["frozen"][place] else "no"
        rows.append([rank, int(snapshot.layer_E[place]), int(snapshot["uid"][place]), *measured, age, frozen])
    return columns, rows


__all__ = ["PROJECT", "TRACKERS", "Trackers", "leaderboard", "open_trackers", "tracker_names", "tracker_options"]
