"""A model goes when it stagnates and Φ has collapsed, returns when the loss falls, and a resumed one does the same."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import FAMILIES, living_model, logits, token_ids
from torch import Tensor

from living_moe import LivingMoeConfig, LivingMoeForCausalLM, convert, export
from living_moe.configuration.errors import ConfigurationError, ConversionError, PopulationError
from living_moe.modeling_living_moe.escape.detector import StagnationDetector
from living_moe.training.optimizers import LivingAdamW

SPACES = ("poincare", "fourier")
every_space = pytest.mark.parametrize("space", SPACES)
FAST = {"window": 2, "patience": 1, "max_steps": 6, "leave_steps": 3, "rest_steps": 4, "loss_tolerance": 0.5}


def escaping(space: str = "poincare", family: str = "mixtral", **escape: Any) -> LivingMoeForCausalLM:
    sections = {
        "escape": {"space": space, **FAST, "grad_tolerance": 9.0, **escape},
        "vitals": {"phi_every": 1, "grad_norm_every": 1},
        "lifecycle": {"enabled": False},
    }
    return living_model(family, sections=sections)


def train_step(
    model: LivingMoeForCausalLM, optimizer: torch.optim.Optimizer, seed: int, *, set_to_none: bool = True
) -> list[tuple[str, int, str]]:
    model.train()
    ids = token_ids(2, 12, seed=seed)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    events = model.lifecycle_step(optimizer)
    optimizer.zero_grad(set_to_none)
    return [(event.kind, event.layer, event.metric) for event in events]


def collapse(model: LivingMoeForCausalLM, *layers: int) -> None:
    """As if Φ of those layers had once been far higher."""
    for layer in layers:
        model.living_block(layer).vitals.phi_record.fill_(10.0)
        model.living_block(layer).vitals.phi_count.fill_(5)


def parameters_of(model: LivingMoeForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -- nothing until it is asked for -------------------------------------------------------------------------------------


def test_without_it_there_is_nothing() -> None:
    model = living_model("mixtral")
    assert not any("escape" in name or "stagnation" in name for name in model.state_dict())
    with pytest.raises(PopulationError, match=r"set escape\.space to poincare"):
        model.open_escape(0)


@every_space
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_may_go_trains_like_one_that_may_not_until_it_goes(space: str, family: str) -> None:
    plain = living_model(
        family, sections={"vitals": {"phi_every": 1, "grad_norm_every": 1}, "lifecycle": {"enabled": False}}
    )
    model = escaping(space, family)
    optimizers = [LivingAdamW(each, lr=1e-2) for each in (plain, model)]
    for seed in range(3):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            assert train_step(each, optimizer, seed) == []
    found, expected = parameters_of(model), parameters_of(plain)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    ids = token_ids(2, 10)
    before = logits(model.eval(), ids)
    for layer in range(2):
        model.open_escape(layer)
    assert torch.equal(logits(model, ids), before)
    assert [event.kind for event in model.lineage] == ["escape", "escape"]


# -- when it goes, and when it returns ---------------------------------------------------------------------------------


@every_space
def test_stagnation_and_a_collapse_together_send_a_layer_away_and_it_returns(space: str) -> None:
    model = escaping(space)
    optimizer = LivingAdamW(model, lr=1e-3)
    happened: dict[int, list[tuple[str, int, str]]] = {}
    collapse(model, 1)
    for step in range(1, 19):
        if events := train_step(model, optimizer, step):
            happened[step] = events
    # Flat from the second window on; six steps there, three to leave, and by then the peak is of today.
    assert happened == {4: [("escape", 1, "phi")], 10: [("return", 1, "steps")]}
    assert [event.kind for event in model.lineage] == ["escape", "return"]
    escape = model.living_block(1).escape
    assert model.escape_state(1) == model.escape_state(0) == "closed" and escape.now.rest_until == 13 + 4
    assert float(model.phi(1)["phi_record"]) < 1 and model.lineage[0].threshold == pytest.approx(9.0)


def test_neither_alone_sends_anybody_away() -> None:
    stagnating = escaping()
    moving = escaping(grad_tolerance=0.0, loss_tolerance=0.0)
    for model, layers in ((stagnating, ()), (moving, (0, 1))):
        optimizer = LivingAdamW(model, lr=1e-3)
        collapse(model, *layers)
        assert [train_step(model, optimizer, step) for step in range(8)] == [[]] * 8


def test_a_loss_that_falls_again_brings_a_layer_home() -> None:
    model = escaping(max_steps=1000, loss_tolerance=0.02)
    model.open_escape(0)
    optimizer = LivingAdamW(model, lr=2e-2)
    happened = [event for _ in range(12) for event in train_step(model, optimizer, 1)]
    assert happened == [("return", 0, "loss fall")]
    assert model.lineage[-1].value > 0.02


def test_a_rest_is_kept() -> None:
    model = escaping(rest_steps=20, max_steps=2, leave_steps=1)
    optimizer = LivingAdamW(model, lr=1e-3)
    happened = {}
    for step in range(1, 34):
        collapse(model, 0)
        if events := train_step(model, optimizer, step):
            happened[step] = [kind for kind, *_ in events]
    # Closed at step 7, so not before step 27, and windows end at even steps.
    assert happened == {4: ["escape"], 6: ["return"], 28: ["escape"], 30: ["return"]}


@every_space
def test_it_learns_there_and_the_optimizer_begins_anew_each_time(space: str) -> None:
    model = escaping(space, max_steps=1000, window=1000)
    optimizer = LivingAdamW(model, lr=1e-2)
    escape = model.living_block(0).escape
    start = {name: p.detach().clone() for name, p in escape.named_parameters()}
    model.open_escape(0, optimizer=optimizer)
    for seed in range(4):
        train_step(model, optimizer, seed)
    assert all(not torch.equal(p, start[name]) for name, p in escape.named_parameters())
    assert model.signals()["escaped"] == 1
    assert float(optimizer.state[escape.gate]["step"]) == 4
    model.leave_escape(0)
    for seed in range(3):
        assert model.escape_state(0) == "leaving"
        train_step(model, optimizer, seed)
    assert model.escape_state(0) == "closed" and not escape.gate.any()
    assert not any(value.any() for p in escape.parameters() for value in optimizer.state[p].values())
    kept = {name: p.detach().clone() for name, p in escape.named_parameters()}
    train_step(model, optimizer, 9)
    assert all(torch.equal(p, kept[name]) for name, p in escape.named_parameters())


def test_a_map_at_home_is_not_worn_down_by_decay() -> None:
    model = escaping(leave_steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.open_escape(0, optimizer=optimizer)
    for seed in range(4):
        if seed == 3:
            model.leave_escape(0)
        train_step(model, optimizer, seed, set_to_none=False)
    assert model.escape_state(0) == "closed"
    learned = parameters_of(model)
    for seed in range(4, 8):
        train_step(model, optimizer, seed, set_to_none=False)
    now = parameters_of(model)
    escape = [name for name in now if ".0." in name and ".escape.map." in name]
    assert escape and all(torch.equal(now[name], learned[name]) for name in escape)


def test_direct_calls_in_the_wrong_state_are_refused() -> None:
    model = escaping()
    with pytest.raises(PopulationError, match="layer 0: the escape is closed; only an open one is left"):
        model.leave_escape(0)
    model.open_escape(0)
    with pytest.raises(PopulationError, match="layer 0: the escape is open; only a closed one opens"):
        model.open_escape(0)


# -- saved, resumed, exported ------------------------------------------------------------------------------------------


@every_space
@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_resumed_life_is_the_uninterrupted_one(space: str, cut: int, tmp_path: Path) -> None:
    model = escaping(space)
    collapse(model, 0)
    optimizer = LivingAdamW(model, lr=1e-2)
    for step in range(cut):
        train_step(model, optimizer, step)
    model.save_pretrained(tmp_path)
    again = LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval(), token_ids(2, 9)), logits(model.eval(), token_ids(2, 9)))
    other = LivingAdamW(again, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(cut, 16):
        assert train_step(again, other, step) == train_step(model, optimizer, step)
    assert again.lineage == model.lineage and {event.kind for event in model.lineage} == {"escape", "return"}
    for (name, one), two in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    fresh = escaping(space)
    fresh.load_state_dict(model.state_dict())
    assert [fresh.escape_state(layer) for layer in range(2)] == [model.escape_state(layer) for layer in range(2)]


@every_space
def test_a_conversion_is_exact_and_an_export_waits_until_all_are_home(space: str, tmp_path: Path) -> None:
    source = export(living_model("mixtral"), tmp_path / "source")
    model = convert(source, preset="grow", escape={"space": space})
    assert model.graft_verification.max_difference == 0.0
    model.open_escape(1)
    with pytest.raises(ConversionError, match=rf"layers \[1\] work in another space \({space}\)"):
        export(model, tmp_path / "away")
    model.living_block(1).escape.leave(0)
    for step in range(model.config.escape.leave_steps):
        model.living_block(1).escape.tick(step)
    exported = export(model, tmp_path / "home")
    assert torch.equal(logits(exported, token_ids(2, 8)), logits(source, token_ids(2, 8)))


@every_space
def test_a_model_from_scratch_and_one_in_bf16_stay_finite(space: str) -> None:
    config = escaping(space).config
    config.populations = None
    torch.manual_seed(0)
    model = LivingMoeForCausalLM(LivingMoeConfig.from_dict(config.to_dict()))
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        model.train()
        if model.escape_state(0) == "closed":
            model.open_escape(0)
        with torch.no_grad():
            model.living_block(0).escape.gate.fill_(0.8)
        ids = token_ids(2, 12)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.living_block(0).escape.parameters())
        model.zero_grad()


@every_space
def test_checkpointed_gradients_are_the_same(space: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = escaping(space)
        model.open_escape(0)
        with torch.no_grad():
            model.living_block(0).escape.gate.fill_(0.5)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = token_ids(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(one, gradients[1][name], atol=1e-7) for name, one in gradients[0].items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"vitals": {"phi_every": 0}}, "vitals.phi_every is 0: it must be measured in every window of 200"),
        ({"vitals": {"grad_norm_every": 300}}, "vitals.grad_norm_every is 300"),
        ({"backbone_config": {"num_experts_per_tok": 1}}, "with one expert per token Φ is always 0"),
        (
            {
                "backbone_config": {"num_experts_per_tok": 1},
                "escape": {},
                "lifecycle": {"phi_trigger": 0.9, "noise_std": 0.1},
            },
            r"lifecycle\.phi_trigger is 0\.9, but num_experts_per_tok is 1",
        ),
        ({"receptive_field": {"enabled": True}, "experts": {"freeze_pretrained": True}}, "protects the outputs"),
    ],
)
def test_settings_that_could_never_work_are_refused(sections: dict[str, Any], message: str) -> None:
    backbone = {"model_type": "mixtral", **sections.pop("backbone_config", {})}
    with pytest.raises(ConfigurationError, match=message):
        LivingMoeConfig(backbone_config=backbone, **{"escape": {"space": "fourier"}, **sections})


def test_the_detector_belongs_to_models_that_may_go_only() -> None:
    assert living_model("mixtral").model.stagnation is None
    assert isinstance(escaping().model.stagnation, StagnationDetector)
