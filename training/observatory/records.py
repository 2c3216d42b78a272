"""What a run has written, read back: `read_run` opens finished, running and crashed runs, and saved checkpoints.

A run's directory holds `run.json` (what it is), `log.jsonl` (a line per step), `lineage.jsonl` (a line per event) and
`vitals.jsonl` (see vitals_log.py), all but the first appended to while it trains. A process that is killed leaves a
line half written; it is left out, and `Run.notes` says so. Runs of before the observatory have a log only.

Steps are optimizer steps the model has lived, over all its training runs, as in the lineage.

Never writes, never fails over what a crash left behind; what no run of living_moe wrote is an error.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from living_moe.configuration.errors import CheckpointError, RecordsError
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent
from living_moe.modeling_living_moe.lifecycle.lineage import LINEAGE_NAME
from living_moe.training.observatory.lives import Life, lives_of
from living_moe.training.observatory.tail import Tail
from living_moe.training.observatory.vitals_log import VITALS_NAME, Snapshot, VitalsLog

RUN_NAME, LOG_NAME = "run.json", "log.jsonl"


@dataclass
class Run:
    """A run's records.

    Attributes:
        path: Its directory.
        header: `run.json`, or what a checkpoint's config says of the same; empty where there is none.
        log: Lines of the training log, oldest first: `step`, `lived`, `loss`, `experts`, every so often `routing` and
            `signals`.
        evaluations: Those lines of it that say `eval_loss`.
        events: All events, oldest first, those of earlier runs of the model included.
        notes: What could not be read, a sentence each. Reading snapshots may add to them.
        saved: The one snapshot of a checkpoint; None for a run.
    """

    path: Path
    header: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[LifecycleEvent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    saved: Snapshot | None = None
    vitals: VitalsLog | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def state(self) -> str:
        """ "finished", "running", "crashed" (its process is gone), "checkpoint", or "unknown" (of another machine)."""
        if self.saved is not None:
            return "checkpoint"
        if self.header.get("finished"):
            return "finished"
        # Elsewhere than on POSIX systems, asking whether a process lives would end it.
        if "pid" not in self.header or self.header.get("host") != platform.node() or os.name != "posix":
            return "unknown"
        return "running" if _lives(int(self.header["pid"])) else "crashed"

    @property
    def last_step(self) -> int:
        """The last step anything is known of."""
        steps = [entry["lived"] for entry in self.log[-1:]] + [event.step for event in self.events[-1:]]
        return max([0, *steps, *self.vitals_steps[-1:]])

    @property
    def vitals_steps(self) -> list[int]:
        """Steps of the snapshots."""
        if self.saved is not None:
            return [self.saved.step]
        return [] if self.vitals is None else self.vitals.steps

    def snapshots(self, columns: Iterable[str] | None = None, *, after: int = -1) -> Iterator[Snapshot]:
        """Snapshots of all experts, oldest first, read one at a time. See `Snapshot` for their columns.

        Args:
            columns: Which to unpack beside `uid`; None is all.
            after: Only those of later steps.
        """
        if self.saved is not None:
            if self.saved.step > after:
                yield self.saved
        elif self.vitals is not None:
            yield from self.vitals.snapshots(columns, after=after)

    def latest(self, columns: Iterable[str] | None = None) -> Snapshot | None:
        """The last snapshot; None where there is none."""
        if self.saved is not None:
            return self.saved
        return None if self.vitals is None else self.vitals.latest(columns)

    def series(self, name: str) -> tuple[list[int], list[Any]]:
        """Steps and values of a number in the log, e.g. "loss", "routing.gini" or "signals.interference"."""
        steps, values = [], []
        for entry in self.log:
            value: Any = entry
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                steps.append(entry["lived"])
                values.append(value)
        return steps, values

    def founders(self) -> list[list[int]]:
        """Per layer the uids of the experts that were there before the first event."""
        given = self.header.get("founders")
        if given is not None:
            return [list(uids) for uids in given]
        if self.saved is not None:
            known = {(int(layer), int(uid)) for layer, uid in zip(self.saved.layer_E, self.saved["uid"], strict=True)}
            born = {(event.layer, uid) for event in self.events if event.kind == "split" for uid in event.children}
            layers = 1 + max(layer for layer, _ in known)
            return [sorted(uid for at, uid in known - born if at == layer) for layer in range(layers)]
        if not self.log:
            return []
        # The first line's counts, less what happened until then; a graft numbers its experts from 0.
        entry = self.log[0]
        change: Counter[int] = Counter()
        for event in self.events:
            if event.step <= entry["lived"]:
                change[event.layer] += {"split": 1, "death": -1, "merge": 1 - len(event.parents)}.get(event.kind, 0)
        return [list(range(count - change[layer])) for layer, count in enumerate(entry["experts"])]

    def lives(self) -> dict[tuple[int, int], Life]:
        """Every expert's life by (layer, uid)."""
        return lives_of(self.events, self.founders(), self.last_step)


def read_run(path: str | Path) -> Run:
    """A run's records, or a checkpoint's.

    Args:
        path: Directory of a run (`--output-dir`) or of a saved checkpoint.

    Raises:
        RecordsError: There is no such directory, or nothing in it that a run has written.
        CheckpointError: A checkpoint of living_moe that is broken.
    """
    return Follower(path).run


