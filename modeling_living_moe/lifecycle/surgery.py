"""Apply one change to everything that has a row per slot: weights, keys, tables, vitals, gradients, optimizer state.

A `LayerDraft` is the layer as it will be: per slab, the list of its experts and where each one's row comes from.
`stage` computes every new tensor; the function it returns commits them by assignment and in-place row copies. An
error before the commit leaves model and optimizer untouched. Decides nothing: what to change is `operations.py`'s.

C capacity, H hidden, I intermediate.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from living_moe.configuration.errors import OptimizerError, PopulationError
from living_moe.configuration.sections import ExpertsConfig
from living_moe.configuration.slabs import SLABS, is_frozen
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.plasticity.state import KeyPlasticity, PlasticityTable
from living_moe.modeling_living_moe.population import IdentityTable, Leaf, RowTable, Tombstone
from living_moe.modeling_living_moe.synapse.postsynaptic import PostsynapticTable, carry_over
from living_moe.modeling_living_moe.ternary import fitted_row, ternary_row
from living_moe.modeling_living_moe.vitals import COUNTED_BY, ECONOMY, VitalsTable

#: Roles of what belongs to an address rather than to a function: no hidden units, no noise, sources of their own.
OF_ADDRESS = ("key", "expression")
IDENTITY = ("uid", "clade", "field", "group", "parent", "born")


@dataclass(frozen=True)
class RowSource:
    """Where (part of) a new row's contents come from.

    Several sources are averaged, their hidden units reordered by `neurons_I` first; or, if they say where (`at`), laid
    beside each other in a wider row, whose function is then the weighted sum of theirs: the weights go to `down_proj`.
    """

    slab: str
    row: int
    weight: float = 1.0
    neurons_I: Tensor | None = field(default=None, compare=False)
    #: Place of the first hidden unit in the wider row.
    at: int | None = None


@dataclass
class DraftRow:
    """One expert of the layer as it will be."""

    uid: int
    clade: int
    field: int
    group: int
    parent: int
    born: int
    sources: tuple[RowSource, ...]
    noise_std: float = 0.0
    noise_seed: int = 0
    life: Literal["same", "parent", "newborn", "merged"] = "same"
    #: Share of the source's load that this expert serves from now on (split only).
    load_share: float = 0.5
    #: Where the key and the selection bias come from, if from elsewhere than the weights.
    key_sources: tuple[RowSource, ...] | None = None
    #: An address the expert takes over instead of its source's.
    address: DraftTombstone | None = None

    def is_still(self, slab: str, number: int) -> bool:
        """Whether the expert stays in its row with all it has."""
        unchanged = self.life == "same" and self.sources == (RowSource(slab, number),)
        return unchanged and self.key_sources is None and self.address is None


@dataclass
class DraftTombstone:
    """An address without an expert of its own, as it will be. `heir` is a uid or NOBODY; `key_H` and the expression
    vector of its synapse, if it has one, are fp32."""

    uid: int
    clade: int
    field: int
    group: int
    heir: int
    key_H: Tensor
    bias: float
    expression_X: Tensor | None = None

    def like(self, key_H: Tensor, bias: float, expression_X: Tensor | None = None) -> bool:
        if self.expression_X is not None and not torch.equal(self.expression_X, _given(expression_X)):
            return False
        return self.bias == bias and torch.equal(self.key_H, key_H)


@dataclass(frozen=True)
class SlabEdit:
    """How one slab's rows change. `rows`: new row -> its sources; an empty tuple clears the row."""

    capacity_before: int
    capacity_after: int
    rows: dict[int, tuple[RowSource, ...]]


@dataclass(frozen=True)
class ParameterEdit:
    """One parameter's share of an edit, as optimizer surgery sees it.

    Attributes:
        old, new: The parameter before and after; the same object if the capacity stays, None where there is none.
        siblings: The old parameters of this role, by slab: what `RowSource.slab` refers to.
        role: gate_up_proj | down_proj | key | expression.
    """

    layer: int
    slab: str
    role: str
    old: nn.Parameter | None
    new: nn.Parameter | None
    siblings: dict[str, nn.Parameter]
    edit: SlabEdit


#: A new parameter that belongs to no slot, and the one whose param group it joins.
Joining = tuple[nn.Parameter, nn.Parameter]


