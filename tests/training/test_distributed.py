"""Two processes (gloo) are one: through splits, deaths and slab growth, resumed, diverging, and under Trainer.

Two processes are started once, train through all scenarios, and write what they saw.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from lives import STEPS, blocks, build, calm_model, escaping_model, signals
from two_ranks import start_two_ranks

from living_moe.training.data import BlockLoader

SCRIPT = Path(__file__).with_name("two_processes.py")


Seen = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """What rank 0 and rank 1 saw of every scenario in two_processes.py."""
    folder = tmp_path_factory.mktemp("ranks")
    start_two_ranks(SCRIPT, folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("preset", ["grow", "frozen-graft", "ternary"])
def test_two_processes_are_one_process_with_their_global_batch(preset: str, ranks: list[Seen]) -> None:
    alone = build(calm_model(preset), data=BlockLoader(blocks(), 8, seed=3), max_steps=STEPS)
    alone.model.config.vitals.signal_tokens *= 2  # as many as both ranks sample
    alone.run()
    first, second = (seen[preset] for seen in ranks)
    assert first == second, "the ranks have parted"
    assert first["losses"] == pytest.approx([record.loss for record in alone.records], abs=1e-5)
    lineage = [(event.kind, event.step, event.layer, event.parents, event.children) for event in alone.model.lineage]
    assert [
        (e["kind"], e["step"], e["layer"], tuple(e["parents"]), tuple(e["children"])) for e in first["lineage"]
    ] == (lineage)
    happened = {event.kind for event in alone.model.lineage}
    assert happened >= ({"split", "grow"} if preset == "frozen-graft" else {"split", "death", "grow"})
    assert first["capacities"] == [block.capacities() for block in alone.model.living_blocks]
    assert first["resumed_is_the_same"]
    for theirs, ours in zip(first["signals"], signals(alone.model), strict=True):
        assert any(ours["interference"]) and any(ours["loss_slow"])
        for name, values in ours.items():
            assert theirs[name] == pytest.approx(values, rel=1e-3, abs=1e-3), name


def test_two_processes_measure_phi_and_escape_as_one(ranks: list[Seen]) -> None:
    alone = build(escaping_model(), data=BlockLoader(blocks(), 8, seed=3), max_steps=STEPS)
    alone.model.config.vitals.phi_tokens *= 2  # as many as both ranks sample
    alone.run()
    first, second = (seen["escape"] for seen in ranks)
    assert first == second, "the ranks have parted"
    events = [[event.step, event.kind] for event in alone.model.lineage]
    assert first["events"] == events == [[4, "escape"], [8, "return"]]
    assert first["losses"] == pytest.approx([record.loss for record in alone.records], abs=1e-5)
    assert first["phi"] == pytest.approx([float(alone.model.phi(layer)["phi"]) for layer in range(2)], rel=1e-4)
    assert first["resumed_is_the_same"]


def test_a_loss_that_is_no_number_on_one_rank_stops_both_before_the_step(ranks: list[Seen]) -> None:
    first, second = (seen["diverge"] for seen in ranks)
    assert first == second
    assert first["kind"] == "TrainingDivergedError" and first["step"] == 2
    assert "step 3: the loss is nan" in first["error"] and "layer 1: " in first["error"]


def test_trainer_re_wraps_a_model_that_grows(ranks: list[Seen]) -> None:
    first, second = (seen["trainer"] for seen in ranks)
    assert first == second
    assert {kind for _, kind in first["events"]} >= {"split", "grow"}
    assert first["resumed_is_the_same"]
