"""Pictures of a run, from its own records: PNG or SVG, light or dark, without a display.

Each picture is a function of a `Scene`, what a run's records say, and a `Theme`; it returns a figure, or raises
`NothingToDraw` with what the records lack. Large runs are thinned to what can be seen, and the picture says so.

Draws only: measures nothing, and reads no model. Which classes of tokens go where no log records; that picture, and
measured contributions, need what `performance.measure` found.

T snapshots, E experts, D directions that keys are noted on, C classes of tokens.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.drift import PHASES
from living_moe.training.collapse import TOKEN_CLASSES
from living_moe.training.observatory.history import (
    MOST_SNAPSHOTS,
    Tracks,
    forgetting_curves,
    forgotten_by_expert,
    tracks,
)
from living_moe.training.observatory.lives import Life
from living_moe.training.observatory.performance import ExpertRow, Performance
from living_moe.training.observatory.records import Run
from living_moe.training.observatory.vitals_log import Array

#: Layers drawn side by side, lives below each other, points on a line, numbers in a table of tracks.
MOST_PANELS, MOST_LIVES, MOST_POINTS, MOST_CELLS = 12, 1200, 2000, 3_000_000
#: Points of a key's path.
MOST_TURNS = 40
#: Layers that get a line of their own in a timeline.
MOST_LINES = 10
#: Fewest keys of a layer that UMAP is asked to lay out; below, neighbourhoods of its size mean nothing.
FEWEST_FOR_UMAP = 16
#: Experts of a layer in the heat map of classes, and experts with a radar.
MOST_ROWS, RADARS = 40, 6
#: Loads are shown up to so many uniform shares.
HIGHEST_LOAD = 3.0
_KEYS = tuple(f"key_{place}" for place in range(8))
_COLUMNS = (
    "load", "age", "router_weight", "interference", "divergence", "conflict_cos", "loss_slow", "frozen", "field",
    "energy", *_KEYS,
)  # fmt: skip
_EVENT_KINDS = ("split", "merge", "death", "freeze", "thaw", "part", "field")


class NothingToDraw(Exception):
    """The records lack what a picture shows; the message says what."""


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


@dataclass
class Scene:
    """What a run's records say, read once for all pictures.

    Attributes:
        run: From `read_run`.
        performance: What was measured on the run's model, if anything was.
    """

    run: Run
    performance: Performance | None = None

    @cached_property
    def lives(self) -> dict[tuple[int, int], Life]:
        return self.run.lives()

    @cached_property
    def tracks(self) -> Tracks:
        latest = self.run.latest(())
        experts = 1 if latest is None else max(1, len(latest))
        return tracks(self.run, _COLUMNS, most=min(MOST_SNAPSHOTS, max(40, MOST_CELLS // (experts * 4))))

    @cached_property
    def now(self) -> Snapshotted:
        """The alive at the last snapshot."""
        if not len(self.tracks.steps_T):
            raise NothingToDraw("the run has no snapshots of its experts (vitals.jsonl)")
        place_E = np.flatnonzero(np.isfinite(self.tracks["load"][-1]))
        columns = {name: column[-1, place_E] for name, column in self.tracks.columns.items() if self.tracks.has(name)}
        return Snapshotted(
            int(self.tracks.steps_T[-1]), self.tracks.layer_E[place_E], self.tracks.uid_E[place_E], place_E, columns
        )

    @cached_property
    def layouts(self) -> tuple[dict[int, Array], str]:
        """Places in the plane of the alive's keys, (E, 2) per shown layer, and how they were found."""
        keys_ED = key_table(self.now)
        layers, _ = some_layers([int(layer) for layer in np.unique(self.now.layer_E)])
        has_umap = importlib.util.find_spec("umap") is not None
        found = {layer: flat_layout(keys_ED[self.now.layer_E == layer], umap=has_umap) for layer in layers}
        methods = " and ".join(sorted({method for _, method in found.values()}))
        return {layer: place_E2 for layer, (place_E2, _) in found.items()}, methods

    @property
    def caption(self) -> str:
        run = self.run
        return f"{run.name} ({run.state}), step {run.last_step:,}"


@dataclass(frozen=True)
class Snapshotted:
    """The alive of one step: columns (E,); `place_E` is where they are in the tracks."""

    step: int
    layer_E: Array
    uid_E: Array
    place_E: Array
    columns: dict[str, Array] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Array:
        """A column; zeros where it was never written."""
        column = self.columns.get(name)
        return np.zeros(len(self.layer_E)) if column is None else np.nan_to_num(column.astype(np.float64))


