"""`living-moe experts` and `living-moe pictures`: what experts are worth on a text, and a run's life in pictures."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from living_moe.configuration.errors import ConfigurationError, TrainingError
from living_moe.conversion.export import load_living
from living_moe.modeling_living_moe import LivingMoeForCausalLM
from living_moe.training.checkpointing import newest_model
from living_moe.training.data import TokenBlocks, read_blocks
from living_moe.training.observatory.leaderboard import (
    card_leaderboard,
    describe_agreement,
    leaderboard_markdown,
    leaderboard_table,
    reads_table,
    what_it_reads,
)
from living_moe.training.observatory.performance import Performance, measure
from living_moe.training.observatory.pictures import DARK, LIGHT, PICTURES, THEMES, Scene, draw_pictures
from living_moe.training.observatory.records import read_run


def show_experts(
    source: str,
    text: Path,
    console: Console,
    *,
    top: int = 20,
    block_size: int = 128,
    max_blocks: int = 32,
    batch_size: int = 8,
    leave_out: bool = True,
    markdown: Path | None = None,
    record: bool = False,
) -> Performance:
    """Measure and print.

    Args:
        source: Living checkpoint's directory or hub id.
        text: What to measure on (text, JSON lines or Parquet), under the checkpoint's own tokenizer.
        top: Experts shown.
        markdown: File for the whole leaderboard.
        record: Save the checkpoint, a directory then, with the leaderboard in its card.

    Raises:
        ConfigurationError: `record` for a model on the hub, or a number below 1.
        TrainingError: The text or the tokenizer cannot be read, or the text is too short.
    """
    for name, value in (("top", top), ("block_size", block_size), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigurationError(f"{name} is {value}; give a number of at least 1.")
    if record and not Path(source).is_dir():
        raise ConfigurationError(f"{source} is no directory; --record writes to a checkpoint on disk.")
    model, tokenizer, blocks = _prepare(source, text, block_size)
    found = measure(
        model, blocks, tokenizer=tokenizer, batch_size=batch_size, max_blocks=max_blocks, leave_out=leave_out
    )
    console.print(leaderboard_table(found, top=top))
    reads = []
    for row in found.leaderboard(top):
        place = model.expert_uids(row.layer).index(row.uid)
        reads.append(what_it_reads(found.reading, row.layer, place, row.uid, tokenizer))
    console.print(reads_table(reads))
    for one in found.agreement:
        console.print(describe_agreement(one))
    if markdown is not None:
        markdown.write_text(leaderboard_markdown(found, top=None) + "\n", encoding="utf-8")
        console.print(f"leaderboard of all {len(found.rows)} experts written to {markdown}")
    if record:
        model.config.provenance = {**model.config.provenance, "leaderboard": card_leaderboard(found)}
        model.save_pretrained(source)
        console.print(f"{source} saved with the leaderboard in its model card")
    return found


def _prepare(
    source: str, text: Path, block_size: int
) -> tuple[LivingMoeForCausalLM, PreTrainedTokenizerBase, TokenBlocks]:
    """A checkpoint, its tokenizer, and a text in blocks."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read a tokenizer from {source}: {error}") from error
    blocks = read_blocks([str(text)], tokenizer, block_size)
    return load_living(source), tokenizer, blocks


def show_pictures(
    path: Path,
    console: Console,
    *,
    out: Path | None = None,
    theme: str = "light",
    kind: str = "png",
    text: Path | None = None,
    block_size: int = 128,
) -> list[Path]:
    """Draw a run, and say what was written, what could not be, and what its records lack.

    Args:
        path: A run's directory, or a checkpoint's.
        out: Directory for the pictures; None is `pictures` in the run's.
        theme: "light", "dark" or "both".
        kind: "png" or "svg".
        text: Read by the run's newest checkpoint; how much its experts matter is told from one gradient.

    Raises:
        RecordsError: No run has written there.
        TrainingError: The run has no checkpoint that could read `text`, or that cannot be read.
    """
    run = read_run(path)
    performance = None
    if text is not None:
        if (newest := newest_model(path)) is None:
            raise TrainingError(
                f"{path} has no checkpoint yet (final or checkpoint-N) that could read a text; leave --text out."
            )
        model, tokenizer, blocks = _prepare(str(newest), text, block_size)
        performance = measure(model, blocks, tokenizer=tokenizer, leave_out=False)
    themes = [LIGHT, DARK] if theme == "both" else [THEMES[theme]]
    written, missing = draw_pictures(
        Scene(run, performance), out or path / "pictures", themes=themes, kind=kind, names=tuple(PICTURES)
    )
    for file in written:
        console.print(str(file), soft_wrap=True)
    for name, reason in missing.items():
        console.print(f"no {name}: {reason}", soft_wrap=True)
    for note in run.notes:
        console.print(f"note: {note}", soft_wrap=True)
    return written
