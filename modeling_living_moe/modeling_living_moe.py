"""`LivingMoeModel` and `LivingMoeForCausalLM`: a source family's model whose MoE layers are populations.

Composition over the family's Transformers classes (see `backbone.py`); what a population can do is in
`lifecycle/api.py`, how a model is saved and loaded in `checkpoint.py`.

B batch, S sequence, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple

from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import PlasticityConfig, SynapseConfig
from living_moe.modeling_living_moe.backbone import (
    init_living_weights,
    living_backbone_class,
    num_fields,
)
from living_moe.modeling_living_moe.block import ForwardContext, LivingMoeBlock
from living_moe.modeling_living_moe.checkpoint import CheckpointMixin
from living_moe.modeling_living_moe.deltas import FieldDelta
from living_moe.modeling_living_moe.drift import DriftDetector
from living_moe.modeling_living_moe.escape.detector import StagnationDetector
from living_moe.modeling_living_moe.families import family_of
from living_moe.modeling_living_moe.field_evidence import evidence_history, remember
from living_moe.modeling_living_moe.lifecycle.api import LifecycleMixin
from living_moe.modeling_living_moe.lifecycle.lineage import Lineage
from living_moe.modeling_living_moe.plasticity.api import PlasticityMixin
from living_moe.modeling_living_moe.population import ROOT_FIELD
from living_moe.modeling_living_moe.receptive_field import FieldGate, ReceptiveFields
from living_moe.modeling_living_moe.router import load_balancing_loss
from living_moe.modeling_living_moe.signals import TokenSample, spread, token_losses
from living_moe.modeling_living_moe.synapse.attention import SYNAPTIC
from living_moe.modeling_living_moe.synapse.postsynaptic_api import PostsynapticMixin
from living_moe.modeling_living_moe.synapse.router import Passage
from living_moe.modeling_living_moe.synapse.texts import read_texts, remember_texts, synapse_layer
from living_moe.modeling_living_moe.ternary_api import TernaryMixin
from living_moe.modeling_living_moe.trend import LossTrend


class LivingMoePreTrainedModel(  # type: ignore[misc]
    CheckpointMixin, LifecycleMixin, PlasticityMixin, PostsynapticMixin, TernaryMixin, PreTrainedModel
):
    """Base of the living models: Transformers' contract, the population's API, strict checkpoints."""

    config: LivingMoeConfig
    config_class = LivingMoeConfig
    base_model_prefix = "model"
    # Checkpoints from before there was a trend, or an economy of synapses, begin it anew.
    _keys_to_ignore_on_load_missing = [r"(^|\.)trend\.", r"\.vitals\.[a-z0-9_]+\.(energy|depletion)$"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Transformers finds these by searching a module's source text, where composition leaves no trace.
    _can_set_experts_implementation_cached_value = True
    _can_set_attn_implementation_cached_value = True

    def __init__(self, config: LivingMoeConfig, *args: Any, **kwargs: Any):
        if config.synapse.attention:
            config._attn_implementation = SYNAPTIC  # the backbone's too
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_living_weights(module, self.config.backbone_config.initializer_range, self.config.experts)
        if isinstance(module, Clock):
            init.zeros_(module.steps)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As Transformers'. Densities and the head's delta follow: new tokens are unseen, and no delta changes them."""
        embeddings: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        vocab_size = embeddings.weight.shape[0]
        fields, head_delta = self._life.fields, getattr(self, "head_delta", None)
        if fields is not None and fields.vocab_size != vocab_size:
            fields.resize_vocab(vocab_size)
        if head_delta is not None:
            head_delta.resize_output(vocab_size)
        return embeddings

    @property
    def living_blocks(self) -> list[LivingMoeBlock]:  # type: ignore[override]
        """The living layers' blocks, by layer number."""
        layers: Any = self._life.backbone.living_layers
        blocks = [getattr(layer, layer.living_block) for layer in layers]
        if all(isinstance(block, LivingMoeBlock) for block in blocks):
            return blocks
        # Something (PEFT, say) has put a wrapper around them.
        return [module for module in self.modules() if isinstance(module, LivingMoeBlock)]


class Clock(nn.Module):
    """Optimizer steps lived, `steps`: a buffer so that it is saved, never read back per step.

    A module of its own because a device map inferred by Accelerate forgets the buffers of modules it splits.
    """

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))


