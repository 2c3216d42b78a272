"""Two processes on one machine, as a test starts them: its own file, run as a script, is one rank.

def test_...(tmp_path):
    first, second = two_ranks(__file__, tmp_path)

if __name__ == "__main__":
    one_of_two_ranks(lambda rank: ...)
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent


def start_two_ranks(script: str | Path, folder: Path) -> None:
    """Run `python script folder` as rank 0 and as rank 1, as torchrun would; a failure shows its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    shared["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


def two_ranks(script: str | Path, folder: Path) -> list[Any]:
    """What `one_of_two_ranks` saved, of rank 0 and of rank 1."""
    start_two_ranks(script, folder)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def one_of_two_ranks(work: Callable[[int], Any]) -> None:
    """Save what `work(rank)` returns. They meet at a file, which no other process can hold, as it can a port."""
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
