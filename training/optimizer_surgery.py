"""The rows of an optimizer's state follow their experts through every event.

An event edits some slot parameters (`ParameterEdit`). Each edit is checked against the optimizer, staged, and committed
after the model's own part: param groups keep their identity, hyperparameters and order, a replaced parameter takes its
predecessor's place, and the rows of all moments go where their experts went. Knows the states of AdamW (Loshchilov &
Hutter 2019, arXiv:1711.05101), SGD and Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) and refuses any other: a
wrong guess would train on in silence. Never steps, changes no learning rate, and decides nothing about experts.

What a row of a slab gets:

- An expert that moved, and a newborn, have the moments of the row they come from.
- A merge averages moments by the event's weights, hidden units matched as the weights are. A source without moments (a
  frozen expert) counts as zero in first moments; second moments are averaged over the others, so that no step becomes
  longer than theirs.
- A merge into a wider tier lays moments beside each other as the hidden units; the units that are left over have zero
  first moments, and the mean of the others' second moments.
- A row without inheritance (thawed, or child of a frozen parent) has zero first moments. Where the slots share one step
  count, which no longer corrects for a cold start, its second moments are the mean of the slab's other experts: with
  zeros its first update would be (1 - b1) / sqrt(1 - b2) = 3.2 times too long. With a count per slot (`LivingAdamW`) it
  starts at step 0 with zeros; a merge takes the largest count.
- The dead leave zeros. A slab that goes takes its state along; parameters without gradient leave the optimizer.

C slots of a slab, H hidden, I intermediate.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from living_moe.configuration.errors import OptimizerError
from living_moe.modeling_living_moe.lifecycle.api import LifecycleMixin
from living_moe.modeling_living_moe.lifecycle.surgery import (
    Joining,
    ParameterEdit,
    RowSource,
    is_retired,
    place_units,
)
from living_moe.training.optimizers import LivingAdamW

#: Dimension of a slot parameter that runs over hidden units. gate_up_proj holds them twice: gates, then ups.
NEURON_AXIS = {"gate_up_proj": 1, "down_proj": 2}
#: What `LivingAdamW` tags the param group of each role with (`group["role"]`); other optimizers' groups may be too.
GROUP_ROLE = {"gate_up_proj": "experts", "down_proj": "experts", "key": "keys", "expression": "keys"}


@dataclass(frozen=True)
class StateTensor:
    """How an optimizer lays out one state tensor of a slot parameter.

    Attributes:
        kind: A "first" or "second" moment, or "steps", one count per slot.
        averaged: Dimension of the parameter (negative) the tensor is a mean over; None if it has them all.
        keepdim: Whether that dimension is kept, with size 1.
    """

    kind: Literal["first", "second", "steps"]
    averaged: int | None = None
    keepdim: bool = False

    def axis(self, axis: int, ndim: int) -> int | None:
        """Where dimension `axis` of a parameter of `ndim` dimensions is in this tensor; None if it is not."""
        if self.kind == "steps":
            return axis if axis == 0 else None
        gone = ndim if self.averaged is None else ndim + self.averaged
        if axis == gone:
            return None
        return axis if axis < gone or self.keepdim else axis - 1

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        if self.kind == "steps":
            return tuple(parameter.shape[:1])
        gone = None if self.averaged is None else parameter.ndim + self.averaged
        sizes = [(axis, 1 if axis == gone else size) for axis, size in enumerate(parameter.shape)]
        return tuple(size for axis, size in sizes if axis != gone or self.keepdim)


Layout = Mapping[str, StateTensor]
FIRST, SECOND = StateTensor("first"), StateTensor("second")
ADAM: Layout = {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND}


def known_optimizers() -> dict[type[Optimizer], Layout]:
    """The supported classes and their per-row state; whatever else they keep is a number shared by all slots."""
    known: dict[type[Optimizer], Layout] = {
        LivingAdamW: {**ADAM, "step": StateTensor("steps")},
        torch.optim.AdamW: ADAM,
        torch.optim.Adam: ADAM,
        torch.optim.SGD: {"momentum_buffer": FIRST},
        torch.optim.Adafactor: {
            "row_var": StateTensor("second", averaged=-1, keepdim=True),
            "col_var": StateTensor("second", averaged=-2, keepdim=True),
        },
    }
    # Half a second to import, and imported already wherever such an optimizer exists.
    if adafactor := getattr(sys.modules.get("transformers.optimization"), "Adafactor", None):
        known[adafactor] = {
            "exp_avg": FIRST,
            "exp_avg_sq_row": StateTensor("second", averaged=-1),
            "exp_avg_sq_col": StateTensor("second", averaged=-2),
        }
    return known


def stage_optimizer_edit(
    optimizer: Optimizer, model: nn.Module, edits: Sequence[ParameterEdit], joining: Sequence[Joining] = ()
) -> Callable[[], None]:
    """Check, and compute, an event's part in the optimizer.

    A new slab's parameter joins the group of the nearest layer's parameter of the same role, else the group whose
    `role` is "experts" or "keys" as it is one, else the group with most slot parameters, else the first. Within its
    group it is placed as in `model.parameters()`, so that a saved state loads into an optimizer built anew.

    Args:
        optimizer: A supported optimizer, a subclass of one with the same state, or accelerate's wrapper of one.
        model: The living model itself, before the event.
        edits: What happens to its slot parameters.
        joining: New parameters of no slot, each with an elder whose group it joins; not if the elder is in none.

    Returns:
        The commit, to be called after the model's own; it assigns and copies rows, and cannot fail.

    Raises:
        OptimizerError: The optimizer is unsupported; or it does not hold every trainable slot parameter of the model
            exactly once (it was built before a slab grew); or its state is not the state of its class. Other
            parameters may be left out freely. Nothing has changed then.
    """
    optimizer = unwrapped(optimizer)
    layout = layout_of(optimizer)
    living = cast(LifecycleMixin, model)
    check_membership(optimizer, living)
    for edit in edits:
        check_state(optimizer, edit, layout)
    commits = [_StateEdit(optimizer, edit, layout, living).stage() for edit in edits]
    commits.append(_stage_groups(optimizer, model, edits, joining))

    def commit() -> None:
        for step in commits:
            step()
        assert_partition(optimizer, model)

    return commit


def assert_partition(optimizer: Optimizer, model: nn.Module) -> None:
    """Assert that every trainable slot parameter is in exactly one param group, and nothing of the past in any.

    Args:
        optimizer: As in `stage_optimizer_edit`.
        model: The living model itself, after the event.

    Raises:
        AssertionError: A parameter is missing, held twice, or no longer the model's.
    """
    optimizer = unwrapped(optimizer)
    held = _times_held(optimizer)
    assert all(count == 1 for count in held.values()), "a parameter is in two param groups"
    for slot in cast(LifecycleMixin, model).slot_parameters():
        assert held[slot.parameter] or not slot.parameter.requires_grad, (
            f"layer {slot.layer}: {slot.role} of the {slot.slab} slab is in no param group"
        )
    for parameter in (*held, *optimizer.state):
        assert not is_retired(parameter), f"a replaced parameter {tuple(parameter.shape)} is still in the optimizer"


# -- checks ------------------------------------------------------------------------------------------------------------


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper (known by its attribute, so that accelerate need not be imported)."""
    # A scheduler has an optimizer, too, and is none.
    while isinstance(optimizer, Optimizer) and isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def layout_of(optimizer: Optimizer) -> Layout:
    """The state layout of an optimizer's class.

    Raises:
        OptimizerError: The class is none of the known ones.
    """
    known = known_optimizers()
    for base in type(optimizer).__mro__:
        if base in known:
            return known[base]
    raise OptimizerError(
        f"{type(optimizer).__module__}.{type(optimizer).__qualname__} is not supported: its state could not follow the "
        f"experts. Train with living_moe.training.optimizers.LivingAdamW, torch's AdamW, Adam, SGD or Adafactor, or "
        f"transformers' Adafactor; or leave optimizer= out and build the optimizer anew after the event."
    )


