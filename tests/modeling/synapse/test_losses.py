"""Auxiliary losses of synapses: nothing at weight 0, the equations, gradients, checkpointing, padding."""

from typing import Any

import pytest
import torch
from factories import FAMILIES, living_model, mixed_text, token_ids

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import SynapseConfig
from living_moe.modeling_living_moe.synapse.presynaptic import MOLECULES, rest

WEIGHTS = {"energy_loss_coef": 0.1, "pool_loss_coef": 0.1}


def lossy(family: str = "mixtral", events: int = 0, **fields: Any) -> LivingMoeForCausalLM:
    """Synapses at work, of differing expression."""
    synapse = {"router": True, "chunk": 4, "strength": 1.0, **fields}
    model = living_model(family, sections={"synapse": synapse, "lifecycle": {"enabled": False}})
    for number in range(events):
        model.split_expert(number % len(model.expert_counts), number)
    generator = torch.Generator().manual_seed(0)
    for block in model.living_blocks:
        for vectors in block.router.synapse.expression.values():
            vectors.data.normal_(0, 0.5, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_loss_gradients_and_outputs_are_bit_for_bit_those_without_losses(family: str) -> None:
    """Also not one key of the output more."""
    found = []
    for fields in ({}, {"energy_loss_coef": 0.0, "pool_loss_coef": 0.0}):
        model = lossy(family, **fields).train()
        ids = token_ids(2, 13)
        output = model(ids, labels=ids)
        output.loss.backward()
        assert "energy_loss" not in output and "pool_loss" not in output
        found.append([output.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_losses_are_added_with_their_weights_and_change_no_logits() -> None:
    ids = token_ids(2, 13)
    plain = lossy()(ids, labels=ids)
    output = lossy(energy_loss_coef=0.3, pool_loss_coef=0.7)(ids, labels=ids)
    assert torch.equal(plain.logits, output.logits)
    assert 0 < output.energy_loss < 1 and 0 < output.pool_loss < 1
    expected = plain.loss + 0.3 * output.energy_loss + 0.7 * output.pool_loss
    torch.testing.assert_close(output.loss, expected)
    only = lossy(pool_loss_coef=0.7)(ids, labels=ids)
    torch.testing.assert_close(only.loss, plain.loss + 0.7 * output.pool_loss)
    assert lossy(**WEIGHTS)(ids).loss is None


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_module_s_equations(family: str) -> None:
    """Against the states a cache keeps at the ends of chunks."""
    model = lossy(family, events=2, **WEIGHTS)
    ids, expected = token_ids(3, 10), []
    output = model(ids, labels=ids, use_cache=False)
    with torch.no_grad():
        kept = [model(ids[:, :end], use_cache=True).past_key_values.layers[-1].state for end in (4, 8)]
    for block in model.living_blocks:
        addresses = block.population.num_addresses
        turn = float(len(block.population.view(0, ids.device).address_N))
        rates = block.router.synapse.presynapse.rates(block.router.synapse.expression(block.population.alive), turn)
        first = sum(1 + 7 * other.population.num_addresses for other in model.living_blocks[: block.layer])
        states = torch.stack([state[:, first + 1 : first + 1 + 7 * addresses] for state in kept])
        states = states.unflatten(-1, (addresses, 7))
        gone = torch.relu(1 - states[..., 3] / rest(rates).pools[:, 0])
        expected.append(torch.stack([1 - states[..., 2].mean(), gone.mean()]))
    energy, pool = torch.stack(expected).mean(0).detach()
    torch.testing.assert_close(output.energy_loss.detach(), energy)
    torch.testing.assert_close(output.pool_loss.detach(), pool)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_gradients_reach_expression_strength_keys_and_what_is_below(name: str) -> None:
    """Of the loss alone: the language-model loss is not in it."""
    model = lossy(**{name: 1.0}).train()
    ids = token_ids(2, 16)
    output = model(ids, labels=ids)
    (output.energy_loss if name == "energy_loss_coef" else output.pool_loss).backward()
    for block in model.living_blocks:
        synapse = block.router.synapse
        reached = synapse.expression["trainable"].grad.abs().sum(0) > 0
        # What a vesicle weighs changes routing alone, and through it everything.
        assert reached.sum() >= len(MOLECULES) - 2
        assert synapse.strength.grad.abs() > 0 and synapse.presynapse.scalars.grad.abs().sum() > 0
        assert block.router.keys["trainable"].grad.abs().sum() > 0
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_descending_a_loss_lowers_it(name: str) -> None:
    model = lossy(**{name: 1.0}).train()
    parameters = [p for block in model.living_blocks for p in block.router.synapse.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    ids = token_ids(4, 16)
    shown = []
    for _ in range(10):
        output = model(ids, labels=ids)
        loss = output.energy_loss if name == "energy_loss_coef" else output.pool_loss
        shown.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shown[-1] < shown[0] - 1e-3


@pytest.mark.parametrize("mode", ["expectation", "stochastic"])
def test_gradient_checkpointing_has_the_same_losses_and_gradients_and_leaves_nothing(mode: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = lossy(mode=mode, **WEIGHTS).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        passages = []
        model.model.backbone.register_forward_pre_hook(
            lambda module, args, kwargs, passages=passages: passages.append(kwargs["living_context"].passage),
            with_kwargs=True,
        )
        ids = token_ids(2, 12)
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        assert passages and not passages[0].economies
        found.append([output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused() -> None:
    model = lossy(**WEIGHTS).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = token_ids(2, 20)
    with pytest.raises(ConfigurationError, match="use_reentrant"):
        model(ids, labels=ids)
    model.config.synapse.energy_loss_coef = model.config.synapse.pool_loss_coef = 0.0
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("coefficient", ["energy_loss_coef", "pool_loss_coef", "z_loss_coef"])
def test_accumulating_gradients_changes_no_weight_of_a_loss(coefficient: str) -> None:
    """As Trainer does it: each pass says how many tokens its optimizer step has, and nobody divides afterwards."""
    ids, found = token_ids(4, 20), []
    for passes in (1, 4):
        model = lossy().train()
        section = model.config.router if coefficient == "z_loss_coef" else model.config.synapse
        setattr(section, coefficient, 0.5)
        for part in ids.chunk(passes):
            model(part, labels=part, num_items_in_batch=torch.tensor(4 * 19)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_padding_counts_for_nothing() -> None:
    model = lossy(**WEIGHTS)
    ids, pads = token_ids(2, 8), torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
    padded = torch.cat([pads, ids], dim=1)
    outputs = model(ids, labels=ids), model(padded, attention_mask=mask, labels=padded)
    found = [torch.stack([output.energy_loss, output.pool_loss]) for output in outputs]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_texts_packed_in_a_row_are_texts_of_their_own() -> None:
    """Nine tokens are two chunks of four, twice; a row of eighteen would be four and a half."""
    model = lossy().train()
    block = model.living_blocks[0]
    for ids, positions, chunks in (
        (token_ids(2, 9), None, 4.0),
        (token_ids(1, 18), torch.arange(9).repeat(2)[None], 4.0),
        (token_ids(1, 20), None, 5.0),
    ):
        model(ids, position_ids=positions)
        assert block.vitals.pending_economy[2].tolist() == [chunks] * 8
        block.vitals.forget()


def test_texts_shorter_than_a_chunk_spend_nothing() -> None:
    model = lossy(**WEIGHTS).train()
    ids = token_ids(2, 3)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.energy_loss == 0 and output.pool_loss == 0


def test_shared_experts_are_untouched() -> None:
    """DeepSeek's shared experts serve every token beside the routed ones; no synapse, fast weight or loss is theirs."""
    source = living_model("deepseek_v3", sections={"lifecycle": {"enabled": False}})
    model = living_model("deepseek_v3", "synaptic-full", sections={"synapse": {"chunk": 4, "strength": 1.0}}).train()
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    for block, plain in zip(model.living_blocks, source.living_blocks, strict=True):
        shared, other = block.shared_experts, plain.shared_experts
        assert type(shared) is type(other) and shared is not None
        assert [name for name, _ in shared.named_parameters()] == [name for name, _ in other.named_parameters()]
        assert torch.equal(shared(hidden), other(hidden))
    ids = mixed_text(2, 16)
    model(ids, labels=ids).loss.backward()
    before = [p.detach().clone() for block in model.living_blocks for p in block.shared_experts.parameters()]
    for _ in range(3):
        model(ids)
        model.lifecycle_step()
    after = [p for block in model.living_blocks for p in block.shared_experts.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(p.grad is not None and p.grad.any() for p in after)


@pytest.mark.parametrize("fields", [{"energy_loss_coef": -0.1}, {"pool_loss_coef": 0.1, "router": False}])
def test_a_weight_without_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="loss_coef"):
        SynapseConfig(**{"router": True, **fields})
