"""What watching costs: size of a great run's records, time to build its page and to follow it, overhead of a step.

    python benchmarks/observatory.py            # the size of a run of 100,000 steps, page, overhead
    python benchmarks/observatory.py --quick    # a tenth of it

Sizes: a synthetic run of 16 layers, 1,000 experts in all (and again with 1,000 in each), 50,000 events, whose numbers
are as noisy as a run's. Overhead: a small model trained on random text; what the observatory's hooks take is timed
step by step between the steps themselves, so that other load on the machine falls on both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import living_moe
from living_moe.training.data import BlockLoader
from living_moe.training.loop import LivingTrainer
from living_moe.training.observatory import live, read_run
from living_moe.training.observatory.lineage_page import write_lineage_page
from living_moe.training.observatory.recorder import Recorder
from living_moe.training.observatory.trackers import Trackers, open_trackers, tracker_names
from living_moe.training.optimizers import LivingAdamW
from living_moe.training.reporting import JsonLog

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from synthetic_run import write_synthetic_run


def sizes(directory: Path, experts: int, share: float) -> None:
    """Records of a run with so many experts in each of 16 layers, and its page."""
    steps, events = round(100_000 * share), round(50_000 * share)
    begin = time.perf_counter()
    write_synthetic_run(directory, layers=16, founders=experts, most=experts + 8, events=events, steps=steps)
    written = time.perf_counter() - begin
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    begin, cpu = time.perf_counter(), time.process_time()
    run = read_run(directory)
    read = time.perf_counter() - begin
    path = write_lineage_page(run, directory.with_suffix(".html"))
    built, cpu = time.perf_counter() - begin, time.process_time() - cpu
    counts = f"{steps:,} steps, {len(run.events):,} events, {len(run.vitals_steps):,} snapshots"
    print(f"16 layers x {experts} experts, {counts}")
    for name, size in files.items():
        print(f"  {name:<16}{size / 1e6:8.1f} MB")
    print(f"  {'all records':<16}{sum(files.values()) / 1e6:8.1f} MB   (written in {written:.0f} s)")
    megabytes = path.stat().st_size / 1e6
    print(
        f"  read in {read:.1f} s; read, and a page of {megabytes:.1f} MB built, in {built:.1f} s ({cpu:.1f} s of CPU)",
        flush=True,
    )
    polls(directory)


def polls(directory: Path) -> None:
    """CPU time of the live page's first look at a run, and of later ones, each after something was appended."""
    live.PAUSE = 0.0
    page = live.Live(directory)
    known: dict[str, str] = {}

    def look(times: int, change: Callable[[], None] = lambda: None) -> float:
        spent = 0.0
        for _ in range(times):
            change()
            begin = time.process_time()
            answer = page.state(known)
            json.dumps(answer)
            spent += time.process_time() - begin
            known.update(answer["versions"])
        return 1000 * spent / times

    def append(name: str, text: str) -> Callable[[], None]:
        def act() -> None:
            with (directory / name).open("a") as file:
                file.write(text)

        return act

    last = {path.name: path.read_text().splitlines(keepends=True)[-1] for path in directory.glob("*.jsonl")}
    whole = [line for line in (directory / "vitals.jsonl").read_text().splitlines(True) if '"whole": true' in line][-1]
    print(
        f"  live page: first look {look(1) / 1000:.1f} s of CPU; then, in ms, {look(50):.2f} with nothing new, "
        f"{look(20, append('log.jsonl', last['log.jsonl'])):.1f} after a step, "
        f"{look(20, append('lineage.jsonl', last['lineage.jsonl'])):.1f} after an event, "
        f"{look(3, append('vitals.jsonl', whole)):.1f} after a snapshot",
        flush=True,
    )


def small_model() -> Any:
    config = MixtralConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return living_moe.convert(MixtralForCausalLM(config), preset="grow", lifecycle={"interval": 10, "max_experts": 16})


def overhead(directory: Path, steps: int) -> None:
    """What the hooks of a training run take, of the time that its steps take without them."""
    model = small_model()
    blocks = torch.randint(3, 512, (256, 128), generator=torch.Generator().manual_seed(1))
    opened = open_trackers(tracker_names("auto"), str(directory / "tensorboard"), "overhead")
    trackers = Trackers(opened, model)
    log = JsonLog(directory / "log.jsonl", listeners=[trackers.entry])
    recorder = Recorder(directory, model, max_steps=steps, listeners=[trackers.snapshot])
    spent: list[float] = []

    def observe(trainer: LivingTrainer, record: Any) -> None:
        begin = time.perf_counter()
        recorder(trainer, record)
        log(trainer, record)
        spent.append(time.perf_counter() - begin)

    trainer = LivingTrainer(
        model, BlockLoader(blocks, 8, seed=3), LivingAdamW(model, lr=1e-3), max_steps=steps, hooks=[observe]
    )
    begin = time.perf_counter()
    trainer.run()
    took = time.perf_counter() - begin
    recorder.close()
    trackers.finish()
    print(
        f"4 layers, {sum(model.expert_counts)} experts, {steps} steps of {1000 * (took - sum(spent)) / steps:.1f} ms, "
        f"observed for {1000 * sum(spent) / steps:.3f} ms a step (median {1000 * statistics.median(spent):.3f} ms): "
        f"{100 * sum(spent) / (took - sum(spent)):.2f} % of a step; "
        f"trackers: {', '.join(tracker.name for tracker in opened) or 'none'}; "
        f"{len(read_run(directory).vitals_steps)} snapshots",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps and events")
    arguments = parser.parse_args()
    share = 0.1 if arguments.quick else 1.0
    with tempfile.TemporaryDirectory() as folder:
        overhead(Path(folder) / "overhead", round(300 * share) + 100)
        sizes(Path(folder) / "thousand", 62, share)
        sizes(Path(folder) / "thousands", 1000, share)


if __name__ == "__main__":
    main()
