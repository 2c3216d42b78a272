"""Arguments of the training script: one dataclass, filled from a file, then from flags (a flag wins).

Every field is a flag, `--batch-size 8`, and a key of a YAML or JSON file, `batch_size: 8`. The sections of the model's
config are set the same way, `--lifecycle.interval 5` or `lifecycle: {interval: 5}`, and override what the model has.
Nothing is guessed: an unknown key or flag is an error that names the closest known one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.presets import known_preset
from living_moe.configuration.sections import SECTIONS, did_you_mean

OPTIMIZERS = ("living_adamw", "adamw", "adamw_fused", "sgd", "adafactor")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
MIXED_PRECISIONS = ("no", "bf16", "fp16")
EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "active")
#: What `--resume-from` takes besides a directory.
LATEST = "latest"


def argument(default: Any, text: str, *, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with its help text (meaning, unit) and, for a few, the values it may have."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(kw_only=True)
class TrainArguments:
    """What `living_moe.training.train` does. Sizes are per process unless said otherwise; losses are in nats."""

    model: str = argument("", "living checkpoint to train, or a source checkpoint (directory or hub id) to graft first")
    preset: str | None = argument(
        None, "preset of the graft when --model is a source checkpoint (default frozen-graft)"
    )
    tokenizer: str | None = argument(None, "directory or hub id of the tokenizer (default: the one beside --model)")
    experts_implementation: str | None = argument(
        None, "how experts are multiplied (default: the model's)", choices=EXPERTS_IMPLEMENTATIONS
    )

    dataset: str | None = argument(None, "hub id or local directory of a dataset to train on")
    dataset_config: str | None = argument(None, "configuration of --dataset, e.g. wikitext-2-raw-v1")
    split: str = argument("train", "split of --dataset or --data-files, slices allowed: train[:1%%]")
    data_files: list[str] = field(
        default_factory=list,
        metadata={"help": "local .txt, .json, .jsonl or .parquet files to train on (instead of --dataset)"},
    )
    text_column: str = argument("text", "column that holds the text")
    append_eos: bool | None = argument(
        None, "end every row with the tokenizer's EOS token (default: yes, except for lines of text files)"
    )
    eval_data_files: list[str] = field(
        default_factory=list, metadata={"help": "local files to evaluate on; a perplexity for each"}
    )
    calibration_file: str | None = argument(
        None, "text of what the model knew before, for receptive fields (default: sampled from the model itself)"
    )
    block_size: int = argument(256, "tokens per training sequence; text is packed into blocks without padding")

    batch_size: int = argument(8, "sequences per process and forward pass")
    gradient_accumulation: int = argument(1, "forward passes per optimizer step")
    max_steps: int = argument(1000, "optimizer steps in all, resumed ones included")
    optimizer: str = argument(
        "living_adamw", "experts without tokens stay as they are with the default", choices=OPTIMIZERS
    )
    lr: float = argument(3e-4, "peak learning rate")
    lr_scheduler: str = argument("cosine", "shape of the learning rate over the run", choices=SCHEDULERS)
    warmup_steps: int = argument(0, "optimizer steps over which the learning rate rises from 0")
    weight_decay: float = argument(0.01, "decoupled weight decay (L2 penalty for sgd and adafactor)")
    max_grad_norm: float = argument(1.0, "clip the gradient to this L2 norm; 0 does not clip")
    mixed_precision: str | None = argument(
        None, "autocast dtype (default: what `accelerate config` says, else no)", choices=MIXED_PRECISIONS
    )
    gradient_checkpointing: bool = argument(False, "recompute activations in the backward pass: less memory, more time")
    tune_malloc: bool = argument(
        False, "CPU, glibc: keep freed memory mapped between steps (faster; the process never shrinks again)"
    )
    seed: int = argument(0, "seed of data order, dropout and calibration samples")

    eval_steps: int = argument(0, "optimizer steps between evaluations; 0 evaluates before and after only")
    max_eval_blocks: int = argument(0, "evaluate at most this many blocks of each file; 0 is all of them")
    save_steps: int = argument(0, "optimizer steps between checkpoints; 0 saves none on the way")
    keep_checkpoints: int = argument(2, "newest checkpoints kept in --output-dir; 0 keeps all")
    log_steps: int = argument(10, "optimizer steps between lines where there is no terminal for a progress bar")
    snapshot_steps: int = argument(50, "optimizer steps, at least, between records of all experts; 0 keeps none")
    report_to: str = argument(
        "auto", "trackers: tensorboard, trackio, wandb (several with commas), none, auto (tensorboard if installed)"
    )
    output_dir: str = argument("living-moe-run", "directory of checkpoints, log and final model")
    resume_from: str | None = argument(
        None, f"checkpoint directory to go on from, or '{LATEST}' for the newest in --output-dir"
    )
    push_to_hub: str | None = argument(None, "hub repository (user/name) to push the final model to")

    #: Per section of `LivingMoeConfig`, fields to set otherwise.
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in argument_types().items():
            setattr(self, name, checked(name, getattr(self, name), hint))
        for name in ("block_size", "batch_size", "gradient_accumulation", "max_steps", "log_steps"):
            self.require(name, getattr(self, name) >= 1, ">= 1")
        self.require("block_size", self.block_size >= 2, ">= 2 (a token is predicted from the one before it)")
        for name in (
            "lr",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "seed",
            "eval_steps",
            "save_steps",
            "snapshot_steps",
        ):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("keep_checkpoints", "max_eval_blocks"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        for name, definition in self.__dataclass_fields__.items():
            choices = definition.metadata.get("choices")
            if choices is not None and getattr(self, name) not in (None, *choices):
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}.{did_you_mean(str(getattr(self, name)), choices)}"
                )
        if self.preset is not None:
            known_preset(self.preset)
        self.require("model", bool(self.model) or self.resume_from is not None, "a checkpoint; give --model")
        if bool(self.dataset) == bool(self.data_files):
            raise ConfigurationError(
                f"give either dataset or data_files, got dataset {self.dataset!r} and data_files {self.data_files!r}."
            )
        for section, fields in self.sections.items():
            if section not in SECTIONS:
                raise ConfigurationError(f"unknown section {section!r}.{did_you_mean(section, SECTIONS)}")
            SECTIONS[section].from_value(fields)

    def require(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ConfigurationError(f"{name} must be {wanted}, got {getattr(self, name)!r}.")


def argument_types() -> dict[str, Any]:
    """Type of every argument, sections left out."""
    hints = typing.get_type_hints(TrainArguments)
    return {name: hints[name] for name in TrainArguments.__dataclass_fields__ if name != "sections"}


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type the field has; an int is taken for a float and one path for a list of paths.

    Raises:
        ConfigurationError: It is of another type, or not finite.
    """
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if list[str] in accepted:
        value = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    elif isinstance(value, bool):
        if bool in accepted:
            return value
    elif isinstance(value, int) and int not in accepted and float in accepted:
        return float(value)
    elif isinstance(value, accepted) and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    raise ConfigurationError(f"{name} must be {_type_name(accepted)}, got {value!r}.")


