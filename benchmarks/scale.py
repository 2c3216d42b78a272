"""What a population of 1,400 experts costs: the parts of a step, a run that grows there, and the lifecycle itself.

    python benchmarks/scale.py [steps] [growth] [overhead] [--rounds 15] [--experts 1400] [--save]

**steps**: a living Mixtral of 8 experts against one of 1,400 of which 64 receive tokens, equal in everything else; both
in one process, taking turns. *parted*: 1,400 clades, so every token is compared with every key; 64 keys in random slots
were trained to share the tokens, the others are zero. *grown*: 8 clades as splits leave them, 175 members each, so
every token walks 8 trees of facets; three levels of facets at the medians of what reaches them give each clade eight
members with tokens, the others were born behind facets that no token crosses. Forward (with loss), backward, clipping
as `LivingTrainer` does it, `LivingAdamW`, lifecycle step and zero_grad are timed apart; a ratio is that of the sums,
the median over rounds. "active" experts with direct gradients, top-2, fp32, 2,048 tokens a step, vocabulary 1,024.

**growth**: a run from 8 experts to 1,408 by the policy `load`, on random text of a skewed distribution. Printed: steps
and CPU seconds, splits, slab growths, the time of an event at the end, peak memory; and of every newborn whether its
weights moved once it received tokens. One that received none must still be what its parent was at its birth.

**overhead**: a model of each of two presets, steps with its lifecycle (a decision at every tenth, room for no event) in
turns with steps without: no lifecycle step, no signals, no readings of gradients. Tokens are counted in both: the
optimizer asks who had any.

Times are of the processor (one thread), so that others on the machine disturb them little; milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import machine, markdown_table
from throughput import first_inputs
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.active_experts import gradient_norm, scale_gradients
from living_moe.modeling_living_moe.lifecycle.api import iter_events
from living_moe.modeling_living_moe.population import Leaf, split_leaves
from living_moe.training.malloc import tune_malloc
from living_moe.training.optimizers import LivingAdamW

RESULTS = Path(__file__).parent / "results"
VOCABULARY, BATCH, SEQUENCE, TOP_K = 1024, 8, 256, 2
TOKENS = BATCH * SEQUENCE
FEW, ACTIVE = 8, 64
#: Small enough that no step changes who is served by whom.
LEARNING_RATE = 1e-6
PARTS = ("forward", "backward", "clip", "optimizer", "lifecycle", "zero_grad")


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int

    def __str__(self) -> str:
        return f"H {self.hidden}, I {self.intermediate}, {self.layers} layers".replace(", 1 layers", ", 1 layer")


SHAPES = (Shape(128, 256, 4), Shape(256, 512, 1))


# -- models ------------------------------------------------------------------------------------------------------------


def living(
    shape: Shape, experts: int, lifecycle: dict[str, Any], preset: str = "grow", **vitals: Any
) -> LivingMoeForCausalLM:
    stock = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=experts,
            num_experts_per_tok=TOP_K,
            max_position_embeddings=SEQUENCE,
        )
    )
    nn.init.normal_(stock.model.embed_tokens.weight)
    model = living_moe.convert(stock, preset=preset, verify=False, lifecycle=lifecycle, vitals=vitals)
    model.set_experts_implementation("active")
    return model.train()


def calm(experts: int) -> dict[str, Any]:
    """A decision at every tenth step, and no room for an event."""
    return {"warmup_steps": 0, "min_experts": experts, "max_experts": experts}


def sharing_keys(x_TH: Tensor, count: int, steps: int = 60) -> Tensor:
    """Keys (count, H) that share tokens like `x_TH` evenly: random ones, trained with the load-balancing loss alone."""
    keys_EH = torch.randn(count, x_TH.shape[1])
    keys_EH = (keys_EH * (2.0 / (x_TH[:TOKENS] @ keys_EH.T).std())).requires_grad_()
    optimizer = torch.optim.Adam([keys_EH], lr=0.05 * keys_EH.detach().std().item())
    for _ in range(steps):
        logits_TE = x_TH[torch.randint(len(x_TH), (TOKENS,))] @ keys_EH.T
        share_E = torch.bincount(logits_TE.topk(TOP_K)[1].flatten(), minlength=count) / TOKENS
        loss = count * (share_E * logits_TE.softmax(-1).mean(0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return keys_EH.detach()


@torch.no_grad()
def lay_out(model: LivingMoeForCausalLM, kind: str) -> None:
    """Make every layer serve tokens as `kind` says, layer by layer: each one's inputs depend on the routing below."""
    batches = torch.randint(VOCABULARY, (4, BATCH, SEQUENCE))
    model.eval()
    for block in model.living_blocks:
        with first_inputs([block.router], 0) as seen:
            for batch in batches:
                model(batch)
        x_TH = torch.cat(seen)
        keys_EH = block.router.keys["trainable"]
        with torch.enable_grad():
            sharing = sharing_keys(x_TH, ACTIVE if kind == "parted" else FEW)
        if kind == "parted":
            keys_EH.zero_()
            keys_EH[torch.randperm(len(keys_EH))[:ACTIVE]] = sharing
        else:
            keys_EH.copy_(sharing[torch.arange(len(keys_EH)) % FEW])
            if kind == "grown":
                into_clades(block, x_TH)
    model.train()


