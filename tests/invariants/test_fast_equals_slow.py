"""A living layer equals the oracle, forward and backward, whatever events came before.

The oracle (`reference.py`) computes one token at a time. Random lives are drawn by hypothesis; every rule of choice,
every experts implementation, tokens in and out of receptive fields.
"""

import copy
import functools
from typing import Any

import pytest
import torch
from factories import EVENTS, HIDDEN, check_invariants, drift, living_model, try_event
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.block import ForwardContext, LivingMoeBlock
from living_moe.modeling_living_moe.receptive_field import FieldGate
from living_moe.modeling_living_moe.reference import reference_forward, reference_route

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", dict(num_hidden_layers=1)),
    "mixtral top-1": ("mixtral", dict(num_hidden_layers=1, num_experts_per_tok=1)),
    "qwen": ("qwen3_moe", dict(num_hidden_layers=1)),
    "qwen not renormalised": ("qwen3_moe", dict(num_hidden_layers=1, norm_topk_prob=False)),
    "deepseek": ("deepseek_v3", dict(num_hidden_layers=2)),
    "deepseek, 2 of 4 groups": (
        "deepseek_v3", dict(num_hidden_layers=2, n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3)
    ),
    "deepseek without groups": ("deepseek_v3", dict(num_hidden_layers=2, n_group=1, topk_group=1)),
}  # fmt: skip
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "active")
TOKENS = 10

lives = st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.just(0), st.integers(0, 10_000)), max_size=14)


@functools.cache
def newborn_model(rule: str, preset: str) -> LivingMoeForCausalLM:
    family, overrides = RULES[rule]
    return living_model(family, preset, **overrides)


def after(rule: str, preset: str, life: list[tuple[str, int, int]]) -> LivingMoeForCausalLM:
    model = copy.deepcopy(newborn_model(rule, preset))
    for kind, layer, seed in life:
        try_event(model, kind, layer, seed)
        check_invariants(model)
        if seed % 3 == 0:
            drift(model, seed, frozen=True)
    drift(model, len(life), frozen=True)
    return model


def gradients(block: LivingMoeBlock, output_TH: Tensor, hidden_TH: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every output, per parameter with one row per slot, and of the input."""
    block.zero_grad()
    hidden_TH.grad = None
    weights = torch.randn(output_TH.shape, generator=torch.Generator().manual_seed(7))
    (output_TH * weights).sum().backward()
    found = {"hidden": hidden_TH.grad.clone()}
    for slot in block.slot_parameters():
        if slot.parameter.requires_grad:
            grad = slot.parameter.grad
            found[f"{slot.slab} {slot.role}"] = torch.zeros_like(slot.parameter) if grad is None else grad.clone()
    return found


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=12)
@given(life=lives, seed=st.integers(0, 10_000))
def test_outputs_and_gradients_equal_the_oracles(
    rule: str, preset: str, life: list[tuple[str, int, int]], seed: int
) -> None:
    model = after(rule, preset, life)
    block = model.living_blocks[0]
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    field_T = None
    if preset == "frozen-graft":
        field_T = torch.randint(2, (TOKENS,), generator=generator)
        gate = FieldGate(field_T[None], torch.zeros(1, TOKENS, 1))
        block.context = ForwardContext(gate)
    shared = block.shared_experts
    block.shared_experts = None
    expected = reference_forward(block, hidden_TH, field_T)
    slow = gradients(block, expected, hidden_TH)
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        for training in (False, True):
            block.train(training)
            output = block(hidden_TH[None])[0]
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            fast = gradients(block, output, hidden_TH)
            for name in slow:
                torch.testing.assert_close(
                    fast[name], slow[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
    block.shared_experts = shared


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=8)
@given(life=lives)
def test_the_vitals_count_the_tokens_the_oracle_sends(rule: str, life: list[tuple[str, int, int]]) -> None:
    model = after(rule, "frozen-graft", life)
    block = model.living_blocks[0].train()
    hidden_TH = torch.randn(TOKENS, HIDDEN)
    field_T = torch.randint(3, (TOKENS,))
    real_T = torch.rand(TOKENS) < 0.7
    block.context = ForwardContext(FieldGate(field_T[None], torch.zeros(1, TOKENS, 2)), real_T[None], observe=True)
    block.vitals.pending = block.vitals.since_step = None
    block(hidden_TH[None])
    members = block.population.members
    expected = torch.zeros(4, len(members), dtype=torch.float64)
    for t in range(TOKENS):
        for weight, member in reference_route(block, hidden_TH[t], int(field_T[t])):
            if real_T[t]:
                foreign = float(member.field != int(field_T[t]))
                expected[:3, member.index] += torch.tensor([1.0, float(weight), foreign], dtype=torch.float64)
                # What an expert's load is measured against: all pairs of its field, for the root's all there are.
                expected[3] += torch.tensor([m.field in (0, int(field_T[t])) for m in members], dtype=torch.float64)
    torch.testing.assert_close(block.vitals.pending, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(block.vitals.since_step, expected[0].long())


@settings(max_examples=20)
@given(life=lives)
def test_uids_are_never_reused_and_the_lineage_tells_every_birth_and_death(life: list[tuple[str, int, int]]) -> None:
    model = copy.deepcopy(newborn_model("mixtral", "grow"))
    ever, alive = set(range(8)), set(range(8))
    for kind, layer, seed in life:
        event = try_event(model, kind, layer, seed)
        if event is None:
            continue
        assert model.lineage[len(model.lineage) - 1] == event
        if event.kind == "split":
            assert not ever & set(event.children)
            alive |= set(event.children)
            ever |= alive
        elif event.kind in ("death", "merge"):
            alive -= set(event.parents) - set(event.children)
        assert set(model.expert_uids(0)) == alive
        assert model.expert_counts == [len(alive)]
