"""Who lives in a layer: trees send each token to one leaf, views know when they are stale, tables last."""

import copy

import pytest
import torch
from factories import HIDDEN, check_invariants, drift, live, living_model, logits, mixed_text
from hypothesis import given
from hypothesis import strategies as st

from living_moe.configuration.errors import UnknownExpertError
from living_moe.modeling_living_moe.population import (
    NOBODY,
    Leaf,
    Population,
    hand_over,
    prune_leaves,
    remove_owner,
    split_leaves,
)

CPU = torch.device("cpu")

# -- trees -------------------------------------------------------------------------------------------------------------

#: A history of a cell: (kind, which, which other).
histories = st.lists(
    st.tuples(st.sampled_from("split split die merge".split()), st.integers(0, 99), st.integers(0, 99))
)


def owner(leaves: list[Leaf], sides: dict[int, int]) -> int:
    """Who serves a token that lies on these sides of the facets; exactly one leaf must fit."""
    fitting = [leaf for leaf in leaves if all(sides[facet] == side for facet, side in leaf.path)]
    assert len(fitting) == 1
    return fitting[0].uid


@given(history=histories, seed=st.integers(0, 1000))
def test_a_tree_sends_every_token_to_one_owner_and_moves_only_those_of_the_gone(
    history: list[tuple[str, int, int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = [
        dict(enumerate((torch.randint(2, (len(history) + 1,), generator=generator) * 2 - 1).tolist()))
        for _ in range(40)
    ]
    leaves, alive, facets = [Leaf(0, ())], [0], 0
    for kind, first, second in history:
        uid, other = alive[first % len(alive)], alive[second % len(alive)]
        before = [owner(leaves, sides) for sides in tokens]
        if kind == "split":
            child = facets + 1
            leaves = split_leaves(leaves, uid, child, facets)
            alive.append(child)
            expected = [{uid, child} if b == uid else {b} for b in before]
            assert all(
                owner(leaves, sides) == (child if sides[facets] > 0 else uid)
                for sides, b in zip(tokens, before, strict=True)
                if b == uid
            )
            facets += 1
        elif len(alive) == 1:
            continue
        elif kind == "die":
            leaves = remove_owner(leaves, uid)
            alive.remove(uid)
            expected = [set(alive) if b == uid else {b} for b in before]
        elif uid != other:
            leaves = hand_over(leaves, other, uid)
            alive.remove(other)
            expected = [{uid} if b == other else {b} for b in before]
        else:
            continue
        assert all(owner(leaves, sides) in wanted for sides, wanted in zip(tokens, expected, strict=True))
        assert {leaf.uid for leaf in leaves} == set(alive)


def test_a_sibling_subtree_takes_over_what_a_dead_leaf_served() -> None:
    leaves = split_leaves(split_leaves([Leaf(0, ())], 0, 1, 0), 1, 2, 1)
    assert remove_owner(leaves, 0) == [Leaf(1, ((1, -1),)), Leaf(2, ((1, 1),))]
    assert sorted(remove_owner(leaves, 2), key=lambda leaf: leaf.uid) == [Leaf(0, ((0, -1),)), Leaf(1, ((0, 1),))]


def test_a_cell_of_one_needs_no_tree() -> None:
    leaves = [Leaf(0, ((0, -1),)), Leaf(1, ((0, 1),)), Leaf(5, ())]
    assert prune_leaves(leaves, [[0, 1], [5]]) == leaves[:2]


@given(history=histories)
def test_trees_survive_their_tables(history: list[tuple[str, int, int]]) -> None:
    leaves, facets, alive = [Leaf(0, ())], 0, [0]
    for kind, first, _ in history:
        uid = alive[first % len(alive)]
        if kind == "split":
            leaves = split_leaves(leaves, uid, facets + 1, facets)
            alive.append(facets + 1)
            facets += 1
        elif len(alive) > 1:
            leaves = remove_owner(leaves, uid)
            alive.remove(uid)
    population = Population({"trainable": 4}, HIDDEN)
    normals = [torch.full((HIDDEN,), float(n)) for n in range(facets)]
    population.write_leaves(leaves, normals, [float(n) for n in range(facets)])
    # Facets are numbered anew, in their old order; their normals tell which was which.
    old = population.facet_offset.long().tolist()
    restored = [Leaf(leaf.uid, tuple((old[facet], side) for facet, side in leaf.path)) for leaf in population.leaves]
    assert restored == leaves
    assert all(int(normal[0]) == facet for normal, facet in zip(population.facet_normal, old, strict=True))


# -- members -----------------------------------------------------------------------------------------------------------


def test_a_new_population_has_one_clade_per_slot_and_fills_its_groups_evenly() -> None:
    population = Population({"frozen": 4, "trainable": 2}, HIDDEN, num_groups=3)
    assert population.uids == [0, 1, 2, 3, 4, 5] and population.is_fresh
    assert population.alive == {"frozen": 4, "trainable": 2}
    assert [member.group for member in population.members] == [0, 0, 1, 1, 2, 2]
    assert [(member.slab, member.row) for member in population.members][3:5] == [("frozen", 3), ("trainable", 0)]
    assert population.view(0, CPU).is_identity


@pytest.mark.parametrize(
    ("uid", "fate"),
    [(99, "never existed"), (-1, "never existed"), ("2", "never existed"), (3, "is dead"), (None, "never existed")],
)
def test_an_unknown_uid_is_told_from_a_dead_one(uid: object, fate: str) -> None:
    model = living_model("mixtral")
    model.remove_expert(1, 3)
    with pytest.raises(UnknownExpertError, match=f"layer 1: expert uid .*{fate}.*alive uids: .0, 1, 2, 7, 4, 5, 6"):
        model.split_expert(1, uid)


def test_a_death_moves_the_last_expert_into_the_hole() -> None:
    model = living_model("mixtral")
    model.remove_expert(0, 2)
    assert model.expert_uids(0) == [0, 1, 7, 3, 4, 5, 6]
    check_invariants(model)


# -- views -------------------------------------------------------------------------------------------------------------


def test_views_are_kept_until_something_changes() -> None:
    model = living_model("mixtral")
    population = model.living_blocks[0].population
    view, version = population.view(0, CPU), model.population_version
    assert population.view(0, CPU) is view and model.population_version == version
    model.split_expert(0, 1)
    assert population.view(0, CPU) is not view and model.population_version > version
    state_dict = copy.deepcopy(model.state_dict())
    version = model.population_version
    model.load_state_dict(state_dict)
    assert model.population_version > version


def test_a_newborn_of_a_field_hides_its_parent_there_and_nowhere_else() -> None:
    model = living_model("mixtral", "frozen-graft")
    newborn = model.split_expert(0, 3).children[0]
    population = model.living_blocks[0].population
    index = {member.uid: member.index for member in population.members}
    assert population.view(0, CPU).server_N.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert population.view(1, CPU).server_N.tolist() == [0, 1, 2, index[newborn], 4, 5, 6, 7]


def test_a_tombstone_keeps_the_address_and_sends_to_the_heir() -> None:
    model = living_model("mixtral")
    newborn = model.split_expert(0, 3).children[0]
    drift(model, 0)
    block = model.living_blocks[0]
    key = block.router.keys["trainable"][8].detach().clone()
    model.remove_expert(0, newborn)
    (stone,) = block.population.tombstones
    assert (stone.uid, stone.clade, stone.heir) == (newborn, 3, 3)
    assert torch.equal(block.population.tombstone_key[0], key)
    assert {address.uid: address.server for address in block.population.addresses}[newborn] == 3
    assert model.config.populations[0] == {"trainable": 12, "facets": 1, "leaves": 2, "tombstones": 1}
    model.remove_expert(0, 3)
    assert not block.population.tombstones, "the clade has ended, and nothing of it weighs on the others"


def test_a_dead_clade_is_scored_where_the_others_weights_depend_on_it() -> None:
    for family, overrides, kept in (
        ("mixtral", {}, False),
        ("qwen3_moe", dict(norm_topk_prob=False), True),
        ("deepseek_v3", {}, True),
        ("deepseek_v3", dict(n_group=1, topk_group=1), False),
    ):
        model = living_model(family, **overrides)
        model.remove_expert(0, 3)
        population = model.living_blocks[0].population
        assert [stone.heir for stone in population.tombstones] == ([NOBODY] if kept else [])
        view = population.view(0, CPU)
        assert view.num_open == 7 and len(view.address_N) == 7 + kept


def test_tombstones_do_not_outlive_the_heirs_of_their_heirs() -> None:
    model = living_model("mixtral")
    for _ in range(3):
        model.split_expert(0, 3)
        drift(model, 0)
    uids = [member.uid for member in model.living_blocks[0].population.members if member.clade == 3]
    for uid in uids:
        model.remove_expert(0, uid)
        check_invariants(model)
        alive = set(model.expert_uids(0))
        assert all(stone.heir in alive for stone in model.living_blocks[0].population.tombstones)
    assert model.config.populations[0] == {"trainable": 12}


def test_what_was_seen_in_inference_mode_can_be_trained_on() -> None:
    model = living_model("mixtral", "frozen-graft")
    live(model, 12, seed=6)
    with torch.inference_mode():
        model(mixed_text(2, 8))
    ids = mixed_text(2, 8)
    model.train()(ids, labels=ids).loss.backward()


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_tables_keep_their_dtype_when_the_model_changes_its_own(cast: str) -> None:
    model = living_model("deepseek_v3", "frozen-graft")
    live(model, 12, seed=6)
    cast_model = getattr(copy.deepcopy(model), cast)()
    for block, original in zip(cast_model.living_blocks, model.living_blocks, strict=True):
        for (name, ours), theirs in zip(block.population.named_buffers(), original.population.buffers(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
        assert block.experts.slab("frozen").down_proj.dtype == getattr(
            torch, {"half": "float16", "double": "float64"}.get(cast, cast)
        )


def test_a_deep_copy_shares_nothing() -> None:
    model = living_model("mixtral")
    live(model, 6)
    twin = copy.deepcopy(model)
    before = logits(model, mixed_text(2, 8))
    live(twin, 6, seed=2)
    drift(twin, 0)
    assert torch.equal(logits(model, mixed_text(2, 8)), before)
