"""What synapses cost: a training step of a small Mixtral with synapses of routers, or of attention, beside the same
without.

    python benchmarks/synapse.py [--experts 64] [--tokens 512] [--chunks 32 48 64] [--attention-chunks 16 32 64]
        [--rounds 7] [--save]

All arms are in one process and take turns; a figure is the median over rounds of the ratio to the arm without synapses
in the same round. A step is forward, loss, backward, `LivingAdamW` step and zero_grad, one thread, fp32, hidden 256,
intermediate 512, top-2, two layers, 4 heads, 4 texts, vocabulary 1,024. Time is the process's own (CPU), so that
neighbours do not count. The ratio of the fast path to the reference is that of one router's synapses alone, and of one
layer's attention function, forward and backward.
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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.modeling_living_moe.synapse.attention import attention_layers
from living_moe.modeling_living_moe.synapse.router import Passage
from living_moe.modeling_living_moe.synapse.texts import read_texts
from living_moe.training.malloc import tune_malloc
from living_moe.training.optimizers import LivingAdamW

VOCABULARY, TEXTS, HIDDEN, INTERMEDIATE, TOP_K, LAYERS, HEADS = 1024, 4, 256, 512, 2, 2, 4
#: What the fast path of routers may add to a training step.
BAR = 0.15
RESULTS = Path(__file__).parent / "results" / "synapse.md"


#: Which edges have synapses, and their chunk.
Arm = tuple[str, int]
WITHOUT: Arm = ("", 0)


def build(experts: int, tokens: int, arm: Arm) -> LivingMoeForCausalLM:
    torch.manual_seed(0)
    backbone = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=tokens,
    )
    edges, chunk = arm
    name = {"router": "chunk", "attention": "attention_chunk"}.get(edges, "chunk")
    synapse = {edges: True, name: chunk, "strength": 1.0} if edges else {}
    config = LivingMoeConfig(backbone_config=backbone, lifecycle={"enabled": False}, synapse=synapse)
    return LivingMoeForCausalLM(config).train()


def stepper(model: LivingMoeForCausalLM, ids: Tensor) -> Callable[[], None]:
    optimizer = LivingAdamW(model, lr=1e-6)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None]) -> float:
    gc.collect()
    started = time.process_time()
    step()
    return time.process_time() - started


def training_steps(experts: int, tokens: int, arms: list[Arm], rounds: int) -> list[list[str]]:
    """Per arm: name, milliseconds of a step, and its ratio to the step without synapses."""
    ids = torch.randint(VOCABULARY, (TEXTS, tokens), generator=torch.Generator().manual_seed(1))
    steps = {arm: stepper(build(experts, tokens, arm), ids) for arm in (WITHOUT, *arms)}
    times: dict[Arm, list[float]] = {arm: [] for arm in steps}
    for number in range(rounds + 1):
        for arm, step in steps.items():
            taken = seconds(step)
            if number:  # the first round warms up
                times[arm].append(taken)
    rows = []
    for arm, taken in times.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(taken, times[WITHOUT], strict=True))
        name = "without synapses" if arm == WITHOUT else f"{arm[0]}, chunks of {arm[1]}"
        verdict = "" if arm[0] != "router" else "yes" if ratio - 1 <= BAR else "no"
        rows.append([name, f"{1e3 * statistics.median(taken):.0f}", f"{ratio - 1:+.1%}", verdict])
    return rows


def router_alone(experts: int, tokens: int, chunk: int) -> Callable[[], None]:
    """One router's synapses on random scores, forward and backward."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(TEXTS * tokens, experts, generator=generator).requires_grad_()
    block = build(experts, tokens, ("router", chunk)).living_blocks[0]

    def run() -> None:
        passage = Passage(read_texts((TEXTS, tokens), chunk, scores.device))
        block.router.synapse(scores, block.population, lambda view: None, passage=passage).sum().backward()

    return run


def attention_alone(experts: int, tokens: int, chunk: int) -> Callable[[], None]:
    """One layer's attention function, after its projections, on random queries, forward and backward; 0 is sdpa."""
    generator = torch.Generator().manual_seed(2)
    size = (TEXTS, HEADS, tokens, HIDDEN // HEADS)
    query, key, value = (torch.randn(size, generator=generator).requires_grad_() for _ in range(3))
    layer: Any = attention_layers(build(experts, tokens, ("attention", chunk or 1)))[0]
    name = "synaptic" if chunk else "sdpa"

    def run() -> None:
        found, _ = ALL_ATTENTION_FUNCTIONS[name](layer, query, key, value, None, scaling=layer.scaling)
        found.sum().backward()

    return run


def synapses_alone(arms: dict[str, Callable[[], None]], reference: str, rounds: int) -> list[list[str]]:
    """Per arm: its name, its milliseconds, and the reference's multiple of them."""
    times = {name: statistics.median([seconds(run) for _ in range(rounds)]) for name, run in arms.items()}
    return [[name, f"{1e3 * taken:.1f}", f"{times[reference] / taken:.1f}"] for name, taken in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--attention-chunks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/synapse.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tune_malloc()
    shape = (options.experts, options.tokens)
    arms = [("router", chunk) for chunk in options.chunks] + [("attention", c) for c in options.attention_chunks]
    steps = markdown_table(
        ["synapses", "ms per step", "added", f"router: at most {BAR:.0%}"], training_steps(*shape, arms, options.rounds)
    )
    reference, rounds = "step size 1 (reference)", max(3, options.rounds // 2)
    routers = {reference: router_alone(*shape, 1)}
    routers |= {f"chunks of {chunk}": router_alone(*shape, chunk) for chunk in options.chunks}
    layers = {"sdpa, without synapses": attention_alone(*shape, 0), reference: attention_alone(*shape, 1)}
    layers |= {f"chunks of {chunk}": attention_alone(*shape, chunk) for chunk in options.attention_chunks}
    alone = "\n\n".join(
        markdown_table([what, "ms forward and backward", "times faster than the reference"], rows)
        for what, rows in (
            ("one router's synapses", synapses_alone(routers, reference, rounds)),
            ("one layer's synaptic attention", synapses_alone(layers, reference, rounds)),
        )
    )
    what = f"{options.experts} experts, {TEXTS} x {options.tokens} tokens, median of {options.rounds} rounds"
    report = f"# Synapses: cost\n\n{what}, CPU time. {machine()}.\n\n{steps}\n\n{alone}\n"
    print(report)
    if options.save:
        RESULTS.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
