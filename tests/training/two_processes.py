"""Started twice by test_distributed.py: trains in one of two processes and writes what this one saw.

python two_processes.py <folder>        (rank, world size and port in the environment)
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from lives import STEPS, blocks, build, busy_model, calm_model, escaping_model, signals  # noqa: E402

from living_moe.configuration.errors import LivingMoeError  # noqa: E402
from living_moe.training.checkpointing import load_model  # noqa: E402
from living_moe.training.data import BlockLoader  # noqa: E402
from living_moe.training.loop import living_accelerator  # noqa: E402


def digest(model: Any, optimizer: Any) -> str:
    """Of every parameter, buffer and optimizer row this process holds."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = dict(model.state_dict())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{names[id(parameter)]}/{key}": value for key, value in state.items()}
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def loader(batch: int = 4) -> BlockLoader:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return BlockLoader(blocks(), batch, seed=3, rank=rank, world_size=2)


def seen(trainer: Any) -> dict[str, Any]:
    return {
        "losses": [record.loss for record in trainer.records],
        "events": [[record.step, event.kind] for record in trainer.records for event in record.events],
        "lineage": [event.to_dict() for event in trainer.model.lineage],
        "digest": digest(trainer.model, trainer.optimizer),
        "capacities": [block.capacities() for block in trainer.model.living_blocks],
        "signals": signals(trainer.model),
        "phi": [float(trainer.model.phi(layer)["phi"]) for layer in range(len(trainer.model.living_blocks))],
    }


def live(model: Any, folder: Path) -> dict[str, Any]:
    """The whole run, and the run that is resumed from its middle."""
    accelerator = living_accelerator()
    trainer = build(model, data=loader(), accelerator=accelerator, max_steps=STEPS)
    trainer.hooks.append(lambda t, r: t.save(folder / "checkpoint-7") if r.step == 7 else None)
    trainer.run()
    whole = seen(trainer)
    again = build(load_model(folder / "checkpoint-7"), data=loader(), accelerator=accelerator, max_steps=STEPS)
    again.resume(folder / "checkpoint-7")
    again.run()
    resumed = seen(again)
    same = resumed["digest"] == whole["digest"] and resumed["losses"] == whole["losses"][7:]
    return {**whole, "resumed_is_the_same": same and resumed["lineage"] == whole["lineage"]}


def diverge(folder: Path) -> dict[str, Any]:
    """Only rank 1 meets a loss that is no number."""
    trainer = build(busy_model(), data=loader(), accelerator=living_accelerator(), max_steps=4)
    head = trainer.model.lm_head.forward
    trainer.model.lm_head.forward = lambda hidden: (
        head(hidden) * (float("nan") if trainer.step == 2 and dist.get_rank() == 1 else 1.0)
    )
    before: dict[str, Any] = {}
    trainer.hooks.append(lambda t, r: before.update(digest=digest(t.model, t.optimizer)))
    try:
        trainer.run()
    except LivingMoeError as error:
        parameters = digest_of_parameters(trainer.model)
        return {"error": str(error), "kind": type(error).__name__, "step": trainer.step, "digest": parameters}
    return {"error": None}


def digest_of_parameters(model: Any) -> str:
    sha = hashlib.sha256()
    for parameter in model.parameters():
        sha.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def under_trainer(folder: Path) -> dict[str, Any]:
    """The same life under transformers.Trainer, resumed as well."""
    from test_callback import losses, trainer_for

    def run(name: str, resume: str | None = None) -> tuple[Any, Any]:
        model = busy_model()
        trainer = trainer_for(model, folder / name, save_strategy="steps", save_steps=7, max_steps=STEPS)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, model

    trainer, model = run("whole")
    result = {
        "losses": losses(trainer),
        "events": [[event.step, event.kind] for event in model.lineage],
        "digest": digest(model, trainer.optimizer.optimizer),
    }
    again, other = run("again", str(folder / "whole" / "checkpoint-7"))
    same = digest(other, again.optimizer.optimizer) == result["digest"] and losses(again) == result["losses"]
    return {**result, "resumed_is_the_same": same}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    scenarios = {
        "grow": lambda place: live(calm_model("grow"), place),
        "frozen-graft": lambda place: live(calm_model("frozen-graft"), place),
        "ternary": lambda place: live(calm_model("ternary"), place),
        "escape": lambda place: live(escaping_model(), place),
        "trainer": under_trainer,
        "diverge": diverge,
    }
    seen_here = {}
    for name, scenario in scenarios.items():
        torch.manual_seed(0)
        seen_here[name] = scenario(folder / name)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen_here))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
