"""Experiments as cells: each is run once, kept in a file, and never run again; tables are means over seeds.

A cell is a dict of what distinguishes it (experiment, arm, seed). Its result, a dict of numbers, is appended to a JSON
lines file as soon as it is there, so that a run that was cut off goes on where it stopped. Cells run in processes of
their own, one thread each: two of them on two cores are faster than one with two threads.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

Cell = dict[str, Any]
Result = dict[str, float]


def run_cells(
    cells: Sequence[Cell], function: Callable[[Cell], Result], path: Path, *, workers: int = 2
) -> list[tuple[Cell, Result]]:
    """Results of all cells, in their order; those in `path` are not run again.

    Args:
        cells: JSON values only; what decides a result must be in them.
        function: Importable from its module; called in a process with one thread.
        path: JSON lines file of earlier results, continued.
        workers: Processes at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {json.dumps(entry["cell"], sort_keys=True): entry["result"] for entry in map(_parsed, lines) if entry}
    missing = [cell for cell in cells if json.dumps(cell, sort_keys=True) not in done]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them known from {path}", flush=True)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        path.open("a", encoding="utf-8") as file,
    ):
        waiting = {pool.submit(_timed, function, cell): cell for cell in missing}
        for future in as_completed(waiting):
            cell, result = waiting[future], future.result()
            done[json.dumps(cell, sort_keys=True)] = result
            file.write(json.dumps({"cell": cell, "result": result}) + "\n")
            file.flush()
            print(f"{cell}: {result}", flush=True)
    return [(cell, done[json.dumps(cell, sort_keys=True)]) for cell in cells]


def _timed(function: Callable[[Cell], Result], cell: Cell) -> Result:
    started = time.perf_counter()
    return {**function(cell), "seconds": time.perf_counter() - started}


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None  # cut off by a crash
    return entry


def mean_and_deviation(values: Iterable[float], digits: int = 3) -> str:
    """ "1.234 ± 0.012" over seeds; a single value has no deviation."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(name: str, what: str, seeds: Sequence[int], table: str) -> str:
    """One experiment's part of a report: what it was run on, and its table."""
    return f"## {name}\n\n{what}, seeds {list(seeds)}, mean ± standard deviation. {machine()}.\n\n{table}"


def text_name(file: str | None) -> str:
    """What a text is called in a report: the folder it lies in."""
    return Path(file).parent.name if file else "the interpreter's own"


def machine() -> str:
    """What a table was measured on."""
    return f"{processor()}, one thread a cell, torch {torch.__version__}"


def processor() -> str:
    """Its name, where the system tells; else its architecture."""
    try:
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
