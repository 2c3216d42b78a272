"""Pictures show the lives that the lineage records."""

from pathlib import Path

from living_moe.figures import counts_over_time, draw, lives
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent, LifecycleKind


def event(kind: LifecycleKind, step: int, parents: tuple[int, ...], children: tuple[int, ...]) -> LifecycleEvent:
    return LifecycleEvent(kind=kind, step=step, layer=0, parents=parents, children=children)


LINEAGE = [
    event("grow", 3, (), ()),
    event("split", 3, (0,), (2,)),
    event("split", 5, (2,), (3,)),
    event("death", 7, (1,), ()),
    event("merge", 9, (2, 3), (2,)),
]


def test_every_expert_has_one_life_from_birth_to_death():
    found = {life.uid: life for life in lives(LINEAGE, [2], last_step=10)}
    assert {uid: (life.born, life.died, life.alive, life.parent) for uid, life in found.items()} == {
        0: (0, 10, True, None),
        1: (0, 7, False, None),
        2: (3, 10, True, 0),
        3: (5, 9, False, 2),
    }


def test_the_timeline_counts_the_living_after_each_event():
    steps, counts = counts_over_time(lives(LINEAGE, [2], 10), 10)[0]
    assert dict(zip(steps, counts, strict=True)) == {0: 2, 3: 3, 5: 4, 7: 3, 9: 2, 10: 2}


def test_pictures_are_written_as_png_and_self_contained_html(tmp_path: Path):
    png, html = draw(LINEAGE, [2, 2], 10, tmp_path / "figures")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = html.read_text(encoding="utf-8")
    assert "newborn of 2 at step 5" in text
    assert "<script src=" not in text
