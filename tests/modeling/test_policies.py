"""The load policy: splits the overloaded, adapts the frozen in demand, removes the starved, and does not dither.

Loads are written straight into the vitals, so that what the policy sees is known.
"""

import copy
import random
from typing import Any

import pytest
import torch
from factories import VOCAB, check_invariants, living_model, mixed_text
from torch import Tensor

from living_moe import LifecycleEvent, LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.lifecycle.policies import POLICIES, Circumstances, policy_named
from living_moe.modeling_living_moe.lifecycle.policies.load import propose_by_load

#: Decides at every step, at once.
PROMPT = dict(interval=1, warmup_steps=0, cooldown_steps=0, min_age_steps=0, patience=1, max_events_per_step=64)


def model_with(loads: list[float] | None = None, preset: str = "grow", **lifecycle: Any) -> LivingMoeForCausalLM:
    model = living_model("mixtral", preset, sections={"lifecycle": {**PROMPT, **lifecycle}})
    if loads is not None:
        set_loads(model, loads)
    return model


def set_loads(model: LivingMoeForCausalLM, loads: list[float], column: str = "load") -> None:
    """Of layer 0 in slot order; the others are balanced."""
    for block in model.living_blocks:
        first = 0
        for slab, count in block.population.alive.items():
            values = torch.tensor(loads[first : first + count]) if block.layer == 0 else torch.ones(count)
            table = block.vitals.table(slab)
            getattr(table, column)[:count] = values
            # As if every step brought tokens: without any since the last decision nobody is judged.
            table.idle[:count] = -1_000_000
            first += count


def proposed(model: LivingMoeForCausalLM) -> list[tuple[str, int]]:
    found = propose_by_load(model.living_blocks[0], model.config.lifecycle, Circumstances(model._surroundings()))
    return [(proposal.kind, *proposal.uids) for proposal in found]


def test_the_overloaded_split_and_the_starved_die() -> None:
    model = model_with([1.0, 1.7, 0.01, 1.5, 0.03, 1.61, 1.0, 1.0])
    assert proposed(model) == [("split", 1), ("death", 2), ("split", 5)]
    found = propose_by_load(model.living_blocks[0], model.config.lifecycle, Circumstances(model._surroundings()))
    assert found[0].reason.metric == "load"
    assert (found[0].reason.value, found[0].reason.threshold) == (pytest.approx(1.7), 1.6)
    assert found[0].urgency > found[2].urgency > 0


def test_a_balanced_layer_is_left_alone() -> None:
    assert proposed(model_with([1.0] * 8)) == []


def test_a_collapse_of_phi_splits_the_most_loaded_once_and_with_mutation() -> None:
    loads = [1.0, 1.2, 1.5, 1.5, 0.5, 0.7, 0.8, 0.8]
    model = model_with(loads, phi_trigger=0.5, noise_std=0.1)
    vitals = model.living_block(0).vitals
    vitals.phi_level.fill_(0.41)
    vitals.phi_peak.fill_(0.8)
    assert proposed(model) == []
    vitals.phi_level.fill_(0.39)
    assert proposed(model) == [("split", 2)]
    [event] = model.decide_events()
    assert (event.kind, event.layer, event.parents, event.noise_std) == ("split", 0, (2,), 0.1)
    assert (event.metric, event.value, event.threshold) == ("phi", pytest.approx(0.39), pytest.approx(0.4))
    # That was the answer to this collapse; the next one is measured from here.
    assert proposed(model) == [] and int(vitals.phi_count) == 0
    vitals.phi_peak.fill_(0.4)
    vitals.phi_level.fill_(0.1)
    assert [kind for kind, _ in proposed(model)] == ["split"]
    # The young and the frozen do not answer.
    for uid in model.expert_uids(0)[:-1]:
        model.freeze_expert(0, uid)
    model.config.lifecycle.min_age_steps = 10
    assert proposed(model) == []


def test_a_phi_trigger_needs_mutation_and_a_measurement() -> None:
    with pytest.raises(ConfigurationError, match=r"phi_trigger must be None while lifecycle\.noise_std is 0"):
        model_with(phi_trigger=0.5)
    with pytest.raises(ConfigurationError, match="phi_trigger is 0.5 but vitals.phi_every is 0"):
        living_model(
            "mixtral", sections={"lifecycle": {"phi_trigger": 0.5, "noise_std": 0.1}, "vitals": {"phi_every": 0}}
        )


