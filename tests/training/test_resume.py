"""A run that is interrupted in the middle of a lifecycle and resumed is the run that was not: bit for bit on a CPU.

Losses, parameters, spare slots, vitals with their hysteresis counters, receptive fields, optimizer rows, lineage.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lives import OPTIMIZERS, assert_same_life, blocks, build, busy_model, kinds, life

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import CheckpointError, TrainingDivergedError, TrainingError
from living_moe.training.checkpointing import (
    STATE_FOLDER,
    capacities,
    checkpoints,
    generator_states,
    latest_checkpoint,
    load_generators,
    load_model,
)
from living_moe.training.data import BlockLoader
from living_moe.training.loop import living_accelerator

HALF, WHOLE = 9, 16


def save_at(step: int, directory: Path) -> Any:
    def hook(trainer: Any, record: Any) -> None:
        if record.step == step:
            trainer.save(directory)

    return hook


def resumed(directory: Path, **kwargs: Any) -> Any:
    torch.manual_seed(999)  # whatever the new process has drawn before
    random.seed(999)
    trainer = build(load_model(directory), max_steps=WHOLE, **kwargs)
    trainer.resume(directory)
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("preset", ["grow", "frozen-graft", "synaptic-router"])
def test_a_resumed_run_is_the_uninterrupted_run(preset: str, optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = build(busy_model(preset), optimizer=optimizer, max_steps=WHOLE)
    whole.run()
    assert {"split"} <= set(kinds(whole.records[:HALF])) and kinds(whole.records[HALF:])

    torch.manual_seed(0)
    directory = tmp_path / f"checkpoint-{HALF}"
    broken = build(busy_model(preset), optimizer=optimizer, max_steps=WHOLE, hooks=[save_at(HALF, directory)])
    broken.max_steps = HALF + 2  # killed some steps after its last checkpoint
    broken.run()
    slots = [sum(slabs.values()) for slabs in capacities(broken.model)]
    if preset != "frozen-graft":
        assert slots != broken.model.expert_counts, (
            "the test should cover spare slots, which a checkpoint's model leaves out"
        )

    again = resumed(directory, optimizer=optimizer)
    again.run()
    assert again.records == whole.records[HALF:]
    assert_same_life(life(again.model, again.optimizer), life(whole.model, whole.optimizer))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_every_family_resumes(family: str, tmp_path: Path) -> None:
    from factories import living_model
    from lives import BUSY

    def model() -> LivingMoeForCausalLM:
        return living_model(family, "grow", sections={"lifecycle": BUSY})

    whole = build(model(), max_steps=10)
    whole.run()
    build(model(), max_steps=10, hooks=[save_at(5, tmp_path / "checkpoint-5")]).run()
    again = build(load_model(tmp_path / "checkpoint-5"), max_steps=10)
    again.resume(tmp_path / "checkpoint-5")
    again.run()
    assert kinds(whole.records[:5]) and again.records == whole.records[5:]
    assert_same_life(life(again.model, again.optimizer), life(whole.model, whole.optimizer))


def test_a_run_resumes_in_the_middle_of_accumulation_epochs_and_a_frozen_slab_born_late(tmp_path: Path) -> None:
    def run(hooks: Any = ()) -> Any:
        torch.manual_seed(0)
        accelerator = living_accelerator(gradient_accumulation=3)
        data = BlockLoader(blocks(17), 4, seed=1)  # 3 epochs in 16 steps of 3 x 4 blocks
        return build(busy_model(), accelerator=accelerator, data=data, max_steps=WHOLE, hooks=[freeze, *hooks])

    def freeze(trainer: Any, record: Any) -> None:
        if record.step == 5:
            model = trainer.model
            model.freeze_expert(0, model.expert_uids(0)[1], optimizer=trainer.optimizer)

    whole = run()
    whole.run()
    run([save_at(HALF, tmp_path / "checkpoint-9")]).run()
    accelerator = living_accelerator(gradient_accumulation=3)
    again = resumed(tmp_path / "checkpoint-9", accelerator=accelerator, data=BlockLoader(blocks(17), 4, seed=1))
    again.run()
    assert again.records == whole.records[HALF:]
    assert_same_life(life(again.model, again.optimizer), life(whole.model, whole.optimizer))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = build(busy_model())
    plain.run()
    torch.manual_seed(0)
    saving = build(busy_model(), hooks=[lambda t, r: t.save(tmp_path / f"checkpoint-{r.step}", keep=2)])
    saving.run()
    assert saving.records == plain.records
    assert_same_life(life(saving.model, saving.optimizer), life(plain.model, plain.optimizer))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-16"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-15", "checkpoint-16"]


def test_a_checkpoint_is_a_model_without_pickles(tmp_path: Path) -> None:
    trainer = build(busy_model(), max_steps=6)
    trainer.run()
    trainer.save(tmp_path / "checkpoint-6")
    files = {path.suffix for path in (tmp_path / "checkpoint-6").rglob("*") if path.is_file()}
    assert files <= {".safetensors", ".json", ".jsonl", ".md"}
    model = LivingMoeForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert model.expert_counts == trainer.model.expert_counts
    ids = blocks(2)
    assert torch.equal(model.eval()(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data=BlockLoader(blocks(), 2, seed=3)), "batch_size 4, this run has 2"),
        (dict(data=BlockLoader(blocks(), 4, seed=4)), "seed 3, this run has 4"),
        (dict(data=BlockLoader(blocks(seed=6), 4, seed=3)), "text"),
        (dict(data=BlockLoader(blocks(), 4, seed=3, world_size=2)), "processes 1, this run has 2"),
        (dict(optimizer="sgd"), "written with LivingAdamW, this run has SGD"),
    ],
)
def test_another_run_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = build(busy_model(), max_steps=3)
    trainer.run()
    trainer.save(tmp_path / "checkpoint-3")
    with pytest.raises(TrainingError, match=message):
        build(load_model(tmp_path / "checkpoint-3"), **change).resume(tmp_path / "checkpoint-3")


def test_an_optimizer_over_other_parameters_is_refused(tmp_path: Path) -> None:
    trainer = build(busy_model(), max_steps=3)
    trainer.run()
    trainer.save(tmp_path / "checkpoint-3")
    model = load_model(tmp_path / "checkpoint-3")
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(TrainingError, match="differing: lm_head.weight"):
        build(model).resume(tmp_path / "checkpoint-3")


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    trainer = build(busy_model(), max_steps=2)
    trainer.run()
    good = trainer.save(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        latest_checkpoint(tmp_path / "nowhere")
    assert latest_checkpoint(tmp_path) == good

    state = good / STATE_FOLDER / "state.json"
    text = state.read_text()
    state.write_text(json.dumps({**json.loads(text), "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        load_model(good)
    state.write_text(text[:-5])
    with pytest.raises(CheckpointError, match="state.json is broken"):
        load_model(good)
    state.write_text(text)
    file = good / STATE_FOLDER / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="optimizer.safetensors is missing, truncated"):
        build(load_model(good)).resume(good)
    state.unlink()
    with pytest.raises(CheckpointError, match="interrupted"):
        load_model(good)
    assert checkpoints(tmp_path) == []


def test_an_interrupted_save_leaves_the_checkpoints_that_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(busy_model(), max_steps=4)
    trainer.max_steps = 2
    trainer.run()
    trainer.save(tmp_path / "checkpoint-2")
    trainer.max_steps = 4
    trainer.run()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    for place in ("living_moe.training.checkpointing.save_file", "safetensors.torch.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full_disk)
            patch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
            with pytest.raises(OSError, match="no space"):
                trainer.save(tmp_path / "checkpoint-4")
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
        assert latest_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_checkpoint_written_again_never_pairs_a_new_model_with_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(busy_model(), max_steps=2)
    trainer.run()
    trainer.save(tmp_path / "checkpoint-2")
    with monkeypatch.context() as patch:
        patch.setattr("living_moe.training.checkpointing.save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            trainer.save(tmp_path / "checkpoint-2")
    assert checkpoints(tmp_path) == []


def test_a_model_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    trainer = build(busy_model(), max_steps=2)
    trainer.run()
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(TrainingDivergedError, match=r"lm_head\.weight holds NaN or infinity"):
        trainer.save(tmp_path / "checkpoint-2")
    assert list(tmp_path.iterdir()) == []


def test_every_generator_comes_back(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()  # odd numbers of Gaussians: Python and NumPy keep the second of a pair
    (tmp_path / STATE_FOLDER).mkdir()
    save_file(generator_states(), tmp_path / STATE_FOLDER / "rng-0.safetensors")
    expected = [draw(), draw()]
    load_generators(tmp_path, 0)
    assert [draw(), draw()] == expected
