"""Text belongs to the field that explains it and is counted there; no field learns another's text; ranks agree."""

import copy
import functools
import itertools
import math
from collections import Counter

import pytest
import torch
from field_models import (
    VOCAB,
    SlowHomes,
    field_text,
    make_fields,
    make_section,
    new_text,
    pending_of,
    slow_holder,
    slow_pieces,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe.modeling_living_moe import receptive_field
from living_moe.modeling_living_moe.receptive_field import (
    BOUNDARY,
    FEWEST_PIECES,
    FIRST_WAKING,
    PIECES_PER_STEP,
    REFRESH_GROWTH,
    SAMPLED_PIECES,
    SLEEPER_PRIORS,
    STREAM_SHARE,
    TIE,
    WAKING_SHARE,
    FieldGate,
    ReceptiveFields,
)

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
