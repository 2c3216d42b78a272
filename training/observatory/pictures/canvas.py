"""What pictures are drawn on and with: themes, figures, panels, axes, legends, labels.

The look of all pictures is decided here and nowhere else. Knows no picture, and of a run nothing but its caption.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from living_moe.training.observatory.pictures.scene import Scene

#: Loads are shown up to so many uniform shares.
HIGHEST_LOAD = 3.0


@dataclass(frozen=True)
class Theme:
    """Colours. `layers` are told apart by eye, also by most colour-blind eyes; `low` to `high` is a ramp."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    low: str
    middle: str
    high: str
    layers: tuple[str, ...]

    @cached_property
    def ramp(self) -> Colormap:
        return LinearSegmentedColormap.from_list(f"{self.name}-ramp", [self.low, self.middle, self.high])

    @cached_property
    def around(self) -> Colormap:
        """From less (warm) over the paper to more (cool)."""
        return LinearSegmentedColormap.from_list(f"{self.name}-around", ["#d1662b", self.paper, "#2f7fd1"])


LIGHT = Theme(
    "light", "#ffffff", "#1b1f24", "#5f6b7a", "#e4e8ed", "#b9d5f0", "#3f86cc", "#0a2f66",
    ("#3b6fd4", "#d98a00", "#c9445f", "#1f9e89", "#7a52c7", "#8a6d3b", "#d060b0", "#5b7d1f", "#4a5568", "#e06030"),
)  # fmt: skip
DARK = Theme(
    "dark", "#12161c", "#e8ecf1", "#98a4b3", "#2a323d", "#2b5680", "#46a3e0", "#eaf6ff",
    ("#7aa5ff", "#f2b632", "#ff7d8f", "#52d0b8", "#b794ff", "#cfae76", "#ff9adf", "#a5cf5a", "#a9b6c6", "#ff9868"),
)  # fmt: skip
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


def new_figure(
    theme: Theme, width: float, height: float, title: str, scene: Scene, notes: Sequence[str] = ()
) -> Figure:
    """An empty figure, inches, with its title above and what it was made from below."""
    figure = Figure(figsize=(width, height), facecolor=theme.paper)
    said = textwrap.wrap("  ·  ".join([scene.caption, *(note for note in notes if note)]), int(13 * width))
    above, below = 0.5 / height, (0.22 + 0.13 * len(said)) / height
    room = (0.0, below, 1.0, 1.0 - above - below)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=room, w_pad=0.06, h_pad=0.06))
    figure.text(0.14 / width, 1 - 0.16 / height, title, color=theme.ink, size=13, weight="bold", va="top")
    figure.text(0.14 / width, 0.1 / height, "\n".join(said), color=theme.muted, size=7.5, va="bottom")
    return figure


def dress(axes: Axes, theme: Theme, title: str = "") -> None:
    axes.set_facecolor(theme.paper)
    axes.set_title(title, loc="left", color=theme.ink, size=9.5)
    for side, spine in axes.spines.items():
        spine.set_color(theme.grid)
        if side in ("top", "right"):
            spine.set_visible(False)
    axes.tick_params(colors=theme.muted, labelsize=8, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.muted)
        label.set_fontsize(9)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)


def step_axis(axes: Axes, *, label: bool = True) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
    if label:
        axes.set_xlabel("optimizer step")


def thousands(value: float) -> str:
    """10000 as "10k"."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def legend(axes: Axes, theme: Theme, **options: Any) -> None:
    settings: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": theme.ink, **options}
    axes.legend(**settings)


def color_bar(figure: Figure, mappable: Any, axes: Any, theme: Theme, label: str, **options: Any) -> None:
    bar = figure.colorbar(mappable, ax=axes, **{"shrink": 0.7, "aspect": 30, "pad": 0.01, **options})
    bar.set_label(label, color=theme.muted, size=8)
    bar.ax.tick_params(colors=theme.muted, labelsize=7, length=2)
    bar.outline.set_edgecolor(theme.grid)


def layer_colors(theme: Theme, layers: Sequence[int]) -> dict[int, Any]:
    """Colours to tell layers apart; with many, a ramp from the first to the last."""
    if len(layers) <= len(theme.layers):
        return dict(zip(layers, theme.layers, strict=False))
    return {layer: theme.ramp(0.15 + 0.85 * place / (len(layers) - 1)) for place, layer in enumerate(layers)}


def panels(
    scene: Scene, theme: Theme, layers: Sequence[int], title: str, notes: Sequence[str], *, size: float = 3.0
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per layer, in rows of up to four."""
    columns = min(4, len(layers), math.ceil(math.sqrt(len(layers))) if len(layers) > 4 else 4)
    rows = math.ceil(len(layers) / columns)
    width = max(6.4, size * columns + 0.9)
    figure = new_figure(theme, width, size * rows + 1.0, title, scene, notes)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    for axes, layer in zip(grid, layers, strict=False):
        dress(axes, theme, f"layer {layer}")
    return figure, grid[: len(layers)]


def name_axes(grid: Sequence[Axes], theme: Theme, across: str, down: str) -> None:
    """Name the axes of panels once: below the lowest of each column, left of the first of each row."""
    for place, axes in enumerate(grid):
        spec: Any = axes.get_subplotspec()
        columns = spec.get_gridspec().ncols
        if place + columns >= len(grid):
            axes.set_xlabel(across, color=theme.muted, size=9)
        if spec.is_first_col():
            axes.set_ylabel(down, color=theme.muted, size=9)


def label_points(figure: Figure, theme: Theme, wanted: Sequence[tuple[Axes, float, float, float, str]]) -> None:
    """Write labels beside points, on those that are large, and leave out whichever would cover another before it.

    Args:
        wanted: Panel, place, radius of the point in typographic points, and text; the first have precedence.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # where the panels are is settled
    taken: list[Any] = []
    for axes, x, y, radius, text in wanted:
        away = radius + 5
        for shift in ((0, 0),) if radius >= 6 else ((0, away), (0, -away), (away, 0), (-away, 0)):
            align = "center" if not shift[0] else "left" if shift[0] > 0 else "right"
            note = axes.annotate(
                text, (x, y), xytext=shift, textcoords="offset points", size=7, color=theme.ink, ha=align, va="center"
            )
            note.set_path_effects([withStroke(linewidth=2, foreground=theme.paper)])
            box = note.get_window_extent().expanded(1.08, 1.1)
            inside = axes.get_window_extent()
            if inside.contains(*box.min) and inside.contains(*box.max) and not any(box.overlaps(t) for t in taken):
                taken.append(box)
                break
            note.remove()
