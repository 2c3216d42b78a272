"""Router synapses in whole models: nothing when off, memory when on, the same after events."""

from typing import Any

import pytest
import torch
from factories import drift, live, living_model, logits, source_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from synaptic_models import CACHED, in_pieces
from synaptic_models import router_model as synaptic
from torch import Tensor
from transformers import DynamicCache

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError, LivingMoeError
from living_moe.configuration.sections import SynapseConfig
from living_moe.modeling_living_moe import router
from living_moe.modeling_living_moe.population import Population
from living_moe.modeling_living_moe.synapse.presynaptic import MOLECULES
from living_moe.modeling_living_moe.synapse.router import Passage, RouterSynapse
from living_moe.modeling_living_moe.synapse.texts import SynapseLayer, read_texts
from living_moe.training.optimizers import LivingAdamW

SHARED = synaptic()


# -- off is off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synapses_of_a_graft_have_the_dtype_of_its_keys_beside_a_learned_temperature(dtype: torch.dtype) -> None:
    source = source_model("mixtral").to(dtype)
    model = living_moe.convert(source, preset="synaptic-router", router={"learn_temperature": True}, verify=False)
    for block in model.living_blocks:
        assert block.router.learned_temperature.log_ratio.dtype == torch.float32
        assert {parameter.dtype for parameter in block.router.synapse.parameters()} == {dtype}


def test_bf16_keeps_states_in_fp32_and_strength_zero_exact() -> None:
    plain, model = living_model("mixtral").to(torch.bfloat16), synaptic(strength=0.0).to(torch.bfloat16)
    ids = token_ids(2, 30)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache, use_cache=True)
    assert cache.layers[-1].keys.dtype == torch.float32 and cache.layers[-1].state.dtype == torch.float32


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4])
def test_gradients_reach_every_component_of_every_layer(chunk: int) -> None:
    model = synaptic(chunk=chunk).train()
    ids = token_ids(2, 40)
    model(ids, labels=ids).loss.backward()
    for block in model.living_blocks:
        synapse = block.router.synapse
        assert (synapse.expression["trainable"].grad.abs().amax(dim=0) > 1e-9).all()
        assert (synapse.presynapse.scalars.grad.abs() > 1e-9).all()
        assert synapse.strength.grad.abs() > 0


@pytest.mark.parametrize("events", [0, 8])
def test_all_scores_keep_their_gradients_however_many_they_are(events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With synapses the scores of the unchosen matter, so sparse gradients of scores do not."""
    ids, gradients = token_ids(2, 20), []
    for sparse_from in (0, 10**9):
        monkeypatch.setattr(router, "SPARSE_FROM", sparse_from)
        model = synaptic()
        if events:
            live(model, events, 5)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_switch_decides_over_synapses() -> None:
    sections = {"synapse": {"router": True}, "trainable": {"synapses": False}}
    model = living_model("mixtral", "grow", sections=sections)
    assert {p.requires_grad for name, p in model.named_parameters() if "synapse" in name} == {False}
    frozen = living_model("mixtral", "frozen-graft", sections={**sections, "trainable": {"synapses": True}})
    trains = {name: p.requires_grad for name, p in frozen.named_parameters() if "synapse" in name}
    assert {on for name, on in trains.items() if "expression.frozen" in name} == {False}
    assert {on for name, on in trains.items() if "expression" not in name} == {True}


# -- memory ------------------------------------------------------------------------------------------------------------


def routed(model: LivingMoeForCausalLM, ids: Tensor) -> Tensor:
    """Weights of every expert for every token, of the first layer: (T, E)."""
    found: list[Tensor] = []

    def note(router: Any, args: Any, output: Any) -> None:
        _, weights_TK, index_TK = output
        found.append(torch.zeros(len(weights_TK), 8).scatter(1, index_TK, weights_TK.float()))

    hook = model.living_blocks[0].router.register_forward_hook(note)
    logits(model, ids)
    hook.remove()
    return found[0]


def test_the_same_prompt_twice_in_a_row_is_routed_differently_the_second_time() -> None:
    """Attention is taken out, so that without synapses a token's routing does not depend on its text."""
    prompt = token_ids(1, 16)
    for model, differs in ((living_model("mixtral"), False), (synaptic(strength=1.5), True)):
        for layer in model.model.backbone.layers:
            layer.self_attn.o_proj.weight.data.zero_()
        first, second = routed(model, torch.cat([prompt, prompt], dim=1)).split(16)
        assert ((first - second).abs().max() > 1e-2) == differs
        assert torch.allclose(first, second, atol=1e-5) != differs


def test_an_expert_in_use_tires() -> None:
    """One token again and again: what its experts are given falls, and others get more."""
    model = synaptic(strength=3.0, chunk=1)
    for block in model.living_blocks:
        block.router.synapse.expression["trainable"].data.zero_()
    for layer in model.model.backbone.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    weights = routed(model, torch.full((1, 60), 5))
    favourite = int(weights[0].argmax())
    assert weights[-20:, favourite].mean() < 0.9 * weights[0, favourite]
    assert (weights.sum(0) > 0).sum() > (weights[0] > 0).sum()


# -- chunks, texts -----------------------------------------------------------------------------------------------------


def what_is_heard(experts: int, chunk: int) -> Tensor:
    """What synapses add to random scores of two texts of 512 tokens, but for what all scores of a token share."""
    scoring = living_model("mixtral").living_blocks[0].router.scoring
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2 * 512, experts, generator=generator) + 0.5 * torch.randn(experts, generator=generator)
    settings = SynapseConfig(router=True, chunk=chunk, strength=1.0)
    synapse = RouterSynapse(settings, scoring, {"trainable": experts})
    passage = Passage(read_texts((2, 512), chunk, scores.device))
    population = Population({"trainable": experts}, 8)
    with torch.no_grad():
        added = synapse(scores, population, lambda view: None, passage=passage) - scores
    return added - added.mean(dim=-1, keepdim=True)