class LivingMoeModel(LivingMoePreTrainedModel):
    """The source family's decoder with living MoE layers, without a head.

    Args:
        config: Fills `config.populations` with the graft's when it is None.
    """

    # A causal-LM checkpoint loads into this class too; its head is not ours.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^head_delta\."]

    def __init__(self, config: LivingMoeConfig):
        super().__init__(config)
        backbone_class = living_backbone_class(family_of(config.backbone_config).model_class)  # type: ignore[arg-type]
        self.backbone = backbone_class(config)
        self.fields = (
            ReceptiveFields(config.receptive_field, config.backbone_config.vocab_size, num_fields(config))
            if config.receptive_field.enabled
            else None
        )
        #: The delta of the head, which a causal-LM model around this one owns; a list, so that it is no child here.
        self.deltas_outside: list[FieldDelta] = []
        self.clock = Clock()
        self.drift = DriftDetector()
        self.trend = LossTrend()
        self.stagnation = StagnationDetector(config.escape) if config.escape.enabled else None
        self._steps: int | None = None
        self._ready_for: tuple[int, int] | None = None
        self.lineage_ = Lineage()
        self.post_init()
        # Initial weights begin a new life, whatever past the config tells of.
        self.record_populations()
        self.apply_trainability()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        living_context: ForwardContext | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As the backbone's forward. Tokens given as `inputs_embeds` carry no evidence for receptive fields.

        Args:
            living_context: What the blocks share, from `read_context`; for callers that read it again afterwards.
        """
        context = living_context
        if context is None:
            context = self.read_context(input_ids, attention_mask, past_key_values, inputs_embeds, position_ids)
            wanted = kwargs.get("output_router_logits")
            context.all_logits = bool(self.config.output_router_logits if wanted is None else wanted)
        if context.passage is not None:
            caches = self.config.use_cache if use_cache is None else use_cache
            context.passage.record = bool(caches) or past_key_values is not None
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.config, name)
        try:
            outputs: MoeModelOutputWithPast = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                living_context=context,
                return_dict=True,
                **kwargs,
            )
        except BaseException:
            # Half a pass is no evidence.
            self.forget_evidence()
            raise
        if context.gate is not None and outputs.past_key_values is not None:
            remember(outputs.past_key_values, context.gate.evidence)
        if context.passage is not None:
            self._remember_synapses(outputs.past_key_values, context.passage)
        if context.plastic and not self.training:
            self.consolidate_keys()
        if context.learns and not self.training:
            self.potentiate_experts()
        return outputs

    def read_context(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | dict[str, Tensor] | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> ForwardContext:
        """Which tokens are padding, and which field each token is in."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            return ForwardContext(plastic=self._keys_move(), learns=self._experts_learn())
        history = None
        if self.fields is not None and past_key_values is not None:
            history = evidence_history(past_key_values)
        plastic, learns = self._keys_move(), self._experts_learn()
        past = 0 if history is None else history.shape[1]
        synaptic = self.config.synapse.router
        if history is None and (plastic or learns or synaptic) and past_key_values is not None:
            past = int(past_key_values.get_seq_length())
        mask = real_tokens(attention_mask, given.shape[1], past)
        gate: FieldGate | None = None
        if self.fields is not None:
            ids = input_ids if input_ids is not None else given.new_full(given.shape[:2], -1, dtype=torch.int64)
            gate = self.fields(ids, mask, history, position_ids)
            if self.training:
                self.drift.observe_fields(gate.index, mask)
            if self.training and input_ids is not None:
                belongs = self.fields.observe(input_ids, mask, position_ids, gate)
                gate = self.fields.trained_gate(gate, belongs, mask)
        vitals = self.config.vitals
        return ForwardContext(
            gate,
            mask,
            observe=self.training,
            plastic=plastic,
            sample=self._token_sample(given, mask, vitals.signals_every, vitals.signal_tokens),
            phi_sample=self._token_sample(given, mask, vitals.phi_every, vitals.phi_tokens),
            learns=learns,
            follows=going_on(position_ids) if learns else None,
            passage=self._passage(given, mask, position_ids, past_key_values) if synaptic else None,
            step=self.steps_lived if self.training and self.config.synapse.attention else 0,
        )

    def _passage(self, given: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None) -> Passage:
        """The texts of a pass, and what the cache knows of their synapses."""
        history = synapse_layer(cache)
        shape = (given.shape[0], given.shape[1])
        texts = read_texts(shape, self.config.synapse.chunk, given.device, mask, position_ids, history)
        passage = Passage(texts, step=self.steps_lived if self.training else 0, accounts=self.training)
        if history is not None:
            sizes = [block.population.num_addresses for block in self.living_blocks]
            passage.take_up(history, sizes, self.population_version)
        return passage

    def _remember_synapses(self, cache: Cache | None, passage: Passage) -> None:
        """Leave what a pass recorded in the cache."""
        layers = sorted(passage.traces)
        if cache is not None and layers:
            device = passage.traces[layers[0]][0].device
            kept, states = (
                torch.cat([passage.traces[layer][part].to(device) for layer in layers], dim=-1) for part in (0, 1)
            )
            remember_texts(cache, passage.texts, kept, states, self.config.synapse.chunk, self.population_version)
        passage.traces.clear()

    def _token_sample(self, given: Tensor, mask: Tensor | None, every: int, most: int) -> TokenSample | None:
        """The (at most) `most` tokens that are measured, in passes of every `every`-th optimizer step."""
        tokens = given.shape[0] * given.shape[1]
        if not (self.training and every and tokens) or (self.steps_lived + 1) % every:
            return None
        flat_mask = None if mask is None else mask.reshape(-1)
        return spread(tokens, most, flat_mask, given.device)

    def _keys_move(self) -> bool:
        """Whether this pass is evidence for the keys."""
        settings: PlasticityConfig = self.config.plasticity
        if settings.enabled:
            self._require_plasticity()
        if self.training:
            return settings.enabled and settings.training
        # A pass whose gradient may follow must find the keys it was made with.
        plastic = self.is_plastic and self._keys_too
        return (plastic or (settings.enabled and settings.inference)) and not torch.is_grad_enabled()

    def _experts_learn(self) -> bool:
        """Whether this pass is evidence for fast weights."""
        settings: SynapseConfig = self.config.synapse
        if not settings.postsynaptic or self.training:
            return settings.postsynaptic and settings.postsynaptic_training
        return (self.is_plastic or settings.postsynaptic_inference) and not torch.is_grad_enabled()

    def deltas(self) -> list[FieldDelta]:
        """Every low-rank delta of the receptive fields, the head's last."""
        return [module for module in self.modules() if isinstance(module, FieldDelta)] + self.deltas_outside

    def calibrate(self, token_ids: Tensor) -> None:
        """Show the model text of what it already knows, so that newborn fields can tell it from new text.

        Args:
            token_ids: int64, shape (tokens,) or (documents, tokens).

        Raises:
            ConfigurationError: The model has no receptive fields.
        """
        if self.fields is None:
            raise ConfigurationError(
                "this model has no receptive fields; set receptive_field.enabled (preset frozen-graft)."
            )
        self.fields.calibrate(token_ids)


