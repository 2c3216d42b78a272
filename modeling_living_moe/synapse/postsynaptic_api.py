"""What a model with two timescales can do: learn from what it read, show it, take it back, make it slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.distributed import sum_over_ranks, world_size
from living_moe.modeling_living_moe.population import Member
from living_moe.modeling_living_moe.row_snapshots import Snapshot, restore_rows, snapshot_rows
from living_moe.modeling_living_moe.synapse.fast_weights import fold
from living_moe.modeling_living_moe.synapse.postsynaptic import SHOWN, Evidence, Postsynapse


class PostsynapticMixin:
    """Fast weights of the experts of a model with `living_blocks`."""

    config: Any
    living_blocks: list[LivingMoeBlock]
    living_block: Callable[[int], LivingMoeBlock]
    training: bool

    def _postsynapses(self) -> list[tuple[LivingMoeBlock, Postsynapse]]:
        return [(block, block.postsynaptic) for block in self.living_blocks if block.postsynaptic is not None]

    def potentiate_experts(self) -> None:
        """Let what was read since the last call move the fast weights and, in training, some of them into the slow.

        `lifecycle_step` does it after every optimizer step, a plastic pass at its end. A collective: every rank calls
        it.
        """
        layers = self._postsynapses()
        evidence = [side.take(block.population.alive, training=self.training) for block, side in layers]
        if world_size() > 1:
            _sum_evidence(evidence)
        for (block, side), parts in zip(layers, evidence, strict=True):
            side.learn(block.experts, parts, training=self.training)

    def postsynapse(self, layer: int) -> dict[str, Tensor]:
        """A layer's alive experts, each (experts,) in slot order: calcium (multiples of the mean), camkii, pp1, bdnf,
        and the sizes of the fast weights: gain, the root mean square of d; trace, the norm of O.

        Raises:
            ConfigurationError: `synapse.postsynaptic` is off.
        """
        block = self.living_block(layer)
        side = self._require_postsynapse(block)
        tables = [(side.table(slab), count) for slab, count in block.population.alive.items()]
        shown = {name: torch.cat([getattr(table, name)[:count] for table, count in tables]) for name in SHOWN}
        shown["gain"] = torch.cat([table.gain[:count].square().mean(1).sqrt() for table, count in tables])
        shown["trace"] = torch.cat(
            [torch.linalg.vector_norm(table.trace[:count], dim=(1, 2)) for table, count in tables]
        )
        return shown

    def fast_snapshot(self) -> Snapshot:
        """Copies of all fast weights: per living layer, by uid, its fast gains (I) and its eligibility trace (H, R)."""
        return snapshot_rows(self.living_blocks, self._fast_weights)

    def restore_fast(self, snapshot: Snapshot) -> None:
        """Put fast weights back where a snapshot has them; slow weights stay. Experts born since keep theirs.

        Raises:
            PopulationError: The snapshot is of another model.
        """
        restore_rows(self.living_blocks, snapshot, self._fast_weights, "fast weights")
        for _, side in self._postsynapses():
            side.forget()
            side.wake()

    def forget_fast(self) -> None:
        """Experts compute with their slow weights alone again; what has been consolidated stays."""
        for _, side in self._postsynapses():
            side.clear()

    @torch.no_grad()
    def fold_fast_weights(self) -> None:
        """Make all fast weights slow, those of frozen experts too: no output changes, beyond rounding.

        For whoever is to read the experts' parameters alone, `export` among them.
        """
        for block, side in self._postsynapses():
            for slab, count in block.population.alive.items():
                table, down = side.table(slab), block.experts.weights(slab).down_proj
                fast = table.gain[:count], table.trace[:count]
                down[:count] = fold(down.detach()[:count], *fast, 1.0, side.settings.postsynaptic_gain)[0]
            side.clear()

    def _fast_weights(self, block: LivingMoeBlock, member: Member) -> tuple[Tensor, Tensor]:
        table = self._require_postsynapse(block).table(member.slab)
        return table.gain[member.row], table.trace[member.row]

    def _require_postsynapse(self, block: LivingMoeBlock) -> Postsynapse:
        if block.postsynaptic is None:
            raise ConfigurationError(
                f"layer {block.layer} has no fast weights; set synapse.postsynaptic when the model is made."
            )
        return block.postsynaptic


def _sum_evidence(evidence: list[dict[str, Evidence]]) -> None:
    """Sum over ranks in one collective, in place."""
    tensors = [tensor for parts in evidence for part in parts.values() for tensor in part.tensors()]
    if not tensors:
        return
    flat = sum_over_ranks(torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors]))
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


__all__ = ["PostsynapticMixin"]
