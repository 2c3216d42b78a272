"""What takes gradients is exactly what the section `trainable` names: from a config, a graft, a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import VOCAB, drift, living_model, mixed_text, source_config, source_model
from torch import nn

import living_moe
from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import TrainableConfig
from living_moe.training.optimizers import LivingAdamW

SWITCHES = TrainableConfig.field_names()
ROUTER = {"query_network": "mlp"}
SYNAPSE = {"router": True, "strength": 0.5, "chunk": 2}


def concern(name: str) -> str | None:
    """The switch of a parameter, told from its full name; None where no switch decides."""
    parts = name.split(".")
    if parts[-3:-1] == ["router", "keys"]:
        return {"frozen": "frozen_keys", "trainable": "keys"}[parts[-1]]
    if "synapse" in parts:
        return "synapses"
    if "experts" in parts:
        return None
    if "query" in parts:
        return "query_networks"
    if "self_attn" in parts:
        return "attention"
    if "embed_tokens" in parts:
        return "embeddings"
    if "lm_head" in parts:
        return "head"
    return "norms" if parts[-2].endswith("norm") else "mlps"


def is_frozen_expert(name: str) -> bool:
    return ".experts.frozen." in name


def expected(model: nn.Module, trainable: dict[str, bool]) -> dict[str, bool]:
    found = {}
    for name, _ in model.named_parameters():
        switch = concern(name)
        found[name] = not is_frozen_expert(name) if switch is None else trainable.get(switch, True)
        if name.endswith(".expression.frozen"):  # part of an address, like the key
            found[name] &= trainable.get("frozen_keys", True)
    return found


def actual(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def from_config(family: str, sections: dict[str, Any], **overrides: Any) -> LivingMoeForCausalLM:
    config = LivingMoeConfig.from_backbone(source_config(family, **overrides), preset="some", **sections)
    return LivingMoeForCausalLM(config)


def from_graft(family: str, sections: dict[str, Any], **overrides: Any) -> LivingMoeForCausalLM:
    return living_model(family, "some", sections=sections, **overrides)


MAKERS = {"config": from_config, "graft": from_graft}


@pytest.mark.parametrize("on", [False, True], ids=["only off", "only on"])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("origin", MAKERS)
def test_each_switch_decides_over_its_parameters_and_no_others(origin: str, family: str, switch: str, on: bool) -> None:
    trainable = dict.fromkeys(SWITCHES, not on) | {switch: on}
    model = MAKERS[origin](family, {"trainable": trainable, "router": ROUTER, "synapse": SYNAPSE})
    assert actual(model) == expected(model, trainable)
    present = {concern(name) for name in actual(model)}
    # There are no shared experts in Mixtral, and no trainable slab before the first newborn.
    missing = {"keys"} | ({"mlps"} if family == "mixtral" else set())
    assert present == {*SWITCHES, None} - missing


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_are_kept_by_save_load_and_events(switch: str, tmp_path: Path) -> None:
    trainable = {"mlps": False, switch: False}
    model = from_graft("deepseek_v3", {"trainable": trainable})
    model.split_expert(0, 1)
    model.thaw_expert(1, 2)
    assert actual(model) == expected(model, trainable)
    assert "keys" in {concern(name) for name in actual(model)}
    model.save_pretrained(tmp_path)
    again = LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert again.config.trainable == model.config.trainable
    assert actual(again) == actual(model)
    other = from_graft("deepseek_v3", {"trainable": trainable})
    other.load_state_dict(model.state_dict())
    assert actual(other) == actual(model)


def test_a_changed_switch_takes_effect_when_it_is_applied() -> None:
    model = from_graft("mixtral", {})
    model.config.trainable.attention = False
    assert any(actual(model)[name] for name in actual(model) if concern(name) == "attention")
    model.apply_trainability()
    assert actual(model) == expected(model, {"attention": False, "mlps": False})


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("origin", MAKERS)
def test_a_tied_head_is_the_embeddings(origin: str, head: bool, embeddings: bool) -> None:
    trainable = {"head": head, "embeddings": embeddings}
    model = MAKERS[origin]("mixtral", {"trainable": trainable}, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.requires_grad == embeddings
    assert actual(model) == expected(model, trainable | {"mlps": False})


def test_deltas_of_receptive_fields_always_train() -> None:
    model = living_model("mixtral", "frozen-graft")
    model.split_expert(0, 1)
    on = {name for name, trains in actual(model).items() if trains}
    assert on and all("delta" in name or ".trainable" in name for name in on)
    assert {name for name in actual(model) if "delta" in name} < on


# -- the preset some ---------------------------------------------------------------------------------------------------


def steps(model: LivingMoeForCausalLM, count: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters before and after training."""
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = LivingAdamW(model, lr=1e-2)
    ids = mixed_text(4, 16)
    for _ in range(count):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()
    return before, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("origin", MAKERS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_some_keeps_its_experts_bit_for_bit_and_learns_how_they_are_reached(family: str, origin: str) -> None:
    model = MAKERS[origin](family, {})
    assert [block.capacities() for block in model.living_blocks] == [{"frozen": 8}] * 2
    before, after = steps(model)
    for name, value in after.items():
        still = torch.equal(value, before[name])
        assert still == (is_frozen_expert(name) or concern(name) == "mlps"), name
    assert model.expert_counts == [8, 8] and not list(model.lineage)


@pytest.mark.parametrize("plastic", [False, True])
@pytest.mark.parametrize("frozen_keys", [False, True])
def test_keys_of_frozen_experts_move_by_gradient_by_plasticity_by_both_or_not_at_all(
    frozen_keys: bool, plastic: bool
) -> None:
    sections = {"trainable": {"frozen_keys": frozen_keys}, "plasticity": {"enabled": plastic}}
    before, after = steps(from_graft("mixtral", sections))
    moved = [not torch.equal(after[name], before[name]) for name in after if ".router.keys." in name]
    assert moved == [frozen_keys or plastic] * 2


@pytest.mark.parametrize("switch", [switch for switch in SWITCHES if switch != "keys"])
def test_only_what_is_named_changes_in_training(switch: str) -> None:
    trainable = dict.fromkeys(SWITCHES, False) | {switch: True}
    model = from_graft("deepseek_v3", {"trainable": trainable, "plasticity": {"enabled": False}, "synapse": SYNAPSE})
    before, after = steps(model)
    trains = expected(model, trainable)
    for name, value in after.items():
        assert torch.equal(value, before[name]) != trains[name], name


def test_a_graft_by_some_is_exact() -> None:
    source = source_model("qwen3_moe")
    model = living_moe.convert(source, preset="some")
    assert model.graft_verification.max_difference == 0.0
    drift(model, 0)
    assert model(mixed_text(1, 8)).logits.shape == (1, 8, VOCAB)


def test_a_misspelt_switch_is_refused_with_the_closest() -> None:
    with pytest.raises(ConfigurationError, match=r"trainable.embedings.*'embeddings'"):
        TrainableConfig(embedings=True)
    with pytest.raises(ConfigurationError, match="trainable.head"):
        TrainableConfig(head="yes")
