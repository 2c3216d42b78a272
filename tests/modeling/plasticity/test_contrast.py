"""Keys that turn away from each other: the loop over pairs, bounds, who is left alone, and twins after a split."""

import pytest
import torch
import torch.nn.functional as F
from factories import living_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.presets import preset_sections
from living_moe.configuration.sections import PlasticityConfig
from living_moe.modeling_living_moe.lifecycle.affinity import coactivation
from living_moe.modeling_living_moe.plasticity.contrast import company, push_apart
from living_moe.modeling_living_moe.plasticity.gravity import Evidence, LayerKeys, consolidate, reference_consolidate
from living_moe.modeling_living_moe.plasticity.gravity import unit_directions as directions
from living_moe.training.optimizers import LivingAdamW

STILL = {"use_alpha": False, "use_beta": False, "use_decay": False}


def choices(tokens: int, experts: int, places: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :places]
    return index.masked_fill(torch.rand(index.shape, generator=generator) < 0.2, -1)


def cosines(keys: Tensor) -> Tensor:
    unit = F.normalize(keys.double(), dim=1)
    return unit @ unit.T


@given(
    seed=st.integers(0, 1000),
    experts=st.integers(1, 7),
    width=st.integers(1, 6),
    tokens=st.integers(0, 20),
    rate=st.sampled_from([0.0, 0.01, 0.9]),
    margin=st.sampled_from([0.0, 0.3, 0.9]),
    twins=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_push_is_the_loop_over_pairs_keeps_lengths_and_turns_by_the_rate_at_most(
    seed: int, experts: int, width: int, tokens: int, rate: float, margin: float, twins: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(experts, width, generator=generator).double() + 0.5
    if twins and experts > 1:
        keys[1] = 3 * keys[0]
    uid, index = torch.arange(experts) + 5, choices(tokens, experts, min(2, experts), seed)
    config = PlasticityConfig(**STILL, contrast=rate, contrast_cosine=margin)
    layer = LayerKeys(keys, keys, torch.zeros(experts, dtype=torch.int64), torch.zeros(experts), uid)
    wanted = reference_consolidate(layer, [Evidence(torch.zeros(tokens, width), index)], config).keys_ED
    found = push_apart(keys, directions(uid, width), company(index, experts), rate, margin)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), keys.norm(dim=1))
    # An arc cosine loses half of the digits.
    turned = F.cosine_similarity(found, keys, dim=1).clamp(-1, 1).arccos()
    assert (turned <= rate + 1e-6).all()


def test_company_is_coactivation() -> None:
    index = choices(50, 9, 3)
    assert torch.equal(company(index, 9), coactivation(index, 9))
    assert torch.equal(company(index[:0], 9), torch.zeros(9, 9))


def test_who_serves_together_and_who_serves_nobody_is_left_alone() -> None:
    keys = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 0.3 + 1, dim=1)
    own, index = directions(torch.arange(4), 8), torch.tensor([[0, 1]] * 6 + [[2, -1]])
    found = push_apart(keys, own, company(index, 4), 0.1, 0.0)
    assert torch.equal(found[3], keys[3])
    before, after = cosines(keys), cosines(found)
    # 0 and 1 serve all their tokens together: they turn away from 2, side by side.
    assert after[0, 2] < before[0, 2] and after[1, 2] < before[1, 2]
    assert abs(after[0, 1] - before[0, 1]) < (before[0, 2] - after[0, 2]) / 2
    apart = push_apart(keys, own, company(torch.tensor([[0, -1], [1, -1]]), 4), 0.1, 0.0)
    assert cosines(apart)[0, 1] < before[0, 1] and torch.equal(apart[2:], keys[2:])


