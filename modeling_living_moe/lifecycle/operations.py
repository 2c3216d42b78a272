"""The events themselves: split, merge, death, freeze, thaw, part. Each checks, drafts, and describes one change.

Exactness (fp32, no mutation noise): a split, a freeze, a thaw, the merge of identical twins, and the death of an
expert that serves no token leave the layer's outputs unchanged. Decides nothing (that is `policies/`) and touches no
tensor (that is `surgery.py`).

H hidden, I intermediate, S sampled tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from living_moe.configuration.errors import PopulationError
from living_moe.configuration.sections import ExpertsConfig, LifecycleConfig
from living_moe.configuration.slabs import MOST_TIERS, is_frozen, slab_name, tier_of
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.families import Scoring
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent, LifecycleKind
from living_moe.modeling_living_moe.lifecycle.surgery import DraftRow, DraftTombstone, LayerDraft, RowSource
from living_moe.modeling_living_moe.population import (
    NOBODY,
    ROOT_FIELD,
    Leaf,
    Member,
    hand_over,
    prune_leaves,
    remove_owner,
    split_leaves,
)


@dataclass(frozen=True)
class Reason:
    """What fired an event: a vital, its value, the threshold it crossed, and for how many optimizer steps it had."""

    metric: str = "request"
    value: float = 0.0
    threshold: float = 0.0
    held: int = 0


#: Somebody asked for it.
REQUEST = Reason()


@dataclass(frozen=True)
class Surroundings:
    """What an operation needs to know beyond its layer."""

    step: int
    lifecycle: LifecycleConfig
    experts: ExpertsConfig
    #: Bytes of all expert weights now.
    bytes_now: int = 0


def seed_of(*parts: int) -> int:
    """A 62-bit seed from (seed, step, layer, uid): the same on every rank and in every run."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def split(
    block: LivingMoeBlock,
    uid: int,
    around: Surroundings,
    reason: Reason,
    *,
    noise_std: float,
    sample: Tensor | None,
    newborn_field: int = 1,
) -> tuple[LayerDraft, LifecycleEvent]:
    """A newborn takes over part of the parent's tokens, with a copy of its weights and key.

    A trainable parent keeps one side of a new facet, the newborn serves the other. A frozen parent of a model with
    receptive fields stays as it is for the tokens of its own field; the newborn serves in its place in a newborn
    field (if one does already, the request passes to it), at the address of one that served there before if it left
    a tombstone.

    Args:
        sample: Recent router inputs of the parent, (S, H), for 2-means; None draws the facet at random.
        newborn_field: Where the newborn of a frozen parent of the root field serves.

    Raises:
        UnknownExpertError, PopulationError: See `_check_room`.
    """
    population = block.population
    parent = population.find(uid, block.layer)
    uid, slab = parent.uid, parent.slab
    field = parent.field
    if is_frozen(slab) and block.has_fields and field == ROOT_FIELD:
        field = newborn_field
        heirs = [m for m in population.members if (m.clade, m.field) == (parent.clade, field)]
        if heirs:
            loads = {m.uid: float(block.vitals.table(m.slab).load[m.row]) for m in heirs}
            heir = max(loads, key=lambda u: loads[u])
            return split(block, heir, around, reason, noise_std=noise_std, sample=sample)
        servers = {t.heir for t in population.tombstones if (t.clade, t.field) == (parent.clade, field)}
        if servers and uid not in servers:
            raise PopulationError(
                f"layer {block.layer}: expert uid {uid} serves no token of field {field}, others do since a merge; "
                f"split one of {sorted(servers)}."
            )
    _check_room(block, around, 1, block.experts.bytes_per_expert(slab), "split")
    draft = LayerDraft(block, around.experts)
    newborn_uid = draft.new_uid()
    seed = seed_of(around.lifecycle.seed, around.step, block.layer, newborn_uid)
    parent_row = draft.row(uid)
    moved, address = 0.5, None
    if field == parent.field:
        normal, offset = facet(sample, population.hidden_size, seed)
        draft.normals.append(normal)
        draft.offsets.append(offset)
        draft.leaves = split_leaves(draft.leaves, uid, newborn_uid, len(draft.normals) - 1)
    else:
        table = block.vitals.table(slab)
        moved = float((table.foreign_load[parent.row] / table.load[parent.row].clamp_min(1e-12)).clamp(0, 1))
        address = _take_over(draft, parent, field, newborn_uid)
    parent_row.life, parent_row.load_share = "parent", 1 - moved
    draft.slabs[slab_name(tier_of(slab), frozen=False)].append(
        DraftRow(
            uid=newborn_uid,
            clade=parent.clade,
            field=field,
            group=parent.group,
            parent=uid,
            born=around.step,
            sources=parent_row.sources,
            noise_std=noise_std,
            noise_seed=seed,
            life="newborn",
            load_share=moved,
            address=address,
        )
    )
    return draft, _event("split", block, around, reason, (uid,), (newborn_uid,), seed=seed, noise_std=noise_std)


