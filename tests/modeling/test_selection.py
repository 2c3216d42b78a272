"""Who is chosen: as many clades as a token needs, or the family's number, biases or not; weights equal the oracle's."""

import copy
import itertools
from typing import Any

import pytest
import torch
from factories import (
    EVENTS,
    FAMILIES,
    HIDDEN,
    VOCAB,
    check_invariants,
    drift,
    living_model,
    logits,
    mixed_text,
    token_ids,
    try_event,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_equals_oracle
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.sections import RouterConfig
from living_moe.modeling_living_moe.families import Scoring
from living_moe.modeling_living_moe.router import CandidateColumns
from living_moe.modeling_living_moe.selection import FLOOR, UNUSED, FamilySelection, TopAny, selection_rule

GATES = ("straight_through", "relu")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "active")
#: Near the middle of the scores that `source_model` gives, so that tokens differ in how many experts they need.
MIDDLE = 1.0


def any_model(family: str = "mixtral", preset: str = "grow", **router: Any) -> LivingMoeForCausalLM:
    settings_ = {"selection": "top_any", "threshold": MIDDLE, **router}
    overrides = {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    return living_model(family, preset, sections={"router": settings_, "lifecycle": {"enabled": False}}, **overrides)


def rule(top_k: int = 2, function: str = "softmax", **router: Any) -> TopAny:
    return TopAny(Scoring(top_k, function=function), RouterConfig(selection="top_any", **router))


# -- top-any: the choice -----------------------------------------------------------------------------------------------


@given(
    tokens=st.integers(0, 20),
    columns=st.integers(1, 12),
    closed=st.integers(0, 3),
    top_k=st.integers(1, 3),
    places=st.one_of(st.none(), st.integers(1, 15)),
    threshold=st.sampled_from([-9.0, -0.7, 0.0, 0.9, 9.0]),
    gate=st.sampled_from(GATES),
    function=st.sampled_from(["softmax", "sigmoid"]),
    bias=st.sampled_from(["none", "per clade", "per token"]),
)
@settings(max_examples=150)
def test_a_token_takes_all_above_the_threshold_at_least_one_and_at_most_its_places(
    tokens: int, columns: int, closed: int, top_k: int, places: int | None, threshold: float, gate: str,
    function: str, bias: str,
) -> None:  # fmt: skip
    selection = rule(top_k, function, threshold=threshold, gate=gate, max_experts_per_token=places)
    assert selection.places == (places or 2 * top_k)
    logits_TN = torch.randn(tokens, columns + closed)
    shape = {"none": None, "per clade": (columns + closed,), "per token": (tokens, columns + closed)}[bias]
    bias_TN = None if shape is None else torch.randn(shape)
    weights_TK, chosen_TK = selection(logits_TN, bias_TN, CandidateColumns(columns))
    assert weights_TK.shape == chosen_TK.shape == (tokens, selection.places)
    choice_TN = (logits_TN if bias_TN is None else logits_TN + bias_TN)[:, :columns] - threshold
    for choice_N, weights_K, chosen_K in zip(choice_TN, weights_TK, chosen_TK, strict=True):
        best = choice_N.argsort(descending=True).tolist()
        above = [n for n in best if choice_N[n] > 0][: selection.places]
        used = [n for n in chosen_K.tolist() if n != UNUSED]
        assert used == (above or best[:1])
        assert chosen_K.tolist() == used + [UNUSED] * (selection.places - len(used))
        assert not weights_K[len(used) :].any() and (weights_K >= 0).all() and weights_K.isfinite().all()
        if gate == "straight_through":
            torch.testing.assert_close(weights_K.sum(), torch.tensor(1.0))


def test_rectified_weights_are_heights_above_the_threshold() -> None:
    weights_TK, chosen_TK = rule(gate="relu", threshold=0.5)(
        torch.tensor([[0.2, 2.0, 0.6], [0.1, 0.0, -4.0]]), None, CandidateColumns(3)
    )
    assert chosen_TK.tolist() == [[1, 2, -1, -1], [0, -1, -1, -1]]
    height = torch.tensor(-0.4)
    torch.testing.assert_close(
        weights_TK, torch.tensor([[1.5, 0.1, 0, 0], [float(FLOOR * height.exp()), 0, 0, 0]]), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("place", ["best", "second"])
def test_rectified_weights_are_continuous_where_a_score_crosses_the_threshold(place: str) -> None:
    selection = rule(gate="relu", threshold=0.5)
    other = -3.0 if place == "best" else 2.0

    def weight(score: float) -> float:
        weights_TK, chosen_TK = selection(torch.tensor([[score, other]]), None, CandidateColumns(2))
        return float(weights_TK[chosen_TK == 0].sum())

    scores = torch.linspace(0.4, 0.6, 400).tolist()
    weights = [weight(score) for score in scores]
    assert max(abs(b - a) for a, b in itertools.pairwise(weights)) <= 0.2 / 399 + 1e-5
    assert weights[-1] == pytest.approx(0.1)
    assert (weights[0] > 0) == (place == "best"), "the best always has some weight, else it could never learn"


def test_weights_are_scaled_and_cast_as_the_family_does() -> None:
    plain = TopAny(Scoring(2), RouterConfig())
    scaled = TopAny(Scoring(2, scaling=2.5, cast_weights=True), RouterConfig())
    logits_TN = torch.randn(9, 6).bfloat16()
    one, other = (each(logits_TN, None, CandidateColumns(6))[0] for each in (plain, scaled))
    assert one.dtype == torch.float32 and other.dtype == torch.bfloat16
    torch.testing.assert_close(other, (2.5 * one).bfloat16())


def test_each_config_gets_its_rule() -> None:
    assert isinstance(selection_rule(Scoring(2), RouterConfig()), FamilySelection)
    assert isinstance(selection_rule(Scoring(2), RouterConfig(selection="top_any")), TopAny)


def test_a_compiled_choice_is_one_graph_and_the_same() -> None:
    logits_TN = torch.randn(20, 8)
    for gate in GATES:
        selection = rule(gate=gate)
        compiled = torch.compile(
            lambda x, selection=selection: selection(x, None, CandidateColumns(8)), backend="aot_eager", fullgraph=True
        )
        for ours, theirs in zip(compiled(logits_TN), selection(logits_TN, None, CandidateColumns(8)), strict=True):
            torch.testing.assert_close(ours, theirs)


# -- top-any: in a model -----------------------------------------------------------------------------------------------

lives = st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.integers(0, 10_000)), max_size=12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5)
@given(life=lives, places=st.sampled_from([None, 1, 12]), threshold=st.sampled_from([-1.0, MIDDLE, 9.0]))
def test_any_population_equals_the_oracle_forward_and_backward(
    family: str, preset: str, gate: str, life: list[tuple[str, int]], places: int | None, threshold: float
) -> None:
    model = any_model(family, preset, gate=gate, max_experts_per_token=places, threshold=threshold)
    for kind, seed in life:
        try_event(model, kind, 0, seed)
        check_invariants(model)
    drift(model, len(life), frozen=True)
    assert_equals_oracle(model)


