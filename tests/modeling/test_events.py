"""An event happens completely and is recorded, or is refused with the remedy and nothing has changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import check_invariants, drift, living_model, logits, mixed_text, source_model
from torch.optim import SGD, AdamW

from living_moe import LifecycleEvent, LivingMoeForCausalLM
from living_moe.configuration.errors import CheckpointError, OptimizerError, PopulationError, UnknownExpertError
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.lineage import Lineage
from living_moe.modeling_living_moe.lifecycle.surgery import LayerDraft

IDS = mixed_text(2, 8)


def everything(model: LivingMoeForCausalLM) -> dict[str, Any]:
    """All that an event may touch: identities of parameters, contents of tensors, records."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "lineage": list(model.lineage),
        "populations": copy.deepcopy(model.config.populations),
        "uids": [model.expert_uids(layer) for layer in range(len(model.expert_counts))],
        "pending": [block.vitals.pending.clone() for block in model.living_blocks],
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    if isinstance(before, list):
        return len(before) == len(after) and all(same(a, b) for a, b in zip(before, after, strict=True))
    return bool(before == after)


def in_training(family: str = "mixtral", preset: str = "grow", **options: Any) -> LivingMoeForCausalLM:
    """With gradients, pending vitals, a sample, a tombstone and spare slots."""
    model = living_model(family, preset, **options).train()
    newborn = model.split_expert(0, 4).children[0]
    model.split_expert(0, newborn)
    drift(model, 0)
    model.remove_expert(0, newborn)
    model(IDS, labels=IDS).loss.backward()
    return model


# -- refusals ----------------------------------------------------------------------------------------------------------

