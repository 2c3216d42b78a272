"""Tokens per second of a whole training step: a living Mixtral against the stock one it was grafted from.

    python benchmarks/throughput.py [--experts 8 64 256 1024:64] [--layers 4] [--steps 15] [--threads 1] [--save]

Both sides start from the same weights, see the same batches, run in one process and take turns, with the same malloc
settings; one round is a step of each, and the ratio is the median over rounds. A step is forward, loss, backward,
optimizer step and zero_grad; the living side also counts vitals and lives its lifecycle step, with the population's
size pinned so that both sides keep computing the same thing. Stock: `MixtralForCausalLM`, grouped_mm, fused AdamW.
Living: preset "grow", `LivingAdamW`, the quicker of "active" experts (with direct gradients) and grouped_mm. Hidden
256, intermediate 512, top-2, 8 x 256 tokens, fp32, vocabulary 1,024.

Routing is the routers' own, and uniform because the keys were made so before timing: token embeddings of unit variance
(tokens differ, as in a trained model), and keys trained layer by layer with nothing but the load-balancing loss.
`1024:64` is 1,024 experts of which 64 receive tokens: 64 such keys in random slots, the other keys zero, so that they
never reach the top 2. The learning rate is too small to change any of this within a run; the loads seen after the
last step are printed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import processor
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import living_moe
from living_moe.training.malloc import tune_malloc
from living_moe.training.optimizers import LivingAdamW

VOCABULARY, BATCH, SEQUENCE, HIDDEN, INTERMEDIATE, TOP_K = 1024, 8, 256, 256, 512, 2
TOKENS = BATCH * SEQUENCE
LEARNING_RATE = 1e-6
#: Parameter, gradient, two moments: bytes of one expert on one side.
EXPERT_BYTES = 4 * 4 * 3 * HIDDEN * INTERMEDIATE
RESULTS = Path(__file__).parent / "results"
IMPLEMENTATIONS = ("active", "grouped_mm")
TRIAL_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    experts: int
    active: int
    layers: int

    @classmethod
    def parse(cls, text: str, layers: int, memory_gib: float) -> Case:
        experts, _, active = text.partition(":")
        fitting = int(memory_gib * 2**30 // (2 * int(experts) * EXPERT_BYTES))
        return cls(int(experts), int(active or experts), max(1, min(layers, fitting)))


@dataclass(frozen=True)
class Result:
    case: Case
    stock_seconds: float
    living_seconds: float
    ratio: float
    loads: str
    implementation: str


# -- routing -----------------------------------------------------------------------------------------------------------


@contextmanager
def first_inputs(modules: list[nn.Module], position: int) -> Iterator[list[Tensor]]:
    """Collects the positional argument `position` of every call of `modules`, in order."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[position])) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balanced_keys(x_TH: Tensor, experts: int, steps: int = 100) -> Tensor:
    """Keys (E, H) that spread tokens like `x_TH` evenly: random ones, trained with the load-balancing loss alone."""
    keys_EH = torch.randn(experts, HIDDEN)
    keys_EH = (keys_EH * (2.0 / (x_TH[:TOKENS] @ keys_EH.T).std())).requires_grad_()
    optimizer = torch.optim.Adam([keys_EH], lr=0.05 * keys_EH.detach().std().item())
    for _ in range(steps):
        logits_TE = x_TH[torch.randint(len(x_TH), (TOKENS,))] @ keys_EH.T
        share_E = torch.bincount(logits_TE.topk(TOP_K)[1].flatten(), minlength=experts) / TOKENS
        loss = experts * (share_E * logits_TE.softmax(-1).mean(0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return keys_EH.detach()


@torch.no_grad()
def balance(model: MixtralForCausalLM, active: int) -> None:
    """Give every layer keys that send tokens evenly to `active` experts in random slots. Layer by layer: each layer's
    inputs depend on the routing below."""
    batches = torch.randint(VOCABULARY, (8, BATCH, SEQUENCE))
    for layer in model.model.layers:
        with first_inputs([layer.mlp.gate], 0) as seen:
            for batch in batches:
                model.model(batch)
        with torch.enable_grad():
            keys_EH = balanced_keys(torch.cat([x.reshape(-1, HIDDEN) for x in seen]), active)
        weight = layer.mlp.gate.weight
        weight.zero_()
        weight[torch.randperm(len(weight))[:active]] = keys_EH


@torch.no_grad()
def loads(model: nn.Module, experts: list[nn.Module], batch: Tensor) -> tuple[list[int], float]:
    """Experts that receive tokens of `batch` per layer, and the busiest expert's load over their mean."""
    with first_inputs(experts, 1) as seen:
        model(batch)
    counts = [torch.bincount(index.flatten()) for index in seen]
    return [int((count > 0).sum()) for count in counts], max(
        float(count.max() / count[count > 0].float().mean()) for count in counts
    )


# -- the two sides -----------------------------------------------------------------------------------------------------


def stock_model(case: Case) -> MixtralForCausalLM:
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=case.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=case.experts,
            num_experts_per_tok=TOP_K,
            max_position_embeddings=SEQUENCE,
        )
    )
    model.set_experts_implementation("grouped_mm")
    nn.init.normal_(model.model.embed_tokens.weight)
    balance(model, case.active)
    return model


