"""Ternary experts, measured: what quantising costs in loss, what calibration and training win back, bytes and speed.

    python benchmarks/ternary.py [--first FILE] [--seeds 0 1 2] [--steps 240] [--more 80] [--workers 1] [--save]

Per seed a small Mixtral learns the text in floats and is grafted (preset "grow", without events). Then, on held-out
blocks of that text:

- **float**: the graft, and the graft trained on for `--more` steps: the yardstick of what is trained on.
- **absmean**: its weights taken as latents, as BitNet's quantiser rounds them; and trained on as such.
- **fitted to the weights**: `model.ternarize()`, without text.
- **calibrated**: `model.ternarize(ids)` on training text; and trained on.

Bytes are those of the experts' tensors in the checkpoint, speed is wall clock of the first seed's model: reading (one
forward pass of 8 x 128 tokens) and writing (greedy, one text), medians of interleaved rounds. Cells are kept in
benchmarks/results/ternary.jsonl and not run again. Losses in nats per token.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Result, machine, markdown_table, mean_and_deviation, run_cells
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.quickstart import Domain, Sizes, pretrain, read_domains, train
from living_moe.training.evaluation import evaluate_blocks
from living_moe.training.malloc import tune_malloc

RESULTS = Path(__file__).parent / "results"
LEARNING_RATE = 1e-3
ROUNDS = 7
#: Row of the table -> what to do to the float graft, and whether to train it on.
ARMS: dict[str, tuple[str, bool]] = {
    "float": ("float", False),
    "float, trained on": ("float", True),
    "absmean": ("absmean", False),
    "absmean, trained on": ("absmean", True),
    "fitted to the weights": ("weights", False),
    "calibrated": ("calibrated", False),
    "calibrated, trained on": ("calibrated", True),
}


def sizes(steps: int) -> Sizes:
    return Sizes(
        characters=1_000_000, vocabulary=2048, batch=8, layers=2, pretrain_steps=steps, living_lr=LEARNING_RATE,
        eval_blocks=64,
    )  # fmt: skip


@lru_cache(maxsize=1)
def text(first: str | None, steps: int) -> Domain:
    return read_domains(Path(first) if first else None, None, sizes(steps))[1][0]


def grafted(cell: Cell) -> LivingMoeForCausalLM:
    source = pretrain(text(cell["first"], cell["steps"]), sizes(cell["steps"]), cell["seed"], Console(quiet=True))
    model = living_moe.convert(source, preset="grow", lifecycle={"enabled": False})
    model.set_experts_implementation("active")
    return model


def quantised(graft: LivingMoeForCausalLM, how: str, ids: Tensor) -> LivingMoeForCausalLM:
    """A copy of the graft whose experts are ternary in one of the ways, or float."""
    model = copy.deepcopy(graft)
    if how == "absmean":
        model.ternarize()
        model.load_state_dict(graft.state_dict())  # the float weights back, now as latents
    elif how != "float":
        model.ternarize(ids if how == "calibrated" else None)
    return model


def losses(cell: Cell) -> Result:
    """Held-out loss of every arm, of one seed."""
    domain, scale = text(cell["first"], cell["steps"]), sizes(cell["steps"])
    graft = grafted(cell)
    found = {}
    for arm, (how, trained_on) in ARMS.items():
        model = quantised(graft, how, domain.train)
        if trained_on:
            train(model, domain, cell["more"], LEARNING_RATE, scale, cell["seed"] + 1, arm, Console(quiet=True))
        found[arm] = evaluate_blocks(model, domain.held_out, max_blocks=scale.eval_blocks).loss
    return found


def bytes_on_disk(model: LivingMoeForCausalLM) -> int:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tensors = load_file(Path(directory) / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)


def bytes_and_speed(cell: Cell) -> str:
    """The second table: of a float model, its ternary latents, and packed."""
    domain = text(cell["first"], cell["steps"])
    models = {"float": grafted(cell).eval()}
    models["latents"] = quantised(models["float"], "calibrated", domain.train)
    models["packed"] = copy.deepcopy(models["latents"])
    models["packed"].pack_experts()
    sizes_on_disk = {
        "float": bytes_on_disk(copy.deepcopy(models["float"]).bfloat16()),
        "latents": bytes_on_disk(copy.deepcopy(models["latents"]).bfloat16()),
        "packed": bytes_on_disk(models["packed"]),
    }
    batch, prompt = domain.held_out[:8], domain.held_out[:1, :16]
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS + 1):
        for name, model in models.items():
            for task, work in (("reading", reading(model, batch)), ("writing", writing(model, prompt))):
                started = time.perf_counter()
                tokens = work()
                seconds.setdefault((name, task), []).append((time.perf_counter() - started) / tokens)
    rows = []
    for name, model in models.items():
        speeds = [f"{1 / statistics.median(seconds[name, task][1:]):,.0f}" for task in ("reading", "writing")]
        share = f"{sizes_on_disk[name] / sizes_on_disk['float']:.3f}"
        rows.append([name, f"{model.expert_bytes:,}", f"{sizes_on_disk[name]:,}", share, *speeds])
    header = ["experts", "bytes in memory", "bytes on disk (bf16 or packed)", "of bf16", "reads tokens/s"]
    return markdown_table([*header, "writes tokens/s"], rows)


def reading(model: LivingMoeForCausalLM, batch: Tensor) -> Callable[[], int]:
    def work() -> int:
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
        return batch.numel()

    return work


def writing(model: LivingMoeForCausalLM, prompt: Tensor) -> Callable[[], int]:
    def work() -> int:
        mask = torch.ones_like(prompt)
        options: dict[str, Any] = {"max_new_tokens": 32, "min_new_tokens": 32, "pad_token_id": 0}
        written: Any = model.generate(prompt, attention_mask=mask, **options)  # type: ignore[misc]
        return int(written.shape[1] - prompt.shape[1])

    return work


def losses_table(rows: list[tuple[Cell, Result]]) -> str:
    lines = []
    for arm in ARMS:
        values = [result[arm] for _, result in rows]
        beside = "float, trained on" if ARMS[arm][1] else "float"
        against = [result[arm] - result[beside] for _, result in rows]
        lines.append([arm, mean_and_deviation(values), mean_and_deviation(against)])
    return markdown_table(["experts", "held-out loss", "against float"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", help="text file; default: Python's documentation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps in floats, of 8 x 128 tokens")
    parser.add_argument("--more", type=int, default=80, help="steps that three of the arms are trained on")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/ternary.md")
    options = parser.parse_args()
    cells = [
        {"first": options.first, "steps": options.steps, "more": options.more, "seed": seed} for seed in options.seeds
    ]
    rows = run_cells(cells, losses, RESULTS / "ternary.jsonl", workers=options.workers)
    torch.set_num_threads(1)
    tune_malloc()
    speed = bytes_and_speed(cells[0])
    name = Path(options.first).name if options.first else "the interpreter's documentation"
    report = (
        f"# Ternary experts\n\nText: {name}. Hidden 128, 2 layers of 8 experts of 256, top-2; {options.steps} float "
        f"steps of 8 x 128 tokens, {options.more} more where trained on. Seeds {options.seeds}, mean ± sd; "
        f"`against float` compares with floats that were trained as long. {machine()}.\n\n{losses_table(rows)}\n\n"
        f"Bytes of the experts and speed, seed {options.seeds[0]}, fp32 except on disk, medians of {ROUNDS} rounds "
        f'(float and latents with the "active" kernel):\n\n{speed}\n'
    )
    print(report)
    if options.save:
        (RESULTS / "ternary.md").write_text(report)


if __name__ == "__main__":
    main()
