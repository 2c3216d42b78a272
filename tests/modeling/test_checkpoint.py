"""A checkpoint loads completely, or not at all with an error that names what is wrong; a save is whole or never was."""

import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from factories import live, living_model, logits, mixed_text
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from living_moe import LivingMoeForCausalLM, LivingMoeModel
from living_moe.configuration.errors import CheckpointError, ConfigurationError
from living_moe.modeling_living_moe.lifecycle.lineage import Lineage

IDS = mixed_text(2, 8)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
WEIGHTS = "model.safetensors"
BLOCK = "model.backbone.layers.0.mlp."


@functools.cache
def model_with_a_past() -> LivingMoeForCausalLM:
    model = living_model("mixtral", "frozen-graft")
    live(model, 20, seed=3)
    for layer in range(2):
        model.split_expert(layer, model.living_blocks[layer].population.members[-1].uid)
    return model


@functools.cache
def saved(max_shard_size: str) -> Path:
    directory = Path(tempfile.mkdtemp())
    model_with_a_past().save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(saved("5GB"), tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return shutil.copytree(saved("100KB"), tmp_path / "sharded")


def refuses(directory: Path, *named: str, error: type[ValueError] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(caught.value, ValueError)
    for name in named:
        assert name in str(caught.value)


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, -1])
def test_a_truncated_file_is_named(checkpoint: Path, kept: float) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    end = int(len(content) * kept) if 0 < kept < 1 else int(kept)
    (checkpoint / WEIGHTS).write_bytes(content[:end])
    refuses(checkpoint, WEIGHTS, "truncated")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refuses(sharded, shard.name, "truncated")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.unlink()
    refuses(sharded, shard.name, "missing")


def test_a_shard_that_lacks_a_tensor_names_it(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    refuses(sharded, name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "\x00"])
def test_a_damaged_shard_index_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    refuses(sharded, "model.safetensors.index.json")


def test_missing_weights_are_named(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    refuses(checkpoint, WEIGHTS)


def test_without_a_config_nothing_loads(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json"):
        LivingMoeForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("line", ['{"kind": "split"}', "not json", '{"kind": "birth", "step": 1}', "[]"])
def test_a_broken_lineage_is_named_by_file_and_line(checkpoint: Path, line: str) -> None:
    file = checkpoint / "lineage.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], line, *lines[5:]]))
    refuses(checkpoint, "lineage.jsonl, line 5")


def test_pickled_weights_are_never_read(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / WEIGHTS), checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    refuses(checkpoint, WEIGHTS)


# -- tensors that do not fit -------------------------------------------------------------------------------------------

A_TENSORS: dict[str, str] = {
    "expert weights": BLOCK + "experts.frozen.down_proj",
    "keys": BLOCK + "router.keys.trainable",
    "uids": BLOCK + "population.trainable.uid",
    "vitals": BLOCK + "vitals.frozen.load",
    "facets": BLOCK + "population.facet_normal",
    "attention": "model.backbone.layers.1.self_attn.q_proj.weight",
    "a delta": "head_delta.up.0",
    "densities": "model.fields.old_counts",
    "the head": "lm_head.weight",
    "steps": "model.clock.steps",
}


@pytest.mark.parametrize("what", A_TENSORS)
def test_a_missing_tensor_is_named(checkpoint: Path, what: str) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(A_TENSORS[what]))
    refuses(checkpoint, A_TENSORS[what], "missing")


@pytest.mark.parametrize("what", [name for name in A_TENSORS if name != "steps"])
def test_a_tensor_of_another_shape_is_named(checkpoint: Path, what: str) -> None:
    name = A_TENSORS[what]
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    refuses(checkpoint, name)


@pytest.mark.parametrize("name", [BLOCK + "experts.frozen.bias", "model.backbone.layers.7.mlp.router.keys.frozen", "x"])
def test_an_extra_tensor_is_named(checkpoint: Path, name: str) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.zeros(3)}))
    refuses(checkpoint, name, "unexpected")


