"""Over a life fields wake for what none explains, and find it again when it returns."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from field_models import (
    SlowHomes,
    make_section,
    slow_densities,
)
from torch import Tensor

from living_moe.modeling_living_moe import receptive_field
from living_moe.modeling_living_moe.receptive_field import (
    SLEEPER_PRIORS,
    ReceptiveFields,
)


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
