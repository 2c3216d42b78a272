"""Two processes (gloo, DDP) that train a model with standalone living blocks are one process with the whole batch.

As a script, started twice by the test, it is one of the processes.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import one_of_two_ranks, two_ranks

from living_moe import LivingMoeBlock, StandaloneLivingMoe
from living_moe.configuration.errors import TrainingDivergedError
from living_moe.training.distributed import WrapperKeeper
from living_moe.training.optimizers import LivingAdamW

H, STEPS = 16, 24
BUSY = dict(
    interval=2, warmup_steps=2, cooldown_steps=0, min_age_steps=4, patience=1, split_load=1.25, death_load=0.2,
    max_experts=12, max_events_per_step=2,
)  # fmt: skip


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sections: dict[str, Any] = {"lifecycle": BUSY, "vitals": {"grad_norm_every": 2, "signals_every": 0}}
        self.first = LivingMoeBlock.standalone(H, 8, 6, 2, **sections)
        self.second = LivingMoeBlock.standalone(H, 8, 6, 2, **sections)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    centers = torch.randn(4, H, generator=torch.Generator().manual_seed(99)) * 2
    which = torch.multinomial(torch.tensor([8.0, 4, 2, 1]), 64, replacement=True, generator=generator)
    return (centers[which] + torch.randn(64, H, generator=generator)).view(4, 16, H)


def train() -> dict[str, Any]:
    rank, world = (dist.get_rank(), 2) if dist.is_initialized() else (0, 1)
    model = Model()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    keeper = WrapperKeeper(model, wrapped)
    optimizer = LivingAdamW(model, lr=1e-2)
    for step in range(STEPS):
        x = batch(step).chunk(world)[rank]
        loss = (wrapped(x) - torch.sin(x.roll(1, dims=-1) * x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for layer in (model.first, model.second):
            layer.lifecycle_step(optimizer, loss=loss)
        keeper.follow()
    # What one rank cannot go on with stops all of them, and changes nothing.
    told, steps = [math.nan if rank == 0 else 1.0, None if rank else math.inf], model.first.steps_lived
    for loss_told in told:
        with pytest.raises(TrainingDivergedError, match="another rank" if rank else "training has diverged"):
            model.first.lifecycle_step(optimizer, loss=loss_told)
    assert model.first.steps_lived == steps
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"digest": digest.hexdigest(), "parts": [seen(model.first), seen(model.second)]}


def seen(layer: StandaloneLivingMoe) -> dict[str, Any]:
    events = [[e.step, e.kind, list(e.parents), list(e.children)] for e in layer.lineage]
    return {"events": events, "uids": layer.expert_uids(), "vitality": layer.vitality().tolist()}


def test_two_processes_are_one(tmp_path: Path) -> None:
    ranks = two_ranks(__file__, tmp_path)
    assert ranks[0] == ranks[1], "the ranks have parted"
    alone = train()
    for one, both in zip(alone["parts"], ranks[0]["parts"], strict=True):
        assert {"split", "grow"} <= {kind for _, kind, *_ in both["events"]}
        assert one["events"] == both["events"] and one["uids"] == both["uids"]
        torch.testing.assert_close(torch.tensor(one["vitality"]), torch.tensor(both["vitality"]), rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    one_of_two_ranks(lambda rank: train())