def check_membership(optimizer: Optimizer, model: LifecycleMixin) -> None:
    """Raise `OptimizerError` unless every trainable slot parameter is in exactly one group, and no replaced one."""
    name = type(optimizer).__name__
    held = _times_held(optimizer)
    slots = {s.parameter: f"layer {s.layer}: {s.role} of the {s.slab} slab" for s in model.slot_parameters()}
    for parameter, count in held.items():
        what = slots.get(parameter, f"a parameter of shape {tuple(parameter.shape)}")
        if count > 1:
            raise OptimizerError(f"{what} is in the {name}'s param groups {count} times; give it to one group, once.")
        if is_retired(parameter):
            raise OptimizerError(
                f"this {name} was built before a slab changed its capacity: it holds a tensor of shape "
                f"{tuple(parameter.shape)} that is no longer in the model. Pass optimizer= to every event, or build "
                f"the optimizer anew."
            )
    for parameter, what in slots.items():
        if parameter.requires_grad and not held[parameter]:
            raise OptimizerError(
                f"{what} takes gradients but is in none of the {name}'s param groups: it was built before that slab "
                f"was, or without it. Pass optimizer= to every event, build the optimizer anew, or call "
                f"requires_grad_(False) on what shall not train."
            )


def check_state(optimizer: Optimizer, edit: ParameterEdit, layout: Layout) -> None:
    """Raise `OptimizerError` unless all state of the parameters in an edit is as its class lays it out."""
    for slab, parameter in edit.siblings.items():
        for name, value in (optimizer.state.get(parameter) or {}).items():
            shared = value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, int | float | None)
            if shared and (name not in layout or name == "step" or value is None):
                continue
            if name in layout and isinstance(value, Tensor) and value.shape == layout[name].shape(parameter):
                continue
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
            wanted = f"; expected {layout[name].shape(parameter)}" if name in layout else ", which is unknown"
            raise OptimizerError(
                f"layer {edit.layer}: {type(optimizer).__name__} holds state {name!r} {found} for {edit.role} of the "
                f"{slab} slab {tuple(parameter.shape)}{wanted}. Use the supported class itself, and load only states "
                f"of this population; or leave optimizer= out and build the optimizer anew after the event."
            )


