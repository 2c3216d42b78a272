"""AdamW that leaves experts without tokens alone: per-slot lazy stepping.

AdamW is Loshchilov & Hutter 2019 (arXiv:1711.05101). In a plain AdamW an expert that received no token still moves, by
momentum and weight decay, and a newborn inherits a step count that is not its own (at step 5,000 its first update is
3.15 times the learning rate). Here every slot of a *slot parameter* (dimension 0 is the slots: expert projections,
router keys) has its own step count, and a slot whose expert saw no token since the last step, in any micro-batch on any
rank, keeps parameter, moments and step count bit for bit.

Changes no population: rows of state follow events in `optimizer_surgery.py`.

C slots of a slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from living_moe.configuration.errors import OptimizerError
from living_moe.modeling_living_moe.standalone import LivingParts

#: The groups built from a model, in this order, empty ones included: events and schedulers find them by place and role.
ROLES = ("decay", "no_decay", "experts", "keys")

#: Devices whose AdamW runs in torch's fused kernel; others take the foreach one.
FUSED_DEVICES = ("cpu", "cuda")


class SlotParameter(Protocol):
    """A parameter with one row per slot of a slab."""

    @property
    def layer(self) -> int: ...
    @property
    def slab(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def parameter(self) -> nn.Parameter: ...


class LivingModel(Protocol):
    """What the optimizer asks of a model. `LivingMoeForCausalLM` answers it."""

    def counts_tokens(self, layer: int) -> bool:
        """Whether forward passes count the tokens of a layer's experts."""

    @property
    def population_version(self) -> int:
        """Changes whenever a slot parameter may have been replaced."""

    def slot_parameters(self) -> Iterable[SlotParameter]:
        """Every slot parameter; roles are gate_up_proj, down_proj, key, expression."""

    def take_step_tokens(self) -> dict[tuple[int, str], Tensor]:
        """Per (layer, slab), int64 (C,) tokens each slot received since the last call, over all ranks."""

    def field_parameters(self) -> Iterable[tuple[int, nn.Parameter]]:
        """Every parameter that only tokens of one receptive field use, with the number of that field."""

    def take_step_fields(self) -> Tensor | None:
        """int64 (F,) tokens of each newborn field since the last call, over all ranks; None without fields."""

    def require_unpacked(self) -> None:
        """Raise `PopulationError` if experts are packed, so that they could not train."""

    def modules(self) -> Iterator[nn.Module]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class LivingAdamW(Optimizer):
    """AdamW with decoupled weight decay; slot parameters step per slot and only where tokens went.

    The groups built from a model are, in order: `decay`, `no_decay` (parameters of one dimension: norms, biases),
    `experts`, `keys`; each is tagged `{"role": ...}` and holds trainable parameters only. Where every slot receives
    tokens at every step the result is `torch.optim.AdamW(fused=True)`'s, bit for bit.

    State of a slot parameter: `step` fp32 (C,), `exp_avg` and `exp_avg_sq` of the parameter's shape; of any other
    parameter the same as torch's AdamW.

    Args:
        model_or_groups: A living model, itself and not a wrapper of it (DistributedDataParallel, ...), or a model with
            standalone living blocks in it. Or parameters or groups as any torch optimizer takes them; they step lazily
            if `model` is given too.
        lr: Learning rate; may be a tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of every group but `no_decay`.
        model: The living model of hand-made groups.
        decay_embeddings: False puts embeddings of tokens into `no_decay`.
        direct_gradients: Let the slabs write their gradients in place (`active_experts.py`; only the "active" experts
            implementation does). Faster where few of many experts receive tokens; read the contract there.
        fused: Use torch's fused kernel; None does on CPU and CUDA.

    Raises:
        OptimizerError: A wrapped model, nothing to train, hyperparameters out of range.
    """

    def __init__(
        self,
        model_or_groups: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        model: nn.Module | None = None,
        decay_embeddings: bool = True,
        direct_gradients: bool = False,
        fused: bool | None = None,
    ):
        for name, value, ok, wanted in (
            ("lr", lr, lr >= 0, ">= 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
            ("eps", eps, eps >= 0, ">= 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
        ):
            if not ok:
                raise OptimizerError(f"{name} must be {wanted}, got {value!r}.")
        groups: Any = model_or_groups
        if isinstance(model_or_groups, nn.Module):
            model = model_or_groups
            groups = _groups_of(_as_living(model), weight_decay, decay_embeddings)
        self._model = None if model is None else _as_living(model)
        if self._model is not None:
            self._model.require_unpacked()
        self._direct_gradients = direct_gradients
        self._fused = fused
        self._slots: dict[int, SlotParameter] = {}
        #: Parameter -> the receptive field whose tokens alone use it.
        self._fields: dict[int, int] = {}
        self._seen_version: int | None = None
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._follow_population()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and of slot parameters the rows that received tokens.

        Args:
            closure: Computes the loss anew and its gradients; called once, before anything else.

        Returns:
            What `closure` returned, else None.

        Raises:
            OptimizerError: A gradient is sparse; a slot parameter of the model is in no group (the optimizer was
                built before a slab grew); a layer has gradients but counted no token because it is in eval mode.
                Nothing is changed then, but the tokens of the pass are taken: repeat it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_population()
        for group in self.param_groups:
            for parameter in group["params"]:
                self._check(parameter)
        rows, fields = self._rows_with_tokens(), self._fields_with_tokens()
        for group in self.param_groups:
            batch = _Batch()
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                slot = self._slots.get(id(parameter))
                if slot is None:
                    if self._fields.get(id(parameter), 0) in fields:
                        batch.add(parameter, self._state_of(parameter, ()))
                elif touched := rows.get((slot.layer, slot.slab)):
                    batch.add_rows(parameter, self._state_of(parameter, parameter.shape[:1]), touched)
            batch.update(group, self._fused)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies; they carry the model along."""
        own = {name: getattr(self, name) for name in ("_model", "_direct_gradients", "_fused")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._slots, self._fields, self._seen_version = {}, {}, None

    def _state_of(self, parameter: nn.Parameter, clock_shape: tuple[int, ...]) -> dict[str, Tensor]:
        state = cast(dict[str, Tensor], self.state[parameter])
        if not state:
            state["step"] = torch.zeros(clock_shape, dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif state["step"].device != parameter.device:
            # Optimizer.load_state_dict leaves `step` where the checkpoint had it.
            state["step"] = state["step"].to(parameter.device)
        return state

    def _check(self, parameter: nn.Parameter) -> None:
        """Refuse what `step` could not finish, before it starts."""
        if parameter.grad is None:
            return
        if parameter.grad.is_sparse:
            raise OptimizerError(
                f"LivingAdamW has no update for the sparse gradient of a parameter of shape {tuple(parameter.shape)}; "
                f"build the embedding with sparse=False."
            )
        clock = self.state.get(parameter, {}).get("step")
        slot = self._slots.get(id(parameter))
        wanted = () if slot is None else parameter.shape[:1]
        if clock is not None and clock.shape != wanted:
            raise OptimizerError(
                f"the optimizer's state holds step counts of shape {tuple(clock.shape)} for a parameter that needs "
                f"{tuple(wanted)}; it belongs to another population or optimizer. Pass optimizer= to every event, "
                f"and load only states that a LivingAdamW of this model saved."
            )

    def _rows_with_tokens(self) -> dict[tuple[int, str], list[int]]:
        """Per (layer, slab) the slots that received tokens since the last step, ascending."""
        if self._model is None:
            return {}
        tokens = self._model.take_step_tokens()
        if not tokens:
            return {}
        device = next(iter(tokens.values())).device
        # One transfer for all layers: each one waits for the device.
        flat = torch.cat([count.to(device) for count in tokens.values()]).tolist()
        rows: dict[tuple[int, str], list[int]] = {}
        first = 0
        for place, count in tokens.items():
            rows[place] = [row for row in range(count.numel()) if flat[first + row] > 0]
            first += count.numel()
        served = {layer for (layer, _), touched in rows.items() if touched}
        for slot in self._slots.values():
            grad = slot.parameter.grad if slot.parameter.requires_grad else None
            if slot.layer in served or grad is None or self._model.counts_tokens(slot.layer):
                continue
            if bool(grad.any()):
                raise OptimizerError(
                    f"layer {slot.layer}: the {slot.slab} experts have gradients, but the layer is in eval mode and "
                    f"counted no token, so no expert would learn; call model.train(), or requires_grad_(False) on what "
                    f"shall not learn, and repeat the forward and backward pass."
                )
        return rows

    def _fields_with_tokens(self) -> set[int]:
        """Newborn fields that tokens were in since the last step, and 0."""
        tokens = None if self._model is None else self._model.take_step_fields()
        return {0} if tokens is None else {0} | {int(field) + 1 for field in tokens.nonzero()[:, 0]}

    def _follow_population(self) -> None:
        """Learn which parameters are slot parameters; again after every event."""
        if self._model is None or self._model.population_version == self._seen_version:
            return
        slots = {id(slot.parameter): slot for slot in self._model.slot_parameters()}
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for place, slot in slots.items():
            if slot.parameter.requires_grad and place not in held:
                raise OptimizerError(
                    f"layer {slot.layer}: {slot.role} of the {slot.slab} slab is in no param group: the optimizer was "
                    f"built before that slab was. Pass optimizer= to the event, or build the optimizer anew."
                )
        if self._direct_gradients:
            for module in self._model.modules():
                if hasattr(type(module), "direct_grad"):
                    module.direct_grad = True  # type: ignore[assignment]
        self._slots = slots
        self._fields = {id(parameter): field for field, parameter in self._model.field_parameters()}
        self._seen_version = self._model.population_version


def _as_living(model: nn.Module) -> LivingModel:
    wanted = (
        "slot_parameters", "take_step_tokens", "field_parameters", "take_step_fields", "population_version",
        "require_unpacked",
    )  # fmt: skip
    missing = [name for name in wanted if not hasattr(model, name)]
    if missing and (parts := LivingParts(model)).parts:
        return parts
    if missing:
        raise OptimizerError(
            f"LivingAdamW needs a living model, and {type(model).__name__} has no {missing[0]}; pass the model before "
            f"it is wrapped (accelerator.unwrap_model(model), or model.module), or its parameters for a plain AdamW."
        )
    return cast(LivingModel, model)


def _groups_of(model: LivingModel, weight_decay: float, decay_embeddings: bool) -> list[dict[str, Any]]:
    """Param groups in the order of `ROLES`, trainable parameters only."""
    roles = {
        id(slot.parameter): "keys" if slot.role in ("key", "expression") else "experts"
        for slot in model.slot_parameters()
    }
    if not decay_embeddings:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                roles[id(module.weight)] = "no_decay"
    groups: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[roles.get(id(parameter), "decay" if parameter.ndim > 1 else "no_decay")].append(parameter)
    if not any(groups.values()):
        raise OptimizerError("no parameter of the model requires a gradient, so there is nothing to train.")
    return [
        {"params": parameters, "role": role, "weight_decay": 0.0 if role == "no_decay" else weight_decay}
        for role, parameters in groups.items()
    ]


class _Batch:
    """Tensors that one call of the AdamW kernel updates: whole parameters, and row ranges of slot parameters."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.exp_avgs: list[Tensor] = []
        self.exp_avg_sqs: list[Tensor] = []
        self.steps: list[Tensor] = []

    def add(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        assert parameter.grad is not None
        self.parameters.append(parameter)
        self.grads.append(parameter.grad)
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        self.steps.append(state["step"])

    def add_rows(self, parameter: nn.Parameter, state: dict[str, Tensor], rows: Sequence[int]) -> None:
        """Add `rows` (ascending), neighbours of equal step count as one tensor, and advance their step counts."""
        assert parameter.grad is not None
        clock = state["step"]
        runs = list(runs_of_equal_step(rows, clock.tolist()))
        for tensors, whole in (
            (self.parameters, parameter),
            (self.grads, parameter.grad),
            (self.exp_avgs, state["exp_avg"]),
            (self.exp_avg_sqs, state["exp_avg_sq"]),
        ):
            tensors.extend(whole.narrow(0, first, length) for first, length in runs)
        # The kernel advances these copies, one per run; the slots' own counts advance here.
        self.steps.extend(clock[[first for first, _ in runs]].unbind(0))
        clock[list(rows)] += 1

    def update(self, group: dict[str, Any], fused: bool | None) -> None:
        if not self.parameters:
            return
        if fused is None:
            fused = all(parameter.device.type in FUSED_DEVICES for parameter in self.parameters)
        beta1, beta2 = group["betas"]
        adamw(
            self.parameters,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def runs_of_equal_step(rows: Sequence[int], steps: Sequence[float]) -> Iterator[tuple[int, int]]:
    """(first row, length) of the longest stretches of neighbouring `rows` (ascending) whose step counts are equal."""
    first = length = 0
    for row in rows:
        if length and row == first + length and steps[row] == steps[first]:
            length += 1
            continue
        if length:
            yield first, length
        first, length = row, 1
    if length:
        yield first, length
