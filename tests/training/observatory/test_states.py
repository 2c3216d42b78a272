"""An expert's state follows the thresholds of the run's own policy."""

from typing import Any

import numpy as np
import pytest

from living_moe.configuration.sections import LifecycleConfig
from living_moe.training.observatory.states import STATES, lifecycle_of, states_of
from living_moe.training.observatory.vitals_log import Snapshot

LIMITS = LifecycleConfig(split_load=1.5, death_load=0.1, min_age_steps=20)


def snapshot(**columns: Any) -> Snapshot:
    size = len(columns["load"])
    given = {"uid": np.arange(size), "clade": np.arange(size), "parent": np.full(size, -1)}
    return Snapshot(100, np.zeros(size, np.int32), given | {name: np.array(value) for name, value in columns.items()})


def names(found: Any) -> list[str]:
    return [STATES[state] for state in found]


def test_states_turn_at_the_policy_s_thresholds() -> None:
    load = [1.5, 1.51, 0.1, 0.099, 1.0]
    assert names(states_of(snapshot(load=load), LIMITS)) == ["healthy", "overloaded", "healthy", "starved", "healthy"]
    wider = LifecycleConfig(split_load=3.0, death_load=0.0)
    assert set(names(states_of(snapshot(load=load), wider))) == {"healthy"}


def test_a_newborn_is_one_until_the_policy_s_minimum_age_and_the_frozen_are_frozen_whatever_their_load() -> None:
    found = states_of(
        snapshot(load=[9.0, 9.0, 0.0, 0.0], parent=[0, 0, -1, 0], age=[19, 20, 3, 5], frozen=[0, 0, 0, 1]), LIMITS
    )
    assert names(found) == ["newborn", "overloaded", "starved", "frozen"]


def test_nobody_starves_before_anything_was_measured() -> None:
    assert names(states_of(snapshot(load=[0.0, 0.0], age=[0, 1]), LIMITS)) == ["healthy", "starved"]


def test_overload_is_of_a_clade_s_share_as_the_policy_has_it() -> None:
    # Four experts in two clades: a clade's uniform share is twice an expert's.
    load = [2.9, 3.1, 0.5, 0.5]
    assert names(states_of(snapshot(load=load, clade=[0, 1, 1, 0]), LIMITS))[:2] == ["healthy", "overloaded"]


@pytest.mark.parametrize(("policy", "state"), [("load", "healthy"), ("self_preservation", "overloaded")])
def test_who_is_being_overwritten_asks_for_a_split_under_self_preservation(policy: str, state: str) -> None:
    limits = LifecycleConfig(policy=policy)
    assert names(states_of(snapshot(load=[1.0], divergence=[0.06]), limits)) == [state]


def test_ages_follow_from_births_where_none_are_written() -> None:
    assert names(states_of(snapshot(load=[1.0, 1.0], parent=[0, 0], born=[80, 81]), LIMITS)) == ["healthy", "newborn"]


def test_thresholds_are_those_of_the_run_and_fields_of_other_versions_are_passed_over() -> None:
    assert lifecycle_of({"lifecycle": {"split_load": 2.5, "gone": 1}}).split_load == 2.5
    assert lifecycle_of({}) == LifecycleConfig()
