"""The chaotic task: deterministic, chaotic, and predictable from its past only as far as that goes."""

import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from living_moe.configuration.errors import TrainingError
from living_moe.training.chaos import chaotic_dataset, chaotic_symbols, entropy_rate, least_loss


def test_a_lone_site_is_the_logistic_map() -> None:
    """With so fine an alphabet the next symbol is what the map makes of this one."""
    fine = 1 << 20
    path = chaotic_symbols(1, 50, symbols=fine, sites=1, growth=(3.9, 3.9), coupling=0.0)[0].double() / fine
    torch.testing.assert_close(path[1:], 3.9 * path[:-1] * (1 - path[:-1]), rtol=0, atol=1e-5)


def test_equal_seeds_give_equal_symbols_and_others_do_not() -> None:
    one, again, other = (chaotic_symbols(4, 100, seed=seed) for seed in (3, np.int64(3), 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (4, 100) and one.min() >= 0 and one.max() < 32 and len(one.unique()) > 20


def test_near_starts_part() -> None:
    """Chaos: symbols of trajectories a billionth apart have nothing in common after some eighty steps."""
    fine = 1 << 40
    start = chaotic_symbols(2000, 1, symbols=fine)[:, 0].double() / fine
    assert start.std() > 0.2
    settings = {"sites": 1, "growth": (3.9, 3.9), "coupling": 0.0}
    path = chaotic_symbols(1, 4000, symbols=fine, **settings)[0].double() / fine
    exponent = float((3.9 * (1 - 2 * path)).abs().log().mean())
    assert 0.45 < exponent < 0.55
    assert entropy_rate(1, 4000, **settings) == pytest.approx(exponent, abs=1e-6)


def test_lone_sites_make_new_information_each_on_its_own() -> None:
    one = entropy_rate(20, 2000, sites=1, growth=(3.9, 3.9), coupling=0.0)
    assert entropy_rate(20, 2000, sites=3, growth=(3.9, 3.9), coupling=0.0) == pytest.approx(3 * one, rel=0.05)
    assert entropy_rate(20, 2000, sites=1, growth=(2.5, 3.4), coupling=0.0) == pytest.approx(0.0, abs=0.01)


def test_more_past_tells_more_but_never_everything() -> None:
    found = [least_loss(context, 200, 1000, symbols=8) for context in (0, 1, 2, 3)]
    assert math.log(8) > found[0] > found[1] + 0.1 > found[2] + 0.1
    assert found[3] > entropy_rate(200, 1000)


def test_the_least_loss_of_maps_that_are_solved() -> None:
    """At r = 4 halves of the logistic map are fair coins, whatever their past; a period of two is known after one."""
    lone = {"sites": 1, "coupling": 0.0, "symbols": 2}
    for context in (1, 6):
        coins = least_loss(context, 500, 200, growth=(4.0, 4.0), **lone)
        assert coins == pytest.approx(math.log(2), abs=2e-3)
        assert coins == pytest.approx(entropy_rate(500, 200, sites=1, growth=(4.0, 4.0), coupling=0.0), abs=5e-3)
    period = {**lone, "symbols": 16, "growth": (3.2, 3.2)}
    assert least_loss(0, 500, 20, **period) == pytest.approx(math.log(2), abs=1e-3)
    assert least_loss(1, 500, 20, **period) == pytest.approx(0.0, abs=1e-3)


def test_few_windows_do_not_make_the_least_loss_larger() -> None:
    """Against words that are all there many times over, of two steps of 32 symbols."""
    enough = least_loss(2, 4000, 500)
    assert least_loss(2, 50, 100) < enough + 0.01
    assert least_loss(2, 1000, 500) == pytest.approx(enough, abs=0.01)


def test_a_dataset_has_blocks_of_consecutive_symbols() -> None:
    rows = chaotic_dataset(3, 100, block_size=32, seed=1)
    assert len(rows) == 9 and rows.column_names == ["input_ids"]
    assert rows[1]["input_ids"] == chaotic_symbols(3, 100, seed=1)[0, 32:64].tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"growth": growth} for growth in ((3.9, 4.1), (3.6, math.nan), (-0.1, 4.0), (4.0, 3.6), 3.9, (3.9,))),
        *({"coupling": coupling} for coupling in (-0.1, 3.0, math.nan, "0")),
        *({name: number} for name in ("sites", "trajectories", "steps") for number in (0, -5, 2.0, True)),
        {"seed": -1}, {"symbols": 1}, {"symbols": 8.0},
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    given = {"trajectories": 1, "steps": 4, **wrong}
    for function in (chaotic_symbols, partial(least_loss, 2), partial(chaotic_dataset, block_size=1), entropy_rate):
        if function is not entropy_rate or "symbols" not in wrong:
            with pytest.raises(TrainingError, match=f"{next(iter(wrong))} must be"):
                function(**given)


def test_a_block_or_a_context_that_does_not_fit_is_named() -> None:
    for size in (0, 5, 2.0):
        with pytest.raises(TrainingError, match="block_size"):
            chaotic_dataset(1, 4, block_size=size)
    for context in (-1, 12, 1.0):
        with pytest.raises(TrainingError, match="context must be"):
            least_loss(context, 1, 4)


@pytest.mark.parametrize("trajectories", [1, 7, 40])
@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_least_loss_is_that_of_the_best_table_on_these_windows(trajectories: int, context: int) -> None:
    symbols_BS = chaotic_symbols(trajectories, 60 + context, symbols=6, seed=2)
    seen = Counter(map(tuple, symbols_BS.unfold(1, context + 1, 1).flatten(0, 1).tolist()))
    pasts = Counter(window[:-1] for window in seen.elements())
    losses = [-math.log(count / pasts[window[:-1]]) for window, count in seen.items() for _ in range(count)]
    assert least_loss(context, trajectories, 60, symbols=6, seed=2) == pytest.approx(math.fsum(losses) / len(losses))
