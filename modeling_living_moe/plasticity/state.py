"""What a layer remembers for knowledge gravity: where each key started, how much its expert was used, who came since.

Rows follow their experts through events like every row-aligned table; a newborn starts with its parent's past. The
forces themselves are in `gravity.py`.

C capacity, E alive experts in slot order, D length of a key, T tokens, K places per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from living_moe.configuration.errors import PopulationError
from living_moe.configuration.slabs import SLABS
from living_moe.modeling_living_moe.plasticity.gravity import Evidence, LayerKeys
from living_moe.modeling_living_moe.population import KeepsDtype, Population, RowTable

#: Forward passes that may wait for a consolidation before it is taken for forgotten.
MOST_EVIDENCE = 1024


class PlasticityTable(RowTable):
    """Past of the keys of one slab."""

    columns = {
        # Tokens received while plastic, and moving average of the load per consolidation (1.0 is the uniform share).
        "hits": (torch.int64, 0),
        "use": (torch.float32, 0.0),
    }
    hits: Tensor
    use: Tensor
    start: Tensor

    def __init__(self, capacity: int, d_key: int):
        super().__init__(capacity)
        # (C, D): where gravity found the key first.
        self.register_buffer("start", torch.zeros(capacity, d_key, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.zeros_(self.start)


class KeyPlasticity(KeepsDtype):
    """Plasticity of one layer's keys: a `PlasticityTable` per slab, and the evidence that waits."""

    def __init__(self, capacities: dict[str, int], d_key: int):
        super().__init__()
        self.d_key = d_key
        for name in SLABS:
            if capacity := capacities.get(name, 0):
                self.add_module(name, PlasticityTable(capacity, d_key))
        #: Consolidations so far; the first one finds where keys start.
        self.register_buffer("consolidations", torch.tensor(0))
        self._has_started: bool | None = None
        self.evidence: list[Evidence] = []

    consolidations: Tensor

    def reset_parameters(self) -> None:
        init.zeros_(self.consolidations)
        self._has_started = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._has_started = None

    def table(self, slab: str) -> PlasticityTable:
        return self.get_submodule(slab)  # type: ignore[return-value]

    @property
    def has_started(self) -> bool:
        """Whether gravity ever acted here, so that `start` says something. Read from the device once."""
        if self._has_started is None:
            self._has_started = bool(self.consolidations > 0)
        return self._has_started

    def observe(self, query_TD: Tensor, index_TK: Tensor, token_mask_T: Tensor | None, *, full: bool = False) -> None:
        """Remember one forward until the next consolidation. Padding moves nothing.

        Args:
            full: Whether every place is used; unused ones have a negative index.
        """
        if len(self.evidence) >= MOST_EVIDENCE:
            raise PopulationError(
                f"{MOST_EVIDENCE} forward passes wait for their keys to consolidate; call model.lifecycle_step() (or "
                f"model.consolidate_keys()) after every optimizer step, or set plasticity.training to False."
            )
        index_TK = index_TK.detach()
        if token_mask_T is not None:
            index_TK = index_TK.masked_fill(~token_mask_T.unsqueeze(-1), -1)
        self.evidence.append(Evidence(query_TD.detach(), index_TK, full and token_mask_T is None))

    def follow(self, new_index: Sequence[int]) -> None:
        """Carry waiting evidence over to a new slot order: old index -> new index, -1 for the dead."""
        if self.evidence:
            place = torch.tensor([*new_index, -1], device=self.evidence[0].index_TK.device)
            self.evidence = [Evidence(piece.query_TD, place[piece.index_TK]) for piece in self.evidence]

    def take_evidence(self) -> list[Evidence]:
        """What came since the last consolidation; it waits no longer."""
        evidence, self.evidence = self.evidence, []
        return evidence

    @torch.no_grad()
    def read(self, keys: nn.ParameterDict, population: Population) -> LayerKeys:
        """The alive rows of all slabs, in slot order. The first time, where keys are is where they start."""
        alive = population.alive
        if not self.has_started:
            for slab, count in alive.items():
                self.table(slab).start[:count] = keys[slab][:count].float()
            self._has_started = True
        parts = [
            LayerKeys(
                keys[slab][:count].float(),
                (table := self.table(slab)).start[:count],
                table.hits[:count],
                table.use[:count],
                population.table(slab).uid[:count],
            )
            for slab, count in alive.items()
        ]
        return parts[0] if len(parts) == 1 else LayerKeys.cat(parts)

    @torch.no_grad()
    def pairs(self, moved: LayerKeys, keys: nn.ParameterDict, population: Population) -> list[tuple[Tensor, Tensor]]:
        """What a consolidation's result is to be copied to, and from where."""
        found, first = [], 0
        for slab, count in population.alive.items():
            mine, table = slice(first, first + count), self.table(slab)
            new = (moved.keys_ED[mine], moved.hits_E[mine], moved.load_E[mine])
            found += [(old[:count], part) for old, part in zip((keys[slab], table.hits, table.use), new, strict=True)]
            first += count
        return found

    @torch.no_grad()
    def reset(self, keys: nn.ParameterDict, population: Population) -> None:
        """Keys back to where they started; usage and evidence forgotten."""
        for slab, count in population.alive.items():
            table = self.table(slab)
            if self.has_started:
                keys[slab][:count] = table.start[:count].to(keys[slab].dtype)
            table.hits.zero_()
            table.use.zero_()
        self.evidence = []
        self.consolidations.zero_()
        self._has_started = False

    def distances(self, keys: nn.ParameterDict, population: Population) -> Tensor:
        """How far each key is from its start, L2, fp32 (E,)."""
        if not self.has_started:
            return torch.zeros(len(population.members), device=self.consolidations.device)
        parts = [
            torch.linalg.vector_norm(keys[slab][:count].detach().float() - self.table(slab).start[:count], dim=1)
            for slab, count in population.alive.items()
        ]
        return torch.cat(parts)


__all__ = ["KeyPlasticity", "PlasticityTable"]
