"""Apply one change to everything that has a row per slot: weights, keys, tables, vitals, gradients, optimizer state.

A `LayerDraft` is the layer as it will be: per slab, the list of its experts and where each one's row comes from.
`stage` computes every new tensor; the function it returns commits them by assignment and in-place row copies. An
error before the commit leaves model and optimizer untouched. Decides nothing: what to change is `operations.py`'s.

C capacity, H hidden, I intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from living_moe.configuration.errors import OptimizerError, PopulationError
from living_moe.configuration.sections import ExpertsConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.population import SLABS, IdentityTable, Leaf
from living_moe.modeling_living_moe.vitals import VitalsTable

IDENTITY = ("uid", "clade", "field", "group", "parent", "born")


@dataclass(frozen=True)
class RowSource:
    """Where (part of) a new row's contents come from. `neurons_I` reorders hidden units before averaging."""

    slab: str
    row: int
    weight: float = 1.0
    neurons_I: Tensor | None = field(default=None, compare=False)


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
        role: gate_up_proj | down_proj | key.
    """

    layer: int
    slab: str
    role: str
    old: nn.Parameter | None
    new: nn.Parameter | None
    siblings: dict[str, nn.Parameter]
    edit: SlabEdit


#: Stages the optimizer's part of an edit and returns its commit. Registered by `living_moe.training`.
OptimizerSurgeon = Callable[[Optimizer, nn.Module, Sequence[ParameterEdit]], Callable[[], None]]
_surgeon: OptimizerSurgeon | None = None


def set_optimizer_surgeon(surgeon: OptimizerSurgeon) -> None:
    """Tell events how to change an optimizer (this room must not import the training room)."""
    global _surgeon
    _surgeon = surgeon


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
        """Uids per (clade, field)."""
        cells: dict[tuple[int, int], list[int]] = {}
        for rows in self.slabs.values():
            for row in rows:
                cells.setdefault((row.clade, row.field), []).append(row.uid)
        return list(cells.values())

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
        commits = [self._stage_tables(edits), self._stage_leaves()]
        parameters, commit_parameters = self._stage_parameters(edits)
        commits.append(commit_parameters)
        if optimizer is not None:
            if _surgeon is None:
                raise OptimizerError("no optimizer surgery is registered; import living_moe.training first.")
            commits.append(_surgeon(optimizer, model, parameters))
        else:
            commits.append(lambda: retire([p.old for p in parameters if p.old is not None and p.old is not p.new]))

        place = {row.uid: number for number, row in enumerate(row for name in SLABS for row in self.slabs[name])}
        new_index = [place.get(member.uid, -1) for member in block.population.members]

        def commit() -> None:
            for step in commits:
                step()
            block.population.stale()
            block.vitals.follow(new_index, len(place))

        return commit

    # -- parameters ------------------------------------------------------------------------------------------------

    def _stage_parameters(self, edits: dict[str, SlabEdit]) -> tuple[list[ParameterEdit], Callable[[], None]]:
        block = self.block
        old = {(p.slab, p.role): p.parameter for p in block.slot_parameters()}
        staged: list[ParameterEdit] = []
        commits: list[Callable[[], None]] = []
        for slab, edit in edits.items():
            new: dict[str, nn.Parameter] = {}
            for role in ("gate_up_proj", "down_proj", "key"):
                siblings = {s: p for (s, r), p in old.items() if r == role}
                values = {n: self._row_value(siblings, role, slab, n) for n in edit.rows}
                before = siblings.get(slab)
                if edit.capacity_after == edit.capacity_before:
                    assert before is not None
                    new[role] = before
                    commits.append(_writer(before, values, self._moved_gradients(siblings, slab, edit)))
                elif edit.capacity_after:
                    new[role] = self._resized(siblings, role, slab, edit, values)
                staged.append(ParameterEdit(block.layer, slab, role, before, new.get(role), siblings, edit))
            if edit.capacity_after != edit.capacity_before:
                commits.append(lambda slab=slab, new=new, edit=edit: self._replace(slab, new, edit))  # type: ignore[misc]
        return staged, lambda: [commit() for commit in commits] and None

    def _row_value(self, siblings: dict[str, nn.Parameter], role: str, slab: str, number: int) -> Tensor | None:
        """Contents of a new row, or None for a cleared one."""
        if number >= len(self.slabs[slab]):
            return None
        row = self.slabs[slab][number]
        parts = [(_reorder(siblings[s.slab].detach()[s.row], role, s.neurons_I), s.weight) for s in row.sources]
        value = parts[0][0].clone() if len(parts) == 1 else sum(part * weight for part, weight in parts)
        assert isinstance(value, Tensor)
        if row.noise_std and role != "key":
            # Seeded on the CPU, so that every rank and every device draws the same noise.
            generator = torch.Generator().manual_seed(row.noise_seed * 2 + (role == "down_proj"))
            noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            value += noise * (row.noise_std * value.float().square().mean().sqrt().to(value.dtype))
        return value

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
        model_row = before if before is not None else next(iter(siblings.values()))
        data = model_row.new_zeros((edit.capacity_after, *model_row.shape[1:]), requires_grad=False)
        kept = min(edit.capacity_before, edit.capacity_after)
        grad = None
        with torch.no_grad():
            if before is not None:
                data[:kept] = before[:kept]
                if before.grad is not None:
                    grad = torch.zeros_like(data)
                    grad[:kept] = before.grad[:kept]
            for number, value in values.items():
                data[number] = 0 if value is None else value
            if grad is not None:
                for number, moved in self._moved_gradients(siblings, slab, edit).items():
                    grad[number] = 0 if moved is None else moved
        trainable = slab != "frozen" or (role == "key" and self.block.router.train_frozen_keys)
        parameter = nn.Parameter(data, requires_grad=trainable)
        if trainable:
            parameter.grad = grad
        return parameter

    def _replace(self, slab: str, new: dict[str, nn.Parameter], edit: SlabEdit) -> None:
        pool, router = self.block.experts, self.block.router
        if not edit.capacity_after:
            del pool._modules[slab]
            del router.keys[slab]
            return
        if slab in pool._modules:
            module = pool.slab(slab)
        else:
            with torch.device("meta"):
                module = pool.new_slab(slab, edit.capacity_after)
            module.train(pool.training)
            pool.add_module(slab, module)
        module.num_experts = edit.capacity_after
        module.gate_up_proj, module.down_proj = new["gate_up_proj"], new["down_proj"]
        router.keys[slab] = new["key"]

    # -- tables ----------------------------------------------------------------------------------------------------

    def _stage_tables(self, edits: dict[str, SlabEdit]) -> Callable[[], None]:
        block = self.block
        device = block.population.next_uid.device
        identity: dict[str, IdentityTable] = {}
        vitals: dict[str, VitalsTable] = {}
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
            for number, row in enumerate(rows):
                identity[slab].bias[number] = sum(old_identity[s.slab].bias[s.row] * s.weight for s in row.sources)
                _live_on(vitals[slab], number, row, old_vitals)

        def commit() -> None:
            for slab, edit in edits.items():
                for owner, tables in ((block.population, identity), (block.vitals, vitals)):
                    if not edit.capacity_after:
                        del owner._modules[slab]
                    else:
                        owner.add_module(slab, tables[slab])
            block.population.next_uid.fill_(self.next_uid)

        return commit

    def _stage_leaves(self) -> Callable[[], None]:
        leaves, normals, offsets = self.leaves, self.normals, self.offsets
        if leaves == self.block.population.leaves:
            return lambda: None
        return lambda: self.block.population.write_leaves(leaves, normals, offsets)


def _live_on(table: VitalsTable, number: int, row: DraftRow, old: dict[str, VitalsTable]) -> None:
    """Vitals of one expert after the event: moved, halved between parent and newborn, or summed."""
    for name in VitalsTable.columns:
        column = getattr(table, name)
        values = [getattr(old[s.slab], name)[s.row] for s in row.sources]
        if row.life == "same":
            column[number] = values[0]
        elif name in ("overloaded", "starved"):
            column[number] = 0
        elif row.life == "merged":
            shared = name in ("load", "foreign_load", "tokens")
            column[number] = sum(values) if shared else max(values)
        elif name in ("age", "tokens"):
            column[number] = 0 if row.life == "newborn" else values[0]
        elif name == "load":
            column[number] = values[0] * row.load_share
        elif name == "foreign_load":
            # The newborn now meets the demand its parent could not.
            column[number] = 0
        else:
            column[number] = values[0]


def _reorder(row: Tensor, role: str, neurons_I: Tensor | None) -> Tensor:
    """One expert's tensor with its hidden units in another order."""
    if neurons_I is None or role == "key":
        return row
    if role == "down_proj":
        return row[:, neurons_I]
    gate, up = row.chunk(2, dim=0)
    return torch.cat([gate[neurons_I], up[neurons_I]])


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


def retire(parameters: Sequence[nn.Parameter]) -> None:
    """Remember parameters that left the model unseen by any optimizer; a step on one of them is then an error.

    Without this an optimizer built before a slab grew would train tensors nobody reads, and say nothing.
    """
    global _guarded
    for parameter in parameters:
        parameter._living_moe_retired = True  # type: ignore[attr-defined]
    if parameters and not _guarded:
        register_optimizer_step_pre_hook(_refuse_retired)
        _guarded = True


def _refuse_retired(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, "_living_moe_retired", False):
                raise OptimizerError(
                    f"this {type(optimizer).__name__} was built before a slab changed its capacity: it holds a tensor of "
                    f"shape {tuple(parameter.shape)} that is no longer in the model. Pass optimizer= to the event, or "
                    f"build the optimizer anew."
                )


__all__ = [
    "DraftRow",
    "LayerDraft",
    "OptimizerSurgeon",
    "ParameterEdit",
    "RowSource",
    "SlabEdit",
    "set_optimizer_surgeon",
]
