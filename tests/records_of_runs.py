"""A made-up run's records, of any size, in which it is known what happened to whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from living_moe.modeling_living_moe.drift import PHASES
from living_moe.training.observatory.vitals_log import Snapshot, VitalsWriter


def write_run(
    directory: Path, *, layers: int, experts: int, snapshots: int, every: int = 10, keys: bool = True, seed: int = 0
) -> None:
    """In every layer expert 0 is steady, 1 starves in the second half, 2 forgets a nat, 3 dies in the last quarter, and
    0 has a newborn after a quarter; all others wander.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    last = (snapshots - 1) * every
    born, died = last // 4 // every * every, 3 * last // 4 // every * every
    split = {"kind": "split", "step": born, "parents": [0], "children": [experts]}
    death = {"kind": "death", "step": died, "parents": [3], "children": []}
    events = [{**event, "layer": layer} for event in (split, death) for layer in range(layers) if snapshots > 1]
    home = rng.normal(size=(layers, experts + 1, 8))
    writer = VitalsWriter(directory / "vitals.jsonl")
    log: list[dict[str, Any]] = []
    for number in range(snapshots):
        step = number * every
        alive = [
            uid
            for uid in range(experts + 1)
            if not (snapshots > 1 and uid == 3 and step >= died) and (uid < experts or (snapshots > 1 and step >= born))
        ]
        uid_E, layer_E = np.tile(alive, layers), np.repeat(np.arange(layers, dtype=np.int32), len(alive))
        size = len(uid_E)
        load_E = np.where(uid_E == 0, 1.0, rng.gamma(4.0, 0.25, size))
        load_E[(uid_E == 1) & (2 * step > last)] = 0.001
        loss_E = np.where((uid_E == 2) & (2 * step > last), 4.0, 3.0)
        columns: dict[str, Any] = {name: np.zeros(size, np.int64) for name in ("clade", "field", "tier")}
        columns |= {"uid": uid_E, "frozen": (uid_E % 5 == 2).astype(np.int64)}
        columns |= {"parent": np.where(uid_E == experts, 0, -1), "born": np.where(uid_E == experts, born, 0)}
        columns |= {"load": load_E, "loss_slow": loss_E, "loss_fast": loss_E, "age": step - columns["born"]}
        columns |= {"router_weight": rng.random(size), "interference": rng.random(size)}
        columns |= {"divergence": 0.1 * rng.normal(size=size), "conflict_cos": 0.2 * rng.normal(size=size)}
        if keys:
            home += 0.02 * rng.normal(size=home.shape)
            columns |= {f"key_{place}": home[layer_E, uid_E, place] for place in range(8)}
        exact = {name: column for name, column in columns.items() if np.asarray(column).dtype == np.int64}
        columns = {name: np.asarray(column, np.float32) for name, column in columns.items()} | exact
        columns["age"] = columns["age"].astype(np.float32)
        writer.write(Snapshot(step, layer_E, columns))
        happened = [event for event in events if event["step"] == step]
        entry = {"step": max(1, step), "loss": 4.0 - number / snapshots, "experts": [len(alive)] * layers}
        signals = {"interference": 0.5 + 0.1 * rng.normal(), "phase": PHASES[6 * number // snapshots]}
        log.append({**entry, "events": happened, "routing": {"gini": rng.random()}, "signals": signals})
        log += [{"step": max(1, step), "evaluated": f"{name}.txt", "eval_loss": 3.0 + rng.random()} for name in "ab"]
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (directory / "lineage.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (directory / "run.json").write_text(json.dumps({"founders": [list(range(experts))] * layers}))