def test_only_patience_decisions_in_a_row_count() -> None:
    overloaded, starved, calm = [1.0, 2.0] + [1.0] * 6, [1.0, 0.0] + [1.0] * 6, [1.0] * 8
    model = model_with(overloaded, patience=3)
    assert [bool(proposed(model)) for _ in range(3)] == [False, False, True]
    set_loads(model, calm)
    assert proposed(model) == []
    set_loads(model, overloaded)
    assert [bool(proposed(model)) for _ in range(3)] == [False, False, True]
    # Overload does not count towards starvation.
    set_loads(model, starved)
    assert [bool(proposed(model)) for _ in range(3)] == [False, False, True]


def test_newborns_are_immune_until_they_have_an_age() -> None:
    model = model_with(min_age_steps=5)
    newborn = model.split_expert(0, 3).children[0]
    row = model.expert_uids(0).index(newborn)
    table = model.living_blocks[0].vitals.table("trainable")
    for load, kind in ((0.0, "death"), (9.0, "split")):
        set_loads(model, [1.0] * row + [load])
        for age in (0, 4):
            table.age[row] = age
            assert proposed(model) == []
        table.age[row] = 5
        assert proposed(model) == [(kind, newborn)]


def test_frozen_experts_neither_split_nor_die_of_their_load() -> None:
    model = model_with()
    model.freeze_expert(0, 2)
    model.freeze_expert(0, 5)
    order = model.expert_uids(0)
    set_loads(model, [9.0 if uid == 2 else 0.0 if uid == 5 else 1.0 for uid in order])
    assert proposed(model) == []


def test_a_frozen_expert_in_demand_outside_its_field_gives_birth() -> None:
    model = model_with([1.0] * 8, preset="frozen-graft")
    set_loads(model, [0.0, 0.24, 0.26, 0.9, 0.0, 0.0, 0.0, 0.0], column="foreign_load")
    assert proposed(model) == [("split", 2), ("split", 3)]
    uids = model.expert_uids(0)
    model.lifecycle_step()
    newborns = [member for member in model.living_blocks[0].population.members if member.uid not in uids]
    assert [(m.parent, m.field, m.slab) for m in newborns] == [(3, 1, "trainable"), (2, 1, "trainable")]
    set_loads(model, [0.0] * 10, column="foreign_load")
    assert ("split", 2) not in proposed(model), "the demand is met"


@pytest.mark.parametrize(("split_load", "death_load"), [(1.6, 0.05), (1.01, 0.5)])
def test_a_split_does_not_make_a_candidate_for_death(split_load: float, death_load: float) -> None:
    model = model_with([split_load + 1e-3] + [1.0] * 7, split_load=split_load, death_load=death_load)
    assert [event.kind for event in model.lifecycle_step()] == ["split"]
    assert not [each for each in proposed(model) if each[0] == "death"]


def test_an_unknown_policy_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="Known: load|Did you mean 'load'"):
        policy_named("loud")
    model = model_with(policy="loud")
    with pytest.raises(ConfigurationError, match="loud"):
        model.lifecycle_step()


def test_a_policy_of_ones_own_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(POLICIES, "mine", lambda block, config, now: seen.append(block.layer) or [])
    model_with(policy="mine").lifecycle_step()
    assert seen == [0, 1]


# -- lifecycle_step ----------------------------------------------------------------------------------------------------


def steps_with_events(model: LivingMoeForCausalLM, steps: int, loads: list[float]) -> list[int]:
    happened = []
    for step in range(1, steps + 1):
        count = model.expert_counts[0]
        set_loads(model, (loads + [1.0] * count)[:count])
        for block in model.living_blocks:
            block.vitals.pending = None
        if [event for event in model.lifecycle_step() if event.kind == "split"]:
            happened.append(step)
    return happened


def test_decisions_wait_for_the_warm_up_and_the_interval() -> None:
    always = [1.0] * 4 + [50.0] * 4
    assert steps_with_events(model_with(interval=4, warmup_steps=6, max_experts=64), 13, always) == [8, 12]
    assert steps_with_events(model_with(enabled=False), 5, always) == []


