"""What synapses cost: a training step of a small Mixtral with synapses of routers, of attention, or postsynaptic,
beside the same without.

    python benchmarks/synapse.py [--experts 64] [--tokens 512] [--chunks 32 48 64] [--attention-chunks 16 32 64]
        [--rounds 7] [--save]

All arms are in one process and take turns; a figure is the median over rounds of the ratio to the arm without synapses
in the same round. A step is forward, loss, backward, `LivingAdamW` step, `lifecycle_step` (no events) and zero_grad,
one thread, fp32, hidden 256, intermediate 512, top-2, two layers, 4 heads, 4 texts, vocabulary 1,024. Time is the
process's own (CPU), so that neighbours do not count. The ratio of the fast path to the reference is that of one
router's synapses alone, and of one layer's attention function, forward and backward.
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
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=tokens,
    )
    config = LivingMoeConfig(backbone_config=backbone, lifecycle={"enabled": False}, synapse=synapse)
    return LivingMoeForCausalLM(config).train()


def of_router(chunk: int) -> dict[str, Any]:
    return {"router": True, "chunk": chunk, "strength": 1.0}


def of_attention(chunk: int) -> dict[str, Any]:
    return {"attention": True, "attention_chunk": chunk, "strength": 1.0}


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


def training_steps(experts: int, tokens: int, arms: dict[str, dict[str, Any]], rounds: int) -> list[list[str]]:
    """Per arm: name, milliseconds of a step, and its ratio to the step without synapses."""
    ids = torch.randint(VOCABULARY, (TEXTS, tokens), generator=torch.Generator().manual_seed(1))
    steps = {name: stepper(build(experts, tokens, synapse), ids) for name, synapse in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, step in steps.items():
            taken = seconds(step)
            if number:  # the first round warms up
                times[name].append(taken)
    rows = []
    for name, own in times.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(own, times[PLAIN], strict=True))
        verdict = "" if "router" not in arms[name] else "yes" if ratio - 1 <= BAR else "no"
        rows.append([name, f"{1e3 * statistics.median(own):.0f}", f"{ratio - 1:+.1%}", verdict])
    return rows


def router_alone(experts: int, tokens: int, chunk: int) -> Callable[[], None]:
    """One router's synapses on random scores, forward and backward."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(TEXTS * tokens, experts, generator=generator).requires_grad_()
    block = build(experts, tokens, of_router(chunk)).living_blocks[0]
    synapse = block.router.synapse
    assert synapse is not None

    def run() -> None:
        passage = Passage(read_texts((TEXTS, tokens), chunk, scores.device))
        synapse(scores, block.population, lambda view: None, passage=passage).sum().backward()

    return run


def attention_alone(experts: int, tokens: int, chunk: int) -> Callable[[], None]:
    """One layer's attention function, after its projections, on random queries, forward and backward; 0 is sdpa."""
    generator = torch.Generator().manual_seed(2)
    size = (TEXTS, HEADS, tokens, HIDDEN // HEADS)
    query, key, value = (torch.randn(size, generator=generator).requires_grad_() for _ in range(3))
    layer: Any = attention_layers(build(experts, tokens, of_attention(chunk or 1)))[0]
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
    arms: dict[str, dict[str, Any]] = {PLAIN: {}}
    arms |= {f"router, chunks of {chunk}": of_router(chunk) for chunk in options.chunks}
    arms |= {f"attention, chunks of {chunk}": of_attention(chunk) for chunk in options.attention_chunks}
    arms["postsynaptic"] = {"postsynaptic": True}
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
