"""The gate is causal, says the same however the text is cut into passes, and keeps what it cannot tell from the old in
the root field.
"""

import pytest
import torch
from field_models import (
    VOCAB,
    field_text,
    make_fields,
    new_text,
    old_text,
    own_texts,
    slow_evidence,
    slow_holder,
    thresholds_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from living_moe.configuration.sections import ReceptiveFieldConfig
from living_moe.modeling_living_moe import receptive_field
from living_moe.modeling_living_moe.receptive_field import (
    ReceptiveFields,
    taken_by,
)


@settings(max_examples=60)
@given(
    length=st.integers(1, 70),
    num_fields=st.integers(1, 3),
    asleep=st.sets(st.integers(1, 3), max_size=2),
    decay=st.sampled_from([0.0, 0.5, 0.97]),
    padded=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_gate_equals_the_recurrence_token_by_token(
    length: int, num_fields: int, asleep: set[int], decay: float, padded: bool, packed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    fields = make_fields(num_fields, asleep=asleep, decay=decay, quantile=0.9)
    ids = torch.randint(-1, VOCAB + 2, (3, length), generator=generator)
    mask = torch.rand(3, length, generator=generator) < 0.6 if padded else None
    position = torch.randint(0, 4, (3, length), generator=generator) if packed else None
    gate = fields(ids, mask, position_ids=position)
    thresholds, awake = thresholds_of(num_fields, decay, 0.9), fields.awake.tolist()
    for row in range(3):
        real = None if mask is None else mask[row].tolist()
        at = None if position is None else position[row].tolist()
        states = slow_evidence(fields, ids[row].tolist(), real, at)
        torch.testing.assert_close(gate.evidence[row], torch.tensor(states, dtype=torch.float64), rtol=0, atol=1e-12)
        for index, state in zip(gate.index[row].tolist(), states, strict=True):
            assert slow_holder(state, thresholds, awake, margin=1e-12) in (index, None)
    assert gate.any_open() == bool((gate.index > 0).any())
    assert gate.present == tuple(sorted(set(gate.index.flatten().tolist()) - {0}))


@st.composite
def tournaments(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[bool]]:
    """Evidence per token, thresholds and who is awake, in whole numbers so that ties happen."""
    count = draw(st.integers(1, 5))
    row = st.lists(st.integers(-4, 4), min_size=count, max_size=count)
    threshold = st.lists(st.integers(0, 4), min_size=count, max_size=count)
    awake = st.lists(st.booleans(), min_size=count, max_size=count)
    tokens = st.lists(row, min_size=1, max_size=12)
    return draw(tokens), draw(st.lists(threshold, min_size=count, max_size=count)), draw(awake)


@given(tournaments())
def test_a_token_passes_to_younger_fields_as_in_the_tournament_one_by_one(
    drawn: tuple[list[list[int]], list[list[int]], list[bool]],
) -> None:
    evidence, thresholds, awake = drawn
    taken = taken_by(torch.tensor(evidence).double(), torch.tensor(thresholds).double(), awake)
    assert taken.tolist() == [slow_holder(state, thresholds, awake) for state in evidence]
    assert taken_by(torch.tensor(evidence[0]).double(), torch.tensor(thresholds).double(), awake) == taken[0]


@pytest.mark.parametrize(("decay", "quantile"), [(0.5, 0.9), (0.9, 0.5), (0.0, 1.0), (0.97, 0.97)])
def test_thresholds_are_quantiles_of_the_older_fields_own_texts(decay: float, quantile: float) -> None:
    fields = make_fields(3, decay=decay, quantile=quantile)
    thresholds = torch.tensor(thresholds_of(3, decay, quantile), dtype=torch.float64)
    torch.testing.assert_close(fields._current_tables().threshold, thresholds, rtol=0, atol=1e-12)
    assert torch.equal(fields.threshold, fields._current_tables().threshold[:, 0])


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 1.0])
def test_a_younger_field_takes_at_most_one_minus_quantile_of_an_older_ones_sample(quantile: float) -> None:
    # Densities so near each other that thresholds of zero would let much more go.
    fields = make_fields(3, decay=0.3, quantile=quantile)
    mixture = fields.new_counts.sum(dim=0)
    fields.new_counts += mixture
    fields._tables = None
    thresholds, binding = fields._current_tables().threshold, 0
    for older, texts in enumerate(own_texts(fields)):
        evidence = torch.cat([fields(torch.tensor([text])).evidence[0] for text in texts])
        for younger in range(older + 1, 4):
            gap = evidence[:, younger - 1] - (evidence[:, older - 1] if older else 0.0)
            share = (gap > thresholds[younger - 1, older]).double().mean().item()
            assert share <= 1 - quantile + 1e-9
            if thresholds[younger - 1, older] > 0:
                assert share == pytest.approx(1 - quantile, abs=2e-3)
                binding += 1
            before = taken_by(evidence, thresholds, [field == older for field in (1, 2, 3)])
            after = taken_by(evidence, thresholds, [field in (older, younger) for field in (1, 2, 3)])
            lost = ((before == older) & (after == younger)).double().mean().item()
            assert lost <= 1 - quantile + 1e-9
    assert binding == (3 + 2 + 1 if quantile > 0.5 else 0)


@settings(max_examples=60)
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
    fields = make_fields(2, folded=0)
    fields.awake.fill_(True)
    fields._tables = None
    gate = fields(torch.randint(0, VOCAB, (4, 100)))
    assert torch.equal(gate.evidence, torch.zeros_like(gate.evidence))
    assert not gate.any_open()


def test_a_field_asleep_has_evidence_and_no_token() -> None:
    awake, asleep = make_fields(2), make_fields(2, asleep={2})
    ids = field_text(2, 400, seed=9).view(4, 100)
    assert (awake(ids).index == 2).float().mean() > 0.5
    assert not (asleep(ids).index == 2).any()
    assert torch.equal(asleep(ids).evidence, awake(ids).evidence)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 1.0])