class OptimizerSurgeon(Protocol):
    """Stages the optimizer's part of an event and returns its commit. Registered by `living_moe.training`."""

    def __call__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        edits: Sequence[ParameterEdit],
        joining: Sequence[Joining] = (),
    ) -> Callable[[], None]: ...


_surgeon: OptimizerSurgeon | None = None


def set_optimizer_surgeon(surgeon: OptimizerSurgeon) -> None:
    """Tell events how to change an optimizer (this room must not import the training room)."""
    global _surgeon
    _surgeon = surgeon


def surgeon() -> OptimizerSurgeon:
    """The registered one.

    Raises:
        OptimizerError: None is.
    """
    if _surgeon is None:
        raise OptimizerError("no optimizer surgery is registered; import living_moe first.")
    return _surgeon


def join_optimizer(model: nn.Module, optimizer: Optimizer | None, joining: Sequence[Joining]) -> Callable[[], None]:
    """Stage the entry of new parameters, each beside its elder, into the optimizer; returns the commit.

    Without an optimizer the commit makes it an error that one steps which holds the elders and not them.
    """
    if optimizer is None:
        return lambda: require_optimizer(model, [new for new, _ in joining])
    return surgeon()(optimizer, model, (), joining)


@torch.no_grad()
def forget_state(optimizer: Optimizer | None, module: nn.Module) -> None:
    """Make an optimizer's next step of a module's parameters their first: moments, momenta and step counts of zero."""
    if optimizer is None:
        return
    for parameter in module.parameters():
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[name] = type(value)(0)


