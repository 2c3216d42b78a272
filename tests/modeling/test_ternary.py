"""Ternary experts: the quantisers, the packing, slabs under every implementation, and calibration.

Oracles take one weight, one token, one pair at a time. Those that go through the 8-bit rounding compute in fp64: in
fp32 another order of adding can move a unit to the next of its 255 levels.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MixtralConfig

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe import ternary
from living_moe.modeling_living_moe.active_experts import register_active_experts
from living_moe.modeling_living_moe.experts import ExpertSlab
from living_moe.modeling_living_moe.ternary import (
    IMPLEMENTATIONS,
    PackedTernary,
    TernarySlab,
    dequantize,
    fake_quantize,
    latent_weights,
    pack,
    quantize_activations,
    ternarize_,
    ternary_quantize,
    unpack,
    unpack_values,
)

register_active_experts()

HIDDEN, INTERMEDIATE = 8, 12
DTYPES = (torch.float32, torch.bfloat16)


def new_slab(
    capacity: int,
    implementation: str = "eager",
    *,
    kind: type[ExpertSlab] = TernarySlab,
    alive: int | None = None,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    seed: int = 0,
    trainable: bool = True,
) -> ExpertSlab:
    """A slab whose rows from `alive` on are spare."""
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, hidden_act="silu")
    config._experts_implementation = implementation
    slab = kind(config, capacity, hidden, intermediate, trainable=trainable)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in slab.parameters():
            alive_rows = parameter[: capacity if alive is None else alive]
            alive_rows.copy_(torch.randn(alive_rows.shape, generator=generator) * 0.5)
    return slab


def inputs(tokens: int, top_k: int, rows: int, hidden: int = HIDDEN, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.randint(rows, (tokens, top_k), generator=generator)
    return torch.randn(tokens, hidden, generator=generator), index_TK, torch.rand(tokens, top_k, generator=generator)


def bits(tensor: Tensor) -> Tensor:
    """What `torch.equal` does not tell apart: zeros of either sign."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.equal(bits(ours), bits(theirs))


