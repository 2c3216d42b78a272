"""The presynaptic micro-model: against a loop that spells its equations out, and within its bounds whatever happens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe.modeling_living_moe.synapse.presynaptic import (
    MOLECULES,
    SCALARS,
    STATE_SIZE,
    VESICLES,
    Presynapse,
    PresynapticState,
    Rates,
    advance,
    chunk_weights,
    release_probability,
    released_content,
    rest,
    sum_up,
)
from living_moe.modeling_living_moe.synapse.router import FIRST_RELEASE, binomial_release

EDGES, TURN = 6, 8.0


def presynapse(spread: float = 0.0, seed: int = 0) -> Presynapse:
    module = Presynapse()
    generator = torch.Generator().manual_seed(seed)
    module.scalars.data = torch.randn(len(SCALARS), generator=generator) * spread
    return module


def expression(spread: float = 1.0, seed: int = 0, edges: int = EDGES) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(edges, len(MOLECULES), generator=generator) * spread


def drives(tokens: int, seed: int = 0, sequences: int = 2, peaked: float = 2.0, edges: int = EDGES) -> Tensor:
    """Soft routing that prefers some: (G, T, N), a token's sums to one."""
    generator = torch.Generator().manual_seed(seed + 2)
    scores = torch.randn(sequences, tokens, edges, generator=generator)
    return torch.softmax((scores + 0.5 * torch.randn(edges, generator=generator)) * peaked, dim=-1)


def over(rates: Rates, sequences: int) -> Rates:
    return Rates(*(rate.expand(sequences, *rate.shape) for rate in rates))


def run(drive: Tensor, rates: Rates, chunk: int, sample=None) -> tuple[Tensor, PresynapticState]:
    """Contents that chunks start with, (G, chunks, N), and the last state."""
    wide = over(rates, drive.shape[0])
    weights, state, contents = chunk_weights(rates, chunk), rest(wide), []
    probability = release_probability(state.calcium, wide)
    for part in drive.split(chunk, dim=1):
        contents.append(released_content(state, probability, wide))
        state, probability = advance(state, sum_up(part, weights), weights, wide, sample)
    return torch.stack(contents, dim=1), state


def spelt_out(drive: list[float], edge: dict[str, float]) -> list[dict[str, float]]:
    """One edge, token by token, each equation as in docs/synapse.md; the states after each token."""
    docked = VESICLES * edge["docking"] / (edge["docking"] + edge["undocking"])
    now = dict(C=0.0, Q=1.0, E=1.0, D=docked, R=VESICLES - docked, U=0.0, V=0.0)
    states = []
    for a in drive:
        C, Q, E, D, R, U, V = (now[name] for name in "CQEDRUV")
        fast = ((C + edge["influx"]) * edge["per_syt1"]) ** 4
        slow, tail = C**2 * edge["per_syt7"], C * edge["per_doc2"]
        sensors = ((edge["past_syt1"], fast), (edge["past_syt7"], slow), (edge["past_doc2"], tail))
        p = 1 - math.prod(1 - (1 - past) * x / (1 + x) for past, x in sensors)
        vigour = 1.5 * E / (E + 0.5)
        priming, docking, late = edge["priming"] * vigour, edge["docking"] * vigour, edge["late"] * vigour
        leaves = a * Q * p
        kept = Q * (1 - 0.5 * a * p)
        undocked = edge["undocking"] * (D - leaves * D)
        now = dict(
            C=edge["decay"] * (C + edge["influx"] * a),
            Q=kept + priming * (1 - kept),
            E=0.0,
            D=D - leaves * D - undocked + docking * R,
            R=R - docking * R + undocked + late * V,
            U=U + leaves * D - edge["early"] * U,
            V=V + edge["early"] * U - late * V,
        )
        mean_D, mean_U, mean_V = (D + now["D"]) / 2, (U + now["U"]) / 2, (V + now["V"]) / 2
        cost = 0.02 * leaves * mean_D + 0.01 * edge["early"] * mean_U + 0.01 * late * mean_V
        cost += 0.02 * priming * (1 - Q)
        left = E / (1 + cost)
        now["E"] = left + edge["supply"] * (1 - left)
        states.append(now)
    return states


def test_a_step_of_one_token_is_the_equations_spelt_out() -> None:
    rates = presynapse(0.5).rates(expression(), TURN)
    drive = drives(40, sequences=1)
    _, state = run(drive, rates, chunk=1)
    for edge in range(EDGES):
        of_edge = {name: value[edge].item() for name, value in rates._asdict().items()}
        last = spelt_out(drive[0, :, edge].tolist(), of_edge)[-1]
        found = [state.calcium[0, edge], state.snare[0, edge], state.energy[0, edge], *state.pools[0, edge]]
        for value, name in zip(found, "CQEDUVR", strict=True):
            assert value.item() == pytest.approx(last[name], rel=2e-4, abs=1e-5), name


