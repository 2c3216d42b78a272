"""Presets: named choices of the sections, for the ways a graft usually lives.

A preset is a starting point, never a mode: its name is recorded in the config, its values are written out like any
others, and nothing but the sections is read afterwards. Overrides come in one form, a dict per section:
`lifecycle={"interval": 5}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import SECTIONS, TrainableConfig, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A name, what it is for, and the values it sets; every other field keeps its section's default."""

    name: str
    description: str
    sections: Mapping[str, Mapping[str, Any]]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="frozen-graft",
            description="Pretrained experts, their keys and everything around them are frozen. Newborns learn in "
            "receptive fields of their own, so text of the old domain flows through the old function untouched.",
            sections={
                "experts": {"freeze_pretrained": True},
                "trainable": dict.fromkeys(TrainableConfig.field_names(), False) | {"keys": True},
                "receptive_field": {"enabled": True},
                "lifecycle": {
                    "policy": "self_preservation",
                    # A birth cannot hurt the old function and nothing is learned before it: whole layers may give birth
                    # at once, and need no rest.
                    "max_events_per_step": 64,
                    "cooldown_steps": 0,
                    # Old experts are in demand by new text and give birth for that. More splits within a field have won
                    # nothing (`benchmarks/continual.py`).
                    "split_load": 4.0,
                },
            },
        ),
        Preset(
            name="some",
            description="A library of frozen experts, pretrained or random. What learns is how they are reached: query "
            "networks and keys, with embeddings, attention, norms and head; and keys also move without gradients.",
            sections={
                "router": {"query_network": "mlp"},
                "experts": {"freeze_pretrained": True, "init_gain": 1.0},
                "trainable": {"mlps": False},
                "plasticity": {"enabled": True, "pull": "direction"},
                "lifecycle": {"enabled": False},
            },
        ),
        Preset(
            name="microexperts",
            description="The population grows, consolidates and forgets by local rules: whoever is being overwritten "
            "splits and protects itself, fragments merge into wider experts, the starved die. Tokens take as many "
            "experts as they need. Everything trains; it may start from one expert per layer.",
            sections={
                "router": {"selection": "top_any"},
                "experts": {"freeze_pretrained": False, "max_tier": 2},
                "lifecycle": {"policy": "self_preservation"},
            },
        ),
        Preset(
            name="ouroboros",
            description="Selection by vitality, of load and gradient: the overloaded split into mutants, the starved "
            "die, and the population grows only while the loss pays for it. Tokens find experts by cosine in a latent "
            "space, at a learned temperature. Everything trains.",
            sections={
                "router": {
                    "query_network": "linear",
                    "similarity": "cosine",
                    "temperature": 0.1,
                    "learn_temperature": True,
                },
                "experts": {"freeze_pretrained": False},
                # Vitality is half gradient, so a decision should not go by an old one.
                "vitals": {"grad_norm_every": 10},
                "lifecycle": {
                    "policy": "darwinian",
                    "split_load": 1.4,
                    "death_load": 0.05,
                    "patience": 3,
                    "noise_std": 0.05,
                    "cap_improvement": 0.005,
                },
            },
        ),
        Preset(
            name="synaptic-router",
            description="As grow, and routers have synapses: experts tire and are primed along a text, in ways that "
            "are learned. A graft starts exact.",
            sections={"synapse": {"router": True}},
        ),
        Preset(
            name="synaptic-full",
            description="As synaptic-router; keys of attention tire too, and experts have fast weights beside the slow "
            "ones. The healthy that have too much to do split, the sick die, the weak and alike merge; what releases "
            "cost weighs on the loss.",
            sections={
                "synapse": {
                    "router": True,
                    "attention": True,
                    "postsynaptic": True,
                    "energy_loss_coef": 0.01,
                    "pool_loss_coef": 0.01,
                },
                # Who serves together is pulled together and others are pushed apart; queries pull nobody. No
                # inertia: after some thousand hits nothing would pull anybody.
                "plasticity": {
                    "enabled": True,
                    "use_alpha": False,
                    "use_decay": False,
                    "use_inertia": False,
                    "beta": 1e-5,
                    "contrast": 0.002,
                },
                "lifecycle": {"policy": "synaptic_health"},
            },
        ),
        Preset(
            name="grow",
            description="Everything trains and the population is free: the overloaded split, the starved die.",
            sections={
                "experts": {"freeze_pretrained": False},
                "receptive_field": {"enabled": False},
            },
        ),
    )
}


def known_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigurationError: There is none; the message names the closest one.
    """
    if name not in PRESETS:
        raise ConfigurationError(f"unknown preset {name!r}.{did_you_mean(str(name), PRESETS)}")
    return PRESETS[name]


def preset_sections(name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """All sections of a preset, complete and checked one by one.

    Args:
        name: A key of `PRESETS`.
        overrides: Per section name, a dict of the fields to set otherwise.

    Returns:
        Per section name, all its fields.

    Raises:
        ConfigurationError: The preset, a section or a field is unknown, or a value makes no sense.
    """
    preset = known_preset(name)
    overrides = overrides or {}
    for key, value in overrides.items():
        if key not in SECTIONS:
            raise ConfigurationError(_unknown_override(key, value))
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"override {key} must be a dict of the fields to change, got {value!r}.")
    return {
        section: cls.from_value({**preset.sections.get(section, {}), **overrides.get(section, {})}).to_dict()
        for section, cls in SECTIONS.items()
    }


def _unknown_override(key: str, value: Any) -> str:
    """The message for an override that is no section; a field given flat or dotted is shown in its section."""
    field = re.split(r"__|\.", key)[-1]
    owners = [section for section, cls in SECTIONS.items() if field in cls.field_names()]
    if owners:
        hint = " Did you mean " + " or ".join(f"{owner}={{{field!r}: {value!r}}}" for owner in owners) + "?"
    else:
        hint = did_you_mean(key, SECTIONS)
    return f"unknown override {key!r}; overrides are one dict per section.{hint}"