@st.composite
def matrices(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (*DTYPES, torch.float16, torch.float64)) -> Tensor:
    """Stacks of matrices of any shape and scale, some with zeros, ties at the threshold or outliers."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 9)))
    kind = draw(st.sampled_from(["normal", "ties", "sparse", "outlier", "zeros"]))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    if kind == "ties":
        weight = weight.sign() * weight.abs().mul(4).ceil() / 4
    elif kind == "sparse":
        weight = weight * (weight.abs() > 1.2)
    elif kind == "outlier":
        weight[0, 0, 0] = 300.0
    elif kind == "zeros":
        weight[-1] = 0
    return (weight * draw(st.sampled_from([1.0, 0.02, 3e-3]))).to(draw(st.sampled_from(dtypes)))


# -- quantisers --------------------------------------------------------------------------------------------------------


@given(matrices())
def test_each_weight_is_rounded_by_its_matrixs_mean_magnitude(weight: Tensor) -> None:
    q, scale = ternary_quantize(weight)
    assert q.dtype == torch.int8 and q.shape == weight.shape and scale.dtype == torch.float32
    for matrix, codes, unit in zip(weight.float().numpy(), q.numpy(), scale.numpy(), strict=True):
        mean = math.fsum(abs(float(value)) for value in matrix.flat) / matrix.size
        assert unit == pytest.approx(mean, rel=1e-6)
        for value, code in zip(matrix.flat, codes.flat, strict=True):
            # fp32 divided by fp32, half to even, as Python rounds.
            wanted = 0 if unit == 0 else max(-1, min(1, round(float(np.float32(value) / unit))))
            assert code == wanted


@given(matrices())
def test_fake_quantised_weights_are_q_times_scale_bit_for_bit(weight: Tensor) -> None:
    q, scale = ternary_quantize(weight)
    values = fake_quantize(weight)
    assert_same_bits(values, dequantize(q, scale, weight.dtype))
    expected = torch.stack([(codes.float() * unit).to(weight.dtype) for codes, unit in zip(q, scale, strict=True)])
    assert_same_bits(values, expected)


@given(matrices(DTYPES))
def test_the_latent_weights_get_the_gradient_of_the_ternary_values(weight: Tensor) -> None:
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    weight.requires_grad_()
    (fake_quantize(weight) * gradient).sum().backward()
    assert torch.equal(weight.grad, gradient)


@given(matrices(), st.integers(1, 40))
def test_a_matrix_is_quantised_alike_alone_among_others_and_in_pieces(weight: Tensor, chunk: int) -> None:
    together = ternary_quantize(weight)
    for number, matrix in enumerate(weight):
        for ours, theirs in zip(ternary_quantize(matrix.clone()), together, strict=True):
            assert_same_bits(ours, theirs[number])
    values = fake_quantize(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ternary, "CHUNK", chunk)
        assert_same_bits(fake_quantize(weight), values)
    assert_same_bits(fake_quantize(weight.unflatten(0, (-1, 1))), values.unflatten(0, (-1, 1)))


def test_many_matrices_are_quantised_as_one_is_by_several_threads_too() -> None:
    """Threads divide the sum over one matrix among them; of many, each takes some whole."""
    weight = torch.randn(6, 300, 257)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        q, scale = ternary_quantize(weight)
        alone = [ternary_quantize(matrix) for matrix in weight]
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(scale, torch.stack([unit for _, unit in alone]))
    assert_same_bits(q, torch.stack([codes for codes, _ in alone]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros_and_the_smallest_weights_stay_finite(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 4, 5, dtype=dtype)
    weight[1] = torch.finfo(dtype).smallest_normal
    weight[2, 0, 0] = torch.finfo(dtype).smallest_normal
    q, scale = ternary_quantize(weight)
    assert not q[0].any() and scale[0] == 0 and not fake_quantize(weight)[0].any()
    assert torch.equal(q[1], torch.ones(4, 5, dtype=torch.int8)) and scale.isfinite().all()
    assert torch.equal(fake_quantize(weight)[1], weight[1]) and fake_quantize(weight).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_diverged_are_not_hidden(bad: float) -> None:
    weight = torch.randn(2, 3, 4)
    weight[1, 2, 3] = bad
    values = fake_quantize(weight)
    assert values[0].isfinite().all() and not values[1].isfinite().all()


@st.composite
def hidden_states(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(0, 6)), draw(st.integers(1, 17)))
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    hidden = hidden * torch.tensor([10.0 ** draw(st.integers(-4, 4)) for _ in range(shape[0])]).view(-1, 1)
    if shape[0] and draw(st.booleans()):
        hidden[0] = 0
    return hidden.to(draw(st.sampled_from(DTYPES)))


@given(hidden_states())
def test_each_token_has_at_most_255_levels_and_its_largest_value_stays(hidden: Tensor) -> None:
    found = quantize_activations(hidden)
    assert found.dtype == hidden.dtype and found.shape == hidden.shape
    for token, quantised in zip(hidden.float().numpy(), found, strict=True):
        step = np.abs(token).max() / np.float32(127)
        codes = [0 if step == 0 else round(float(value / step)) for value in token]
        assert all(-127 <= code <= 127 for code in codes)
        assert step == 0 or max(map(abs, codes)) == 127
        wanted = torch.tensor([np.float32(code) * step for code in codes]).to(hidden.dtype)
        assert torch.equal(quantised, wanted)


@given(hidden_states())
def test_activations_get_the_gradient_of_their_quantised_values(hidden: Tensor) -> None:
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    hidden.requires_grad_()
    (quantize_activations(hidden) * gradient).sum().backward()
    assert torch.equal(hidden.grad, gradient)


# -- packing -----------------------------------------------------------------------------------------------------------


@st.composite
def trits(draw: st.DrawFn) -> Tensor:
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 6)), draw(st.integers(1, 8)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randint(-1, 2, shape, generator=generator).to(
        draw(st.sampled_from([torch.int8, torch.int64, *DTYPES]))
    )


@given(trits())
def test_packing_loses_nothing_and_takes_a_fifth_of_a_byte_per_weight(q: Tensor) -> None:
    packed = pack(q)
    weights = q.shape[-1] * q.shape[-2]
    assert packed.dtype == torch.uint8 and packed.shape == (*q.shape[:-2], math.ceil(weights / 5))
    assert packed.numel() == 0 or packed.max() <= 242
    unpacked = unpack(packed, (q.shape[-2], q.shape[-1]))
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, q.to(torch.int8))


@given(trits())
def test_a_byte_is_its_five_trits_in_base_three(q: Tensor) -> None:
    weights = q.shape[-1] * q.shape[-2]
    for matrix, found in zip(q.reshape(-1, weights), pack(q).reshape(-1, math.ceil(weights / 5)), strict=True):
        digits = [int(value) + 1 for value in matrix] + [1] * (-weights % 5)
        wanted = [int("".join(map(str, digits[n : n + 5])), 3) for n in range(0, len(digits), 5)]
        assert found.tolist() == wanted


def test_a_slot_is_packed_as_if_it_were_alone() -> None:
    q = torch.randint(-1, 2, (4, 2, 3, 7))
    packed = pack(q)
    for slot in range(4):
        assert torch.equal(packed[slot], pack(q[slot]))
        assert torch.equal(unpack(packed[slot], (3, 7)), q[slot].to(torch.int8))


@pytest.mark.parametrize("bad", [2, -2, 0.5, math.nan])
def test_only_trits_can_be_packed(bad: float) -> None:
    with pytest.raises(ConfigurationError, match="-1, 0 and 1"):
        pack(torch.tensor([[0.0, 1.0, bad]]))


@given(matrices(), st.sampled_from([*DTYPES, torch.float16, torch.float64]))
def test_unpacked_values_are_the_quantised_ones_bit_for_bit(weight: Tensor, dtype: torch.dtype) -> None:
    q, scale = ternary_quantize(weight)
    values = unpack_values(pack(q), scale, (q.shape[1], q.shape[2]), dtype)
    assert values.is_contiguous()
    assert_same_bits(values, dequantize(q, scale, dtype))


# -- slabs -------------------------------------------------------------------------------------------------------------


def oracle(slab: ExpertSlab, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
    """Output, and gradients of input, routing weights and projections, one pair at a time.

    Straight through, without trusting `fake_quantize`: the quantised values are leaves, and what they get is wanted.
    """

    def leaf(values: Tensor) -> Tensor:
        return values.detach().requires_grad_()

    def quantised(matrix: Tensor) -> Tensor:
        q, scale = ternary_quantize(matrix)
        return (q.float() * scale).to(matrix.dtype)

    def eight_bits(token: Tensor) -> Tensor:
        step = token.detach().float().abs().max() / 127
        codes = (token.detach().float() / step).round() if step else torch.zeros_like(token)
        # Exact in value up to fp64's rounding; the gradient is the identity's.
        return token + ((codes * step).to(token.dtype) - token).detach()

    gate_up = [[leaf(quantised(part)) for part in row.chunk(2)] for row in slab.gate_up_proj]
    down = [leaf(quantised(row)) for row in slab.down_proj]
    hidden, weights = leaf(hidden_TH), leaf(weights_TK)
    outputs = []
    for token, rows, shares in zip(hidden, rows_TK.tolist(), weights, strict=True):
        output = torch.zeros_like(token)
        seen = eight_bits(token)
        for row, share in zip(rows, shares, strict=True):
            if row < slab.num_experts:
                units = F.silu(gate_up[row][0] @ seen) * (gate_up[row][1] @ seen)
                output = output + share * (down[row] @ eight_bits(units))
        outputs.append(output)
    output_TH = torch.stack(outputs)
    if output_TH.requires_grad:
        output_TH.backward(output_gradient(output_TH))

    def grad(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    grads = [torch.stack([torch.cat([grad(g), grad(u)]) for g, u in gate_up]), torch.stack([grad(d) for d in down])]
    return [output_TH.detach(), grad(hidden), grad(weights), *grads]


def output_gradient(output: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape).to(output.dtype)


def run(slab: nn.Module, hidden_TH: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
    """Output, and gradients of input, routing weights and parameters, for one fixed output gradient."""
    slab.zero_grad()
    slab._is_expert_parallel = bool((rows_TK >= slab.num_experts).any())
    hidden, weights = hidden_TH.detach().requires_grad_(), weights_TK.detach().requires_grad_()
    output = slab(hidden, rows_TK, weights)
    if output.requires_grad:
        output.backward(output_gradient(output))
    found = [hidden, weights, *slab.parameters()]
    return [output.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in found)]


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, Tensor]:
    """A capacity, and rows (T, K) among which pairs of another slab may occur."""
    capacity, tokens, top_k = draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    last = capacity if draw(st.booleans()) else capacity - 1
    rows = draw(st.lists(st.integers(0, last), min_size=tokens * top_k, max_size=tokens * top_k))
    return capacity, torch.tensor(rows, dtype=torch.int64).reshape(tokens, top_k)


@settings(max_examples=40)
@given(routings(), st.integers(0, 99))
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "active"])
def test_output_and_every_gradient_equal_one_pair_at_a_time(
    implementation: str, routing: tuple[int, Tensor], seed: int
) -> None:
    capacity, rows_TK = routing
    slab = new_slab(capacity, implementation, seed=seed).double()
    hidden_TH, _, weights_TK = inputs(*rows_TK.shape, capacity, seed=seed)
    arguments = (hidden_TH.double(), rows_TK, weights_TK.double())
    for ours, theirs in zip(run(slab, *arguments), oracle(slab, *arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [5, 6], ids=["own pairs only", "pairs of another slab"])
def test_fp32_output_and_every_gradient_equal_one_pair_at_a_time(implementation: str, rows: int) -> None:
    """The one precision that grouped_mm has on a CPU beside bf16."""
    slab = new_slab(5, implementation, hidden=16, intermediate=24)
    arguments = inputs(20, 2, rows, 16)
    for ours, theirs in zip(run(slab, *arguments), oracle(slab, *arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_output_and_gradients_follow_the_fp64_oracle(implementation: str) -> None:
    slab = new_slab(5, implementation, hidden=16, intermediate=24).bfloat16()
    hidden_TH, rows_TK, weights_TK = inputs(30, 2, 5, 16)
    hidden_TH, weights_TK = hidden_TH.bfloat16(), weights_TK.bfloat16()
    exact = oracle(copy.deepcopy(slab).double(), hidden_TH.double(), rows_TK, weights_TK.double())
    for ours, theirs in zip(run(slab, hidden_TH, rows_TK, weights_TK), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_is_neither_the_float_slab_nor_a_slab_with_float_activations(dtype: torch.dtype) -> None:
    """What the comparisons above would not notice, were the tolerance too wide: both roundings can be seen."""
    slab = new_slab(5, "grouped_mm", hidden=16, intermediate=24).to(dtype)
    hidden_TH, rows_TK, weights_TK = inputs(30, 2, 5, 16)
    arguments = (hidden_TH.to(dtype), rows_TK, weights_TK.to(dtype))
    found = slab(*arguments).double()
    plain = new_slab(5, "grouped_mm", kind=ExpertSlab, hidden=16, intermediate=24).to(dtype)
    assert (plain(*arguments).double() - found).norm() > 0.1 * found.norm()
    with torch.no_grad():
        plain.gate_up_proj.copy_(fake_quantize(plain.gate_up_proj.unflatten(1, (2, -1))).flatten(1, 2))
        plain.down_proj.copy_(fake_quantize(plain.down_proj))
    assert (plain(*arguments).double() - found).norm() > 2e-3 * found.norm()


@settings(max_examples=60)
@given(routings(), st.integers(0, 99), st.sampled_from(DTYPES), st.integers(1, 13), st.integers(1, 11))
def test_packed_experts_compute_the_bits_of_fake_quantised_ones(
    routing: tuple[int, Tensor], seed: int, dtype: torch.dtype, hidden: int, intermediate: int
) -> None:
    capacity, rows_TK = routing
    slab = new_slab(capacity, seed=seed, hidden=hidden, intermediate=intermediate).to(dtype)
    hidden_TH, _, weights_TK = inputs(*rows_TK.shape, capacity, hidden, seed)
    arguments = (hidden_TH.to(dtype), rows_TK, weights_TK.to(dtype))
    for ours, theirs in zip(run(PackedTernary.from_slab(slab), *arguments), run(slab, *arguments)[:3], strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["latent", "packed"])
def test_an_experts_product_is_the_products_of_its_ternary_values_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    latent = new_slab(4, hidden=64, intermediate=48).to(dtype)
    slab: nn.Module = latent if kind == "latent" else PackedTernary.from_slab(latent)
    hidden_TH, rows_TK, weights_TK = inputs(40, 1, 4, 64)
    hidden_TH, weights_TK = hidden_TH.to(dtype), weights_TK.to(dtype)
    expected = torch.zeros_like(hidden_TH)
    for row in range(4):
        (gate, up), down = latent.gate_up_proj[row].chunk(2), latent.down_proj[row]
        gate, up, down = (dequantize(*ternary_quantize(part), dtype) for part in (gate, up, down))
        mine = (rows_TK[:, 0] == row).nonzero().flatten()
        seen = quantize_activations(hidden_TH)[mine]
        products = F.linear(seen, torch.cat([gate, up])).chunk(2, dim=-1)
        units = quantize_activations(F.silu(products[0]) * products[1])
        expected[mine] = F.linear(units, down) * weights_TK[mine]
    assert_same_bits(slab(hidden_TH, rows_TK, weights_TK).detach(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_quantises_what_it_multiplies(implementation: str) -> None:
    slab = new_slab(5, implementation, hidden=16, intermediate=24)
    arguments = inputs(30, 2, 5, 16)
    exact = oracle(copy.deepcopy(slab).double(), arguments[0].double(), arguments[1], arguments[2].double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = slab(*arguments)
        packed = PackedTernary.from_slab(slab)(*arguments)
    assert (found.double() - exact).norm() <= 2e-2 * exact.norm()
    if implementation == "eager":
        assert_same_bits(packed, found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_spare_slots_cost_nothing_and_get_no_gradient(implementation: str) -> None:
    slab, dense = new_slab(9, implementation, alive=4), new_slab(4, implementation)
    with torch.no_grad():
        slab.gate_up_proj[:4], slab.down_proj[:4] = dense.gate_up_proj, dense.down_proj
    arguments = inputs(25, 2, 4)
    found, wanted = run(slab, *arguments), run(dense, *arguments)
    for ours, theirs in zip(found[:3], wanted[:3], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found[3:], wanted[3:], strict=True):
        assert torch.equal(ours[:4], theirs) and not ours[4:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_of_zeros_gives_zeros_and_finite_gradients(implementation: str) -> None:
    slab = new_slab(3, implementation, alive=2)
    hidden_TH, _, weights_TK = inputs(6, 1, 3)
    output, *grads = run(slab, hidden_TH, torch.full((6, 1), 2), weights_TK)
    assert not output.any() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_slab_without_a_token_still_gets_a_zero_gradient(implementation: str) -> None:
    """DistributedDataParallel waits for a gradient of every parameter on every rank."""
    slab = new_slab(3, implementation)
    slab._is_expert_parallel = True
    hidden_TH, _, weights_TK = inputs(4, 2, 3)
    output = slab(hidden_TH.requires_grad_(), torch.full((4, 2), 3), weights_TK)
    output.backward(torch.ones_like(output))
    assert not output.any()
    for parameter in slab.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("kind", [TernarySlab, PackedTernary])
def test_a_batch_without_tokens_is_fine(kind: type[nn.Module]) -> None:
    latent = new_slab(3)
    slab = latent if kind is TernarySlab else PackedTernary.from_slab(latent)
    hidden_TH, rows_TK, weights_TK = inputs(0, 2, 3)
    assert slab(hidden_TH, rows_TK, weights_TK).shape == (0, HIDDEN)


def test_the_opt_in_for_direct_gradients_changes_no_gradient() -> None:
    arguments = inputs(12, 2, 5)
    found = []
    for direct in (False, True):
        slab = new_slab(5, "active")
        slab.direct_grad = direct
        found.append(run(slab, *arguments))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("implementation", ["eager", "active"])
def test_only_experts_with_tokens_are_quantised(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    quantise = ternary._ternary_values
    monkeypatch.setattr(ternary, "_ternary_values", lambda w: seen.append(w.numel()) or quantise(w))
    slab = new_slab(50, implementation)
    hidden_TH, _, weights_TK = inputs(6, 2, 50)
    slab(hidden_TH, torch.tensor([[7, 31]] * 6), weights_TK)
    assert sum(seen) == 2 * 3 * HIDDEN * INTERMEDIATE


def test_only_experts_with_tokens_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    values = PackedTernary.values
    monkeypatch.setattr(PackedTernary, "values", lambda s, row, dtype: asked.append(row) or values(s, row, dtype))
    packed = PackedTernary.from_slab(new_slab(6))
    hidden_TH, _, weights_TK = inputs(5, 2, 6)
    packed(hidden_TH, torch.tensor([[4, 1]] * 4 + [[1, 6]]), weights_TK)
    assert asked == [1, 4]


@pytest.mark.parametrize("name", ["sonicmoe", "deepgemm"])
def test_an_implementation_that_leaves_no_place_to_quantise_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}.*grouped_mm"):
        new_slab(2, name)(*inputs(3, 1, 2))


def test_a_float_slabs_weights_load_as_latents() -> None:
    plain = new_slab(4, kind=ExpertSlab, seed=3)
    slab = new_slab(4)
    slab.load_state_dict(plain.state_dict())
    assert torch.equal(slab.gate_up_proj, plain.gate_up_proj) and torch.equal(slab.down_proj, plain.down_proj)


def test_latent_weights_learn_through_the_quantiser() -> None:
    slab, teacher = new_slab(2, "grouped_mm", seed=1), new_slab(2, "grouped_mm", seed=2)
    arguments = inputs(64, 1, 2)
    target = teacher(*arguments).detach()
    optimizer = torch.optim.Adam(slab.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(slab(*arguments), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_a_ternary_slab_compiles_without_a_graph_break(implementation: str) -> None:
    slab = new_slab(4, implementation)
    arguments = inputs(10, 2, 4)
    compiled = torch.compile(slab, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, *arguments), run(slab, *arguments), strict=True):
        torch.testing.assert_close(ours, theirs)


# -- packed slabs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 48), (33, 17), (32, 16)])
def test_packed_experts_take_a_seventh_of_bf16_in_memory_and_on_disk(
    hidden: int, intermediate: int, tmp_path: Path
) -> None:
    slab = new_slab(16, hidden=hidden, intermediate=intermediate).bfloat16()
    packed = PackedTernary.from_slab(slab)
    weights = 16 * 3 * hidden * intermediate
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert packed.nbytes * 8 <= 2 * weights and packed.nbytes <= 0.14 * 2 * weights
    assert not list(packed.parameters())
    save_file(packed.state_dict(), tmp_path / "packed.safetensors")
    save_file(slab.state_dict(), tmp_path / "bf16.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("packed", "bf16")]
    assert sizes[0] <= 0.14 * sizes[1]


def test_every_buffer_has_a_row_per_slot_and_a_new_slab_is_zeros() -> None:
    packed = PackedTernary(5, HIDDEN, INTERMEDIATE, "silu")
    assert all(buffer.shape[0] == 5 for buffer in packed.buffers())
    zeros = PackedTernary.from_slab(new_slab(5, alive=0))
    for ours, theirs in zip(packed.buffers(), zeros.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(part.any() for part in packed.values(3, torch.float32))


@given(st.lists(st.integers(-1, 4), max_size=7))
def test_selected_rows_are_those_experts_and_negative_ones_are_spare(rows: list[int]) -> None:
    slab = new_slab(5)
    packed = PackedTernary.from_slab(slab)
    moved = packed.row_select(rows)
    assert moved.num_experts == len(rows) and moved.nbytes * 5 == packed.nbytes * len(rows)
    hidden_TH, _, weights_TK = inputs(3, 1, 5)
    for place, row in enumerate(rows):
        found = moved(hidden_TH, torch.full((3, 1), place), weights_TK)
        if row < 0:
            assert not found.any()
        else:
            assert_same_bits(found, packed(hidden_TH, torch.full((3, 1), row), weights_TK))
    for buffer in moved.buffers():
        buffer.zero_()
    for ours, theirs in zip(packed.buffers(), PackedTernary.from_slab(slab).buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_dict_brings_the_experts_back_and_casts_leave_the_scales_alone() -> None:
    packed = PackedTernary.from_slab(new_slab(3))
    loaded = PackedTernary(3, HIDDEN, INTERMEDIATE, "silu").bfloat16()
    loaded.load_state_dict(packed.state_dict())
    for ours, theirs in zip(loaded.half().buffers(), packed.buffers(), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_of_packed_experts_quantise_to_what_they_were(dtype: torch.dtype) -> None:
    slab = new_slab(3, alive=2, hidden=32, intermediate=24)
    packed = PackedTernary.from_slab(slab)
    thawed = new_slab(3, hidden=32, intermediate=24).to(dtype)
    with torch.no_grad():
        for row in range(3):
            thawed.gate_up_proj[row], thawed.down_proj[row] = packed.latents(row)
    again = PackedTernary.from_slab(thawed)
    assert torch.equal(again.gate_up_packed, packed.gate_up_packed)
    assert torch.equal(again.down_packed, packed.down_packed)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(again.gate_up_scale, packed.gate_up_scale, rtol=tolerance, atol=0)
    torch.testing.assert_close(again.down_scale, packed.down_scale, rtol=tolerance, atol=0)


# -- conversion --------------------------------------------------------------------------------------------------------


@given(matrices((torch.float32,)), st.floats(0.05, 2.0), st.floats(0.01, 3.0), st.sampled_from(DTYPES))
def test_latents_are_quantised_to_the_chosen_trits_and_scale(
    weight: Tensor, share: float, scale: float, dtype: torch.dtype
) -> None:
    for matrix in weight:
        threshold = share * float(matrix.abs().mean())
        wanted = matrix.sign() * (matrix.abs() > threshold)
        latents = latent_weights(matrix, max(threshold, 1e-30), scale).to(dtype)
        q, found = ternary_quantize(latents)
        assert torch.equal(q.float(), wanted)
        if wanted.any():
            assert float(found) == pytest.approx(scale, rel=3e-6 if dtype == torch.float32 else 4e-3)
        else:
            assert not latents.any()


@pytest.mark.parametrize("scale", [0.011, 1.7])
def test_rounding_latents_to_bf16_moves_no_weight_across_the_threshold(scale: float) -> None:
    """Of a hundred thousand weights some are at the threshold, and bf16 moves the scale too."""
    weight = torch.randn(300, 400)
    q, found = ternary_quantize(latent_weights(weight, 0.7, scale).bfloat16())
    assert torch.equal(q, (weight.sign() * (weight.abs() > 0.7)).to(torch.int8))
    assert float(found) == pytest.approx(scale, rel=1e-3)


def test_latents_keep_the_order_of_magnitudes() -> None:
    weight = torch.randn(20, 30)
    latents = latent_weights(weight, 0.8, 1.3)
    assert torch.equal(latents.sign(), weight.sign())
    order = weight.abs().flatten().argsort()
    assert (latents.abs().flatten()[order].diff() >= 0).all()


def correlated(tokens: int, hidden: int, seed: int) -> Tensor:
    """Inputs as they are inside models: a few directions and a few dimensions much stronger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(hidden, hidden, generator=generator) / hidden**0.5
    strength = torch.exp(torch.randn(hidden, generator=generator))
    return torch.randn(tokens, hidden, generator=generator) * strength @ mix + torch.randn(hidden, generator=generator)


