"""Evaluation: the plain loss, exactly, and no trace left on the model."""

import math

import pytest
import torch
import torch.nn.functional as F
from lives import assert_same_life, blocks, busy_model, life

from living_moe.training.evaluation import evaluate_blocks, perplexity_metric


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_loss_is_the_mean_over_all_scored_tokens(batch_size: int) -> None:
    model = busy_model("frozen-graft").eval()
    rows = blocks(7)
    with torch.no_grad():
        logits = model(rows).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    result = evaluate_blocks(model, rows, batch_size=batch_size)
    assert result.loss == pytest.approx(expected, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.tokens == 7 * 15


def test_auxiliary_losses_are_left_out() -> None:
    model = busy_model()
    plain = evaluate_blocks(model, blocks(4))
    model.config.output_router_logits = True
    model.config.router.z_loss_coef = 1.0
    assert evaluate_blocks(model, blocks(4)) == plain


def test_some_blocks_are_spread_over_the_text() -> None:
    model = busy_model()
    rows = blocks(10)
    some = evaluate_blocks(model, rows, max_blocks=3)
    assert some == evaluate_blocks(model, rows[[0, 3, 6]])
    assert evaluate_blocks(model, rows, max_blocks=99) == evaluate_blocks(model, rows)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_it_leaves_no_trace(preset: str) -> None:
    model = busy_model(preset).train()
    before, random = life(model), torch.get_rng_state()
    evaluate_blocks(model, blocks(4))
    assert_same_life(life(model), before)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(block.vitals.pending is None for block in model.living_blocks)


def test_the_metric_adds_up_partial_sums() -> None:
    metric = perplexity_metric()
    parts = metric.compute(predictions=[10.0, 4.0, 0.0], references=[4, 3, 0])
    assert parts == {"loss": 2.0, "perplexity": pytest.approx(math.exp(2.0))}
    assert metric.compute(predictions=[1e6], references=[1]) == {"loss": 1e6, "perplexity": math.inf}
    assert math.isnan(metric.compute(predictions=[math.nan], references=[1])["perplexity"])
