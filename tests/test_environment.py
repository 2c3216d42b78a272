"""The promises of conftest.py: offline, one thread, reproducible, uninitialised memory poisoned."""

import os
import random

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

DRAWS: list[tuple[float, ...]] = []
EXAMPLES: dict[int, float] = {}


def test_hub_is_offline() -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert huggingface_hub.constants.HF_HOME == os.environ["HF_HOME"]


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("draw", [1, 2])
def test_every_test_draws_the_same_numbers(draw) -> None:
    DRAWS.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert set(DRAWS) == {DRAWS[0]}


@given(st.integers(0, 3))
def test_every_hypothesis_example_draws_the_same_numbers(number) -> None:
    drawn = float(torch.rand(()))
    assert EXAMPLES.setdefault(0, drawn) == drawn


def test_uninitialised_memory_is_poisoned() -> None:
    like = torch.zeros(4)
    for fresh in (torch.empty(4), torch.empty_like(like), like.new_empty(4), torch.zeros(0).resize_(4)):
        assert fresh.isnan().all()
    assert (torch.empty(4, dtype=torch.long) == torch.iinfo(torch.long).max).all()
