"""Selection by vitality: its units, the policy `darwinian`, the learned temperature, the loss trend, the preset."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    FAMILIES,
    HIDDEN,
    check_invariants,
    live,
    living_model,
    logits,
    mixed_text,
    prime_searches,
    source_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lives import build, kinds
from oracles import assert_equals_oracle
from transformers import AutoModelForCausalLM

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError, ConversionError
from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.drift import Passes
from living_moe.modeling_living_moe.lifecycle.planner import LayerState, plan
from living_moe.modeling_living_moe.lifecycle.policies import Circumstances
from living_moe.modeling_living_moe.lifecycle.policies.darwinian import propose_darwinian
from living_moe.modeling_living_moe.lifecycle.vitality import vitality_of
from living_moe.modeling_living_moe.router import TEMPERATURE_RANGE, LearnedTemperature
from living_moe.modeling_living_moe.trend import WARM_UP, LossTrend
from living_moe.training.optimizers import LivingAdamW

#: Decides at every step, at once.
PROMPT = dict(
    policy="darwinian", interval=1, warmup_steps=0, cooldown_steps=0, min_age_steps=0, patience=1, split_load=2.0,
    death_load=0.1, max_events_per_step=64, cap_improvement=None,
)  # fmt: skip
EXPERTS = 8


@pytest.fixture(scope="module")
def blank() -> LivingMoeForCausalLM:
    return living_model("mixtral", "ouroboros", sections={"lifecycle": PROMPT})


def write(model: LivingMoeForCausalLM, loads: list[float], gradients: list[float] | None = None) -> None:
    """Vitals of layer 0, in slot order, as if measured."""
    table = model.living_blocks[0].vitals.table("trainable")
    for name in ("overloaded", "starved", "idle"):
        getattr(table, name).zero_()
    table.load[: len(loads)] = torch.tensor(loads)
    table.grad_norm[: len(loads)] = torch.tensor(gradients if gradients is not None else [1.0] * len(loads))


def proposed(model: LivingMoeForCausalLM, config: LifecycleConfig | None = None, **now: Any) -> list[tuple[str, int]]:
    circumstances = Circumstances(model._surroundings(), **now)
    found = propose_darwinian(model.living_blocks[0], config or model.config.lifecycle, circumstances)
    return [(proposal.kind, *proposal.uids) for proposal in found]


def some_lifecycle(**fields: Any) -> LifecycleConfig:
    return LifecycleConfig(**{**PROMPT, **fields})


# -- vitality ----------------------------------------------------------------------------------------------------------

positive = st.floats(0.0, 1e3, allow_subnormal=False)


@given(
    parts=st.lists(st.tuples(positive, positive), min_size=EXPERTS, max_size=EXPERTS),
    weight=st.floats(0, 1),
    scale=st.floats(1e-3, 1e3),
)
@settings(max_examples=50, deadline=None)
def test_vitality_is_in_units_of_the_uniform_share(
    blank: LivingMoeForCausalLM, parts: list[tuple[float, float]], weight: float, scale: float
) -> None:
    """Whatever the loads (which average 1 by themselves) and the scale of the gradients, its mean is 1."""
    total = math.fsum(load for load, _ in parts)
    loads = [load * EXPERTS / total if total > 1e-3 else 1.0 for load, _ in parts]
    gradients = [scale * (gradient + 1e-3) for _, gradient in parts]
    write(blank, loads, gradients)
    found = vitality_of(blank.living_blocks[0], weight)
    assert math.fsum(each.vitality for each in found) / EXPERTS == pytest.approx(1.0, rel=1e-5)
    mean = math.fsum(gradients) / EXPERTS
    for each, load, gradient in zip(found, loads, gradients, strict=True):
        assert each.vitality == pytest.approx((1 - weight) * load + weight * gradient / mean, rel=1e-4, abs=1e-6)


def test_vitality_is_measured_load_and_measured_gradient() -> None:
    """After real steps, from real gradients: against norms and counts taken beside the model."""
    model = living_model(
        "mixtral", "ouroboros",
        sections={"lifecycle": {**PROMPT, "enabled": False}, "vitals": {"grad_norm_every": 1, "decay": 0.0}},
    ).train()  # fmt: skip
    seen: list[torch.Tensor] = []
    model.living_blocks[0].router.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    ids = mixed_text(4, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    slab = model.living_blocks[0].experts.weights("trainable")
    squares = sum(p.grad.flatten(1).square().sum(1) for p in (slab.gate_up_proj, slab.down_proj))  # type: ignore[union-attr]
    norms = squares.sqrt()
    model.lifecycle_step()
    counts = torch.bincount(seen[0].flatten(), minlength=EXPERTS).float()
    expected = 0.5 * counts / counts.mean() + 0.5 * norms / norms.mean()
    torch.testing.assert_close(model.vitality(0), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_without_gradients_vitality_is_the_load(blank: LivingMoeForCausalLM) -> None:
    loads = [0.5, 1.5] + [1.0] * 6
    write(blank, loads, [0.0] * EXPERTS)
    assert [each.vitality for each in vitality_of(blank.living_blocks[0], 0.5)] == loads
    frozen = living_model("mixtral", "ouroboros", sections={"lifecycle": PROMPT})
    write(frozen, loads, [1.0, 3.0] + [1.0] * 6)
    frozen.freeze_expert(0, 0)
    uids = frozen.expert_uids(0)
    found = dict(zip(uids, vitality_of(frozen.living_blocks[0], 0.5), strict=True))
    assert found[0].gradient is None and found[0].vitality == 0.5
    assert found[1].vitality == pytest.approx(0.5 * 1.5 + 0.5 * 3.0 * 7 / 9)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 2), (4, 1)])
def test_the_preset_s_threshold_can_be_reached(experts: int, top_k: int) -> None:
    """All tokens to the same experts: their load is E / K."""
    model = living_model("mixtral", "ouroboros", num_local_experts=experts, num_experts_per_tok=top_k)
    write(model, [experts / top_k] * top_k + [0.0] * (experts - top_k), [1.0] * top_k + [0.0] * (experts - top_k))
    vitality = model.vitality(0)
    assert vitality[0] > model.config.lifecycle.split_load
    assert vitality[-1] < model.config.lifecycle.death_load


# -- policy ------------------------------------------------------------------------------------------------------------


def test_the_overloaded_split_and_the_starved_die(blank: LivingMoeForCausalLM) -> None:
    write(blank, [3.0, 0.0] + [5.0 / 6] * 6, [3.0, 0.0] + [5.0 / 6] * 6)
    assert proposed(blank) == [("split", 0), ("death", 1)]
    found = propose_darwinian(blank.living_blocks[0], blank.config.lifecycle, Circumstances(blank._surroundings()))
    assert [p.reason.metric for p in found] == ["vitality"] * 2
    assert found[0].reason.value == pytest.approx(3.0) and found[0].reason.threshold == 2.0


def test_gradient_alone_can_save_or_condemn(blank: LivingMoeForCausalLM) -> None:
    """Hardly any load and much to learn is a reason to split; much load and nothing to learn is none."""
    write(blank, [0.05, 2.2] + [0.96] * 6, [4.0, 0.0] + [4.0 / 6] * 6)
    assert proposed(blank) == [("split", 0)]
    assert proposed(blank, some_lifecycle(vitality_gradient=0.0)) == [("death", 0), ("split", 1)]


@pytest.mark.parametrize("gradient", [0.5, 0.9, 1.0])
def test_whoever_is_starved_can_die_whatever_its_load(gradient: float) -> None:
    """With little to learn, load up to death_load / (1 - gradient) is starvation too."""
    lifecycle = {**PROMPT, "vitality_gradient": gradient}
    model = living_model("mixtral", "ouroboros", sections={"lifecycle": lifecycle})
    load = min(0.9 * 0.1 / (1 - gradient + 1e-9), 1.0)
    write(model, [load] * 2 + [(EXPERTS - 2 * load) / 6] * 6, [0.0] * 2 + [1.0] * 6)
    assert float(model.vitality(0)[0]) < 0.1
    dead = [event.parents for event in model.decide_events() if event.kind == "death" and event.layer == 0]
    assert dead and set(dead) <= {(0,), (1,)}


@given(noise=st.lists(st.floats(-0.4, 0.4), min_size=EXPERTS, max_size=EXPERTS))
@settings(max_examples=30, deadline=None)
def test_a_nearly_uniform_layer_is_left_alone(blank: LivingMoeForCausalLM, noise: list[float]) -> None:
    write(blank, [1.0 + each for each in noise], [1.0 - each for each in noise])
    assert proposed(blank) == []


def test_only_patience_decisions_in_a_row_count(blank: LivingMoeForCausalLM) -> None:
    patient, calm = some_lifecycle(patience=3), [1.0] * EXPERTS
    for loads, kind in (([3.0] + [5.0 / 7] * 7, "split"), ([0.0] + [8.0 / 7] * 7, "death")):
        write(blank, loads, loads)
        assert [proposed(blank, patient) for _ in range(3)] == [[], [], [(kind, 0)]]
        write(blank, calm)
        assert proposed(blank, patient) == []
        table = blank.living_blocks[0].vitals.table("trainable")
        table.load[:], table.grad_norm[:] = torch.tensor(loads), torch.tensor(loads)
        assert [proposed(blank, patient) for _ in range(3)] == [[], [], [(kind, 0)]]


@given(
    loads=st.lists(st.floats(0, 4), min_size=EXPERTS, max_size=EXPERTS),
    gradients=st.lists(st.floats(0, 4), min_size=EXPERTS, max_size=EXPERTS),
    order=st.permutations(range(EXPERTS)),
)
@settings(max_examples=50, deadline=None)
def test_decisions_do_not_depend_on_the_order_of_the_slots(
    blank: LivingMoeForCausalLM, loads: list[float], gradients: list[float], order: list[int]
) -> None:
    state = copy.deepcopy(blank.living_blocks[0].population.state_dict())
    write(blank, loads, gradients)
    expected = decided(blank)
    table = blank.living_blocks[0].population.table("trainable")
    try:
        table.uid.copy_(torch.tensor(order))
        table.clade.copy_(torch.tensor(order))
        blank.living_blocks[0].population.stale()
        write(blank, [loads[uid] for uid in order], [gradients[uid] for uid in order])
        assert decided(blank) == expected
    finally:
        blank.living_blocks[0].population.load_state_dict(state)


def decided(model: LivingMoeForCausalLM) -> list[tuple[Any, ...]]:
    """The plan: kinds, uids and reasons in order."""
    block, config = model.living_blocks[0], model.config.lifecycle
    found = propose_darwinian(block, config, Circumstances(model._surroundings()))
    layers = [LayerState(len(block.population.members), 2, 10**9)]
    return [(p.kind, p.uids, p.reason, p.urgency) for p in plan(found, layers, config, None)]


@given(
    loads=st.lists(st.floats(0, 4), min_size=EXPERTS, max_size=EXPERTS),
    least=st.one_of(st.none(), st.integers(2, 8)),
    most=st.one_of(st.none(), st.integers(8, 11)),
)
@settings(max_examples=25, deadline=None)
def test_bounds_hold_whatever_the_vitality(loads: list[float], least: int | None, most: int | None) -> None:
    model = living_model(
        "mixtral", "ouroboros",
        sections={"lifecycle": {**PROMPT, "min_experts": least, "max_experts": most, "death_load": 0.5}},
    )  # fmt: skip
    for _ in range(2):
        count = model.expert_counts[0]
        values = (loads * 4)[:count]
        write(model, values, values)
        for event in model.decide_events():
            assert event.kind in ("split", "death", "grow", "shrink")
        assert max(least or 3, 2) <= model.expert_counts[0] <= (most or 10**9)
        check_invariants(model)


def test_newborns_are_immune_until_they_have_an_age() -> None:
    model = living_model("mixtral", "ouroboros", sections={"lifecycle": {**PROMPT, "min_age_steps": 5}})
    newborn = model.split_expert(0, 3).children[0]
    row = model.expert_uids(0).index(newborn)
    for load, kind in ((0.0, "death"), (9.0, "split")):
        for age, expected in ((4, []), (5, [(kind, newborn)])):
            write(model, [1.0] * row + [load], [1.0] * row + [load])
            model.living_blocks[0].vitals.table("trainable").age[row] = age
            assert [each for each in proposed(model) if each[1] == newborn] == expected


def test_a_split_hands_on_half_of_the_load_and_of_the_gradient(blank: LivingMoeForCausalLM) -> None:
    model = copy.deepcopy(blank)
    write(model, [4.0] + [4.0 / 7] * 7, [3.0] + [1.0] * 7)
    newborn = model.split_expert(0, 0).children[0]
    uids, vitals = model.expert_uids(0), model.vitals(0)
    for name, share in (("load", 2.0), ("grad_norm", 1.5)):
        assert vitals[name][uids.index(0)] == vitals[name][uids.index(newborn)] == share


# -- the adaptive cap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("improvement", "grows"), [(None, True), (0.02, True), (0.01, True), (0.009, False), (-0.1, False)]
)
def test_a_population_grows_only_while_the_loss_pays_for_it(
    blank: LivingMoeForCausalLM, improvement: float | None, grows: bool
) -> None:
    write(blank, [3.0, 0.0] + [5.0 / 6] * 6, [3.0, 0.0] + [5.0 / 6] * 6)
    found = proposed(blank, some_lifecycle(cap_improvement=0.01), improvement=improvement)
    assert found == ([("split", 0)] if grows else []) + [("death", 1)]
    # Without such a cap the loss does not matter.
    assert proposed(blank, some_lifecycle(), improvement=improvement)[0] == ("split", 0)


@given(rate=st.floats(-1e-4, 1e-4), start=st.floats(1.0, 10.0), steps=st.integers(WARM_UP, 3000))
@settings(max_examples=20, deadline=None)
def test_the_trend_of_a_steady_loss_is_its_rate(rate: float, start: float, steps: int) -> None:
    trend = LossTrend()
    trend.slow, trend.slower = trend.slow.double(), trend.slower.double()
    values = [start * (1 - rate * step) for step in range(steps)]
    for value in values:
        trend.defer(Passes((torch.tensor(value, dtype=torch.float64),)))
    found = trend.improvement()
    assert found is not None
    assert found == pytest.approx(1000 * rate * start / float(trend.slower), rel=1e-3, abs=1e-6)


def test_the_trend_needs_steps_and_skips_what_is_no_loss() -> None:
    trend = LossTrend()
    for step in range(2 * WARM_UP):
        known = step % 2 == 0
        trend.defer(Passes((torch.tensor(2.0 if known else float("nan")),)))
        assert (trend.improvement() is None) == (int(trend.count) < WARM_UP)
    assert int(trend.count) == WARM_UP and trend.improvement() == pytest.approx(0.0)
    assert float(trend.slow) == 2.0


@pytest.mark.parametrize("every", [2, 10])
def test_the_trend_is_per_step_however_seldom_a_loss_is_told(every: int) -> None:
    often, seldom = LossTrend(), LossTrend()
    for step in range(every * 3 * WARM_UP):
        loss = torch.tensor(3.0 - 1e-5 * step)
        often.defer(Passes((loss,)))
        seldom.defer(Passes((loss,) if step % every == 0 else ()))
    assert int(seldom.count) == 3 * WARM_UP
    assert seldom.improvement() * float(seldom.slower) == pytest.approx(1e-2, rel=0.02)
    assert often.improvement() * float(often.slower) == pytest.approx(1e-2, rel=0.02)


def test_a_loss_of_nothing_cannot_improve() -> None:
    trend = LossTrend()
    for _ in range(WARM_UP):
        trend.defer(Passes((torch.tensor(0.0),)))
    assert trend.improvement() == 0.0


def test_the_model_s_loss_reaches_the_trend_and_the_trend_is_saved(tmp_path: Path) -> None:
    model = living_model("mixtral", "ouroboros", sections={"lifecycle": {"enabled": False}}).train()
    ids = mixed_text(2, 8)
    losses = []
    for _ in range(3):
        losses.append(float(model(input_ids=ids, labels=ids).loss.detach()))
        model.lifecycle_step()
    assert float(model.model.trend.slow) == pytest.approx(sum(losses) / 3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.trend.slow, model.model.trend.slow) and int(again.model.trend.count) == 3


# -- the router --------------------------------------------------------------------------------------------------------


def test_a_temperature_starts_where_it_is_told_and_cannot_leave_its_range() -> None:
    for start in (0.07, 1.0, 30.0):
        temperature = LearnedTemperature(start)
        assert torch.equal(temperature().detach(), torch.tensor(start))
        for far, bound in ((-1e6, 1 / TEMPERATURE_RANGE), (1e6, TEMPERATURE_RANGE)):
            temperature.log_ratio.data.fill_(far)
            assert float(temperature().detach()) == pytest.approx(start * bound, rel=1e-5)
        temperature.log_ratio.data.fill_(3.0)
        (gradient,) = torch.autograd.grad(temperature(), temperature.log_ratio)
        assert gradient > 0
    halves = LearnedTemperature(1.0).bfloat16()
    assert halves.log_ratio.dtype == torch.float32


def test_without_it_there_is_no_new_parameter() -> None:
    names = [name for name, _ in living_model("mixtral", "grow").named_parameters()]
    assert not [name for name in names if "temperature" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_with_a_learned_temperature_of_1_is_exact(family: str) -> None:
    source = source_model(family)
    model = living_moe.convert(source, preset="grow", router={"learn_temperature": True})
    ids = mixed_text(2, 8)
    assert torch.equal(logits(model, ids), logits(source, ids))
    assert model.living_blocks[0].router.learned_temperature.log_ratio.requires_grad
    frozen = living_moe.convert(source, router={"learn_temperature": True})
    assert not frozen.living_blocks[0].router.learned_temperature.log_ratio.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "active"])
def test_the_darwinian_router_is_the_oracle_s_forward_and_backward(family: str, implementation: str) -> None:
    model = living_model(family, "ouroboros", sections={"router": {"d_key": 20}})
    live(model, 6)
    for block in model.living_blocks:
        block.router.learned_temperature.log_ratio.data.fill_(-0.4)
    gradients = assert_equals_oracle(model, implementation)
    assert gradients["router.learned_temperature.log_ratio"] != 0
    assert gradients["router.query.linear.weight"].any()


def test_the_temperature_counts_where_a_search_scores_too() -> None:
    exact = living_model("mixtral", "ouroboros", num_local_experts=64, sections={"router": {"search": "exact"}})
    searched = living_model("mixtral", "ouroboros", num_local_experts=64, sections={"router": {"search": "two_stage"}})
    prime_searches(searched)
    for model in (exact, searched):
        for block in model.living_blocks:
            block.router.learned_temperature.log_ratio.data.fill_(0.7)
    hidden_TH = torch.randn(16, HIDDEN)
    weights = []
    for model in (exact, searched):
        block = model.living_blocks[0]
        _, weights_TK, _ = block.router(hidden_TH, block.population, all_logits=False)
        block.zero_grad()
        (weights_TK * torch.arange(2.0)).sum().backward()
        weights.append((weights_TK, block.router.learned_temperature.log_ratio.grad))
    same = (weights[0][0] - weights[1][0]).abs().amax(1) < 1e-5
    assert same.float().mean() > 0.7, "the search finds too little to compare"
    assert weights[1][1] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_temperature_is_saved_in_full_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = living_model("mixtral", "ouroboros").to(dtype)
    for block in model.living_blocks:
        block.router.learned_temperature.log_ratio.data.fill_(0.123456789)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for block in again.living_blocks:
        ratio = block.router.learned_temperature.log_ratio
        assert ratio.dtype == torch.float32 and float(ratio) == float(torch.tensor(0.123456789))
        assert ratio.requires_grad
    if dtype == torch.float32:
        ids = mixed_text(2, 8)
        assert torch.equal(logits(again, ids), logits(model, ids))


def test_the_temperature_is_in_one_param_group_and_learns() -> None:
    model = living_model("mixtral", "ouroboros").train()
    ratio = model.living_blocks[0].router.learned_temperature.log_ratio
    optimizer = LivingAdamW(model, lr=1e-2)
    groups = [group["role"] for group in optimizer.param_groups if any(p is ratio for p in group["params"])]
    assert groups == ["no_decay"]
    ids = mixed_text(4, 16)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(ratio) != 0.0


# -- the preset --------------------------------------------------------------------------------------------------------


def test_a_pretrained_graft_is_refused_unless_one_gives_up_exactness() -> None:
    with pytest.raises(ConversionError, match=r"router\.similarity='cosine' makes another model"):
        living_moe.convert(source_model("mixtral"), preset="ouroboros")
    assert living_moe.convert(source_model("mixtral"), preset="ouroboros", verify=False).config.preset == "ouroboros"


@pytest.mark.parametrize("optimizer", ["living_adamw", "adamw", "adafactor"])
def test_a_run_grows_by_selection_and_goes_on_learning(optimizer: str) -> None:
    lifecycle = {
        "interval": 2, "warmup_steps": 2, "cooldown_steps": 0, "min_age_steps": 3, "patience": 2, "split_load": 1.3,
        "death_load": 0.3, "max_experts": 12, "max_events_per_step": 2,
    }  # fmt: skip
    model = living_model(
        "mixtral", "ouroboros", sections={"lifecycle": lifecycle, "vitals": {"grad_norm_every": 2}}
    ).train()
    trainer = build(model, optimizer=optimizer, max_steps=40)
    trainer.run()
    assert "split" in kinds(trainer.records)
    assert {e.metric for e in model.lineage if e.kind in ("split", "death")} == {"vitality"}
    assert all(e.noise_std == 0.05 for e in model.lineage if e.kind == "split")
    assert trainer.records[-1].loss < trainer.records[0].loss
    assert max(model.expert_counts) <= 12
    check_invariants(model)


@pytest.mark.parametrize(
    ("field", "value"), [("vitality_gradient", -0.1), ("vitality_gradient", 1.1), ("vitality_gradient", None)]
)
def test_senseless_choices_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"lifecycle\.{field} must be"):
        LifecycleConfig(**{field: value})
