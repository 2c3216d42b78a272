"""Selection by health: its factors, chances that are the same everywhere, and who splits, dies and merges."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import check_invariants, living_model, mixed_text
from hypothesis import given, settings
from hypothesis import strategies as st
from lives import assert_same_life, build, kinds, life
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.presets import preset_sections
from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.lifecycle.policies import Circumstances
from living_moe.modeling_living_moe.lifecycle.policies.health import CAMKII_ON, health_of
from living_moe.modeling_living_moe.lifecycle.policies.synaptic_health import SPLIT, chance, happens, propose_by_health
from living_moe.modeling_living_moe.synapse.postsynaptic import switch_step
from living_moe.modeling_living_moe.synapse.presynaptic import rest
from living_moe.training.checkpointing import load_model

EXPERTS = 8
#: Decides at every step, and whatever may happen does, or nearly.
CERTAIN = dict(
    policy="synaptic_health", interval=1, warmup_steps=0, cooldown_steps=0, min_age_steps=0, patience=1, hazard=1.0,
    health_slope=1e6, max_events_per_step=64,
)  # fmt: skip
BOTH: dict[str, Any] = {"router": True, "postsynaptic": True, "chunk": 4}


def healthy_model(synapse: dict[str, Any] | None = None, **lifecycle: Any) -> LivingMoeForCausalLM:
    sections = {"lifecycle": {**CERTAIN, **lifecycle}, "synapse": BOTH if synapse is None else synapse}
    return living_model("mixtral", sections=sections)


@pytest.fixture(scope="module")
def blank() -> LivingMoeForCausalLM:
    return healthy_model()


def write(
    model: LivingMoeForCausalLM,
    loads: list[float],
    energies: list[float] | None = None,
    camkii: list[float] | None = None,
) -> None:
    """Vitals of layer 0, in slot order, as if measured; without the others all are rested and consolidated."""
    block = model.living_blocks[0]
    table = block.vitals.table("trainable")
    for name in ("overloaded", "starved", "idle"):
        getattr(table, name).zero_()
    count = len(loads)
    table.load[:count] = torch.tensor(loads)
    table.energy[:count] = torch.tensor(energies if energies is not None else [1.0] * count)
    if block.postsynaptic is not None:
        switch = block.postsynaptic.table("trainable").camkii
        switch[:count] = torch.tensor(camkii if camkii is not None else [CAMKII_ON] * count)


def proposed(
    model: LivingMoeForCausalLM, config: LifecycleConfig | None = None, **now: Any
) -> list[tuple[str, tuple[int, ...]]]:
    circumstances = Circumstances(model._surroundings(), **now)
    found = propose_by_health(model.living_blocks[0], config or model.config.lifecycle, circumstances)
    return [(proposal.kind, proposal.uids) for proposal in found]


def some_lifecycle(**fields: Any) -> LifecycleConfig:
    return LifecycleConfig(**{**CERTAIN, **fields})


# -- health ------------------------------------------------------------------------------------------------------------

share = st.floats(0, 1, width=32)


@given(
    parts=st.lists(st.tuples(st.floats(0, 8, width=32), share, share), min_size=EXPERTS, max_size=EXPERTS),
    age=st.integers(0, 10_000),
)
@settings(max_examples=50, deadline=None)
def test_health_is_the_product_of_four_shares(
    blank: LivingMoeForCausalLM, parts: list[tuple[float, float, float]], age: int
) -> None:
    write(blank, *([part[column] for part in parts] for column in range(3)))
    config = some_lifecycle(min_age_steps=50)
    for (load, energy, camkii), found in zip(parts, health_of(blank.living_blocks[0], config), strict=True):
        expected = min(1.0, load) * energy * (0.5 + 0.5 * min(1.0, camkii / CAMKII_ON))
        assert found.health == pytest.approx(expected, abs=1e-6)
        assert all(0 <= factor <= 1 for factor in found[1:])
    shown = blank.health(0)
    torch.testing.assert_close(
        shown["health"], shown["utilisation"] * shown["energy"] * shown["camkii"] * shown["maturity"]
    )


def test_newborns_mature_and_roots_are_mature() -> None:
    model = healthy_model(min_age_steps=50)
    newborn = model.split_expert(0, 3).children[0]
    row = model.expert_uids(0).index(newborn)
    for age, maturity in ((0, 0.0), (50, 0.5), (450, 0.9)):
        model.living_blocks[0].vitals.table("trainable").age[row] = age
        assert model.health(0)["maturity"].tolist() == pytest.approx([1.0] * row + [maturity])


def test_without_synapses_health_is_utilisation_and_maturity() -> None:
    model = healthy_model({})
    write(model, [0.2, 0.6, *[1.2] * 6], [0.0] * EXPERTS)
    found = model.health(0)
    assert found["energy"].tolist() == found["camkii"].tolist() == [1.0] * EXPERTS
    assert found["health"].tolist() == pytest.approx([0.2, 0.6, *[1.0] * 6])


def test_the_camkii_of_a_fully_healthy_expert_is_the_switch_s_upper_state() -> None:
    state = torch.ones(()), torch.ones(()), torch.zeros(())
    for _ in range(5000):
        state = switch_step(torch.tensor(0.9), *state, 1.0, 0.7)
    assert float(state[0]) == pytest.approx(CAMKII_ON, abs=0.01)


# -- measured energy ---------------------------------------------------------------------------------------------------


def test_energy_of_an_expert_is_the_mean_over_texts_at_the_ends_of_chunks() -> None:
    """Against the states that a cache keeps: those of each chunk's end, text by text."""
    model = healthy_model({"router": True, "chunk": 4, "strength": 1.0}, enabled=False)
    ids = mixed_text(3, 12)
    expected = []
    for end in (4, 8, 12):
        with torch.no_grad():
            layer = model(ids[:, :end], use_cache=True).past_key_values.layers[-1]
        first = layer.state[:, : 1 + 7 * EXPERTS][:, 1:].view(3, EXPERTS, 7)
        expected.append((first[..., 2], first[..., 3]))
    model.train()
    model(ids, labels=ids)
    model.lifecycle_step()
    vitals = model.vitals(0)
    torch.testing.assert_close(vitals["energy"], torch.stack([part[0] for part in expected]).mean((0, 1)))
    docked = torch.stack([part[1] for part in expected])
    presynapse = model.living_blocks[0].router.synapse.presynapse
    full = rest(presynapse.rates(torch.zeros(EXPERTS, 20), float(EXPERTS))).pools[:, 0].detach()
    torch.testing.assert_close(vitals["depletion"], torch.relu(1 - docked / full).mean((0, 1)), atol=1e-5, rtol=1e-4)
    assert vitals["energy"].max() < 1 and vitals["energy"].std() > 0
    assert model.signals()["energy"] < 1 and model.signals()["depletion"] > 0


