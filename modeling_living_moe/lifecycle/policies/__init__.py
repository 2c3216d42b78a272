"""Policies: each reads vitals and proposes events. Register one under the name `lifecycle.policy` gives it."""

from __future__ import annotations

from collections.abc import Callable

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import LifecycleConfig, did_you_mean
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.lifecycle.policies.circumstances import Circumstances
from living_moe.modeling_living_moe.lifecycle.policies.darwinian import propose_darwinian
from living_moe.modeling_living_moe.lifecycle.policies.load import propose_by_load
from living_moe.modeling_living_moe.lifecycle.policies.self_preservation import propose_self_preserving
from living_moe.modeling_living_moe.lifecycle.policies.synaptic_health import propose_by_health

#: Called for every living layer at each decision, on every rank alike; may advance the layer's hysteresis counters.
Policy = Callable[[LivingMoeBlock, LifecycleConfig, Circumstances], list[Proposal]]

POLICIES: dict[str, Policy] = {
    "load": propose_by_load,
    "self_preservation": propose_self_preserving,
    "darwinian": propose_darwinian,
    "synaptic_health": propose_by_health,
}


def policy_named(name: str) -> Policy:
    if name not in POLICIES:
        raise ConfigurationError(f"unknown lifecycle.policy {name!r}.{did_you_mean(name, POLICIES)}")
    return POLICIES[name]


__all__ = ["POLICIES", "Circumstances", "Policy", "policy_named"]
