"""Synapses of routers and two timescales of experts in one model: neither hinders what the other promises."""

import copy
from pathlib import Path

import torch
from factories import drift, fast_model, live, logits, relative_difference, token_ids

from living_moe import LivingMoeForCausalLM
from living_moe.training.optimizers import LivingAdamW


def both() -> LivingMoeForCausalLM:
    model = fast_model(sections={"synapse": {"router": True, "chunk": 4, "strength": 1.5}})
    drift(model, 4, std=0.1)
    return model


def test_a_split_changes_no_output_and_hands_on_both_sides() -> None:
    model, ids = both(), token_ids(3, 24)
    before = logits(model, ids)
    newborn = model.split_expert(0, 3).children[0]
    assert relative_difference(logits(model, ids), before) <= 1e-6
    block, uids = model.living_blocks[0], model.expert_uids(0)
    place, parent = uids.index(newborn), uids.index(3)
    vectors, table = block.router.synapse.expression["trainable"], block.postsynaptic.table("trainable")
    for rows in (vectors, table.gain, table.trace):
        assert torch.equal(rows[place], rows[parent]) and rows[parent].any()


def test_a_merge_folds_fast_weights_and_averages_expression() -> None:
    model = both()
    newborn = model.split_expert(0, 3).children[0]
    drift(model, 1, std=0.1)
    uids, block = model.expert_uids(0), model.living_blocks[0]
    vectors = block.router.synapse.expression["trainable"].detach()
    low, high = torch.stack([vectors[uids.index(uid)] for uid in (3, newborn)]).aminmax(dim=0)
    model.merge_experts(0, [3, newborn])
    row = model.expert_uids(0).index(3)
    merged = block.router.synapse.expression["trainable"][row].detach()
    assert (low < merged).all() and (merged < high).all()
    assert not block.postsynaptic.table("trainable").trace[row].any()


def test_a_life_with_both_learns_and_loads_as_it_was_saved(tmp_path: Path) -> None:
    model = both()
    live(model, 12, seed=3)
    model.train()
    optimizer, ids = LivingAdamW(model, lr=1e-3), token_ids(2, 20)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
    after = model.state_dict()
    for part in ("synapse.expression", "synapse.strength", "synapse.presynapse", "postsynaptic.trainable.trace"):
        names = [name for name in after if part in name]
        assert names and any(not torch.equal(after[name], before[name]) for name in names), part
    model.eval().save_pretrained(tmp_path)
    loaded = LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_plastic_pass_changes_fast_weights_and_no_synapse_of_a_router() -> None:
    model, ids = both(), token_ids(2, 20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with model.plastic(keys=False):
        logits(model, ids)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(".postsynaptic." in name for name in changed)
    assert not [name for name in changed if ".synapse." in name]