def _type_name(accepted: Sequence[Any]) -> str:
    names = {list[str]: "a list of texts", float: "a finite number", type(None): "None", str: "a text"}
    return " or ".join(names.get(kind, getattr(kind, "__name__", str(kind))) for kind in accepted)


def parse_arguments(argv: Sequence[str]) -> TrainArguments:
    """Arguments from the command line and the file that `--config` names.

    Raises:
        ConfigurationError: An unknown flag or key, a value of the wrong type, values that make no sense.
    """
    given = vars(build_parser().parse_args(list(argv)))
    file = given.pop("config", None)
    values = {} if file is None else read_file(Path(file))
    sections = values.pop("sections", {})
    for name, value in given.items():
        section, dot, key = name.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
        else:
            values[name] = value
    return TrainArguments(**values, sections=sections)


class _Parser(argparse.ArgumentParser):
    """argparse that raises our errors instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message[:1].lower() + message[1:] + " (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            raise ConfigurationError(f"unknown argument {flag}.{did_you_mean(flag.replace('_', '-'), known)}")
        return parsed


def build_parser() -> argparse.ArgumentParser:
    """A flag per argument and per field of every section; nothing is set that is not given."""
    parser = _Parser(
        prog="living_moe.training.train",
        description="Train a living mixture of experts. Start with `accelerate launch -m living_moe.training.train` "
        "(many processes) or `python -m living_moe.training.train` (one).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML or JSON file of arguments; flags win over it")
    hints = argument_types()
    for definition in dataclasses.fields(TrainArguments):
        if definition.name == "sections":
            continue
        default = "" if definition.default in (dataclasses.MISSING, None, "") else f" (default {definition.default})"
        text = definition.metadata["help"] + default.replace("%", "%%")
        _add_flag(parser, f"--{definition.name.replace('_', '-')}", definition.name, hints[definition.name], text)
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(f"{section} of the model's config", f"override the model's own {section}")
        section_hints = typing.get_type_hints(cls)
        for definition in dataclasses.fields(cls):
            name = f"{section}.{definition.name}"
            factory = definition.default_factory
            value: Any = definition.default if factory is dataclasses.MISSING else factory()
            _add_flag(group, f"--{name}", name, section_hints[definition.name], f"default {value}")
    return parser


def _add_flag(parser: Any, flag: str, name: str, hint: Any, text: str) -> None:
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    options: dict[str, Any] = {"dest": name, "help": text}
    if list[str] in accepted:
        parser.add_argument(flag, nargs="+", metavar="FILE", **options)
    elif list[int] in accepted:
        parser.add_argument(flag, nargs="*", type=int, metavar="INT", **options)
    elif bool in accepted and "." not in flag:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    else:
        parser.add_argument(flag, type=_reader(accepted), metavar=_metavar(accepted), **options)


def _metavar(accepted: Sequence[Any]) -> str:
    return next(kind.__name__.upper() for kind in accepted if kind is not type(None))


def _reader(accepted: Sequence[Any]) -> Any:
    """From the text of a flag to a value: the type's own syntax, with true/false, and none where None is allowed."""

    def read(text: str) -> Any:
        if type(None) in accepted and str not in accepted and text.lower() in ("none", "null"):
            return None
        if bool in accepted and text.lower() in ("true", "false"):
            return text.lower() == "true"
        for kind in (int, float, str):
            if kind in accepted:
                return kind(text)
        raise ValueError(text)

    read.__name__ = _metavar(accepted).lower()
    return read