def real_tokens(attention_mask: Tensor | dict[str, Tensor] | None, length: int, past: int) -> Tensor | None:
    """Which of the `length` tokens of a pass are not padding: bool (B, length), or None when the mask does not say.

    Args:
        attention_mask: As Transformers passes it around: (B, past + length), nonzero for tokens; (B, 1, length, any),
            bool or additive, ready for attention (generation with static caches); such masks by layer type; other
            objects (flex attention's) do not say.
        past: Tokens in the cache.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()), None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    # Every token but padding attends to itself. Static caches have room behind the tokens of the pass, and sliding
    # windows have left the first columns behind.
    first = min(past, attention_mask.shape[3] - length)
    own = attention_mask[:, 0, :, first : first + length].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0


def going_on(position_ids: Tensor | None) -> Tensor | None:
    """Whether the next token of the row goes on with the text of each: bool (B or 1, S); None when nothing is known.

    Texts packed into one row begin at positions of their own.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    ends = torch.zeros_like(position_ids[:, :1], dtype=torch.bool)
    return torch.cat([position_ids.diff(dim=1) == 1, ends], dim=1)


@dataclass
class LivingMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """As Transformers', and the auxiliary losses of synapses, 0-dim fp32: mean energy spent, and mean share of the
    docked vesicles that is gone, both in [0, 1]; None without a weight in the section `synapse`."""

    energy_loss: Tensor | None = None
    pool_loss: Tensor | None = None


