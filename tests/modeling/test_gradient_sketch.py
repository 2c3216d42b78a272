"""The sketch estimates what the gradients themselves would say, within the error it states."""

import pytest
import torch
from factories import living_model, mixed_text
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from living_moe.modeling_living_moe.gradient_sketch import (
    CHUNK,
    PATTERNS,
    PERIOD,
    SKETCH,
    STRIDE,
    STRIDES,
    _hashes,
    _turn,
    conflict_zone,
    similarity,
    sketch_rows,
)


def slow_sketch(gradients: list[Tensor]) -> Tensor:
    """Of one expert: coordinate by coordinate."""
    buckets = [0.0] * SKETCH
    hashes = _hashes(torch.device("cpu"))
    chunk = 0
    for gradient in gradients:
        values = gradient.flatten().tolist()
        for start in range(0, len(values), CHUNK):
            shift, sign = _turn(chunk)
            part = values[start : start + CHUNK]
            for coordinate, value in enumerate(part):
                stride, place = divmod(coordinate, STRIDE)
                own = float(hashes.rest[stride, place])
                if len(part) == CHUNK:
                    of_chunk = chunk % PERIOD
                    pattern = int(hashes.picked[of_chunk, place])
                    own = float(hashes.pattern[of_chunk, pattern, stride] * hashes.sign[of_chunk, place])
                buckets[(place + shift) % SKETCH] += sign * own * value
            chunk += 1
    return torch.tensor(buckets)


