"""How the training script turns a source checkpoint into a living one.

Conversion is another room, which this one must not import; the package door introduces them.
"""

from __future__ import annotations

from collections.abc import Callable

from living_moe.configuration.errors import TrainingError
from living_moe.modeling_living_moe import LivingMoeForCausalLM

#: `living_moe.convert`: (source, preset=..., **sections) -> a living model.
Grafter = Callable[..., LivingMoeForCausalLM]
_grafter: Grafter | None = None


def set_grafter(grafter: Grafter) -> None:
    """Tell the training script how to graft (this room must not import conversion)."""
    global _grafter
    _grafter = grafter


def graft(source: str, **options: object) -> LivingMoeForCausalLM:
    """A living model from a source checkpoint.

    Raises:
        TrainingError: Nobody has said how.
        ConversionError: The source cannot be grafted.
    """
    if _grafter is None:
        raise TrainingError("nothing grafts source checkpoints here; import living_moe first.")
    return _grafter(source, **options)


__all__ = ["graft", "set_grafter"]
