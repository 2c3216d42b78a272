"""Experts of several widths in a layer: merging upward keeps the function, and everything else goes on as with one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factories import HIDDEN, check_invariants, live, living_model, logits, mixed_text, relative_difference, token_ids
from lives import OPTIMIZERS
from torch import Tensor

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError, ConversionError, PopulationError
from living_moe.configuration.slabs import MOST_TIERS, SLABS, is_frozen, slab_name, tier_of
from living_moe.training.optimizers import LivingAdamW

IDS = mixed_text(3, 12)
WIDTH = 16
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "active")


def weights_of(model: LivingMoeForCausalLM, uid: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    block = model.living_block(layer)
    member = block.population.find(uid, layer)
    slab = block.experts.slab(member.slab)
    return slab.gate_up_proj.detach()[member.row], slab.down_proj.detach()[member.row]


def function_of(model: LivingMoeForCausalLM, uid: int, inputs: Tensor) -> Tensor:
    gate_up, down = weights_of(model, uid)
    gate, up = (inputs @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def set_load(model: LivingMoeForCausalLM, uid: int, load: float) -> None:
    block = model.living_block(0)
    member = block.population.find(uid, 0)
    block.vitals.table(member.slab).load[member.row] = load


def slab_of(model: LivingMoeForCausalLM, uid: int) -> str:
    return model.living_block(0).population.find(uid, 0).slab


def train_step(model: LivingMoeForCausalLM, optimizer: Any, seed: int = 0) -> None:
    ids = token_ids(4, 12, seed)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    model.lifecycle_step(optimizer)
    optimizer.zero_grad()


def test_names_of_slabs_say_their_tier_and_whether_they_are_frozen() -> None:
    assert SLABS[:2] == ("frozen", "trainable")
    for tier in range(MOST_TIERS):
        for frozen in (True, False):
            name = slab_name(tier, frozen=frozen)
            assert tier_of(name) == tier and is_frozen(name) == frozen and SLABS.count(name) == 1


@pytest.mark.parametrize("loads", [(1.0, 1.0), (3.0, 1.0), (0.0, 0.0), (0.0, 2.0)])
def test_a_merge_into_a_wider_tier_computes_the_weighted_sum_of_the_functions(loads: tuple[float, float]) -> None:
    model = living_model()
    inputs = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0))
    for uid, load in zip((2, 5), loads, strict=True):
        set_load(model, uid, load)
    shares = [load / sum(loads) if sum(loads) else 0.5 for load in loads]
    expected = sum(share * function_of(model, uid, inputs) for share, uid in zip(shares, (2, 5), strict=True))
    event = model.merge_experts(0, [2, 5], tier_up=True)
    assert event.children == (2,) and slab_of(model, 2) == "trainable_tier1"
    assert relative_difference(function_of(model, 2, inputs), expected) < 1e-6
    check_invariants(model)
    assert logits(model, IDS).isfinite().all()


def test_twins_that_merge_into_a_wider_tier_change_no_output() -> None:
    model = living_model()
    newborn = model.split_expert(0, 3).children[0]
    before = logits(model, IDS)
    model.merge_experts(0, [3, newborn], tier_up=True)
    assert relative_difference(logits(model, IDS), before) <= 1e-6


def test_leftover_units_write_nothing_read_something_and_learn() -> None:
    model = living_model(num_experts_per_tok=4)
    model.merge_experts(0, [0, 1], tier_up=True)
    gate_up, down = weights_of(model, 0)
    gate, up = gate_up.chunk(2)
    assert not down[:, 2 * WIDTH :].any() and down[:, : 2 * WIDTH].all()
    for part in (gate, up):
        assert 0.5 < float(part[2 * WIDTH :].std() / part[: 2 * WIDTH].std()) < 2.0
    ids = token_ids(6, 20)
    model.train()(ids, labels=ids).loss.backward()
    grad = model.living_block(0).experts.slab("trainable_tier1").down_proj.grad
    assert grad is not None and grad[0][:, 2 * WIDTH :].abs().sum() > 0


def test_four_of_a_tier_fill_the_next_and_five_need_the_one_after() -> None:
    model = living_model()
    model.merge_experts(0, [0, 1, 2, 3], tier_up=True)
    assert slab_of(model, 0) == "trainable_tier1" and weights_of(model, 0)[1].all()
    model.merge_experts(0, [4, 0])
    assert slab_of(model, 4) == "trainable_tier2"
    check_invariants(model)


def test_the_same_merge_makes_the_same_weights() -> None:
    first, second = living_model(), living_model()
    events = [model.merge_experts(0, [1, 6], tier_up=True) for model in (first, second)]
    assert events[0] == events[1] and events[0].seed != 0
    assert all(torch.equal(a, b) for a, b in zip(weights_of(first, 1), weights_of(second, 1), strict=True))
    third = living_model(sections={"lifecycle": {"seed": 5}})
    third.merge_experts(0, [1, 6], tier_up=True)
    assert not torch.equal(weights_of(first, 1)[0], weights_of(third, 1)[0])


def test_experts_split_freeze_and_thaw_within_their_tier() -> None:
    model = living_model()
    model.merge_experts(0, [0, 1], tier_up=True)
    before = logits(model, IDS)
    newborn = model.split_expert(0, 0).children[0]
    assert slab_of(model, newborn) == "trainable_tier1"
    model.freeze_expert(0, 0)
    assert slab_of(model, 0) == "frozen_tier1"
    assert not model.living_block(0).experts.slab("frozen_tier1").down_proj.requires_grad
    model.thaw_expert(0, 0)
    assert slab_of(model, 0) == "trainable_tier1"
    assert relative_difference(logits(model, IDS), before) <= 1e-6
    model.freeze_expert(0, newborn)
    merged = model.merge_experts(0, [newborn, 4]).children[0]
    assert merged == newborn and slab_of(model, merged) == "frozen_tier2"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"max_tier": 0}, r"a merge of 32 hidden units needs a tier above 0 .* experts.max_tier is 0"),
        ({"memory_budget_mib": 16.5 * 4 * 3 * HIDDEN * WIDTH / 2**20}, "a merge would bring the experts to 0.1 MiB"),
    ],
)
def test_a_merge_that_does_not_fit_is_refused_and_changes_nothing(sections: dict[str, float], message: str) -> None:
    model = living_model(sections={"experts": sections})
    before, populations = copy.deepcopy(model.state_dict()), model.config.populations
    with pytest.raises(PopulationError, match=message):
        model.merge_experts(0, [0, 1], tier_up=True)
    assert model.config.populations == populations and len(model.lineage) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_split_costs_the_memory_of_its_tier() -> None:
    one = 4 * 3 * HIDDEN * WIDTH / 2**20
    model = living_model(sections={"experts": {"memory_budget_mib": (14 + 4 + 3.5) * one}})
    model.merge_experts(0, [0, 1], tier_up=True)
    with pytest.raises(PopulationError, match="a split would bring the experts to"):
        model.split_expert(0, 0)
    model.split_expert(0, 2)


@pytest.mark.parametrize("sections", [{"max_tier": MOST_TIERS}, {"tier_factor": 1}])
def test_impossible_tiers_are_refused(sections: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=f"experts.{next(iter(sections))}"):
        living_model(sections={"experts": sections})


def test_wider_experts_cannot_leave_as_a_family_of_one_width(tmp_path: Path) -> None:
    model = living_model()
    for layer in (0, 1):
        model.merge_experts(layer, [0, 1], tier_up=True)
    with pytest.raises(ConversionError, match="layer 0: uids 0 are wider than the family's experts"):
        living_moe.export(model, tmp_path / "out")


# -- every kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_every_implementation_runs_experts_of_several_widths(implementation: str, preset: str) -> None:
    model = living_model("mixtral", preset)
    model.merge_experts(0, [0, 1], tier_up=True)
    model.merge_experts(0, [0, 2])
    model.merge_experts(0, [3, 4], tier_up=True)
    model.split_expert(0, 3)
    assert len({tier_of(slab) for slab in model.living_block(0).population.alive}) == 3
    slow, fast = model, copy.deepcopy(model)
    slow.set_experts_implementation("eager")
    fast.set_experts_implementation(implementation)
    gradients = []
    for each in (slow, fast):
        each.train()(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(logits(fast.eval(), IDS), logits(slow.eval(), IDS), rtol=1e-4, atol=1e-5)


# -- training goes on --------------------------------------------------------------------------------------------------


def units(row: Tensor, at: int, number: int) -> Tensor:
    gate, up = row.chunk(2)
    return torch.cat([gate[at : at + number], up[at : at + number]])


@pytest.mark.parametrize("lazy", [True, False])
def test_adams_moments_lie_beside_each_other_as_the_hidden_units_do(lazy: bool) -> None:
    model = living_model().train()
    optimizer = LivingAdamW(model, lr=1e-3) if lazy else torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3):
        train_step(model, optimizer, seed)

    def moments(uid: int, name: str) -> tuple[Tensor, Tensor]:
        member = model.living_block(0).population.find(uid, 0)
        slab = model.living_block(0).experts.slab(member.slab)
        gate_up, down = (optimizer.state[p][name][member.row].clone() for p in (slab.gate_up_proj, slab.down_proj))
        return gate_up, down

    before = {(uid, name): moments(uid, name) for uid in (1, 4) for name in ("exp_avg", "exp_avg_sq")}
    model.merge_experts(0, [4, 1], tier_up=True, optimizer=optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        gate_up, down = moments(4, name)
        for number, uid in enumerate((4, 1)):
            own_gate_up, own_down = before[uid, name]
            assert torch.equal(units(gate_up, number * WIDTH, WIDTH), own_gate_up)
            assert torch.equal(down[:, number * WIDTH : (number + 1) * WIDTH], own_down)
        rest = units(gate_up, 2 * WIDTH, 2 * WIDTH)
        if name == "exp_avg":
            assert not rest.any() and not down[:, 2 * WIDTH :].any()
        else:
            mean = torch.cat([before[uid, name][0] for uid in (4, 1)]).mean(dim=0)
            torch.testing.assert_close(rest, mean.expand_as(rest))
            mean = torch.cat([before[uid, name][1] for uid in (4, 1)], dim=1).mean(dim=1, keepdim=True)
            torch.testing.assert_close(down[:, 2 * WIDTH :], mean.expand(-1, 2 * WIDTH))
    train_step(model, optimizer)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_trains_on_through_a_merge_into_a_wider_tier(name: str) -> None:
    model = living_model().train()
    optimizer = OPTIMIZERS[name](model)
    for seed in range(2):
        train_step(model, optimizer, seed)
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    model.merge_experts(0, [0, 1], tier_up=True, optimizer=optimizer)
    model.merge_experts(0, [0, 2], optimizer=optimizer)
    before = [w.clone() for w in weights_of(model, 0)]
    for seed in range(3):
        train_step(model, optimizer, seed)
        assert all(p.isfinite().all() and p.abs().max() < 2 * largest for p in model.parameters())
    assert not any(torch.equal(now, then) for now, then in zip(weights_of(model, 0), before, strict=True))
    check_invariants(model)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_a_life_through_several_tiers_is_saved_and_loaded_bit_for_bit(preset: str, tmp_path: Path) -> None:
    model = living_model("mixtral", preset)
    live(model, 12, seed=3)
    uids = model.expert_uids(0)
    model.merge_experts(0, uids[:2], tier_up=True)
    model.save_pretrained(tmp_path / "model")
    loaded = LivingMoeForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.populations[0].keys() == model.living_block(0).capacities().keys() | {
        name for name in model.config.populations[0] if name not in SLABS
    }
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    fresh = living_model("mixtral", preset)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, IDS), logits(model, IDS))
    check_invariants(loaded)
    check_invariants(fresh)