def _times_held(optimizer: Optimizer) -> Counter[nn.Parameter]:
    return Counter(parameter for group in optimizer.param_groups for parameter in group["params"])


# -- state -------------------------------------------------------------------------------------------------------------


class _StateEdit:
    """The optimizer's state of one slot parameter, before and after an edit."""

    def __init__(self, optimizer: Optimizer, edit: ParameterEdit, layout: Layout, model: LifecycleMixin):
        self.all_state, self.edit, self.layout = optimizer.state, edit, layout
        self.states: dict[str, dict[str, Any]] = {
            slab: optimizer.state.get(parameter) or {} for slab, parameter in edit.siblings.items()
        }
        self.before = self.states.get(edit.slab, {})
        #: What the new state is modelled on: the old one, or that of the slab the experts come from.
        self.template = self.before or next(filter(None, self.states.values()), {})
        steps = self.row_layout("step")
        self.steps_per_slot = steps is not None and steps.kind == "steps"
        #: Step counts per slab, read from the device once.
        clocks = self.states.items() if self.steps_per_slot else ()
        self.steps = {slab: state["step"].tolist() for slab, state in clocks if state}
        rows = edit.edit.rows
        alive = model.living_block(edit.layer).population.alive.get(edit.slab, 0)
        #: Per expert alive after the event the sources that have moments.
        self.heirs = {
            row: [source for source in rows.get(row, (RowSource(edit.slab, row),)) if self.has_moments(source)]
            for row in range(edit.edit.capacity_after)
            if rows.get(row, row < alive)
        }

    def row_layout(self, name: str) -> StateTensor | None:
        """Layout of a state tensor that has a row per slot; None for what all slots share."""
        value, layout = self.template.get(name), self.layout.get(name)
        if layout is None or not isinstance(value, Tensor) or value.ndim == 0:
            return None
        return None if layout.axis(0, self._ndim) is None else layout

    @property
    def _ndim(self) -> int:
        return next(iter(self.edit.siblings.values())).ndim

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Of one expert in state entry `name` after the edit; a slab of another width may be the template."""
        assert self.edit.new is not None
        return self.layout[name].shape(self.edit.new)[1:]

    def has_moments(self, source: RowSource) -> bool:
        if not self.states.get(source.slab) or source.weight <= 0:
            return False
        return not self.steps_per_slot or self.steps[source.slab][source.row] > 0

    def stage(self) -> Callable[[], None]:
        old, new = self.edit.old, self.edit.new
        keep = new is not None and new.requires_grad
        if not keep or (not self.before and not any(self.heirs.values())):
            # Without moments there is nothing to carry over: the optimizer makes them at the first step.
            return lambda: self._assign(old, None, None)
        if new is old and self.before:
            names = [name for name in self.before if self.row_layout(name) is not None]
            writes = [(self.before[name], row, value) for name in names for row, value in self._rows(name).items()]
            return lambda: _write_rows(writes)
        after = {name: self._resized(name) for name in self.template}
        return lambda: self._assign(old, new, after)

    def _assign(self, old: nn.Parameter | None, new: nn.Parameter | None, after: dict[str, Any] | None) -> None:
        if old is not None:
            self.all_state.pop(old, None)
        if new is not None:
            self.all_state[new] = after

    def _resized(self, name: str) -> Any:
        """State entry `name` of the new parameter."""
        value, layout = self.template[name], self.row_layout(name)
        if layout is None:
            return value if self.before else copy.deepcopy(value)
        assert self.edit.new is not None
        result = value.new_zeros(layout.shape(self.edit.new))
        if self.before:
            kept = min(self.edit.edit.capacity_before, self.edit.edit.capacity_after)
            result[:kept] = value[:kept]
        for row, contents in self._rows(name).items():
            result[row] = contents
        return result

    def _rows(self, name: str) -> dict[int, Tensor]:
        """New contents of the rows that do not just stay: moved, born, merged, thawed, cleared."""
        rows = dict.fromkeys(self.edit.edit.rows)
        if not self.before:
            rows |= dict.fromkeys(self.heirs)
        values = {row: self._inherited(name, self.heirs[row]) for row in rows if self.heirs.get(row)}
        zero = self.template[name].new_zeros(self.row_shape(name))
        start = zero if self.steps_per_slot or self.layout[name].kind != "second" else None
        for row in rows:
            if row not in self.heirs:
                values[row] = zero
            elif not self.heirs[row]:
                start = self._mean_of_heirs(name, values) if start is None else start
                values[row] = start
        return values

    def _inherited(self, name: str, sources: list[RowSource]) -> Tensor:
        layout = self.layout[name]
        parts = [self._read(name, source) for source in sources]
        if layout.kind == "steps":
            return torch.stack(parts).amax(dim=0)
        total = sum(source.weight for source in sources) if layout.kind == "second" else 1.0
        weights = [source.weight / total for source in sources]
        axis = self._unit_axis(name)
        if axis is not None and any(source.at is not None for source in sources):
            return self._beside_each_other(name, axis, sources, parts)
        if weights == [1.0]:
            return parts[0].clone()
        return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum(dim=0)

    def _unit_axis(self, name: str) -> int | None:
        """Dimension of a state tensor's row that runs over hidden units; None if none does, or it was averaged over."""
        axis = NEURON_AXIS.get(self.edit.role)
        place = None if axis is None else self.layout[name].axis(axis, self._ndim)
        return None if place is None else place - 1

    def _beside_each_other(self, name: str, axis: int, sources: Sequence[RowSource], parts: Sequence[Tensor]) -> Tensor:
        """Moments of hidden units that lie beside each other in a wider row."""
        result = self.template[name].new_zeros(self.row_shape(name))
        if self.layout[name].kind == "second":
            # A step with next to no second moment behind it would be too long, as for rows without inheritance.
            result += torch.cat([part.float() for part in parts], dim=axis).mean(dim=axis, keepdim=True)
        for source, part in zip(sources, parts, strict=True):
            assert source.at is not None
            place_units(result, part, self.edit.role, source.at, axis)
        return result

    def _read(self, name: str, source: RowSource) -> Tensor:
        """A source's row with its hidden units in the order of the expert it goes to."""
        tensor = self.states[source.slab].get(name)
        if tensor is None:
            shape = self.layout[name].shape(self.edit.siblings[source.slab])[1:]
            return self.template[name].new_zeros(shape)
        axis = self._unit_axis(name)
        row: Tensor = tensor[source.row]
        if source.neurons_I is None or axis is None:
            return row
        order = source.neurons_I.to(row.device)
        halves = row.chunk(2, dim=axis) if self.edit.role == "gate_up_proj" else (row,)
        return torch.cat([half.index_select(axis, order) for half in halves], dim=axis)

    def _mean_of_heirs(self, name: str, values: Mapping[int, Tensor]) -> Tensor:
        """Mean over the slab's experts that have moments: `values` where they are new, the old rows elsewhere."""
        stayed = [row for row, sources in self.heirs.items() if sources and row not in self.edit.edit.rows]
        inherited = [values[row] for row, sources in self.heirs.items() if sources and row in values]
        parts = torch.stack(inherited) if inherited else self.template[name].new_zeros(0, *self.row_shape(name))
        if stayed:
            parts = torch.cat([parts, self.before[name][stayed]])
        return parts.float().sum(dim=0).div(max(1, len(parts))).to(parts.dtype)


