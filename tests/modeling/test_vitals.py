"""Vitals count each real token of training once, and nothing else; they follow their experts through events."""

import copy
from typing import Any

import pytest
import torch
from factories import HIDDEN, living_model, mixed_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.vitals import SHOWN, Vitals


def state(model: LivingMoeForCausalLM) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "vitals" in name or "fields" in name}


def pending(model: LivingMoeForCausalLM) -> Tensor:
    return torch.stack([block.vitals.pending for block in model.living_blocks])


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_evaluation_and_generation_leave_no_trace(preset: str) -> None:
    model = living_model("mixtral", preset)
    before = state(model)
    with torch.no_grad():
        model(mixed_text(2, 8), labels=mixed_text(2, 8))
    model.generate(mixed_text(2, 8), max_new_tokens=3, do_sample=False)
    model.lifecycle_step()
    after = state(model)
    counted = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in counted} == {"age", "idle"}, "only time has passed"
    assert all(block.vitals.sample is None for block in model.living_blocks)


def test_evaluation_in_the_middle_of_training_leaves_no_trace() -> None:
    model = living_model("mixtral").train()
    model(mixed_text(2, 8))
    before = pending(model)
    model.eval()(mixed_text(2, 8, seed=5))
    assert torch.equal(pending(model), before)


