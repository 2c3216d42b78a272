"""Tracks, resilience and forgetting are what a run's records say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from records_of_runs import write_run

from living_moe.training.observatory.history import forgetting_curves, resilience, tracks
from living_moe.training.observatory.records import read_run


def test_tracks_hold_each_expert_while_it_lives_and_the_ends_of_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, layers=2, experts=4, snapshots=21)
    run = read_run(tmp_path)
    whole = tracks(run, ("load", "no_such_column"))
    assert whole.sampled == "" and not whole.has("no_such_column") and whole.has("load")
    assert whole.layers == [0, 1] and len(whole.of_layer(0)) == 5  # four founders and a newborn
    born = run.events[0].step
    newborn = int(np.flatnonzero((whole.layer_E == 0) & (whole.uid_E == 4))[0])
    assert np.isfinite(whole["load"][:, newborn]).tolist() == [step >= born for step in whole.steps_T.tolist()]
    for place, snapshot in enumerate(run.snapshots(("load",))):
        row = whole["load"][place]
        assert np.array_equal(row[np.isfinite(row)], snapshot["load"])
    some = tracks(run, ("load",), most=5)
    assert some.sampled == "5 of 21 snapshots, evenly spread"
    assert some.steps_T[0] == whole.steps_T[0] and some.steps_T[-1] == whole.steps_T[-1]


def test_a_run_without_snapshots_has_no_tracks(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 4.0, "experts": [4], "events": []}) + "\n")
    empty = tracks(read_run(tmp_path), ("load", "loss_slow"))
    assert len(empty.steps_T) == len(empty.uid_E) == 0 and not empty.has("load")
    assert resilience(read_run(tmp_path)) == {}


def test_resilience_tells_fate_steadiness_hunger_and_what_was_lost(tmp_path: Path) -> None:
    write_run(tmp_path, layers=1, experts=4, snapshots=21)
    found = resilience(read_run(tmp_path))
    steady, starving, forgetful, dead = (found[0, uid] for uid in range(4))
    assert steady.variation == pytest.approx(0.0, abs=0.02) and steady.starved == 0.0 and steady.fate == "alive"
    assert steady.forgotten == 0.0
    assert starving.starved == pytest.approx(10 / 21, abs=0.06) and starving.variation is not None
    assert starving.variation > 0.5
    assert forgetful.forgotten == pytest.approx(1.0, rel=0.1)
    assert dead.fate == "death" and dead.died < found[0, 0].died and dead.born == 0
    assert found[0, 4].born > 0


def test_a_forgetting_curve_is_the_loss_above_the_best_before(tmp_path: Path) -> None:
    entries = [("a", 1, 3.0), ("b", 1, 5.0), ("a", 2, 2.0), ("b", 2, 4.0), ("a", 3, 2.5), ("b", 3, 4.5), ("a", 4, 1.0)]
    lines = [{"step": 1, "loss": 4.0, "experts": [4], "events": []}]
    lines += [{"step": step, "evaluated": text, "eval_loss": loss} for text, step, loss in entries]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = forgetting_curves(read_run(tmp_path))
    assert (first.text, first.steps, first.loss) == ("a", [1, 2, 3, 4], [3.0, 2.0, 2.5, 1.0])
    assert first.forgotten == [0.0, 0.0, 0.5, 0.0]
    assert second.forgotten == [0.0, 0.0, 0.5]
