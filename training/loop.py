"""The training loop: forward, backward, one optimizer step, one step of life.

`LivingTrainer` owns the order of things and nothing else; evaluation, checkpoints, progress bars and logs are hooks,
called after every optimizer step with a `StepRecord`. It trains any causal language model with `.loss` in its output,
so that a living model and its source can be trained by the same code; only a living one lives.

One number per step leaves the device: the loss, summed over ranks and checked together with the gradient norm. That
is what a diverged run must be stopped by, before the optimizer sees it, on every rank alike.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from living_moe.configuration.errors import TrainingDivergedError, TrainingError
from living_moe.modeling_living_moe.active_experts import gradient_norm, scale_gradients
from living_moe.modeling_living_moe.distributed import gather_objects, sum_over_ranks, world_size
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent
from living_moe.training.checkpointing import (
    generator_states,
    load_generators,
    load_optimizer,
    read_state,
    remove_old_checkpoints,
    save_checkpoint,
)
from living_moe.training.distributed import WrapperKeeper, quiet_wrapping

#: Ways of sharding parameters under which events cannot replace them.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Batches(Protocol):
    """Training data: batches from a position on, without end. `BlockLoader` is one."""

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches from its batch number `start` on."""

    def identity(self) -> dict[str, Any]:
        """JSON values that decide the order of the data."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What happened in one optimizer step.

    Attributes:
        step: Optimizer steps of this run so far, this one included.
        loss: Mean training loss over micro-batches and ranks, auxiliary losses included, nats per token.
        grad_norm: L2 norm of the gradient before clipping; None where nothing clips.
        learning_rate: Of the first param group, as used in this step.
        tokens: Input tokens of this step, all ranks.
        experts: Alive experts per living layer after the step; empty for a model that does not live.
        events: What the lifecycle did after the step.
        lived: Optimizer steps the model has lived, over all its training runs; None for one that does not live.
    """

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    experts: tuple[int, ...]
    events: tuple[LifecycleEvent, ...]
    lived: int | None = None


Hook = Callable[["LivingTrainer", StepRecord], None]


def living_accelerator(*, gradient_accumulation: int = 1, **kwargs: Any) -> Accelerator:
    """An `Accelerator` for living models: no broadcast of buffers, which are the same on every rank by construction.

    Args:
        gradient_accumulation: Forward passes per optimizer step.
        **kwargs: For `Accelerator`.
    """
    handlers = list(kwargs.pop("kwargs_handlers", None) or [])
    if not any(isinstance(handler, DistributedDataParallelKwargs) for handler in handlers):
        handlers.append(DistributedDataParallelKwargs(broadcast_buffers=False))
    return Accelerator(gradient_accumulation_steps=gradient_accumulation, kwargs_handlers=handlers, **kwargs)


