"""Contract of knowledge gravity: the closed form is the loop over hits, on one rank or two; without forces nothing
moves; pulls alone let the keys fall together, and dark energy bounds that.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from two_ranks import one_of_two_ranks, two_ranks

from living_moe.configuration.sections import PlasticityConfig
from living_moe.modeling_living_moe.plasticity import Evidence, LayerKeys, gravity
from living_moe.modeling_living_moe.plasticity.gravity import unit_directions

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Moved = tuple[Tensor, Tensor, Tensor]


def consolidate(
    keys: Tensor,
    start: Tensor,
    hits: Tensor,
    load: Tensor,
    uid: Tensor,
    pieces: list[Evidence],
    config: PlasticityConfig,
) -> Moved:
    """A model of one layer: new keys, hits, load."""
    [moved] = gravity.consolidate([LayerKeys(keys, start, hits, load, uid)], [pieces], config)
    return moved.keys_ED, moved.hits_E, moved.load_E


def reference_consolidate(
    keys: Tensor,
    start: Tensor,
    hits: Tensor,
    load: Tensor,
    uid: Tensor,
    pieces: list[Evidence],
    config: PlasticityConfig,
    peers: str = "before",
) -> Moved:
    moved = gravity.reference_consolidate(LayerKeys(keys, start, hits, load, uid), pieces, config, peers)
    return moved.keys_ED, moved.hits_E, moved.load_E


def state(num_experts: int, width: int, hits: int = 0) -> State:
    """Keys, start, hits, load, uids of experts with different histories."""
    keys_ED = torch.randn(num_experts, width)
    some_E = hits + torch.randint(0, hits // 10 + 2, (num_experts,)) if hits else torch.zeros(num_experts).long()
    return keys_ED, torch.randn(num_experts, width), some_E, 3 * torch.rand(num_experts), torch.arange(num_experts) + 5


def evidence(num_experts: int, top_k: int, tokens: int, width: int, unused: float = 0.0) -> Evidence:
    """Different experts per token; a share `unused` of the places does not count."""
    index_TK = torch.rand(tokens, num_experts).argsort(dim=1)[:, :top_k]
    index_TK = index_TK.masked_fill(torch.rand(tokens, top_k) < unused, -1)
    return Evidence(torch.randn(tokens, width), index_TK, full=not unused)


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], scale: float) -> None:
    """Keys to 1e-5 of the longest vector that took part, load to 1e-5, hits exactly."""
    assert (found[0] - wanted[0]).abs().max() <= 1e-5 * scale
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-5, atol=1e-6)


def longest(keys_ED: Tensor, pieces: list[Evidence]) -> float:
    return max(float(vectors.norm(dim=1).max()) for vectors in (keys_ED, *(p.query_TD for p in pieces)) if len(vectors))


configs = st.builds(
    PlasticityConfig,
    alpha=st.sampled_from([0.0, 0.01, 0.5, 0.99]),
    beta=st.sampled_from([0.0, 0.001, 0.3, 0.99]),
    use_alpha=st.booleans(),
    use_beta=st.booleans(),
    use_inertia=st.booleans(),
    use_decay=st.booleans(),
    usage=st.sampled_from(["count", "ema"]),
    pull=st.sampled_from(["raw", "direction"]),
    dark_energy=st.sampled_from(["decay", "repulsion"]),
    repulsion=st.just(0.1),
    usage_decay=st.sampled_from([0.0, 0.9]),
    forgetting_threshold=st.just(0.7),
    decay_rate=st.just(0.2),
    decay_target=st.sampled_from(["origin", "start"]),
)


@given(
    config=configs,
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    lengths=st.lists(st.integers(0, 12), max_size=3),
    unused=st.sampled_from([0.0, 0.3, 1.0]),
    hits=st.sampled_from([0, 1, 30, 10**9]),
    width=st.sampled_from([3, 6]),
)
@example(  # every force at once, over several pieces with unused places
    config=PlasticityConfig(alpha=0.3, beta=0.2, forgetting_threshold=0.9, decay_rate=0.2),
    num_experts=6,
    top_k=3,
    lengths=[12, 0, 9],
    unused=0.3,
    hits=0,
    width=4,
)
@settings(max_examples=150)
def test_closed_form_is_the_loop_over_hits(
    config: PlasticityConfig,
    num_experts: int,
    top_k: int,
    lengths: list[int],
    unused: float,
    hits: int,
    width: int,
) -> None:
    now = state(num_experts, width, hits)
    pieces = [evidence(num_experts, min(top_k, num_experts), length, width, unused) for length in lengths]
    found = consolidate(*now, pieces, config)
    assert_same(found, reference_consolidate(*now, pieces, config), longest(now[0], pieces))


@given(
    config=configs,
    layers=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 4), st.lists(st.integers(0, 9), max_size=2)), min_size=2, max_size=4
    ),
    unused=st.sampled_from([0.0, 0.3, 1.0]),
    hits=st.sampled_from([0, 30, 10**9]),
    width=st.sampled_from([3, 12]),
)
@settings(max_examples=100)
def test_layers_together_are_each_alone(
    config: PlasticityConfig, layers: list[tuple[int, int, list[int]]], unused: float, hits: int, width: int
) -> None:
    """Of other sizes, with other numbers of tokens and of experts per token."""
    rows = [LayerKeys(*state(num_experts, width, hits)) for num_experts, _, _ in layers]
    pieces = [
        [evidence(num_experts, min(top_k, num_experts), length, width, unused) for length in lengths]
        for num_experts, top_k, lengths in layers
    ]
    for before, after, own in zip(rows, gravity.consolidate(rows, pieces, config), pieces, strict=True):
        [alone] = gravity.consolidate([before], [own], config)
        torch.testing.assert_close(after.keys_ED, alone.keys_ED, rtol=1e-6, atol=1e-6)
        assert torch.equal(after.hits_E, alone.hits_E) and torch.equal(after.load_E, alone.load_E)


@pytest.mark.parametrize("bound", [5, 2**16, 2**16 + 1])
def test_sorting_is_stable(bound: int) -> None:
    values = torch.randint(bound, (5000,)) % 7 + bound - 7 if bound > 7 else torch.randint(bound, (5000,))
    assert torch.equal(gravity.stable_order(values, bound), values.sort(stable=True).indices)


@pytest.mark.parametrize("usage", ["count", "ema"])
def test_a_thousand_hits_of_one_expert_are_the_loop_over_hits(usage: str) -> None:
    now, pieces = state(5, 8), [evidence(5, 3, 1000, 8, 0.1)]
    config = PlasticityConfig(alpha=0.9, beta=0.1, usage=usage)
    assert_same(consolidate(*now, pieces, config), reference_consolidate(*now, pieces, config), longest(now[0], pieces))


def test_hits_of_a_heavy_expert_are_not_lost_to_cancellation() -> None:
    """A billion hits leave a rate of 5e-10 each; from keys of zero their sum shows to the last digits."""
    _, start, hits, load, uid = state(4, 8, hits=10**9)
    pieces = [Evidence(torch.randn(400, 8) + 3, torch.randint(0, 4, (400, 1)))]
    config = PlasticityConfig(alpha=0.5)
    found, *_ = consolidate(torch.zeros(4, 8), start, hits, load, uid, pieces, config)
    wanted, *_ = reference_consolidate(torch.zeros(4, 8), start, hits, load, uid, pieces, config)
    assert 1e-8 < wanted.norm(dim=1).min() < 1e-6
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens", [1, 7])
def test_first_query_pull_is_the_formula(tokens: int) -> None:
    """Of the paper, k + alpha / (1 + usage) (q - k), without the oracle."""
    keys, start, _, load, uid = state(3, 4)
    hits, query_TD = torch.tensor([0, 4, 9]), torch.randn(tokens, 4)
    pieces = [Evidence(query_TD, torch.ones(tokens, 1).long())]
    config = PlasticityConfig(alpha=0.2, use_decay=False)
    wanted = keys.clone()
    for place, query_D in enumerate(query_TD):
        wanted[1] += 0.2 / (1 + 4 + place) * (query_D - wanted[1])
    found, now_hits, now_load = consolidate(keys, start, hits, load, uid, pieces, config)
    torch.testing.assert_close(found, wanted)
    assert now_hits.tolist() == [0, 4 + tokens, 9]
    torch.testing.assert_close(now_load, 0.99 * load + 0.01 * torch.tensor([0.0, 3.0, 0.0]))


def test_two_peers_pull_each_other_by_the_formula() -> None:
    keys, start, _, load, uid = state(3, 4)
    config = PlasticityConfig(beta=0.2, use_alpha=False, use_decay=False)
    pieces = [Evidence(torch.randn(1, 4), torch.tensor([[2, 0]]))]
    found, *_ = consolidate(keys, start, torch.tensor([0, 0, 3]), load, uid, pieces, config)
    torch.testing.assert_close(found[0], keys[0] + 0.2 * (keys[2] - keys[0]))
    torch.testing.assert_close(found[2], keys[2] + 0.05 * (keys[0] - keys[2]))
    assert torch.equal(found[1], keys[1])


def test_peers_from_where_they_were_differ_from_live_peers_in_second_order(capsys: pytest.CaptureFixture) -> None:
    """At the default rates after a step of 64 tokens the two readings of the formula agree in what they move."""
    figures = {}
    for beta in (0.001, 0.01, 0.1):
        for inertia in (True, False):
            torch.manual_seed(0)
            now, pieces = state(8, 16), [evidence(8, 2, 64, 16)]
            config = PlasticityConfig(beta=beta, use_alpha=False, use_decay=False, use_inertia=inertia)
            before, live = (reference_consolidate(*now, pieces, config, peers=form)[0] for form in ("before", "live"))
            figures[beta, inertia] = float((before - live).norm() / (live - now[0]).norm())
    with capsys.disabled():
        print("\nold against live peers, difference over movement, by (beta, inertia):", end=" ")
        print({setting: round(figure, 4) for setting, figure in figures.items()})
    assert figures[0.001, True] < 0.01
    assert figures[0.001, False] < 0.03
    assert figures[0.001, False] < figures[0.01, False] < figures[0.1, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forces", [{"alpha": 0.0, "beta": 0.0}, {"use_alpha": False, "use_beta": False}])
def test_without_forces_keys_keep_their_bits(forces: dict[str, Any], dtype: torch.dtype) -> None:
    keys, *rest = state(6, 8)
    keys[0, 0] = -0.0
    keys = keys.to(dtype)
    found, hits, _ = consolidate(keys, *rest, [evidence(6, 2, 20, 8)], PlasticityConfig(**forces, use_decay=False))
    assert torch.equal(found.view(torch.uint8), keys.view(torch.uint8)) and found.data_ptr() != keys.data_ptr()
    assert int(hits.sum()) == 40


def test_experts_that_serve_nothing_keep_their_keys() -> None:
    now = state(6, 8)
    config = PlasticityConfig(alpha=0.5, beta=0.5, use_decay=False)
    found, *_ = consolidate(*now, [evidence(4, 2, 20, 8)], config)
    assert torch.equal(found[4:], now[0][4:])
    assert not (found[:4] == now[0][:4]).any()


@pytest.mark.parametrize("pull", ["raw", "direction"])
def test_padding_moves_nothing(pull: str) -> None:
    """Whatever its queries hold, and wherever it stands."""
    now, piece = state(6, 8), evidence(6, 2, 20, 8)
    config = PlasticityConfig(alpha=0.5, beta=0.5, pull=pull)
    padding = Evidence(torch.full((5, 8), torch.nan), torch.full((5, 2), -1))
    mixed = Evidence(torch.cat([padding.query_TD, piece.query_TD]), torch.cat([padding.index_TK, piece.index_TK]))
    alone = consolidate(*now, [piece], config)
    for pieces in ([mixed], [padding, piece, padding]):
        for found, wanted in zip(consolidate(*now, pieces, config), alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    still = dataclasses.replace(config, use_decay=False)
    for pieces in ([], [padding]):
        assert all(
            torch.equal(*pair) for pair in zip(consolidate(*now, pieces, still), (now[0], *now[2:4]), strict=True)
        )


def test_inputs_are_left_as_they_are() -> None:
    for settings_ in (
        {},
        {"alpha": 0.0, "beta": 0.0, "use_decay": False},
        {"dark_energy": "repulsion"},
        {"contrast": 0.1},
    ):
        now, piece = state(6, 8), evidence(6, 2, 20, 8, 0.2)
        tensors = (*now, piece.query_TD, piece.index_TK)
        copies = [tensor.clone() for tensor in tensors]
        for tensor in consolidate(*now, [piece], PlasticityConfig(**settings_)):
            tensor.fill_(0)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_parameters_and_queries_with_gradients_are_read_only() -> None:
    keys, *rest = state(6, 8)
    piece = evidence(6, 2, 20, 8)
    piece.query_TD.requires_grad_()
    found, *_ = consolidate(torch.nn.Parameter(keys), *rest, [piece], PlasticityConfig())
    assert not found.requires_grad and type(found) is Tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    keys, start, *rest = state(6, 8)
    piece = evidence(6, 2, 20, 8)
    half = [Evidence(piece.query_TD.to(dtype), piece.index_TK)]
    full = [Evidence(half[0].query_TD.float(), piece.index_TK)]
    config = PlasticityConfig(alpha=0.3, beta=0.1)
    found, *_ = consolidate(keys.to(dtype), start.to(dtype), *rest, half, config)
    wanted, *_ = consolidate(keys.to(dtype).float(), start.to(dtype).float(), *rest, full, config)
    assert found.dtype == dtype and torch.equal(found, wanted.to(dtype))


def test_direction_pull_knows_no_length() -> None:
    """Of queries; a query of zero has no direction and pulls nothing, but is a hit."""
    now, piece = state(6, 8), evidence(6, 2, 20, 8)
    config = PlasticityConfig(alpha=0.5, pull="direction", use_decay=False)
    scaled = Evidence(piece.query_TD * (10 * torch.rand(20, 1) + 0.1), piece.index_TK)
    torch.testing.assert_close(consolidate(*now, [piece], config)[0], consolidate(*now, [scaled], config)[0])
    found, hits, _ = consolidate(*now, [Evidence(torch.zeros(4, 8), piece.index_TK[:4])], config)
    config = dataclasses.replace(config, use_alpha=False)
    torch.testing.assert_close(found, consolidate(*now, [Evidence(torch.zeros(4, 8), piece.index_TK[:4])], config)[0])
    assert int(hits.sum()) == 8


def test_coincident_keys_part_under_repulsion() -> None:
    """Each in the direction of its uid, which is the same in every process; distinct keys go straight away."""
    _, start, hits, load, uid = state(5, 8)
    config = PlasticityConfig(use_alpha=False, use_beta=False, dark_energy="repulsion", repulsion=0.1)
    keys = torch.randn(1, 8).expand(5, 8).contiguous()
    found, *_ = consolidate(keys, start, hits, load, uid, [], config)
    torch.testing.assert_close((found - keys).norm(dim=1), torch.full((5,), 0.1))
    torch.testing.assert_close(found - keys, 0.1 * unit_directions(uid, 8), rtol=1e-4, atol=1e-6)
    assert torch.pdist(found).min() > 0.05
    torch.testing.assert_close(
        unit_directions(torch.tensor([7]), 2), torch.tensor([[-0.1298, -0.9915]]), rtol=0, atol=1e-4
    )
    many = unit_directions(torch.arange(4000), 16)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(4000))
    assert many.mean(dim=0).norm() < 0.05 and torch.pdist(many[:200]).min() > 0.2


def test_a_lonely_key_is_not_repelled() -> None:
    now = state(1, 4)
    config = PlasticityConfig(use_alpha=False, use_beta=False, dark_energy="repulsion", repulsion=0.1)
    assert torch.equal(consolidate(*now, [evidence(1, 1, 3, 4)], config)[0], now[0])


@pytest.mark.parametrize(
    "mode",
    [
        {"usage": "count", "pull": "raw", "dark_energy": "decay", "decay_target": "origin"},
        {"usage": "ema", "pull": "direction", "dark_energy": "decay", "decay_target": "start"},
        {"use_inertia": False, "pull": "raw", "dark_energy": "repulsion"},
        {"use_inertia": False, "pull": "direction", "dark_energy": "repulsion"},
    ],
    ids=["count", "ema", "massless", "massless-direction"],
)
def test_keys_stay_finite_over_ten_thousand_steps(mode: dict[str, Any]) -> None:
    """And as long as what pulls them allows: pulls are convex, repulsion of 0.001 against a pull of 0.5 adds little."""
    keys, start, hits, load, uid = state(6, 4)
    config = PlasticityConfig(alpha=0.5, beta=0.25, **mode)
    bound = float(keys.norm(dim=1).max())
    query_NTD = torch.randn(10_000, 4, 4)
    if config.pull == "raw":
        bound = max(bound, float(query_NTD.norm(dim=-1).max()))
    for query_TD in query_NTD:
        piece = Evidence(query_TD, (query_TD @ keys.T).topk(2).indices)
        keys, hits, load = consolidate(keys, start, hits, load, uid, [piece], config)
    assert keys.isfinite().all() and load.isfinite().all()
    # Repelled keys whose queries have no length of their own may drift outwards a step at a time.
    drift = 10_000 * config.repulsion if config.dark_energy == "repulsion" else 0.0
    assert keys.norm(dim=1).max() <= bound * 1.001 + drift
    assert int(hits.sum()) == 10_000 * 8


def distances_after_a_life(seed: int, **forces: Any) -> tuple[float, float]:
    """Mean and smallest distance between keys after 300 steps, as shares of what they were.

    16 keys of unit length in 16 dimensions, 32 tokens a step around one of 8 unit directions (noise of norm 1), each
    served by its 4 best keys by dot product, so that where the keys have gone decides who is pulled next. Gravity is
    strong: alpha 0.01, beta 0.3, no mass.
    """
    torch.manual_seed(seed)
    centres_CD = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    keys = start = torch.nn.functional.normalize(torch.randn(16, 16), dim=1)
    hits, load, uid = torch.zeros(16).long(), torch.ones(16), torch.arange(16)
    config = PlasticityConfig(alpha=0.01, beta=0.3, use_inertia=False, usage_decay=0.9, **forces)
    for _ in range(300):
        query_TD = centres_CD[torch.randint(8, (32,))] + torch.randn(32, 16) / 4
        piece = Evidence(query_TD, (query_TD @ keys.T).topk(4).indices)
        keys, hits, load = consolidate(keys, start, hits, load, uid, [piece], config)
    before, after = torch.pdist(start), torch.pdist(keys)
    return float(after.mean() / before.mean()), float(after.min() / before.min())


@pytest.mark.parametrize("seed", [0, 1])
def test_pulls_alone_collapse_the_keys_and_dark_energy_bounds_it(seed: int, capsys: pytest.CaptureFixture) -> None:
    """A strong decay to the start keeps keys apart, each from each. Repulsion keeps them apart on average only: it acts
    away from the centroid, along one line for keys that have met. Decay to the origin does not help: it is one more
    point to fall into.
    """
    strong = {"forgetting_threshold": 1.0, "decay_rate": 0.5}
    lives = {
        "pulls alone": distances_after_a_life(seed, use_decay=False),
        "decay to origin": distances_after_a_life(seed, **strong, decay_target="origin"),
        "decay to start": distances_after_a_life(seed, **strong, decay_target="start"),
        "repulsion": distances_after_a_life(seed, dark_energy="repulsion", repulsion=0.02),
    }
    with capsys.disabled():
        print(f"\nmean, smallest distance between keys over their start's, seed {seed}:", end=" ")
        print({name: (round(mean, 4), round(smallest, 4)) for name, (mean, smallest) in lives.items()})
    assert lives["pulls alone"][0] < 0.2 and lives["pulls alone"][1] < 0.001
    assert lives["decay to origin"][0] < 0.2
    assert lives["decay to start"][0] > 0.25 and lives["decay to start"][1] > 0.02
    assert lives["repulsion"][0] > 1.0


def two_rank_cases() -> list[tuple[State, list[list[Evidence]], PlasticityConfig]]:
    """State, the evidence of each rank, and config; the same in every process."""
    cases = []
    for seed, (unused, lengths) in enumerate(
        [(0.3, ([7, 4], [9])), (0.0, ([], [8])), (0.0, ([8, 3], [])), (0, ([], []))]
    ):
        modes = ({}, {"usage": "ema", "pull": "direction", "dark_energy": "repulsion"}, {"use_inertia": False})
        for mode in (*modes, {"contrast": 0.2, "contrast_cosine": 0.0}):
            torch.manual_seed(seed)
            pieces = [[evidence(6, 3, length, 8, unused) for length in of_rank] for of_rank in lengths]
            cases.append((state(6, 8), pieces, PlasticityConfig(alpha=0.4, beta=0.2, decay_rate=0.1, **mode)))
    return cases


def consolidated(rank: int) -> list[Moved]:
    return [consolidate(*now, pieces[rank], config) for now, pieces, config in two_rank_cases()]


def test_two_ranks_are_one_process_with_their_evidence_in_rank_order(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path)
    for (now, pieces, config), one, other in zip(two_rank_cases(), first, second, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True)), "the ranks have parted"
        together = [piece for of_rank in pieces for piece in of_rank]
        assert_same(one, consolidate(*now, together, config), longest(now[0], together))
        assert_same(one, reference_consolidate(*now, together, config), longest(now[0], together))


if __name__ == "__main__":
    one_of_two_ranks(consolidated)