class LayerDraft:
    """A layer as it will be after an event, to be changed freely and then staged."""

    def __init__(self, block: LivingMoeBlock, experts: ExpertsConfig):
        self.block = block
        self.settings = experts
        population = block.population
        self.slabs: dict[str, list[DraftRow]] = {name: [] for name in SLABS}
        self._before = {m.uid: (m.clade, m.field, m.group) for m in population.members}
        for m in population.members:
            row = DraftRow(m.uid, m.clade, m.field, m.group, m.parent, m.born, (RowSource(m.slab, m.row),))
            self.slabs[m.slab].append(row)
        self.leaves: list[Leaf] = list(population.leaves)
        self.normals: list[Tensor] = list(population.facet_normal)
        self.offsets: list[float] = population.facet_offset.tolist()
        synapse = block.router.synapse
        expression = [None] * len(population.tombstones) if synapse is None else synapse.tombstones.expression
        self.tombstones = [
            DraftTombstone(t.uid, t.clade, t.field, t.group, t.heir, *address)
            for t, *address in zip(
                population.tombstones,
                population.tombstone_key,
                population.tombstone_bias.tolist(),
                expression,
                strict=True,
            )
        ]
        self.next_uid = int(population.next_uid)

    def find(self, uid: int) -> tuple[str, int]:
        for name, rows in self.slabs.items():
            for number, row in enumerate(rows):
                if row.uid == uid:
                    return name, number
        raise PopulationError(f"uid {uid} is not in this draft.")

    def row(self, uid: int) -> DraftRow:
        slab, number = self.find(uid)
        return self.slabs[slab][number]

    def new_uid(self) -> int:
        self.next_uid += 1
        return self.next_uid - 1

    def take_out(self, uid: int) -> DraftRow:
        """Remove an expert; the slab's last row moves into the hole, so alive rows stay a prefix."""
        slab, number = self.find(uid)
        rows = self.slabs[slab]
        gone, last = rows[number], rows.pop()
        if last is not gone:
            rows[number] = last
        return gone

    def cells(self) -> list[list[int]]:
        """Uids of addresses per (clade, field)."""
        cells: dict[tuple[int, int], list[int]] = {}
        addresses: list[DraftRow | DraftTombstone] = [row for rows in self.slabs.values() for row in rows]
        for address in [*addresses, *self.tombstones]:
            cells.setdefault((address.clade, address.field), []).append(address.uid)
        return list(cells.values())

    def cell(self, clade: int, field: int) -> dict[int, int]:
        """Addresses of one cell and who serves there: uid -> uid of the server, or NOBODY."""
        rows = [row for name in SLABS for row in self.slabs[name]]
        living = {row.uid: row.uid for row in rows if (row.clade, row.field) == (clade, field)}
        return living | {t.uid: t.heir for t in self.tombstones if (t.clade, t.field) == (clade, field)}

    def address(self, uid: int) -> tuple[Tensor, float, Tensor | None]:
        """Key (H,) in fp32, selection bias and expression (X,) of an expert or a tombstone, as before the event."""
        for tombstone in self.tombstones:
            if tombstone.uid == uid:
                return tombstone.key_H, tombstone.bias, tombstone.expression_X
        member = self.block.population.find(uid, self.block.layer)
        key_H = self.block.router.keys[member.slab].detach()[member.row].float().clone()
        synapse = self.block.router.synapse
        vectors = None if synapse is None else synapse.expression[member.slab]
        expression_X = None if vectors is None else vectors.detach()[member.row].float().clone()
        return key_H, float(self.block.population.table(member.slab).bias[member.row]), expression_X

    def capacity_after(self, slab: str) -> int:
        now, wanted = self.block.population.capacity(slab), len(self.slabs[slab])
        if wanted > now:
            return max(wanted, math.ceil(now * self.settings.growth_factor))
        if wanted < self.settings.shrink_below * now or wanted == 0:
            return wanted
        return now

    def edits(self) -> dict[str, SlabEdit]:
        """Per slab that changes, what changes."""
        edits = {}
        for slab, rows in self.slabs.items():
            before, after = self.block.population.capacity(slab), self.capacity_after(slab)
            changed = {n: row.sources for n, row in enumerate(rows) if row.sources != (RowSource(slab, n),)}
            cleared = range(len(rows), min(self.block.population.alive.get(slab, 0), after))
            changed.update(dict.fromkeys(cleared, ()))
            touched = any(
                row.life != "same" or self._before.get(row.uid) != (row.clade, row.field, row.group) for row in rows
            )
            if changed or touched or before != after:
                edits[slab] = SlabEdit(before, after, changed)
        return edits

    def stage(self, model: nn.Module, optimizer: Optimizer | None) -> Callable[[], None]:
        """Compute everything new; the returned function commits it.

        Raises:
            OptimizerError: The optimizer is unsupported or does not hold the model's present parameters.
            PopulationError: PEFT wraps a slab this change would touch.
        """
        edits = self.edits()
        block = self.block
        for slab in edits:
            if block.experts.is_wrapped(slab):
                raise PopulationError(
                    f"layer {block.layer}: slab {slab!r} is wrapped by PEFT (target_parameters), so its experts cannot "
                    f"change; merge the adapter first (merge_and_unload), or target only attention."
                )
        if edits and any(slot.parameter.is_meta for slot in block.slot_parameters()):
            raise PopulationError(
                f"layer {block.layer} is offloaded (device_map), so its experts cannot change; load the model without "
                f"offload."
            )
        commits = [self._stage_tables(edits), self._stage_leaves(), self._stage_tombstones()]
        parameters, commit_parameters = self._stage_parameters(edits)
        commits.append(commit_parameters)
        gone = [p.old for p in parameters if p.old is not None and p.old is not p.new]
        commits.append(lambda: retire(gone))
        if optimizer is not None:
            commits.append(surgeon()(optimizer, model, parameters))
        else:
            new = [p.new for p in parameters if p.new is not None and p.new is not p.old]
            commits.append(lambda: require_optimizer(model, new))
        kept = [p.new for p in parameters if p.new is not None and p.new is p.old and p.edit.rows]
        commits.append(lambda: leave_behind(kept, told=optimizer))

        place = {row.uid: number for number, row in enumerate(row for name in SLABS for row in self.slabs[name])}
        new_index = [place.get(member.uid, -1) for member in block.population.members]

        def commit() -> None:
            for step in commits:
                step()
            block.population.stale(leaves=False)
            block.vitals.follow(new_index, len(place))
            if block.plasticity is not None:
                block.plasticity.follow(new_index)
            if block.postsynaptic is not None:
                block.postsynaptic.forget()

        return commit

    # -- parameters ------------------------------------------------------------------------------------------------

    def row_value(self, role: str, slab: str, number: int) -> Tensor | None:
        """Contents of a row as it will be: (2I, H), (H, I) or a key; None for a cleared one."""
        siblings = {p.slab: p.parameter for p in self.block.slot_parameters() if p.role == role}
        return self._row_value(siblings, role, slab, number)

    def _stage_parameters(self, edits: dict[str, SlabEdit]) -> tuple[list[ParameterEdit], Callable[[], None]]:
        block = self.block
        old = {(p.slab, p.role): p.parameter for p in block.slot_parameters()}
        staged: list[ParameterEdit] = []
        commits: list[Callable[[], None]] = []
        for slab, edit in edits.items():
            new: dict[str, nn.Parameter] = {}
            for role in dict.fromkeys(role for _, role in old):
                siblings = {s: p for (s, r), p in old.items() if r == role}
                values = {n: self._row_value(siblings, role, slab, n) for n in edit.rows}
                before = siblings.get(slab)
                if edit.capacity_after == edit.capacity_before:
                    assert before is not None
                    new[role] = before
                    commits.append(_writer(before, values, self._moved_gradients(siblings, slab, edit)))
                elif edit.capacity_after:
                    new[role] = self._resized(siblings, role, slab, edit, values)
                rows = {n: self._sources(slab, n, role) for n in edit.rows}
                of_role = SlabEdit(edit.capacity_before, edit.capacity_after, rows)
                staged.append(ParameterEdit(block.layer, slab, role, before, new.get(role), siblings, of_role))
            if edit.capacity_after != edit.capacity_before:
                commits.append(lambda slab=slab, new=new, edit=edit: self._replace(slab, new, edit))  # type: ignore[misc]

        def commit_all() -> None:
            for commit in commits:
                commit()

        return staged, commit_all

    def _row_value(self, siblings: dict[str, nn.Parameter], role: str, slab: str, number: int) -> Tensor | None:
        """Contents of a new row, or None for a cleared one."""
        if number >= len(self.slabs[slab]):
            return None
        row = self.slabs[slab][number]
        if role in OF_ADDRESS and row.address is not None:
            own = row.address.key_H if role == "key" else _given(row.address.expression_X)
            return own.to(siblings[row.sources[0].slab].dtype)
        sources = self._sources(slab, number, role)
        merged = row.life == "merged"
        rows = [self._row_of(siblings[s.slab], s, role, folded=merged) for s in sources]
        parts = [(_reorder(part, role, s.neurons_I), s.weight) for part, s in zip(rows, sources, strict=True)]
        if role not in OF_ADDRESS and any(source.at is not None for source in sources):
            return self._beside_each_other(slab, role, row, parts)
        value = parts[0][0].clone() if len(parts) == 1 else sum(part * weight for part, weight in parts)
        assert isinstance(value, Tensor)
        if row.noise_std and role not in OF_ADDRESS:
            value += _noise_like(value, row, role) * (row.noise_std * _rms(value))
        return value

    def _row_of(self, parameter: nn.Parameter, source: RowSource, role: str, *, folded: bool) -> Tensor:
        """A source's row. Latents of a ternary expert stay latents, unless they become part of a wider expert, which
        is to compute what they do: then what they are quantised to. `folded`: with its fast weights in it."""
        row = parameter.detach()[source.row]
        if folded and role == "down_proj" and self.block.postsynaptic is not None:
            return self.block.postsynaptic.folded(source.slab, source.row, row)
        if role in OF_ADDRESS or source.at is None or not self.block.experts.is_ternary(source.slab):
            return row
        return ternary_row(row, role)

    def _beside_each_other(self, slab: str, role: str, row: DraftRow, parts: list[tuple[Tensor, float]]) -> Tensor:
        """A wider row with the hidden units of several. Units left over read at random and write nothing, so they cost
        no function, and learn. A ternary tier has one scale for all units, the best there is."""
        value = parts[0][0].new_zeros(self.block.experts.row_shape(slab, role))
        if role == "gate_up_proj":
            value += _noise_like(value, row, role) * _rms(torch.cat([part for part, _ in parts]))
        for source, (part, weight) in zip(row.sources, parts, strict=True):
            assert source.at is not None
            place_units(value, part if role == "gate_up_proj" else part * weight, role, source.at)
        return fitted_row(value, role) if self.block.experts.is_ternary(slab) else value

    def _sources(self, slab: str, number: int, role: str) -> tuple[RowSource, ...]:
        """Sources of a new row's part of that role; none for a cleared row."""
        if number >= len(self.slabs[slab]):
            return ()
        row = self.slabs[slab][number]
        return row.key_sources if role in OF_ADDRESS and row.key_sources is not None else row.sources

    def _moved_gradients(
        self, siblings: dict[str, nn.Parameter], slab: str, edit: SlabEdit
    ) -> dict[int, Tensor | None]:
        """Accumulated gradients follow experts that only move; a newborn starts without any."""
        gradients: dict[int, Tensor | None] = {}
        for number in edit.rows:
            row = self.slabs[slab][number] if number < len(self.slabs[slab]) else None
            source = row.sources[0] if row is not None and row.life == "same" else None
            grad = siblings[source.slab].grad if source is not None else None
            gradients[number] = grad[source.row].clone() if grad is not None and source is not None else None
        return gradients

    def _resized(
        self,
        siblings: dict[str, nn.Parameter],
        role: str,
        slab: str,
        edit: SlabEdit,
        values: dict[int, Tensor | None],
    ) -> nn.Parameter:
        before = siblings.get(slab)
        like = before if before is not None else next(iter(siblings.values()))
        if before is not None:
            trainable = before.requires_grad
        else:
            trainable = self.block.router.trains(slab, role) if role in OF_ADDRESS else not is_frozen(slab)
        shape = like.shape[1:] if role in OF_ADDRESS else self.block.experts.row_shape(slab, role)
        data = like.new_zeros((edit.capacity_after, *shape), requires_grad=False)
        kept = min(edit.capacity_before, edit.capacity_after)
        old_grad = None if before is None else before.grad
        moved = self._moved_gradients(siblings, slab, edit)
        grad = None
        with torch.no_grad():
            if before is not None:
                data[:kept] = before[:kept]
            for number, value in values.items():
                data[number] = 0 if value is None else value
            if trainable and (old_grad is not None or any(row is not None for row in moved.values())):
                grad = torch.zeros_like(data)
                if old_grad is not None:
                    grad[:kept] = old_grad[:kept]
                for number, row in moved.items():
                    grad[number] = 0 if row is None else row
        parameter = nn.Parameter(data, requires_grad=trainable)
        parameter.grad = grad
        return parameter

    def _replace(self, slab: str, new: dict[str, nn.Parameter], edit: SlabEdit) -> None:
        pool, router = self.block.experts, self.block.router
        if not edit.capacity_after:
            del pool._modules[slab]
            del router.keys[slab]
            if router.synapse is not None:
                del router.synapse.expression[slab]
            return
        if slab in pool._modules:
            module = pool.weights(slab)
        else:
            with torch.device("meta"):
                pool.add_module(slab, pool.new_slab(slab, edit.capacity_after).train(pool.training))
            module = pool.weights(slab)
        module.num_experts = edit.capacity_after
        module.gate_up_proj, module.down_proj = new["gate_up_proj"], new["down_proj"]
        router.keys[slab] = new["key"]
        if router.synapse is not None:
            router.synapse.expression[slab] = new["expression"]

    # -- tables ----------------------------------------------------------------------------------------------------

    def _stage_tables(self, edits: dict[str, SlabEdit]) -> Callable[[], None]:
        block = self.block
        device = block.population.next_uid.device
        identity: dict[str, IdentityTable] = {}
        vitals: dict[str, VitalsTable] = {}
        pasts: dict[str, PlasticityTable] = {}
        fast: dict[str, PostsynapticTable] = {}
        old_identity = {name: block.population.table(name) for name in block.population.slabs}
        old_vitals = {name: block.vitals.table(name) for name in block.population.slabs}
        for slab, edit in edits.items():
            rows = self.slabs[slab]
            if not edit.capacity_after:
                continue
            identity[slab] = IdentityTable(edit.capacity_after).to(device)
            vitals[slab] = VitalsTable(edit.capacity_after).to(device)
            for name in IDENTITY:
                column = torch.tensor([getattr(row, name) for row in rows], dtype=torch.int64)
                getattr(identity[slab], name)[: len(rows)] = column.to(device)
            changed = [n for n, row in enumerate(rows) if not row.is_still(slab, n)]
            # Those that stay where they are, all but a few, in one piece.
            _keep_rows(vitals[slab], old_vitals.get(slab), len(rows))
            if slab in old_identity:
                kept = min(len(rows), edit.capacity_before)
                identity[slab].bias[:kept] = old_identity[slab].bias[:kept]
            for number in changed:
                row = rows[number]
                bias = sum(old_identity[s.slab].bias[s.row] * s.weight for s in self._sources(slab, number, "key"))
                identity[slab].bias[number] = bias if row.address is None else row.address.bias
                _live_on(vitals[slab], number, row, old_vitals)
            if block.plasticity is not None:
                pasts[slab] = PlasticityTable(edit.capacity_after, block.router.d_key).to(device)
                before = block.plasticity.table(slab) if slab in old_identity else None
                _keep_rows(pasts[slab], before, len(rows))
                for number in changed:
                    _inherit(pasts[slab], number, self._sources(slab, number, "key"), block.plasticity)
                    address = rows[number].address
                    if address is not None:
                        pasts[slab].start[number] = address.key_H

            if block.postsynaptic is not None:
                fast[slab] = block.postsynaptic.new_table(slab, edit.capacity_after).to(device)
                for number, row in enumerate(rows):
                    sources = [(block.postsynaptic.table(s.slab), s.row, s.weight) for s in row.sources]
                    carry_over(fast[slab], number, sources, merged=row.life == "merged")

        owners: list[tuple[nn.Module, Mapping[str, RowTable]]] = [(block.population, identity), (block.vitals, vitals)]
        if block.plasticity is not None:
            owners.append((block.plasticity, pasts))
        if block.postsynaptic is not None:
            owners.append((block.postsynaptic, fast))

        def commit() -> None:
            for slab, edit in edits.items():
                for owner, tables in owners:
                    if not edit.capacity_after:
                        del owner._modules[slab]
                    else:
                        owner.add_module(slab, tables[slab])
            block.population.next_uid.fill_(self.next_uid)
            sizes = [block.population.capacity(name) for name in SLABS]
            block.population.slab_sizes.copy_(torch.tensor(sizes))

        return commit

    def _stage_leaves(self) -> Callable[[], None]:
        leaves, normals, offsets = self.leaves, self.normals, self.offsets
        if leaves == self.block.population.leaves:
            return lambda: None
        return lambda: self.block.population.write_leaves(leaves, normals, offsets)

    def _stage_tombstones(self) -> Callable[[], None]:
        drafts = self.tombstones
        places = [Tombstone(t.uid, t.clade, t.field, t.group, t.heir) for t in drafts]
        if places == self.block.population.tombstones:
            return lambda: None
        keys, biases = [t.key_H for t in drafts], [t.bias for t in drafts]
        synapse, population = self.block.router.synapse, self.block.population
        vectors = [] if synapse is None else [_given(t.expression_X) for t in drafts]

        def commit() -> None:
            population.write_tombstones(places, keys, biases)
            if synapse is not None:
                synapse.tombstones.write(vectors)

        return commit


