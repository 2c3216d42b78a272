"""One living block in any PyTorch model: the same events, surgery and state dicts as a living model's."""

import copy
import io
import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import StepLR
from torch.utils.checkpoint import checkpoint

from living_moe import LivingMoeBlock, LivingMoeError, StandaloneLivingMoe
from living_moe.configuration.errors import (
    CheckpointError,
    ConfigurationError,
    OptimizerError,
    PopulationError,
    TrainingDivergedError,
    UnknownExpertError,
)
from living_moe.modeling_living_moe.modeling_living_moe import LivingMoePreTrainedModel
from living_moe.modeling_living_moe.reference import reference_forward
from living_moe.training.optimizer_surgery import assert_partition
from living_moe.training.optimizers import LivingAdamW

H, WIDTH, EXPERTS, TOP_K = 24, 12, 6, 2
#: A lifecycle that acts every other step.
BUSY = dict(
    interval=2, warmup_steps=2, cooldown_steps=0, min_age_steps=4, patience=1, split_load=1.3, death_load=0.2,
    max_events_per_step=2, max_experts=12,
)  # fmt: skip
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: SGD(model.parameters(), lr=1e-1, momentum=0.9),
    "adafactor": lambda model: Adafactor(model.parameters(), lr=1e-2),
    "living_adamw": lambda model: LivingAdamW(model, lr=1e-2),
}


def new(seed: int = 0, **sections: Any) -> StandaloneLivingMoe:
    torch.manual_seed(seed)
    sections["lifecycle"] = {**BUSY, **sections.get("lifecycle", {})}
    sections["experts"] = {"max_tier": 1, **sections.get("experts", {})}
    return LivingMoeBlock.standalone(H, WIDTH, EXPERTS, TOP_K, **sections)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Of a skewed mixture of places, so that routers have something to prefer."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, H, generator=torch.Generator().manual_seed(99)) * 2
    which = torch.multinomial(torch.tensor([8.0, 4, 2, 1, 1]), 10**4, replacement=True, generator=generator)
    count = int(torch.tensor(shape).prod())
    return (centers[which[:count]] + torch.randn(count, H, generator=generator)).view(*shape, H)


