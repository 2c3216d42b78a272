"""What synapses cost: a training step of a small Mixtral with synapses, router or postsynaptic, beside one without.

    python benchmarks/synapse.py [--experts 64] [--tokens 512] [--chunks 32 48 64] [--rounds 7] [--save]

All arms are in one process and take turns; a figure is the median over rounds of the ratio to the arm without synapses
in the same round. A step is forward, loss, backward, `LivingAdamW` step, `lifecycle_step` (no events) and zero_grad,
one thread, fp32, hidden 256, intermediate 512, top-2, two layers, 4 texts, vocabulary 1,024. Time is the process's own
(CPU), so that neighbours do not count. The ratio of the fast path to the reference is that of one router's synapses
alone, forward and backward.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import machine, markdown_table
from torch import Tensor
from transformers import MixtralConfig

from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.modeling_living_moe.synapse.router import Passage
from living_moe.modeling_living_moe.synapse.texts import read_texts
from living_moe.training.malloc import tune_malloc
from living_moe.training.optimizers import LivingAdamW

VOCABULARY, TEXTS, HIDDEN, INTERMEDIATE, TOP_K, LAYERS = 1024, 4, 256, 512, 2, 2
#: What a router's fast path may add to a training step.
BAR = 0.15
PLAIN = "without synapses"
RESULTS = Path(__file__).parent / "results" / "synapse.md"


def build(experts: int, tokens: int, synapse: dict[str, Any]) -> LivingMoeForCausalLM:
    torch.manual_seed(0)
    backbone = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=tokens,
    )
    config = LivingMoeConfig(backbone_config=backbone, lifecycle={"enabled": False}, synapse=synapse)
    return LivingMoeForCausalLM(config).train()


def of_router(chunk: int) -> dict[str, Any]:
    return {"router": True, "chunk": chunk, "strength": 1.0}


def stepper(model: LivingMoeForCausalLM, ids: Tensor) -> Callable[[], None]:
    optimizer = LivingAdamW(model, lr=1e-6)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None]) -> float:
    gc.collect()
    started = time.process_time()
    step()
    return time.process_time() - started


def training_steps(experts: int, tokens: int, chunks: list[int], rounds: int) -> list[list[str]]:
    """Per arm: name, milliseconds of a step, and its ratio to the step without synapses."""
    ids = torch.randint(VOCABULARY, (TEXTS, tokens), generator=torch.Generator().manual_seed(1))
    arms: dict[str, dict[str, Any]] = {PLAIN: {}}
    arms |= {f"router, chunks of {chunk}": of_router(chunk) for chunk in chunks}
    arms["postsynaptic"] = {"postsynaptic": True}
    steps = {name: stepper(build(experts, tokens, synapse), ids) for name, synapse in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, step in steps.items():
            taken = seconds(step)
            if number:  # the first round warms up
                times[name].append(taken)
    rows = []
    for name, taken in times.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(taken, times[PLAIN], strict=True))
        verdict = "" if "router" not in arms[name] else "yes" if ratio - 1 <= BAR else "no"
        rows.append([name, f"{1e3 * statistics.median(taken):.0f}", f"{ratio - 1:+.1%}", verdict])
    return rows


def synapses_alone(experts: int, tokens: int, chunks: list[int], rounds: int) -> list[list[str]]:
    """Per chunk size: milliseconds of one router's synapses, forward and backward, and the reference's multiple."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(TEXTS * tokens, experts, generator=generator).requires_grad_()
    arms = {}
    for chunk in (1, *chunks):
        block = build(experts, tokens, of_router(chunk)).living_blocks[0]

        def run(block: torch.nn.Module = block, chunk: int = chunk) -> None:
            passage = Passage(read_texts((TEXTS, tokens), chunk, scores.device))
            block.router.synapse(scores, block.population, lambda view: None, passage=passage).sum().backward()

        arms[chunk] = run
    times = {chunk: statistics.median([seconds(run) for _ in range(rounds)]) for chunk, run in arms.items()}
    names = {1: "step size 1 (reference)"}
    return [
        [names.get(chunk, f"chunks of {chunk}"), f"{1e3 * taken:.1f}", f"{times[1] / taken:.1f}"]
        for chunk, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/synapse.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tune_malloc()
    shape = (options.experts, options.tokens, options.chunks)
    steps = markdown_table(
        ["synapses", "ms per step", "added", f"at most {BAR:.0%}"], training_steps(*shape, options.rounds)
    )
    alone = markdown_table(
        ["one router's synapses", "ms forward and backward", "times faster than the reference"],
        synapses_alone(*shape, max(3, options.rounds // 2)),
    )
    what = f"{options.experts} experts, {TEXTS} x {options.tokens} tokens, median of {options.rounds} rounds"
    report = f"# Synapses: cost\n\n{what}, CPU time. {machine()}.\n\n{steps}\n\n{alone}\n"
    print(report)
    if options.save:
        RESULTS.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