def _given(expression_X: Tensor | None) -> Tensor:
    """The vector of an address in a layer with synapses."""
    assert expression_X is not None
    return expression_X


def _keep_rows(table: nn.Module, before: nn.Module | None, rows: int) -> None:
    """Copy the first rows of every column from the table before, as many as both have and are alive after."""
    for name, column in table.named_buffers():
        if before is not None:
            kept = min(rows, len(before.get_buffer(name)))
            column[:kept] = before.get_buffer(name)[:kept]


def _live_on(table: VitalsTable, number: int, row: DraftRow, old: dict[str, VitalsTable]) -> None:
    """Vitals of one expert after the event: moved, halved between parent and newborn, or summed."""
    for name in VitalsTable.columns:
        column = getattr(table, name)
        values = [getattr(old[s.slab], name)[s.row] for s in row.sources]
        if row.life == "same":
            column[number] = values[0]
        elif name in ("overloaded", "starved", "cannibalised", "idle", "thaw_at"):
            column[number] = 0
        elif row.life == "merged" and name in COUNTED_BY:
            # The mean, weighted like the weights, over those it was ever measured of.
            counts = [getattr(old[s.slab], COUNTED_BY[name])[s.row] for s in row.sources]
            weights = [s.weight * (count > 0) for s, count in zip(row.sources, counts, strict=True)]
            total = sum(value * weight for value, weight in zip(values, weights, strict=True))
            column[number] = total / torch.as_tensor(sum(weights)).clamp_min(1e-12)
        elif row.life == "merged" and name in ECONOMY:
            column[number] = sum(value * s.weight for value, s in zip(values, row.sources, strict=True))
        elif row.life == "merged":
            shared = name in ("load", "foreign_load", "tokens")
            column[number] = sum(values) if shared else max(values)
        elif name == "loss_slow":
            # What rose before the split is its reason, and no reason for the next one.
            column[number] = old[row.sources[0].slab].loss_fast[row.sources[0].row]
        elif name in ("age", "tokens"):
            column[number] = 0 if row.life == "newborn" else values[0]
        elif name in ("load", "grad_norm"):
            column[number] = values[0] * row.load_share
        elif name == "foreign_load":
            # The newborn now meets the demand its parent could not.
            column[number] = 0
        else:
            column[number] = values[0]