def living_model(stock: MixtralForCausalLM, case: Case, implementation: str) -> Any:
    # A decision at every tenth step, and no room for an event: events would make the two sides differ.
    lifecycle = {"warmup_steps": 0, "min_experts": case.experts, "max_experts": case.experts}
    model = living_moe.convert(stock, preset="grow", lifecycle=lifecycle)
    model.set_experts_implementation(implementation)
    return model.train()


def stock_step(model: MixtralForCausalLM, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(batch: Tensor) -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def living_step(model: Any, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(batch: Tensor) -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()

    return step


def measure(case: Case, steps: int, seed: int, implementation: str, clock: Callable[[], float]) -> Result:
    torch.manual_seed(seed)
    stock = stock_model(case).train()
    living = living_model(stock, case, implementation)
    sides = [
        stock_step(stock, torch.optim.AdamW(stock.parameters(), lr=LEARNING_RATE, fused=True)),
        living_step(living, LivingAdamW(living, lr=LEARNING_RATE, direct_gradients=implementation == "active")),
    ]
    seconds: list[list[float]] = [[], []]
    warm_up = 3
    for round_number in range(warm_up + steps):
        batch = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
        # The side that goes first alternates: it finds the caches and the other core as the second left them.
        for side in (0, 1) if round_number % 2 else (1, 0):
            start = clock()
            sides[side](batch)
            if round_number >= warm_up:
                seconds[side].append(clock() - start)
    assert living.expert_counts == [case.experts] * case.layers, "an event changed the population"

    batch = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    stock_loads = loads(stock, [layer.mlp.experts for layer in stock.model.layers], batch)
    living_loads = loads(living, [block.experts for block in living.living_blocks], batch)
    active, busiest = living_loads
    for ours, theirs in zip(active, stock_loads[0], strict=True):
        assert abs(ours - theirs) <= 0.02 * case.active, f"the sides route differently: {ours} and {theirs} experts"
    return Result(
        case,
        statistics.median(seconds[0]),
        statistics.median(seconds[1]),
        statistics.median(theirs / ours for theirs, ours in zip(*seconds, strict=True)),
        f"{min(active)}..{max(active)}, {busiest:.1f} x",
        implementation,
    )


# -- report ------------------------------------------------------------------------------------------------------------


def machine() -> str:
    return f"{processor()}, torch {torch.__version__}, threads {torch.get_num_threads()}"


def table(results: list[Result]) -> str:
    lines = [
        "| experts | with tokens | layers | active, busiest / mean | living kernel | stock tokens/s | living tokens/s "
        "| ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        stock, living = TOKENS / result.stock_seconds, TOKENS / result.living_seconds
        lines.append(
            f"| {result.case.experts:,} | {result.case.active:,} | {result.case.layers} | {result.loads} | "
            f"{result.implementation} | {stock:,.0f} | {living:,.0f} | {result.ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experts", nargs="+", default=["8", "64", "256", "1024:64"], help="experts, or experts:those that get tokens"
    )
    parser.add_argument("--layers", type=int, default=4, help="fewer are used where memory does not suffice")
    parser.add_argument("--steps", type=int, default=15, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=14.0, help="GiB for the experts of both sides, state included")
    parser.add_argument(
        "--implementation",
        choices=["best", *IMPLEMENTATIONS],
        default="best",
        help="experts implementation of the living side; best: the quicker one in a short trial before",
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of this process; steadier where others use the machine, the same where they do not "
        "(with one thread)",
    )
    parser.add_argument("--save", action="store_true", help=f"also write the table to {RESULTS.name}/throughput.md")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    tuned = tune_malloc()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    results = []
    for text in options.experts:
        case = Case.parse(text, options.layers, options.memory)
        implementation = options.implementation
        if implementation == "best":
            trials = {name: measure(case, TRIAL_ROUNDS, options.seed, name, clock).ratio for name in IMPLEMENTATIONS}
            implementation = max(trials, key=lambda name: trials[name])
        results.append(measure(case, options.steps, options.seed, implementation, clock))
        print(table(results[-1:]), flush=True)
        gc.collect()
    settings = (
        f"{machine()}, {'tuned' if tuned else 'default'} malloc on both sides, "
        f"{options.clock} clock, median of {options.steps} rounds, seed {options.seed}"
    )
    report = f"{table(results)}\n\n{settings}\n"
    print(f"\n{report}")
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "throughput.md").write_text(f"# Whole training step, living against stock Mixtral\n\n{report}")


if __name__ == "__main__":
    main()