def test_calcium_of_a_chunk_is_exact() -> None:
    rates = presynapse().rates(expression(), TURN)
    drive = drives(64)
    slow, fast = run(drive, rates, 1)[1], run(drive, rates, 32)[1]
    torch.testing.assert_close(fast.calcium, slow.calcium, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("chunk", "peaked", "mean", "most"),
    [(8, 1.0, 0.01, 0.1), (32, 1.0, 0.01, 0.2), (32, 2.0, 0.04, 0.7), (64, 1.0, 0.02, 0.3)],
)
def test_a_chunk_of_a_turn_at_most_is_close_to_its_tokens(chunk: int, peaked: float, mean: float, most: float) -> None:
    """Errors in the log of what edges release, at the starts of chunks, against step size 1."""
    rates = presynapse().rates(torch.zeros(64, len(MOLECULES)), 64.0)
    drive = drives(512, peaked=peaked, edges=64)
    with torch.no_grad():
        slow, fast = run(drive, rates, 1)[0][:, ::chunk].log(), run(drive, rates, chunk)[0].log()
    error = (fast - slow).abs()
    assert error.mean() <= mean and error.max() <= most
    assert slow[:, 1:].std() > 10 * error.mean()


def test_shorter_chunks_are_closer() -> None:
    """Chunks of several turns are coarse: their error falls with their length."""
    rates = presynapse().rates(torch.zeros(EDGES, len(MOLECULES)), TURN)
    drive = drives(256, peaked=1.0)
    with torch.no_grad():
        slow = run(drive, rates, 1)[0].log()
        errors = [(run(drive, rates, c)[0].log() - slow[:, ::c]).abs().mean().item() for c in (2, 4, 8, 32)]
    assert errors == sorted(errors) and errors[0] < 0.03 and errors[-1] < 0.3


def test_without_drive_the_state_rests() -> None:
    rates = presynapse(1.0).rates(expression(), TURN)
    wide = over(rates, 2)
    _, state = run(torch.zeros(2, 640, EDGES), rates, 32)
    for now, then in zip(state, rest(wide), strict=True):
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-4)


def test_a_rested_edge_of_medium_expression_releases_about_what_the_running_mean_starts_from() -> None:
    rates = presynapse().rates(torch.zeros(1, len(MOLECULES)), 64.0)
    assert run(torch.zeros(1, 1, 1), rates, 1)[0].item() == pytest.approx(FIRST_RELEASE, rel=0.05)


def test_use_tires_and_rest_restores() -> None:
    rates = presynapse().rates(torch.zeros(1, len(MOLECULES)), 8.0)
    drive = torch.cat([torch.ones(1, 64, 1), torch.zeros(1, 512, 1)], dim=1)
    with torch.no_grad():
        contents, _ = run(drive, rates, 1)
    fresh, tired, rested = contents[0, 0, 0], contents[0, 64, 0], contents[0, -1, 0]
    assert tired < 0.4 * fresh
    assert rested.item() == pytest.approx(fresh.item(), rel=0.05)


def test_a_spike_primes_before_it_tires() -> None:
    """Facilitation: calcium that is left raises the next release where few vesicles were used."""
    vectors = torch.zeros(1, len(MOLECULES))
    vectors[0, MOLECULES.index("syt7")], vectors[0, MOLECULES.index("syt1")] = 3.0, -2.0
    rates = presynapse().rates(vectors, 8.0)
    drive = torch.zeros(1, 3, 1)
    drive[0, 0] = 1.0
    contents, _ = run(drive, rates, 1)
    assert contents[0, 1, 0] > contents[0, 0, 0]


#: What more of each molecule does at once: to which rate, and in which direction.
EFFECTS = {
    "pv": ("decay", -1), "cam": ("decay", 1), "rim": ("influx", 1), "munc13": ("priming", 1), "munc18": ("priming", -1),
    "nsf": ("priming", 1), "csp": ("priming", 1), "syt1": ("past_syt1", -1), "syt7": ("past_syt7", -1),
    "complexin": ("per_syt1", -1), "doc2": ("past_doc2", -1), "synapsin": ("docking", 1), "actin": ("docking", 1),
    "clathrin": ("early", 1), "dynamin": ("early", 1), "rab": ("late", 1), "v_atpase": ("late", 1),
    "vdac": ("supply", 1), "vglut": ("quantum", 1), "sv2": ("quantum", 1),
}  # fmt: skip


