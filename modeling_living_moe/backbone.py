"""A source family's own Transformers model, with living blocks in place of its MoE blocks.

Nothing of the family is rewritten: a subclass builds it with a one-expert skeleton (so the source's experts are
never allocated), then swaps the blocks. Each decoder layer's class is subclassed too, to hand the pass's context to its
block inside the function that gradient checkpointing runs again: a recomputation sees the context of its own pass.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import ExpertsConfig
from living_moe.configuration.slabs import SLABS, slab_name
from living_moe.modeling_living_moe.block import ForwardContext, LivingMoeBlock
from living_moe.modeling_living_moe.deltas import DownMaps, GateHolder, UpMaps, attach_deltas
from living_moe.modeling_living_moe.drift import DriftDetector
from living_moe.modeling_living_moe.escape.detector import StagnationDetector
from living_moe.modeling_living_moe.escape.module import Escape, FourierMap, PoincareMap
from living_moe.modeling_living_moe.escape.spaces import PoincareBall
from living_moe.modeling_living_moe.experts import ExpertSlab, init_experts
from living_moe.modeling_living_moe.families import FAMILIES, Family, family_of
from living_moe.modeling_living_moe.plasticity.state import KeyPlasticity
from living_moe.modeling_living_moe.population import Population, RowTable
from living_moe.modeling_living_moe.receptive_field import ReceptiveFields
from living_moe.modeling_living_moe.router import Keys, LearnedTemperature, LivingRouter
from living_moe.modeling_living_moe.selection import TopAny
from living_moe.modeling_living_moe.synapse.attention import AttentionSynapse, attach_attention_synapses
from living_moe.modeling_living_moe.synapse.postsynaptic import Postsynapse
from living_moe.modeling_living_moe.synapse.presynaptic import Presynapse
from living_moe.modeling_living_moe.synapse.router import Expression, RouterSynapse, TombstoneExpression
from living_moe.modeling_living_moe.ternary import PackedTernary
from living_moe.modeling_living_moe.trend import LossTrend
from living_moe.modeling_living_moe.vitals import Vitals


def num_fields(config: LivingMoeConfig) -> int:
    """Newborn fields the model has by now."""
    return config.num_fields if config.receptive_field.enabled else 0


def fresh_capacities(config: LivingMoeConfig, family: Family) -> dict[str, int]:
    """Slots of one layer right after a graft: every pretrained expert, no spare."""
    return {slab_name(0, frozen=config.experts.freeze_pretrained): family.num_experts(config.backbone_config)}


class LivingBackbone:
    """Mixin over a family's model class; see `living_backbone_class`."""

    config: Any

    def __init__(self, config: LivingMoeConfig):
        family = family_of(config.backbone_config)
        self.living_settings = config.experts
        with family.skeleton(config.backbone_config):
            super().__init__(config.backbone_config)  # type: ignore[call-arg]
        self.living_layers = [
            layer
            for layer in self.layers  # type: ignore[attr-defined]
            if isinstance(getattr(layer, family.block_attribute, None), family.block_class)
        ]
        if config.populations is None:
            config.populations = [fresh_capacities(config, family) for _ in self.living_layers]
        if len(config.populations) != len(self.living_layers):
            raise ConfigurationError(
                f"populations has {len(config.populations)} entries but {type(self).__name__} has "
                f"{len(self.living_layers)} layers with experts; give one entry per such layer."
            )
        config.experts.require_layers(len(self.living_layers))
        for number, (layer, population) in enumerate(zip(self.living_layers, config.populations, strict=True)):
            source = getattr(layer, family.block_attribute)
            block = LivingMoeBlock(
                config.backbone_config,
                family,
                number,
                {slab: population[slab] for slab in SLABS if population.get(slab)},
                num_facets=population.get("facets", 0),
                num_leaves=population.get("leaves", 0),
                num_tombstones=population.get("tombstones", 0),
                has_fields=config.receptive_field.enabled,
                router=config.router,
                experts=config.experts,
                trainable=config.trainable,
                vitals=config.vitals,
                plasticity=config.plasticity,
                escape=config.escape,
                synapse=config.synapse,
                shared=getattr(source, family.shared_attribute) if family.shared_attribute else None,
            )
            setattr(layer, family.block_attribute, block)
            layer.living_block = family.block_attribute
        rank = config.receptive_field.attention_rank
        for layer in self.layers if config.receptive_field.enabled and rank else ():  # type: ignore[attr-defined]
            # Families name more projections than every config uses (DeepSeek with and without query compression).
            names = [
                n for n in family.attention_projections if isinstance(getattr(layer.self_attn, n, None), nn.Linear)
            ]
            attach_deltas(layer, names, rank, num_fields(config))
        if config.synapse.attention:
            attach_attention_synapses(self, config.synapse)  # type: ignore[arg-type]
        for layer in self.layers:  # type: ignore[attr-defined]
            layer.__class__ = living_layer_class(type(layer))  # type: ignore[arg-type]
        # What a family keeps in fp32 may have gone with its blocks; our tables have dtypes of their own.
        names = [name for name, _ in (*self.named_parameters(), *self.named_buffers())]  # type: ignore[attr-defined]
        wanted: Any = getattr(type(self), "_keep_in_fp32_modules_strict", None) or ()
        self._keep_in_fp32_modules_strict = [part for part in wanted if any(part in name for name in names)]
        if config.router.learn_temperature:
            self._keep_in_fp32_modules_strict.append("learned_temperature")
        self.post_init()  # type: ignore[attr-defined]
        # The family's plans shard its experts. Surgery works on whole tensors, so ours are not sharded, and neither are
        # the maps whose outputs a delta adds to.
        self._tp_plan: dict[str, str] = {}
        self._ep_plan: dict[str, str] = {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        init_living_weights(module, self.config.initializer_range, self.living_settings)


#: Modules of ours that know their own initial values.
_RESET = (
    AttentionSynapse, DownMaps, DriftDetector, Escape, Expression, FourierMap, KeyPlasticity, LearnedTemperature,
    LossTrend, PackedTernary, PoincareBall, PoincareMap, Population, Postsynapse, Presynapse, ReceptiveFields,
    RouterSynapse, RowTable, StagnationDetector, TombstoneExpression, TopAny, UpMaps, Vitals,
)  # fmt: skip


def init_living_weights(module: nn.Module, std: float, settings: ExpertsConfig) -> None:
    """Initial weights of our own modules, for models that are not loaded.

    Only of modules that own tensors: Transformers passes no others to `_init_weights` of a class it does not ship.
    """
    if isinstance(module, ExpertSlab):
        init_experts(module, std, settings)
    elif isinstance(module, Keys):
        for key in module.values():
            init.normal_(key, mean=0.0, std=std)
    elif isinstance(module, _RESET):
        module.reset_parameters()


class LivingLayer:
    """Mixin over a family's decoder layer class; see `living_layer_class`."""

    def forward(self, *args: Any, living_context: ForwardContext | None = None, **kwargs: Any) -> Any:
        """As the family's, with the context within reach of the modules that read it."""
        share_context(self, living_context)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            # It holds the pass's graph, which may be large and which no copy of a model may carry.
            share_context(self, None)


def share_context(layer: Any, context: ForwardContext | None) -> None:
    name = getattr(layer, "living_block", None)
    if name is not None:
        getattr(layer, name).context = context
    attention = getattr(layer, "self_attn", None)
    holder = getattr(attention, "gate_holder", None)
    if isinstance(holder, GateHolder):
        holder.gate = None if context is None else context.gate
    synapse = getattr(attention, "synapse", None)
    if isinstance(synapse, AttentionSynapse):
        synapse.step = None if context is None else context.step


@functools.cache
def living_layer_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """`layer_class` that takes a `living_context`; built once per family."""
    return type(f"Living{layer_class.__name__}", (LivingLayer, layer_class), {"__module__": __name__})


@functools.cache
def living_backbone_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`model_class` with living blocks; built once per family."""
    recorded = {**(model_class._can_record_outputs or {}), "router_logits": OutputRecorder(LivingRouter, index=0)}
    return type(
        f"Living{model_class.__name__}",
        (LivingBackbone, model_class),
        {
            "__module__": __name__,
            "__doc__": f"{model_class.__name__} with living blocks.",
            "_can_record_outputs": recorded,
            "_no_split_modules": [f"Living{name}" for name in model_class._no_split_modules or ()],
            "_can_set_experts_implementation_cached_value": True,
            "_can_set_attn_implementation_cached_value": True,
        },
    )


def __getattr__(name: str) -> type:
    """A class built on demand, by its name: unpickling a whole model asks for them."""
    if name.startswith("Living"):
        for family in FAMILIES.values():
            source = getattr(sys.modules[family.model_class.__module__], name.removeprefix("Living"), None)
            if isinstance(source, type) and issubclass(source, PreTrainedModel):
                return living_backbone_class(source)  # type: ignore[arg-type]
            if isinstance(source, type) and issubclass(source, nn.Module):
                return living_layer_class(source)  # type: ignore[arg-type]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