def test_fields_may_see_different_numbers_of_clades() -> None:
    """A frozen expert dies whose newborn lives on in the new field: eight clades there, seven in the root field."""
    model = any_model(preset="frozen-graft", max_experts_per_token=8, threshold=-9.0)
    model.split_expert(0, 3)
    drift(model, 0, frozen=True)
    model.remove_expert(0, 3)
    population = model.living_blocks[0].population
    assert (population.num_open(0), population.num_open(1)) == (7, 8)
    assert_equals_oracle(model)


@pytest.mark.parametrize("frozen", [(), (1, 4)], ids=["one slab", "two slabs"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_experts_implementation_agrees_where_places_are_unused(
    family: str, gate: str, frozen: tuple[int, ...]
) -> None:
    model = any_model(family, gate=gate)
    for layer in range(len(model.expert_counts)):
        for uid in frozen:
            model.freeze_expert(layer, uid)
    ids, found = mixed_text(3, 16), {}
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        found[implementation] = logits(model, ids)
    for implementation in IMPLEMENTATIONS[1:]:
        torch.testing.assert_close(found[implementation], found["eager"], rtol=1e-4, atol=1e-5)
    index_TK = model.living_blocks[0].router(torch.randn(99, HIDDEN), model.living_blocks[0].population)[2]
    assert 0.1 < float((index_TK == UNUSED).float().mean()) < 0.9
    assert_equals_oracle(model, *IMPLEMENTATIONS)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_keys_and_queries_learn_where_a_token_has_one_expert_only(gate: str, function: str) -> None:
    family = "mixtral" if function == "softmax" else "deepseek_v3"
    model = any_model(family, gate=gate, threshold=9.0, query_network="linear")
    slow = assert_equals_oracle(model, scale=0.5)
    block = model.living_blocks[0]
    assert (block.router(torch.randn(30, HIDDEN), block.population)[2] != UNUSED).sum() == 30
    assert slow["router.keys.trainable"].any() and slow["router.query.linear.weight"].any()


def test_the_step_of_the_straight_through_gate_does_not_show_forward() -> None:
    logits_TN = torch.randn(40, 8)
    weights_TK, chosen_TK = rule()(logits_TN, None, CandidateColumns(8))
    scores_TK = logits_TN.gather(1, chosen_TK.clamp(min=0)).masked_fill(chosen_TK == UNUSED, float("-inf"))
    torch.testing.assert_close(weights_TK, scores_TK.softmax(dim=-1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_auxiliary_loss_is_finite_and_learned_from(family: str, gate: str, masked: bool) -> None:
    model = any_model(family, gate=gate, aux_loss_coef=0.1, z_loss_coef=0.01).train()
    model.split_expert(0, 2)
    ids = mixed_text(4, 12)
    mask = torch.ones_like(ids)
    mask[0, : 6 * masked] = 0
    output = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert output.loss.isfinite() and 0 < float(output.aux_loss.detach()) < 16
    (grad,) = torch.autograd.grad(output.aux_loss, model.living_blocks[0].router.keys["trainable"], retain_graph=True)
    assert grad.isfinite().all() and grad.any()
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_generation_without(family: str, gate: str) -> None:
    model = any_model(family, gate=gate)
    ids = mixed_text(2, 8)
    cached, plain = (
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=VOCAB + 1)
        for use_cache in (True, False)
    )
    assert cached.shape == (2, 14) and torch.equal(cached, plain)


# -- density -----------------------------------------------------------------------------------------------------------


def routed(model: LivingMoeForCausalLM) -> list[tuple[Tensor, Tensor]]:
    """Fills with (weights, experts) of every layer's choices as the model runs."""
    found: list[tuple[Tensor, Tensor]] = []
    for block in model.living_blocks:
        block.router.register_forward_hook(lambda module, args, output: found.append((output[1], output[2])))
    return found


def test_vitals_and_density_count_used_places_of_real_tokens_only() -> None:
    model = any_model(threshold_rate=0.3).train()
    found = routed(model)
    ids = mixed_text(4, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[3, :9] = 0
    for batch in (slice(0, 1), slice(1, 4)):  # two micro-batches of unequal size, with unequal padding
        model(ids[batch], attention_mask=mask[batch])
    real_T = mask.flatten().bool()
    before = [block.router.selection.threshold.clone() for block in model.living_blocks]
    pending = [block.vitals.pending.clone() for block in model.living_blocks]
    model.lifecycle_step()
    layers = len(model.living_blocks)
    for number, block in enumerate(model.living_blocks):
        weights_TK, index_TK = (torch.cat([f[n] for f in found[number::layers]])[real_T].detach() for n in (0, 1))
        used_TK = index_TK != UNUSED
        expected = torch.bincount(index_TK[used_TK], minlength=8)
        assert torch.equal(pending[number][0].long(), expected)
        torch.testing.assert_close(pending[number][1].sum().float(), weights_TK[used_TK].sum())
        assert torch.equal(block.vitals.table("trainable").tokens, expected)
        density = float(used_TK.sum() / real_T.sum())
        assert 1.0 < density < 4.0
        step = 0.3 * (density / 2 - 1)
        assert float(block.router.selection.threshold - before[number]) == pytest.approx(step, rel=1e-4, abs=1e-6)


def test_a_step_without_tokens_leaves_the_threshold_alone() -> None:
    model = any_model()
    before = [block.router.selection.threshold.clone() for block in model.living_blocks]
    model(mixed_text(1, 8))
    model.lifecycle_step()
    assert [float(block.router.selection.threshold) for block in model.living_blocks] == list(map(float, before))


@pytest.mark.parametrize("target", [1.2, None, 3.0])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_threshold_finds_the_density_it_is_steered_to(family: str, target: float | None) -> None:
    model = any_model(family, target_experts_per_token=target, threshold=-3.0, threshold_rate=0.2).train()
    found = routed(model)
    with torch.no_grad():
        for step in range(120):
            for micro in range(2):
                model(token_ids(2, 24, seed=2 * step + micro))
            model.lifecycle_step()
    layers = len(model.living_blocks)
    for layer in range(layers):
        density = [float((index != UNUSED).float().sum(dim=1).mean()) for _, index in found[layer::layers]]
        assert density[0] > 3.5, "it starts where nearly every place is used"
        assert sum(density[-80:]) / 80 == pytest.approx(target or 2.0, rel=0.05)


def test_the_threshold_is_saved_and_loaded_and_keeps_its_precision(tmp_path) -> None:
    model = any_model(preset="grow")
    model.living_blocks[1].router.selection.threshold.fill_(1.2345678)
    low = copy.deepcopy(model).bfloat16()
    assert torch.equal(low.living_blocks[1].router.selection.threshold, torch.tensor(1.2345678))
    model.save_pretrained(tmp_path)
    again = LivingMoeForCausalLM.from_pretrained(tmp_path)
    thresholds = [float(block.router.selection.threshold) for block in again.living_blocks]
    assert thresholds == pytest.approx([MIDDLE, 1.2345678], abs=1e-7)
    ids = mixed_text(2, 8)
    assert torch.equal(logits(again, ids), logits(model, ids))


# -- the family's rule with biases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule_", [Scoring(2), Scoring(3, normalise=False, cast_weights=True), Scoring(2, function="sigmoid", epsilon=1e-20)]
)
def test_biases_choose_and_never_weigh(rule_: Scoring) -> None:
    selection = FamilySelection(rule_)
    logits_TN, bias_N = torch.randn(60, 9), torch.randn(9) / 4
    scores_TN = logits_TN.softmax(dim=-1) if rule_.function == "softmax" else logits_TN.sigmoid()
    weights_TK, chosen_TK = selection(logits_TN, bias_N, CandidateColumns(7))
    expected_TK = (scores_TN + bias_N)[:, :7].topk(rule_.top_k).indices
    assert torch.equal(chosen_TK.sort().values, expected_TK.sort().values)
    own_TK = scores_TN.gather(1, chosen_TK)
    torch.testing.assert_close(weights_TK, own_TK / own_TK.sum(-1, keepdim=True) if rule_.normalise else own_TK)
    per_token = selection(logits_TN, bias_N.expand(60, 9), CandidateColumns(7))
    assert all(map(torch.equal, per_token, (weights_TK, chosen_TK)))
    unbiased, zero = (selection(logits_TN, bias, CandidateColumns(7)) for bias in (None, torch.zeros(9)))
    assert all(map(torch.equal, unbiased, zero)) and not torch.equal(unbiased[1], chosen_TK)


@pytest.mark.parametrize("selection", ["family", "top_any"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(life=lives)
def test_biased_populations_equal_the_oracle(family: str, selection: str, life: list[tuple[str, int]]) -> None:
    model = any_model(family) if selection == "top_any" else living_model(family)
    block = model.living_blocks[0]
    block.population.table("trainable").bias.normal_(0, 0.2)
    block.population.biases_moved()
    plain = copy.deepcopy(block)
    plain.population.table("trainable").bias.zero_()
    plain.population.biases_moved()
    hidden_TH = torch.randn(200, HIDDEN)
    assert not torch.equal(block.router(hidden_TH, block.population)[2], plain.router(hidden_TH, plain.population)[2])
    for kind, seed in life:
        try_event(model, kind, 0, seed)
        check_invariants(model)
    drift(model, len(life), frozen=True)
    assert_equals_oracle(model)
