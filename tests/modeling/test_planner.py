"""The planner keeps what the limits allow, the most urgent first, alike whatever order the proposals come in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from living_moe.configuration import LifecycleConfig
from living_moe.modeling_living_moe.lifecycle.operations import Reason
from living_moe.modeling_living_moe.lifecycle.planner import LayerState, Proposal, plan

NOW = Reason("load", 2.0, 1.6)


def proposal(kind: str, layer: int, *uids: int, urgency: float = 1.0) -> Proposal:
    return Proposal(kind, layer, uids, NOW, urgency)


def layers(*experts: int, rested: int = 1000) -> list[LayerState]:
    return [LayerState(experts=count, top_k=2, steps_since_event=rested) for count in experts]


def drawn(kind: str, layer: int, uid: int, urgency: float) -> Proposal:
    cost = {"split": 100, "merge": 60 * (uid % 3 - 1)}.get(kind, 0)
    return Proposal(kind, layer, (uid, uid + 1) if kind == "merge" else (uid,), NOW, urgency, added_bytes=cost)


proposals = st.lists(
    st.builds(
        drawn,
        st.sampled_from(["split", "death", "merge", "freeze", "thaw"]),
        st.integers(0, 2),
        st.integers(0, 9),
        st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    ),
    max_size=20,
)


@given(
    wanted=proposals,
    counts=st.tuples(*[st.integers(3, 12)] * 3),
    rested=st.tuples(*[st.sampled_from([0, 9, 10, 99])] * 3),
    max_events=st.integers(1, 6),
    max_experts=st.sampled_from([None, 8, 12]),
    min_experts=st.sampled_from([None, 2, 6]),
    memory=st.sampled_from([None, -50, 0, 250]),
    random=st.randoms(use_true_random=False),
)
def test_a_plan_keeps_every_limit_and_does_not_depend_on_the_order(
    wanted: list[Proposal],
    counts: tuple[int, ...],
    rested: tuple[int, ...],
    max_events: int,
    max_experts: int | None,
    min_experts: int | None,
    memory: int | None,
    random: object,
) -> None:
    config = LifecycleConfig(max_events_per_step=max_events, max_experts=max_experts, min_experts=min_experts)
    states = [LayerState(experts=n, top_k=2, steps_since_event=r) for n, r in zip(counts, rested, strict=True)]
    chosen = plan(wanted, states, config, memory)
    assert len(chosen) <= max_events and all(each in wanted for each in chosen)
    assert [each.urgency for each in chosen] == sorted((each.urgency for each in chosen), reverse=True)
    assert all(rested[each.layer] >= config.cooldown_steps for each in chosen)
    touched = [(each.layer, uid) for each in chosen for uid in each.uids]
    assert len(set(touched)) == len(touched), "an expert has two events in one step"
    for number, each in enumerate(chosen if memory is not None else ()):
        spent = sum(earlier.added_bytes for earlier in chosen[: number + 1])
        assert each.added_bytes <= 0 or spent <= memory
    for layer, before in enumerate(counts):
        count = before
        for each in (each for each in chosen if each.layer == layer):
            count += {"split": 1, "death": -1, "merge": -1}.get(each.kind, 0)
            assert each.kind != "split" or max_experts is None or count <= max_experts
            assert each.kind not in ("death", "merge") or count >= (3 if min_experts is None else min_experts)
    shuffled = list(wanted)
    random.shuffle(shuffled)
    assert plan(shuffled, states, config, memory) == chosen


def test_the_most_urgent_come_first_across_layers_and_ties_go_by_layer_and_uid() -> None:
    wanted = [
        proposal("split", 1, 4, urgency=2.0),
        proposal("split", 0, 7, urgency=2.0),
        proposal("split", 0, 3, urgency=2.0),
        proposal("death", 1, 2, urgency=9.0),
        proposal("split", 0, 1, urgency=0.1),
    ]
    chosen = plan(wanted, layers(8, 8), LifecycleConfig(max_events_per_step=4), None)
    assert [(each.layer, *each.uids) for each in chosen] == [(1, 2), (0, 3), (0, 7), (1, 4)]


def test_what_does_not_fit_makes_room_for_what_does() -> None:
    wanted = [proposal("split", 0, 1, urgency=3.0), proposal("split", 1, 1, urgency=2.0)]
    chosen = plan(wanted, layers(8, 4), LifecycleConfig(max_experts=8, max_events_per_step=1), None)
    assert [each.layer for each in chosen] == [1]


def test_an_expert_that_splits_does_not_die_in_the_same_step() -> None:
    wanted = [proposal("split", 0, 5, urgency=2.0), proposal("death", 0, 5, urgency=1.0)]
    assert [each.kind for each in plan(wanted, layers(8), LifecycleConfig(), None)] == ["split"]


@pytest.mark.parametrize(("rested", "planned"), [(9, 0), (10, 1)])
def test_a_layer_rests_after_an_event(rested: int, planned: int) -> None:
    assert len(plan([proposal("split", 0, 1)], layers(8, rested=rested), LifecycleConfig(), None)) == planned


@pytest.mark.parametrize(
    ("births", "allowed"),
    [
        ({}, True),
        ({5: (1, 499)}, False),  # parent and newborn
        ({5: (1, 500)}, True),
        ({1: (5, 3)}, False),
        ({1: (3, 800), 5: (3, 499)}, False),  # both of one parent
        ({1: (3, 800), 5: (3, 500)}, True),
        ({1: (3, 2), 5: (4, 2)}, True),  # of different parents
    ],
)
def test_siblings_do_not_merge_back_for_a_while(births: dict[int, tuple[int, int]], allowed: bool) -> None:
    state = LayerState(experts=8, top_k=2, steps_since_event=1000, births=births)
    config = LifecycleConfig(sibling_merge_bar_steps=500)
    assert bool(plan([proposal("merge", 0, 1, 5)], [state], config, None)) == allowed
    assert bool(plan([proposal("merge", 0, 8, 1, 5)], [state], config, None)) == allowed


def test_deaths_of_one_step_together_displace_no_more_than_one_may() -> None:
    config = LifecycleConfig(death_load=0.02)
    loads = [0.015, 0.004, 0.006, 0.0]
    wanted = [Proposal("death", n % 2, (n,), NOW, 1.0 - load / 0.02, load) for n, load in enumerate(loads)]
    chosen = plan(wanted, layers(8, 8), config, None)
    assert [proposal.uids for proposal in chosen] == [(3,), (1,), (2,)]