class Follower:
    """Keeps a run's records up to date while it trains: reads them once, then what is appended.

    Args:
        path: As for `read_run`, which says what is raised.

    Attributes:
        run: All that was read so far. Another object after the records were begun anew, as a resumed run does.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._open()

    def follow(self) -> bool:
        """Read what was appended; whether anything was.

        Raises:
            RecordsError: The records are gone.
        """
        if self.run.saved is not None:
            return False
        # Without a lineage file events are the log's; when one comes it has all of them.
        appeared = not self._has_lineage and self._lineage.path.is_file()
        tails = [self._log, self._lineage, *([] if self.run.vitals is None else [self.run.vitals.tail])]
        if appeared or any(tail.rewritten() for tail in tails):
            self._open()
            return True
        return self._read_on()

    def _open(self) -> None:
        directory = self.path
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise RecordsError(
                f"{directory} {what}; give the directory of a run (its --output-dir) or of a checkpoint."
            )
        if not any((directory / name).is_file() for name in (RUN_NAME, LOG_NAME, VITALS_NAME)):
            if (directory / "config.json").is_file():
                self.run = _read_checkpoint(directory)
                return
            if not (directory / LINEAGE_NAME).is_file():
                raise RecordsError(
                    f"{directory} has no {LOG_NAME}, {LINEAGE_NAME} or {VITALS_NAME}; give the directory of a run "
                    f"(its --output-dir) or of a checkpoint."
                )
        self.run = run = Run(directory)
        self._header_seen: tuple[int, int] | None = None
        self._log, self._lineage = Tail(directory / LOG_NAME), Tail(directory / LINEAGE_NAME)
        self._has_lineage = self._lineage.path.is_file()
        self._passing: list[str] = []
        self._read_on()
        if run.notes and not (run.header or run.log or run.events or run.vitals_steps):
            raise RecordsError(
                f"{directory} has no line that a run of living_moe wrote ({run.notes[0]}); give the directory of a run."
            )

    def _read_on(self) -> bool:
        run = self.run
        # What was said of lines in progress may hold no longer.
        run.notes[:] = [note for note in run.notes if note not in self._passing]
        self._passing = []
        new = self._read_header()
        for entry in self._objects(self._log):
            new = True
            if not isinstance(entry.get("step"), int):
                run.notes.append(f"{LOG_NAME}: a line without a step left out.")
                continue
            entry.setdefault("lived", entry["step"])
            (run.evaluations if "eval_loss" in entry else run.log).append(entry)
            if not self._has_lineage:
                run.events += [LifecycleEvent.from_dict(event) for event in entry.get("events", ())]
        for event in events_of(self._objects(self._lineage), run.notes):
            new = True
            run.events.append(event)
        if run.vitals is not None:
            return run.vitals.follow() or new
        if (path := self.path / VITALS_NAME).is_file():
            run.vitals = VitalsLog(path, run.notes)
            return True
        return new

    def _read_header(self) -> bool:
        path = self.path / RUN_NAME
        found = path.stat() if path.is_file() else None
        seen = None if found is None else (found.st_mtime_ns, found.st_ino)
        if seen is None or seen == self._header_seen:
            return False
        self._header_seen = seen
        try:
            header = json.loads(path.read_bytes())
        except ValueError:
            header = None
        if isinstance(header, dict):
            self.run.header = header
            return True
        self.run.notes.append(f"{path.name} is no JSON object; left out.")
        return False

    def _objects(self, tail: Tail) -> Iterator[dict[str, Any]]:
        yield from objects_of(tail, self.run.notes)
        if tail.cut:
            self._passing.append(cut_note(tail))
            self.run.notes.append(cut_note(tail))


def objects_of(tail: Tail, notes: list[str]) -> Iterator[dict[str, Any]]:
    """JSON objects that were appended to a file, one a line; `notes` gets a sentence for each line that is none."""
    for number, _, line in tail.new_lines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            yield entry
        else:
            notes.append(f"{tail.path.name}, line {number}: no record; left out.")


def cut_note(tail: Tail) -> str:
    """A sentence on what is behind the last whole line of a file."""
    return f"{tail.path.name}: cut off in line {tail.lines + 1}, the last one; {tail.cut} bytes left out."


def events_of(entries: Iterable[dict[str, Any]], notes: list[str]) -> Iterator[LifecycleEvent]:
    """Events of a lineage file's lines; `notes` gets a sentence for each that is none."""
    for entry in entries:
        try:
            yield LifecycleEvent.from_dict(entry)
        except CheckpointError as error:
            notes.append(f"{LINEAGE_NAME}: {error} Left out.")


def _read_checkpoint(directory: Path) -> Run:
    # Models are needed for checkpoints only.
    from living_moe.training.observatory.saved import load_tables, snapshot_of

    model = load_tables(directory, keys=True)
    notes: list[str] = []
    tail = Tail(directory / LINEAGE_NAME)
    events = list(events_of(objects_of(tail, notes), notes))
    if tail.cut:
        notes.append(cut_note(tail))
    config = model.config
    header = {
        "family": config.backbone_config.model_type,
        "preset": config.preset,
        "layers": len(model.living_blocks),
        "lifecycle": config.lifecycle.to_dict(),
    }
    return Run(directory, header, events=events, notes=notes, saved=snapshot_of(model))


def _lives(pid: int) -> bool:
    """Whether a process of this machine is running."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


__all__ = ["LOG_NAME", "RUN_NAME", "Follower", "Run", "read_run"]
