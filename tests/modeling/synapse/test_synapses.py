"""What holds of synapses wherever they are: nothing when off, learning when on, the same after events and files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from factories import drift, living_model, logits, relative_difference, source_model, token_ids
from synaptic_models import BUILD, shared
from torch import Tensor
from transformers import AutoModelForCausalLM

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError, ConversionError
from living_moe.configuration.sections import SynapseConfig
from living_moe.training.optimizers import LivingAdamW

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")
#: Parameters of one layer: strength, expression, scalars.
TENSORS = {"router": 3, "attention": 3, "both": 6}


@pytest.fixture(params=sorted(BUILD))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def trained(model: LivingMoeForCausalLM, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a training pass and its gradients by name."""
    loss = model.train()(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- off is off --------------------------------------------------------------------------------------------------------


def test_without_synapses_there_is_nothing_of_them() -> None:
    model = living_model("mixtral")
    assert not [name for name in model.state_dict() if "synapse" in name]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_at_strength_zero_logits_are_bitwise_those_without(kind: str, family: str, padded: bool) -> None:
    plain, model = living_model(family), BUILD[kind](family, strength=0.0)
    ids = token_ids(3, 30)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
    for reads in (torch.no_grad(), torch.enable_grad()):
        with reads:
            found, expected = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (model, plain))
        assert torch.equal(found, expected)
    assert not torch.equal(logits(BUILD[kind](family), ids), logits(plain, ids))


def test_at_strength_zero_logits_are_bitwise_those_without_in_bf16(kind: str) -> None:
    plain, model = living_model("mixtral").to(torch.bfloat16), BUILD[kind](strength=0.0).to(torch.bfloat16)
    ids = token_ids(2, 30)
    assert torch.equal(logits(model, ids), logits(plain, ids))


def test_strength_leaves_zero_by_its_own_gradient_and_the_rest_trains_as_without(kind: str) -> None:
    ids = token_ids(2, 40)
    loss, gradients = trained(BUILD[kind](strength=0.0), ids)
    expected_loss, expected = trained(living_model("mixtral"), ids)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients.pop(name), gradient, rtol=1e-3, atol=1e-6)
    strengths = [gradient for name, gradient in gradients.items() if "strength" in name]
    assert len(strengths) == 2 * TENSORS[kind] // 3
    assert all((gradient.abs() > 0).all() for gradient in strengths)


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["expectation", "stochastic"])
def test_gradient_checkpointing_recomputes_the_same_pass(kind: str, mode: str) -> None:
    ids, found = token_ids(2, 20), []
    for checkpointing in (False, True):
        model = BUILD[kind](mode=mode, stochastic_share=1.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(trained(model, ids))
    torch.testing.assert_close(*[loss for loss, _ in found])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_stochastic_release_is_drawn_in_training_only_and_anew_each_step(kind: str) -> None:
    model, ids = BUILD[kind](mode="stochastic", stochastic_share=1.0), token_ids(2, 20)
    expected = logits(shared(kind), ids)
    assert torch.equal(logits(model, ids), expected)
    model.train()
    first = logits(model, ids)
    assert torch.equal(logits(model, ids), first)
    assert not torch.equal(first, expected)
    optimizer = LivingAdamW(model, lr=0.0)
    _, gradients = trained(model, ids)
    expressions = [gradient for name, gradient in gradients.items() if ".synapse.expression" in name]
    assert expressions and all((gradient.abs().amax(dim=0) > 1e-9).all() for gradient in expressions)
    optimizer.step()
    model.lifecycle_step(optimizer)
    assert not torch.equal(logits(model, ids), first)


def test_an_optimizer_trains_synapses(kind: str) -> None:
    model = BUILD[kind](strength=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".synapse." in name}
    optimizer = LivingAdamW(model, lr=1e-2)
    trained(model, token_ids(2, 30))
    optimizer.step()
    assert len(before) == 2 * TENSORS[kind]
    assert all(not torch.equal(dict(model.named_parameters())[name], old) for name, old in before.items())


# -- events and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_exact_with_synapses_at_work(kind: str, family: str) -> None:
    model, ids = BUILD[kind](family), token_ids(3, 24)
    before = logits(model, ids)
    for _ in range(2):
        for layer in range(len(model.expert_counts)):
            for uid in model.expert_uids(layer):
                model.split_expert(layer, uid)
        assert relative_difference(logits(model, ids), before) <= 1e-6
    drift(model, 3, std=0.1)
    before = logits(model, ids)
    for layer in range(len(model.expert_counts)):
        for uid in model.expert_uids(layer)[::3]:
            model.split_expert(layer, uid)
    assert relative_difference(logits(model, ids), before) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_keep_synapses_of_a_population_with_a_past(kind: str, family: str, tmp_path: Path) -> None:
    model, ids = BUILD[kind](family), token_ids(2, 24)
    newborn = model.split_expert(0, 3).children[0]
    model.freeze_expert(len(model.expert_counts) - 1, 2)
    drift(model, 1, std=0.1)
    model.remove_expert(0, newborn)
    model.save_pretrained(tmp_path)
    loaded = LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == model.config._attn_implementation
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    other = BUILD[kind](family, strength=0.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))


def test_an_export_of_synapses_at_work_is_refused_and_of_idle_ones_exact(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"layer 0:? (its router )?has synapses"):
        living_moe.export(BUILD[kind](), tmp_path / "no")
    exported, ids = living_moe.export(BUILD[kind](strength=0.0), tmp_path / "yes"), token_ids(2, 12)
    assert torch.equal(logits(exported, ids), logits(living_model("mixtral"), ids))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "yes").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_synapses_of_a_graft_are_at_rest_and_of_the_sources_dtype(kind: str, family: str, dtype: torch.dtype) -> None:
    wanted = {name: kind in (name, "both") for name in ("router", "attention")}
    model = living_moe.convert(source_model(family).to(dtype), preset="grow", synapse=wanted)
    assert {name: getattr(model.config.synapse, name) for name in wanted} == wanted
    synapses = {name: p for name, p in model.named_parameters() if ".synapse." in name}
    assert {parameter.dtype for parameter in synapses.values()} == {dtype}
    assert not any(p.any() for name, p in synapses.items() if "strength" in name or "expression" in name)
    assert model.graft_verification.max_difference == 0.0


def test_offloaded_weights_are_brought_to_synapses(kind: str) -> None:
    model, ids = BUILD[kind](), token_ids(2, 20)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert torch.equal(logits(offloaded, ids), logits(model, ids))
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(offloaded.generate(ids, **options), model.generate(ids, **options))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        {"chunk": 0}, {"mode": "expectations"}, {"epsilon": 0.0}, {"stochastic_share": 0.0}, {"strength": 11.0},
        {"seed": -1}, {"chunks": 4}, {"attention_chunk": 0}, {"attention_top_k": 0}, {"attention_turn": 0.5},
        {"attention_barrier": -0.1}, {"attention_barrier_length": 0.0}, {"attention_chunks": 4},
    ],
)  # fmt: skip
def test_values_without_sense_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="synapse"):
        SynapseConfig(**section)


def test_offloaded_weights_learn_nothing_while_reading() -> None:
    model = living_model("mixtral", "grow", sections={"synapse": {"postsynaptic": True}})
    offloaded = cpu_offload(model, execution_device="cpu")
    logits(offloaded, token_ids(2, 12))
    with pytest.raises(ConfigurationError, match="offloaded"), offloaded.plastic(keys=False):
        pass


def test_continuous_batching_is_refused(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="continuous batching"):
        shared(kind).init_continuous_batching()
