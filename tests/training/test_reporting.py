"""What a run says: events in a line, a line every so many steps, a log that a resumed run continues."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from living_moe import LifecycleEvent
from living_moe.training.loop import StepRecord
from living_moe.training.reporting import JsonLog, Progress, describe_events


def event(kind: Any, layer: int) -> LifecycleEvent:
    return LifecycleEvent(kind=kind, step=3, layer=layer, parents=(1,), children=(9,))


def record(step: int, *events: LifecycleEvent) -> StepRecord:
    return StepRecord(
        step=step, loss=float(step), grad_norm=0.5, learning_rate=1e-3, tokens=64, experts=(8, 9), events=events
    )


def test_events_are_counted_by_kind_and_layer() -> None:
    assert describe_events([]) == ""
    events = [event("split", 3), event("death", 1), event("split", 0), event("split", 3)]
    assert describe_events(events) == "3 splits (layers 0, 3), 1 death (layer 1)"


def test_without_a_terminal_there_is_a_line_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, every=2)
    for step in range(1, 6):
        progress(None, record(step, *([event("split", 0)] if step == 3 else [])))  # type: ignore[arg-type]
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "step 2/5: loss 1.5000", "step 3: 1 split (layer 0)", "step 4/5: loss 2.5000", "step 5/5: loss 3.0000",
    ]  # fmt: skip
    assert "experts 17, events 1, lr 0.001" in lines[-1]


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(2)
    progress(None, record(1, event("death", 1)))  # type: ignore[arg-type]
    progress(None, record(2))  # type: ignore[arg-type]
    progress.close()
    assert "step 1: 1 death (layer 1)" in terminal.getvalue()
    assert "2/2" in terminal.getvalue() and "experts=17" in terminal.getvalue()


def test_processes_that_do_not_speak_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress, log = Progress(1, shown=False), JsonLog(tmp_path / "log.jsonl", written=False)
    progress(None, record(1))  # type: ignore[arg-type]
    log(None, record(1))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_a_log_is_continued_after_the_step_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLog(path)
    for step in range(1, 5):
        log(None, record(step, event("split", 0)))  # type: ignore[arg-type]
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by the crash
    again = JsonLog(path, after=2)
    again(None, record(3))  # type: ignore[arg-type]
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["step"], len(entry["events"])) for entry in entries] == [(1, 1), (2, 1), (3, 0)]
    assert LifecycleEvent.from_dict(entries[0]["events"][0]) == event("split", 0)
    JsonLog(path)
    assert path.read_text() == ""
