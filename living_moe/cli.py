"""The command `living-moe`: what it can do, and one clear line when it cannot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from living_moe.configuration import PRESETS, LivingMoeError
from living_moe.configuration.errors import ConfigurationError
from living_moe.version import __version__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="living-moe", description="Mixture-of-experts layers as living populations, on Hugging Face Transformers."
    )
    parser.add_argument("--version", action="version", version=f"living-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="graft a pretrained MoE checkpoint; outputs stay the same")
    convert.add_argument("source", help="checkpoint directory or hub id of a Mixtral, Qwen3-MoE or DeepSeek-V3 model")
    convert.add_argument("target", type=Path, help="directory for the living checkpoint; must not exist or be empty")
    convert.add_argument("--preset", default="frozen-graft", help=f"one of: {', '.join(PRESETS)} (default %(default)s)")
    convert.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override one field of the preset, e.g. --set lifecycle.interval=5 (may be repeated)",
    )
    convert.add_argument("--dtype", help="load and save in this dtype: float32, bfloat16, ... (default: the source's)")
    convert.add_argument(
        "--calibration",
        type=Path,
        help="text file of what the source knows; newborn receptive fields tell new text from it",
    )
    convert.add_argument("--no-verify", action="store_true", help="do not compare logits with the source")
    convert.set_defaults(run=run_convert)

    ternarize = commands.add_parser(
        "ternarize", help="turn a living checkpoint's experts into ternary ones (1.58 bits); outputs change, see design"
    )
    ternarize.add_argument("source", help="living checkpoint's directory or hub id")
    ternarize.add_argument("target", type=Path, help="directory for the new checkpoint; must not exist or be empty")
    ternarize.add_argument(
        "--calibration",
        type=Path,
        help="text file like what the model will read; thresholds and scales are fitted to it",
    )
    ternarize.add_argument(
        "--pack", action="store_true", help="write 1.6 bits a weight, for inference (default: latents to train on)"
    )
    ternarize.set_defaults(run=run_ternarize)

    export = commands.add_parser("export", help="write a uniform living checkpoint as one of its source family")
    export.add_argument("source", help="living checkpoint's directory or hub id")
    export.add_argument("target", type=Path, help="directory for the plain checkpoint; must not exist or be empty")
    export.add_argument("--to", default="auto", help="family to write; the backbone's is the only one (default auto)")
    export.add_argument(
        "--field",
        type=int,
        default=0,
        help="whose function: 0 what the source knew, 1 what tokens of the newborn receptive field see (default 0)",
    )
    export.add_argument("--no-verify", action="store_true", help="do not compare logits with the living model")
    export.set_defaults(run=run_export)

    inspect = commands.add_parser("inspect", help="show a living checkpoint's populations, parameters and events")
    inspect.add_argument("checkpoint", type=Path)
    inspect.add_argument("--events", type=int, default=10, help="how many of the last events to show (default 10)")
    inspect.set_defaults(run=run_inspect)

    lineage = commands.add_parser(
        "lineage", help="write the interactive lineage of a run or a checkpoint: one HTML file that opens offline"
    )
    lineage.add_argument(
        "directory", type=Path, help="directory of a run (finished, running or crashed) or of a checkpoint"
    )
    lineage.add_argument("--out", type=Path, help="the page to write (default: lineage.html in the run's directory)")
    lineage.set_defaults(run=run_lineage)

    watch = commands.add_parser("watch", help="a live page of a run while it trains, on this machine only")
    watch.add_argument(
        "directory",
        metavar="RUN",
        type=Path,
        help="a run's directory (also one that does not exist yet), or a checkpoint's",
    )
    watch.add_argument(
        "--port", type=int, default=7860, help="port of 127.0.0.1; 0 takes a free one (default %(default)s)"
    )
    watch.set_defaults(run=run_watch)

    space = commands.add_parser(
        "space", help="write a folder that shows a saved model's population as a Space of the hub"
    )
    space.add_argument("source", metavar="MODEL", type=Path, help="a checkpoint's directory, or a run's with one in it")
    space.add_argument("target", type=Path, help="the folder to write; must not exist or be empty")
    space.add_argument("--title", help="the Space's title (default: the model's name)")
    space.set_defaults(run=run_space)

    train = commands.add_parser(
        "train", help="train a living model in this process (see also: accelerate launch -m living_moe.training.train)"
    )
    train.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of living_moe.training.train")
    train.set_defaults(run=run_train)

    quickstart = commands.add_parser(
        "quickstart", help="the whole story on text of the running interpreter: train, graft, learn, grow, save, load"
    )
    quickstart.add_argument("--first", type=Path, help="text of the first domain (default: Python's documentation)")
    quickstart.add_argument("--second", type=Path, help="text of the second domain (default: Python's source code)")
    quickstart.add_argument("--output", type=Path, default=Path("quickstart"), help="directory (default %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    quickstart.add_argument("--smoke", action="store_true", help="a few steps only: checks that everything runs")
    quickstart.set_defaults(run=run_quickstart)

    experts = commands.add_parser(
        "experts", help="what each expert contributes to the loss on a text, what it costs and what it reads"
    )
    experts.add_argument("model", help="living checkpoint's directory or hub id")
    experts.add_argument("--text", type=Path, required=True, help="text file to measure on")
    experts.add_argument("--top", type=int, default=20, help="how many experts to show (default %(default)s)")
    experts.add_argument("--block-size", type=int, default=128, help="tokens of a block of text (default %(default)s)")
    experts.add_argument(
        "--blocks", type=int, default=32, help="blocks to read, spread over the text; 0 is all (default %(default)s)"
    )
    experts.add_argument("--batch-size", type=int, default=8, help="blocks per forward pass (default %(default)s)")
    experts.add_argument(
        "--no-leave-out", action="store_true", help="estimate contributions from one gradient, do not measure them"
    )
    experts.add_argument("--markdown", type=Path, metavar="FILE", help="write the whole leaderboard there as Markdown")
    experts.add_argument(
        "--record", action="store_true", help="save the checkpoint anew with the ten best experts in its model card"
    )
    experts.set_defaults(run=run_experts)

    pictures = commands.add_parser("pictures", help="draw a run from its own records, finished, running or crashed")
    pictures.add_argument(
        "directory", metavar="RUN", type=Path, help="a run's directory (its --output-dir), or a checkpoint's"
    )
    pictures.add_argument("--out", type=Path, help="directory for the pictures (default: RUN/pictures)")
    pictures.add_argument("--theme", choices=("light", "dark", "both"), default="light", help="default %(default)s")
    pictures.add_argument("--format", choices=("png", "svg"), default="png", help="default %(default)s")
    pictures.add_argument(
        "--text",
        type=Path,
        help="text file that the run's newest checkpoint reads, for what experts read and contribute",
    )
    pictures.set_defaults(run=run_pictures)

    card = commands.add_parser("card", help="print the model card of a living checkpoint")
    card.add_argument("checkpoint", type=Path)
    card.set_defaults(run=run_card)
    return parser


def parse_overrides(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`section.field=value` texts as nested dicts; values are JSON, or plain text.

    Raises:
        ConfigurationError: A text has another form.
    """
    overrides: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, dot, field = name.partition(".")
        if not (equals and dot and section and field):
            raise ConfigurationError(f"--set {assignment!r} must have the form section.field=value.")
        try:
            value = json.loads(text.lower() if text in ("True", "False", "None") else text)
        except json.JSONDecodeError:
            value = None if text == "None" else text
        overrides.setdefault(section, {})[field] = value
    return overrides


