"""`LivingMoeCallback`: the same life under `transformers.Trainer` and the trainers built on it (TRL).

    trainer = Trainer(model, args, train_dataset=..., callbacks=[LivingMoeCallback()],
                      optimizer_cls_and_kwargs=(LivingAdamW, {"model": model, "lr": 1e-3}))

Trainer's own optimizers work too. It calls `lifecycle_step` after every optimizer step, before gradients are zeroed,
stops a diverged run before the step that would spoil it, and puts back what a Trainer checkpoint leaves out: spare
slots, lineage, and the order of the optimizer's parameters, which Trainer saves by position. Pass an optimizer as above
rather than built (`optimizers=`): a resumed run must build it after the checkpoint has set the sizes of the slabs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from living_moe.configuration.errors import OptimizerError, TrainingDivergedError, TrainingError
from living_moe.modeling_living_moe import LivingMoePreTrainedModel
from living_moe.modeling_living_moe.distributed import sum_over_ranks, world_size
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent
from living_moe.modeling_living_moe.lifecycle.lineage import Lineage
from living_moe.training.checkpointing import capacities, names_of, reserve
from living_moe.training.distributed import WrapperKeeper, find_wrapper
from living_moe.training.loop import diverged_message
from living_moe.training.observatory.recorder import SNAPSHOT_STEPS, Recorder
from living_moe.training.observatory.records import LOG_NAME
from living_moe.training.observatory.trackers import TRACKERS, Trackers, open_trackers, tracker_names
from living_moe.training.reporting import JsonLog, describe_events, event_line, living_state

logger = logging.get_logger(__name__)


class LivingMoeCallback(TrainerCallback, ExportableState):
    """Lets the experts of a living model live while a Trainer trains it.

    Args:
        records: Keep the run's records in `output_dir` (see observatory/records.py).
        snapshot_steps: Optimizer steps, at least, between records of all experts; 0 keeps none.
        report_to: Trackers that get them too, as `--report-to` of the training script; None is those the Trainer
            reports to.

    Attributes:
        events: What the lifecycle has done in this run, oldest first.
        record: What a resumed run needs beyond a Trainer checkpoint; written into `trainer_state.json`.
    """

    def __init__(
        self, *, records: bool = True, snapshot_steps: int = SNAPSHOT_STEPS, report_to: str | None = None
    ) -> None:
        self.records = records
        self.snapshot_steps = snapshot_steps
        self.report_to = report_to
        self._recorder: Recorder | None = None
        self._log: JsonLog | None = None
        self._trackers: Trackers | None = None
        self._unlogged: list[LifecycleEvent] = []
        self.events: list[LifecycleEvent] = []
        self.record: dict[str, Any] | None = None
        self._whole: nn.Module | None = None  # what the Trainer was given: the living model, or PEFT's wrapper of it
        self._model: LivingMoePreTrainedModel | None = None
        self._optimizer: Optimizer | None = None
        self._keeper: WrapperKeeper | None = None
        self._losses: list[Tensor] = []
        self._hook: Any = None

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`: slots per slab, the optimizer's parameters by name, lineage."""
        if self._whole is not None and self._model is not None and self._optimizer is not None:
            names = names_of(self._whole)
            self.record = {
                "capacities": capacities(self._model),
                "optimizer": [[names[id(p)] for p in group["params"]] for group in self._optimizer.param_groups],
                "lineage": [event.to_dict() for event in self._model.lineage],
            }
        return {"args": {}, "attributes": {"record": self.record}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.n_gpu > 1:
            raise TrainingError(
                f"Trainer would use nn.DataParallel on {args.n_gpu} devices, whose replicas count no tokens; start it "
                f"with torchrun or accelerate launch, or show it one device (CUDA_VISIBLE_DEVICES)."
            )
        self._whole = whole = kwargs["model"]
        self._model = model = living_model_in(whole)
        self._optimizer = optimizer = torch_optimizer(kwargs["optimizer"])
        wrapper = find_wrapper(whole)
        self._keeper = WrapperKeeper(model, whole if wrapper is None else wrapper)
        if state.global_step:
            saved = state.stateful_callbacks.get(type(self).__name__)  # type: ignore[union-attr]
            record = saved["attributes"]["record"] if isinstance(saved, dict) else None
            if record is None:
                logger.warning(
                    "This run resumes from a checkpoint that LivingMoeCallback did not help to write: spare slots and "
                    "lineage start anew."
                )
            else:
                take_up(record, whole, model, optimizer)
                self._keeper.follow()
        # Trainer saves the states of callbacks it has an entry for; a foreign checkpoint has none for this one.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # type: ignore[union-attr]
        require_held(model, optimizer)
        if self._hook is not None:
            self._hook.remove()
        self._losses.clear()
        self._hook = whole.register_forward_hook(self._keep_loss)
        if self.records and state.is_world_process_zero:
            self._open_records(args, state, model)

    def _open_records(self, args: TrainingArguments, state: TrainerState, model: LivingMoePreTrainedModel) -> None:
        directory = Path(args.output_dir)  # type: ignore[arg-type]
        reported = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
        wanted = [name for name in reported if name in TRACKERS] if self.report_to is None else self.report_to
        opened = open_trackers(tracker_names(wanted), str(directory / "tensorboard"), directory.resolve().name)
        self._trackers = Trackers(opened, model)
        self._log = JsonLog(directory / LOG_NAME, after=state.global_step, listeners=[self._trackers.entry])
        self._recorder = Recorder(
            directory,
            model,
            max_steps=state.max_steps,
            step=state.global_step,
            every=self.snapshot_steps,
            listeners=[self._trackers.snapshot],
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._model is not None
        losses, self._losses = self._losses, []
        scaled = getattr(kwargs["optimizer"], "scaler", None) is not None
        if losses:
            value = float(sum_over_ranks(torch.stack(losses).mean() / world_size()))
            what = f"the loss is {value}"
        elif grads := [p.grad for p in self._model.parameters() if p.grad is not None and not scaled]:
            # The trainer computes its loss outside of the model: look at what it did to the gradients.
            value = float(torch.stack(torch._foreach_norm(grads)).sum())
            what = f"the sum of the gradients' norms is {value}"
        else:
            return
        if not math.isfinite(value):
            raise TrainingDivergedError(diverged_message(state.global_step + 1, what, self._model, None))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._model is not None and self._keeper is not None and self._optimizer is not None
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._model.take_step_tokens()
            return
        events = self._model.lifecycle_step(self._optimizer)
        self._keeper.follow()
        if events:
            self.events += events
            self._unlogged += events
            for event in events:
                logger.info(event_line(event))
            logger.info(f"step {state.global_step + 1}: {describe_events(events)}; experts {self._model.expert_counts}")

        if self._recorder is not None:
            self._recorder.observe()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds `experts` (alive, all layers) and `events` (of this run) to what the Trainer logs and keeps."""
        if self._model is None:
            return
        figures = {"experts": sum(self._model.expert_counts), "events": len(self.events)}
        for target in (logs, state.log_history[-1] if state.log_history else None):
            if target is not None:
                target.update(figures)
        if self._log is not None and logs is not None and "loss" in logs:
            entry = {name: logs.get(name) for name in ("loss", "grad_norm", "learning_rate")}
            happened, self._unlogged = [event.to_dict() for event in self._unlogged], []
            entry |= {"experts": list(self._model.expert_counts), "events": happened, **living_state(self._model)}
            self._log.write({"step": state.global_step, "lived": self._model.steps_lived, **entry})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._recorder is not None and self._trackers is not None:
            self._recorder.close()
            self._trackers.finish()
            self._recorder = self._trackers = self._log = None

    def _keep_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if module.training and torch.is_grad_enabled() and loss is not None:
            self._losses.append(loss.detach().float())


def living_model_in(model: nn.Module) -> LivingMoePreTrainedModel:
    """The living model itself, also where PEFT has wrapped it.

    Raises:
        TrainingError: There is none.
    """
    for module in model.modules():
        if isinstance(module, LivingMoePreTrainedModel):
            return module
    raise TrainingError(
        f"LivingMoeCallback needs a living model, got {type(model).__name__}; graft it first (living_moe.convert)."
    )


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def take_up(record: dict[str, Any], whole: nn.Module, model: LivingMoePreTrainedModel, optimizer: Optimizer) -> None:
    """Put back what a Trainer checkpoint leaves out: lineage, spare slots, whose optimizer state is whose.

    Trainer has loaded the optimizer's state by position: the state now at place n of a group belongs to the parameter
    that was at place n when it was saved.
    """
    life: Any = model.base_model
    life.lineage_ = Lineage(LifecycleEvent.from_dict(event) for event in record["lineage"])
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group) for group in record["optimizer"]]:
        raise OptimizerError(
            f"the optimizer has groups of {sizes} parameters, the checkpoint {[len(g) for g in record['optimizer']]}: "
            f"it was built before the checkpoint's slabs were. Pass Trainer optimizer_cls_and_kwargs, not optimizers."
        )
    states = [[optimizer.state.pop(p, {}) for p in group["params"]] for group in optimizer.param_groups]
    reserve(model, record["capacities"])
    parameters = dict(whole.named_parameters())
    for group, names, rows in zip(optimizer.param_groups, record["optimizer"], states, strict=True):
        group["params"] = [parameters[name] for name in names]
        for parameter, state in zip(group["params"], rows, strict=True):
            if state:
                optimizer.state[parameter] = state


def require_held(model: LivingMoePreTrainedModel, optimizer: Optimizer) -> None:
    """Raise `OptimizerError` unless the optimizer holds the trainable parameters the model has now."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        slot for slot in model.slot_parameters() if slot.parameter.requires_grad and id(slot.parameter) not in held
    ]
    if missing:
        raise OptimizerError(
            f"layer {missing[0].layer}: the optimizer does not hold the {missing[0].role} of the {missing[0].slab} "
            f"slab; it was built before the slab had this size. Pass Trainer optimizer_cls_and_kwargs, not optimizers."
        )


__all__ = ["LivingMoeCallback"]
