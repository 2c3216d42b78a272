"""SOME's two claims, measured: a library of frozen experts learns by routing alone; moving keys adapt while reading.

    python benchmarks/some.py reservoir shift cost [--first FILE --second FILE] [--seeds 0 1 2] [--workers 2] [--save]

**reservoir** (claim A of the experiment plan): small Mixtrals with 128 experts a layer are trained from scratch on
the first text. In most arms the experts are random and frozen, 99 % of all weights; the arms differ in what else
learns. "routing" is query networks, keys, embeddings, attention and norms, balanced by biases except where it says so.
"one expert" has a single frozen expert of the same active width, "hash" sends every token of the vocabulary to two
fixed random experts with equal weights, "no experts" is what attention and embeddings do alone.

**shift**: a small MoE learns the first text, then reads the second one, block after block, and its keys move without
gradients (`model.plastic`). Printed: held-out loss on the second text while it reads (each block is scored before its
own consolidation can matter), then on the first text with the keys it ended with. The base is trained with a
dot-product router, or with a cosine router whose keys gravity moves in training too, and no gradient.

**cost**: what a consolidation takes beside the forward pass it follows.

Losses in nats per token; cells are kept in benchmarks/results/some.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Result, machine, markdown_table, mean_and_deviation, run_cells, section, text_name
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import MixtralConfig

from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.quickstart import Domain, Sizes, read_domains
from living_moe.training.collapse import collapse_report, summary
from living_moe.training.data import BlockLoader
from living_moe.training.evaluation import evaluate_blocks
from living_moe.training.loop import LivingTrainer
from living_moe.training.malloc import tune_malloc

RESULTS = Path(__file__).parent / "results"
VOCABULARY, BLOCK, BATCH, HIDDEN, LAYERS, TOP_K = 2048, 128, 16, 128, 4, 2
LEARNING_RATE = 3e-3

#: What learns in each reservoir arm, as sections that differ from the preset "some".
NOTHING = {"embeddings": False, "head": False, "attention": False, "norms": False}
ROUTER_FROZEN = {"query_networks": False, "keys": False, "frozen_keys": False}
#: A hundredth of the uniform score of 128 experts per step: biases are added to softmax scores, which are small.
BALANCED = {"router": {"bias_update_rate": 1e-4}, "plasticity": {"enabled": False}}
UNROUTED = {"trainable": ROUTER_FROZEN, "plasticity": {"enabled": False}}
RESERVOIR: dict[str, dict[str, Any]] = {
    "everything": {**BALANCED, "experts": {"freeze_pretrained": False}},
    "everything, unbalanced": {"plasticity": {"enabled": False}, "experts": {"freeze_pretrained": False}},
    "routing": BALANCED,
    "routing, unbalanced": {"plasticity": {"enabled": False}},
    "routing, orthogonal experts": {**BALANCED, "experts": {"init": "orthogonal"}},
    "routing, 90 % sparse experts": {**BALANCED, "experts": {"init": "sparse"}},
    "queries, and keys by gravity": {**BALANCED, "plasticity": {}, "trainable": {"keys": False, "frozen_keys": False}},
    "fixed random keys": UNROUTED,
    "hash": UNROUTED,
    "one expert": UNROUTED,
    "no experts": UNROUTED,
    "routing and nothing else": {**BALANCED, "trainable": NOTHING},
}

#: Of each shift arm: the base's router, and the forces while it reads (None: keys stay).
SHIFT: dict[str, tuple[str, dict[str, Any] | None]] = {
    "dot, keys off": ("dot", None),
    "dot, raw queries, alpha 0.01": ("dot", {"pull": "raw", "alpha": 0.01, "beta": 0.001}),
    "dot, directions, alpha 0.01": ("dot", {"pull": "direction", "alpha": 0.01, "beta": 0.001}),
    "dot, directions, alpha 0.1": ("dot", {"pull": "direction", "alpha": 0.1, "beta": 0.01}),
    "cosine and gravity, keys off": ("cosine", None),
    "cosine and gravity, alpha 0.01": ("cosine", {"alpha": 0.01, "beta": 0.001}),
    "cosine and gravity, alpha 0.1": ("cosine", {"alpha": 0.1, "beta": 0.01}),
    "cosine and gravity, moving average": ("cosine", {"alpha": 0.001, "beta": 0.0001, "usage": "ema"}),
}


@lru_cache(maxsize=1)
def texts(first: str | None, second: str | None) -> tuple[Domain, Domain]:
    sizes = Sizes(vocabulary=VOCABULARY, block=BLOCK, batch=BATCH)
    return read_domains(Path(first) if first else None, Path(second) if second else None, sizes)[1]


def build(experts: int, intermediate: int, sections: dict[str, dict[str, Any]], seed: int) -> LivingMoeForCausalLM:
    """A model from scratch, preset "some" with `sections` on top."""
    backbone = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=min(TOP_K, experts),
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    network = {"query_network": "mlp", "d_key": 64, "query_hidden": 64}
    sections = {**sections, "router": {**network, **sections.get("router", {})}}
    config = LivingMoeConfig.from_backbone(backbone, preset="some", **sections)
    torch.manual_seed(seed)
    model = LivingMoeForCausalLM(config)
    model.apply_trainability()
    model.set_experts_implementation("active")
    return model


def train(model: nn.Module, blocks: Tensor, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95),
        fused=True,
    )  # fmt: skip
    scheduler = OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    data = BlockLoader(blocks, BATCH, seed=seed)
    LivingTrainer(model, data, optimizer, scheduler, max_steps=steps, max_grad_norm=1.0).run()


# -- reservoir ---------------------------------------------------------------------------------------------------------


class HashRouter(nn.Module):
    """Two fixed random experts for every token of the vocabulary, with equal weights."""

    def __init__(self, source: nn.Module, experts: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(VOCABULARY)]
        self.table = torch.stack(rows)
        self.keys, self.selection, self.scoring = source.keys, source.selection, source.scoring
        self.d_key, self.ids = source.d_key, torch.zeros(0, dtype=torch.int64)
        self.synapse = None

    def forward(self, hidden_TH: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
        index_TK = self.table[self.ids.reshape(-1)]
        weights_TK = torch.full(index_TK.shape, 1 / TOP_K, dtype=hidden_TH.dtype)
        return hidden_TH, weights_TK, index_TK


def by_hash(model: LivingMoeForCausalLM, seed: int) -> None:
    routers = []
    for block in model.living_blocks:
        block.router = HashRouter(block.router, len(block.population.members), seed + block.layer)  # type: ignore[assignment]
        routers.append(block.router)

    def remember(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        for router in routers:
            router.ids = kwargs["input_ids"]

    model.register_forward_pre_hook(remember, with_kwargs=True)


def reservoir(cell: Cell) -> Result:
    tune_malloc()
    domain = texts(cell["first"], cell["second"])[0]
    arm, seed = cell["arm"], cell["seed"]
    one = arm == "one expert"
    experts, intermediate = (1, TOP_K * cell["intermediate"]) if one else (cell["experts"], cell["intermediate"])
    model = build(experts, intermediate, RESERVOIR[arm], seed)
    if arm == "hash":
        by_hash(model, seed)
    if arm == "no experts":
        for block in model.living_blocks:
            block.experts.weights("frozen").down_proj.data.zero_()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    train(model, domain.train, cell["steps"], seed)
    loss = evaluate_blocks(model, domain.held_out, batch_size=BATCH).loss
    result = {"loss": loss, "frozen": 1 - trainable / total, "parameters": float(total)}
    if not one and arm != "hash":
        figures = summary(collapse_report(model))
        result |= {"gini": figures["routing/gini"], "effective": figures["routing/effective_experts"]}
    return result


def reservoir_table(rows: list[tuple[Cell, Result]]) -> str:
    lines = []
    for arm in dict.fromkeys(cell["arm"] for cell, _ in rows):
        mine = [result for cell, result in rows if cell["arm"] == arm]
        spread = [
            mean_and_deviation([result[name] for result in mine], digits) if name in mine[0] else ""
            for name, digits in (("gini", 2), ("effective", 1))
        ]
        loss = mean_and_deviation(result["loss"] for result in mine)
        seconds = mean_and_deviation([result["seconds"] for result in mine], 0)
        lines.append([arm, loss, f"{mine[0]['frozen']:.1%}", *spread, seconds])
    return markdown_table(["what learns", "held-out loss", "frozen", "Gini", "effective experts", "seconds"], lines)


# -- shift -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def shift_base(router: str, seed: int, steps: int, first: str | None, second: str | None) -> dict[str, Tensor]:
    """Weights of a small MoE that has learned the first text."""
    model = shift_model(router, seed)
    train(model, texts(first, second)[0].train, steps, seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def shift_model(router: str, seed: int) -> LivingMoeForCausalLM:
    gravity = router == "cosine"
    sections: dict[str, dict[str, Any]] = {
        "router": {"query_network": "identity", "d_key": None, "query_hidden": None}
        | ({"similarity": "cosine", "temperature": 0.1} if gravity else {}),
        "experts": {"freeze_pretrained": False, "init_gain": None},
        "trainable": {"mlps": True, "keys": not gravity, "frozen_keys": not gravity},
        "plasticity": {"enabled": True, "training": gravity, "pull": "direction"},
    }
    return build(16, 256, sections, seed)


def shift(cell: Cell) -> Result:
    tune_malloc()
    first, second = texts(cell["first"], cell["second"])
    router, forces = SHIFT[cell["arm"]]
    model = shift_model(router, cell["seed"])
    model.load_state_dict(shift_base(router, cell["seed"], cell["steps"], cell["first"], cell["second"]))
    model.eval()
    start = model.key_snapshot()
    first_before = evaluate_blocks(model, first.held_out, batch_size=BATCH).loss
    stream = second.train[: cell["blocks"]]
    halves = stream.chunk(2)
    if forces is None:
        reading = [evaluate_blocks(model, half, batch_size=1).loss for half in halves]
    else:
        with model.plastic(**forces):
            reading = [evaluate_blocks(model, half, batch_size=1).loss for half in halves]
    moved = [
        torch.stack([(key - rows[uid]).norm() / rows[uid].norm() for uid, key in now.items()]).mean()
        for rows, now in zip(start, model.key_snapshot(), strict=True)
    ]
    return {
        "second": sum(reading) / 2,
        "second_late": reading[1],
        "first_before": first_before,
        "first_after": evaluate_blocks(model, first.held_out, batch_size=BATCH).loss,
        "moved": float(torch.stack(moved).mean()),
    }


def shift_table(rows: list[tuple[Cell, Result]]) -> str:
    lines = []
    for arm in dict.fromkeys(cell["arm"] for cell, _ in rows):
        mine = [result for cell, result in rows if cell["arm"] == arm]
        off = [result for cell, result in rows if cell["arm"] == arm.split(",")[0] + ", keys off"]
        gain = [on["second_late"] - base["second_late"] for on, base in zip(mine, off, strict=True)]
        forgotten = [result["first_after"] - result["first_before"] for result in mine]
        columns = [mean_and_deviation(r[name] for r in mine) for name in ("second", "second_late")]
        moved = f"{sum(r['moved'] for r in mine) / len(mine):.1%}"
        lines.append([arm, *columns, mean_and_deviation(gain, 4), mean_and_deviation(forgotten, 4), moved])
    header = ["arm", "second text", "its later half", "against keys off", "first text, lost", "keys moved by"]
    return markdown_table(header, lines)


# -- cost --------------------------------------------------------------------------------------------------------------


def cost(rounds: int) -> str:
    """Consolidation against the forward pass it follows, in this process: 4 layers, top-2, 2,048 tokens."""
    tune_malloc()
    lines = []
    for hidden, experts in ((256, 8), (256, 64), (256, 256), (512, 64), (1024, 64)):
        backbone = MixtralConfig(
            vocab_size=1024, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8, num_local_experts=experts, num_experts_per_tok=2, max_position_embeddings=256,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LivingMoeForCausalLM(LivingMoeConfig.from_backbone(backbone, preset="grow")).eval()
        model.set_experts_implementation("grouped_mm")
        ids = torch.randint(1024, (8, 256))
        passes, moves = [], []
        with model.plastic(alpha=1e-3, beta=1e-4), torch.no_grad():
            consolidate = model.model.consolidate_keys
            for _ in range(rounds + 1):
                model.model.consolidate_keys = lambda: None
                started = time.perf_counter()
                model(input_ids=ids)
                read = time.perf_counter()
                consolidate()
                passes.append(read - started)
                moves.append(time.perf_counter() - read)
        forward, moved = (statistics.median(times[1:]) * 1e3 for times in (passes, moves))
        lines.append([str(hidden), str(experts), f"{forward:.1f}", f"{moved:.2f}", f"{moved / forward:.2%}"])
    header = ["hidden", "experts", "forward ms", "consolidation ms", "ratio"]
    return f"## cost\n\n{machine()}, medians of {rounds} rounds.\n\n{markdown_table(header, lines)}"


# -- command line ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=("reservoir", "shift", "cost"))
    parser.add_argument("--first", help="text file; default: Python's documentation")
    parser.add_argument("--second", help="text file; default: Python's source code")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of 16 x 128 tokens")
    parser.add_argument("--experts", type=int, default=128, help="reservoir: experts per layer")
    parser.add_argument("--intermediate", type=int, default=384, help="reservoir: width of an expert")
    parser.add_argument("--blocks", type=int, default=512, help="shift: blocks of 128 tokens to read")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/some.md")
    options = parser.parse_args()
    path = RESULTS / "some.jsonl"
    common = {"first": options.first, "second": options.second, "steps": options.steps}
    parts = []
    for experiment in options.experiments:
        if experiment == "cost":
            torch.set_num_threads(1)
            parts.append(cost(rounds=15))
            print(parts[-1], flush=True)
            continue
        arms: Iterable[str]
        if experiment == "reservoir":
            arms, function, table = RESERVOIR, reservoir, reservoir_table
            own = {"experts": options.experts, "intermediate": options.intermediate}
        else:
            arms, function, table = SHIFT, shift, shift_table
            own = {"blocks": options.blocks}
        cells = [
            {"experiment": experiment, "arm": arm, "seed": seed, **common, **own}
            for seed in options.seeds
            for arm in arms
            if options.arms is None or arm in options.arms
        ]
        rows = run_cells(cells, function, path, workers=options.workers)
        names = f"{text_name(options.first)}, {text_name(options.second)}"
        what = f"Texts: {names}. {options.steps} steps of {BATCH} x {BLOCK} tokens"
        parts.append(section(experiment, what, options.seeds, table(rows)))
        print(parts[-1], flush=True)
    if options.save:
        (RESULTS / "some.md").write_text("# SOME\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
