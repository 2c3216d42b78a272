"""`LivingMoeCallback`: life under transformers.Trainer, resumed runs included."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import source_model
from lives import assert_same_life, blocks, busy_model, life
from torch import Tensor
from transformers import Trainer, TrainingArguments

import living_moe
from living_moe.configuration.errors import OptimizerError, TrainingDivergedError, TrainingError
from living_moe.training import LivingAdamW, LivingMoeCallback

HALF, WHOLE = 9, 14


class Blocks(torch.utils.data.Dataset):
    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[number], "labels": self.rows[number]}


def trainer_for(model: Any, directory: Path, *, callbacks: Any = None, **options: Any) -> Trainer:
    own_names = ("optimizer_cls_and_kwargs", "optimizers", "compute_loss_func")
    own = {name: options.pop(name) for name in own_names if name in options}
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **{
            "max_steps": WHOLE,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "lr_scheduler_type": "cosine",
            **options,
        },
    )
    callbacks = [LivingMoeCallback()] if callbacks is None else callbacks
    return Trainer(model, arguments, train_dataset=Blocks(blocks()), callbacks=callbacks, **own)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def torch_optimizer(trainer: Trainer) -> Any:
    return trainer.optimizer.optimizer


CHOICES = {
    "living_adamw": lambda model: dict(optimizer_cls_and_kwargs=(LivingAdamW, {"model": model, "lr": 1e-2})),
    "adamw_torch_fused": lambda model: dict(optim="adamw_torch_fused"),
    "sgd": lambda model: dict(optim="sgd", optim_args="momentum=0.9"),
}


@pytest.mark.parametrize("optimizer", CHOICES)
@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_a_resumed_trainer_run_is_the_uninterrupted_run(preset: str, optimizer: str, tmp_path: Path) -> None:
    options = dict(save_strategy="steps", save_steps=HALF, restore_callback_states_from_checkpoint=preset == "grow")
    model = busy_model(preset)
    whole = trainer_for(model, tmp_path / "whole", **CHOICES[optimizer](model), **options)
    whole.train()
    steps = [event.step for event in model.lineage]
    assert min(steps) < HALF < max(steps), "events should fall on both sides of the interruption"

    fresh = busy_model(preset)
    again = trainer_for(fresh, tmp_path / "again", **CHOICES[optimizer](fresh), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{HALF}"))
    assert losses(again)[HALF:] == losses(whole)[HALF:]
    assert_same_life(life(fresh, torch_optimizer(again)), life(model, torch_optimizer(whole)))


def test_a_trainer_grows_a_model_and_says_so(tmp_path: Path) -> None:
    model = busy_model()
    callback = LivingMoeCallback()
    trainer = trainer_for(model, tmp_path, callbacks=[callback])
    trainer.train()
    assert sum(model.expert_counts) > 16 and model.steps_lived == WHOLE
    assert [event.kind for event in callback.events].count("split") >= 2
    last = trainer.state.log_history[-2]
    assert last["experts"] == sum(model.expert_counts) and last["events"] == len(callback.events)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for slot in model.slot_parameters():
        assert (id(slot.parameter) in held) == slot.parameter.requires_grad
        if slot.parameter.requires_grad:
            assert torch_optimizer(trainer).state[slot.parameter]["exp_avg"].shape == slot.parameter.shape


def test_with_the_lifecycle_off_it_is_the_source_under_a_plain_trainer(tmp_path: Path) -> None:
    """And with accumulation: the loss is normalised by tokens alike."""
    source = source_model("mixtral", attention_dropout=0.1)
    model = living_moe.convert(source, preset="grow", verify=False, lifecycle={"enabled": False})
    options = dict(gradient_accumulation_steps=2, max_steps=8)
    plain = trainer_for(source, tmp_path / "plain", callbacks=[], **options)
    plain.train()
    living = trainer_for(model, tmp_path / "living", **options)
    living.train()
    assert losses(living) == pytest.approx(losses(plain), abs=1e-6)
    assert torch.allclose(model.lm_head.weight, source.lm_head.weight, atol=1e-6)


def test_it_lives_once_per_optimizer_step(tmp_path: Path) -> None:
    model = busy_model()
    trainer_for(model, tmp_path, gradient_accumulation_steps=3, max_steps=5).train()
    assert model.steps_lived == 5
    assert float(model.vitals(0)["tokens"].sum()) <= 5 * 3 * 4 * 16 * 2  # steps, micro-batches, rows, tokens, top-k


def test_the_learning_rate_does_not_notice_events(tmp_path: Path) -> None:
    model = busy_model()
    trainer = trainer_for(model, tmp_path, warmup_steps=3)
    trainer.train()
    assert len(model.lineage) > 4
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    warm = [1e-2 * step / 3 for step in range(3)]
    cosine = [0.5e-2 * (1 + math.cos(math.pi * step / (WHOLE - 3))) for step in range(WHOLE - 3)]
    assert rates == pytest.approx([*warm, *cosine])
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1


@pytest.mark.parametrize("outside", [False, True], ids=["loss of the model", "loss of the trainer"])
def test_a_loss_that_is_no_number_stops_the_run_before_the_step(outside: bool, tmp_path: Path) -> None:
    def loss_function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs.logits.sum() * float("nan")

    model = busy_model()
    trainer = trainer_for(model, tmp_path, **({"compute_loss_func": loss_function} if outside else {}))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    if not outside:
        head = model.lm_head.forward
        model.lm_head.forward = lambda hidden: head(hidden) * float("inf")
    with pytest.raises(TrainingDivergedError, match=r"step 1: .*\n  layer 0: 8 experts, load 0, "):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_an_optimizer_built_before_the_checkpoint_goes_on_or_is_refused(preset: str, tmp_path: Path) -> None:
    options = dict(save_strategy="steps", save_steps=HALF)
    model = busy_model(preset)
    whole = trainer_for(model, tmp_path, optimizers=(LivingAdamW(model, lr=1e-2), None), **options)
    whole.train()
    fresh = busy_model(preset)
    again = trainer_for(fresh, tmp_path, optimizers=(LivingAdamW(fresh, lr=1e-2), None), **options)
    if preset == "grow":  # the same slabs, of other sizes
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
        assert_same_life(life(fresh, torch_optimizer(again)), life(model, torch_optimizer(whole)))
    else:  # slabs it has never heard of: torch refuses the state
        with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))


def test_an_optimizer_without_the_trainable_slab_is_refused(tmp_path: Path) -> None:
    model = busy_model()
    rest = [p for name, p in model.named_parameters() if "experts" not in name]
    with pytest.raises(OptimizerError, match="does not hold the gate_up_proj of the trainable slab"):
        trainer_for(model, tmp_path, optimizers=(torch.optim.SGD(rest, lr=0.1), None)).train()


def test_a_checkpoint_from_before_the_callback_resumes_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_for(busy_model(), tmp_path, callbacks=[], save_strategy="steps", save_steps=3, max_steps=3).train()
    model = busy_model()
    trainer = trainer_for(model, tmp_path, save_strategy="steps", save_steps=6, max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert model.steps_lived == 3
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").is_file()


def test_a_model_that_does_not_live_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="needs a living model, got MixtralForCausalLM"):
        trainer_for(source_model("mixtral"), tmp_path).train()
