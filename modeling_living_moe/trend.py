"""How fast the loss falls: two averages of it, a slow one and a slower one.

On a loss that changes steadily an average lags behind by the mean age of what it remembers, so the difference of two
averages is the rate of change times the difference of their ages:

    improvement = 1000 * (slower - slow) / (age(slower) - age(slow)) / |slower|

the share of itself that the loss loses in 1,000 optimizer steps; below 0 it rises. Independent noise of single steps,
of relative standard deviation s, leaves s / 15 in it once both averages are full (5 % from batch to batch: 0.3 % in
1,000 steps), 2.4 times as much after 1,000 steps, and ten times as much after 300, when nobody is told yet.

Changes nothing; the policy `darwinian` reads it. Every rank computes the same from the same summed loss.
"""

from __future__ import annotations

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
    """Two moving averages of the loss, in buffers: `slow`, `slower`, and `count`, the steps that brought a loss.

    `defer` takes the forward passes of a step, of all ranks.
    """

    slow: Tensor
    slower: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("slow", "slower"):
            self.register_buffer(name, torch.tensor(0.0, dtype=torch.float32))
        self.register_buffer("count", torch.tensor(0))

    def reset_parameters(self) -> None:
        """Nothing seen yet; leaves alone what a checkpoint has loaded."""
        for buffer in (self.slow, self.slower, self.count):
            init.zeros_(buffer)

    def _fold(self, backlog: list[Passes]) -> None:
        slow, slower, count = torch.stack([self.slow, self.slower, self.count.to(self.slow)]).tolist()
        for total, passes, *_ in sums_of(backlog, self.slow.device).tolist():
            if passes:
                slow += (total / passes - slow) / min(count + 1, SLOW)
                slower += (total / passes - slower) / min(count + 1, SLOWER)
                count += 1
                # What buffers hold between steps, so that nothing depends on when somebody looks.
                slow, slower = array("f" if self.slow.dtype == torch.float32 else "d", [slow, slower])
        for buffer, value in ((self.slow, slow), (self.slower, slower), (self.count, count)):
            buffer.fill_(value)

    def improvement(self) -> float | None:
        """Relative fall of the loss in 1,000 steps; None before `WARM_UP` steps. Waits for the device."""
        slow, slower, count = torch.stack([self.slow, self.slower, self.count.float()]).tolist()
        if count < WARM_UP or slower == 0:
            return None
        # Mean age of a running mean of n values is (n - 1) / 2; of a moving average it grows to n - 1 of its memory.
        return PER_STEPS * (slower - slow) / (mean_age(count, SLOWER) - mean_age(count, SLOW)) / abs(slower)


def mean_age(count: float, memory: int) -> float:
    """Mean age, in steps, of the values in an average after `count` of them: a running mean up to `memory` values, from
    then on a moving average of rate 1 / memory.
    """
    if count <= memory:
        return (count - 1) / 2
    forgotten = (1 - 1 / memory) ** (count - memory)
    return (memory - 1) * (1 - forgotten) + (memory - 1) / 2 * forgotten


__all__ = ["LossTrend"]
