"""Events that claim to change nothing change nothing: logits stay within 1e-6 of the largest, in fp32.

Plain copies are not neutral under top-k, so every rule of choice is tried: top-k 1, 2 and 8, softmax with and without
renormalisation, sigmoid with groups, fields with and without calibration, and populations that have lived before.
"""

import random
from typing import Any

import pytest
import torch
from factories import (
    FAMILIES,
    check_invariants,
    drift,
    live,
    living_model,
    logits,
    mixed_text,
    relative_difference,
)
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import PopulationError
from living_moe.configuration.slabs import is_frozen
from living_moe.modeling_living_moe.router import LivingRouter

EXACT = 1e-6
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral top-1": ("mixtral", dict(num_experts_per_tok=1)),
    "mixtral top-2": ("mixtral", dict()),
    "mixtral top-8 of 12": ("mixtral", dict(num_experts_per_tok=8, num_local_experts=12)),
    "qwen": ("qwen3_moe", dict()),
    "qwen not renormalised": ("qwen3_moe", dict(norm_topk_prob=False)),
    "deepseek, 1 of 2 groups": ("deepseek_v3", dict()),
    "deepseek, 2 of 4 groups": ("deepseek_v3", dict(n_group=4, topk_group=2, n_routed_experts=12)),
    "deepseek top-8, not renormalised": (
        "deepseek_v3", dict(num_experts_per_tok=8, n_routed_experts=18, norm_topk_prob=False, num_hidden_layers=2)
    ),
}  # fmt: skip
PRESETS = {
    "grow": dict(preset="grow"),
    "fields": dict(preset="frozen-graft"),
    "uncalibrated fields": dict(preset="frozen-graft", calibrated=False),
    "synaptic": dict(preset="grow", sections={"synapse": {"router": True, "chunk": 3, "strength": 1.5}}),
    "synaptic fields": dict(preset="frozen-graft", sections={"synapse": {"router": True, "chunk": 3, "strength": 1.5}}),
}
every_rule = pytest.mark.parametrize("rule", RULES)
every_preset = pytest.mark.parametrize("preset", PRESETS)
#: The softmax that drives synapses is over all clades: one that ends, though no token chooses it, leaves it a share.
every_preset_of_plain_routers = pytest.mark.parametrize("preset", [name for name in PRESETS if "synaptic" not in name])


def model_of(rule: str, preset: str = "grow") -> LivingMoeForCausalLM:
    family, overrides = RULES[rule]
    return living_model(family, **PRESETS[preset], **overrides)


