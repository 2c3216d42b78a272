"""Contract of experts with two timescales: fast weights are the oracle's in every implementation, nothing where they
are off or at zero gain, bounded whatever drives them; they are written by training and plastic reading only, and become
slow without a change of function; they follow their experts through every event, and into every checkpoint.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factories import (
    EVENTS,
    FAMILIES,
    HIDDEN,
    check_invariants,
    excite,
    fast_model,
    live,
    living_model,
    logits,
    relative_difference,
    token_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_equals_oracle
from torch import Tensor
from two_ranks import one_of_two_ranks, two_ranks

import living_moe
from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.configuration.errors import CheckpointError, ConfigurationError, ConversionError, PopulationError
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.reference import reference_expert, reference_route, reference_sensors
from living_moe.modeling_living_moe.synapse import postsynaptic
from living_moe.modeling_living_moe.synapse.fast_weights import IMPLEMENTATIONS, fold, sensors
from living_moe.modeling_living_moe.synapse.postsynaptic import GAIN_MOST, TRACE_MOST, Rates, fast_step, switch_step
from living_moe.training.optimizers import LivingAdamW

EXACT = 1e-6
every_family = pytest.mark.parametrize("family", FAMILIES)


def buffers(model: LivingMoeForCausalLM) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def everything(model: LivingMoeForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def read_plastically(model: LivingMoeForCausalLM, ids: Tensor, **inputs: Any) -> Tensor:
    with model.plastic(keys=False):
        return logits(model, ids, **inputs)


def train(model: LivingMoeForCausalLM, ids: Tensor, steps: int = 1, lr: float = 1e-2) -> None:
    model.train()
    optimizer = LivingAdamW(model, lr=lr)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()
    model.eval()


# -- off, and at zero gain ---------------------------------------------------------------------------------------------


@every_family
def test_off_there_is_no_tensor_and_no_slab_of_another_kind(family: str) -> None:
    model = living_model(family)
    assert not [name for name in everything(model) if "postsynaptic" in name]
    assert all(block.postsynaptic is None for block in model.living_blocks)
    assert {type(block.experts.slab("trainable")).__name__ for block in model.living_blocks} == {"ExpertSlab"}


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@every_family
def test_until_something_is_written_every_bit_is_as_without(family: str, experts: str) -> None:
    plain, model = living_model(family), living_model(family, sections={"synapse": {"postsynaptic": True}})
    ids = token_ids(2, 12)
    for each in (plain, model):
        each.set_experts_implementation(experts)
        each.split_expert(0, 1)
        each.freeze_expert(0, 2)
    assert torch.equal(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
def test_at_zero_gain_written_fast_weights_change_no_bit(experts: str) -> None:
    plain, model = living_model(), fast_model(postsynaptic_gain=0.0)
    ids = token_ids(2, 12)
    for each in (plain, model):
        each.set_experts_implementation(experts)
        each.freeze_expert(0, 2)
    before = {name: tensor for name, tensor in everything(model).items() if "experts." in name}
    read_plastically(model, ids)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    model.fold_fast_weights()
    assert_same_bits(before, {name: tensor for name, tensor in everything(model).items() if "experts." in name})


def test_at_zero_gain_training_is_bit_for_bit_training_without() -> None:
    plain, model = living_model(), fast_model(postsynaptic_gain=0.0)
    for each in (plain, model):
        train(each, token_ids(2, 12), steps=3)
    assert_same_bits(dict(plain.named_parameters()), dict(model.named_parameters()))


# -- the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.0, 0.3])
@every_family
def test_outputs_and_gradients_are_the_oracles(family: str, gain: float) -> None:
    model = fast_model(family, postsynaptic_gain=gain)
    gradients = assert_equals_oracle(model, *IMPLEMENTATIONS)
    assert gradients["experts.trainable.down_proj"].any()


@pytest.mark.parametrize("rank", [1, 8, 13])
def test_any_rank_over_slabs_of_several_kinds_and_tiers_is_the_oracles(rank: int) -> None:
    model = fast_model(postsynaptic_rank=rank)
    model.freeze_expert(0, 2)
    model.merge_experts(0, [3, 4], tier_up=True)
    excite(model, 5)
    assert len(model.living_blocks[0].population.slabs) == 3
    assert_equals_oracle(model, *IMPLEMENTATIONS)


def test_fast_weights_matter_and_both_parts_do() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    whole = logits(model, ids)
    for part in ("gain", "trace"):
        other = copy.deepcopy(model)
        for block in other.living_blocks:
            getattr(block.postsynaptic.table("trainable"), part).zero_()
        assert relative_difference(logits(other, ids), whole) > 1e-2


def test_low_precision_and_autocast_compute_what_fp32_does() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    expected = logits(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_difference(logits(model, ids).float(), expected) < 0.1
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert low.living_blocks[0].postsynaptic.table("trainable").gain.dtype == torch.float32
    assert relative_difference(logits(low, ids).float(), expected) < 0.2


def test_another_kernel_is_refused_by_name() -> None:
    model = fast_model()
    for block in model.living_blocks:
        block.experts.config._experts_implementation = "sonicmoe"
    with pytest.raises(ConfigurationError, match="'sonicmoe' has no place for the gains"):
        logits(model, token_ids(1, 4))


# -- the laws ----------------------------------------------------------------------------------------------------------


def run_switch(calcium: float, camkii: Tensor, pp1: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    bdnf, level = torch.zeros_like(camkii), torch.full_like(camkii, calcium)
    for _ in range(steps):
        camkii, pp1, bdnf = switch_step(level, camkii, pp1, bdnf, 1.0, 0.7)
    return camkii, pp1, bdnf


def test_at_rest_the_switch_has_two_stable_states_and_keeps_either() -> None:
    start = torch.linspace(0, 1, 101)
    camkii, pp1, bdnf = run_switch(0.85, start, torch.full_like(start, 0.3), 3000)
    low, high = camkii < 1e-3, (camkii - 0.787).abs() < 1e-2
    assert (low | high).all() and low.any() and high.any()
    threshold = float(start[high].min())
    assert (start[low] < threshold).all() and 0.07 < threshold < 0.10
    assert (pp1 - 0.3).abs().max() < 1e-3 and (bdnf[high] > 0.2).all() and not bdnf[low].any()
    again, _, _ = run_switch(0.85, (camkii + 0.03 * torch.sin(start * 99)).clamp(0, 1), pp1, 3000)
    torch.testing.assert_close(again, camkii, atol=1e-3, rtol=0)


def test_calcium_above_and_below_the_thresholds_flips_the_switch_and_it_stays() -> None:
    camkii, pp1 = torch.zeros(1), torch.ones(1)
    camkii, pp1, _ = run_switch(2.0, camkii, pp1, 40)
    camkii, pp1, _ = run_switch(0.85, camkii, pp1, 3000)
    assert float(camkii) > 0.7
    camkii, pp1, _ = run_switch(0.3, camkii, pp1, 2000)
    camkii, pp1, _ = run_switch(0.85, camkii, pp1, 3000)
    assert float(camkii) < 1e-3


def test_the_switch_stays_within_its_bounds_for_100_000_steps_of_any_drive() -> None:
    camkii, pp1, bdnf = torch.rand(64), torch.rand(64), torch.rand(64) / 2
    scale = torch.logspace(-3, 6, 64)
    for step in range(100_000):
        calcium = scale * (step * 0.7 % 2) if step % 1000 < 500 else torch.full((64,), torch.inf if step % 2 else 0.0)
        camkii, pp1, bdnf = switch_step(calcium, camkii, pp1, bdnf, 1.0, 0.7)
        if step % 997 == 0:
            assert all(bool(((0 <= x) & (x <= 1)).all()) for x in (camkii, pp1, 2 * bdnf))


ANY_DRIVE = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3, 1e10, 1e30, 3e38, torch.inf, -torch.inf, torch.nan])


def within_bounds(gain: Tensor, trace: Tensor, length: Tensor) -> bool:
    size = torch.linalg.vector_norm(trace, dim=(-2, -1))
    finite = bool(gain.isfinite().all() and trace.isfinite().all())
    return finite and bool((gain.abs() <= GAIN_MOST).all() and (size <= TRACE_MOST * length * (1 + 1e-5)).all())


@given(
    drives=st.lists(st.tuples(ANY_DRIVE, ANY_DRIVE), min_size=1, max_size=4),
    rate=st.sampled_from([0.0, 1e-9, 0.0015, 0.1, 1.0]),
    decay=st.sampled_from([0.0, 0.95, 1 - 1e-7]),
    length=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200)
def test_from_any_state_within_the_bounds_any_drive_stays_within(
    drives: list[tuple[float, float]], rate: float, decay: float, length: float, seed: int
) -> None:
    """So they hold after any number of steps."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((3,), length)
    gain = (torch.rand(3, 5, generator=generator) * 2 - 1) * GAIN_MOST
    trace = F.normalize(torch.randn(3, 24, generator=generator), dim=1).view(3, 6, 4) * TRACE_MOST * length
    for of_gain, of_trace in drives:
        shape = torch.randn(3, 5, generator=generator), torch.randn(3, 6, 4, generator=generator)
        gain, trace = fast_step(
            gain, trace, shape[0] * of_gain, shape[1] * of_trace, lengths, Rates(rate, decay, decay)
        )
        assert within_bounds(gain, trace, lengths)


