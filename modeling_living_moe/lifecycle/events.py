"""The record of one change to a population."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from living_moe.configuration.errors import CheckpointError

LifecycleKind = Literal[
    "split", "merge", "death", "freeze", "thaw", "part", "grow", "shrink", "field", "escape", "return"
]
#: Layer of events that concern the whole model.
EVERY_LAYER = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class LifecycleEvent:
    """One change to a layer's experts, as written to lineage.jsonl.

    A split's parent lives on; its only child is the newborn. A merge's child is the surviving parent. `part` ends a
    clade: its members become clades of their own. `grow` and `shrink` change a slab's capacity and touch no expert.
    `field` is the birth of a receptive field, of all layers (`EVERY_LAYER`); its number is the only child. With
    `escape` a block begins to work in another space, with `return` it begins to leave it; they touch no expert.
    """

    kind: LifecycleKind
    step: int  # optimizer steps, never wall time
    layer: int  # EVERY_LAYER where the whole model is concerned
    parents: tuple[int, ...]  # uids, never slots
    children: tuple[int, ...]
    metric: str = "request"  # what fired it, e.g. "load"; "request" is a direct call
    value: float = 0.0
    threshold: float = 0.0
    held: int = 0  # optimizer steps for which the value was beyond the threshold; 0 where none are counted
    seed: int = 0  # of mutation noise and facet, so that the event can be repeated
    noise_std: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> LifecycleEvent:
        """The event a lineage line describes.

        Raises:
            CheckpointError: A field is missing, unknown, or of an unknown kind.
        """
        if not isinstance(record, dict) or not _FIELDS >= record.keys() or record.get("kind") not in _KINDS:
            raise CheckpointError(f"not a lineage record: {record!r}; its fields must be among {sorted(_FIELDS)}.")
        try:
            lists = {name: tuple(int(uid) for uid in record[name]) for name in ("parents", "children")}
            return cls(**{**record, **lists})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"broken lineage record {record!r}: {error}") from error


_FIELDS = frozenset(field.name for field in dataclasses.fields(LifecycleEvent))
_KINDS = frozenset(get_args(LifecycleKind))