def step(model: nn.Module, layers: list[StandaloneLivingMoe], optimizer: Optimizer, seed: int) -> float:
    x = tokens(4, 16, seed=seed)
    loss = (model(x) - torch.sin(x.roll(1, dims=-1) * x)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for layer in layers:
        layer.lifecycle_step(optimizer, loss=loss)
    return float(loss.detach())


def lived(events: int = 8, seed: int = 0, **sections: Any) -> StandaloneLivingMoe:
    """A block with a past: training steps, and random events among them."""
    layer = new(seed, **sections)
    optimizer, rng = AdamW(layer.parameters(), lr=1e-2), random.Random(seed)
    for number in range(events):
        step(layer, [layer], optimizer, number)
        uids = layer.expert_uids()
        rng.shuffle(uids)
        kind = rng.choice(["split", "split", "merge", "tier_up", "death", "freeze", "thaw"])
        try:
            if kind == "split":
                layer.split_expert(uids[0], noise_std=0.1, optimizer=optimizer)
            elif kind in ("merge", "tier_up"):
                layer.merge_experts(uids[:2], tier_up=kind == "tier_up", optimizer=optimizer)
            else:
                happen = {"death": layer.remove_expert, "freeze": layer.freeze_expert, "thaw": layer.thaw_expert}[kind]
                happen(uids[0], optimizer=optimizer)
        except PopulationError:
            continue
        assert_partition(optimizer, layer)
    return layer


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same(one: StandaloneLivingMoe, other: StandaloneLivingMoe) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.expert_uids() == other.expert_uids() and one.lineage == other.lineage
    assert one.lineage.counts() == other.lineage.counts() and one.steps_lived == other.steps_lived
    assert all(torch.equal(value, other.vitals()[name]) for name, value in one.vitals().items())
    assert torch.equal(one.vitality(), other.vitality())
    x = tokens(3, 5, seed=8)
    training = one.training, other.training
    assert torch.equal(one.eval()(x), other.eval()(x))
    one.train(training[0]), other.train(training[1])


# -- forward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4), (0,)])
def test_any_leading_shape_goes_in_and_comes_out(shape: tuple[int, ...]) -> None:
    layer, x = new().eval(), torch.randn(*shape, H)
    output = layer(x)
    assert output.shape == x.shape and output.dtype == x.dtype
    torch.testing.assert_close(output.reshape(-1, H), layer(x.reshape(-1, H)) if x.numel() else output.reshape(-1, H))


@pytest.mark.parametrize("sizes", [(10, 7), (16, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_sizes_work_in_any_precision(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    layer = LivingMoeBlock.standalone(*sizes, 4, 2).to(dtype)
    output = layer(torch.randn(5, sizes[0], dtype=dtype))
    output.float().square().mean().backward()
    assert output.isfinite().all() and output.dtype == dtype
    layer.split_expert(0)
    assert layer(torch.randn(5, sizes[0], dtype=dtype)).isfinite().all()


def test_it_is_no_transformers_model() -> None:
    model = nn.Sequential(nn.Linear(H, H), new())
    assert not any(isinstance(module, LivingMoePreTrainedModel) for module in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "active"])
def test_it_is_the_oracle_s_forward_and_backward(implementation: str) -> None:
    layer = lived(10, seed=3)
    layer.config.backbone_config._experts_implementation = implementation
    layer.block.router.learned_temperature.log_ratio.data.fill_(-0.3)
    block = layer.block
    x = tokens(12).requires_grad_()
    expected = reference_forward(block, x)
    slow = gradients(block, expected, x)
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    fast = gradients(block, output, x)
    assert slow.keys() == fast.keys() and slow["router.learned_temperature.log_ratio"] != 0
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-3, atol=1e-4)


def test_tokens_are_counted_in_training_only_and_without_padding() -> None:
    layer = new().eval()
    x = tokens(2, 8)
    layer(x)
    assert layer.block.vitals.pending is None
    layer.train()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :5] = False
    layer(x, mask)
    assert layer.block.vitals.pending is not None and layer.block.vitals.pending[0].sum() == TOP_K * 11
    assert layer.block.context is None


def test_recomputation_under_gradient_checkpointing_counts_once() -> None:
    layer = new()
    x = tokens(2, 8).requires_grad_()
    for reentrant in (False, True):
        layer.block.vitals.forget()
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert layer.block.vitals.pending is not None and layer.block.vitals.pending[0].sum() == TOP_K * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 4, 2), "d_model must be an int >= 1, got 0"),
        ((8, 8.0, 4, 2), "d_ff must be an int >= 1, got 8.0"),
        ((8, 8, 2, 3), "top_k is 3 but there are n_experts = 2"),
    ],
)
def test_senseless_sizes_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LivingMoeBlock.standalone(*arguments)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"preset": "frozen-graft"}, r"receptive_field\.enabled is True \(preset 'frozen-graft'\)"),
        ({"preset": "some"}, r"plasticity\.enabled is True"),
        ({"preset": "synaptic-router"}, r"synapse\.router is True \(preset 'synaptic-router'\)"),
        ({"synapse": {"attention": True}}, r"synapse\.attention is True"),
        ({"synapse": {"postsynaptic": True}}, r"synapse\.postsynaptic is True"),
        ({"preset": "ouroborus"}, "Did you mean 'ouroboros'"),
        ({"lifecycle": {"max_expert": 3}}, "Did you mean 'max_experts'"),
        ({"experts_implementation": "grouped"}, "Did you mean 'grouped_mm'"),
        ({"hidden_act": "prelu"}, "hidden_act is 'prelu', which has parameters of its own"),
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu'.*Did you mean 'silu'"),
        ({"lifecycle": {"policy": "darwinain"}}, "Did you mean 'darwinian'"),
        ({"lifecylce": {}}, "Did you mean 'lifecycle'"),
    ],
)
def test_what_it_cannot_be_is_refused(choices: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LivingMoeBlock.standalone(8, 8, 4, 2, **choices)


def test_grouped_mm_by_name_needs_the_sizes_its_kernels_need() -> None:
    with pytest.raises(ConfigurationError, match="multiples of 8, got d_model 8 and d_ff 12"):
        LivingMoeBlock.standalone(8, 12, 4, 2, experts_implementation="grouped_mm")


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.arange(2 * H).view(2, H), "torch.int64 of shape (2, 24)"),
        (torch.zeros(2, H, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(()), "torch.float32 of shape ()"),
        ([[0.0] * H], "list"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_floating_point_tensor_is_refused(x: Any, found: str) -> None:
    layer = new()
    with pytest.raises(ConfigurationError, match=re.escape(found)):
        layer(x)
    with pytest.raises(ConfigurationError, match="token_mask must be a bool tensor, got list"):
        layer(tokens(2), [True, True])
    assert layer.block.vitals.pending is None


@pytest.mark.parametrize("sizes", [(8, 8), (6, 10)])
def test_gradients_in_double_precision_are_those_of_finite_differences(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = LivingMoeBlock.standalone(*sizes, 3, 2).double()
    layer.split_expert(1)
    x = torch.randn(5, sizes[0], dtype=torch.float64, requires_grad=True)
    weights = [slot.parameter for slot in layer.slot_parameters()]
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *weights), eps=1e-6, atol=1e-7)
    fresh = LivingMoeBlock.standalone(*sizes, 3, 2)
    fresh.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(fresh.eval()(x), layer.eval()(x))
    assert layer.float()(x.detach().float()).dtype == torch.float32
    layer.config.backbone_config._experts_implementation = "eager"
    assert layer.double().config.backbone_config._experts_implementation == "eager", "what was chosen since stays"


def test_an_empty_batch_is_a_batch() -> None:
    layer, x = new(), torch.randn(0, H)
    out = layer(x)
    assert out is not x and out.shape == x.shape
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters() if p.requires_grad)
    assert layer.requires_grad_(False)(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_default_dtype_will_do(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = LivingMoeBlock.standalone(8, 8, 3, 2)
        x = torch.randn(9, 8)
        layer(x).sum().backward()
        layer.split_expert(0, noise_std=0.1)
        layer.remove_expert(1)
        assert layer(x).dtype == dtype
    finally:
        torch.set_default_dtype(before)
    fresh = LivingMoeBlock.standalone(8, 8, 3, 2)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert fresh.expert_uids() == layer.expert_uids()


@pytest.mark.parametrize("how", ["double", "default dtype"])
def test_a_block_in_double_precision_lives(how: str) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if how == "default dtype" else before)
    try:
        layer = new(vitals={"grad_norm_every": 2, "signals_every": 2, "phi_every": 2}).double()
        optimizer = AdamW(layer.parameters(), lr=1e-2)
        for number in range(30):
            x = tokens(64, seed=number).double()
            loss = (layer(x) - x.sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            layer.lifecycle_step(optimizer, loss=loss)
        layer.execute_systemic_lifecycle(optimizer)
    finally:
        torch.set_default_dtype(before)
    assert layer.steps_lived == 31 and layer.vitals()["grad_norm"].any() and len(list(layer.lineage)) > 2


def test_a_training_pass_in_inference_mode_spoils_none_after_it() -> None:
    layer, twin = (new(vitals={"signals_every": 1}, lifecycle={"enabled": False}) for _ in range(2))
    for each, mode in ((layer, torch.inference_mode), (twin, torch.no_grad)):
        for number in range(3):
            with mode():
                each(tokens(32, seed=10 + number))
            each(tokens(32, seed=number)).square().mean().backward()
            each.lifecycle_step()
    assert all(torch.equal(value, twin.vitals()[name]) for name, value in layer.vitals().items())


def test_inputs_of_another_size_are_refused() -> None:
    layer = new()
    with pytest.raises(ConfigurationError, match="the input has 5 features but d_model is 24"):
        layer(torch.randn(2, 5))
    with pytest.raises(ConfigurationError, match=r"token_mask has shape \(3,\)"):
        layer(torch.randn(2, H), torch.ones(3))


@pytest.mark.parametrize("real", ["all", "some", "none"])
def test_what_is_measured_on_samples_leaves_padding_out(real: str) -> None:
    """The same text with padding behind it, at every step of which everything is sampled."""
    every = {"signals_every": 1, "phi_every": 1, "grad_norm_every": 1}
    layers = [new(vitals=every, lifecycle={"enabled": False}) for _ in range(2)]
    x = tokens(2, 8)
    mask = {"all": 8, "some": 5, "none": 0}[real] > torch.arange(8).expand(2, -1)
    for number in range(3):
        padded = torch.where(mask[..., None], x, 1e4)
        layers[0](padded, token_mask=mask).masked_fill(~mask[..., None], 0).square().mean().backward()
        if mask.any():
            layers[1](x[mask]).square().sum().div(x.numel()).backward()
        for layer in layers:
            layer.lifecycle_step()
            layer.zero_grad()
        assert layers[0].clock.steps == number + 1
    for one, other in zip(*(layer.block.vitals.state_dict().items() for layer in layers), strict=True):
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-5, msg=one[0])


def test_with_one_place_the_router_learns() -> None:
    torch.manual_seed(0)
    layer = LivingMoeBlock.standalone(H, WIDTH, EXPERTS, 1)
    x = tokens(64)
    found = layer(x)
    torch.testing.assert_close(found, reference_forward(layer.block, x))
    found.square().mean().backward()
    for parameter in (layer.block.router.keys["trainable"], *layer.block.router.query.parameters()):
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4
    before = layer.eval()(x)
    layer.split_expert(2)
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


def test_a_loss_is_taken_as_it_is_told() -> None:
    """Whoever goes on adding to the tensor changes nothing; what is no single number is refused at once."""
    layers, log = [new() for _ in range(2)], torch.zeros(())
    for number in range(5):
        log.fill_(float(number))
        layers[0].lifecycle_step(loss=log)
        layers[1].lifecycle_step(loss=float(number))
        log.mul_(1000.0)
    assert torch.equal(layers[0].trend.slow, layers[1].trend.slow) and layers[0].trend.slow > 0
    steps = layers[0].steps_lived
    with pytest.raises(ConfigurationError, match=r"the loss has shape \(2,\)"):
        layers[0].lifecycle_step(loss=torch.ones(2))
    for wrong in ("1.0", 1 + 2j, True, [1.0]):
        with pytest.raises(ConfigurationError, match="the loss is"):
            layers[0].lifecycle_step(loss=wrong)  # type: ignore[arg-type]
    for diverged in (math.nan, -math.inf, torch.tensor(math.nan)):
        for live in (layers[0].lifecycle_step, layers[0].execute_systemic_lifecycle):
            with pytest.raises(TrainingDivergedError, match=f"at step {steps + 1}; training has diverged"):
                live(loss=diverged)
    assert layers[0].steps_lived == steps and torch.equal(layers[0].trend.slow, layers[1].trend.slow)
    layers[0].lifecycle_step(loss=torch.ones(1))
    assert layers[0].steps_lived == steps + 1


def test_a_pass_that_fails_has_counted_nothing() -> None:
    layer, x = new(), tokens(8)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = layer.block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(x)
    hook.remove()
    layer(x)
    assert layer.block.vitals.pending[0].sum() == 8 * TOP_K


def test_evidence_does_not_outlive_a_move_to_another_device() -> None:
    layer = new()
    layer(tokens(8))
    layer.double()
    assert layer.block.vitals.pending is not None
    layer.to("meta")
    assert layer.block.vitals.pending is None and layer.block.vitals.since_step is None


def test_an_overflow_of_gradients_does_not_stay_in_vitality() -> None:
    layer = new(vitals={"grad_norm_every": 1}, lifecycle={"enabled": False})
    for number in range(4):
        layer(tokens(64, seed=number)).square().mean().backward()
        if number == 1:
            weight = layer.block.experts.weights("trainable").gate_up_proj
            weight.grad[0].fill_(float("inf"))
            weight.grad[1].fill_(float("nan"))
        layer.lifecycle_step()
        layer.zero_grad()
    assert all(values.isfinite().all() for values in layer.vitals().values())
    expected = 0.5 * layer.vitals()["load"] + 0.5 * layer.vitals()["grad_norm"] / layer.vitals()["grad_norm"].mean()
    torch.testing.assert_close(layer.vitality(), expected, rtol=1e-4, atol=1e-5)


# -- events ------------------------------------------------------------------------------------------------------------


def test_a_split_without_noise_changes_no_output() -> None:
    layer, x = lived(4).eval(), tokens(64, seed=5)
    before, uids = layer(x), layer.expert_uids()
    for uid in uids:
        layer.split_expert(uid)
    assert layer.num_experts == 2 * len(uids)
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_newborns_inherit_the_optimizer_s_state_and_move(name: str) -> None:
    model = nn.Sequential(nn.Linear(H, H), new(lifecycle={"enabled": False}))
    layer: StandaloneLivingMoe = model[1]  # type: ignore[assignment]
    optimizer = OPTIMIZERS[name](model)
    for number in range(3):
        step(model, [layer], optimizer, number)
    load = layer.vitals()["load"]
    event = layer.split_expert(layer.expert_uids()[int(load.argmax())], optimizer=optimizer)
    parent, newborn = (layer.block.population.find(uid, 0).row for uid in (event.parents[0], event.children[0]))
    weight = layer.block.experts.weights("trainable").gate_up_proj
    moments = {key: value for key, value in optimizer.state[weight].items() if value.ndim and len(value) == len(weight)}
    assert moments and all(
        value[newborn].any() and torch.equal(value[newborn], value[parent]) for value in moments.values()
    )
    before = weight.detach().clone()
    for number in range(3, 6):
        step(model, [layer], optimizer, number)
    assert not torch.equal(weight[newborn], before[newborn])
    assert not torch.equal(weight[newborn], weight[parent])
    assert_partition(optimizer, layer)


def test_an_optimizer_that_was_not_told_of_growth_is_refused() -> None:
    model = nn.Sequential(nn.Linear(H, H), new())
    layer: StandaloneLivingMoe = model[1]  # type: ignore[assignment]
    optimizer = AdamW(model.parameters())
    layer.split_expert(0)
    model(tokens(4)).sum().backward()
    with pytest.raises(OptimizerError, match="Pass optimizer="):
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_was_not_told_whose_rows_moved_is_refused(name: str) -> None:
    """A death in a slab that keeps its size moves the last expert into the hole, and with it nobody's moments."""
    layer = new()
    optimizer = OPTIMIZERS[name](layer)
    step(layer, [], optimizer, 0)
    layer.remove_expert(1)
    before = state(layer)
    with pytest.raises(OptimizerError, match="was not told.*Pass optimizer= to every event"):
        step(layer, [], optimizer, 1)
    assert all(torch.equal(value, before[key]) for key, value in state(layer).items())
    # One built anew, or told in time, trains on; so does one whose state was loaded since.
    step(layer, [], OPTIMIZERS[name](layer), 2)
    another = OPTIMIZERS[name](layer)
    step(layer, [], another, 3)
    layer.remove_expert(2, optimizer=another)
    step(layer, [], another, 4)
    saved = another.state_dict()
    layer.remove_expert(0)
    another.load_state_dict(saved)
    step(layer, [], another, 5)


def test_of_two_optimizers_both_have_to_be_told() -> None:
    layer = new()
    first, second = AdamW(layer.parameters()), SGD(layer.parameters(), momentum=0.9)
    step(layer, [], first, 0)
    step(layer, [], second, 1)
    layer.remove_expert(1, optimizer=first)
    step(layer, [], first, 2)
    with pytest.raises(OptimizerError, match="SGD was not told"):
        step(layer, [], second, 3)
    second.state.clear()
    for number in range(4, 7):
        step(layer, [], second, number)


def test_an_event_that_moves_no_row_leaves_no_optimizer_behind() -> None:
    layer = new()
    optimizer = AdamW(layer.parameters())
    layer.split_expert(0, optimizer=optimizer)
    step(layer, [], optimizer, 0)
    layer.part_clade(0)
    step(layer, [], optimizer, 1)
    # Nor does one that concerns what does not train any more.
    layer.remove_expert(1)
    layer.zero_grad()
    for slot in layer.slot_parameters():
        slot.parameter.requires_grad_(False)
    step(layer, [], optimizer, 2)


def test_numbers_of_numpy_and_torch_are_numbers_and_nothing_else_is() -> None:
    layer = new(lifecycle={"max_experts": None})
    layer.split_expert(np.int64(1), noise_std=np.float32(0.1))
    layer.split_expert(torch.tensor(2))  # type: ignore[arg-type]
    layer.merge_experts(np.array([1, 2]))  # type: ignore[arg-type]
    layer.freeze_expert(np.int32(3))
    fresh = new()
    fresh.load_state_dict(layer.state_dict())
    assert_same(fresh, layer)
    before = state(layer)
    for uid in (True, 1.0, "1", None, torch.tensor([1, 2])):
        for happen in (layer.split_expert, layer.remove_expert, layer.freeze_expert):
            with pytest.raises(UnknownExpertError, match="never existed"):
                happen(uid)  # type: ignore[operator]
    for uids in (None, 3, [4, 4], [4]):
        with pytest.raises(PopulationError, match="at least two different uids"):
            layer.merge_experts(uids)  # type: ignore[arg-type]
    for noise in (math.nan, math.inf, -0.1, "1", None, True):
        with pytest.raises(PopulationError, match="noise_std must be >= 0 and finite"):
            layer.split_expert(4, noise_std=noise)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in state(layer).items())


