"""The interactive lineage: its records, and the page itself in headless Chromium."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browsing import opened
from synthetic_run import write_synthetic_run

from living_moe import LifecycleEvent
from living_moe.cli import main
from living_moe.configuration.errors import RecordsError
from living_moe.training.observatory import Run, read_run
from living_moe.training.observatory.lineage_page import lineage_page, lineage_records, rows_of, write_lineage_page


def split(step: int, parent: int, child: int) -> LifecycleEvent:
    return LifecycleEvent(
        kind="split", step=step, layer=0, parents=(parent,), children=(child,), metric="load", value=2
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("runs") / "a <b> & c"
    write_synthetic_run(directory, layers=3, founders=6, events=90, most=20, steps=800)
    # As a crash leaves it.
    with (directory / "lineage.jsonl").open("a") as file:
        file.write('{"kind": "split", "step": 8')
    return read_run(directory)


# -- records -----------------------------------------------------------------------------------------------------------


def test_children_are_right_below_their_parents_and_layers_apart() -> None:
    run = Run(
        Path("run"),
        {"founders": [[0, 1], [0]]},
        events=[split(1, 0, 2), split(2, 1, 3), split(3, 0, 4), split(4, 2, 5)],
    )
    rows = rows_of(run.lives())
    assert sorted(rows, key=lambda key: rows[key]) == [(0, 0), (0, 2), (0, 5), (0, 4), (0, 1), (0, 3), (1, 0)]


def test_a_line_of_descent_of_any_length_has_rows() -> None:
    run = Run(Path("run"), {"founders": [[0]]}, events=[split(n + 1, n, n + 1) for n in range(5000)])
    rows = rows_of(run.lives())
    assert [rows[0, uid] for uid in range(5001)] == list(range(5001))


def test_the_page_knows_every_expert_and_event(run: Run) -> None:
    records = lineage_records(run)
    experts, lives = records["experts"], run.lives()
    assert sorted(experts["row"]) == list(range(len(lives)))
    for n, ((layer, uid), life) in enumerate(lives.items()):
        assert (experts["layer"][n], experts["uid"][n], experts["born"][n]) == (layer, uid, life.born)
        above = experts["parent"][n]
        assert (None if above < 0 else experts["uid"][above]) == life.parent
    assert len(records["events"]["step"]) == len(run.events) == 90
    assert records["events"]["line"][0].startswith(f"step {run.events[0].step} layer ")
    assert records["notes"] == ["lineage.jsonl: cut off in line 91, the last one; 27 bytes left out."]
    assert len(records["loads"]["steps"]) == 16 and records["loads"]["steps"][-1] == run.vitals_steps[-1]


def test_the_page_holds_everything_itself(run: Run) -> None:
    page = lineage_page(run)
    own = re.sub(r"(?s)<script>.*?</script>", "", page)
    assert not re.search(r'(src|href)="(?!data:)', own)
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in page
    (records,) = re.findall(r'(?s)<script id="records" type="application/json">(.*?)</script>', page)
    assert json.loads(records)["last"] == 800


def test_a_run_that_has_only_begun_says_so(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(RecordsError, match="has no expert yet"):
        lineage_page(read_run(tmp_path))


def test_the_command_writes_the_page_and_says_what_was_cut(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lineage", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr()
    assert "experts written to" in said.out and "cut off in line 91" in said.err
    assert (tmp_path / "page.html").read_text() == lineage_page(read_run(run.path))
    assert main(["lineage", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err


# -- the page in a browser ---------------------------------------------------------------------------------------------


def place_of(page: Any, layer: int, uid: int) -> tuple[float, float]:
    """Where on the screen the middle of an expert's bar is."""
    x, y = page.evaluate(
        """([layer, uid]) => {
            const records = JSON.parse(document.getElementById("records").textContent).experts;
            const i = records.uid.findIndex((one, n) => one === uid && records.layer[n] === layer);
            const plot = document.getElementById("plot"), full = plot._fullLayout, box = plot.getBoundingClientRect();
            const middle = (records.born[i] + records.died[i]) / 2;
            const x = full._size.l + full.xaxis.l2p(middle), y = full.yaxis._offset + full.yaxis.l2p(records.row[i]);
            return [box.left + x, box.top + y];
        }""",
        [layer, uid],
    )
    return x, y


