"""The live page's state: what was appended is read once, and comes to what reading everything comes to."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from factories import token_ids
from lives import busy_model
from synthetic_run import write_synthetic_run

from living_moe import LifecycleEvent
from living_moe.training.observatory import live as module
from living_moe.training.observatory.leaderboard import card_leaderboard
from living_moe.training.observatory.live import Live
from living_moe.training.observatory.performance import measure
from living_moe.training.observatory.records import Follower, read_run
from living_moe.training.observatory.tail import Tail

FILES = ("log.jsonl", "lineage.jsonl", "vitals.jsonl")


@pytest.fixture(autouse=True)
def look_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    write_synthetic_run(directory, layers=2, founders=5, events=60, most=12, steps=300, every=20)
    return directory


def shown(live: Live) -> dict[str, Any]:
    """All parts of a state, as they are sent."""
    state = live.state()
    del state["versions"]
    return json.loads(json.dumps(state, allow_nan=False))


def split(step: int, parent: int, child: int, layer: int = 0) -> LifecycleEvent:
    return LifecycleEvent(
        kind="split", step=step, layer=layer, parents=(parent,), children=(child,), metric="load", value=2
    )


def append(path: Path, *events: LifecycleEvent) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(event.to_dict()) + "\n" for event in events))


# -- following ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_run_followed_through_any_appends_is_the_run_read_at_once(whole: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    run = tmp_path / "whole"
    run.mkdir()
    shutil.copy(whole / "run.json", run)
    contents = {name: (whole / name).read_bytes() for name in FILES}
    written = dict.fromkeys(FILES, 0)
    for name in FILES:
        (run / name).touch()
    follower, live = Follower(run), Live(run)
    while any(written[name] < len(contents[name]) for name in FILES):
        for name in FILES:
            # In pieces that end anywhere, also in the middle of a line.
            size = rng.randrange(len(contents[name]) // 5)
            with (run / name).open("ab") as file:
                file.write(contents[name][written[name] : written[name] + size])
            written[name] += size
        follower.follow()
        told = read_run(run)
        assert follower.run.log == told.log and follower.run.events == told.events
        assert follower.run.vitals_steps == told.vitals_steps and sorted(follower.run.notes) == sorted(told.notes)
        now, anew = shown(live), shown(Live(run))
        now["status"]["notes"].sort(), anew["status"]["notes"].sort()
        assert now == anew
    assert follower.run.notes == [] and len(follower.run.events) == 60


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "note": "x" * 300}) + "\n" for step in range(4)]
    path.write_text("".join(lines))
    tail = Tail(path)
    assert [number for number, _, _ in tail.new_lines()] == [1, 2, 3, 4]
    content = path.read_text()
    # Nobody would notice that the first line has become another.
    path.write_text(content.replace('"step": 0', '"step": 7') + lines[0])
    assert not tail.rewritten()
    assert [json.loads(line)["step"] for _, _, line in tail.new_lines()] == [0] and tail.lines == 5
    assert list(tail.new_lines()) == []


def test_a_run_that_is_resumed_is_read_anew(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    live = Live(run)
    before = shown(live)
    # The process went back to a checkpoint: records behind it are dropped, and others follow.
    events = [event for event in read_run(run).events if event.step <= 100]
    (run / "lineage.jsonl").write_text("".join(json.dumps(event.to_dict()) + "\n" for event in events))
    append(run / "lineage.jsonl", *(split(101 + n, events[-1].parents[0], 900 + n) for n in range(80)))
    after = shown(live)
    assert after == shown(Live(run)) != before
    assert after["events"][0]["line"].startswith("step 180 layer 0: split of")
    shutil.rmtree(run)
    assert shown(live)["status"]["state"] == "waiting" and shown(live)["population"] is None


def test_a_run_is_waited_for(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "whole"
    live = Live(run)
    assert "does not exist" in shown(live)["status"]["waiting"]
    run.mkdir()
    assert "has no log.jsonl" in shown(live)["status"]["waiting"]
    shutil.copy(whole / "run.json", run)
    (run / "log.jsonl").touch()
    assert "has begun and recorded no step" in shown(live)["status"]["waiting"]
    for name in FILES:
        shutil.copy(whole / name, run)
    state = shown(live)
    assert state["status"]["state"] == "finished" and state["status"]["waiting"] == ""
    assert state == shown(Live(whole))


def test_a_crashed_run_says_what_was_cut(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "whole"
    shutil.copytree(whole, run)
    content = (run / "lineage.jsonl").read_bytes()
    (run / "lineage.jsonl").write_bytes(content + b'{"kind": "split", "st')
    live = Live(run)
    state = shown(live)
    assert state["status"]["notes"] == ["lineage.jsonl: cut off in line 61, the last one; 21 bytes left out."]
    assert state["status"]["events"] == 60 and state["population"] is not None
    # The line was only in progress: nothing is said of it any more.
    (run / "lineage.jsonl").write_bytes(content)
    append(run / "lineage.jsonl", split(300, 0, 999))
    assert shown(live)["status"]["notes"] == []


def test_only_what_is_new_is_sent(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    live = Live(run)
    first = live.state()
    assert set(first) == {"status", "versions", "population", "timeline", "events", "board"}
    second = live.state(first["versions"])
    assert set(second) == {"status", "versions"}
    append(run / "lineage.jsonl", split(300, 0, 999))
    third = live.state(second["versions"])
    assert set(third) == {"status", "versions", "population", "timeline", "events"}
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 301, "loss": 2.0, "experts": [5, 5]}) + "\n")
    assert set(live.state(third["versions"])) == {"status", "versions", "timeline"}
    assert set(live.state({**third["versions"], "events": "0"})) >= {"events"}


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_population_is_the_last_snapshot_and_what_happened_since(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    snapshot = read_run(run).latest()
    assert snapshot is not None
    live = Live(run)
    alive = {key for key, life in read_run(run).lives().items() if life.fate == "alive"}
    layers = shown(live)["population"]["layers"]
    assert {(layer["layer"], uid) for layer in layers for uid in layer["uid"]} == alive
    first = layers[0]
    places = [first["uid"].index(int(uid)) for uid in snapshot.of_layer(0)["uid"] if int(uid) in first["uid"]]
    assert len(places) > 3 and all(first["load"][place] is not None for place in places)

    parent, gone, cold = first["uid"][:3]
    frozen = LifecycleEvent(kind="freeze", step=302, layer=0, parents=(cold,), children=(cold,))
    death = LifecycleEvent(kind="death", step=303, layer=0, parents=(gone,), children=())
    append(run / "lineage.jsonl", split(301, parent, 999), frozen, death)
    state = shown(live)
    after = state["population"]["layers"][0]
    assert after["uid"] == [uid for uid in first["uid"] if uid != gone] + [999]
    assert (after["state"][-1], after["load"][-1], after["parent"][-1], after["born"][-1]) == ("n", None, parent, 301)
    assert after["state"][after["uid"].index(cold)] == "f"
    assert sum(state["population"]["counts"].values()) == len(alive) == state["status"]["experts"]


def test_without_snapshots_the_events_tell_who_is_alive(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with_snapshots = shown(Live(run))
    (run / "vitals.jsonl").unlink()
    state = shown(Live(run))
    for layer, other in zip(state["population"]["layers"], with_snapshots["population"]["layers"], strict=True):
        assert layer["uid"] == other["uid"] and layer["born"] == other["born"]
        assert set(layer["load"]) == {None}
    assert state["board"]["busiest"] is None and with_snapshots["board"]["busiest"]["rows"]


def test_a_timeline_has_few_points_and_leaves_nothing_out(whole: Path) -> None:
    state, run = shown(Live(whole)), read_run(whole)
    line = state["timeline"]
    assert len(line["steps"]) <= module.POINTS and (line["steps"][0], line["steps"][-1]) == (1, 300)
    assert line["experts"][-1] == state["status"]["experts"]
    happened = {kind: sum(bins) for kind, bins in line["events"].items()}
    assert sum(happened.values()) == 60 and happened["split"] == sum(e.kind == "split" for e in run.events)
    losses = run.series("loss")[1]
    curve = line["loss"]
    assert min(filter(None, curve["low"])) == pytest.approx(min(losses), abs=1e-5)
    assert max(filter(None, curve["high"])) == pytest.approx(max(losses), abs=1e-5)


def test_losses_that_are_no_numbers_leave_the_page_readable(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": math.nan if step == 2 else 3.0, "experts": [2]} for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = shown(Live(tmp_path))
    assert state["status"]["loss"] == 3.0 and state["status"]["experts"] == 2
    assert state["timeline"]["loss"]["mean"] == [3.0, 3.0]


def test_a_checkpoint_is_shown_with_what_was_measured_of_it(tmp_path: Path) -> None:
    model = busy_model()
    model.split_expert(1, 3)
    found = measure(model, token_ids(4, 16, high=60))
    model.config.provenance = {"leaderboard": card_leaderboard(found)}
    model.save_pretrained(tmp_path / "saved")
    state = shown(Live(tmp_path / "saved"))
    assert (state["status"]["state"], state["status"]["experts"], state["status"]["model"]) == (
        "checkpoint",
        17,
        "saved",
    )
    assert [layer["uid"] for layer in state["population"]["layers"]] == [list(range(8)), list(range(9))]
    assert state["population"]["limits"]["split_load"] == model.config.lifecycle.split_load
    best = found.leaderboard(1)[0]
    assert state["board"]["measured"]["rows"][0][:2] == [best.layer, best.uid]
    assert state["events"] == [{"kind": "split", "line": "step 0 layer 1: split of 3, newborn 8 (asked for)"}]
