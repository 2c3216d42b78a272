"""Synapses along a text: the same in pieces, batches, beams, with padding and cropped caches, as read at once."""

import copy
import pickle
from typing import Any

import pytest
import torch
from factories import living_model, logits, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from synaptic_models import BUILD, CACHED, in_pieces, shared
from torch import Tensor
from transformers import DynamicCache, StaticCache

from living_moe import LivingMoeForCausalLM

KINDS = sorted(BUILD)
LONG = dict(overrides=dict(max_position_embeddings=1024))
EDGES = dict(attention_chunk=32, attention_top_k=8, attention_turn=128.0)
OF_LONG: dict[str, dict[str, Any]] = {
    "router": dict(chunk=32, **LONG),
    "attention": dict(**EDGES, **LONG),
    "both": dict(chunk=16, **EDGES, **LONG),
}
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> LivingMoeForCausalLM:
    return shared(request.param)


# -- pieces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [("deepseek_v3", "attention"), ("deepseek_v3", "router")] + [("mixtral", kind) for kind in KINDS],
)
def test_reading_in_pieces_is_reading_at_once_on_512_tokens(family: str, kind: str) -> None:
    model, ids = BUILD[kind](family, **OF_LONG[kind]), token_ids(2, 512)
    whole = logits(model, ids)
    for sizes in ([1] * 40 + [472], [300] + [1] * 34 + [178], [31, 1, 32, 33, 415]):
        assert (in_pieces(model, ids, sizes) - whole).abs().max() <= CACHED
    plain = logits(BUILD[kind](family, 0.0, **LONG), ids)
    assert (plain - whole).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "step"), [("router", "chunk"), ("attention", "attention_chunk")])
def test_token_by_token_with_the_reference_step(kind: str, step: str) -> None:
    model, ids = BUILD[kind](**{step: 1}), token_ids(2, 24)
    assert (in_pieces(model, ids, [1] * 24) - logits(model, ids)).abs().max() <= CACHED


@pytest.mark.parametrize("kind", KINDS)
def test_beams_of_padded_rows_are_the_rows_alone_on_512_tokens(kind: str) -> None:
    model = BUILD[kind](**OF_LONG[kind])
    ids, mask = token_ids(3, 512), torch.ones(3, 512, dtype=torch.int64)
    mask[0, :37], mask[1, :160] = 0, 0
    cache, start = DynamicCache(config=model.config), 0
    for size, order in ((200, [1, 0, 2]), (1, [2, 2, 0]), (30, [1, 2, 0]), (1, [0, 2, 1]), (280, [0, 1, 2])):
        end = start + size
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
        rows = ids[:, start:end]
        found = logits(
            model, rows, attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache, use_cache=True
        )
        for row in range(3):
            first = int((1 - mask[row]).sum())
            alone = logits(model, ids[row : row + 1, first:end])[0, -min(size, end - first) :]
            assert (found[row, -len(alone) :] - alone).abs().max() <= CACHED
        # A row goes on with its own tokens to come, whatever it has read.
        chosen = torch.tensor(order)
        cache.reorder_cache(chosen)
        ids[:, :end], mask[:, :end], start = ids[chosen][:, :end], mask[chosen][:, :end], end


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    cuts=st.sets(st.integers(1, 39), max_size=8), seed=st.integers(0, 100), pads=st.tuples(*[st.integers(0, 15)] * 3)
)
def test_any_pieces_of_padded_rows_are_the_rows_alone(
    kind: str, cuts: set[int], seed: int, pads: tuple[int, ...]
) -> None:
    model, ids = shared(kind), token_ids(3, 40, seed)
    ends = [*sorted(cuts), 40]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = in_pieces(model, ids, sizes, attention_mask=mask, position_ids=positions)
    for row, pad in enumerate(pads):
        assert (found[row, pad:] - logits(model, ids[row : row + 1, pad:])[0]).abs().max() <= CACHED