Attempt = Callable[[LivingMoeForCausalLM], Any]
REFUSED: dict[str, tuple[Attempt, type[PopulationError], str]] = {
    "unknown uid": (lambda m: m.split_expert(0, 77), UnknownExpertError, "layer 0.*77.*never existed.*alive uids"),
    "dead uid": (lambda m: m.remove_expert(0, 8), UnknownExpertError, "layer 0.*uid 8 is dead"),
    "uid of a tombstone": (lambda m: m.thaw_expert(0, 8), UnknownExpertError, "is dead"),
    "merge with an unknown uid": (lambda m: m.merge_experts(0, [1, 77]), UnknownExpertError, "77"),
    "merge with oneself": (lambda m: m.merge_experts(0, [3, 3]), PopulationError, "two different uids, got .3, 3"),
    "merge of one": (lambda m: m.merge_experts(0, [3]), PopulationError, "two different uids"),
    "merge of a number": (lambda m: m.merge_experts(0, 3), PopulationError, "two different uids"),
    "no such layer": (lambda m: m.split_expert(2, 1), PopulationError, r"layer 2.*layers 0\.\.1"),
    "a negative layer": (lambda m: m.remove_expert(-1, 1), PopulationError, "layer -1"),
    "a merge across layers": (
        lambda m: m.merge_experts((0, 1), [1, 2]), PopulationError, "an event stays within one"
    ),
    "freeze what is frozen": (
        lambda m: (m.freeze_expert(1, 2), m.freeze_expert(1, 2)), PopulationError, "uid 2 is frozen already"
    ),
    "thaw what trains": (lambda m: m.thaw_expert(0, 2), PopulationError, "uid 2 is trainable already"),
    "negative noise": (lambda m: m.split_expert(0, 1, noise_std=-0.1), PopulationError, "noise_std must be >= 0"),
    "part what is alone": (lambda m: m.part_clade(0, 1), PopulationError, "shares its clade with nobody"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(name: str) -> None:
    attempt, error, message = REFUSED[name]
    model = in_training()
    before = everything(model)
    with pytest.raises(error, match=message) as caught:
        attempt(model)
    assert isinstance(caught.value, ValueError)
    if name != "freeze what is frozen":
        assert same(before, everything(model))


@pytest.mark.parametrize(
    ("family", "overrides", "left"),
    [
        ("mixtral", {}, 2),
        ("qwen3_moe", dict(num_experts_per_tok=3), 3),
        # One of two groups is open: each must keep enough for top-2.
        ("deepseek_v3", {}, 4),
        ("deepseek_v3", dict(n_group=4, topk_group=2, n_routed_experts=12, num_experts_per_tok=3), 6),
    ],
)
def test_a_death_below_top_k_is_refused(family: str, overrides: dict[str, Any], left: int) -> None:
    model = living_model(family, **overrides)
    refused = ""
    for uid in model.expert_uids(0):
        before = model.expert_uids(0)
        try:
            model.remove_expert(0, uid)
        except PopulationError as error:
            refused = str(error)
            assert model.expert_uids(0) == before
    assert model.expert_counts[0] >= left and "top_k" in refused and "lifecycle.min_experts" in refused
    assert logits(model, IDS).isfinite().all()


def test_a_merge_that_leaves_fewer_experts_than_top_k_is_refused() -> None:
    model = living_model("mixtral", num_experts_per_tok=3)
    model.merge_experts(0, [0, 1, 2, 3])
    model.merge_experts(0, [4, 5, 6])
    with pytest.raises(PopulationError, match="top_k is 3"):
        model.merge_experts(0, [0, 4])
    assert model.expert_uids(0) == [0, 7, 4] or set(model.expert_uids(0)) == {0, 4, 7}
    assert logits(model, IDS).isfinite().all()


def test_a_split_beyond_the_most_experts_is_refused() -> None:
    model = living_model("mixtral", sections={"lifecycle": {"max_experts": 9}})
    model.split_expert(0, 1)
    with pytest.raises(PopulationError, match="layer 0: a split would make 10 experts but lifecycle.max_experts is 9"):
        model.split_expert(0, 1)
    assert model.expert_counts == [9, 8]
    model.split_expert(1, 1)


def test_a_split_beyond_the_memory_budget_is_refused() -> None:
    one = 4 * 3 * 32 * 16 / 2**20
    model = living_model("mixtral", sections={"experts": {"memory_budget_mib": 17.5 * one}})
    model.split_expert(0, 1)
    with pytest.raises(PopulationError, match=r"0\.1 MiB but experts.memory_budget_mib is 0\.1"):
        model.split_expert(1, 1)
    model.remove_expert(0, 5)
    model.split_expert(1, 1)
    assert model.expert_counts == [8, 9]


# -- all or nothing ----------------------------------------------------------------------------------------------------

EVENTS: dict[str, Attempt] = {
    "split": lambda m: m.split_expert(0, 4),
    "split of the frozen": lambda m: m.split_expert(0, 2),
    "merge": lambda m: m.merge_experts(0, [1, 4, 9]),
    "death": lambda m: m.remove_expert(0, 9),
    "freeze or thaw": lambda m: (m.thaw_expert if m.config.preset == "frozen-graft" else m.freeze_expert)(0, 4),
}


@pytest.mark.parametrize("stage", ["_stage_tables", "_stage_leaves", "_stage_tombstones", "_stage_parameters"])
@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("name", EVENTS)
def test_a_failure_while_staging_changes_nothing(
    name: str, preset: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_training("deepseek_v3", preset)
    before = everything(model)
    original = getattr(LayerDraft, stage)

    def fail(draft: LayerDraft, *args: Any) -> None:
        original(draft, *args)
        raise MemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(LayerDraft, stage, fail)
        with pytest.raises(MemoryError):
            EVENTS[name](model)
    assert same(before, everything(model))
    EVENTS[name](model)
    assert not same(before, everything(model))
    check_invariants(model)


@pytest.mark.parametrize("name", EVENTS)
def test_an_optimizer_nobody_can_operate_on_is_refused_before_anything_changes(name: str) -> None:
    class Strange(SGD):
        def __init__(self, parameters: Any):
            super().__init__(parameters, lr=0.1)

    model = in_training("mixtral")
    optimizer = Strange(list(model.parameters())[:1])
    before = everything(model)
    with pytest.raises(OptimizerError):
        EVENTS[name].__call__(_WithOptimizer(model, optimizer))
    assert same(before, everything(model))


class _WithOptimizer:
    """A model whose events are passed an optimizer."""

    def __init__(self, model: LivingMoeForCausalLM, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.model, name)
        return found if name == "config" else lambda *args: found(*args, optimizer=self.optimizer)


def test_an_optimizer_built_before_a_slab_grew_cannot_step() -> None:
    model = living_model("mixtral").train()
    optimizer = AdamW(model.parameters(), lr=0.1)
    model.split_expert(0, 3)
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(OptimizerError, match="built before a slab changed its capacity.*Pass optimizer= to the event"):
        optimizer.step()
    AdamW(model.parameters(), lr=0.1).step()


# -- what an event does ------------------------------------------------------------------------------------------------


def test_events_say_what_happened_and_are_appended_to_the_lineage() -> None:
    model = living_model("mixtral").train()
    for _ in range(3):
        model(IDS)
        model.lifecycle_step()
    events = [
        model.split_expert(0, 3, noise_std=0.1),
        model.merge_experts(1, [4, 2]),
        model.freeze_expert(0, 5),
        model.thaw_expert(0, 5),
        model.remove_expert(0, 1),
        model.part_clade(0, 3),
    ]
    assert [(e.kind, e.layer, e.parents, e.children) for e in events] == [
        ("split", 0, (3,), (8,)),
        ("merge", 1, (4, 2), (4,)),
        ("freeze", 0, (5,), (5,)),
        ("thaw", 0, (5,), (5,)),
        ("death", 0, (1,), ()),
        ("part", 0, (3, 8), (3, 8)),
    ]
    assert {(e.step, e.metric) for e in events} == {(3, "request")} and events[0].noise_std == 0.1
    assert [event for event in model.lineage if event.kind not in ("grow", "shrink")] == events
    assert model.lineage.counts()["split"] == 1


def test_a_merge_is_the_mean_of_its_parents_weighted_by_load() -> None:
    model = living_model("mixtral")
    block = model.living_blocks[0]
    block.vitals.table("trainable").load[:8] = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    slab = block.experts.slab("trainable")
    # No unit is nearer to another's than to its own: nothing to match.
    slab.down_proj.data[7] = slab.down_proj.data[1] * 0.5
    slab.gate_up_proj.data[7] = slab.gate_up_proj.data[1]
    expected = (0.75 * slab.down_proj[1] + 0.25 * slab.down_proj[1] * 2).detach()
    slab.gate_up_proj.data[0], slab.down_proj.data[0] = slab.gate_up_proj.data[1], slab.down_proj.data[1] * 2
    key = block.router.keys["trainable"].detach().clone()
    model.merge_experts(0, [1, 0])
    row = model.expert_uids(0).index(1)
    torch.testing.assert_close(slab.down_proj[row], expected)
    assert torch.equal(block.router.keys["trainable"][row], key[1]), "of another clade: its address stays its own"
    model.merge_experts(0, [1, 7])
    # The third has no load, hence no weight.
    torch.testing.assert_close(slab.down_proj[model.expert_uids(0).index(1)], expected)


def test_parted_siblings_become_clades_that_compete() -> None:
    model = living_model("mixtral")
    newborn = model.split_expert(0, 3).children[0]
    drift(model, 0)
    model.part_clade(0, newborn)
    population = model.living_blocks[0].population
    assert {m.uid: m.clade for m in population.members}[3] == 3
    assert {m.uid: m.clade for m in population.members}[newborn] == newborn
    assert not population.leaves and len(population.facet_offset) == 0
    assert population.num_open() == 9
    check_invariants(model)


def test_slabs_grow_geometrically_and_give_memory_back() -> None:
    model = living_model("mixtral", num_local_experts=8)
    capacities = []
    for _ in range(12):
        model.split_expert(0, model.expert_uids(0)[0])
        capacities.append(model.living_blocks[0].capacities()["trainable"])
    assert capacities == [12] * 4 + [18] * 6 + [27] * 2
    for uid in model.expert_uids(0)[3:]:
        model.remove_expert(0, uid)
    block = model.living_blocks[0]
    assert model.expert_counts[0] == 3 and block.capacities()["trainable"] <= 6
    assert block.experts.slab("trainable").down_proj.shape[0] == block.capacities()["trainable"]
    kinds = [event.kind for event in model.lineage if event.layer == 0]
    assert kinds.count("grow") == 3 and kinds.count("shrink") >= 1
    check_invariants(model)


def test_events_inside_capacity_keep_the_parameters_themselves() -> None:
    model = living_model("mixtral")
    model.split_expert(0, 1)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.split_expert(0, 2)
    model.remove_expert(0, 3)
    model.merge_experts(0, [1, 2])
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_gradients_accumulated_before_an_event_follow_their_experts() -> None:
    model = living_model("mixtral").train()
    model(mixed_text(6, 12), labels=mixed_text(6, 12)).loss.backward()

    def by_uid(block: LivingMoeBlock) -> dict[int, torch.Tensor]:
        grad = block.experts.slab("trainable").gate_up_proj.grad
        return {m.uid: grad[m.row].clone() for m in block.population.members if m.slab == "trainable"}

    block = model.living_blocks[0]
    before = by_uid(block)
    newborn = model.split_expert(0, 2).children[0]  # grows the slab
    model.remove_expert(0, 1)  # moves the newborn
    model.freeze_expert(0, 5)
    after = by_uid(block)
    assert not after[newborn].any(), "a newborn starts without"
    for uid in (0, 3, 4, 6, 7):
        assert before[uid].any() and torch.equal(after[uid], before[uid])


def test_a_newborn_learns_from_its_first_step_and_so_does_its_parent() -> None:
    model = living_model("mixtral").train()
    newborn = model.split_expert(0, 2).children[0]
    optimizer = AdamW(model.parameters(), lr=0.01)
    ids = mixed_text(8, 16)
    model(ids, labels=ids).loss.backward()
    weights = model.living_blocks[0].experts.slab("trainable").down_proj
    row = model.expert_uids(0).index(newborn)
    assert torch.equal(weights[row], weights[2])
    optimizer.step()
    assert not torch.equal(weights[row], weights[2])


def test_frozen_experts_do_not_move_whatever_the_optimizer() -> None:
    model = living_model("mixtral", "frozen-graft").train()
    model.split_expert(0, 2)
    before = [p.detach().clone() for p in model.living_blocks[0].experts.slab("frozen").parameters()]
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    ids = mixed_text(8, 16)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    after = model.living_blocks[0].experts.slab("frozen").parameters()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_old_text_is_served_by_the_source_alone_whatever_the_newborns_learned() -> None:
    from factories import old_text

    source, model = source_model("mixtral"), living_model("mixtral", "frozen-graft")
    for layer in range(2):
        for uid in range(8):
            model.split_expert(layer, uid)
    drift(model, 0, std=1.0)
    ids = old_text(24)[None]
    assert not model.model.fields(ids).any_open()
    assert torch.equal(logits(model, ids), logits(source, ids))
    assert not torch.equal(logits(model, IDS), logits(source, IDS))


# -- the record --------------------------------------------------------------------------------------------------------


def test_an_event_survives_its_line() -> None:
    model = living_model("mixtral")
    event = model.split_expert(0, 3, noise_std=0.25)
    assert LifecycleEvent.from_dict(event.to_dict()) == event
    for broken in ({**event.to_dict(), "kind": "birth"}, {**event.to_dict(), "colour": 1}, {"kind": "split"}, 3):
        with pytest.raises(CheckpointError):
            LifecycleEvent.from_dict(broken)


def test_a_lineage_is_a_sequence() -> None:
    model = living_model("mixtral")
    for uid in range(3):
        model.split_expert(0, uid)
    lineage = model.lineage
    assert len(lineage) == 4 and lineage[0].kind == "grow" and [e.kind for e in lineage[1:]] == ["split"] * 3
    assert lineage == Lineage(list(lineage)) and lineage != Lineage()


def test_the_same_event_draws_the_same_noise_and_facet() -> None:
    first, second = living_model("mixtral"), living_model("mixtral")
    assert first.split_expert(0, 3, noise_std=0.3) == second.split_expert(0, 3, noise_std=0.3)
    first_state, second_state = first.state_dict(), second.state_dict()
    assert all(torch.equal(first_state[name], second_state[name]) for name in first_state)
