"""A graft computes what its source computes, bit for bit: max |Δlogits| is 0 in fp32, not merely small."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import FAMILIES, living_model, logits, mixed_text, save_source, source_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import living_moe

CALIBRATION = mixed_text(20, 20, seed=9)


@functools.cache
def cached_source(family: str, attention: str, experts: str) -> PreTrainedModel:
    return source_model(family, attention=attention, experts=experts)


def in_steps(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of a prefill of 6 tokens, three steps of one token and a chunk, all with a KV cache."""
    cache = DynamicCache(config=model.config)
    parts = []
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 9), (9, ids.shape[1])]:
        seen = None if mask is None else mask[:, :end]
        parts.append(logits(model, ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_sources(family: str, attention: str, experts: str, preset: str) -> None:
    source = cached_source(family, attention, experts)
    model = living_moe.convert(
        source, preset=preset, verify=False, calibration=CALIBRATION if preset != "grow" else None
    )
    ids = mixed_text(3, 12)
    padded = torch.ones_like(ids)
    padded[1, :4], padded[2, :1] = 0, 0
    for mask in (None, padded):
        real = torch.ones_like(ids) if mask is None else mask
        for run in (in_steps, lambda m, i, a: logits(m, i, attention_mask=a)):
            ours, theirs = run(model, ids, mask)[real.bool()], run(source, ids, mask)[real.bool()]
            assert theirs.isfinite().all() and float(theirs.std()) > 0.1
            assert float((ours - theirs).abs().max()) == 0.0
    used = {block.experts.config._experts_implementation for block in model.living_blocks}
    assert used == {experts} and model.config._attn_implementation == attention


MIXES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek with two dense layers": ("deepseek_v3", dict(num_hidden_layers=4, first_k_dense_replace=2)),
    "deepseek without query compression": ("deepseek_v3", dict(q_lora_rank=None)),
    "deepseek without groups": ("deepseek_v3", dict(n_group=1, topk_group=1)),
    "deepseek choosing 2 of 4 groups": ("deepseek_v3", dict(n_group=4, topk_group=2, num_experts_per_tok=3)),
    "deepseek without renormalised weights": ("deepseek_v3", dict(norm_topk_prob=False)),
    "deepseek with two shared experts": ("deepseek_v3", dict(n_shared_experts=2)),
    "qwen with dense layers by number": ("qwen3_moe", dict(num_hidden_layers=3, mlp_only_layers=[1])),
    "qwen with experts in every other layer": ("qwen3_moe", dict(num_hidden_layers=4, decoder_sparse_step=2)),
    "qwen without renormalised weights": ("qwen3_moe", dict(norm_topk_prob=False)),
    "qwen with tied embeddings": ("qwen3_moe", dict(tie_word_embeddings=True)),
    "mixtral with tied embeddings": ("mixtral", dict(tie_word_embeddings=True)),
    "mixtral with a sliding window": ("mixtral", dict(sliding_window=4)),
    "mixtral with one expert per token": ("mixtral", dict(num_experts_per_tok=1)),
    "mixtral with every expert per token": ("mixtral", dict(num_experts_per_tok=8)),
}


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("name", MIXES)
def test_every_layout_of_a_family_is_grafted_exactly(name: str, preset: str) -> None:
    family, overrides = MIXES[name]
    source = source_model(family, **overrides)
    model = living_model(family, preset, **overrides)
    ids = mixed_text(2, 12)
    for run in (in_steps, lambda m, i, a: logits(m, i)):
        assert float((run(model, ids, None) - run(source, ids, None)).abs().max()) == 0.0


def test_only_the_moe_layers_live() -> None:
    assert len(living_model("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=2).expert_counts) == 2
    assert len(living_model("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2).expert_counts) == 2
    assert len(living_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1]).expert_counts) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_precisions_are_grafted_exactly_too(family: str, dtype: torch.dtype) -> None:
    source = source_model(family, experts="eager").to(dtype)
    model = living_moe.convert(source, preset="grow", verify=False)
    ids = mixed_text(2, 12)
    assert model.dtype == dtype
    assert torch.equal(logits(model, ids), logits(source, ids))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_on_disk_is_grafted_exactly(family: str, sharded: bool, tmp_path: Path) -> None:
    source = source_model(family)
    save_source(source, tmp_path / "source", max_shard_size="30KB" if sharded else "5GB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > (1 if sharded else 0)
    model = living_moe.convert(tmp_path / "source", tmp_path / "living", preset="grow")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "living")
    ids = mixed_text(2, 12)
    expected = logits(source, ids)
    assert model.graft_verification.max_difference == 0.0
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(reloaded, ids), expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_logits_and_the_balancing_loss_equal_the_sources(family: str) -> None:
    source, model = source_model(family), living_model(family)
    ids = mixed_text(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = dict(input_ids=ids, labels=ids, attention_mask=mask, output_router_logits=True)
    with torch.no_grad():
        ours, theirs = model(**inputs), source(**inputs)
    assert len(ours.router_logits) == len(theirs.router_logits) == 2
    for mine, his in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert torch.equal(mine, his)
    assert torch.equal(ours.aux_loss, theirs.aux_loss) and torch.equal(ours.loss, theirs.loss)


def test_deepseek_router_logits_come_from_every_living_layer() -> None:
    source, model = source_model("deepseek_v3"), living_model("deepseek_v3")
    ids = mixed_text(2, 10)
    caught: list[Tensor] = []
    for layer in source.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    logits(source, ids)
    with torch.no_grad():
        output = model(ids, output_router_logits=True)
    assert len(output.router_logits) == 2 and output.aux_loss is None
    for ours, theirs in zip(output.router_logits, caught, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_in_memory_stays_as_it_was(family: str, preset: str) -> None:
    source = source_model(family, tie_word_embeddings=True)
    before = copy.deepcopy(source.state_dict())
    config = source.config.to_dict()
    flags = {name: parameter.requires_grad for name, parameter in source.named_parameters()}
    model = living_moe.convert(source, preset=preset)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    model.config.backbone_config.vocab_size = 3
    after = source.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert source.config.to_dict() == config and not source.training
    assert {name: parameter.requires_grad for name, parameter in source.named_parameters()} == flags


def test_a_source_in_training_mode_stays_in_it() -> None:
    source = source_model("mixtral").train()
    model = living_moe.convert(source)
    assert source.training and not model.training


def test_hidden_states_and_attentions_equal_the_sources() -> None:
    source, model = source_model("mixtral", attention="eager"), living_model("mixtral", attention="eager")
    ids = mixed_text(2, 9)
    with torch.no_grad():
        ours = model(ids, output_hidden_states=True, output_attentions=True)
        theirs = source(ids, output_hidden_states=True, output_attentions=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for name in ("hidden_states", "attentions"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))


def test_greedy_sampled_and_beam_generation_equal_the_sources() -> None:
    source, model = source_model("mixtral"), living_model("mixtral", "frozen-graft")
    ids = mixed_text(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for options in (dict(do_sample=False), dict(do_sample=True, top_k=20), dict(num_beams=3, do_sample=False)):
        outputs = []
        for generator in (source, model):
            torch.manual_seed(5)
            outputs.append(generator.generate(ids, attention_mask=mask, max_new_tokens=6, **options))
        assert torch.equal(*outputs), options
