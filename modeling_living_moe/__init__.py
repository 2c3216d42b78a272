"""The modeling room: blocks, routers, experts, populations and their lifecycle."""

from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent
from living_moe.modeling_living_moe.modeling_living_moe import (
    LivingMoeForCausalLM,
    LivingMoeModel,
    LivingMoePreTrainedModel,
)

__all__ = ["LifecycleEvent", "LivingMoeForCausalLM", "LivingMoeModel", "LivingMoePreTrainedModel"]
