"""Balance by bias: against the load, by steps of one size, clade by clade, alike whoever counts the tokens.

Run as a script, this file is one of two ranks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import FAMILIES, HIDDEN, VOCAB, drift, living_model, logits, mixed_text, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from two_ranks import one_of_two_ranks, two_ranks

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.balance import balance_step
from living_moe.modeling_living_moe.population import Population

RATE = 0.01
CALM = {"enabled": False}


def balanced_model(
    family: str = "mixtral", preset: str = "grow", rate: float = RATE, **router: Any
) -> LivingMoeForCausalLM:
    return living_model(family, preset, sections={"router": {"bias_update_rate": rate, **router}, "lifecycle": CALM})


def biases(population: Population) -> Tensor:
    """Of the alive, in slot order."""
    return population.address_bias()[: len(population.members)].clone()


def load_of_members(model: LivingMoeForCausalLM, layer: int = 0) -> Tensor:
    pending = model.living_blocks[layer].vitals.pending
    assert pending is not None
    return pending[0]


# -- one step ----------------------------------------------------------------------------------------------------------


def test_each_bias_steps_against_its_load_and_all_are_recentred() -> None:
    population = Population({"trainable": 4}, HIDDEN)
    balance_step(population, torch.tensor([10.0, 0.0, 5.0, 1.0]), 0.1)
    # The mean is 4: two are above it, two below; their steps cancel.
    torch.testing.assert_close(biases(population), torch.tensor([-0.1, 0.1, -0.1, 0.1]))
    balance_step(population, torch.tensor([13.0, 1.0, 1.0, 1.0]), 0.1)
    torch.testing.assert_close(biases(population), torch.tensor([-0.25, 0.15, -0.05, 0.15]))


def test_a_balanced_layer_and_a_step_without_tokens_move_nothing() -> None:
    population = Population({"trainable": 4}, HIDDEN)
    balance_step(population, torch.full((4,), 7.0), 0.1)
    assert not biases(population).any()
    # Not even to recentre what a source came with.
    population.table("trainable").bias.copy_(torch.tensor([0.5, 0.1, 0.2, 0.3]))
    balance_step(population, torch.zeros(4), 0.1)
    assert biases(population).tolist() == pytest.approx([0.5, 0.1, 0.2, 0.3])


@given(
    loads=st.lists(st.integers(0, 50), min_size=3, max_size=9),
    frozen=st.integers(0, 4),
    clades=st.integers(1, 4),
    rate=st.sampled_from([1e-4, 0.01, 1.0]),
)
@settings(max_examples=60)
def test_biases_move_by_the_rate_against_the_load_of_their_clade(
    loads: list[int], frozen: int, clades: int, rate: float
) -> None:
    frozen = min(frozen, len(loads) - 1)
    population = Population({"frozen": frozen, "trainable": len(loads) - frozen + 2}, HIDDEN)
    table = population.table("trainable")
    table.uid[-2:] = -1  # spare rows
    clade_E = torch.arange(len(loads)) % clades
    for slab, rows in (("frozen", clade_E[:frozen]), ("trainable", clade_E[frozen:])):
        if len(rows):
            population.table(slab).clade[: len(rows)] = rows
    population.stale()
    received_E = torch.tensor(loads, dtype=torch.float64)
    balance_step(population, received_E, rate)
    bias_E = biases(population)
    load_N = torch.zeros(int(clade_E.max()) + 1, dtype=torch.float64).index_add_(0, clade_E, received_E)
    step_E = rate * torch.sign(load_N.mean() - load_N)[clade_E].float()
    expected_E = step_E - step_E.mean() if sum(loads) else torch.zeros(len(loads))
    torch.testing.assert_close(bias_E, expected_E, rtol=1e-5, atol=1e-7)
    assert not table.bias[-2:].any(), "spare rows stay empty"


def test_members_of_a_clade_move_alike_wherever_its_tokens_go() -> None:
    model = balanced_model().train()
    for uid in (0, 1, 2):
        model.split_expert(0, uid)
    model.freeze_expert(0, 1)
    drift(model, 0)
    for seed in range(20):
        model(token_ids(2, 12, seed))
        model.lifecycle_step()
    population = model.living_blocks[0].population
    bias_E = biases(population)
    assert len(bias_E.unique()) > 2
    for clade in {member.clade for member in population.members}:
        assert len({float(bias_E[m.index]) for m in population.members if m.clade == clade}) == 1


def test_a_tombstone_moves_with_the_clade_of_its_heir() -> None:
    """Else the clade's tokens would come and go by an address that no balance reaches."""
    model = balanced_model().train()
    newborn = model.split_expert(0, 2).children[0]
    drift(model, 0)
    model.remove_expert(0, newborn)
    population = model.living_blocks[0].population
    (tombstone,) = population.tombstones
    assert tombstone.heir == 2
    for seed in range(12):
        model(token_ids(2, 12, seed))
        model.lifecycle_step()
    heir = population.find(2, 0)
    assert float(population.tombstone_bias) == pytest.approx(float(biases(population)[heir.index]), abs=1e-6)
    assert float(population.tombstone_bias) != 0.0


# -- in a model --------------------------------------------------------------------------------------------------------