def _take_over(draft: LayerDraft, parent: Member, field: int, newborn: int) -> DraftTombstone | None:
    """Give a newborn what `parent` serves in its clade's cell of `field`; returns the address it moves into."""
    inherited = [t for t in draft.tombstones if (t.clade, t.field, t.heir) == (parent.clade, field, parent.uid)]
    if not inherited:
        return None
    draft.tombstones.remove(inherited[0])
    draft.leaves = hand_over(draft.leaves, inherited[0].uid, newborn)
    for tombstone in inherited[1:]:
        tombstone.heir = newborn
    return inherited[0]


def _check_room(block: LivingMoeBlock, around: Surroundings, experts: int, num_bytes: int, what: str) -> None:
    """Raise `PopulationError` if so many more experts, or bytes, are too many."""
    count, limit = len(block.population.members) + experts, around.lifecycle.max_experts
    if experts > 0 and limit is not None and count > limit:
        raise PopulationError(
            f"layer {block.layer}: a {what} would make {count} experts but lifecycle.max_experts is {limit}; "
            f"raise it, or remove or merge experts first."
        )
    budget = around.experts.memory_budget_mib
    needed = (around.bytes_now + num_bytes) / 2**20
    if num_bytes > 0 and budget is not None and needed > budget:
        raise PopulationError(
            f"layer {block.layer}: a {what} would bring the experts to {needed:.1f} MiB but experts.memory_budget_mib "
            f"is {budget:g}; raise it, or remove or merge experts first."
        )


