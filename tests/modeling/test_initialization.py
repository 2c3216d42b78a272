"""A model from scratch: every weight has its initial value, none is left as it was allocated."""

import re

import pytest
import torch

from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.configuration import PRESETS
from tests.factories import FAMILIES, source_config, token_ids

#: Zero by design: biases, the half of a low-rank delta that makes it change nothing at first, the strength of synapses,
#: and what is learned as the logarithm of a share of its first value (temperature, rates of synapses).
ZERO_AT_FIRST = re.compile(
    r"\.bias$|_delta\.up\.\d+$|\.learned_temperature\.log_ratio$|\.synapse\.(strength|presynapse\.scalars|expression(\.\w+)?)$"
)


def fresh(family: str, preset: str, seed: int = 0, **overrides: int) -> LivingMoeForCausalLM:
    torch.manual_seed(seed)
    return LivingMoeForCausalLM(LivingMoeConfig.from_backbone(source_config(family, **overrides), preset=preset))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_starts_at_zero_by_design_is_zero(family, preset):
    for name, parameter in fresh(family, preset).named_parameters():
        assert bool(parameter.any()) != bool(ZERO_AT_FIRST.search(name)), name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_have_the_spread_of_the_familys_other_weights(family, preset):
    model = fresh(family, preset, hidden_size=128)
    std = model.config.backbone_config.initializer_range
    for block in model.living_blocks:
        keys = torch.cat([key.detach().flatten() for key in block.router.keys.values()])
        assert keys.std().item() == pytest.approx(std, rel=0.15)


@pytest.mark.parametrize("preset", PRESETS)
def test_experts_of_a_model_from_scratch_are_told_apart(preset):
    model = fresh("mixtral", preset).eval()
    ids = token_ids(4, 32)
    chosen = model(input_ids=ids, output_router_logits=True).router_logits
    for logits in chosen:
        assert logits.std(dim=-1).min() > 0
        assert logits.topk(2).indices.unique().numel() > 2


def test_seeds_differ_and_repeat():
    one, same, other = (fresh("mixtral", "some", seed).living_blocks[0].router.keys["frozen"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
