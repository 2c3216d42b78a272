"""How long finding each token's experts takes: scoring every key, two-stage search, FAISS.

    python benchmarks/routing.py [--experts 1000 4000 100000] [--threads 2] [--output benchmarks/results/routing.md]

2,048 queries of length 256, 8 candidates each. *Grown* keys are what splits leave behind: 64 random roots, then random
experts split, each child at a cosine of .8 to its parent; a query is the key of a random expert and noise, at a cosine
of .8, too. *Random* keys have no clusters: no search that skips keys finds their best, and `KeyStoreSearch` must say so
and give way. Searches look at more keys per query until they find 97 % of each query's two best. One round is a search
of each kind; times are medians over rounds, ratios to the exact search. FAISS is measured on grown keys.

Sync: 1 % of the keys have moved. Build: the whole index.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cells import processor
from torch import Tensor

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import RouterConfig
from living_moe.modeling_living_moe.key_search import (
    ExactSearch,
    FaissSearch,
    KeySearch,
    KeyStoreSearch,
    TwoStageSearch,
)

QUERIES, LENGTH, ROOTS, COSINE, COUNT, TOP_K, MIN_RECALL = 2048, 256, 64, 0.8, 8, 2, 0.97


def near(direction_ND: Tensor) -> Tensor:
    """Unit vectors at a cosine of `COSINE` to `direction_ND`."""
    noise_ND = torch.randn_like(direction_ND)
    noise_ND -= (noise_ND * direction_ND).sum(1, keepdim=True) * direction_ND
    return COSINE * direction_ND + math.sqrt(1 - COSINE**2) * F.normalize(noise_ND, dim=1)


def random_keys(count: int) -> Tensor:
    return F.normalize(torch.randn(count, LENGTH), dim=1)


def grown_keys(count: int) -> Tensor:
    """Random experts split, an eighth of the population at a time."""
    keys_ND = torch.empty(count, LENGTH)
    keys_ND[:ROOTS] = random_keys(ROOTS)
    alive = ROOTS
    while alive < count:
        newborns = min(count - alive, max(1, alive // 8))
        keys_ND[alive : alive + newborns] = near(keys_ND[torch.randint(alive, (newborns,))])
        alive += newborns
    return keys_ND[torch.randperm(count)]


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def recall(found_TC: Tensor, best_TK: Tensor) -> float:
    return (best_TK.unsqueeze(2) == found_TC.unsqueeze(1)).any(2).float().mean().item()


def measure(kind: str, count: int, rounds: int, crossover: dict[int, float]) -> list[str]:
    """Rows of the table for `count` keys."""
    keys_ND = grown_keys(count) if kind == "grown" else random_keys(count)
    query_TD = near(keys_ND[torch.randint(count, (QUERIES,))])
    searches: dict[str, KeySearch] = {"exact": ExactSearch(), "two-stage": TwoStageSearch()}
    missing = []
    if kind == "grown":
        for name in ("hnsw", "ivf"):
            try:
                searches[f"FAISS {name}"] = FaissSearch(name)
            except ConfigurationError:
                missing.append(f"| {kind} | {count:,} | FAISS {name} | not installed | | | | | |")
    builds = {name: seconds_of(partial(search.sync, keys_ND)) for name, search in searches.items()}

    best_TK = searches["exact"].search(query_TD, TOP_K)
    recalls = {}
    for name, search in searches.items():
        recalls[name] = recall(search.search(query_TD, COUNT), best_TK)
        while recalls[name] < MIN_RECALL and search.widen():
            recalls[name] = recall(search.search(query_TD, COUNT), best_TK)
    times: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(rounds):
        for name, search in searches.items():
            times[name].append(seconds_of(partial(search.search, query_TD, COUNT)))
    syncs: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(3):
        moved = torch.randperm(count)[: count // 100]
        keys_ND[moved] = near(keys_ND[moved])
        for name, search in searches.items():
            syncs[name].append(seconds_of(partial(search.sync, keys_ND)))

    medians = {name: statistics.median(values) for name, values in times.items()}
    if kind == "grown":
        crossover[count] = medians["two-stage"] / medians["exact"]
    lines = []
    for name, search in searches.items():
        index = name != "exact"
        width = getattr(search, "probes", getattr(search, "width", ""))
        lines.append(
            f"| {kind} | {count:,} | {name} | {width} | {recalls[name]:.3f} | {1e3 * medians[name]:.1f} | "
            f"{medians[name] / medians['exact']:.3f} | "
            f"{f'{1e3 * statistics.median(syncs[name]):.1f}' if index else ''} | "
            f"{f'{builds[name]:.2f}' if index else ''} |"
        )
    if kind == "random":
        store = KeyStoreSearch(RouterConfig(search="two_stage"))
        store.candidates(query_TD, keys_ND, COUNT, TOP_K)
        lines.append(f"| {kind} | {count:,} | what a router does | {store.mode} | | | | | |")
    return lines + missing


def machine() -> str:
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[1000, 4000, 16000, 100000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    lines = [
        f"| keys | N | search | probes or width | recall@{TOP_K} | search ms | ratio | sync 1 % ms | build s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    crossover: dict[int, float] = {}
    for kind in ("grown", "random"):
        for count in options.experts:
            rows = measure(kind, count, options.rounds, crossover)
            print("\n".join(rows), flush=True)
            lines += rows
    faster = [count for count in sorted(crossover) if crossover[count] < 1]
    summary = (
        f"Crossover: two-stage is faster than exact from N = {faster[0]:,} on, of those measured."
        if faster
        else "Crossover: exact is fastest at every N measured."
    )
    settings = (
        f"{QUERIES:,} queries, d {LENGTH}, {COUNT} candidates; {machine()}; medians of {options.rounds} interleaved "
        f"rounds, seed {options.seed}"
    )
    print(f"\n{summary}\n\n{settings}")
    if options.output:
        report = "\n".join([*lines, "", summary, "", settings])
        options.output.write_text(f"# Searching keys: exact, two-stage, FAISS\n\n{report}\n")


if __name__ == "__main__":
    main()