class LivingMoeForCausalLM(LivingMoePreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A living model with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.backbone.embed_tokens.weight"}
    #: Comparison with the source, on models that `living_moe.convert` has just made.
    graft_verification: Any = None

    def __init__(self, config: LivingMoeConfig):
        super().__init__(config)
        backbone = config.backbone_config
        self.model = LivingMoeModel(config)
        self.vocab_size = backbone.vocab_size
        self.lm_head = nn.Linear(backbone.hidden_size, backbone.vocab_size, bias=False)
        rank = config.receptive_field.head_rank if config.receptive_field.enabled else 0
        self.head_delta = (
            FieldDelta(backbone.hidden_size, backbone.vocab_size, rank, num_fields(config)) if rank else None
        )
        self.model.deltas_outside = [self.head_delta] if self.head_delta is not None else []
        self.post_init()
        self.apply_trainability()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def calibrate(self, token_ids: Tensor) -> None:
        """See `LivingMoeModel.calibrate`."""
        self.model.calibrate(token_ids)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'. It packs many texts into a row, where receptive fields and synapses cannot tell them apart.

        Raises:
            ConfigurationError: The model has receptive fields or synapses.
        """
        for name in ("router", "attention"):
            if getattr(self.config.synapse, name):
                raise ConfigurationError(
                    f"synapse.{name} is True: continuous batching keeps no synapses per request, so they would tire by "
                    f"the texts of others; use `generate`, which takes batches too."
                )
        if self.model.fields is not None:
            raise ConfigurationError(
                "receptive_field.enabled is True: continuous batching keeps no evidence per request, so fields would "
                "open and close by the texts of others; use `generate`, which takes batches too."
            )
        return super().init_continuous_batching(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LivingMoeCausalLMOutput:
        """Next-token logits, and the loss when `labels` are given.

        Args:
            labels: int64 (B, S), -100 is ignored; shifted inside.
            output_router_logits: Return each living layer's router logits (tokens, alive experts) and add the
                load-balancing loss, weighted by `router.aux_loss_coef` (None: the source's own weight).
            logits_to_keep: Compute logits for the last n positions only (0: all), or for the given indices.

        Returns:
            `logits` (B, S, V), `loss`, `aux_loss` and what the backbone returns; `energy_loss` and `pool_loss` where
            `synapse` gives them a weight.
        """
        if output_router_logits is None:
            output_router_logits = bool(self.config.output_router_logits)
        z_loss_coef = self.config.router.z_loss_coef
        want_logits = output_router_logits or (z_loss_coef > 0 and labels is not None)
        context = self.model.read_context(input_ids, attention_mask, past_key_values, inputs_embeds, position_ids)
        context.keep_choices, context.all_logits = output_router_logits, want_logits
        coefficients = self.config.synapse.energy_loss_coef, self.config.synapse.pool_loss_coef
        if context.passage is not None and labels is not None and any(coefficients):
            context.passage.accounts = context.passage.has_losses = True
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            living_context=context,
            output_router_logits=want_logits,
            return_dict=True,
            **kwargs,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden)
        if self.head_delta is not None:
            logits = self._apply_head_delta(hidden, logits, logits_to_keep, context)

        loss = aux_loss = None
        share: Tensor | float = 1.0
        if labels is not None:
            share = _share_of_step(labels, **kwargs)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
            if context.observe:
                self.model.drift.observe_loss(loss.detach())
            if context.sample is not None:
                self._credit(logits, labels, context.sample, kwargs.get("shift_labels"))
        if output_router_logits and (coefficient := self.aux_loss_coef) is not None:
            aux_loss = self._load_balancing_loss(outputs.router_logits, context)
            if loss is not None:
                loss = loss + coefficient * aux_loss.to(loss.device)
            # Gradient checkpointing keeps the context for its recomputation: a cycle through the graph.
            context.choices.clear()
        if loss is not None and z_loss_coef > 0:
            squares = [
                layer.float().logsumexp(dim=-1).square().mean().to(loss.device) for layer in outputs.router_logits
            ]
            loss = loss + z_loss_coef * share * torch.stack(squares).mean()
        economy = self._synaptic_losses(context.passage)
        if economy is not None and loss is not None and loss.requires_grad and not economy[0].requires_grad:
            if self.training and self.is_gradient_checkpointing:
                raise ConfigurationError(
                    "reentrant gradient checkpointing hides from synapse.energy_loss_coef and synapse.pool_loss_coef "
                    'what they have gradients from; enable it with {"use_reentrant": False}, or set both to 0.'
                )
        if loss is not None and economy is not None:
            for coefficient, part in zip(coefficients, economy, strict=True):
                if coefficient:
                    loss = loss + coefficient * share * part.to(loss.device)
        energy_loss, pool_loss = (None, None) if economy is None else economy
        if loss is not None and self.training and torch.is_grad_enabled() and not loss.requires_grad:
            loss = self._nothing_to_learn(loss)
        return LivingMoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            energy_loss=energy_loss,
            pool_loss=pool_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    @staticmethod
    def _synaptic_losses(passage: Passage | None) -> tuple[Tensor, Tensor] | None:
        """Energy spent and depletion, means over layers; None where nobody asked."""
        if passage is None or not passage.has_losses:
            return None
        layers = [economy.losses for _, economy in sorted(passage.economies.items())]
        # Gradient checkpointing keeps the passage for its recomputation: a cycle through the graph.
        passage.economies.clear()
        energy, pool = torch.stack([losses.to(layers[0].device) for losses in layers]).mean(0).unbind()
        return energy, pool

    def _credit(self, logits: Tensor, labels: Tensor, sample: TokenSample, shift_labels: Tensor | None) -> None:
        """Credit the loss of the sampled tokens to the experts that served them, in every layer."""
        if logits.shape[:-1] == labels.shape:
            loss_S, known_S = token_losses(logits, labels, sample, shift_labels)
            for block in self.living_blocks:
                if block.layer in sample.served:
                    index_SK, weights_SK = sample.served[block.layer]
                    device, experts = index_SK.device, len(block.population.members)
                    block.vitals.credit(index_SK, weights_SK, loss_S.to(device), known_S.to(device), experts)
        # Gradient checkpointing keeps the context for its recomputation.
        sample.served.clear()

    def _nothing_to_learn(self, loss: Tensor) -> Tensor:
        """The same loss with a gradient of zero, so that `backward` works on text that belongs to the (frozen) root."""
        if self.model.fields is None:
            return loss
        deltas = self.model.deltas()
        idle = deltas[-1].up[-1].flatten()[0] if deltas else torch.zeros((), requires_grad=True)
        return loss + 0.0 * idle.to(loss)

    def _apply_head_delta(
        self, hidden: Tensor, logits: Tensor, logits_to_keep: int | Tensor, context: ForwardContext
    ) -> Tensor:
        assert self.head_delta is not None
        if context.gate is None:
            return logits
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        index = context.gate.index if isinstance(keep, int) else context.gate.index[:, keep]
        return self.head_delta.of_gate(hidden, logits, index, context.gate.present)

    @property
    def aux_loss_coef(self) -> float | None:
        """Weight of the load-balancing loss; None for families that have none, unless the config sets one."""
        own = self.config.router.aux_loss_coef
        return own if own is not None else getattr(self.config.backbone_config, "router_aux_loss_coef", None)

    def _load_balancing_loss(self, router_logits: tuple[Tensor, ...], context: ForwardContext) -> Tensor:
        """Over the tokens of this pass: with a cache, the attention mask knows more of them than the routers saw."""
        blocks = self.living_blocks
        counts = set(self.expert_counts)
        top_k = blocks[0].router.scoring.top_k
        plain = not any(block.router.selection.leaves_places_unused for block in blocks)
        if plain and len(counts) == 1 and all(block.population.is_fresh for block in blocks):
            # Until the first event the source's own loss, which pools the layers before it multiplies.
            pooled: Any = load_balancing_loss_func  # typed for one layer
            return pooled(router_logits, counts.pop(), top_k, context.token_mask)
        losses = [field_balance(context, block.layer).to(router_logits[0].device) for block in blocks]
        return torch.stack(losses).mean()


def field_balance(context: ForwardContext, layer: int) -> Tensor:
    """Load-balancing loss of one layer: per field over the clades its tokens see, weighted by the field's tokens."""
    fields = context.choices[layer]
    device = fields[ROOT_FIELD][0].device
    weight_T = torch.ones(fields[ROOT_FIELD][0].shape[0], device=device)
    if context.token_mask is not None:
        weight_T = context.token_mask.reshape(-1).to(device, torch.float32)
    if context.gate is None or len(fields) == 1:
        return load_balancing_loss(*fields[ROOT_FIELD], weight_T)
    index_T = context.gate.index.reshape(-1).to(device)
    total = weight_T.sum().clamp_min(1.0)
    loss = torch.zeros((), device=device)
    for field, (logits_TN, clades_TK) in fields.items():
        mine_T = weight_T * (index_T == field)
        loss = loss + load_balancing_loss(logits_TN, clades_TK, mine_T) * (mine_T.sum() / total)
    return loss


def _share_of_step(
    labels: Tensor, num_items_in_batch: Tensor | int | None = None, shift_labels: Tensor | None = None, **_: Any
) -> Tensor | float:
    """What of an optimizer step this pass is, where the step's tokens are given, as Trainer does: passes then have sums
    over it, which are not divided by their number.
    """
    if num_items_in_batch is None:
        return 1.0
    here = ((labels[..., 1:] if shift_labels is None else shift_labels) != -100).sum()
    return here / torch.as_tensor(num_items_in_batch, device=here.device).clamp(min=1)


__all__ = ["LivingMoeForCausalLM", "LivingMoeModel", "LivingMoePreTrainedModel"]
