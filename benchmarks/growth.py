"""Growth: from one expert per layer under a budget, and whether a population comes to rest.

    python benchmarks/growth.py monolith stationary [--text FILE] [--seeds 0 1 2] [--workers 2] [--save]

**monolith**: all learn one text from scratch, with equal tokens and equal active parameters: *one expert*, which is a
dense model; *static*, a Qwen3-MoE of as many experts as the grown one may have, one of them per token, with its
load-balancing loss; *grown*, a living model (preset `microexperts`) that starts as the first and splits up to the size
of the second. Printed: held-out loss, CPU seconds of training, experts at the end, and the growth economics
eta = (L_one - L_grown) / (L_one - L_static), the share of what the experts of the static model are worth that growing
them gives (above 1: more than that; it is defined where the static model is better than one expert by more than two
standard deviations, and for every seed).

**stationary**: a small Mixtral of 8 experts, from scratch, lives with the preset `microexperts` on one text, shuffled,
for a long run. Printed: events per 1,000 steps in the first and in the last half, splits, merges of siblings as a share
of splits, split-merge cycles (an expert that splits again after it had taken its newborn back), experts at the end, and
the largest ratio of the training loss over the 20 steps after an event to the 20 before.

Losses in nats per token; cells are kept in benchmarks/results/growth.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Result, markdown_table, mean_and_deviation, run_cells, section, text_name
from torch.optim.lr_scheduler import OneCycleLR
from transformers import MixtralConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from living_moe import LifecycleEvent, LivingMoeConfig, LivingMoeForCausalLM
from living_moe.modeling_living_moe.lifecycle.api import iter_events
from living_moe.quickstart import Domain, Sizes, read_domains
from living_moe.training.data import BlockLoader
from living_moe.training.evaluation import evaluate_blocks
from living_moe.training.loop import LivingTrainer, StepRecord
from living_moe.training.malloc import tune_malloc
from living_moe.training.optimizers import LivingAdamW

RESULTS = Path(__file__).parent / "results"
VOCABULARY, BLOCK, BATCH, HIDDEN, LAYERS, WIDTH = 2048, 128, 16, 128, 4, 256
LEARNING_RATE = 2e-3
#: Steps before and after an event whose training losses are compared.
WINDOW = 20

MONOLITH = ("one expert", "static", "grown")


@lru_cache(maxsize=1)
def text(file: str | None) -> Domain:
    sizes = Sizes(vocabulary=VOCABULARY, block=BLOCK, batch=BATCH)
    return read_domains(Path(file) if file else None, None, sizes)[1][0]


def backbone(experts: int) -> Qwen3MoeConfig:
    """Switch-like: one expert per token, its output times its probability."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=VOCABULARY, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, intermediate_size=WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, head_dim=HIDDEN // 4,
        num_experts=experts, num_experts_per_tok=1, norm_topk_prob=False, max_position_embeddings=BLOCK,
        tie_word_embeddings=True, router_aux_loss_coef=0.01, output_router_logits=experts > 1,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def train(
    model: PreTrainedModel, blocks: torch.Tensor, steps: int, seed: int, rate: float
) -> tuple[list[StepRecord], float]:
    """Records of all steps, and CPU seconds."""
    if isinstance(model, LivingMoeForCausalLM):
        optimizer: torch.optim.Optimizer = LivingAdamW(model, lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    scheduler = OneCycleLR(optimizer, max_lr=rate, total_steps=steps + 1, pct_start=0.1)
    records: list[StepRecord] = []
    hooks = [lambda trainer, record: records.append(record)]
    data = BlockLoader(blocks, BATCH, seed=seed)
    started = time.process_time()
    LivingTrainer(model, data, optimizer, scheduler, max_steps=steps, max_grad_norm=1.0, hooks=hooks).run()
    return records, time.process_time() - started


# -- monolith ----------------------------------------------------------------------------------------------------------


def monolith(cell: Cell) -> Result:
    tune_malloc()
    domain, most = text(cell["text"]), cell["experts"]
    torch.manual_seed(cell["seed"])
    if cell["arm"] == "grown":
        # Loads are measured against a clade's share: one that is served by n experts evenly loads each with 1 / n.
        lifecycle = {"max_experts": most, "split_load": 1.25 / most, "seed": cell["seed"], "min_age_steps": 20}
        config = LivingMoeConfig.from_backbone(backbone(1), preset="microexperts", lifecycle=lifecycle)
        model: PreTrainedModel = LivingMoeForCausalLM(config)
    else:
        model = Qwen3MoeForCausalLM(backbone(most if cell["arm"] == "static" else 1))
    _, seconds = train(model, domain.train, cell["steps"], cell["seed"], cell["learning_rate"])
    result = {"loss": evaluate_blocks(model, domain.held_out, batch_size=BATCH).loss, "cpu": seconds}
    result["parameters"] = float(sum(p.numel() for p in model.parameters()))
    if isinstance(model, LivingMoeForCausalLM):
        result["experts"] = statistics.fmean(model.expert_counts)
        kinds = [event.kind for event in model.lineage]
        result |= {kind: float(kinds.count(kind)) for kind in ("split", "merge", "death", "freeze", "thaw")}
    return result


def monolith_table(rows: list[tuple[Cell, Result]]) -> str:
    by_arm = {arm: [result for cell, result in rows if cell["arm"] == arm] for arm in MONOLITH}
    lines = []
    for arm, mine in by_arm.items():
        eta = ""
        if arm == "grown":
            parts = list(zip(*(by_arm[name] for name in MONOLITH), strict=True))
            worth = [one["loss"] - static["loss"] for one, static, _ in parts]
            eta = "static ties with one expert"
            if statistics.fmean(worth) > 2 * (statistics.stdev(worth) if len(worth) > 1 else 0.0) and min(worth) > 0:
                eta = mean_and_deviation(
                    ((one["loss"] - grown["loss"]) / (one["loss"] - static["loss"]) for one, static, grown in parts), 2
                )
        experts = mean_and_deviation([result["experts"] for result in mine], 1) if arm == "grown" else "–"
        events = [
            mean_and_deviation([r[kind] for r in mine], 0) if arm == "grown" else "–" for kind in ("split", "death")
        ]
        lines.append(
            [
                arm, mean_and_deviation(result["loss"] for result in mine),
                mean_and_deviation([result["cpu"] for result in mine], 0), experts, *events, eta,
            ]
        )  # fmt: skip
    return markdown_table(
        ["arm", "held-out loss", "CPU seconds", "experts per layer at the end", "splits", "deaths", "eta"], lines
    )


# -- stationary --------------------------------------------------------------------------------------------------------


def stationary(cell: Cell) -> Result:
    tune_malloc()
    domain = text(cell["text"])
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=BLOCK, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(cell["seed"])
    lifecycle = {"seed": cell["seed"]}
    model = LivingMoeForCausalLM(LivingMoeConfig.from_backbone(config, preset="microexperts", lifecycle=lifecycle))
    records, seconds = train(model, domain.train, cell["steps"], cell["seed"], LEARNING_RATE)
    events = list(iter_events(list(model.lineage)))
    middle = cell["steps"] / 2
    late = [event for event in events if event.step > middle]
    splits = [event for event in events if event.kind == "split"]
    losses = [record.loss for record in records]
    jumps = [
        statistics.fmean(losses[step : step + WINDOW]) / statistics.fmean(losses[step - WINDOW : step])
        for step in {event.step for event in events if event.kind in ("split", "merge", "death")}
        if WINDOW <= step <= len(losses) - WINDOW
    ]
    return {
        "loss": evaluate_blocks(model, domain.held_out, batch_size=BATCH).loss,
        "early": 1000 * (len(events) - len(late)) / middle,
        "late": 1000 * len(late) / middle,
        "splits": float(len(splits)),
        "merges": float(sum(event.kind == "merge" for event in events)),
        "deaths": float(sum(event.kind == "death" for event in events)),
        "merge_backs": float(len(merge_backs(events))),
        "cycles": float(cycles(events)),
        "experts": statistics.fmean(model.expert_counts),
        "jump": max(jumps, default=1.0),
        "cpu": seconds,
    }


def merge_backs(events: list[LifecycleEvent]) -> list[LifecycleEvent]:
    """Merges of a parent with its child, or of two children of one parent."""
    parent = {(e.layer, e.children[0]): e.parents[0] for e in events if e.kind == "split"}
    found = []
    for event in events:
        if event.kind == "merge":
            above = [parent.get((event.layer, uid), -1) for uid in event.parents]
            relatives = set(above) & set(event.parents) or any(above.count(uid) > 1 for uid in above if uid >= 0)
            found += [event] if relatives else []
    return found


def cycles(events: list[LifecycleEvent]) -> int:
    """Splits of an expert that has taken a child of its own back before."""
    taken_back = {(event.layer, event.children[0]): event.step for event in reversed(merge_backs(events))}
    return sum(
        event.kind == "split" and event.step > taken_back.get((event.layer, event.parents[0]), event.step)
        for event in events
    )


def stationary_table(rows: list[tuple[Cell, Result]]) -> str:
    figures: list[tuple[str, str, int]] = [
        ("events per 1,000 steps, first half", "early", 1), ("the same, last half", "late", 1), ("splits", "splits", 1),
        ("merges", "merges", 1), ("deaths", "deaths", 1), ("split-merge cycles", "cycles", 1),
        ("experts per layer at the end", "experts", 1), ("20 steps after an event / before, largest", "jump", 4),
        ("held-out loss", "loss", 3), ("CPU seconds", "cpu", 0),
    ]  # fmt: skip
    results = [result for _, result in rows]
    lines = [[name, mean_and_deviation([result[key] for result in results], digits)] for name, key, digits in figures]
    shares = [100 * result["merge_backs"] / max(1.0, result["splits"]) for result in results]
    lines.insert(5, ["merges of siblings, % of splits", mean_and_deviation(shares, 1)])
    return markdown_table(["figure", "mean ± deviation"], lines)


# -- command line ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=("monolith", "stationary"))
    parser.add_argument("--text", help="text file; default: Python's documentation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="monolith: optimizer steps of 16 x 128 tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="monolith: the highest")
    parser.add_argument("--long", type=int, default=1500, help="stationary: optimizer steps")
    parser.add_argument("--experts", type=int, default=8, help="monolith: experts per layer at most")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/growth.md")
    options = parser.parse_args()
    parts = []
    for experiment in options.experiments:
        common: dict[str, Any] = {"experiment": experiment, "text": options.text}
        if experiment == "monolith":
            own = {"steps": options.steps, "experts": options.experts, "learning_rate": options.learning_rate}
            cells = [{**common, **own, "arm": arm, "seed": seed} for seed in options.seeds for arm in MONOLITH]
            rows = run_cells(cells, monolith, RESULTS / "growth.jsonl", workers=options.workers)
            table = monolith_table(rows)
        else:
            cells = [{**common, "steps": options.long, "seed": seed} for seed in options.seeds]
            rows = run_cells(cells, stationary, RESULTS / "growth.jsonl", workers=options.workers)
            table = stationary_table(rows)
        what = f"Text: {text_name(options.text)}. {cells[0]['steps']} steps of {BATCH} x {BLOCK} tokens"
        parts.append(section(experiment, what, options.seeds, table))
        print(parts[-1], flush=True)
    if options.save:
        (RESULTS / "growth.md").write_text("# Growth\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