def run_convert(arguments: argparse.Namespace) -> None:
    from living_moe.conversion import convert
    from living_moe.texts import calibration_ids

    overrides: dict[str, Any] = dict(parse_overrides(arguments.set))
    if arguments.dtype:
        overrides["dtype"] = arguments.dtype
    ids = None if arguments.calibration is None else calibration_ids(arguments.source, arguments.calibration)
    convert(
        arguments.source,
        arguments.target,
        preset=arguments.preset,
        calibration=ids,
        verify=not arguments.no_verify,
        **overrides,
    )
    print(f"living checkpoint written to {arguments.target}")


def run_ternarize(arguments: argparse.Namespace) -> None:
    from living_moe.conversion.convert import copy_tokenizer, free_directory
    from living_moe.conversion.export import load_living
    from living_moe.texts import calibration_ids

    target = free_directory(arguments.target)
    ids = None if arguments.calibration is None else calibration_ids(arguments.source, arguments.calibration)
    model = load_living(arguments.source)
    before = model.expert_bytes
    reports = model.ternarize(ids)
    if arguments.pack:
        model.pack_experts()
    model.save_pretrained(target)
    copy_tokenizer(arguments.source, target)
    errors = "they were ternary already"
    if reports:
        worst, plain = (
            max(float(getattr(report, name).max()) for report in reports if report.uids)
            for name in ("calibrated_E", "absmean_E")
        )
        errors = f"largest relative error of an expert {worst:.3f} (plain absmean {plain:.3f})"
    print(f"experts: {before:,} bytes before, {model.expert_bytes:,} after; {errors}")
    print(f"ternary checkpoint written to {target}")


