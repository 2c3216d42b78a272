"""The population's life as one interactive HTML file: expert counts over time, and the tree of descent."""

from __future__ import annotations

from pathlib import Path

from living_moe.training.observatory.pictures import counts_over_time, family_order
from living_moe.training.observatory.records import Run


def draw_html(run: Run, path: Path) -> None:
    """Write a run's expert counts and lineage as a file that opens without a network."""
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    lives = run.lives()
    order = family_order(lives)
    row = {key: place for place, key in enumerate(order)}
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, subplot_titles=("Experts per layer", "Lineage"))
    palette = qualitative.D3
    for layer in sorted({layer for layer, _ in order}):
        color = palette[layer % len(palette)]
        mine = [lives[key] for key in order if key[0] == layer]
        steps, counts = counts_over_time(mine, run.last_step)
        line = {"shape": "hv", "color": color}
        figure.add_trace(
            go.Scatter(x=steps.tolist(), y=counts.tolist(), name=f"layer {layer}", line=line), row=1, col=1
        )
        x: list[int | None] = []
        y: list[int | None] = []
        text: list[str | None] = []
        for life in mine:
            here = row[layer, life.uid]
            origin = "founder" if life.parent is None else f"newborn of {life.parent} at step {life.born}"
            fate = "alive" if life.fate == "alive" else f"{life.fate} at step {life.died}"
            note = f"layer {layer}, uid {life.uid}: {origin}, {fate}"
            if life.parent is not None:
                x += [life.born, life.born, None]
                y += [row[layer, life.parent], here, None]
                text += [note, note, None]
            x += [life.born, life.died, None]
            y += [here, here, None]
            text += [note, note, None]
        style = {"color": color, "width": 2}
        trace = go.Scatter(x=x, y=y, text=text, hoverinfo="text", mode="lines", line=style, showlegend=False)
        figure.add_trace(trace, row=2, col=1)
    figure.update_yaxes(title_text="experts", row=1, col=1)
    figure.update_yaxes(autorange="reversed", showticklabels=False, row=2, col=1)
    figure.update_xaxes(title_text="optimizer step", row=2, col=1)
    figure.update_layout(height=max(700, 300 + 9 * len(order)), template="plotly_white")
    # Self-contained: opens without a network.
    figure.write_html(path, include_plotlyjs=True)
