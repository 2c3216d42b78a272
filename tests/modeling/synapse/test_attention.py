"""Synaptic attention: nothing at strength 0, else the loops it abbreviates, in any backbone."""

from typing import Any

import pytest
import torch
from factories import VOCAB, living_model, logits, source_config, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from synaptic_models import CACHED, excite_attention, in_pieces
from synaptic_models import attention_model as synaptic
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.llama import LlamaConfig
from transformers.models.olmoe import OlmoeConfig
from transformers.models.persimmon import PersimmonConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig

from living_moe import LivingMoeConfig, LivingMoeForCausalLM, attach_attention_synapses
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import SynapseConfig
from living_moe.modeling_living_moe.synapse.attention import (
    AttentionCall,
    AttentionSynapse,
    attention_layers,
    plain_attention,
)
from living_moe.modeling_living_moe.synapse.edge_memory import RemembersEdges
from living_moe.modeling_living_moe.synapse.presynaptic import (
    VESICLES,
    advance,
    chunk_weights,
    release_probability,
    released_content,
    rest,
    sum_up,
)
from living_moe.modeling_living_moe.synapse.router import FIRST_RELEASE, GAIN_TIME

LIVING = ("mixtral", "qwen3_moe", "deepseek_v3")

_TINY = dict(
    vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    intermediate_size=24, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_MLA = dict(kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
FOREIGN: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_TINY),
    "gemma2": lambda: Gemma2Config(**_TINY, head_dim=8, sliding_window=8, attn_logit_softcapping=2.0),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{name: value for name, value in _TINY.items() if name != "num_key_value_heads"}, tie_word_embeddings=False
    ),
    "persimmon": lambda: PersimmonConfig(**{n: v for n, v in _TINY.items() if n != "num_key_value_heads"}),
    "olmoe": lambda: OlmoeConfig(**_TINY, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **{**_TINY, "num_key_value_heads": 4}, **_MLA, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, topk_method="greedy", moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1,
    ),
}  # fmt: skip


