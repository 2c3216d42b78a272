"""The interactive picture shows the lives that the lineage records, and needs no network."""

from pathlib import Path

from records_of_runs import write_run

from living_moe.figures import draw_html
from living_moe.training.observatory.records import read_run


def test_the_html_file_tells_lives_and_is_self_contained(tmp_path: Path):
    write_run(tmp_path, layers=2, experts=4, snapshots=9)
    draw_html(read_run(tmp_path), tmp_path / "population.html")
    text = (tmp_path / "population.html").read_text(encoding="utf-8")
    assert "layer 1, uid 4: newborn of 0 at step 20, alive" in text
    assert "layer 0, uid 3: founder, death at step 60" in text
    assert "<script src=" not in text