def test_padding_in_the_midst_and_at_the_end_is_not_there(model: LivingMoeForCausalLM) -> None:
    ids = token_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 26:], mask[1, 9:14] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for sizes in ([30], [11, 1, 1, 17]):
        found = in_pieces(model, ids, sizes, attention_mask=mask, position_ids=positions)
        for row in range(2):
            kept = mask[row].bool()
            assert (found[row, kept] - logits(model, ids[row : row + 1, kept])[0]).abs().max() <= CACHED


# -- caches that change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [1, 3, 4, 9])
def test_a_cropped_cache_goes_on_as_if_nothing_had_been_read(model: LivingMoeForCausalLM, back: int) -> None:
    ids, wrong = token_ids(2, 30), token_ids(2, back, seed=9)
    whole = logits(model, ids)
    for start in (13, 16):
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :start], past_key_values=cache, use_cache=True)
        logits(model, wrong, past_key_values=cache, use_cache=True)
        cache.crop(-back)
        found = logits(model, ids[:, start:], past_key_values=cache, use_cache=True)
        assert (found - whole[:, start:]).abs().max() <= CACHED
        cache.crop(-(30 - start + 2))
        found = logits(model, ids[:, start - 2 :], past_key_values=cache, use_cache=True)
        assert (found - whole[:, start - 2 :]).abs().max() <= CACHED


def test_a_cache_cropped_again_and_again_goes_on_with_less_than_it_had(model: LivingMoeForCausalLM) -> None:
    ids = token_ids(2, 30)
    whole = logits(model, ids)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :19], past_key_values=cache, use_cache=True)
    for start, end in ((17, 18), (16, 17), (16, 19), (9, 10), (10, 11), (4, 30)):
        cache.crop(start - cache.get_seq_length())
        found = logits(model, ids[:, start:end], past_key_values=cache, use_cache=True)
        assert (found - whole[:, start:end]).abs().max() <= CACHED


def test_a_cache_follows_the_order_and_choice_of_rows_and_a_reset(model: LivingMoeForCausalLM) -> None:
    ids = token_ids(3, 22)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :10], past_key_values=cache, use_cache=True)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    cache = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    found = logits(model, ids[order][:, 10:], past_key_values=cache, use_cache=True)
    assert (found - logits(model, ids[order])[:, 10:]).abs().max() <= CACHED
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    more = token_ids(2, 5, seed=4)
    found = logits(model, more, past_key_values=cache, use_cache=True)
    again = logits(model, torch.cat([ids[[0, 0]], more], dim=1))[:, 22:]
    assert (found - again).abs().max() <= CACHED
    cache.reset()
    assert torch.equal(logits(model, ids, past_key_values=cache, use_cache=True), logits(model, ids))


# -- generation --------------------------------------------------------------------------------------------------------


def without_cache(model: LivingMoeForCausalLM, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 8])
def test_greedy_generation_is_that_without_a_cache(kind: str, window: int | None) -> None:
    model, ids = BUILD[kind](overrides=dict(sliding_window=window)), token_ids(2, 9)
    expected = without_cache(model, ids, 20)
    for implementation in (None, "static"):
        options = dict(max_new_tokens=20, cache_implementation=implementation, **GREEDY)
        assert torch.equal(model.generate(ids, **options), expected)
    static = StaticCache(config=model.config, max_cache_len=40)
    first = logits(model, ids, past_key_values=static, use_cache=True)
    assert (first - logits(model, ids)).abs().max() <= CACHED


def test_beams_with_a_cache_are_beams_without(model: LivingMoeForCausalLM) -> None:
    ids, options = token_ids(2, 9), dict(num_beams=3, max_new_tokens=14, **GREEDY)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_a_padded_batch_generates_what_its_rows_do(model: LivingMoeForCausalLM) -> None:
    ids, options = token_ids(2, 12), dict(max_new_tokens=14, **GREEDY)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    both = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(both[0, 12:], model.generate(ids[:1, 5:], **options)[0, 7:])
    assert torch.equal(both[1], model.generate(ids[1:], **options)[0])


def test_assisted_decoding_is_plain_decoding(model: LivingMoeForCausalLM) -> None:
    ids, options = token_ids(1, 9), dict(max_new_tokens=20, **GREEDY)
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=living_model("mixtral"), **options), plain)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), plain)