def _inherit(table: PlasticityTable, number: int, sources: Sequence[RowSource], old: KeyPlasticity) -> None:
    """The past of a key: its source's; of several, the mean, and the hits together."""
    for name, column in table.named_buffers():
        values = [(getattr(old.table(s.slab), name)[s.row], s.weight) for s in sources]
        column[number] = sum(v if name == "hits" else v * weight for v, weight in values)


def _reorder(row: Tensor, role: str, neurons_I: Tensor | None) -> Tensor:
    """One expert's tensor with its hidden units in another order."""
    if neurons_I is None or role in OF_ADDRESS:
        return row
    if role == "down_proj":
        return row[:, neurons_I]
    gate, up = row.chunk(2, dim=0)
    return torch.cat([gate[neurons_I], up[neurons_I]])


def place_units(row: Tensor, units: Tensor, role: str, at: int, axis: int | None = None) -> None:
    """Write one expert's hidden units into a wider expert's row, from unit `at` on.

    Args:
        row, units: (2I, H) and (2I', H) where `role` is gate_up_proj, (H, I) and (H, I') where it is down_proj; or any
            tensors whose dimension `axis` runs over hidden units.
    """
    axis = (0 if role == "gate_up_proj" else 1) if axis is None else axis
    halves = 2 if role == "gate_up_proj" else 1
    for wide, narrow in zip(row.chunk(halves, dim=axis), units.chunk(halves, dim=axis), strict=True):
        wide.narrow(axis, at, narrow.shape[axis]).copy_(narrow)


