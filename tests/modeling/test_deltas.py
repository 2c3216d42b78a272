"""Contract of field deltas: a token of the root field keeps the source's output bit for bit, a token of a newborn field
gets that field's update, the linear maps stay the source's own modules, and the birth of a field changes nothing. The
oracle is one token at a time.
"""

import copy
import pickle

import pytest
import torch
from factories import living_model, logits, mixed_text
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe import deltas
from living_moe.modeling_living_moe.deltas import FieldDelta, attach_deltas
from living_moe.modeling_living_moe.receptive_field import FieldGate

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
MLA_SIZES = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2))


def qwen3_moe() -> PreTrainedModel:
    sizes = dict(num_key_value_heads=1, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))


def deepseek_v3(**changes: int | None) -> PreTrainedModel:
    experts = dict(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16)
    sizes = {**SIZES, **MLA_SIZES, **experts, "num_key_value_heads": 2, "first_k_dense_replace": 1, **changes}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))


FAMILIES = {
    "mixtral": (mixtral, QKVO),
    "qwen3_moe": (qwen3_moe, QKVO),
    "deepseek_v3": (deepseek_v3, MLA),
    "deepseek_v3 without q_lora": (lambda: deepseek_v3(q_lora_rank=None), ["q_proj", *MLA[2:]]),
}


def attach(model: PreTrainedModel, names: list[str] = QKVO, rank: int = 3, num_fields: int = 1) -> PreTrainedModel:
    for layer in model.model.layers:
        attach_deltas(layer, names, rank, num_fields)
    return model