def test_an_overflowed_token_makes_no_facet_that_divides_nothing() -> None:
    layer = LivingMoeBlock.standalone(H, WIDTH, 4, 4)
    x = tokens(40)
    x[::3] = torch.tensor([math.nan, math.inf])[torch.arange(H) % 2]
    layer(x)
    for uid in range(4):
        layer.split_expert(uid)
    layer.block.vitals.forget()
    layer(tokens(2000, seed=1))
    assert (layer.block.vitals.pending[0] > 0).all()


def test_errors_name_the_remedy_and_change_nothing() -> None:
    layer = new(lifecycle={"max_experts": EXPERTS})
    before = state(layer)
    with pytest.raises(UnknownExpertError, match="alive uids"):
        layer.remove_expert(77)
    with pytest.raises(PopulationError, match=r"lifecycle\.max_experts is 6"):
        layer.split_expert(0)
    with pytest.raises(PopulationError, match="no receptive fields"):
        layer.open_field()
    assert all(torch.equal(value, before[name]) for name, value in state(layer).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_block_in_a_sequential_grows_and_learns(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(H), new(vitals={"grad_norm_every": 2}), nn.Linear(H, H))
    layer: StandaloneLivingMoe = model[1]  # type: ignore[assignment]
    optimizer = OPTIMIZERS[name](model)
    losses = [step(model, [layer], optimizer, number) for number in range(60)]
    assert layer.num_experts > EXPERTS and "split" in layer.lineage.counts()
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert {event.metric for event in layer.lineage if event.kind in ("split", "death")} == {"vitality"}
    assert layer.steps_lived == 60 and layer.num_experts == layer.expert_counts[0] == len(layer.expert_uids())
    assert layer.vitals()["interference"].any() and layer.trend.slow > 0
    assert not layer.vitals()["loss_fast"].any()


def test_the_seed_s_call_decides_at_once_and_names_the_dead_and_the_born() -> None:
    layer = new(lifecycle={"interval": 1000, "warmup_steps": 1000, "max_experts": None})
    optimizer = AdamW(layer.parameters(), lr=1e-2)
    dead, born = [], []
    for number in range(12):
        x = tokens(4, 16, seed=number)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        uids = layer.expert_uids()
        gone, come = layer.execute_systemic_lifecycle(optimizer)
        assert set(layer.expert_uids()) == (set(uids) - set(gone)) | set(come)
        dead += gone
        born += come
    assert born and layer.num_experts == EXPERTS + len(born) - len(dead)
    with pytest.raises(PopulationError, match=r"lifecycle\.enabled is False"):
        new(lifecycle={"enabled": False}).execute_systemic_lifecycle()


def test_the_seed_s_call_reads_gradients_every_time() -> None:
    layer = new(lifecycle={"split_load": 1e6, "death_load": 0.0}, vitals={"grad_norm_every": 1000})
    layer(tokens(64)).square().mean().backward()
    layer.execute_systemic_lifecycle()
    assert layer.vitals()["grad_norm"].any()


@pytest.mark.parametrize("how", ["nothing was read", "evaluation", "padding", "old numbers"])
@pytest.mark.parametrize("policy", ["darwinian", "load", "self_preservation", "synaptic_health"])
def test_nobody_is_judged_without_a_token(how: str, policy: str) -> None:
    layer = new(lifecycle={"policy": policy, "patience": 1, "min_age_steps": 0, "warmup_steps": 0})
    if how == "old numbers":
        layer(tokens(64)).square().mean().backward()
        for _ in range(1 + BUSY["interval"]):
            layer._live_a_step()
        assert max(layer.vitals()["load"]) > BUSY["split_load"]
    before = layer.expert_uids()
    for number in range(40):
        if how == "evaluation":
            layer.eval()(tokens(16, seed=number))
        elif how == "padding":
            layer(tokens(16, seed=number), torch.zeros(16, dtype=torch.bool))
        assert layer.lifecycle_step() == []
        assert layer.execute_systemic_lifecycle() == ([], [])
    assert layer.expert_uids() == before


@pytest.mark.parametrize("optimizer", ["unsupported", "a stranger's", "no optimizer", "a scheduler"])
def test_an_optimizer_that_no_event_could_follow_is_refused_before_the_step(optimizer: str) -> None:
    layer = new(escape={"space": "fourier"})
    wrong: Any = {
        "unsupported": RMSprop(layer.parameters()),
        "a stranger's": AdamW(new().parameters()),
        "no optimizer": "AdamW",
        "a scheduler": StepLR(AdamW(layer.parameters()), 1),
    }[optimizer]
    layer(tokens(16))
    before = state(layer)
    for happen in (layer.lifecycle_step, layer.execute_systemic_lifecycle):
        with pytest.raises(OptimizerError):
            happen(wrong, loss=1.0)
    with pytest.raises(OptimizerError):
        layer.open_escape(optimizer=wrong)
    assert layer.steps_lived == 0 and layer.escape_state() == "closed"
    assert all(torch.equal(value, before[name]) for name, value in state(layer).items())
    right = AdamW(layer.parameters())
    layer.lifecycle_step(right, loss=1.0)
    assert (layer.steps_lived, int(layer.trend.settle() or layer.trend.count)) == (1, 1)


# -- several blocks in one model ---------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        self.first, self.between, self.second = new(seed), nn.Linear(H, H), new(seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.between(x + self.first(x))))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_of_one_model_live_their_own_lives(name: str) -> None:
    torch.manual_seed(0)
    model = Two()
    optimizer = OPTIMIZERS[name](model)
    for number in range(20):
        step(model, [model.first, model.second], optimizer, number)
    model.first.freeze_expert(model.first.expert_uids()[0], optimizer=optimizer)
    for number in range(20, 30):
        step(model, [model.first, model.second], optimizer, number)
    assert model.first.lineage and model.second.lineage and model.first.lineage != model.second.lineage
    for layer in (model.first, model.second):
        assert_partition(optimizer, layer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    # The order of the groups is that of an optimizer built anew, so that its saved state loads there.
    fresh = OPTIMIZERS[name](model)
    trained = [[p for p in group["params"] if p.requires_grad] for group in fresh.param_groups]
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(p) for p in g] for g in trained]


