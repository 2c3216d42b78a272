"""Who lives in a layer: slots, uids, clades, fields, and the facets that divide a clade among its members.

A *slab* is a stack of slots; its alive rows are always a prefix. A *clade* is the set of experts that descend from one
root and still share its address in the router. Within a clade, experts of one *field* form a **cell**; a cell's
members divide its tokens by a binary tree of hyperplanes (*facets*), one per split, so exactly one member serves
each token.

An expert is an address (its key) and a function (its weights). When it dies or merges, forgetting its address too can
change what the living serve: a sibling's key, drifted since the split, would win or lose other tokens in the region
it takes over; a softmax that is not renormalised loses a share, an expert group a score. Then the address stays as a
**tombstone**: tokens that choose it go to an heir, or, when there is none, it is only scored and never chosen.

Reads and writes tables only; weights belong to `experts.py`, keys of the living to `router.py`, and what changes a
population to `lifecycle/`.

C capacity of a slab, E alive experts of the layer, D tombstones, P facets, L leaves, H hidden, T tokens.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from living_moe.configuration.errors import UnknownExpertError
from living_moe.configuration.slabs import SLABS

ROOT_FIELD = 0
#: Buffers with a row per past event of some kind: empty in a fresh population.
HISTORY_TABLES = (
    "facet_normal",
    "facet_offset",
    "leaf_uid",
    "leaf_path",
    "tombstone_place",
    "tombstone_key",
    "tombstone_bias",
)
#: Heir of an address that nobody serves any more.
NOBODY = -1


class KeepsDtype(nn.Module):
    """A module whose floating buffers keep their dtype under `.to(dtype)`, `.half()`, ...: they are no weights.

    If its children are named after slabs, they are listed in slot order.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        sort_slabs(self._modules)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            # Casts touch floating tensors only, so an integer probe tells where `fn` moves things.
            device = fn(torch.empty(0, dtype=torch.int64, device=tensor.device)).device
            if tensor.is_meta and device.type != "meta":
                return torch.empty_like(tensor, device=device)
            return tensor.to(device)

        return super()._apply(keep_dtype, recurse)


def sort_slabs(entries: dict[str, Any]) -> None:
    """Bring a dict from slab name to anything into slot order, in place.

    A slab born late would otherwise come last in `named_parameters`, and a reloaded model would list its parameters in
    another order: optimizers find their state by that order, and a sum over parameters rounds by it.
    """
    for name in SLABS:
        if name in entries:
            entries[name] = entries.pop(name)


class RowTable(KeepsDtype):
    """Buffers with one row per slot of a slab, all described by `columns`."""

    #: name -> (dtype, value of a free row)
    columns: ClassVar[dict[str, tuple[torch.dtype, float | int]]] = {}

    def __init__(self, capacity: int):
        super().__init__()
        for name, (dtype, fill) in self.columns.items():
            self.register_buffer(name, torch.full((capacity,), fill, dtype=dtype))

    def reset_parameters(self) -> None:
        """Free every row that no checkpoint has filled."""
        self.free_rows()

    def free_rows(self) -> None:
        for name, (_, fill) in self.columns.items():
            init.constant_(getattr(self, name), fill)


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

    def reset_parameters(self) -> None:
        """Left to the population, which knows who lives here at first: modules are reset in any order."""


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
class Tombstone:
    """What is known of an address whose expert is gone. `heir` is the uid of who serves there, or NOBODY."""

    uid: int
    clade: int
    field: int
    group: int
    heir: int


@dataclass(frozen=True, slots=True)
class Address:
    """A key by which a clade is reached. `index`: among the keys of the alive in slot order, then of the tombstones.

    `server` is the slot-order index of the expert that serves there, or NOBODY.
    """

    uid: int
    clade: int
    field: int
    group: int
    index: int
    server: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """One region of a cell: the facets it lies on, on which side (+1 or -1), root first, and whose address it has."""

    uid: int
    path: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Trees:
    """The facets of some cells as binary trees of Q nodes.

    A node that is no leaf lies on facet `facet_Q` and goes on to `next_Q2`, by the side a token lies on (negative, then
    positive). A leaf goes on to itself, so `depth` steps from a root bring every token to its leaf.
    """

    facet_Q: Tensor
    next_Q2: Tensor
    depth: int

    def step(self, node_S: Tensor, positive_S: Tensor) -> Tensor:
        """The next nodes, int64; `positive_S` is the side of each one's facet."""
        return self.next_Q2.view(-1).index_select(0, (2 * node_S).add_(positive_S.long()))