def health(now: Snapshotted) -> Array:
    """How well experts are, 0 to 1, (E,): their load up to the uniform share, halved for who is being cannibalised.

    Cannibalised is, by the default thresholds of the policy `self_preservation`, whose tokens' loss rises
    (`divergence`) while the mixture or other gradients pull it away (`interference`, `conflict_cos`).
    """
    limits = LifecycleConfig()
    attacked_E = (now["interference"] > limits.split_interference) | (now["conflict_cos"] < limits.split_conflict)
    cannibalised_E = (now["divergence"] > limits.split_divergence) & attacked_E
    health_E: Array = np.minimum(1.0, now["load"]) * np.where(cannibalised_E, 0.5, 1.0)
    return health_E


# -- what all pictures share -------------------------------------------------------------------------------------------


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


def spread_over(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most).round()]


def some_layers(layers: Sequence[int], most: int = MOST_PANELS) -> tuple[list[int], str]:
    """The layers shown, and what the picture says of the others."""
    shown = spread_over(layers, most)
    return shown, "" if len(shown) == len(layers) else f"{len(shown)} of {len(layers)} layers, evenly spread"


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


# -- the pictures ------------------------------------------------------------------------------------------------------


def key_table(now: Snapshotted) -> Array:
    """Keys of the alive on the directions they were noted on, (E, D).

    Raises:
        NothingToDraw: They were not noted.
    """
    names = [name for name in _KEYS if name in now.columns]
    if not names:
        raise NothingToDraw("the snapshots hold no keys")
    return np.stack([now[name] for name in names], axis=1)


def flat_layout(keys_ED: Array, *, umap: bool) -> tuple[Array, str]:
    """Places in the plane, (E, 2), for keys, and how they were found: "UMAP" where wanted and possible, or "PCA"."""
    if umap and len(keys_ED) >= FEWEST_FOR_UMAP:
        from umap import UMAP  # type: ignore[import-not-found,import-untyped,unused-ignore]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies, about threads and graphs
            reducer = UMAP(n_neighbors=min(15, len(keys_ED) - 1), random_state=0, n_jobs=1)
            return np.asarray(reducer.fit_transform(keys_ED), np.float64), "UMAP"
    return keys_ED @ principal_axes(keys_ED) - keys_ED.mean(0) @ principal_axes(keys_ED), "PCA"


def principal_axes(points_ND: Array) -> Array:
    """The two directions of most variance, (D, 2), each with its largest entry above 0."""
    centred_ND = points_ND - points_ND.mean(0)
    _, vectors_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    axes_D2 = vectors_DD[:, ::-1][:, :2]
    if axes_D2.shape[1] < 2:
        axes_D2 = np.concatenate([axes_D2, np.zeros_like(axes_D2)], axis=1)
    signs: Array = np.sign(axes_D2[np.abs(axes_D2).argmax(0), [0, 1]])
    return axes_D2 * np.where(signs == 0, 1.0, signs)


def expert_map(scene: Scene, theme: Theme) -> Figure:
    """Where experts are addressed: keys in the plane, size load times health, colour energy or load, old ones faded."""
    now = scene.now
    places, methods = scene.layouts
    layers, note = some_layers([int(layer) for layer in np.unique(now.layer_E)])
    shown = "energy" if "energy" in now.columns else "load"
    value_E = now[shown]
    top = min(HIGHEST_LOAD, max(1.5, float(value_E.max()))) if shown == "load" else max(float(value_E.max()), 1e-9)
    size_E = now["load"] * health(now)
    age_E = now["age"] / max(float(now["age"].max()), 1.0)
    color = theme.ramp(np.clip(value_E / top, 0, 1))
    color[:, 3] = 1.0 - 0.5 * age_E
    notes = [
        f"{methods} of keys on {sum(name in now.columns for name in _KEYS)} random directions",
        "size: load × health, fading: age, ring: frozen",
        note,
    ]
    figure, grid = panels(scene, theme, layers, f"Expert map at step {now.step:,}", notes)
    wanted = []
    largest = max(float(size_E.max()), 1e-9)
    for axes, layer in zip(grid, layers, strict=True):
        place_E2 = places[layer]
        mine = np.flatnonzero(now.layer_E == layer)
        order = mine[np.argsort(-size_E[mine], kind="stable")]
        rank = np.argsort(-size_E[mine], kind="stable")
        crowd = min(1.0, 24 / len(mine))
        ring = [1.3 if now["frozen"][one] > 0 else 0.5 for one in order]
        edges = [theme.ink if now["frozen"][one] > 0 else theme.muted for one in order]
        areas = 14 + 420 * crowd * size_E[order] / largest
        axes.scatter(
            place_E2[rank, 0],
            place_E2[rank, 1],
            s=areas,
            c=color[order],
            linewidths=ring,
            edgecolors=edges,
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.margins(0.16)
        wanted += [
            (axes, *place_E2[one], math.sqrt(area / math.pi), str(int(now.uid_E[mine[one]])))
            for one, area in zip(rank[:24], areas, strict=False)
        ]
    mappable = _mappable(theme.ramp, 0.0, top)
    unit = "load (uniform share is 1)" if shown == "load" else "energy"
    color_bar(figure, mappable, grid, theme, unit, extend="max" if shown == "load" else "neither")
    label_points(figure, theme, wanted)
    return figure


def _mappable(ramp: Colormap, low: float, high: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), ramp)


