"""Who lives in a layer: slots, uids, clades, fields, and the facets that divide a clade among its members.

A *slab* is a stack of slots; its alive rows are always a prefix. A *clade* is the set of experts that descend from one
root and still share its address in the router. Within a clade, experts of one *field* form a **cell**; a cell's
members divide its tokens by a binary tree of hyperplanes (*facets*), one per split, so exactly one member serves
each token. Reads and writes tables only; weights belong to `experts.py`, keys to `router.py`, and what changes a
population to `lifecycle/`.

C capacity of a slab, E alive experts of the layer, P facets, L leaves, H hidden, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from living_moe.configuration.errors import UnknownExpertError

#: Slabs of a layer in slot order.
SLABS = ("frozen", "trainable")
ROOT_FIELD = 0


class KeepsDtype(nn.Module):
    """A module whose floating buffers keep their dtype under `.to(dtype)`, `.half()`, ...: measurements, not weights."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            # Casts touch floating tensors only, so an integer probe tells where `fn` moves things.
            device = fn(torch.empty(0, dtype=torch.int64, device=tensor.device)).device
            if tensor.is_meta and device.type != "meta":
                return torch.empty_like(tensor, device=device)
            return tensor.to(device)

        return super()._apply(keep_dtype, recurse)


class RowTable(KeepsDtype):
    """Buffers with one row per slot of a slab, all described by `columns`."""

    #: name -> (dtype, value of a free row)
    columns: ClassVar[dict[str, tuple[torch.dtype, float | int]]] = {}

    def __init__(self, capacity: int):
        super().__init__()
        for name, (dtype, fill) in self.columns.items():
            self.register_buffer(name, torch.full((capacity,), fill, dtype=dtype))


class IdentityTable(RowTable):
    """Identity and place of the experts of one slab."""

    columns = {
        "uid": (torch.int64, -1),
        "clade": (torch.int64, -1),
        "field": (torch.int64, ROOT_FIELD),
        "group": (torch.int64, 0),
        "parent": (torch.int64, -1),
        "born": (torch.int64, 0),
        # Selection bias of DeepSeek-V3 (arXiv:2412.19437): added to the score when choosing, never to the weight.
        "bias": (torch.float32, 0.0),
    }
    uid: Tensor
    clade: Tensor
    field: Tensor
    group: Tensor
    parent: Tensor
    born: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Member:
    """One alive expert, as the host sees it. `parent` is -1 for a root; `born` is an optimizer step."""

    uid: int
    clade: int
    field: int
    group: int
    parent: int
    born: int
    slab: str
    row: int
    index: int  # place in slot order


@dataclass(frozen=True, slots=True)
class Leaf:
    """One region of a cell: the facets it lies on and on which side (+1 or -1), root first, and who serves it."""

    uid: int
    path: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class View:
    """How tokens of one field see a layer: its cells in a fixed order, as tensors for the router.

    `sole_N` is the slot-order index of the member of each of N cells (of its first leaf, if it has several).
    For the `shared_N` cells with several leaves: `satisfied_L` leaves are found by `sides_PL`, and `owner_LM` adds
    the index of the satisfied leaf's owner to that cell's column.
    """

    sole_N: Tensor
    is_identity: bool
    group_N: Tensor
    group_members_GM: Tensor | None
    shared_columns_M: Tensor | None
    sides_PL: Tensor | None
    path_length_L: Tensor | None
    owner_LM: Tensor | None