def _write_rows(writes: list[tuple[Tensor, int, Tensor]]) -> None:
    for tensor, row, value in writes:
        tensor[row] = value


# -- groups ------------------------------------------------------------------------------------------------------------


def _stage_groups(
    optimizer: Optimizer, model: nn.Module, edits: Sequence[ParameterEdit], newcomers: Sequence[Joining]
) -> Callable[[], None]:
    """New members of the param groups; returns what assigns them."""
    replaced: dict[nn.Parameter, nn.Parameter | None] = {}
    joining: list[tuple[nn.Parameter, dict[str, Any]]] = []
    for edit in edits:
        new = edit.new if edit.new is not None and edit.new.requires_grad else None
        if edit.old is not None:
            replaced[edit.old] = new
        elif new is not None:
            joining.append((new, _home(optimizer, cast(LifecycleMixin, model), edit)))
    for new, elder in newcomers:
        homes = [group for group in optimizer.param_groups if any(member is elder for member in group["params"])]
        if homes and new.requires_grad:
            joining.append((new, homes[0]))

    def commit() -> None:
        for group in optimizer.param_groups:
            members = [replaced.get(parameter, parameter) for parameter in group["params"]]
            if "param_names" in group:
                names = zip(members, group["param_names"], strict=True)
                group["param_names"][:] = [name for member, name in names if member is not None]
            group["params"][:] = [member for member in members if member is not None]
        if joining:
            names_now = {parameter: name for name, parameter in model.named_parameters()}
            rank = {parameter: number for number, parameter in enumerate(names_now)}
            for parameter, home in joining:
                _join(home, parameter, names_now.get(parameter, ""), rank)

    return commit


