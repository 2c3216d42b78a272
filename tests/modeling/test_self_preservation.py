"""Whoever is being overwritten splits and protects itself; fragments merge where that changes nothing; preservers thaw.

Signals are written straight into the vitals, so that what the policy sees is known.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from factories import HIDDEN, check_invariants, live, living_model, logits, mixed_text, relative_difference, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.lifecycle import operations
from living_moe.modeling_living_moe.lifecycle.affinity import coactivation, displacement
from living_moe.modeling_living_moe.lifecycle.operations import Reason
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.lifecycle.policies import Circumstances
from living_moe.modeling_living_moe.lifecycle.policies.self_preservation import propose_self_preserving
from living_moe.modeling_living_moe.vitals import Sample
from living_moe.training.optimizers import LivingAdamW

IDS = mixed_text(3, 12)
#: Decides at every step, at once.
PROMPT = dict(interval=1, warmup_steps=0, cooldown_steps=0, min_age_steps=0, patience=1, max_events_per_step=64)
CANNIBALISED = dict(loss_fast=3.2, loss_slow=3.0, interference=0.9)


def model_with(family: str = "mixtral", preset: str = "grow", **lifecycle: Any) -> LivingMoeForCausalLM:
    sections = {"lifecycle": {**PROMPT, "policy": "self_preservation", **lifecycle}}
    model = living_model(family, preset, sections=sections)
    for block in model.living_blocks:
        for slab, count in block.population.alive.items():
            block.vitals.table(slab).load[:count] = 1.0
            block.vitals.table(slab).conflict_cos[:count] = 0.0
    return model


def set_vitals(model: LivingMoeForCausalLM, uid: int, **columns: float) -> None:
    member = model.living_block(0).population.find(uid, 0)
    for name, value in columns.items():
        getattr(model.living_block(0).vitals.table(member.slab), name)[member.row] = value


def proposed(model: LivingMoeForCausalLM, *, sample: Sample | None = None, **now: Any) -> list[Proposal]:
    around = now.pop("around", model._surroundings())
    choices = None if sample is None else sample.choices_SK
    circumstances = Circumstances(around, choices=lambda block: choices, sample=lambda block: sample, **now)
    return propose_self_preserving(model.living_block(0), model.config.lifecycle, circumstances)


def kinds(proposals: list[Proposal]) -> list[tuple[Any, ...]]:
    return [(proposal.kind, *proposal.uids) for proposal in proposals]


# -- preserving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signs", "preserves"),
    [
        (CANNIBALISED, True),
        ({**CANNIBALISED, "interference": 0.4}, False),
        ({**CANNIBALISED, "interference": 0.4, "conflict_cos": -0.3}, True),
        ({**CANNIBALISED, "loss_slow": 3.19}, False),
        ({**CANNIBALISED, "loss_fast": 2.0}, False),
        ({"interference": 2.0, "conflict_cos": -1.0}, False),
    ],
)
def test_an_expert_whose_loss_rises_while_others_pull_it_away_preserves_itself(
    signs: dict[str, float], preserves: bool
) -> None:
    model = model_with()
    set_vitals(model, 3, **signs)
    found = kinds(proposed(model))
    assert found == ([("preserve", 3)] if preserves else [])


def test_while_the_data_shift_smaller_signs_are_enough() -> None:
    model = model_with()
    set_vitals(model, 3, loss_fast=3.04, loss_slow=3.0, interference=0.4)
    assert proposed(model) == []
    assert kinds(proposed(model, vigilance=1.5)) == [("preserve", 3)]


def test_only_patience_decisions_in_a_row_count_and_newborns_are_immune() -> None:
    model = model_with(patience=2, min_age_steps=5)
    set_vitals(model, 3, **CANNIBALISED)
    assert proposed(model) == []
    assert kinds(proposed(model)) == [("preserve", 3)]
    set_vitals(model, 3, interference=0.0)
    assert proposed(model) == []
    newborn = model.split_expert(0, 5).children[0]
    set_vitals(model, newborn, **CANNIBALISED, age=4)
    assert proposed(model) == [] and proposed(model) == []
    set_vitals(model, newborn, age=5)
    assert proposed(model) == []
    assert kinds(proposed(model)) == [("preserve", newborn)]


def test_the_preserver_is_frozen_as_it_is_and_the_adapter_takes_the_gradients_and_the_moments() -> None:
    model = model_with().train()
    optimizer = LivingAdamW(model, lr=1e-3)
    for seed in range(2):
        ids = token_ids(4, 12, seed)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.vitals(0)
    for block in model.living_blocks:
        block.vitals.forget()
    set_vitals(model, 3, **CANNIBALISED)
    block = model.living_block(0)
    slab, row = block.experts.slab("trainable"), block.population.find(3, 0).row
    weights = slab.down_proj.detach()[row].clone()
    moments = optimizer.state[slab.down_proj]["exp_avg"][row].clone()
    before = logits(model.eval(), IDS)
    events = model.decide_events(optimizer)
    assert [(event.kind, event.parents) for event in events] == [("split", (3,)), ("freeze", (3,))]
    assert {event.metric for event in events} == {"divergence"}
    assert relative_difference(logits(model, IDS), before) <= 1e-6
    preserver, adapter = (block.population.find(uid, 0) for uid in (3, events[0].children[0]))
    assert (preserver.slab, adapter.slab) == ("frozen", "trainable")
    assert torch.equal(block.experts.slab("frozen").down_proj[preserver.row], weights)
    slab = block.experts.slab("trainable")
    assert torch.equal(slab.down_proj.detach()[adapter.row], weights)
    assert torch.equal(optimizer.state[slab.down_proj]["exp_avg"][adapter.row], moments) and moments.any()
    check_invariants(model)


@pytest.mark.parametrize(("load", "multiple"), [(1.0, 1.0), (0.01, 0.25), (2.5, 2.5), (9.0, 4.0)])
def test_a_preserver_thaws_after_a_time_in_proportion_to_its_load_once_the_data_have_settled(
    load: float, multiple: float
) -> None:
    model = model_with(preserve_steps=40, split_load=99.0, death_load=0.001)
    model.base_model._steps = None
    model.base_model.clock.steps.fill_(7)
    set_vitals(model, 3, **CANNIBALISED, load=load)
    model.decide_events()
    due = 7 + round(40 * multiple)
    assert int(model.living_block(0).vitals.table("frozen").thaw_at[0]) == due

    def at(step: int, vigilance: float = 1.0) -> list[tuple[Any, ...]]:
        around = operations.Surroundings(step, model.config.lifecycle, model.config.experts)
        return kinds(proposed(model, around=around, vigilance=vigilance))

    assert at(due - 1) == [] and at(due, vigilance=1.5) == []
    assert at(due) == [("thaw", 3)]
    model.base_model._steps = None
    model.base_model.clock.steps.fill_(due)
    assert [event.kind for event in model.decide_events()] == ["thaw"]
    assert model.living_block(0).population.find(3, 0).slab == "trainable"
    assert not model.living_block(0).vitals.table("trainable").thaw_at.any()


def test_who_was_frozen_by_hand_or_by_a_graft_never_thaws_of_itself() -> None:
    model = model_with()
    model.freeze_expert(0, 2)
    around = operations.Surroundings(10**9, model.config.lifecycle, model.config.experts)
    assert proposed(model, around=around) == []


def test_what_chance_does_to_an_average_of_few_tokens_is_no_sign() -> None:
    model = model_with()
    # The fast average of measurements of variance v has the variance v (1 - 0.9) / (1 + 0.9).
    set_vitals(model, 3, **CANNIBALISED, loss_noise=19 * (0.25 / 3) ** 2)
    assert proposed(model) == []
    assert kinds(proposed(model, vigilance=1.5)) == [("preserve", 3)]
    set_vitals(model, 3, loss_noise=19 * (0.19 / 3) ** 2)
    assert kinds(proposed(model)) == [("preserve", 3)]


# -- what a merge would change -----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    choices=st.lists(st.permutations([-1, -1, 0, 1, 2, 3, 4]).map(lambda places: places[:3])),
)
def test_coactivation_counts_tokens_that_chose_both(choices: list[list[int]]) -> None:
    together = coactivation(torch.tensor(choices, dtype=torch.int64).view(-1, 3), 5)
    for one in range(5):
        for other in range(5):
            assert together[one, other] == sum(one in chosen and other in chosen for chosen in choices)


def sample_of(model: LivingMoeForCausalLM, tokens: int = 64, seed: int = 0) -> Sample:
    block = model.living_block(0)
    hidden_SH = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        _, weights_SK, choices_SK = block.router(hidden_SH, block.population)
    return Sample(hidden_SH, choices_SK, torch.zeros(tokens, dtype=torch.int64), weights_SK)


def outputs(model: LivingMoeForCausalLM, hidden_SH: Tensor) -> Tensor:
    block = model.living_block(0)
    with torch.no_grad():
        _, weights, index = block.router(hidden_SH, block.population)
        return block.experts(hidden_SH, index, weights, block.population.alive)


@pytest.mark.parametrize("tier_up", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_displacement_is_how_far_the_merge_then_moves_the_layers_output(family: str, tier_up: bool) -> None:
    model = model_with(family)
    live(model, 6, seed=2)
    sample, uids = sample_of(model), model.expert_uids(0)[-2:]
    before = outputs(model, sample.hidden_SH)
    around = model._surroundings()
    draft, event = operations.merge(model.living_block(0), uids, around, Reason(), tier_up=tier_up)
    predicted = displacement(model.living_block(0), sample, draft, event.children[0], uids)
    count = model.expert_counts[0]
    model.merge_experts(0, uids, tier_up=tier_up)
    moved = (outputs(model, sample.hidden_SH) - before).norm(dim=1) / before.norm(dim=1)
    assert predicted == pytest.approx(float(moved.mean()) * count, rel=1e-4, abs=1e-6)
    assert predicted > 1e-3


def fragments(model: LivingMoeForCausalLM, first: int, second: int, *, alike: bool, load: float = 0.2) -> Sample:
    """Two experts that serve the same tokens, with the same function or not, and the sample that shows it."""
    block = model.living_block(0)
    slab = block.experts.slab("trainable")
    if alike:
        for weight in (slab.gate_up_proj, slab.down_proj):
            weight.data[second] = weight.data[first]
    for uid in (first, second):
        set_vitals(model, uid, load=load)
    sample = sample_of(model, 40)
    pair = torch.tensor([first, second])
    choices = torch.where(torch.arange(40)[:, None] < 20, pair, torch.tensor([6, 7]))
    return sample._replace(choices_SK=choices)


def test_fragments_merge_into_a_wider_tier_if_that_displaces_nothing() -> None:
    model = model_with()
    sample = fragments(model, 1, 4, alike=True)
    (proposal,) = proposed(model, sample=sample)
    assert (proposal.kind, set(proposal.uids), proposal.tier_up) == ("merge", {1, 4}, True)
    assert proposal.reason == Reason("fragments", 1.0, 0.5) and proposal.displaced < 1e-5
    one = 4 * 3 * HIDDEN * 16
    assert proposal.added_bytes == 4 * one - 2 * one
    model = model_with()
    assert proposed(model, sample=fragments(model, 1, 4, alike=False)) == []


def test_nobody_merges_who_had_no_token_since_the_last_decision() -> None:
    model = model_with()
    sample = fragments(model, 1, 4, alike=True)
    set_vitals(model, 1, idle=model.config.lifecycle.interval - 1)
    assert kinds(proposed(model, sample=sample, memory=0.95)) != []
    for uid in model.expert_uids(0):
        set_vitals(model, uid, idle=model.config.lifecycle.interval)
    assert proposed(model, sample=sample, memory=0.95) == []


def test_fragments_are_weak() -> None:
    model = model_with()
    assert proposed(model, sample=fragments(model, 1, 4, alike=True, load=0.6)) != [], "tier gravity"
    assert proposed(model, sample=fragments(model, 1, 4, alike=True, load=0.6))[0].reason.metric == "tier gravity"
    model.config.experts.max_tier = 0
    assert proposed(model, sample=fragments(model, 1, 4, alike=True, load=0.6)) == []
    (proposal,) = proposed(model, sample=fragments(model, 1, 4, alike=True))
    assert not proposal.tier_up, "without a wider tier fragments are averaged"


def test_near_the_memory_budget_the_weakest_merge_if_that_displaces_nothing() -> None:
    model = model_with()
    sample = fragments(model, 1, 4, alike=True)
    sample = sample._replace(choices_SK=torch.tensor([[0, 2]]).expand(40, 2))
    assert proposed(model, sample=sample, memory=0.89) == []
    found = proposed(model, sample=sample, memory=0.95)
    assert ("merge", 1, 4) in kinds(found) and all(not proposal.tier_up for proposal in found)
    assert found[0].reason.metric == "memory" and found[0].added_bytes < 0


def test_a_merge_that_the_policy_wants_happens_and_moves_no_output() -> None:
    model = model_with(min_experts=4)
    block = model.living_block(0)
    sample = fragments(model, 1, 4, alike=True)
    block.vitals.sample = sample
    before = logits(model, IDS)
    events = model.decide_events()
    assert [event.kind for event in events] == ["merge"] and events[0].metric == "fragments"
    assert relative_difference(logits(model, IDS), before) <= 1e-5
    assert "trainable_tier1" in model.config.populations[0]


# -- lifetimes ---------------------------------------------------------------------------------------------------------


def test_wider_experts_wait_longer() -> None:
    model = model_with(min_age_steps=10, patience=2, lifetime_exponent=0.5, cooldown_steps=6)
    newborn = model.split_expert(0, 3).children[0]
    model.merge_experts(0, [newborn, 5], tier_up=True)
    assert model.living_block(0).population.find(newborn, 0).slab == "trainable_tier1"
    set_vitals(model, newborn, load=9.0, age=19, foreign_load=0.0)
    assert proposed(model) == []
    set_vitals(model, newborn, age=20)
    found = [kinds(proposed(model)) for _ in range(4)]
    assert found == [[], [], [], [("split", newborn)]], "a width of four takes twice the age and the patience"
    assert proposed(model)[0].lifetime == 2.0


def test_an_expert_with_little_traffic_must_be_older_to_split() -> None:
    model = model_with(min_age_steps=10, split_load=0.3)
    newborn = model.split_expert(0, 3).children[0]
    share = 8 / 9  # of a clade's uniform share, by the newborn's birth
    set_vitals(model, newborn, load=0.5 / share, age=19)
    assert ("split", newborn) not in kinds(proposed(model))
    set_vitals(model, newborn, age=20)
    assert ("split", newborn) in kinds(proposed(model))


def test_every_lineage_reaches_a_root() -> None:
    model = model_with("mixtral", "microexperts", min_experts=3, split_load=1.1, death_load=0.3, preserve_steps=2)
    model.train()
    roots = set(model.expert_uids(0))
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        low = int(torch.randint(3, 50, (), generator=generator))
        ids = torch.randint(low, low + 12, (3, 8), generator=generator)
        model(ids, labels=ids).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
        if step % 3 == 0:
            for uid in model.expert_uids(0)[:3]:
                if "frozen" not in model.living_block(0).population.find(uid, 0).slab:
                    set_vitals(model, uid, **CANNIBALISED)
        model.lifecycle_step()
        model.zero_grad()
    check_invariants(model)
    events = [event for event in model.lineage if event.layer == 0]
    assert {"split", "freeze", "thaw"} <= {event.kind for event in events}
    parents = {event.children[0]: event.parents[0] for event in events if event.kind == "split"}
    for uid in model.expert_uids(0):
        while uid in parents:
            uid = parents[uid]
        assert uid in roots


def test_a_decision_is_the_same_again() -> None:
    model = model_with()
    sample = fragments(model, 1, 4, alike=True)
    set_vitals(model, 3, **CANNIBALISED)
    again = copy.deepcopy(model)
    assert proposed(model, sample=sample) == proposed(again, sample=sample)
