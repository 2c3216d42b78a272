"""Pictures of what experts are used for: their load over time, the classes of tokens they read, the top ones' traits.

Which classes of tokens go where no log records; that picture, and measured contributions, need what
`performance.measure` found. Draws only: measures nothing itself, and reads no model.

T snapshots, E experts, C classes of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from living_moe.training.collapse import TOKEN_CLASSES
from living_moe.training.observatory.history import MOST_SNAPSHOTS
from living_moe.training.observatory.performance import ExpertRow
from living_moe.training.observatory.pictures.canvas import (
    HIGHEST_LOAD,
    Theme,
    color_bar,
    name_axes,
    new_figure,
    panels,
    step_axis,
)
from living_moe.training.observatory.pictures.scene import NothingToDraw, Scene, Snapshotted, health
from living_moe.training.observatory.pictures.thinning import some_layers
from living_moe.training.observatory.vitals_log import Array

#: Experts of a layer in the heat map of classes, and experts with a radar.
MOST_ROWS, RADARS = 40, 6


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