@torch.no_grad()
def expert_errors(exact: ExpertSlab, slab: nn.Module, hidden_TH: Tensor, rows_TK: Tensor) -> list[float | None]:
    """Relative output errors per expert, each expert alone on its tokens; None for one without."""
    errors: list[float | None] = []
    for row in range(exact.num_experts):
        mine = hidden_TH[(rows_TK == row).any(dim=-1)]
        route = (torch.full((len(mine), 1), row), torch.ones(len(mine), 1, dtype=mine.dtype))
        wanted, found = (module(mine, *route).float() for module in (exact, slab))
        errors.append(float((found - wanted).norm() / wanted.norm()) if len(mine) else None)
    return errors


@settings(max_examples=15)
@given(st.integers(0, 999), st.sampled_from([1, 6, 80]), st.sampled_from(DTYPES), st.sampled_from([0.0, 8.0]))
def test_calibration_is_never_worse_than_absmean_on_its_tokens(
    seed: int, tokens: int, dtype: torch.dtype, outliers: float
) -> None:
    exact = new_slab(3, kind=ExpertSlab, hidden=16, intermediate=24, seed=seed).to(dtype)
    with torch.no_grad():
        exact.down_proj += outliers * (torch.rand(exact.down_proj.shape) < 0.02)
    plain, slab = (new_slab(3, hidden=16, intermediate=24).to(dtype) for _ in range(2))
    for ternary_slab in (plain, slab):
        ternary_slab.load_state_dict(exact.state_dict())
    hidden_TH = correlated(tokens, 16, seed).to(dtype)
    rows_TK = inputs(tokens, 2, 3, seed=seed)[1]
    report = ternarize_(slab, hidden_TH, rows_TK)
    assert report.absmean_C.dtype == torch.float32 and report.absmean_C.shape == (3,)
    # Measured in fp32, with the latents as they were rounded to `dtype`.
    before, after = (
        expert_errors(exact.float(), module.float(), hidden_TH.float(), rows_TK) for module in (plain, slab)
    )
    for old, new, *reported in zip(before, after, report.absmean_C, report.calibrated_C, strict=True):
        if old is not None and new is not None:
            assert new <= old * (1 + 1e-5)
            assert [float(error) for error in reported] == pytest.approx([old, new], rel=1e-3)
        assert reported[1] <= reported[0]


