"""A router that searches its keys chooses, weighs and learns as one that compares them all, whatever has happened.

With every cluster probed the search misses nothing, so the exact router is the oracle.
"""

import copy
import time
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
    prime_searches,
    source_config,
    token_ids,
    try_event,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients
from torch import Tensor

from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.block import ForwardContext, LivingMoeBlock
from living_moe.modeling_living_moe.key_search import KeyStoreSearch, TwoStageSearch
from living_moe.modeling_living_moe.population import NOBODY, Member
from living_moe.modeling_living_moe.reference import reference_address, reference_server
from living_moe.modeling_living_moe.selection import UNUSED

EXPERTS = 24
#: Families without groups: group-limited routing needs every score.
PLAIN = {"deepseek_v3": {"n_group": 1, "topk_group": 1}}
#: How each family names its number of experts.
COUNT = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}


def searched_model(family: str = "mixtral", preset: str = "grow", **router: Any) -> LivingMoeForCausalLM:
    """Of 24 experts a layer; its searches probe everything."""
    overrides = {COUNT[family]: EXPERTS, **PLAIN.get(family, {})}
    model = living_model(family, preset, sections={"router": {"search": "two_stage", **router}}, **overrides)
    for block in model.living_blocks:
        for slab in block.population.slabs:  # a DeepSeek comes with biases, and biased layers compare every key
            block.population.table(slab).bias.zero_()
        block.population.biases_moved()
    probe_all(model)
    return model


def probe_all(model: LivingMoeForCausalLM) -> None:
    for block in model.living_blocks:
        block.router.search.index = TwoStageSearch()
        block.router.search.index.probes = 10_000
    prime_searches(model)


def exact(block: LivingMoeBlock) -> LivingMoeBlock:
    """A copy that compares every key."""
    twin = copy.deepcopy(block)
    twin.router.search = None
    return twin


def found(block: LivingMoeBlock, hidden_TH: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Weights, experts, and whether they come of a search: then the logits are those of the candidates."""
    logits_TC, weights_TK, index_TK = block.router(hidden_TH, block.population, all_logits=False)
    keys = block.router.keys(block.population.alive)
    return weights_TK, index_TK, logits_TC.shape != (len(hidden_TH), len(keys)) or bool(logits_TC.isinf().any())


def assert_same_as_exact(block: LivingMoeBlock, tokens: int = 40, seed: int = 0) -> None:
    """Values, and gradients of the input, keys, queries and experts."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    twin = exact(block)
    outcomes = []
    for each in (block, twin):
        each.shared_experts = None
        each.context = ForwardContext(all_logits=False)
        output_TH = each(hidden_TH[None])[0]
        outcomes.append((output_TH, gradients(each, output_TH, hidden_TH)))
    (ours, fast), (theirs, slow) = outcomes
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert fast.keys() == slow.keys()
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    block.context = None


# -- equal to the exact router -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "router",
    [
        {},
        {"query_network": "mlp", "d_key": EXPERTS},
        {"similarity": "cosine", "temperature": 0.1, "query_network": "linear"},
        {"selection": "top_any", "threshold": 1.5},
        {"selection": "top_any", "threshold": 1.5, "gate": "relu", "max_experts_per_token": 3},
    ],
    ids=["dot", "mlp", "cosine", "top-any", "rectified"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_population_is_routed_as_by_the_exact_router(family: str, router: dict[str, Any]) -> None:
    model = searched_model(family, **router)
    drift(model, 0, 0.1, frozen=True)
    block = model.living_blocks[0]
    hidden_TH = torch.randn(60, HIDDEN)
    weights_TK, index_TK, searched = found(block, hidden_TH)
    assert searched and block.router.search.mode == "two_stage" and block.router.search.recall == 1.0
    twin = exact(block)
    expected_TK, places_TK, not_searched = found(twin, hidden_TH)
    assert not not_searched
    assert torch.equal(index_TK.sort().values, places_TK.sort().values)
    torch.testing.assert_close(weights_TK.sort().values, expected_TK.sort().values)
    assert_same_as_exact(block)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_searched_models_loss_and_gradients_are_the_exact_models(family: str) -> None:
    model = searched_model(family, query_network="linear").train()
    twin = copy.deepcopy(model)
    for block in twin.living_blocks:
        block.router.search = None
    probe_all(model)
    ids = mixed_text(3, 16)
    losses = []
    for each in (model, twin):
        losses.append(each(ids, labels=ids).loss)
        losses[-1].backward()
    assert all(block.router.search.mode == "two_stage" for block in model.living_blocks)
    torch.testing.assert_close(*losses)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


lives = st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.integers(0, 10_000)), max_size=16)


