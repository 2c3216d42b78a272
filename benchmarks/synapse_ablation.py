"""What synapses are worth on real text, and whether fatigue balances experts by itself.

    python benchmarks/synapse_ablation.py parts balance [--text FILE] [--seeds 0 1 2] [--steps 600] [--save]

A small Mixtral of 16 experts, two of them per token, learns a text from scratch with equal tokens in every arm.

**parts**: the baseline, which is the same model without synapses, and one part of them after the other: router synapse,
postsynaptic side, attention, and all together. The load-balancing loss is on in all of them. Printed: held-out loss,
the difference to the baseline of the same seed, CPU seconds of training, and how balanced experts were.

**balance**: the claim that fatigue balances experts by itself. Without any auxiliary loss and with the load-balancing
loss, each without synapses and with the router's: MaxVio (largest load over the mean, less 1), entropy of the loads
over its largest value, effective experts (of 16), and the share that receives next to nothing; loads of the held-out
text, counted in evaluation, means over layers.

Says which claims hold: a difference of two arms counts where its mean over seeds is more than two standard deviations
from 0. Losses in nats per token. Cells are kept in benchmarks/results/synapse_ablation.jsonl and not run again; arms
that are the same in both experiments are run once.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Result, markdown_table, mean_and_deviation, run_cells, section, text_name
from torch.optim.lr_scheduler import OneCycleLR
from transformers import MixtralConfig

from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.configuration.sections import SynapseConfig
from living_moe.quickstart import Domain, Sizes, read_domains
from living_moe.training.collapse import measures_of_load
from living_moe.training.data import BlockLoader
from living_moe.training.evaluation import evaluate_blocks, in_eval_mode
from living_moe.training.loop import LivingTrainer
from living_moe.training.malloc import tune_malloc
from living_moe.training.optimizers import LivingAdamW

RESULTS = Path(__file__).parent / "results"
VOCABULARY, BLOCK, BATCH, HIDDEN, LAYERS, WIDTH, EXPERTS, TOP_K = 2048, 128, 16, 128, 4, 128, 16, 2
LEARNING_RATE = 2e-3
#: Weight of the load-balancing loss where it is on.
BALANCE = 0.01
#: Tokens of a chunk: a turn of 16 experts is 8 tokens of two places.
ROUTER: dict[str, Any] = {"router": True, "chunk": 16}
POSTSYNAPTIC: dict[str, Any] = {"postsynaptic": True}
ATTENTION: dict[str, Any] = {"attention": True}
BASELINE = "baseline"
PARTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "+ router synapse": ROUTER,
    "+ postsynaptic": POSTSYNAPTIC,
    "+ attention": ATTENTION,
    "all": {**ROUTER, **POSTSYNAPTIC, **ATTENTION},
}
#: Section `synapse`, and weight of the load-balancing loss.
Arm = tuple[dict[str, Any], float]
BALANCES: dict[str, Arm] = {
    "no auxiliary loss": ({}, 0.0),
    "no auxiliary loss, router synapse": (ROUTER, 0.0),
    "no auxiliary loss, router synapse, strength 1 at the start": ({**ROUTER, "strength": 1.0}, 0.0),
    "load-balancing loss": ({}, BALANCE),
    "load-balancing loss, router synapse": (ROUTER, BALANCE),
}
#: Loads at most so many uniform shares are next to nothing.
DEAD = 0.02


def parts() -> dict[str, Arm]:
    """Arms of `parts` that this version's synapses have; "all" without what they have not."""
    known = set(SynapseConfig.field_names())
    arms = {name: {field: value for field, value in fields.items() if field in known} for name, fields in PARTS.items()}
    return {name: (fields, BALANCE) for name, fields in arms.items() if fields or not PARTS[name]}


@lru_cache(maxsize=1)
def text(file: str | None) -> Domain:
    sizes = Sizes(vocabulary=VOCABULARY, block=BLOCK, batch=BATCH)
    return read_domains(Path(file) if file else None, None, sizes)[1][0]


def build(synapse: dict[str, Any], balance: float, seed: int) -> LivingMoeForCausalLM:
    """The same weights in every arm: what synapses add is drawn after them, or not at all."""
    torch.manual_seed(seed)
    backbone = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
        max_position_embeddings=BLOCK, tie_word_embeddings=True, router_aux_loss_coef=balance,
        output_router_logits=balance > 0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    config = LivingMoeConfig.from_backbone(backbone, "grow", synapse=synapse, lifecycle={"enabled": False})
    return LivingMoeForCausalLM(config)


def run(cell: Cell) -> Result:
    tune_malloc()
    domain = text(cell["text"])
    model = build(cell["synapse"], cell["balance"], cell["seed"])
    optimizer = LivingAdamW(model, lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    scheduler = OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=cell["steps"] + 1, pct_start=0.1)
    data = BlockLoader(domain.train, BATCH, seed=cell["seed"])
    started = time.process_time()
    LivingTrainer(model, data, optimizer, scheduler, max_steps=cell["steps"], max_grad_norm=1.0).run()
    seconds = time.process_time() - started
    result = {"loss": evaluate_blocks(model, domain.held_out, batch_size=BATCH).loss, "cpu": seconds}
    if cell["synapse"].get("router"):
        synapses = [block.router.synapse for block in model.living_blocks]
        result["strength"] = statistics.fmean(float(one.strength.detach()) for one in synapses if one is not None)
    return {**result, **held_out_balance(model, domain)}


