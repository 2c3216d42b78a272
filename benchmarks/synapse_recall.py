"""Associative recall by fast weights: pairs of key and value are read, and asked for in a later pass.

    python benchmarks/synapse_recall.py memory use [--seeds 0 1 2] [--steps 1500] [--workers 2] [--save]

A stream is a mapping from keys to values, drawn anew each time. A pass holds every pair once, in some order, so nothing
within it tells the values: only what earlier passes left in the weights does. Attention does not reach them.

**memory**: an untrained layer reads a stream plastically, twice. Of the values it has seen, which one is nearest to
what its fast weights add to the layer's output at each key? Says what the trace holds, whether or not a model uses it.

**use**: a small model trains on streams that change every `PERIOD` steps, so that a step's pass can be answered from
what earlier steps have written. Then it reads new streams plastically: accuracy and loss of the values in a pass
without learning, after so many passes of the stream. Arms: no fast weights; fast weights written while reading only;
written while training too, at two rates. Chance: one of `VALUES`; who knows a stream's values and not their keys gets
one of `ASKED`.

Cells are kept in benchmarks/results/synapse_recall.jsonl and not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cell, Result, markdown_table, mean_and_deviation, run_cells, section
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import MixtralConfig

from living_moe import LivingMoeConfig, LivingMoeForCausalLM

RESULTS = Path(__file__).parent / "results"
KEYS, VALUES, PERIOD, ROWS = 16, 16, 8, 4
RANKS, PAIRS, READ = (1, 4, 8, 32), (4, 8, 16), (0, 1, 2, 4, 8)
#: Pairs of a stream in `use`.
ASKED = 6
READING: dict[str, Any] = {"postsynaptic": True, "postsynaptic_rank": 32, "postsynaptic_tokens": 10_000}
ARMS: dict[str, dict[str, Any]] = {
    "no fast weights": {},
    "while reading only": {**READING, "postsynaptic_training": False, "postsynaptic_plastic_rate": 0.3},
    "in training too, rate 0.1": {**READING, "postsynaptic_rate": 0.1, "postsynaptic_slow_rate": 0.0},
    "in training too, rate 0.3": {
        **READING, "postsynaptic_rate": 0.3, "postsynaptic_plastic_rate": 0.3, "postsynaptic_slow_rate": 0.0,
    },
}  # fmt: skip

Pairs = tuple[Tensor, Tensor]


def new_model(seed: int, synapse: dict[str, Any]) -> LivingMoeForCausalLM:
    torch.manual_seed(seed)
    backbone = MixtralConfig(  # type: ignore[call-arg]
        vocab_size=KEYS + VALUES, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        tie_word_embeddings=True, initializer_range=0.15, experts_implementation="grouped_mm",
    )  # fmt: skip
    return LivingMoeForCausalLM(
        LivingMoeConfig.from_backbone(backbone, "grow", synapse=synapse, lifecycle={"enabled": False})
    )


def stream(generator: torch.Generator, pairs: int) -> Pairs:
    """Different keys, each with any value; values differ too where there are enough."""
    keys = torch.randperm(KEYS, generator=generator)[:pairs]
    return keys, KEYS + torch.randperm(VALUES, generator=generator)[:pairs]


def one_pass(generator: torch.Generator, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (ROWS, 2 pairs): every pair once a row, and only values are asked for."""
    order = torch.stack([torch.randperm(len(pairs[0]), generator=generator) for _ in range(ROWS)])
    ids = torch.stack([part[order] for part in pairs], dim=-1).flatten(1)
    labels = ids.clone()
    labels[:, ::2] = -100
    return ids, labels


def read(model: LivingMoeForCausalLM, ids: Tensor) -> None:
    with model.plastic(keys=False):
        model(input_ids=ids)


# -- memory ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recalled(model: LivingMoeForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's input, centred, and what fast weights add to its output: both (rows, tokens, H)."""
    block = model.living_blocks[0]
    seen: dict[str, Tensor] = {}
    hook = block.register_forward_hook(lambda block, args, output: seen.update(input=args[0], output=output))
    model(input_ids=ids)
    snapshot, output = model.fast_snapshot(), seen["output"]
    model.forget_fast()
    model(input_ids=ids)
    hook.remove()
    model.restore_fast(snapshot)
    return seen["input"] - seen["input"].mean(dim=(0, 1)), output - seen["output"]


