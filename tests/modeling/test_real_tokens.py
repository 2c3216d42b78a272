"""Padding is read from whatever mask Transformers hands over, whichever cache it was made for."""

from typing import Any

import pytest
import torch
from factories import living_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from living_moe.modeling_living_moe.modeling_living_moe import real_tokens

LENGTH = 24
MODELS = {window: living_model("mixtral", sliding_window=window) for window in (None, 4, 9)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("make_cache", ["dynamic", "static"])
@settings(max_examples=20)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=6), pads=st.tuples(*[st.integers(0, 10)] * 2))
def test_the_real_tokens_of_a_mask_made_for_a_cache_are_those_of_the_texts(
    make_cache: str, window: int | None, attention: str, cuts: set[int], pads: tuple[int, int]
) -> None:
    model, ids = MODELS[window], token_ids(2, LENGTH)
    model.set_attn_implementation(attention)
    given_mask = torch.ones(2, LENGTH, dtype=torch.int64)
    for row, pad in enumerate(pads):
        given_mask[row, :pad] = 0
    static: dict[str, Any] = dict(config=model.config, max_cache_len=LENGTH + 3)
    cache = StaticCache(**static) if make_cache == "static" else DynamicCache(config=model.config)
    start = 0
    for end in [*sorted(cuts), LENGTH]:
        flat = given_mask[:, :end]
        made = create_masks_for_generate(
            config=model.config,
            inputs_embeds=torch.empty(2, end - start, 0),
            attention_mask=flat,
            past_key_values=cache,
            position_ids=(flat.cumsum(1) - 1).clamp(min=0)[:, start:],
        )
        for mask in (flat, made):
            found = real_tokens(mask, end - start, start)
            expected = flat[:, start:].bool()
            assert torch.equal(expected if found is None else found, expected) or (found is None and expected.all())
        with torch.no_grad():
            model(ids[:, start:end], attention_mask=made, past_key_values=cache, use_cache=True)
        start = end
