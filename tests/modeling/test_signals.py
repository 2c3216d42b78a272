"""Interference, credited loss, density and entropy are what slow loops say, and follow their experts through events."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factories import HIDDEN, VOCAB, drift, live, living_model, mixed_text, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import VitalsConfig
from living_moe.modeling_living_moe.signals import spread
from living_moe.modeling_living_moe.vitals import COUNTED_BY, Vitals, VitalsTable

EVERY_STEP = {"vitals": {"signals_every": 1, "grad_norm_every": 1}}
COLUMNS = (*COUNTED_BY, "sampled", "credited", "compared")


def sampling(family: str = "mixtral", preset: str = "grow", tokens: int = 64, **options: Any) -> LivingMoeForCausalLM:
    sections = {"vitals": {**EVERY_STEP["vitals"], "signal_tokens": tokens}, **options.pop("sections", {})}
    return living_model(family, preset, sections=sections, **options).train()


def rows(model: LivingMoeForCausalLM, layer: int, names: tuple[str, ...] = COLUMNS) -> dict[str, Tensor]:
    """Columns of a layer's alive experts, in slot order."""
    block = model.living_blocks[layer]
    return {
        name: torch.cat([getattr(block.vitals.table(s), name)[:n] for s, n in block.population.alive.items()])
        for name in names
    }


class Witness:
    """Records what each living block's pool was given in the pass itself."""

    def __init__(self, model: LivingMoeForCausalLM):
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.hooks = [block.router.register_forward_hook(self._keep) for block in model.living_blocks]

    def _keep(self, module: Any, given: Any, output: Any) -> None:
        self.calls.append((given[0].detach(), output[1].detach(), output[2]))


def expert_output(block: Any, index: int, hidden_H: Tensor) -> Tensor:
    member = block.population.members[index]
    slab = block.experts.slab(member.slab)
    gate, up = (slab.gate_up_proj.detach()[member.row] @ hidden_H).chunk(2)
    return slab.down_proj.detach()[member.row] @ (F.silu(gate) * up)


def slow_signals(
    model: LivingMoeForCausalLM, witness: Witness, positions: list[int], losses: dict[int, float]
) -> list[list[list[float]]]:
    """Per layer the four rows of pending signals, token by token and expert by expert."""
    result = []
    for block, (hidden_TH, weights_TK, index_TK) in zip(model.living_blocks, witness.calls, strict=True):
        sums = [[0.0] * len(block.population.members) for _ in range(4)]
        for t in positions:
            served = [(int(e), float(w)) for e, w in zip(index_TK[t], weights_TK[t], strict=True) if e >= 0]
            outputs = {e: expert_output(block, e, hidden_TH[t]) for e, _ in served}
            mixture = sum((outputs[e] * w for e, w in served), torch.zeros(HIDDEN))
            for e, w in served:
                sums[0][e] += float((outputs[e] - mixture).norm() / outputs[e].norm())
                sums[1][e] += 1
                if t in losses:
                    share = w / sum(w for _, w in served)
                    sums[2][e] += share * losses[t]
                    sums[3][e] += share
        result.append(sums)
    return result


def slow_losses(logits: Tensor, labels: Tensor) -> dict[int, float]:
    """Position in the flattened batch -> loss of what follows."""
    batch, length = labels.shape
    found = {}
    for b in range(batch):
        for t in range(length - 1):
            label = int(labels[b, t + 1])
            if label != -100:
                row = logits[b, t].detach().double()
                found[b * length + t] = float(row.logsumexp(0) - row[label])
    return found