def lived(model: LivingMoeForCausalLM, life: list[tuple[str, int]]) -> LivingMoeForCausalLM:
    for kind, seed in life:
        try_event(model, kind, 0, seed)
        check_invariants(model)
        if seed % 3 == 0:
            drift(model, seed, frozen=True)
    drift(model, len(life), frozen=True)
    return model


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(life=lives, seed=st.integers(0, 1000))
def test_the_address_book_tells_who_serves_after_any_life(
    family: str, preset: str, life: list[tuple[str, int]], seed: int
) -> None:
    """In the root field, which is all that is searched: of each clade the oracle's address, and no other."""
    model = lived(living_model(family, preset), life)
    block = model.living_blocks[0]
    population = block.population
    book = population.address_book(torch.device("cpu"))
    hidden_TH = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 2
    addresses = population.addresses
    serves_TA = book.serves(hidden_TH, torch.arange(len(addresses)).expand(8, -1))
    known = [*population.members, *population.tombstones]
    clades = dict.fromkeys(address.clade for address in known if address.field == 0)
    for hidden, serves_A in zip(hidden_TH, serves_TA, strict=True):
        expected: dict[int, int] = {}
        for clade in clades:
            address = reference_address(block, hidden, clade, 0)
            server = reference_server(block, address)
            if server is not None:
                index = address.index if isinstance(address, Member) else [a.uid for a in addresses].index(address.uid)
                expected[index] = server.index
        assert set(serves_A.nonzero()[:, 0].tolist()) == set(expected)
        assert all(int(book.server_A[index]) == server != NOBODY for index, server in expected.items())
    none = torch.full((8, 3), -1)
    assert not book.serves(hidden_TH, none).any()


