"""Records of a run are read whatever state it is in; what no run wrote is one clear error."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lives import busy_model

from living_moe import LifecycleEvent
from living_moe.configuration.errors import LivingMoeError, RecordsError
from living_moe.training.observatory import lives_of, read_run


def event(kind: Any, step: int, parents: tuple[int, ...], children: tuple[int, ...], layer: int = 0) -> LifecycleEvent:
    return LifecycleEvent(kind=kind, step=step, layer=layer, parents=parents, children=children, metric="load")


EVENTS = [
    event("split", 2, (0,), (4,)),
    event("grow", 2, (), ()),
    event("field", 3, (), (1,), layer=-1),
    event("split", 4, (4,), (5,)),
    event("freeze", 5, (0,), (0,)),
    event("merge", 6, (1, 4), (1,)),
    event("death", 8, (2,), ()),
]


def lines(entries: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def write_run(directory: Path, header: dict[str, Any] | None = None) -> None:
    counts = {1: 4, 2: 5, 4: 6, 6: 5, 8: 4}
    log, count = [], 4
    for step in range(1, 11):
        count = counts.get(step, count)
        happened = [one.to_dict() for one in EVENTS if one.step == step]
        entry = {"step": step, "loss": 5.0 - step / 10, "experts": [count, 4], "events": happened}
        log.append({**entry, "routing": {"gini": 0.5}} if step % 5 == 0 else entry)
    log.insert(6, {"step": 6, "evaluated": "held-out.txt", "eval_loss": 4.0})
    (directory / "log.jsonl").write_bytes(lines(log))
    (directory / "lineage.jsonl").write_bytes(lines([one.to_dict() for one in EVENTS]))
    if header is not None:
        (directory / "run.json").write_text(json.dumps(header))


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    write_run(tmp_path)
    run = read_run(tmp_path)
    assert run.events == EVENTS and run.notes == [] and run.last_step == 10
    assert run.series("loss")[0] == list(range(1, 11)) and run.series("routing.gini") == ([5, 10], [0.5, 0.5])
    assert [entry["eval_loss"] for entry in run.evaluations] == [4.0]
    # The first line of the log says four and four, and nothing had happened then.
    assert run.founders() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert run.latest() is None and list(run.snapshots()) == []


def test_lives_are_told_from_the_events() -> None:
    lives = lives_of(EVENTS, [[0, 1, 2, 3], [0, 1]], 10)
    told = {key: (life.parent, life.born, life.died, life.fate, life.heir) for key, life in lives.items()}
    assert told == {
        (0, 0): (None, 0, 10, "alive", None),
        (0, 1): (None, 0, 10, "alive", None),
        (0, 2): (None, 0, 8, "death", None),
        (0, 3): (None, 0, 10, "alive", None),
        (0, 4): (0, 2, 6, "merge", 1),
        (0, 5): (4, 4, 10, "alive", None),
        (1, 0): (None, 0, 10, "alive", None),
        (1, 1): (None, 0, 10, "alive", None),
    }
    assert [one.kind for one in lives[0, 4].events] == ["split", "split", "merge"]
    assert [one.kind for one in lives[0, 0].events] == ["split", "freeze"]


def test_who_is_only_named_by_an_event_is_a_founder() -> None:
    lives = lives_of([event("split", 7, (9,), (12,)), event("death", 9, (12,), ())], [], 10)
    assert {key: life.parent for key, life in lives.items()} == {(0, 9): None, (0, 12): 9}


@pytest.mark.parametrize("name", ["lineage.jsonl", "log.jsonl"])
def test_a_file_cut_at_any_byte_of_its_last_line_loses_that_line_only(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    for cut in range(len(content) - last, len(content) + 1):
        path.write_bytes(content[:cut])
        run = read_run(tmp_path)
        whole, left = cut >= len(content) - 1, cut - (len(content) - last)
        assert run.events == (EVENTS if name == "log.jsonl" or whole else EVENTS[:-1])
        assert len(run.log) == (10 if name != "log.jsonl" or whole else 9)
        number = len(content.splitlines())
        said = f"{name}: cut off in line {number}, the last one; {left} bytes left out."
        assert run.notes == ([] if whole or not left else [said])


def test_garbage_between_good_lines_is_left_out_and_told(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "lineage.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    content[1] = b"\x00\x00\xfe\n"
    content[3] = b'{"kind": "resurrection"}\n'
    path.write_bytes(b"".join(content))
    run = read_run(tmp_path)
    assert run.events == [one for place, one in enumerate(EVENTS) if place not in (1, 3)]
    assert len(run.notes) == 2 and "line 2" in run.notes[0] and "resurrection" in run.notes[1]


def test_without_a_lineage_file_events_are_taken_from_the_log(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "lineage.jsonl").unlink()
    assert read_run(tmp_path).events == EVENTS


def test_the_state_of_a_run_is_told_from_its_process(tmp_path: Path) -> None:
    here = {"host": platform.node(), "pid": os.getpid(), "finished": False}
    for header, state in (
        (here, "running"),
        ({**here, "pid": 2**22 + 7}, "crashed"),
        ({**here, "host": "elsewhere"}, "unknown"),
        ({**here, "finished": True}, "finished"),
        ({}, "unknown"),
    ):
        write_run(tmp_path, header)
        assert read_run(tmp_path).state == state


def test_a_broken_header_is_left_out_and_told(tmp_path: Path) -> None:
    write_run(tmp_path, {})
    (tmp_path / "run.json").write_text('{"layers": ')
    run = read_run(tmp_path)
    assert run.header == {} and run.notes == ["run.json is no JSON object; left out."] and run.events == EVENTS


def test_a_checkpoint_is_a_run_of_one_snapshot(tmp_path: Path) -> None:
    model = busy_model()
    model.split_expert(1, 3)
    model.living_blocks[0].vitals.table("trainable").load[:2] = 2.5
    model.save_pretrained(tmp_path / "saved")
    run = read_run(tmp_path / "saved")
    assert run.state == "checkpoint" and run.events == list(model.lineage)
    (snapshot,) = run.snapshots()
    layer = snapshot.of_layer(1)
    assert layer["uid"].tolist() == sorted(model.expert_uids(1)) and layer["parent"].tolist()[-1] == 3
    assert np.allclose(snapshot.of_layer(0)["load"][:2], 2.5)
    assert run.founders() == [list(range(8)), list(range(8))]
    assert "key_0" in snapshot.columns


def test_what_no_run_wrote_is_one_clear_error(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "log.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    file = tmp_path / "file.jsonl"
    file.write_text("{}")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "does not exist; give the directory of a run"),
        (file, "is a file; give the directory of a run"),
        (tmp_path / "empty", "has no log.jsonl, lineage.jsonl or vitals.jsonl"),
        (foreign, "has no line that a run of living_moe wrote"),
    ):
        with pytest.raises(RecordsError, match=message):
            read_run(path)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(LivingMoeError):
        read_run(checkpoint)
