"""The script, from text files and a source checkpoint to a model that loads, resumed and in two processes."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError, TrainingError
from living_moe.training.train import Run, main

BUSY = ["--lifecycle.interval", "2", "--lifecycle.warmup_steps", "2", "--lifecycle.patience", "1"]
BUSY += ["--lifecycle.split_load", "1.2", "--lifecycle.cooldown_steps", "0", "--lifecycle.min_age_steps", "2"]
SMALL = ["--receptive_field.attention_rank", "4", "--receptive_field.head_rank", "4"]


def flags(source: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(source / "model"), "--data-files", str(source / "new.txt"), "--output-dir", str(output)]
    return [*given, "--block-size", "24", "--batch-size", "4", "--lr", "1e-2", "--max-steps", "8", *more]


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_source_checkpoint_learns_a_new_domain(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grafted on the fly, calibrated on its own samples, evaluated before and after, with a card that says so."""
    held_out = ["--eval-data-files", str(source / "old.txt"), str(source / "new.txt")]
    steps = ["--eval-steps", "4", "--max-eval-blocks", "20"]
    run = main(flags(source, tmp_path, *BUSY, *SMALL, *held_out, *steps))
    assert run.model.config.preset == "frozen-graft" and sum(run.model.expert_counts) > 16
    assert run.losses[-1] < run.losses[0] and len(run.losses) == 8
    before, after = run.evaluations[str(source / "new.txt")]
    assert before is not None and after.perplexity < before.perplexity
    said = capsys.readouterr().err
    assert "tokens that the model itself wrote" in said
    assert "step 4, " in said and "split of" in said
    assert f"perplexity on {source / 'new.txt'}: {before.perplexity:.2f} -> {after.perplexity:.2f}" in said

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert isinstance(model, LivingMoeForCausalLM) and model.expert_counts == run.model.expert_counts
    assert model.config.provenance["datasets"] == ["new.txt"]
    assert model.config.provenance["perplexities"][1] == {
        "dataset": "new.txt", "before": before.perplexity, "after": after.perplexity,
    }  # fmt: skip
    assert "new.txt" in (tmp_path / "final" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    written = model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert written.shape[1] > 4
    steps_logged = [entry for entry in log(tmp_path) if "loss" in entry]
    assert [entry["step"] for entry in steps_logged] == list(range(1, 9))
    assert [entry["loss"] for entry in steps_logged] == run.losses


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_a_resumed_script_is_the_uninterrupted_script(preset: str, source: Path, tmp_path: Path) -> None:
    more = [*BUSY, *(SMALL if preset == "frozen-graft" else []), "--preset", preset]
    more += ["--save-steps", "3", "--keep-checkpoints", "0", "--eval-data-files", str(source / "old.txt")]
    whole = main(flags(source, tmp_path / "whole", *more))
    assert any(entry["events"] for entry in log(tmp_path / "whole")[3:])

    # The run dies after step 7; its log is ahead of its last checkpoint.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "log.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 0.0}) + "\n" for n in range(8))
    )
    os.rename(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed_flags = [flag for flag in more if flag not in ("--preset", preset)]
    again = main(flags(source, tmp_path / "again", *resumed_flags, "--resume-from", "latest"))
    assert again.losses == whole.losses[3:]
    ours, theirs = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("again", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.json", "lineage.jsonl"):
        assert (tmp_path / "again" / "final" / name).read_text() == (tmp_path / "whole" / "final" / name).read_text()
    assert [entry["step"] for entry in log(tmp_path / "again")] == list(range(9))
    assert log(tmp_path / "again")[4:] == log(tmp_path / "whole")[3:]


def test_two_launched_processes_are_one(source: Path, tmp_path: Path) -> None:
    more = ["--preset", "grow", *BUSY, "--max-steps", "6"]
    alone = main(flags(source, tmp_path / "one", *more))
    # On a CPU accelerate starts one process whatever --num_processes says, unless told --multi_gpu.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "living_moe.training.train"]
    process = subprocess.run(
        [*command, *flags(source, tmp_path / "two", *more, "--batch-size", "2")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert "in 2 processes" in process.stderr
    entries = log(tmp_path / "two")
    assert [entry["loss"] for entry in entries] == pytest.approx(alone.losses, abs=1e-5)
    assert [entry["experts"] for entry in entries][-1] == alone.model.expert_counts
    assert (tmp_path / "two" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("optimizer", ["living_adamw", "adamw", "adamw_fused", "sgd", "adafactor"])
def test_every_optimizer_by_its_name(optimizer: str, source: Path, tmp_path: Path) -> None:
    run = main(flags(source, tmp_path, "--preset", "grow", *BUSY, "--optimizer", optimizer, "--max-steps", "4"))
    assert len(run.losses) == 4 and sum(run.model.expert_counts) > 16


def test_a_living_checkpoint_goes_on_living(source: Path, tmp_path: Path) -> None:
    first = main(flags(source, tmp_path / "first", "--preset", "grow", *BUSY, "--max-steps", "4"))
    AcceleratorState._reset_state()  # its precision is fixed for the life of a process
    more = ["--lifecycle.interval", "3", "--gradient-accumulation", "2", "--gradient-checkpointing"]
    more += ["--mixed-precision", "bf16", "--lr-scheduler", "linear", "--warmup-steps", "2", "--max-steps", "4"]
    command = flags(source, tmp_path / "second", *more, "--model", str(tmp_path / "first" / "final"))
    second = main(command)
    assert second.model.config.lifecycle.interval == 3
    assert second.model.config.lifecycle.patience == first.model.config.lifecycle.patience
    assert second.model.steps_lived == 8
    assert list(second.model.lineage)[: len(first.model.lineage)] == list(first.model.lineage)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second" / "final").config.use_cache
    with pytest.raises(ConfigurationError, match="is a living checkpoint already; leave preset out"):
        main([*command, "--preset", "grow"])


def test_calibration_text_is_used(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run: Run = main(flags(source, tmp_path, *SMALL, "--calibration-file", str(source / "old.txt"), "--max-steps", "1"))
    tokenizer = AutoTokenizer.from_pretrained(source / "model")
    ids = tokenizer((source / "old.txt").read_text(), add_special_tokens=False)["input_ids"]
    fields = run.model.model.fields
    assert fields is not None and torch.equal(
        fields.old_counts, torch.bincount(torch.tensor(ids), minlength=fields.vocab_size)
    )
    assert "calibrated receptive fields on" in capsys.readouterr().err


def test_what_is_missing_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot read a model config from .*nowhere"):
        main(flags(source, tmp_path, "--model", str(tmp_path / "nowhere")))
    with pytest.raises(TrainingError, match="cannot load a tokenizer from .*name one with --tokenizer"):
        main(flags(source, tmp_path, "--tokenizer", str(tmp_path)))
    with pytest.raises(TrainingError, match="block_size is 1000 but the model was made for 128 positions"):
        main(flags(source, tmp_path, "--block-size", "1000"))
    (tmp_path / "short.txt").write_text("the cat")
    with pytest.raises(TrainingError, match="less than one block of 24"):
        main(flags(source, tmp_path, "--data-files", str(tmp_path / "short.txt")))
    tokenizer = AutoTokenizer.from_pretrained(source / "model")
    tokenizer.add_tokens([f"<extra {number}>" for number in range(3)])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(TrainingError, match="the tokenizer has .* tokens but the model only .* embeddings"):
        main(flags(source, tmp_path, "--tokenizer", str(tmp_path / "larger")))


def test_the_command_line_ends_in_one_line_about_what_was_wrong(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *flags(source, tmp_path, "--lr", "1e30", "--max-grad-norm", "0")])
    monkeypatch.delitem(sys.modules, "living_moe.training.train")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("living_moe.training.train", run_name="__main__")
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert "error: step " in message and "stopped before the optimizer step" in message and "layer 1: " in message
    assert "Traceback" not in message
