"""Models whose synapses are at work, in routers, in attention, or in both; and a text read in pieces."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from factories import living_model, logits
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.synapse.attention import attention_layers

#: How near a pass through a cache comes to one without.
CACHED = 1e-5


def excite_routers(model: LivingMoeForCausalLM, strength: float, seed: int = 0) -> None:
    """Expression of all kinds, so that no edge is like another."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.living_blocks:
        synapse = block.router.synapse
        synapse.strength.data.fill_(strength)
        for vectors in synapse.expression.values():
            vectors.data.normal_(generator=generator)


def excite_attention(model: nn.Module, strength: float, seed: int = 0) -> None:
    """Expression of all kinds, so that no head is like another."""
    generator = torch.Generator().manual_seed(seed)
    for layer in attention_layers(model):
        layer.synapse.strength.data.fill_(strength)
        layer.synapse.expression.data.normal_(generator=generator)


def router_model(
    family: str = "mixtral", strength: float = 1.5, *, seed: int = 0, **options: Any
) -> LivingMoeForCausalLM:
    overrides = options.pop("overrides", {})
    model = living_model(family, "synaptic-router", sections={"synapse": {"chunk": 4, **options}}, **overrides)
    excite_routers(model, strength, seed)
    return model


def attention_model(family: str = "mixtral", strength: float = 1.5, **options: Any) -> LivingMoeForCausalLM:
    overrides, preset = options.pop("overrides", {}), options.pop("preset", "grow")
    section = {"attention": True, "attention_chunk": 4, "attention_top_k": 3, "attention_turn": 8.0, **options}
    model = living_model(family, preset, sections={"synapse": section}, **overrides)
    excite_attention(model, strength)
    return model


def model_of_both(family: str = "mixtral", strength: float = 1.5, **options: Any) -> LivingMoeForCausalLM:
    model = attention_model(family, strength, router=True, **{"chunk": 3, **options})
    excite_routers(model, strength)
    return model


BUILD: dict[str, Callable[..., LivingMoeForCausalLM]] = {
    "router": router_model,
    "attention": attention_model,
    "both": model_of_both,
}


@cache
def shared(kind: str) -> LivingMoeForCausalLM:
    """A model that tests only read."""
    return BUILD[kind]()


def in_pieces(model: PreTrainedModel, ids: Tensor, sizes: list[int], **inputs: Tensor) -> Tensor:
    """Logits of a text (B, T) read through a cache, so many tokens at a time."""
    pools, found, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        end = start + size
        own = {"attention_mask": inputs["attention_mask"][:, :end]} if "attention_mask" in inputs else {}
        if "position_ids" in inputs:
            own["position_ids"] = inputs["position_ids"][:, start:end]
        found.append(logits(model, ids[:, start:end], past_key_values=pools, use_cache=True, **own))
        start = end
    assert start == ids.shape[1]
    return torch.cat(found, dim=1)