@pytest.mark.parametrize("molecule", MOLECULES)
def test_each_molecule_moves_its_rate_in_its_direction(molecule: str) -> None:
    module = presynapse()
    more = torch.zeros(1, len(MOLECULES))
    more[0, MOLECULES.index(molecule)] = 1.0
    name, sign = EFFECTS[molecule]
    before = getattr(module.rates(torch.zeros_like(more), TURN), name)
    assert (getattr(module.rates(more, TURN), name) - before).item() * sign > 1e-4


@pytest.mark.parametrize("chunk", [1, 16])
def test_gradients_reach_every_component_and_every_scalar(chunk: int) -> None:
    module, vectors = presynapse(0.2), expression(0.3).requires_grad_()
    contents, _ = run(drives(64), module.rates(vectors, TURN), chunk)
    contents.log().square().sum().backward()
    assert (vectors.grad.abs().amax(dim=0) > 1e-6).all()
    assert (module.scalars.grad.abs() > 1e-6).all()


def test_gradients_of_a_chunk_are_those_of_finite_differences() -> None:
    module, vectors = presynapse(0.2), expression(0.3, edges=2)
    rates = Rates(*(rate.detach().double() for rate in module.rates(vectors, TURN)))
    drive = drives(16)[..., :2].double()

    def contents(drive: Tensor, *rates: Tensor) -> Tensor:
        return run(drive, Rates(*rates), 8)[0]

    inputs = [tensor.requires_grad_() for tensor in (drive, *rates)]
    assert torch.autograd.gradcheck(contents, inputs)


# -- bounds ------------------------------------------------------------------------------------------------------------


def check_bounds(state: PresynapticState, rates: Rates) -> None:
    assert all(torch.isfinite(part).all() for part in state)
    assert (state.calcium >= 0).all()
    assert (state.calcium <= 1.001 * rates.influx * rates.decay / (1 - rates.decay)).all()
    for part in (state.snare, state.energy):
        assert (part >= 0).all() and (part <= 1 + 1e-5).all()
    assert (state.pools >= 0).all()
    torch.testing.assert_close(state.pools.sum(-1), torch.full_like(state.snare, VESICLES), rtol=1e-5, atol=0)


KINDS = ("nothing", "everything", "noise", "bursts", "one")


def any_drive(kind: str, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, tokens, EDGES, generator=generator)
    if kind == "nothing":
        return torch.zeros_like(noise)
    if kind == "everything":
        return torch.ones_like(noise)
    if kind == "bursts":
        return (torch.sin(torch.arange(tokens) / 50.0)[None, :, None] > noise - 0.5).float()
    if kind == "one":
        return torch.nn.functional.one_hot(torch.zeros(1, tokens, dtype=torch.int64), EDGES).float()
    return noise


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    chunk=st.sampled_from([1, 3, 32]),
    turn=st.sampled_from([1.0, 2.0, 64.0, 8192.0]),
    stochastic=st.booleans(),
)
def test_pools_are_conserved_and_states_bounded_whatever_the_parameters_and_the_drive(
    kind: str, seed: int, spread: float, chunk: int, turn: float, stochastic: bool
) -> None:
    with torch.no_grad():
        rates = presynapse(spread, seed).rates(expression(spread, seed), turn)
        sample = binomial_release((seed, 0, 0), 1.0, (1, EDGES), torch.device("cpu")) if stochastic else None
        contents, state = run(any_drive(kind, 96, seed), rates, chunk, sample)
    check_bounds(state, rates)
    assert torch.isfinite(contents).all() and (contents >= 0).all()


def hostile_drives(tokens: int, seed: int) -> Tensor:
    """All of `KINDS`, and drives that flip at every token and at random: (kinds, T, EDGES)."""
    flips = (torch.arange(tokens) % 2.0)[None, :, None].expand(1, -1, EDGES)
    coins = torch.rand(1, tokens, EDGES, generator=torch.Generator().manual_seed(seed)).round()
    return torch.cat([*(any_drive(kind, tokens, seed) for kind in KINDS), flips, coins])


