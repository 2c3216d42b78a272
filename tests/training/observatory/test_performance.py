"""What an expert is worth: leaving it out equals really taking its term away, and the estimate is the derivative."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import FAMILIES, drift, live, living_model, mixed_text, prime_searches, token_ids
from lives import assert_same_life, busy_model, life
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import TrainingError
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.training.collapse import routing_mutual_information
from living_moe.training.observatory.performance import (
    ExpertRow,
    agreement,
    class_counts,
    leave_one_out,
    measure,
    pool_hook,
    read,
    sample_blocks,
    spearman,
    specialisation,
)


def lived(family: str = "mixtral", preset: str = "grow", **options: Any) -> LivingMoeForCausalLM:
    """A model whose experts have split, merged and drifted apart."""
    model = living_model(family, preset, **options)
    live(model, 6, seed=1)
    drift(model, 3, frozen=True)
    return model


class WithoutOne:
    """The oracle: a layer's experts one pair of token and expert at a time, and one expert's pairs never computed."""

    def __init__(self, block: LivingMoeBlock, gone: int):
        self.block, self.gone = block, gone
        self.plain = block.experts.forward

    def __call__(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, alive: Any, **_: Any) -> Tensor:
        output_TH = torch.zeros_like(hidden_TH)
        for token, place in (index_TK >= 0).nonzero().tolist():
            expert = int(index_TK[token, place])
            if expert != self.gone:
                member = self.block.population.members[expert]
                slab = self.block.experts.weights(member.slab)
                gate, up = (slab.gate_up_proj[member.row] @ hidden_TH[token]).chunk(2)
                output = slab.down_proj[member.row] @ (slab.act_fn(gate) * up)
                output_TH[token] += weights_TK[token, place] * output
        return output_TH

    def __enter__(self) -> None:
        self.block.experts.forward = self  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self.block.experts.forward  # type: ignore[method-assign]


@torch.no_grad()
def mean_loss(model: LivingMoeForCausalLM, ids_NS: Tensor) -> float:
    logits = model(input_ids=ids_NS, use_cache=False).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1).double(), ids_NS[:, 1:].flatten()))


TOP_ANY = {"router": {"selection": "top_any", "max_experts_per_token": 5, "threshold": 0.2}}


@pytest.mark.parametrize(
    ("family", "preset", "sections"),
    [(family, preset, {}) for family in FAMILIES for preset in ("grow", "frozen-graft")]
    + [("mixtral", "grow", TOP_ANY)],
)
def test_leaving_an_expert_out_is_the_model_whose_layer_never_computes_it(
    family: str, preset: str, sections: dict[str, Any]
) -> None:
    model = lived(family, preset, sections=sections)
    ids_NS = mixed_text(4, 12)
    reading = read(model, ids_NS, batch_size=3)
    deltas = leave_one_out(model, reading, batch_size=5)
    full = mean_loss(model, ids_NS)
    assert float(reading.loss_NS.mean()) == pytest.approx(full, abs=1e-6)
    for layer, block in enumerate(model.living_blocks):
        for expert in range(len(block.population.members)):
            with WithoutOne(block, expert):
                without = mean_loss(model, ids_NS)
            found = float(deltas[layer][expert].sum()) / reading.loss_NS.numel()
            assert found == pytest.approx(without - full, abs=2e-6), (layer, expert)
        with WithoutOne(block, -1):  # an oracle that leaves nobody out is the model
            assert mean_loss(model, ids_NS) == pytest.approx(full, abs=1e-6)
    assert max(float(delta.abs().max()) for delta in deltas) > 0.05, "nobody mattered, so nothing was tested"


def test_who_served_nobody_contributes_exactly_nothing() -> None:
    model = lived()
    reading = read(model, token_ids(2, 6))
    deltas = leave_one_out(model, reading)
    idle = 0
    for delta_EN, index_NSK in zip(deltas, reading.index, strict=True):
        for expert, delta_N in enumerate(delta_EN):
            served_N = (index_NSK == expert).any(-1).any(-1)
            assert not delta_N[~served_N].any()
            idle += int((~served_N).sum())
    assert idle


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("implementation", ["eager", "active"])
def test_the_estimate_is_the_change_for_a_gate_that_closes_a_little(
    family: str, preset: str, implementation: str
) -> None:
    """A central difference; where so small a change alters a choice of a later layer, there is no derivative."""
    model = lived(family, preset).double()
    model.set_experts_implementation(implementation)
    ids_NS = mixed_text(2, 10)
    reading = read(model, ids_NS, batch_size=1)
    little, compared = 1e-3, 0
    for layer, block in enumerate(model.living_blocks):
        for expert in range(len(block.population.members)):
            beside = []
            for gate in (1 - little, 1 + little):

                def closed(index_TK: Tensor, weights_TK: Tensor, gate: float = gate, expert: int = expert) -> Tensor:
                    return torch.where(index_TK == expert, gate * weights_TK, weights_TK)

                with pool_hook(block, closed):
                    beside.append(read(model, ids_NS))
            if all(torch.equal(a, b) for one in beside for a, b in zip(one.index, reading.index, strict=True)):
                difference = float((beside[0].loss_NS - beside[1].loss_NS).mean()) / (2 * little)
                # Families take norms in fp32, which limits the difference, not the derivative.
                assert float(reading.first_order[layer][expert]) == pytest.approx(difference, rel=0.01, abs=2e-4)
                compared += 1
    assert compared > 0.7 * sum(model.expert_counts)
    assert max(float(estimate.abs().max()) for estimate in reading.first_order) > 5e-3


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_every_implementation_gives_the_same_estimate(preset: str) -> None:
    model, ids_NS = lived("mixtral", preset), mixed_text(3, 10)
    model.set_experts_implementation("eager")
    expected = torch.cat(read(model, ids_NS).first_order)
    for implementation in ("grouped_mm", "batched_mm", "active"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(torch.cat(read(model, ids_NS).first_order), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft", "some", "microexperts"])
def test_measuring_leaves_no_trace(preset: str) -> None:
    model = busy_model(preset).train()
    model.config.plasticity.inference = preset == "some"
    model.set_experts_implementation("active")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for block in model.living_blocks:
        for slot in block.slot_parameters():
            if slot.role != "key":
                block.experts.weights(slot.slab).direct_grad = True
    before, random = life(model), torch.get_rng_state()
    searches = [block.router.search for block in model.living_blocks]
    evidence = [block.plasticity and list(block.plasticity.evidence) for block in model.living_blocks]
    measure(model, mixed_text(4, 12))
    assert_same_life(life(model), before)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(block.vitals.pending is None for block in model.living_blocks)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [block.router.search for block in model.living_blocks] == searches
    assert [block.plasticity and list(block.plasticity.evidence) for block in model.living_blocks] == evidence
    for block in model.living_blocks:
        assert not block.experts._forward_pre_hooks
    for layer in model.model.backbone.layers:
        assert "forward" not in layer.__dict__ and not layer._forward_pre_hooks


def test_a_search_neither_decides_what_is_measured_nor_remembers_it() -> None:
    model = living_model("mixtral", sections={"router": {"search": "two_stage"}}, num_local_experts=24)
    prime_searches(model)
    searched = model.living_blocks[0].router.search
    assert searched is not None
    calls = searched.calls
    found = measure(model, mixed_text(2, 12))
    assert searched.calls == calls and model.living_blocks[0].router.search is searched
    exact = living_model("mixtral", sections={"router": {"search": "exact"}}, num_local_experts=24)
    assert [row.contribution for row in found.rows] == [
        row.contribution for row in measure(exact, mixed_text(2, 12)).rows
    ]


def test_rows_say_what_experts_are_and_cost() -> None:
    model = living_model("mixtral", sections={"experts": {"ternary_tiers": [1]}})
    model.merge_experts(0, model.expert_uids(0)[:2], tier_up=True)
    drift(model, 3, frozen=True)
    ids_NS = mixed_text(4, 12)
    found = measure(model, ids_NS)
    assert [(row.layer, row.uid) for row in found.rows] == [
        (layer, uid) for layer in range(2) for uid in model.expert_uids(layer)
    ]
    (wide,) = (row for row in found.rows if row.width == 64)
    assert wide.ternary and not any(row.ternary for row in found.rows if row is not wide)
    for row in found.rows:
        used = [row.uid == uid for uid in model.expert_uids(row.layer)].index(True)
        assert row.tokens == int((found.reading.index[row.layer] == used).sum())
        assert row.contribution is not None and row.per_mib is not None
        assert row.per_mib * (3 * 32 * row.width * 4 / 2**20) == pytest.approx(row.contribution)
        if row.tokens:
            spent = row.tokens * 32 * row.width * (3 if row.ternary else 6) / 1e9
            assert row.per_gflop == pytest.approx(row.contribution * found.tokens / spent)
    for layer in range(2):
        mine = [row for row in found.rows if row.layer == layer]
        assert np.mean([row.load for row in mine]) == pytest.approx(1.0)
        assert sum(row.tokens for row in mine) == ids_NS.numel() * 2
    best = found.leaderboard()
    assert [row.worth for row in best] == sorted((row.worth for row in found.rows), reverse=True)
    assert found.leaderboard(3) == best[:3]


def test_without_leaving_out_sensitivity_ranks() -> None:
    found = measure(lived(), mixed_text(2, 12), leave_out=False)
    assert found.agreement == [] and all(row.contribution is None and row.per_mib is None for row in found.rows)
    assert found.leaderboard(1)[0].sensitivity == max(row.sensitivity for row in found.rows)


def test_sensitivity_is_the_estimate_without_its_signs() -> None:
    found = measure(lived(), token_ids(3, 8), leave_out=False)
    assert all(row.sensitivity >= abs(row.first_order) for row in found.rows)
    assert any(row.sensitivity > 1.5 * abs(row.first_order) for row in found.rows)
    once = [row for row in found.rows if row.tokens == 1]
    assert once and all(row.sensitivity == pytest.approx(abs(row.first_order)) for row in once)


def test_an_error_is_that_of_independent_blocks() -> None:
    model = lived()
    ids_NS = mixed_text(5, 12)
    found = measure(model, ids_NS)
    reading = read(model, ids_NS)
    delta_EN = leave_one_out(model, reading)[0]
    per_block_N = delta_EN[0] / reading.loss_NS.shape[1]
    assert found.rows[0].error == pytest.approx(float(per_block_N.std()) / math.sqrt(5), rel=1e-3)
    assert measure(model, ids_NS[:1]).rows[0].error is None


def test_specialisation_averages_to_the_mutual_information() -> None:
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    index_NSK = torch.randint(-1, 5, (4, 20, 2), generator=generator)
    class_NS = torch.randint(0, 4, (4, 20), generator=generator)
    index_NSK[0] = class_NS[0].unsqueeze(-1)  # something to find
    counts_EC = class_counts(index_NSK, class_NS.numpy(), 6, 4)
    divergence_E, entropy_E = specialisation(counts_EC)
    used = (index_NSK >= 0).numpy()
    classes = np.broadcast_to(class_NS.numpy()[..., None], used.shape)[used]
    expected = routing_mutual_information(index_NSK.numpy()[used], classes, normalised=False)
    weights_E = counts_EC.sum(1) / counts_EC.sum()
    assert float(weights_E @ divergence_E) == pytest.approx(expected)
    assert divergence_E[5] == entropy_E[5] == 0.0  # who reads nothing


def test_who_reads_one_class_has_no_entropy_and_who_reads_as_all_do_is_no_specialist() -> None:
    divergence_E, entropy_E = specialisation(np.array([[8.0, 0.0], [4.0, 4.0], [0.0, 0.0]]))
    assert entropy_E == pytest.approx([0.0, math.log(2), 0.0])
    assert divergence_E[0] == pytest.approx(math.log(16 / 12)) and divergence_E[0] > divergence_E[1] > 0
    assert specialisation(np.array([[3.0, 5.0]]))[0] == pytest.approx([0.0])


def test_rank_correlations_follow_order_alone() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert spearman([1, 2], [1, 2]) is None and spearman([1, 1, 1], [1, 2, 3]) is None


SOME_ROW = ExpertRow(
    layer=0, uid=0, frozen=False, width=16, ternary=False, field=0, age=0, tokens=1, load=1.0, weight=0.5,
    contribution=0.1, error=None, first_order=0.1, sensitivity=0.1, per_gflop=None, per_mib=None,
    specialisation=0.0, entropy=0.0, reads=None,
)  # fmt: skip


def test_agreement_is_told_by_layer_and_overall() -> None:
    def row(layer: int, uid: int, contribution: float, first_order: float, load: float) -> ExpertRow:
        told = {"contribution": contribution, "first_order": first_order, "load": load, "sensitivity": load}
        return dataclasses.replace(SOME_ROW, layer=layer, uid=uid, **told)

    rows = [row(0, uid, uid, uid**3, 10 - uid) for uid in range(4)] + [row(1, 0, 9.0, -1.0, 5)]
    found = agreement(rows)
    assert [(one.layer, one.experts) for one in found] == [(0, 4), (1, 1), (None, 5)]
    assert found[0].first_order == pytest.approx(1.0) and found[0].load == pytest.approx(-1.0)
    assert found[0].sensitivity == pytest.approx(-1.0) and found[1].first_order is None
    assert found[2].first_order == pytest.approx(0.0)


def test_a_sample_is_spread_over_the_text_and_a_text_without_a_token_to_score_is_refused() -> None:
    text = torch.arange(40).view(10, 4)
    assert torch.equal(sample_blocks(text, 3), text[[0, 3, 6]])
    assert torch.equal(sample_blocks(text, 0), text) and torch.equal(sample_blocks(text, 99), text)
    for empty in (text[:0], text[:, :1]):
        with pytest.raises(TrainingError, match="no token to score"):
            sample_blocks(empty, 3)
