"""The "active" experts implementation: equal to eager and grouped_mm, forward and backward, and its direct gradient."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe import active_experts
from living_moe.modeling_living_moe.active_experts import GradientRows, register_active_experts

register_active_experts()

HIDDEN, INTERMEDIATE = 8, 12


def new_slab(capacity: int, *, direct: bool = False, activation: str = "silu") -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=capacity, hidden_act=activation
    )
    config._experts_implementation = "active"
    slab = MixtralExperts(config)
    for parameter in slab.parameters():
        nn.init.normal_(parameter, std=0.5)
    slab.direct_grad = direct
    return slab


def run(slab: MixtralExperts, implementation: str, hidden: Tensor, index: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and gradients of hidden states, routing weights and both projections, for one fixed output gradient."""
    slab = copy.deepcopy(slab)
    slab.config._experts_implementation = implementation
    slab._is_expert_parallel = bool((index >= slab.num_experts).any())
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    output = slab(hidden, index, weights)
    if output.requires_grad:  # eager's graph does not reach the inputs where no pair is of this slab
        output.backward(output_gradient(output))
    return [output.detach(), hidden.grad, weights.grad, slab.gate_up_proj.grad, slab.down_proj.grad]


def output_gradient(output: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape).to(output.dtype)


def inputs(tokens: int, top_k: int, capacity: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.randint(capacity, (tokens, top_k), generator=generator)
    return hidden, index, torch.rand(tokens, top_k, generator=generator)


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, Tensor]:
    """A capacity, and rows (T, K) among which pairs of another slab may occur."""
    capacity, tokens, top_k = draw(st.integers(1, 7)), draw(st.integers(0, 9)), draw(st.integers(1, 5))
    last = capacity if draw(st.booleans()) else capacity - 1
    rows = draw(st.lists(st.integers(0, last), min_size=tokens * top_k, max_size=tokens * top_k))
    return capacity, torch.tensor(rows, dtype=torch.int64).reshape(tokens, top_k)


