"""Copies of what a model knows about each expert, by uid, so that they outlive events; and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from living_moe.configuration.errors import PopulationError
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.population import Member

#: An expert's tensors, as views of the tables they are rows of.
RowsOf = Callable[[LivingMoeBlock, Member], tuple[Tensor, ...]]
#: Of each living layer, by uid.
Snapshot = list[dict[int, tuple[Tensor, ...]]]


def snapshot_rows(blocks: Sequence[LivingMoeBlock], rows_of: RowsOf) -> Snapshot:
    """Copies of the rows of all alive experts."""
    return [
        {member.uid: tuple(r.detach().clone() for r in rows_of(block, member)) for member in block.population.members}
        for block in blocks
    ]


@torch.no_grad()
def restore_rows(
    blocks: Sequence[LivingMoeBlock], snapshot: Sequence[dict[int, tuple[Tensor, ...]]], rows_of: RowsOf, what: str
) -> None:
    """Put rows back where a snapshot has them. Experts that it does not know keep theirs.

    Args:
        what: The name of the rows in errors.

    Raises:
        PopulationError: The snapshot is of another model; nothing has changed.
    """
    if len(snapshot) != len(blocks):
        raise PopulationError(f"the snapshot has {len(snapshot)} layers, the model {len(blocks)}.")
    pairs: list[tuple[Tensor, Tensor]] = []
    for block, kept in zip(blocks, snapshot, strict=True):
        for member in block.population.members:
            for old, new in zip(rows_of(block, member), kept.get(member.uid, ()), strict=False):
                if old.shape != new.shape:
                    raise PopulationError(
                        f"layer {block.layer}: the snapshot's {what} of uid {member.uid} have shape "
                        f"{tuple(new.shape)}, the model's {tuple(old.shape)}."
                    )
                pairs.append((old, new))
    for old, new in pairs:
        old.copy_(new)


__all__ = ["RowsOf", "Snapshot", "restore_rows", "snapshot_rows"]
