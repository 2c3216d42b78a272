"""A block's escape: entered without a trace, learns from its first step, sees one token at a time, leaves smoothly."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import EscapeConfig
from living_moe.modeling_living_moe.escape import module
from living_moe.modeling_living_moe.escape.module import CLOSED, LEAVING, OPEN, Escape

FEATURES = 12
SPACES = ("poincare", "fourier")
every_space = pytest.mark.parametrize("space", SPACES)


def escape(space: str, features: int = FEATURES, **settings: int) -> Escape:
    return Escape(features, EscapeConfig(space=space, **settings), layer=3)


def tokens(count: int = 9, features: int = FEATURES, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def opened(space: str, gate: float = 0.0, **settings: int) -> Escape:
    found = escape(space, **settings)
    found.open(1)
    with torch.no_grad():
        found.gate.fill_(gate)
    return found


def bits(x: Tensor) -> Tensor:
    return x.detach().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()])


@every_space
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [0.0, -0.0, 1e-7, 1.0, 3e4])
def test_entering_changes_no_bit(space: str, dtype: torch.dtype, size: float) -> None:
    x = (tokens() * size).to(dtype)
    block = escape(space)
    assert block(x) is x, "a closed escape computes nothing"
    block.open(1)
    assert torch.equal(bits(block(x)), bits(x))


@every_space
def test_not_even_where_the_other_space_has_no_answer(space: str) -> None:
    block, x = opened(space), tokens()
    block.map = torch.nn.Module()
    block.map.forward = lambda x: x * torch.inf  # type: ignore[method-assign]
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.gate.grad is not None and block.gate.grad.isfinite()


@every_space
def test_a_token_without_an_answer_there_stays_here_and_stops_no_other(space: str) -> None:
    block, x = opened(space, gate=0.5), tokens()
    there = torch.nn.Linear(FEATURES, FEATURES)
    block.map = torch.nn.Module()
    block.map.forward = lambda x: there(x).index_fill(0, torch.tensor([2]), torch.nan)  # type: ignore[method-assign]
    output = block(x)
    assert torch.equal(output[2], x[2]) and output.isfinite().all()
    block.map.forward = there.forward  # type: ignore[method-assign]
    rest = torch.arange(len(x)) != 2
    torch.testing.assert_close(output[rest], block(x)[rest])
    output.square().sum().backward()
    assert block.gate.grad is not None and block.gate.grad.isfinite()


@every_space
def test_a_token_that_overflowed_spoils_no_gradient(space: str) -> None:
    block, x = opened(space, gate=0.5), tokens().requires_grad_()
    rest = torch.arange(len(x)) != 2
    block(x)[rest].square().sum().backward()
    wanted = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    spoiled = x.detach().clone()
    spoiled[2, 0], spoiled[2, 1] = torch.inf, torch.nan
    spoiled.requires_grad_()
    block(spoiled)[rest].square().sum().backward()
    assert spoiled.grad is not None and spoiled.grad.isfinite().all()
    for parameter, grad in zip(block.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@every_space
@pytest.mark.parametrize("seed", range(4))
def test_the_gate_learns_from_its_first_step_and_the_map_from_its_second(space: str, seed: int) -> None:
    block, x, target = opened(space), tokens(seed=seed), tokens(seed=seed + 50)
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.01)
    (block(x) - target).square().mean().backward()
    assert block.gate.grad.abs() > 1e-5
    assert all(not p.grad.any() for name, p in block.named_parameters() if name != "gate")
    optimizer.step()
    optimizer.zero_grad()
    (block(x) - target).square().mean().backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in block.parameters())


@every_space
def test_gradients_through_the_gate_are_those_of_the_formula(space: str) -> None:
    for gate in (0.0, 0.4, -1.2):
        block, weight = opened(space, gate).double(), tokens(seed=8, dtype=torch.float64)
        plain, x = copy.deepcopy(block), tokens(dtype=torch.float64).requires_grad_()
        (block(x) * weight).sum().backward()
        y = x.detach().clone().requires_grad_()
        ((y + torch.tanh(plain.gate) * (plain.map(y) - y)) * weight).sum().backward()
        assert torch.allclose(x.grad, y.grad, rtol=1e-10, atol=1e-12)
        for (name, one), other in zip(block.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-8, atol=1e-12), name


@every_space
def test_gradients_of_the_map_are_true(space: str) -> None:
    block = opened(space, 0.5).double()
    names = [name for name, _ in block.named_parameters()]

    def output(x: Tensor, *values: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))
        return found

    values = [p.detach().clone().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(output, (tokens(3, dtype=torch.float64).requires_grad_(), *values), atol=1e-5)


@every_space
def test_the_map_starts_near_the_identity_and_not_on_it(space: str) -> None:
    x = tokens(64, 48)
    away = (escape(space, 48).map(x) - x).norm(dim=-1) / x.norm(dim=-1)
    assert (away > 1e-3).all() and (away < 0.5).all()
    # The first parameters depend on the layer alone, not on what else was drawn.
    torch.manual_seed(99)
    again = escape(space, 48)
    assert torch.equal(again.map(x), escape(space, 48).map(x))
    other = Escape(48, EscapeConfig(space=space), layer=4)
    assert not torch.equal(again.map(x), other.map(x))


@every_space
@settings(max_examples=25)
@given(token=st.integers(0, 8), seed=st.integers(0, 10_000), size=st.sampled_from([0.0, 1.0, 1e20]))
def test_no_token_sees_another(space: str, token: int, seed: int, size: float) -> None:
    block, x = opened(space, 0.7), tokens(seed=seed).view(3, 3, FEATURES)
    changed = x.clone()
    changed.view(9, FEATURES)[token] = tokens(1, seed=seed + 1)[0] * size
    before, after = block(x).view(9, FEATURES), block(changed).view(9, FEATURES)
    others = torch.arange(9) != token
    assert torch.allclose(before[others], after[others], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(before[token], after[token], rtol=1e-6, atol=1e-7)


@every_space
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e4])
def test_outputs_and_gradients_are_finite_in_every_precision(space: str, dtype: torch.dtype, size: float) -> None:
    block = opened(space, 0.9)
    if dtype == torch.bfloat16:
        block.to(dtype)
    x = (tokens() * size).to(dtype).requires_grad_()
    output = block(x)
    assert output.dtype == dtype and output.isfinite().all()
    output.float().mean().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters())


@every_space
def test_autocast_computes_the_map_in_full_precision(space: str) -> None:
    block, x = opened(space, 0.5), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block(x)
    assert torch.equal(inside, block(x))


@every_space
def test_leaving_fades_step_by_step_and_ends_where_it_would_be_without(space: str) -> None:
    block, x = opened(space, 1.5, leave_steps=50, rest_steps=7), tokens()
    map_before = copy.deepcopy(block.map.state_dict())
    outputs = [block(x)]
    block.leave(10)
    assert torch.equal(block(x), outputs[0]), "the decision itself changes nothing"
    for step in range(11, 61):
        assert block.now.state == LEAVING
        assert block.tick(step) == (step == 60)
        outputs.append(block(x))
    assert outputs[-1] is x and block.now.state == CLOSED and block.now.rest_until == 67
    whole = float((outputs[0] - x).detach().norm())
    jumps = [float((after - before).detach().norm()) for before, after in itertools.pairwise(outputs)]
    assert jumps == pytest.approx([whole / 50] * 50, rel=1e-3)
    # The map stays for the next time, the gate does not.
    assert not block.gate.any()
    assert all(torch.equal(value, map_before[name]) for name, value in block.map.state_dict().items())
    block.open(100)
    assert torch.equal(block(x), x) and block.now.state == OPEN and not block.tick(101)


@every_space
def test_a_loaded_escape_is_where_the_saved_one_was(space: str) -> None:
    block, x = opened(space, 0.8, leave_steps=10), tokens()
    block.leave(5)
    block.tick(6)
    again = escape(space, leave_steps=10)
    assert again(x) is x
    again.load_state_dict(block.state_dict())
    assert again.now == block.now and torch.equal(again(x), block(x)) and not torch.equal(again(x), x)


@every_space
def test_on_several_ranks_closed_parameters_take_part_with_a_gradient_of_zero(
    space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "world_size", lambda: 2)
    block, x = escape(space), tokens().requires_grad_()
    output = block(x)
    assert torch.equal(bits(output), bits(x))
    output.square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())
    assert torch.equal(x.grad, 2 * x)
    assert all(p.dim() == 1 for p in block.parameters()), "weight decay would move what is closed"
    block.eval()
    assert block(x) is x


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("space", "poincaré", "Did you mean 'poincare'"),
        ("window", 0, ">= 1"),
        ("leave_steps", 0, ">= 1"),
        ("loss_tolerance", -0.1, ">= 0"),
        ("collapse", 0.0, r"in \(0, 1\]"),
        ("curvature", 0.0, "from 0.001"),
    ],
)
def test_senseless_settings_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"escape.{field}.*{message}"):
        EscapeConfig(**{field: value})
