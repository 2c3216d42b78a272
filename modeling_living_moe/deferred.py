"""State that follows training step by step, but computes only when somebody looks.

A training step leaves evidence behind: counts, losses. To fold each step's at once takes many small operations, which
between two large ones cost the more, for nothing they need is in the caches. So evidence is kept and folded for
several steps together: at the first look at any buffer or child (by attribute), when the state dict is taken, when
the module moves, and after `MOST_STEPS` steps. What comes out does not depend on when that is.

Evidence must be complete when it is deferred: summed over ranks, and of the population as it was.

With many ranks nothing is kept. They look at different times (the first one logs and saves), and
DistributedDataParallel copies the first rank's buffers into the others' before every forward pass: it would carry what
is folded to ranks that have yet to fold it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from living_moe.modeling_living_moe.distributed import world_size
from living_moe.modeling_living_moe.population import KeepsDtype

#: Steps kept at most: evidence of a layer of a thousand experts is 30 KB.
MOST_STEPS = 32

Evidence = TypeVar("Evidence")


class Deferred(KeepsDtype, Generic[Evidence]):
    """Subclasses hand evidence to `defer` and fold it in `_fold`; their buffers are always up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog: list[Evidence] = []

    def defer(self, evidence: Evidence) -> None:
        """Keep a step's evidence until somebody looks."""
        self.backlog.append(evidence)
        if len(self.backlog) >= MOST_STEPS or world_size() > 1:
            self.settle()

    def settle(self) -> None:
        """Fold what was kept."""
        backlog = self.__dict__.get("backlog")
        if backlog:
            self.backlog = []
            with torch.no_grad():
                self._fold(backlog)

    def _fold(self, backlog: list[Evidence]) -> None:
        """Bring the buffers up to date with evidence, oldest first."""
        raise NotImplementedError

    # Buffers and children are no attributes of the instance, so every look at one comes through here.
    def __getattr__(self, name: str) -> Any:
        self.settle()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.settle()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.backlog = []
        super()._load_from_state_dict(*args, **kwargs)


__all__ = ["Deferred"]
