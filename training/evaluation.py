"""Loss and perplexity of a model on held-out blocks.

The loss is the plain cross-entropy of the next token, in nats per token, whatever auxiliary losses training adds.
Evaluation observes nothing (vitals and receptive fields stay as they are) and draws no random number, so a run with
evaluations is the run without them.

B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from living_moe.modeling_living_moe.distributed import rank, sum_over_ranks, world_size
from living_moe.training.data import TokenBlocks

METRIC = Path(__file__).with_name("perplexity_of_losses.py")


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on one text. `loss` in nats per token."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate_blocks(
    model: nn.Module, blocks: TokenBlocks | Tensor, *, batch_size: int = 8, max_blocks: int = 0
) -> Evaluation:
    """Loss and perplexity over blocks; every process calls it and each takes its share.

    Args:
        model: Causal language model, not its data-parallel wrapper. Its training mode is restored.
        blocks: `TokenBlocks`, or a tensor (N, S) of token ids. The first token of a block is not scored.
        batch_size: Sequences per process and forward pass.
        max_blocks: At most so many, spread evenly over the text; 0 is all.
    """
    chosen = list(range(len(blocks)))
    if 0 < max_blocks < len(chosen):
        chosen = [number * len(blocks) // max_blocks for number in range(max_blocks)]
    mine = chosen[rank() :: world_size()]
    device = next(model.parameters()).device
    sums = [torch.zeros((), device=device)]
    tokens = 0
    with in_eval_mode(model):
        for first in range(0, len(mine), batch_size):
            ids = torch.stack([blocks[number] for number in mine[first : first + batch_size]]).to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            targets = ids[:, 1:].reshape(-1)
            sums.append(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"))
            tokens += targets.numel()
    # One transfer for all batches, then exact sums on the host.
    total = torch.tensor([sum(torch.stack(sums).tolist()), tokens], dtype=torch.float64)
    loss_sum, count = sum_over_ranks(total.to(device if device.type != "mps" else "cpu")).tolist()
    result = perplexity_metric().compute(predictions=[loss_sum], references=[round(count)])
    assert result is not None
    return Evaluation(result["loss"], result["perplexity"], round(count))


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@cache
def perplexity_metric() -> Any:
    """The `evaluate` metric of this package; sums stay in memory, so processes share no cache file."""
    return evaluate.load(str(METRIC), keep_in_memory=True)


__all__ = ["Evaluation", "evaluate_blocks", "in_eval_mode", "perplexity_metric"]