@torch.no_grad()
def held_out_balance(model: LivingMoeForCausalLM, domain: Domain) -> Result:
    """Measures of the loads of the held-out text, means over layers."""
    counts = [torch.zeros(EXPERTS) for _ in model.living_blocks]

    def count(layer: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            counts[layer] += torch.bincount(output[2].flatten(), minlength=EXPERTS)

        return hook

    hooks = [b.router.register_forward_hook(count(layer)) for layer, b in enumerate(model.living_blocks)]
    with in_eval_mode(model):
        for first in range(0, len(domain.held_out), BATCH):
            model(domain.held_out[first : first + BATCH], use_cache=False)
    for handle in hooks:
        handle.remove()
    measures = [measures_of_load(layer, DEAD) for layer in counts]
    found = {name: statistics.fmean(measure[name] for measure in measures) for name in measures[0]}
    entropies = [math.log(measure["effective_experts"]) / math.log(EXPERTS) for measure in measures]
    return {**found, "entropy": statistics.fmean(entropies)}


# -- tables ------------------------------------------------------------------------------------------------------------

Rows = list[tuple[Cell, Result]]


def of_arm(rows: Rows, arm: Arm) -> list[Result]:
    """Results of an arm, in the order of the seeds."""
    return [result for cell, result in rows if (cell["synapse"], cell["balance"]) == arm]


def differences(rows: Rows, arm: Arm, other: Arm, figure: str) -> list[float]:
    """Of two arms, seed by seed."""
    pairs = zip(of_arm(rows, arm), of_arm(rows, other), strict=True)
    return [one[figure] - two[figure] for one, two in pairs]


def change(values: list[float]) -> str:
    """What a difference is, in a word: lower or higher where its mean is more than two standard deviations from 0."""
    if len(values) < 2:
        return "of one seed only"
    mean = statistics.fmean(values)
    return "no different" if abs(mean) <= 2 * statistics.stdev(values) else "higher" if mean > 0 else "lower"


#: Figure, digits.
SHOWN = (("max_violation", 2), ("entropy", 3), ("effective_experts", 1), ("dead_share", 3))
HEADER = ["MaxVio", "entropy", "effective experts", "dead share"]


def shown(results: list[Result]) -> list[str]:
    return [mean_and_deviation([result[name] for result in results], digits) for name, digits in SHOWN]


def parts_table(rows: Rows) -> str:
    lines, claims, baseline = [], [], parts()[BASELINE]
    for name, arm in parts().items():
        mine, gained = of_arm(rows, arm), differences(rows, arm, baseline, "loss")
        difference = "–" if name == BASELINE else mean_and_deviation(gained, 4)
        costs = [one["cpu"] / two["cpu"] for one, two in zip(mine, of_arm(rows, baseline), strict=True)]
        loss = mean_and_deviation([result["loss"] for result in mine], 4)
        lines.append([name, loss, difference, mean_and_deviation(costs, 2), *shown(mine)])
        if name != BASELINE:
            claims.append(f"- {name}: the loss is {change(gained)} ({difference}).")
    table = markdown_table(["arm", "held-out loss", "difference", "CPU seconds / baseline's", *HEADER], lines)
    return "\n".join([table, "", *claims])


def balance_table(rows: Rows) -> str:
    lines, claims = [], []
    for name, arm in BALANCES.items():
        mine = of_arm(rows, arm)
        strengths = [result["strength"] for result in mine if "strength" in result]
        strength = mean_and_deviation(strengths, 2) if strengths else "–"
        loss = mean_and_deviation([result["loss"] for result in mine], 4)
        lines.append([name, loss, *shown(mine), strength])
        # An arm with synapses beside the one without; the loss that is there to balance beside none.
        other: Arm = ({}, arm[1]) if arm[0] else ({}, 0.0)
        if arm != other:
            against = next(known for known, there in BALANCES.items() if there == other)
            apart = differences(rows, arm, other, "max_violation")
            by = mean_and_deviation(apart, 2)
            gained = differences(rows, arm, other, "loss")
            loss = f"the loss {change(gained)} ({mean_and_deviation(gained, 4)})"
            claims.append(f"- {name}, against {against}: MaxVio is {change(apart)} ({by}), {loss}.")
    table = markdown_table(["arm", "held-out loss", *HEADER, "strength learned"], lines)
    return "\n".join([table, "", *claims])


# -- command line ------------------------------------------------------------------------------------------------------


def cells_of(arms: dict[str, Arm], options: argparse.Namespace) -> list[Cell]:
    common = {"text": options.text, "steps": options.steps}
    return [
        {**common, "synapse": fields, "balance": balance, "seed": seed}
        for seed in options.seeds
        for fields, balance in arms.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=("parts", "balance"))
    parser.add_argument("--text", help="text file; default: Python's documentation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of 16 x 128 tokens")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the tables to results/synapse_ablation.md")
    options = parser.parse_args()
    tables = {"parts": parts_table, "balance": balance_table}
    reports = []
    for experiment in options.experiments:
        cells = cells_of(parts() if experiment == "parts" else BALANCES, options)
        rows = run_cells(cells, run, RESULTS / "synapse_ablation.jsonl", workers=options.workers)
        what = (
            f"Text: {text_name(options.text)}. {options.steps} steps of {BATCH} x {BLOCK} tokens, {LAYERS} layers of "
            f"{EXPERTS} experts, top-{TOP_K}, hidden {HIDDEN}"
        )
        reports.append(section(experiment, what, options.seeds, tables[experiment](rows)))
        print(reports[-1], flush=True)
    if options.save:
        (RESULTS / "synapse_ablation.md").write_text("# Synapses: ablation\n\n" + "\n\n".join(reports) + "\n")


if __name__ == "__main__":
    main()
