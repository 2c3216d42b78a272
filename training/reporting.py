"""What a run says while it runs: a live bar or lines, every event in words, and a log that tools can read.

Reads records and models, changes neither.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from living_moe.modeling_living_moe.lifecycle.events import EVERY_LAYER, LifecycleEvent
from living_moe.training.collapse import collapse_report, summary
from living_moe.training.loop import LivingTrainer, StepRecord

#: Steps over which the shown loss is averaged.
SHOWN_WINDOW = 20
#: Columns of a terminal that has room for a bar.
WIDE = 110
#: Events of one step that get a line each.
MOST_LINES = 12
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


#: Names of what fires events, in the words of a reader; other metrics stand for themselves.
_MEASURES = {
    "load": "load {value:.3g} of fair share",
    "foreign_load": "load {value:.3g} of fair share, of tokens outside its field",
    "divergence": "loss of its tokens up by {value:.3g} nats",
    "fragments": "weak, {value:.0%} of their tokens shared",
    "tier gravity": "{value:.0%} of their tokens shared",
    "memory": "memory {value:.0%} of its budget",
    "steps frozen": "preserved until step {threshold:.0f}",
    "tokens": "{value:,.0f} tokens seen by the last one",
    "request": "asked for",
}


def event_line(event: LifecycleEvent) -> str:
    """One event in words, e.g. "step 4550 layer 5: death of 17 (load 0.001 of fair share for 254 steps)"."""
    where = "" if event.layer == EVERY_LAYER else f" layer {event.layer}"
    parents, children = (" and ".join(map(str, uids)) for uids in (event.parents, event.children))
    if event.kind in ("grow", "shrink"):
        what = f"{event.metric} {event.kind} from {event.threshold:.0f} to {event.value:.0f}"
        return f"step {event.step}{where}: {what}"
    what = {
        "split": f"split of {parents}, newborn {children}",
        "merge": f"merge of {parents} into {children}",
        "field": f"birth of receptive field {children}",
        "part": f"the clade of {parents} parts",
    }.get(event.kind, f"{event.kind} of {parents}")
    measure = _MEASURES.get(event.metric, f"{event.metric} {{value:.3g}}")
    reason = measure.format(value=event.value, threshold=event.threshold)
    held = f" for {event.held} steps" if event.held else ""
    return f"step {event.step}{where}: {what} ({reason}{held})"


class Progress:
    """Hook: a live bar on a terminal, else a line every `every` steps; every event gets a line of its own.

    So do changes of a living model's phase, looked up every `every` steps. A step with more than `MOST_LINES` events
    has one line that counts them.

    Args:
        total: Steps of the run.
        every: Steps between lines where there is no terminal.
        shown: False on all processes but one.
    """

    def __init__(self, total: int, *, every: int = 10, shown: bool = True):
        self.every = every
        self.shown = shown
        self.total = total
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._losses: list[float] = []
        self._tokens = 0
        self._since = time.perf_counter()
        self._recent: list[tuple[float, int]] = []
        self._events = 0
        self._phase: str | None = None

    def __call__(self, trainer: LivingTrainer, record: StepRecord) -> None:
        if not self.shown:
            return
        self._losses = [*self._losses[1 - SHOWN_WINDOW :], record.loss]
        self._tokens += record.tokens
        self._recent = [*self._recent[-SHOWN_WINDOW:], (time.perf_counter(), record.tokens)]
        self._events += len(record.events)
        if self._bar is None and sys.stderr.isatty():
            self._bar = self._open(record.step - 1)
        if len(record.events) > MOST_LINES:
            self.say(f"step {record.step}: {describe_events(record.events)}")
        else:
            for event in record.events:
                self.say(event_line(event))
        if record.experts and record.step % self.every == 0:
            self._tell_phase(trainer.model, record.step)
        mean = sum(self._losses) / len(self._losses)
        experts = sum(record.experts)
        if self._bar is not None:
            note = f"loss {mean:.3f} experts {experts} events {self._events} {self._speed():,.0f} tokens/s"
            self._bar.update(self._task, completed=record.step, note=note)
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

    def _open(self, done: int) -> Bar:
        console = Console(stderr=True)
        # In a narrow window the numbers are worth more than the bar.
        wide = console.width >= WIDE
        columns = (
            *((TextColumn("step"),) if wide else ()),
            MofNCompleteColumn(),
            *((BarColumn(bar_width=None),) if wide else ()),
            TextColumn("{task.fields[note]}"),
            *((TimeElapsedColumn(),) if wide else ()),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        bar = Bar(*columns, console=console, refresh_per_second=4, expand=wide)
        self._task = bar.add_task("", total=self.total, completed=done, note="")
        bar.start()
        return bar

    def _speed(self) -> float:
        """Tokens per second over the last steps."""
        (begin, _), *later = self._recent
        return sum(tokens for _, tokens in later) / max(later[-1][0] - begin, 1e-9) if later else 0.0

    def _tell_phase(self, model: Any, step: int) -> None:
        before, self._phase = self._phase, model.phase
        if before not in (None, self._phase):
            self.say(f"step {step}: phase {self._phase}, since step {model.signals()['phase_since']:.0f}")

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def living_state(model: Any) -> dict[str, Any]:
    """What a log says of a living model now and then: `routing` and `signals`."""
    means = summary(collapse_report(model), prefix="")
    return {
        "routing": {name: means[name] for name in LOGGED_ROUTING},
        "signals": {**model.signals(), "phase": model.phase},
    }


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
        listeners: Called with every entry written.
    """

    def __init__(
        self,
        path: Path,
        *,
        after: int = 0,
        written: bool = True,
        every: int = 10,
        listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
    ):
        self.path = path
        self.listeners = list(listeners)
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
            "lived": record.step if record.lived is None else record.lived,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "experts": list(record.experts),
            "events": [event.to_dict() for event in record.events],
        }
        if record.experts and self.every and record.step % self.every == 0:
            entry |= living_state(trainer.model)
        self.write(entry)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; it has a `step`."""
        if self.written:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            for listen in self.listeners:
                listen(entry)


__all__ = ["LOGGED_ROUTING", "JsonLog", "Progress", "describe_events", "event_line", "living_state"]
