"""Policies: each reads vitals and proposes events. Register one under the name `lifecycle.policy` gives it."""

from __future__ import annotations

from collections.abc import Callable

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import LifecycleConfig, did_you_mean
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.planner import Proposal
from living_moe.modeling_living_moe.lifecycle.policies.load import propose_by_load

#: Called for every living layer at each decision, on every rank alike; may advance the layer's hysteresis counters.
Policy = Callable[[LivingMoeBlock, LifecycleConfig], list[Proposal]]

POLICIES: dict[str, Policy] = {"load": propose_by_load}


def policy_named(name: str) -> Policy:
    if name not in POLICIES:
        raise ConfigurationError(f"unknown lifecycle.policy {name!r}.{did_you_mean(name, POLICIES)}")
    return POLICIES[name]


__all__ = ["POLICIES", "Policy", "policy_named"]