def into_clades(block: Any, x_TH: Tensor) -> None:
    """Divide the experts into 8 clades, as splits would: expert i of clade i modulo 8, born of a random member."""
    population, rng = block.population, random.Random(0)
    uids = population.uids
    clades = [uids[first::FEW] for first in range(FEW)]
    leaves: list[Leaf] = []
    normals: list[Tensor] = []
    offsets: list[float] = []
    for clade in clades:
        alive = clade[:1]
        for number, newborn in enumerate(clade[1:], start=1):
            busy = number < ACTIVE // FEW
            # The first ones halve what all have, level by level; the others take nothing of a random member's.
            parent = alive[number - (1 << number.bit_length() - 1)] if busy else rng.choice(alive)
            normal_H = torch.nn.functional.normalize(torch.randn(x_TH.shape[1]), dim=0)
            offset = -1e4
            if busy:
                inside_T = torch.ones(len(x_TH), dtype=torch.bool)
                for facet, side in next((leaf.path for leaf in leaves if leaf.uid == parent), ()):
                    inside_T &= (x_TH @ normals[facet] + offsets[facet] >= 0) == (side > 0)
                offset = -float((x_TH[inside_T] @ normal_H).median())
            normals.append(normal_H)
            offsets.append(offset)
            leaves = split_leaves(leaves, parent, newborn, len(normals) - 1)
            alive.append(newborn)
    table = population.table("trainable")
    table.clade.copy_(table.uid % FEW)
    population.write_leaves(leaves, normals, offsets)


# -- steps -------------------------------------------------------------------------------------------------------------


def timed_step(model: LivingMoeForCausalLM, optimizer: LivingAdamW, batch: Tensor) -> list[float]:
    """CPU seconds of the parts of one step."""
    parameters = list(model.parameters())
    marks = [time.process_time()]
    loss = model(batch, labels=batch, use_cache=False).loss
    marks.append(time.process_time())
    loss.backward()
    marks.append(time.process_time())
    scale_gradients(parameters, min(1.0, 1.0 / float(gradient_norm(parameters))))
    marks.append(time.process_time())
    optimizer.step()
    marks.append(time.process_time())
    model.lifecycle_step(optimizer)
    marks.append(time.process_time())
    optimizer.zero_grad()
    marks.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(marks)]


@torch.no_grad()
def with_tokens(model: LivingMoeForCausalLM, batch: Tensor) -> list[int]:
    """Experts of each layer that receive tokens of a batch."""
    with first_inputs([block.experts for block in model.living_blocks], 1) as seen:
        model(batch)
    return [len(index.unique()) for index in seen]


def compare(shape: Shape, experts: int, kind: str, rounds: int) -> list[list[str]]:
    """Rows of the table: the parts of a step of 8 experts and of many."""
    torch.manual_seed(0)
    sides = []
    for count in (FEW, experts):
        model = living(shape, count, calm(count))
        lay_out(model, kind if count == experts else "few")
        sides.append((model, LivingAdamW(model, lr=LEARNING_RATE, direct_gradients=True)))
    seconds: list[list[list[float]]] = [[], []]
    for number in range(rounds + 3):
        batch = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
        for side in (0, 1) if number % 2 else (1, 0):
            parts = timed_step(*sides[side], batch)
            if number >= 3:
                seconds[side].append(parts)
    assert [model.expert_counts[0] for model, _ in sides] == [FEW, experts], "an event changed the population"
    served = with_tokens(sides[1][0], torch.randint(VOCABULARY, (BATCH, SEQUENCE)))
    rows = []
    for place, part in enumerate(PARTS):
        few, many = (statistics.median(step[place] for step in side) for side in seconds)
        rows.append(["", "", part, f"{1e3 * few:.1f}", f"{1e3 * many:.1f}", ""])
    few, many = (statistics.median(map(sum, side)) for side in seconds)
    ratio = statistics.median(sum(two) / sum(one) for one, two in zip(*seconds, strict=True))
    name = [f"{kind}, {shape}", f"{min(served)}..{max(served)}"]
    return [*rows, [*name, "**step**", f"{1e3 * few:.1f}", f"{1e3 * many:.1f}", f"**{ratio:.2f}**"]]


