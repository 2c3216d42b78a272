"""One living block for any PyTorch model: a layer in place of a feed-forward network, without Transformers' models.

`StandaloneLivingMoe` puts the parts a living model shares (clock, drift detector, trend, lineage, config) around one
`LivingMoeBlock`, so populations, events and surgery are those of `lifecycle/`; the layer argument of a model's methods
falls away. It takes part in the state dict of whatever model it is in: `load_state_dict` of that model gives the block
the sizes of the state it is given.

The block knows no labels. Load and gradients are measured; a loss only if `lifecycle_step(loss=...)` is told one, and
the loss of single experts (`loss_fast`, `loss_slow`) never. What needs the whole model (receptive fields, plastic keys,
packed experts, synapses, the writing of checkpoints) is `LivingMoeForCausalLM`'s.

H = d_model hidden, I = d_ff intermediate, E alive experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.errors import (
    CheckpointError,
    ConfigurationError,
    PopulationError,
    TrainingDivergedError,
)
from living_moe.configuration.sections import did_you_mean
from living_moe.configuration.slabs import SLABS, slab_name
from living_moe.modeling_living_moe.block import ForwardContext, LivingMoeBlock, SlotParameter, in_backward
from living_moe.modeling_living_moe.checkpoint import adopt_sizes, check_population
from living_moe.modeling_living_moe.deltas import FieldDelta
from living_moe.modeling_living_moe.distributed import sum_over_ranks, world_size
from living_moe.modeling_living_moe.drift import DriftDetector
from living_moe.modeling_living_moe.escape.detector import StagnationDetector
from living_moe.modeling_living_moe.escape.module import Now
from living_moe.modeling_living_moe.experts import ExpertSlab, init_experts
from living_moe.modeling_living_moe.families import family_of
from living_moe.modeling_living_moe.lifecycle.api import LifecycleMixin
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent
from living_moe.modeling_living_moe.lifecycle.lineage import Lineage
from living_moe.modeling_living_moe.lifecycle.policies import policy_named
from living_moe.modeling_living_moe.lifecycle.surgery import require_optimizer, retire
from living_moe.modeling_living_moe.modeling_living_moe import Clock
from living_moe.modeling_living_moe.population import Population
from living_moe.modeling_living_moe.signals import TokenSample, spread
from living_moe.modeling_living_moe.trend import LossTrend

#: The only layer there is.
LAYER = 0
#: Part of a state dict that is no tensor of the modules: the lineage, as JSON in a uint8 tensor, so that files of any
#: kind can hold it.
EXTRA = "_extra_state"


class StandaloneLivingMoe(LifecycleMixin, nn.Module):
    """A mixture of SwiGLU experts that split and die while it trains: (..., d_model) -> (..., d_model).

    Scores are softmax, the `top_k` best clades serve, their weights sum to one (as Mixtral's; with `top_k` of 1, where
    that weight would be 1 whatever the router learns, it is the softmax's, as Switch's). Tokens are counted in
    training mode. After every `optimizer.step()`, before gradients are zeroed, on every rank::

        events = layer.lifecycle_step(optimizer)

    With several in one model each has its own population; call it for each. Slabs that grow and shrink for an event
    (kinds "grow" and "shrink" in `lineage`) replace parameters, so DistributedDataParallel has to wrap the model anew:
    `training.distributed.WrapperKeeper` does it.

    Args:
        d_model, d_ff: H and I.
        n_experts, top_k: Experts to begin with, and clades per token.
        preset: Of the sections, see `living_moe.PRESETS`.
        hidden_act: Activation of the experts' gates, a name Transformers knows.
        experts_implementation: How experts are computed: "eager", "batched_mm", "grouped_mm", or "active", whose cost
            follows the experts that receive tokens. None is "grouped_mm" where H and I are multiples of 8 and the dtype
            is not float64, as its kernels need, else "active".
        **sections: Per section a dict of the fields to set otherwise, such as `lifecycle={"max_experts": 64}`. Unless
            given, `experts.init_gain` is 1.

    Raises:
        ConfigurationError: A size or a choice makes no sense, or needs a whole model.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int = 8,
        top_k: int = 2,
        *,
        preset: str = "ouroboros",
        hidden_act: str = "silu",
        experts_implementation: str | None = None,
        **sections: Mapping[str, Any],
    ):
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("n_experts", n_experts), ("top_k", top_k)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} must be an int >= 1, got {value!r}.")
        if top_k > n_experts:
            raise ConfigurationError(f"top_k is {top_k} but there are n_experts = {n_experts}; lower top_k.")
        #: What was chosen where none was asked for.
        self._chosen = "active" if experts_implementation is None else None
        known = ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys())
        for name, choice, choices in (
            ("experts_implementation", self._chosen or experts_implementation, known),
            ("hidden_act", hidden_act, tuple(ACT2FN)),
        ):
            if choice not in choices:
                raise ConfigurationError(f"{name} is {choice!r}.{did_you_mean(str(choice), choices)}")
        if experts_implementation == "grouped_mm" and (d_model % 8 or d_ff % 8):
            raise ConfigurationError(
                f"experts_implementation 'grouped_mm' needs sizes that are multiples of 8, got d_model {d_model} and "
                f"d_ff {d_ff}; leave it out, or take 'active'."
            )
        experts = sections.get("experts", {})
        if isinstance(experts, Mapping):
            sections["experts"] = {"init_gain": 1.0, **experts}
        backbone = MixtralConfig(
            hidden_size=d_model, intermediate_size=d_ff, num_local_experts=n_experts, num_experts_per_tok=top_k,
            hidden_act=hidden_act, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=1,
        )  # fmt: skip
        self.config = LivingMoeConfig.from_backbone(backbone, preset=preset, **sections)  # type: ignore[arg-type]
        for name, asked in (
            ("receptive_field.enabled", self.config.receptive_field.enabled),
            ("plasticity.enabled", self.config.plasticity.enabled),
            ("experts.packed", self.config.experts.packed),
            ("synapse.router", self.config.synapse.router),
            ("synapse.attention", self.config.synapse.attention),
            ("synapse.postsynaptic", self.config.synapse.postsynaptic),
        ):
            if asked:
                raise ConfigurationError(f"{name} is True (preset {preset!r}), which needs a whole living model.")
        policy_named(self.config.lifecycle.policy)
        self.config.backbone_config._experts_implementation = experts_implementation or "active"
        slab = slab_name(0, frozen=self.config.experts.freeze_pretrained)
        self.block = self._new_block({slab: n_experts})
        self.clock = Clock()
        self.drift = DriftDetector()
        self.trend = LossTrend()
        self.stagnation = StagnationDetector(self.config.escape) if self.config.escape.enabled else None
        self.fields = None
        self.lineage_ = Lineage()
        self._steps: int | None = None
        self._ready_for: tuple[int, int] | None = None
        self._init_weights()
        self._choose_implementation()
        self._set_trainable()
        self.record_populations()
        self.register_load_state_dict_post_hook(_after_loading)

    def _new_block(self, capacities: dict[str, int], **tables: Any) -> LivingMoeBlock:
        config, family = self.config, family_of(self.config.backbone_config)
        scoring = family.scoring(config.backbone_config)
        return LivingMoeBlock(
            config.backbone_config,
            family,
            LAYER,
            capacities,
            scoring=dataclasses.replace(scoring, normalise=scoring.top_k > 1, wide=True),
            router=config.router,
            experts=config.experts,
            trainable=config.trainable,
            vitals=config.vitals,
            escape=config.escape,
            **tables,
        )

    def _choose_implementation(self) -> None:
        """The fastest that the sizes and the dtype allow, where none was asked for."""
        backbone = self.config.backbone_config
        if self._chosen is not None and backbone._experts_implementation == self._chosen:
            weight = next(iter(self.slot_parameters())).parameter
            fits = self.d_model % 8 == self.d_ff % 8 == 0 and weight.dtype != torch.float64
            self._chosen = backbone._experts_implementation = "grouped_mm" if fits else "active"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StandaloneLivingMoe:
        super()._apply(fn, recurse)
        self._choose_implementation()
        return self

    @torch.no_grad()
    def _init_weights(self) -> None:
        for module in self.block.experts.children():
            if isinstance(module, ExpertSlab):
                init_experts(module, self.config.backbone_config.initializer_range, self.config.experts)
        for key in self.block.router.keys.values():
            nn.init.normal_(key, std=self.block.router.d_key**-0.5)

    def _set_trainable(self) -> None:
        """Slabs and keys know by themselves; the rest of the router is as the section `trainable` says."""
        for part in (self.block.router.query, self.block.router.learned_temperature):
            if part is not None:
                part.requires_grad_(self.config.trainable.query_networks)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_ff={self.d_ff}, experts={self.num_experts}, top_k={self.top_k}"

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """(..., d_model) -> the same shape and dtype.

        Args:
            x: Tokens.
            token_mask: Bool, the shape of `x` without its last dimension: False for padding, which is computed and not
                counted. None counts all.

        Raises:
            ConfigurationError: No floating point tensor, another number of features, or a mask of another shape.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
            found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ConfigurationError(f"the input must be a floating point tensor (..., {self.d_model}), got {found}.")
        if x.shape[-1] != self.d_model:
            raise ConfigurationError(f"the input has {x.shape[-1]} features but d_model is {self.d_model}.")
        if token_mask is not None and not isinstance(token_mask, Tensor):
            raise ConfigurationError(f"token_mask must be a bool tensor, got {type(token_mask).__name__}.")
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ConfigurationError(
                f"token_mask has shape {tuple(token_mask.shape)} but there are tokens of shape {tuple(x.shape[:-1])}."
            )
        hidden = x.reshape(1, -1, self.d_model)
        if not hidden.shape[1]:
            # A tensor of its own, on which every parameter depends, as on that of any batch.
            return x + torch.stack([p.flatten()[0].to(x) for p in self.parameters() if p.numel()]).sum()
        mask = None if token_mask is None else token_mask.reshape(1, -1).bool()
        vitals = self.config.vitals
        self.block.context = ForwardContext(
            token_mask=mask,
            observe=self.training,
            sample=self._token_sample(hidden, token_mask, vitals.signals_every, vitals.signal_tokens),
            phi_sample=self._token_sample(hidden, token_mask, vitals.phi_every, vitals.phi_tokens),
            all_logits=False,
        )
        try:
            output: Tensor = self.block(hidden)
        except Exception:
            # What a pass has counted that never came to its end is no evidence. A recomputation counts nothing, and is
            # ended by an error when it has what it is for.
            if not in_backward():
                self.block.vitals.forget()
            raise
        finally:
            # No copy of the module may carry a pass's tensors.
            self.block.context = None
        return output.reshape(x.shape)

    def _token_sample(self, hidden: Tensor, mask: Tensor | None, every: int, tokens: int) -> TokenSample | None:
        """So many tokens to measure something on, in passes of every `every`-th step."""
        if not (self.training and every) or (self.steps_lived + 1) % every:
            return None
        return spread(hidden.shape[1], tokens, None if mask is None else mask.reshape(-1).bool(), hidden.device)

    # -- what the lifecycle asks of a model ------------------------------------------------------------------------

    @property
    def base_model(self) -> StandaloneLivingMoe:
        """Who holds steps and lineage: the block itself."""
        return self

    @property
    def living_blocks(self) -> list[LivingMoeBlock]:  # type: ignore[override]
        return [self.block]

    def deltas(self) -> list[FieldDelta]:
        return []

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def d_model(self) -> int:
        return self.block.router.hidden_size

    @property
    def d_ff(self) -> int:
        return self.block.experts.intermediate_size

    @property
    def top_k(self) -> int:
        return self.block.router.scoring.top_k

    @property
    def num_experts(self) -> int:
        """Alive experts. (`expert_counts` is, as for any living model, a list: of this one number.)"""
        return len(self.block.population.members)

    def expert_uids(self) -> list[int]:  # type: ignore[override]
        """Uids of the alive experts, in slot order."""
        return super().expert_uids(LAYER)

    def vitals(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Measurements of the alive experts, each (E,) in slot order; see `LifecycleMixin.vitals`."""
        return super().vitals(LAYER)

    def vitality(self) -> Tensor:  # type: ignore[override]
        """Vitality of the alive experts, fp32 (E,) in slot order; 1.0 is like any other."""
        return super().vitality(LAYER)

    def health(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Health of the alive experts and its factors; see `LifecycleMixin.health`."""
        return super().health(LAYER)

    def phi(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Whether the experts are different functions that work together; see `LifecycleMixin.phi`."""
        return super().phi(LAYER)

    def escape_state(self) -> str:  # type: ignore[override]
        """Whether the block works in another space: closed, open, or leaving."""
        return super().escape_state(LAYER)

    def routing(self) -> dict[str, Tensor]:  # type: ignore[override]
        """`density` and `entropy` of the routing; see `LifecycleMixin.routing`."""
        return super().routing(LAYER)

    # -- events ----------------------------------------------------------------------------------------------------

    def split_expert(  # type: ignore[override]
        self, uid: int, *, noise_std: float = 0.0, optimizer: Optimizer | None = None
    ) -> LifecycleEvent:
        """Give an expert a newborn that takes over part of its tokens. Outputs are unchanged at `noise_std` 0.

        Errors as `LifecycleMixin.split_expert`, for this and the other events.
        """
        return super().split_expert(LAYER, uid, noise_std=noise_std, optimizer=optimizer)

    def merge_experts(  # type: ignore[override]
        self, uids: Sequence[int], *, tier_up: bool = False, optimizer: Optimizer | None = None
    ) -> LifecycleEvent:
        """Make one expert of several, weighted by load."""
        return super().merge_experts(LAYER, uids, tier_up=tier_up, optimizer=optimizer)

    def remove_expert(self, uid: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:  # type: ignore[override]
        """Death of an expert. Exact if it serves no token."""
        return super().remove_expert(LAYER, uid, optimizer=optimizer)

    def freeze_expert(self, uid: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:  # type: ignore[override]
        """Move an expert to the frozen slab: it keeps serving, and never changes again until thawed."""
        return super().freeze_expert(LAYER, uid, optimizer=optimizer)

    def thaw_expert(self, uid: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:  # type: ignore[override]
        """Move an expert to the trainable slab."""
        return super().thaw_expert(LAYER, uid, optimizer=optimizer)

    def part_clade(self, uid: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:  # type: ignore[override]
        """End the clade of an expert: its members compete for places from then on. Not exact."""
        return super().part_clade(LAYER, uid, optimizer=optimizer)

    def open_escape(self, *, optimizer: Optimizer | None = None) -> LifecycleEvent:  # type: ignore[override]
        """Enter the other space of the section `escape`, through a gate of zero: no output changes."""
        return super().open_escape(LAYER, optimizer=optimizer)

    def leave_escape(self) -> LifecycleEvent:  # type: ignore[override]
        """Leave it: the gate fades out over `escape.leave_steps` lifecycle steps."""
        return super().leave_escape(LAYER)

    def lifecycle_step(
        self, optimizer: Optimizer | None = None, loss: Tensor | float | None = None
    ) -> list[LifecycleEvent]:
        """Live one optimizer step: fold vitals, and at decision steps let the policy change the population.

        Call it on every rank after every `optimizer.step()`, before gradients are zeroed.

        Args:
            optimizer: The one that trains this block (and whatever else); its state follows the experts.
            loss: Of this step, one number, on this rank. Without it `lifecycle.cap_improvement` has nothing to go by,
                and drift is watched for in routing alone. One on an accelerator is waited for.

        Returns:
            The events that happened, in order; empty on most steps.

        Raises:
            TrainingDivergedError: The loss is nan or infinite, on any rank.
            ConfigurationError: The loss is not one number; unknown `lifecycle.policy`.
            OptimizerError: The optimizer is unsupported, or was built before a slab grew. In all of these cases
                nothing of the step has happened.
        """
        self._require_ready(optimizer)
        self._observe_loss(loss)
        return super().lifecycle_step(optimizer)

    def execute_systemic_lifecycle(
        self, optimizer: Optimizer | None = None, loss: Tensor | float | None = None
    ) -> tuple[list[int], list[int]]:
        """The call of those who come from `OuroborosMoELayer`: one decision, now; who died and who was born.

        To be called now and then in place of `lifecycle_step`, before gradients are zeroed: each call reads them. A
        call is one step of the block's clock: ages, cooldown and patience count calls, and neither
        `lifecycle.warmup_steps` nor `interval` delays the decision. Who had no token since the last call is not judged.

        Returns:
            dead, born: Uids. Of a merge all but the survivor are dead.

        Raises:
            As `lifecycle_step`; `PopulationError` where the lifecycle is not enabled.
        """
        if not self.config.lifecycle.enabled:
            raise PopulationError("lifecycle.enabled is False, so there is no decision to make; set it to True.")
        self._require_ready(optimizer)
        self._observe_loss(loss)
        self._live_a_step(reads=True)
        # Every call decides: what held for an interval held for one call.
        config = dataclasses.replace(self.config.lifecycle, interval=1)
        events = self._step_escapes(optimizer) + self._decide(optimizer, config)
        dead = [uid for e in events if e.kind in ("death", "merge") for uid in e.parents if uid not in e.children]
        return dead, [uid for e in events if e.kind == "split" for uid in e.children]

    def _observe_loss(self, loss: Tensor | float | None) -> None:
        told = torch.zeros(()) if loss is None else self._number(loss)
        finite = told.isfinite()
        # All ranks refuse together: one that went on would wait for the others for ever.
        others = sum_over_ranks((~finite).to(self.clock.steps)) if world_size() > 1 else ~finite
        if bool(others):
            found = "not finite on another rank" if bool(finite) else f"{float(told)}"
            raise TrainingDivergedError(
                f"the loss is {found} at step {self.steps_lived + 1}; training has diverged. Nothing of the step was "
                f"taken. For a step that a gradient scaler skips, leave loss out."
            )
        if loss is not None:
            self.drift.observe_loss(told)

    @staticmethod
    def _number(loss: Tensor | float) -> Tensor:
        """A told loss, 0-dim fp32."""
        if not isinstance(loss, Tensor | Real) or isinstance(loss, bool) or torch.as_tensor(loss).is_complex():
            raise ConfigurationError(f"the loss is {loss!r}; give one number, or a tensor of one.")
        told = torch.as_tensor(loss).detach().float()
        if told.numel() != 1:
            raise ConfigurationError(f"the loss has shape {tuple(told.shape)}; give one number, such as loss.mean().")
        return told.reshape(())

    # -- state dict ------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The lineage, JSON in a uint8 tensor."""
        records = [event.to_dict() for event in self.lineage_]
        return torch.frombuffer(bytearray(json.dumps(records).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.lineage_ = _lineage_of(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take the sizes of the state first. All of it is checked before anything changes, so that an error leaves
        this block as it was.

        Raises:
            CheckpointError: The state is not one of such a block, or not of a population.
        """
        incoming = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
        if incoming:
            self._check_state(incoming)
            before = {id(slot.parameter) for slot in self.slot_parameters()}
            retired = adopt_sizes(self.block, f"{prefix}block.", state_dict)
            retire(retired)
            new = [slot.parameter for slot in self.slot_parameters() if id(slot.parameter) not in before]
            require_optimizer(self, new)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_state(self, incoming: Mapping[str, Any]) -> None:
        """Compare a state with that of a block of the sizes it claims to have, and its tables with what holds of any
        population.
        """
        tables = {name.removeprefix("block.population."): value for name, value in incoming.items()}
        wanted = ("slab_sizes", "facet_offset", "leaf_uid", "tombstone_bias")
        if missing := [f"block.population.{name}" for name in wanted if not isinstance(tables.get(name), Tensor)]:
            raise CheckpointError(
                f"this state dict has no {', '.join(missing)}: it is not of a standalone living block, or incomplete."
            )
        sizes = tables["slab_sizes"].flatten().tolist()
        if len(sizes) != len(SLABS) or min(sizes) < 0 or not sum(sizes):
            raise CheckpointError(f"block.population.slab_sizes is {sizes}: not sizes of the slabs {list(SLABS)}.")
        capacities = {slab: int(size) for slab, size in zip(SLABS, sizes, strict=True) if size}
        facets, leaves, tombstones = (len(tables[name].reshape(-1)) for name in wanted[1:])
        counts = {"num_facets": facets, "num_leaves": leaves, "num_tombstones": tombstones}
        with torch.device("meta"):
            like = self._new_block(capacities, **counts)
        expected = {f"block.{name}": value for name, value in like.state_dict().items()}
        for name in ("clock", "drift", "trend", "stagnation"):
            if (part := getattr(self, name)) is not None:
                expected |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        problems = [f"missing {name}" for name in expected if name not in incoming]
        problems += [f"unexpected {name}" for name in incoming if name not in expected and name != EXTRA]
        problems += [f"missing {EXTRA}"] if EXTRA not in incoming else []
        for name, value in expected.items():
            if name not in incoming:
                continue
            given = incoming[name]
            if not isinstance(given, Tensor):
                problems.append(f"{name} is a {type(given).__name__}, expected a tensor")
            elif given.shape != value.shape or given.is_floating_point() != value.is_floating_point():
                problems.append(f"{name} is {given.dtype} {tuple(given.shape)}, expected {tuple(value.shape)}")
        if problems:
            raise CheckpointError(
                f"the state does not fit a block of d_model {self.d_model}, d_ff {self.d_ff} and its own sizes "
                f"{capacities}: {'; '.join(problems[:6])}. It is incomplete, edited, or of another block; build the "
                f"block with the same arguments."
            )
        population = Population(
            capacities,
            self.d_model,
            key_size=self.block.router.d_key,
            num_groups=self.block.population.num_groups,
            **counts,
        )
        names = population.state_dict()
        population.load_state_dict({name: tables[name] for name in names})
        check_population(population, LAYER, self.top_k)
        if self.block.escape is not None:
            Now.of(*(incoming[f"block.escape.{name}"] for name in Now._fields))
        _lineage_of(incoming[EXTRA])


def _lineage_of(state: Any) -> Lineage:
    """The lineage in an extra state.

    Raises:
        CheckpointError: There is none.
    """
    try:
        records = json.loads(bytes(state.to(torch.uint8).flatten().tolist()))
        return Lineage(LifecycleEvent.from_dict(record) for record in records)
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{EXTRA} of this state is no lineage: {error}.") from error


def _after_loading(module: nn.Module, _: Any) -> None:
    """Forget what was derived from, or observed of, the population before."""
    assert isinstance(module, StandaloneLivingMoe)
    module.block.population.stale()
    module.block.vitals.forget()
    module._steps = None
    module._choose_implementation()
    module.drift.take()
    module.record_populations()


class LivingParts:
    """The standalone blocks in some model, as `LivingAdamW` asks of one living model: the blocks are its layers.

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def parts(self) -> list[StandaloneLivingMoe]:
        return [module for module in self.model.modules() if isinstance(module, StandaloneLivingMoe)]

    def counts_tokens(self, layer: int) -> bool:
        return self.parts[layer].training

    @property
    def population_version(self) -> int:
        return sum(part.population_version for part in self.parts)

    def slot_parameters(self) -> list[SlotParameter]:
        return [
            dataclasses.replace(slot, layer=number)
            for number, part in enumerate(self.parts)
            for slot in part.slot_parameters()
        ]

    def take_step_tokens(self) -> dict[tuple[int, str], Tensor]:
        return {
            (number, slab): tokens
            for number, part in enumerate(self.parts)
            for (_, slab), tokens in part.take_step_tokens().items()
        }

    def field_parameters(self) -> list[tuple[int, nn.Parameter]]:
        return []

    def take_step_fields(self) -> Tensor | None:
        return None

    def require_unpacked(self) -> None:
        for part in self.parts:
            part.require_unpacked()

    def modules(self) -> Iterator[nn.Module]:
        return self.model.modules()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()


__all__ = ["LivingParts", "StandaloneLivingMoe"]
