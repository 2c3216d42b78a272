"""Checkpoints from which a run goes on as the same run, bit for bit on one CPU.

`checkpoint-N/` is a living checkpoint like any other (`save_pretrained`: alive experts, tables, vitals, lineage) with
one more folder, `training_state/`, that holds what a model alone does not say:

    state.json               step, slab capacities, optimizer groups, scheduler, gradient scaler, data order
    optimizer.safetensors    the optimizer's tensors, named "<parameter>//<state>"
    rng-<rank>.safetensors   states of the random generators of each process

The model is complete before the folder appears, and the folder appears complete, by a rename. A directory without it is
a model that cannot be resumed, never a run that resumes wrongly. Nothing is pickled. Optimizer rows are found by the
names of parameters, not by their order, which events change.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from living_moe.configuration.errors import CheckpointError, TrainingDivergedError, TrainingError
from living_moe.configuration.slabs import SLABS
from living_moe.modeling_living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.population import IdentityTable
from living_moe.modeling_living_moe.synapse.postsynaptic import PostsynapticTable
from living_moe.modeling_living_moe.vitals import VitalsTable

STATE_FOLDER = "training_state"
STATE_NAME = "state.json"
OPTIMIZER_NAME = "optimizer.safetensors"
#: Of `state.json`; newer is refused.
STATE_VERSION = 1
#: Folders of models that were trained to the end.
FINAL_MODELS = ("final", "living-trained")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


# -- directories -------------------------------------------------------------------------------------------------------


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    root = Path(output_dir)
    found = [
        (int(match[1]), path)
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / STATE_FOLDER / STATE_NAME).is_file()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(output_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        CheckpointError: There is none.
    """
    found = checkpoints(output_dir)
    if not found:
        raise CheckpointError(
            f"{output_dir} has no complete checkpoint to resume from; leave resume_from out to start."
        )
    return found[-1]


