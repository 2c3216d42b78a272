"""With the lifecycle off a graft trains as its source does: the losses of both runs are equal, step for step."""

from typing import Any

import pytest
import torch
from factories import FAMILIES, living_model, mixed_text, source_model
from torch.optim import AdamW
from transformers import PreTrainedModel

from living_moe import LivingMoeForCausalLM

STEPS = 6
OFF = {"lifecycle": {"enabled": False, "interval": 1, "warmup_steps": 0}}


def losses(model: PreTrainedModel, **inputs: Any) -> list[float]:
    """Of a run over padded batches, with gradient accumulation over two."""
    model.train()
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    torch.manual_seed(3)
    found = []
    for step in range(STEPS):
        for half in range(2):
            ids = mixed_text(4, 10, seed=2 * step + half)
            mask = torch.ones_like(ids)
            mask[half, :3] = 0
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, **inputs).loss
            (loss / 2).backward()
            found.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if isinstance(model, LivingMoeForCausalLM):
            assert model.lifecycle_step(optimizer) == []
        optimizer.zero_grad()
    return found


def largest_gap(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{family: (family, {}, {}) for family in FAMILIES},
    "mixtral, auxiliary loss": ("mixtral", dict(router_aux_loss_coef=0.1), dict(output_router_logits=True)),
    "qwen, auxiliary loss": ("qwen3_moe", dict(router_aux_loss_coef=0.1), dict(output_router_logits=True)),
    "mixtral, auxiliary loss by config": ("mixtral", dict(router_aux_loss_coef=0.1, output_router_logits=True), {}),
    "mixtral, jitter and dropout": ("mixtral", dict(router_jitter_noise=0.1, attention_dropout=0.1), {}),
    "qwen, not renormalised": ("qwen3_moe", dict(norm_topk_prob=False), {}),
    "qwen, tied embeddings": ("qwen3_moe", dict(tie_word_embeddings=True), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_the_sources_step_for_step(case: str) -> None:
    family, overrides, inputs = CASES[case]
    ours = losses(living_model(family, "grow", sections=OFF, **overrides), **inputs)
    theirs = losses(source_model(family, **overrides), **inputs)
    assert largest_gap(ours, theirs) <= 1e-6
    assert len(set(theirs)) == 2 * STEPS and min(theirs) > 0


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_so_they_do_under_gradient_checkpointing(family: str, reentrant: bool, auxiliary: bool) -> None:
    if auxiliary and (reentrant or family == "deepseek_v3"):
        pytest.skip("the source has no such loss, or no gradient of it")
    inputs = dict(output_router_logits=True) if auxiliary else {}
    overrides = dict(router_aux_loss_coef=0.1) if auxiliary else {}
    runs = []
    for model in (living_model(family, "grow", sections=OFF, **overrides), source_model(family, **overrides)):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        runs.append(losses(model, **inputs))
    runs.append(losses(source_model(family, **overrides), **inputs))
    ours, theirs, plain = runs
    assert largest_gap(ours, theirs) <= 1e-6
    assert largest_gap(ours, plain) <= 1e-5


def test_with_the_lifecycle_on_and_eager_the_run_differs() -> None:
    eager = dict(
        interval=1, warmup_steps=0, min_age_steps=0, cooldown_steps=0, patience=1, split_load=1.2, noise_std=0.5
    )
    model = living_model("mixtral", "grow", sections={"lifecycle": eager}).train()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    model(mixed_text(4, 10)).logits.sum().backward()
    optimizer.step()
    assert model.lifecycle_step(optimizer)