def waken(model: nn.Module) -> None:
    """Give every delta an effect."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, FieldDelta):
            for up in module.up:
                with torch.no_grad():
                    up.copy_(torch.randn(up.shape, generator=generator))


def open_gate(model: nn.Module, index: Tensor | None) -> None:
    gate = None if index is None else FieldGate(index, torch.zeros(*index.shape, 3))
    for module in model.modules():
        if hasattr(module, "gate_holder"):
            module.gate_holder.gate = gate


def slow_delta(delta: FieldDelta, x: Tensor, out: Tensor, index: Tensor) -> Tensor:
    rows = []
    for token, base, field in zip(x.flatten(0, -2), out.flatten(0, -2), index.flatten().tolist(), strict=True):
        rows.append(base if field == 0 else base + delta.up[field - 1] @ (delta.down[field - 1] @ token))
    return torch.stack(rows).reshape(out.shape)


def field_deltas(model: nn.Module) -> list[FieldDelta]:
    return [module for module in model.modules() if isinstance(module, FieldDelta)]


@given(
    leading=st.sampled_from([(5,), (2, 7), (1, 1), (2, 3, 2)]),
    rank=st.integers(1, 4),
    num_fields=st.integers(1, 3),
    fields=st.one_of(st.none(), st.sets(st.integers(1, 3))),
    seed=st.integers(0, 10_000),
)
def test_the_delta_equals_one_token_at_a_time_forward_and_backward(
    leading: tuple[int, ...], rank: int, num_fields: int, fields: set[int] | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = FieldDelta(4, 6, rank, num_fields).double()
    waken(delta)
    x, out, weight = (torch.randn(*leading, width, generator=generator).double() for width in (4, 6, 6))
    index = torch.randint(0, num_fields + 1, leading, generator=generator)
    present = None if fields is None else sorted(field for field in fields if field <= num_fields)
    # A token of a field that does not take part is one of the root.
    seen = index if present is None else torch.where(torch.isin(index, torch.tensor([0, *present])), index, 0)
    results = []
    for function in (lambda *args: delta(*args, index, present), lambda *args: slow_delta(delta, *args, seen)):
        leaves = [x.clone().requires_grad_(), out.clone().requires_grad_()]
        result = function(*leaves)
        inputs = [*leaves, *delta.down, *delta.up]
        grads = torch.autograd.grad((result * weight).sum(), inputs, allow_unused=True)
        zeros = [torch.zeros_like(each) for each in inputs]
        results.append([result, *(z if g is None else g for g, z in zip(grads, zeros, strict=True))])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


def test_a_token_of_the_root_field_keeps_its_output_bit_for_bit() -> None:
    delta = FieldDelta(4, 6, 2)
    waken(delta)
    x, out, index = torch.randn(3, 9, 4), torch.randn(3, 9, 6), torch.arange(27).reshape(3, 9) % 2
    result = delta(x, out, index)
    assert torch.equal(result[index == 0], out[index == 0])
    assert (result[index == 1] != out[index == 1]).all()


def test_a_newborn_delta_changes_nothing_and_learns_from_its_first_gradient() -> None:
    delta = FieldDelta(4, 6, 2)
    x, out = torch.randn(9, 4), torch.randn(9, 6)
    result = delta(x, out, torch.ones(9, dtype=torch.int64))
    assert torch.equal(result, out)
    (result * torch.randn(9, 6)).sum().backward()
    assert delta.up[0].grad is not None and delta.up[0].grad.abs().min() > 0
    assert FieldDelta(64, 6, 32).down[0].var().item() == pytest.approx(1 / 64, rel=0.2)


#: None, or the field of each of 2 x 6 tokens; which fields have some.
GATES = {
    "no gate": (None, set()),
    "all root": (torch.zeros(2, 6, dtype=torch.int64), set()),
    "one field": (torch.tensor([[0, 0, 2, 2, 2, 2]] * 2), {2}),
    "two fields": (torch.tensor([[3, 3, 0, 0, 1, 1]] * 2), {1, 3}),
}


def gradients_of(model: PreTrainedModel, index: Tensor | None) -> dict[int, list[Tensor | None]]:
    """Gradients of the deltas of each field, after a training pass."""
    open_gate(model, index)
    model.zero_grad()
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(4))
    model(input_ids=ids).logits.square().mean().backward()
    every = field_deltas(model)
    return {field: [maps[field - 1].grad for d in every for maps in (d.down, d.up)] for field in (1, 2, 3)}


@pytest.mark.parametrize("gate", GATES)
def test_in_one_process_a_field_without_tokens_gets_no_gradient(gate: str) -> None:
    model = attach(mixtral(), num_fields=3).train()
    waken(model)
    index, present = GATES[gate]
    for field, gradients in gradients_of(model, index).items():
        for gradient in gradients:
            assert (gradient is not None) == (field in present)
            assert gradient is None or gradient.any()


@pytest.mark.parametrize("gate", GATES)
def test_on_several_ranks_every_delta_gets_the_gradient_of_one_process_or_zero(
    gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(mixtral(), num_fields=3).train()
    waken(model)
    index, present = GATES[gate]
    alone = gradients_of(model, index)
    monkeypatch.setattr(deltas, "world_size", lambda: 2)
    for field, gradients in gradients_of(model, index).items():
        for gradient, expected in zip(gradients, alone[field], strict=True):
            assert gradient is not None
            if field in present:
                torch.testing.assert_close(gradient, expected)
            else:
                assert not gradient.any()


def test_in_evaluation_on_several_ranks_absent_fields_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "world_size", lambda: 2)
    monkeypatch.setattr(FieldDelta, "forward", lambda *_: pytest.fail("a closed delta was computed"))
    model = attach(mixtral()).eval()
    open_gate(model, torch.zeros(2, 6, dtype=torch.int64))
    model(input_ids=torch.randint(0, 32, (2, 6)))


# Births


@pytest.mark.parametrize("training", [False, True])
def test_the_birth_of_a_field_changes_no_output_and_no_gradient_bit_for_bit(training: bool) -> None:
    model = attach(mixtral(), num_fields=2).train(training)
    waken(model)
    ids = torch.randint(0, 32, (2, 6))
    index = torch.tensor([[0, 1, 1, 0, 2, 2], [2, 0, 0, 1, 1, 1]])

    def passed() -> list[Tensor]:
        model.zero_grad()
        out = model(input_ids=ids).logits
        out.square().mean().backward()
        return [out, *(p.grad for name, p in model.named_parameters() if p.grad is not None)]

    open_gate(model, index)
    before = passed()
    for seed, delta in enumerate(field_deltas(model)):
        delta.append(*delta.new_field(seed))
    assert {delta.num_fields for delta in field_deltas(model)} == {3}
    for one, other in zip(passed(), before, strict=True):
        assert torch.equal(one, other)
    # Where the newborn field is open it says what the root says, and learns.
    open_gate(model, None)
    root = model(input_ids=ids).logits
    open_gate(model, torch.full_like(ids, 3))
    assert torch.equal(passed()[0], root)
    assert all(delta.up[2].grad is not None and delta.up[2].grad.any() for delta in field_deltas(model))


def test_the_birth_of_a_field_changes_no_logit_of_a_living_model_bit_for_bit() -> None:
    model = living_model("mixtral", "frozen-graft")
    waken(model)
    ids = mixed_text(2, 24)
    before, number = logits(model, ids), len(model.model.deltas())
    assert number == 4 * 2 + 1 and model.model.fields(ids).present == (1,)
    model.open_field()
    assert [delta.num_fields for delta in model.model.deltas()] == [2] * number
    assert model.model.fields.num_fields == 2
    assert torch.equal(logits(model, ids), before)


def test_a_new_field_is_the_same_on_every_call_with_a_seed_and_draws_from_nobody() -> None:
    delta = FieldDelta(64, 6, 8, num_fields=2).bfloat16()
    state = torch.get_rng_state()
    first, again, other = (delta.new_field(seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert not first[1].any()
    assert [tuple(each.shape) for each in first] == [(8, 64), (6, 8)]
    assert first[0].float().var().item() == pytest.approx(1 / 64, rel=0.2)
    assert delta.num_fields == 2 and not any(each is new for each in delta.parameters() for new in first)
    for trains in (True, False):
        delta.requires_grad_(trains)
        for each in delta.new_field(5):
            assert isinstance(each, nn.Parameter)
            assert each.dtype == torch.bfloat16 and each.requires_grad == trains


def test_fields_are_appended_and_dropped_and_the_others_stay_the_same_parameters() -> None:
    delta = FieldDelta(4, 6, 2, num_fields=2)
    waken(delta)
    old = [*delta.down, *delta.up]
    down, up = delta.new_field(1)
    delta.append(down, up)
    assert delta.num_fields == 3
    assert all(
        one is other for one, other in zip([*delta.down, *delta.up], [*old[:2], down, *old[2:], up], strict=True)
    )
    assert {name for name, _ in delta.named_parameters()} == {f"{m}.{f}" for m in ("down", "up") for f in range(3)}
    with torch.no_grad():
        up.normal_()
    x, out, index = torch.randn(8, 4), torch.randn(8, 6), torch.arange(8) % 4
    torch.testing.assert_close(delta(x, out, index), slow_delta(delta, x, out, index))
    delta.keep(1)
    assert delta.num_fields == 1 and list(delta.state_dict()) == ["down.0", "up.0"]
    assert delta.down[0] is old[0] and delta.up[0] is old[2]
    index = index % 2
    torch.testing.assert_close(delta(x, out, index), slow_delta(delta, x, out, index))
    restored = FieldDelta(4, 6, 2, num_fields=1)
    restored.load_state_dict(delta.state_dict())
    assert torch.equal(restored(x, out, index), delta(x, out, index))
    delta.reset_parameters()
    assert not delta.up[0].any()  # also after `keep` the lists know their initial values


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("size", [9, 4])
def test_a_resized_output_keeps_the_updates_of_the_outputs_that_stay(size: int, trains: bool) -> None:
    delta = FieldDelta(4, 6, 2, num_fields=2).requires_grad_(trains)
    waken(delta)
    x, index = torch.randn(9, 4), torch.arange(9) % 3
    before, kept = delta(x, torch.zeros(9, 6), index), min(size, 6)
    down = list(delta.down)
    delta.resize_output(size)
    after = delta(x, torch.zeros(9, size), index)
    assert torch.equal(after[:, :kept], before[:, :kept])
    assert not after[:, kept:].any()
    assert [tuple(up.shape) for up in delta.up] == [(size, 2)] * 2 and delta.out_features == size
    assert all(one is other for one, other in zip(delta.down, down, strict=True))
    assert all(isinstance(up, nn.Parameter) and up.requires_grad == trains for up in delta.up)
    assert tuple(delta.new_field(1)[1].shape) == (size, 2)
    ups = list(delta.up)
    delta.resize_output(size)
    assert all(one is other for one, other in zip(delta.up, ups, strict=True))


def test_resetting_leaves_alone_what_a_checkpoint_has_loaded() -> None:
    delta = FieldDelta(4, 6, 2, num_fields=2)
    waken(delta)
    before = [each.clone() for each in delta.parameters()]
    delta.down[0]._is_hf_initialized = delta.up[1]._is_hf_initialized = True  # as `from_pretrained` marks them
    delta.reset_parameters()
    same = [torch.equal(each, old) for each, old in zip(delta.parameters(), before, strict=True)]
    assert same == [True, False, False, True]
    assert not delta.up[0].any()


# In a model


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_it_is_the_source_bit_for_bit_without_any_arithmetic(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, names = FAMILIES[family]
    source = build().eval()
    living = attach(copy.deepcopy(source), names)
    waken(living)
    ids = torch.randint(0, 32, (2, 6))
    expected = source(input_ids=ids).logits
    monkeypatch.setattr(FieldDelta, "forward", lambda *_: pytest.fail("a closed delta was computed"))
    for index in (None, torch.zeros_like(ids)):
        open_gate(living, index)
        assert torch.equal(living(input_ids=ids).logits, expected)
    added = set(living.state_dict()) - set(source.state_dict())
    assert set(source.state_dict()) <= set(living.state_dict())
    assert len(added) == 2 * 2 * len(names) and all(".self_attn.field_deltas." in key for key in added)


@pytest.mark.parametrize("family", FAMILIES)
def test_open_it_is_the_source_with_the_updates_merged_into_its_weights(family: str) -> None:
    build, names = FAMILIES[family]
    living = attach(build().eval(), names, num_fields=2)
    waken(living)
    ids = torch.randint(0, 32, (2, 6))
    for field in (1, 2):
        merged = copy.deepcopy(living)
        open_gate(living, torch.full_like(ids, field))
        open_gate(merged, None)
        for layer in merged.model.layers:
            for name in names:
                delta = layer.self_attn.field_deltas[f"{name}_delta"]
                getattr(layer.self_attn, name).weight.data += (delta.up[field - 1] @ delta.down[field - 1]).data
        torch.testing.assert_close(living(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_tokens_before_the_first_open_one_keep_their_logits_bit_for_bit() -> None:
    model = attach(mixtral().eval())
    waken(model)
    ids = torch.randint(0, 32, (2, 8))
    open_gate(model, None)
    expected = model(input_ids=ids).logits
    index = torch.zeros_like(ids)
    index[:, 5:] = 1
    open_gate(model, index)
    logits = model(input_ids=ids).logits
    assert torch.equal(logits[:, :5], expected[:, :5])
    assert (logits[:, 5:] != expected[:, 5:]).any(-1).all()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_works_on_its_own(how: str) -> None:
    model = attach(mixtral().eval())
    waken(model)
    ids = torch.randint(0, 32, (2, 6))
    open_gate(model, torch.ones_like(ids))
    before = model(input_ids=ids).logits
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(input_ids=ids).logits, before)
    open_gate(twin, None)
    closed = twin(input_ids=ids).logits
    assert not torch.equal(closed, before)
    for module in twin.modules():
        if isinstance(module, FieldDelta):
            nn.init.zeros_(module.up[0])
    assert torch.equal(model(input_ids=ids).logits, before)
    open_gate(twin, torch.ones_like(ids))
    assert torch.equal(twin(input_ids=ids).logits, closed)


def test_checkpointed_layers_give_the_gradients_of_plain_ones() -> None:
    model = attach(mixtral()).train()
    waken(model)
    layer = model.model.layers[0].self_attn
    hidden, index = torch.randn(2, 6, 16), torch.tensor([[0, 0, 1, 1, 1, 0]] * 2)
    rotary = model.model.rotary_emb(hidden, torch.arange(6).unsqueeze(0))
    open_gate(model, index)
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        x = hidden.clone().requires_grad_()
        args = (x, rotary, None)
        out = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        out[0].square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_peft_wraps_the_linear_maps_afterwards_and_both_updates_act() -> None:
    model = attach(mixtral().eval())
    waken(model)
    ids = torch.randint(0, 32, (2, 6))
    open_gate(model, torch.ones_like(ids))
    expected = model(input_ids=ids).logits
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)).eval()
    assert torch.equal(wrapped(input_ids=ids).logits, expected)
    adapted = [name for name, module in wrapped.named_modules() if name.endswith(".lora_A")]
    assert len(adapted) == 4 and not any("field_deltas" in name for name in adapted)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    changed = wrapped(input_ids=ids).logits
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(wrapped.merge_and_unload()(input_ids=ids).logits, changed, rtol=1e-4, atol=1e-4)


def test_mixed_precision_keeps_the_dtype_of_the_map_and_the_bits_of_closed_tokens() -> None:
    delta, linear = FieldDelta(8, 8, 2), nn.Linear(8, 8)
    waken(delta)
    x, index = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x)
        mixed = delta(x, out, index)
    half = delta(x.bfloat16(), out, index)
    for result in (mixed, half, copy.deepcopy(delta).bfloat16()(x, out, index)):
        assert result.dtype == torch.bfloat16
        assert torch.equal(result[::2], out[::2])
        torch.testing.assert_close(result.float(), delta(x, linear(x), index), rtol=0.05, atol=0.1)


def test_deltas_follow_the_dtype_and_device_of_their_linear_maps() -> None:
    half = attach(mixtral().bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        model = attach(mixtral())
    assert all(p.is_meta for p in model.parameters())
    delta = model.model.layers[0].self_attn.field_deltas["q_proj_delta"]
    delta.to_empty(device="cpu").reset_parameters()
    assert torch.equal(delta.up[0], torch.zeros_like(delta.up[0]))
    assert delta.down[0].isfinite().all()


def test_a_map_that_is_not_there_is_refused_by_name_and_nothing_is_attached() -> None:
    layer = mixtral().model.layers[0]
    with pytest.raises(ConfigurationError, match=r"MixtralAttention.qq_proj .* q_proj, k_proj, v_proj, o_proj"):
        attach_deltas(layer, ["q_proj", "qq_proj"], 2, 1)
    assert not layer.self_attn.q_proj._forward_hooks and not hasattr(layer.self_attn, "field_deltas")
    attach_deltas(layer, ["q_proj"], 2, 1)
    with pytest.raises(ConfigurationError, match="already"):
        attach_deltas(layer, ["k_proj"], 2, 1)
