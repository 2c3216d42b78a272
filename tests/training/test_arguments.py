"""Arguments: a file, then flags; whatever is unknown or senseless is an error that names it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import SECTIONS
from living_moe.training.arguments import TrainArguments, build_parser, parse_arguments

LEAST = ["--model", "m", "--data-files", "a.txt"]


def test_flags_set_arguments_and_sections() -> None:
    flags = ["--lr", "1e-2", "--batch-size", "3", "--gradient-checkpointing", "--no-append-eos"]
    flags += ["--lifecycle.interval", "5", "--lifecycle.enabled", "false", "--lifecycle.max_experts", "none"]
    flags += ["--receptive_field.decay", "0.9", "--lifecycle.policy", "load", "--experts.ternary_tiers", "0", "1"]
    arguments = parse_arguments([*LEAST, "b.txt", *flags])
    assert arguments.data_files == ["a.txt", "b.txt"]
    assert (arguments.lr, arguments.batch_size, arguments.gradient_checkpointing) == (1e-2, 3, True)
    assert arguments.append_eos is False
    assert arguments.sections == {
        "lifecycle": {"interval": 5, "enabled": False, "max_experts": None, "policy": "load"},
        "receptive_field": {"decay": 0.9},
        "experts": {"ternary_tiers": [0, 1]},
    }


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_flags_win_over_the_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"run.{suffix}"
    yaml = """
        model: from-file
        data-files: a.txt
        lr: 2e-3
        max_steps: 7
        lifecycle:
          interval: 3
          split_load: 2e0
        vitals.decay: 0.5
    """
    content = {
        "model": "from-file", "data-files": "a.txt", "lr": 2e-3, "max_steps": 7,
        "lifecycle": {"interval": 3, "split_load": 2.0}, "vitals.decay": 0.5,
    }  # fmt: skip
    file.write_text(yaml if suffix == "yaml" else json.dumps(content))
    arguments = parse_arguments(["--config", str(file), "--max-steps", "9", "--lifecycle.interval", "4"])
    assert (arguments.model, arguments.lr, arguments.max_steps) == ("from-file", 2e-3, 9)
    assert arguments.data_files == ["a.txt"]
    assert arguments.sections == {"lifecycle": {"interval": 4, "split_load": 2.0}, "vitals": {"decay": 0.5}}


def test_every_argument_and_every_field_of_a_section_has_a_flag_with_help() -> None:
    actions = {action.dest: action for action in build_parser()._actions}
    for field in dataclasses.fields(TrainArguments):
        if field.name != "sections":
            assert actions[field.name].help
    for section, cls in SECTIONS.items():
        for name in cls.field_names():
            assert f"{section}.{name}" in actions
    build_parser().format_help()  # a lone % in a help text would raise


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batchsize", "3"], "unknown argument --batchsize. Did you mean '--batch-size'"),
        (["--lifecycle.intervall", "3"], "unknown argument --lifecycle.intervall. Did you mean '--lifecycle.interval'"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--lr", "nan"], "lr must be a finite number, got nan"),
        (["--lr", "-1"], "lr must be >= 0, got -1.0"),
        (["--batch-size", "0"], "batch_size must be >= 1, got 0"),
        (["--block-size", "1"], "block_size must be >= 2"),
        (["--optimizer", "adam"], "optimizer is 'adam'. Did you mean 'adamw'"),
        (["--preset", "grown"], "unknown preset 'grown'. Did you mean 'grow'"),
        (["--lifecycle.interval", "0"], "lifecycle.interval must be >= 1, got 0"),
        (["--lifecycle.enabled", "maybe"], "invalid bool value: 'maybe'"),
        (["--dataset", "d"], "either dataset or data_files"),
    ],
)
def test_bad_flags_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_arguments([*LEAST, *flags])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modle": "m"}, "unknown key 'modle'. Did you mean 'model'"),
        ({"lifecycle": {"intervall": 5}}, "unknown field lifecycle.intervall. Did you mean 'interval'"),
        ({"lifecycle": 5}, "lifecycle must be a mapping of its fields, got 5"),
        ({"batch_size": "eight"}, "batch_size must be int, got 'eight'"),
        ({"batch_size": True}, "batch_size must be int, got True"),
        ({"data_files": [1]}, "data_files must be a list of texts"),
        ([1], "must hold a mapping from argument to value, got list"),
    ],
)
def test_bad_files_are_named(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError) as caught:
        parse_arguments(["--config", str(file), "--model", "m", "--dataset", "d"])
    assert message in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere.yaml does not exist"):
        parse_arguments(["--config", str(tmp_path / "nowhere.yaml")])
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigurationError, match="cannot read .*broken.yaml"):
        parse_arguments(["--config", str(tmp_path / "broken.yaml")])
    with pytest.raises(ConfigurationError, match="model must be a checkpoint; give --model"):
        parse_arguments(["--data-files", "a.txt"])
