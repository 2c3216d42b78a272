"""A living mixture-of-experts block: router, expert pool, population, vitals, and the source's shared experts.

Takes the place of a source family's MoE module and keeps its call: hidden states in, hidden states out. What else a
forward pass needs (which field each token is in, which tokens are padding) comes through `context`, set by the
model before the layer runs.

B batch, S sequence, T = B * S tokens, H hidden, E alive experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from living_moe.configuration.sections import (
    EscapeConfig,
    ExpertsConfig,
    PlasticityConfig,
    RouterConfig,
    SynapseConfig,
    TrainableConfig,
    VitalsConfig,
)
from living_moe.configuration.slabs import SLABS
from living_moe.modeling_living_moe.escape.module import Escape
from living_moe.modeling_living_moe.experts import ExpertPool
from living_moe.modeling_living_moe.families import Family, Scoring
from living_moe.modeling_living_moe.phi import measured_experts, phi_evidence, sampled_outputs
from living_moe.modeling_living_moe.plasticity.state import KeyPlasticity
from living_moe.modeling_living_moe.population import Population
from living_moe.modeling_living_moe.receptive_field import FieldGate
from living_moe.modeling_living_moe.router import LivingRouter
from living_moe.modeling_living_moe.signals import TokenSample, interference
from living_moe.modeling_living_moe.synapse.postsynaptic import Postsynapse
from living_moe.modeling_living_moe.synapse.router import Passage
from living_moe.modeling_living_moe.vitals import Vitals

if TYPE_CHECKING:
    from living_moe.modeling_living_moe.standalone import StandaloneLivingMoe


@dataclass
class ForwardContext:
    """What the blocks of one forward pass share.

    Attributes:
        gate: The field of every token, or None when the model has no receptive fields.
        token_mask: Bool (B, S), False for padding; None when every token counts.
        observe: Whether vitals count this pass (training).
        sample: The tokens whose interference and loss are measured in this pass, or None.
        phi_sample: The tokens on which Φ is measured in this pass, or None.
        plastic: Whether keys will move by this pass.
        learns: Whether fast weights will learn from this pass.
        follows: Bool (B, S), whether the next token goes on with the text of this one; None when it always does.
        keep_choices: Whether routers leave their choices in `choices` for an auxiliary loss.
        all_logits: Whether somebody reads the routers' logits.
        passage: The texts of this pass, for synapses; None where there are none.
        step: Optimizer steps lived, for what draws.
        choices: Living layer -> per field (clade logits (T, N), chosen clades (T, K)).
    """

    gate: FieldGate | None = None
    token_mask: Tensor | None = None
    observe: bool = False
    sample: TokenSample | None = None
    phi_sample: TokenSample | None = None
    plastic: bool = False
    learns: bool = False
    follows: Tensor | None = None
    keep_choices: bool = False
    all_logits: bool = True
    passage: Passage | None = None
    step: int = 0
    choices: dict[int, dict[int, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def to(self, device: torch.device | str, **_: object) -> ForwardContext:
        """The same on another device; model-parallel hooks call it."""
        gate = None if self.gate is None else self.gate.to(device)
        mask = None if self.token_mask is None else self.token_mask.to(device)
        follows = None if self.follows is None else self.follows.to(device)
        passage = None if self.passage is None else self.passage.to(device)
        return dataclasses.replace(self, gate=gate, token_mask=mask, follows=follows, passage=passage)


@dataclass(frozen=True)
class SlotParameter:
    """A parameter whose dimension 0 is the slots of a slab. `role`: gate_up_proj | down_proj | key | expression."""

    layer: int
    slab: str
    role: str
    parameter: nn.Parameter


class LivingMoeBlock(nn.Module):
    """One living layer.

    Args:
        config: The backbone's config object itself.
        family: The source family's adapter.
        layer: Number of this living layer, from 0.
        capacities: Slots per slab.
        scoring: How logits become choice and weights; None is as the family does it.
        has_fields: Whether experts live in receptive fields.
        shared: The source family's shared experts, or None.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        family: Family,
        layer: int,
        capacities: dict[str, int],
        *,
        scoring: Scoring | None = None,
        num_facets: int = 0,
        num_leaves: int = 0,
        num_tombstones: int = 0,
        has_fields: bool = False,
        router: RouterConfig | None = None,
        experts: ExpertsConfig | None = None,
        trainable: TrainableConfig | None = None,
        vitals: VitalsConfig | None = None,
        plasticity: PlasticityConfig | None = None,
        escape: EscapeConfig | None = None,
        synapse: SynapseConfig | None = None,
        shared: nn.Module | None = None,
    ):
        super().__init__()
        scoring = scoring or family.scoring(config)
        hidden = config.hidden_size
        self.layer = layer
        self.has_fields = has_fields
        self.jitter_noise = family.jitter_noise(config)
        self.router = LivingRouter(scoring, capacities, hidden, router, trainable, synapse, layer, num_tombstones)
        experts, synapse = experts or ExpertsConfig(), synapse or SynapseConfig()
        self.experts = ExpertPool(
            config,
            capacities,
            hidden,
            family.intermediate_size(config),
            experts.tier_factor,
            experts.ternary_in(layer),
            experts.packed,
            two_timescales=synapse.postsynaptic,
        )
        self.population = Population(
            capacities,
            hidden,
            key_size=self.router.d_key,
            num_facets=num_facets,
            num_leaves=num_leaves,
            num_tombstones=num_tombstones,
            num_groups=scoring.num_groups,
        )
        vitals = vitals or VitalsConfig()
        self.vitals = Vitals(capacities, vitals.decay, fast_decay=vitals.fast_decay, slow_decay=vitals.slow_decay)
        self.phi_experts = vitals.phi_experts
        plastic = plasticity is not None and plasticity.enabled
        self.plasticity = KeyPlasticity(capacities, self.router.d_key) if plastic else None
        self.escape = Escape(hidden, escape, layer) if escape is not None and escape.enabled else None
        self.postsynaptic = Postsynapse(capacities, self.experts, synapse) if synapse.postsynaptic else None
        self.experts.fast = [self.postsynaptic] if self.postsynaptic is not None else []
        self.shared_experts = shared
        self.context: ForwardContext | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        residual = hidden_states
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
            hidden_states = hidden_states * noise
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        context = self.context or ForwardContext()
        field_T: Tensor | None = None
        fields: tuple[int, ...] = ()
        if context.gate is not None and (self.training or context.gate.any_open()):
            field_T, fields = context.gate.index.to(hidden_TH.device).reshape(-1), context.gate.present
        choices: dict[int, tuple[Tensor, Tensor]] | None = {} if context.keep_choices and not in_backward() else None
        passage = context.passage
        record = passage is not None and passage.record and not in_backward()
        _, weights_TK, index_TK = self.router(
            hidden_TH,
            self.population,
            field_T,
            fields,
            choices,
            all_logits=context.all_logits,
            may_search=not self.has_fields,
            passage=passage,
            record=record,
        )
        if choices is not None:
            context.choices[self.layer] = choices
        full = not self.router.selection.leaves_places_unused
        observed = context.observe and self.training and not in_backward()
        if observed:
            self._observe(hidden_TH, weights_TK, index_TK, field_T, context)
        if passage is not None and in_backward():
            # A recomputation computes what its pass did; who asked for it has it already.
            passage.economies.pop(self.layer, None)
        if context.plastic and self.plasticity is not None and not in_backward():
            with torch.no_grad():
                query_TD = self.router.queries(hidden_TH)
            self.plasticity.observe(query_TD, index_TK, token_mask(context, hidden_TH), full=full)
        if context.learns and self.postsynaptic is not None and not in_backward():
            self._learn(hidden_states, index_TK, weights_TK, context)
        output_TH = self.experts(hidden_TH, index_TK, weights_TK, self.population.alive, full=full)
        if observed and context.sample is not None:
            # After the pass itself: autocast would keep weights that were cast first without a gradient.
            self._measure(hidden_TH, weights_TK, index_TK, context.sample)
        if observed and context.phi_sample is not None:
            self._measure_phi(hidden_TH, weights_TK, index_TK, context.phi_sample)
        if self.escape is not None:
            output_TH = self.escape(output_TH)
        output = output_TH.reshape(residual.shape)
        return output if self.shared_experts is None else output + self.shared_experts(residual)

    def _observe(
        self, hidden_TH: Tensor, weights_TK: Tensor, index_TK: Tensor, field_T: Tensor | None, context: ForwardContext
    ) -> None:
        mask_T = token_mask(context, hidden_TH)
        full = not self.router.selection.leaves_places_unused
        fields_E = self.population.fields() if self.has_fields else None
        num_experts = len(self.population.members)
        self.vitals.observe(hidden_TH, weights_TK, index_TK, num_experts, mask_T, field_T, fields_E, full=full)
        if context.passage is not None and (economy := context.passage.economies.get(self.layer)) is not None:
            self.vitals.observe_economy(economy.sums[:, :num_experts], economy.times)

    def _learn(self, hidden_BSH: Tensor, index_TK: Tensor, weights_TK: Tensor, context: ForwardContext) -> None:
        assert self.postsynaptic is not None
        device, masks = hidden_BSH.device, (context.token_mask, context.follows)
        mask_BS, follows_BS = (None if part is None else part.to(device) for part in masks)
        self.postsynaptic.observe(
            self.experts,
            hidden_BSH,
            index_TK,
            weights_TK,
            self.population.alive,
            mask_BS,
            follows_BS,
            training=self.training,
        )

    def _measure(self, hidden_TH: Tensor, weights_TK: Tensor, index_TK: Tensor, sample: TokenSample) -> None:
        """Interference of the sampled tokens; who served them is left for whoever knows their loss."""
        position_S, real_S = sample.position_S.to(hidden_TH.device), sample.real_S.to(hidden_TH.device)
        index_SK, weights_SK = index_TK[position_S], weights_TK.detach()[position_S]
        ratio_SK, known_SK = interference(
            self.experts, hidden_TH.detach()[position_S], index_SK, weights_SK, self.population.alive
        )
        known_SK &= real_S.unsqueeze(1)
        self.vitals.observe_interference(index_SK, ratio_SK, known_SK, len(self.population.members))
        sample.served[self.layer] = (index_SK, weights_SK)

    @staticmethod
    def standalone(d_model: int, d_ff: int, n_experts: int = 8, top_k: int = 2, **choices: Any) -> StandaloneLivingMoe:
        """One living block for any PyTorch model, without Transformers' model classes: see `StandaloneLivingMoe`."""
        from living_moe.modeling_living_moe.standalone import StandaloneLivingMoe

        return StandaloneLivingMoe(d_model, d_ff, n_experts, top_k, **choices)

    def _measure_phi(self, hidden_TH: Tensor, weights_TK: Tensor, index_TK: Tensor, sample: TokenSample) -> None:
        position_S = sample.position_S.to(hidden_TH.device)
        index_SK, alive = index_TK[position_S], self.population.alive
        picked_M, share_M = measured_experts(self.vitals.loads(alive), self.phi_experts)
        outputs_MSH, length_SK = sampled_outputs(
            self.experts, hidden_TH.detach()[position_S], index_SK, picked_M, alive
        )
        part_SK = length_SK * weights_TK.detach()[position_S].abs()
        self.vitals.observe_phi(phi_evidence(outputs_MSH, share_M, part_SK, sample.real_S.to(hidden_TH.device)))

    # -- what surgery and optimizers address -----------------------------------------------------------------------

    def slot_parameters(self) -> Iterator[SlotParameter]:
        """Every parameter with one row per slot, in slab order; of packed experts only what the router has."""
        for name in SLABS:
            if name in self.population.slabs:
                if not self.experts.is_packed(name):
                    slab = self.experts.weights(name)
                    yield SlotParameter(self.layer, name, "gate_up_proj", slab.gate_up_proj)
                    yield SlotParameter(self.layer, name, "down_proj", slab.down_proj)
                yield SlotParameter(self.layer, name, "key", self.router.keys[name])
                if self.router.synapse is not None:
                    yield SlotParameter(self.layer, name, "expression", self.router.synapse.expression[name])

    def capacities(self) -> dict[str, int]:
        return {name: self.population.capacity(name) for name in self.population.slabs}


def token_mask(context: ForwardContext, hidden_TH: Tensor) -> Tensor | None:
    """Bool (T,), False for padding; None when every token counts."""
    return None if context.token_mask is None else context.token_mask.to(hidden_TH.device).reshape(-1)


def in_backward() -> bool:
    """Whether the autograd engine is running: then a forward is a recomputation under gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1