@pytest.mark.parametrize("router", [{}, {"query_network": "mlp", "d_key": 28}, {"selection": "top_any"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(life=lives)
def test_any_population_is_routed_as_by_the_exact_router(
    family: str, router: dict[str, Any], life: list[tuple[str, int]]
) -> None:
    assert_same_as_exact(lived(searched_model(family, **router), life).living_blocks[0])


def test_a_grown_layer_with_tombstones_is_still_searched() -> None:
    model = searched_model()
    newborns = [model.split_expert(0, uid).children[0] for uid in range(EXPERTS)]
    drift(model, 0)
    for uid in newborns[:6]:
        model.remove_expert(0, uid)
    block = model.living_blocks[0]
    assert len(block.population.tombstones) == 6
    assert found(block, torch.randn(60, HIDDEN))[2]
    for seed in range(5):
        assert_same_as_exact(block, 1, seed)


def test_tokens_with_too_few_serving_candidates_compare_every_key_and_no_others_do(monkeypatch) -> None:
    """All siblings of one clade lie before the others for some tokens, and only one of them serves."""
    model = searched_model()
    for _ in range(12):
        model.split_expert(0, 0)
    block = model.living_blocks[0]
    keys = block.router.keys["trainable"].data
    for member in block.population.members:
        if member.clade == 0:
            keys[member.row] = 5.0 * torch.ones(HIDDEN)
    compared = []
    plain = block.router.choose
    monkeypatch.setattr(
        block.router, "choose", lambda hidden_TH, *rest: compared.append(hidden_TH) or plain(hidden_TH, *rest)
    )
    near_TH, far_TH = torch.randn(40, HIDDEN) * 0.1 + 1.0, torch.randn(40, HIDDEN) * 0.1 - 1.0
    mixed_TH = torch.stack([near_TH, far_TH], dim=1).flatten(0, 1)
    weights_TK, index_TK, _ = found(block, mixed_TH)
    assert len(compared) == 1 and torch.equal(compared[0], near_TH)
    expected_TK, places_TK, _ = found(exact(block), mixed_TH)
    assert torch.equal(index_TK.sort().values, places_TK.sort().values)
    torch.testing.assert_close(weights_TK.sort().values, expected_TK.sort().values)
    assert_same_as_exact(block)


# -- when every key is compared ----------------------------------------------------------------------------------------


def test_who_asks_for_router_logits_gets_those_of_every_expert() -> None:
    model = searched_model(aux_loss_coef=0.1)
    ids = mixed_text(2, 8)
    with torch.no_grad():
        asked, plain = model(ids, output_router_logits=True), model(ids)
        base = model.model(ids, output_router_logits=True)
    assert [tuple(layer.shape) for layer in asked.router_logits] == [(16, EXPERTS)] * 2
    assert all(layer.isfinite().all() for layer in asked.router_logits)
    assert all(map(torch.equal, base.router_logits, asked.router_logits))
    torch.testing.assert_close(asked.logits, plain.logits, rtol=1e-4, atol=1e-5)
    model.config.router.z_loss_coef = 0.1
    with torch.no_grad():
        with_z = model(ids, labels=ids)
    assert with_z.loss.isfinite() and with_z.router_logits is None


def test_biases_are_seen_although_a_search_sees_none() -> None:
    model = searched_model()
    block = model.living_blocks[0]
    hidden_TH = torch.randn(40, HIDDEN)
    assert found(block, hidden_TH)[2]
    block.population.table("trainable").bias.normal_()
    block.population.biases_moved()
    assert not found(block, hidden_TH)[2]
    assert_same_as_exact(block)


def test_layers_with_fields_compare_every_key() -> None:
    model = searched_model(preset="frozen-graft")
    model.split_expert(0, 1)
    twin = copy.deepcopy(model)
    for block in twin.living_blocks:
        block.router.search = None
    ids = mixed_text(3, 16)
    assert torch.equal(logits(model, ids), logits(twin, ids))
    assert model.living_blocks[0].router.search.recall is None


@pytest.mark.parametrize(
    ("family", "overrides", "router", "reason"),
    [
        ("deepseek_v3", {}, {}, "group-limited"),
        ("qwen3_moe", {"norm_topk_prob": False}, {}, "renormalised"),
        ("mixtral", {}, {"bias_update_rate": 0.01}, "balancing biases"),
    ],
)
@pytest.mark.parametrize("search", ["two_stage", "auto", "exact"])
def test_routers_that_need_every_score_refuse_a_search_and_take_auto_for_exact(
    family: str, overrides: dict[str, Any], router: dict[str, Any], reason: str, search: str
) -> None:
    sections = {"router": {"search": search, "search_from": 1, **router}}
    if search == "two_stage":
        with pytest.raises(ConfigurationError, match=rf"router.search is 'two_stage' .*{reason}.*'exact' or 'auto'"):
            living_model(family, sections=sections, **overrides)
    else:
        assert living_model(family, sections=sections, **overrides).living_blocks[0].router.search is None


def test_few_keys_are_not_searched_unless_asked_to() -> None:
    assert isinstance(living_model().living_blocks[0].router.search, KeyStoreSearch)
    model = living_model(sections={"router": {"search_from": 9}})
    block = model.living_blocks[0]
    prime_searches(model)
    assert not found(block, torch.randn(40, HIDDEN))[2]
    model.split_expert(0, 2)
    drift(model, 0)
    prime_searches(model)
    found(block, torch.randn(40, HIDDEN))
    assert block.router.search.mode == "two_stage"
    assert living_model(sections={"router": {"search": "exact"}}).living_blocks[0].router.search is None


# -- keys that move ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_keys_that_plasticity_moved_are_found_again(inference: bool) -> None:
    overrides = {"num_local_experts": EXPERTS}
    sections = {
        "router": {"search": "two_stage"},
        "plasticity": {"enabled": True, "alpha": 0.5, "inference": inference},
    }
    model = living_model("mixtral", sections=sections, **overrides).train(not inference)
    probe_all(model)
    block = model.living_blocks[0]
    for seed in range(4):
        before = block.router.keys["trainable"].detach().clone()
        with torch.no_grad():
            model(token_ids(2, 24, seed))
        if not inference:
            model.lifecycle_step()
        assert not torch.equal(block.router.keys["trainable"], before), "keys moved"
        assert found(block, torch.randn(40, HIDDEN))[2]
        model.eval()
        assert_same_as_exact(block, seed=seed)
        model.train(not inference)


def test_keys_that_an_optimizer_moved_are_found_again() -> None:
    model = searched_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    ids = mixed_text(3, 16)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        assert_same_as_exact(model.living_blocks[0])
        model.train()


def test_generation_with_a_cache_is_generation_without() -> None:
    for router in ({}, {"selection": "top_any", "threshold": 1.5}):
        model = searched_model(**router)
        ids = mixed_text(2, 8)
        cached, plain = (
            model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=VOCAB + 1)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, plain)


# -- very many keys ----------------------------------------------------------------------------------------------------


def test_a_layer_of_a_hundred_thousand_experts_trains_and_generates_in_seconds() -> None:
    started = time.perf_counter()
    backbone = source_config(
        "mixtral", hidden_size=8, intermediate_size=4, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=1, num_local_experts=100_000,
    )  # fmt: skip
    config = LivingMoeConfig.from_backbone(
        backbone, preset="some", router={"min_recall": 0.5}, plasticity={"enabled": False}
    )
    config._experts_implementation = "grouped_mm"
    model = LivingMoeForCausalLM(config).train()
    block = model.living_blocks[0]
    # Keys of a trained store have lineages.
    roots = torch.randn(5000, 8)
    block.router.keys["frozen"].data = roots[torch.arange(100_000) % 5000] + 0.2 * torch.randn(100_000, 8)
    ids = token_ids(2, 16)
    with torch.no_grad():
        model(ids)  # a search's first call only remembers
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and block.router.search.mode == "two_stage"
    moved = block.router.keys["frozen"].grad.any(dim=1).sum()
    assert 2 <= int(moved) <= 2 * ids.numel(), "only who serves learns"
    text = model.eval().generate(ids[:, :4], max_new_tokens=4, do_sample=False)
    assert text.shape[1] > 4 and block.router.search.mode == "two_stage"
    with torch.no_grad():
        index_TK = block.router(torch.randn(9, 8), block.population, all_logits=False)[2]
    assert index_TK.shape == (9, 2) and not (index_TK == UNUSED).any()
    assert time.perf_counter() - started < 60