def test_energy_is_an_average_over_steps_and_texts_shorter_than_a_chunk_say_nothing() -> None:
    model = healthy_model({"router": True, "chunk": 4}, enabled=False).train()
    one = mixed_text(2, 8)
    model(one)
    model.lifecycle_step()
    before = model.vitals(0)["energy"]
    assert before.max() < 1
    model(mixed_text(2, 3, seed=9))
    model.lifecycle_step()
    assert torch.equal(model.vitals(0)["energy"], before)
    model(mixed_text(2, 8, seed=7))
    model.lifecycle_step()
    after = model.vitals(0)["energy"]
    assert not torch.equal(after, before) and (after - before).abs().max() < (1 - before).max()


def test_padding_and_evaluation_do_not_count() -> None:
    model = healthy_model({"router": True, "chunk": 4, "strength": 1.0}, enabled=False)
    ids = mixed_text(2, 9)
    model(ids)
    assert model.living_blocks[0].vitals.pending_economy is None
    model.train()
    found = []
    for inputs in (
        {"input_ids": ids},
        {
            "input_ids": torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1),
            "attention_mask": torch.cat([torch.zeros(2, 3), torch.ones(2, 9)], dim=1).long(),
        },
    ):
        model(**inputs)
        found.append(model.living_blocks[0].vitals.pending_economy)
        model.model.living_blocks[0].vitals.forget()
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_newborn_starts_with_its_parent_s_energy_and_a_merged_expert_with_the_mean() -> None:
    model = healthy_model()
    write(model, [1.0] * EXPERTS, [0.1 * (row + 1) for row in range(EXPERTS)])
    newborn = model.split_expert(0, 3).children[0]
    energy = dict(zip(model.expert_uids(0), model.vitals(0)["energy"].tolist(), strict=True))
    assert energy[3] == energy[newborn] == pytest.approx(0.4)
    model.merge_experts(0, [0, 6])
    energy = dict(zip(model.expert_uids(0), model.vitals(0)["energy"].tolist(), strict=True))
    assert energy[0] == pytest.approx((0.1 + 0.7) / 2)


