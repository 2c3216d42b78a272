"""The block in its model: what it is told of a pass, under caches, checkpointing, embeddings and noise."""

import copy
import functools

import pytest
import torch
from factories import HIDDEN, drift, live, living_model, logits, mixed_text, relative_difference, source_model
from torch import Tensor
from transformers import DynamicCache

from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.block import ForwardContext, in_backward
from living_moe.modeling_living_moe.receptive_field import FieldGate

IDS = mixed_text(3, 12)


@functools.cache
def lived(family: str, preset: str) -> LivingMoeForCausalLM:
    model = living_model(family, preset)
    for layer in range(2):
        for uid in model.expert_uids(layer):
            model.split_expert(layer, uid)
    drift(model, 0)
    live(model, 10, seed=1)
    drift(model, 1)
    return model


def gradients(model: LivingMoeForCausalLM, **inputs: object) -> dict[str, Tensor]:
    model = copy.deepcopy(model).train()
    model(IDS, labels=IDS, **inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_gradients_under_checkpointing_equal_those_without(family: str, preset: str, reentrant: bool) -> None:
    model = lived(family, preset)
    inputs = {} if reentrant or family == "deepseek_v3" else dict(output_router_logits=True)
    plain = gradients(model, **inputs)
    checkpointed = copy.deepcopy(model)
    if preset == "frozen-graft":
        checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(checkpointed, **inputs)
    assert found.keys() == plain.keys() and len(plain) > 8
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_pass_in_steps_with_a_cache_equals_the_pass_at_once(family: str, preset: str) -> None:
    model = lived(family, preset)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    cache = DynamicCache(config=model.config)
    steps = []
    for start, end in [(0, 5), *((t, t + 1) for t in range(5, 9)), (9, 12)]:
        steps.append(logits(model, IDS[:, start:end], attention_mask=mask[:, :end], past_key_values=cache))
    at_once = logits(model, IDS, attention_mask=mask)
    real = mask.bool()
    assert relative_difference(torch.cat(steps, dim=1)[real], at_once[real]) <= 1e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_what_is_left_of_the_batch_does_not_change_a_row(family: str) -> None:
    model = lived(family, "frozen-graft")
    assert relative_difference(logits(model, IDS[1:2]), logits(model, IDS)[1:2]) <= 1e-5


def test_shared_experts_see_every_token_once() -> None:
    model = living_model("deepseek_v3")
    block = model.living_blocks[0]
    hidden = torch.randn(2, 5, HIDDEN)
    shared, block.shared_experts = block.shared_experts, None
    routed = block(hidden)
    block.shared_experts = shared
    torch.testing.assert_close(block(hidden), routed + shared(hidden))


def test_jitter_draws_the_noise_the_source_draws() -> None:
    source, model = (make("mixtral", router_jitter_noise=0.2).train() for make in (source_model, living_model))
    outputs = []
    for each in (source, model):
        torch.manual_seed(4)
        outputs.append(each(IDS).logits)
    assert torch.equal(*outputs)
    assert not torch.equal(model(IDS).logits, outputs[1]), "another draw, another output"


def test_tokens_given_as_embeddings_are_computed_alike_and_carry_no_evidence() -> None:
    grow = lived("mixtral", "grow")
    embedded = grow.get_input_embeddings()(IDS)
    assert torch.equal(logits(grow, None, inputs_embeds=embedded), logits(grow, IDS))
    fields = lived("mixtral", "frozen-graft")
    old = mixed_text(2, 6)[:, :3]
    assert torch.equal(logits(fields, None, inputs_embeds=fields.get_input_embeddings()(old)), logits(fields, old))


def test_a_block_alone_routes_every_token_in_the_root_field() -> None:
    block = copy.deepcopy(lived("mixtral", "frozen-graft").living_blocks[0])
    hidden = torch.randn(1, 6, HIDDEN)
    block.context = None
    alone = block(hidden)
    block.context = ForwardContext(FieldGate(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, 1)))
    assert torch.equal(block(hidden), alone)
    block.context = ForwardContext(FieldGate(torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 6, 1)))
    assert not torch.equal(block(hidden), alone)


def test_a_context_moves_as_one_and_keeps_its_choices() -> None:
    gate = FieldGate(torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 6, 1))
    context = ForwardContext(gate, torch.ones(1, 6, dtype=torch.bool), observe=True, keep_choices=True)
    moved = context.to("meta")
    assert moved.gate.index.is_meta and moved.token_mask.is_meta and moved.observe and moved.keep_choices
    assert moved.choices is context.choices


def test_recomputation_is_told_from_the_pass_itself() -> None:
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            seen.append(in_backward())
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            seen.append(in_backward())
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(Spy.apply, x, use_reentrant=True).sum().backward()
    assert seen == [False, True, True]


def test_slot_parameters_are_listed_layer_by_layer_in_slot_order() -> None:
    model = living_model("mixtral")
    model.freeze_expert(0, 2)
    assert [(slot.layer, slot.slab, slot.role) for slot in model.slot_parameters()] == [
        (layer, slab, role)
        for layer, slabs in ((0, ("frozen", "trainable")), (1, ("trainable",)))
        for slab in slabs
        for role in ("gate_up_proj", "down_proj", "key")
    ]
    assert model.living_blocks[0].capacities() == {"frozen": 1, "trainable": 8}


def test_embeddings_can_be_resized_before_and_after_events() -> None:
    model = copy.deepcopy(lived("mixtral", "frozen-graft"))
    before, gate = logits(model, IDS), model.model.fields(IDS)
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 80
    after = logits(model, IDS)
    assert after.shape[-1] == 80
    # Unseen tokens share a smoothing mass: in so small a vocabulary the evidence changes, and the field of some tokens.
    same = (model.model.fields(IDS).index == gate.index).long().cumprod(dim=1).bool()
    assert same.float().mean() > 0.3
    torch.testing.assert_close(after[same][..., :67], before[same], rtol=1e-5, atol=1e-5)
    model.split_expert(0, model.expert_uids(0)[0])
    assert logits(model, torch.full((1, 4), 79)).isfinite().all()