def memory(cell: Cell) -> Result:
    settings = {"postsynaptic": True, "postsynaptic_rank": cell["rank"]}
    model = new_model(cell["seed"], settings).eval()
    generator = torch.Generator().manual_seed(cell["seed"])
    right: list[Tensor] = []
    for _ in range(8):
        model.forget_fast()
        keys, values = stream(generator, cell["pairs"])
        for _ in range(2):
            read(model, one_pass(generator, (keys, values))[0])
        ids, _ = one_pass(generator, (keys, values))
        input_BTH, added_BTH = recalled(model, ids)
        value_VH = torch.stack([F.normalize(input_BTH[ids == value].mean(0), dim=0) for value in values])
        nearest_N = (added_BTH[:, ::2].flatten(0, 1) @ value_VH.T).argmax(-1)
        right.append((values[nearest_N] == ids[:, 1::2].flatten()).float())
    return {"accuracy": float(torch.cat(right).mean())}


# -- use ---------------------------------------------------------------------------------------------------------------


def train(model: LivingMoeForCausalLM, seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        if step % PERIOD == 0:
            pairs = stream(generator, ASKED)
        ids, labels = one_pass(generator, pairs)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def answers(model: LivingMoeForCausalLM, ids: Tensor) -> tuple[float, float]:
    """Accuracy and loss, nats, of the values of one pass."""
    scores = model(input_ids=ids).logits[:, ::2].flatten(0, 1)
    wanted = ids[:, 1::2].flatten()
    return float((scores.argmax(-1) == wanted).float().mean()), float(F.cross_entropy(scores, wanted))


def use(cell: Cell) -> Result:
    model = new_model(cell["seed"], ARMS[cell["arm"]])
    train(model, cell["seed"], cell["steps"])
    generator = torch.Generator().manual_seed(10_000 + cell["seed"])
    sums = {number: torch.zeros(2) for number in READ}
    streams = 40
    for _ in range(streams):
        pairs = stream(generator, ASKED)
        model.forget_fast()
        for number in range(max(READ) + 1):
            if number in READ:
                sums[number] += torch.tensor(answers(model, one_pass(generator, pairs)[0])) / streams
            if ARMS[cell["arm"]]:
                read(model, one_pass(generator, pairs)[0])
    return {f"{what} {n}": float(sums[n][i]) for i, what in enumerate(("accuracy", "loss")) for n in READ}


# -- report ------------------------------------------------------------------------------------------------------------


def memory_table(rows: list[tuple[Cell, Result]]) -> str:
    def shown(rank: int, pairs: int) -> str:
        found = [result["accuracy"] for cell, result in rows if (cell["rank"], cell["pairs"]) == (rank, pairs)]
        return mean_and_deviation(found, 2)

    return markdown_table(
        ["rank", *(f"{pairs} pairs" for pairs in PAIRS)],
        ([str(rank), *(shown(rank, pairs) for pairs in PAIRS)] for rank in RANKS),
    )


def use_table(rows: list[tuple[Cell, Result]]) -> str:
    def shown(arm: str, number: int) -> str:
        results = [result for cell, result in rows if cell["arm"] == arm]
        loss, accuracy = (
            mean_and_deviation((r[f"{what} {number}"] for r in results), 2) for what in ("loss", "accuracy")
        )
        return f"{accuracy} ({loss})"

    header = ["fast weights", *(f"{n} passes read" for n in READ)]
    return markdown_table(header, ([arm, *(shown(arm, n) for n in READ)] for arm in ARMS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=("memory", "use"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of training, in `use`")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/synapse_recall.md")
    options = parser.parse_args()
    kept, report = RESULTS / "synapse_recall.jsonl", []
    if "memory" in options.experiments:
        cells: list[Cell] = [
            {"experiment": "memory", "rank": rank, "pairs": pairs, "seed": seed}
            for rank in RANKS for pairs in PAIRS for seed in options.seeds
        ]  # fmt: skip
        rows = run_cells(cells, memory, kept, workers=options.workers)
        what = "Share of keys whose recalled vector is nearest to their own value's"
        report.append(section("Memory", what, options.seeds, memory_table(rows)))
    if "use" in options.experiments:
        cells = [
            {"experiment": "use", "arm": arm, "steps": options.steps, "seed": seed}
            for seed in options.seeds for arm in ARMS
        ]  # fmt: skip
        rows = run_cells(cells, use, kept, workers=options.workers)
        what = f"Accuracy (loss, nats) of values after {options.steps} steps of training; chance {1 / VALUES:.3f}"
        report.append(section("Use", what, options.seeds, use_table(rows)))
    text = "\n\n".join(report)
    print(text)
    if options.save:
        (RESULTS / "synapse_recall.md").write_text(
            f"# Associative recall by fast weights\n\n{text}\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
