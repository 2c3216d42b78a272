"""Pictures of who lived: the tree of descent, and the number of the living over time.

From the lives that log and lineage tell, without snapshots. Draws only: measures nothing, and reads no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from living_moe.training.observatory.lives import Life
from living_moe.training.observatory.pictures.canvas import (
    Theme,
    color_bar,
    dress,
    layer_colors,
    legend,
    new_figure,
    step_axis,
)
from living_moe.training.observatory.pictures.scene import NothingToDraw, Scene
from living_moe.training.observatory.pictures.thinning import MOST_LINES, MOST_POINTS, spread_over
from living_moe.training.observatory.vitals_log import Array

#: Lives below each other.
MOST_LIVES = 1200
_EVENT_KINDS = ("split", "merge", "death", "freeze", "thaw", "part", "field")


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