def _noise_like(value: Tensor, row: DraftRow, role: str) -> Tensor:
    """Standard normal noise. Seeded on the CPU, so that every rank and every device draws the same."""
    generator = torch.Generator("cpu").manual_seed(row.noise_seed * 2 + (role == "down_proj"))
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32, device="cpu")
    return noise.to(value.device, value.dtype)


def _rms(value: Tensor) -> Tensor:
    return value.float().square().mean().sqrt().to(value.dtype)


def _writer(
    parameter: nn.Parameter, values: dict[int, Tensor | None], gradients: dict[int, Tensor | None]
) -> Callable[[], None]:
    def commit() -> None:
        with torch.no_grad():
            for number, value in values.items():
                parameter[number] = 0 if value is None else value
            if parameter.grad is not None:
                for number, moved in gradients.items():
                    parameter.grad[number] = 0 if moved is None else moved

    return commit


_guarded = False
#: New trainable parameters that no optimizer was told of, each with the model it belongs to.
_unclaimed: list[tuple[weakref.ref[nn.Parameter], weakref.ref[nn.Module]]] = []


def retire(parameters: Sequence[nn.Parameter], *, packed: bool = False) -> None:
    """Remember parameters that left their model; an optimizer's step on one of them is from now on an error.

    Without this an optimizer built before a slab grew (or was packed) would train tensors nobody reads, and say so to
    nobody.
    """
    for parameter in parameters:
        parameter._living_moe_retired = True  # type: ignore[attr-defined]
        parameter._living_moe_packed = packed  # type: ignore[attr-defined]
    if parameters:
        _guard_steps()