@pytest.mark.parametrize("drive", [1.0, 1e30])
def test_fast_weights_stay_within_their_bounds_for_100_000_steps(drive: float) -> None:
    gain, trace, length = torch.zeros(2, 4), torch.zeros(2, 3, 2), torch.tensor([0.1, 3.0])
    of_gain, of_trace, rates = torch.randn(2, 4) * drive, torch.randn(2, 3, 2) * drive, Rates(0.1, 0.95, 0.96)
    for step in range(100_000):
        gain, trace = fast_step(gain, trace, of_gain, of_trace, length, rates)
        if step % 9973 == 0:
            assert within_bounds(gain, trace, length)
    assert gain.any() and trace.any()
    for _ in range(2000):
        gain, trace = fast_step(gain, trace, torch.zeros(2, 4), torch.zeros(2, 3, 2), length, rates)
    assert gain.abs().max() < 1e-30 and trace.abs().max() < 1e-30, "what is not repeated is forgotten"


def test_what_a_token_writes_is_recalled_from_its_hidden_units() -> None:
    """O V h after one token is about rate |W| towards what followed it, for the same h; less for another."""
    hidden, width, rank, rate = 64, 256, 64, 0.2
    h, other = F.normalize(torch.randn(width), dim=0), F.normalize(torch.randn(width), dim=0)
    after, sense = F.normalize(torch.randn(hidden), dim=0), sensors(rank, width, torch.device("cpu"))
    _, trace = fast_step(
        torch.zeros(width), torch.zeros(hidden, rank), torch.zeros(width), torch.outer(after, sense @ h),
        torch.tensor(1.0), Rates(rate, 0.95, 0.96),
    )  # fmt: skip
    assert abs(float(after @ trace @ (sense @ h)) / rate - 1) < 0.5
    assert abs(float(after @ trace @ (sense @ other))) < 0.5 * rate