def steps_report(experts: int, rounds: int, shapes: Sequence[Shape]) -> str:
    rows: list[list[str]] = []
    for shape in shapes:
        for kind in ("parted", "grown"):
            rows += compare(shape, experts, kind, rounds)
            print(markdown_table(HEADER, rows[-len(PARTS) - 1 :]), flush=True)
            gc.collect()
    return (
        f"## Steps\n\n{machine()}, medians of {rounds} rounds, ms of processor time.\n\n{markdown_table(HEADER, rows)}"
    )


HEADER = ("population", "with tokens", "part", "8 experts", "many", "ratio")


# -- growth ------------------------------------------------------------------------------------------------------------

GROWN = Shape(64, 64, 1)


def skewed_batch() -> Tensor:
    weights = torch.arange(1, VOCABULARY + 1, dtype=torch.float32).pow(-0.5)
    return torch.multinomial(weights, TOKENS, replacement=True).view(BATCH, SEQUENCE)


def weights_of(model: LivingMoeForCausalLM, uid: int) -> Tensor:
    block = model.living_blocks[0]
    member = block.population.find(uid, 0)
    slab = block.experts.weights(member.slab)
    return torch.cat([slab.gate_up_proj[member.row].flatten(), slab.down_proj[member.row].flatten()]).detach().clone()


