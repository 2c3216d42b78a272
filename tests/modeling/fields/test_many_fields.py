"""A model whose fields are born one after another: births are exact and saved, and learning in one field leaves the
others bit for bit as they were.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import living_model, logits, mixed_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import PopulationError
from living_moe.modeling_living_moe.lifecycle.events import EVERY_LAYER
from living_moe.training import LivingAdamW

VOCAB, ROWS, LENGTH = 67, 8, 128
IDS = mixed_text(3, 16)


def domain(number: int, seed: int, rows: int = ROWS) -> Tensor:
    """Texts that mostly use a quarter of the vocabulary."""
    generator = torch.Generator().manual_seed(1000 * number + seed)
    weight = torch.where(torch.arange(VOCAB) % 4 == number, 1.0, 0.05)
    return torch.multinomial(weight, rows * LENGTH, replacement=True, generator=generator).view(rows, LENGTH)


def calibrated(family: str = "mixtral", **sections: Any) -> LivingMoeForCausalLM:
    """Knows domain 0; a field is mature after four batches."""
    field = {
        "attention_rank": 4,
        "head_rank": 4,
        "prior_tokens": 200.0,
        "field_tokens": 4 * ROWS * LENGTH,
        "decay": 0.9,
    }
    sections = {"lifecycle": {"interval": 2, "warmup_steps": 2, "patience": 1, "cooldown_steps": 0}, **sections}
    model = living_model(
        family, "frozen-graft", sections={"receptive_field": field, **sections}, calibrated=False,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model.calibrate(domain(0, 0, rows=40).flatten())
    return model


def learn(model: LivingMoeForCausalLM, optimizer: torch.optim.Optimizer, number: int, steps: int) -> None:
    model.train()
    for step in range(steps):
        ids = domain(number, step + 1)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()
    model.eval()


def field_state(model: LivingMoeForCausalLM, field: int) -> dict[str, Tensor]:
    """Every weight that only tokens of one field use: deltas, and experts with their keys."""
    state = {
        f"delta {number}": parameter.detach().clone()
        for number, parameter in enumerate(p for own, p in model.field_parameters() if own == field)
    }
    for block in model.living_blocks:
        for member in block.population.members:
            if member.field == field:
                slab = block.experts.slab(member.slab)
                for name in ("gate_up_proj", "down_proj"):
                    weight = getattr(slab, name)[member.row]
                    state[f"{block.layer} {member.uid} {name}"] = weight.detach().clone()
                state[f"{block.layer} {member.uid} key"] = block.router.keys[member.slab][member.row].detach().clone()
    return state


def test_the_birth_of_a_field_changes_no_logits_and_joins_the_optimizer() -> None:
    model = living_model("mixtral", "frozen-graft")
    optimizer = LivingAdamW(model, lr=1e-2)
    before, held = logits(model, IDS), sum(len(group["params"]) for group in optimizer.param_groups)
    event = model.open_field(optimizer=optimizer)
    assert torch.equal(logits(model, IDS), before)
    assert (event.kind, event.layer, event.children) == ("field", EVERY_LAYER, (2,))
    assert model.lineage[-1] == event and model.config.num_fields == model.model.fields.num_fields == 2
    deltas = len(model.model.deltas())
    assert deltas == 9  # four maps in two layers, and the head
    assert sum(len(group["params"]) for group in optimizer.param_groups) == held + 2 * deltas
    named = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        places = [list(named).index(id(parameter)) for parameter in group["params"]]
        assert places == sorted(places), "a saved state must load into an optimizer built anew"


def test_two_births_at_the_same_step_of_the_same_life_are_the_same_everywhere() -> None:
    """Ranks draw the new deltas themselves."""
    model = living_model("mixtral", "frozen-graft")
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    model.open_field()
    torch.manual_seed(2)
    twin.open_field()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_stepping_optimizer_that_was_not_told_of_a_birth_is_refused() -> None:
    model = calibrated()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.open_field()
    ids = domain(1, 0)
    model.train()(ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="Pass optimizer= to the event"):
        optimizer.step()


def test_no_more_fields_than_the_config_allows() -> None:
    model = living_model("mixtral", "frozen-graft", sections={"receptive_field": {"max_fields": 2}})
    model.open_field()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PopulationError, match="max_fields"):
        model.open_field()
    with pytest.raises(PopulationError, match=r"no receptive fields.*receptive_field.enabled"):
        living_model("mixtral", "grow").open_field()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_each_new_domain_gets_a_field_and_leaves_the_others_bit_for_bit(family: str) -> None:
    model = calibrated(family)
    optimizer = LivingAdamW(model, lr=5e-3, weight_decay=0.1)
    old = domain(0, 99, rows=2)
    root = logits(model, old)
    learn(model, optimizer, 1, 8)
    fields = model.model.fields
    assert fields.awake.tolist() == [True, False]
    assert [event.kind for event in model.lineage].count("field") == 1
    first = field_state(model, 1)
    assert any("key" in name for name in first), "newborns serve the field"
    learn(model, optimizer, 2, 8)
    assert fields.awake.tolist() == [True, True, False]
    kept = field_state(model, 1)
    assert first.keys() == kept.keys(), "a field that sleeps loses no expert and gets none"
    for name, value in first.items():
        assert torch.equal(kept[name], value), name
    assert any(member.field == 2 for block in model.living_blocks for member in block.population.members)
    # A domain that returns is known: no field is born for it, and the second keeps every bit.
    second, counts = field_state(model, 2), fields.num_fields
    learn(model, optimizer, 1, 4)
    assert fields.num_fields == counts
    assert all(torch.equal(field_state(model, 2)[name], value) for name, value in second.items())
    assert any(not torch.equal(field_state(model, 1)[name], value) for name, value in first.items())
    # Where the gate stays in the root the model is its source.
    closed = (fields(old).index == 0).long().cumprod(dim=1).bool()
    assert closed.float().mean() > 0.5
    torch.testing.assert_close(logits(model, old)[closed], root[closed], rtol=1e-5, atol=1e-5)


def test_text_of_the_root_trains_nothing_and_does_not_fail() -> None:
    model = calibrated()
    optimizer = LivingAdamW(model, lr=1e-2, weight_decay=0.5)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    learn(model, optimizer, 0, 3)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_a_model_of_several_fields_is_saved_and_loaded(tmp_path: Path) -> None:
    model = calibrated()
    optimizer = LivingAdamW(model, lr=5e-3)
    for number in (1, 2):
        learn(model, optimizer, number, 6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_fields == model.model.fields.num_fields == 3
    ids = torch.cat([domain(number, 50, rows=1) for number in range(4)])
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.lineage == model.lineage
    # Another model of the same backbone takes up the state, with its fields, and lets its own go.
    other = calibrated()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))
    fewer = calibrated()
    model.load_state_dict(fewer.state_dict())
    assert model.config.num_fields == 1
    assert torch.equal(logits(model, ids), logits(fewer, ids))


def test_a_split_says_in_which_field_the_newborn_serves() -> None:
    model = living_model("mixtral", "frozen-graft")
    model.open_field()
    event = model.split_expert(0, 3, field=2)
    newborn = model.living_block(0).population.find(event.children[0], 0)
    assert (newborn.field, newborn.clade) == (2, 3)
    with pytest.raises(PopulationError, match=r"field=3.*1\.\.2"):
        model.split_expert(0, 3, field=3)
    with pytest.raises(PopulationError, match="none"):
        living_model("mixtral", "grow").split_expert(0, 3, field=1)