def test_living_adamw_leaves_experts_of_any_block_alone_that_received_nothing() -> None:
    model = Two()
    optimizer = LivingAdamW(model, lr=1e-2)
    step(model, [], optimizer, 0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    x = tokens(1, seed=3)
    optimizer.zero_grad()
    model(x).sum().backward()
    received = [layer.block.vitals.since_step.clone() for layer in (model.first, model.second)]  # type: ignore[union-attr]
    optimizer.step()
    for name, layer, counts in (("first", model.first, received[0]), ("second", model.second, received[1])):
        weight = layer.block.experts.weights("trainable").gate_up_proj
        moved = (weight != before[f"{name}.block.experts.trainable.gate_up_proj"]).flatten(1).any(1)
        assert torch.equal(moved, counts > 0) and not moved.all()


def test_living_adamw_refuses_a_block_that_would_not_learn_beside_one_that_does() -> None:
    model = Two()
    optimizer = LivingAdamW(model, lr=1e-2)
    model.second.eval()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(OptimizerError, match="layer 1: the trainable experts have gradients.*eval mode"):
        step(model, [], optimizer, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    for slot in model.second.slot_parameters():
        slot.parameter.requires_grad_(False)
    step(model, [], LivingAdamW(model, lr=1e-2), 0)


def test_copies_and_pickles_of_a_living_adamw_train_the_model_that_came_along() -> None:
    model = Two()
    optimizer = LivingAdamW(model, lr=1e-2)
    for number in range(3):
        step(model, [model.first, model.second], optimizer, number)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    pairs = [(model, optimizer), copy.deepcopy((model, optimizer)), torch.load(file, weights_only=False)]
    losses = []
    for own, its in pairs:
        losses.append([step(own, [own.first, own.second], its, number) for number in range(3, 9)])
        own.first.split_expert(own.first.expert_uids()[0], optimizer=its)
        step(own, [], its, 9)
    assert losses[0] == losses[1] == losses[2]


def test_a_whole_model_s_state_is_saved_and_loaded_by_torch() -> None:
    model = Two()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for number in range(20):
        step(model, [model.first, model.second], optimizer, number)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = Two(seed=7)
    result = fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(fresh.first, model.first)
    assert_same(fresh.second, model.second)
    assert torch.equal(fresh.between.weight, model.between.weight)


# -- state dicts -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), events=st.integers(0, 12))
@settings(max_examples=15, deadline=None)
def test_a_fresh_block_takes_up_any_life(seed: int, events: int) -> None:
    layer = lived(events, seed)
    fresh = new(seed + 1)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert_same(fresh, layer)
    # It goes on living as the other does, bit for bit.
    optimizers = [AdamW(each.parameters(), lr=1e-2) for each in (layer, fresh)]
    for number in range(3):
        for each, optimizer in zip((layer, fresh), optimizers, strict=True):
            each.block.vitals.forget()
            step(each, [each], optimizer, number)
    assert_same(fresh, layer)


@pytest.mark.parametrize("space", ["poincare", "fourier"])
@pytest.mark.parametrize("state", ["closed", "open", "leaving"])
def test_a_fresh_block_is_where_the_saved_one_was(space: str, state: str) -> None:
    sections = {
        "escape": {"space": space, "window": 3, "leave_steps": 10, "loss_tolerance": 10.0, "collapse": 0.01},
        "vitals": {"grad_norm_every": 1, "phi_every": 1},
    }
    layer = new(0, **sections)
    optimizer = AdamW(layer.parameters(), lr=1e-2)
    if state != "closed":
        layer.open_escape(optimizer=optimizer)
    for number in range(8):
        step(layer, [layer], optimizer, number)
    if state == "leaving":
        layer.leave_escape()
        step(layer, [layer], optimizer, 9)
    fresh = new(1, **sections)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert fresh.escape_state() == layer.escape_state() == state and layer.phi().keys() == fresh.phi().keys()
    assert_same(fresh, layer)
    with pytest.raises(CheckpointError, match="unexpected"):
        new(1, vitals=sections["vitals"]).load_state_dict(layer.state_dict())


def test_a_shrunken_state_loads_into_a_grown_block_and_through_safetensors() -> None:
    small = new(0)
    for uid in (0, 1, 2):
        small.remove_expert(uid)
    grown = lived(10, seed=2)
    grown.load_state_dict(load_safetensors(save_safetensors(small.state_dict())), strict=True)
    assert grown.num_experts == EXPERTS - 3
    assert_same(grown, small)


def test_copies_and_pickles_live_on_alone() -> None:
    layer = lived(6)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert_same(other, layer)
        other.split_expert(other.expert_uids()[0])
        assert other.num_experts == layer.num_experts + 1 and len(other.lineage) > len(layer.lineage)


def test_an_optimizer_of_before_a_load_is_refused() -> None:
    grown, layer = lived(8), new(1)
    optimizer = AdamW(layer.parameters())
    layer.load_state_dict(grown.state_dict())
    layer(tokens(8)).sum().backward()
    with pytest.raises(OptimizerError):
        optimizer.step()


CORRUPTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no sizes": (lambda s: s.pop("block.population.slab_sizes"), "no block.population.slab_sizes"),
    "no weights": (lambda s: s.pop("block.experts.trainable.down_proj"), "missing block.experts.trainable.down_proj"),
    "no lineage": (lambda s: s.pop("_extra_state"), "missing _extra_state"),
    "no clock": (lambda s: s.pop("clock.steps"), "missing clock.steps"),
    "a stranger": (lambda s: s.update({"block.router.gate": torch.ones(1)}), "unexpected block.router.gate"),
    "rows": (
        lambda s: s.update({"block.router.keys.trainable": s["block.router.keys.trainable"][:-1]}),
        "block.router.keys.trainable is",
    ),
    "sizes": (lambda s: s["block.population.slab_sizes"].add_(1), "does not fit"),
    "negative sizes": (lambda s: s["block.population.slab_sizes"].fill_(-1), "not sizes of the slabs"),
    "twins": (lambda s: s["block.population.trainable.uid"].fill_(1), "repeat"),
    "holes": (lambda s: s["block.population.trainable.uid"][0].fill_(-1), "not a prefix"),
    "the future": (lambda s: s["block.population.next_uid"].fill_(2), "next_uid"),
    "kind": (
        lambda s: s.update({"block.population.trainable.uid": s["block.population.trainable.uid"].float()}),
        "block.population.trainable.uid is torch.float32",
    ),
    "noise": (lambda s: s.update({"_extra_state": torch.randint(0, 255, (99,), dtype=torch.uint8)}), "lineage"),
    "a record": (
        lambda s: s.update({"_extra_state": torch.tensor(list(b'[{"kind": "birth"}]'), dtype=torch.uint8)}),
        "not a lineage record",
    ),
    "an object": (lambda s: s.update({"_extra_state": None}), "no lineage"),
    "a fourth state": (lambda s: s["block.escape.state"].fill_(7), r"escape\.state is 7"),
    "leaving for ever": (lambda s: s["block.escape.state"].fill_(2), r"escape\.state is 2 with escape\.left 0"),
    "no tensor": (
        lambda s: s.update({"block.vitals.steps": None}),
        "block.vitals.steps is a NoneType, expected a tensor",
    ),
    "a list": (lambda s: s.update({"block.router.keys.trainable": [1.0]}), "keys.trainable is a list"),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_corrupt_state_is_one_clear_error_and_changes_nothing(what: str) -> None:
    corrupt, message = CORRUPTIONS[what]
    incoming = state(lived(8, seed=4, escape={"space": "fourier"}))
    corrupt(incoming)
    layer = lived(5, seed=1, escape={"space": "fourier"})
    parameters, before = list(layer.parameters()), state(layer)
    with pytest.raises(CheckpointError, match=message):
        layer.load_state_dict(incoming, strict=True)
    assert all(one is other for one, other in zip(parameters, layer.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in state(layer).items())


@pytest.mark.parametrize("arguments", [(H, WIDTH + 1), (H + 1, WIDTH)])
def test_the_state_of_another_block_is_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(LivingMoeError, match="build the block with the same arguments"):
        new().load_state_dict(LivingMoeBlock.standalone(*arguments, EXPERTS, TOP_K).state_dict())
    other, small = LivingMoeBlock.standalone(H, WIDTH, 6, 6), LivingMoeBlock.standalone(H, WIDTH, 4, 2)
    with pytest.raises(CheckpointError, match="clades cannot serve top_k 6"):
        other.load_state_dict(small.state_dict())
    with pytest.raises(CheckpointError, match="not of a standalone living block"):
        new().load_state_dict(nn.Linear(3, 3).state_dict())


def test_a_state_without_the_block_leaves_it_alone_where_torch_allows_it() -> None:
    model = nn.Sequential(nn.Linear(H, H), lived(4))
    before = state(model[1])
    result = model.load_state_dict(nn.Sequential(nn.Linear(H, H)).state_dict(), strict=False)
    assert result.missing_keys
    assert all(torch.equal(value, before[name]) for name, value in state(model[1]).items())


def test_halves_keep_their_tables_and_temperature_in_full_precision() -> None:
    layer = lived(6).bfloat16()
    fresh = new(3).bfloat16()
    fresh.load_state_dict(layer.state_dict())
    assert fresh.block.experts.weights("trainable").down_proj.dtype == torch.bfloat16
    assert fresh.block.router.learned_temperature.log_ratio.dtype == torch.float32
    x = tokens(9).bfloat16()
    assert torch.equal(fresh.eval()(x), layer.eval()(x)) and fresh(x).dtype == torch.bfloat16


def test_a_collapse_of_phi_splits_with_mutation_and_the_block_escapes_where_that_did_not_help() -> None:
    layer = LivingMoeBlock.standalone(
        16, 24, 4, 2,
        lifecycle={"phi_trigger": 0.5, "interval": 1, "warmup_steps": 0, "cooldown_steps": 0, "max_experts": 8},
        escape={"space": "fourier", "window": 4, "patience": 1, "loss_tolerance": 10.0, "grad_tolerance": 10.0},
        vitals={"grad_norm_every": 1, "phi_every": 1},
    )  # fmt: skip
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    kinds = []
    for step in range(12):
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        if step == 5:
            layer.block.vitals.phi_peak.fill_(4.0)
            layer.block.vitals.phi_record.fill_(4.0)
        kinds += [event.kind for event in layer.lifecycle_step(optimizer, loss=loss.detach())]
        optimizer.zero_grad()
    assert 0 < float(layer.block.vitals.phi) <= 1
    assert kinds == ["split", "escape"]
    split, escape = (event for event in layer.lineage if event.kind in kinds)
    assert split.metric == "phi" and split.noise_std > 0
    # The escape goes by five measurements of after the split, and the window at steps 5 to 8 ends before there are.
    assert (split.step, escape.step) == (6, 12)
    assert escape.metric == "phi" and escape.threshold == pytest.approx(0.9 * 4)


def test_one_collapse_of_phi_is_answered_by_one_split() -> None:
    layer = LivingMoeBlock.standalone(
        16, 16, 6, 2, vitals={"phi_every": 5}, lifecycle={"phi_trigger": 0.9, "split_load": 1e6, "max_experts": 64}
    )
    optimizer, happened = SGD(layer.parameters(), lr=0.0), []
    slab = layer.block.experts.weights("trainable")
    for number in range(300):
        if number == 100:
            with torch.no_grad():
                for weight in (slab.gate_up_proj, slab.down_proj):
                    weight[:6] = weight[:1] + 0.02 * torch.randn(weight[:6].shape)
        loss = layer(torch.randn(64, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        happened += [(number > 99, event.kind, event.metric) for event in layer.lifecycle_step(optimizer, loss=1.0)]
    assert happened == [(True, "split", "phi")]


@pytest.mark.parametrize("order", ["parents first", "children first"])
def test_modules_may_be_reset_in_any_order(order: str) -> None:
    layer = new()
    before, uids = state(layer.block.population), layer.expert_uids()
    modules = list(layer.modules())
    for module in modules if order == "parents first" else reversed(modules):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer.expert_uids() == uids
    assert all(torch.equal(value, before[name]) for name, value in state(layer.block.population).items())
