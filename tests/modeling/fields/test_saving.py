"""State of receptive fields: saved, built, copied, resized; and the sample they are calibrated on."""

import copy
import itertools

import pytest
import torch
from field_models import (
    VOCAB,
    field_text,
    make_fields,
    make_section,
    new_text,
    pending_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from living_moe.configuration.errors import LivingMoeError
from living_moe.configuration.sections import ReceptiveFieldConfig
from living_moe.modeling_living_moe import receptive_field
from living_moe.modeling_living_moe.receptive_field import (
    BOUNDARY,
    ReceptiveFields,
)


def test_saved_state_restores_the_gate_bit_for_bit_also_between_refreshes() -> None:
    fields = make_fields(3, asleep={3})
    waiting = torch.ones_like(fields.waiting_counts)
    fields.fold(pending_of(fields, waiting, (30, 20, 10)))
    assert fields.waiting_counts.sum() > 0 and fields.recent.sum() > 0
    restored = ReceptiveFields(make_section(), VOCAB, 3)
    ids = torch.stack([field_text(field, 128, seed=40) for field in range(4)])
    restored(ids)  # builds tables that loading must throw away
    restored.load_state_dict(fields.state_dict())
    for follow_up in (0, 1):
        assert torch.equal(restored(ids).evidence, fields(ids).evidence)
        assert torch.equal(restored(ids).index, fields(ids).index)
        assert torch.equal(restored.observe(ids), fields.observe(ids))
        for each in (restored, fields):
            each.fold(each.pending() + pending_of(each, waiting * 20 * (1 - follow_up)))
    assert bool(fields.awake.all())
    assert all(torch.equal(value, fields.state_dict()[name]) for name, value in restored.state_dict().items())


def test_it_is_built_on_meta_and_filled_by_loading() -> None:
    fields = make_fields(2)
    with torch.device("meta"):
        loaded = ReceptiveFields(make_section(), VOCAB, 2)
    loaded.load_state_dict(fields.state_dict(), assign=True)
    ids = torch.stack([new_text(64), field_text(2, 64, seed=4)])
    assert torch.equal(loaded(ids).evidence, fields(ids).evidence)
    assert torch.equal(loaded(ids).index, fields(ids).index)
    assert torch.equal(loaded.observe(ids), fields.observe(ids))
    with torch.device("meta"):
        fresh = ReceptiveFields(make_section(calibration_tokens=8), VOCAB, 2)
    fresh.to_empty(device="cpu").reset_parameters()
    empty = ReceptiveFields(make_section(calibration_tokens=8), VOCAB, 2).state_dict()
    assert all(torch.equal(value, empty[name]) for name, value in fresh.state_dict().items())


def test_half_precision_and_copies_leave_the_gate_as_it_was() -> None:
    fields = make_fields(2)
    ids = torch.stack([new_text(64), field_text(2, 64, seed=4)])
    expected = fields(ids)
    twin = copy.deepcopy(fields)
    fields.to(torch.bfloat16)._tables = None
    assert torch.equal(fields(ids).evidence, expected.evidence)
    assert torch.equal(fields(ids).index, expected.index)
    twin.fold(pending_of(twin, torch.full_like(twin.new_counts, 1000)))
    assert torch.equal(fields(ids).evidence, expected.evidence)
    assert not torch.equal(twin(ids).evidence, expected.evidence)


def test_kept_fields_answer_bit_for_bit_as_before_when_fields_come_and_go() -> None:
    fields = make_fields(2)
    ids = torch.stack([field_text(field, 300, seed=40) for field in range(3)])
    before, state = fields(ids), copy.deepcopy(fields.state_dict())
    assert before.present == (1, 2)
    fields.observe(ids)
    fields.resize_fields(4)
    assert fields.num_fields == 4 and fields.version == 1
    assert fields.awake.tolist() == [True, True, False, False]
    assert fields.num_tokens()[2:].tolist() == [0, 0] and fields.sampled[2:].tolist() == [0, 0]
    assert (fields.sample_ids[2:] == BOUNDARY).all() and fields.recent.tolist() == [0, 0, 0]
    after = fields(ids)
    assert torch.equal(after.index, before.index)
    assert torch.equal(after.evidence[..., :2], before.evidence)
    assert not after.evidence[..., 2:].any()
    assert torch.equal(fields.threshold[:2], make_fields(2).threshold)
    belongs = fields.observe(ids)
    assert (belongs[1] == 1).all() and (belongs[2] == 2).all()
    fields.fold(fields.pending())
    fields.resize_fields(2)
    fields.load_state_dict(state)
    assert fields.version == 2
    assert torch.equal(fields(ids).evidence, before.evidence)
    fields.resize_fields(1)
    assert torch.equal(fields(ids).evidence, before.evidence[..., :1])
    assert fields(ids).present == (1,)


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
    fields = make_fields(3, asleep={3})
    ids = torch.stack([field_text(field, 128, seed=40) for field in range(3)])
    fields.observe(ids)
    counts = fields.new_counts.clone()
    pending = [part.clone() for part in fields._parts(fields.pending())]
    before = fields(ids)
    fields.resize_vocab(VOCAB + 8)
    assert torch.equal(fields.new_counts[:, :VOCAB], counts) and not fields.new_counts[:, VOCAB:].any()
    grown = fields._parts(fields.pending())
    assert torch.equal(grown[0][:, :VOCAB], pending[0]) and not grown[0][:, VOCAB:].any()
    assert torch.equal(grown[1], pending[1]) and torch.equal(grown[2], pending[2])
    # The root's density makes room for the new tokens, and with it all evidence moves a little.
    torch.testing.assert_close(fields(ids).evidence, before.evidence, rtol=0.05, atol=0.01)
    fields.observe(torch.full((1, 128), VOCAB + 7))
    assert fields._parts(fields.pending())[0][:, VOCAB:].nonzero().tolist() == [[2, 7]]
    assert fields(torch.full((1, 4), VOCAB + 3)).evidence.isfinite().all()
    fields.fold(fields.pending())
    assert fields(torch.full((1, 4), VOCAB + 3)).evidence.isfinite().all()
    counts, samples = fields.new_counts.clone(), fields.sample_ids.clone()
    fields.resize_vocab(10)
    assert torch.equal(fields.new_counts, counts[:, :10])
    assert fields.calibration_ids.max() < 10 and fields.sample_ids.max() < 10
    assert torch.equal(fields.sample_ids, torch.where(samples < 10, samples, BOUNDARY))
    assert fields(torch.tensor([[3, 12]])).evidence.isfinite().all()
    fields.observe(torch.tensor([[3, 12, 9]]))
    fields.fold(fields.pending())


def test_a_vocabulary_that_shrinks_between_observing_and_folding_forgets_removed_tokens() -> None:
    fields, shrinking = make_fields(), make_fields()
    for each in (fields, shrinking):
        each.observe(new_text(256).unsqueeze(0))
    shrinking.resize_vocab(30)
    for each in (fields, shrinking):
        each.fold(each.pending())
    assert torch.equal(shrinking.num_tokens(), (fields.new_counts + fields.waiting_counts)[:, :30].sum(dim=-1))
    assert (fields.sample_ids == 29).any()
    assert torch.equal(shrinking.sample_ids, torch.where(fields.sample_ids < 30, fields.sample_ids, BOUNDARY))
    assert shrinking(torch.tensor([[3, 12]])).evidence.isfinite().all()
