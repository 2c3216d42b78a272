"""Stagnation is two flat trends at once, found on traces made for it, and the same after a resume."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from living_moe.configuration.sections import EscapeConfig
from living_moe.modeling_living_moe.escape.detector import GRADIENT, LOSS, StagnationDetector

WINDOW = 10


def detector(**settings: float) -> StagnationDetector:
    return StagnationDetector(EscapeConfig(space="fourier", window=WINDOW, **{"patience": 2, **settings}))


def show(found: StagnationDetector, loss: list[float], norm: list[float]) -> list[tuple[bool, bool]]:
    """(stagnates, falling) at the end of every window; the gradient is read every fifth step."""
    verdicts = []
    for step, (value, size) in enumerate(zip(loss, norm, strict=True), start=1):
        found.observe(LOSS, torch.tensor(value, dtype=torch.float64))
        if step % 5 == 0:
            found.observe(GRADIENT, torch.tensor(size, dtype=torch.float64))
        if step % WINDOW == 0:
            found.end_window()
            verdicts.append((bool(found.stagnates()), bool(found.falling())))
    return verdicts


def wobbly(level: float, steps: int, seed: int, share: float = 0.01) -> list[float]:
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(seed))
    return (level * (1 + share * noise)).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_two_flat_trends_are_stagnation_after_patience_windows(seed: int) -> None:
    verdicts = show(detector(), wobbly(2.0, 60, seed), wobbly(0.5, 60, seed + 9))
    # The first window has nothing to be compared with.
    assert [stagnates for stagnates, _ in verdicts] == [False, False, True, True, True, True]
    assert not any(falling for _, falling in verdicts)


@pytest.mark.parametrize("trend", [0.97, 1.03])
def test_one_trend_alone_is_no_stagnation(trend: float) -> None:
    moving = [2.0 * trend ** (step / WINDOW * 2) for step in range(80)]
    flat = [2.0] * 80
    # The gradient's tolerance is wider.
    gradient = [2.0 * trend ** (step / WINDOW * 8) for step in range(80)]
    assert not any(stagnates for stagnates, _ in show(detector(), moving, flat))
    assert not any(stagnates for stagnates, _ in show(detector(), flat, gradient))
    assert [falling for _, falling in show(detector(), moving, flat)][1:] == [trend < 1] * 7


def test_a_window_that_moves_begins_the_count_anew() -> None:
    loss = [2.0] * 20 + [1.5] * 40
    verdicts = show(detector(), loss, [1.0] * 60)
    assert verdicts == [
        (False, False), (False, False), (False, True), (False, False), (True, False), (True, False)
    ]  # fmt: skip


def test_what_was_not_measured_is_no_evidence() -> None:
    assert not any(stagnates for stagnates, _ in show(detector(), [math.nan] * 60, [1.0] * 60))
    assert not any(stagnates for stagnates, _ in show(detector(), [2.0] * 60, [math.inf] * 60))
    found = detector()
    for _ in range(60):
        found.observe(LOSS, torch.tensor(9.0), torch.tensor(False))
        found.observe(GRADIENT, torch.tensor(1.0))
    found.end_window()
    assert not found.known[LOSS] and found.known[GRADIENT]
    # A number that is none among others is left out.
    loss = [2.0] * 60
    loss[33] = math.nan
    assert show(detector(), loss, [1.0] * 60)[-1] == (True, False)


def test_a_gradient_of_zero_is_flat() -> None:
    assert show(detector(), [2.0] * 30, [0.0] * 30)[-1] == (True, False)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 59))
def test_a_resumed_detector_says_what_an_uninterrupted_one_does(seed: int, cut: int) -> None:
    loss, norm = wobbly(2.0, 60, seed, 0.02), wobbly(1.0, 60, seed + 1, 0.1)
    one, before = detector(), detector()
    after = detector()
    seen = []
    for step, (value, size) in enumerate(zip(loss, norm, strict=True), start=1):
        for found in {id(each): each for each in (one, before if step <= cut else after)}.values():
            found.observe(LOSS, torch.tensor(value))
            found.observe(GRADIENT, torch.tensor(size))
            if step % WINDOW == 0:
                found.end_window()
        if step == cut:
            after.load_state_dict(before.state_dict())
        if step > cut:
            seen.append(step)
            for name, buffer in one.named_buffers():
                assert torch.equal(buffer, after.get_buffer(name)), (step, name)
    assert seen
