"""Knowledge gravity: keys that move without gradients, towards the queries they serve and the peers they serve with."""

from living_moe.modeling_living_moe.plasticity.gravity import Evidence, LayerKeys, consolidate, reference_consolidate

__all__ = ["Evidence", "LayerKeys", "consolidate", "reference_consolidate"]