def set_entry(name: str, index: int, value: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[BLOCK + "population." + name].view(-1).__setitem__(index, value)


def first_uid(tensors: dict[str, Tensor]) -> int:
    return int(tensors[BLOCK + "population.frozen.uid"][0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors[BLOCK + "population.frozen.uid"][1:].fill_(first_uid(tensors)), "repeat"),
        (set_entry("frozen.uid", 0, 9999), "exceed next_uid"),
        (set_entry("frozen.uid", 0, -1), "not a prefix"),
        (set_entry("leaf_uid", 0, 9999), "9999"),
        (set_entry("slab_sizes", 0, 99), "slab_sizes"),
        (lambda tensors: tensors[BLOCK + "population.trainable.uid"].fill_(-1), "slab_sizes|alive|top_k|leaves"),
    ],
    ids=["same uid twice", "uid never given", "hole", "leaf of nobody", "sizes", "nobody alive"],
)
def test_tables_that_describe_no_population_are_refused(
    checkpoint: Path, change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    edit_tensors(checkpoint, change)
    with pytest.raises(CheckpointError, match=named):
        AutoModelForCausalLM.from_pretrained(checkpoint)


# -- configs that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slab", ["frozen", "trainable"])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_wrong_count_names_the_tensors_it_does_not_fit(checkpoint: Path, slab: str, by: int) -> None:
    edit_config(checkpoint, lambda config: config["populations"][0].update({slab: config["populations"][0][slab] + by}))
    refuses(checkpoint, f"{BLOCK}experts.{slab}.down_proj")


@pytest.mark.parametrize("table", ["facets", "leaves"])
def test_a_wrong_table_size_names_the_table(checkpoint: Path, table: str) -> None:
    def one_more(config: dict[str, Any]) -> None:
        config["populations"][0][table] += 1

    edit_config(checkpoint, one_more)
    refuses(checkpoint, "leaf_path")


@pytest.mark.parametrize("change", [lambda p: p.pop(), lambda p: p.append({"trainable": 8})])
def test_a_wrong_number_of_layers_is_told(checkpoint: Path, change: Callable[[list[Any]], Any]) -> None:
    edit_config(checkpoint, lambda config: change(config["populations"]))
    refuses(checkpoint, "populations", "layers", error=ConfigurationError)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(populatoins=[]), "Did you mean 'populations'"),
        (lambda c: c["lifecycle"].update(intervall=3), "Did you mean 'interval'"),
        (lambda c: c["populations"][1].update(frozne=3), "Did you mean 'frozen'"),
        (lambda c: c["populations"][1].update(frozen=-3), r"populations\[1\]"),
        (lambda c: c.update(format_version=99), "format_version is 99"),
        (lambda c: c["backbone_config"].update(model_type="mixtrall"), "Did you mean 'mixtral'"),
    ],
    ids=["unknown key", "unknown field of a section", "unknown slab", "negative count", "newer format", "family"],
)
def test_a_config_that_makes_no_sense_is_told(
    checkpoint: Path, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    edit_config(checkpoint, change)
    with pytest.raises(ConfigurationError, match=named):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    from factories import source_model

    source_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mixtral"):
        LivingMoeForCausalLM.from_pretrained(tmp_path)


# -- interrupted saves -------------------------------------------------------------------------------------------------


class PowerFailure(BaseException):
    """Not an `Exception`, as a KeyboardInterrupt is not."""


@functools.cache
def successor() -> LivingMoeForCausalLM:
    """The same model later: more events, other weights."""
    model = LivingMoeForCausalLM.from_pretrained(saved("5GB"))
    live(model, 6, seed=8)
    return model


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, failure: Callable[[], Any]) -> list[str]:
    """Call `failure` at the n-th thing a save does to the disk; returns the list of what was done."""
    done: list[str] = []

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == number + 1:
                failure()
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (transformers.modeling_utils, "safe_save_file"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Lineage, "save"),
        (shutil, "rmtree"),
        (tempfile, "mkdtemp"),
        (type(model_with_a_past().config), "save_pretrained"),
        (transformers.GenerationConfig, "save_pretrained"),
    ]:
        monkeypatch.setattr(owner, name, wrapped(name, getattr(owner, name)))
    return done


def outcome(directory: Path) -> str:
    """Which checkpoint is in `directory`: "old", "new", or "none" when nothing loads."""
    try:
        model = AutoModelForCausalLM.from_pretrained(directory)
    except (ValueError, OSError):
        return "none"
    for name, known in (("old", model_with_a_past()), ("new", successor())):
        if model.expert_counts == known.expert_counts and torch.equal(logits(model, IDS), logits(known, IDS)):
            assert model.lineage == known.lineage
            return name
    raise AssertionError("a checkpoint loads that nobody saved")


def steps_of_a_save(directory: Path, **options: Any) -> list[str]:
    model = successor()
    with pytest.MonkeyPatch.context() as monkeypatch:
        done = fail_at(monkeypatch, -1, lambda: None)
        model.save_pretrained(directory, **options)
    return done


def killed_while_saving(directory: Path, arrange: Callable[[], Any]) -> bool:
    """Save in a child process that `arrange` prepares; whether it was killed."""
    model = successor()
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        arrange()
        model.save_pretrained(directory)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("shards", ["5GB", "150KB"])