class Population(KeepsDtype):
    """Tables of one living layer.

    Args:
        capacities: Slots per slab, e.g. `{"frozen": 8, "trainable": 3}`; slabs without slots are left out.
        hidden_size: H, length of a facet's normal.
        num_facets, num_leaves: P and L of the checkpoint this layer is built for.
        num_groups: Expert groups of group-limited routing; experts of a new layer fill them evenly.
        alive: How many slots of a new layer hold an expert; all by default. A checkpoint overwrites it.
    """

    def __init__(
        self,
        capacities: dict[str, int],
        hidden_size: int,
        *,
        num_facets: int = 0,
        num_leaves: int = 0,
        num_groups: int = 1,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_groups = num_groups
        #: Changes with every event and every load, so that derived tables know when they are stale.
        self.version = 0
        self._members: list[Member] | None = None
        self._alive: dict[str, int] | None = None
        self._leaves: list[Leaf] | None = None
        self._views: dict[tuple[int, torch.device], View] = {}
        total = sum(capacities.values())
        first = 0
        for name in SLABS:
            if capacity := capacities.get(name, 0):
                table = IdentityTable(capacity)
                table.uid.copy_(torch.arange(first, first + capacity))
                table.clade.copy_(table.uid)
                table.group.copy_(table.uid * num_groups // total)
                self.add_module(name, table)
                first += capacity
        self.register_buffer("next_uid", torch.tensor(total))
        self.register_buffer("facet_normal", torch.zeros(num_facets, hidden_size))
        self.register_buffer("facet_offset", torch.zeros(num_facets))
        self.register_buffer("leaf_uid", torch.zeros(num_leaves, dtype=torch.int64))
        # Signs: +1 or -1 where the leaf lies on that side of the facet, 0 where the facet does not concern it.
        self.register_buffer("leaf_path", torch.zeros(num_leaves, num_facets, dtype=torch.int8))

    next_uid: Tensor
    facet_normal: Tensor
    facet_offset: Tensor
    leaf_uid: Tensor
    leaf_path: Tensor

    # -- reading ---------------------------------------------------------------------------------------------------

    def table(self, slab: str) -> IdentityTable:
        return self.get_submodule(slab)  # type: ignore[return-value]

    @property
    def slabs(self) -> list[str]:
        return [name for name in SLABS if name in self._modules]

    def capacity(self, slab: str) -> int:
        return self.table(slab).uid.numel() if slab in self._modules else 0

    def stale(self) -> None:
        """Forget what was derived from the tables; call after changing them."""
        self.version += 1
        self._members = self._leaves = self._alive = None
        self._views.clear()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.stale()

    @property
    def members(self) -> list[Member]:
        """Alive experts in slot order. Reads the device once per event, never per step."""
        if self._members is None:
            members: list[Member] = []
            for slab in self.slabs:
                table = self.table(slab)
                names = ("uid", "clade", "field", "group", "parent", "born")
                columns = [getattr(table, name).tolist() for name in names]
                for row, values in enumerate(zip(*columns, strict=True)):
                    if values[0] < 0:
                        break
                    members.append(Member(*values, slab, row, len(members)))
            self._members = members
        return self._members

    @property
    def leaves(self) -> list[Leaf]:
        if self._leaves is None:
            self._leaves = [
                Leaf(uid, tuple((facet, side) for facet, side in enumerate(path) if side))
                for uid, path in zip(self.leaf_uid.tolist(), self.leaf_path.tolist(), strict=True)
            ]
        return self._leaves

    @property
    def uids(self) -> list[int]:
        return [member.uid for member in self.members]

    @property
    def alive(self) -> dict[str, int]:
        """Alive rows per slab that has any, in slot order."""
        if self._alive is None:
            counts = {slab: sum(member.slab == slab for member in self.members) for slab in self.slabs}
            self._alive = {slab: count for slab, count in counts.items() if count}
        return self._alive

    @property
    def is_fresh(self) -> bool:
        """Every expert is its own clade in the root field, as right after a graft."""
        return all(m.uid == m.clade and m.field == ROOT_FIELD for m in self.members)

    def find(self, uid: int, layer: int) -> Member:
        """The alive expert with this uid.

        Raises:
            UnknownExpertError: The uid was never given in this layer, or its expert is dead.
        """
        for member in self.members:
            if member.uid == uid:
                return member
        issued = int(self.next_uid)
        fate = (
            "is dead" if isinstance(uid, int) and 0 <= uid < issued else f"never existed (uids so far: 0..{issued - 1})"
        )
        raise UnknownExpertError(f"layer {layer}: expert uid {uid!r} {fate}; alive uids: {self.uids}.")

    def cell(self, member: Member) -> list[Member]:
        """The members that share `member`'s clade and field, itself included."""
        return [other for other in self.members if (other.clade, other.field) == (member.clade, member.field)]

    def clades(self, field: int = ROOT_FIELD) -> list[int]:
        """Clades visible to tokens of `field`, in the order of their first member."""
        return list(dict.fromkeys(m.clade for m in self.members if m.field in (ROOT_FIELD, field)))

    def group_sizes(self, field: int = ROOT_FIELD) -> list[int]:
        """Visible clades per expert group."""
        groups = {m.clade: m.group for m in self.members if m.field in (ROOT_FIELD, field)}
        return [sum(group == g for group in groups.values()) for g in range(self.num_groups)]

    # -- what the router reads -------------------------------------------------------------------------------------

    def visible_cells(self, field: int) -> list[list[Member]]:
        """Per visible clade the members that tokens of `field` may reach: its own field's, else the root field's."""
        cells: dict[int, list[Member]] = {}
        for member in self.members:
            if member.field in (ROOT_FIELD, field):
                cells.setdefault(member.clade, []).append(member)
        return [[m for m in cell if m.field == field] or cell for cell in cells.values()]

    def view(self, field: int, device: torch.device) -> View:
        key = (field, device)
        if key not in self._views:
            self._views[key] = self._build_view(field, device)
        return self._views[key]

    def _build_view(self, field: int, device: torch.device) -> View:
        cells = self.visible_cells(field)
        index_of = {m.uid: m.index for m in self.members}
        sole = [cell[0].index for cell in cells]
        groups = [cell[0].group for cell in cells]
        by_group = [[n for n, group in enumerate(groups) if group == g] for g in range(self.num_groups)]
        widest = max(len(group) for group in by_group)
        padded = [group + [len(cells)] * (widest - len(group)) for group in by_group]

        cell_of = {m.uid: n for n, cell in enumerate(cells) for m in cell}
        leaves = [leaf for leaf in self.leaves if leaf.uid in cell_of]
        shared = list(dict.fromkeys(cell_of[leaf.uid] for leaf in leaves))
        view_leaves: dict[str, Tensor | None] = dict.fromkeys(
            ("shared_columns_M", "sides_PL", "path_length_L", "owner_LM")
        )
        if leaves:
            owner = torch.zeros(len(leaves), len(shared))
            sides = torch.zeros(self.facet_offset.numel(), len(leaves))
            for number, leaf in enumerate(leaves):
                owner[number, shared.index(cell_of[leaf.uid])] = index_of[leaf.uid]
                for facet, side in leaf.path:
                    sides[facet, number] = side
            view_leaves = {
                "shared_columns_M": torch.tensor(shared, device=device),
                "sides_PL": sides.to(device),
                "path_length_L": sides.abs().sum(0).to(device),
                "owner_LM": owner.to(device),
            }
        return View(
            sole_N=torch.tensor(sole, device=device),
            is_identity=not leaves and sole == list(range(len(self.members))),
            group_N=torch.tensor(groups, device=device),
            group_members_GM=torch.tensor(padded, device=device) if self.num_groups > 1 else None,
            **view_leaves,
        )

    # -- facets ----------------------------------------------------------------------------------------------------

    def write_leaves(self, leaves: Sequence[Leaf], normals: Sequence[Tensor], offsets: Sequence[float]) -> None:
        """Replace leaves and facets, dropping facets that no leaf lies on. Facet ids in `leaves` index `normals`."""
        used = sorted({facet for leaf in leaves for facet, _ in leaf.path})
        place = {facet: number for number, facet in enumerate(used)}
        device = self.facet_normal.device
        path = torch.zeros(len(leaves), len(used), dtype=torch.int8)
        for number, leaf in enumerate(leaves):
            for facet, side in leaf.path:
                path[number, place[facet]] = side
        normal = torch.stack([normals[f].to(device, torch.float32) for f in used]) if used else None
        self.facet_normal = torch.zeros(0, self.hidden_size, device=device) if normal is None else normal
        self.facet_offset = torch.tensor([offsets[f] for f in used], dtype=torch.float32, device=device)
        self.leaf_uid = torch.tensor([leaf.uid for leaf in leaves], dtype=torch.int64, device=device)
        self.leaf_path = path.to(device)
        self.stale()


def split_leaves(leaves: Sequence[Leaf], parent: int, child: int, facet: int) -> list[Leaf]:
    """Leaves after `child` takes the positive side of `facet` from every leaf that `parent` serves."""
    served = [leaf for leaf in leaves if leaf.uid == parent] or [Leaf(parent, ())]
    kept = [leaf for leaf in leaves if leaf.uid != parent]
    for leaf in served:
        kept += [Leaf(parent, (*leaf.path, (facet, -1))), Leaf(child, (*leaf.path, (facet, 1)))]
    return kept


def remove_owner(leaves: Sequence[Leaf], uid: int) -> list[Leaf]:
    """Leaves after `uid` leaves: on each of its leaves the sibling subtree takes over, nothing else moves."""
    remaining = list(leaves)
    while True:
        gone = next((leaf for leaf in remaining if leaf.uid == uid), None)
        if gone is None:
            return remaining
        remaining.remove(gone)
        if not gone.path:
            continue
        # Splits happen at leaves, so the last facet of a path is its deepest: the sibling subtree lies across it.
        (facet, side), depth = gone.path[-1], len(gone.path) - 1
        remaining = [
            Leaf(leaf.uid, leaf.path[:depth] + leaf.path[depth + 1 :])
            if leaf.path[:depth] == gone.path[:depth] and leaf.path[depth : depth + 1] == ((facet, -side),)
            else leaf
            for leaf in remaining
        ]


def hand_over(leaves: Sequence[Leaf], old: int, new: int) -> list[Leaf]:
    """Leaves after everything `old` served is served by `new`."""
    return [Leaf(new, leaf.path) if leaf.uid == old else leaf for leaf in leaves]


def prune_leaves(leaves: Sequence[Leaf], cells: Iterator[list[int]] | Sequence[list[int]]) -> list[Leaf]:
    """Drop the leaves of cells (lists of uids) that a single expert serves alone: they need no tree."""
    alone = {uids[0] for uids in cells if len(uids) == 1}
    return [leaf for leaf in leaves if leaf.uid not in alone]