def test_a_checkpoint_from_before_energies_loads_rested(tmp_path: Path) -> None:
    model = healthy_model()
    write(model, [1.0] * EXPERTS, [0.5] * EXPERTS)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.vitals(0)["energy"].tolist() == [0.5] * EXPERTS
    file = tmp_path / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if not name.endswith((".energy", ".depletion"))}
    save_file(kept, file, metadata={"format": "pt"})
    assert AutoModelForCausalLM.from_pretrained(tmp_path).vitals(0)["energy"].tolist() == [1.0] * EXPERTS


# -- policy ------------------------------------------------------------------------------------------------------------


def test_the_healthy_and_overloaded_split_the_sick_die_and_others_are_left_alone(blank: LivingMoeForCausalLM) -> None:
    write(blank, [3.0, 0.0, 3.0, *[0.8] * 5], [0.9, 1.0, 0.3, *[0.9] * 5])
    # The third has too much to do and too little energy for a split.
    assert proposed(blank) == [("split", (0,)), ("death", (1,))]
    circumstances = Circumstances(blank._surroundings())
    found = propose_by_health(blank.living_blocks[0], blank.config.lifecycle, circumstances)
    assert [(p.reason.metric, p.reason.value, p.reason.threshold) for p in found] == [
        ("health", pytest.approx(0.9), 0.5), ("health", 0.0, 0.1),
    ]  # fmt: skip
    write(blank, [1.0] * EXPERTS)
    assert proposed(blank) == []


def test_health_alone_splits_nobody_and_overload_alone_neither(blank: LivingMoeForCausalLM) -> None:
    write(blank, [1.5, *[6.5 / 7] * 7])
    assert proposed(blank) == []
    write(blank, [4.0, *[4 / 7] * 7], camkii=[0.0] * EXPERTS, energies=[0.9] * EXPERTS)
    assert proposed(blank) == []


def test_only_patience_decisions_in_a_row_count(blank: LivingMoeForCausalLM) -> None:
    patient = some_lifecycle(patience=3)
    for loads, kind in (([3.0] + [5.0 / 7] * 7, "split"), ([0.0] + [8.0 / 7] * 7, "death")):
        write(blank, loads)
        assert [proposed(blank, patient) for _ in range(3)] == [[], [], [(kind, (0,))]]
        write(blank, [1.0] * EXPERTS)
        assert proposed(blank, patient) == []


def test_newborns_are_immune_until_they_have_an_age() -> None:
    model = healthy_model(min_age_steps=5)
    newborn = model.split_expert(0, 3).children[0]
    row = model.expert_uids(0).index(newborn)
    for age, expected in ((4, []), (5, [("death", (newborn,))])):
        write(model, [1.0] * row + [0.0])
        model.living_blocks[0].vitals.table("trainable").age[row] = age
        assert [each for each in proposed(model) if each[1] == (newborn,)] == expected


def test_frozen_experts_and_those_whose_field_was_not_read_are_not_judged() -> None:
    model = healthy_model()
    model.freeze_expert(0, 0)
    write(model, [0.0, *[1.0] * 6])
    model.living_blocks[0].vitals.table("frozen").load[0] = 0.0
    sick = model.expert_uids(0)[1] if model.expert_uids(0)[0] == 0 else model.expert_uids(0)[0]
    assert proposed(model) == [("death", (sick,))]
    model.living_blocks[0].vitals.table("trainable").idle.fill_(1)
    assert proposed(model) == []


def merge_ready() -> LivingMoeForCausalLM:
    """Experts 1 and 2 are weak, serve next to nothing and have nearly the same key and function; so is 5, elsewhere."""
    model = healthy_model(death_load=0.3, enabled=False)
    block = model.living_blocks[0]
    slab, keys = block.experts.weights("trainable"), block.router.keys["trainable"]
    with torch.no_grad():
        for tensor in (slab.gate_up_proj, slab.down_proj, keys):
            tensor[2] = tensor[1]
        keys[5] = -keys[1]
    model.train()
    model(mixed_text(4, 16))
    model.lifecycle_step()
    return model


def gathered(model: LivingMoeForCausalLM) -> dict[str, Any]:
    return {"sample": lambda block: block.vitals.sample}


