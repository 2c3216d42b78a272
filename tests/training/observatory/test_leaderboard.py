"""The leaderboard reads the same in the terminal, in Markdown and in a card; what experts read is what they read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from factories import drift, live, living_model, mixed_text
from rich.console import Console

from living_moe.model_cards import CardRecords, build_model_card
from living_moe.training.observatory.leaderboard import (
    card_leaderboard,
    cells,
    describe_agreement,
    leaderboard_markdown,
    leaderboard_table,
    reads_table,
    what_it_reads,
)
from living_moe.training.observatory.performance import Agreement, Performance, Reading, measure


class Letters:
    """A tokenizer of letters: token n is the n-th."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join("\n" if one == 9 else chr(ord("a") + one) for one in ids)


def reading_of(ids_NS: torch.Tensor, index_NSK: torch.Tensor, weights_NSK: torch.Tensor) -> Reading:
    return Reading(ids_NS, torch.zeros(ids_NS.shape[0], ids_NS.shape[1] - 1), [index_NSK], [weights_NSK], [], [])


def test_an_expert_reads_what_it_reads_more_than_its_layer() -> None:
    #                       a  b  a  b  c  a  b  d, expert 0 reads every a, one b, and the d
    ids_NS = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 3]])
    index_NSK = torch.tensor([[[0], [1], [0], [1], [1], [0], [0], [0]]], dtype=torch.int32)
    weights_NSK = torch.tensor([[[0.5], [1.0], [0.9], [1.0], [1.0], [0.7], [0.2], [0.8]]])
    found = what_it_reads(reading_of(ids_NS, index_NSK, weights_NSK), 0, 0, 7, Letters(), contexts=2)
    assert (found.layer, found.uid) == (0, 7)
    assert found.tokens == ["a"]  # b less than the layer, d once only
    assert found.contexts == [("ab", "a", "bcabd"), ("babcab", "d", "")]  # the second "a" by weight would be a repeat
    by_id = what_it_reads(reading_of(ids_NS, index_NSK, weights_NSK), 0, 0, 7, contexts=1)
    assert by_id.tokens == ["0"] and by_id.contexts == [("0 1", "0", "1 2 0 1 3")]


def test_line_breaks_are_shown_and_who_reads_nothing_has_nothing_to_show() -> None:
    ids_NS = torch.tensor([[9, 9, 1]])
    index_NSK = torch.tensor([[[0, 1], [0, -1], [1, -1]]], dtype=torch.int32)
    reading = reading_of(ids_NS, index_NSK, torch.ones(1, 3, 2))
    assert what_it_reads(reading, 0, 0, 0, Letters()).tokens == ["⏎"]
    assert what_it_reads(reading, 0, 5, 5, Letters()) == what_it_reads(reading, 0, 5, 5)
    assert what_it_reads(reading, 0, 5, 5).contexts == []


@pytest.fixture(scope="module")
def found() -> Performance:
    model = living_model("mixtral")
    live(model, 6, seed=1)
    drift(model, 3, frozen=True)
    return measure(model, mixed_text(3, 12))


def printed(thing: object, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(thing)
    return console.export_text()


def test_terminal_and_markdown_show_the_best_first(found: Performance) -> None:
    best = found.leaderboard(3)
    lines = leaderboard_markdown(found, top=3).splitlines()
    assert lines[0] == f"| {' | '.join(cells(best[0]))} |"
    assert lines[2:5] == [f"| {' | '.join(cells(row).values())} |" for row in best]
    assert "33 scored tokens in 3 blocks" in lines[-1]
    shown = printed(leaderboard_table(found, top=3))
    assert "The 3 most valuable of 13 experts" in shown
    assert [shown.index(cells(row)["contribution"]) for row in best] == sorted(
        shown.index(cells(row)["contribution"]) for row in best
    )
    assert len(leaderboard_markdown(found, top=None).splitlines()) == 2 + 13 + 2


def test_a_card_shows_the_leaderboard_and_says_where_none_is(found: Performance) -> None:
    board = card_leaderboard(found, top=2)
    text = str(build_model_card(CardRecords(model_name="m", family="mixtral", leaderboard=board)))  # type: ignore[arg-type]
    assert "The 2 most valuable of 13 experts, measured on 33 tokens at optimizer step 0." in text
    for row in found.leaderboard(2):
        assert f"| {row.layer} | {row.uid} | {row.load:.2f} | {row.contribution:+.3g} | {row.sensitivity:.4g} |" in text
    estimated = dataclasses.replace(found, rows=[dataclasses.replace(row, contribution=None) for row in found.rows])
    board = card_leaderboard(estimated, top=1)
    card = build_model_card(CardRecords(model_name="m", family="mixtral", leaderboard=board))  # type: ignore[arg-type]
    assert "| not measured |" in str(card)
    assert "What the experts contribute is not recorded." in str(
        build_model_card(CardRecords(model_name="m", family="f"))
    )


def test_agreement_and_reads_are_told_in_words(found: Performance) -> None:
    line = describe_agreement(Agreement(None, 13, 0.904, -0.5, None))
    assert line == (
        "all layers (13 experts): rank correlation with leave-one-out: first order 0.90, "
        "sensitivity -0.50, load alone none"
    )
    reads = [what_it_reads(found.reading, row.layer, 0, row.uid) for row in found.rows[:2]]
    assert reads[0].contexts[0][1] in printed(reads_table(reads))