def test_sensors_are_the_same_everywhere_and_their_square_is_the_identity_on_average() -> None:
    assert torch.equal(sensors(5, 24, torch.device("cpu")), reference_sensors(5, 24))
    wide = sensors(4096, 8, torch.device("cpu"))
    torch.testing.assert_close(wide.T @ wide, torch.eye(8), atol=0.1, rtol=0)


# -- consolidation -----------------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3)),
    share=st.floats(0, 1),
    g=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_moving_a_share_of_the_fast_weights_keeps_the_function(
    shape: tuple[int, int, int, int], share: float, g: float, seed: int
) -> None:
    experts, hidden, width, rank = shape
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(experts, hidden, width, generator=generator)
    gain = (torch.rand(experts, width, generator=generator) * 2 - 1) * GAIN_MOST
    trace = torch.randn(experts, hidden, rank, generator=generator)
    sense = sensors(rank, width, torch.device("cpu"))
    units = torch.randn(experts, width, 1, generator=generator)

    def function(down: Tensor, gain: Tensor, trace: Tensor) -> Tensor:
        return down @ ((1 + g * gain)[..., None] * units) + g * trace @ (sense @ units)

    shares = torch.full((experts,), share)
    shares[0] = 0.0
    new = fold(down, gain, trace, shares, g)
    torch.testing.assert_close(function(*new), function(down, gain, trace), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new[0][0], down[0], atol=1e-6, rtol=1e-6)
    assert (new[1].abs() <= gain.abs()).all() and (new[2].abs() <= trace.abs()).all()


@every_family
def test_folding_everything_keeps_the_logits_and_leaves_no_fast_weights(family: str) -> None:
    model, ids = fast_model(family), token_ids(3, 12)
    model.freeze_expert(0, 1)
    model.merge_experts(0, [2, 3], tier_up=True)
    excite(model, 3)
    before = logits(model, ids)
    model.fold_fast_weights()
    assert relative_difference(logits(model, ids), before) <= EXACT
    assert not any(block.postsynaptic.has_fast_weights(block.population.alive) for block in model.living_blocks)
    plain = living_model(family)
    with pytest.raises(RuntimeError, match="postsynaptic"):
        plain.load_state_dict(model.state_dict())


def consolidating(slow_rate: float) -> LivingMoeForCausalLM:
    """Every switch on, nothing else that could change a weight."""
    model = fast_model(
        postsynaptic_slow_rate=slow_rate, postsynaptic_rate=0.001, sections={"lifecycle": {"enabled": False}}
    )
    for block in model.living_blocks:
        block.postsynaptic.table("trainable").camkii.fill_(0.9)
    model.train()
    model(input_ids=token_ids(2, 12))
    model.lifecycle_step()
    return model.eval()


def test_a_step_that_consolidates_changes_slow_weights_and_no_logits() -> None:
    without, half = consolidating(0.0), consolidating(0.5)
    ids = token_ids(3, 12, seed=4)
    assert relative_difference(logits(half, ids), logits(without, ids)) <= EXACT
    for layer, (one, other) in enumerate(zip(without.living_blocks, half.living_blocks, strict=True)):
        slow, moved = one.experts.weights("trainable").down_proj, other.experts.weights("trainable").down_proj
        assert relative_difference(moved.detach(), slow.detach()) > 0.05
        counted = one.vitals.table("trainable").tokens > 0
        shares = half.postsynapse(layer)["gain"] / without.postsynapse(layer)["gain"]
        # 1 - 0.5 (1 + B) (2 m - 1), with m about 0.9.
        assert counted.any() and ((shares[counted] > 0.3) & (shares[counted] < 0.65)).all()