def test_padding_is_not_counted_and_gives_no_queries() -> None:
    ids = mixed_text(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded, short = living_model("mixtral").train(), living_model("mixtral").train()
    padded(ids, attention_mask=mask)
    assert (pending(padded)[:, 0].sum(dim=1) == 2 * mask.sum()).all()
    # The same real tokens without padding, at the same positions.
    short(ids[:1, 5:], position_ids=torch.arange(3)[None])
    short(ids[1:])
    torch.testing.assert_close(pending(padded), pending(short), rtol=1e-5, atol=1e-5)
    for block in padded.living_blocks:
        index = block.vitals.sample.choices_SK
        assert torch.equal((index >= 0).all(dim=1), mask.flatten().bool())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_a_token_once(reentrant: bool) -> None:
    plain, checkpointed = living_model("mixtral").train(), living_model("mixtral").train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ids = mixed_text(3, 8)
    for model in (plain, checkpointed):
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
    assert torch.equal(pending(plain), pending(checkpointed))
    for ours, theirs in zip(plain.living_blocks, checkpointed.living_blocks, strict=True):
        assert torch.equal(ours.vitals.since_step, theirs.vitals.since_step)


def test_micro_batches_add_up_to_their_batch() -> None:
    whole, parts = living_model("mixtral").train(), living_model("mixtral").train()
    ids = mixed_text(4, 8)
    whole(ids)
    for row in ids:
        parts(row[None])
    torch.testing.assert_close(pending(whole), pending(parts), rtol=1e-6, atol=1e-6)
    for model in (whole, parts):
        model.lifecycle_step()
    for layer in range(2):
        assert torch.equal(whole.vitals(layer)["tokens"], parts.vitals(layer)["tokens"])


def of_one_field(counts: torch.Tensor) -> torch.Tensor:
    """Counts (3, E) and the tokens of the experts' field: all there are."""
    return torch.cat([counts, counts[:1].sum().expand(1, counts.shape[1])])


def test_experts_of_a_field_without_tokens_have_not_lived_the_step() -> None:
    vitals = Vitals({"trainable": 3}, decay=0.5)
    # Experts 0 and 1 are of one field with 4 pairs, expert 2 of another with none, then the other way round.
    rows = [[3.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [4.0, 4.0, 0.0]]
    other = [[0.0, 0.0, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
    vitals.fold(torch.tensor(rows, dtype=torch.float64), {"trainable": 3}, None)
    table = vitals.table("trainable")
    assert table.load.tolist() == [3.0 * 3 / 4, 1.0 * 3 / 4, 0.0]
    assert (table.age.tolist(), table.idle.tolist()) == ([1, 1, 0], [0, 0, 1])
    before = table.load.clone()
    for _ in range(4):
        vitals.fold(torch.tensor(other, dtype=torch.float64), {"trainable": 3}, None)
    table = vitals.table("trainable")
    assert torch.equal(table.load[:2], before[:2])
    assert (table.age.tolist(), table.idle.tolist()) == ([1, 1, 4], [4, 4, 0])


def test_a_balanced_layer_has_load_one_and_loads_average_to_one() -> None:
    vitals = Vitals({"frozen": 2, "trainable": 3}, decay=0.9)
    counts = torch.full((3, 4), 6.0, dtype=torch.float64)
    vitals.fold(of_one_field(counts), {"frozen": 2, "trainable": 2}, None)
    for slab in ("frozen", "trainable"):
        assert torch.equal(vitals.table(slab).load[:2], torch.ones(2))
    assert float(vitals.table("trainable").load[2]) == 0.0
    model = living_model("qwen3_moe").train()
    model(mixed_text(4, 8))
    model.lifecycle_step()
    assert float(model.vitals(0)["load"].mean()) == pytest.approx(1.0)


def test_averages_are_running_means_until_their_window_is_full() -> None:
    vitals = Vitals({"trainable": 2}, decay=0.75)
    expected, seen = 0.0, []
    for step, share in enumerate([2.0, 0.0, 2.0, 2.0, 0.0, 1.0]):
        counts = torch.tensor([[share, 2.0 - share]] * 3, dtype=torch.float64)
        vitals.fold(of_one_field(counts), {"trainable": 2}, None)
        seen.append(share)
        expected = sum(seen) / len(seen) if step < 4 else 0.75 * expected + 0.25 * share
        assert float(vitals.table("trainable").load[0]) == pytest.approx(expected, abs=1e-6)
    assert int(vitals.steps) == 6


def test_steps_without_a_token_are_no_evidence() -> None:
    vitals = Vitals({"trainable": 2}, decay=0.5)
    counts = torch.tensor([[1.0, 3.0], [1.0, 3.0], [0.0, 1.0]], dtype=torch.float64)
    vitals.fold(of_one_field(counts), {"trainable": 2}, None)
    before = {name: value.clone() for name, value in vitals.table("trainable").named_buffers()}
    for _ in range(3):
        vitals.fold(of_one_field(torch.zeros_like(counts)), {"trainable": 2}, None)
    after = dict(vitals.table("trainable").named_buffers())
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"age", "idle"}
    assert after["idle"].tolist() == [3, 3]


def test_routing_weight_is_the_mean_over_received_tokens_and_waits_where_there_are_none() -> None:
    vitals = Vitals({"trainable": 2}, decay=0.5)
    first, second = [[4.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 1.0], [0.0, 0.0]]
    vitals.fold(of_one_field(torch.tensor(first, dtype=torch.float64)), {"trainable": 2}, None)
    assert vitals.table("trainable").router_weight.tolist() == [0.25, 0.0]
    vitals.fold(of_one_field(torch.tensor(second, dtype=torch.float64)), {"trainable": 2}, None)
    assert vitals.table("trainable").router_weight.tolist() == [0.25, 0.25]
    assert vitals.table("trainable").tokens.tolist() == [4, 2]


def test_gradient_norms_are_those_of_the_rows() -> None:
    model = living_model("mixtral", sections={"vitals": {"grad_norm_every": 2}}).train()
    ids = mixed_text(4, 8)
    for step in (1, 2):
        model(ids, labels=ids).loss.backward()
        slab = model.living_blocks[1].experts.slab("trainable")
        rows = torch.cat([slab.gate_up_proj.grad.flatten(1), slab.down_proj.grad.flatten(1)], dim=1)
        model.lifecycle_step()
        norms = model.vitals(1)["grad_norm"]
        if step == 1:
            assert not norms.any(), "an off step reads no gradient"
    # The running mean of two steps, of which the first was not read.
    torch.testing.assert_close(norms, rows.norm(dim=1) / 2)


def test_vitals_are_shown_per_alive_expert_in_slot_order_as_a_copy() -> None:
    model = living_model("mixtral").train()
    model(mixed_text(4, 8))
    model.lifecycle_step()
    model.split_expert(0, 3)
    vitals = model.vitals(0)
    assert set(vitals) == set(SHOWN) and all(len(value) == 9 for value in vitals.values())
    vitals["load"].zero_()
    assert model.vitals(0)["load"].any()


def test_a_split_halves_the_load_and_the_newborn_starts_young() -> None:
    model = living_model("mixtral").train()
    for _ in range(3):
        model(mixed_text(4, 8))
        model.lifecycle_step()
    before = model.vitals(0)
    model.split_expert(0, 3)
    after = model.vitals(0)
    assert float(after["load"][3]) == float(after["load"][8]) == pytest.approx(float(before["load"][3]) / 2)
    assert float(after["load"].sum()) == pytest.approx(float(before["load"].sum()))
    assert (int(after["age"][3]), int(after["age"][8])) == (3, 0)
    assert (int(after["tokens"][3]), int(after["tokens"][8])) == (int(before["tokens"][3]), 0)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert all(torch.equal(after[name][others], before[name][others]) for name in SHOWN)


def test_vitals_follow_their_experts_when_rows_move() -> None:
    model = living_model("mixtral").train()
    model(mixed_text(4, 8))
    model.lifecycle_step()
    model(mixed_text(4, 8, seed=3))  # left pending
    block = model.living_blocks[0]

    def by_uid() -> dict[int, tuple[Any, ...]]:
        vitals, uids = model.vitals(0), model.expert_uids(0)
        rows = [*(vitals[name] for name in SHOWN), *block.vitals.pending, block.vitals.since_step]
        return {uid: tuple(float(row[n]) for row in rows) for n, uid in enumerate(uids)}

    before = by_uid()
    model.remove_expert(0, 1)
    model.freeze_expert(0, 6)
    model.remove_expert(0, 3)
    model.thaw_expert(0, 6)
    after = by_uid()
    assert set(after) == {0, 2, 4, 5, 6, 7}
    assert all(after[uid] == before[uid] for uid in after)


def test_the_sample_of_queries_follows_through_several_deaths() -> None:
    model = living_model("mixtral").train()
    model(mixed_text(4, 8))
    block = model.living_blocks[0]
    uids = torch.tensor(model.expert_uids(0))
    before = uids[block.vitals.sample.choices_SK]
    for dead in (7, 0, 4):
        model.remove_expert(0, dead)
        index = block.vitals.sample.choices_SK
        uids = torch.tensor([*model.expert_uids(0), -1])
        before = before.masked_fill(before == dead, -1)
        assert torch.equal(uids[index], before)


def test_merged_experts_add_their_loads() -> None:
    model = living_model("mixtral").train()
    model(mixed_text(4, 8))
    model.lifecycle_step()
    before = model.vitals(0)
    model.merge_experts(0, [2, 5])
    after = model.vitals(0)
    row = model.expert_uids(0).index(2)
    for name in ("load", "tokens"):
        assert float(after[name][row]) == pytest.approx(float(before[name][2] + before[name][5]))


def test_tokens_since_the_last_step_are_handed_out_once_per_slot() -> None:
    model = living_model("mixtral").train()
    model.split_expert(0, 2)  # 12 slots, 9 alive
    ids = mixed_text(4, 8)
    model(ids)
    model(ids)
    tokens = model.take_step_tokens()
    assert set(tokens) == {(0, "trainable"), (1, "trainable")}
    assert [len(counts) for counts in tokens.values()] == [12, 8]
    assert all(int(counts.sum()) == 2 * 2 * ids.numel() for counts in tokens.values())
    assert not tokens[0, "trainable"][9:].any()
    assert not any(counts.any() for counts in model.take_step_tokens().values())


def trained_fields(model: LivingMoeForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The field each token of a training pass is in."""
    fields = copy.deepcopy(model.model.fields)
    gate = fields(ids)
    return fields.trained_gate(gate, fields.observe(ids, gate=gate), None).index


def test_foreign_load_is_what_a_frozen_expert_serves_outside_its_field() -> None:
    model = living_model("mixtral", "frozen-graft").train()
    ids = mixed_text(6, 16)
    in_field = float(trained_fields(model, ids).float().mean())
    model(ids)
    model.lifecycle_step()
    vitals = model.vitals(0)
    assert 0.2 < in_field < 0.8
    assert float(vitals["foreign_load"].mean()) == pytest.approx(in_field)
    for uid in model.expert_uids(0):
        model.split_expert(0, uid)
    assert not model.vitals(0)["foreign_load"].any()
    for _ in range(3):
        model(ids)
        model.lifecycle_step()
    assert float(model.vitals(0)["foreign_load"][:8].sum()) == 0.0, "newborns serve in their field"


def test_vitals_keep_their_precision_when_the_model_changes_its_own() -> None:
    model = living_model("mixtral").train()
    model(mixed_text(4, 8))
    model.lifecycle_step()
    half = copy.deepcopy(model).half().bfloat16().to(torch.float16)
    for name, value in model.vitals(0).items():
        assert torch.equal(half.vitals(0)[name], value) and half.vitals(0)[name].dtype == value.dtype


def test_counting_costs_no_gradient_and_keeps_no_graph() -> None:
    model = living_model("mixtral").train()
    model(mixed_text(4, 8))
    vitals = model.living_blocks[0].vitals
    assert not vitals.pending.requires_grad and not vitals.sample[0].requires_grad
    assert vitals.sample[0].shape == (32, HIDDEN)


def random_step(generator: torch.Generator, alive: dict[str, int]) -> tuple[Tensor, Tensor | None]:
    """Counts (4, E) of experts of two fields, of which one or both may have had no token, and perhaps signals."""
    experts = sum(alive.values())
    field_E = torch.arange(experts) % 2
    here = torch.rand(2, generator=generator) < 0.7
    received = torch.randint(0, 5, (experts,), generator=generator).double() * here[field_E]
    of_field = torch.stack([received[field_E == field].sum() for field in (0, 1)])[field_E]
    counts = torch.stack([received, received * torch.rand(experts, generator=generator), received // 2, of_field])
    signals = (
        torch.rand(4, experts, generator=generator).double() if torch.rand((), generator=generator) < 0.3 else None
    )
    return counts, signals


@given(st.integers(0, 2**16), st.sets(st.integers(0, 39)), st.booleans())
@settings(max_examples=30, deadline=None)
def test_vitals_do_not_depend_on_when_somebody_looks(seed: int, looks: set[int], dense: bool) -> None:
    alive = {"frozen": 2, "trainable": 3}
    at_once, later = (Vitals({"frozen": 2, "trainable": 4}, decay=0.8) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    for step in range(40):
        counts, signals = random_step(generator, alive)
        tokens = None if dense else counts[0].sum() / 1.5
        for vitals in (at_once, later):
            vitals.fold(counts, alive, signals=signals, tokens=tokens, places=2 if dense else 0)
        at_once.settle()
        if step in looks:
            assert int(later.steps) == int(at_once.steps)
    assert not at_once.backlog and len(later.backlog) < 40
    expected, found = at_once.state_dict(), later.state_dict()
    assert {name for name in expected if not torch.equal(expected[name], found[name])} == set()


def test_a_copy_and_a_cast_of_vitals_hold_what_was_deferred() -> None:
    vitals = Vitals({"trainable": 2}, decay=0.5)
    counts = of_one_field(torch.tensor([[3.0, 1.0]] * 3, dtype=torch.float64))
    vitals.fold(counts, {"trainable": 2})
    assert vitals.backlog
    twin = copy.deepcopy(vitals)
    vitals.half()
    for each in (vitals, twin):
        assert each.table("trainable").load.tolist() == [1.5, 0.5] and not each.backlog
    vitals.fold(counts, {"trainable": 2})
    vitals.load_state_dict(twin.state_dict())
    assert int(vitals.steps) == 1, "what was pending before a load is not of the loaded life"
