"""Writes what the observatory reads while a model trains: `run.json`, `lineage.jsonl`, `vitals.jsonl`.

Events are appended when they happen. Snapshots of all experts follow a cadence that keeps two promises, whatever the
size of the model and the length of the run: they take at most `TIME_SHARE` of its time, and their log stays below a
number of bytes, by growing further apart. `log.jsonl` is written by `JsonLog`.

Reads models, changes nothing; writes on one process.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from living_moe.modeling_living_moe import LivingMoePreTrainedModel
from living_moe.modeling_living_moe.lifecycle.lineage import LINEAGE_NAME
from living_moe.training.observatory.records import RUN_NAME
from living_moe.training.observatory.saved import snapshot_of
from living_moe.training.observatory.vitals_log import VITALS_NAME, Snapshot, VitalsWriter
from living_moe.version import __version__

#: Optimizer steps between snapshots, where the promises below do not ask for more.
SNAPSHOT_STEPS = 50
#: Of a run's time, that snapshots and what listens to them may take.
TIME_SHARE = 0.004
#: Bytes of a vitals log. With a line of some 400 bytes per step and event, 100,000 steps stay below 200 MB.
VITALS_BYTES = 100_000_000


class Pace:
    """Spaces out something done while training, so that it takes at most a share of the time.

    Args:
        every: Steps from one time to the next, at least.
        share: Of the time, 0 to 1; 0 spaces by steps alone.
    """

    def __init__(self, every: int, share: float = TIME_SHARE):
        self.every = every
        self.share = share
        self.next = 0
        self.spent = 0.0
        self._step: int | None = None
        self._ended = time.perf_counter()

    def due(self, step: int) -> bool:
        return step >= self.next

    def postpone(self, step: int) -> None:
        """Not before this step."""
        self.next = max(self.next, step)

    @contextmanager
    def spend(self, step: int) -> Iterator[None]:
        """What is done inside is measured; the next time follows from what it took, and what steps took since."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            interval = self.every
            if self.share and self._step is not None and step > self._step:
                per_step = max((begin - self._ended) / (step - self._step), 1e-9)
                interval = max(interval, math.ceil((end - begin) / (self.share * per_step)))
            self.spent += end - begin
            self.next, self._step, self._ended = step + interval, step, end


class Recorder:
    """Hook: keeps a run's records. Close it at the end; a run that never does has crashed.

    Args:
        directory: Of the run.
        model: A living model.
        max_steps: Optimizer steps of the whole run.
        step: Steps of the run so far; more than 0 continues the records there.
        every: Optimizer steps between snapshots, at least; 0 writes none.
        max_bytes: Of the vitals log.
        written: False on all processes but one.
        listeners: Called with every snapshot.
        share: Of the time, for snapshots and listeners; 0 spaces by steps alone.
    """

    def __init__(
        self,
        directory: str | Path,
        model: LivingMoePreTrainedModel,
        *,
        max_steps: int,
        step: int = 0,
        every: int = SNAPSHOT_STEPS,
        max_bytes: int = VITALS_BYTES,
        written: bool = True,
        listeners: Sequence[Callable[[Snapshot], None]] = (),
        share: float = TIME_SHARE,
    ):
        self.directory = Path(directory)
        self.model = model
        self.max_steps = max_steps
        self.every = every
        self.max_bytes = max_bytes
        self.written = written
        self.listeners = list(listeners)
        self.pace = Pace(every, share)
        self._lived = model.steps_lived
        self._known = 0
        self._recorded = -1
        if not written:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._header = run_header(model, max_steps)
        self._write_header()
        # Anew: events behind the checkpoint a run resumes from did not happen.
        model.lineage.save(self.directory / LINEAGE_NAME)
        self._known = len(model.lineage)
        if every:
            after = self._lived if step else None
            self._vitals = VitalsWriter(self.directory / VITALS_NAME, after=after)
            self._to_come = self._lived + max_steps - step
            self._snapshot()

    def __call__(self, trainer: Any, record: Any) -> None:
        self.observe()

    def observe(self) -> None:
        """After an optimizer step: note what happened, and how everybody is when that is due."""
        if not self.written:
            return
        lineage = self.model.lineage
        if len(lineage) > self._known:
            lines = [json.dumps(event.to_dict()) + "\n" for event in lineage[self._known :]]
            with (self.directory / LINEAGE_NAME).open("a", encoding="utf-8") as file:
                file.write("".join(lines))
            self._known = len(lineage)
        if self.every and self.pace.due(self.model.steps_lived):
            self._snapshot()

    def close(self, *, finished: bool = True) -> None:
        """The last snapshot; says in `run.json` that the run is over."""
        if not self.written:
            return
        self.observe()
        if self.every and self._recorded < self.model.steps_lived:
            self._snapshot()
        self._header["finished"] = finished
        self._write_header()

    def _snapshot(self) -> None:
        step = self.model.steps_lived
        with self.pace.spend(step):
            snapshot = snapshot_of(self.model)
            size = self._vitals.write(snapshot)
            for listen in self.listeners:
                listen(snapshot)
        self._recorded = step
        left, steps_left = self.max_bytes - self._vitals.bytes, self._to_come - step
        # A third more than the last one: populations grow, and some snapshots stand on their own.
        affordable = max(left / (1.33 * size), 1.0)
        self.pace.postpone(step + math.ceil(steps_left / affordable))

    def _write_header(self) -> None:
        path = self.directory / RUN_NAME
        staged = path.with_suffix(".tmp")
        staged.write_text(json.dumps(self._header, indent=2) + "\n", encoding="utf-8")
        staged.replace(path)


def run_header(model: LivingMoePreTrainedModel, max_steps: int) -> dict[str, Any]:
    """What `run.json` says of a run that begins now."""
    born = {(event.layer, uid) for event in model.lineage if event.kind == "split" for uid in event.children}
    gone = [
        (event.layer, uid)
        for event in model.lineage
        if event.kind in ("death", "merge")
        for uid in event.parents
        if uid not in event.children
    ]
    founders: list[list[int]] = []
    for layer, block in enumerate(model.living_blocks):
        ever = {*block.population.uids, *(uid for at, uid in gone if at == layer)}
        founders.append(sorted(uid for uid in ever if (layer, uid) not in born))
    lifecycle = model.config.lifecycle
    return {
        "living_moe": __version__,
        "family": model.config.backbone_config.model_type,
        "preset": model.config.preset,
        "layers": len(model.living_blocks),
        "top_k": [block.router.scoring.top_k for block in model.living_blocks],
        "max_steps": max_steps,
        "first_step": model.steps_lived,
        "founders": founders,
        "lifecycle": lifecycle.to_dict(),
        "host": platform.node(),
        "pid": os.getpid(),
        "finished": False,
    }


__all__ = ["SNAPSHOT_STEPS", "VITALS_BYTES", "Pace", "Recorder", "run_header"]
