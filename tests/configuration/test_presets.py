"""Presets are complete, make sense, and take overrides in exactly one form."""

from typing import Any

import pytest
from transformers import MixtralConfig

from living_moe.configuration import PRESETS, ConfigurationError, LivingMoeConfig, preset_sections
from living_moe.configuration.sections import SECTIONS

SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_every_section_and_a_valid_config(name: str) -> None:
    sections = preset_sections(name)
    assert sections.keys() == SECTIONS.keys()
    config = LivingMoeConfig.from_backbone(MixtralConfig(**SMALL), preset=name)
    assert config.preset == name
    for section, values in PRESETS[name].sections.items():
        for field, value in values.items():
            assert getattr(getattr(config, section), field) == value
    config.validate()


def test_frozen_graft_protects_the_old_function() -> None:
    config = LivingMoeConfig.from_backbone(MixtralConfig(**SMALL))
    assert config.preset == "frozen-graft"
    assert config.experts.freeze_pretrained and config.receptive_field.enabled
    assert config.trainable.to_dict() == dict.fromkeys(config.trainable.to_dict(), False) | {"keys": True}


def test_grow_trains_everything() -> None:
    config = LivingMoeConfig.from_backbone(MixtralConfig(**SMALL), preset="grow")
    assert not (config.experts.freeze_pretrained or config.receptive_field.enabled)
    assert all(config.trainable.to_dict().values()) and config.lifecycle.enabled


def test_an_override_changes_its_field_and_leaves_the_rest_of_the_section() -> None:
    plain, changed = (
        preset_sections("frozen-graft"),
        preset_sections("frozen-graft", {"experts": {"growth_factor": 2.0}}),
    )
    assert changed["experts"] == {**plain["experts"], "growth_factor": 2.0}
    assert changed["experts"]["freeze_pretrained"] is True
    assert {name: changed[name] for name in changed if name != "experts"} == {
        name: plain[name] for name in plain if name != "experts"
    }
    assert LivingMoeConfig.from_backbone(MixtralConfig(**SMALL), lifecycle={"interval": 5}).lifecycle.interval == 5


def test_presets_do_not_remember_overrides() -> None:
    before = preset_sections("grow")
    preset_sections("grow", {"lifecycle": {"interval": 3}})["lifecycle"]["interval"] = 4
    assert preset_sections("grow") == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lifecycel": {}}, r"unknown override 'lifecycel'; .* Did you mean 'lifecycle'\?"),
        ({"interval": 5}, r"one dict per section\. Did you mean lifecycle=\{'interval': 5\}\?"),
        ({"lifecycle__interval": 5}, r"Did you mean lifecycle=\{'interval': 5\}\?"),
        ({"lifecycle.interval": 5}, r"Did you mean lifecycle=\{'interval': 5\}\?"),
        ({"decay": 0.5}, r"vitals=\{'decay': 0\.5\} or receptive_field=\{'decay': 0\.5\}\?"),
        ({"zzz": 5}, r"unknown override 'zzz'; .* Known: escape, experts, lifecycle"),
        ({"lifecycle": 5}, r"override lifecycle must be a dict of the fields to change, got 5"),
        ({"lifecycle": {"intervall": 5}}, r"unknown field lifecycle\.intervall\. Did you mean 'interval'\?"),
        ({"lifecycle": {"interval": 0}}, r"lifecycle\.interval must be >= 1, got 0"),
        ({"experts": {"freeze_pretrained": False}}, r"receptive_field\.enabled is True but experts\.freeze_pretrained"),
    ],
)
def test_any_other_override_is_refused_with_the_right_form(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LivingMoeConfig.from_backbone(MixtralConfig(**SMALL), preset="frozen-graft", **overrides)


def test_an_unknown_preset_is_refused_with_the_closest() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown preset 'frozen_graft'\. Did you mean 'frozen-graft'\?"):
        LivingMoeConfig.from_backbone(MixtralConfig(**SMALL), preset="frozen_graft")
