"""What a run writes about its experts, while it trains and whatever becomes of it."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lives import build, busy_model

from living_moe.modeling_living_moe.vitals import SHOWN
from living_moe.training.observatory import read_run
from living_moe.training.observatory.recorder import Pace, Recorder
from living_moe.training.observatory.saved import snapshot_of
from living_moe.training.reporting import JsonLog


def recorded(directory: Path, *, steps: int = 16, **options: Any) -> Any:
    """A short run with its records; closed if it is asked for."""
    model = busy_model()
    options = {"every": 4, "share": 0.0, **options}
    recorder = Recorder(directory, model, max_steps=steps, **options)
    trainer = build(model, max_steps=steps, hooks=[recorder, JsonLog(directory / "log.jsonl")])
    trainer.recorder = recorder
    trainer.run()
    return trainer


def test_a_run_leaves_its_lineage_its_log_and_its_vitals(tmp_path: Path) -> None:
    trainer = recorded(tmp_path)
    running = read_run(tmp_path)
    assert running.state == "running" and running.vitals_steps == [0, 4, 8, 12, 16]
    trainer.recorder.close()
    run = read_run(tmp_path)
    model = trainer.model
    assert run.state == "finished" and run.notes == [] and run.vitals_steps == [0, 4, 8, 12, 16]
    assert run.events == list(model.lineage) and any(event.kind == "split" for event in run.events)
    assert run.founders() == [list(range(8)), list(range(8))]
    last = run.latest()
    assert last is not None
    for layer in range(2):
        experts, order = last.of_layer(layer), np.argsort(model.expert_uids(layer))
        assert experts["uid"].tolist() == sorted(model.expert_uids(layer))
        vitals = model.vitals(layer)
        assert set(SHOWN) <= set(experts.columns)
        for name in SHOWN:
            np.testing.assert_allclose(experts[name], vitals[name].numpy()[order], rtol=0.011, atol=1.1e-5)
    # Whoever is alive in the lineage is in the last snapshot.
    alive = {key for key, life in run.lives().items() if life.fate == "alive"}
    assert alive == {(int(layer), int(uid)) for layer, uid in zip(last.layer_E, last["uid"], strict=True)}


def test_recording_changes_nothing_of_a_model(tmp_path: Path) -> None:
    model = busy_model("some")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshot = snapshot_of(model)
    assert {"plasticity", "drift", "key_0"} <= set(snapshot.columns)
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())


def test_a_run_that_is_resumed_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    model = busy_model()
    recorder = Recorder(tmp_path, model, max_steps=16, every=2, share=0.0)
    trainer = build(model, max_steps=12, hooks=[recorder])
    trainer.run()
    known = len(model.lineage)
    # The process went on to step 12, its checkpoint is of step 5.
    model.model.lineage_._events[:] = [event for event in model.lineage if event.step <= 5]
    model.model._steps = 5
    again = Recorder(tmp_path, model, max_steps=16, step=5, every=2, share=0.0)
    run = read_run(tmp_path)
    assert run.vitals_steps == [0, 2, 4, 5] and run.events == list(model.lineage) and len(run.events) < known
    assert not run.notes
    again.close(finished=False)


def test_snapshots_grow_further_apart_so_that_the_log_keeps_its_bound(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, every=1, max_bytes=15_000)
    trainer.recorder.close()
    run = read_run(tmp_path)
    assert len(run.vitals_steps) < 16 and run.vitals_steps[-1] == 16
    size = (tmp_path / "vitals.jsonl").stat().st_size
    # The last snapshot of all is always written.
    assert size < 15_000 + 2 * size / len(run.vitals_steps)


def test_pace_keeps_to_its_share_of_the_time() -> None:
    pace = Pace(1, share=0.1)
    begin, spent, times = time.perf_counter(), 0.0, 0
    for step in range(400):
        time.sleep(0.0005)
        if pace.due(step):
            inner = time.perf_counter()
            with pace.spend(step):
                time.sleep(0.002)
            spent += time.perf_counter() - inner
            times += 1
    assert 2 < times < 200
    # The first two times are not paced: nothing is known of the steps yet.
    assert pace.spent == pytest.approx(spent, rel=0.1)
    assert (spent - 0.004) / (time.perf_counter() - begin) < 0.15


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", busy_model(), max_steps=3, written=False)
    recorder.observe()
    recorder.close()
    assert not (tmp_path / "run").exists()
