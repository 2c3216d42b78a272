"""The `living-moe` command: what it does, and one clear line when it cannot."""

from pathlib import Path

import factories
import pytest
import torch
from records_of_runs import write_run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import living_moe
from living_moe.cli import main, parse_overrides
from living_moe.configuration.errors import ConfigurationError
from living_moe.quickstart import Sizes, quickstart
from living_moe.training.checkpointing import newest_model
from living_moe.training.observatory import read_run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    factories.source_model("mixtral").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_convert_writes_a_living_checkpoint_that_computes_the_same(source: Path, tmp_path: Path, capsys):
    target = tmp_path / "living"
    assert main(["convert", str(source), str(target), "--preset", "grow", "--set", "lifecycle.interval=7"]) == 0
    assert "max |logits - source logits| = 0 " in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.config.lifecycle.interval == 7
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        assert torch.equal(loaded(ids).logits, expected)


@pytest.mark.parametrize("pack", [False, True])
def test_ternarize_fits_to_a_text_and_says_what_it_cost(pack: bool, tmp_path: Path, capsys):
    model = living_moe.convert(factories.source_model("mixtral"), tmp_path / "living", preset="grow")
    words = {f"w{number}": number for number in range(60)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "living")
    ids = factories.token_ids(1, 400, high=60)[0]
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in ids.tolist()))
    arguments = ["ternarize", str(tmp_path / "living"), str(tmp_path / "out"), "--calibration"]
    arguments += [str(tmp_path / "text.txt")]
    assert main(arguments + ["--pack"] * pack) == 0
    reports = model.ternarize(ids)
    worst = max(float(report.calibrated_E.max()) for report in reports)
    floats = 4 * 16 * 3 * 32 * 16
    after = 16 * 3 * (103 + 4) if pack else floats
    assert f"{floats:,} bytes before, {after:,} after; largest relative error of an expert {worst:.3f}" in (
        capsys.readouterr().out
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    model.set_experts_implementation("eager")
    assert torch.equal(factories.logits(loaded, ids[None, :20]), factories.logits(model, ids[None, :20]))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"Ternary experts: tiers 0; {'packed' if pack else 'as latents'}" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "never overwrites" in capsys.readouterr().err


def test_convert_never_overwrites(source: Path, tmp_path: Path, capsys):
    (tmp_path / "living").mkdir()
    (tmp_path / "living" / "mine.txt").write_text("keep")
    assert main(["convert", str(source), str(tmp_path / "living")]) == 1
    error = capsys.readouterr().err
    assert "never overwrites" in error
    assert len(error.strip().splitlines()) == 1
    assert [entry.name for entry in (tmp_path / "living").iterdir()] == ["mine.txt"]


def test_inspect_shows_populations_parameters_and_events(source: Path, tmp_path: Path, capsys):
    model = living_moe.convert(source, preset="grow")
    newborn = model.split_expert(0, 1).children[0]
    model.save_pretrained(tmp_path / "living")
    assert main(["inspect", str(tmp_path / "living")]) == 0
    shown = capsys.readouterr().out
    assert "split" in shown
    assert str(newborn) in shown
    assert f"{sum(p.numel() for p in living_moe.convert(source, preset='grow').parameters()):,}" not in shown
    assert "Populations" in shown


def test_inspect_of_something_else_is_one_clear_line(tmp_path: Path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["lifecycle", "lifecycle.interval", "=3", "interval=3"])
def test_a_malformed_override_is_refused(text: str):
    with pytest.raises(ConfigurationError, match=r"section\.field=value"):
        parse_overrides([text])


def test_overrides_are_json_values_or_plain_text():
    assert parse_overrides(["a.b=3", "a.c=0.5", "a.d=true", "a.e=None", "d.f=load"]) == {
        "a": {"b": 3, "c": 0.5, "d": True, "e": None},
        "d": {"f": "load"},
    }


def test_the_quickstart_tells_the_whole_story_in_small(tmp_path: Path):
    sizes = Sizes(
        characters=60_000, vocabulary=300, block=32, batch=4, hidden=32, layers=2, experts=4, pretrain_steps=4,
        finetune_steps=6, eval_blocks=4,
        lifecycle={"interval": 2, "warmup_steps": 2, "patience": 1},
    )  # fmt: skip
    rows = quickstart(tmp_path / "run", sizes=sizes)
    assert rows["plain"].first_before == rows["living"].first_before
    assert sum(rows["living"].experts) > 8
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} >= {
        "lineage.png",
        "timeline.png",
        "expert-map.png",
        "lineage.html",
    }
    run = read_run(tmp_path / "run")
    assert run.state == "finished" and run.series("loss")[0] == list(range(1, 7)) and run.vitals_steps == [0, 6]
    assert run.events == read_run(tmp_path / "run" / "living-trained").events != []
    assert newest_model(tmp_path / "run") == tmp_path / "run" / "living-trained"
    assert "perplexity" in (tmp_path / "run" / "living-trained" / "README.md").read_text(encoding="utf-8").lower()


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A run's directory with a small checkpoint in `final`, its tokenizer and a text."""
    living_moe.convert(factories.source_model("mixtral"), tmp_path / "run" / "final", preset="grow")
    words = {f"w{number}": number for number in range(60)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "run" / "final")
    ids = factories.token_ids(1, 200, high=60)[0]
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in ids.tolist()))
    write_run(tmp_path / "run", layers=2, experts=8, snapshots=5)
    return tmp_path / "run"


