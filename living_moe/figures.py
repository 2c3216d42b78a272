"""Pictures of a population's life: expert counts over time and the tree of descent, as PNG and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent


@dataclass(frozen=True)
class Life:
    """One expert from birth to death, in optimizer steps. `parent` is None for a founder."""

    layer: int
    uid: int
    born: int
    died: int
    alive: bool
    parent: int | None


def lives(lineage: Sequence[LifecycleEvent], founders: Sequence[int], last_step: int) -> list[Life]:
    """Every expert's life, founders first, from the record of events.

    Args:
        lineage: Events, oldest first.
        founders: Experts per layer at the graft; their uids are 0, 1, ...
        last_step: Where lives still going on are drawn to.
    """
    born: dict[tuple[int, int], tuple[int, int | None]] = {
        (layer, uid): (0, None) for layer, count in enumerate(founders) for uid in range(count)
    }
    died: dict[tuple[int, int], int] = {}
    for event in lineage:
        if event.kind == "split":
            born[(event.layer, event.children[0])] = (event.step, event.parents[0])
        elif event.kind == "death":
            died[(event.layer, event.parents[0])] = event.step
        elif event.kind == "merge":
            for uid in event.parents:
                if uid not in event.children:
                    died[(event.layer, uid)] = event.step
    return [
        Life(layer, uid, start, died.get((layer, uid), last_step), (layer, uid) not in died, parent)
        for (layer, uid), (start, parent) in sorted(born.items())
    ]


def counts_over_time(all_lives: Sequence[Life], last_step: int) -> dict[int, tuple[list[int], list[int]]]:
    """Per layer the steps at which its expert count changes, and the counts from there on."""
    series: dict[int, tuple[list[int], list[int]]] = {}
    for layer in sorted({life.layer for life in all_lives}):
        mine = [life for life in all_lives if life.layer == layer]
        steps = sorted({0, last_step, *(life.born for life in mine), *(life.died for life in mine if not life.alive)})
        counts = [sum(life.born <= step and (life.alive or step < life.died) for life in mine) for step in steps]
        series[layer] = (steps, counts)
    return series


def draw(lineage: Sequence[LifecycleEvent], founders: Sequence[int], last_step: int, directory: Path) -> list[Path]:
    """Write `population.png` and `population.html`; returns their paths."""
    all_lives = lives(lineage, founders, last_step)
    series = counts_over_time(all_lives, last_step)
    rows = _rows(all_lives)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "population.png", directory / "population.html"]
    _draw_png(all_lives, series, rows, paths[0])
    _draw_html(all_lives, series, rows, paths[1])
    return paths


def _rows(all_lives: Sequence[Life]) -> dict[tuple[int, int], int]:
    """A row per expert: layers one below the other, children right below their parents."""
    rows: dict[tuple[int, int], int] = {}

    def visit(life: Life) -> None:
        rows[(life.layer, life.uid)] = len(rows)
        for child in all_lives:
            if child.layer == life.layer and child.parent == life.uid:
                visit(child)

    for life in all_lives:
        if life.parent is None:
            visit(life)
    return rows


def _draw_png(
    all_lives: Sequence[Life],
    series: dict[int, tuple[list[int], list[int]]],
    rows: dict[tuple[int, int], int],
    path: Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface, not pyplot: no global state, no display.
    figure = Figure(figsize=(10, 4 + 0.09 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, max(3.0, 0.09 * len(rows))], sharex=True)
    colors = [f"C{layer % 10}" for layer in range(len(series))]
    for layer, (steps, counts) in series.items():
        top.step(steps, counts, where="post", label=f"layer {layer}", color=colors[layer])
    top.set_ylabel("experts")
    top.legend(loc="upper left", fontsize="small")
    top.set_title("Experts per layer")
    for life in all_lives:
        row = rows[(life.layer, life.uid)]
        bottom.plot([life.born, life.died], [row, row], color=colors[life.layer], linewidth=1.4)
        if life.parent is not None:
            above = rows[(life.layer, life.parent)]
            bottom.plot([life.born, life.born], [above, row], color=colors[life.layer], linewidth=0.6, alpha=0.6)
        if not life.alive:
            bottom.plot([life.died], [row], marker="x", color="black", markersize=4)
    bottom.invert_yaxis()
    bottom.set_xlabel("optimizer step")
    bottom.set_yticks([])
    bottom.set_title("Lineage: a line is an expert from birth to death (x); a fork is a split")
    figure.savefig(path, dpi=120)


def _draw_html(
    all_lives: Sequence[Life],
    series: dict[int, tuple[list[int], list[int]]],
    rows: dict[tuple[int, int], int],
    path: Path,
) -> None:
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, subplot_titles=("Experts per layer", "Lineage"))
    palette = qualitative.D3
    for layer, (steps, counts) in series.items():
        line = {"shape": "hv", "color": palette[layer % len(palette)]}
        figure.add_trace(go.Scatter(x=steps, y=counts, name=f"layer {layer}", line=line), row=1, col=1)
    for layer in series:
        x: list[int | None] = []
        y: list[int | None] = []
        text: list[str | None] = []
        for life in all_lives:
            if life.layer != layer:
                continue
            row = rows[(life.layer, life.uid)]
            origin = "founder" if life.parent is None else f"newborn of {life.parent} at step {life.born}"
            fate = "alive" if life.alive else f"died at step {life.died}"
            note = f"layer {layer}, uid {life.uid}: {origin}, {fate}"
            if life.parent is not None:
                x += [life.born, life.born, None]
                y += [rows[(life.layer, life.parent)], row, None]
                text += [note, note, None]
            x += [life.born, life.died, None]
            y += [row, row, None]
            text += [note, note, None]
        line = {"color": palette[layer % len(palette)], "width": 2}
        trace = go.Scatter(x=x, y=y, text=text, hoverinfo="text", mode="lines", line=line, showlegend=False)
        figure.add_trace(trace, row=2, col=1)
    figure.update_yaxes(title_text="experts", row=1, col=1)
    figure.update_yaxes(autorange="reversed", showticklabels=False, row=2, col=1)
    figure.update_xaxes(title_text="optimizer step", row=2, col=1)
    figure.update_layout(height=max(700, 300 + 9 * len(rows)), template="plotly_white")
    # Self-contained: opens without a network.
    figure.write_html(path, include_plotlyjs=True)