def test_the_reported_errors_are_those_of_the_experts() -> None:
    exact = new_slab(4, kind=ExpertSlab, hidden=32, intermediate=24)
    plain, slab = new_slab(4, hidden=32, intermediate=24), new_slab(4, hidden=32, intermediate=24)
    hidden_TH, rows_TK = correlated(120, 32, 0), inputs(120, 2, 4)[1]
    report = ternarize_(slab, hidden_TH, rows_TK)
    modules = (plain, slab, PackedTernary.from_slab(slab))
    before, after, packed = (expert_errors(exact, module, hidden_TH, rows_TK) for module in modules)
    assert report.absmean_C.tolist() == pytest.approx(before, rel=1e-3)
    assert report.calibrated_C.tolist() == pytest.approx(after, rel=1e-3) and after == packed
    assert all(new < 0.95 * old for new, old in zip(after, before, strict=True))


def test_no_other_scale_of_down_fits_the_experts_outputs_better() -> None:
    exact, slab = new_slab(3, kind=ExpertSlab, hidden=32, intermediate=24), new_slab(3, hidden=32, intermediate=24)
    hidden_TH, rows_TK = correlated(120, 32, 0), inputs(120, 2, 3)[1]
    ternarize_(slab, hidden_TH, rows_TK)
    best = expert_errors(exact, slab, hidden_TH, rows_TK)
    for factor in (0.97, 1.03):
        other = copy.deepcopy(slab)
        with torch.no_grad():
            other.down_proj *= factor  # scales every magnitude, hence no trit changes
        assert all(new > old for new, old in zip(expert_errors(exact, other, hidden_TH, rows_TK), best, strict=True))