def test_the_page_opens_clean_and_a_click_lights_up_descendants(
    run: Run, browser: Any, artefacts: Path, tmp_path: Path
) -> None:
    path = write_lineage_page(run, tmp_path / "lineage.html")
    lives = run.lives()

    def descendants(key: tuple[int, int]) -> int:
        return 1 + sum(descendants(other) for other, life in lives.items() if (life.layer, life.parent) == key)

    layer, uid = max(lives, key=descendants)
    assert descendants((layer, uid)) > 3
    for size, scheme in (("desktop", "light"), ("phone", "dark")):
        page, wrong = opened(browser, path.resolve().as_uri(), size=size, scheme=scheme)
        assert "cut off in line 91" in page.inner_text("#notes")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.mouse.click(*place_of(page, layer, uid))
        page.wait_for_selector(f'body[data-chosen="{layer}:{uid}"]')
        assert int(page.get_attribute("body", "data-highlighted")) == descendants((layer, uid))
        assert page.inner_text("#story h2").startswith(f"expert {uid} of layer {layer}, ")
        page.wait_for_timeout(500)
        page.screenshot(path=artefacts / f"lineage-{size}-{scheme}.png", full_page=size == "phone")
        page.click("#clear")
        assert page.get_attribute("body", "data-chosen") == ""
        assert wrong == []
        page.context.close()


def test_hovering_tells_the_story_search_finds_and_play_moves(run: Run, browser: Any, tmp_path: Path) -> None:
    page, wrong = opened(browser, write_lineage_page(run, tmp_path / "lineage.html").as_uri())
    newborn = next(life for life in run.lives().values() if life.parent is not None and life.fate == "death")
    page.mouse.move(*place_of(page, newborn.layer, newborn.uid))
    page.wait_for_selector("#tip", state="visible")
    tip = page.inner_text("#tip")
    assert (
        f"expert {newborn.uid} of layer {newborn.layer}" in tip
        and f"born at step {newborn.born} of expert {newborn.parent}" in tip
    )
    assert f"death of {newborn.uid} (load 0.001 of fair share for 40 steps)" in tip

    page.fill("#search", f"{newborn.layer}:{newborn.uid}")
    page.press("#search", "Enter")
    assert page.get_attribute("body", "data-chosen") == f"{newborn.layer}:{newborn.uid}"
    # The same uid in three layers: one after the other.
    seen = set()
    page.fill("#search", "0")
    for _ in range(3):
        page.press("#search", "Enter")
        seen.add(page.get_attribute("body", "data-chosen"))
    assert seen == {"0:0", "1:0", "2:0"}
    page.fill("#search", "987654")
    page.press("#search", "Enter")
    assert page.inner_text("#found") == "no expert 987654"

    page.click("#play")
    page.wait_for_function("Number(document.body.dataset.step) > 0 && Number(document.body.dataset.step) < 800")
    page.click("#play")
    assert page.inner_text("#play") == "Play"
    at = int(page.get_attribute("body", "data-step"))
    alive = sum(life.born <= at and (life.fate == "alive" or life.died > at) for life in run.lives().values())
    assert page.inner_text("#now") == f"step {at}, {alive} experts"
    assert wrong == []
    page.context.close()


def test_a_frame_of_a_great_run_takes_the_page_less_than_a_frame_of_time(
    browser: Any, artefacts: Path, tmp_path: Path
) -> None:
    write_synthetic_run(tmp_path / "run", layers=16, founders=60, events=50_000, most=70, steps=5_000, every=500)
    run = read_run(tmp_path / "run")
    assert len(run.lives()) >= 5000 and len(run.events) == 50_000
    page, wrong = opened(browser, write_lineage_page(run, tmp_path / "lineage.html").as_uri())
    times = page.evaluate(
        """() => Array.from({ length: 60 }, (_, n) => {
            const slider = document.getElementById("step"), begin = performance.now();
            slider.value = 80 * n;
            slider.dispatchEvent(new Event("input"));
            return performance.now() - begin;
        })"""
    )
    # What the page itself does between two frames at 60 a second; drawing is the compositor's.
    assert sorted(times)[len(times) // 2] < 16
    page.fill("#search", "3:7")
    page.press("#search", "Enter")
    page.wait_for_selector('body[data-chosen="3:7"]')
    page.wait_for_timeout(500)
    page.screenshot(path=artefacts / "lineage-50000-events.png")
    assert wrong == []
    page.context.close()
