"""Pictures of routing keys: where experts are addressed, and how that drifts.

A key is drawn by its places along the random directions it was noted on, laid out in a plane per layer; distances
between layers mean nothing. Draws only: measures nothing, and reads no model.

T snapshots, E experts, D directions that keys are noted on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, to_rgba
from matplotlib.figure import Figure

from living_moe.training.observatory.pictures.canvas import HIGHEST_LOAD, Theme, color_bar, label_points, panels
from living_moe.training.observatory.pictures.layout import principal_axes
from living_moe.training.observatory.pictures.scene import KEY_COLUMNS, NothingToDraw, Scene, health
from living_moe.training.observatory.pictures.thinning import some_layers, spread_over
from living_moe.training.observatory.vitals_log import Array

#: Points of a key's path.
MOST_TURNS = 40


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
        f"{methods} of keys on {sum(name in now.columns for name in KEY_COLUMNS)} random directions",
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


def key_drift(scene: Scene, theme: Theme) -> Figure:
    """The paths of keys: faint where they began, a dot where they are."""
    over_time = scene.tracks
    names = [name for name in KEY_COLUMNS if over_time.has(name)]
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
