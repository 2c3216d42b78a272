"""What a run's records say, read once for all pictures, and `NothingToDraw`, with what they lack.

Reads only: draws nothing, measures nothing, and loads no model.

E experts, D directions that keys are noted on.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from living_moe.configuration.sections import LifecycleConfig
from living_moe.training.observatory.history import MOST_SNAPSHOTS, Tracks, tracks
from living_moe.training.observatory.lives import Life
from living_moe.training.observatory.performance import Performance
from living_moe.training.observatory.pictures.layout import flat_layout
from living_moe.training.observatory.pictures.thinning import some_layers
from living_moe.training.observatory.records import Run
from living_moe.training.observatory.vitals_log import Array

#: Numbers in a table of tracks.
MOST_CELLS = 3_000_000
#: Columns of a snapshot that together hold a key: its place along each direction it is noted on.
KEY_COLUMNS = tuple(f"key_{place}" for place in range(8))
_COLUMNS = (
    "load", "age", "router_weight", "interference", "divergence", "conflict_cos", "loss_slow", "frozen", "field",
    "energy", *KEY_COLUMNS,
)  # fmt: skip


class NothingToDraw(Exception):
    """The records lack what a picture shows; the message says what."""


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


def key_table(now: Snapshotted) -> Array:
    """Keys of the alive on the directions they were noted on, (E, D).

    Raises:
        NothingToDraw: They were not noted.
    """
    names = [name for name in KEY_COLUMNS if name in now.columns]
    if not names:
        raise NothingToDraw("the snapshots hold no keys")
    return np.stack([now[name] for name in names], axis=1)


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
