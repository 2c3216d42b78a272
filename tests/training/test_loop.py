"""The loop: one optimizer step and one step of life at a time, in the right order, stopped before it can do harm."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from factories import source_model
from lives import assert_same_life, blocks, build, busy_model, kinds, life
from torch import Tensor
from torch.optim import SGD, AdamW

import living_moe
from living_moe.configuration.errors import TrainingDivergedError
from living_moe.training.data import BlockLoader
from living_moe.training.loop import LivingTrainer, living_accelerator


def test_with_the_lifecycle_off_the_losses_are_the_source_class_s_own() -> None:
    """The oracle is the shortest loop there is, around Transformers' own class."""
    source = source_model("mixtral")
    model = living_moe.convert(source, preset="grow", verify=False, lifecycle={"enabled": False})
    expected = []
    optimizer = AdamW(source.parameters(), lr=1e-2)
    source.train()
    for batch in itertools.islice(BlockLoader(blocks(), 4).batches(0), 10):
        loss = source(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(source.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    found: list[float] = []
    optimizer = AdamW(model.parameters(), lr=1e-2)
    hooks = [lambda trainer, record: found.append(record.loss)]
    LivingTrainer(model, BlockLoader(blocks(), 4), optimizer, max_steps=10, hooks=hooks).run()
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_source_class_trains_in_the_same_loop() -> None:
    source = source_model("mixtral")
    trainer = LivingTrainer(source, BlockLoader(blocks(), 4), SGD(source.parameters(), lr=0.1), max_steps=2)
    record = trainer.run()
    assert record is not None and record.step == 2 and record.experts == () and record.events == ()


@pytest.mark.parametrize("optimizer", ["living_adamw", "sgd"])
def test_accumulated_micro_batches_are_one_batch(optimizer: str) -> None:
    """Same blocks, same step: losses, gradient norms and experts agree; vitals have counted every micro-batch."""

    def run(batch: int, accumulation: int) -> Any:
        model = busy_model(attention_dropout=0.0, router_jitter_noise=0.0, lifecycle={"enabled": False})
        data = BlockLoader(blocks(), batch, seed=3)
        accelerator = living_accelerator(gradient_accumulation=accumulation)
        trainer = build(model, optimizer=optimizer, data=data, accelerator=accelerator, max_steps=4)
        trainer.run()
        return trainer

    whole, parts = run(8, 1), run(2, 4)
    for one, other in zip(whole.records, parts.records, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, abs=1e-5)
        assert other.tokens == one.tokens == 8 * 16
    assert parts.model.steps_lived == 4
    for layer in range(2):
        assert torch.equal(parts.model.vitals(layer)["tokens"], whole.model.vitals(layer)["tokens"])
        assert int(whole.model.vitals(layer)["tokens"].sum()) == 4 * 8 * 16 * 2


def test_gradients_are_clipped_before_the_step() -> None:
    model = busy_model(lifecycle={"enabled": False})
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = LivingTrainer(
        model, BlockLoader(blocks(), 4), SGD(model.parameters(), lr=1.0), max_steps=1, max_grad_norm=1e-3
    )
    record = trainer.run()
    assert record is not None and record.grad_norm is not None and record.grad_norm > 0.1
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before, strict=True)]).norm()
    assert float(moved.detach()) == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_does_not_notice_events() -> None:
    trainer = build(busy_model(), max_steps=16)
    trainer.run()
    assert len(kinds(trainer.records)) > 4
    warm = [1e-2 * step / 2 for step in range(2)]
    cosine = [0.5e-2 * (1 + math.cos(math.pi * step / 14)) for step in range(14)]
    assert [record.learning_rate for record in trainer.records] == pytest.approx([*warm, *cosine])
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {trainer.scheduler.get_last_lr()[0]}