def family_order(lives: dict[tuple[int, int], Life]) -> list[tuple[int, int]]:
    """Layers one below the other, children right below their parents, in the order of birth."""
    children: dict[tuple[int, int], list[tuple[int, int]]] = {}
    roots = []
    for key, life in lives.items():
        parent = None if life.parent is None else (life.layer, life.parent)
        if parent is None or parent not in lives:
            roots.append(key)
        else:
            children.setdefault(parent, []).append(key)
    order = []
    for root in sorted(roots):
        open_keys = [root]
        while open_keys:
            key = open_keys.pop()
            order.append(key)
            open_keys += sorted(children.get(key, ()), key=lambda one: (-lives[one].born, one))
    return order


def visible_lives(lives: dict[tuple[int, int], Life]) -> tuple[dict[tuple[int, int], Life], list[str]]:
    """Lives that fit in a picture, and what it says of the others."""
    if len(lives) <= MOST_LIVES:
        return lives, []
    notes = []
    eventful = {key: life for key, life in lives.items() if life.events}
    if len(eventful) < len(lives):
        notes.append(f"{len(lives) - len(eventful):,} founders without an event left out")
    if len(eventful) <= MOST_LIVES:
        return eventful, notes
    layers = sorted({layer for layer, _ in eventful})
    sizes = Counter(layer for layer, _ in eventful)
    count = len(layers)
    while count > 1 and sum(sizes[layer] for layer in spread_over(layers, count)) > MOST_LIVES:
        count -= 1
    shown = spread_over(layers, count)
    if count < len(layers):
        notes.append(f"{count} of {len(layers)} layers")
    kept = [key for key in family_order(eventful) if key[0] in shown]
    if len(kept) > MOST_LIVES:
        oldest = sorted(kept, key=lambda key: (eventful[key].born, key))[:MOST_LIVES]
        notes.append(f"the {MOST_LIVES:,} of {len(kept):,} experts that were born first")
        kept = oldest
    return {key: eventful[key] for key in kept}, notes


def lineage_tree(scene: Scene, theme: Theme) -> Figure:
    """Every expert from birth to death, children below their parents."""
    if not scene.lives:
        raise NothingToDraw("neither a log nor a lineage says who lived")
    lives, notes = visible_lives(scene.lives)
    return draw_lineage(lives, theme, scene, notes)


def draw_lineage(lives: dict[tuple[int, int], Life], theme: Theme, scene: Scene, notes: Sequence[str] = ()) -> Figure:
    order = family_order(lives)
    layers = sorted({layer for layer, _ in order})
    # A row is left free between layers.
    row = {key: place + layers.index(key[0]) for place, key in enumerate(order)}
    colors = layer_colors(theme, layers)
    height = min(18.0, 2.2 + max(1.6, 0.1 * len(order)))
    notes = ["a line is a life; a fork is a split; × is a death, a dotted line leads into a merge", *notes]
    figure = new_figure(theme, 10, height, f"Lineage of {len(order):,} experts", scene, notes)
    axes = figure.subplots()
    dress(axes, theme)
    thin = min(1.0, 240 / len(order))
    bars: dict[int, list[Any]] = {layer: [] for layer in layers}
    forks: dict[int, list[Any]] = {layer: [] for layer in layers}
    merges: dict[int, list[Any]] = {layer: [] for layer in layers}
    dead = []
    for key in order:
        life, y = lives[key], row[key]
        bars[life.layer].append([(life.born, y), (max(life.died, life.born), y)])
        if life.parent is not None and (parent := (life.layer, life.parent)) in row:
            forks[life.layer].append([(life.born, row[parent]), (life.born, y)])
        if life.fate == "merge" and life.heir is not None and (heir := (life.layer, life.heir)) in row:
            merges[life.layer].append([(life.died, y), (life.died, row[heir])])
        if life.fate != "alive":
            dead.append((life.died, y, life.fate))
    for layer in layers:
        color = colors[layer]
        axes.add_collection(LineCollection(bars[layer], colors=[color], linewidths=0.5 + 1.1 * thin))
        axes.add_collection(LineCollection(forks[layer], colors=[color], linewidths=0.4 + 0.4 * thin, alpha=0.7))
        dotted = LineCollection(merges[layer], colors=[color], linewidths=0.5 + 0.5 * thin, linestyles="dotted")
        axes.add_collection(dotted)
    ends = [(x, y) for x, y, fate in dead if fate == "death"]
    size, width = 6 + 14 * thin, 0.5 + 0.5 * thin
    axes.scatter([x for x, _ in ends], [y for _, y in ends], marker="x", s=size, c=theme.ink, linewidths=width)
    last = max(1, scene.run.last_step, *(life.died for life in lives.values()))
    axes.set_xlim(-0.01 * last, 1.01 * last)
    axes.set_ylim(len(order) + len(layers) - 1.2, -0.8)
    middle = {layer: np.mean([row[key] for key in order if key[0] == layer]) for layer in layers}
    shown = spread_over(layers, max(1, int(height * 5)))
    axes.set_yticks([float(middle[layer]) for layer in shown], [f"layer {layer}" for layer in shown])
    for tick, layer in zip(axes.get_yticklabels(), shown, strict=True):
        tick.set_color(colors[layer] if len(layers) <= len(theme.layers) else theme.muted)
    axes.grid(visible=False, axis="y")
    step_axis(axes)
    return figure


