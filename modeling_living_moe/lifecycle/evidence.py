"""What all ranks have seen since the last step: counts, sampled signals, losses, gradients, and samples of tokens.

One collective per step for what is summed, and the same one on every rank, whatever it has seen; where there is one
rank, a step computes nothing here. Samples are gathered for decisions only.

E alive experts in slot order, S sampled tokens, K places per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from living_moe.modeling_living_moe.active_experts import filled_rows
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.distributed import gather_objects, sum_over_ranks, world_size
from living_moe.modeling_living_moe.drift import DriftDetector, LayerEvidence, Passes, StepEvidence, sums_of
from living_moe.modeling_living_moe.gradient_sketch import sketch_rows
from living_moe.modeling_living_moe.vitals import Sample, count_dtype


def of_step(blocks: Sequence[LivingMoeBlock], drift: DriftDetector, step: int, *, samples: bool) -> StepEvidence:
    """The evidence of one optimizer step, summed over ranks; nothing of it is pending afterwards.

    Args:
        samples: Whether signals were sampled in this step, alike on every rank.
    """
    device = blocks[0].population.next_uid.device
    mine = [_of_layer(block, samples) for block in blocks]
    passes = drift.take()
    if world_size() > 1:
        sums = sums_of([passes], device)[0]
        parts = [
            part
            for layer in mine
            for part in (layer.counts, layer.signals, layer.tokens, layer.economy)
            if part is not None
        ]
        total = sum_over_ranks(torch.cat([part.to(sums).flatten() for part in [*parts, sums]]))
        summed = iter(total.split([part.numel() for part in [*parts, sums]]))

        def of_all(part: Tensor) -> Tensor:
            return next(summed).view(part.shape).to(part.device)

        mine = [
            layer._replace(
                counts=of_all(layer.counts),
                signals=None if layer.signals is None else of_all(layer.signals),
                tokens=None if layer.tokens is None else of_all(layer.tokens),
                economy=None if layer.economy is None else of_all(layer.economy),
            )
            for layer in mine
        ]
        passes = Passes(summed=next(summed))
    return StepEvidence(step, tuple(mine), passes)


def _of_layer(block: LivingMoeBlock, samples: bool) -> LayerEvidence:
    """What this rank saw of a layer."""
    vitals, selection = block.vitals, block.router.selection
    clade_E, clades = block.population.clades
    device = block.population.next_uid.device
    counts, signals, tokens = vitals.pending, vitals.pending_signals, vitals.pending_tokens
    economy = vitals.pending_economy
    vitals.pending = vitals.pending_signals = vitals.pending_tokens = vitals.pending_economy = None

    def or_zeros(pending: Tensor | None, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=count_dtype(device), device=device) if pending is None else pending

    experts = len(clade_E)
    return LayerEvidence(
        clade_E,
        clades,
        or_zeros(counts, 4, experts),
        or_zeros(signals, 4, experts) if samples else None,
        or_zeros(tokens).to(count_dtype(device)) if selection.leaves_places_unused else None,
        selection.places,
        None if block.router.synapse is None else or_zeros(economy, 3, experts),
    )


def gradients(block: LivingMoeBlock) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """L2 norms (alive,) and sketches (alive, SKETCH) of the experts' gradients, by slab."""
    norms, sketches = {}, {}
    for slab, count in block.population.alive.items():
        if block.experts.is_packed(slab):
            continue
        weights = block.experts.weights(slab)
        parameters = [p for p in (weights.gate_up_proj, weights.down_proj) if p.grad is not None]
        found = [p.grad for p in parameters if p.grad is not None]
        if found:
            sketches[slab], norms[slab] = sketch_rows(found, count, filled_rows(parameters))
    return norms, sketches


def recent_queries(block: LivingMoeBlock, uid: int) -> tuple[Tensor | None, Tensor | None]:
    """Sampled router inputs (S, H) and fields (S,) of the tokens it served last, of all ranks; None if none."""
    sample = gathered_sample(block)
    if sample is None:
        return None, None
    served = (sample.choices_SK == block.population.find(uid, block.layer).index).any(dim=1)
    return sample.hidden_SH[served], sample.fields_S[served]


def gathered_sample(block: LivingMoeBlock) -> Sample | None:
    """A layer's sample of recent tokens, of all ranks, on the CPU, floats in fp32; None if there is none."""
    mine = block.vitals.sample
    if mine is not None:
        mine = Sample(*((part.float() if part.is_floating_point() else part).cpu() for part in mine))
    shared = [part for part in gather_objects(mine) if part is not None]
    return Sample(*map(torch.cat, zip(*shared, strict=True))) if shared else None


def gathered_choices(block: LivingMoeBlock) -> Tensor | None:
    """Of that sample only who served whom, a hundredth of its bytes."""
    mine = None if block.vitals.sample is None else block.vitals.sample.choices_SK.cpu()
    shared = [part for part in gather_objects(mine) if part is not None]
    return torch.cat(shared) if shared else None


__all__ = ["gathered_choices", "gathered_sample", "gradients", "of_step", "recent_queries"]