def test_where_fitting_each_matrix_does_not_help_the_expert_its_weights_stay() -> None:
    """With a single token the parts are fitted to it one by one, and the whole now and then comes out worse."""
    kept = 0
    for seed in range(20):
        slab = new_slab(1, hidden=16, intermediate=24, seed=seed)
        before = copy.deepcopy(slab)
        report = ternarize_(slab, correlated(1, 16, seed), torch.zeros(1, 1, dtype=torch.int64))
        if torch.equal(slab.down_proj, before.down_proj):
            assert torch.equal(slab.gate_up_proj, before.gate_up_proj)
            assert torch.equal(report.calibrated_C, report.absmean_C)
            kept += 1
        else:
            assert report.calibrated_C < report.absmean_C
    assert 0 < kept < 20


def test_calibration_also_helps_on_tokens_it_has_not_seen() -> None:
    exact = new_slab(2, kind=ExpertSlab, hidden=32, intermediate=24)
    plain, slab = new_slab(2, hidden=32, intermediate=24), new_slab(2, hidden=32, intermediate=24)
    hidden_TH, rows_TK = correlated(600, 32, 0), inputs(600, 1, 2)[1]
    ternarize_(slab, hidden_TH[:300], rows_TK[:300])
    before, after = (expert_errors(exact, module, hidden_TH[300:], rows_TK[300:]) for module in (plain, slab))
    assert all(new < old for new, old in zip(after, before, strict=True))