def pending(model: LivingMoeForCausalLM) -> list[Tensor]:
    return [block.vitals.pending_signals for block in model.living_blocks]


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("tokens", [64, 7])
def test_interference_and_credit_are_those_of_the_slow_loop(family: str, tokens: int) -> None:
    model = sampling(family, tokens=tokens)
    live(model, 5)
    witness = Witness(model)
    ids = mixed_text(3, 8)
    labels = ids.clone()
    labels[1, 3:6] = -100
    logits = model(ids, labels=labels).logits
    positions = [(2 * i + 1) * 24 // (2 * min(tokens, 24)) for i in range(min(tokens, 24))]
    expected = slow_signals(model, witness, positions, slow_losses(logits, labels))
    for ours, theirs in zip(pending(model), expected, strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert all(float(sums[0].sum()) > 0 and float(sums[3].sum()) > 0 for sums in pending(model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "active"])
def test_every_implementation_measures_the_same(implementation: str) -> None:
    model, other = sampling(), sampling()
    other.set_experts_implementation(implementation)
    for one in (model, other):
        one(mixed_text(3, 8), labels=mixed_text(3, 8))
    for ours, theirs in zip(pending(model), pending(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_top_any_measures_only_places_in_use() -> None:
    model = sampling(sections={"router": {"selection": "top_any", "threshold": 0.5}})
    witness = Witness(model)
    ids = mixed_text(3, 8)
    logits = model(ids, labels=ids).logits
    assert any((index_TK < 0).any() for _, _, index_TK in witness.calls)
    expected = slow_signals(model, witness, list(range(24)), slow_losses(logits, ids))
    for ours, theirs in zip(pending(model), expected, strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_an_expert_that_serves_alone_meets_no_interference() -> None:
    model = sampling(num_experts_per_tok=1)
    model(mixed_text(3, 8))
    model.lifecycle_step()
    for layer in range(2):
        assert not model.vitals(layer)["interference"].any()
        assert rows(model, layer)["sampled"].any()


def test_signals_are_measured_on_their_steps_only() -> None:
    model = living_model("mixtral", sections={"vitals": {"signals_every": 3}}).train()
    seen = []
    for _ in range(7):
        model(mixed_text(2, 8), labels=mixed_text(2, 8))
        seen.append(pending(model)[0] is not None)
        model.lifecycle_step()
    assert seen == [False, False, True, False, False, True, False]
    assert int(rows(model, 0)["sampled"].max()) == 2
    never = living_model("mixtral", sections={"vitals": {"signals_every": 0}}).train()
    for _ in range(2):
        never(mixed_text(2, 8), labels=mixed_text(2, 8))
        assert pending(never)[0] is None
        never.lifecycle_step()


def test_without_labels_nobody_is_credited_and_in_evaluation_nothing_is_measured() -> None:
    model = sampling()
    model(mixed_text(2, 8))
    assert all(not sums[2:].any() and sums[:2].any() for sums in pending(model))
    model = sampling().eval()
    model(mixed_text(2, 8), labels=mixed_text(2, 8))
    assert all(sums is None for sums in pending(model))


def test_measuring_changes_neither_loss_nor_gradients() -> None:
    plain, measured = living_model("mixtral").train(), sampling()
    ids = mixed_text(3, 8)
    losses = []
    for model in (plain, measured):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert not any(sums.requires_grad for sums in pending(measured))


def test_under_autocast_the_gradients_of_a_sampled_step_are_all_there() -> None:
    grads = []
    for model in (living_model("mixtral").train(), sampling()):
        model.set_experts_implementation("eager")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(mixed_text(3, 8), labels=mixed_text(3, 8)).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_measures_once(reentrant: bool) -> None:
    plain, checkpointed = sampling(), sampling()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ids = mixed_text(3, 8)
    for model in (plain, checkpointed):
        model(ids, labels=ids).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(pending(plain), pending(checkpointed), strict=True))


def test_micro_batches_add_up_to_their_batch() -> None:
    whole, parts = sampling(), sampling()
    ids = mixed_text(4, 8)
    whole(ids, labels=ids)
    for row in ids:
        parts(row[None], labels=row[None])
    for ours, theirs in zip(pending(whole), pending(parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_padding_is_not_sampled() -> None:
    ids = mixed_text(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded, short = sampling(), sampling()
    padded(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    short(ids[:1, 5:], labels=ids[:1, 5:], position_ids=torch.arange(3)[None])
    short(ids[1:], labels=ids[1:])
    for ours, theirs in zip(pending(padded), pending(short), strict=True):
        assert float(ours[1].sum()) == 2 * int(mask.sum())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 50))
def test_a_sample_is_evenly_spread_over_the_real_tokens(real: list[bool], most: int) -> None:
    mask = torch.tensor(real)
    sample = spread(len(real), most, mask, torch.device("cpu"))
    taken = sample.position_S[sample.real_S].tolist()
    places = [place for place, is_real in enumerate(real) if is_real]
    assert taken == sorted(set(taken)) and set(taken) <= set(places)
    assert len(taken) == min(most, len(real), len(places))
    if taken:
        ranks = [places.index(place) for place in taken]
        gaps = [b - a for a, b in itertools.pairwise(ranks)]
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
    if all(real):
        whole = spread(len(real), most, None, torch.device("cpu"))
        assert torch.equal(whole.position_S, sample.position_S) and whole.real_S.all()


def test_labels_that_are_shifted_already_are_not_shifted_again() -> None:
    model, other = sampling(), sampling()
    ids = mixed_text(2, 8)
    model(ids, labels=ids)
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    other(ids, labels=ids, shift_labels=shifted)
    assert all(torch.equal(a, b) for a, b in zip(pending(model), pending(other), strict=True))


def test_the_config_refuses_averages_without_a_slow_one() -> None:
    with pytest.raises(ConfigurationError, match="vitals.fast_decay must be < vitals.slow_decay, got 0.99"):
        VitalsConfig(fast_decay=0.99)
    with pytest.raises(ConfigurationError, match="vitals.signal_tokens must be >= 1, got 0"):
        VitalsConfig(signal_tokens=0)


# -- averages ----------------------------------------------------------------------------------------------------------


def folded(vitals: Vitals, signals: list[list[float]]) -> None:
    experts = len(signals[0])
    counts = torch.ones(4, experts, dtype=torch.float64)
    vitals.fold(counts, {"trainable": experts}, None, signals=torch.tensor(signals, dtype=torch.float64))


def test_averages_are_over_the_steps_that_brought_something_and_start_unbiased() -> None:
    vitals = Vitals({"trainable": 2}, decay=0.5, fast_decay=0.5, slow_decay=0.75)
    table = vitals.table("trainable")
    fast = slow = pull = noise = 0.0
    losses = [3.0, 1.0, 2.0, 5.0, 5.0, 4.0]
    for step, loss in enumerate(losses):
        folded(vitals, [[loss, 0.0], [2.0, 0.0], [loss * 0.5, 0.0], [0.5, 0.0]])
        folded(vitals, [[0.0, 0.0]] * 4)
        fast = sum(losses[: step + 1]) / (step + 1) if step < 2 else 0.5 * fast + 0.5 * loss
        squares = (loss - slow) ** 2
        noise = 0.0 if not step else noise + (squares - noise) * max(1 / step, 0.25)
        slow = sum(losses[: step + 1]) / (step + 1) if step < 4 else 0.75 * slow + 0.25 * loss
        pull = sum(losses[: step + 1]) / (step + 1) / 2 if step < 2 else 0.5 * pull + 0.25 * loss
        assert float(table.loss_fast[0]) == pytest.approx(fast, abs=1e-5)
        assert float(table.loss_slow[0]) == pytest.approx(slow, abs=1e-5)
        assert float(table.loss_noise[0]) == pytest.approx(noise, abs=1e-5)
        assert float(table.interference[0]) == pytest.approx(pull, abs=1e-5)
    assert float(table.divergence[0]) == pytest.approx(fast - slow, abs=1e-5)
    assert table.credited.tolist() == table.sampled.tolist() == [6, 0]
    assert not table.loss_fast[1] and not table.interference[1]


def test_an_expert_whose_tokens_become_harder_diverges_upwards() -> None:
    model = sampling()
    ids = mixed_text(4, 8)
    for _ in range(12):
        model(ids, labels=ids)
        model.lifecycle_step()
    assert model.vitals(0)["divergence"].abs().max() < 1e-5
    for _ in range(3):
        model(ids, labels=token_ids(4, 8, seed=9).fill_(5))
        model.lifecycle_step()
    vitals = model.vitals(0)
    change = vitals["loss_fast"] - vitals["loss_slow"]
    assert torch.equal(vitals["divergence"], change) and float(change.abs().max()) > 0.05


def test_density_and_entropy_are_averages_of_the_steps() -> None:
    vitals = Vitals({"trainable": 4}, decay=0.5)
    seen: list[tuple[float, float]] = []
    for counts in ([4.0, 4.0, 4.0, 4.0], [8.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]):
        total = sum(counts)
        shares = [c / total for c in counts if c]
        if total:
            seen.append((total / 4, -sum(p * math.log(p) for p in shares) / math.log(4)))
        both = [sum(pair[i] for pair in seen[:2]) / len(seen[:2]) for i in range(2)]
        for later in seen[2:]:
            both = [0.5 * old + 0.5 * new for old, new in zip(both, later, strict=True)]
        row = torch.tensor(counts, dtype=torch.float64)
        vitals.fold(
            torch.stack([row, row, 0 * row, row.sum().expand(4)]), {"trainable": 4}, None, tokens=torch.tensor(4)
        )
        assert float(vitals.density) == pytest.approx(both[0])
        assert float(vitals.entropy) == pytest.approx(both[1], abs=1e-6)


def test_the_density_of_a_layer_is_its_experts_per_token() -> None:
    model = sampling()
    model(mixed_text(4, 8))
    model.lifecycle_step()
    assert float(model.routing(0)["density"]) == 2.0 and 0 < float(model.routing(0)["entropy"]) < 1
    model = sampling(sections={"router": {"selection": "top_any", "threshold": 0.5}})
    witness = Witness(model)
    model(mixed_text(4, 8))
    model.lifecycle_step()
    used = (witness.calls[1][2] >= 0).sum(dim=1).float().mean()
    assert float(model.routing(1)["density"]) == pytest.approx(float(used)) and float(used) != 2.0


# -- through events ----------------------------------------------------------------------------------------------------


def measured_model(preset: str = "grow") -> LivingMoeForCausalLM:
    model = sampling(preset=preset)
    for seed in range(3):
        ids = mixed_text(4, 8, seed=seed)
        model(ids, labels=ids).loss.backward()
        model.lifecycle_step()
        model.zero_grad()
    assert all((rows(model, layer)[name] > 0).any() for layer in range(2) for name in ("sampled", "credited"))
    return model


def test_a_newborn_starts_from_its_parents_signals_and_nobody_elses_change() -> None:
    model = measured_model()
    before = rows(model, 0)
    assert before["sketch"].any(dim=1).all()
    model.split_expert(0, 3)
    after = rows(model, 0)
    for name in COLUMNS:
        assert torch.equal(after[name][:8], before[name]), name
        assert torch.equal(after[name][8], before[name][3]), name


def test_signals_follow_experts_that_move() -> None:
    model = measured_model()
    ids = mixed_text(4, 8)
    model(ids, labels=ids)  # left pending

    def by_uid() -> dict[int, list[list[float]]]:
        found, block = rows(model, 0), model.living_blocks[0]
        waiting = block.vitals.pending_signals
        return {
            uid: [*(found[name][n].flatten().tolist() for name in COLUMNS), waiting[:, n].tolist()]
            for n, uid in enumerate(model.expert_uids(0))
        }

    before = by_uid()
    model.remove_expert(0, 1)
    model.freeze_expert(0, 6)
    model.remove_expert(0, 3)
    model.thaw_expert(0, 6)
    after = by_uid()
    assert set(after) == {0, 2, 4, 5, 6, 7} and all(after[uid] == before[uid] for uid in after)


def test_merged_experts_have_the_mean_signal_of_those_that_were_measured() -> None:
    model = measured_model()
    table = model.living_blocks[0].vitals.table("trainable")
    table.load[:3] = torch.tensor([1.0, 3.0, 4.0])
    table.credited[2] = 0
    before = rows(model, 0)
    model.merge_experts(0, [0, 1, 2])
    after = rows(model, 0)
    for name, count in COUNTED_BY.items():
        weights = torch.tensor([1.0, 3.0, 0.0 if count == "credited" else 4.0])
        mean = (before[name][:3].movedim(0, -1) * weights).sum(-1) / weights.sum()
        torch.testing.assert_close(after[name][0], mean, msg=lambda text, name=name: f"{name}: {text}")
        assert int(after[count][0]) == int(before[count][:3].max())


def test_saved_and_loaded_signals_are_the_same(tmp_path: Path) -> None:
    model = measured_model("frozen-graft")
    model.split_expert(0, model.expert_uids(0)[0])
    model.save_pretrained(tmp_path)
    again = LivingMoeForCausalLM.from_pretrained(tmp_path)
    for layer in range(2):
        for name, value in rows(model, layer).items():
            assert torch.equal(rows(again, layer)[name], value), name
        for name, value in model.routing(layer).items():
            assert torch.equal(again.routing(layer)[name], value)
    half = copy.deepcopy(model).bfloat16()
    assert all(getattr(half.living_blocks[0].vitals, name).dtype == torch.float32 for name in ("density", "entropy"))


@pytest.mark.parametrize("seed", range(3))
def test_a_life_of_random_events_keeps_signals_aligned_and_finite(seed: int) -> None:
    model = measured_model()
    live(model, 12, seed)
    drift(model, seed)
    model.lifecycle_step()
    ids = mixed_text(4, 8)
    model(ids, labels=ids).loss.backward()
    model.lifecycle_step()
    for block in model.living_blocks:
        for slab, capacity in block.capacities().items():
            table, alive = block.vitals.table(slab), block.population.alive.get(slab, 0)
            assert table.sketch.shape == (capacity, 256)
            for name in VitalsTable.columns:
                column = getattr(table, name)
                assert column.isfinite().all() and len(column) == capacity
                if name in COLUMNS:
                    assert not column[alive:].any(), f"{name}: a spare row holds something"
    assert VOCAB > max(ids.flatten().tolist())
