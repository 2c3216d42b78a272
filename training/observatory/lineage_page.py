"""The interactive lineage: every expert's life as a bar, in one HTML file that opens without a network.

Plotly draws, with WebGL, in a dozen traces however many experts there are; its script is inlined from the Python
package. What the page does itself (`lineage_page.js`): a veil over the future moves as the run is played, so a frame
draws nothing anew; clicks and searches redraw one trace.
"""

from __future__ import annotations

import base64
import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from living_moe.configuration.errors import RecordsError
from living_moe.modeling_living_moe.lifecycle.events import EVERY_LAYER
from living_moe.training.observatory.lives import Life
from living_moe.training.observatory.records import Run
from living_moe.training.observatory.vitals_log import Array, identity
from living_moe.training.reporting import event_line

PAGE_NAME = "lineage.html"
#: Moments at which the page knows every expert's load.
MOMENTS = 24
_FATES = {"alive": 0, "death": 1, "merge": 2}


def write_lineage_page(run: Run, path: str | Path) -> Path:
    """Write the interactive lineage of a run; returns its path.

    Raises:
        RecordsError: The run has no expert yet.
    """
    path = Path(path)
    page = lineage_page(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def lineage_page(run: Run) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    room = files(__package__)
    # A "</" inside a script would end it.
    records = json.dumps(lineage_records(run), separators=(",", ":")).replace("</", "<\\/")
    template = Template(room.joinpath("lineage_page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(f"Lineage of {run.name}"),
        heading=html.escape(run.name),
        plotly=get_plotlyjs(),
        records=records,
        script=room.joinpath("lineage_page.js").read_text(encoding="utf-8"),
    )


def lineage_records(run: Run) -> dict[str, Any]:
    """What the page is made of: experts, events in words, loads at a few moments.

    Raises:
        RecordsError: The run has no expert yet.
    """
    lives = run.lives()
    if not lives:
        raise RecordsError(f"{run.path} has no expert yet: no event, and no line in its log. Try again when it trains.")
    keys = list(lives)
    place = {key: number for number, key in enumerate(keys)}
    rows = rows_of(lives)
    experts: dict[str, list[int]] = {
        "layer": [life.layer for life in lives.values()],
        "uid": [life.uid for life in lives.values()],
        "parent": [-1 if life.parent is None else place.get((life.layer, life.parent), -1) for life in lives.values()],
        "born": [life.born for life in lives.values()],
        "died": [life.died for life in lives.values()],
        "fate": [_FATES[life.fate] for life in lives.values()],
        "heir": [-1 if life.heir is None else place.get((life.layer, life.heir), -1) for life in lives.values()],
        "row": [rows[key] for key in keys],
    }
    events = sorted((event for event in run.events if event.kind not in ("grow", "shrink")), key=lambda e: e.step)
    told = {
        "step": [event.step for event in events],
        "kind": [event.kind for event in events],
        "who": [
            []
            if event.layer == EVERY_LAYER
            else [place[event.layer, uid] for uid in dict.fromkeys((*event.parents, *event.children))]
            for event in events
        ],
        "line": [event_line(event) for event in events],
    }
    return {
        "state": run.state,
        "last": run.last_step,
        "experts": experts,
        "events": told,
        "loads": _loads(run, keys),
        # Last: reading snapshots may have added some.
        "notes": list(run.notes),
    }


def rows_of(lives: dict[tuple[int, int], Life]) -> dict[tuple[int, int], int]:
    """A row per expert: layers one below the other, in each the children right below their parents."""
    children: dict[tuple[int, int], list[tuple[int, int]]] = {}
    roots = []
    for key, life in lives.items():
        above = None if life.parent is None else (life.layer, life.parent)
        if above in lives:
            children.setdefault(above, []).append(key)
        else:
            roots.append(key)
    rows: dict[tuple[int, int], int] = {}
    # Last in, first out: the first root on top, the oldest child below its parent.
    waiting = sorted(roots, reverse=True)
    while waiting:
        key = waiting.pop()
        rows[key] = len(rows)
        waiting += reversed(children.get(key, []))
    return rows


def _loads(run: Run, keys: list[tuple[int, int]]) -> dict[str, Any] | None:
    """Loads at a few moments, a byte each, expert by expert: 0 not alive, 1 nothing, else 24 steps an octave."""
    steps = run.vitals_steps
    if not steps:
        return None
    chosen = {steps[round(n)] for n in np.linspace(0, len(steps) - 1, min(MOMENTS, len(steps)))}
    layer, uid = np.array(keys, np.int64).T
    asked = identity(layer, uid)
    order = np.argsort(asked)
    moments: list[int] = []
    codes: list[Array] = []
    for snapshot in run.snapshots(["load"]):
        if snapshot.step not in chosen or (moments and snapshot.step == moments[-1]):
            continue
        load_E = np.maximum(snapshot["load"].astype(float), 0.0)
        code_E = (
            np.where(load_E > 0, 2 + 24 * (np.log2(np.maximum(load_E, 2.0**-7)) + 7), 1).clip(1, 255).astype(np.uint8)
        )
        code = np.zeros(len(keys), np.uint8)
        found = np.searchsorted(asked, snapshot.identity_E, sorter=order).clip(max=len(keys) - 1)
        known_E = asked[order[found]] == snapshot.identity_E
        code[order[found[known_E]]] = code_E[known_E]
        moments.append(snapshot.step)
        codes.append(code)
    if not moments:
        return None
    return {"steps": moments, "values": base64.b64encode(np.stack(codes, axis=1).tobytes()).decode("ascii")}


__all__ = ["PAGE_NAME", "lineage_page", "lineage_records", "rows_of", "write_lineage_page"]