@pytest.mark.parametrize("experts", [8, 64])
def test_the_error_of_chunks_is_measured_and_bounded(experts: int) -> None:
    """Against step size 1, root mean square over that of what is added; tokens without order are the worst case."""
    reference = what_is_heard(experts, 1)
    size = reference.square().mean().sqrt()
    errors = {c: ((what_is_heard(experts, c) - reference).square().mean().sqrt() / size).item() for c in (2, 8, 32)}
    assert size > 0.1
    assert errors[2] <= 0.2 and errors[8] <= 0.42 and errors[32] <= 0.68
    assert list(errors.values()) == sorted(errors.values())


def test_texts_packed_in_a_row_begin_at_rest() -> None:
    """A text behind another reads as the same text alone, as far as synapses go: attention is taken out."""
    model = synaptic()
    for layer in model.model.backbone.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    lengths = (11, 3, 14)
    ids = token_ids(2, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    packed = logits(model, ids, position_ids=positions).split(lengths, dim=1)
    for part, own in zip(packed, ids.split(lengths, dim=1), strict=True):
        assert (part - logits(model, own)).abs().max() <= CACHED
    assert (torch.cat(packed, dim=1) - logits(model, ids)).abs().max() > 1e-2
    pieces = in_pieces(model, ids, [5, 7, 1, 9, 6], position_ids=positions)
    assert (pieces - torch.cat(packed, dim=1)).abs().max() <= CACHED


def test_a_crop_within_a_chunk_keeps_the_state_and_one_behind_it_does_not() -> None:
    cache = DynamicCache(config=SHARED.config)
    logits(SHARED, token_ids(1, 11), past_key_values=cache, use_cache=True)
    layer = cache.layers[-1]
    assert isinstance(layer, SynapseLayer) and layer.state is not None
    cache.crop(-2)
    assert layer.state is not None
    cache.crop(-2)
    assert layer.state is None


@settings(max_examples=15)
@given(tokens=st.integers(1, 20), pads=st.tuples(*[st.integers(0, 8)] * 2), chunk=st.sampled_from([1, 3, 8]))
def test_laying_out_and_gathering_give_back_every_real_token(tokens: int, pads: tuple[int, int], chunk: int) -> None:
    mask = torch.ones(2, tokens, dtype=torch.bool)
    for row, pad in enumerate(pads):
        mask[row, : min(pad, tokens - 1)] = False
    texts = read_texts((2, tokens), chunk, mask.device, mask)
    values = torch.randn(2 * tokens, 3)
    back = texts.gather(texts.lay_out(values)).view(2, tokens, 3)
    assert torch.equal(back[mask], values.view(2, tokens, 3)[mask])
    assert torch.equal(back[~mask], torch.zeros_like(back[~mask]))


# -- population --------------------------------------------------------------------------------------------------------


def test_a_newborn_inherits_expression_and_the_optimizers_memory_of_it() -> None:
    model = synaptic().train()
    optimizer = LivingAdamW(model)
    ids = token_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    newborn = model.split_expert(0, 3, optimizer=optimizer).children[0]
    uids, vectors = model.expert_uids(0), model.living_blocks[0].router.synapse.expression["trainable"]
    assert torch.equal(vectors[uids.index(newborn)], vectors[uids.index(3)])
    moments = optimizer.state[vectors]["exp_avg"]
    assert torch.equal(moments[uids.index(newborn)], moments[uids.index(3)]) and moments[uids.index(3)].any()
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("loads", "share"), [((0.0, 0.0), 0.5), ((3.0, 1.0), 0.25), ((0.5, 1.5), 0.75)])
def test_a_merge_within_a_clade_averages_expression_by_load(loads: tuple[float, float], share: float) -> None:
    """As it averages keys: the merged expert has the newborn's `share` of the way, and nobody else changes a bit."""
    model = synaptic()
    newborn = model.split_expert(0, 3).children[0]
    block = model.living_blocks[0]
    uids, vectors = model.expert_uids(0), block.router.synapse.expression["trainable"]
    generator = torch.Generator().manual_seed(4)
    vectors.data[uids.index(newborn)] = torch.randn(len(MOLECULES), generator=generator)
    load = block.vitals.table("trainable").load
    load[uids.index(3)], load[uids.index(newborn)] = loads
    before = dict(zip(uids, vectors.detach().clone(), strict=False))
    model.merge_experts(0, [3, newborn])
    after = dict(zip(model.expert_uids(0), block.router.synapse.expression["trainable"].detach(), strict=False))
    assert after.keys() == before.keys() - {newborn}
    torch.testing.assert_close(after[3], torch.lerp(before[3], before[newborn], share), atol=1e-6, rtol=1e-6)
    assert (before[3] - before[newborn]).abs().min() > 1e-3
    assert all(torch.equal(vector, before[uid]) for uid, vector in after.items() if uid != 3)