def test_padding_is_not_counted() -> None:
    padded, bare = balanced_model().train(), balanced_model().train()
    ids = mixed_text(3, 12)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    for _ in range(3):
        padded(ids.masked_fill(mask == 0, 3), attention_mask=mask)
        bare(ids[:, 7:])
        assert torch.equal(load_of_members(padded), load_of_members(bare))
        for model in (padded, bare):
            model.lifecycle_step()
    for one, other in zip(padded.living_blocks, bare.living_blocks, strict=True):
        assert biases(one.population).any()
        assert torch.equal(biases(one.population), biases(other.population))


def test_micro_batches_move_biases_as_one_batch_and_evaluation_moves_none() -> None:
    whole, parts, watching = (balanced_model() for _ in range(3))
    ids = mixed_text(6, 12)
    for _ in range(4):
        whole.train()(ids)
        for part in ids.split(2):
            parts.train()(part)
        watching.eval()(ids)
        for model in (whole, parts, watching):
            model.lifecycle_step()
    for one, two, three in zip(*(model.living_blocks for model in (whole, parts, watching)), strict=True):
        assert biases(one.population).any() and torch.equal(biases(one.population), biases(two.population))
        assert not biases(three.population).any()


def max_violation(load_E: Tensor) -> float:
    """MaxVio of arXiv:2408.15664: how far the most loaded expert is above the mean, in means."""
    return float(load_E.max() / load_E.mean() - 1)


@pytest.mark.parametrize("function", ["mixtral", "deepseek_v3 without groups", "mixtral top-any"])
def test_a_skewed_router_is_balanced_in_some_hundred_steps_without_a_loss(function: str) -> None:
    family = function.split()[0]
    overrides = {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    router: dict[str, Any] = {"bias_update_rate": 0.005}
    if "top-any" in function:
        router |= {"selection": "top_any", "threshold": 1.0, "threshold_rate": 0.05, "bias_update_rate": 0.025}
    unbiased = {**router, "bias_update_rate": 0.0}
    model, still = (
        living_model(family, sections={"router": each, "lifecycle": CALM}, **overrides).train()
        for each in (router, unbiased)
    )
    for each in (model, still):
        # A direction that all tokens share, and keys that lie more or less along it.
        each.model.backbone.embed_tokens.weight.data += 0.2
        keys = each.living_blocks[0].router.keys["trainable"]
        keys.data += torch.linspace(-0.2, 0.2, len(keys))[:, None]
    violation: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for step in range(200):
            ids = token_ids(4, 48, step)
            for each in (model, still):
                each(ids)
                violation[each is model].append(max_violation(load_of_members(each)))
                each.lifecycle_step()
    late, skewed = (sum(violation[key][-50:]) / 50 for key in (True, False))
    assert violation[True][0] == violation[False][0] > 1.0, "it starts skewed"
    assert skewed > 1.5 and late < 0.5 * skewed


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_are_saved_and_used_whatever_the_rate_of_the_model_that_loads_them(family: str, tmp_path: Path) -> None:
    model = balanced_model(family, rate=0.1).train()
    ids = mixed_text(3, 16)
    for _ in range(5):
        model(ids)
        model.lifecycle_step()
    model.eval().save_pretrained(tmp_path)
    expected = logits(model, ids)
    again = LivingMoeForCausalLM.from_pretrained(
        tmp_path, router={**model.config.router.to_dict(), "bias_update_rate": 0.0}
    )
    assert not again.living_blocks[0].router.balances and again.living_blocks[0].population.is_biased
    assert torch.equal(logits(again, ids), expected)
    fresh = living_model(family)
    plain = logits(fresh, ids)
    assert not torch.equal(plain, expected)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, ids), expected)


def test_a_bias_never_enters_a_weight_and_takes_no_gradient() -> None:
    model = balanced_model(rate=0.5).train()
    ids = mixed_text(3, 16)
    for _ in range(3):
        model(ids)
        model.lifecycle_step()
    block = model.living_blocks[0]
    logits_TE, weights_TK, index_TK = block.router(torch.randn(50, HIDDEN), block.population)
    own_TK = logits_TE.softmax(dim=-1).gather(1, index_TK)
    torch.testing.assert_close(weights_TK, own_TK / own_TK.sum(dim=-1, keepdim=True))
    assert not torch.equal(index_TK.sort().values, logits_TE.topk(2).indices.sort().values)
    assert not any("bias" in name for name, _ in model.named_parameters())


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="router.bias_update_rate"):
        balanced_model(rate=-0.1)


# -- two ranks ---------------------------------------------------------------------------------------------------------


def lived(rank: int | None) -> list[Tensor]:
    """Biases of all layers after some steps: of one process, or of one of two ranks with half of each batch."""
    model = balanced_model("deepseek_v3", rate=0.1).train()
    for step in range(6):
        if step == 2:
            model.split_expert(0, 1)
        for micro in range(2):
            ids = token_ids(4, 12, seed=2 * step + micro, high=VOCAB // 2)
            model(ids if rank is None else ids[2 * rank : 2 * rank + 2 - (step == 5) * rank])
        if rank is None and step == 5:  # ranks may see unequal numbers of tokens
            for block in model.living_blocks:
                block.vitals.forget()
            for micro in range(2):
                model(token_ids(4, 12, seed=2 * step + micro, high=VOCAB // 2)[:3])
        model.lifecycle_step()
    return [biases(block.population) for block in model.living_blocks]


def test_two_ranks_move_biases_as_one_process(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path)
    alone = lived(None)
    for one, two, single in zip(first, second, alone, strict=True):
        assert torch.equal(one, two), "the ranks have parted"
        assert torch.equal(one, single) and one.any()


if __name__ == "__main__":
    one_of_two_ranks(lived)
