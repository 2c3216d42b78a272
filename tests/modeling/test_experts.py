"""Slabs and pools: one slab is the source's experts; two slabs compute what one would, under every implementation."""

import pytest
import torch
from factories import HIDDEN, living_model, mixed_text, source_config
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from living_moe.configuration.errors import PopulationError
from living_moe.modeling_living_moe.experts import ExpertPool, ExpertSlab, unwrapped

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "active")
TOKENS, TOP_K = 14, 2


def new_pool(capacities: dict[str, int], implementation: str) -> ExpertPool:
    config = source_config("mixtral")
    config._experts_implementation = implementation
    pool = ExpertPool(config, capacities, HIDDEN, 16)
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    return pool


def routed(experts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
    return torch.randn(TOKENS, HIDDEN, generator=generator), index_TK, weights_TK


def naive(pool: ExpertPool, alive: dict[str, int], hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """One pair at a time."""
    rows = [(pool.slab(name), row) for name, count in alive.items() for row in range(count)]
    outputs = []
    for hidden, index, weights in zip(hidden_TH, index_TK.tolist(), weights_TK, strict=True):
        output = torch.zeros(HIDDEN)
        for place, expert in enumerate(index):
            slab, row = rows[expert]
            gate, up = (slab.gate_up_proj[row] @ hidden).chunk(2)
            output = output + weights[place] * (slab.down_proj[row] @ (nn.functional.silu(gate) * up))
        outputs.append(output)
    return torch.stack(outputs)


POOLS = {
    "one slab": ({"trainable": 6}, {"trainable": 6}),
    "one slab with spare rows": ({"trainable": 9}, {"trainable": 6}),
    "two slabs": ({"frozen": 4, "trainable": 2}, {"frozen": 4, "trainable": 2}),
    "two slabs with spare rows": ({"frozen": 5, "trainable": 7}, {"frozen": 2, "trainable": 4}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", POOLS)
def test_a_pool_equals_one_pair_at_a_time_forward_and_backward(name: str, implementation: str) -> None:
    capacities, alive = POOLS[name]
    pool = new_pool(capacities, implementation)
    hidden_TH, index_TK, weights_TK = routed(6)
    found = []
    for run in (pool, lambda *inputs: naive(pool, inputs[3], *inputs[:3])):
        inputs = [hidden_TH.clone().requires_grad_(), index_TK, weights_TK.clone().requires_grad_()]
        pool.zero_grad()
        output = run(*inputs, alive)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
        gradients = [parameter.grad for parameter in pool.parameters() if parameter.requires_grad]
        found.append([output.detach(), inputs[0].grad, inputs[2].grad, *(g.clone() for g in gradients)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for slab in alive:
        if slab == "trainable":
            assert not pool.slab(slab).down_proj.grad[alive[slab] :].any(), "spare rows take no gradient"
        else:
            assert pool.slab(slab).down_proj.grad is None


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_slab_is_the_sources_experts_bit_for_bit(implementation: str) -> None:
    config = source_config("mixtral")
    config._experts_implementation = implementation
    theirs, ours = MixtralExperts(config), ExpertSlab(config, 8, HIDDEN, 16, trainable=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    inputs = routed(8)
    assert torch.equal(ours(*inputs), theirs(*inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_may_serve_a_token_twice(implementation: str) -> None:
    """As the survivor of a merge does, for a token that chooses both its addresses."""
    alive = {"frozen": 2, "trainable": 2}
    pool = new_pool(alive, implementation)
    hidden_TH, _, weights_TK = routed(4)
    index_TK = torch.tensor([[1, 1], [3, 3], [0, 3]]).repeat(5, 1)[:TOKENS]
    expected = naive(pool, alive, hidden_TH, index_TK, weights_TK)
    torch.testing.assert_close(pool(hidden_TH, index_TK, weights_TK, alive), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_slab_without_a_token_still_gets_a_zero_gradient(implementation: str) -> None:
    """DistributedDataParallel waits for a gradient of every parameter on every rank."""
    alive = {"frozen": 3, "trainable": 3}
    pool = new_pool(alive, implementation)
    hidden_TH, index_TK, weights_TK = routed(3)
    hidden_TH.requires_grad_()
    output = pool(hidden_TH, index_TK, weights_TK, alive)
    output.backward(torch.ones_like(output))
    for parameter in pool.slab("trainable").parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    torch.testing.assert_close(output, naive(pool, alive, hidden_TH, index_TK, weights_TK), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_in_spare_rows_is_never_used(implementation: str) -> None:
    alive = {"frozen": 3, "trainable": 3}
    pool = new_pool({"frozen": 5, "trainable": 6}, implementation)
    inputs = routed(6)
    before = pool(*inputs, alive)
    for slab in ("frozen", "trainable"):
        for parameter in pool.slab(slab).parameters():
            parameter.data[3:] = 1e3
    assert torch.equal(pool(*inputs, alive), before)


def test_slabs_are_listed_in_slot_order_whenever_they_came() -> None:
    pool = new_pool({"trainable": 2}, "eager")
    pool.add_module("frozen", pool.new_slab("frozen", 3))
    assert [name for name, _ in pool.named_children()] == ["frozen", "trainable"]
    assert not pool.slab("frozen").down_proj.requires_grad and pool.slab("trainable").down_proj.requires_grad


def test_new_slabs_are_empty_never_uninitialised() -> None:
    slab = ExpertSlab(source_config("mixtral"), 3, 8, 4, trainable=True)
    assert not any(parameter.any() for parameter in slab.parameters())


def test_all_slabs_follow_the_models_experts_implementation() -> None:
    model = living_model("mixtral", experts="eager")
    model.freeze_expert(0, 2)  # a slab made after the model was
    for implementation in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        slabs = [module for module in model.modules() if isinstance(module, ExpertSlab)]
        assert len(slabs) == 3
        assert {slab.config._experts_implementation for slab in slabs} == {implementation}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_on_experts_trains_and_refuses_events_that_would_change_its_slab() -> None:
    from peft import LoraConfig, get_peft_model

    model = living_model("mixtral")
    uids = model.expert_uids(0)
    names = ["experts.trainable.gate_up_proj", "experts.trainable.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)
    wrapped = get_peft_model(model, config)
    ids = mixed_text(2, 6)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert unwrapped(model.living_blocks[0].experts.get_submodule("trainable")) is not None
    for event in (model.split_expert, model.remove_expert, model.freeze_expert):
        with pytest.raises(PopulationError, match="wrapped by PEFT.*merge_and_unload"):
            event(0, 3)
    assert model.expert_uids(0) == uids and len(model.lineage) == 0
    merged = wrapped.merge_and_unload()
    merged.split_expert(0, 3)
    assert merged.expert_counts == [9, 8]