def foreign_model(name: str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FOREIGN[name](), attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def attached(name: str, strength: float, **options: Any) -> PreTrainedModel:
    model = foreign_model(name)
    section = SynapseConfig(attention=True, attention_chunk=4, attention_top_k=3, attention_turn=8.0, **options)
    attach_attention_synapses(model, section)
    excite_attention(model, strength)
    return model


SHARED = synaptic()


# -- off is off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_at_strength_zero_any_backbone_is_bitwise_as_before(name: str) -> None:
    ids = token_ids(3, 30)
    plain, model = foreign_model(name), attached(name, 0.0)
    # Soft caps are beyond sdpa.
    assert plain.config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert (logits(attached(name, 1.5), ids) - logits(plain, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_with_nothing_to_hear_any_backbone_is_as_before(name: str) -> None:
    """The synapses' own path, all keys at rest and no barrier: one chunk, in which nothing has been released yet."""
    ids = token_ids(3, 30)
    model = attached(name, 1.5, attention_barrier=0.0)
    for layer in attention_layers(model):
        layer.synapse.settings.attention_chunk = 64
    assert (logits(model, ids) - logits(foreign_model(name, "eager"), ids)).abs().max() <= CACHED


@pytest.mark.parametrize("family", LIVING)
def test_a_model_from_scratch_begins_with_medium_expression_and_the_strength_asked_for(family: str) -> None:
    synapse = {"attention": True, "strength": 0.25}
    config = LivingMoeConfig.from_backbone(source_config(family), preset="grow", synapse=synapse)
    model = LivingMoeForCausalLM(config)
    layers = attention_layers(model)
    assert len(layers) == config.num_hidden_layers
    for layer in layers:
        assert (layer.synapse.strength == 0.25).all() and len(layer.synapse.strength) == 4
        assert not layer.synapse.expression.any() and not layer.synapse.presynapse.scalars.any()
    assert logits(model.eval(), token_ids(2, 20)).isfinite().all()


def test_bf16_keeps_states_in_fp32_and_strength_zero_exact() -> None:
    ids = token_ids(2, 30)
    plain = living_model("mixtral").to(torch.bfloat16)
    assert torch.equal(logits(synaptic(strength=0.0).to(torch.bfloat16), ids), logits(plain, ids))
    model = synaptic().to(torch.bfloat16)
    cache = DynamicCache(config=model.config)
    found = logits(model, ids, past_key_values=cache, use_cache=True)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    edges = cache.layers[0].edges
    assert edges.keys.dtype == edges.state.dtype == torch.float32


def test_under_autocast_pools_stay_in_fp32() -> None:
    ids = token_ids(2, 30)
    cache = DynamicCache(config=SHARED.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(SHARED, ids, past_key_values=cache, use_cache=True)
    assert (found - logits(SHARED, ids)).abs().mean() < 0.1
    pools = cache.layers[0].edges.state[:, :, 1:, 3:]
    assert (pools.sum(-1) - VESICLES).abs().max() <= 1e-4


# -- the loops it abbreviates ------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """As much of an attention layer as its function asks for."""

    is_causal = True


def module(heads: int = 2, strength: float = 1.5, seed: int = 0, **options: Any) -> AttentionSynapse:
    synapse = AttentionSynapse(SynapseConfig(attention=True, **options), heads)
    generator = torch.Generator().manual_seed(seed)
    synapse.strength.data = strength + 0.3 * torch.randn(heads, generator=generator)
    synapse.expression.data.normal_(generator=generator)
    synapse.presynapse.scalars.data.normal_(0, 0.3, generator=generator)
    return synapse


def inputs(tokens: int, heads: int = 2, groups: int = 1, width: int = 4, seed: int = 0, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 10)
    sizes = ((heads, 2.0), (groups, 1.0), (groups, 1.0))
    return [
        (scale * torch.randn(batch, count, tokens, width, generator=generator)).requires_grad_()
        for count, scale in sizes
    ]


def looped(synapse: AttentionSynapse, query: Tensor, key: Tensor, value: Tensor, sees: Any) -> Tensor:
    """One row, query by query, key by key: (S, H, width). `sees(t, j)` says whether t may attend to j."""
    options, heads, tokens = synapse.settings, query.shape[1], query.shape[2]
    chunk, found = options.attention_chunk, []
    for head in range(heads):
        rates = synapse.presynapse.rates(synapse.expression[head : head + 1, :-1], options.attention_turn)
        septin, strength = torch.sigmoid(synapse.expression[head, -1]), synapse.strength[head]
        weights, resting = chunk_weights(rates, chunk), rest(rates)
        state = [type(resting)(*(part.unsqueeze(0) for part in resting)) for _ in range(tokens)]
        drives: list[list[Tensor]] = [[] for _ in range(tokens)]
        running, row = FIRST_RELEASE, []
        group = head * key.shape[1] // heads
        for t in range(tokens):
            content = [released_content(s, release_probability(s.calcium, rates), rates)[0, 0] for s in state]
            heard = {}
            for j in range(tokens):
                if sees(t, j):
                    release = torch.log(options.epsilon + content[j] / running)
                    barrier = options.attention_barrier * septin * (t - j)
                    barrier = barrier / (t - j + options.attention_barrier_length)
                    score = query[0, head, t] @ key[0, group, j] / query.shape[-1] ** 0.5
                    heard[j] = score + strength * (release - barrier)
            given = dict(zip(heard, torch.softmax(torch.stack(list(heard.values())), dim=0), strict=True))
            order = sorted(given, key=lambda j: -given[j].item())
            chosen, behind = order[: options.attention_top_k], order[options.attention_top_k :]
            least = given[behind[0]] if behind else torch.zeros(())
            for j in range(tokens):
                drives[j].append(given[j] - least if j in chosen else torch.zeros(()))
            row.append(sum(given[j] * value[0, group, j] for j in given))
            if len(drives[0]) == chunk:
                sums = [sum(drive.item() for drive in of_key) for of_key in drives]
                total = sum(sums)
                mean = sum(s * c.item() for s, c in zip(sums, content, strict=True)) / max(total, 1e-20)
                if total > 0:
                    running = running + (1 - torch.tensor(-chunk / GAIN_TIME).exp().item()) * (mean - running)
                for j in range(tokens):
                    drive = sum_up(torch.stack(drives[j]).view(1, chunk, 1), weights)
                    state[j] = advance(state[j], drive, weights, rates)[0]
                drives = [[] for _ in range(tokens)]
        found.append(torch.stack(row))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(("chunk", "window"), [(1, None), (3, None), (5, 6), (32, None)])
def test_the_fast_path_is_the_loops_forward_and_backward(chunk: int, window: int | None) -> None:
    tokens = 11
    synapse = module(attention_chunk=chunk, attention_top_k=2, attention_turn=6.0, attention_barrier_length=5.0)
    given, mask = inputs(tokens), None
    if window is not None:
        far = torch.arange(tokens)[:, None] - torch.arange(tokens)
        mask = ((far >= 0) & (far < window))[None, None]
    weight = torch.randn(tokens, 2, 4, generator=torch.Generator().manual_seed(3))
    learned = [*given, *synapse.parameters()]
    call = AttentionCall(Layer, *given, mask, 0.5)
    fast = synapse(call)[0]
    slow = looped(synapse, *given, lambda t, j: j <= t and (window is None or t - j < window))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad((out * weight).sum(), learned) for out in (fast, slow)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    without = plain_attention(call)[0]
    assert (fast - without).abs().max() > 0.05


def error_of_chunks(turn: float, chunk: int, skipped: int = 64) -> tuple[float, float]:
    """Root mean square of the error of outputs against step size 1, over that of what synapses add; and the latter.

    Random queries, the worst case, of two heads of 512 tokens, the first of which are left out: where there are few
    keys to choose from all of them are driven hard, and a first chunk hears nothing.
    """
    call = AttentionCall(Layer, *(t.detach() for t in inputs(512, groups=2, width=16)), None, 0.25)
    outputs = []
    with torch.no_grad():
        for length in (1, chunk):
            synapse = AttentionSynapse(
                SynapseConfig(attention=True, strength=1.0, attention_turn=turn, attention_chunk=length), 2
            )
            outputs.append(synapse(call)[:, skipped:])
        plain = plain_attention(call)[:, skipped:]
    size = (outputs[0] - plain).square().mean().sqrt()
    return float((outputs[1] - outputs[0]).square().mean().sqrt() / size), float(size)


def test_the_error_of_chunks_is_measured_and_bounded() -> None:
    errors = {chunk: error_of_chunks(128.0, chunk)[0] for chunk in (2, 8, 32)}
    assert errors[2] <= 0.2 and errors[8] <= 0.3 and errors[32] <= 0.5
    assert list(errors.values()) == sorted(errors.values())
    assert error_of_chunks(128.0, 32)[1] > 0.03
    assert error_of_chunks(512.0, 32)[0] < errors[32] < error_of_chunks(16.0, 32)[0]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_key_in_use_is_primed_and_then_tires() -> None:
    """All queries prefer the first key. Its odds against all others, and how they change by what it remembers."""
    tokens = 40
    query, key, value = torch.ones(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4)
    key[:, :, 0], value[:, :, 0] = 1.5, 1.0
    synapse = AttentionSynapse(SynapseConfig(attention=True, strength=2.0, attention_chunk=1, attention_barrier=0.0), 1)
    with torch.no_grad():
        call = AttentionCall(Layer, query, key, value, None, 0.5)
        share, plain = synapse(call)[0, :, 0, 0], plain_attention(call)[0, :, 0, 0]
    odds = torch.log(share[1:] / (1 - share[1:])) - torch.log(plain[1:] / (1 - plain[1:]))
    assert odds[0] > 1 and odds[2:].max() < -2


def test_the_barrier_weakens_what_is_far_by_its_distance_alone() -> None:
    synapse = AttentionSynapse(
        SynapseConfig(attention=True, strength=2.0, attention_chunk=64, attention_barrier_length=10.0), 1
    )
    found = []
    for tokens in (21, 41):
        query, key = torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4)
        with torch.no_grad():
            call = AttentionCall(Layer, query, key, torch.eye(tokens)[None, None], None, 0.5)
            found.append(synapse(call)[0, 20, 0, :21].log())
    torch.testing.assert_close(found[0], found[1])
    distance = torch.arange(20, -1, -1.0)
    expected = -2.0 * 0.7 * 0.5 * distance / (distance + 10.0)
    torch.testing.assert_close(found[0] - found[0][-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_pools_stay_finite_and_conserved(family: str) -> None:
    for strength, spread in ((-3.0, 8.0), (3.0, 8.0)):
        model = synaptic(family, strength, attention_chunk=7, overrides=dict(max_position_embeddings=1024))
        for layer in attention_layers(model):
            layer.synapse.expression.data *= spread
            layer.synapse.presynapse.scalars.data.normal_(0, spread)
        cache = DynamicCache(config=model.config)
        assert logits(model, token_ids(2, 700), past_key_values=cache, use_cache=True).isfinite().all()
        for layer in cache.layers:
            calcium, snare, energy = layer.edges.state[:, :, 1:, :3].unbind(-1)
            pools = layer.edges.state[:, :, 1:, 3:]
            assert (calcium >= 0).all() and calcium.isfinite().all()
            for part in (snare, energy, pools / VESICLES):
                assert (part >= 0).all() and (part <= 1 + 1e-5).all()
            assert (pools.sum(-1) - VESICLES).abs().max() <= 1e-4


# -- causality, length, padding ----------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(tokens=st.integers(2, 40), at=st.integers(0, 39), more=st.integers(0, 20), seed=st.integers(0, 100))
def test_no_token_hears_of_a_later_one_nor_of_how_many_follow(tokens: int, at: int, more: int, seed: int) -> None:
    at = min(at, tokens - 1)
    ids = token_ids(1, tokens, seed)
    whole = logits(SHARED, ids)
    changed = torch.cat([ids[:, :at], (ids[:, at:] + 7) % VOCAB, token_ids(1, more, seed + 1)], dim=1)
    assert (logits(SHARED, changed)[:, :at] - whole[:, :at]).abs().max().item() <= CACHED if at else True
    longer = torch.cat([ids, token_ids(1, more, seed + 1)], dim=1)
    assert (logits(SHARED, longer)[:, :tokens] - whole).abs().max() <= CACHED


def test_texts_packed_in_a_row_begin_at_rest() -> None:
    lengths = (11, 3, 14)
    ids = token_ids(2, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    packed = logits(SHARED, ids, position_ids=positions, use_cache=False).split(lengths, dim=1)
    for part, own in zip(packed, ids.split(lengths, dim=1), strict=True):
        assert (part - logits(SHARED, own)).abs().max() <= CACHED


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_any_backbone_reads_in_pieces_what_it_reads_at_once(name: str) -> None:
    model, ids = attached(name, 1.5), token_ids(2, 24)
    assert (in_pieces(model, ids, [9, *[1] * 6, 9]) - logits(model, ids)).abs().max() <= CACHED


def test_sliding_windows_leave_the_pools_of_their_keys_behind() -> None:
    model = synaptic(overrides=dict(sliding_window=6))
    ids = token_ids(2, 30)
    whole = logits(model, ids)
    assert (in_pieces(model, ids, [9, *[1] * 8, 13]) - whole).abs().max() <= CACHED
    assert (whole - logits(SHARED, ids)).abs().max() > 1e-2


def test_a_crop_within_a_chunk_keeps_the_state_and_one_behind_it_does_not() -> None:
    cache = DynamicCache(config=SHARED.config)
    logits(SHARED, token_ids(1, 11), past_key_values=cache, use_cache=True)
    assert isinstance(cache.layers[0], RemembersEdges) and cache.layers[0].edges.state is not None
    cache.crop(-2)
    assert cache.layers[0].edges.state is not None
    cache.crop(-2)
    assert cache.layers[0].edges.state is None


@pytest.mark.parametrize("name", ["llama", "persimmon"])
def test_texts_packed_in_a_row_have_pools_of_their_own(name: str) -> None:
    """Also where the backbone keeps position ids from attention. A mask keeps the texts apart for everything else."""
    model, lengths = attached(name, 1.5), (9, 11)
    ids, text = token_ids(1, 20), torch.tensor([0] * 9 + [1] * 11)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    mask = ((text[:, None] == text) & torch.ones(20, 20, dtype=torch.bool).tril())[None, None]
    packed = logits(model, ids, position_ids=positions, attention_mask=mask)
    alone = [logits(model, part) for part in ids.split(lengths, dim=1)]
    assert (packed - torch.cat(alone, dim=1)).abs().max() <= CACHED
    assert torch.equal(logits(model, ids), logits(attached(name, 1.5), ids))


def test_caches_by_another_name_are_found() -> None:
    model = attached("gpt_neox", 1.5)
    ids = token_ids(2, 20)
    assert (in_pieces(model, ids, [9, 1, 6, 1, 3]) - logits(model, ids)).abs().max() <= CACHED


def test_keys_of_a_cache_that_synapses_were_not_given_are_refused() -> None:
    query, key, value = inputs(6)
    with pytest.raises(ConfigurationError, match="6 keys by 2 queries"):
        module()(AttentionCall(Layer, query[:, :, -2:], key, value, None, 0.5))


@pytest.mark.parametrize("additive", [False, True])
def test_masks_that_show_later_tokens_are_refused(additive: bool) -> None:
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[:4, :4] = True
    given: Any = mask.expand(1, 1, -1, -1)
    if additive:
        given = torch.zeros(1, 1, 12, 12).masked_fill(~given, torch.finfo(torch.float32).min)
    ids = token_ids(1, 12)
    with pytest.raises(ConfigurationError, match="attend to later ones"):
        logits(attached("llama", 1.5), ids, attention_mask=given)
    idle = logits(attached("llama", 0.0), ids, attention_mask=given)
    assert torch.equal(idle, logits(foreign_model("llama"), ids, attention_mask=given))


def test_prompt_lookup_on_a_sliding_window_is_greedy_search() -> None:
    model = synaptic(overrides=dict(sliding_window=8, max_position_embeddings=256))
    ids = token_ids(1, 6).repeat(1, 3)[:, :13]
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), expected)


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_gradients_reach_every_component_of_every_layer(family: str, chunk: int) -> None:
    model = synaptic(family, attention_chunk=chunk).train()
    ids = token_ids(2, 40)
    model(ids, labels=ids).loss.backward()
    for layer in attention_layers(model):
        assert (layer.synapse.expression.grad.abs().amax(dim=0) > 1e-9).all()
        assert (layer.synapse.presynapse.scalars.grad.abs() > 1e-9).all()
        assert (layer.synapse.strength.grad.abs() > 0).all()


def test_stochastic_release_in_any_backbone_draws_by_torchs_seed() -> None:
    model = attached("llama", 1.5, mode="stochastic", stochastic_share=1.0).train()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(logits(model, token_ids(2, 20)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_switch_decides_over_synapses_and_not_that_of_attention() -> None:
    for synapses in (False, True):
        sections = {"synapse": {"attention": True}, "trainable": {"synapses": synapses, "attention": not synapses}}
        model = living_model("mixtral", "grow", sections=sections)
        trains = {name: p.requires_grad for name, p in model.named_parameters() if ".self_attn." in name}
        assert {on for name, on in trains.items() if ".synapse." in name} == {synapses}
        assert {on for name, on in trains.items() if ".synapse." not in name} == {not synapses}


def test_dropout_is_attentions_own() -> None:
    model = attached("llama", 1.5).train()
    for layer in attention_layers(model):
        layer.attention_dropout = 0.5
    ids = token_ids(2, 20)
    torch.manual_seed(0)
    first = logits(model, ids)
    assert (logits(model, ids) - first).abs().max() > 1e-3
    model.eval()
    assert torch.equal(logits(model, ids), logits(attached("llama", 1.5), ids))


# -- saving, leaving, events -------------------------------------------------------------------------------------------


def test_what_is_attached_to_any_backbone_is_in_its_state_dict() -> None:
    model, other, ids = attached("llama", 1.5), attached("llama", 0.0), token_ids(2, 24)
    assert not torch.equal(logits(other, ids), logits(model, ids))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_another_implementation_leaves_synapses_out() -> None:
    model, ids = synaptic(), token_ids(2, 24)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, ids), logits(living_model("mixtral"), ids))
    model.set_attn_implementation("synaptic")
    assert torch.equal(logits(model, ids), logits(SHARED, ids))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_the_implementation_without_synapses_says_how_to_get_them() -> None:
    with pytest.raises(ConfigurationError, match="attach_attention_synapses"):
        logits(foreign_model("llama", "synaptic"), token_ids(1, 4))


def test_synapses_are_attached_once_and_to_causal_attention() -> None:
    with pytest.raises(ConfigurationError, match="already"):
        attach_attention_synapses(attached("llama", 0.0))
    with pytest.raises(ConfigurationError, match="no causal attention"):
        attach_attention_synapses(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_attention_with_sinks_is_refused() -> None:
    sinks = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**_TINY, **sinks), attn_implementation="eager")
    attach_attention_synapses(model)
    with pytest.raises(ConfigurationError, match="s_aux"):
        logits(model, token_ids(1, 4))


def test_layers_that_are_not_causal_are_refused() -> None:
    model = attached("llama", 1.5)
    for layer in attention_layers(model):
        layer.is_causal = False
    with pytest.raises(ConfigurationError, match="not causal"):
        logits(model, token_ids(1, 4))


def test_a_cache_that_another_implementation_began_is_refused() -> None:
    model = synaptic()
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    logits(model, token_ids(1, 5), past_key_values=cache, use_cache=True)
    model.set_attn_implementation("synaptic")
    with pytest.raises(ConfigurationError, match="new cache"):
        logits(model, token_ids(1, 2), past_key_values=cache, use_cache=True)


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="3 heads"):
        module(heads=2)(AttentionCall(Layer, *inputs(4, heads=3), None, 0.5))