def test_a_merge_across_clades_leaves_each_address_its_expression() -> None:
    """The survivor keeps its own; the other's address stays, as a tombstone, with its own."""
    model = synaptic()
    block = model.living_blocks[0]
    uids, vectors = model.expert_uids(0), block.router.synapse.expression["trainable"].detach().clone()
    assert not torch.equal(vectors[2], vectors[5])
    model.merge_experts(0, [2, 5])
    after = block.router.synapse.expression["trainable"].detach()
    assert torch.equal(after[model.expert_uids(0).index(2)], vectors[uids.index(2)])
    assert torch.equal(block.router.synapse.tombstones.expression, vectors[uids.index(5)][None])


def test_an_address_keeps_its_expression_when_its_expert_dies() -> None:
    """A sibling with another key takes over: the address stays as a tombstone, and its synapse with it."""
    model = synaptic()
    newborn = model.split_expert(0, 3).children[0]
    drift(model, 1, std=0.1)
    block = model.living_blocks[0]
    uids = model.expert_uids(0)
    vector = block.router.synapse.expression["trainable"][uids.index(newborn)].detach().clone()
    model.remove_expert(0, newborn)
    assert torch.equal(block.router.synapse.tombstones.expression, vector[None])
    logits(model, token_ids(2, 12))


@pytest.mark.parametrize("events", [["split"], ["freeze"], ["split", "death"]])
def test_a_cache_from_before_an_event_is_refused(events: list[str]) -> None:
    """Also where there are as many addresses as before, in another order or of another expert."""
    model = synaptic()
    cache = DynamicCache(config=model.config)
    logits(model, token_ids(1, 8), past_key_values=cache, use_cache=True)
    for event in events:
        happen = {"split": model.split_expert, "freeze": model.freeze_expert, "death": model.remove_expert}[event]
        happen(0, 3)
    with pytest.raises(LivingMoeError, match="new cache"):
        logits(model, token_ids(1, 2), past_key_values=cache, use_cache=True)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_searched_routers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="router.search"):
        living_model("mixtral", "synaptic-router", sections={"router": {"search": "two_stage"}})


def test_tokens_with_no_text_given_are_one_text() -> None:
    block = SHARED.living_blocks[0]
    hidden = torch.randn(20, block.router.hidden_size)
    passage = Passage(read_texts((1, 20), 4, hidden.device))
    alone = block.router(hidden, block.population)
    given = block.router(hidden, block.population, passage=passage)
    assert all(torch.equal(a, b) for a, b in zip(alone, given, strict=True))
    assert not torch.equal(alone[0], block.router.logits(hidden, block.router.keys(block.population.alive)))
