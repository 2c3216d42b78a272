"""Knowledge gravity: keys that move without gradients, towards the queries they serve and the peers they serve with."""

from living_moe.modeling_living_moe.plasticity.gravity import Evidence, consolidate, reference_consolidate

__all__ = ["Evidence", "consolidate", "reference_consolidate"]
