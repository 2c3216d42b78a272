"""Pictures are drawn from records of any size and state, and what cannot be drawn says what is missing."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from factories import drift, live, living_model, mixed_text
from matplotlib.figure import Figure
from records_of_runs import write_run

from living_moe import LivingMoeForCausalLM
from living_moe.training.collapse import TOKEN_CLASSES
from living_moe.training.observatory.performance import Performance, measure
from living_moe.training.observatory.pictures import (
    DARK,
    LIGHT,
    PICTURES,
    NothingToDraw,
    Scene,
    Snapshotted,
    Theme,
    counts_over_time,
    draw_pictures,
    family_order,
    flat_layout,
    health,
    magnified,
    percentile,
    spread_over,
)
from living_moe.training.observatory.pictures.lives import visible_lives
from living_moe.training.observatory.pictures.thinning import MOST_PANELS
from living_moe.training.observatory.records import read_run

PACKAGE = "living_moe.training.observatory.pictures"
FROM_RECORDS = sorted({*PICTURES} - {"load-by-class"})


@pytest.fixture(autouse=True)
def without_umap(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """UMAP compiles for half a minute; the one test of it asks for it."""
    if "umap" not in request.node.name:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def texts(figure: Figure) -> str:
    """All that is written, captions on one line each."""
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return "\n".join(artist.get_text().replace("\n", " ") for artist in found)


@pytest.mark.parametrize(
    ("layers", "themes", "kind"), [(1, (LIGHT, DARK), "png"), (3, (DARK,), "svg")], ids=["tiny, png", "small, svg"]
)
def test_every_picture_is_written(layers: int, themes: tuple[Theme, ...], kind: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", layers=layers, experts=4 + layers, snapshots=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written, missing = draw_pictures(
            Scene(read_run(tmp_path / "run")), tmp_path / "out", themes=themes, kind=kind, dpi=40
        )
    assert sorted(missing) == ["load-by-class"] and "--text" in missing["load-by-class"]
    ends = ["" if theme is LIGHT else "-dark" for theme in themes]
    assert {path.stem for path in written} == {f"{name}{end}" for name in FROM_RECORDS for end in ends}
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if kind == "png" else b"<?xml") and len(content) > 3000


def test_a_large_run_is_thinned_and_the_pictures_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, layers=40, experts=40, snapshots=60, every=2000)
    monkeypatch.setattr(f"{PACKAGE}.scene.MOST_CELLS", 40 * 40 * 4 * 45)
    scene = Scene(read_run(tmp_path))
    for name in FROM_RECORDS:
        figure = PICTURES[name](scene, LIGHT)
        assert len(figure.axes) <= 1 + MOST_PANELS
        if name in ("expert-map", "load-over-time", "key-drift"):
            assert "12 of 40 layers, evenly spread" in texts(figure)
        if name == "load-over-time":
            assert "45 of 60 snapshots, evenly spread" in texts(figure)
        if name == "lineage":
            assert "1,440 founders without an event left out" not in texts(figure)
            assert "founders without an event left out" in texts(figure)


def test_more_lives_than_fit_are_left_out_by_layers_then_by_birth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, layers=10, experts=6, snapshots=9)
    monkeypatch.setattr(f"{PACKAGE}.lives.MOST_LIVES", 10)
    lives, notes = visible_lives(read_run(tmp_path).lives())
    assert {layer for layer, _ in lives} == {0, 4, 9} and len(lives) == 9  # three of each layer had an event
    assert notes == ["40 founders without an event left out", "3 of 10 layers"]
    monkeypatch.setattr(f"{PACKAGE}.lives.MOST_LIVES", 2)
    lives, notes = visible_lives(read_run(tmp_path).lives())
    assert len(lives) == 2 and notes[-1] == "the 2 of 3 experts that were born first"


def test_what_records_lack_is_said(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 3, "loss": 4.0, "experts": [4], "events": []}) + "\n")
    written, missing = draw_pictures(Scene(read_run(tmp_path)), tmp_path / "out", dpi=40)
    assert sorted(path.stem for path in written) == ["lineage", "timeline"]
    assert "no snapshots" in missing["expert-map"] and "no snapshots" in missing["radar"]
    assert "interference" in missing["phases"] and "evaluations" in missing["forgetting"]


def test_one_snapshot_without_keys_or_events_is_enough_for_what_needs_no_more(tmp_path: Path) -> None:
    write_run(tmp_path, layers=1, experts=4, snapshots=1, keys=False)
    written, missing = draw_pictures(Scene(read_run(tmp_path)), tmp_path / "out", dpi=40)
    assert sorted(missing) == ["expert-map", "forgetting", "key-drift", "load-by-class"]
    assert "keys" in missing["expert-map"]
    assert {"radar", "phases", "load-over-time"} <= {path.stem for path in written}


def test_a_crashed_run_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path, layers=2, experts=4, snapshots=9)
    for name in ("log.jsonl", "lineage.jsonl", "vitals.jsonl"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: -len(content.splitlines()[-1]) // 2])
    run = read_run(tmp_path)
    names = ("lineage", "timeline", "load-over-time")
    written, missing = draw_pictures(Scene(run), tmp_path / "out", names=names, dpi=40)
    assert len(written) == 3 and not missing and len(run.notes) == 3


@pytest.fixture(scope="module")
def model() -> LivingMoeForCausalLM:
    model = living_model("mixtral")
    live(model, 6, seed=1)
    drift(model, 3, frozen=True)
    return model


def test_a_checkpoint_is_drawn_with_what_its_model_was_measured_to_do(
    model: LivingMoeForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    ids_NS = mixed_text(3, 10)
    found = measure(model, ids_NS)
    counts = [np.ones((count, len(TOKEN_CLASSES))) for count in model.expert_counts]
    found = dataclasses.replace(found, classes=counts)
    scene = Scene(read_run(tmp_path / "checkpoint"), found)
    assert "contribution to the loss" in texts(PICTURES["radar"](scene, DARK))
    assert "punctuation" in texts(PICTURES["load-by-class"](scene, DARK))
    PICTURES["expert-map"](scene, LIGHT)
    PICTURES["lineage"](scene, LIGHT)
    with pytest.raises(NothingToDraw, match="no path"):
        PICTURES["key-drift"](scene, LIGHT)


def test_classes_without_a_tokenizer_are_nothing_to_draw(model: LivingMoeForCausalLM, tmp_path: Path) -> None:
    write_run(tmp_path, layers=2, experts=4, snapshots=3)
    found: Performance = measure(model, mixed_text(2, 8), leave_out=False)
    assert found.classes == []
    with pytest.raises(NothingToDraw):
        PICTURES["load-by-class"](Scene(read_run(tmp_path), found), LIGHT)


def test_the_starving_and_the_cannibalised_are_less_healthy() -> None:
    columns = {
        "load": np.array([1.0, 2.0, 0.25, 1.0, 1.0, 1.0]),
        "divergence": np.array([0.0, 0.0, 0.0, 0.2, 0.2, 0.2]),
        "interference": np.array([0.9, 0.0, 0.0, 0.9, 0.0, 0.0]),
        "conflict_cos": np.array([0.0, 0.0, 0.0, 0.0, -0.5, 0.5]),
    }
    now = Snapshotted(1, np.zeros(6), np.arange(6), np.arange(6), columns)
    assert health(now).tolist() == [1.0, 1.0, 0.25, 0.5, 0.5, 1.0]


def test_the_timeline_counts_the_living_after_each_event(tmp_path: Path) -> None:
    write_run(tmp_path, layers=1, experts=4, snapshots=9)
    lives = list(read_run(tmp_path).lives().values())
    steps, counts = counts_over_time(lives, 80)
    assert dict(zip(steps.tolist(), counts.tolist(), strict=True)) == {0: 4, 20: 5, 60: 4, 80: 4}


def test_children_stand_below_their_parents(tmp_path: Path) -> None:
    write_run(tmp_path, layers=2, experts=4, snapshots=9)
    order = family_order(read_run(tmp_path).lives())
    assert order == [(layer, uid) for layer in range(2) for uid in (0, 4, 1, 2, 3)]


def test_a_layout_by_principal_axes_keeps_the_plane_that_keys_lie_in() -> None:
    rng = np.random.default_rng(0)
    plane, basis = rng.normal(size=(12, 2)) * [3, 1], np.linalg.qr(rng.normal(size=(8, 2)))[0]
    place_E2, method = flat_layout(plane @ basis.T + 5.0, umap=False)
    assert method == "PCA"
    distances = [np.linalg.norm(x[:, None] - x[None], axis=2) for x in (plane, place_E2)]
    assert distances[0] == pytest.approx(distances[1])
    one, _ = flat_layout(np.ones((1, 8)), umap=True)
    assert one.shape == (1, 2) and np.isfinite(one).all()


def test_umap_lays_out_groups_of_keys() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    keys_ED = np.concatenate([rng.normal(size=(12, 8)), rng.normal(size=(12, 8)) + 20.0])
    place_E2, method = flat_layout(keys_ED, umap=True)
    assert method == "UMAP" and np.isfinite(place_E2).all()
    centres = [half.mean(0) for half in (place_E2[:12], place_E2[12:])]
    spread = max(float(np.linalg.norm(half - half.mean(0), axis=1).mean()) for half in (place_E2[:12], place_E2[12:]))
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread


def test_short_paths_are_drawn_larger_around_their_starts() -> None:
    start = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    path = start + np.linspace(0, 0.05, 5)[:, None, None]
    larger, factor = magnified(path)
    assert factor == 10 and larger[0] == pytest.approx(start)
    assert larger[-1] - start == pytest.approx(np.full((3, 2), 0.5))
    still, factor = magnified(np.repeat(start[None], 3, 0))
    assert factor == 1 and still[-1] == pytest.approx(start)
    late = path.copy()
    late[:2, 1] = np.nan  # born later
    assert magnified(late)[0][2, 1] == pytest.approx(path[2, 1])


def test_traits_are_ranks() -> None:
    assert percentile(np.array([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert percentile(np.array([1.0, 1.0])).tolist() == [0.5, 0.5] and percentile(np.array([7.0])).tolist() == [0.5]
    assert spread_over(range(10), 3) == [0, 4, 9] and spread_over([5, 6], 3) == [5, 6]