@pytest.mark.parametrize("chunk", [1, 50])
def test_states_stay_finite_and_bounded_for_a_hundred_thousand_steps(chunk: int) -> None:
    """Reference steps of a token each, and steps of fifty; all drives side by side, on edges of ordinary, extreme and
    saturated expression, used at every token, at every eighth and nearly never."""
    steps = 100_000 if chunk == 1 else 4_000
    vectors = expression(3.0, 3)
    vectors[1], vectors[2], vectors[3] = 30.0, -30.0, torch.tensor([30.0, -30.0]).repeat(len(MOLECULES) // 2)
    with torch.inference_mode():
        of_turn = [presynapse(1.0, 3).rates(vectors, turn) for turn in (1.0, TURN, 8192.0)]
        wide = over(Rates(*map(torch.cat, zip(*of_turn, strict=True))), len(KINDS) + 2)
        weights, state, block = chunk_weights(wide, chunk), rest(wide), 1000
        weights = weights._replace(weights=weights.weights[:, :, 0], left=weights.left[:, :, 0])
        for number in range(steps // block):
            drive = hostile_drives(block * chunk, number).repeat(1, 1, 3)
            for part in drive.split(chunk, dim=1):
                state, probability = advance(state, sum_up(part, weights), weights, wide)
            check_bounds(state, wide)
            assert (probability >= 0).all() and (probability <= 1).all()


@settings(max_examples=25)
@given(spread=st.floats(0, 100), seed=st.integers(0, 100))
def test_shared_scalars_never_leave_their_bounds(spread: float, seed: int) -> None:
    for name, value in presynapse(spread, seed).shared().items():
        low, _, high = SCALARS[name]
        assert low * 0.999 <= value.item() <= high * 1.001


def test_shared_scalars_start_at_their_first_values() -> None:
    for name, value in presynapse().shared().items():
        assert value.item() == pytest.approx(SCALARS[name][1], rel=1e-4)


# -- what attention will need ------------------------------------------------------------------------------------------


def test_edges_may_have_any_shape_that_expression_has() -> None:
    """State per sequence, head and key: expression per head, the same for every key."""
    module = presynapse()
    vectors = expression(edges=3)[:, None].expand(3, 5, len(MOLECULES))
    rates = module.rates(vectors, 16.0)
    drive = torch.rand(2, 12, 3, 5)
    contents, state = run(drive, rates, 4)
    assert contents.shape == (2, 3, 3, 5) and state.pools.shape == (2, 3, 5, 4)
    alone, _ = run(drive[:, :, 1], Rates(*(rate[1] for rate in rates)), 4)
    torch.testing.assert_close(contents[:, :, 1], alone)


def test_a_state_survives_packing() -> None:
    _, state = run(drives(8), presynapse().rates(expression(), TURN), 4)
    packed = state.pack()
    assert packed.shape == (2, EDGES, STATE_SIZE)
    assert all(torch.equal(a, b) for a, b in zip(PresynapticState.unpack(packed), state, strict=True))


# -- stochastic release ------------------------------------------------------------------------------------------------


def test_drawn_release_is_whole_vesicles_with_the_expected_mean_and_gradient() -> None:
    count = 20_000
    fraction = torch.full((1, count), 0.3, requires_grad=True)
    docked = torch.full((1, count), 5.25)
    sample = binomial_release((1, 2, 3), 1.0, (1, count), torch.device("cpu"))
    drawn = sample(fraction, docked, 1)
    vesicles = (drawn * docked).detach()
    part = vesicles - vesicles.floor()
    assert (torch.minimum((part - 0.25).abs(), torch.minimum(part, 1 - part)) < 1e-4).all()
    assert drawn.mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 5 / count))
    drawn.sum().backward()
    assert torch.equal(fraction.grad, torch.ones_like(fraction))


@pytest.mark.parametrize("tokens", [1, 8, 48])
@pytest.mark.parametrize(("fraction", "docked"), [(0.05, 2.4), (0.4, 0.6), (0.0, 3.0), (1.0, 3.0)])
def test_what_is_drawn_for_a_chunk_has_the_expected_mean(tokens: int, fraction: float, docked: float) -> None:
    count = 50_000
    sample = binomial_release((1, 2, 3), 1.0, (1, count), torch.device("cpu"))
    drawn = sample(torch.full((1, count), fraction), torch.full((1, count), docked), tokens)
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(fraction, abs=4 * drawn.std().item() / count**0.5 + 1e-6)


def test_only_the_chosen_share_of_edges_draws() -> None:
    fraction, docked = torch.full((4, 1000), 0.3), torch.full((4, 1000), 6.0)
    sample = binomial_release((1, 2, 3), 0.1, (4, 1000), torch.device("cpu"))
    first = sample(fraction, docked, 1) != fraction
    assert 0.05 < first.float().mean() < 0.15
    assert torch.equal(sample(fraction, docked, 1) != fraction, first) or (first.float().mean() < 0.2)


def test_the_same_seed_step_and_layer_draw_the_same_and_others_do_not() -> None:
    fraction, docked = torch.full((2, 50), 0.4), torch.full((2, 50), 6.0)

    def draw(*seed: int) -> Tensor:
        return binomial_release(seed, 1.0, (2, 50), torch.device("cpu"))(fraction, docked, 4)

    assert torch.equal(draw(0, 5, 1), draw(0, 5, 1))
    for other in ((1, 5, 1), (0, 6, 1), (0, 5, 2)):
        assert not torch.equal(draw(0, 5, 1), draw(*other))
