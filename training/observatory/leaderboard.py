"""What experts are worth and what they read, for people: terminal tables, Markdown, plain rows for a model card.

Takes what `performance.measure` found and shows it; measures nothing.

N blocks, S tokens of a block, K places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from living_moe.training.observatory.performance import Agreement, ExpertRow, Performance, Reading

#: Tokens shown before and after the one an expert reads.
CONTEXT = 6
#: A token counts as one of an expert's own only when it read it so often.
LEAST_READ = 2


@dataclass(frozen=True)
class Reads:
    """What one expert reads.

    Attributes:
        tokens: Texts of the tokens that tell most of it: those with the largest p log(p / q), p their share of what it
            reads, q of what its layer reads. Most telling first; with ids for texts where there is no tokenizer.
        contexts: Where its routing weight was largest, each token at most once: before, the token, after.
    """

    layer: int
    uid: int
    tokens: list[str]
    contexts: list[tuple[str, str, str]]


def what_it_reads(
    reading: Reading, layer: int, index: int, uid: int, tokenizer: Any = None, *, top: int = 8, contexts: int = 3
) -> Reads:
    """What an expert of a layer reads, from the pass over the text.

    Args:
        index: Its place in slot order.
        tokenizer: Says what ids mean; None shows the ids.
        top, contexts: How many to show at most.
    """
    ids_NS, index_NSK = reading.ids_NS, reading.index[layer]
    hit_NSK = index_NSK == index
    hit_NS = hit_NSK.any(-1)
    vocabulary = int(ids_NS.max()) + 1
    used_N = (index_NSK >= 0).sum(-1).flatten()
    mine_V = torch.bincount(ids_NS[hit_NS], minlength=vocabulary).double()
    all_V = torch.bincount(ids_NS.flatten(), weights=used_N.double(), minlength=vocabulary)
    share_V, base_V = mine_V / mine_V.sum().clamp_min(1), all_V / all_V.sum().clamp_min(1)
    telling_V = torch.where(mine_V >= LEAST_READ, share_V * (share_V / base_V.clamp_min(1e-300)).log(), -math.inf)
    best = [token for token in telling_V.argsort(descending=True, stable=True).tolist()[:top] if telling_V[token] > 0]

    weight_NS = (reading.weights[layer] * hit_NSK).sum(-1)
    order = weight_NS.masked_fill(~hit_NS, -math.inf).flatten().argsort(descending=True, stable=True)
    shown: dict[int, tuple[str, str, str]] = {}
    for position in order[: int(hit_NS.sum())].tolist():
        if len(shown) == contexts:
            break
        block, place = divmod(position, ids_NS.shape[1])
        row = ids_NS[block].tolist()
        if row[place] not in shown:
            before, after = row[max(0, place - CONTEXT) : place], row[place + 1 : place + 1 + CONTEXT]
            parts = (before, [row[place]], after)
            shown[row[place]] = tuple(shown_text(ids, tokenizer) for ids in parts)  # type: ignore[assignment]
    return Reads(layer, uid, [shown_text([token], tokenizer) for token in best], list(shown.values()))


def shown_text(ids: Sequence[int], tokenizer: Any) -> str:
    """What ids say, on one line, spaces at the ends kept: they belong to the tokens."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "")


# -- tables ------------------------------------------------------------------------------------------------------------


def _signed(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:+.{digits}e}" if value else "0"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def cells(row: ExpertRow) -> dict[str, str]:
    """A row as text by column, the same in every table."""
    kind = "frozen" if row.frozen else "trains"
    kind += f", field {row.field}" if row.field else ""
    kind += ", 1.58 bits" if row.ternary else ""
    return {
        "layer": str(row.layer),
        "uid": str(row.uid),
        "kind": kind,
        "width": str(row.width),
        "load": _plain(row.load),
        "contribution": _signed(row.contribution),
        "±": "" if row.error is None else f"{row.error:.0e}",
        "first order": _signed(row.first_order),
        "sensitivity": f"{row.sensitivity:.2e}",
        "per GFLOP": _signed(row.per_gflop, 1),
        "per MiB": _signed(row.per_mib, 1),
        "specialised": _plain(row.specialisation),
        "reads": row.reads or "",
    }


def describe_agreement(found: Agreement) -> str:
    """E.g. "layer 3: rank correlation with leave-one-out: first order 0.91, sensitivity ..., load alone ..."."""

    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.2f}"

    where = "all layers" if found.layer is None else f"layer {found.layer}"
    return (
        f"{where} ({found.experts} experts): rank correlation with leave-one-out: "
        f"first order {shown(found.first_order)}, sensitivity {shown(found.sensitivity)}, "
        f"load alone {shown(found.load)}"
    )


def describe_text(performance: Performance) -> str:
    """On what it was measured."""
    return (
        f"{performance.tokens:,} scored tokens in {performance.blocks} blocks, loss {performance.loss:.4f} nats per "
        f"token, at optimizer step {performance.step}"
    )


def leaderboard_table(performance: Performance, *, top: int | None = 20) -> Table:
    """For the terminal. `top` None shows every expert."""
    rows = performance.leaderboard(top)
    title = f"The {len(rows)} most valuable of {len(performance.rows)} experts"
    table = Table(title=title, caption=describe_text(performance))
    for name in cells(performance.rows[0]):
        table.add_column(name, justify="left" if name in ("kind", "reads") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, cells(row).values()))
    return table


def leaderboard_markdown(performance: Performance, *, top: int | None = 20) -> str:
    """As a Markdown table, for TensorBoard's text and for reports."""
    rows = performance.leaderboard(top)
    names = list(cells(performance.rows[0]))
    lines = [
        f"| {' | '.join(names)} |",
        f"| {' | '.join('---' if n in ('kind', 'reads') else '---:' for n in names)} |",
    ]
    lines += [f"| {' | '.join(cells(row).values())} |" for row in rows]
    return "\n".join([*lines, "", f"{describe_text(performance)}."])


def card_leaderboard(performance: Performance, *, top: int = 10) -> dict[str, Any]:
    """What a model's provenance keeps for its card, in plain values: `CardRecords.leaderboard`."""
    return {
        "step": performance.step,
        "tokens": performance.tokens,
        "experts": len(performance.rows),
        "rows": [
            {
                "layer": row.layer,
                "uid": row.uid,
                "load": row.load,
                "contribution": row.contribution,
                "sensitivity": row.sensitivity,
                "specialisation": row.specialisation,
                "reads": row.reads,
            }
            for row in performance.leaderboard(top)
        ],
    }


def reads_table(reads: Sequence[Reads]) -> Table:
    """What experts read, for the terminal: the token an expert reads is set off in its context."""
    table = Table(title="What they read", show_lines=True)
    for name, justify in (("layer", "right"), ("uid", "right"), ("tokens", "left"), ("contexts", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for expert in reads:
        contexts = [
            f"{escape(before)}[bold reverse]{escape(token)}[/]{escape(after)}"
            for before, token, after in expert.contexts
        ]
        tokens = " ".join(f"[reverse]{escape(token)}[/]" for token in expert.tokens)
        table.add_row(str(expert.layer), str(expert.uid), tokens, "\n".join(contexts))
    return table