@dataclass(frozen=True)
class View:
    """How tokens of one field see a layer: its N cells in a fixed order, as tensors for the router.

    The first `num_open` cells can be chosen; the others, which nobody serves, are only scored. `address_N` is the
    address of each cell (of its first leaf, if it has several) and `server_N` the expert that serves there. Each of the
    M cells with several leaves has a tree in `trees`; of the nodes that are leaves, `address_Q` and `server_Q` are
    theirs.
    """

    num_open: int
    is_identity: bool
    address_N: Tensor
    server_N: Tensor
    group_N: Tensor
    group_members_GM: Tensor | None
    columns_M: Tensor
    root_M: Tensor
    trees: Trees
    address_Q: Tensor
    server_Q: Tensor
    #: Cell that each address's clade has here; N where it has none.
    column_A: Tensor


@dataclass(frozen=True)
class AddressBook:
    """Who serves at each of the A addresses. An address that shares its clade serves on its leaves only.

    `root_A` is the root of the tree of its clade (-1: none), `address_Q` whose leaf a node is. `spare` is how many
    addresses of a clade beside the right one may be found before it.
    """

    server_A: Tensor
    serves_all_A: Tensor
    root_A: Tensor
    trees: Trees
    address_Q: Tensor
    normal_FH: Tensor
    offset_F: Tensor
    spare: int

    @torch.no_grad()
    def serves(self, hidden_TH: Tensor, candidates_TC: Tensor) -> Tensor:
        """Whether each candidate address (-1: none) is the one of its clade for the token: bool (T, C)."""
        found_TC = candidates_TC >= 0
        address_TC = candidates_TC.clamp(min=0)
        serves_TC = self.serves_all_A[address_TC] & found_TC
        if not self.trees.depth:
            return serves_TC
        shared_TC = (self.root_A[address_TC] >= 0) & found_TC & (self.server_A[address_TC] != NOBODY)
        token_M, place_M = shared_TC.nonzero(as_tuple=True)
        address_M = address_TC[token_M, place_M]
        hidden_MH, node_M = hidden_TH[token_M].float(), self.root_A[address_M]
        for _ in range(self.trees.depth):
            facet_M = self.trees.facet_Q[node_M]
            height_M = torch.einsum("mh,mh->m", self.normal_FH[facet_M], hidden_MH) + self.offset_F[facet_M]
            node_M = self.trees.step(node_M, height_M >= 0)
        return serves_TC.index_put((token_M, place_M), self.address_Q[node_M] == address_M)


