"""Names of a layer's slabs: each holds the experts of one tier (width class) that train, or those that are frozen.

Tier 0 has the backbone's own width and plain names, so that what never grows a tier never shows one.
"""

from __future__ import annotations

#: Width classes of experts a layer may have.
MOST_TIERS = 4


def slab_name(tier: int, *, frozen: bool) -> str:
    kind = "frozen" if frozen else "trainable"
    return f"{kind}_tier{tier}" if tier else kind


#: The slabs of a layer, in slot order.
SLABS = tuple(slab_name(tier, frozen=frozen) for tier in range(MOST_TIERS) for frozen in (True, False))


def is_frozen(slab: str) -> bool:
    return slab.startswith("frozen")


def tier_of(slab: str) -> int:
    return SLABS.index(slab) // 2
