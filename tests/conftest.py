"""What every test starts from: no network, one thread, the same random numbers, and no lucky zeros.

The environment is set before anything of Hugging Face is imported; xdist's workers and the processes that tests start
inherit it.
"""

import atexit
import os
import random
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:
    # A fresh home keeps the user's caches, tokens and `accelerate config` out of the tests.
    _home = tempfile.mkdtemp(prefix="living-moe-tests-")
    atexit.register(shutil.rmtree, _home, ignore_errors=True)
    os.environ.update(
        HF_HOME=_home,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        MPLBACKEND="agg",
        TOKENIZERS_PARALLELISM="false",
        ACCELERATE_USE_CPU="true",  # bits are compared, and on the CPU they are reproducible
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with spinning thread pools are slower than one

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)


class _TorchRandom:
    """torch's generator in the shape of `random.Random`, so that hypothesis seeds it before every example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_torch_random = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> None:
    """Seed every generator, and let torch fill uninitialised memory with NaN (integers: the largest).

    `torch.empty` often returns zeros by luck, which hides a newborn's row that nobody wrote. Deterministic mode fills
    it, also inside Transformers' own initialisation, and changes no result of the CPU kernels used here.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("requires_gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