class Population(KeepsDtype):
    """Tables of one living layer.

    Args:
        capacities: Slots per slab, e.g. `{"frozen": 8, "trainable": 3}`; slabs without slots are left out.
        hidden_size: H, length of a facet's normal.
        key_size: Length of a key; None is H.
        num_facets, num_leaves, num_tombstones: P, L and D of the checkpoint this layer is built for.
        num_groups: Expert groups of group-limited routing; experts of a new layer fill them evenly.
    """

    def __init__(
        self,
        capacities: dict[str, int],
        hidden_size: int,
        *,
        key_size: int | None = None,
        num_facets: int = 0,
        num_leaves: int = 0,
        num_tombstones: int = 0,
        num_groups: int = 1,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.key_size = key_size or hidden_size
        self.num_groups = num_groups
        #: Changes with every event and every load, so that derived tables know when they are stale.
        self.version = 0
        self._members: list[Member] | None = None
        self._alive: dict[str, int] | None = None
        self._leaves: list[Leaf] | None = None
        self._tombstones: list[Tombstone] | None = None
        self._views: dict[tuple[int, torch.device], View] = {}
        self._books: dict[torch.device, AddressBook] = {}
        self._is_biased: bool | None = None
        self._clades: tuple[Tensor, int] | None = None
        self._leading_roots: int | None = None
        for name in SLABS:
            if capacity := capacities.get(name, 0):
                self.add_module(name, IdentityTable(capacity))
        self.register_buffer("next_uid", torch.tensor(0))
        # What a state dict is read by: a shard of it may hold this layer's tables in part only.
        self.register_buffer("slab_sizes", torch.zeros(len(SLABS), dtype=torch.int64))
        # A model that is loaded in bf16 is built with bf16 as the default.
        self.register_buffer("facet_normal", torch.zeros(num_facets, hidden_size, dtype=torch.float32))
        self.register_buffer("facet_offset", torch.zeros(num_facets, dtype=torch.float32))
        self.register_buffer("leaf_uid", torch.zeros(num_leaves, dtype=torch.int64))
        # Signs: +1 or -1 where the leaf lies on that side of the facet, 0 where the facet does not concern it.
        self.register_buffer("leaf_path", torch.zeros(num_leaves, num_facets, dtype=torch.int8))
        # Columns uid, clade, field, group, heir.
        self.register_buffer("tombstone_place", torch.zeros(num_tombstones, 5, dtype=torch.int64))
        self.register_buffer("tombstone_key", torch.zeros(num_tombstones, self.key_size, dtype=torch.float32))
        self.register_buffer("tombstone_bias", torch.zeros(num_tombstones, dtype=torch.float32))
        for buffer, value in self._first_values():
            buffer.copy_(value)

    next_uid: Tensor
    slab_sizes: Tensor
    facet_normal: Tensor
    facet_offset: Tensor
    leaf_uid: Tensor
    leaf_path: Tensor
    tombstone_place: Tensor
    tombstone_key: Tensor
    tombstone_bias: Tensor

    def _first_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Buffers of a fresh population and their values: every slot holds an expert that is a clade of its own."""
        sizes = {name: self.capacity(name) for name in self.slabs}
        total = sum(sizes.values())
        first = 0
        for name, capacity in sizes.items():
            table = self.table(name)
            uid = torch.arange(first, first + capacity)
            yield from ((table.uid, uid), (table.clade, uid), (table.group, uid * self.num_groups // total))
            first += capacity
        yield self.next_uid, torch.tensor(total)
        yield self.slab_sizes, torch.tensor([sizes.get(name, 0) for name in SLABS])

    def reset_parameters(self) -> None:
        """A fresh population in which nothing ever happened; leaves alone what a checkpoint has loaded."""
        for slab in self.slabs:
            self.table(slab).free_rows()
        for buffer, value in self._first_values():
            init.copy_(buffer, value)
        for name in HISTORY_TABLES:
            table = getattr(self, name)
            if not getattr(table, "_is_hf_initialized", False):
                setattr(self, name, table.new_zeros(0, *table.shape[1:]))
        self.stale()

    # -- reading ---------------------------------------------------------------------------------------------------

    def table(self, slab: str) -> IdentityTable:
        return self.get_submodule(slab)  # type: ignore[return-value]

    @property
    def slabs(self) -> list[str]:
        return [name for name in SLABS if name in self._modules]

    def capacity(self, slab: str) -> int:
        return self.table(slab).uid.numel() if slab in self._modules else 0

    def stale(self, *, leaves: bool = True) -> None:
        """Forget what was derived from the tables; call after changing them.

        Args:
            leaves: Whether the tables of facets changed too; their reading takes longest.
        """
        self.version += 1
        self._members = self._alive = self._tombstones = self._is_biased = self._clades = self._leading_roots = None
        if leaves:
            self._leaves = None
        self._views.clear()
        self._books.clear()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.stale()

    @property
    def clades(self) -> tuple[Tensor, int]:
        """Clade of each alive expert in slot order, int64 (E,), the same object until stale; and a number above all."""
        if self._clades is None or self._clades[0].device != self.next_uid.device:
            clade_E = torch.cat([self.table(slab).clade[:count] for slab, count in self.alive.items()])
            self._clades = clade_E, 1 + max(member.clade for member in self.members)
        return self._clades

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
                    uid, clade, field, group, parent, born = values
                    members.append(Member(uid, clade, field, group, parent, born, slab, row, len(members)))
            self._members = members
        return self._members

    @property
    def leaves(self) -> list[Leaf]:
        if self._leaves is None:
            paths: list[list[tuple[int, int]]] = [[] for _ in range(len(self.leaf_uid))]
            # On the host: a path concerns few of many facets.
            signs = self.leaf_path.cpu()
            places = signs.nonzero()
            for (leaf, facet), side in zip(places.tolist(), signs[tuple(places.T)].tolist(), strict=True):
                paths[leaf].append((facet, side))
            self._leaves = [Leaf(uid, tuple(path)) for uid, path in zip(self.leaf_uid.tolist(), paths, strict=True)]
        return self._leaves

    @property
    def tombstones(self) -> list[Tombstone]:
        if self._tombstones is None:
            self._tombstones = [Tombstone(*place) for place in self.tombstone_place.tolist()]
        return self._tombstones

    @property
    def addresses(self) -> list[Address]:
        """Of the alive in slot order, then of the tombstones: the order of the router's scores."""
        index_of = {m.uid: m.index for m in self.members}
        living = [Address(m.uid, m.clade, m.field, m.group, m.index, m.index) for m in self.members]
        left = [
            Address(t.uid, t.clade, t.field, t.group, index, index_of.get(t.heir, NOBODY))
            for index, t in enumerate(self.tombstones, start=len(living))
        ]
        return living + left

    @property
    def num_addresses(self) -> int:
        """A: of the alive and of tombstones."""
        return len(self.members) + len(self.tombstones)

    def fields(self) -> Tensor:
        """Field of every alive expert in slot order, int64 (E,)."""
        return torch.cat([self.table(slab).field[:count] for slab, count in self.alive.items()])

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
    def leading_roots(self) -> int:
        """How many members of the root field come before the first one of a newborn field, in slot order."""
        if self._leading_roots is None:
            roots = itertools.takewhile(lambda member: member.field == ROOT_FIELD, self.members)
            self._leading_roots = sum(1 for _ in roots)
        return self._leading_roots

    @property
    def is_fresh(self) -> bool:
        """Every expert is its own clade in the root field, as right after a graft."""
        return not self.tombstones and all(m.uid == m.clade and m.field == ROOT_FIELD for m in self.members)

    def find(self, uid: int, layer: int) -> Member:
        """The alive expert with this uid: any integer, of NumPy or torch too. What is kept of it is `Member.uid`.

        Raises:
            UnknownExpertError: The uid was never given in this layer, or its expert is dead.
        """
        try:
            number = NOBODY if isinstance(uid, bool) else operator.index(uid)
        except TypeError:
            number = NOBODY
        for member in self.members:
            if member.uid == number:
                return member
        issued = int(self.next_uid)
        fate = "is dead" if 0 <= number < issued else f"never existed (uids so far: 0..{issued - 1})"
        raise UnknownExpertError(f"layer {layer}: expert uid {uid!r} {fate}; alive uids: {self.uids}.")

    def cell(self, member: Member) -> list[Member]:
        """The members that share `member`'s clade and field, itself included."""
        return [other for other in self.members if (other.clade, other.field) == (member.clade, member.field)]

    # -- what the router reads -------------------------------------------------------------------------------------

    def visible_cells(self, field: int) -> list[list[Address]]:
        """Per clade the addresses that tokens of `field` see, its own field's or else the root's; open cells first."""
        clades: dict[int, list[Address]] = {}
        for address in self.addresses:
            if address.field in (ROOT_FIELD, field):
                clades.setdefault(address.clade, []).append(address)
        cells = [[a for a in clade if a.field == field] or clade for clade in clades.values()]
        return sorted(cells, key=lambda cell: cell[0].server == NOBODY)

    def num_open(self, field: int = ROOT_FIELD) -> int:
        """Clades that tokens of `field` can choose."""
        return sum(cell[0].server != NOBODY for cell in self.visible_cells(field))

    def reachable(self, field: int = ROOT_FIELD) -> int:
        """Experts that tokens of `field` can be served by."""
        return len({address.server for cell in self.visible_cells(field) for address in cell} - {NOBODY})

    def address_bias(self) -> Tensor:
        """Selection bias of every address, fp32 (A,)."""
        parts = [self.table(slab).bias[:count] for slab, count in self.alive.items()]
        return torch.cat([*parts, self.tombstone_bias])

    def biases_moved(self) -> None:
        """Forget what was derived from the biases; call after changing them."""
        self._is_biased = None

    @property
    def is_biased(self) -> bool:
        """Whether any selection bias is other than 0. Reads the device once per change."""
        if self._is_biased is None:
            self._is_biased = bool(self.address_bias().any())
        return self._is_biased

    def address_book(self, device: torch.device) -> AddressBook:
        """Who serves at which address, for routers that see only some addresses. Root field only."""
        if device not in self._books:
            with torch.inference_mode(False):
                self._books[device] = self._build_book(device)
        return self._books[device]

    def _build_book(self, device: torch.device) -> AddressBook:
        addresses = self.addresses
        cells = self.visible_cells(ROOT_FIELD)
        cell_of = {address.uid: number for number, cell in enumerate(cells) for address in cell}
        roots, trees, leaf_Q = self._plant(cell_of)
        index_of = {address.uid: address.index for cell in cells for address in cell}
        server = torch.tensor([address.server for address in addresses])
        # Of a cell with several addresses and no leaves the first has it all.
        alone = torch.zeros(len(addresses), dtype=torch.bool)
        root = torch.full((len(addresses),), -1)
        for number, cell in enumerate(cells):
            if number not in roots:
                alone[cell[0].index] = True
                continue
            for address in cell:
                root[address.index] = roots[number]
        return AddressBook(
            server_A=server.to(device),
            serves_all_A=(alone & (server != NOBODY)).to(device),
            root_A=root.to(device),
            trees=Trees(trees.facet_Q.to(device), trees.next_Q2.to(device), trees.depth),
            address_Q=torch.tensor([index_of.get(uid, -1) for uid in leaf_Q], dtype=torch.int64, device=device),
            normal_FH=self.facet_normal.to(device),
            offset_F=self.facet_offset.to(device),
            spare=max((len(cell) for cell in cells), default=1) - 1,
        )

    def _plant(self, cell_of: dict[int, int]) -> tuple[dict[int, int], Trees, list[int]]:
        """The trees of some cells.

        Args:
            cell_of: Uid of an address -> number of its cell.

        Returns:
            The root of each cell that has leaves, in the order of these; the trees, on the CPU; per node the uid of
            whom it is a leaf of, or -1.
        """
        roots: dict[int, int] = {}
        facets: list[int] = []
        following: list[list[int]] = []
        owners: list[int] = []
        depth = 0

        def new_node() -> int:
            node = len(owners)
            facets.append(0)
            following.append([node, node])
            owners.append(-1)
            return node

        for leaf in self.leaves:
            if leaf.uid not in cell_of:
                continue
            cell = cell_of[leaf.uid]
            if cell not in roots:
                roots[cell] = new_node()
            node = roots[cell]
            for facet, side in leaf.path:
                facets[node] = facet
                if following[node][side > 0] == node:
                    following[node][side > 0] = new_node()
                node = following[node][side > 0]
            owners[node] = leaf.uid
            depth = max(depth, len(leaf.path))
        trees = Trees(torch.tensor(facets, dtype=torch.int64), torch.tensor(following).view(-1, 2).long(), depth)
        return roots, trees, owners

    def view(self, field: int, device: torch.device) -> View:
        key = (field, device)
        if key not in self._views:
            # Kept for training passes too, whatever mode the pass that happens to come first is in.
            with torch.inference_mode(False):
                self._views[key] = self._build_view(field, device)
        return self._views[key]

    def _build_view(self, field: int, device: torch.device) -> View:
        cells = self.visible_cells(field)
        groups = [cell[0].group for cell in cells]
        by_group = [[n for n, group in enumerate(groups) if group == g] for g in range(self.num_groups)]
        widest = max(len(group) for group in by_group)
        padded = [group + [len(cells)] * (widest - len(group)) for group in by_group]

        address_of = {a.uid: a for cell in cells for a in cell}
        roots, trees, leaf_Q = self._plant({a.uid: n for n, cell in enumerate(cells) for a in cell})
        owner_Q = [address_of.get(uid) for uid in leaf_Q]
        address_Q = [0 if address is None else address.index for address in owner_Q]
        server_Q = [0 if address is None else max(address.server, 0) for address in owner_Q]

        first = [cell[0] for cell in cells]
        clades = {address.clade: column for column, address in enumerate(first)}
        index = [address.index for address in first]
        server = [max(address.server, 0) for address in first]
        return View(
            num_open=sum(address.server != NOBODY for address in first),
            is_identity=not roots and index == server == list(range(len(self.addresses))),
            address_N=torch.tensor(index, device=device),
            server_N=torch.tensor(server, device=device),
            group_N=torch.tensor(groups, device=device),
            group_members_GM=torch.tensor(padded, device=device) if self.num_groups > 1 else None,
            columns_M=torch.tensor(list(roots), dtype=torch.int64, device=device),
            root_M=torch.tensor(list(roots.values()), dtype=torch.int64, device=device),
            trees=Trees(trees.facet_Q.to(device), trees.next_Q2.to(device), trees.depth),
            address_Q=torch.tensor(address_Q, dtype=torch.int64, device=device),
            server_Q=torch.tensor(server_Q, dtype=torch.int64, device=device),
            column_A=torch.tensor([clades.get(a.clade, len(cells)) for a in self.addresses], device=device),
        )

    # -- facets ----------------------------------------------------------------------------------------------------

    def write_leaves(self, leaves: Sequence[Leaf], normals: Sequence[Tensor], offsets: Sequence[float]) -> None:
        """Replace leaves and facets, dropping facets that no leaf lies on. Facet ids in `leaves` index `normals`."""
        used = sorted({facet for leaf in leaves for facet, _ in leaf.path})
        place = {facet: number for number, facet in enumerate(used)}
        device = self.facet_normal.device
        path = torch.zeros(len(leaves), len(used), dtype=torch.int8)
        steps = [(number, place[facet], side) for number, leaf in enumerate(leaves) for facet, side in leaf.path]
        if steps:
            row, column, side = torch.tensor(steps).unbind(1)
            path[row, column] = side.to(path.dtype)
        normal = torch.stack([normals[f].to(device, torch.float32) for f in used]) if used else None
        self.facet_normal = self.facet_normal.new_zeros(0, self.hidden_size) if normal is None else normal
        self.facet_offset = torch.tensor([offsets[f] for f in used], dtype=torch.float32, device=device)
        self.leaf_uid = torch.tensor([leaf.uid for leaf in leaves], dtype=torch.int64, device=device)
        self.leaf_path = path.to(device)
        self.stale()
        # As they would be read.
        self._leaves = [Leaf(leaf.uid, tuple(sorted((place[f], side) for f, side in leaf.path))) for leaf in leaves]

    def write_tombstones(
        self, tombstones: Sequence[Tombstone], keys: Sequence[Tensor], biases: Sequence[float]
    ) -> None:
        """Replace the tombstones: each one's place, key (key size,), and selection bias."""
        device = self.tombstone_key.device
        places = [[t.uid, t.clade, t.field, t.group, t.heir] for t in tombstones]
        self.tombstone_place = torch.tensor(places, dtype=torch.int64, device=device).reshape(-1, 5)
        empty = self.tombstone_key.new_zeros(0, self.key_size)
        self.tombstone_key = torch.stack([key.to(device, torch.float32) for key in keys]) if keys else empty
        self.tombstone_bias = torch.tensor(biases, dtype=torch.float32, device=device)
        self.stale(leaves=False)


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