def test_at_most_one_minus_quantile_of_the_calibration_tokens_leave_the_root(quantile: float) -> None:
    # New text so near the old that a threshold of zero would let many old tokens out.
    section = ReceptiveFieldConfig(quantile=quantile, calibration_tokens=4 * (receptive_field.WINDOW + 1), decay=0.5)
    fields = ReceptiveFields(section, VOCAB)
    fields.calibrate(old_text(4000))
    fields.new_counts[0] = torch.bincount(torch.cat([old_text(9000, seed=3), new_text(3000)]), minlength=VOCAB)
    fields.awake.fill_(True)
    fields._tables = None
    windows = fields.calibration_ids.reshape(4, receptive_field.WINDOW + 1)[:, :-1]
    opened = (fields(windows).index > 0).float().mean().item()
    assert opened <= 1 - quantile + 1e-6
    assert opened == pytest.approx(1 - quantile, abs=2e-3) or fields.threshold.item() == 0


def test_the_threshold_is_never_below_zero() -> None:
    fields = make_fields(3, quantile=0.5)
    windows = fields.calibration_ids[: receptive_field.WINDOW].unsqueeze(0)
    assert (fields(windows).evidence.flatten(0, 1).median(dim=0).values < 0).all()
    assert fields.threshold.tolist() == [0.0, 0.0, 0.0]


def test_without_calibration_everything_is_open_and_one_warning_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(receptive_field.logger, "warning_once", warned.append)
    fields = ReceptiveFields(ReceptiveFieldConfig(), VOCAB)
    ids = torch.randint(0, VOCAB, (2, 5))
    gate = fields(ids)
    assert torch.equal(gate.index, torch.ones(2, 5, dtype=torch.int64))
    assert gate.any_open() and gate.present == (1,)
    assert "model.calibrate" in warned[0]
    assert torch.equal(gate.evidence, torch.zeros(2, 5, 1, dtype=gate.evidence.dtype))
    assert torch.equal(fields.observe(ids, gate=gate), gate.index)
    assert torch.equal(fields.trained_gate(gate, gate.index, None).index, gate.index)
    assert not fields(ids[:, :0]).any_open()