def counts_over_time(lives: Sequence[Life], last_step: int) -> tuple[Array, Array]:
    """The steps at which a number of experts changes, 0 and the last among them, and the numbers from there on."""
    born = np.array([life.born for life in lives], np.int64)
    died = np.array([life.died for life in lives if life.fate != "alive"], np.int64)
    steps = np.unique(np.concatenate([born, died, [0, last_step]]))
    alive = np.searchsorted(np.sort(born), steps, side="right") - np.searchsorted(np.sort(died), steps, side="right")
    return steps, alive


def timeline(scene: Scene, theme: Theme) -> Figure:
    """How many experts live in each layer, and when what happened."""
    if not scene.lives:
        raise NothingToDraw("neither a log nor a lineage says who lived")
    last = max(1, scene.run.last_step)
    by_layer: dict[int, list[Life]] = {}
    for (layer, _), life in sorted(scene.lives.items()):
        by_layer.setdefault(layer, []).append(life)
    layers = list(by_layer)
    series = {layer: counts_over_time(mine, last) for layer, mine in by_layer.items()}
    events = Counter(event.kind for event in scene.run.events if event.kind in _EVENT_KINDS)
    many = len(layers) > MOST_LINES
    figure = new_figure(theme, 10, 6.2, "Experts per layer over time", scene)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 1.1], sharex=True)
    for axes in (top, bottom):
        dress(axes, theme)
    if many:
        at = np.unique(np.linspace(0, last, 400).astype(np.int64))
        table = np.stack([counts[np.searchsorted(steps, at, side="right") - 1] for steps, counts in series.values()])
        image = top.imshow(
            table, aspect="auto", cmap=theme.ramp, interpolation="nearest",
            extent=(0, last, layers[-1] + 0.5, layers[0] - 0.5),
        )  # fmt: skip
        top.grid(visible=False)
        top.set_ylabel("layer")
        color_bar(figure, image, top, theme, "experts", shrink=0.9)
    else:
        colors = layer_colors(theme, layers)
        for layer, (steps, counts) in series.items():
            kept = spread_over(range(len(steps)), MOST_POINTS)
            top.step(
                steps[kept], counts[kept], where="post", color=colors[layer], linewidth=1.6, label=f"layer {layer}"
            )
        top.set_ylabel("experts")
        top.yaxis.set_major_locator(MaxNLocator(integer=True))
        legend(top, theme, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if events:
        bins = np.linspace(0, last, min(60, last) + 1)
        base = np.zeros(len(bins) - 1)
        for kind, color in zip(_EVENT_KINDS, theme.layers, strict=False):
            if kind in events:
                height, _ = np.histogram([e.step for e in scene.run.events if e.kind == kind], bins)
                bottom.bar(bins[:-1], height, np.diff(bins), bottom=base, align="edge", color=color, label=kind)
                base += height
        legend(bottom, theme, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        bottom.text(0.5, 0.5, "no event", transform=bottom.transAxes, ha="center", va="center", color=theme.muted)
        bottom.set_yticks([])
    bottom.set_ylabel("events")
    bottom.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    bottom.set_xlim(0, last)
    step_axis(bottom)
    return figure


def load_over_time(scene: Scene, theme: Theme) -> Figure:
    """Who was routed to: a row per expert in the order of birth, its load over the snapshots."""
    over_time = scene.tracks
    if not len(over_time.steps_T):
        raise NothingToDraw("the run has no snapshots of its experts (vitals.jsonl)")
    layers, note = some_layers(over_time.layers)
    figure, grid = panels(scene, theme, layers, "Load of every expert over time", [over_time.sampled, note])
    begin, end = int(over_time.steps_T[0]), max(scene.run.last_step, int(over_time.steps_T[-1]) + 1)
    # Between snapshots the one before holds.
    column_T = np.searchsorted(over_time.steps_T, np.linspace(begin, end, MOST_SNAPSHOTS, endpoint=False), "right") - 1
    image: Any = None
    for axes, layer in zip(grid, layers, strict=True):
        load_ET = over_time["load"][:, over_time.of_layer(layer)].T
        image = axes.imshow(
            load_ET[:, column_T], aspect="auto", cmap=theme.ramp, vmin=0, vmax=HIGHEST_LOAD, interpolation="nearest",
            extent=(begin, end, len(load_ET), 0),
        )  # fmt: skip
        axes.grid(visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        step_axis(axes, label=False)
    name_axes(grid, theme, "optimizer step", "expert, in the order of uid")
    color_bar(figure, image, grid, theme, "load (uniform share is 1)", extend="max")
    return figure


def load_by_class(scene: Scene, theme: Theme) -> Figure:
    """What experts read: how much more of each class of tokens than their layer does."""
    if scene.performance is None or not scene.performance.classes:
        raise NothingToDraw("what experts read is not in a run's records; give a text (--text) to read it on its model")
    found = scene.performance
    layers, note = some_layers(sorted({row.layer for row in found.rows}))
    notes = [f"{found.tokens:,} scored tokens", note]
    most = max(sum(row.layer == layer for row in found.rows) for layer in layers)
    if most > MOST_ROWS:
        notes.append(f"the {MOST_ROWS} experts of a layer with most tokens")
    size = 3.0 if most <= 16 else min(5.0, 0.13 * min(most, MOST_ROWS) + 1.0)
    figure, grid = panels(scene, theme, layers, "What experts read, by class of token", notes, size=size)
    image: Any = None
    read_C = np.flatnonzero(sum(found.classes[layer].sum(0) for layer in layers))
    for axes, layer in zip(grid, layers, strict=True):
        mine = [row for row in found.rows if row.layer == layer]
        counts_EC = found.classes[layer][:, read_C]
        base_C = counts_EC.sum(0) / max(counts_EC.sum(), 1)
        kept = sorted(sorted(range(len(mine)), key=lambda e: -mine[e].tokens)[:MOST_ROWS])
        share_EC = counts_EC[kept] / np.maximum(counts_EC[kept].sum(1, keepdims=True), 1)
        # Half a token keeps the logarithm of a class never read finite, and says little where little was read.
        prior_EC = 0.5 / (counts_EC[kept].sum(1, keepdims=True) + 1)
        lift_EC = np.log2((share_EC + prior_EC) / (base_C + prior_EC))
        lift_EC[:, base_C == 0] = np.nan
        image = axes.imshow(lift_EC, aspect="auto", cmap=theme.around, vmin=-3, vmax=3, interpolation="nearest")
        axes.grid(visible=False)
        every = max(1, math.ceil(len(kept) / 20))
        axes.set_yticks(range(0, len(kept), every), [str(mine[e].uid) for e in kept[::every]], size=6.5)
        names = [TOKEN_CLASSES[place].replace("_", " ") for place in read_C]
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", size=6.5)
    name_axes(grid, theme, "", "expert (uid)")
    color_bar(figure, image, grid, theme, "log2 of its share over the layer's", extend="both")
    return figure


def radar(scene: Scene, theme: Theme) -> Figure:
    """The top experts, by contribution or sensitivity if measured, else load × health; a trait is a rank among all."""
    now = scene.now
    traits, worth_E, by = _traits(scene, now)
    order = np.argsort(-worth_E, kind="stable")[:RADARS]
    count = len(order)
    columns = min(3, count)
    rows = math.ceil(count / columns)
    notes = [f"by {by}", f"each trait is a rank among {len(worth_E):,} alive experts: the rim is the highest"]
    figure = new_figure(theme, max(6.4, 3.3 * columns), 3.7 * rows + 1.0, f"The top {count} experts", scene, notes)
    angles = np.linspace(0, 2 * np.pi, len(traits), endpoint=False)
    ranks = {name: percentile(values) for name, values in traits.items()}
    for place, one in enumerate(order.tolist()):
        axes: Any = figure.add_subplot(rows, columns, place + 1, projection="polar")
        axes.set_facecolor(theme.paper)
        color = theme.layers[place % len(theme.layers)]
        values = [ranks[name][one] for name in traits]
        axes.fill(angles, values, color=color, alpha=0.25)
        axes.plot([*angles, angles[0]], [*values, values[0]], color=color, linewidth=1.6)
        axes.set_ylim(0, 1)
        axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
        axes.set_xticks(angles, list(traits), size=7.5, color=theme.ink)
        axes.tick_params(pad=3)
        axes.grid(color=theme.grid, linewidth=0.7)
        axes.spines["polar"].set_color(theme.grid)
        title = f"layer {now.layer_E[one]}, expert {now.uid_E[one]}"
        axes.set_title(title, color=theme.ink, size=9.5, weight="bold", pad=14)
    return figure


def _traits(scene: Scene, now: Snapshotted) -> tuple[dict[str, Array], Array, str]:
    """What a radar shows of all alive, what they are ordered by, and its name."""
    load_TE = scene.tracks["load"][:, now.place_E]
    seen_E = np.maximum(np.isfinite(load_TE).sum(0), 1)
    mean_E = np.nansum(load_TE, axis=0) / seen_E
    spread_E = np.sqrt(np.nansum((load_TE - mean_E) ** 2, axis=0) / seen_E)
    traits = {
        "load": now["load"],
        "weight": now["router_weight"],
        "steady": -spread_E / np.maximum(mean_E, 1e-9),
        "age": now["age"],
    }
    if "interference" in now.columns:
        traits["calm"] = -now["interference"]
    if "divergence" in now.columns:
        traits["improving"] = -now["divergence"]
    rows: dict[tuple[int, int], ExpertRow] = {}
    if scene.performance is not None:
        rows = {(row.layer, row.uid): row for row in scene.performance.rows}
    mine = [rows.get((int(layer), int(uid))) for layer, uid in zip(now.layer_E, now.uid_E, strict=True)]
    if not rows or any(row is None for row in mine):
        return traits, now["load"] * health(now), "load × health"
    known = [row for row in mine if row is not None]
    measured = all(row.contribution is not None for row in known)
    name = "contribution" if measured else "sensitivity"
    traits[name] = np.array([row.worth for row in known])
    traits["specialised"] = np.array([row.specialisation for row in known])
    return traits, traits[name], "contribution to the loss" if measured else "how strongly the loss depends on them"


def percentile(values_E: Array) -> Array:
    """Share of the others that are below, ties halved: 0 for the lowest, 1 for the highest; 0.5 for one alone."""
    ordered = np.sort(values_E)
    below = np.searchsorted(ordered, values_E, side="left") + np.searchsorted(ordered, values_E, side="right") - 1
    return below / 2 / max(1, len(values_E) - 1) if len(values_E) > 1 else np.full(1, 0.5)


def key_drift(scene: Scene, theme: Theme) -> Figure:
    """The paths of keys: faint where they began, a dot where they are."""
    over_time = scene.tracks
    names = [name for name in _KEYS if over_time.has(name)]
    if not names:
        raise NothingToDraw("the snapshots hold no keys")
    if len(over_time.steps_T) < 2:
        raise NothingToDraw("one snapshot is no path; keys drift over several")
    layers, note = some_layers(over_time.layers)
    turns = min(len(over_time.steps_T), MOST_TURNS)
    sampled = "" if turns == over_time.of else f"{turns} of {over_time.of} snapshots, evenly spread"
    notes = [f"PCA of keys on {len(names)} random directions, per layer", sampled, note]
    figure, grid = panels(scene, theme, layers, "How keys drift", notes)
    # A path needs no more points than can be seen.
    seen_T = spread_over(range(len(over_time.steps_T)), MOST_TURNS)
    steps_T = over_time.steps_T[seen_T]
    wanted = []
    still = True
    for axes, layer in zip(grid, layers, strict=True):
        place_E = over_time.of_layer(layer)
        keys_TED = np.stack([over_time[name][seen_T][:, place_E] for name in names], axis=2).astype(np.float64)
        known_TE = np.asarray(np.isfinite(keys_TED).all(2))
        flat_TE2, factor = magnified(keys_TED @ principal_axes(keys_TED[known_TE]))
        if factor > 1:
            axes.set_title(f"{axes.get_title(loc='left')}, paths ×{factor}", loc="left", color=theme.ink, size=9.5)
        moved = []
        segments, ages = [], []
        for expert in range(len(place_E)):
            here = np.flatnonzero(known_TE[:, expert])
            if not len(here):
                continue
            path = flat_TE2[here, expert]
            segments += [path[i : i + 2] for i in range(len(path) - 1)]
            ages += [steps_T[here[i + 1]] for i in range(len(path) - 1)]
            alive = here[-1] == len(steps_T) - 1
            distance = float(np.linalg.norm(keys_TED[here[-1], expert] - keys_TED[here[0], expert]))
            moved.append((distance, expert, alive, path[-1]))
        rgba = np.tile(to_rgba(theme.middle), (len(segments), 1))
        share = (np.array(ages) - steps_T[0]) / max(1, steps_T[-1] - steps_T[0]) if ages else np.empty(0)
        if len(segments):
            rgba[:, 3] = 0.15 + 0.75 * share
            axes.add_collection(LineCollection(segments, colors=rgba, linewidths=1.1, rasterized=len(segments) > 5000))
        for alive, mark, color in ((True, "o", theme.high), (False, "x", theme.muted)):
            ends = np.array([end for _, _, living, end in moved if living == alive])
            if len(ends):
                size = 6 if len(moved) > 40 else 14
                axes.scatter(ends[:, 0], ends[:, 1], s=size, marker=mark, c=color, linewidths=0.8, zorder=3)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.margins(0.12)
        axes.autoscale_view()
        moved.sort(key=lambda one: (-one[0], one[1]))
        still = still and (not moved or moved[0][0] == 0)
        wanted += [
            (axes, *end, 2.0, str(int(over_time.uid_E[place_E[expert]])))
            for distance, expert, _, end in moved[:6]
            if distance > 0
        ]
    if still:
        grid[0].text(0.02, 0.02, "no key has moved", transform=grid[0].transAxes, color=theme.muted, size=8)
    label_points(figure, theme, wanted)
    return figure


def magnified(path_TE2: Array) -> tuple[Array, int]:
    """Paths drawn larger around their own starts, where they are too short to be seen, and by which factor.

    The factor, one of 1, 2, 5, 10, ..., 100, brings the median path to at most a twelfth of the picture.
    """
    known_TE = np.isfinite(path_TE2).all(2)
    with_path_E = known_TE.sum(0) > 1
    if not with_path_E.any():
        return path_TE2, 1
    first_E = known_TE.argmax(0)
    start_E2 = path_TE2[first_E, np.arange(path_TE2.shape[1])]
    away_TE2 = path_TE2 - start_E2
    reach_E = np.nanmax(np.linalg.norm(away_TE2[:, with_path_E], axis=2), axis=0)
    extent = float(np.max(np.nanmax(path_TE2, axis=(0, 1)) - np.nanmin(path_TE2, axis=(0, 1))))
    usual = float(np.median(reach_E[reach_E > 0])) if (reach_E > 0).any() else math.inf
    factor = max((one for one in (1, 2, 5, 10, 20, 50, 100) if one * usual <= extent / 12), default=1)
    return start_E2 + factor * away_TE2, factor


def phase_diagram(scene: Scene, theme: Theme) -> Figure:
    """The population's way through the plane of uneven load and interference, and where its experts are now."""
    path = [
        (entry["lived"], entry["routing"]["gini"], entry["signals"]["interference"], str(entry["signals"].get("phase")))
        for entry in scene.run.log
        if "interference" in entry.get("signals", {}) and "gini" in entry.get("routing", {})
    ]
    if not path:
        raise NothingToDraw(
            "the log has no interference (vitals.signals_every) beside the Gini coefficient of the load"
        )
    kept = [path[place] for place in spread_over(range(len(path)), MOST_POINTS)]
    note = "" if len(kept) == len(path) else f"{len(kept):,} of {len(path):,} measurements, evenly spread"
    colors = dict(zip(PHASES, theme.layers, strict=False))
    figure = new_figure(theme, 11, 5.4, "Phases of the population", scene, [note])
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    dress(left, theme, "over time, by phase")
    dress(right, theme, "experts at the last snapshot")
    points = np.array([(gini, interference) for _, gini, interference, _ in kept])
    phases = [phase for *_, phase in kept]
    segments = np.stack([points[:-1], points[1:]], axis=1) if len(points) > 1 else np.empty((0, 2, 2))
    left.add_collection(
        LineCollection(segments, colors=[colors.get(p, theme.muted) for p in phases[1:]], linewidths=0.9, alpha=0.55)  # type: ignore[arg-type]
    )
    for phase in dict.fromkeys(phases):
        mine = points[[p == phase for p in phases]]
        name = phase.replace("_", " ")
        left.scatter(*mine.T, s=9, color=colors.get(phase, theme.muted), label=name, linewidths=0)
    ends = ((points[0], kept[0][0], "s", -12), (points[-1], kept[-1][0], "o", 10))
    for (x, y), step, mark, shift in ends if len(points) > 1 else ends[1:]:
        left.scatter(
            [x], [y], s=60, marker=mark, facecolors=theme.paper, edgecolors=theme.ink, linewidths=1.4, zorder=5
        )
        left.annotate(
            f"step {step:,}", (x, y), xytext=(0, shift), textcoords="offset points", size=8, color=theme.ink,
            ha="center", va="center", zorder=6,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.75, "pad": 1.0},
        )  # fmt: skip
    left.margins(0.12)
    left.set_xlabel("unevenness of load (Gini coefficient, mean over layers)")
    left.set_ylabel("interference (mean over experts)")
    legend(left, theme, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, markerscale=2)
    right.set_xlabel("load (uniform share is 1)")
    right.set_ylabel("interference")
    try:
        now = scene.now
    except NothingToDraw as missing:
        right.text(0.5, 0.5, str(missing), transform=right.transAxes, ha="center", color=theme.muted, size=8, wrap=True)
        right.set_xticks([])
        right.set_yticks([])
        return figure
    layers = [int(layer) for layer in np.unique(now.layer_E)]
    by_layer = layer_colors(theme, layers)
    color = [by_layer[int(layer)] for layer in now.layer_E]
    small = 14 if len(color) <= 300 else 5
    right.scatter(now["load"], now["interference"], s=small, c=color, alpha=0.8, linewidths=0)
    # One expert with very much load must not push all others into a corner.
    end = 1.15 * max(2.0, float(np.quantile(now["load"], 0.99)))
    if beyond := int((now["load"] > end).sum()):
        right.set_xlim(-0.02 * end, end)
        right.text(
            0.99, 0.98, f"{beyond} beyond", transform=right.transAxes, ha="right", va="top", color=theme.muted, size=8
        )
    right.axvline(1.0, color=theme.muted, linewidth=0.8, linestyle="dotted")
    if len(layers) <= MOST_LINES:
        for layer in layers:
            right.scatter([], [], s=14, color=by_layer[layer], label=f"layer {layer}")
        legend(right, theme, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
    return figure


def forgetting(scene: Scene, theme: Theme) -> Figure:
    """What was known and is lost again: held-out texts, and the credited loss of experts."""
    curves = [curve for curve in forgetting_curves(scene.run) if len(curve.steps) > 1]
    over_time = scene.tracks
    credited = over_time.has("loss_slow") and bool((np.nan_to_num(over_time["loss_slow"]) > 0).any())
    if not curves and not (credited and len(over_time.steps_T) > 1):
        raise NothingToDraw("the records hold neither evaluations (--eval-steps) nor credited losses over time")
    figure = new_figure(theme, 11, 4.8, "Forgetting", scene, [over_time.sampled])
    left, right = figure.subplots(1, 2)
    dress(left, theme, "held-out texts: loss above the best so far")
    dress(right, theme, "experts: credited loss above its lowest so far")
    for axes in (left, right):
        step_axis(axes)
    left.set_ylabel("nats per token")
    for curve, color in zip(curves, theme.layers * (1 + len(curves) // len(theme.layers)), strict=False):
        kept = spread_over(range(len(curve.steps)), MOST_POINTS)
        steps, lost = np.array(curve.steps)[kept], np.array(curve.forgotten)[kept]
        left.plot(steps, lost, color=color, linewidth=1.6, marker="o", markersize=3, label=Path(curve.text).name)
    if curves:
        legend(left, theme, loc="upper left")
    else:
        left.text(0.5, 0.5, "no evaluations while training", transform=left.transAxes, ha="center", color=theme.muted)
    if credited:
        lost_TE = forgotten_by_expert(over_time)
        known_T = np.isfinite(lost_TE).any(1)
        steps_T, lost_TE = over_time.steps_T[known_T], lost_TE[known_T]
        quarters = np.nanquantile(lost_TE, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
        right.fill_between(
            steps_T, quarters[0], quarters[4], color=theme.middle, alpha=0.18, linewidth=0, label="5 to 95 %"
        )
        right.fill_between(
            steps_T, quarters[1], quarters[3], color=theme.middle, alpha=0.35, linewidth=0, label="25 to 75 %"
        )
        right.plot(steps_T, quarters[2], color=theme.ink, linewidth=1.4, label="median expert")
        final_E = np.where(np.isfinite(lost_TE[-1]), lost_TE[-1], -np.inf)
        for rank, (one, color) in enumerate(
            zip(np.argsort(-final_E, kind="stable")[:3], theme.layers[1:], strict=False)
        ):
            if final_E[one] > 0:
                name = (
                    f"{'most' if not rank else 'next'}: layer {over_time.layer_E[one]}, expert {over_time.uid_E[one]}"
                )
                right.plot(steps_T, lost_TE[:, one], color=color, linewidth=1.0, label=name)
        legend(right, theme, loc="upper left")
    else:
        right.text(0.5, 0.5, "no credited losses", transform=right.transAxes, ha="center", color=theme.muted)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    return figure


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


__all__ = ["DARK", "LIGHT", "PICTURES", "THEMES", "NothingToDraw", "Scene", "Theme", "draw_pictures", "health"]
