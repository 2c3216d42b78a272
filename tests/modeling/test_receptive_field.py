"""Contract of receptive fields: the gate is causal, says the same however the text is cut into passes, keeps what it
cannot tell from the old in the root field, and all of it survives saving. The oracle is the recurrence, token by token.
"""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from living_moe.configuration.errors import LivingMoeError
from living_moe.configuration.sections import ReceptiveFieldConfig
from living_moe.modeling_living_moe import receptive_field
from living_moe.modeling_living_moe.deltas import FieldDelta
from living_moe.modeling_living_moe.receptive_field import (
    BOUNDARY,
    FieldGate,
    ReceptiveFields,
    evidence_history,
    linear_recurrence,
    remember,
)

VOCAB = 40


def old_text(number: int, seed: int = 1) -> Tensor:
    """Tokens of the domain the model knows: mostly the lower half of the vocabulary."""
    return domain(number, seed, torch.arange(VOCAB) < VOCAB // 2)


def new_text(number: int, seed: int = 2) -> Tensor:
    return domain(number, seed, torch.arange(VOCAB) >= VOCAB // 2)


def domain(number: int, seed: int, favoured: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.where(favoured, 1.0, 0.3), number, replacement=True, generator=generator)


def make_fields(num_fields: int = 1, folded: int = 3000, **config: float) -> ReceptiveFields:
    """Calibrated on old text; field 1 has counted new text, further fields other mixtures."""
    section = ReceptiveFieldConfig(**{"calibration_tokens": 2048, "prior_tokens": 50.0, **config})
    fields = ReceptiveFields(section, VOCAB, num_fields)
    fields.calibrate(old_text(4000))
    if folded:
        fields.observe(new_text(folded))
        for field in range(2, num_fields + 1):
            fields.observe(domain(folded, field, torch.arange(VOCAB) % field == 0), field=field)
        fields.fold(fields.pending_counts())
    return fields


def slow_densities(fields: ReceptiveFields) -> tuple[list[float], list[list[float]]]:
    old = fields.old_counts.tolist()
    seen = sum(count > 0 for count in old)
    p_old = [(count + seen / VOCAB) / (sum(old) + seen) for count in old]
    newborn = []
    for counts in fields.new_counts.tolist():
        total = sum(counts) + fields.prior_tokens
        newborn.append([(c + fields.prior_tokens * p) / total for c, p in zip(counts, p_old, strict=True)])
    return p_old, newborn


def slow_gate(fields: ReceptiveFields, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Evidence (B, T, F) and field (B, T), one token after another."""
    p_old, newborn = slow_densities(fields)
    evidence = torch.zeros(*ids.shape, len(newborn), dtype=torch.float64)
    index = torch.zeros_like(ids)
    for row in range(ids.shape[0]):
        state = [0.0] * len(newborn)
        for t, token in enumerate(ids[row].tolist()):
            if mask is None or mask[row, t]:
                for f, p_new in enumerate(newborn):
                    ratio = math.log(p_new[token]) - math.log(p_old[token]) if 0 <= token < VOCAB else 0.0
                    state[f] = fields.decay * state[f] + (1 - fields.decay) * ratio
            margins = [state[f] - fields.threshold[f].item() for f in range(len(newborn))]
            if max(margins) > 0:
                index[row, t] = 1 + margins.index(max(margins))
            evidence[row, t] = torch.tensor(state, dtype=torch.float64)
    return evidence, index


@given(
    length=st.integers(1, 70),
    num_fields=st.integers(1, 3),
    decay=st.sampled_from([0.0, 0.5, 0.97]),
    padded=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_gate_equals_the_recurrence_token_by_token(
    length: int, num_fields: int, decay: float, padded: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    fields = make_fields(num_fields, decay=decay, quantile=0.9)
    ids = torch.randint(-1, VOCAB + 2, (3, length), generator=generator)
    mask = torch.rand(3, length, generator=generator) < 0.6 if padded else None
    gate = fields(ids, mask)
    evidence, index = slow_gate(fields, ids, mask)
    torch.testing.assert_close(gate.evidence, evidence, rtol=0, atol=1e-12)
    near = (gate.evidence - fields.threshold).abs().amin(-1) < 1e-12
    assert torch.equal(gate.index[~near], index[~near])
    assert gate.any_open() == bool((gate.index > 0).any())


@given(cuts=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 10_000), padded=st.booleans())
def test_text_cut_into_passes_gives_the_gate_of_the_whole(cuts: list[int], seed: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    fields = make_fields(2)
    ids = torch.randint(0, VOCAB, (2, sum(cuts)), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, : int(torch.randint(0, sum(cuts), (), generator=generator))] = 0
    whole = fields(ids, mask)
    start, history = 0, None
    for cut in cuts:
        part = fields(ids[:, start : start + cut], mask[:, start : start + cut], history)
        history = part.evidence if history is None else torch.cat([history, part.evidence], dim=1)
        assert torch.equal(part.index, whole.index[:, start : start + cut])
        start += cut
    torch.testing.assert_close(history, whole.evidence, rtol=0, atol=1e-12)


def test_a_scan_longer_than_any_chunk_stays_exact() -> None:
    keep = torch.rand(2, 3001, dtype=torch.float64)
    added, start = torch.randn(2, 3001, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    state, expected = start, []
    for t in range(3001):
        state = keep[:, t, None] * state + added[:, t]
        expected.append(state)
    torch.testing.assert_close(linear_recurrence(keep, added, start), torch.stack(expected, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reach", [1, 6, 7, 8, 100])
def test_a_scan_told_how_far_states_reach_gives_the_same(reach: int) -> None:
    keep, added = torch.rand(1, 100, dtype=torch.float64), torch.randn(1, 100, 1, dtype=torch.float64)
    keep[:, :: reach + 1] = 0.0
    torch.testing.assert_close(linear_recurrence(keep, added, reach=reach), linear_recurrence(keep, added))


def test_the_field_of_a_token_does_not_depend_on_later_tokens() -> None:
    fields = make_fields(2)
    ids = torch.cat([old_text(30), new_text(30)]).unsqueeze(0)
    before = fields(ids)
    for t in (0, 17, 40, 58):
        changed = ids.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 11) % VOCAB
        after = fields(changed)
        assert torch.equal(before.index[:, : t + 1], after.index[:, : t + 1])
        assert torch.equal(before.evidence[:, : t + 1], after.evidence[:, : t + 1])
        assert not torch.equal(before.evidence[:, t + 1 :], after.evidence[:, t + 1 :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_adds_evidence_nor_lets_it_decay(side: str) -> None:
    fields = make_fields()
    text, padding = new_text(20).unsqueeze(0), torch.full((1, 7), 3)
    parts = [padding, text] if side == "left" else [text, padding]
    ids, mask = torch.cat(parts, 1), torch.cat([torch.full_like(p, int(p is text)) for p in parts], 1)
    gate, alone = fields(ids, mask), fields(text)
    real = mask.bool()
    torch.testing.assert_close(gate.evidence[real], alone.evidence[0], rtol=0, atol=1e-12)
    assert torch.equal(gate.index[real], alone.index[0])
    carried = gate.evidence[~real]
    expected = torch.zeros_like(carried) if side == "left" else alone.evidence[0, -1:].expand_as(carried)
    torch.testing.assert_close(carried, expected, rtol=0, atol=1e-12)


def test_new_text_opens_its_field_and_old_text_stays_in_the_root() -> None:
    fields = make_fields(decay=0.95, quantile=0.95)
    assert (fields(new_text(2000, seed=7).reshape(4, 500)).index == 1).float().mean() > 0.95
    assert (fields(old_text(2000, seed=8).reshape(4, 500)).index == 1).float().mean() < 0.05


def test_a_field_that_has_counted_nothing_never_opens() -> None:
    fields = make_fields(folded=0)
    gate = fields(torch.randint(0, VOCAB, (4, 100)))
    assert torch.equal(gate.evidence, torch.zeros_like(gate.evidence))
    assert not gate.any_open()


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 1.0])
def test_at_most_one_minus_quantile_of_the_calibration_tokens_leave_the_root(quantile: float) -> None:
    # New text so near the old that a threshold of zero would let many old tokens out.
    section = ReceptiveFieldConfig(quantile=quantile, calibration_tokens=4 * (receptive_field.WINDOW + 1), decay=0.5)
    fields = ReceptiveFields(section, VOCAB)
    fields.calibrate(old_text(4000))
    fields.observe(torch.cat([old_text(9000, seed=3), new_text(3000)]))
    fields.fold(fields.pending_counts())
    windows = fields.calibration_ids.reshape(4, receptive_field.WINDOW + 1)[:, :-1]
    opened = (fields(windows).index > 0).float().mean().item()
    assert opened <= 1 - quantile + 1e-6
    assert opened == pytest.approx(1 - quantile, abs=2e-3) or fields.threshold.item() == 0


def test_the_threshold_is_never_below_zero() -> None:
    fields = make_fields(quantile=0.5)
    windows = fields.calibration_ids[: receptive_field.WINDOW].unsqueeze(0)
    assert fields(windows).evidence.median() < 0
    assert fields.threshold.tolist() == [0.0]


def test_without_calibration_everything_is_open_and_one_warning_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(receptive_field.logger, "warning_once", warned.append)
    fields = ReceptiveFields(ReceptiveFieldConfig(), VOCAB)
    gate = fields(torch.randint(0, VOCAB, (2, 5)))
    assert torch.equal(gate.index, torch.ones(2, 5, dtype=torch.int64))
    assert gate.any_open()
    assert "model.calibrate" in warned[0]
    assert torch.equal(gate.evidence, torch.zeros(2, 5, 1, dtype=gate.evidence.dtype))


def test_the_densities_in_use_follow_the_counts_only_when_these_have_grown() -> None:
    fields = make_fields(folded=1000)
    in_use = fields.new_counts.clone()
    small = torch.zeros_like(fields.new_counts)
    small[0, 0] = 60
    fields.fold(small)
    assert torch.equal(fields.new_counts, in_use)
    before = fields(new_text(50).unsqueeze(0))
    fields.fold(small)
    assert torch.equal(fields.new_counts, in_use + 2 * small)
    assert fields.waiting_counts.sum() == 0
    assert not torch.equal(fields(new_text(50).unsqueeze(0)).evidence, before.evidence)


def test_only_real_and_known_tokens_are_counted() -> None:
    fields = make_fields(folded=0)
    fields.observe(torch.tensor([[3, 3, 5, -1], [3, VOCAB, 6, 7]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]))
    expected = torch.zeros(1, VOCAB, dtype=torch.int64)
    expected[0, 3], expected[0, 5], expected[0, 6] = 2, 1, 1
    assert torch.equal(fields.pending_counts(), expected)
    fields.fold(fields.pending_counts())
    assert fields.pending_counts().sum() == 0
    assert "_pending" not in dict(fields.named_buffers())


def test_two_ranks_that_sum_their_counts_have_the_gate_of_one() -> None:
    alone, first, second = (make_fields(folded=0) for _ in range(3))
    text = new_text(400)
    alone.observe(text)
    alone.fold(alone.pending_counts())
    first.observe(text[:150])
    second.observe(text[150:])
    total = first.pending_counts() + second.pending_counts()
    for rank in (first, second):
        rank.fold(total)
        assert torch.equal(rank(text.unsqueeze(0)).evidence, alone(text.unsqueeze(0)).evidence)


def test_saved_state_restores_the_gate_bit_for_bit_also_between_refreshes() -> None:
    fields = make_fields(2)
    waiting = torch.ones_like(fields.waiting_counts)
    fields.fold(waiting)
    assert fields.waiting_counts.sum() > 0
    restored = ReceptiveFields(ReceptiveFieldConfig(calibration_tokens=2048, prior_tokens=50.0), VOCAB, 2)
    ids = torch.cat([old_text(60), new_text(60)]).reshape(2, 60)
    restored(ids)  # builds tables that loading must throw away
    restored.load_state_dict(fields.state_dict())
    for follow_up in (0, 1):
        assert torch.equal(restored(ids).evidence, fields(ids).evidence)
        assert torch.equal(restored(ids).index, fields(ids).index)
        for each in (restored, fields):
            each.fold(waiting * 20 * (1 - follow_up))


def test_it_is_built_on_meta_and_filled_by_loading() -> None:
    fields = make_fields()
    with torch.device("meta"):
        loaded = ReceptiveFields(ReceptiveFieldConfig(calibration_tokens=2048, prior_tokens=50.0), VOCAB)
    loaded.load_state_dict(fields.state_dict(), assign=True)
    ids = new_text(64).unsqueeze(0)
    assert torch.equal(loaded(ids).evidence, fields(ids).evidence)
    with torch.device("meta"):
        fresh = ReceptiveFields(ReceptiveFieldConfig(calibration_tokens=8), VOCAB)
    fresh.to_empty(device="cpu").reset_parameters()
    empty = ReceptiveFields(ReceptiveFieldConfig(calibration_tokens=8), VOCAB).state_dict()
    assert all(torch.equal(value, empty[name]) for name, value in fresh.state_dict().items())


def test_half_precision_and_copies_leave_the_gate_as_it_was() -> None:
    fields = make_fields()
    ids = new_text(64).unsqueeze(0)
    expected = fields(ids).evidence
    twin = copy.deepcopy(fields)
    assert torch.equal(fields.to(torch.bfloat16)(ids).evidence, expected)
    twin.fold(torch.full_like(twin.new_counts, 1000))
    assert torch.equal(fields(ids).evidence, expected)
    assert not torch.equal(twin(ids).evidence, expected)


def test_the_calibration_sample_is_whole_windows_spread_over_the_text() -> None:
    fields = ReceptiveFields(ReceptiveFieldConfig(calibration_tokens=3 * (receptive_field.WINDOW + 1)), 10_000)
    text = torch.arange(10_000)
    fields.calibrate(text)
    windows = fields.calibration_ids.reshape(3, receptive_field.WINDOW + 1)
    assert torch.equal(windows[:, -1], torch.full((3,), BOUNDARY, dtype=torch.int32))
    starts = windows[:, 0].tolist()
    assert starts[0] == 0 and starts[-1] == (10_000 // receptive_field.WINDOW - 1) * receptive_field.WINDOW
    for window in windows[:, :-1]:
        assert torch.equal(window.diff(), torch.ones_like(window[1:]))
    assert fields.old_counts.sum() == 10_000


@given(budget=st.integers(1, 40), documents=st.integers(1, 6), length=st.integers(1, 12))
def test_any_text_fits_any_budget_without_crossing_documents(budget: int, documents: int, length: int) -> None:
    fields = ReceptiveFields(ReceptiveFieldConfig(calibration_tokens=budget), 100)
    fields.calibrate(torch.arange(documents * length).reshape(documents, length))
    kept = fields.calibration_ids.tolist()
    assert len(kept) == budget
    assert kept[0] != BOUNDARY
    for token, successor in itertools.pairwise(kept):
        if BOUNDARY not in (token, successor):
            assert successor == token + 1 and successor % length


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.empty(0, dtype=torch.int64), "empty"),
        (torch.ones(4), "torch.float32"),
        (torch.ones(1, 1, 1, dtype=torch.int64), "shape"),
        (torch.tensor([0, VOCAB]), f"0..{VOCAB}"),
        (torch.tensor([-100, 2]), "padding"),
    ],
)
def test_text_that_cannot_calibrate_is_refused_and_changes_nothing(ids: Tensor, message: str) -> None:
    fields = make_fields()
    before = copy.deepcopy(fields.state_dict())
    with pytest.raises(LivingMoeError, match=message):
        fields.calibrate(ids)
    assert all(torch.equal(value, before[name]) for name, value in fields.state_dict().items())


def test_a_resized_vocabulary_keeps_the_counts_of_the_tokens_that_stay() -> None:
    fields = make_fields()
    fields.observe(torch.tensor([1, 2]))
    counts = fields.new_counts.clone()
    fields.resize_vocab(VOCAB + 8)
    assert torch.equal(fields.new_counts[:, :VOCAB], counts)
    fields.observe(torch.tensor([VOCAB + 7]))
    assert fields.pending_counts()[0].nonzero().flatten().tolist() == [1, 2, VOCAB + 7]
    gate = fields(torch.full((1, 4), VOCAB + 3))
    assert gate.evidence.isfinite().all()
    fields.resize_vocab(10)
    assert torch.equal(fields.new_counts, counts[:, :10])
    assert fields.calibration_ids.max() < 10
    assert fields(torch.tensor([[3, 12]])).evidence.isfinite().all()


# The cache


class GatedMixtral(MixtralForCausalLM):
    """The least model that reads a gate: a stock Mixtral whose head changes where a field is open."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.fields = make_fields(2)
        self.delta = FieldDelta(config.hidden_size, config.vocab_size, 4, 2)
        nn.init.normal_(self.delta.up, std=3.0)
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
            remember(outputs.past_key_values, gate)
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
    assert evidence is not None
    torch.testing.assert_close(evidence, model.gates[0].evidence, rtol=0, atol=1e-12)
    assert cache.get_seq_length() == 12
    assert cache.is_compileable == compiles
    cache.reset()
    assert evidence_history(cache) is None
    again = model(ids, past_key_values=cache)
    torch.testing.assert_close(again.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == 3


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
    remember(cache, make_fields()(prompt()))
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
    assert 0 < torch.cat([gate.index for gate in model.gates], 1).clamp(max=1).float().mean() < 1
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
