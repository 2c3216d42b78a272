"""Contract of receptive fields: the gate is causal, says the same however the text is cut into passes, keeps what it
cannot tell from the old in the root field, and all of it survives saving; text belongs to the field that explains it,
fields wake for what none explains, and no field learns another's text. The oracles go token by token, piece by piece.
"""

import copy
import functools
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe.configuration.errors import LivingMoeError
from living_moe.configuration.sections import ReceptiveFieldConfig
from living_moe.modeling_living_moe import receptive_field
from living_moe.modeling_living_moe.receptive_field import (
    BOUNDARY,
    FAR,
    FEWEST_PIECES,
    FIRST_WAKING,
    LEAST_DEVIATION,
    PIECES_PER_STEP,
    REFRESH_GROWTH,
    SAMPLED_PIECES,
    SLEEPER_PRIORS,
    STREAM_SHARE,
    TIE,
    WAKING_SHARE,
    FieldGate,
    ReceptiveFields,
    taken_by,
)

VOCAB = 40


def old_text(number: int, seed: int = 1) -> Tensor:
    """Tokens of the domain the model knows: mostly the lower half of the vocabulary."""
    return domain(number, seed, torch.arange(VOCAB) < VOCAB // 2)


def new_text(number: int, seed: int = 2) -> Tensor:
    return domain(number, seed, torch.arange(VOCAB) >= VOCAB // 2)


def field_text(field: int, number: int, seed: int) -> Tensor:
    """Text of the domain that `make_fields` gives to a field; 0 is the root's."""
    if field < 2:
        return old_text(number, seed) if field == 0 else new_text(number, seed)
    return domain(number, seed, torch.arange(VOCAB) % field == 0)


def domain(number: int, seed: int, favoured: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.where(favoured, 1.0, 0.3), number, replacement=True, generator=generator)


def make_section(**config: float) -> ReceptiveFieldConfig:
    return ReceptiveFieldConfig(**{"calibration_tokens": 2048, "prior_tokens": 50.0, **config})  # type: ignore[arg-type]


def make_fields(
    num_fields: int = 1, folded: int = 3000, asleep: Collection[int] = (), **config: float
) -> ReceptiveFields:
    """Calibrated on old text; field 1 has counted new text, further fields other mixtures (none if `folded` is 0)."""
    fields = copy.deepcopy(_fields(num_fields, folded, receptive_field.PIECE, tuple(config.items())))
    sleeping = [field in asleep for field in range(1, num_fields + 1)]
    if folded and any(sleeping):
        fields.awake &= ~torch.tensor(sleeping)
        fields._tables = None
    return fields


@functools.cache
def _fields(num_fields: int, folded: int, piece: int, config: tuple[tuple[str, float], ...]) -> ReceptiveFields:
    fields = ReceptiveFields(make_section(**dict(config)), VOCAB, num_fields)
    fields.calibrate(old_text(4000))
    for field in range(1, num_fields + 1) if folded else ():
        text = field_text(field, folded, seed=field + 1)
        fields.new_counts[field - 1] = torch.bincount(text, minlength=VOCAB)
        pieces = text[: folded // piece * piece].view(-1, piece)[:SAMPLED_PIECES]
        fields.sample_ids[field - 1, : len(pieces)] = pieces.int()
        fields.sampled[field - 1] = len(pieces)
        fields.awake[field - 1] = True
    fields._current_tables()
    return fields


def pending_of(
    fields: ReceptiveFields,
    counts: Tensor | None = None,
    recent: Sequence[int] = (1, 0, 0),
    sampled: Tensor | None = None,
) -> Tensor:
    """What `observe` would leave behind that had seen these counts (F, V), shares, and pieces (F, up to 8, L)."""
    pending = torch.zeros_like(fields.pending())
    its_counts, its_recent, its_sampled = fields._parts(pending)
    its_counts += 0 if counts is None else counts
    its_recent += torch.tensor(recent)
    if sampled is not None:
        its_sampled[:, : sampled.shape[1]] = sampled + 1
    return pending


# The oracles


def slow_densities(fields: ReceptiveFields) -> list[list[float]]:
    """p_f(x), the root's first."""
    old = fields.old_counts.tolist()
    seen = sum(count > 0 for count in old)
    p_old = [(count + seen / fields.vocab_size) / (sum(old) + seen) for count in old]
    densities, prior = [p_old], fields.config.prior_tokens
    for counts in fields.new_counts.tolist():
        total = sum(counts) + prior
        densities.append([(c + prior * p) / total for c, p in zip(counts, p_old, strict=True)])
    return densities


def slow_evidence(
    fields: ReceptiveFields,
    text: list[int],
    real: list[bool] | None = None,
    position: list[int] | None = None,
    densities: list[list[float]] | None = None,
) -> list[list[float]]:
    """Evidence of the newborn fields after each token of one row."""
    root, *newborn = slow_densities(fields) if densities is None else densities
    decay, state, states = fields.config.decay, [0.0] * len(newborn), []
    for t, token in enumerate(text):
        if real is None or real[t]:
            if position is not None and position[t] == 0:
                state = [0.0] * len(newborn)
            for f, density in enumerate(newborn):
                ratio = math.log(density[token]) - math.log(root[token]) if 0 <= token < len(root) else 0.0
                state[f] = decay * state[f] + (1 - decay) * ratio
        states.append(list(state))
    return states


def own_texts(fields: ReceptiveFields) -> list[list[list[int]]]:
    """Per field, the root first, the contiguous texts of its sample."""
    rows = [fields.calibration_ids.unsqueeze(0), *fields.sample_ids]
    texts = []
    for row in rows:
        groups = [itertools.groupby(line, lambda token: token != BOUNDARY) for line in row.tolist()]
        texts.append([list(tokens) for line in groups for known, tokens in line if known])
    return texts


def slow_thresholds(fields: ReceptiveFields) -> list[list[float]]:
    """What field f must exceed each older field by: row f - 1, the root first."""
    count, densities = fields.num_fields, slow_densities(fields)
    thresholds = [[0.0] * count for _ in range(count)]
    for older, texts in enumerate(own_texts(fields)):
        states = [state for text in texts for state in slow_evidence(fields, text, densities=densities)]
        for younger in range(older + 1, count + 1) if states else ():
            gaps = sorted(state[younger - 1] - (state[older - 1] if older else 0.0) for state in states)
            stay = math.ceil(fields.config.quantile * len(gaps))
            halfway = (gaps[stay - 1] + gaps[min(stay, len(gaps) - 1)]) / 2
            thresholds[younger - 1][older] = max(0.0, halfway)
    return thresholds


@functools.cache
def thresholds_of(num_fields: int, decay: float, quantile: float) -> list[list[float]]:
    return slow_thresholds(make_fields(num_fields, decay=decay, quantile=quantile))


def slow_holder(
    evidence: Sequence[float], thresholds: Sequence[Sequence[float]], awake: Sequence[bool], margin: float = 0.0
) -> int | None:
    """The field that has a token; None where a comparison hangs on less than `margin`."""
    holder = 0
    for younger in range(1, len(awake) + 1):
        if not awake[younger - 1]:
            continue
        lead = evidence[younger - 1] - (evidence[holder - 1] if holder > 0 else 0.0)
        if abs(lead - thresholds[younger - 1][holder]) < margin:
            return None
        if lead > thresholds[younger - 1][holder]:
            holder = younger
    return holder


def slow_pieces(shape: tuple[int, int], position: list[list[int]] | None) -> list[list[tuple[int, int]]]:
    """Places (row, column) of each piece of a batch."""
    pieces: list[list[tuple[int, int]]] = []
    for row, column in itertools.product(range(shape[0]), range(shape[1])):
        at = column if position is None else position[row][column]
        if column == 0 or at % receptive_field.PIECE == 0:
            pieces.append([])
        pieces[-1].append((row, column))
    return pieces


class SlowHomes:
    """Which field a piece belongs to, from its tokens one by one."""

    def __init__(self, fields: ReceptiveFields) -> None:
        self.densities, self.length = slow_densities(fields), receptive_field.PIECE
        self.own = []
        for density, texts in zip(self.densities, own_texts(fields), strict=True):
            length = self.length
            pieces = [text[start : start + length] for text in texts for start in range(0, len(text), length)]
            if not pieces:
                self.own.append((0.0, math.inf))
                continue
            mean = self.average(density, [token for piece in pieces for token in piece])
            squares = [(self.average(density, piece) - mean) ** 2 * len(piece) / length for piece in pieces]
            spread = math.sqrt(sum(squares) / len(squares)) if len(pieces) >= FEWEST_PIECES else math.inf
            self.own.append((mean, max(spread, LEAST_DEVIATION)))

    @staticmethod
    def average(density: list[float], piece: list[int]) -> float:
        return sum(math.log(density[token]) for token in piece) / len(piece)

    def of(self, fields: ReceptiveFields, piece: list[int], margin: float = 1e-9) -> tuple[int, int] | None:
        """The field, and the other that may learn the piece meanwhile (the last if none may); None where a comparison
        hangs on less than `margin`."""
        config, last = fields.config, fields.num_fields
        likelihoods, explaining, near, gaps = [], [], [], []
        for field, (density, (mean, spread)) in enumerate(zip(self.densities, self.own, strict=True)):
            likelihood = self.average(density, piece)
            score = (likelihood - mean) / spread * math.sqrt(len(piece) / self.length)
            gaps += [abs(score + config.novelty), abs(score + FAR * config.novelty)]
            if score >= -FAR * config.novelty and field != last:
                near.append(field)
            likelihoods.append(likelihood)
            if score >= -config.novelty:
                explaining.append(field)
        tokens = int(fields.new_counts[-1].sum() + fields.waiting_counts[-1].sum())
        if last == config.max_fields and fields.awake[-1] and tokens >= config.field_tokens:
            candidates = explaining or list(range(last + 1))
            home = meanwhile = max(candidates, key=lambda field: likelihoods[field])
        else:
            candidates = [field for field in explaining if field != last]
            gain = likelihoods[last] - max(likelihoods[:last])
            gaps.append(abs(gain + TIE))
            home = last
            if candidates and gain <= -TIE:
                home = max(candidates, key=lambda field: likelihoods[field])
            everything, mine = fields.latest.tolist()
            if not candidates and mine < receptive_field.NEWS_SHARE * everything:
                candidates = near
            meanwhile = max(candidates, key=lambda field: likelihoods[field], default=last)
        gaps += [abs(likelihoods[meanwhile] - likelihoods[field]) for field in candidates if field != meanwhile]
        return None if min(gaps) < margin else (home, meanwhile)


# The gate


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


# Which field text belongs to


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids of changing domains with unknown ones among them, a mask, and positions."""
    rows, length, seed = draw(st.integers(1, 4)), draw(st.integers(1, 60)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    token = torch.arange(VOCAB)
    # The domains of the root and of fields 1 to 3, two that nobody knows, and noise.
    lower, none = token < VOCAB // 2, torch.zeros(VOCAB, dtype=torch.bool)
    known = [lower, ~lower, token % 2 == 0, token % 3 == 0]
    densities = torch.stack([*[mask + 0.3 for mask in known], token % 11 == 0, token == 7, ~none]).float()
    stretch = (torch.rand(rows, length, generator=generator) < 0.1).cumsum(1)
    domains = torch.randint(0, len(densities), (rows, length), generator=generator).gather(
        1, stretch.clamp_max(length - 1)
    )
    ids = torch.multinomial(densities[domains.flatten()], 1, generator=generator).view(rows, length)
    strange = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.1]))
    ids = torch.where(strange, torch.randint(VOCAB, VOCAB + 3, ids.shape, generator=generator), ids)
    ids = torch.where(strange & (ids == VOCAB), -1, ids)
    column, cut = torch.arange(length), torch.randint(0, length, (rows, 1), generator=generator)
    masks = {
        "left": column >= cut,
        "right": column <= cut,
        "random": torch.rand(rows, length, generator=generator) < 0.7,
    }
    mask = masks.get(draw(st.sampled_from(["none", *masks])))
    positions = {
        "shared": column.unsqueeze(0) + 3,
        "packed": torch.where(column < cut, column, column - cut),
        "late": column + cut,
    }
    return ids, mask, positions.get(draw(st.sampled_from(["none", *positions])))


#: What may be true of the youngest field, or of the one before it.
STATES = ("awake", "asleep", "empty", "nearly unknown", "elder asleep")


def fields_of_short_pieces(num_fields: int, state: str) -> tuple[ReceptiveFields, SlowHomes]:
    """Fields that know pieces of 8 tokens, and the slow rule."""
    fields, homes = _fields_of_short_pieces(num_fields, state)
    return copy.deepcopy(fields), homes


@functools.cache
def _fields_of_short_pieces(num_fields: int, state: str) -> tuple[ReceptiveFields, SlowHomes]:
    asleep = {"awake": (), "elder asleep": (num_fields - 1,)}.get(state, (num_fields,))
    fields = make_fields(num_fields, folded=600, asleep=asleep, decay=0.8)
    if state == "empty":
        fields.new_counts[-1] = 0
    if state in ("empty", "nearly unknown"):
        fields.sample_ids[-1, FEWEST_PIECES - 1 if state == "nearly unknown" else 0 :] = BOUNDARY
    fields._tables = None
    fields._current_tables()
    return fields, SlowHomes(fields)


@settings(max_examples=200)
@given(
    batch=batches(),
    num_fields=st.integers(1, 3),
    state=st.sampled_from(STATES),
    novelty=st.sampled_from([0.3, 1.0, 3.0]),
    full=st.booleans(),
    field_tokens=st.sampled_from([600, 601]),
    asked_before=st.booleans(),
    latest=st.sampled_from([[0, 0], [80, 39], [80, 40], [80, 80]]),
)
def test_text_belongs_to_the_field_of_the_slow_rule_and_is_counted_there(
    batch: tuple[Tensor, Tensor | None, Tensor | None],
    num_fields: int,
    state: str,
    novelty: float,
    full: bool,
    field_tokens: int,
    asked_before: bool,
    latest: list[int],
) -> None:
    ids, mask, position = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receptive_field, "PIECE", 8)
        fields, homes = fields_of_short_pieces(num_fields, state)
        most = num_fields if full else num_fields + 1
        fields.config = make_section(novelty=novelty, max_fields=most, field_tokens=field_tokens, decay=0.8)
        fields.latest = torch.tensor(latest)
        gate = fields(ids, mask, position_ids=position)
        belongs = fields.observe(ids, mask, position, gate if asked_before else None)
        pieces = slow_pieces(ids.shape, None if position is None else position.expand(ids.shape).tolist())
        its_counts, its_recent, its_sampled = fields._parts(fields.pending())

    def known(place: tuple[int, int]) -> bool:
        return 0 <= ids[place] < VOCAB and (mask is None or bool(mask[place]))

    texts = [([int(ids[place]) for place in piece if known(place)], piece) for piece in pieces]
    found = [(tokens, piece, homes.of(fields, tokens)) for tokens, piece in texts if tokens]
    homed = [(tokens, piece, *home) for tokens, piece, home in found if home is not None]
    assume(len(homed) == len(found))
    lengths = Counter(home for tokens, _, home, _ in homed for _ in tokens)
    counts = torch.zeros(num_fields + 1, VOCAB, dtype=torch.int64)
    offered: list[list[list[int]]] = [[] for _ in range(num_fields + 1)]
    thresholds, everyone = fields._current_tables().threshold.tolist(), [*fields.awake[:-1].tolist(), True]
    recent = [lengths.total(), lengths[num_fields], 0]
    for tokens, piece, home, meanwhile in homed:
        # A sleeping field counts what another learns meanwhile.
        belonging = meanwhile if home == num_fields and not fields.awake[-1] else home
        assert {int(belongs[place]) for place in filter(known, piece)} == {belonging}
        for field in {home, belonging}:
            counts[field] += torch.bincount(torch.tensor(tokens), minlength=VOCAB)
        offered[home].append([int(ids[place]) if known(place) else BOUNDARY for place in piece])
        for place in filter(known, piece if home == num_fields else ()):
            recent[2] += slow_holder(gate.evidence[place].tolist(), thresholds, everyone) == num_fields
    assert torch.equal(its_counts, counts[1:])
    assert its_recent.tolist() == recent
    for field in range(1, num_fields + 1):
        longest = sorted(offered[field], key=lambda piece: sum(token == BOUNDARY for token in piece) - len(piece))
        expected = torch.full((PIECES_PER_STEP, 8), BOUNDARY)
        for number, piece in enumerate(longest[:PIECES_PER_STEP]):
            expected[number, : len(piece)] = torch.tensor(piece)
        assert torch.equal(its_sampled[field - 1] - 1, expected)


def test_the_last_field_leaves_alone_what_another_makes_likelier_without_explaining_it() -> None:
    fields = ReceptiveFields(make_section(), 4, 2)
    densities = torch.tensor([[0.28, 0.24, 0.24, 0.24], [0.9, 0.03, 0.03, 0.04], [0.4, 0.2, 0.2, 0.2]])
    pieces = torch.stack([torch.multinomial(density, 64 * 128, replacement=True) for density in densities])
    fields.calibrate(pieces[0])
    for field in (1, 2):
        fields.new_counts[field - 1] = torch.bincount(pieces[field], minlength=4)
        fields.sample_ids[field - 1, :64] = pieces[field].view(64, 128)
    fields.awake[0] = True
    fields._tables = None
    text, homes = [0, 0, 0, 0, 0, 0, 1, 2] * 16, SlowHomes(fields)
    root, first, last = (homes.average(density, text) for density in homes.densities)
    assert first > last + TIE and last > root + TIE
    assert (fields.observe(torch.tensor([text])) == 0).all()
    assert homes.of(fields, text) == (0, 0)


def test_only_real_and_known_tokens_are_counted() -> None:
    fields = make_fields(folded=0)
    fields.observe(torch.tensor([[3, 3, 5, -1], [3, VOCAB, 6, 7]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]))
    expected = torch.zeros(1, VOCAB, dtype=torch.int64)
    expected[0, 3], expected[0, 5], expected[0, 6] = 2, 1, 1
    counts, recent, _ = fields._parts(fields.pending())
    assert torch.equal(counts, expected)
    assert recent[:2].tolist() == [4, 4]
    fields.fold(fields.pending())
    assert torch.equal(fields.new_counts + fields.waiting_counts, expected)
    assert fields.pending().sum() == 0
    assert "_pending" not in dict(fields.named_buffers())


def test_batches_between_two_folds_add_up() -> None:
    together, apart = make_fields(2), make_fields(2)
    ids = torch.stack([field_text(field, 256, seed=20) for field in (0, 1, 2)])
    together.observe(ids)
    for row in ids:
        apart.observe(row.unsqueeze(0))
    for one, other in zip(together._parts(together.pending())[:2], apart._parts(apart.pending())[:2], strict=True):
        assert torch.equal(one, other)
    sampled = apart._parts(apart.pending())[2] - 1
    offered = {tuple(piece) for piece in ids.view(-1, receptive_field.PIECE).tolist()}
    kept = [tuple(piece) for piece in sampled.flatten(0, 1).tolist() if piece[0] != BOUNDARY]
    assert kept and set(kept) <= offered


def test_a_field_explains_text_like_its_own_also_when_that_is_perfectly_regular() -> None:
    fields = ReceptiveFields(make_section(), VOCAB, 2)
    regular = torch.arange(4096) % 16
    fields.calibrate(regular)
    fields.new_counts += torch.bincount(new_text(1000), minlength=VOCAB)
    fields._tables = None
    assert (fields.observe(regular[:1024].view(4, 256)) == 0).all()


# What training text changes


@st.composite
def foldings(draw: st.DrawFn) -> list[tuple[list[list[int]], list[int]]]:
    """Per fold: counts (F, 3) and how many tokens there were, the last field's, and those it would take."""
    count = draw(st.integers(1, 3))
    shares = st.lists(st.integers(0, 60), min_size=3, max_size=3).map(lambda values: sorted(values, reverse=True))
    row = st.lists(st.integers(0, 200), min_size=3, max_size=3)
    return draw(
        st.lists(st.tuples(st.lists(row, min_size=count, max_size=count), shares.filter(any)), min_size=1, max_size=12)
    )


@settings(max_examples=60)
@given(steps=foldings(), awake=st.booleans(), prior=st.sampled_from([100, 300, 1000]))
def test_folding_equals_the_slow_bookkeeping(
    steps: list[tuple[list[list[int]], list[int]]], awake: bool, prior: int
) -> None:
    count, memory = len(steps[0][0]), 90
    fields = ReceptiveFields(make_section(prior_tokens=prior), 3, count)
    fields.calibrate(torch.tensor([0, 1, 2]))
    fields.awake[:-1] = True
    fields.awake[-1] = awake
    fields.sampled[-1] = sampled = 1000
    new, waiting, recent = [[0] * 3 for _ in range(count)], [[0] * 3 for _ in range(count)], [0, 0, 0]
    for counts, shares in steps:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(receptive_field, "RECENT", memory)
            fields.fold(pending_of(fields, torch.tensor(counts), shares))
        waiting = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(waiting, counts, strict=True)]
        recent = [old + share for old, share in zip(recent, shares, strict=True)]
        if recent[0] > memory:
            recent = [share * memory // recent[0] for share in recent]
        everyone, mine, taken = recent
        total, least = sum(new[-1]) + sum(waiting[-1]), FIRST_WAKING if count == 1 else prior
        asleep = not awake
        awake = awake or (total >= least and taken > WAKING_SHARE * mine and mine > STREAM_SHARE * everyone)
        halve = asleep and not awake and total > SLEEPER_PRIORS * prior
        if halve or any(sum(w) > REFRESH_GROWTH * (sum(n) + prior) for w, n in zip(waiting, new, strict=True)):
            new = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(new, waiting, strict=True)]
            waiting = [[0] * 3 for _ in range(count)]
        if halve:
            new[-1] = [number // 2 for number in new[-1]]
            sampled //= 2
        assert fields.new_counts.tolist() == new
        assert fields.waiting_counts.tolist() == waiting
        assert fields.recent.tolist() == recent
        assert fields.awake.tolist() == [True] * (count - 1) + [awake]
        assert int(fields.sampled[-1]) == sampled
        assert fields.num_tokens().tolist() == [sum(n) + sum(w) for n, w in zip(new, waiting, strict=True)]


@pytest.mark.parametrize("calibrated", [True, False])
def test_folding_works_before_the_gate_has_compared_any_text(calibrated: bool) -> None:
    fields = make_fields() if calibrated else ReceptiveFields(make_section(), VOCAB)
    before = fields.num_tokens()
    if not calibrated:
        fields.observe(new_text(256).unsqueeze(0))
    fields.fold(fields.pending())
    assert (fields.num_tokens() - before).tolist() == [0 if calibrated else 256]
    assert fields.recent.tolist() == [0, 0, 0]


def test_the_densities_in_use_follow_the_counts_only_when_these_have_grown() -> None:
    fields = make_fields(folded=1000)
    in_use = fields.new_counts.clone()
    small = torch.zeros_like(fields.new_counts)
    small[0, 0] = 60
    fields.fold(pending_of(fields, small))
    assert torch.equal(fields.new_counts, in_use)
    before = fields(new_text(50).unsqueeze(0))
    fields.fold(pending_of(fields, small))
    assert torch.equal(fields.new_counts, in_use + 2 * small)
    assert fields.waiting_counts.sum() == 0
    assert not torch.equal(fields(new_text(50).unsqueeze(0)).evidence, before.evidence)


def test_a_field_that_wakes_opens_at_the_next_pass() -> None:
    fields = make_fields(asleep={1})
    text = new_text(256, seed=5).view(2, 128)
    assert not fields(text).any_open()
    fields.observe(text)
    fields.fold(fields.pending())
    assert (fields(text).index == 1).float().mean() > 0.9


def test_another_field_is_wanted_when_the_last_is_awake_and_mature() -> None:
    fields = make_fields(2, field_tokens=3001, max_fields=3)
    assert not fields.wants_another()
    one = torch.zeros_like(fields.new_counts)
    one[1, 0] = 1
    fields.fold(pending_of(fields, one))
    assert fields.waiting_counts.sum() == 1  # counts that are not in use yet do count
    assert fields.wants_another()
    fields.resize_fields(3)
    assert not fields.wants_another()
    fields.new_counts[-1, 0] = 10_000
    assert not fields.wants_another()  # asleep
    fields.awake[-1] = True
    fields._tables = None
    assert not fields.wants_another()  # as many as it may
    fields.config = make_section(max_fields=4)
    assert not fields.wants_another()
    fields.config = make_section(max_fields=4, field_tokens=10_000)
    assert fields.wants_another()


@given(seed=st.integers(0, 10_000), num_fields=st.integers(1, 4), padded=st.booleans())
def test_no_field_learns_from_text_that_belongs_to_another(seed: int, num_fields: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    fields = make_fields(num_fields, folded=0)
    steps, trained_tokens = [], [0] * num_fields
    for _ in range(2):
        index, belongs = torch.randint(0, num_fields + 1, (2, 3, 9), generator=generator)
        mask = torch.rand(3, 9, generator=generator) < 0.6 if padded else None
        gate = FieldGate(index, torch.randn(3, 9, num_fields))
        steps.append((gate, fields.trained_gate(gate, belongs, mask), belongs, mask))
    for gate, trained, belongs, mask in steps:
        assert trained.evidence is gate.evidence
        for place in itertools.product(range(3), range(9)):
            field = int(trained.index[place])
            assert field == (int(gate.index[place]) if gate.index[place] == belongs[place] else 0)
            if field > 0 and (mask is None or mask[place]):
                trained_tokens[field - 1] += 1
        assert trained.present == tuple(sorted(set(trained.index.flatten().tolist()) - {0}))
    assert fields.since_step is not None and fields.since_step.tolist() == trained_tokens


# Samples of the fields' own texts


@pytest.fixture(scope="module")
def sampled_streams() -> list[list[int]]:
    """Of 8 fields that were offered the pieces 0, 1, ..., 1999: the numbers of those each has kept, by place."""
    return sample_streams(pieces=2000)


def sample_streams(pieces: int) -> list[list[int]]:
    fields = ReceptiveFields(make_section(calibration_tokens=8), 100, num_fields=8)
    blank = torch.full((8, PIECES_PER_STEP, receptive_field.PIECE), BOUNDARY)
    for start in range(0, pieces, PIECES_PER_STEP - 1):
        sampled = blank.clone()
        for number in range(start, min(start + PIECES_PER_STEP - 1, pieces)):
            place = (number - start) * 3 % PIECES_PER_STEP  # gaps, and no order, as ranks and short batches leave
            sampled[:, place, 0], sampled[:, place, 1] = number // 100, number % 100
        fields.fold(pending_of(fields, sampled=sampled))
    assert fields.sampled.tolist() == [pieces] * 8
    assert (fields.sample_ids[:, :, 2:] == BOUNDARY).all()
    return [[100 * high + low for high, low in row[:, :2].tolist()] for row in fields.sample_ids]


def test_the_first_pieces_are_all_kept_and_empty_places_are_not() -> None:
    for kept in sample_streams(pieces=SAMPLED_PIECES - 5):
        assert sorted(number for number in kept if number >= 0) == list(range(SAMPLED_PIECES - 5))
    for kept in sample_streams(pieces=SAMPLED_PIECES):
        assert sorted(kept) == list(range(SAMPLED_PIECES))


def test_every_place_of_a_sample_holds_a_piece_of_its_own_from_all_over_the_stream(
    sampled_streams: list[list[int]],
) -> None:
    for kept in sampled_streams:
        assert len(set(kept)) == SAMPLED_PIECES and set(kept) <= set(range(2000))
        eighths = Counter(number // 250 for number in kept)
        assert all(3 <= eighths[eighth] <= 40 for eighth in range(8))
    assert sample_streams(pieces=300) == sample_streams(pieces=300)


def test_every_part_of_the_stream_has_its_share_of_a_sample(sampled_streams: list[list[int]]) -> None:
    kept = Counter(number // 250 for stream in sampled_streams for number in stream)
    expected = SAMPLED_PIECES * len(sampled_streams) / 8
    # Four standard deviations of a fair draw.
    assert all(abs(kept[eighth] - expected) < 4 * math.sqrt(expected * 7 / 8) for eighth in range(8))


# Two ranks


def test_two_ranks_that_sum_what_they_observed_have_the_state_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, first, second = (make_fields(2, asleep={2}, prior_tokens=500.0) for _ in range(3))
    ranks = (first, second)

    def at(world: int, rank: int) -> None:
        monkeypatch.setattr(receptive_field, "world_size", lambda: world)
        monkeypatch.setattr(receptive_field, "rank", lambda: rank)

    def pieces(ids: Tensor) -> list[Counter[tuple[int, ...]]]:
        return [Counter(tuple(p) for p in field.tolist() if any(t != BOUNDARY for t in p)) for field in ids]

    woken = []
    for step in range(5):
        batch = torch.stack([field_text(field, 250, seed=30 + step) for field in (0, 1, 2, 2)])
        mask = torch.ones_like(batch)
        mask[0, :9] = 0
        at(1, 0)
        belongs = alone.observe(batch, mask)
        expected = alone._parts(alone.pending())
        for rank, fields in enumerate(ranks):
            at(2, rank)
            assert torch.equal(fields.observe(batch[rank::2], mask[rank::2]), belongs[rank::2])
        total = first.pending() + second.pending()
        parts = first._parts(total)
        assert torch.equal(parts[0], expected[0]) and torch.equal(parts[1], expected[1])
        assert pieces(parts[2] - 1) == pieces(expected[2] - 1)
        assert sum(pieces(expected[2] - 1)[1].values()) == 4
        for rank, fields in enumerate(ranks):
            at(2, rank)
            fields.fold(total.clone())
        at(1, 0)
        alone.fold(alone.pending())
        states = [fields.state_dict() for fields in (alone, first, second)]
        assert all(torch.equal(value, states[2][name]) for name, value in states[1].items())
        for name in ("new_counts", "waiting_counts", "recent", "latest", "awake", "sampled"):
            assert torch.equal(states[0][name], states[1][name]), name
        assert pieces(states[0]["sample_ids"]) == pieces(states[1]["sample_ids"])
        woken.append(bool(alone.awake[1]))
        text = torch.cat([batch, batch.flip(0)], dim=1)
        assert torch.equal(first(text).evidence, alone(text).evidence)
        assert torch.equal(first(text).index, second(text).index)
    assert woken[-1]


def test_while_the_last_field_sleeps_another_is_trained_on_what_it_explains_and_on_nothing_else() -> None:
    strange, known = (torch.stack([field_text(field, 256, seed) for seed in (30, 31)]) for field in (2, 1))
    fields = make_fields(2, folded=0)
    fields.new_counts[0] = torch.bincount(field_text(1, 3000, 2), minlength=VOCAB)
    fields.sample_ids[0, :23] = field_text(1, 23 * 128, 2).view(23, 128).int()
    fields.awake[0] = True
    # A copy of the elder: everything is a tie between them.
    fields.new_counts[1] = fields.new_counts[0]
    fields._tables = None
    belongs = fields.observe(torch.cat([known, strange]))
    assert (belongs[:2] == 1).all() and (belongs[2:] == 2).all()
    counts = fields._parts(fields.pending())[0]
    assert counts.sum(dim=1).tolist() == [512, 1024]


def test_what_is_news_does_not_depend_on_which_rank_sees_it() -> None:
    strange, known = (torch.stack([field_text(field, 256, seed) for seed in (30, 31)]) for field in (2, 1))
    alone, first, second = ranks = [make_fields(2, asleep={2}, novelty=4.0) for _ in range(3)]
    for latest in ([1024, 1024], [1024, 256]):
        for fields in ranks:
            fields.latest = torch.tensor(latest)
        belongs = alone.observe(torch.cat([strange, known, known]))
        parts = [first.observe(torch.cat([strange, known[:1]])), second.observe(torch.cat([known[1:], known]))]
        assert torch.equal(torch.cat(parts), belongs)


@pytest.mark.parametrize(("novelty", "outlier"), [(2.0, False), (4.0, True)])
def test_strange_text_is_an_outlier_while_the_last_step_was_familiar_unless_it_is_far_from_all(
    novelty: float, outlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receptive_field, "WAKING_SHARE", 2.0)  # it sleeps on
    strange, known = (torch.stack([field_text(field, 256, seed) for seed in (30, 31)]) for field in (2, 1))
    fields = make_fields(2, asleep={2}, novelty=novelty)
    for batch, familiar in ((strange, False), (known, False), (strange, True), (strange, False)):
        belongs = fields.observe(batch)
        if batch is strange:
            assert (belongs == 2).all() == (not (familiar and outlier)), (familiar, belongs)
        fields.fold(fields.pending())
        fields.fold(fields.pending())  # a step that brings nothing leaves the judgement alone


# A life


class Stream:
    """Receptive fields while a model trains on one domain after another; a domain is a unigram density."""

    vocab = 200

    def __init__(self, alpha: float, **config: float) -> None:
        self.alpha, self.steps = alpha, 0
        sizes = {"calibration_tokens": 8192, "prior_tokens": 500.0, "field_tokens": 4096, **config}
        self.fields = ReceptiveFields(make_section(**sizes), self.vocab)
        self.fields.calibrate(self.text(0, rows=64))

    def text(self, domain: int, rows: int = 4, length: int = 256, seed: int = 0) -> Tensor:
        density = torch.from_numpy(np.random.default_rng(domain).dirichlet(np.full(self.vocab, self.alpha)))
        generator = torch.Generator().manual_seed(1000 * seed + domain)
        return torch.multinomial(density, rows * length, replacement=True, generator=generator).view(rows, length)

    def live(self, steps: int, *rows: tuple[int, int]) -> Iterator[ReceptiveFields]:
        """Training steps on (domain, number of rows); the fields after each."""
        for _ in range(steps):
            self.steps += 1
            ids = torch.cat([self.text(domain, number, seed=self.steps) for domain, number in rows])
            self.step(ids)
            yield self.fields

    def step(self, ids: Tensor) -> None:
        fields, before = self.fields, self.fields.num_fields
        gate = fields(ids)
        belongs = fields.observe(ids, gate=gate)
        trained = fields.trained_gate(gate, belongs, None)
        assert bool(((trained.index == 0) | (trained.index == belongs)).all())
        assert fields.since_step is not None and int(fields.since_step.sum()) == int((trained.index > 0).sum())
        fields.since_step = None
        fields.fold(fields.pending())
        if fields.wants_another():
            assert fields.awake.all() and int(fields.num_tokens()[-1]) >= fields.config.field_tokens
            fields.resize_fields(before + 1)
            assert fields.awake.tolist() == [True] * before + [False]

    def share(self, domain: int, field: int) -> float:
        """Of fresh text of a domain, how much the gate puts into a field."""
        ids = self.text(domain, rows=8, seed=99)
        return (self.fields(ids).index == field).float().mean().item()


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_each_new_domain_wakes_one_field_and_finds_it_again_when_it_returns(alpha: float) -> None:
    stream = Stream(alpha)
    for fields in stream.live(6, (0, 4)):
        assert fields.awake.tolist() == [False]
    for domain in (1, 2, 3):
        awake = [bool(fields.awake[domain - 1]) for fields in stream.live(12, (domain, 4))]
        assert all(awake[3:]), "within a few folds"
        assert fields.awake.tolist() == [True] * domain + [False]
        assert fields.num_fields == domain + 1
    version = fields.version
    assert version == 3
    for domain in (1, 0, 3, 2, 1):
        before = fields.num_tokens()
        for fields in stream.live(6, (domain, 4)):
            assert fields.awake.tolist() == [True, True, True, False]
        grown = fields.num_tokens() - before
        if domain > 0:
            assert grown[domain - 1] > 0.95 * 6 * 1024
        assert grown[:3].sum() - grown[domain - 1] * (domain > 0) < 0.02 * 6 * 1024
    assert fields.version == version
    for domain in (0, 1, 2, 3):
        assert stream.share(domain, field=domain) > 0.97


def test_a_domain_that_comes_mixed_with_known_ones_wakes_its_field_too() -> None:
    stream = Stream(0.3)
    for _ in stream.live(12, (1, 4)):
        pass
    for _ in stream.live(12, (0, 2), (1, 2), (2, 2)):
        pass
    assert stream.fields.awake.tolist() == [True, True, False]
    for domain in (0, 1, 2):
        assert stream.share(domain, field=domain) > 0.95


def test_with_as_many_fields_as_it_may_have_new_text_goes_to_the_nearest() -> None:
    stream = Stream(1.0, max_fields=2)
    for domain in (1, 2):
        for _ in stream.live(12, (domain, 4)):
            pass
    densities = slow_densities(stream.fields)
    assert stream.fields.awake.tolist() == [True, True]
    chosen = set()
    for domain in (3, 4, 5):
        text, before = stream.text(domain, seed=50), stream.fields.num_tokens()
        pieces = text.view(-1, receptive_field.PIECE)
        likelihoods = [[SlowHomes.average(density, piece) for density in densities] for piece in pieces.tolist()]
        nearest = torch.tensor(likelihoods).argmax(dim=1)
        chosen.update(nearest.tolist())
        fields = copy.deepcopy(stream.fields)
        belongs = fields.observe(text)
        assert torch.equal(belongs.view(-1, receptive_field.PIECE), nearest.unsqueeze(1).expand_as(pieces))
        assert (fields(text).index == belongs).float().mean() > 0.5
        fields.fold(fields.pending())
        assert (fields.num_tokens() - before).tolist() == [128 * int((nearest == field).sum()) for field in (1, 2)]
        assert fields.num_fields == 2 and not fields.wants_another()
    assert len(chosen) > 1


def test_a_sleeping_field_follows_what_is_new_by_now() -> None:
    stream, prior = Stream(0.3, prior_tokens=200.0), 200
    for _ in stream.live(20, (0, 11)):
        pass
    for domain in (1, 2):
        for fields in stream.live(15, (0, 10), (domain, 1)):
            assert fields.awake.tolist() == [False]  # too little of the stream
            assert int(fields.num_tokens()) <= SLEEPER_PRIORS * prior
    older, newer = (fields(stream.text(domain, rows=8)).evidence.mean() for domain in (1, 2))
    assert newer > older + 0.5
    awake = [bool(fields.awake[0]) for fields in stream.live(5, (2, 4))]
    assert all(awake[2:])
    assert stream.share(2, field=1) > 0.95


# State


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
