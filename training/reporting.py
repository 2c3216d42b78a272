"""What a run says while it runs: a progress bar or lines, and a log that tools can read.

Reads records and models, changes neither.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from living_moe.modeling_living_moe.lifecycle.events import EVERY_LAYER, LifecycleEvent
from living_moe.training.collapse import collapse_report, summary
from living_moe.training.loop import LivingTrainer, StepRecord

#: Steps over which the shown loss is averaged.
SHOWN_WINDOW = 20
#: Measures of collapse in a log, means over layers: comparable between layers and populations of any size.
LOGGED_ROUTING = ("gini", "effective_share", "max_violation", "dead_share")


def describe_events(events: Sequence[LifecycleEvent]) -> str:
    """One line: events by kind and layer, e.g. "2 splits (layers 0, 3), 1 death (layer 1)"."""
    parts = []
    for kind, count in Counter(event.kind for event in events).items():
        layers = sorted({event.layer for event in events if event.kind == kind})
        plural = kind if count == 1 else f"{kind}s"
        where = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        parts.append(f"{count} {plural} ({'all layers' if layers == [EVERY_LAYER] else where})")
    return ", ".join(parts)


class Progress:
    """Hook: a progress bar on a terminal, else a line every `every` steps; events get a line of their own.

    So do changes of a living model's phase, looked up every `every` steps.

    Args:
        total: Steps of the run.
        every: Steps between lines where there is no terminal.
        shown: False on all processes but one.
    """

    def __init__(self, total: int, *, every: int = 10, shown: bool = True):
        self.every = every
        self.shown = shown
        self.total = total
        self._bar: Any = None
        self._losses: list[float] = []
        self._tokens = 0
        self._since = time.perf_counter()
        self._events = 0
        self._phase: str | None = None

    def __call__(self, trainer: LivingTrainer, record: StepRecord) -> None:
        if not self.shown:
            return
        self._losses = [*self._losses[1 - SHOWN_WINDOW :], record.loss]
        self._tokens += record.tokens
        self._events += len(record.events)
        if self._bar is None and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=record.step - 1, unit="step", dynamic_ncols=True)
        if record.events:
            self.say(f"step {record.step}: {describe_events(record.events)}")
        if record.experts and record.step % self.every == 0:
            self._tell_phase(trainer.model, record.step)
        mean = sum(self._losses) / len(self._losses)
        experts = sum(record.experts)
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix(loss=f"{mean:.3f}", experts=experts, events=self._events, refresh=False)
        elif record.step % self.every == 0 or record.step == self.total:
            seconds = time.perf_counter() - self._since
            effective = ""
            if experts:
                layers = collapse_report(trainer.model)
                effective = f" ({sum(layer['effective_experts'] for layer in layers):.1f} effective)"
            self.say(
                f"step {record.step}/{self.total}: loss {mean:.4f}, experts {experts}{effective}, "
                f"events {self._events}, lr {record.learning_rate:.3g}, "
                f"{self._tokens / max(seconds, 1e-9):,.0f} tokens/s"
            )
            self._tokens, self._since = 0, time.perf_counter()

    def _tell_phase(self, model: Any, step: int) -> None:
        before, self._phase = self._phase, model.phase
        if before not in (None, self._phase):
            self.say(f"step {step}: phase {self._phase}, since step {model.signals()['phase_since']:.0f}")

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self.shown:
            tqdm.write(line, file=sys.stderr) if self._bar is not None else print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonLog:
    """Hook: one JSON line per step. A resumed run drops the lines after the step it resumes from.

    Every so many steps the line of a living model has `routing`, how far its routing has collapsed (`LOGGED_ROUTING`,
    see collapse.py), and `signals`, what `model.signals` says, with the `phase` it is in and the step at which that
    began. That costs a few transfers from the device.

    Args:
        path: Of the log, such as `log.jsonl`.
        after: Keep lines up to this step.
        written: False on all processes but one.
        every: Steps between lines with `routing` and `signals`; 0 is never.
    """

    def __init__(self, path: Path, *, after: int = 0, written: bool = True, every: int = 10):
        self.path = path
        self.written = written
        self.every = every
        if not written:
            return
        kept = []
        if after and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["step"] <= after:
                    kept.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept), encoding="utf-8")

    def __call__(self, trainer: LivingTrainer, record: StepRecord) -> None:
        if not self.written:
            return
        entry: dict[str, Any] = {
            "step": record.step,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "experts": list(record.experts),
            "events": [event.to_dict() for event in record.events],
        }
        if record.experts and self.every and record.step % self.every == 0:
            means = summary(collapse_report(trainer.model), prefix="")
            entry["routing"] = {name: means[name] for name in LOGGED_ROUTING}
            entry["signals"] = {**trainer.model.signals(), "phase": trainer.model.phase}  # type: ignore[operator]
        self.write(entry)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; it has a `step`."""
        if self.written:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


__all__ = ["LOGGED_ROUTING", "JsonLog", "Progress", "describe_events"]
