"""What trackers are sent, read back from TensorBoard's own files; names; scores of decisions."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lives import blocks, build, busy_model
from transformers import Trainer, TrainingArguments

from living_moe import LifecycleEvent
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import LifecycleConfig
from living_moe.training import LivingMoeCallback
from living_moe.training.observatory import read_run
from living_moe.training.observatory.recorder import Recorder
from living_moe.training.observatory.saved import snapshot_of
from living_moe.training.observatory.states import scores_of
from living_moe.training.observatory.trackers import (
    Decisions,
    Trackers,
    average_precision,
    leaderboard,
    open_trackers,
    tracker_names,
)
from living_moe.training.observatory.vitals_log import Snapshot
from living_moe.training.reporting import JsonLog


def tensorboard_of(directory: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = {path.parent for path in directory.rglob("events.out.tfevents.*")}
    read = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    return read.Reload()


def texts(read: Any, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in read.Tensors(f"{tag}/text_summary")]


def test_a_run_is_seen_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = busy_model()
    trackers = Trackers(open_trackers(["tensorboard"], str(tmp_path / "tensorboard"), "run"), model)
    log = JsonLog(tmp_path / "log.jsonl", every=2, listeners=[trackers.entry])
    recorder = Recorder(tmp_path, model, max_steps=16, every=2, share=0.0, listeners=[trackers.snapshot])
    trainer = build(model, max_steps=16, hooks=[log, recorder])
    trainer.run()
    recorder.close()
    trackers.finish()

    read = tensorboard_of(tmp_path / "tensorboard")
    tags = read.Tags()
    wanted = {
        "train/loss", "population/total", "population/layer_00", "population/layer_01", "routing/gini",
        "signals/density", "signals/entropy", "signals/phase", "vitals/load/mean", "vitals/interference/mean",
        "gini/layer_01", "effective_experts/layer_01", "max_violation/layer_00", "specialisation/layer_00",
        "decisions/split/average_precision",
    }  # fmt: skip
    assert wanted <= set(tags["scalars"])
    assert {event.step: event.value for event in read.Scalars("train/loss")} == pytest.approx(
        {record.step: record.loss for record in trainer.records if record.step % 2 == 0}
    )
    assert read.Scalars("population/total")[-1].value == sum(model.expert_counts)
    assert {"vitals/load", "vitals/grad_norm", "vitals/interference", "vitals/conflict_cos"} <= set(tags["histograms"])
    assert "decisions/split" in tags["tensors"]
    told = "\n".join(texts(read, "lineage"))
    splits = [event for event in model.lineage if event.kind == "split"]
    assert splits and all(f"split of {e.parents[0]}, newborn {e.children[0]}" in told for e in splits)
    assert texts(read, "leaderboard")[-1].startswith("rank | layer | uid | load")
    # The projector: a key and a row of metadata per expert, in one order.
    folder = next((tmp_path / "tensorboard").rglob("*/keys_of_layer_01"))
    header, *rows = (folder / "metadata.tsv").read_text().splitlines()
    assert header.split("\t") == ["uid", "layer", "clade", "field", "tier", "frozen", "load", "age"]
    keys = np.loadtxt(folder / "tensors.tsv", ndmin=2)
    assert len(keys) == len(rows) and [row.split("\t")[1] for row in rows] == ["1"] * len(rows)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_other_trackers_get_numbers_histograms_and_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[dict[str, Any], int]] = []
    kinds = SimpleNamespace(
        Histogram=lambda column: ("histogram", len(column)), Table=lambda columns, data: ("table", len(data))
    )
    monkeypatch.setitem(sys.modules, name, kinds)
    tracker: Any = SimpleNamespace(name=name, log=lambda values, step: sent.append((values, step)), finish=lambda: None)
    model = busy_model()
    trackers = Trackers([tracker], model)
    event = LifecycleEvent(kind="death", step=7, layer=1, parents=(4,), children=(), metric="load", value=0.001)
    trackers.entry({"step": 7, "experts": [8, 7], "loss": 2.0, "events": [event.to_dict()], "routing": {"gini": 0.5}})
    trackers.entry({"step": 8, "evaluated": "new.txt", "eval_loss": 1.5})
    trackers.snapshot(snapshot_of(model))
    trackers.finish()
    together = {key: value for values, _ in sent for key, value in values.items()}
    assert together["population/layer_01"] == 7.0 and together["routing/gini"] == 0.5
    assert together["eval_loss/new.txt"] == 1.5
    assert together["lineage"] == ("table", 1) and together["leaderboard"] == ("table", 16)
    assert together["vitals/load/histogram"] == ("histogram", 16)


def test_names_of_trackers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    home = "living_moe.training.observatory.trackers.get_available_trackers"
    monkeypatch.setattr(home, lambda: [SimpleNamespace(value="tensorboard"), SimpleNamespace(value="wandb")])
    assert tracker_names("auto") == ["tensorboard"]
    assert tracker_names("none") == [] and tracker_names([]) == []
    assert tracker_names("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    with pytest.raises(ConfigurationError, match=r"report_to is 'tensorbord'\. Did you mean"):
        tracker_names("tensorbord")
    with pytest.raises(ConfigurationError, match=r"not installed; run `pip install living_moe\[trackio\]`"):
        tracker_names("trackio")
    monkeypatch.setattr(home, lambda: [])
    assert tracker_names("auto") == []


def experts(step: int, load: list[float], frozen: list[int] | None = None) -> Snapshot:
    count = len(load)
    zeros = np.zeros(count, np.float32)
    columns = {
        "uid": np.arange(count), "clade": np.arange(count), "frozen": np.array(frozen or [0] * count),
        "load": np.array(load, np.float32), "foreign_load": zeros, "divergence": zeros, "router_weight": zeros,
        "interference": zeros, "age": zeros,
    }  # fmt: skip
    return Snapshot(step, np.zeros(count, np.int32), columns)


def test_scores_are_a_half_at_the_threshold() -> None:
    lifecycle = LifecycleConfig(split_load=1.6, death_load=0.02)
    scores = scores_of(experts(0, [1.6, 0.02, 3.2, 0.0], [0, 0, 1, 0]), lifecycle)
    assert scores["split"][0] == pytest.approx(0.5) and scores["death"][1] == pytest.approx(0.5)
    # The frozen do not split for their load, and do not die.
    assert scores["split"][2] == scores["death"][2] == 0.0 and scores["death"][3] == 1.0


def test_decisions_are_compared_with_what_happened_until_the_next_snapshot() -> None:
    decisions = Decisions(LifecycleConfig())
    decisions.follow(experts(0, [3.0, 1.0, 0.0]))
    split = LifecycleEvent(kind="split", step=5, layer=0, parents=(0,), children=(3,))
    death = LifecycleEvent(kind="death", step=6, layer=0, parents=(2,), children=())
    decisions.happened([split, death])
    decisions.follow(experts(10, [1.5, 1.0, 1.5]))
    decisions.follow(experts(20, [1.5, 1.0, 1.5]))
    for kind, first in (("split", [True, False, False]), ("death", [False, False, True])):
        scores, outcomes = decisions.pairs(kind)
        assert len(scores) == 6 and outcomes.tolist() == [*first, False, False, False]
        assert average_precision(scores, outcomes) == 1.0


def test_average_precision_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, outcomes = rng.integers(0, 8, 40) / 8, rng.random(40) < 0.3
        outcomes[0] = True
        assert average_precision(scores, outcomes) == pytest.approx(metrics.average_precision_score(outcomes, scores))


def test_the_busiest_lead() -> None:
    columns, rows = leaderboard(experts(0, [0.5, 2.0, 1.0]), top=2)
    assert columns[:4] == ["rank", "layer", "uid", "load"]
    assert [row[:4] for row in rows] == [[1, 0, 1, 2.0], [2, 0, 2, 1.0]]


def test_a_trainer_keeps_the_same_records(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = busy_model()
    rows = [{"input_ids": row, "labels": row} for row in blocks()]
    arguments = TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, logging_steps=4, max_steps=14, save_strategy="no",
        per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
    )  # fmt: skip
    callback = LivingMoeCallback(snapshot_steps=2, report_to="tensorboard")
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    run = read_run(tmp_path / "run")
    assert run.state == "finished" and run.notes == [] and run.events == list(model.lineage)
    assert run.series("loss")[0] == [4, 8, 12] and run.vitals_steps[0] == 0 and run.vitals_steps[-1] == 14
    logged = [LifecycleEvent.from_dict(event) for entry in run.log for event in entry["events"]]
    assert logged == [event for event in callback.events if event.step <= 12]
    assert "population/total" in tensorboard_of(tmp_path / "run").Tags()["scalars"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["max_steps"] == 14
    # And none where none are wanted.
    arguments.output_dir = str(tmp_path / "other")
    Trainer(busy_model(), arguments, train_dataset=rows, callbacks=[LivingMoeCallback(records=False)]).train()
    assert not list((tmp_path / "other").glob("*.json*"))