def test_experts_prints_the_leaderboard_and_records_it_in_the_card(measured: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    final, text = str(measured / "final"), str(tmp_path / "text.txt")
    before = factories.logits(AutoModelForCausalLM.from_pretrained(final), torch.arange(12).view(1, 12))
    arguments = ["experts", final, "--text", text, "--block-size", "16", "--top", "3", "--record"]
    assert main([*arguments, "--markdown", str(tmp_path / "board.md")]) == 0
    out = capsys.readouterr().out
    assert "The 3 most valuable of 16 experts" in out and "What they read" in out
    assert "all layers (16 experts): rank correlation with leave-one-out: first order" in out
    assert (tmp_path / "board.md").read_text().count("| frozen |") + (tmp_path / "board.md").read_text().count(
        "| trains |"
    ) == 16
    assert "The 10 most valuable of 16 experts" in (measured / "final" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(final)
    assert len(loaded.config.provenance["leaderboard"]["rows"]) == 10
    assert torch.equal(factories.logits(loaded, torch.arange(12).view(1, 12)), before)
    assert main(["card", final]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top", "0"], "top is 0; give a number of at least 1"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--block-size", "5000"], "less than one block"),
    ],
)
def test_experts_says_what_is_wrong(more: list[str], message: str, measured: Path, tmp_path: Path, capsys):
    assert main(["experts", str(measured / "final"), "--text", str(tmp_path / "text.txt"), *more]) == 1
    assert message in capsys.readouterr().err


def test_pictures_draws_what_there_is_and_says_what_is_missing(measured: Path, tmp_path: Path, capsys, monkeypatch):
    drawn = ("timeline", "load-by-class")
    monkeypatch.setattr("living_moe.experts.PICTURES", drawn)
    assert main(["pictures", str(measured), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["timeline.png"]
    assert "no load-by-class: what experts read is not in a run's records" in out
    arguments = ["pictures", str(measured), "--text", str(tmp_path / "text.txt"), "--theme", "both", "--format", "svg"]
    assert main(arguments) == 0
    assert sorted(path.name for path in (measured / "pictures").iterdir()) == [
        "load-by-class-dark.svg", "load-by-class.svg", "timeline-dark.svg", "timeline.svg",
    ]  # fmt: skip
    assert main(["pictures", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_pictures_need_a_checkpoint_to_read_a_text(tmp_path: Path, capsys):
    write_run(tmp_path / "run", layers=1, experts=4, snapshots=3)
    assert main(["pictures", str(tmp_path / "run"), "--text", "text.txt"]) == 1
    assert "has no checkpoint yet" in capsys.readouterr().err