def test_consolidation_needs_the_switch_and_grows_with_bdnf() -> None:
    camkii, bdnf = torch.tensor([0.0, 0.5, 0.75, 0.75, 1.0]), torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5])
    share = postsynaptic.share_to_consolidate(camkii, bdnf, 0.02, 1.0)
    torch.testing.assert_close(share, torch.tensor([0.0, 0.0, 0.01, 0.015, 0.03]))
    assert float(postsynaptic.share_to_consolidate(camkii, bdnf, 1.0, 9.0).max()) == 1.0


# -- what is learned ---------------------------------------------------------------------------------------------------


def reference_evidence(block: LivingMoeBlock, hidden_BSH: Tensor, real_BS: Tensor) -> dict[int, dict[str, Any]]:
    """The drives of every expert, by uid, one token after the other."""
    mean = hidden_BSH[real_BS].mean(0)
    found: dict[int, dict[str, Any]] = {}
    for row, texts in enumerate(hidden_BSH):
        for t in range(len(texts) - 1):
            if not (real_BS[row, t] and real_BS[row, t + 1]):
                continue
            after = texts[t + 1] - mean
            after = after / after.norm()
            for weight, member in reference_route(block, texts[t], 0):
                slab = block.experts.weights(member.slab)
                gate, up = (slab.gate_up_proj[member.row] @ texts[t]).chunk(2)
                units, down = slab.act_fn(gate) * up, slab.down_proj[member.row]
                unit, back = units / units.norm(), down.T @ after
                back = back / back.norm()
                mine = found.setdefault(member.uid, {"count": 0, "activity": 0.0, "gain": 0.0, "trace": 0.0})
                mine["count"] += 1
                mine["activity"] += float(weight * units.norm())
                mine["gain"] = mine["gain"] + len(units) * unit * back
                sense = reference_sensors(block.postsynaptic.rank, len(units))
                mine["trace"] = mine["trace"] + torch.outer(after, sense @ unit)
    return found


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_evidence_is_the_oracles(padded: bool) -> None:
    model = fast_model("mixtral")
    model.freeze_expert(0, 2)
    block = model.living_blocks[0]
    hidden_BSH, real_BS = torch.randn(2, 9, HIDDEN), torch.ones(2, 9, dtype=torch.bool)
    if padded:
        real_BS[0, :3] = real_BS[1, 7:] = False
    _, weights_TK, index_TK = block.router(hidden_BSH.view(-1, HIDDEN), block.population, None, (), None, False)
    mask = real_BS if padded else None
    side = block.postsynaptic
    side.observe(block.experts, hidden_BSH, index_TK, weights_TK, block.population.alive, mask, None, training=False)
    expected = reference_evidence(block, hidden_BSH, real_BS)
    for member in block.population.members:
        parts = (part[member.row] for part in side.pending[False][member.slab].tensors())
        count, activity, gain, trace = parts
        wanted = expected.get(member.uid, {"count": 0, "activity": 0.0, "gain": 0 * gain, "trace": 0 * trace})
        assert int(count) == wanted["count"]
        torch.testing.assert_close(activity, torch.tensor(wanted["activity"]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gain, wanted["gain"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trace, wanted["trace"], rtol=1e-4, atol=1e-5)
    assert sum(part.count_E.sum() for part in side.pending[False].values()) > 10


@torch.no_grad()
def test_a_plastic_pass_writes_the_module_s_equations() -> None:
    model = fast_model(postsynaptic_plastic_rate=0.05)
    before, ids = copy.deepcopy(model), token_ids(2, 9)
    seen: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda block, args, out: seen.__setitem__(block.layer, args[0].clone()))
        for block in model.living_blocks
    ]
    read_plastically(model, ids)
    for hook in hooks:
        hook.remove()
    for block, old in zip(model.living_blocks, before.living_blocks, strict=True):
        drives = reference_evidence(old, seen[block.layer], torch.ones_like(ids, dtype=torch.bool))
        for member in block.population.members:
            now, then = block.postsynaptic.table(member.slab), old.postsynaptic.table(member.slab)
            gain, trace = then.gain[member.row], then.trace[member.row]
            if member.uid in drives:
                length = old.experts.weights(member.slab).down_proj[member.row].norm() / 16**0.5
                gain = (0.95 * gain + 0.05 * drives[member.uid]["gain"]).clamp(-0.5, 0.5)
                trace = 0.96 * trace + 0.05 * length * drives[member.uid]["trace"]
                trace = trace * min(1.0, float(length / trace.norm()))
            torch.testing.assert_close(now.gain[member.row], gain, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(now.trace[member.row], trace, rtol=1e-4, atol=1e-5)


def test_evaluation_touches_no_buffer_whatever_it_does() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    before = buffers(model)
    logits(model, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    model.generate(ids[:, :4], max_new_tokens=4, do_sample=False)
    with torch.inference_mode():
        model(input_ids=ids)
    with model.plastic(keys=False), torch.enable_grad():
        model(input_ids=ids)
    assert_same_bits(before, buffers(model))
    assert all(not block.postsynaptic.pending for block in model.living_blocks)


def test_a_training_pass_writes_nothing_before_the_lifecycle_step() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    fast = model.fast_snapshot()
    model.train()
    first = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, first)
    assert all(torch.equal(*pair) for pair in pairs(fast, model.fast_snapshot()))
    model.lifecycle_step()
    assert not all(torch.equal(*pair) for pair in pairs(fast, model.fast_snapshot()))


def pairs(one: list[dict[int, Any]], other: list[dict[int, Any]]) -> list[tuple[Tensor, Tensor]]:
    assert [set(rows) for rows in one] == [set(rows) for rows in other]
    both = [(mine[uid], theirs[uid]) for mine, theirs in zip(one, other, strict=True) for uid in mine]
    return [pair for mine, theirs in both for pair in zip(mine, theirs, strict=True)]


def test_training_can_be_told_to_leave_fast_weights_alone() -> None:
    model = fast_model(postsynaptic_training=False)
    fast = model.fast_snapshot()
    train(model, token_ids(2, 12))
    assert all(torch.equal(*pair) for pair in pairs(fast, model.fast_snapshot()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_a_token_once(reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = fast_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=token_ids(2, 12), labels=token_ids(2, 12)).loss.backward()
        found.append(
            [part for block in model.living_blocks for part in block.postsynaptic.pending[True]["trainable"].tensors()]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_an_expert_without_tokens_keeps_every_bit_in_training() -> None:
    model = fast_model(postsynaptic_slow_rate=1.0)
    for block in model.living_blocks:
        block.postsynaptic.table("trainable").camkii.fill_(0.9)
    before = copy.deepcopy(model)
    train(model, token_ids(1, 3))
    idle = 0
    for old, new in zip(before.living_blocks, model.living_blocks, strict=True):
        served = new.vitals.table("trainable").tokens > 0
        idle += int((~served).sum())
        one, other = old.experts.weights("trainable"), new.experts.weights("trainable")
        for row in torch.nonzero(~served)[:, 0].tolist():
            assert torch.equal(one.down_proj[row], other.down_proj[row])
            for name in postsynaptic.ROW_TENSORS:
                tables = (block.postsynaptic.table("trainable") for block in (old, new))
                assert torch.equal(*(getattr(table, name)[row] for table in tables))
        assert not torch.equal(one.down_proj, other.down_proj)
    assert idle


def test_frozen_experts_keep_slow_and_fast_weights_in_training_and_learn_fast_ones_when_read_plastically() -> None:
    model, ids = fast_model(postsynaptic_slow_rate=1.0), token_ids(2, 12)
    for layer in range(2):
        for uid in model.expert_uids(layer)[:4]:
            model.freeze_expert(layer, uid)
    frozen = {name: tensor for name, tensor in everything(model).items() if ".frozen." in name}
    kept = {name: tensor for name, tensor in frozen.items() if "experts." in name or "postsynaptic." in name}
    train(model, ids, steps=3)
    now = everything(model)
    assert_same_bits(kept, {name: now[name] for name in kept})
    read_plastically(model, ids)
    now = everything(model)
    changed = {name.rpartition(".")[2] for name in kept if not torch.equal(kept[name], now[name])}
    assert changed == {"gain", "trace"}


# -- reading plastically -----------------------------------------------------------------------------------------------


def test_what_is_read_acts_on_later_passes_and_reading_twice_from_one_state_is_the_same_bit_for_bit() -> None:
    found = []
    for _ in range(2):
        model, ids = fast_model(), token_ids(2, 12)
        before = logits(model, ids)
        assert torch.equal(read_plastically(model, ids), before), "learned within the pass"
        assert relative_difference(logits(model, ids), before) > 1e-3
        found.append(buffers(model))
    assert_same_bits(*found)


def test_a_snapshot_takes_it_back_and_forgetting_leaves_the_slow_weights() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    before, fast = logits(model, ids), model.fast_snapshot()
    read_plastically(model, ids)
    model.split_expert(0, 1)
    model.restore_fast(fast)
    newborn = model.expert_uids(0)[-1]
    assert any(tensor.any() for tensor in model.fast_snapshot()[0][newborn])
    model.remove_expert(0, newborn)
    assert torch.equal(logits(model, ids), before)
    model.forget_fast()
    assert torch.equal(logits(model, ids), logits(living_model(), ids))


def test_a_model_that_never_wrote_reads_what_is_restored() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    fresh = copy.deepcopy(model)
    read_plastically(model, ids)
    fresh.restore_fast(model.fast_snapshot())
    assert torch.equal(logits(fresh, ids), logits(model, ids))
    assert not torch.equal(logits(model, ids), logits(living_model(), ids))


def test_what_training_has_seen_is_not_learned_as_read() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    twin = copy.deepcopy(model)
    model.train()(input_ids=token_ids(2, 12, seed=5))
    for each in (model.eval(), twin):
        read_plastically(each, ids)
    assert_same_bits(buffers(model), buffers(twin))
    model.train().potentiate_experts()
    assert any(not torch.equal(a, b) for a, b in zip(buffers(model).values(), buffers(twin).values(), strict=True))


def test_weights_without_gradients_and_their_fast_weights_keep_every_bit_in_training() -> None:
    """As under PEFT: whoever loads the adapter on the same base must get the same model."""
    model = fast_model()
    read_plastically(model, token_ids(2, 12))
    for block in model.living_blocks:
        block.postsynaptic.table("trainable").camkii.fill_(0.79)
        for slab in block.experts.children():
            for parameter in slab.parameters(recurse=False):
                parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items() if "experts" in name or ".gain" in name}
    for number in range(3):
        ids = token_ids(2, 12, seed=number)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.lifecycle_step()
    assert any("gain" in name for name in before) and any("down_proj" in name for name in before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_snapshot_of_another_model_is_refused_and_changes_nothing() -> None:
    model = fast_model()
    before = buffers(model)
    with pytest.raises(PopulationError, match="the snapshot has 1 layers, the model 2"):
        model.restore_fast(model.fast_snapshot()[:1])
    other = fast_model(postsynaptic_rank=2).fast_snapshot()
    with pytest.raises(PopulationError, match=r"uid 0 have shape \(32, 2\), the model's \(32, 4\)"):
        model.restore_fast(other)
    assert_same_bits(before, buffers(model))


@pytest.mark.parametrize("side", ["left", "right"])
@every_family
def test_padding_moves_nothing(family: str, side: str) -> None:
    ids, found = token_ids(1, 9), []
    for pad in (0, 1, 6):
        model = fast_model(family)
        padding = torch.randint(3, 60, (1, pad))
        mask = torch.cat([torch.zeros(1, pad), torch.ones(1, 9)], dim=1).long()
        padded = torch.cat([padding, ids], dim=1)
        if side == "right":
            mask, padded = mask.flip(1), torch.cat([ids, padding], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        read_plastically(model, padded, attention_mask=mask, position_ids=positions)
        found.append(model.fast_snapshot())
    for other in found[1:]:
        for one, two in pairs(found[0], other):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_one_token_teaches_nothing_so_generation_learns_from_its_prompt() -> None:
    model, ids = fast_model(), token_ids(1, 9)
    before = model.fast_snapshot()
    read_plastically(model, ids[:, :1])
    assert all(torch.equal(*pair) for pair in pairs(before, model.fast_snapshot()))
    read_plastically(model, ids)
    after = model.fast_snapshot()
    model.restore_fast(before)
    with model.plastic(keys=False):
        model.generate(ids, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(*pair) for pair in pairs(after, model.fast_snapshot()))


def test_texts_packed_into_a_row_teach_each_other_nothing_across_the_seam() -> None:
    known = postsynaptic.what_follows(torch.randn(1, 6, 4), None, None)[1]
    assert known.tolist() == [True] * 5 + [False]
    from living_moe.modeling_living_moe.modeling_living_moe import going_on

    packed = going_on(torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert postsynaptic.what_follows(torch.randn(1, 6, 4), None, packed)[1].tolist() == [True, True, False] * 2
    assert going_on(None) is None


def test_keys_stay_where_they_are_if_only_experts_are_to_learn() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    keys = model.key_snapshot()
    read_plastically(model, ids)
    assert all(
        torch.equal(old[uid], new[uid]) for old, new in zip(keys, model.key_snapshot(), strict=True) for uid in old
    )
    assert not model.config.plasticity.enabled
    with model.plastic(alpha=0.5):
        logits(model, ids)
    assert not all(
        torch.equal(old[u], new[u]) for old, new in zip(keys, model.key_snapshot(), strict=True) for u in old
    )
    with (
        pytest.raises(ConfigurationError, match="leaves only fast weights to learn"),
        living_model().plastic(keys=False),
    ):
        pass


def test_configured_for_inference_it_learns_in_passes_without_gradients_only() -> None:
    model, ids = fast_model(postsynaptic_inference=True), token_ids(2, 12)
    before = buffers(model)
    model(input_ids=ids)
    assert_same_bits(before, buffers(model))
    logits(model, ids)
    assert not torch.equal(
        model.fast_snapshot()[0][0][0], before["model.backbone.layers.0.mlp.postsynaptic.trainable.gain"][0]
    )


def test_a_pass_that_fails_half_way_teaches_nothing() -> None:
    model, ids = fast_model(), token_ids(2, 12)
    before = buffers(model)
    hook = model.living_blocks[1].router.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_plastically(model, ids)
    hook.remove()
    assert_same_bits(before, buffers(model))
    assert not model.living_blocks[0].postsynaptic.pending


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["split", "freeze", "part twice split"])
@every_family
def test_splits_freezes_and_thaws_keep_the_function_with_fast_weights(family: str, event: str) -> None:
    model, ids = fast_model(family), token_ids(3, 12)
    before = logits(model, ids)
    for layer in range(len(model.expert_counts)):
        for uid in model.expert_uids(layer)[:4]:
            if event == "freeze":
                model.freeze_expert(layer, uid)
            else:
                model.split_expert(layer, uid)
    assert relative_difference(logits(model, ids), before) <= EXACT
    if event == "freeze":
        model.thaw_expert(0, model.expert_uids(0)[0])
    elif event != "split":
        for layer in range(len(model.expert_counts)):
            for uid in model.expert_uids(layer):
                model.split_expert(layer, uid)
    assert relative_difference(logits(model, ids), before) <= EXACT
    check_invariants(model)


def test_a_newborn_inherits_the_whole_postsynaptic_side_and_may_part_from_it() -> None:
    model = fast_model()
    newborn = model.split_expert(0, 3).children[0]
    shown, uids = model.postsynapse(0), model.expert_uids(0)
    assert all(torch.equal(column[uids.index(3)], column[uids.index(newborn)]) for column in shown.values())
    gain, _ = model.fast_snapshot()[0][newborn]
    read_plastically(model, token_ids(4, 24))
    assert not torch.equal(*(model.fast_snapshot()[0][uid][0] for uid in (3, newborn)))
    assert gain.any()


def test_twins_merge_back_without_a_change_and_their_fast_weights_are_in_the_slow_ones() -> None:
    model, ids = fast_model(), token_ids(3, 12)
    newborn = model.split_expert(0, 3).children[0]
    before = logits(model, ids)
    model.merge_experts(0, [3, newborn])
    assert relative_difference(logits(model, ids), before) <= EXACT
    assert not any(tensor.any() for tensor in model.fast_snapshot()[0][3])
    assert model.postsynapse(0)["camkii"][model.expert_uids(0).index(3)] > 0


@torch.no_grad()
def test_a_merge_into_a_wider_tier_is_the_weighted_sum_of_the_functions_fast_weights_included() -> None:
    model = fast_model()
    block, hidden = model.living_blocks[0], torch.randn(HIDDEN)
    parts = [reference_expert(block, block.population.find(uid, 0), hidden) for uid in (1, 2)]
    for uid, load in ((1, 3.0), (2, 1.0)):
        block.vitals.table("trainable").load[block.population.find(uid, 0).row] = load
    model.merge_experts(0, [1, 2], tier_up=True)
    merged = reference_expert(block, block.population.find(1, 0), hidden)
    torch.testing.assert_close(merged, 0.75 * parts[0] + 0.25 * parts[1], rtol=1e-5, atol=1e-6)


def test_fast_weights_follow_their_experts_through_deaths_growth_and_shrinkage() -> None:
    model = fast_model(sections={"experts": {"growth_factor": 1.2, "shrink_below": 0.9, "max_tier": 2}})
    before = model.fast_snapshot()[0]
    for uid in (0, 5, 2):
        model.remove_expert(0, uid)
    model.split_expert(0, 7)
    for uid, (gain, trace) in model.fast_snapshot()[0].items():
        source = before[min(uid, 7)]
        assert torch.equal(gain, source[0]) and torch.equal(trace, source[1])
    check_invariants(model)
    assert len({event.kind for event in model.lineage} & {"grow", "shrink"}) == 2


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@every_family
def test_after_any_life_tables_fit_and_the_layer_is_the_oracles(family: str, preset: str) -> None:
    model = fast_model(family, preset)
    live(model, 15, seed=2)
    check_invariants(model)
    excite(model, 1)
    assert_equals_oracle(model, *IMPLEMENTATIONS)


def test_evidence_that_waits_is_dropped_by_an_event_of_its_layer() -> None:
    model = fast_model().train()
    model(input_ids=token_ids(2, 12))
    model.split_expert(0, 1)
    assert not model.living_blocks[0].postsynaptic.pending and model.living_blocks[1].postsynaptic.pending
    model.lifecycle_step()


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_a_failed_event_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fast_model()
    model.freeze_expert(0, 7)
    model.split_expert(0, 0)
    before = everything(model)

    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("living_moe.modeling_living_moe.lifecycle.surgery.carry_over", broken)
    uids = [7] if name == "thaw" else [0, 1]
    with pytest.raises(MemoryError):
        EVENTS[name](model, 0, uids)
    assert_same_bits(before, everything(model))


# -- checkpoints, conversion, refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@every_family
def test_fast_weights_are_saved_and_loaded(family: str, preset: str, tmp_path: Path) -> None:
    model, ids = fast_model(family, preset), token_ids(2, 12)
    live(model, 8, seed=5)
    excite(model, 2)
    model.save_pretrained(tmp_path)
    loaded = LivingMoeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert all(torch.equal(*pair) for pair in pairs(model.fast_snapshot(), loaded.fast_snapshot()))
    for layer in range(len(model.expert_counts)):
        one, other = model.postsynapse(layer), loaded.postsynapse(layer)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same_bits(buffers(loaded), buffers(LivingMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)))


def test_a_state_dict_of_another_population_is_taken_up() -> None:
    model, other, ids = fast_model(seed=3), fast_model(), token_ids(2, 12)
    live(model, 8, seed=5)
    excite(model, 2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))
    fresh = living_model(sections={"synapse": {"postsynaptic": True, "postsynaptic_rank": 4}})
    logits(fresh, ids)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, ids), logits(model, ids))


def test_a_checkpoint_without_fast_weights_names_what_a_model_with_them_misses(tmp_path: Path) -> None:
    living_model().save_pretrained(tmp_path)
    config = LivingMoeConfig.from_pretrained(tmp_path)
    config.synapse.postsynaptic = True
    with pytest.raises(CheckpointError, match=r"missing tensors: .*postsynaptic\.trainable"):
        LivingMoeForCausalLM.from_pretrained(tmp_path, config=config)


def test_training_goes_on_bit_for_bit_after_a_save(tmp_path: Path) -> None:
    model, ids = fast_model(sections={"lifecycle": {"enabled": False}}), token_ids(2, 12)
    train(model, ids, steps=2)
    model.save_pretrained(tmp_path)
    loaded = LivingMoeForCausalLM.from_pretrained(tmp_path)
    for each in (model, loaded):
        train(each, ids, steps=2)
    assert_same_bits(everything(model), everything(loaded))


def test_export_refuses_fast_weights_and_takes_folded_ones(tmp_path: Path) -> None:
    model, ids = fast_model(), token_ids(2, 12)
    with pytest.raises(ConversionError, match="fold_fast_weights"):
        living_moe.export(model, tmp_path / "refused")
    before = logits(model, ids)
    model.fold_fast_weights()
    exported = living_moe.export(model, tmp_path / "folded")
    assert relative_difference(logits(exported, ids), before) < 1e-5


def refuse_config() -> None:
    living_model(sections={"synapse": {"postsynaptic": True}, "experts": {"ternary_tiers": [0]}})


def refuse_ternarize() -> None:
    fast_model().ternarize()


@pytest.mark.parametrize("ask", [refuse_config, refuse_ternarize])
def test_ternary_experts_and_fast_weights_refuse_each_other(ask: Callable[[], None]) -> None:
    with pytest.raises(ConfigurationError, match=r"synapse\.postsynaptic is True"):
        ask()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("postsynaptic_gain", 1.5, r"must be in \[0, 1\]"),
        ("postsynaptic_rank", 0, "must be >= 1"),
        ("postsynaptic_trace_decay", 1.0, r"must be in \[0, 1\)"),
        ("postsynaptic_pp1_threshold", 2.0, r"must be in \[0, synapse.postsynaptic_camkii_threshold\]"),
    ],
)
def test_a_value_without_sense_is_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        living_model(sections={"synapse": {field: value}})


