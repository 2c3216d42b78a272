"""Every expert's life, from birth to death, told by the record of events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent


@dataclass
class Life:
    """One expert. Steps are optimizer steps the model has lived.

    Attributes:
        parent: Uid; None for a founder.
        born: 0 for a founder.
        died: Where it ends, or the last step known of while it goes on.
        fate: "alive", "death" or "merge".
        heir: Uid of the expert it was merged into; None unless its fate is "merge".
        events: All it took part in, oldest first.
    """

    layer: int
    uid: int
    parent: int | None
    born: int
    died: int
    fate: str = "alive"
    heir: int | None = None
    events: list[LifecycleEvent] = field(default_factory=list)


def lives_of(
    events: Sequence[LifecycleEvent], founders: Sequence[Sequence[int]], last_step: int
) -> dict[tuple[int, int], Life]:
    """Lives by (layer, uid), founders first, then in the order of birth.

    An expert that an event names and whose birth is not recorded counts as a founder.

    Args:
        events: Oldest first.
        founders: Per layer the uids of the experts that were never born.
        last_step: Where lives that go on are drawn to.
    """
    born = {(event.layer, uid) for event in events if event.kind == "split" for uid in event.children}
    named = {(event.layer, uid) for event in events if event.layer >= 0 for uid in (*event.parents, *event.children)}
    first = {(layer, uid) for layer, uids in enumerate(founders) for uid in uids} | (named - born)
    lives = {key: Life(*key, parent=None, born=0, died=last_step) for key in sorted(first)}
    for event in events:
        if event.layer < 0:
            continue
        if event.kind == "split":
            for uid in event.children:
                parent = event.parents[0] if event.parents else None
                lives[event.layer, uid] = Life(event.layer, uid, parent, event.step, max(last_step, event.step))
        for uid in dict.fromkeys((*event.parents, *event.children)):
            life = lives[event.layer, uid]
            life.events.append(event)
            if uid in event.parents and (
                event.kind == "death" or (event.kind == "merge" and uid not in event.children)
            ):
                life.died, life.fate = event.step, event.kind
                life.heir = event.children[0] if event.kind == "merge" and event.children else None
    return lives


__all__ = ["Life", "lives_of"]
