"""Contract of running evidence: the scan is the recurrence token by token, and a cache carries the evidence of past
tokens through everything that generation does to it. The oracle is the same text in one pass, without a cache.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from living_moe.configuration.sections import ReceptiveFieldConfig
from living_moe.modeling_living_moe.deltas import FieldDelta
from living_moe.modeling_living_moe.field_evidence import EvidenceLayer, evidence_history, linear_recurrence, remember
from living_moe.modeling_living_moe.receptive_field import FieldGate, ReceptiveFields

VOCAB = 40
TOKEN = torch.arange(VOCAB)


def old_text(number: int, seed: int = 1) -> Tensor:
    """Tokens of the domain the model knows: mostly the lower half of the vocabulary."""
    return domain(number, seed, TOKEN < VOCAB // 2)


def new_text(number: int, seed: int = 2) -> Tensor:
    return domain(number, seed, TOKEN >= VOCAB // 2)


def domain(number: int, seed: int, favoured: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.where(favoured, 1.0, 0.3), number, replacement=True, generator=generator)


def two_fields() -> ReceptiveFields:
    """Calibrated on old text; field 1 knows the new text, field 2 tokens of even number."""
    fields = ReceptiveFields(ReceptiveFieldConfig(calibration_tokens=2048, prior_tokens=50.0), VOCAB, 2)
    fields.calibrate(old_text(4000))
    for number, text in enumerate((new_text(3000), domain(3000, 3, TOKEN % 2 == 0))):
        fields.new_counts[number] = torch.bincount(text, minlength=VOCAB)
    fields.awake.fill_(True)
    fields._tables = None
    return fields


# The scan


def slow_recurrence(keep: Tensor, added: Tensor, start: Tensor | None = None) -> Tensor:
    state, states = torch.zeros_like(added[:, 0]) if start is None else start, []
    for t in range(added.shape[1]):
        state = keep[:, t, None] * state + added[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    fields=st.integers(0, 3),
    reach=st.one_of(st.none(), st.integers(0, 45)),
    first=st.integers(0, 45),
    started=st.booleans(),
)
def test_the_scan_equals_the_recurrence_token_by_token(
    rows: int, length: int, fields: int, reach: int | None, first: int, started: bool
) -> None:
    keep, added = torch.rand(rows, length).double(), torch.randn(rows, length, fields).double()
    if reach is not None:
        keep[:, first % (reach + 1) :: reach + 1] = 0.0
    start = torch.randn(rows, fields).double() if started else None
    fast = linear_recurrence(keep, added, start, reach)
    torch.testing.assert_close(fast, slow_recurrence(keep, added, start), rtol=0, atol=1e-12)


def test_a_scan_longer_than_any_chunk_stays_exact() -> None:
    keep = torch.rand(2, 3001, dtype=torch.float64)
    added, start = torch.randn(2, 3001, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    expected = slow_recurrence(keep, added, start)
    torch.testing.assert_close(linear_recurrence(keep, added, start), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reach", [1, 6, 7, 8, 100])
def test_a_scan_told_how_far_states_reach_gives_the_same(reach: int) -> None:
    keep, added = torch.rand(1, 100, dtype=torch.float64), torch.randn(1, 100, 1, dtype=torch.float64)
    keep[:, :: reach + 1] = 0.0
    torch.testing.assert_close(linear_recurrence(keep, added, reach=reach), linear_recurrence(keep, added))


def test_a_scan_leaves_its_inputs_as_they_were() -> None:
    keep, added, start = torch.rand(2, 9), torch.randn(2, 9, 1), torch.randn(2, 1)
    copies = [each.clone() for each in (keep, added, start)]
    linear_recurrence(keep, added, start)
    assert all(torch.equal(one, other) for one, other in zip((keep, added, start), copies, strict=True))


# The cache


class GatedMixtral(MixtralForCausalLM):
    """The least model that reads a gate: a stock Mixtral whose head changes where a field is open."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.fields = two_fields()
        self.delta = FieldDelta(config.hidden_size, config.vocab_size, 4, 2)
        for up in self.delta.up:
            nn.init.normal_(up, std=3.0)
        self.gates: list[FieldGate] = []

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        # A static cache gets a 4-D mask; the prompts it is tested with have no padding.
        flat = attention_mask is not None and attention_mask.dim() == 2
        mask = attention_mask[:, -input_ids.shape[1] :] if flat else None
        history = None if past_key_values is None else evidence_history(past_key_values)
        gate = self.fields(input_ids, mask, history)
        kwargs.pop("logits_to_keep", None)
        kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        if outputs.past_key_values is not None:
            remember(outputs.past_key_values, gate.evidence)
        self.gates.append(gate)
        hidden = outputs.last_hidden_state
        logits = self.delta(hidden, self.lm_head(hidden), gate.index)
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


