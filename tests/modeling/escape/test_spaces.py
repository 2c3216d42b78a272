"""There and back is the identity for tokens of any size; the ball's operations are the ball's; phases are kept."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe.modeling_living_moe.escape.spaces import (
    INSIDE,
    MOST_LOG_CURVATURE,
    FourierSpace,
    PoincareBall,
    length,
    root_mean_square,
)

SIZES = st.sampled_from([0.0, 1e-38, 1e-30, 1e-12, 1e-4, 0.3, 1.0, 7.0, 1e3, 1e9, 1e30])


def ball_of(curvature: float) -> PoincareBall:
    return PoincareBall(curvature)


def token(features: int, seed: int, size: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, features, generator=generator, dtype=torch.float64) * size).to(dtype)


def there_and_back(space: PoincareBall | FourierSpace, x: Tensor) -> Tensor:
    with torch.no_grad():
        point, scale = space.forward(x)
        return space.back(point, scale) if isinstance(space, PoincareBall) else space.back(point, scale, x.shape[-1])


def worst(found: Tensor, x: Tensor) -> float:
    """Largest difference of a token over its largest number."""
    assert found.isfinite().all()
    largest = x.abs().amax(dim=-1).double()
    apart = (found.double() - x.double()).abs().amax(dim=-1)
    assert (apart[largest == 0] == 0).all()
    return float((apart / largest.where(largest > 0, 1.0)).max())


@settings(max_examples=150)
@given(
    features=st.integers(1, 300),
    seed=st.integers(0, 10_000),
    size=SIZES,
    curvature=st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e3]),
)
def test_the_ball_and_back_is_the_identity(features: int, seed: int, size: float, curvature: float) -> None:
    x = token(features, seed, size)
    assert worst(there_and_back(ball_of(curvature), x), x) <= (1e-5 if size > 1e-37 else 1e-2)


@settings(max_examples=150)
@given(features=st.integers(1, 300), seed=st.integers(0, 10_000), size=SIZES)
def test_frequencies_and_back_is_the_identity(features: int, seed: int, size: float) -> None:
    x = token(features, seed, size)
    assert worst(there_and_back(FourierSpace(), x), x) <= (1e-5 if size > 1e-37 else 1e-2)


@settings(max_examples=60)
@given(exponents=st.lists(st.integers(-30, 30), min_size=2, max_size=40), seed=st.integers(0, 10_000))
def test_so_it_is_where_features_differ_by_sixty_orders_of_magnitude(exponents: list[int], seed: int) -> None:
    x = token(len(exponents), seed, 1.0) * 10.0 ** torch.tensor(exponents)
    for space in (ball_of(1.0), FourierSpace()):
        assert worst(there_and_back(space, x), x) <= 1e-5


@pytest.mark.parametrize("curvature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_every_token_becomes_a_point_well_inside_the_ball(curvature: float, size: float) -> None:
    ball = ball_of(curvature)
    point, _ = ball(token(64, 1, size))
    radius = ball.curvature.sqrt() * length(point)
    assert (radius < 0.9641).all()
    # Whatever is done there stays inside: sums and stretches far beyond the boundary's reach.
    moved = ball.stretch(torch.full((64,), 50.0), point)
    for _ in range(5):
        moved = ball.add(moved, ball.exp0(token(64, 2, 1e6)))
    assert (ball.curvature.sqrt() * length(moved) < 1).all() and ball.log0(moved).isfinite().all()


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), curvature=st.sampled_from([0.1, 1.0, 9.0]), size=st.floats(1e-6, 1.2))
def test_the_operations_are_those_of_the_ball(seed: int, curvature: float, size: float) -> None:
    """In fp64: exp and log undo each other; 0 ⊕ p = p; -p ⊕ p = 0; left cancellation; translations keep distances."""
    ball = ball_of(curvature).double()
    unit = token(8, seed, 1.0, torch.float64)
    unit = unit / length(unit) / curvature**0.5
    other = token(8, seed + 1, 1.0, torch.float64)
    other = other / length(other) / curvature**0.5
    with torch.no_grad():
        p, q, by = ball.exp0(size * unit), ball.exp0(0.7 * other), ball.exp0(0.4 * other.roll(1, 0))
        assert torch.allclose(ball.log0(p), size * unit, rtol=1e-9, atol=1e-13)
        assert torch.allclose(ball.add(torch.zeros_like(p), p), p)
        assert ball.add(-p, p).abs().max() < 1e-12
        assert torch.allclose(ball.add(-q, ball.add(q, p)), p, rtol=1e-8, atol=1e-12)
        assert torch.allclose(ball.stretch(torch.full((8,), 0.5), p), ball.exp0(0.5 * size * unit), rtol=1e-9)

        def distance(a: Tensor, b: Tensor) -> Tensor:
            return 2 * length(ball.log0(ball.add(-a, b)))

        assert torch.allclose(distance(ball.add(by, p), ball.add(by, q)), distance(p, q), rtol=1e-7)
        # arcosh form of the distance, from another book.
        gap, inside_p, inside_q = (
            (p - q).square(),
            1 - curvature * p.square().sum(-1),
            1 - curvature * q.square().sum(-1),
        )
        arcosh = torch.acosh(1 + 2 * curvature * gap.sum(-1) / (inside_p * inside_q)) / curvature**0.5
        assert torch.allclose(distance(p, q).squeeze(-1), arcosh, rtol=1e-6)


def test_a_sum_on_the_boundary_is_brought_back_inside() -> None:
    ball = ball_of(1.0)
    edge = torch.zeros(1, 4)
    edge[0, 0] = INSIDE
    for _ in range(20):
        edge = ball.add(edge, edge)
    assert bool(length(edge) < 1) and ball.log0(edge).isfinite().all()


@settings(max_examples=40)
@given(features=st.integers(2, 65), seed=st.integers(0, 10_000))
def test_a_spectrum_keeps_phases_and_energy(features: int, seed: int) -> None:
    x = token(features, seed, 1.0)
    spectrum, scale = FourierSpace().forward(x)
    plain = torch.fft.rfft(x, norm="ortho")
    assert torch.allclose(spectrum * scale, plain, atol=1e-5)
    # Shifting features turns phases and leaves amplitudes.
    turned, _ = FourierSpace().forward(x.roll(1, -1))
    assert torch.allclose(turned.abs(), spectrum.abs(), atol=1e-5)


def test_lengths_neither_overflow_nor_vanish_and_have_a_gradient_everywhere() -> None:
    for size in (1e-38, 1e-25, 1.0, 1e25, 1e37):
        x = torch.tensor([[3.0, 4.0]]) * size
        assert float(length(x)) == pytest.approx(5 * size, rel=1e-5)
        assert float(root_mean_square(x)) == pytest.approx(5 * size / 2**0.5, rel=1e-5)
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    length(x).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 30.0])
def test_gradients_of_the_ways_there_and_back_are_true(size: float) -> None:
    ball, fourier = ball_of(0.7).double(), FourierSpace()
    x = (token(5, 3, 1.0, torch.float64) * size).requires_grad_(size > 0)
    weight = token(5, 4, 1.0, torch.float64)

    def ways(x: Tensor, log_curvature: Tensor) -> Tensor:
        point, scale = torch.func.functional_call(ball, {"log_curvature": log_curvature}, (x,))
        spectrum, factor = fourier.forward(x)
        return (point * weight * scale).sum() + fourier.back(spectrum.square(), factor, 5).sum()

    if size:
        log_curvature = torch.tensor([-0.3], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(ways, (x, log_curvature), atol=1e-5, rtol=1e-4)
    else:
        x.requires_grad_(True)
        point, scale = ball(x)
        ball.back(point, scale).sum().backward()
        assert torch.allclose(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("far", [-12.0, 12.0])
def test_a_curvature_that_was_carried_out_of_bounds_comes_back(far: float) -> None:
    ball = ball_of(1.0)
    with torch.no_grad():
        ball.log_curvature.fill_(far)
    bound = math.exp(math.copysign(MOST_LOG_CURVATURE, far))
    assert float(ball.curvature.detach()) == pytest.approx(bound, rel=1e-5)
    optimizer = torch.optim.SGD(ball.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        ball.curvature.log().square().sum().backward()
        optimizer.step()
    assert float(ball.curvature.detach()) == pytest.approx(1.0, abs=1e-3)