def served(model: LivingMoeForCausalLM, ids: Tensor) -> list[set[int]]:
    """Uids that serve a token of `ids`, per layer."""
    found: list[set[int]] = []

    def note(router: LivingRouter, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        uids = args[1].uids
        found.append({uids[index] for index in output[2].unique().tolist()})

    hooks = [block.router.register_forward_hook(note) for block in model.living_blocks]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found


def lived(rule: str, preset: str, seed: int = 0) -> LivingMoeForCausalLM:
    """A model whose experts have split twice, and whose twins' weights and keys have parted."""
    model = model_of(rule, preset)
    rng = random.Random(seed)
    for round_ in range(2):
        for layer in range(len(model.expert_counts)):
            for uid in rng.sample(model.expert_uids(layer), 5):
                model.split_expert(layer, uid)
        drift(model, seed + round_, std=0.1)
    return model


# -- split -------------------------------------------------------------------------------------------------------------


@every_preset
@every_rule
def test_splitting_one_then_every_expert_then_all_again_changes_nothing(rule: str, preset: str) -> None:
    model = model_of(rule, preset)
    ids = mixed_text(3, 12)
    before = logits(model, ids)
    model.split_expert(0, model.expert_uids(0)[3])
    assert relative_difference(logits(model, ids), before) <= EXACT
    for _ in range(2):
        for layer in range(len(model.expert_counts)):
            for uid in model.expert_uids(layer):
                model.split_expert(layer, uid)
        assert relative_difference(logits(model, ids), before) <= EXACT
    check_invariants(model)


@every_preset
@every_rule
def test_a_split_in_a_population_that_has_lived_changes_nothing(rule: str, preset: str) -> None:
    model = lived(rule, preset)
    ids = mixed_text(3, 12)
    before = logits(model, ids)
    for layer in range(len(model.expert_counts)):
        for uid in model.expert_uids(layer)[::3]:
            model.split_expert(layer, uid)
    assert relative_difference(logits(model, ids), before) <= EXACT


def test_both_halves_of_a_split_are_used() -> None:
    model = model_of("mixtral top-2")
    ids = mixed_text(8, 16)
    event = model.split_expert(0, 2)
    drift(model, 0, std=1e-3)
    assert {2, event.children[0]} <= served(model, ids)[0]


def test_copies_without_a_clade_would_not_be_neutral() -> None:
    model = model_of("mixtral top-2")
    ids = mixed_text(3, 12)
    before = logits(model, ids)
    model.split_expert(0, 2)
    model.part_clade(0, 2)
    assert relative_difference(logits(model, ids), before) > 1e-3


def test_mutation_noise_is_seen_in_the_newborn_only() -> None:
    model = model_of("mixtral top-2")
    before = {s.role: s.parameter.detach().clone() for s in model.slot_parameters() if s.layer == 0}
    newborn = model.split_expert(0, 2, noise_std=0.1).children[0]
    row = model.expert_uids(0).index(newborn)
    for slot in model.slot_parameters():
        if slot.layer == 0:
            assert torch.equal(slot.parameter[:8], before[slot.role])
            noise = slot.parameter.detach()[row] - before[slot.role][2]
            gap = float(noise.std() / before[slot.role][2].square().mean().sqrt())
            assert gap == pytest.approx(0.0 if slot.role == "key" else 0.1, abs=0.01)


# -- death -------------------------------------------------------------------------------------------------------------


@every_preset_of_plain_routers
@every_rule
def test_the_death_of_experts_without_a_token_changes_nothing(rule: str, preset: str) -> None:
    model = lived(rule, preset)
    ids = mixed_text(2, 6)
    before = logits(model, ids)
    died = 0
    for layer, used in enumerate(served(model, ids)):
        for uid in set(model.expert_uids(layer)) - used:
            try:
                model.remove_expert(layer, uid)
            except PopulationError:
                continue  # too few would be left
            died += 1
            assert relative_difference(logits(model, ids), before) <= EXACT
    assert died >= 3
    check_invariants(model)


@every_rule
def test_the_death_of_a_pretrained_expert_without_a_token_changes_nothing(rule: str) -> None:
    model = model_of(rule)
    # Few enough tokens that some expert has none.
    ids = mixed_text(1, 2, seed=4)
    before = logits(model, ids)
    died = 0
    for layer, used in enumerate(served(model, ids)):
        for uid in sorted(set(model.expert_uids(layer)) - used)[:2]:
            try:
                model.remove_expert(layer, uid)
            except PopulationError:
                continue
            died += 1
            assert relative_difference(logits(model, ids), before) <= EXACT
    assert died or rule == "mixtral top-8 of 12"


@every_rule
def test_a_sibling_inherits_what_a_dead_twin_served(rule: str) -> None:
    model = model_of(rule, "grow")
    ids = mixed_text(3, 12)
    before = logits(model, ids)
    for uid in model.expert_uids(0):
        newborn = model.split_expert(0, uid).children[0]
        grandchild = model.split_expert(0, newborn).children[0]
        for gone in random.Random(uid).sample([uid, newborn, grandchild], 2):
            model.remove_expert(0, gone)
    assert relative_difference(logits(model, ids), before) <= EXACT
    assert not any(block.population.tombstones for block in model.living_blocks), "equal addresses need no tombstone"
    check_invariants(model)


@every_rule
def test_a_newborn_of_a_field_that_dies_leaves_its_tokens_to_its_parent(rule: str) -> None:
    model = model_of(rule, "fields")
    ids = mixed_text(3, 12)
    before = logits(model, ids)
    for uid in model.expert_uids(0):
        newborn = model.split_expert(0, uid).children[0]
        model.remove_expert(0, newborn)
    assert relative_difference(logits(model, ids), before) <= EXACT


@pytest.mark.parametrize("rule", ["mixtral top-2", "qwen not renormalised", "deepseek, 1 of 2 groups"])
def test_a_field_is_born_again_at_the_address_its_last_newborn_left(rule: str) -> None:
    model = model_of(rule, "fields")
    ids = mixed_text(3, 12)
    for uid in model.expert_uids(0):
        model.split_expert(0, uid)
    drift(model, 0)
    newborns = [m.uid for m in model.living_blocks[0].population.members if m.field == 1]
    for uid in newborns:
        model.remove_expert(0, uid)
    before = logits(model, ids)
    for uid in model.expert_uids(0):
        model.split_expert(0, uid)
    assert relative_difference(logits(model, ids), before) <= EXACT
    assert not model.living_blocks[0].population.tombstones


# -- merge -------------------------------------------------------------------------------------------------------------


@every_preset
@every_rule
def test_merging_identical_twins_changes_nothing(rule: str, preset: str) -> None:
    """Siblings, cousins deep in one tree, a frozen parent and its newborn: all of one clade, all identical."""
    model = model_of(rule, preset)
    ids = mixed_text(3, 12)
    before = logits(model, ids)
    rng = random.Random(0)

    def clade(uid: int) -> list[int]:
        return [m.uid for m in model.living_blocks[0].population.members if m.clade == uid]

    roots = model.expert_uids(0)
    for uid in roots:
        for _ in range(3):
            model.split_expert(0, rng.choice(clade(uid)))
    for uid in roots:
        model.merge_experts(0, rng.sample(clade(uid), 2))
    assert relative_difference(logits(model, ids), before) <= EXACT
    check_invariants(model)
    for uid in roots:
        model.merge_experts(0, clade(uid))
    assert relative_difference(logits(model, ids), before) <= EXACT
    check_invariants(model)
    assert not any(block.population.tombstones for block in model.living_blocks)


@every_rule
def test_merging_identical_experts_of_different_clades_changes_nothing(rule: str) -> None:
    """The function is one, the addresses are two: tokens go on choosing as they did."""
    model = model_of(rule)
    ids = mixed_text(3, 12)
    for slot in model.slot_parameters():
        if slot.role != "key":
            slot.parameter.data[5] = slot.parameter.data[1]
    before = logits(model, ids)
    event = model.merge_experts(0, [1, 5])
    assert event.children == (1,)
    assert relative_difference(logits(model, ids), before) <= EXACT
    check_invariants(model)


@every_rule
def test_a_newborn_identical_to_its_parent_merges_back_whatever_its_siblings_became(rule: str) -> None:
    model = model_of(rule, "fields")
    ids = mixed_text(3, 12)
    for uid in model.expert_uids(0):
        newborn = model.split_expert(0, uid).children[0]
        model.split_expert(0, newborn)
        rows = {m.uid: m for m in model.living_blocks[0].population.members}
        sibling = max(rows)
        for slot in model.slot_parameters():
            if (slot.layer, slot.slab) == (0, "trainable"):
                slot.parameter.data[rows[sibling].row] *= 1.3
    before = logits(model, ids)
    for uid in model.expert_uids(0)[:8]:
        newborn = next(m.uid for m in model.living_blocks[0].population.members if m.parent == uid)
        model.merge_experts(0, [newborn, uid])
        assert uid in model.expert_uids(0) and newborn not in model.expert_uids(0)
    assert relative_difference(logits(model, ids), before) <= EXACT
    check_invariants(model)


def test_twins_with_shuffled_hidden_units_are_matched_before_they_merge() -> None:
    model = model_of("mixtral top-2")
    ids = mixed_text(3, 12)
    newborn = model.split_expert(0, 2).children[0]
    slab = model.living_blocks[0].experts.slab("trainable")
    row = model.expert_uids(0).index(newborn)
    order = torch.randperm(slab.intermediate_dim, generator=torch.Generator().manual_seed(0))
    gate, up = slab.gate_up_proj.data[row].chunk(2)
    slab.gate_up_proj.data[row] = torch.cat([gate[order], up[order]])
    slab.down_proj.data[row] = slab.down_proj.data[row][:, order]
    before = logits(model, ids)
    model.merge_experts(0, [2, newborn])
    assert relative_difference(logits(model, ids), before) <= EXACT


# -- freeze and thaw ---------------------------------------------------------------------------------------------------


@every_preset
@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_and_thawing_change_nothing(family: str, preset: str) -> None:
    model = living_model(family, **PRESETS[preset])
    live(model, 10, seed=3)
    ids = mixed_text(3, 12)
    before = logits(model, ids)
    for member in list(model.living_blocks[0].population.members):
        change, back = model.freeze_expert, model.thaw_expert
        if is_frozen(member.slab):
            change, back = back, change
        change(0, member.uid)
        assert relative_difference(logits(model, ids), before) <= EXACT
        if member.uid % 2:
            back(0, member.uid)
            assert relative_difference(logits(model, ids), before) <= EXACT
    check_invariants(model)


def test_a_frozen_expert_takes_no_gradient_and_keeps_serving() -> None:
    model = model_of("mixtral top-2").train()
    ids = mixed_text(8, 16)
    model.freeze_expert(0, 3)
    model(ids, labels=ids).loss.backward()
    slab = model.living_blocks[0].experts.slab("frozen")
    assert not slab.gate_up_proj.requires_grad and slab.gate_up_proj.grad is None
    assert 3 in served(model, ids)[0]