def test_after_an_error_at_any_point_the_old_checkpoint_is_as_it_was(tmp_path: Path, shards: str) -> None:
    steps = steps_of_a_save(shutil.copytree(saved(shards), tmp_path / "count"), max_shard_size=shards)
    assert len(steps) > 12 and steps[-1] == "rmtree"
    failures = (OSError("disk full"), PowerFailure())
    for number in range(len(steps) - 1):  # by the last the new checkpoint is in place
        directory = shutil.copytree(saved(shards), tmp_path / str(number))
        (directory / "notes.txt").write_text("mine")
        before = {file.name: file.read_bytes() for file in directory.iterdir()}

        def fail(error: BaseException = failures[number % 2]) -> None:
            raise error

        with pytest.MonkeyPatch.context() as monkeypatch:
            fail_at(monkeypatch, number, fail)
            with pytest.raises((OSError, PowerFailure)):
                successor().save_pretrained(directory, max_shard_size=shards)
        assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    assert outcome(directory) == "old"
    successor().save_pretrained(directory)
    assert outcome(directory) == "new"


@needs_fork
def test_a_process_killed_at_any_point_leaves_the_old_the_new_or_nothing_that_loads(tmp_path: Path) -> None:
    steps = steps_of_a_save(shutil.copytree(saved("5GB"), tmp_path / "count"))
    renames = [number for number, step in enumerate(steps) if step == "rename"]
    outcomes = []
    for number in (4, *renames[::2], len(steps) - 1):
        directory = shutil.copytree(saved("5GB"), tmp_path / str(number))
        (directory / "notes.txt").write_text("mine")
        assert killed_while_saving(directory, lambda number=number: fail_at(pytest.MonkeyPatch(), number, die))
        assert (directory / "notes.txt").read_text() == "mine"
        outcomes.append(outcome(directory))
    assert outcomes[0] == "old" and outcomes[-1] == "new" and "none" in outcomes
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)
    # The next save works, and clears up.
    successor().save_pretrained(directory)
    assert outcome(directory) == "new" and not list(directory.glob(".save-*"))


@needs_fork
def test_a_file_half_written_when_the_process_dies_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    directory = shutil.copytree(saved("5GB"), tmp_path / "checkpoint")

    def half(tensors: dict[str, Tensor], file: str, **options: Any) -> None:
        save_file(tensors, file, **options)
        os.truncate(file, os.path.getsize(file) // 2)
        die()

    assert killed_while_saving(directory, lambda: setattr(transformers.modeling_utils, "safe_save_file", half))
    assert outcome(directory) == "old"


def test_a_failed_save_leaves_no_new_directory_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("disk full")

    fail_at(monkeypatch, 6, fail)
    with pytest.raises(OSError, match="disk full"):
        successor().save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# -- what a save leaves alone ------------------------------------------------------------------------------------------


def test_foreign_files_survive_and_files_of_the_old_checkpoint_do_not(tmp_path: Path) -> None:
    directory = shutil.copytree(saved("100KB"), tmp_path / "checkpoint")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "logs").mkdir()
    (directory / "logs" / "run.txt").write_text("mine")
    (directory / "model.fp16.safetensors").write_bytes(b"an older variant")
    successor().save_pretrained(directory)
    names = {file.name for file in directory.iterdir()}
    assert {"tokenizer.json", "logs", WEIGHTS, "config.json", "lineage.jsonl"} <= names
    assert (directory / "logs" / "run.txt").read_text() == "mine"
    assert not [name for name in names if name.startswith(("model-", "model.safetensors.index", "model.fp16", ".save"))]
    assert outcome(directory) == "new"


def test_a_model_card_of_ones_own_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My words")
    successor().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My words"


def test_saving_in_the_working_directory_keeps_it_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model in (model_with_a_past(), successor()):
        model.save_pretrained(".")
        assert Path.cwd() == tmp_path and Path(WEIGHTS).is_file()
    assert outcome(tmp_path) == "new"


def test_a_variant_is_saved_and_loaded_by_name(tmp_path: Path) -> None:
    successor().save_pretrained(tmp_path, variant="small", max_shard_size="100KB")
    assert list(tmp_path.glob("model.small-*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, variant="small")
    assert torch.equal(logits(model, IDS), logits(successor(), IDS))


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        successor().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    successor().save_pretrained(tmp_path / "checkpoint", is_main_process=False)
    assert not (tmp_path / "checkpoint").exists()


def test_the_head_is_not_missed_where_there_is_none_and_missed_where_there_is(tmp_path: Path) -> None:
    model_with_a_past().model.save_pretrained(tmp_path)
    assert LivingMoeModel.from_pretrained(tmp_path).expert_counts == model_with_a_past().expert_counts
    refuses_head = pytest.raises(CheckpointError, match="lm_head.weight")
    with refuses_head:
        LivingMoeForCausalLM.from_pretrained(tmp_path)


def test_loading_information_is_returned_on_request(checkpoint: Path) -> None:
    model, info = LivingMoeForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert isinstance(model, LivingMoeForCausalLM) and not info["missing_keys"]


def test_a_config_given_by_hand_is_the_one_that_counts(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint, lifecycle={"interval": 7})
    assert LivingMoeForCausalLM.from_pretrained(checkpoint, config=config).config.lifecycle.interval == 7