@given(routings(), st.integers(0, 99), st.sampled_from(["silu", "gelu"]))
def test_output_and_every_gradient_equal_eager(routing: tuple[int, Tensor], seed: int, activation: str) -> None:
    capacity, index = routing
    slab = new_slab(capacity, activation=activation)
    hidden, _, weights = inputs(*index.shape, capacity, seed)
    expected = run(slab, "eager", hidden, index, weights)
    for ours, theirs in zip(run(slab, "active", hidden, index, weights), expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(routings(), st.integers(0, 99))
def test_output_and_every_gradient_equal_grouped_mm(routing: tuple[int, Tensor], seed: int) -> None:
    capacity, index = routing
    if not index.numel():
        return  # grouped_mm itself has no kernel for an empty batch
    slab = new_slab(capacity)
    hidden, _, weights = inputs(*index.shape, capacity, seed)
    expected = run(slab, "grouped_mm", hidden, index, weights)
    for ours, theirs in zip(run(slab, "active", hidden, index, weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_output_equals_grouped_mm_bit_for_bit_in_fp32() -> None:
    slab = new_slab(6)
    hidden, index, weights = inputs(50, 3, 6)
    ours, theirs = (run(slab, name, hidden, index, weights)[0] for name in ("active", "grouped_mm"))
    assert torch.equal(ours, theirs)


def test_derivatives_equal_finite_differences() -> None:
    slab = new_slab(4).double()
    hidden, index, weights = inputs(5, 2, 5)  # row 4 is of another slab

    def output(hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        twin = copy.copy(slab)
        twin._parameters = {}
        twin.gate_up_proj, twin.down_proj = gate_up, down
        return twin(hidden, index, weights)

    arguments = (hidden.double(), weights.double(), slab.gate_up_proj.detach(), slab.down_proj.detach())
    assert torch.autograd.gradcheck(output, tuple(a.clone().requires_grad_() for a in arguments))


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_bf16_experts_agree_with_eager(weights_dtype: torch.dtype) -> None:
    slab = new_slab(5).bfloat16()
    hidden, index, weights = inputs(40, 2, 5)
    arguments = (hidden.bfloat16(), index, weights.to(weights_dtype))
    for ours, theirs in zip(run(slab, "active", *arguments), run(slab, "eager", *arguments), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("direct", [False, True])
def test_autocast_agrees_with_eager_and_keeps_fp32_gradients(direct: bool) -> None:
    slab = new_slab(5)
    hidden, index, weights = inputs(40, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(slab, "eager", hidden, index, weights)
    slab.direct_grad = direct
    with torch.autocast("cpu", torch.bfloat16):
        found = run(slab, "active", hidden, index, weights)
    full = run(slab, "active", hidden, index, weights)
    for ours, theirs, exact in zip(found, expected, full, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)
        assert not torch.equal(ours, exact), "the products did not run in bf16"


def test_an_empty_batch_gives_empty_output_and_zero_gradients() -> None:
    output, grad_hidden, grad_weights, *grads = run(new_slab(3), "active", *inputs(0, 2, 3))
    assert output.shape == (0, HIDDEN) and grad_hidden.shape == (0, HIDDEN) and grad_weights.shape == (0, 2)
    assert not any(grad.any() for grad in grads)


def test_tokens_of_another_slab_add_nothing_and_get_zero_gradients() -> None:
    hidden, _, weights = inputs(4, 2, 3)
    index = torch.full((4, 2), 3)
    for tensor in run(new_slab(3), "active", hidden, index, weights):
        assert not tensor.any()


@pytest.mark.parametrize("direct", [False, True])
def test_frozen_weights_get_no_gradient_and_none_is_computed(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    slab = new_slab(4, direct=direct).requires_grad_(False)
    expected = run(new_slab(4), "active", *inputs(6, 2, 4))
    computed: list[int] = []
    monkeypatch.setattr(active_experts, "_weight_gradient", lambda *a, **k: computed.append(1))
    hidden, index, weights = inputs(6, 2, 4)
    hidden.requires_grad_()
    output = slab(hidden, index, weights)
    output.backward(output_gradient(output))
    assert hidden.grad is not None and hidden.grad.shape == expected[1].shape
    assert slab.gate_up_proj.grad is None and slab.down_proj.grad is None and not computed


def test_without_grad_the_output_is_the_same_and_needs_no_graph() -> None:
    slab = new_slab(4)
    arguments = inputs(6, 2, 4)
    with torch.no_grad():
        output = slab(*arguments)
    assert not output.requires_grad
    assert torch.equal(output, slab(*arguments).detach())


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(direct: bool, use_reentrant: bool) -> None:
    hidden, index, weights = inputs(9, 2, 4)
    expected = run(new_slab_like(0, direct=False), "active", hidden, index, weights)
    slab = new_slab_like(0, direct=direct)
    hidden.requires_grad_()
    weights.requires_grad_()
    output = checkpoint(slab, hidden, index, weights, use_reentrant=use_reentrant)
    output.backward(output_gradient(output))
    found = [output.detach(), hidden.grad, weights.grad, slab.gate_up_proj.grad, slab.down_proj.grad]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def new_slab_like(seed: int, *, direct: bool) -> MixtralExperts:
    torch.manual_seed(seed)
    return new_slab(4, direct=direct)


def test_hooks_and_autograd_grad_see_the_dense_gradient() -> None:
    slab = new_slab(4)
    hidden, index, weights = inputs(6, 2, 2)
    (grad,) = torch.autograd.grad(slab(hidden, index, weights).square().sum(), [slab.down_proj])
    assert slab.down_proj.grad is None
    assert grad[:2].any() and not grad[2:].any()


def test_a_gate_of_the_family_is_used() -> None:
    class ClampedExperts(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up[..., ::2].clamp(max=0.5), gate_up[..., 1::2].clamp(-0.5, 0.5)
            return torch.sigmoid(1.7 * gate) * gate * (up + 1)

    slab = new_slab(4)
    slab.__class__ = ClampedExperts
    arguments = inputs(20, 2, 4)
    for ours, theirs in zip(run(slab, "active", *arguments), run(slab, "grouped_mm", *arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_silu_experts_take_the_path_without_autograd() -> None:
    slab = new_slab(2)
    assert active_experts._gate_function(slab) is None
    slab.act_fn = nn.SiLU()
    assert active_experts._gate_function(slab) is None
    slab.act_fn = nn.GELU()
    assert active_experts._gate_function(slab) is not None


def test_experts_with_biases_are_refused() -> None:
    config = GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    config._experts_implementation = "active"
    with pytest.raises(ConfigurationError, match="biases.*GptOssExperts.*'grouped_mm' or 'eager'"):
        GptOssExperts(config)(*inputs(3, 1, 2))


def test_a_stock_mixtral_can_choose_it_by_name() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    tokens = torch.randint(32, (2, 7))
    found = {}
    for name in ("grouped_mm", "active"):
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
        model.set_experts_implementation(name)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        found[name] = [output.logits.detach(), *(p.grad for p in model.parameters())]
    assert torch.equal(found["active"][0], found["grouped_mm"][0])
    for ours, theirs in zip(found["active"], found["grouped_mm"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# -- the direct gradient -----------------------------------------------------------------------------------------------


def backward(slab: MixtralExperts, seed: int, rows: list[int]) -> None:
    """One micro-batch whose tokens go to `rows` only."""
    hidden, place, weights = inputs(4, 2, len(rows), seed)
    output = slab(hidden, torch.tensor(rows)[place], weights)
    output.backward(output_gradient(output))


def test_the_direct_gradient_is_one_buffer_across_steps() -> None:
    slab = new_slab(6, direct=True)
    backward(slab, 0, [0, 1])
    buffer = slab.gate_up_proj.grad
    slab.zero_grad(set_to_none=True)
    backward(slab, 1, [4])
    assert slab.gate_up_proj.grad is buffer
    assert [row for row in range(6) if buffer[row].any()] == [4]


def test_a_step_writes_no_row_but_the_active_and_the_previously_active() -> None:
    slab = new_slab(6, direct=True)
    backward(slab, 0, [0, 1])
    # Written around the version counter, so that a write to these rows by the next step shows.
    for parameter in slab.parameters():
        parameter.grad.data[[2, 5]] = float("nan")
    slab.zero_grad(set_to_none=True)
    backward(slab, 1, [1, 4])
    for parameter in slab.parameters():
        assert parameter.grad[[2, 5]].isnan().all()
        assert not parameter.grad[[0, 3]].any() and parameter.grad[[1, 4]].any()


def double_use(slab: MixtralExperts, seed: int) -> None:
    """The same experts twice in one graph, as a tied layer."""
    hidden, index, weights = inputs(4, 2, 3, seed)
    output = slab(slab(hidden, index, weights), (index + 1) % 3, weights)
    output.backward(output_gradient(output))


def weight_penalty(slab: MixtralExperts, seed: int) -> None:
    """A term of the loss that reaches the weights past the experts, in one graph with them."""
    hidden, index, weights = inputs(4, 2, 2, seed)
    (slab(hidden, index, weights).square().sum() + sum(p.square().sum() for p in slab.parameters())).backward()


def for_gradients(edit: Callable[[nn.Parameter], None]) -> Callable[[MixtralExperts, int], None]:
    def apply(slab: MixtralExperts, seed: int) -> None:
        for parameter in slab.parameters():
            if parameter.grad is not None:
                edit(parameter)

    return apply


def assign_clone(parameter: nn.Parameter) -> None:
    parameter.grad = parameter.grad.clone() + 1.0


def poison(parameter: nn.Parameter) -> None:
    parameter.grad.fill_(float("nan"))
    parameter.grad = None


ACTIONS: dict[str, Callable[[MixtralExperts, int], None]] = {
    "backward": lambda slab, seed: backward(slab, seed, [[0], [1, 2], [3, 0], [0, 1, 2, 3]][seed % 4]),
    "double use": double_use,
    "weight penalty": weight_penalty,
    "zero to none": lambda slab, seed: slab.zero_grad(set_to_none=True),
    "zero in place": lambda slab, seed: slab.zero_grad(set_to_none=False),
    "clip": lambda slab, seed: nn.utils.clip_grad_norm_(slab.parameters(), 0.5),
    "scale": for_gradients(lambda parameter: parameter.grad.mul_(0.5)),
    "scale one row": for_gradients(lambda parameter: parameter.grad[1].mul_(0.5)),
    "shift": for_gradients(lambda parameter: parameter.grad.add_(1.0)),
    "poison, then none": for_gradients(poison),
    "assign another tensor": for_gradients(assign_clone),
    "dense for once": lambda slab, seed: dense_for_once(slab, seed),
    "step": lambda slab, seed: torch.optim.AdamW(slab.parameters(), lr=0.01, fused=True).step(),
}


def dense_for_once(slab: MixtralExperts, seed: int) -> None:
    slab.direct_grad, before = False, slab.direct_grad
    backward(slab, seed, [0, 2])
    slab.direct_grad = before


@given(st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), st.integers(0, 7)), max_size=12))
def test_whatever_happens_in_between_the_direct_gradient_equals_autograds(actions: list[tuple[str, int]]) -> None:
    direct = new_slab(4, direct=True)
    normal = copy.deepcopy(direct)
    normal.direct_grad = False
    for name, seed in [("backward", 3), *actions, ("backward", 1)]:
        ACTIONS[name](direct, seed)
        ACTIONS[name](normal, seed)
        for ours, theirs in zip(direct.parameters(), normal.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None
            else:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("watcher", ["hook", "post-accumulate hook", "two processes"])
def test_the_dense_gradient_is_returned_where_somebody_watches(monkeypatch: pytest.MonkeyPatch, watcher: str) -> None:
    slab = new_slab(4, direct=True)
    backward(slab, 0, [0, 1])
    buffer = slab.down_proj.grad
    slab.zero_grad()
    seen: list[Tensor] = []
    if watcher == "hook":
        slab.down_proj.register_hook(lambda grad: seen.append(grad))
    elif watcher == "post-accumulate hook":
        slab.down_proj.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    else:
        monkeypatch.setattr(active_experts.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(active_experts.dist, "get_world_size", lambda: 2)
    backward(slab, 1, [2])
    assert slab.down_proj.grad is not buffer
    assert [row for row in range(4) if slab.down_proj.grad[row].any()] == [2]
    assert len(seen) == (0 if watcher == "two processes" else 1)


@pytest.mark.parametrize("change", ["new parameter", "new shape", "new dtype"])
def test_a_replaced_or_resized_parameter_starts_a_new_buffer(change: str) -> None:
    slab = new_slab(4, direct=True)
    backward(slab, 0, [0, 3])
    old = weakref.ref(GradientRows._of_parameter[slab.down_proj])
    slab.zero_grad()
    grown = {
        name: torch.cat([p.detach(), p.detach()[:2]]) if change != "new dtype" else p.detach().double()
        for name, p in slab.named_parameters()
    }
    slab.num_experts = 6 if change != "new dtype" else 4
    for name, tensor in grown.items():
        if change == "new parameter":
            setattr(slab, name, nn.Parameter(tensor))
        else:
            slab.get_parameter(name).data = tensor
    rows = [1, slab.num_experts - 1]
    hidden, place, weights = inputs(4, 2, 2)
    arguments = (hidden.to(slab.down_proj.dtype), torch.tensor(rows)[place], weights.to(slab.down_proj.dtype))
    output = slab(*arguments)
    output.backward(output_gradient(output))
    expected = run(slab, "eager", *arguments)
    for ours, theirs in zip((slab.gate_up_proj.grad, slab.down_proj.grad), expected[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gc.collect()
    assert old() is None, "the old buffer is still held"


def test_a_copied_slab_shares_no_buffer() -> None:
    slab = new_slab(4, direct=True)
    backward(slab, 0, [0, 1])
    twin = copy.deepcopy(slab)
    assert twin.down_proj.grad is None
    before = slab.down_proj.grad.clone()
    backward(twin, 1, [1, 2])
    assert twin.down_proj.grad is not slab.down_proj.grad
    assert torch.equal(slab.down_proj.grad, before)


def test_the_buffer_dies_with_its_parameter() -> None:
    slab = new_slab(4, direct=True)
    backward(slab, 0, [0, 1])
    parameter = weakref.ref(slab.gate_up_proj)
    buffer = weakref.ref(GradientRows._of_parameter[slab.gate_up_proj])
    del slab
    gc.collect()
    assert parameter() is None and buffer() is None
