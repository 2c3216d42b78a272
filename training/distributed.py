"""Data-parallel training of a model whose parameters are replaced while it trains.

DistributedDataParallel hooks the parameters it was built with. When a slab changes its capacity the model has other
ones, which DDP would leave unsynchronised, so the wrapper is built again: the same object, because trainers,
accelerators and callers keep references to it. Everything else about many processes (all-reduced vitals, one plan,
compared hashes) is `modeling_living_moe/distributed.py`'s.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from living_moe.configuration.errors import TrainingError
from living_moe.modeling_living_moe.standalone import LivingParts


class WrapperKeeper:
    """Keeps a data-parallel wrapper in step with the parameters of its model.

    Args:
        model: The living model itself, or the one that holds standalone living blocks.
        wrapped: What the training loop calls: `model`, or a wrapper of it.

    Raises:
        TrainingError: A wrapper under which parameters cannot be replaced.
    """

    def __init__(self, model: nn.Module, wrapped: nn.Module):
        self.model = model
        self.wrapper = data_parallel_of(wrapped)
        self._version = _population_version(model)
        self._held = list(model.parameters())

    def follow(self) -> bool:
        """Wrap anew if parameters were replaced since the last call; call it on every rank after every event.

        Returns:
            Whether they were.
        """
        version = _population_version(self.model)
        if version == self._version:
            return False
        self._version = version
        now = list(self.model.parameters())
        if len(now) == len(self._held) and all(new is old for new, old in zip(now, self._held, strict=True)):
            return False
        self._held = now
        self.rewrap()
        return True

    def rewrap(self) -> None:
        """Build the wrapper anew, whatever has changed."""
        if self.wrapper is not None:
            rewrap(self.wrapper)


def _population_version(model: nn.Module) -> int:
    """Of a living model, or of the standalone living blocks in any other."""
    own: int | None = getattr(model, "population_version", None)
    return LivingParts(model).population_version if own is None else own


def data_parallel_of(wrapped: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel inside what a training loop calls; None if there is none.

    Raises:
        TrainingError: FSDP, DeepSpeed or nn.DataParallel.
    """
    while not isinstance(wrapped, DistributedDataParallel):
        kind = type(wrapped).__name__
        if isinstance(wrapped, DataParallel) or kind in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise TrainingError(
                f"living models train in one process or under DistributedDataParallel, not under {kind}: it holds "
                f"parameters that events replace. Start one process per device (accelerate launch, torchrun)."
            )
        inner = getattr(wrapped, "_orig_mod", None)  # torch.compile
        if inner is None:
            return None
        wrapped = inner
    return wrapped


def rewrap(wrapper: DistributedDataParallel) -> None:
    """Build a DDP wrapper anew, in place, around the parameters its module has now."""
    model, hooks = wrapper.module, list(wrapper._comm_hooks)
    settings: dict[str, Any] = {
        name: getattr(wrapper, name)
        for name in ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters")
    }
    settings |= {name: getattr(wrapper, name) for name in ("gradient_as_bucket_view", "static_graph")}
    settings["bucket_cap_mb"] = None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / 2**20
    # Ranks hold equal tensors, which lifecycle_step has compared, so nothing is broadcast.
    settings |= {"init_sync": False, "broadcast_buffers": False}
    with quiet_wrapping():
        DistributedDataParallel.__init__(wrapper, model, **settings)
    wrapper.training = model.training
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


@contextmanager
def quiet_wrapping() -> Iterator[None]:
    """torch 2.13 calls `broadcast_buffers=False` deprecated; its successor is unknown to the versions before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        yield


def find_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The live DDP wrapper of a model, for callers who are not handed it (Trainer callbacks); searched once per run."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    for thing in gc.get_objects():
        if (
            issubclass(type(thing), DistributedDataParallel)
            and thing.__dict__.get("_modules", {}).get("module") is model
        ):
            return thing
    return None


__all__ = ["WrapperKeeper", "data_parallel_of", "find_wrapper", "quiet_wrapping", "rewrap"]