def make_model(**config: int) -> GatedMixtral:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    shape = dict(num_key_value_heads=1, num_local_experts=2, eos_token_id=None, pad_token_id=0, bos_token_id=None)
    return GatedMixtral(MixtralConfig(**{**sizes, **shape, **config})).eval()


def prompt() -> Tensor:
    return torch.stack([torch.cat([old_text(9), new_text(3)]), torch.cat([new_text(9, 5), old_text(3, 6)])])


@pytest.mark.parametrize("make_cache", ["lazy", "dynamic", "static", "sliding"])
def test_a_cached_pass_continues_the_evidence_of_the_passes_before(make_cache: str) -> None:
    model = make_model(**({"sliding_window": 5} if make_cache == "sliding" else {}))
    caches = {
        "lazy": lambda: DynamicCache(),
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=12),
        "sliding": lambda: DynamicCache(config=model.config),
    }
    cache, ids = caches[make_cache](), prompt()
    compiles = cache.is_compileable
    whole = model(ids)
    logits = [model(ids[:, start:end], past_key_values=cache).logits for start, end in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-4)
    evidence = evidence_history(cache)
    assert evidence is not None and evidence.shape == (2, 12, 2)
    torch.testing.assert_close(evidence, model.gates[0].evidence, rtol=0, atol=1e-12)
    assert cache.get_seq_length() == 12
    assert cache.is_compileable == compiles
    cache.reset()
    assert evidence_history(cache) is None
    again = model(ids, past_key_values=cache)
    torch.testing.assert_close(again.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == 3
    assert isinstance(cache.layers[-1], EvidenceLayer)


def test_the_evidence_follows_reordering_cropping_and_selection() -> None:
    model, cache, ids = make_model(), DynamicCache(), prompt()
    model(ids, past_key_values=cache)
    evidence = model.gates[0].evidence
    cache.crop(-4)
    torch.testing.assert_close(evidence_history(cache), evidence[:, :-4])
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(evidence_history(cache), evidence[[1, 0], :-4])
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(evidence_history(cache), evidence[[1, 1, 0, 0], :-4])
    cache.batch_select_indices(torch.tensor([3]))
    torch.testing.assert_close(evidence_history(cache), evidence[[0], :-4])
    cache.crop(0)
    cache.crop(-8)
    assert evidence_history(cache) is None


def test_a_cache_that_has_stored_nothing_gets_no_layer() -> None:
    cache = DynamicCache()
    remember(cache, two_fields()(prompt()).evidence)
    assert not cache.layers
    assert evidence_history(cache) is None


@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=1),
        dict(num_beams=3),
        dict(num_beams=3, num_return_sequences=2, length_penalty=0.5),
        dict(cache_implementation="static"),
    ],
    ids=["greedy", "beams", "several beams", "static cache"],
)
def test_generation_is_the_same_with_and_without_a_cache(how: dict[str, object]) -> None:
    model, ids = make_model(), prompt()
    mask = torch.ones_like(ids)
    if "cache_implementation" not in how:
        mask[0, :4] = 0
    settings = dict(max_new_tokens=12, do_sample=False, attention_mask=mask)
    cached = model.generate(ids, **settings, **how)
    present = {field for gate in model.gates for field in gate.index.flatten().tolist()}
    assert 0 in present and len(present) > 1
    plain = model.generate(ids, use_cache=False, **settings, **{k: v for k, v in how.items() if "cache" not in k})
    assert torch.equal(cached, plain)


def test_assisted_decoding_rolls_the_evidence_back_with_rejected_tokens() -> None:
    model, assistant, ids = make_model(), make_model(num_hidden_layers=1), prompt()[:1]
    nn.init.normal_(assistant.lm_head.weight, std=0.5)
    settings = dict(max_new_tokens=16, do_sample=False)
    expected = model.generate(ids, **settings)
    model.gates.clear()
    assisted = model.generate(ids, assistant_model=assistant, return_dict_in_generate=True, **settings)
    assert torch.equal(assisted.sequences, expected)
    proposed = sum(gate.index.shape[1] for gate in model.gates)
    assert proposed > assisted.sequences.shape[1]  # some were rejected, so the cache was cropped
    evidence = evidence_history(assisted.past_key_values)
    assert evidence is not None
    whole = model.fields(assisted.sequences[:, : evidence.shape[1]]).evidence
    torch.testing.assert_close(evidence, whole, rtol=0, atol=1e-12)