def read_file(path: Path) -> dict[str, Any]:
    """Arguments from a YAML or JSON file: known keys only, sections under "sections".

    Raises:
        ConfigurationError: The file cannot be read, is no mapping, or has an unknown key.
    """
    if not path.is_file():
        raise ConfigurationError(f"config file {path} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{path} must hold a mapping from argument to value, got {type(content).__name__}.")
    values: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    hints = argument_types()
    known = [*hints, *SECTIONS]
    for key, value in content.items():
        name = str(key).replace("-", "_")
        section, dot, inner = name.partition(".")
        if dot and section in SECTIONS:
            sections.setdefault(section, {})[inner] = value
        elif name in SECTIONS:
            if not isinstance(value, Mapping):
                raise ConfigurationError(f"{path}: {key} must be a mapping of its fields, got {value!r}.")
            sections.setdefault(name, {}).update(value)
        elif name in known:
            values[name] = _number(value, hints[name])
        else:
            raise ConfigurationError(f"{path}: unknown key {key!r}.{did_you_mean(name, known)}")
    for section, fields in sections.items():
        section_hints = typing.get_type_hints(SECTIONS[section])
        sections[section] = {name: _number(value, section_hints.get(name)) for name, value in fields.items()}
    return {**values, "sections": sections}


def _number(value: Any, hint: Any) -> Any:
    """YAML 1.1 reads 3e-4 (without a dot) as text; where a number is wanted it is one."""
    if isinstance(value, str) and float in (typing.get_args(hint) or (hint,)):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


__all__ = ["LATEST", "TrainArguments", "parse_arguments"]