def facet(sample: Tensor | None, hidden_size: int, seed: int) -> tuple[Tensor, float]:
    """A hyperplane (normal (H,), offset) between the two means of the sample; a random one without enough of it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    direction = torch.randn(hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    points = direction.new_empty(0, hidden_size) if sample is None else sample.detach().float().cpu()
    # A token that overflowed would make a facet that nobody is on either side of.
    points = points[points.isfinite().all(dim=1)]
    if len(points) < 2:
        return direction / direction.norm(), 0.0
    center = points.mean(0)
    # 2-means from the two halves along a random direction (Lloyd); a handful of rounds is enough for a boundary.
    side = (points - center) @ direction > 0
    for _ in range(10):
        if side.all() or not side.any():
            break
        high, low = points[side].mean(0), points[~side].mean(0)
        direction, center = high - low, (high + low) / 2
        new_side = (points - center) @ direction > 0
        if torch.equal(new_side, side):
            break
        side = new_side
    norm = direction.norm().clamp_min(1e-12)
    return direction / norm, float(-(center @ direction) / norm)


def remove(block: LivingMoeBlock, uid: int, around: Surroundings, reason: Reason) -> tuple[LayerDraft, LifecycleEvent]:
    """Death. Its tokens go to a sibling; a clade that loses its last member ends, and its tokens go elsewhere.

    Raises:
        PopulationError: Fewer clades than `num_experts_per_tok` would be left.
    """
    uid = block.population.find(uid, block.layer).uid
    draft = LayerDraft(block, around.experts)
    _bury(draft, uid)
    _tidy(draft)
    _check_enough(draft, "death")
    return draft, _event("death", block, around, reason, (uid,), ())


def _bury(draft: LayerDraft, uid: int, successor: int | None = None) -> None:
    """Take an expert out, and see to it that no token chooses otherwise than before.

    Where the others of its cell (or, if it was alone, the root's cell behind it) share its address, they take its
    region over. Where they do not, its address stays as a tombstone and the heir serves there. Without an heir the
    clade ends: its address is forgotten, unless what nobody can choose still weighs on the others (see `_remembers`).

    Args:
        successor: Who serves its tokens; None finds the nearest sibling.
    """
    address = draft.address(uid)
    row = draft.take_out(uid)
    tombstone = DraftTombstone(uid, row.clade, row.field, row.group, NOBODY, *address)
    tombstone.heir = _heir(draft, tombstone, uid) if successor is None else successor
    # Whoever serves there has the same address, so it does not matter that it need not be the heir.
    taken_over = successor is None and _is_shared(draft, tombstone)
    if not taken_over:
        draft.tombstones.append(tombstone)
    for other in draft.tombstones:
        if other.heir == uid:
            heir = _heir(draft, other, uid) if successor is None else successor
            other.heir = tombstone.heir if heir == NOBODY else heir
    forgotten = {t.uid for t in draft.tombstones if t.heir == NOBODY and not _remembers(draft.block.router.scoring)}
    draft.tombstones = [t for t in draft.tombstones if t.uid not in forgotten]
    for gone in forgotten | ({uid} if taken_over else set()):
        draft.leaves = remove_owner(draft.leaves, gone)


def _behind(draft: LayerDraft, address: DraftTombstone) -> dict[int, int]:
    """Whom tokens would see if an address were not there, and who serves them: its cell's, else the root's cell's."""
    cell = {uid: server for uid, server in draft.cell(address.clade, address.field).items() if uid != address.uid}
    return cell or (draft.cell(address.clade, ROOT_FIELD) if address.field != ROOT_FIELD else {})


def _is_shared(draft: LayerDraft, address: DraftTombstone) -> bool:
    """Whether all that tokens would see instead has the same key, bias and expression."""
    behind = _behind(draft, address)
    return bool(behind) and all(address.like(*draft.address(uid)) for uid in behind)


def _tidy(draft: LayerDraft) -> None:
    """Drop tombstones that make no difference, and trees that nothing divides."""
    for tombstone in list(draft.tombstones):
        if set(_behind(draft, tombstone).values()) == {tombstone.heir} and _is_shared(draft, tombstone):
            draft.tombstones.remove(tombstone)
            draft.leaves = remove_owner(draft.leaves, tombstone.uid)
    draft.leaves = prune_leaves(draft.leaves, draft.cells())


def _heir(draft: LayerDraft, tombstone: DraftTombstone, dead: int) -> int:
    """Who serves at an address from now on: the nearest in its cell, else in the root's cell behind it, else NOBODY."""

    def servers(field: int) -> dict[int, int]:
        cell = draft.cell(tombstone.clade, field)
        return {a: server for a, server in cell.items() if a != tombstone.uid and server not in (dead, NOBODY)}

    near = servers(tombstone.field)
    if near:
        path = next(leaf.path for leaf in draft.leaves if leaf.uid == tombstone.uid)
        nearest = max((leaf for leaf in draft.leaves if leaf.uid in near), key=lambda leaf: _shared(path, leaf.path))
        return near[nearest.uid]
    behind = servers(ROOT_FIELD) if tombstone.field != ROOT_FIELD else {}
    return next(iter(behind.values()), NOBODY)


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common prefix."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def _remembers(rule: Scoring) -> bool:
    """Whether a clade that cannot be chosen still weighs on the others: in a softmax's sum, or in its group's score."""
    return (rule.function == "softmax" and not rule.normalise) or rule.num_groups > 1


def _check_enough(draft: LayerDraft, what: str) -> None:
    block = draft.block
    rule = block.router.scoring
    alive = sum(len(rows) for rows in draft.slabs.values())
    addresses = [row for rows in draft.slabs.values() for row in rows] + [t for t in draft.tombstones if t.heir >= 0]
    groups = {address.clade: address.group for address in addresses if address.field == ROOT_FIELD}
    sizes = sorted(sum(group == g for group in groups.values()) for g in range(rule.num_groups))
    reachable = min(alive, sum(sizes[: rule.top_groups]))
    if reachable < rule.top_k:
        within = f" within {rule.top_groups} of {rule.num_groups} expert groups" if rule.num_groups > 1 else ""
        raise PopulationError(
            f"layer {block.layer}: {what} would leave {reachable} living experts{within} to choose from but top_k is "
            f"{rule.top_k}; raise lifecycle.min_experts or lower num_experts_per_tok."
        )


def merge(
    block: LivingMoeBlock, uids: Sequence[int], around: Surroundings, reason: Reason, *, tier_up: bool = False
) -> tuple[LayerDraft, LifecycleEvent]:
    """Make one expert of several, weighted by load; it lives on under one uid.

    Experts of one tier are averaged after matching their hidden units, by the assignment that maximises the inner
    product of their weights. With `tier_up`, and if their widths differ, the hidden units are laid beside each other in
    the lowest tier that holds them all: the result computes exactly the weighted sum of their functions.

    The survivor is the first named of those with the lowest field (so what old contexts could reach stays
    reachable). Its siblings give it their regions and the mean of their keys; experts of other cells leave it their
    addresses, so every token goes on choosing as it did (as Li et al. 2023, arXiv:2310.01334, keep the router).

    Raises:
        PopulationError: Fewer than two different experts, or too few would be left; or no tier up to
            `experts.max_tier` holds their hidden units, or `experts.memory_budget_mib` does not allow it.
    """
    population = block.population
    named = list(uids) if isinstance(uids, Iterable) else []
    members = [population.find(uid, block.layer) for uid in named]
    if len({m.uid for m in members}) < max(2, len(members)):
        raise PopulationError(f"layer {block.layer}: a merge needs at least two different uids, got {uids!r}.")
    survivor = min(members, key=lambda m: m.field)
    cell = {m.uid for m in population.cell(survivor)}
    # Siblings first: then the survivor may be alone behind an heir of its own in another field.
    others = sorted((m for m in members if m is not survivor), key=lambda m: m.uid not in cell)
    loads = {m.uid: float(block.vitals.table(m.slab).load[m.row]) for m in members}

    draft = LayerDraft(block, around.experts)
    seed = 0
    if tier_up or len({tier_of(m.slab) for m in members}) > 1:
        seed = seed_of(around.lifecycle.seed, around.step, block.layer, survivor.uid)
        sources = _side_by_side(block, [survivor, *others])
        _move_up(draft, survivor, _tier_for(block, members, around))
    else:
        sources = {survivor.uid: RowSource(survivor.slab, survivor.row)} | {
            m.uid: RowSource(m.slab, m.row, neurons_I=match_neurons(block, survivor, m)) for m in others
        }
    for other in others:
        if other.uid in cell:
            draft.take_out(other.uid)
            draft.leaves = hand_over(draft.leaves, other.uid, survivor.uid)
            for tombstone in draft.tombstones:
                if tombstone.heir == other.uid:
                    tombstone.heir = survivor.uid
        else:
            _bury(draft, other.uid, survivor.uid)
    _tidy(draft)
    row = draft.row(survivor.uid)
    row.sources, row.life, row.noise_seed = _weighted(sources, loads), "merged", seed
    row.key_sources = _weighted({uid: source for uid, source in sources.items() if uid in cell}, loads)
    _check_enough(draft, "merge")
    return draft, _event("merge", block, around, reason, tuple(m.uid for m in members), (survivor.uid,), seed=seed)


def _side_by_side(block: LivingMoeBlock, members: Sequence[Member]) -> dict[int, RowSource]:
    """uid -> source, each at the first hidden unit after the one before."""
    sources, at = {}, 0
    for member in members:
        sources[member.uid] = RowSource(member.slab, member.row, at=at)
        at += block.experts.width(member.slab)
    return sources


def _tier_for(block: LivingMoeBlock, members: Sequence[Member], around: Surroundings) -> int:
    """The lowest tier above all members' that holds all their hidden units."""
    pool, highest = block.experts, around.experts.max_tier
    units = sum(pool.width(member.slab) for member in members)
    lowest = max(tier_of(member.slab) for member in members) + 1
    tier = next((t for t in range(lowest, highest + 1) if pool.width(slab_name(t, frozen=False)) >= units), None)
    if tier is None:
        raise PopulationError(
            f"layer {block.layer}: a merge of {units} hidden units needs a tier above {lowest - 1} that holds them but "
            f"experts.max_tier is {highest} (of at most {MOST_TIERS - 1}); raise it, or merge experts of one tier."
        )
    old = sum(pool.bytes_per_expert(member.slab) for member in members)
    added = pool.bytes_per_expert(slab_name(tier, frozen=False)) - old
    _check_room(block, around, 1 - len(members), added, "merge")
    return tier


def _move_up(draft: LayerDraft, member: Member, tier: int) -> None:
    draft.slabs[slab_name(tier, frozen=is_frozen(member.slab))].append(draft.take_out(member.uid))


def _weighted(sources: dict[int, RowSource], loads: dict[int, float]) -> tuple[RowSource, ...]:
    """The sources with weights that sum to one: shares of their experts' loads, equal ones where none has any."""
    total = sum(loads[uid] for uid in sources)
    return tuple(
        replace(source, weight=loads[uid] / total if total > 0 else 1 / len(sources)) for uid, source in sources.items()
    )


@torch.no_grad()
def match_neurons(block: LivingMoeBlock, first: Member, second: Member) -> Tensor | None:
    """Order of `second`'s hidden units that best matches `first`'s, int64 (I,); None if they match as they are."""

    def features_IF(member: Member) -> Tensor:
        slab = block.experts.weights(member.slab)
        gate, up = slab.gate_up_proj[member.row].float().chunk(2, dim=0)
        return torch.cat([F.normalize(part, dim=1) for part in (gate, up, slab.down_proj[member.row].float().T)], dim=1)

    similarity_II = (features_IF(first) @ features_IF(second).T).cpu()
    if torch.equal(similarity_II.argmax(dim=1), torch.arange(similarity_II.shape[0])):
        return None
    _, order = linear_sum_assignment(similarity_II.numpy(), maximize=True)
    device = block.experts.weights(second.slab).down_proj.device
    return torch.as_tensor(order, dtype=torch.int64, device=device)


def freeze(block: LivingMoeBlock, uid: int, around: Surroundings, reason: Reason) -> tuple[LayerDraft, LifecycleEvent]:
    """Move an expert to the frozen slab: no gradients and no optimizer state from then on."""
    return _move(block, uid, around, reason, "freeze", frozen=True)


def thaw(block: LivingMoeBlock, uid: int, around: Surroundings, reason: Reason) -> tuple[LayerDraft, LifecycleEvent]:
    """Move an expert to the trainable slab; its optimizer state starts anew."""
    return _move(block, uid, around, reason, "thaw", frozen=False)


def _move(
    block: LivingMoeBlock, uid: int, around: Surroundings, reason: Reason, kind: LifecycleKind, *, frozen: bool
) -> tuple[LayerDraft, LifecycleEvent]:
    member = block.population.find(uid, block.layer)
    uid = member.uid
    if is_frozen(member.slab) == frozen:
        state = "frozen" if frozen else "trainable"
        raise PopulationError(f"layer {block.layer}: expert uid {uid} is {state} already; nothing to {kind}.")
    draft = LayerDraft(block, around.experts)
    draft.slabs[slab_name(tier_of(member.slab), frozen=frozen)].append(draft.take_out(uid))
    return draft, _event(kind, block, around, reason, (uid,), (uid,))


def part(block: LivingMoeBlock, uid: int, around: Surroundings, reason: Reason) -> tuple[LayerDraft, LifecycleEvent]:
    """End the clade of `uid`: each member of its cell becomes a clade of its own, with the address it has by now.

    Not exact: from here on the former siblings compete for places in the top-k.

    Raises:
        PopulationError: The expert shares its clade with nobody in its field.
    """
    member = block.population.find(uid, block.layer)
    cell = block.population.cell(member)
    if len(cell) < 2:
        raise PopulationError(f"layer {block.layer}: expert uid {uid} shares its clade with nobody; nothing to part.")
    uids = tuple(m.uid for m in cell)
    draft = LayerDraft(block, around.experts)
    # One keeps the clade's name, and with it newborns in other fields: the root, whose uid the name is, if it lives.
    heir = next((other for other in cell if other.uid == member.clade), cell[0])
    for other in cell:
        draft.row(other.uid).clade = member.clade if other is heir else other.uid
    left = [t.uid for t in draft.tombstones if (t.clade, t.field) == (member.clade, member.field)]
    draft.tombstones = [t for t in draft.tombstones if t.uid not in left]
    draft.leaves = [leaf for leaf in draft.leaves if leaf.uid not in (*uids, *left)]
    return draft, _event("part", block, around, reason, uids, uids)


def _event(
    kind: LifecycleKind,
    block: LivingMoeBlock,
    around: Surroundings,
    reason: Reason,
    parents: tuple[int, ...],
    children: tuple[int, ...],
    **extra: Any,
) -> LifecycleEvent:
    return LifecycleEvent(
        kind=kind,
        step=around.step,
        layer=block.layer,
        parents=parents,
        children=children,
        metric=reason.metric,
        value=reason.value,
        threshold=reason.threshold,
        held=reason.held,
        **extra,
    )


__all__ = ["Leaf", "Reason", "Surroundings", "freeze", "merge", "part", "remove", "split", "thaw"]
