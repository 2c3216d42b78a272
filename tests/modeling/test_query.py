"""Query networks: a graft with one scores as its source did, learns to ask otherwise, and lives through every event."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    FAMILIES,
    HIDDEN,
    check_invariants,
    drift,
    live,
    living_model,
    logits,
    mixed_text,
    relative_difference,
    source_model,
    try_event,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lives import BUSY, build, kinds
from oracles import assert_equals_oracle

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError, ConversionError
from living_moe.configuration.sections import RouterConfig
from living_moe.modeling_living_moe.query import QueryNetwork, query_network

NETWORKS = ("linear", "mlp")
EXPERTS = 8
#: Keys as few as experts, between, and longer than hidden states.
SHORT, BETWEEN, LONG = EXPERTS, 20, HIDDEN + 9


def asking(family: str = "mixtral", preset: str = "grow", **router: Any) -> LivingMoeForCausalLM:
    return living_model(family, preset, sections={"router": router})


def learned(model: LivingMoeForCausalLM, seed: int = 0) -> LivingMoeForCausalLM:
    """The MLP beside the identity is zero at a graft, and half of its gradients with it: as after some training."""
    drift(model, seed, 0.1, frozen=True)
    return model


# -- grafts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_whose_queries_are_as_long_as_hidden_states_is_exact_bit_for_bit(
    family: str, network: str, dtype: torch.dtype
) -> None:
    source = source_model(family).to(dtype)
    model = living_moe.convert(source, preset="grow", verify=False, router={"query_network": network})
    assert model.living_blocks[0].router.query.linear.weight.dtype == dtype
    ids = mixed_text(3, 16)
    assert torch.equal(logits(model, ids), logits(source, ids))


@pytest.mark.parametrize("d_key", [SHORT, BETWEEN, LONG])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_with_queries_of_another_length_keeps_its_outputs_up_to_rounding(
    family: str, network: str, d_key: int
) -> None:
    source, ids = source_model(family), mixed_text(3, 16)
    model = asking(family, query_network=network, d_key=d_key)
    assert model.living_blocks[0].router.keys["trainable"].shape == (EXPERTS, d_key)
    assert relative_difference(logits(model, ids), logits(source, ids)) <= 1e-5


@pytest.mark.parametrize("d_key", [None, SHORT, LONG])
def test_the_comparison_with_the_source_accepts_query_networks(d_key: int | None) -> None:
    model = living_moe.convert(source_model("mixtral"), preset="grow", router={"query_network": "mlp", "d_key": d_key})
    assert model.graft_verification.max_difference <= 1e-6 * model.graft_verification.max_logit


@pytest.mark.parametrize(("experts", "d_key", "enough"), [(8, 7, 8), (40, 31, 32), (40, 1, 32)])
def test_queries_too_short_for_all_scores_are_refused_with_the_length_that_is_enough(
    experts: int, d_key: int, enough: int
) -> None:
    with pytest.raises(ConversionError, match=rf"router.d_key is {d_key}, .*{experts} experts.* to {enough} or more"):
        living_model("mixtral", sections={"router": {"query_network": "linear", "d_key": d_key}},
                     num_local_experts=experts)  # fmt: skip
    living_model("mixtral", sections={"router": {"query_network": "linear", "d_key": enough}},
                 num_local_experts=experts)  # fmt: skip


@pytest.mark.parametrize(
    "router", [{"similarity": "cosine"}, {"temperature": 2.0}, {"normalise_keys": True}, {"selection": "top_any"}]
)
def test_a_router_that_scores_otherwise_is_no_exact_graft(router: dict[str, Any]) -> None:
    (name,) = router
    with pytest.raises(ConversionError, match=rf"router.{name}=.*verify=False"):
        living_moe.convert(source_model("mixtral"), preset="grow", router=router)
    assert (
        living_moe.convert(source_model("mixtral"), preset="grow", verify=False, router=router).graft_verification
        is None
    )


def test_a_length_without_a_network_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="router.d_key"):
        RouterConfig(d_key=16)
    with pytest.raises(ConfigurationError, match="router.query_hidden"):
        RouterConfig(query_network="linear", query_hidden=16)


@pytest.mark.parametrize("d_key", [None, 5])
@pytest.mark.parametrize("query_hidden", [None, 11])
def test_the_mlp_is_as_wide_as_asked_else_as_its_output(d_key: int | None, query_hidden: int | None) -> None:
    network = query_network(RouterConfig(query_network="mlp", d_key=d_key, query_hidden=query_hidden), HIDDEN)
    assert network.up.out_features == (query_hidden or d_key or HIDDEN)
    assert network(torch.randn(7, HIDDEN)).shape == (7, d_key or HIDDEN)
    assert query_network(RouterConfig(), HIDDEN) is None


def test_a_graft_of_a_seed_is_always_the_same() -> None:
    one, other = (asking(query_network="mlp", d_key=BETWEEN).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_key", [None, SHORT, LONG])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_reach_the_query_network(network: str, d_key: int | None) -> None:
    model = asking(query_network=network, d_key=d_key).train()
    ids = mixed_text(4, 12)
    model(ids, labels=ids).loss.backward()
    for block in model.living_blocks:
        query = block.router.query
        assert query.linear.weight.grad.any() and block.router.keys["trainable"].grad.any()
        if network == "mlp":
            assert query.down.weight.grad.any()
            assert not query.up.weight.grad.any(), "behind zeros; moves from the second step on"
    learned(model).zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in model.living_blocks[0].router.query.parameters())


@pytest.mark.parametrize("network", NETWORKS)
def test_no_dimension_of_longer_queries_is_dead(network: str) -> None:
    """Where queries and keys are both zero neither would ever get a gradient."""
    for d_key in (BETWEEN, LONG):
        model = asking(query_network=network, d_key=d_key).train()
        ids = mixed_text(4, 12)
        model(ids, labels=ids).loss.backward()
        router = model.living_blocks[0].router
        keys_ED = router.keys["trainable"]
        learns_D = keys_ED.grad.any(dim=0) | router.query.linear.weight.grad.any(dim=1)
        assert learns_D.all(), f"{int((~learns_D).sum())} of {d_key} dimensions are dead"


@pytest.mark.parametrize("network", ["identity", *NETWORKS])
@pytest.mark.parametrize(
    "scores",
    [{}, {"similarity": "cosine", "temperature": 0.1}, {"normalise_keys": True}, {"temperature": 3.0}],
    ids=["dot", "cosine", "unit keys", "warm"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_query_and_similarity_equals_the_oracles(family: str, scores: dict[str, Any], network: str) -> None:
    d_key = None if network == "identity" else BETWEEN
    model = learned(asking(family, query_network=network, d_key=d_key, **scores))
    slow = assert_equals_oracle(model, "eager", "grouped_mm")
    assert all(slow[name].any() for name in slow if "router" in name)


def test_a_cosine_is_between_plus_and_minus_one_over_the_temperature_and_ignores_lengths() -> None:
    model = asking(similarity="cosine", temperature=0.5)
    router, population = model.living_blocks[0].router, model.living_blocks[0].population
    hidden_TH = torch.randn(50, HIDDEN)
    scores_TE = router(hidden_TH, population)[0]
    assert scores_TE.abs().max() <= 2.0 + 1e-5
    router.keys["trainable"].data *= torch.rand(EXPERTS, 1) + 0.5
    torch.testing.assert_close(router(hidden_TH * 7, population)[0], scores_TE)


# -- life --------------------------------------------------------------------------------------------------------------

lives = st.lists(
    st.tuples(
        st.sampled_from(["split", "noisy split", "merge", "death", "freeze", "thaw", "part"]), st.integers(0, 10_000)
    ),
    max_size=14,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "router",
    [
        {"query_network": "linear", "d_key": BETWEEN, "similarity": "cosine", "temperature": 0.1},
        {"query_network": "mlp", "d_key": LONG},
    ],
    ids=["short cosine", "long mlp"],
)
@settings(max_examples=8)
@given(life=lives)
def test_any_life_in_another_query_space_keeps_the_invariants_and_equals_the_oracle(
    router: dict[str, Any], family: str, life: list[tuple[str, int]]
) -> None:
    model = asking(family, **router)
    for kind, seed in life:
        try_event(model, kind, 0, seed)
        check_invariants(model)
        population = model.living_blocks[0].population
        assert population.tombstone_key.shape == (len(population.tombstones), router["d_key"])
        if seed % 2:
            drift(model, seed, frozen=True)
    assert_equals_oracle(learned(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("d_key", [SHORT, LONG])
def test_splits_and_deaths_are_exact_in_another_query_space(family: str, d_key: int) -> None:
    model = learned(asking(family, query_network="mlp", d_key=d_key))
    ids = mixed_text(3, 16)
    before = logits(model, ids)
    newborns = [model.split_expert(0, uid).children[0] for uid in range(EXPERTS)]
    assert relative_difference(logits(model, ids), before) <= 1e-6
    # The drifted newborn's address stays, so that its death moves only the tokens that it served.
    block = model.living_blocks[0]
    drift(model, 5)
    hidden_TH = torch.randn(200, HIDDEN)
    served = block.router(hidden_TH, block.population)[2]
    place = model.expert_uids(0).index(newborns[3])
    spared_T = (served != place).all(dim=1)
    assert spared_T.any() and not spared_T.all()
    alone = copy.deepcopy(block)
    alone.shared_experts = block.shared_experts = None
    model.remove_expert(0, newborns[3])
    assert block.population.tombstone_key.shape == (1, d_key)
    spared_TH = hidden_TH[spared_T][None]
    torch.testing.assert_close(block(spared_TH), alone(spared_TH), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_a_grown_model_with_queries_of_its_own_survives_save_and_load(preset: str, tmp_path: Path) -> None:
    model = asking("deepseek_v3", preset, query_network="mlp", d_key=BETWEEN, query_hidden=5, similarity="cosine")
    live(model, 10, seed=3)
    learned(model, 1)
    assert any(block.population.tombstones for block in model.living_blocks)
    model.save_pretrained(tmp_path)
    again = LivingMoeForCausalLM.from_pretrained(tmp_path)
    ids = mixed_text(3, 16)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert again.config.router == model.config.router
    check_invariants(again)
    for block, other in zip(model.living_blocks, again.living_blocks, strict=True):
        assert all(map(torch.equal, block.router.query.parameters(), other.router.query.parameters()))


def test_a_busy_life_of_training_with_short_keys_goes_on_without_a_jump_in_shape() -> None:
    router = {"query_network": "mlp", "d_key": 12}
    model = living_model("mixtral", sections={"lifecycle": BUSY, "router": router})
    before = {name: parameter.clone() for name, parameter in model.living_blocks[0].router.query.named_parameters()}
    trainer = build(model, max_steps=14)
    trainer.run()
    assert {"split", "death"} <= set(kinds(trainer.records))
    check_invariants(model)
    for name, parameter in model.living_blocks[0].router.query.named_parameters():
        assert not torch.equal(parameter, before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_in_low_precision_runs_forward_and_backward(family: str) -> None:
    model = learned(asking(family, query_network="mlp", d_key=BETWEEN, similarity="cosine", temperature=0.1))
    ids = mixed_text(3, 16)
    exact = logits(model, ids)
    model.bfloat16().train()
    output = model(ids, labels=ids)
    assert relative_difference(output.logits.detach().float(), exact) < 0.2
    output.loss.backward()
    for parameter in model.living_blocks[0].router.parameters():
        assert parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all() and parameter.grad.any()


def test_a_network_without_precision_of_its_own_multiplies_in_the_wider_dtype() -> None:
    network = QueryNetwork(HIDDEN, 6, 5).bfloat16()
    assert network(torch.randn(3, HIDDEN)).dtype == torch.float32
    assert network(torch.randn(3, HIDDEN).bfloat16()).dtype == torch.bfloat16