def test_newborns_are_in_the_optimizer_and_learn_from_the_first_step() -> None:
    trainer = build(busy_model(lifecycle={"noise_std": 0.0}), max_steps=16)
    newborn: list[tuple[int, int, Tensor]] = []

    def remember(trainer: Any, record: Any) -> None:
        for layer, uid, weight in newborn:
            assert not torch.equal(row(trainer.model, layer, uid), weight), "a newborn with tokens did not learn"
        newborn[:] = [
            (event.layer, event.children[0], row(trainer.model, event.layer, event.children[0]).clone())
            for event in record.events
            if event.kind == "split"
        ]

    def row(model: Any, layer: int, uid: int) -> Tensor:
        block = model.living_block(layer)
        member = block.population.find(uid, layer)
        return block.experts.slab(member.slab).down_proj.detach()[member.row]

    trainer.hooks.append(remember)
    trainer.run()
    assert "split" in kinds(trainer.records)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_before_the_optimizer_step(accumulation: int) -> None:
    class Poisoned(BlockLoader):
        def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
            for number, batch in enumerate(super().batches(start), start=start):
                poisoned["now"] = number == 5 * accumulation
                yield batch

    poisoned = {"now": False}
    accelerator = living_accelerator(gradient_accumulation=accumulation)
    trainer = build(busy_model(), data=Poisoned(blocks(), 4), accelerator=accelerator, max_steps=8)
    head = trainer.model.lm_head.forward
    trainer.model.lm_head.forward = lambda hidden: head(hidden) * (math.inf if poisoned["now"] else 1.0)
    last: dict[str, Any] = {}
    trainer.hooks.append(lambda trainer, record: last.update(life(trainer.model, trainer.optimizer)))
    with pytest.raises(TrainingDivergedError) as caught:
        trainer.run()
    assert trainer.step == 5
    assert_same_life(life(trainer.model, trainer.optimizer), last)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("step 6: the loss is nan; stopped before the optimizer step. No checkpoint was written")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["layer 0", "layer 1"]
    assert "experts, load" in lines[1] and "grad_norm" in lines[1]


def test_a_gradient_that_overflows_stops_the_run_too_and_the_last_checkpoint_is_named(tmp_path: Any) -> None:
    trainer = build(busy_model(), max_steps=4)
    trainer.hooks.append(lambda trainer, record: trainer.save(tmp_path / f"checkpoint-{record.step}", keep=1))

    def overflow(grad: Tensor) -> Tensor:
        return grad * math.inf if trainer.step == 2 else grad

    trainer.model.lm_head.weight.register_hook(overflow)
    with pytest.raises(TrainingDivergedError, match=r"step 3: the gradient's norm is (inf|nan); .*checkpoint-2"):
        trainer.run()
    assert (tmp_path / "checkpoint-2").is_dir()


def test_bf16_autocast_trains_and_grows() -> None:
    trainer = build(busy_model(), accelerator=living_accelerator(mixed_precision="bf16"), max_steps=10)
    trainer.run()
    assert "split" in kinds(trainer.records)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert all(math.isfinite(record.loss) for record in trainer.records)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_gradient_checkpointing_changes_no_number(preset: str) -> None:
    def run(checkpointing: bool) -> Any:
        torch.manual_seed(0)
        model = busy_model(preset, attention_dropout=0.0, router_jitter_noise=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = build(model, max_steps=10)
        trainer.run()
        return trainer

    plain, recomputed = run(False), run(True)
    assert plain.records == recomputed.records
    assert_same_life(life(plain.model, plain.optimizer), life(recomputed.model, recomputed.optimizer))


def test_a_step_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient norm come back together; vitals stay on the device until a decision (here: never)."""
    trainer = build(busy_model(lifecycle={"enabled": False}), optimizer="sgd", max_steps=4)
    batches = list(itertools.islice(trainer.data.batches(0), 4))
    trainer.model.train()
    for batch in batches[:3]:
        trainer.train_step(iter([batch]))
    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _original: Any = original, _name: str = name) -> Any:
            reads.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    trainer.train_step(iter(batches[3:]))
    monkeypatch.undo()
    # The first is Transformers' own, before each forward pass: it looks for packed sequences.
    assert reads == ["__bool__", "tolist"]
