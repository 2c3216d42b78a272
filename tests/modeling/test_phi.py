"""Φ is 0 for equal experts, high for independent ones, grows in between; it knows functions and use, never weights."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from factories import living_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import VitalsConfig
from living_moe.modeling_living_moe import phi as phi_module
from living_moe.modeling_living_moe.phi import (
    Phi,
    measured_experts,
    phi_collapsed,
    phi_evidence,
    phi_of,
    sampled_outputs,
)

TOKENS, WIDTH, PLACES = 24, 40, 2


def drawn(experts: int, seed: int = 0) -> Tensor:
    return torch.randn(experts, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def equal_shares(experts: int) -> Tensor:
    return torch.full((experts,), 1 / experts, dtype=torch.float64)


def measured(outputs: Tensor, shares: Tensor | None = None, parts: Tensor | None = None) -> Phi:
    shares = equal_shares(len(outputs)) if shares is None else shares
    parts = torch.ones(TOKENS, PLACES) if parts is None else parts
    return phi_of(phi_evidence(outputs, shares, parts), shares)


def orthogonal(experts: int) -> Tensor:
    """Functions that never have a feature in common."""
    outputs = torch.zeros(experts, TOKENS, WIDTH)
    for expert in range(experts):
        outputs[expert, :, expert] = 1.0
    return outputs


# -- the measure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 5, 16])
def test_equal_experts_have_none_and_orthogonal_ones_all_of_it(experts: int) -> None:
    same = measured(drawn(1).expand(experts, -1, -1))
    assert float(same.phi) < 1e-5 and float(same.differentiation) < 1e-10 and float(same.integration) == 1.0
    assert [float(part) for part in measured(orthogonal(experts))] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)


def test_independent_experts_have_nearly_all_of_it() -> None:
    assert float(measured(drawn(16)).phi) > 0.98


def test_one_expert_has_none() -> None:
    assert [float(part) for part in measured(drawn(1))[:2]] == [0.0, 0.0]


@pytest.mark.parametrize("experts", [2, 6, 20])
def test_a_chain_from_equal_to_independent_rises_at_every_link(experts: int) -> None:
    common = orthogonal(experts + 1)[-1:]
    own = orthogonal(experts)
    chain = [float(measured((1 - t) * common + t * own).phi) for t in torch.linspace(0, 1, 41).tolist()]
    assert chain[0] < 1e-5 and chain[-1] > 1 - 1e-6
    assert all(before < after for before, after in itertools.pairwise(chain))


@pytest.mark.parametrize("seed", range(3))
def test_so_does_a_chain_of_random_functions(seed: int) -> None:
    common, own = drawn(1, seed), drawn(6, seed + 100)
    chain = [float(measured((1 - t) * common + t * own).phi) for t in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)]
    assert all(before < after for before, after in itertools.pairwise(chain))


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9])
def test_differentiation_is_the_entropy_of_the_spectrum_that_theory_gives(cosine: float) -> None:
    """Of functions at equal angles: (1 + (M - 1) c) / M once and (1 - c) / M otherwise."""
    experts = 5
    outputs = torch.cat([orthogonal(experts) * (1 - cosine) ** 0.5, torch.full((experts, TOKENS, 1), cosine**0.5)], -1)
    spectrum = torch.tensor([1 + (experts - 1) * cosine] + [1 - cosine] * (experts - 1), dtype=torch.float64) / experts
    expected = float(torch.special.entr(spectrum).sum()) / math.log(experts)
    assert float(measured(outputs).differentiation) == pytest.approx(expected, abs=1e-6)


def test_integration_falls_with_how_much_one_expert_makes_of_a_token() -> None:
    outputs, found = orthogonal(4), []
    for second in (1.0, 0.5, 0.1, 0.0):
        parts = torch.tensor([[1.0, second]]).expand(TOKENS, -1)
        q = [1 / (1 + second), second / (1 + second)]
        expected = -sum(share * math.log(share) for share in q if share) / math.log(2)
        found.append(measured(outputs, parts=parts))
        assert float(found[-1].integration) == pytest.approx(expected, abs=1e-6)
        assert float(found[-1].phi) == pytest.approx(expected**0.5, abs=1e-6)
    assert float(found[-1].phi) == 0.0
    # Top-1 routing integrates nothing.
    assert float(measured(outputs, parts=torch.ones(TOKENS, 1)).phi) == 0.0


@settings(max_examples=40)
@given(
    experts=st.integers(1, 9), seed=st.integers(0, 10_000), rank=st.integers(1, 9), low=st.sampled_from([0.0, 1e-8, 1])
)
def test_it_is_always_between_zero_and_one(experts: int, seed: int, rank: int, low: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(experts, rank, generator=generator) * torch.rand(rank, generator=generator) ** 8
    outputs = torch.einsum("er,rsh->esh", mixture, drawn(rank, seed))
    shares = torch.rand(experts, generator=generator, dtype=torch.float64) + low
    parts = torch.rand(TOKENS, 3, generator=generator) * (torch.rand(TOKENS, 3, generator=generator) > 0.4)
    for part in measured(outputs, shares / shares.sum(), parts):
        assert 0.0 <= float(part) <= 1.0


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-30, 30))
def test_neither_the_order_of_slots_nor_the_scale_of_outputs_matters(seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, parts = drawn(6, seed), torch.rand(TOKENS, 2, generator=generator) + 0.01
    outputs[1] = outputs[0] + 0.3 * outputs[1]
    shares = torch.rand(6, generator=generator, dtype=torch.float64) + 0.1
    shares /= shares.sum()
    order = torch.randperm(6, generator=generator)
    plain = measured(outputs, shares, parts)
    for other in (
        measured(outputs[order], shares[order], parts.flip(1)),
        measured(outputs * 10.0**exponent, shares, parts.double() * 10.0**exponent),
    ):
        assert [float(part) for part in other] == pytest.approx([float(part) for part in plain], abs=1e-6)
    # Of one token alone neither: none drowns the others.
    loud = outputs.clone()
    loud[:, 3] *= 1e6
    assert float(measured(loud, shares, parts).phi) == pytest.approx(float(plain.phi), abs=1e-6)


@settings(max_examples=20)
@given(experts=st.integers(2, 9), seed=st.integers(0, 10_000), kept=st.floats(0.0, 1.0))
def test_a_split_at_zero_noise_lowers_it_by_the_logarithm_of_the_experts(experts: int, seed: int, kept: float) -> None:
    """Wherever the tokens of the parent go."""
    generator = torch.Generator().manual_seed(seed)
    outputs = drawn(experts, seed)
    shares = torch.rand(experts, generator=generator, dtype=torch.float64) + 0.1
    shares /= shares.sum()
    before = measured(outputs, shares)
    after = measured(
        torch.cat([outputs, outputs[:1]]),
        torch.cat([shares[:1] * kept, shares[1:], shares[:1] * (1 - kept)]),
    )
    expected = math.log(experts) / math.log(experts + 1)
    assert float(after.differentiation) == pytest.approx(expected * float(before.differentiation), rel=1e-5)
    assert float(after.phi) == pytest.approx(expected**0.5 * float(before.phi), rel=1e-5)


def test_zero_dead_and_broken_outputs_have_no_state() -> None:
    nothing = measured(torch.zeros(4, TOKENS, WIDTH), parts=torch.zeros(TOKENS, 2))
    assert [float(part) for part in nothing] == [0.0, 0.0, 0.0]
    outputs = orthogonal(4)
    for broken in (0.0, math.nan, math.inf):
        outputs[3] = broken
        assert float(measured(outputs).differentiation) == pytest.approx(math.log(3) / math.log(4), abs=1e-6)
    # Who serves nobody counts as capacity that is not used, whatever it would say.
    outputs = orthogonal(4)
    idle = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0], dtype=torch.float64)
    assert float(measured(outputs, idle).differentiation) == pytest.approx(math.log(3) / math.log(4), abs=1e-6)
    assert [float(part) for part in phi_of(torch.zeros(4 * 4 + 2, dtype=torch.float64), idle)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_token_that_overflowed_says_nothing_of_the_experts(broken: float) -> None:
    outputs, shares, parts = drawn(6), equal_shares(6), torch.rand(drawn(6).shape[1], 2, dtype=torch.float64)
    whole = phi_evidence(outputs, shares, parts)
    overflowed = outputs.clone()
    overflowed[:, 3] = broken
    rest = torch.arange(outputs.shape[1]) != 3
    torch.testing.assert_close(
        phi_evidence(overflowed, shares, parts), phi_evidence(outputs[:, rest], shares, parts[rest])
    )
    assert phi_evidence(overflowed, shares, parts)[-1] == whole[-1] - 1
    # Nothing is left: no measurement, rather than one of 0.
    assert phi_evidence(torch.full_like(outputs, broken), shares, parts)[-1] == 0


def test_evidence_adds_up_over_passes_and_padding_is_none() -> None:
    outputs, shares, parts = drawn(5), equal_shares(5), torch.rand(TOKENS, 2)
    real = torch.arange(TOKENS) % 3 != 0
    outputs[2] = outputs[1] + outputs[2]
    whole = phi_evidence(outputs, shares, parts)
    halves = [phi_evidence(outputs[:, each], shares, parts[each]) for each in (slice(0, 7), slice(7, None))]
    assert torch.allclose(halves[0] + halves[1], whole, rtol=1e-9, atol=1e-12)
    spoiled = outputs.clone()
    spoiled[:, ~real] = math.nan
    padded = phi_evidence(spoiled, shares, parts, real)
    assert torch.allclose(padded, phi_evidence(outputs[:, real], shares, parts[real]), rtol=1e-9, atol=1e-12)
    assert float(padded[-1]) == int(real.sum())


def test_the_most_loaded_experts_are_measured_and_ties_go_by_slot() -> None:
    load = torch.tensor([0.5, 2.0, 0.0, 2.0, 0.5, 1.0])
    picked, shares = measured_experts(load, 4)
    assert picked.tolist() == [0, 1, 3, 5]
    assert shares.tolist() == pytest.approx([0.5 / 5.5, 2 / 5.5, 2 / 5.5, 1 / 5.5])
    assert measured_experts(torch.zeros(3), 64)[1].tolist() == pytest.approx([1 / 3] * 3)


def test_a_collapse_is_a_fall_below_a_share_of_the_peak() -> None:
    phi, peak = torch.tensor([0.3, 0.41, 0.0, 0.2, 1e-4]), torch.tensor([0.8, 0.8, 0.0, 0.2, 1e-3])
    # The last one fell among experts that were alike before.
    assert phi_collapsed(phi, peak, 0.5).tolist() == [True, False, False, False, False]


# -- in a model --------------------------------------------------------------------------------------------------------


def living(family: str = "mixtral", **vitals: int) -> LivingMoeForCausalLM:
    sections = {"vitals": {"phi_every": 2, **vitals}, "lifecycle": {"enabled": False}}
    return living_model(family, sections=sections)


def step(model: LivingMoeForCausalLM, seed: int, passes: int = 1) -> None:
    model.train()
    for number in range(passes):
        ids = token_ids(3, 16, seed=seed + number)
        model(input_ids=ids, labels=ids).loss.backward()
    model.lifecycle_step()
    model.zero_grad()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_outputs_are_those_of_each_expert_alone(family: str) -> None:
    block = living(family).living_blocks[0]
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, 3], [1, -1], [7, 2], [4, 4], [5, 6], [6, 0], [2, 1]])
    outputs, lengths = sampled_outputs(block.experts, hidden, index, torch.arange(8), block.population.alive)
    for expert in range(8):
        alone = block.experts(hidden, torch.full((7, 1), expert), torch.ones(7, 1), block.population.alive)
        assert torch.allclose(outputs[expert], alone, atol=1e-6)
    assert lengths[1, 1] == 0 and lengths[2, 0] == pytest.approx(float(outputs[7, 2].norm()), rel=1e-5)


def test_it_is_measured_at_its_cadence_and_logged() -> None:
    model = living()
    assert float(model.phi(0)["phi"]) == 0.0 and "phi" not in model.signals()
    step(model, 1)
    assert float(model.phi(0)["phi"]) == 0.0
    step(model, 2)
    found = model.phi(1)
    assert 0.0 < float(found["phi"]) <= 1.0 and torch.equal(found["phi"], found["phi_level"])
    assert float(found["phi"]) == pytest.approx(float(found["differentiation"] * found["integration"]) ** 0.5, rel=1e-5)
    signals = model.signals()
    for name in ("phi", "differentiation", "integration"):
        assert signals[name] == pytest.approx(sum(float(model.phi(layer)[name]) for layer in range(2)) / 2)
    step(model, 3)
    assert torch.equal(model.phi(1)["phi"], found["phi"])


def test_the_level_is_a_moving_average_and_the_peak_its_largest_once_it_has_settled() -> None:
    model, level, seen = living(phi_every=1), 0.0, []
    for number in range(12):
        step(model, number)
        found = {name: float(value) for name, value in model.phi(0).items()}
        level += max(1 / (number + 1), 0.2) * (found["phi"] - level)
        seen += [level] if number >= 4 else []
        assert found["phi_level"] == pytest.approx(level, abs=1e-6)
        assert found["phi_peak"] == pytest.approx(max(seen, default=0.0), abs=1e-6)
    # An answer ends it: level and peak are of what is measured from then on.
    model.living_block(0).vitals.answer_collapse()
    assert float(model.phi(0)["phi_peak"]) == 0
    for number in range(5):
        step(model, 20 + number)
        found = {name: float(value) for name, value in model.phi(0).items()}
        level = found["phi"] if number == 0 else level + (found["phi"] - level) / (number + 1)
        assert found["phi_level"] == pytest.approx(level, abs=1e-6)
        assert found["phi_peak"] == pytest.approx(level if number == 4 else 0.0, abs=1e-6)
        # The escape's own is not spent by a split.
        record = max([*seen, level] if number == 4 else seen)
        assert found["phi_record"] == pytest.approx(record, abs=1e-6)
    model.living_block(0).vitals.come_home()
    assert float(model.phi(0)["phi_record"]) == float(model.phi(0)["phi_peak"]) == 0


def test_measuring_changes_no_gradient_and_zero_never_measures() -> None:
    gradients = []
    for every in (0, 1):
        model = living(phi_every=every)
        ids = token_ids(3, 16, seed=5)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.lifecycle_step()
        assert (float(model.phi(0)["phi"]) > 0) == bool(every)
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_a_layer_of_equal_experts_has_none_and_a_split_lowers_it_in_a_model_too() -> None:
    model = living(phi_tokens=48)
    for slot in model.living_block(0).slot_parameters():
        if slot.role != "key":
            slot.parameter.data.copy_(slot.parameter.data[:1].expand_as(slot.parameter))
    for _ in range(2):
        step(model, 7)
    assert float(model.phi(0)["phi"]) < 1e-4 < 0.5 < float(model.phi(1)["phi"])
    before = model.phi(1)
    model.split_expert(1, model.expert_uids(1)[0])
    for _ in range(2):
        step(model, 7)
    expected = math.log(8) / math.log(9)
    assert float(model.phi(1)["differentiation"]) == pytest.approx(
        expected * float(before["differentiation"]), rel=1e-4
    )


def test_an_event_between_pass_and_step_drops_the_measurement() -> None:
    model = living(phi_every=1)
    step(model, 1)
    before = model.phi(0)["phi"]
    model.train()
    ids = token_ids(3, 16, seed=9)
    model(input_ids=ids, labels=ids).loss.backward()
    model.split_expert(0, model.expert_uids(0)[0])
    model.lifecycle_step()
    assert torch.equal(model.phi(0)["phi"], before)


def test_no_more_than_so_many_experts_and_tokens_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = living(phi_experts=5, phi_tokens=6), []
    honest = phi_module.phi_evidence

    def spy(outputs: Tensor, *args: Tensor) -> Tensor:
        seen.append(tuple(outputs.shape))
        return honest(outputs, *args)

    monkeypatch.setattr("living_moe.modeling_living_moe.block.phi_evidence", spy)
    step(model, 1)
    step(model, 2, passes=2)
    assert seen == [(5, 6, 32)] * 4


def test_it_is_saved_and_padding_does_not_move_it(tmp_path: Path) -> None:
    model = living(phi_tokens=64)
    step(model, 1)
    step(model, 2)
    model.save_pretrained(tmp_path)
    again = LivingMoeForCausalLM.from_pretrained(tmp_path)
    for layer in range(2):
        for name, value in model.phi(layer).items():
            assert torch.equal(again.phi(layer)[name], value)
    found = []
    for padding in (0, 5):
        other = living(phi_tokens=64, phi_every=1)
        other.train()
        ids = token_ids(2, 12, seed=3)
        mask = torch.cat([torch.zeros(2, padding, dtype=torch.long), torch.ones_like(ids)], dim=1)
        ids = torch.cat([torch.zeros(2, padding, dtype=torch.long), ids], dim=1)
        other(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        other.lifecycle_step()
        found.append(float(other.phi(0)["phi"]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize(("field", "value"), [("phi_every", -1), ("phi_tokens", 0), ("phi_experts", 1)])
def test_senseless_settings_are_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"vitals.{field} must be"):
        VitalsConfig(**{field: value})
