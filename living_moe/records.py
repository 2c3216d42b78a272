"""What a model knows about itself, in numbers: for its card, for `living-moe inspect`, for reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from living_moe.configuration.slabs import is_frozen, tier_of
from living_moe.model_cards import CardRecords, build_model_card
from living_moe.model_cards.card import LineageSummary, ParameterCounts
from living_moe.modeling_living_moe import LivingMoePreTrainedModel
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.checkpoint import CARD_MARK
from living_moe.modeling_living_moe.lifecycle.lineage import Lineage

_LIBRARIES = ("living-moe", "transformers", "torch", "accelerate", "datasets", "tokenizers")


def parameter_counts(model: LivingMoePreTrainedModel) -> ParameterCounts:
    """Parameters in all, those one token passes through, and those that take gradients; spare slots left out."""
    total = active = trainable = 0
    slots = {id(slot.parameter): slot for slot in model.slot_parameters()}
    seen: set[int] = set()
    for parameter in model.parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        slot = slots.get(id(parameter))
        size = parameter.numel()
        if slot is None:
            total, active = total + size, active + size
        else:
            experts = model.living_block(slot.layer).population.alive.get(slot.slab, 0)
            size = experts * (size // parameter.shape[0])
            total += size
            active += size if slot.role in ("key", "expression") else 0
        trainable += size if parameter.requires_grad else 0
    for block in model.living_blocks:
        # With experts of several widths, of the mean one.
        alive, pool = block.population.alive, block.experts
        total += sum(
            count * 3 * pool.hidden_size * pool.width(slab) for slab, count in alive.items() if pool.is_packed(slab)
        )
        units = sum(count * pool.width(slab) for slab, count in alive.items()) / max(1, sum(alive.values()))
        active += round(block.router.scoring.top_k * 3 * pool.hidden_size * units)
    return {"total": total, "active": active, "trainable": trainable}


def population(block: LivingMoeBlock) -> dict[str, int]:
    """Alive experts of a layer by kind; said of a kind is what sets it apart from the backbone's own experts."""
    kinds = {}
    for slab, count in block.population.alive.items():
        words = ["frozen" if is_frozen(slab) else "trainable"]
        if tier_of(slab):
            words.append(f"{block.experts.width(slab)} hidden units")
        if block.experts.is_ternary(slab):
            words.append("1.58 bits")
        kinds[", ".join(words)] = count
    return kinds


def lineage_summary(lineage: Lineage) -> LineageSummary:
    steps = [event.step for event in lineage]
    return {
        "events": lineage.counts(),
        "first_step": min(steps) if steps else None,
        "last_step": max(steps) if steps else None,
    }


def library_versions() -> dict[str, str]:
    """Installed versions of what trains and saves a model."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def card_records(model: LivingMoePreTrainedModel, directory: Path) -> CardRecords:
    """Everything a card says, from the model's own records."""
    provenance = model.config.provenance
    return CardRecords(
        model_name=directory.name,
        family=model.config.backbone_config.model_type,
        base_model=provenance.get("base_model"),
        license=provenance.get("license"),
        languages=provenance.get("languages", ()),
        datasets=provenance.get("datasets", ()),
        preset=model.config.preset,
        populations=[population(block) for block in model.living_blocks],
        parameters=parameter_counts(model),
        lineage_summary=lineage_summary(model.lineage),
        perplexities=provenance.get("perplexities", ()),
        leaderboard=provenance.get("leaderboard"),
        library_versions=library_versions(),
    )


def write_card(model: LivingMoePreTrainedModel, directory: Path) -> str:
    """Text of the card that `save_pretrained` puts beside a checkpoint."""
    return f"{build_model_card(card_records(model, directory))}\n{CARD_MARK}\n"


__all__ = ["card_records", "library_versions", "lineage_summary", "parameter_counts", "write_card"]
