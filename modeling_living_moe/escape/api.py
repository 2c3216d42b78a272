"""What a model whose blocks can escape can do: say where each is, open and leave by hand, and by itself each window.

When to go is the detector's verdict on the whole model (detector.py) together with a layer's Φ (phi.py); how a block
goes is module.py's. This must not decide on experts (lifecycle/).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from living_moe.configuration.errors import PopulationError
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.distributed import fingerprint, require_agreement, world_size
from living_moe.modeling_living_moe.escape.module import CLOSED, OPEN, STATES, Escape
from living_moe.modeling_living_moe.lifecycle.events import LifecycleEvent, LifecycleKind
from living_moe.modeling_living_moe.lifecycle.operations import REQUEST, Reason
from living_moe.modeling_living_moe.lifecycle.surgery import forget_state, surgeon
from living_moe.modeling_living_moe.phi import phi_collapsed
from living_moe.modeling_living_moe.vitals import PHI_SETTLED

if TYPE_CHECKING:
    from living_moe.modeling_living_moe.lifecycle.lineage import Lineage
    from living_moe.modeling_living_moe.modeling_living_moe import LivingMoeModel


class EscapeMixin:
    """The part of `LifecycleMixin` that is about other spaces: escapes of a model with `living_blocks`."""

    config: Any
    living_blocks: list[LivingMoeBlock]

    if TYPE_CHECKING:

        @property
        def _life(self) -> LivingMoeModel: ...
        @property
        def steps_lived(self) -> int: ...
        @property
        def lineage(self) -> Lineage: ...
        def living_block(self, layer: int) -> LivingMoeBlock: ...

    def escape_state(self, layer: int) -> str:
        """Whether a block works in the other space of the section `escape`: closed, open, or leaving.

        Raises:
            PopulationError: No such layer, or `escape.space` is none.
        """
        return STATES[self._escape(layer).now.state]

    def open_escape(self, layer: int, *, optimizer: Optimizer | None = None) -> LifecycleEvent:
        """Let a block enter the other space, through a gate of zero: no output changes.

        `lifecycle_step` does it when training stagnates and the layer's Φ has collapsed (see escape/detector.py).

        Args:
            optimizer: Forgets what it remembers of the map's parameters, so that the next step is their first.

        Raises:
            PopulationError: As `escape_state`, or the block is not closed.
            OptimizerError: The optimizer is unsupported, or was built before a slab grew.
        """
        escape = self._escape(layer)
        if optimizer is not None:
            surgeon()(optimizer, self, ())  # type: ignore[arg-type]
        if escape.now.state != CLOSED:
            raise PopulationError(f"layer {layer}: the escape is {STATES[escape.now.state]}; only a closed one opens.")
        return self._enter(layer, REQUEST, optimizer)

    def leave_escape(self, layer: int) -> LifecycleEvent:
        """Let a block leave: its gate fades out over `escape.leave_steps` lifecycle steps, then it is closed.

        Raises:
            PopulationError: As `escape_state`, or the block is not open.
        """
        escape = self._escape(layer)
        if escape.now.state != OPEN:
            raise PopulationError(f"layer {layer}: the escape is {STATES[escape.now.state]}; only an open one is left.")
        return self._return(layer, REQUEST)

    def _escape(self, layer: int) -> Escape:
        escape = self.living_block(layer).escape
        if escape is None:
            raise PopulationError(f"layer {layer}: this model has no escape; set escape.space to poincare or fourier.")
        return escape

    def _enter(self, layer: int, reason: Reason, optimizer: Optimizer | None) -> LifecycleEvent:
        escape = self._escape(layer)
        forget_state(optimizer, escape)
        escape.open(self.steps_lived)
        return self._log_escape("escape", layer, reason)

    def _return(self, layer: int, reason: Reason) -> LifecycleEvent:
        self._escape(layer).leave(self.steps_lived)
        return self._log_escape("return", layer, reason)

    def _log_escape(self, kind: LifecycleKind, layer: int, reason: Reason) -> LifecycleEvent:
        event = LifecycleEvent(
            kind=kind, step=self.steps_lived, layer=layer, parents=(), children=(), metric=reason.metric,
            value=reason.value, threshold=reason.threshold,
        )  # fmt: skip
        self.lineage.append(event)
        return event

    def _step_escapes(self, optimizer: Optimizer | None) -> list[LifecycleEvent]:
        """One optimizer step of every escape; at the end of a window, who goes and who returns."""
        detector, settings, step = self._life.stagnation, self.config.escape, self.steps_lived
        if detector is None:
            return []
        for block in self.living_blocks:
            if self._escape(block.layer).tick(step):
                forget_state(optimizer, self._escape(block.layer))
                block.vitals.come_home()
        if step % settings.window:
            return []
        detector.end_window()
        device = detector.fall.device
        phis, peaks, counts = (
            torch.stack([getattr(block.vitals, name).to(device) for block in self.living_blocks])
            for name in ("phi_level", "phi_record", "phi_count")
        )
        # A level that has begun anew is at first as noisy as a single measurement.
        collapsed = phi_collapsed(phis, peaks, settings.collapse) & (counts >= PHI_SETTLED)
        verdict = torch.cat([torch.stack([detector.stagnates(), detector.falling()]).float(), collapsed.float()])
        # One transfer per window.
        figures = torch.cat([verdict, detector.fall.view(1), phis, peaks]).tolist()
        layers = len(self.living_blocks)
        (stagnates, falling), collapses, fall = figures[:2], figures[2 : 2 + layers], figures[2 + layers]
        events = []
        for block, collapse, phi, peak in zip(
            self.living_blocks, collapses, figures[3 + layers : 3 + 2 * layers], figures[3 + 2 * layers :], strict=True
        ):
            now = self._escape(block.layer).now
            lived = step - now.since
            if now.state == CLOSED and stagnates and collapse and step >= now.rest_until:
                events.append(self._enter(block.layer, Reason("phi", phi, settings.collapse * peak), optimizer))
            elif now.state == OPEN and lived >= settings.window and falling:
                events.append(self._return(block.layer, Reason("loss fall", fall, settings.loss_tolerance)))
            elif now.state == OPEN and lived >= settings.max_steps:
                events.append(self._return(block.layer, Reason("steps", float(lived), float(settings.max_steps))))
        if world_size() > 1:
            require_agreement("escapes", fingerprint((), repr(events)))
        return events


__all__ = ["EscapeMixin"]