#: Optimizers that have stepped; and those among them whose state an event did not follow, with the tensors concerned.
_stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_left_behind: weakref.WeakKeyDictionary[Optimizer, dict[int, weakref.ref[nn.Parameter]]] = weakref.WeakKeyDictionary()
#: Those whose loading of a state is watched.
_watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@register_optimizer_step_post_hook
def _note_step(optimizer: Optimizer, *_: object) -> None:
    _stepped.add(optimizer)


def leave_behind(parameters: Sequence[nn.Parameter], *, told: Optimizer | None) -> None:
    """Remember that rows of these parameters are other experts' now, and that one optimizer at most was told.

    The next step of another that has state for them is an error: an expert would go on with another's moments. A state
    loaded or dropped since is taken to know better.
    """
    # Accelerate's wrapper does not step itself.
    informed = {id(told), id(getattr(told, "optimizer", None))}
    for optimizer in list(_stepped):
        concerned = {id(p): weakref.ref(p) for p in parameters if optimizer.state.get(p)}
        if concerned and id(optimizer) not in informed:
            if optimizer not in _watched:
                optimizer.register_load_state_dict_post_hook(_catch_up)
                _watched.add(optimizer)
            _left_behind[optimizer] = _left_behind.get(optimizer, {}) | concerned
            _guard_steps()


