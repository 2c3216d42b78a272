"""Pictures of a run, from its own records: PNG or SVG, light or dark, without a display.

Each picture is a function of a `Scene`, what a run's records say, and a `Theme`; it returns a figure, or raises
`NothingToDraw` with what the records lack. Large runs are thinned to what can be seen (thinning.py), and the picture
says so. They are grouped by what they show: keys.py, lives.py, loads.py, cycle.py.

Draws only: measures nothing, and reads no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from living_moe.training.observatory.pictures.canvas import DARK, LIGHT, THEMES, Theme
from living_moe.training.observatory.pictures.cycle import forgetting, phase_diagram
from living_moe.training.observatory.pictures.keys import expert_map, key_drift, magnified
from living_moe.training.observatory.pictures.layout import flat_layout
from living_moe.training.observatory.pictures.lives import counts_over_time, family_order, lineage_tree, timeline
from living_moe.training.observatory.pictures.loads import load_by_class, load_over_time, percentile, radar
from living_moe.training.observatory.pictures.scene import NothingToDraw, Scene, Snapshotted, health
from living_moe.training.observatory.pictures.thinning import spread_over

Draw = Callable[[Scene, Theme], Figure]
PICTURES: dict[str, Draw] = {
    "expert-map": expert_map,
    "lineage": lineage_tree,
    "timeline": timeline,
    "load-over-time": load_over_time,
    "load-by-class": load_by_class,
    "radar": radar,
    "key-drift": key_drift,
    "phases": phase_diagram,
    "forgetting": forgetting,
}


def draw_pictures(
    scene: Scene,
    directory: Path,
    *,
    themes: Sequence[Theme] = (LIGHT,),
    kind: str = "png",
    names: Sequence[str] = tuple(PICTURES),
    dpi: int = 150,
) -> tuple[list[Path], dict[str, str]]:
    """Write pictures of a run.

    Args:
        directory: Made if need be; pictures of the same names are replaced.
        themes: With several, all but the light one have their name at the end of the file's.
        kind: "png" or "svg".
        names: Of `PICTURES`.

    Returns:
        The files, and for each picture that could not be drawn what the records lack.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written, missing = [], {}
    for name in names:
        for theme in themes:
            try:
                figure = PICTURES[name](scene, theme)
            except NothingToDraw as reason:
                missing[name] = str(reason)
                break
            path = directory / f"{name}{'' if theme is LIGHT else f'-{theme.name}'}.{kind}"
            figure.savefig(path, dpi=dpi, facecolor=theme.paper)
            written.append(path)
    return written, missing


__all__ = [
    "DARK",
    "LIGHT",
    "PICTURES",
    "THEMES",
    "NothingToDraw",
    "Scene",
    "Snapshotted",
    "Theme",
    "counts_over_time",
    "draw_pictures",
    "family_order",
    "flat_layout",
    "health",
    "magnified",
    "percentile",
    "spread_over",
]
