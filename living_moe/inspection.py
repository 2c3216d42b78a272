"""`living-moe inspect`: a checkpoint's populations as tables. Reads headers and small tables, never the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.sections import ExpertsConfig
from living_moe.configuration.slabs import MOST_TIERS, slab_name
from living_moe.model_cards.card import ParameterCounts
from living_moe.modeling_living_moe.gradient_sketch import NEUTRAL, conflict_zone
from living_moe.modeling_living_moe.lifecycle.events import EVERY_LAYER
from living_moe.modeling_living_moe.lifecycle.lineage import LINEAGE_NAME, Lineage
from living_moe.modeling_living_moe.population import Population
from living_moe.records import parameter_counts
from living_moe.training.observatory.saved import load_tables


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says about itself."""

    path: Path
    config: LivingMoeConfig
    populations: list[Population]
    vitals: list[dict[str, Tensor]]
    routing: list[dict[str, Tensor]]
    phi: list[dict[str, Tensor]]
    phase: str
    parameters: ParameterCounts
    lineage: Lineage


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Read a living checkpoint's populations, parameter counts and lineage.

    Raises:
        CheckpointError: Not a living checkpoint, or a damaged one.
        ConfigurationError: Its config.json does not fit this version.
    """
    directory = Path(path)
    model = load_tables(directory)
    lineage = directory / LINEAGE_NAME
    return Inspection(
        path=directory,
        config=model.config,
        populations=[block.population for block in model.living_blocks],
        vitals=[model.vitals(layer) for layer in range(len(model.living_blocks))],
        routing=[model.routing(layer) for layer in range(len(model.living_blocks))],
        phi=[model.phi(layer) for layer in range(len(model.living_blocks))],
        phase=model.phase,
        parameters=parameter_counts(model),
        lineage=Lineage.load(lineage) if lineage.is_file() else Lineage(),
    )


def by_tier(alive: Mapping[str, int], *, frozen: bool) -> str:
    """Experts that are frozen, or train: "12", or "12 + 3" where tiers above the first have any."""
    counts = [alive.get(slab_name(tier, frozen=frozen), 0) for tier in range(MOST_TIERS)]
    while len(counts) > 1 and not counts[-1]:
        counts.pop()
    return " + ".join(map(str, counts))


def ternary_line(experts: ExpertsConfig) -> str:
    """Which experts are ternary, and how they are held."""
    tiers = ", ".join(map(str, experts.ternary_tiers))
    layers = "" if experts.ternary_layers is None else f", layers {', '.join(map(str, experts.ternary_layers))}"
    held = "packed, 1.6 bits a weight" if experts.packed else "as latents to train on"
    return f"Ternary experts: tiers {tiers}{layers}; {held}."


def show(inspection: Inspection, console: Console, *, events: int = 10) -> None:
    """Print an inspection: populations, signals (the largest of a layer's experts), parameters, the last events."""
    config, counts = inspection.config, inspection.parameters
    console.print(
        f"[bold]{inspection.path}[/bold]: {config.backbone_config.model_type}, preset {config.preset or 'none'}, "
        f"{len(inspection.populations)} living layers"
    )
    if config.experts.ternary_tiers:
        console.print(ternary_line(config.experts))
    table = Table(title="Populations")
    for column in (
        "layer",
        "experts",
        "frozen",
        "trainable",
        "clades",
        "newborn field",
        "largest load",
        "smallest load",
    ):
        table.add_column(column, justify="right")
    for layer, (population, vitals) in enumerate(zip(inspection.populations, inspection.vitals, strict=True)):
        load = vitals["load"]
        table.add_row(
            str(layer),
            str(len(population.members)),
            by_tier(population.alive, frozen=True),
            by_tier(population.alive, frozen=False),
            str(len({member.clade for member in population.members})),
            str(sum(member.field > 0 for member in population.members)),
            f"{float(load.max()):.2f}",
            f"{float(load.min()):.2f}",
        )
    console.print(table)
    table = Table(title=f"Signals, phase {inspection.phase}")
    for column in ("layer", "density", "entropy", "phi", "interference", "divergence", "worst conflict", "in conflict"):
        table.add_column(column, justify="right")
    for layer, (routing, vitals) in enumerate(zip(inspection.routing, inspection.vitals, strict=True)):
        conflict = vitals["conflict_cos"]
        table.add_row(
            str(layer),
            *(f"{float(routing[name]):.2f}" for name in ("density", "entropy")),
            f"{float(inspection.phi[layer]['phi']):.2f}",
            *(f"{float(vitals[name].max()):.2f}" for name in ("interference", "divergence")),
            f"{float(conflict.min()):.2f} ({conflict_zone(float(conflict.min()))})",
            str(int((conflict <= -NEUTRAL).sum())),
        )
    console.print(table)
    table = Table(title="Parameters")
    for column in ("total", "active per token", "trainable"):
        table.add_column(column, justify="right")
    table.add_row(*(f"{counts[key]:,}" for key in ("total", "active", "trainable")))
    console.print(table)
    if not inspection.lineage:
        console.print("Lineage: no event has happened.")
        return
    table = Table(title=f"Last {min(events, len(inspection.lineage))} of {len(inspection.lineage)} events")
    for column in ("step", "layer", "event", "parents", "children", "metric", "value", "threshold"):
        table.add_column(column, justify="right")
    for event in inspection.lineage[-events:]:
        table.add_row(
            str(event.step),
            "all" if event.layer == EVERY_LAYER else str(event.layer),
            event.kind,
            ", ".join(map(str, event.parents)),
            ", ".join(map(str, event.children)),
            event.metric,
            f"{event.value:.3g}",
            f"{event.threshold:.3g}",
        )
    console.print(table)
