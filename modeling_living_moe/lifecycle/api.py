"""What a model with living layers can do: the public methods around events, vitals and lineage.

Mixed into `LivingMoeModel` and `LivingMoeForCausalLM`; the state (steps, lineage) lives on the base model, so both see
the same life.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from living_moe.configuration.errors import PopulationError
from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.balance import balance_step
from living_moe.modeling_living_moe.block import LivingMoeBlock, SlotParameter
from living_moe.modeling_living_moe.distributed import (
    fingerprint,
    require_agreement,
    sum_over_ranks,
    world_size,
)
from living_moe.modeling_living_moe.drift import NEW_DATA, SELF_PRESERVATION, sums_of
from living_moe.modeling_living_moe.escape.api import EscapeMixin
from living_moe.modeling_living_moe.escape.detector import GRADIENT as GRADIENT_TREND
from living_moe.modeling_living_moe.escape.detector import LOSS as LOSS_TREND
from living_moe.modeling_living_moe.lifecycle import evidence, operations
from living_moe.modeling_living_moe.lifecycle.events import EVERY_LAYER, LifecycleEvent
from living_moe.modeling_living_moe.lifecycle.lineage import Lineage
from living_moe.modeling_living_moe.lifecycle.operations import REQUEST, Reason, Surroundings
from living_moe.modeling_living_moe.lifecycle.planner import LayerState, Proposal, plan
from living_moe.modeling_living_moe.lifecycle.policies import Circumstances, policy_named
from living_moe.modeling_living_moe.lifecycle.policies.health import health_of
from living_moe.modeling_living_moe.lifecycle.surgery import LayerDraft, join_optimizer, surgeon
from living_moe.modeling_living_moe.lifecycle.vitality import vitality_of
from living_moe.modeling_living_moe.phi import measured_experts, phi_of
from living_moe.modeling_living_moe.selection import TopAny
from living_moe.modeling_living_moe.vitals import ECONOMY, PHI, SHOWN

if TYPE_CHECKING:
    from living_moe.modeling_living_moe.modeling_living_moe import LivingMoeModel


class LifecycleMixin(EscapeMixin):
    """Populations, events and vitals of a model with `living_blocks`."""

    config: Any
    living_blocks: list[LivingMoeBlock]
    consolidate_keys: Callable[[], None]
    potentiate_experts: Callable[[], None]

    @property
    def _life(self) -> LivingMoeModel:
        return self.base_model  # type: ignore[attr-defined]

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def expert_counts(self) -> list[int]:
        """Alive experts per living layer."""
        return [len(block.population.members) for block in self.living_blocks]

    @property
    def expert_bytes(self) -> int:
        """Bytes of the weights of all alive experts."""
        return sum(
            count * block.experts.bytes_per_expert(slab)
            for block in self.living_blocks
            for slab, count in block.population.alive.items()
        )

    def expert_uids(self, layer: int) -> list[int]:
        """Uids of a layer's alive experts, in slot order."""
        return self.living_block(layer).population.uids

    def vitals(self, layer: int) -> dict[str, Tensor]:
        """Measurements of a layer's alive experts, each (experts,) in slot order: a copy, on the layer's device.

        load and foreign_load (multiples of the uniform share), router_weight (mean weight per token), grad_norm (L2),
        age (optimizer steps), tokens (received in all), interference (multiples of the expert's own output), loss_fast,
        loss_slow and divergence (nats per token), conflict_cos and conflict_magnitude (of its gradients). What was not
        measured yet is 0. Where routers have synapses also energy (left, in [0, 1]) and depletion (the share of its
        docked vesicles that is gone), means over texts at the ends of chunks; 1 and 0 until measured.
        """
        block = self.living_block(layer)
        alive = block.population.alive.items()
        shown = SHOWN if block.router.synapse is None else SHOWN + ECONOMY
        return {
            name: torch.cat([getattr(block.vitals.table(slab), name)[:count] for slab, count in alive])
            for name in shown
        }

    def vitality(self, layer: int) -> Tensor:
        """How much each of a layer's experts is used and has to learn: moving averages of its shares of load and of
        gradients in multiples of the uniform share (1.0 is like any other), mixed by `lifecycle.vitality_gradient`.
        fp32 (experts,) in slot order, on the layer's device. See lifecycle/vitality.py.
        """
        block = self.living_block(layer)
        values = [each.vitality for each in vitality_of(block, self.config.lifecycle.vitality_gradient)]
        return torch.tensor(values, dtype=torch.float32, device=block.population.next_uid.device)

    def health(self, layer: int) -> dict[str, Tensor]:
        """How healthy a layer's experts are, each fp32 (experts,) in slot order, in [0, 1]: utilisation, energy,
        camkii, maturity, and their product `health`. See lifecycle/policies/health.py.
        """
        block = self.living_block(layer)
        found = health_of(block, self.config.lifecycle)
        device, names = block.population.next_uid.device, ("utilisation", "energy", "camkii", "maturity", "health")
        return {name: torch.tensor([getattr(each, name) for each in found], device=device) for name in names}

    def routing(self, layer: int) -> dict[str, Tensor]:
        """How a layer routes, moving averages, 0-dim: `density`, experts per token; `entropy` of the experts' shares of
        the load, 1.0 when all have the same.
        """
        vitals = self.living_block(layer).vitals
        return {"density": vitals.density.clone(), "entropy": vitals.entropy.clone()}

    def phi(self, layer: int) -> dict[str, Tensor]:
        """Whether a layer's experts are different functions that work together (see phi.py), 0-dim, each in [0, 1].

        `phi`, its factors `differentiation` and `integration`, as measured last (every `vitals.phi_every` steps);
        `phi_level`, the moving average of `phi`, and `phi_peak`, the largest level, both since the layer's last split
        for a collapse, or escape; `phi_record`, the largest level since its last escape. Both are 0 until a level is of
        five measurements, and what was not measured yet is 0.
        """
        vitals = self.living_block(layer).vitals
        return {name: getattr(vitals, name).clone() for name in PHI}

    @property
    def lineage(self) -> Lineage:
        """Every event so far, oldest first."""
        return self._life.lineage_

    @property
    def phase(self) -> str:
        """Phase of the cycle of self-protection (see drift.py): stability, new_data, self_preservation, specialisation,
        consolidation or new_equilibrium.
        """
        return self._life.drift.phase_name

    @property
    def vigilance(self) -> float:
        """What policies divide their thresholds by: `lifecycle.drift_vigilance` in new_data and self_preservation."""
        tight = int(self._life.drift.phase) in (NEW_DATA, SELF_PRESERVATION)
        return self.config.lifecycle.drift_vigilance if tight else 1.0

    def signals(self) -> dict[str, float]:
        """What the whole model shows, one transfer from the device.

        Means over the experts it was measured for: interference, divergence and conflict (cosine of the gradient with
        its running mean). Means over layers: density and entropy, and phi, differentiation and integration over those
        where Φ was measured. Means over the experts whose routers have synapses: energy and depletion (see `vitals`).
        Layers in another space: escaped. The step at which the phase began: phase_since.
        What was not measured yet is left out.
        """
        blocks, device = self.living_blocks, self._life.drift.phase.device
        tables = [(block.vitals.table(slab), n) for block in blocks for slab, n in block.population.alive.items()]

        def column(name: str) -> Tensor:
            return torch.cat([getattr(table, name)[:alive].to(device) for table, alive in tables])

        numbers: dict[str, Tensor] = {}
        for name, shown, known in (
            ("interference", "interference", column("sampled") > 0),
            ("divergence", "divergence", column("credited") > 0),
            ("conflict", "conflict_cos", column("compared") > 1),
        ):
            numbers[name] = (column(shown) * known).sum() / known.sum()
        for name in ("density", "entropy"):
            numbers[name] = torch.stack([getattr(block.vitals, name).to(device) for block in blocks]).mean()
        measured = torch.stack([block.vitals.phi_count.to(device) for block in blocks]) > 0
        for name in ("phi", "differentiation", "integration"):
            layers = torch.stack([getattr(block.vitals, name).to(device) for block in blocks])
            numbers[name] = (layers * measured).sum() / measured.sum()
        if any(block.router.synapse is not None for block in blocks):
            numbers |= {name: column(name).mean() for name in ECONOMY}
        escapes = [block.escape for block in blocks if block.escape is not None]
        if escapes:
            numbers["escaped"] = torch.stack([(escape.state > 0).to(device) for escape in escapes]).sum()
        numbers["phase_since"] = self._life.drift.began
        values = torch.stack([number.float() for number in numbers.values()]).tolist()
        return {name: value for name, value in zip(numbers, values, strict=True) if math.isfinite(value)}

    @property
    def steps_lived(self) -> int:
        """Optimizer steps this model has lived, over all its training runs."""
        life = self._life
        if life._steps is None:
            life._steps = int(life.clock.steps)
        return life._steps

    @property
    def population_version(self) -> int:
        """Changes whenever an event or a load changes any layer's population."""
        fields = self._life.fields
        return sum(block.population.version for block in self.living_blocks) + (0 if fields is None else fields.version)

    def living_block(self, layer: int) -> LivingMoeBlock:
        """The block of a living layer.

        Raises:
            PopulationError: No such layer.
        """
        blocks = self.living_blocks
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < len(blocks):
            raise PopulationError(
                f"layer {layer!r}: this model has living layers 0..{len(blocks) - 1}, and an event stays within one."
            )
        return blocks[layer]

    def require_unpacked(self, layer: int | None = None) -> None:
        """For whoever would change experts, of one layer or of all.

        Raises:
            PopulationError: They are packed.
        """
        for block in self.living_blocks if layer is None else [self.living_block(layer)]:
            if block.experts.packed:
                raise PopulationError(
                    f"layer {block.layer}: the ternary experts are packed (1.6 bits a weight, for inference), so none "
                    f"can change or train; call model.unpack_experts() first."
                )

    def _changeable_block(self, layer: int) -> LivingMoeBlock:
        self.require_unpacked(layer)
        return self.living_block(layer)

    def counts_tokens(self, layer: int) -> bool:
        """Whether forward passes count the tokens of a layer's experts: in training mode they do."""
        return self.living_block(layer).training

    def slot_parameters(self) -> list[SlotParameter]:
        """Every parameter with one row per slot, layer by layer."""
        return [slot for block in self.living_blocks for slot in block.slot_parameters()]

    def field_parameters(self) -> list[tuple[int, nn.Parameter]]:
        """Every parameter that only tokens of one newborn receptive field use, with that field's number."""
        return [
            (field, parameter)
            for delta in self._life.deltas()
            for maps in (delta.down, delta.up)
            for field, parameter in enumerate(maps, start=1)
        ]

    # -- events ----------------------------------------------------------------------------------------------------

    def split_expert(
        self,
        layer: int,
        uid: int,
        *,
        noise_std: float = 0.0,
        field: int | None = None,
        optimizer: Optimizer | None = None,
    ) -> LifecycleEvent:
        """Give an expert a newborn that takes over part of its tokens. Outputs are unchanged at `noise_std` 0.

        Args:
            layer: Living layer, from 0.
            uid: The parent; it lives on. The newborn's uid is the event's child.
            noise_std: Mutation of the newborn's weights, relative to each tensor's RMS.
            field: Receptive field of the newborn of a frozen expert of the root; None is the one its recent tokens were
                in most, else the newest.
            optimizer: Its state follows; needed when a training run goes on after the event.

        Raises:
            UnknownExpertError: No such expert alive.
            PopulationError: `lifecycle.max_experts` or `experts.memory_budget_mib` would be exceeded.
            OptimizerError: The optimizer is unsupported, or was built before a slab grew.

        Like every event: `PopulationError` where the layer's ternary experts are packed.
        """
        if not isinstance(noise_std, Real) or isinstance(noise_std, bool) or not 0 <= noise_std < math.inf:
            raise PopulationError(f"noise_std must be >= 0 and finite, got {noise_std!r}.")
        fields = self._life.fields
        if field is not None and (fields is None or not 1 <= field <= fields.num_fields):
            known = "none" if fields is None else f"1..{fields.num_fields}"
            raise PopulationError(f"field={field!r}: the newborn fields of this model are {known}.")
        return self._split(layer, uid, REQUEST, float(noise_std), optimizer, field)

    def merge_experts(
        self, layer: int, uids: Sequence[int], *, tier_up: bool = False, optimizer: Optimizer | None = None
    ) -> LifecycleEvent:
        """Make one expert of several, weighted by load: by averaging them after matching their hidden units, or, with
        `tier_up` and if their widths differ, by laying these beside each other in a wider one. See `operations.merge`.
        """
        block = self._changeable_block(layer)
        drafted = operations.merge(block, uids, self._surroundings(), REQUEST, tier_up=tier_up)
        return self._happen(drafted, optimizer)

    def remove_expert(self, layer: int, uid: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:
        """Death of an expert. Exact if it serves no token. Raises `PopulationError` below top-k."""
        block = self._changeable_block(layer)
        return self._happen(operations.remove(block, uid, self._surroundings(), REQUEST), optimizer)

    def freeze_expert(self, layer: int, uid: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:
        """Move an expert to the frozen slab: it keeps serving, and never changes again until thawed."""
        block = self._changeable_block(layer)
        return self._happen(operations.freeze(block, uid, self._surroundings(), REQUEST), optimizer)

    def thaw_expert(self, layer: int, uid: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:
        """Move an expert to the trainable slab."""
        block = self._changeable_block(layer)
        return self._happen(operations.thaw(block, uid, self._surroundings(), REQUEST), optimizer)

    def part_clade(self, layer: int, uid: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:
        """End the clade of an expert: its members become clades of their own. Not exact; see `operations.part`."""
        block = self._changeable_block(layer)
        return self._happen(operations.part(block, uid, self._surroundings(), REQUEST), optimizer)

    def open_field(self, *, optimizer: Optimizer | None = None) -> LifecycleEvent:
        """Birth of a receptive field: one more, asleep, with deltas that are zero. No output changes.

        `lifecycle_step` does it when the last field is mature.

        Raises:
            PopulationError: The model has no receptive fields, or `receptive_field.max_fields` already.
            OptimizerError: The optimizer is unsupported, or was built before a slab grew.
        """
        life = self._life
        fields, limit = life.fields, self.config.receptive_field.max_fields
        if fields is None or fields.num_fields >= limit:
            have = "no receptive fields" if fields is None else f"{fields.num_fields} newborn fields, as many as it may"
            raise PopulationError(f"this model has {have}; set receptive_field.enabled and receptive_field.max_fields.")
        number = fields.num_fields + 1
        seed = operations.seed_of(self.config.lifecycle.seed, self.steps_lived, number)
        value, threshold = float(fields.num_tokens()[-1]), float(self.config.receptive_field.field_tokens)
        newborn = [
            (delta, delta.new_field(operations.seed_of(seed, place))) for place, delta in enumerate(life.deltas())
        ]
        joining = [
            (new, old) for delta, maps in newborn for new, old in zip(maps, (delta.down[-1], delta.up[-1]), strict=True)
        ]
        commit = join_optimizer(self, optimizer, joining)  # type: ignore[arg-type]
        for delta, maps in newborn:
            delta.append(*maps)
        commit()
        fields.resize_fields(number)
        event = LifecycleEvent(
            kind="field", step=self.steps_lived, layer=EVERY_LAYER, parents=(), children=(number,), metric="tokens",
            value=value, threshold=threshold, seed=seed,
        )  # fmt: skip
        self.lineage.append(event)
        self.record_populations()
        return event

    def _split(
        self,
        layer: int,
        uid: int,
        reason: Reason,
        noise_std: float,
        optimizer: Optimizer | None,
        field: int | None = None,
    ) -> LifecycleEvent:
        block = self._changeable_block(layer)
        queries, fields = evidence.recent_queries(block, uid)
        drafted = operations.split(
            block,
            uid,
            self._surroundings(),
            reason,
            noise_std=noise_std,
            sample=queries,
            newborn_field=self._field_in_need(fields) if field is None else field,
        )
        return self._happen(drafted, optimizer)

    def _field_in_need(self, fields_S: Tensor | None) -> int:
        """The newborn field most of the sampled tokens were in; the newest that is awake if none was in any."""
        life = self._life
        if life.fields is None:
            return 1
        if fields_S is not None and bool((fields_S > 0).any()):
            return int(fields_S[fields_S > 0].mode().values)
        awake = life.fields.awake.nonzero()[:, 0]
        return int(awake[-1]) + 1 if len(awake) else 1

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            step=self.steps_lived,
            lifecycle=self.config.lifecycle,
            experts=self.config.experts,
            bytes_now=self.expert_bytes,
        )

    def _happen(self, drafted: tuple[LayerDraft, LifecycleEvent], optimizer: Optimizer | None) -> LifecycleEvent:
        """Stage everything, then commit; an error while staging leaves model, optimizer and lineage as they were."""
        draft, event = drafted
        before = draft.block.capacities()
        commit = draft.stage(self, optimizer)  # type: ignore[arg-type]
        commit()
        after = draft.block.capacities()
        for slab in dict.fromkeys((*before, *after)):
            old, new = before.get(slab, 0), after.get(slab, 0)
            if old != new:
                self.lineage.append(
                    LifecycleEvent(
                        kind="grow" if new > old else "shrink",
                        step=event.step,
                        layer=event.layer,
                        parents=(),
                        children=(),
                        metric=f"{slab} slots",
                        value=float(new),
                        threshold=float(old),
                    )
                )
        if event.kind in ("freeze", "thaw"):
            # Only who was frozen to preserve itself has a time to thaw.
            member = draft.block.population.find(event.children[0], event.layer)
            draft.block.vitals.table(member.slab).thaw_at[member.row] = 0
        draft.block.vitals.last_event.fill_(event.step)
        self._life.drift.note(event.kind)
        self.lineage.append(event)
        self.record_populations()
        return event

    def record_populations(self) -> None:
        """Write the present sizes of slabs and facet tables into the config (what `from_pretrained` builds)."""
        populations = []
        for block in self.living_blocks:
            population = block.population
            tables = {
                "facets": len(population.facet_offset),
                "leaves": len(population.leaf_uid),
                "tombstones": len(population.tombstone_bias),
            }
            populations.append(block.capacities() | {name: size for name, size in tables.items() if size})
        self.config.populations = populations
        if self._life.fields is not None:
            self.config.num_fields = self._life.fields.num_fields

    # -- life while training ---------------------------------------------------------------------------------------

    def take_step_tokens(self) -> dict[tuple[int, str], Tensor]:
        """Tokens each slot received since the last call, summed over ranks: (layer, slab) -> int64 (capacity,)."""
        blocks = self.living_blocks
        rows = [
            torch.zeros(len(block.population.members), dtype=torch.int64, device=block.population.next_uid.device)
            if block.vitals.since_step is None
            else block.vitals.since_step
            for block in blocks
        ]
        sums = sum_over_ranks(torch.cat([row.to(rows[0].device) for row in rows])) if world_size() > 1 else None
        tokens: dict[tuple[int, str], Tensor] = {}
        start = 0
        for block, row in zip(blocks, rows, strict=True):
            total = row if sums is None else sums[start : start + len(row)].to(row.device)
            start += len(row)
            first = 0
            for slab, count in block.population.alive.items():
                padded = torch.zeros(block.population.capacity(slab), dtype=torch.int64, device=row.device)
                padded[:count] = total[first : first + count]
                tokens[(block.layer, slab)] = padded
                first += count
            block.vitals.since_step = None
        return tokens

    def take_step_fields(self) -> Tensor | None:
        """Tokens trained in each newborn field since the last call, summed over ranks, int64 (F,); None: no fields."""
        fields = self._life.fields
        if fields is None:
            return None
        tokens = fields.since_step
        fields.since_step = None
        if tokens is None:
            tokens = torch.zeros(fields.num_fields, dtype=torch.int64, device=fields.new_counts.device)
        return sum_over_ranks(tokens)

    def lifecycle_step(self, optimizer: Optimizer | None = None) -> list[LifecycleEvent]:
        """Live one optimizer step: fold vitals, and at decision steps let the policy change populations.

        Call it on every rank after every `optimizer.step()`, before gradients are zeroed.

        Args:
            optimizer: The one that trains this model; its state follows the experts.

        Returns:
            The events that happened, in order; empty on most steps.
        """
        self._require_ready(optimizer)
        self._live_a_step()
        return self._step_escapes(optimizer) + self.decide_events(optimizer)

    def _require_ready(self, optimizer: Optimizer | None) -> None:
        """Refuse what would fail at the first event, before anything of a step has happened.

        Raises:
            ConfigurationError: Unknown `lifecycle.policy`.
            OptimizerError: The optimizer is unsupported, or does not hold what an event would change.
        """
        if not self.config.lifecycle.enabled:
            return
        policy_named(self.config.lifecycle.policy)
        # Nothing to ask again before something has changed.
        asked = None if optimizer is None else (id(optimizer), self.population_version)
        if optimizer is not None and asked != self._life._ready_for:
            surgeon()(optimizer, self, ())  # type: ignore[arg-type]
        self._life._ready_for = asked

    def _live_a_step(self, *, reads: bool = False) -> None:
        """The first half of `lifecycle_step`: vitals (with gradients on any step if `reads`), keys, the clock."""
        life = self._life
        step = self.steps_lived + 1
        self._fold_vitals(step, reads=reads)
        if self.config.plasticity.enabled and self.config.plasticity.training:
            self.consolidate_keys()
        if self.config.synapse.postsynaptic and self.config.synapse.postsynaptic_training:
            self.potentiate_experts()
        life.clock.steps.fill_(step)
        life._steps = step

    def decide_events(self, optimizer: Optimizer | None = None) -> list[LifecycleEvent]:
        """The second half of `lifecycle_step`: on a decision step, births of fields, policy, plan and surgery.

        Apart for those who measure right before and right after events.
        """
        config = self.config.lifecycle
        step = self.steps_lived
        if config.enabled:
            self.require_unpacked()
        if not config.enabled or step < config.warmup_steps or step % config.interval:
            return []
        return self._decide(optimizer, config)

    def _decide(self, optimizer: Optimizer | None, config: LifecycleConfig) -> list[LifecycleEvent]:
        """One decision, whatever the step."""
        step = self.steps_lived
        events: list[LifecycleEvent] = []
        if self._life.fields is not None and self._life.fields.wants_another():
            events.append(self.open_field(optimizer=optimizer))
        propose = policy_named(config.policy)
        blocks = self.living_blocks
        now = self._circumstances()
        proposals = [proposal for block in blocks for proposal in propose(block, config, now)]
        layers = [
            LayerState(
                experts=len(block.population.members),
                top_k=block.router.scoring.top_k,
                steps_since_event=step - int(block.vitals.last_event),
                births={m.uid: (m.parent, step - m.born) for m in block.population.members if m.parent >= 0},
            )
            for block in blocks
        ]
        chosen = plan(proposals, layers, config, self._bytes_left())
        if world_size() > 1:
            require_agreement("the lifecycle plan", fingerprint((), repr(chosen)))
        for proposal in chosen:
            # A bound the planner does not know (expert groups, ...) drops one event, never the run.
            with contextlib.suppress(PopulationError):
                for event in self._carry_out(proposal, optimizer):
                    events.append(event)
        if events and world_size() > 1:
            layers_touched = sorted({event.layer for event in events if event.layer != EVERY_LAYER})
            touched = [self.living_block(layer) for layer in layers_touched]
            rows = [slot.parameter for block in touched for slot in block.slot_parameters()]
            require_agreement("the experts after an event", fingerprint(rows))
        return events

    def _carry_out(self, proposal: Proposal, optimizer: Optimizer | None) -> Iterator[LifecycleEvent]:
        """The events that a proposal stands for, one after the other."""
        block, uid = self._changeable_block(proposal.layer), proposal.uids[0]
        if proposal.kind in ("split", "preserve"):
            yield self._split(proposal.layer, uid, proposal.reason, self.config.lifecycle.noise_std, optimizer)
            if proposal.reason.metric == "phi":
                block.vitals.answer_collapse()
            if proposal.kind == "preserve":
                yield self._happen(operations.freeze(block, uid, self._surroundings(), proposal.reason), optimizer)
                preserver = block.population.find(uid, proposal.layer)
                block.vitals.table(preserver.slab).thaw_at[preserver.row] = proposal.frozen_until
            return
        around = self._surroundings()
        single: dict[str, Callable[..., tuple[LayerDraft, LifecycleEvent]]] = {
            "death": operations.remove,
            "freeze": operations.freeze,
            "thaw": operations.thaw,
            "part": operations.part,
        }
        if proposal.kind == "merge":
            drafted = operations.merge(block, proposal.uids, around, proposal.reason, tier_up=proposal.tier_up)
            yield self._happen(drafted, optimizer)
            return
        yield self._happen(single[proposal.kind](block, uid, around, proposal.reason), optimizer)

    def _circumstances(self) -> Circumstances:
        around, budget = self._surroundings(), self.config.experts.memory_budget_mib
        return Circumstances(
            around,
            vigilance=self.vigilance,
            memory=around.bytes_now / (budget * 2**20) if budget else 0.0,
            choices=functools.cache(evidence.gathered_choices),
            improvement=self._life.trend.improvement() if self.config.lifecycle.cap_improvement is not None else None,
            sample=functools.cache(evidence.gathered_sample),
        )

    def _bytes_left(self) -> int | None:
        budget = self.config.experts.memory_budget_mib
        return None if budget is None else int(budget * 2**20) - self._surroundings().bytes_now

    @torch.no_grad()
    def _fold_vitals(self, step: int, *, reads: bool = False) -> None:
        every, sampling = self.config.vitals.grad_norm_every, self.config.vitals.signals_every
        reads |= bool(every) and step % every == 0
        samples = bool(sampling) and step % sampling == 0
        rate = self.config.router.bias_update_rate
        if (phi_every := self.config.vitals.phi_every) and step % phi_every == 0:
            self._fold_phi()
        seen = evidence.of_step(self.living_blocks, self._life.drift, step, samples=samples)
        self._life.drift.defer(seen)
        self._life.trend.defer(seen.passes)
        stagnation, squares = self._life.stagnation, []
        if stagnation is not None:
            total, passes = sums_of([seen.passes], stagnation.fall.device)[0, :2]
            stagnation.observe(LOSS_TREND, total / passes.clamp_min(1), passes > 0)
        for block, layer in zip(self.living_blocks, seen.layers, strict=True):
            norms, sketches = evidence.gradients(block) if reads else (None, None)
            squares += [norm.square().sum() for norm in (norms or {}).values()]
            block.vitals.fold(
                layer.counts,
                block.population.alive,
                norms,
                tokens=layer.tokens,
                places=layer.places,
                signals=layer.signals,
                sketches=sketches,
                economy=layer.economy,
            )
            if rate:
                balance_step(block.population, layer.counts[0], rate)
            if isinstance(block.router.selection, TopAny):
                tokens = layer.counts[0].sum() / layer.places if layer.tokens is None else layer.tokens
                block.router.selection.steer(layer.counts[0].sum() / tokens.clamp_min(1))
        if stagnation is not None and squares:
            total = torch.stack([square.to(stagnation.fall.device) for square in squares]).sum()
            stagnation.observe(GRADIENT_TREND, total.sqrt())
        if self._life.fields is not None:
            fields = self._life.fields
            fields.fold(sum_over_ranks(fields.pending()))

    def _fold_phi(self) -> None:
        """Φ of the step's sample, of all ranks, by the loads before this step, with which it was taken."""
        taken: list[tuple[LivingMoeBlock, Tensor, Tensor]] = []
        for block in self.living_blocks:
            _, share_M = measured_experts(block.vitals.loads(block.population.alive), block.phi_experts)
            nothing = share_M.new_zeros(len(share_M) ** 2 + 2)
            mine, block.vitals.pending_phi = block.vitals.pending_phi, None
            taken.append((block, nothing if mine is None else mine, share_M))
        device = taken[0][1].device
        sums = sum_over_ranks(torch.cat([mine.to(device) for _, mine, _ in taken]))
        parts = sums.split([len(mine) for _, mine, _ in taken])
        for (block, _, share_M), part in zip(taken, parts, strict=True):
            part = part.to(share_M.device)
            block.vitals.fold_phi(phi_of(part, share_M), part[-1] > 0)


def iter_events(events: Sequence[LifecycleEvent]) -> Iterator[LifecycleEvent]:
    """Events that changed experts, leaving out slab growth and shrinkage, and what blocks did as a whole."""
    return (event for event in events if event.kind not in ("grow", "shrink", "escape", "return"))
