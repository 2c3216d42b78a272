"""Receptive fields of texts whose domains are known, and the oracles: the rules token by token, piece by piece."""

import copy
import functools
import itertools
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from living_moe.configuration.sections import ReceptiveFieldConfig
from living_moe.modeling_living_moe import receptive_field
from living_moe.modeling_living_moe.receptive_field import (
    BOUNDARY,
    FAR,
    FEWEST_PIECES,
    LEAST_DEVIATION,
    SAMPLED_PIECES,
    TIE,
    ReceptiveFields,
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