def test_pushes_end_at_the_margin_and_stay_in_bounds_for_10_000_steps() -> None:
    """Twelve keys in a cone, and four that coincide."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(16, 24, generator=generator) * 0.2 + 1
    keys[4:8] = keys[4]
    own, together = directions(torch.arange(16), 24), torch.eye(16) * 5
    lengths = keys.norm(dim=1)
    for _ in range(10_000):
        keys = push_apart(keys, own, together, 0.01, 0.3)
    assert torch.isfinite(keys).all()
    torch.testing.assert_close(keys.norm(dim=1), lengths, rtol=1e-3, atol=0)
    # A step past the margin at most.
    assert cosines(keys).fill_diagonal_(0).max() < 0.32
    assert torch.equal(
        push_apart(F.one_hot(torch.arange(16), 24).float(), own, together, 0.5, 0.3)[0], torch.eye(24)[0]
    )


def test_consolidation_pulls_together_who_serves_together_and_pushes_the_others() -> None:
    """The peer pull and the contrast: 0 and 1 share their tokens, 2 and 3 theirs."""
    keys = torch.randn(4, 16, generator=torch.Generator().manual_seed(2)) * 0.5 + 1
    uid = torch.arange(4)
    index = torch.tensor([[0, 1], [2, 3]]).repeat(20, 1)
    config = PlasticityConfig(
        use_alpha=False, use_decay=False, use_inertia=False, beta=0.01, contrast=0.05, contrast_cosine=0.1
    )
    layer = LayerKeys(keys, keys, torch.zeros(4, dtype=torch.int64), torch.zeros(4), uid)
    for _ in range(50):
        [layer] = consolidate([layer], [[Evidence(torch.zeros(40, 16), index)]], config)
    before, after = cosines(keys), cosines(layer.keys_ED)
    for pair in ((0, 1), (2, 3)):
        assert after[pair] > max(before[pair], 0.95)
    for pair in ((0, 2), (0, 3), (1, 2), (1, 3)):
        assert after[pair] < before[pair] - 0.2


def test_the_preset_pulls_together_who_serves_together_however_long_it_has_trained() -> None:
    config = PlasticityConfig.from_value(preset_sections("synaptic-full")["plasticity"])
    keys = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    layer = LayerKeys(keys, keys, torch.zeros(4, dtype=torch.int64), torch.full((4,), 1e6), torch.arange(4))
    index = torch.tensor([[0, 1], [2, 3]]).repeat(64, 1)
    for _ in range(1000):
        [layer] = consolidate([layer], [[Evidence(torch.zeros(128, 16), index)]], config)
    before, after = cosines(keys), cosines(layer.keys_ED)
    for pair in ((0, 1), (2, 3)):
        assert before[pair] + 0.1 < after[pair] < 1


def twins_after(steps: int, contrast: float) -> tuple[float, float]:
    """Cosine of the keys of a parent and its newborn, after a split without noise and training; and the loss."""
    plasticity = {"enabled": True, **STILL, "contrast": contrast}
    model = living_model("mixtral", sections={"plasticity": plasticity, "lifecycle": {"enabled": False}}).train()
    optimizer = LivingAdamW(model, lr=1e-3)
    ids = token_ids(8, 16)
    model(ids)
    newborn = model.split_expert(0, 3, optimizer=optimizer).children[0]
    for number in range(steps):
        ids = token_ids(8, 16, seed=number)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()
    uids, keys = model.expert_uids(0), model.living_blocks[0].router.keys["trainable"].detach()
    cosine = float(cosines(keys)[uids.index(3), uids.index(newborn)])
    return cosine, float(loss.detach())


def test_twins_separate_after_a_split_without_noise() -> None:
    apart, loss = twins_after(30, 0.02)
    alone, loss_alone = twins_after(30, 0.0)
    assert alone > 0.95
    assert apart < alone - 0.2
    assert abs(loss - loss_alone) < 0.05 * loss_alone


def test_a_split_stays_exact_until_the_twins_have_tokens() -> None:
    model = living_model(
        "mixtral", "synaptic-full", sections={"synapse": {"chunk": 4}, "lifecycle": {"enabled": False}}
    )
    model.train()
    ids = token_ids(2, 12)
    model(ids)
    model.lifecycle_step()
    model.eval()
    before = model(ids).logits.detach()
    model.split_expert(0, 3)
    torch.testing.assert_close(model(ids).logits.detach(), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{"contrast": 1.0}, {"contrast": -0.1}, {"contrast_cosine": -0.1}])
def test_a_value_without_sense_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="contrast"):
        PlasticityConfig(**fields)