def test_a_model_without_fast_weights_says_so() -> None:
    model = living_model()
    for ask in (lambda: model.postsynapse(0), model.fast_snapshot):
        with pytest.raises(ConfigurationError, match="has no fast weights; set synapse.postsynaptic"):
            ask()
    model.forget_fast()
    model.fold_fast_weights()


# -- many processes ----------------------------------------------------------------------------------------------------


def live_as(rank: int) -> dict[str, Tensor]:
    """What one of two ranks ends with. The third step brings tokens to the first only."""
    model = fast_model(sections={"lifecycle": {"enabled": False}}, postsynaptic_slow_rate=0.5).train()
    for step in range(3):
        if rank == 0 or step < 2:
            model(input_ids=token_ids(2, 12, seed=10 * step + rank))
        model.lifecycle_step()
    model.eval()
    with model.plastic(keys=False):
        model(input_ids=token_ids(2, 12, seed=rank))
    return model.state_dict()


def test_two_ranks_are_one_process_that_makes_both_passes(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path)
    concerned = {name for name in first if "postsynaptic" in name or "experts." in name}
    assert [name for name in concerned if not torch.equal(first[name], second[name])] == []

    model = fast_model(sections={"lifecycle": {"enabled": False}}, postsynaptic_slow_rate=0.5).train()
    for step in range(3):
        for rank in range(2 if step < 2 else 1):
            model(input_ids=token_ids(2, 12, seed=10 * step + rank))
        model.lifecycle_step()
    model.eval()
    with model.plastic(keys=False):
        # What both ranks read before either has learned from it.
        evidence = [copy.deepcopy(model) for _ in range(2)]
    sums: list[dict[str, postsynaptic.Evidence]] = []
    for rank, reader in enumerate(evidence):
        for block in reader.living_blocks:
            block.postsynaptic.learn = lambda pool, parts, training, kept=sums: kept.append(dict(parts))
        read_plastically(reader, token_ids(2, 12, seed=rank))
    layers = len(model.living_blocks)
    for block, one, other in zip(model.living_blocks, sums[:layers], sums[layers:], strict=True):
        for slab, part in one.items():
            for total, added in zip(part.tensors(), other[slab].tensors(), strict=True):
                total += added
        block.postsynaptic.learn(block.experts, one, training=False)
    alone = model.state_dict()
    for name in sorted(concerned):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    one_of_two_ranks(live_as)
