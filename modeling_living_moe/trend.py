"""How fast the loss falls: two averages of it, a slow one and a slower one.

On a loss that changes steadily an average lags behind by the mean age of what it remembers, so the difference of two
averages is the rate of change times the difference of their ages:

    improvement = 1000 * (slower - slow) / (age(slower) - age(slow)) / |slower|

the share of itself that the loss loses in 1,000 optimizer steps; below 0 it rises. Who is told of a loss only now and
then counts those, and takes the steps between into the ages. Independent noise of single steps,
of relative standard deviation s, leaves s / 15 in it once both averages are full (5 % from batch to batch: 0.3 % in
1,000 steps), 2.4 times as much after 1,000 steps, and ten times as much after 300, when nobody is told yet.

Changes nothing; the policy `darwinian` reads it. Every rank computes the same from the same summed loss.
"""

from __future__ import annotations

import sys
from array import array

import torch
from torch import Tensor
from transformers import initialization as init

from living_moe.modeling_living_moe.deferred import Deferred
from living_moe.modeling_living_moe.drift import Passes, sums_of

#: Optimizer steps the two averages remember (running means until then), and how many must have been seen: before, the
#: averages are of nearly the same steps.
SLOW, SLOWER, WARM_UP = 100, 1000, 1000
#: Steps a rate is given for.
PER_STEPS = 1000


class LossTrend(Deferred[Passes]):
    """Two moving averages of the loss, in buffers: `slow`, `slower`, and `count`, the steps that brought a loss, of the
    `steps` since the first one that did.

    `defer` takes the forward passes of a step, of all ranks.
    """

    slow: Tensor
    slower: Tensor
    count: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("slow", "slower"):
            self.register_buffer(name, torch.tensor(0.0, dtype=torch.float32))
        for name in ("count", "steps"):
            self.register_buffer(name, torch.tensor(0))

    def reset_parameters(self) -> None:
        """Nothing seen yet; leaves alone what a checkpoint has loaded."""
        for buffer in (self.slow, self.slower, self.count, self.steps):
            init.zeros_(buffer)

    def _fold(self, backlog: list[Passes]) -> None:
        slow, slower = torch.stack([self.slow, self.slower]).tolist()
        count, steps = torch.stack([self.count, self.steps]).tolist()
        for total, passes, *_ in sums_of(backlog, self.slow.device).tolist():
            if passes:
                slow += (total / passes - slow) / min(count + 1, SLOW)
                slower += (total / passes - slower) / min(count + 1, SLOWER)
                count += 1
                # What buffers hold between steps, so that nothing depends on when somebody looks.
                slow, slower = array("f" if self.slow.dtype == torch.float32 else "d", [slow, slower])
            steps += count > 0
        for name, value in ("slow", slow), ("slower", slower), ("count", count), ("steps", steps):
            getattr(self, name).fill_(value)

    def improvement(self) -> float | None:
        """Relative fall of the loss in 1,000 steps; None before `WARM_UP` losses. Waits for the device."""
        slow, slower, count, steps = torch.stack(
            [self.slow, self.slower, self.count.to(self.slow), self.steps.to(self.slow)]
        ).tolist()
        if count < WARM_UP:
            return None
        if slow == slower:
            return 0.0
        # Mean age of a running mean of n values is (n - 1) / 2; of a moving average it grows to n - 1 of its memory.
        ages = (mean_age(count, SLOWER) - mean_age(count, SLOW)) * max(steps / count, 1.0)
        return PER_STEPS * (slower - slow) / ages / max(abs(slower), sys.float_info.min)


def mean_age(count: float, memory: int) -> float:
    """Mean age, in steps, of the values in an average after `count` of them: a running mean up to `memory` values, from
    then on a moving average of rate 1 / memory.
    """
    if count <= memory:
        return (count - 1) / 2
    forgotten = (1 - 1 / memory) ** (count - memory)
    return (memory - 1) * (1 - forgotten) + (memory - 1) / 2 * forgotten


__all__ = ["LossTrend"]
