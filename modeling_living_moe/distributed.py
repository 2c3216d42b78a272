"""The four collectives a living model needs. Each is a no-op in a single process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from living_moe.configuration.errors import TrainingError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over the data-parallel world, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_tensors(tensor: Tensor) -> list[Tensor]:
    """`tensor`, of one shape and dtype everywhere, of every rank, in rank order."""
    if world_size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def fingerprint(tensors: Iterable[Tensor], text: str = "") -> str:
    """SHA-256 over the bytes of tensors (and a text), for comparing ranks."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_agreement(what: str, value: str) -> None:
    """Compare a fingerprint over all ranks.

    Raises:
        TrainingError: Two ranks differ; going on would train different models in silence.
    """
    values = gather_objects(value)
    if len(set(values)) > 1:
        raise TrainingError(
            f"ranks disagree on {what}: {[v[:12] for v in values]}; every rank must see the same model, the same plan "
            f"and all-reduced vitals. Check that all ranks call lifecycle_step after every optimizer step."
        )
