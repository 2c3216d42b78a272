"""Initial weights of experts: orthonormal or sparse, all kinds of one variance, and never over loaded weights."""

from pathlib import Path

import pytest
import torch
from factories import living_model, source_config
from torch import Tensor

from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import ExpertsConfig
from living_moe.modeling_living_moe.experts import ExpertSlab, init_experts

KINDS = ("default", "orthogonal", "sparse")


def slab(
    hidden: int = 24, intermediate: int = 40, experts: int = 3, std: float = 0.02, **settings: object
) -> ExpertSlab:
    made = ExpertSlab(source_config("mixtral"), experts, hidden, intermediate, trainable=True)
    init_experts(made, std, ExpertsConfig(**settings))
    return made


def matrices(made: ExpertSlab) -> list[Tensor]:
    """Gate, up and down projection of every expert."""
    gate_up = [part for row in made.gate_up_proj.detach() for part in row.chunk(2)]
    return [*gate_up, *made.down_proj.detach()]


@pytest.mark.parametrize(("hidden", "intermediate"), [(24, 40), (40, 24), (32, 32), (8, 1)])
@pytest.mark.parametrize("gain", [None, 0.3])
def test_orthogonal_matrices_have_orthonormal_rows_or_columns_up_to_scale(
    hidden: int, intermediate: int, gain: float | None
) -> None:
    for matrix in matrices(slab(hidden, intermediate, init="orthogonal", init_gain=gain)):
        rows, columns = matrix.shape
        product = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
        scale = (gain or 1.0) ** 2 * max(rows, columns) / columns
        torch.testing.assert_close(product, scale * torch.eye(min(rows, columns)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_sparse_matrices_have_their_share_of_zeros(sparsity: float) -> None:
    for matrix in matrices(slab(80, 120, init="sparse", init_sparsity=sparsity)):
        assert float((matrix == 0).float().mean()) == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_every_kind_have_the_variance_gain_squared_over_fan_in(kind: str, gain: float) -> None:
    made = slab(90, 150, experts=4, init=kind, init_gain=gain, init_sparsity=0.8)
    for weight in (made.gate_up_proj, made.down_proj):
        assert float(weight.detach().var() * weight.shape[-1]) == pytest.approx(gain**2, rel=0.05)
        assert abs(float(weight.detach().mean())) < 0.01 * gain


@pytest.mark.parametrize("kind", ["orthogonal", "sparse"])
def test_without_a_gain_it_is_one(kind: str) -> None:
    assert float(slab(90, 150, init=kind).gate_up_proj.detach().var() * 90) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("kind", ["default", "pretrained"])
def test_the_default_is_normal_with_the_backbones_range(kind: str) -> None:
    made = slab(90, 150, init=kind, std=0.07)
    for matrix in matrices(made):
        assert float(matrix.std()) == pytest.approx(0.07, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_its_weights_and_no_two_experts_are_alike(kind: str) -> None:
    torch.manual_seed(3)
    one = slab(init=kind)
    torch.manual_seed(3)
    same = slab(init=kind)
    other = slab(init=kind)
    assert all(map(torch.equal, matrices(one), matrices(same)))
    assert not any(map(torch.equal, matrices(one), matrices(other)))
    parts = [matrix.flatten() for matrix in matrices(one)]
    for number, first in enumerate(parts):
        for second in parts[number + 1 :]:
            assert float(torch.cosine_similarity(first, second, dim=0).abs()) < 0.35


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_a_config_is_built_that_way_in_its_dtype(kind: str) -> None:
    torch.manual_seed(0)
    config = LivingMoeConfig.from_backbone(
        source_config("mixtral", initializer_range=0.05), preset="grow", experts={"init": kind, "init_sparsity": 0.75}
    )
    model = LivingMoeForCausalLM(config)
    twin_config = LivingMoeConfig.from_dict(config.to_dict())
    torch.manual_seed(0)
    twin = LivingMoeForCausalLM(twin_config)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name
    made = model.living_blocks[1].experts.slab("trainable")
    gate = made.gate_up_proj.detach()[2, :16]
    if kind == "default":
        assert float(made.gate_up_proj.detach().std()) == pytest.approx(0.05, rel=0.05)
    elif kind == "orthogonal":
        torch.testing.assert_close(gate @ gate.T, torch.eye(16), rtol=1e-4, atol=1e-5)
    else:
        assert float((made.gate_up_proj == 0).float().mean()) == pytest.approx(0.75, abs=0.03)
    config.dtype = torch.bfloat16
    low = LivingMoeForCausalLM._from_config(config)
    weight = low.living_blocks[0].experts.slab("trainable").gate_up_proj
    assert weight.dtype == torch.bfloat16 and weight.isfinite().all() and weight.any()


def test_frozen_experts_of_the_preset_some_start_at_a_useful_scale() -> None:
    config = LivingMoeConfig.from_backbone(source_config("mixtral"), preset="some")
    weight = LivingMoeForCausalLM(config).living_blocks[0].experts.slab("frozen").gate_up_proj
    assert float(weight.var() * weight.shape[-1]) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_weights_are_left_alone(kind: str, tmp_path: Path) -> None:
    model = living_model("mixtral")
    model.config.experts.init, model.config.experts.init_gain = kind, 5.0
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    again = LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert again.config.experts.init == kind
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"


@pytest.mark.parametrize(
    ("field", "value"), [("init", "xavier"), ("init_gain", 0.0), ("init_sparsity", 1.0), ("init_sparsity", -0.1)]
)
def test_an_initialisation_without_sense_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"experts.{field}"):
        ExpertsConfig(**{field: value})