def test_the_weak_merge_only_above_the_cosine_of_their_keys() -> None:
    model = merge_ready()
    weak = [1.0, 0.2, 0.2, 1.0, 1.0, 0.2, 1.2, 1.2]
    write(model, weak)
    assert proposed(model, **gathered(model)) == [("merge", (1, 2))]
    write(model, [1.0, 0.35, 0.35, *weak[3:]])
    assert proposed(model, **gathered(model)) == []
    with torch.no_grad():
        keys = model.living_blocks[0].router.keys["trainable"]
        keys[2] = torch.randn(keys.shape[1], generator=torch.Generator().manual_seed(1))
    write(model, weak)
    assert proposed(model, **gathered(model)) == []


def test_likeness_of_keys_is_not_enough_where_outputs_would_change() -> None:
    model = merge_ready()
    write(model, [1.0, 0.2, 0.2, 1.0, 1.0, 0.2, 1.2, 1.2])
    assert proposed(model, **gathered(model)) == [("merge", (1, 2))]
    sample = model.living_blocks[0].vitals.sample
    # All tokens go to the two, and one of them does the contrary of the other.
    model.living_blocks[0].vitals.sample = sample._replace(
        choices_SK=torch.tensor([1, 2]).expand_as(sample.choices_SK).contiguous()
    )
    with torch.no_grad():
        down = model.living_blocks[0].experts.weights("trainable").down_proj
        down[2] = -3 * down[1]
    assert proposed(model, **gathered(model)) == []


# -- chance ------------------------------------------------------------------------------------------------------------


@given(slope=st.floats(0, 50), hazard=st.floats(0.01, 1), threshold=st.floats(0.05, 0.95), health=st.floats(0, 1))
def test_a_chance_is_half_the_hazard_at_the_threshold_and_rises_beyond(
    slope: float, hazard: float, threshold: float, health: float
) -> None:
    config = some_lifecycle(hazard=hazard, health_slope=slope)
    assert chance(config, 0.0) == pytest.approx(hazard / 2)
    assert 0 <= chance(config, health - threshold) <= hazard
    assert chance(config, health - threshold) == pytest.approx(
        hazard * float(torch.sigmoid(torch.tensor(slope * (health - threshold), dtype=torch.float64)))
    )


def test_the_default_thresholds_can_be_reached() -> None:
    """A split, a death and a merge are each likely for some health that there can be, and unlikely for another."""
    config = LifecycleConfig()
    for best, worst in (
        (1.0 - config.split_health, -config.split_health),
        (config.death_health, config.death_health - 1.0),
        (config.merge_health, config.merge_health - 1.0),
    ):
        assert chance(config, best) > 0.7 * config.hazard and chance(config, worst) < 0.01 * config.hazard


def test_events_happen_as_often_as_the_chance_says(blank: LivingMoeForCausalLM) -> None:
    """Over many seeds and steps; a binomial's three deviations."""
    for beyond in (-0.1, 0.0, 0.2):
        config = some_lifecycle(hazard=0.4, health_slope=12.0)
        expected, draws = chance(config, beyond), 4000
        happened = 0
        for number in range(draws):
            blank.model.clock.steps.fill_(number)
            blank.model._steps = number
            now = Circumstances(blank._surroundings())
            happened += happens(blank.living_blocks[0], config, now, SPLIT, (number % 5,), beyond)
        deviation = math.sqrt(expected * (1 - expected) / draws)
        assert abs(happened / draws - expected) < 3.5 * deviation
    blank.model._steps = 0
    blank.model.clock.steps.zero_()


def test_layers_experts_steps_kinds_and_seeds_draw_apart(blank: LivingMoeForCausalLM) -> None:
    config = some_lifecycle(hazard=0.5, health_slope=0.0)
    now = Circumstances(blank._surroundings())
    layers = blank.living_blocks

    def drawn(block: Any, settings: LifecycleConfig, kind: int) -> list[bool]:
        return [happens(block, settings, now, kind, (uid,), 0.0) for uid in range(200)]

    first = drawn(layers[0], config, SPLIT)
    assert drawn(layers[0], config, SPLIT) == first
    others = (
        drawn(layers[1], config, SPLIT), drawn(layers[0], config, SPLIT + 1),
        drawn(layers[0], some_lifecycle(hazard=0.5, health_slope=0.0, seed=1), SPLIT),
    )  # fmt: skip
    for other in others:
        assert 40 < sum(one == two for one, two in zip(first, other, strict=True)) < 180


# -- lives -------------------------------------------------------------------------------------------------------------

