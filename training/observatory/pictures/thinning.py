"""How much of a large run is drawn: what is left out is left out evenly, and the picture says so.

Chooses only: draws nothing, and reads no records.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Layers drawn side by side, and points on a line.
MOST_PANELS, MOST_POINTS = 12, 2000
#: Layers that get a line of their own.
MOST_LINES = 10


def spread_over(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most).round()]


def some_layers(layers: Sequence[int], most: int = MOST_PANELS) -> tuple[list[int], str]:
    """The layers shown, and what the picture says of the others."""
    shown = spread_over(layers, most)
    return shown, "" if len(shown) == len(layers) else f"{len(shown)} of {len(layers)} layers, evenly spread"
