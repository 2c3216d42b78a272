"""Records of a run that never was, of any size, written the way a run writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from living_moe import LifecycleEvent
from living_moe.modeling_living_moe.vitals import SHOWN
from living_moe.training.observatory.recorder import VITALS_BYTES
from living_moe.training.observatory.vitals_log import Snapshot, VitalsWriter


def write_synthetic_run(
    directory: Path,
    *,
    layers: int = 4,
    founders: int = 16,
    events: int = 400,
    most: int = 64,
    steps: int = 2000,
    every: int = 50,
    max_bytes: int = VITALS_BYTES,
    seed: int = 0,
) -> None:
    """Random splits, merges, deaths, freezes and thaws; loads that wander.

    Args:
        founders: Experts of each layer at the beginning.
        events: In all, evenly spread over the run.
        most: Experts a layer may have at a time.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    alive = [dict.fromkeys(range(founders), 0) for _ in range(layers)]
    next_uid = [founders] * layers
    parents: dict[tuple[int, int], tuple[int, int]] = {}
    load = [dict.fromkeys(range(founders), 1.0) for _ in range(layers)]
    told: list[LifecycleEvent] = []
    writer = VitalsWriter(directory / "vitals.jsonl")
    due = 0
    happen = np.sort(rng.integers(1, steps, events)).tolist()
    place = 0
    with (directory / "log.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            now: list[LifecycleEvent] = []
            while place < len(happen) and happen[place] <= step:
                place += 1
                layer = int(rng.integers(layers))
                uids = list(alive[layer])
                uid = uids[int(rng.integers(len(uids)))]
                draw = rng.random()
                fields: dict[str, Any] = dict(
                    step=step, layer=layer, parents=(uid,), children=(uid,), metric="load", held=40
                )
                if draw < 0.45 and len(uids) < most:
                    child = next_uid[layer]
                    next_uid[layer] += 1
                    alive[layer][child], load[layer][child] = step, load[layer][uid] / 2
                    load[layer][uid] /= 2
                    parents[layer, child] = (uid, step)
                    event: dict[str, Any] = dict(kind="split", children=(child,), value=1.9, threshold=1.6)
                elif draw < 0.6 and len(uids) > founders // 2 + 1:
                    other = next(one for one in uids if one != uid)
                    del alive[layer][other], load[layer][other]
                    event = dict(kind="merge", parents=(uid, other), metric="fragments", value=0.9, threshold=0.5)
                elif draw < 0.85 and len(uids) > founders // 2:
                    del alive[layer][uid], load[layer][uid]
                    event = dict(kind="death", children=(), value=0.001, threshold=0.02)
                else:
                    event = dict(kind="freeze" if draw < 0.93 else "thaw", metric="divergence", value=0.12)
                now.append(LifecycleEvent(**{**fields, **event}))
            told += now
            entry = {
                "step": step, "lived": step, "loss": 3 + 6 * math.exp(-step / steps), "grad_norm": 0.51234567,
                "learning_rate": 3.0012345e-4, "experts": [len(uids) for uids in alive],
                "events": [event.to_dict() for event in now],
            }  # fmt: skip
            if step % 10 == 0:
                numbers = dict(zip(("a", "b", "c", "d"), rng.random(4).tolist(), strict=True))
                entry |= {"routing": numbers, "signals": {**numbers, "phase": "stability", "phase_since": 0.0}}
            log.write(json.dumps(entry) + "\n")
            if step >= due:
                size = writer.write(snapshot_at(step, alive, load, parents, rng))
                left = max_bytes - writer.bytes
                due = step + max(every, math.ceil((steps - step) / max(left / (1.33 * size), 1.0)))
    (directory / "lineage.jsonl").write_text("".join(json.dumps(event.to_dict()) + "\n" for event in told))
    header = {"founders": [list(range(founders))] * layers, "layers": layers, "max_steps": steps, "finished": True}
    (directory / "run.json").write_text(json.dumps(header))


def snapshot_at(
    step: int,
    alive: list[dict[int, int]],
    load: list[dict[int, float]],
    parents: dict[tuple[int, int], tuple[int, int]],
    rng: np.random.Generator,
) -> Snapshot:
    """All columns a run writes, as noisy as a run's."""
    keys = [(layer, uid) for layer, uids in enumerate(alive) for uid in sorted(uids)]
    layer_E, uid_E = np.array(keys, np.int64).T
    wander_E = rng.lognormal(0.0, 0.2, len(keys))
    load_E = np.array([load[layer][uid] for layer, uid in keys]) * wander_E
    for (layer, uid), value in zip(keys, load_E, strict=True):
        load[layer][uid] = float(0.9 * value + 0.1)
    born_E = np.array([parents.get(key, (-1, 0)) for key in keys], np.int64)
    noise = {name: (np.abs(np.sin(uid_E + len(name))) * rng.lognormal(0, 0.2, len(keys))) for name in SHOWN}
    direction = {f"key_{n}": np.sin(uid_E * (n + 1.0)) + 0.01 * rng.standard_normal(len(keys)) for n in range(8)}
    measured = {**noise, "load": load_E, "age": step - born_E[:, 1], "tokens": step * load_E * 64, **direction}
    exact = {
        "uid": uid_E, "clade": uid_E % 16, "field": 0 * uid_E, "tier": 0 * uid_E, "frozen": uid_E % 2,
        "parent": born_E[:, 0], "born": born_E[:, 1],
    }  # fmt: skip
    columns = exact | {name: column.astype(np.float32) for name, column in measured.items()}
    return Snapshot(step, layer_E.astype(np.int32), columns)
