"""How experts are doing, in the policy's own terms: its scores, and the five states that pages colour them by.

No threshold is of this module: `lifecycle.split_load`, `adapt_load`, `death_load`, `min_age_steps` and, for the policy
`self_preservation`, `split_divergence` and `merge_load` are the run's.

Reads snapshots. E experts of a snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from living_moe.configuration.sections import LifecycleConfig
from living_moe.training.observatory.vitals_log import Array, Snapshot, identity

#: Where several are true of an expert, the last of them is shown:
#: healthy      the policy has no reason to touch it;
#: overloaded   it is above the threshold of a split: its load (of a clade's uniform share) above `split_load` or,
#:              under `self_preservation`, the loss of its tokens rising by more than `split_divergence`;
#: starved      its load, once there is one, is below `death_load`;
#: newborn      born of a split fewer than `min_age_steps` steps ago, when the policy does not judge it yet (wider
#:              experts stay immune for longer; here all are newborn for as long as those of the first tier);
#: frozen       it does not learn.
STATES = ("healthy", "overloaded", "starved", "newborn", "frozen")
HEALTHY, OVERLOADED, STARVED, NEWBORN, FROZEN = range(len(STATES))
#: Columns of a snapshot that `states_of` reads.
STATE_COLUMNS = ("clade", "frozen", "parent", "born", "load", "foreign_load", "divergence", "age")


def lifecycle_of(header: Mapping[str, Any]) -> LifecycleConfig:
    """The policy's thresholds as a run's header gives them; the defaults where it gives none.

    Fields that this version does not know are passed over.
    """
    given = header.get("lifecycle") or {}
    return LifecycleConfig(**{name: value for name, value in given.items() if name in LifecycleConfig.field_names()})


def states_of(snapshot: Snapshot, lifecycle: LifecycleConfig) -> Array:
    """The state of each expert, an index of `STATES`, int8 (E,). Columns that were not written count as 0."""
    scores = scores_of(snapshot, lifecycle)
    age_E = ages_of(snapshot)
    parent_E = snapshot["parent"] if "parent" in snapshot.columns else np.full(len(snapshot), -1)
    state_E = np.full(len(snapshot), HEALTHY, np.int8)
    state_E[scores["split"] > 0.5] = OVERLOADED
    state_E[(scores["death"] > 0.5) & (age_E > 0)] = STARVED
    state_E[(parent_E >= 0) & (age_E < lifecycle.min_age_steps)] = NEWBORN
    state_E[_column(snapshot, "frozen") > 0] = FROZEN
    return state_E


def ages_of(snapshot: Snapshot) -> Array:
    """Optimizer steps that experts have lived, (E,); at 0 nothing has been measured of them yet."""
    return _column(snapshot, "age") if "age" in snapshot.columns else snapshot.step - _column(snapshot, "born")


def scores_of(snapshot: Snapshot, lifecycle: LifecycleConfig) -> dict[str, Array]:
    """How much the policy's measures ask for a split, merge or death of each expert, 0 to 1; 0.5 at its threshold."""
    frozen_E, load_E = _column(snapshot, "frozen") > 0, _column(snapshot, "load")
    # Overload is measured against a clade's uniform share.
    clades = np.unique(identity(snapshot.layer_E, _column(snapshot, "clade"))) >> 44
    experts_L = np.bincount(snapshot.layer_E)
    share_E = (np.bincount(clades, minlength=len(experts_L)) / np.maximum(experts_L, 1))[snapshot.layer_E]
    over_E = np.where(frozen_E, 0.0, _beyond(load_E * share_E, lifecycle.split_load))
    adapts_E = np.where(frozen_E, _beyond(_column(snapshot, "foreign_load"), lifecycle.adapt_load), 0.0)
    split_E = np.maximum(over_E, adapts_E)
    if lifecycle.policy == "self_preservation":
        rises_E = _beyond(_column(snapshot, "divergence"), lifecycle.split_divergence)
        split_E = np.maximum(split_E, np.where(frozen_E, 0.0, rises_E))
    return {
        "split": split_E,
        "merge": np.where(frozen_E, 0.0, 1.0 - _beyond(load_E, lifecycle.merge_load)),
        "death": np.where(frozen_E, 0.0, 1.0 - _beyond(load_E, lifecycle.death_load)),
    }


def _column(snapshot: Snapshot, name: str) -> Array:
    if name not in snapshot.columns:
        return np.zeros(len(snapshot))
    return snapshot[name].astype(float)


def _beyond(value: Array, threshold: float) -> Array:
    """0 at 0, 0.5 at the threshold, towards 1 above."""
    value = np.maximum(np.asarray(value, float), 0.0)
    return value / (value + max(threshold, 1e-9))


__all__ = ["STATES", "STATE_COLUMNS", "ages_of", "lifecycle_of", "scores_of", "states_of"]
