"""What a model with plastic keys can do: `model.plastic()`, consolidation, snapshots, the way back.

SOME's claim is that a model adapts while it reads by moving addresses, never functions. Whether that helps is measured
in `benchmarks/some.py`; here it is made exact, deterministic and reversible.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import PlasticityConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.plasticity.gravity import consolidate
from living_moe.modeling_living_moe.plasticity.state import KeyPlasticity
from living_moe.modeling_living_moe.population import Member
from living_moe.modeling_living_moe.row_snapshots import Snapshot, restore_rows, snapshot_rows


class PlasticityMixin:
    """Plastic keys of a model with `living_blocks`."""

    config: Any
    living_blocks: list[LivingMoeBlock]
    training: bool

    #: Forces of an open `plastic()` context, on the base model.
    _forces: PlasticityConfig | None = None
    #: Whether keys move in it.
    _keys_too: bool = True

    @property
    def is_plastic(self) -> bool:
        """Whether a `plastic()` context is open."""
        return self._life._forces is not None  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def plastic(self, *, keys: bool = True, **forces: Any) -> Iterator[None]:
        """While open, keys move as the model reads: every forward pass consolidates at its end, in `generate` too.

        Works on any living model; one that was not configured for it becomes so (`plasticity.enabled`), because where
        keys started must be saved with it. Gradients are off inside: keys move after each pass, so a backward through
        it would be wrong. In a distributed run every rank must make the same passes.

        Where experts have fast weights (`synapse.postsynaptic`), these learn as well, and keep what they learned when
        it closes: `fast_snapshot` and `restore_fast`, or `forget_fast`, take it back.

        Args:
            keys: Whether keys move; without, only fast weights learn.
            **forces: Fields of the section `plasticity` that differ while it is open, e.g. `alpha=0.05`.

        Raises:
            ConfigurationError: The model is in training mode (there `plasticity.training` decides), a field is unknown,
                or neither keys nor fast weights would learn.
        """
        if self.training:
            raise ConfigurationError(
                "plastic() is for reading, and the model is in training mode; call model.eval(), or set "
                "plasticity.training to let keys move while it trains."
            )
        if not keys and not self.config.synapse.postsynaptic:
            raise ConfigurationError(
                "plastic(keys=False) leaves only fast weights to learn, and this model's experts have none; make it "
                "with synapse.postsynaptic, or let keys move."
            )
        if self.config.synapse.postsynaptic and any(p.is_meta for p in self.parameters()):  # type: ignore[attr-defined]
            raise ConfigurationError(
                "plastic() lets fast weights learn from the slow ones, which are offloaded here; load the model "
                "without offloading."
            )
        settings = PlasticityConfig.from_value({**self.config.plasticity.to_dict(), **forces})
        base = self._life  # type: ignore[attr-defined]
        if keys:
            self._require_plasticity()
        before = base._forces, base._keys_too
        base._forces, base._keys_too = settings, keys
        try:
            with torch.no_grad():
                yield
        finally:
            base._forces, base._keys_too = before

    def consolidate_keys(self) -> None:
        """Let what was read since the last consolidation move the keys; `lifecycle_step` does it while training.

        A collective: every rank calls it.
        """
        forces = self._life._forces or self.config.plasticity  # type: ignore[attr-defined]
        plastic: dict[torch.device, list[tuple[LivingMoeBlock, KeyPlasticity]]] = {}
        for block in self.living_blocks:
            if block.plasticity is not None:
                plastic.setdefault(block.population.next_uid.device, []).append((block, block.plasticity))
        for layers in plastic.values():
            before = [memory.read(block.router.keys, block.population) for block, memory in layers]
            after = consolidate(before, [memory.take_evidence() for _, memory in layers], forces)
            pairs = [
                pair
                for (block, memory), moved in zip(layers, after, strict=True)
                for pair in memory.pairs(moved, block.router.keys, block.population)
            ]
            with torch.no_grad():
                # One call for all layers.
                torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
                torch._foreach_add_([memory.consolidations for _, memory in layers], 1)

    def forget_evidence(self) -> None:
        """Drop what was read since the last consolidation."""
        for block in self.living_blocks:
            if block.plasticity is not None:
                block.plasticity.evidence = []
            if block.postsynaptic is not None:
                block.postsynaptic.forget()

    def reset_keys(self) -> None:
        """Keys back to where they were before gravity first acted; usage is forgotten."""
        for block in self.living_blocks:
            if block.plasticity is not None:
                block.plasticity.reset(block.router.keys, block.population)

    def key_distances(self, layer: int) -> Tensor:
        """How far the keys of a layer are from where they started: L2, fp32 (experts,), slot order."""
        block = self.living_block(layer)  # type: ignore[attr-defined]
        if block.plasticity is None:
            return torch.zeros(len(block.population.members), device=block.population.next_uid.device)
        distances: Tensor = block.plasticity.distances(block.router.keys, block.population)
        return distances

    def key_snapshot(self) -> list[dict[int, Tensor]]:
        """Copies of all keys, (D,) each: per living layer, by uid."""
        return [{uid: key for uid, (key,) in rows.items()} for rows in snapshot_rows(self.living_blocks, _key)]

    def restore_keys(self, snapshot: Sequence[dict[int, Tensor]]) -> None:
        """Put keys back where a snapshot has them; usage stays. Experts born since keep theirs.

        Raises:
            PopulationError: The snapshot is of another model.
        """
        rows: Snapshot = [{uid: (key,) for uid, key in layer.items()} for layer in snapshot]
        restore_rows(self.living_blocks, rows, _key, "keys")

    def _require_plasticity(self) -> None:
        if not self.config.plasticity.enabled:
            self.config.plasticity = dataclasses.replace(self.config.plasticity, enabled=True, training=False)
        for block in self.living_blocks:
            if block.plasticity is None:
                device = block.population.next_uid.device
                # Tables made under inference_mode could not be changed outside of it.
                with torch.inference_mode(False):
                    block.plasticity = KeyPlasticity(block.capacities(), block.router.d_key).to(device)


def _key(block: LivingMoeBlock, member: Member) -> tuple[Tensor]:
    return (block.router.keys[member.slab].detach()[member.row],)


__all__ = ["PlasticityMixin"]