def grow(most: int, after: int = 60, per_step: int = 32) -> list[tuple[str, str]]:
    """Train while the population grows to `most` experts, and `after` steps longer; what there is to say of it."""
    torch.manual_seed(0)
    # Everybody above the uniform share of all there will be is overloaded; nobody starves, nobody rests.
    lifecycle = dict(
        interval=1, warmup_steps=1, cooldown_steps=0, min_age_steps=0, patience=1, death_load=0.0,
        split_load=0.5 * FEW / most, max_events_per_step=per_step, max_experts=most,
    )  # fmt: skip
    model = living(GROWN, FEW, lifecycle)
    lay_out(model, "few")
    optimizer = LivingAdamW(model, lr=1e-3, direct_gradients=True)
    born: dict[int, Tensor] = {}
    growths, splitting, last, steps, left = 0, 0.0, 0.0, 0, after
    start = time.process_time()
    while left:
        loss = model(batch := skewed_batch(), labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        before = time.process_time()
        events = model.lifecycle_step(optimizer)
        spent = time.process_time() - before
        optimizer.zero_grad()
        steps += 1
        newborns = [uid for event in iter_events(events) for uid in event.children]
        if newborns:
            splitting, last = splitting + spent, spent / len(newborns)
        born |= {uid: weights_of(model, uid) for uid in newborns}
        left -= model.expert_counts[0] >= most
    seconds = time.process_time() - start
    growths = sum(event.kind == "grow" for event in model.lineage)
    received = dict(zip(model.expert_uids(0), model.vitals(0)["tokens"].tolist(), strict=True))
    moved = {uid: not torch.equal(weights_of(model, uid), weights) for uid, weights in born.items()}
    idle = [uid for uid in born if not received[uid]]
    assert all(moved[uid] == bool(received[uid]) for uid in born), "a newborn did not train, or moved without tokens"
    trained, still = len(born) - len(idle), len(born) - sum(moved.values())
    return [
        ("experts", f"{FEW} to {model.expert_counts[0]:,}"),
        ("steps, of which after the last split", f"{steps}, {after}"),
        ("CPU seconds, of which in splits", f"{seconds:.0f}, {splitting:.0f}"),
        ("splits, slab growths", f"{len(born):,}, {growths}"),
        ("milliseconds per split, mean and at the end", f"{1e3 * splitting / len(born):.0f}, {1e3 * last:.0f}"),
        ("newborns that received tokens, and whose weights moved", f"{trained:,}, {sum(moved.values()):,}"),
        (
            "newborns that never received one, and are as they were born",
            f"{len(idle):,}, {still:,}",
        ),
        ("longest path of facets", str(model.living_blocks[0].population.view(0, batch.device).trees.depth)),
        ("loss, nats per token", f"{float(loss.detach()):.3f}"),
        ("peak memory of the process", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"),
    ]


def growth_report(most: int) -> str:
    table = markdown_table(("a run that grows", ""), grow(most))
    return f"## Growth\n\nMixtral, {GROWN}, {TOKENS:,} tokens a step. {machine()}.\n\n{table}"


# -- overhead ----------------------------------------------------------------------------------------------------------

OVERHEAD_PRESETS = ("grow", "ouroboros")
OVERHEAD_SHAPES = (Shape(128, 256, 4), Shape(256, 512, 4))


def overhead(shape: Shape, preset: str, rounds: int) -> list[str]:
    """A row: milliseconds of a step with and without its lifecycle, their ratio, in the median and in the mean."""
    torch.manual_seed(0)
    model = living(shape, FEW, calm(FEW), preset)
    lay_out(model, "few")
    optimizer = LivingAdamW(model, lr=LEARNING_RATE, direct_gradients=True)
    vitals = model.config.vitals
    every = vitals.signals_every, vitals.phi_every

    def on(batch: Tensor) -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()

    def off(batch: Tensor) -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    sides: tuple[Callable[[Tensor], None], ...] = (on, off)
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 3):
        batch = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
        for side in (0, 1) if number % 2 else (1, 0):
            vitals.signals_every, vitals.phi_every = (0, 0) if side else every
            start = time.process_time()
            sides[side](batch)
            if number >= 3:
                seconds[side].append(time.process_time() - start)
            if side:
                # What the lifecycle would have folded must not pile up for its next step.
                for block in model.living_blocks:
                    block.vitals.forget()
                model.model.drift.take()
    assert model.expert_counts == [FEW] * shape.layers, "an event changed the population"
    one, other = (statistics.median(side) for side in seconds)
    paired = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    mean = statistics.fmean(seconds[0]) / statistics.fmean(seconds[1])
    return [
        f"{preset}, {shape}",
        f"{1e3 * one:.1f}",
        f"{1e3 * other:.1f}",
        *(f"{100 * (r - 1):+.2f} %" for r in (paired, mean)),
    ]


def overhead_report(rounds: int) -> str:
    header = ("preset, model of 8 experts", "with, ms", "without, ms", "overhead, median of pairs", "of the means")
    table = markdown_table(
        header, [overhead(shape, preset, rounds) for preset in OVERHEAD_PRESETS for shape in OVERHEAD_SHAPES]
    )
    return f"## Overhead of a lifecycle without events\n\n{machine()}, {rounds} pairs of steps.\n\n{table}"


REPORTS = ("steps", "growth", "overhead")


def report(part: str, experts: int, rounds: int, shapes: Sequence[Shape]) -> str:
    torch.set_num_threads(1)
    tune_malloc()
    if part == "steps":
        return steps_report(experts, rounds, shapes)
    return growth_report(experts + 8) if part == "growth" else overhead_report(10 * rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="steps, growth, overhead; all of them if none is named")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; overhead takes ten times as many")
    parser.add_argument("--experts", type=int, default=1400)
    parser.add_argument("--shapes", nargs="+", help="of steps: hidden,intermediate,layers", metavar="H,I,L")
    parser.add_argument("--save", action="store_true", help=f"also write {RESULTS.name}/scale.md")
    options = parser.parse_args()
    if unknown := set(options.what) - set(REPORTS):
        parser.error(f"unknown part {sorted(unknown)}; choose from {list(REPORTS)}")
    shapes = [Shape(*map(int, text.split(","))) for text in options.shapes] if options.shapes else SHAPES
    parts = []
    for name in options.what or REPORTS:
        # Each in a process of its own: peak memory is that of a process.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts.append(pool.submit(report, name, options.experts, options.rounds, shapes).result())
        print(f"\n{parts[-1]}\n", flush=True)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "scale.md").write_text("# A population of 1,400 experts\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
