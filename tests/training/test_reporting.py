"""What a run says: events in a line, a line every so many steps, a log that a resumed run continues."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lives import busy_model

from living_moe import LifecycleEvent
from living_moe.training.loop import StepRecord
from living_moe.training.reporting import JsonLog, Progress, describe_events, event_line


def event(kind: Any, layer: int) -> LifecycleEvent:
    return LifecycleEvent(kind=kind, step=3, layer=layer, parents=(1,), children=(9,))


def record(step: int, *events: LifecycleEvent) -> StepRecord:
    return StepRecord(
        step=step, loss=float(step), grad_norm=0.5, learning_rate=1e-3, tokens=64, experts=(8, 9), events=events
    )


def living_trainer() -> Any:
    """A trainer whose model has two layers: all tokens with one of eight experts, and a balanced nine."""
    model = busy_model()
    model.split_expert(1, model.expert_uids(1)[0])
    for block, load in zip(model.living_blocks, ([8.0] + [0.0] * 7, [1.0] * 9), strict=True):
        block.vitals.table("trainable").load[: len(load)] = torch.tensor(load)
    return SimpleNamespace(model=model)


def test_events_are_counted_by_kind_and_layer() -> None:
    assert describe_events([]) == ""
    events = [event("split", 3), event("death", 1), event("split", 0), event("split", 3)]
    assert describe_events(events) == "3 splits (layers 0, 3), 1 death (layer 1)"


def test_without_a_terminal_there_is_a_line_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    progress, trainer = Progress(5, every=2), living_trainer()
    for step in range(1, 6):
        progress(trainer, record(step, *([event("split", 0)] if step == 3 else [])))
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "step 2/5: loss 1.5000", "step 3 layer 0: split of 1", "step 4/5: loss 2.5000", "step 5/5: loss 3.0000",
    ]  # fmt: skip
    assert "experts 17 (10.0 effective), events 1, lr 0.001" in lines[-1]


def test_a_model_that_does_not_live_has_no_effective_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = SimpleNamespace(model=torch.nn.Linear(2, 2))
    step = dataclasses.replace(record(1), experts=())
    Progress(1)(trainer, step)
    JsonLog(tmp_path / "log.jsonl", every=1)(trainer, step)
    assert "experts 0, events 0" in capsys.readouterr().err
    assert "routing" not in (tmp_path / "log.jsonl").read_text()


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
    shown = terminal.getvalue()
    assert "step 3 layer 1: death of 1 (asked for)" in shown
    for part in ("2/2", "experts 17", "events 1", "loss 1.500", "tokens/s", "ETA"):
        assert part in shown


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            dict(kind="death", parents=(17,), metric="load", value=0.001, threshold=0.02, held=254),
            "step 4550 layer 5: death of 17 (load 0.001 of fair share for 254 steps)",
        ),
        (
            dict(kind="split", parents=(3,), children=(40,), metric="load", value=1.84, threshold=1.6, held=100),
            "step 4550 layer 5: split of 3, newborn 40 (load 1.84 of fair share for 100 steps)",
        ),
        (
            dict(kind="split", parents=(3,), children=(40,), metric="foreign_load", value=0.3),
            "step 4550 layer 5: split of 3, newborn 40 (load 0.3 of fair share, of tokens outside its field)",
        ),
        (
            dict(kind="freeze", parents=(3,), children=(3,), metric="divergence", value=0.125, held=50),
            "step 4550 layer 5: freeze of 3 (loss of its tokens up by 0.125 nats for 50 steps)",
        ),
        (
            dict(kind="thaw", parents=(3,), children=(3,), metric="steps frozen", value=4550, threshold=4500),
            "step 4550 layer 5: thaw of 3 (preserved until step 4500)",
        ),
        (
            dict(kind="merge", parents=(3, 8), children=(3,), metric="fragments", value=0.93, threshold=0.5),
            "step 4550 layer 5: merge of 3 and 8 into 3 (weak, 93% of their tokens shared)",
        ),
        (
            dict(kind="merge", parents=(3, 8), children=(3,), metric="memory", value=0.95, threshold=0.9),
            "step 4550 layer 5: merge of 3 and 8 into 3 (memory 95% of its budget)",
        ),
        (
            dict(kind="part", parents=(3,), children=(3, 8)),
            "step 4550 layer 5: the clade of 3 parts (asked for)",
        ),
        (
            dict(kind="grow", metric="trainable slots", value=16, threshold=8),
            "step 4550 layer 5: trainable slots grow from 8 to 16",
        ),
        (
            dict(kind="field", layer=-1, children=(2,), metric="tokens", value=32768),
            "step 4550: birth of receptive field 2 (32,768 tokens seen by the last one)",
        ),
        (
            dict(kind="death", parents=(17,), metric="energy", value=0.25),
            "step 4550 layer 5: death of 17 (energy 0.25)",
        ),
    ],
)  # fmt: skip
def test_every_kind_of_event_is_told_in_words(fields: dict[str, Any], line: str) -> None:
    assert event_line(LifecycleEvent(**{"step": 4550, "layer": 5, "parents": (), "children": (), **fields})) == line


def test_very_many_events_of_a_step_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(5)(living_trainer(), record(1, *[event("split", 0)] * 40))
    assert capsys.readouterr().err == "step 1: 40 splits (layer 0)\n"


def test_processes_that_do_not_speak_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress, log = Progress(1, shown=False), JsonLog(tmp_path / "log.jsonl", written=False)
    progress(None, record(1))  # type: ignore[arg-type]
    log(None, record(1))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_every_so_many_lines_of_a_log_have_the_state_of_routing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log, trainer = JsonLog(path, every=2), living_trainer()
    for step in range(1, 6):
        log(trainer, record(step))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["step"] for entry in entries if "routing" in entry] == [2, 4]
    # Means of a layer where one of eight takes all, and a balanced one.
    expected = {"gini": 0.875 / 2, "effective_share": (1 / 8 + 1) / 2, "max_violation": 3.5, "dead_share": 0.875 / 2}
    assert entries[1]["routing"] == pytest.approx(expected)


def test_every_so_many_lines_have_the_signals_and_changes_of_phase_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, path = living_trainer(), tmp_path / "log.jsonl"
    hooks = [JsonLog(path, every=2), Progress(8, every=2)]
    table, drift = trainer.model.living_blocks[0].vitals.table("trainable"), trainer.model.model.drift
    table.interference[:2], table.sampled[:2] = torch.tensor([1.0, 3.0]), torch.tensor([1, 4])
    table.loss_fast[0], table.loss_slow[0], table.credited[0] = 2.5, 2.0, 1
    for step in range(1, 9):
        if step == 5:
            drift.phase.fill_(2)
            drift.began.fill_(5)
        for hook in hooks:
            hook(trainer, record(step))
    signals = {
        entry["step"]: entry["signals"]
        for entry in map(json.loads, path.read_text().splitlines())
        if "signals" in entry
    }
    assert list(signals) == [2, 4, 6, 8]
    assert signals[4] == {
        "interference": 2.0, "divergence": 0.5, "density": 0.0, "entropy": 0.0, "phase_since": 0.0, "phase": "stability"
    }  # fmt: skip
    assert (signals[6]["phase"], signals[6]["phase_since"]) == ("new_data", 5.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "phase" in line] == ["step 6: phase new_data, since step 5"]


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