def test_without_tokens_the_weights_error_is_near_the_best_there_is() -> None:
    slab = new_slab(2, hidden=24, intermediate=16)
    exact = copy.deepcopy(slab)
    report = ternarize_(slab)
    for row in range(2):
        squares, total = 0.0, 0.0
        for weight in (*exact.gate_up_proj[row].detach().chunk(2), exact.down_proj[row].detach()):
            # Whatever the scale, the best q rounds to nearest: one search over scales finds the best of all.
            scales = torch.linspace(0.2, 3, 600) * weight.abs().mean()
            squares += min(float((weight - s * (weight / s).round().clamp(-1, 1)).square().sum()) for s in scales)
            total += float(weight.square().sum())
        best = (squares / total) ** 0.5
        assert best * 0.999 <= report.calibrated_C[row] <= best * 1.01
        assert report.calibrated_C[row] < report.absmean_C[row]


def test_experts_without_tokens_and_spare_slots_are_converted_by_their_weights() -> None:
    slab, same = new_slab(4, alive=3, hidden=16), new_slab(4, alive=3, hidden=16)
    hidden_TH, _, _ = inputs(30, 1, 4, 16)
    rows_TK = torch.tensor([[0, 1]] * 29 + [[1, 4]])  # none to 2; 3 is spare; 4 is of another slab
    report, weights_only = ternarize_(slab, hidden_TH, rows_TK), ternarize_(same)
    assert torch.equal(slab.down_proj[2:], same.down_proj[2:]) and not slab.down_proj[3].any()
    assert torch.equal(slab.gate_up_proj[2:], same.gate_up_proj[2:]) and not slab.gate_up_proj[3].any()
    assert torch.equal(report.calibrated_C[2:], weights_only.calibrated_C[2:])
    assert report.absmean_C[3] == 0 and report.calibrated_C[3] == 0
    assert slab.gate_up_proj.requires_grad and slab.gate_up_proj.is_leaf


def test_a_ternary_expert_is_left_as_it_is() -> None:
    """Nothing is better than no error: weights that are their own ternary values stay."""
    slab = new_slab(1)
    with torch.no_grad():
        for parameter in slab.parameters():
            parameter.copy_(torch.where(torch.rand_like(parameter) < 0.5, 0.3, -0.3))
    before = copy.deepcopy(slab.state_dict())
    report = ternarize_(slab)
    assert float(report.absmean_C) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(slab.state_dict(), before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("drop", ["hidden", "rows", "some tokens"])
def test_calibration_wants_tokens_and_their_rows(drop: str) -> None:
    hidden_TH, rows_TK, _ = inputs(6, 2, 3)
    arguments: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "hidden": (None, rows_TK),
        "rows": (hidden_TH, None),
        "some tokens": (hidden_TH[1:], rows_TK),
    }
    slab = new_slab(3)
    before = copy.deepcopy(slab.state_dict())
    with pytest.raises(ConfigurationError, match="row of experts for each token"):
        ternarize_(slab, *arguments[drop])
    torch.testing.assert_close(slab.state_dict(), before, rtol=0, atol=0)