def newest_model(directory: str | Path) -> Path | None:
    """The saved model of a run that trained longest; a checkpoint is its own.

    That is `final`, or `living-trained` as the quickstart calls it, else the highest `checkpoint-N`, resumable or not.
    """
    root = Path(directory)
    numbered = [
        (int(match[1]), path) for path in root.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    places = (root, *(root / name for name in FINAL_MODELS), *(path for _, path in sorted(numbered, reverse=True)))
    return next((place for place in places if (place / "config.json").is_file()), None)


def remove_old_checkpoints(output_dir: str | Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints; 0 keeps all."""
    for path in checkpoints(output_dir)[: -keep or None] if keep else ():
        _remove(path)


def _remove(path: Path) -> None:
    """Delete a directory, so that a half-deleted one never has its name."""
    if path.exists():
        doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
        path.rename(doomed)
        shutil.rmtree(doomed)


# -- saving ------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    state: Mapping[str, Any],
    generators: Sequence[Mapping[str, Tensor]],
    tokenizer: Any = None,
) -> Path:
    """Write a checkpoint that a run can resume from. One process calls it.

    Args:
        directory: `checkpoint-N`; replaced if it exists.
        model: The model itself, not a wrapper; anything with `save_pretrained`.
        optimizer: torch's own, not accelerate's wrapper.
        state: What else the run needs, JSON values.
        generators: `generator_states()` of every process, by rank.
        tokenizer: Saved beside the model.

    Raises:
        TrainingDivergedError: A parameter is NaN or infinite; nothing is written.
        TrainingError: The state holds something that is no JSON.
    """
    target = Path(directory)
    require_finite_parameters(model)
    tensors, groups = pack_optimizer(optimizer, names_of(model))
    content = {
        **state,
        "version": STATE_VERSION,
        "capacities": capacities(model),
        "optimizer": {"class": type(optimizer).__name__, **groups},
        "processes": len(generators),
    }
    try:
        text = json.dumps(content, indent=1)
    except TypeError as error:
        raise TrainingError(f"the training state is not JSON ({error}), so this run could not be resumed.") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    # A checkpoint that is written again must not pair its new model with its old state.
    _remove(target / STATE_FOLDER)
    model.save_pretrained(target)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    stage = Path(tempfile.mkdtemp(prefix=f".{STATE_FOLDER}.new-", dir=target))
    try:
        save_file(tensors, stage / OPTIMIZER_NAME)
        for rank, generator in enumerate(generators):
            save_file(dict(generator), stage / generators_name(rank))
        (stage / STATE_NAME).write_text(text, encoding="utf-8")
        stage.chmod(target.stat().st_mode & 0o777)
        stage.rename(target / STATE_FOLDER)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return target


def require_finite_parameters(model: nn.Module) -> None:
    """Raise `TrainingDivergedError` if a parameter holds NaN or infinity: such a model is no good checkpoint."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingDivergedError(
                f"{name} holds NaN or infinity, so no checkpoint was written; the last one is good. Lower the learning "
                f"rate, or clip gradients."
            )


def names_of(model: nn.Module) -> dict[int, str]:
    """id of each parameter -> its name."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def capacities(model: nn.Module) -> list[dict[str, int]]:
    """Slots per slab of every living layer, spare ones included."""
    return [block.capacities() for block in getattr(model, "living_blocks", [])]


def pack_optimizer(
    optimizer: Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]]]:
    """An optimizer's state by parameter names: its tensors, and its groups and other values as JSON.

    Raises:
        TrainingError: It holds a parameter that is not the model's.
    """
    tensors: dict[str, Tensor] = {}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        packed: dict[str, Any] = {"params": [], "state": {}}
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise TrainingError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not the model's; pass "
                    f"optimizer= to every event."
                )
            name = names[id(parameter)]
            packed["params"].append(name)
            other = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}//{key}"] = value.detach().cpu().contiguous()
                else:
                    other[key] = value
            if other:
                packed["state"][name] = other
        packed["options"] = {}
        for key, value in group.items():
            if key == "params":
                continue
            if isinstance(value, Tensor):
                tensors[f"//group{number}//{key}"] = value.detach().cpu().contiguous()
            else:
                packed["options"][key] = value
        groups.append(packed)
    return tensors, {"groups": groups}


# -- loading -----------------------------------------------------------------------------------------------------------


def load_model(directory: str | Path, **kwargs: Any) -> LivingMoeForCausalLM:
    """The model of a checkpoint, with the spare slots it had: what its optimizer's rows belong to.

    Args:
        directory: Written by `save_checkpoint`.
        **kwargs: For `from_pretrained`.

    Raises:
        CheckpointError: The checkpoint is incomplete.
    """
    state = read_state(directory)
    model: LivingMoeForCausalLM = LivingMoeForCausalLM.from_pretrained(directory, **kwargs)
    reserve(model, state["capacities"])
    return model


def read_state(directory: str | Path) -> dict[str, Any]:
    """The JSON part of a checkpoint's training state.

    Raises:
        CheckpointError: There is none, or it is broken or newer than this code.
    """
    path = Path(directory) / STATE_FOLDER / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {STATE_FOLDER}/{STATE_NAME}: not a checkpoint of this script, or an interrupted one. "
            f"To start a new run from its model, give it as --model."
        )
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = state["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is broken: {error}.") from error
    if version > STATE_VERSION:
        raise CheckpointError(f"{path} has version {version}; this living_moe reads {STATE_VERSION}. Upgrade it.")
    return state


def reserve(model: nn.Module, wanted: Sequence[Mapping[str, int]]) -> None:
    """Give slabs the spare slots that a saved model leaves out. Slabs that change become new parameters.

    Args:
        model: A living model.
        wanted: `capacities(model)` at the time of saving.

    Raises:
        CheckpointError: The layers differ, or a slab has more experts than slots.
    """
    blocks = {id(block): block for block in model.living_blocks}  # type: ignore[union-attr]
    named = [(f"{name}.", blocks[id(module)]) for name, module in model.named_modules() if id(module) in blocks]
    if len(named) != len(wanted):
        raise CheckpointError(f"the training state has {len(wanted)} living layers, the model {len(named)}.")
    full = model.state_dict()
    padded: dict[str, Tensor] = {}
    for (prefix, block), sizes in zip(named, wanted, strict=True):
        now = block.capacities()
        if dict(sizes) == now:
            continue
        if sizes.keys() != now.keys() or any(sizes[slab] < now[slab] for slab in now):
            raise CheckpointError(f"layer {block.layer}: the training state has slots {dict(sizes)}, the model {now}.")
        for slab, capacity in sizes.items():
            for name in _row_tensors(full, prefix, slab):
                padded[name] = _padded(full[name], name.rpartition(".")[2], capacity)
        if (name := f"{prefix}population.slab_sizes") in full:
            padded[name] = torch.tensor([sizes.get(slab, 0) for slab in SLABS])
    if padded:
        model.load_state_dict(padded, strict=False)


#: Modules of a block that have a row per slot, by slab.
_ROW_OWNERS = ("experts", "population", "vitals", "plasticity", "postsynaptic")


def _row_tensors(full: Iterable[str], prefix: str, slab: str) -> list[str]:
    starts = tuple(f"{prefix}{owner}.{slab}." for owner in _ROW_OWNERS)
    of_router = {f"{prefix}router.{owner}.{slab}" for owner in ("keys", "synapse.expression")}
    return [name for name in full if name.startswith(starts) or name in of_router]


def _padded(rows: Tensor, column: str, capacity: int) -> Tensor:
    """`rows` followed by free ones."""
    _, fill = {**IdentityTable.columns, **VitalsTable.columns, **PostsynapticTable.columns}.get(column, (None, 0))
    free = rows.new_full((capacity - rows.shape[0], *rows.shape[1:]), fill)
    return torch.cat([rows.detach(), free])


def load_optimizer(directory: str | Path, optimizer: Optimizer, model: nn.Module) -> None:
    """Give an optimizer the state a checkpoint has for it: rows by parameter name, groups and hyperparameters.

    Args:
        directory: Written by `save_checkpoint`.
        optimizer: Built for `model` by the same class, over the same parameters.
        model: `load_model(directory)`.

    Raises:
        CheckpointError: The file is missing or broken.
        TrainingError: The optimizer is of another class, or holds other parameters.
    """
    record = read_state(directory)["optimizer"]
    path = Path(directory) / STATE_FOLDER / OPTIMIZER_NAME
    tensors = read_tensors(path)
    groups = record["groups"]
    if type(optimizer).__name__ != record["class"]:
        raise TrainingError(
            f"{directory} was written with {record['class']}, this run has {type(optimizer).__name__}; resume with the "
            f"same optimizer, or start a new run from its model with --model."
        )
    names = names_of(model)
    held = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in groups]
    if [sorted(map(str, group)) for group in held] != [sorted(group) for group in saved]:
        differing = {str(n) for group in held for n in group} ^ {n for group in saved for n in group}
        raise TrainingError(
            f"the optimizer's groups are not those of {directory} (differing: "
            f"{', '.join(sorted(differing)[:4]) or 'their order'}); build it as that run did."
        )
    parameters = dict(model.named_parameters())
    states: dict[int, dict[str, Any]] = {}
    packed = []
    for number, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        own["params"] = [parameters[name] for name in group["params"]]
        options = {key: _as(own.get(key), value) for key, value in group["options"].items()}
        first = sum(len(names) for names in saved[:number])
        packed.append({**options, "params": list(range(first, first + len(group["params"])))})
        for place, name in enumerate(group["params"], start=first):
            if name in group["state"]:
                states[place] = dict(group["state"][name])
    place_of = {name: place for place, name in enumerate(name for group in saved for name in group)}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("//")
        if name.startswith("//group"):
            packed[int(name.removeprefix("//group"))][entry] = tensor
        else:
            states.setdefault(place_of[name], {})[entry] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": packed})


def _as(own: Any, value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(own, tuple) and isinstance(value, list) else value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: It is missing, truncated or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing, truncated or not a safetensors file: {error}") from error


# -- random generators -------------------------------------------------------------------------------------------------


def generators_name(rank: int) -> str:
    return f"rng-{rank}.safetensors"


def generator_states() -> dict[str, Tensor]:
    """States of this process's generators (Python, NumPy, torch, each CUDA device) as tensors."""
    version, python, gauss = random.getstate()
    numpy: Any = np.random.get_state()  # ("MT19937", keys, position, has_gauss, cached)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *python], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*numpy[1].tolist(), *numpy[2:4]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy[4]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def load_generators(directory: str | Path, rank: int) -> None:
    """Put this process's generators where they were; call it last, for building a run draws numbers too."""
    states = read_tensors(Path(directory) / STATE_FOLDER / generators_name(rank))
    torch.set_rng_state(states["torch"])
    version, *python = states["python"].tolist()
    random.setstate((version, tuple(python), next(iter(states["python_gauss"].tolist()), None)))
    *keys, position, has_gauss = states["numpy"].tolist()
    (cached,) = states["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    cuda = [states[f"cuda{number}"] for number in range(len(states)) if f"cuda{number}" in states]
    if cuda and torch.cuda.is_available():
        with contextlib.suppress(IndexError):  # fewer devices than then: the rest have nobody to seed
            torch.cuda.set_rng_state_all(cuda)


__all__ = [
    "FINAL_MODELS",
    "STATE_FOLDER",
    "capacities",
    "checkpoints",
    "generator_states",
    "latest_checkpoint",
    "load_generators",
    "load_model",
    "load_optimizer",
    "newest_model",
    "read_state",
    "remove_old_checkpoints",
    "reserve",
    "save_checkpoint",
]