def run_export(arguments: argparse.Namespace) -> None:
    from living_moe.conversion import export

    export(arguments.source, arguments.target, to=arguments.to, field=arguments.field, verify=not arguments.no_verify)
    print(f"checkpoint written to {arguments.target}")


def run_inspect(arguments: argparse.Namespace) -> None:
    from living_moe.inspection import inspect_checkpoint, show

    show(inspect_checkpoint(arguments.checkpoint), Console(), events=arguments.events)


def run_lineage(arguments: argparse.Namespace) -> None:
    from living_moe.training.observatory.lineage_page import PAGE_NAME, write_lineage_page
    from living_moe.training.observatory.records import read_run

    run = read_run(arguments.directory)
    path = write_lineage_page(run, arguments.out or arguments.directory / PAGE_NAME)
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"lineage of {len(run.lives()):,} experts written to {path}")


def run_watch(arguments: argparse.Namespace) -> None:
    from living_moe.training.observatory.watch import serve

    def announce(url: str) -> None:
        print(f"watching {arguments.directory} at {url} (Ctrl-C ends it)", flush=True)

    serve(arguments.directory, port=arguments.port, announce=announce)


def run_space(arguments: argparse.Namespace) -> None:
    from living_moe.space import write_space

    target = write_space(arguments.source, arguments.target, title=arguments.title)
    print(f"Space written to {target}; push it with: hf upload YOU/NAME {target} --repo-type space")


def run_train(arguments: argparse.Namespace) -> None:
    from living_moe.training.train import main as train

    train(arguments.arguments)


def run_quickstart(arguments: argparse.Namespace) -> None:
    from living_moe.quickstart import quickstart

    quickstart(
        arguments.output, first=arguments.first, second=arguments.second, seed=arguments.seed, smoke=arguments.smoke
    )


def run_experts(arguments: argparse.Namespace) -> None:
    from living_moe.experts import show_experts

    show_experts(
        arguments.model,
        arguments.text,
        Console(),
        top=arguments.top,
        block_size=arguments.block_size,
        max_blocks=arguments.blocks,
        batch_size=arguments.batch_size,
        leave_out=not arguments.no_leave_out,
        markdown=arguments.markdown,
        record=arguments.record,
    )


def run_pictures(arguments: argparse.Namespace) -> None:
    from living_moe.experts import show_pictures

    show_pictures(
        arguments.directory,
        Console(),
        out=arguments.out,
        theme=arguments.theme,
        kind=arguments.format,
        text=arguments.text,
    )


def run_card(arguments: argparse.Namespace) -> None:
    from living_moe.modeling_living_moe import LivingMoeForCausalLM
    from living_moe.records import write_card

    model = LivingMoeForCausalLM.from_pretrained(arguments.checkpoint)
    print(write_card(model, arguments.checkpoint.resolve()))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 1 after one clear line about what was wrong."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except LivingMoeError as error:
        print(f"living-moe {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