def _catch_up(optimizer: Optimizer) -> None:
    _left_behind.pop(optimizer, None)


def is_retired(parameter: Tensor) -> bool:
    """Whether the parameter was replaced by another or its slab is gone."""
    return getattr(parameter, "_living_moe_retired", False)


def require_optimizer(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Remember new parameters of an event that no optimizer was passed to.

    If an optimizer of the model steps while none holds them, that is an error: they would never train.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    _unclaimed.extend((weakref.ref(parameter), weakref.ref(model)) for parameter in trainable)
    if trainable:
        _guard_steps()


def _guard_steps() -> None:
    global _guarded
    if not _guarded:
        register_optimizer_step_pre_hook(_refuse_stale)
        _guarded = True


def _refuse_stale(optimizer: Optimizer, *_: object) -> None:
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in held.values():
        if getattr(parameter, "_living_moe_packed", False):
            raise PopulationError(
                f"this {type(optimizer).__name__} was built before model.pack_experts(): it holds latents of shape "
                f"{tuple(parameter.shape)} that are no longer in the model. Call model.unpack_experts() and build the "
                f"optimizer anew."
            )
        if is_retired(parameter):
            raise OptimizerError(
                f"this {type(optimizer).__name__} was built before a slab changed its capacity: it holds a tensor of "
                f"shape {tuple(parameter.shape)} that is no longer in the model. Pass optimizer= to the event, or "
                f"build the optimizer anew."
            )
    behind = _left_behind.get(optimizer, {})
    for place, reference in list(behind.items()):
        parameter = reference()
        if parameter is None or place not in held or not optimizer.state.get(parameter):
            del behind[place]
        elif parameter.requires_grad:
            raise OptimizerError(
                f"an event has changed whose rows are whose in a tensor of shape {tuple(parameter.shape)}, and this "
                f"{type(optimizer).__name__} was not told: it would train experts with others' moments. Pass "
                f"optimizer= to every event, or build the optimizer anew."
            )
    if not _unclaimed:
        return
    waiting = []
    for reference, owner in _unclaimed:
        parameter, model = reference(), owner()
        if parameter is None or model is None or is_retired(parameter) or not parameter.requires_grad:
            continue
        if id(parameter) in held:
            continue
        if any(id(other) in held for other in model.parameters()):
            if not _held_by_any_optimizer(parameter):
                raise OptimizerError(
                    f"no optimizer holds the new slab of shape {tuple(parameter.shape)} that an event has made: this "
                    f"{type(optimizer).__name__} was built before. Pass optimizer= to the event, build the optimizer "
                    f"anew, or call requires_grad_(False) on the slab if it shall not train."
                )
            continue
        waiting.append((reference, owner))
    _unclaimed[:] = waiting


def _held_by_any_optimizer(parameter: nn.Parameter) -> bool:
    """Search the process for an optimizer that trains this parameter: some split a model among several.

    Slow (a quarter of a second), but once per slab, and only if the optimizer that steps is not the one.
    """
    optimizers = (thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer))
    return any(
        other is parameter
        for optimizer in optimizers
        for group in optimizer.__dict__.get("param_groups", ())
        for other in group["params"]
    )


__all__ = [
    "DraftRow",
    "LayerDraft",
    "OptimizerSurgeon",
    "ParameterEdit",
    "RowSource",
    "SlabEdit",
    "place_units",
    "set_optimizer_surgeon",
]