BUSY = dict(
    policy="synaptic_health", interval=1, warmup_steps=2, cooldown_steps=0, min_age_steps=2, patience=1, hazard=0.6,
    split_load=1.2, death_load=0.5, split_health=0.3, merge_health=0.3, death_health=0.2, max_experts=12,
    merge_cosine=0.0, sibling_merge_bar_steps=2, noise_std=0.05, max_events_per_step=2,
)  # fmt: skip


def busy(seed: int = 0) -> LivingMoeForCausalLM:
    sections = {"lifecycle": {**BUSY, "seed": seed}, "synapse": BOTH}
    return living_model("mixtral", sections=sections)


def test_a_run_by_health_has_events_and_goes_on_bit_for_bit_after_a_save(tmp_path: Path) -> None:
    """The draws too: they depend on the step and on nothing that a save could lose."""
    whole = build(busy(), max_steps=14)
    whole.run()
    assert {"split"} <= set(kinds(whole.records)) and len(kinds(whole.records)) >= 3
    check_invariants(whole.model)
    first = build(busy(), max_steps=14)
    first.max_steps = 7
    first.run()
    assert kinds(first.records), "nothing happened before the save"
    path = first.save(tmp_path / "checkpoint-7")
    second = build(load_model(path), max_steps=14)
    second.resume(path)
    second.run()
    assert_same_life(life(whole.model, whole.optimizer), life(second.model, second.optimizer))
    assert [event.kind for event in whole.model.lineage] == [event.kind for event in second.model.lineage]


RANK_SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
import torch, torch.distributed as dist
from test_synaptic_health import life_of_passes
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
model = life_of_passes([rank])
torch.save((model.state_dict(), [event.to_dict() for event in model.lineage]), folder / f"rank-{{rank}}.pt")
dist.destroy_process_group()
"""


def life_of_passes(ranks: list[int]) -> LivingMoeForCausalLM:
    """Eight steps of reading by these ranks' passes, without a gradient; the fourth brings tokens to rank 0 only."""
    sections = {"lifecycle": {**BUSY, "noise_std": 0.0}, "synapse": {"router": True, "chunk": 4, "strength": 1.0}}
    model = living_model("mixtral", sections=sections).train()
    for step in range(8):
        for rank in ranks:
            if rank == 0 or step != 3:
                model(input_ids=mixed_text(4, 12, seed=10 * step + rank))
        model.lifecycle_step()
    return model


def test_two_ranks_live_as_one_process_that_makes_both_passes(tmp_path: Path) -> None:
    """Energy is one average of all ranks, and every draw falls alike."""
    here = Path(__file__)
    script = RANK_SCRIPT.format(tests=str(here.parents[1]), here=str(here.parent))
    started = [subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    (first, events), (second, others) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert events == others and any(event["kind"] == "split" for event in events)
    alone = life_of_passes([0, 1])
    assert [(e.kind, e.step, e.layer, list(e.parents)) for e in alone.lineage] == [
        (e["kind"], e["step"], e["layer"], list(e["parents"])) for e in events
    ]
    energies = [name for name in first if name.endswith((".energy", ".depletion"))]
    assert energies
    for name in energies:
        torch.testing.assert_close(first[name], alone.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_another_seed_lives_another_life() -> None:
    lineages = []
    for seed in (0, 1):
        trainer = build(busy(seed), max_steps=10)
        trainer.run()
        lineages.append([(event.kind, event.step, event.layer, event.parents) for event in trainer.model.lineage])
    assert lineages[0] != lineages[1]


def test_the_preset_lives_by_health_with_both_sides_and_losses() -> None:
    sections = preset_sections("synaptic-full")
    assert sections["lifecycle"]["policy"] == "synaptic_health"
    assert sections["synapse"]["router"] and sections["synapse"]["postsynaptic"]
    assert sections["synapse"]["energy_loss_coef"] > 0 < sections["synapse"]["pool_loss_coef"]
    model = living_model("mixtral", "synaptic-full", sections={"synapse": {"chunk": 4}}).train()
    ids = mixed_text(2, 12)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.energy_loss > 0 and output.pool_loss > 0
    model.lifecycle_step()
    assert model.health(0)["health"].max() <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hazard": 0.0}, "lifecycle.hazard"),
        ({"death_health": 0.6}, "merge_health"),
        ({"split_health": 1.0}, "split_health"),
        ({"merge_cosine": 1.0}, "merge_cosine"),
        ({"health_slope": -1.0}, "health_slope"),
    ],
)
def test_a_value_without_sense_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LifecycleConfig(**fields)