class LivingTrainer:
    """Trains a model and lets its experts live.

    Args:
        model: The model itself, not wrapped; it is prepared here. Its mode is training from here on.
        data: `BlockLoader`, or anything that serves batches by their number.
        optimizer: Built for this model; torch's own, not accelerate's.
        scheduler: Of that optimizer; stepped once per optimizer step.
        accelerator: Device, processes, mixed precision and gradient accumulation; default `living_accelerator()`.
        max_steps: Optimizer steps of the whole run, resumed ones included.
        max_grad_norm: Clip the gradient to this L2 norm; None or 0 does not clip.
        hooks: Called in order after every optimizer step, on every rank.

    Raises:
        TrainingError: Parameters are sharded over processes (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        *,
        accelerator: Accelerator | None = None,
        max_steps: int,
        max_grad_norm: float | None = 1.0,
        hooks: Sequence[Hook] = (),
    ):
        self.accelerator = accelerator if accelerator is not None else living_accelerator()
        if self.accelerator.distributed_type in _SHARDED:
            raise TrainingError(
                f"living models do not train under {self.accelerator.distributed_type.value}: events replace "
                f"parameters. Run `accelerate config` and choose one process per device (DDP)."
            )
        self.model = model
        self.data = data
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.max_steps = max_steps
        self.max_grad_norm = max_grad_norm
        self.hooks = list(hooks)
        self.step = 0
        #: The newest checkpoint this run has written or come from.
        self.last_checkpoint: Path | None = None
        self.lives = hasattr(model, "lifecycle_step")
        # accelerate's wrapper steps the gradient scaler of fp16; param groups and state stay the optimizer's own.
        self._stepper = self.accelerator.prepare_optimizer(optimizer)
        with quiet_wrapping():
            self.wrapped = self.accelerator.prepare_model(model)
        self._keeper = WrapperKeeper(model, self.wrapped)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return int(self.accelerator.gradient_accumulation_steps)

    def run(self) -> StepRecord | None:
        """Train until `max_steps`.

        Returns:
            The record of the last step; None if there was nothing left to do.

        Raises:
            TrainingDivergedError: The loss (or the gradient) became NaN or infinite; the model is as before that step.
        """
        record = None
        batches = self.data.batches(self.step * self.accumulation)
        self.model.train()
        while self.step < self.max_steps:
            record = self.train_step(batches)
            for hook in self.hooks:
                hook(self, record)
        return record

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> StepRecord:
        """One optimizer step, on `accumulation` batches."""
        total: Tensor | None = None
        tokens = 0
        for number in range(self.accumulation):
            batch = {name: value.to(self.accelerator.device) for name, value in next(batches).items()}
            tokens += batch["input_ids"].numel() * world_size()
            last = number == self.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self.wrapped(**batch, use_cache=False).loss
                self.accelerator.backward(loss)
            detached = loss.detach().float()
            total = detached if total is None else total + detached
        assert total is not None
        loss_value, norm_value = self._clip(total / self.accumulation)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self._stepper.step()
        events: list[LifecycleEvent] = []
        if self._stepper.step_was_skipped:
            # fp16 found the gradient overflown: no step, so nobody lived it, and its tokens train nobody later.
            if self.lives:
                self.model.take_step_tokens()  # type: ignore[operator]
        else:
            if self.scheduler is not None:
                self.scheduler.step()
            if self.lives:
                events = self.model.lifecycle_step(self.optimizer)  # type: ignore[operator]
                self._keeper.follow()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepRecord(
            step=self.step,
            loss=loss_value,
            grad_norm=norm_value,
            learning_rate=learning_rate,
            tokens=tokens,
            experts=tuple(self.model.expert_counts) if self.lives else (),  # type: ignore[arg-type]
            events=tuple(events),
            lived=self.model.steps_lived if self.lives else None,  # type: ignore[arg-type]
        )

    def _clip(self, loss: Tensor) -> tuple[float, float | None]:
        """Clip gradients; all ranks raise together if the loss or the gradient is no number.

        Args:
            loss: Mean over this rank's micro-batches.

        Returns:
            Mean loss over ranks, and the gradient's norm before clipping (None where nothing clips).
        """
        numbers = [sum_over_ranks(loss / world_size())]
        parameters = list(self.model.parameters()) if self.max_grad_norm else []
        if self.max_grad_norm:
            self.accelerator.unscale_gradients()
            numbers.append(gradient_norm(parameters).to(loss.device, loss.dtype))
        values: list[float] = torch.stack(numbers).tolist()
        # fp16 looks for overflown gradients itself, and skips the step.
        checked = values if self.accelerator.scaler is None else values[:1]
        if not all(math.isfinite(value) for value in checked):
            what = f"the loss is {values[0]}" if not math.isfinite(values[0]) else f"the gradient's norm is {values[1]}"
            raise TrainingDivergedError(diverged_message(self.step + 1, what, self.model, self.last_checkpoint))
        if not self.max_grad_norm:
            return values[0], None
        # As torch's `clip_grad_norm_`, less the pass over all gradients that would multiply them by one.
        if (shrink := self.max_grad_norm / (values[1] + 1e-6)) < 1:
            scale_gradients(parameters, shrink)
        return values[0], values[1]

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path, *, tokenizer: Any = None, keep: int = 0) -> Path:
        """Write a checkpoint to resume from; every rank calls it.

        Args:
            directory: `checkpoint-N` in the run's directory.
            tokenizer: Saved beside the model.
            keep: Delete all but this many newest checkpoints in the same place; 0 deletes none.
        """
        generators = gather_objects(generator_states())
        path = Path(directory)
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "gradient_accumulation": self.accumulation,
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "data": self.data.identity(),
            }
            save_checkpoint(path, self.model, self.optimizer, state=state, generators=generators, tokenizer=tokenizer)
            remove_old_checkpoints(path.parent, keep)
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = path
        return path

    def resume(self, directory: str | Path) -> None:
        """Go on where a checkpoint was written; the model must be `load_model(directory)`.

        Raises:
            CheckpointError: The checkpoint is incomplete or broken.
            TrainingError: This run differs from that one in what decides its course: data order, number of processes,
                gradient accumulation, optimizer.
        """
        state = read_state(directory)
        mine = {"gradient_accumulation": self.accumulation, **self.data.identity()}
        theirs = {"gradient_accumulation": state["gradient_accumulation"], **state["data"]}
        for name in {**theirs, **mine}:
            if mine.get(name) != theirs.get(name):
                raise TrainingError(
                    f"{directory} was written with {name} {theirs.get(name)!r}, this run has {mine.get(name)!r}: it "
                    f"would not be the same run. Set it as it was, or start a new run from its model (--model)."
                )
        load_optimizer(directory, self.optimizer, self.model)
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.last_checkpoint = Path(directory)
        load_generators(directory, self.accelerator.process_index)


def diverged_message(step: int, what: str, model: nn.Module, checkpoint: Path | None) -> str:
    """What `TrainingDivergedError` says: the step, the remedy, the last good checkpoint, each layer's vitals."""
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint is not None else "No checkpoint was written yet."
    lines = [
        f"step {step}: {what}; stopped before the optimizer step. {kept} Lower the learning rate, warm it up longer, "
        f"or clip gradients."
    ]
    for layer, count in enumerate(getattr(model, "expert_counts", [])):
        vitals = model.vitals(layer)  # type: ignore[operator]
        ranges = [f"{name} {_range(vitals[name])}" for name in ("load", "router_weight", "grad_norm", "age")]
        lines.append(f"  layer {layer}: {count} experts, {', '.join(ranges)}")
    return "\n".join(lines)


def _range(values: Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"


__all__ = ["Batches", "LivingTrainer", "StepRecord", "diverged_message", "living_accelerator"]
