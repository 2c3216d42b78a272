"""Pictures of the population as a whole: its way through the phases, and what it forgets on it.

Draws only: the phases are those that the log names, and what was lost is what evaluations and credited losses say.

T snapshots, E experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from living_moe.modeling_living_moe.drift import PHASES
from living_moe.training.observatory.history import forgetting_curves, forgotten_by_expert
from living_moe.training.observatory.pictures.canvas import Theme, dress, layer_colors, legend, new_figure, step_axis
from living_moe.training.observatory.pictures.scene import NothingToDraw, Scene
from living_moe.training.observatory.pictures.thinning import MOST_LINES, MOST_POINTS, spread_over


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
