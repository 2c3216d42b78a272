"""The append-only record of events, and its file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from living_moe.configuration.errors import CheckpointError
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent

LINEAGE_NAME = "lineage.jsonl"


class Lineage(Sequence[LifecycleEvent]):
    """Events in the order they happened. Iterable, indexable, append-only."""

    def __init__(self, events: Iterable[LifecycleEvent] = ()):
        self._events = list(events)

    @overload
    def __getitem__(self, index: int) -> LifecycleEvent: ...
    @overload
    def __getitem__(self, index: slice) -> list[LifecycleEvent]: ...
    def __getitem__(self, index: int | slice) -> LifecycleEvent | list[LifecycleEvent]:
        return self._events[index]

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[LifecycleEvent]:
        return iter(self._events)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lineage) and self._events == other._events

    __hash__ = None  # type: ignore[assignment]

    def append(self, event: LifecycleEvent) -> None:
        self._events.append(event)

    def counts(self) -> dict[str, int]:
        """Events per kind."""
        return dict(Counter(event.kind for event in self._events))

    def save(self, path: Path) -> None:
        path.write_text("".join(json.dumps(event.to_dict()) + "\n" for event in self._events), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Lineage:
        """Read a lineage file.

        Raises:
            CheckpointError: A line is not a lineage record; the message names the line.
        """
        events = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                events.append(LifecycleEvent.from_dict(json.loads(line)))
            except ValueError as error:
                raise CheckpointError(f"{path}, line {number}: {error}") from error
        return cls(events)