def test_a_layer_rests_after_its_events() -> None:
    always = [1.0] * 4 + [50.0] * 4
    model = model_with(cooldown_steps=3, max_events_per_step=1, max_experts=64)
    assert steps_with_events(model, 8, always) == [1, 4, 7]


def test_the_event_budget_goes_to_the_most_urgent() -> None:
    model = model_with([3.0, 1.0, 5.0, 2.0, 4.0, 1.0, 1.0, 1.0], max_events_per_step=2)
    events = [event for event in model.lifecycle_step() if event.kind == "split"]
    assert [event.parents[0] for event in events] == [2, 4]


def test_the_number_of_experts_stays_within_its_bounds() -> None:
    assert model_after([9.0] * 8, max_experts=10) == 10
    assert model_after([0.0] * 8) == 3  # top-k + 1
    assert model_after([0.0] * 8, min_experts=6) == 6


def model_after(loads: list[float], **lifecycle: Any) -> int:
    model = model_with(loads, **lifecycle)
    model.lifecycle_step()
    return model.expert_counts[0]


def test_the_memory_budget_counts_the_experts_of_all_layers() -> None:
    one = 4 * 3 * 32 * 16
    budget = (16 + 3.5) * one / 2**20
    model = living_model("mixtral", sections={"lifecycle": PROMPT, "experts": {"memory_budget_mib": budget}})
    set_loads(model, [9.0] * 8)
    model.lifecycle_step()
    assert sum(model.expert_counts) == 19
    set_loads(model, [9.0] * 11)
    assert model.lifecycle_step() == []


def random_life(seed: int, preset: str = "grow", steps: int = 25) -> tuple[LivingMoeForCausalLM, list[LifecycleEvent]]:
    """Training steps on text whose words change, with a lifecycle that acts whenever it can."""
    rng = random.Random(seed)
    lifecycle = dict(
        PROMPT, patience=rng.choice([1, 2]), split_load=rng.choice([1.05, 1.3]), death_load=rng.choice([0.3, 0.5]),
        cooldown_steps=rng.choice([0, 2]), min_age_steps=rng.choice([0, 3]), max_experts=rng.choice([12, None]),
        max_events_per_step=rng.choice([1, 3, 9]), noise_std=0.1, seed=seed,
    )  # fmt: skip
    family = ("mixtral", "qwen3_moe", "deepseek_v3")[seed % 3]
    experts = {"memory_budget_mib": rng.choice([None, 0.2])}
    model = living_model(family, preset, sections={"lifecycle": lifecycle, "experts": experts}).train()
    generator = torch.Generator().manual_seed(seed)
    events = []
    for step in range(steps):
        low = int(torch.randint(3, VOCAB - 12, (), generator=generator))
        ids = torch.randint(low, low + 12, (3, 8), generator=generator)
        model(ids, labels=ids).loss.backward()
        # Plain descent, built anew: what an optimizer does at events is its own test.
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
        events += model.lifecycle_step()
        model.zero_grad()
        if step % 5 == 0:
            check_invariants(model)
    return model, events


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("seed", range(6))
def test_under_any_load_a_lifecycle_never_fails_and_keeps_the_populations_sound(seed: int, preset: str) -> None:
    model, events = random_life(seed, preset)
    check_invariants(model)
    assert events and [event for event in model.lineage if event.kind not in ("grow", "shrink")] == events
    model.eval()
    assert model(mixed_text(2, 8)).logits.isfinite().all()


def test_the_same_seed_lives_the_same_life_and_another_seed_another() -> None:
    def weights(model: LivingMoeForCausalLM) -> list[Tensor]:
        return [slot.parameter for slot in model.slot_parameters()]

    (first, events), (second, same) = random_life(0), random_life(0)
    assert events == same and all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    model = model_with([5.0] + [1.0] * 7, noise_std=0.1)
    other = copy.deepcopy(model)
    other.config.lifecycle.seed = 1
    for each in (model, other):
        each.lifecycle_step()
    assert [event.seed for event in model.lineage] != [event.seed for event in other.lineage]
    assert not all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))
