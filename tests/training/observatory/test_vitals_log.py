"""The vitals log: what is written is read back, within the rounding promised, whatever is cut off or broken."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from living_moe.configuration.errors import RecordsError
from living_moe.training.observatory import vitals_log
from living_moe.training.observatory.vitals_log import (
    WHOLE_EVERY,
    NewestSnapshot,
    Snapshot,
    VitalsLog,
    VitalsWriter,
    packed,
    rounded,
    unpacked,
    unrounded,
)


def snapshot(step: int, uids: list[list[int]], seed: int = 0) -> Snapshot:
    rng = np.random.default_rng((seed, step))
    flat = np.array([uid for layer in uids for uid in layer], np.int64)
    layer_E = np.repeat(np.arange(len(uids), dtype=np.int32), [len(layer) for layer in uids])
    load = rng.lognormal(size=len(flat)).astype(np.float32)
    conflict = rng.uniform(-1, 1, len(flat)).astype(np.float32)
    return Snapshot(step, layer_E, {"uid": flat, "clade": flat % 4, "load": load, "conflict_cos": conflict})


def population(rng: np.random.Generator) -> list[list[int]]:
    return [sorted(rng.choice(60, rng.integers(1, 20), replace=False).tolist()) for _ in range(3)]


def assert_close(read: Snapshot, written: Snapshot) -> None:
    assert read.step == written.step
    assert np.array_equal(read.layer_E, written.layer_E)
    for name in ("uid", "clade"):
        assert np.array_equal(read[name], written[name])
    for name in ("load", "conflict_cos"):
        np.testing.assert_allclose(read[name], written[name], rtol=0.011, atol=1.1e-5)


@given(st.lists(st.integers(-(2**30), 2**30), max_size=50))
def test_packed_integers_are_the_same_unpacked(numbers: list[int]) -> None:
    assert unpacked(packed(np.array(numbers, np.int64))).tolist() == numbers


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_numbers_are_rounded_by_at_most_a_hundredth(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    read = unrounded(rounded(values))
    finite = np.isfinite(values) & (np.abs(values) < 1e38)
    np.testing.assert_allclose(read[finite], values[finite], rtol=0.011, atol=1.1e-5)
    assert np.isfinite(read[np.isnan(values)]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_snapshots_of_a_changing_population_are_read_back(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("log") / "vitals.jsonl"
    writer = VitalsWriter(path)
    written, people = [], population(rng)
    for step in range(8):
        if rng.random() < 0.5:
            people = population(rng)
        written.append(snapshot(step, people))
        writer.write(written[-1])
    notes: list[str] = []
    log = VitalsLog(path, notes)
    assert not notes and log.steps == list(range(8)) and writer.bytes == path.stat().st_size
    for read, one in zip(log.snapshots(), written, strict=True):
        assert_close(read, one)
    assert [one.step for one in log.snapshots(["load"], after=5)] == [6, 7]
    assert set(next(log.snapshots(["load"])).columns) == {"uid", "load"}
    latest = log.latest()
    assert latest is not None
    assert_close(latest, written[-1])


def test_the_newest_snapshot_of_a_growing_log_is_its_last_and_every_line_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitals_log, "WHOLE_EVERY", 5)
    rng, path, notes = np.random.default_rng(0), tmp_path / "vitals.jsonl", []
    writer = VitalsWriter(path)
    writer.write(snapshot(0, population(rng)))
    log = VitalsLog(path, notes)
    newest, unpacked_lines = NewestSnapshot(log, ["clade", "load"]), []
    decode = vitals_log._Decoder.decode
    for step in range(1, 40):
        writer.write(snapshot(step, population(rng)))
        if rng.random() < 0.6:
            continue
        assert log.follow() and not log.follow()
        expected = log.latest(["clade", "load"])
        with monkeypatch.context() as patch:
            patch.setattr(
                vitals_log._Decoder,
                "decode",
                lambda self, file, line: unpacked_lines.append(line.step) or decode(self, file, line),
            )
            found = newest()
            assert newest() is None
        assert found is not None and expected is not None and found.step == expected.step == step
        assert set(found.columns) == {"uid", "clade", "load"}
        assert all(np.array_equal(found[name], expected[name]) for name in found.columns)
    assert len(unpacked_lines) == len(set(unpacked_lines)) < 40 and not notes


def test_a_log_cut_at_any_byte_of_its_last_line_loses_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "vitals.jsonl"
    writer = VitalsWriter(path)
    written = [snapshot(step, [[0, 1, 2], [0, 1, 2, 3 + step]]) for step in range(4)]
    sizes = [writer.write(one) for one in written]
    content = path.read_bytes()
    for cut in range(len(content) - sizes[-1], len(content) + 1):
        path.write_bytes(content[:cut])
        notes: list[str] = []
        log = VitalsLog(path, notes)
        # Without its newline alone a line is whole.
        whole = cut >= len(content) - 1
        assert [one.step for one in log.snapshots()] == [0, 1, 2, 3][: 4 if whole else 3]
        lost = cut - (len(content) - sizes[-1])
        said = [] if whole or not lost else [f"vitals.jsonl: cut off in its last line; {lost} bytes left out."]
        assert notes == said
        # The rest of the line arrives.
        with path.open("ab") as file:
            file.write(content[cut:])
        log.follow()
        assert notes == [] and log.steps == [0, 1, 2, 3]
        for read, one in zip(log.snapshots(), written, strict=True):
            assert_close(read, one)


def test_what_is_behind_a_broken_line_is_read_from_the_next_whole_snapshot_on(tmp_path: Path) -> None:
    path = tmp_path / "vitals.jsonl"
    writer = VitalsWriter(path)
    for step in range(WHOLE_EVERY + 3):
        writer.write(snapshot(step, [[0, 1, 2]]))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"load": "', b'"load": "!')
    lines[7] = b"\x00\xff no line\n"
    path.write_bytes(b"".join(lines))
    notes: list[str] = []
    log = VitalsLog(path, notes)
    assert [one.step for one in log.snapshots()] == [*range(5), *range(WHOLE_EVERY, WHOLE_EVERY + 3)]
    assert len(notes) == 2 and "step 5" in notes[1] and "no snapshot" in notes[0]
    latest = log.latest(["load"])
    assert latest is not None and latest.step == WHOLE_EVERY + 2


def test_a_resumed_run_drops_later_snapshots_and_begins_with_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "vitals.jsonl"
    writer = VitalsWriter(path)
    for step in range(0, 50, 10):
        writer.write(snapshot(step, [[0, 1]]))
    with path.open("ab") as file:
        file.write(b'{"step": 50, "who')
    writer = VitalsWriter(path, after=20)
    written = snapshot(30, [[0, 1, 5]], seed=1)
    writer.write(written)
    notes: list[str] = []
    log = VitalsLog(path, notes)
    assert log.steps == [0, 10, 20, 30] and not notes
    assert_close(list(log.snapshots())[-1], written)
    VitalsWriter(path)
    assert path.read_bytes() == b""


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(RecordsError, match=r"step 3 has no column 'energy'; it has \['clade'"):
        snapshot(3, [[0]])["energy"]


def test_one_layer_can_be_looked_at_alone() -> None:
    whole = snapshot(1, [[0, 1], [4, 5, 9]])
    layer = whole.of_layer(1)
    assert layer["uid"].tolist() == [4, 5, 9] and len(layer) == 3
    assert np.array_equal(layer["load"], whole["load"][2:])