def _home(optimizer: Optimizer, model: LifecycleMixin, edit: ParameterEdit) -> dict[str, Any]:
    """The param group that a new slab's parameter joins; see `stage_optimizer_edit`."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    number_of = {parameter: number for number, group in enumerate(groups) for parameter in group["params"]}
    held = [slot for slot in model.slot_parameters() if slot.parameter in number_of]
    same_role = [slot for slot in held if slot.role == edit.role]
    if same_role:
        return groups[number_of[min(same_role, key=lambda slot: abs(slot.layer - edit.layer)).parameter]]
    for group in groups:
        if group.get("role") == GROUP_ROLE[edit.role]:
            return group
    sizes = Counter(number_of[slot.parameter] for slot in held)
    return groups[max(range(len(groups)), key=lambda number: sizes[number])]


def _join(group: dict[str, Any], parameter: nn.Parameter, name: str, rank: Mapping[nn.Parameter, int]) -> None:
    members = group["params"]
    own = rank.get(parameter, len(rank))
    # Behind the last one before it, if none comes after: what follows there is not the model's.
    earlier = [n for n, other in enumerate(members) if 0 <= rank.get(other, -1) < own]
    later = (n for n, other in enumerate(members) if rank.get(other, -1) > own)
    place = next(later, earlier[-1] + 1 if earlier else len(members))
    members.insert(place, parameter)
    if "param_names" in group:
        group["param_names"].insert(place, name)


__all__ = ["assert_partition", "stage_optimizer_edit"]