@pytest.mark.parametrize("sizes", [[(3,), (5, 50)], [(16, CHUNK // 8), (STRIDE,)], [(CHUNK + STRIDE + 1,), (CHUNK,)]])
def test_the_fast_sketch_is_the_slow_one_and_norms_are_exact(sizes: list[tuple[int, ...]]) -> None:
    gradients = [torch.randn(3, *size) for size in sizes]
    sketch, norm = sketch_rows(gradients, 2)
    assert sketch.shape == (2, SKETCH)
    for row in range(2):
        torch.testing.assert_close(sketch[row], slow_sketch([g[row] for g in gradients]), rtol=1e-4, atol=1e-3)
    whole = torch.cat([g[:2].flatten(1) for g in gradients], dim=1)
    torch.testing.assert_close(norm, whole.norm(dim=1))


def test_patterns_are_used_again_after_their_period_with_other_buckets() -> None:
    gradient = torch.zeros(2, (PERIOD + 1) * CHUNK)
    gradient[0, 0] = gradient[1, PERIOD * CHUNK] = 1.0
    sketch, _ = sketch_rows([gradient], 2)
    buckets = sketch.abs().argmax(dim=1).tolist()
    assert sketch.abs().sum(dim=1).tolist() == [1.0, 1.0] and buckets[0] != buckets[1]


def test_signs_are_fair_and_independent() -> None:
    hashes = _hashes(torch.device("cpu"))
    for signs in (hashes.pattern, hashes.sign, hashes.rest):
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        assert abs(float(signs.mean())) < 4 / signs.numel() ** 0.5
    patterns = hashes.pattern.flatten(0, 1)
    between = patterns @ patterns.T / STRIDES - torch.eye(len(patterns))
    assert float(between.square().mean().sqrt()) == pytest.approx(STRIDES**-0.5, rel=0.05)
    counts = torch.bincount(hashes.picked.flatten(), minlength=PATTERNS).float()
    assert float((counts / counts.mean() - 1).abs().max()) < 0.1


#: Gradients (experts, rows, columns) of every shape a matrix's gradient takes: none of them may fool the sketch.
SHAPES = {
    "dense": lambda: torch.randn(48, 192, 256),
    "of one token": lambda: torch.randn(48, 192, 1) * torch.randn(48, 1, 256),
    "of one token, positive": lambda: torch.rand(48, 192, 1) * torch.rand(48, 1, 256),
    "one column": lambda: torch.randn(48, 192, 256) * torch.where(torch.arange(256) == 7, 100.0, 1.0),
    "few rows": lambda: torch.randn(48, 192, 256) * (torch.arange(192) < 8).unsqueeze(1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cosine", [-0.9, -0.5, 0.0, 0.5])
def test_a_cosine_is_known_within_the_stated_error(name: str, cosine: float) -> None:
    one, noise = SHAPES[name](), SHAPES[name]()
    flat, other = one.flatten(1), noise.flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    other = other - (other * unit).sum(1, keepdim=True) * unit
    other = cosine * unit + (1 - cosine**2) ** 0.5 * other / other.norm(dim=1, keepdim=True)
    sketches = [sketch_rows([g.view_as(one)], 48)[0] for g in (one, other)]
    error = similarity(*sketches)[0] - cosine
    bound = 0.12 if name == "of one token, positive" else 0.09
    assert float(error.square().mean().sqrt()) < bound


@given(st.integers(0, 1000), st.floats(0.1, 10.0))
def test_similarities_are_bounded_and_a_sketch_is_linear(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(2, 300, generator=generator) for _ in range(2))
    both = sketch_rows([one], 2)[0] + scale * sketch_rows([other], 2)[0]
    torch.testing.assert_close(sketch_rows([one + scale * other], 2)[0], both, rtol=1e-4, atol=1e-4)
    cosine, magnitude = similarity(one, scale * one)
    torch.testing.assert_close(cosine, torch.ones(2))
    torch.testing.assert_close(magnitude, torch.full((2,), 2 * scale / (1 + scale**2)))
    assert similarity(one, torch.zeros_like(one))[0].tolist() == [0.0, 0.0]
    assert similarity(torch.zeros_like(one), torch.zeros_like(one))[1].tolist() == [0.0, 0.0]


def test_conflict_is_that_of_the_gradients_with_their_running_mean() -> None:
    model = living_model("mixtral", sections={"vitals": {"grad_norm_every": 1, "signals_every": 0}}).train()
    slab = model.living_blocks[1].experts.slab("trainable")
    means, cosines, magnitudes = torch.zeros(8, 1), [], []
    for step in range(4):
        ids = mixed_text(4, 8, seed=step)
        model(ids, labels=ids if step < 3 else ids.flip(1)).loss.backward()
        rows = torch.cat([slab.gate_up_proj.grad.flatten(1), slab.down_proj.grad.flatten(1)], dim=1)
        if step:
            exact = similarity(rows, means)
            cosines.append(exact[0])
            magnitudes.append(exact[1])
        means = (means * step + rows) / (step + 1)
        model.lifecycle_step()
        model.zero_grad()
    vitals = model.vitals(1)
    table = model.living_blocks[1].vitals.table("trainable")
    busy = table.compared == 4
    assert int(busy.sum()) > 4
    split = means.split([slab.gate_up_proj[0].numel(), slab.down_proj[0].numel()], dim=1)
    torch.testing.assert_close(table.sketch[busy], sketch_rows(split, 8)[0][busy], rtol=1e-3, atol=1e-5)
    cosine_error = (vitals["conflict_cos"] - torch.stack(cosines).mean(0))[busy]
    magnitude_error = (vitals["conflict_magnitude"] - torch.stack(magnitudes).mean(0))[busy]
    assert float(cosine_error.abs().max()) < 0.2 and float(magnitude_error.abs().max()) < 0.1
    assert torch.equal(vitals["grad_norm"] > 0, table.compared > 0)


def test_an_expert_without_a_gradient_learns_nothing_of_itself() -> None:
    model = living_model("mixtral", sections={"vitals": {"grad_norm_every": 1}}).train()
    model.freeze_expert(0, 2)
    for _ in range(2):
        model(mixed_text(4, 8), labels=mixed_text(4, 8)).loss.backward()
        slab = model.living_blocks[0].experts.slab("trainable")
        slab.gate_up_proj.grad[3], slab.down_proj.grad[3] = 0.0, 0.0
        model.lifecycle_step()
        model.zero_grad()
    tables = model.living_blocks[0].vitals
    assert tables.table("frozen").compared.tolist() == [0] and not tables.table("frozen").sketch.any()
    assert int(tables.table("trainable").compared[3]) == 0 and not tables.table("trainable").conflict_cos[3]
    assert int(tables.table("trainable").compared.max()) == 2


def test_opposite_gradients_are_a_strong_conflict() -> None:
    model = living_model("mixtral", sections={"vitals": {"grad_norm_every": 1}}).train()
    model(mixed_text(4, 8), labels=mixed_text(4, 8)).loss.backward()
    slab = model.living_blocks[0].experts.slab("trainable")
    model.lifecycle_step()
    for parameter in (slab.gate_up_proj, slab.down_proj):
        parameter.grad.neg_()
    model.lifecycle_step()
    torch.testing.assert_close(model.vitals(0)["conflict_cos"], torch.full((8,), -1.0))
    torch.testing.assert_close(model.vitals(0)["conflict_magnitude"], torch.ones(8))
    zones = [conflict_zone(cosine) for cosine in (-1.0, -0.5, -0.3, -0.1, 0.0, 0.1, 0.2, 1.0)]
    assert zones == ["strong conflict"] * 2 + ["mild conflict"] + ["neutral"] * 3 + ["aligned"] * 2
