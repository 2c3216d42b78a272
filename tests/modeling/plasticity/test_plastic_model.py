"""Contract of plastic keys in a model: off they change nothing; on they move when and only when they should, as the
oracle says, the same on every rank; what a key has lived through follows its expert through events and checkpoints.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    EVENTS,
    FAMILIES,
    VOCAB,
    check_invariants,
    drift,
    living_model,
    logits,
    mixed_text,
    source_model,
    token_ids,
    try_event,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM
from two_ranks import one_of_two_ranks, two_ranks

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import CheckpointError, ConfigurationError, PopulationError
from living_moe.configuration.sections import PlasticityConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.plasticity import Evidence, LayerKeys, reference_consolidate, state
from living_moe.modeling_living_moe.plasticity.state import PlasticityTable
from living_moe.modeling_living_moe.router import LivingRouter
from living_moe.training.optimizers import LivingAdamW

#: Forces that show after one pass.
STRONG = dict(alpha=0.4, beta=0.2, usage_decay=0.5, decay_rate=0.1, forgetting_threshold=0.7)
#: How often a key may be written down in fp32 along two ways of computing it.
CLOSE = dict(rtol=1e-5, atol=1e-5)
IDS = mixed_text(3, 12)
every_family = pytest.mark.parametrize("family", FAMILIES)


def plastic_model(
    family: str = "mixtral", preset: str = "grow", sections: dict[str, Any] | None = None, **forces: Any
) -> LivingMoeForCausalLM:
    """Configured, not moving yet: plasticity acts in training, and in evaluation where asked."""
    plasticity = {"enabled": True, **STRONG, **forces}
    return living_model(family, preset, sections={"plasticity": plasticity, **(sections or {})})


def keys(model: LivingMoeForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".router.keys." in name}


def memory(model: LivingMoeForCausalLM) -> dict[str, Tensor]:
    """Keys and all that is known of their past."""
    past = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".plasticity." in name}
    return keys(model) | past


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def all_moved(before: dict[str, Tensor], model: LivingMoeForCausalLM) -> bool:
    """Whether some key of every layer has moved."""
    now = keys(model)
    return all(not torch.equal(before[name], now[name]) for name in before)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(tensor, theirs[name]), name


def total_hits(model: LivingMoeForCausalLM) -> list[int]:
    """Hits per layer."""
    return [
        sum(int(block.plasticity.table(slab).hits.sum()) for slab in block.population.slabs)
        for block in model.living_blocks
    ]


def waiting(model: LivingMoeForCausalLM) -> list[int]:
    """Passes per layer whose evidence waits."""
    return [len(block.plasticity.evidence) for block in model.living_blocks]


def train_pass(model: LivingMoeForCausalLM, ids: Tensor, **inputs: Any) -> None:
    model(input_ids=ids, labels=ids, **inputs).loss.backward()


def key_rows(block: LivingMoeBlock) -> Tensor:
    """Keys of the alive in slot order, (E, D)."""
    return torch.cat([block.router.keys[slab].detach()[:count] for slab, count in block.population.alive.items()])


@contextmanager
def seen_by_routers(model: LivingMoeForCausalLM, real_T: Tensor) -> Iterator[list[list[Evidence]]]:
    """What the routers see while open, per layer; `real_T` says which tokens count."""
    seen: list[list[Evidence]] = [[] for _ in model.living_blocks]

    def note(layer: int) -> Callable[..., None]:
        def hook(router: LivingRouter, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            query_TD = router.queries(args[0]).detach().clone()
            seen[layer].append(Evidence(query_TD, output[2].masked_fill(~real_T.unsqueeze(-1), -1)))

        return hook

    handles = [b.router.register_forward_hook(note(layer)) for layer, b in enumerate(model.living_blocks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def expected_keys(model: LivingMoeForCausalLM, seen: list[list[Evidence]], config: PlasticityConfig) -> list[LayerKeys]:
    """Per layer what the loop over hits makes of keys without a past."""
    found = []
    for block, pieces in zip(model.living_blocks, seen, strict=True):
        rows = key_rows(block)
        hits, load = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows))
        layer = LayerKeys(rows, rows, hits, load, torch.tensor(block.population.uids))
        found.append(reference_consolidate(layer, pieces, config))
    return found


def assert_layers(model: LivingMoeForCausalLM, expected: list[LayerKeys]) -> None:
    for block, wanted in zip(model.living_blocks, expected, strict=True):
        torch.testing.assert_close(key_rows(block), wanted.keys_ED, **CLOSE)
        tables = [(block.plasticity.table(slab), count) for slab, count in block.population.alive.items()]
        assert torch.equal(torch.cat([table.hits[:count] for table, count in tables]), wanted.hits_E)
        torch.testing.assert_close(torch.cat([table.use[:count] for table, count in tables]), wanted.load_E)


# -- off ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["grow", "some"])
@every_family
def test_a_graft_with_plasticity_unused_is_its_source_bit_for_bit(family: str, preset: str) -> None:
    source, model = source_model(family), plastic_model(family, preset)
    before = memory(model)
    expected = logits(source, IDS)
    for _ in range(2):
        assert torch.equal(logits(model, IDS), expected)
    assert same(memory(model), before) and total_hits(model) == [0, 0]


@pytest.mark.parametrize("energy", [{}, {"decay_target": "origin"}, {"dark_energy": "repulsion", "repulsion": 0.0}])
@every_family
def test_plastic_without_forces_changes_no_bit_over_many_passes(family: str, energy: dict[str, Any]) -> None:
    model = living_model(family)
    expected, before = logits(model, IDS), keys(model)
    with model.plastic(alpha=0.0, beta=0.0, decay_rate=0.0, forgetting_threshold=10.0, **energy):
        for _ in range(4):
            assert torch.equal(logits(model, IDS), expected)
    assert same(keys(model), before)
    assert total_hits(model) == [4 * IDS.numel() * 2] * 2
    assert all(not model.key_distances(layer).any() for layer in range(2))


def test_a_verified_graft_configured_for_inference_has_read_nothing() -> None:
    source = source_model("mixtral")
    model = living_moe.convert(source, preset="grow", plasticity={"enabled": True, "inference": True, **STRONG})
    assert total_hits(model) == [0, 0]
    assert torch.equal(logits(model, IDS), logits(source, IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_any_precision_are_restored_bit_for_bit(dtype: torch.dtype) -> None:
    model = living_moe.convert(source_model("mixtral", experts="eager").to(dtype), preset="grow", verify=False)
    before, expected = keys(model), logits(model, IDS)
    with model.plastic(alpha=0.0, beta=0.0, decay_rate=0.0):
        assert torch.equal(logits(model, IDS), expected)
    assert same(keys(model), before)
    with model.plastic(**STRONG):
        logits(model, IDS)
    assert all_moved(before, model) and {key.dtype for key in keys(model).values()} == {dtype}
    model.reset_keys()
    assert same(keys(model), before) and torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("configured", [False, True])
@every_family
def test_off_by_default(family: str, configured: bool) -> None:
    """Neither evaluation passes nor generation move a key, nor count a hit."""
    model = plastic_model(family) if configured else living_model(family)
    before, expected = memory(model), logits(model, IDS)
    model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False)
    model(IDS, labels=IDS).loss.backward()
    assert torch.equal(logits(model, IDS), expected)
    assert same(memory(model), before) and not model.is_plastic
    if configured:
        assert waiting(model) == [0, 0]
    else:
        assert all(block.plasticity is None for block in model.living_blocks)
        assert not any(".plasticity." in name for name in model.state_dict())


def test_training_without_plasticity_leaves_keys_to_the_optimizer() -> None:
    for model in (living_model(), plastic_model(training=False)):
        before = memory(model)
        model.train()
        train_pass(model, IDS)
        model.lifecycle_step()
        assert same(memory(model), before)
        assert all(block.plasticity is None or not block.plasticity.evidence for block in model.living_blocks)


# -- while reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forces", [{}, {"pull": "direction", "usage": "ema", "decay_target": "origin"}, {"dark_energy": "repulsion"}]
)
@every_family
def test_one_pass_moves_the_keys_as_the_oracle_says(family: str, forces: dict[str, Any]) -> None:
    model = living_model(family)
    mask = torch.ones_like(IDS)
    mask[1, :3], mask[2, 9:] = 0, 0
    config = PlasticityConfig(**{**STRONG, **forces})
    with seen_by_routers(model, mask.bool().flatten()) as seen:
        logits(model, IDS, attention_mask=mask)
    expected = expected_keys(model, seen, config)
    with model.plastic(**{**STRONG, **forces}):
        logits(model, IDS, attention_mask=mask)
    assert_layers(model, expected)
    assert total_hits(model) == [int(mask.sum()) * 2] * 2
    for layer, wanted in enumerate(expected):
        start = torch.cat([t.start for t in pasts(model.living_blocks[layer])])
        torch.testing.assert_close(model.key_distances(layer), (wanted.keys_ED - start).norm(dim=1), **CLOSE)


def pasts(block: LivingMoeBlock) -> list[PlasticityTable]:
    return [block.plasticity.table(slab) for slab in block.population.slabs]


READINGS: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=20),
    "beams": dict(do_sample=False, num_beams=3),
}


@pytest.mark.parametrize("reading", ["forward", *READINGS])
@every_family
def test_reading_moves_keys_the_same_way_twice(family: str, reading: str) -> None:
    model = living_model(family)
    before = keys(model)
    runs = []
    for twin in (copy.deepcopy(model), copy.deepcopy(model)):
        torch.manual_seed(3)
        with twin.plastic(**STRONG):
            if reading == "forward":
                output = torch.stack([logits(twin, IDS) for _ in range(3)])
            else:
                output = twin.generate(IDS[:, :5], max_new_tokens=6, **READINGS[reading])
        assert all_moved(before, twin)
        assert not twin.is_plastic and waiting(twin) == [0, 0]
        runs.append((output, memory(twin)))
    assert torch.equal(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1])
    assert same(keys(model), before)


def test_keys_move_between_passes_never_within_one() -> None:
    model = living_model()
    expected = logits(model, IDS)
    with model.plastic(**STRONG):
        assert torch.equal(logits(model, IDS), expected)
        assert not torch.equal(logits(model, IDS), expected)


def test_generation_counts_every_token_it_reads_once() -> None:
    model = living_model()
    model.generation_config.eos_token_id = None
    ids, mask = IDS[:, :6], torch.ones(3, 6, dtype=torch.int64)
    mask[1, :4] = 0
    with model.plastic(**STRONG):
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    # The last token is chosen, and read by nobody.
    assert total_hits(model) == [2 * (int(mask.sum()) + 3 * 4)] * 2


def test_a_static_cache_moves_keys_as_a_dynamic_one() -> None:
    """Of a padded batch too, whose masks come ready for attention."""
    model = living_model()
    model.generation_config.eos_token_id = None
    ids, mask = IDS[:, :6], torch.ones(3, 6, dtype=torch.int64)
    mask[1, :4] = 0
    moved = []
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        twin = copy.deepcopy(model)
        with twin.plastic(**STRONG):
            twin.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
        moved.append(memory(twin))
    assert_close(*moved)


def test_the_base_model_is_plastic_with_its_causal_model() -> None:
    model = living_model()
    before = keys(model)
    with model.model.plastic(**STRONG), torch.no_grad():
        assert model.is_plastic
        model.model(IDS)
    assert all_moved(before, model)


def test_configured_for_inference_keys_move_in_passes_without_gradients_only() -> None:
    model = plastic_model(inference=True)
    before = memory(model)
    model(IDS, labels=IDS).loss.backward()
    assert same(memory(model), before) and waiting(model) == [0, 0]
    logits(model, IDS)
    assert all_moved(keys_of(before), model)
    before = keys(model)
    model.generate(IDS[:, :5], max_new_tokens=3, do_sample=False)
    assert all_moved(before, model)
    with model.plastic(), torch.enable_grad():
        before = memory(model)
        model(IDS, labels=IDS).loss.backward()
    assert same(memory(model), before)


def keys_of(remembered: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in remembered.items() if ".router.keys." in name}


def test_config_and_context_move_keys_alike() -> None:
    by_config, by_context = plastic_model(inference=True), living_model()
    logits(by_config, IDS)
    with by_context.plastic(**STRONG):
        logits(by_context, IDS)
    assert same(memory(by_config), memory(by_context))


def test_inference_mode_leaves_tensors_that_others_can_change() -> None:
    model = living_model()
    with torch.inference_mode(), model.plastic(**STRONG):
        model(IDS)
    before = keys(model)
    with model.plastic(**STRONG):
        logits(model, IDS)
    assert all_moved(before, model)
    model.train()
    train_pass(model, IDS)


def test_contexts_nest_and_the_inner_forces_end_with_it() -> None:
    model = living_model()
    with model.plastic(**STRONG):
        before = keys(model)
        with model.plastic(alpha=0.0, beta=0.0, use_decay=False):
            logits(model, IDS)
        assert same(keys(model), before) and model.is_plastic
        logits(model, IDS)
        assert all_moved(before, model)
    assert not model.is_plastic


def test_an_error_inside_ends_the_context() -> None:
    model = living_model()
    with pytest.raises(ZeroDivisionError), model.plastic():
        raise ZeroDivisionError
    assert not model.is_plastic


@pytest.mark.parametrize("training", [False, True])
def test_plastic_refuses_a_model_in_training_mode(training: bool) -> None:
    model = plastic_model(training=training).train()
    with pytest.raises(ConfigurationError, match=r"model.eval\(\)"), model.plastic():
        pass
    assert not model.is_plastic


def test_a_misspelt_force_leaves_everything_as_it_was() -> None:
    model = living_model()
    config = model.config.to_dict()
    for wrong in ({"alhpa": 0.1}, {"alpha": 2.0}):
        with pytest.raises(ConfigurationError, match="alpha"), model.plastic(**wrong):
            pass
    assert not model.is_plastic and model.config.to_dict() == config
    assert all(block.plasticity is None for block in model.living_blocks)


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="generate marks the padding after a finished text as tokens"
)
def test_texts_that_have_ended_pull_no_more() -> None:
    model = living_model()
    model.generation_config.eos_token_id = None
    ids = IDS[:, :6]
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    model.generation_config.eos_token_id = int(whole[0, 7])
    with model.plastic(alpha=0.0, beta=0.0, use_decay=False):
        ended = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    # The last token is chosen, and read by nobody.
    real = ended[:, :-1] != model.generation_config.pad_token_id
    assert total_hits(model) == [2 * int(real.sum())] * 2


# -- padding -----------------------------------------------------------------------------------------------------------


def texts() -> list[Tensor]:
    return [mixed_text(1, length, seed=length) for length in (12, 7, 9)]


def padded(side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    ids, mask = torch.full((3, 12), fill), torch.zeros(3, 12, dtype=torch.int64)
    for row, text in enumerate(texts()):
        place = slice(0, text.shape[1]) if side == "right" else slice(12 - text.shape[1], 12)
        ids[row, place], mask[row, place] = text[0], 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@every_family
def test_a_padded_batch_moves_keys_as_its_texts_do(family: str, side: str) -> None:
    apart, together = plastic_model(family).train(), plastic_model(family).train()
    for text in texts():
        apart(text)
    ids, mask = padded(side)
    together(ids, attention_mask=mask)
    for model in (apart, together):
        model.lifecycle_step()
    assert_close(memory(together), memory(apart))
    assert total_hits(together) == [2 * int(mask.sum())] * 2
    unmasked = plastic_model(family).train()
    unmasked(ids)
    unmasked.lifecycle_step()
    assert total_hits(unmasked) == [2 * ids.numel()] * 2


@pytest.mark.parametrize("side", ["left", "right"])
@every_family
def test_what_padding_holds_does_not_matter(family: str, side: str) -> None:
    moved = []
    for fill in (0, 1, VOCAB - 1):
        model = living_model(family)
        ids, mask = padded(side, fill)
        with model.plastic(**STRONG):
            for _ in range(2):
                logits(model, ids, attention_mask=mask)
        moved.append(memory(model))
    for other in moved[1:]:
        assert_close(moved[0], other)


# -- while training ----------------------------------------------------------------------------------------------------


@every_family
def test_in_training_keys_move_in_the_lifecycle_step_by_all_its_micro_batches(family: str) -> None:
    model = plastic_model(family).train()
    before = memory(model)
    micro = [mixed_text(2, 8, seed=seed) for seed in range(3)]
    with seen_by_routers(model, torch.ones(16, dtype=torch.bool)) as seen:
        for ids in micro:
            train_pass(model, ids)
    assert same(memory(model), before), "a training pass moved a key"
    assert waiting(model) == [3, 3]
    expected = expected_keys(model, seen, model.config.plasticity)
    model.lifecycle_step()
    assert_layers(model, expected)
    assert all_moved(keys_of(before), model) and waiting(model) == [0, 0]
    resting = keys(model)
    model.config.plasticity.use_decay = False
    model.lifecycle_step()
    assert same(keys(model), resting), "the evidence moved keys twice"


@pytest.mark.parametrize("reentrant", [False, True])
@every_family
def test_gradient_checkpointing_does_not_double_the_evidence(family: str, reentrant: bool) -> None:
    models = [plastic_model(family).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in models:
        for seed in range(2):
            train_pass(model, mixed_text(2, 8, seed=seed))
        assert waiting(model) == [2, 2]
        model.lifecycle_step()
    assert same(memory(models[0]), memory(models[1]))


OPTIMIZERS: dict[str, tuple[str, Callable[[LivingMoeForCausalLM], torch.optim.Optimizer]]] = {
    "adamw": ("grouped_mm", lambda model: AdamW(model.parameters(), lr=1e-2)),
    "living": ("grouped_mm", lambda model: LivingAdamW(model, lr=1e-2)),
    "direct": ("active", lambda model: LivingAdamW(model, lr=1e-2, direct_gradients=True)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_on_after_gravity_and_events(name: str) -> None:
    experts, build = OPTIMIZERS[name]
    model = plastic_model().train()
    model.set_experts_implementation(experts)
    optimizer = build(model)
    for step in range(6):
        for seed in range(2):
            train_pass(model, mixed_text(2, 10, seed=2 * step + seed))
        trained = keys(model)
        optimizer.step()
        by_gradient = keys(model)
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()
        for stage in (trained, by_gradient):
            assert all_moved(stage, model)
        for layer in range(2):
            model.split_expert(layer, model.expert_uids(layer)[step], optimizer=optimizer)
    assert all(tensor.isfinite().all() for tensor in memory(model).values())
    check_invariants(model)


def test_keys_of_frozen_experts_move_without_gradients() -> None:
    model = plastic_model(preset="some").train()
    before = keys(model)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    train_pass(model, IDS)
    optimizer.step()
    model.lifecycle_step(optimizer)
    assert all("frozen" in name for name in before) and all_moved(before, model)


def test_evidence_that_nobody_consolidates_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MOST_EVIDENCE", 3)
    model = plastic_model().train()
    for _ in range(2):
        for _ in range(3):
            model(IDS)
        model.lifecycle_step()
    for _ in range(3):
        model(IDS)
    with pytest.raises(PopulationError, match=r"model.lifecycle_step\(\).*plasticity.training"):
        model(IDS)


# -- the way back ------------------------------------------------------------------------------------------------------


@every_family
def test_reset_brings_keys_back_bit_for_bit(family: str) -> None:
    model = living_model(family)
    first, expected = keys(model), logits(model, IDS)
    assert all(torch.equal(model.key_distances(layer), torch.zeros(8)) for layer in range(2))
    model.reset_keys()
    for _ in range(2):
        with model.plastic(**STRONG):
            logits(model, IDS)
            assert all(float(model.key_distances(layer).max()) > 0 for layer in range(2))
            logits(model, IDS)
        model.reset_keys()
        assert same(keys(model), first) and torch.equal(logits(model, IDS), expected)
        assert total_hits(model) == [0, 0]
        assert all(not model.key_distances(layer).any() for layer in range(2))


def test_after_a_reset_gravity_begins_where_keys_are_then() -> None:
    """Not where they were before they were trained."""
    model = plastic_model()
    with model.plastic():
        logits(model, IDS)
    model.reset_keys()
    drift(model, 0)
    trained = keys(model)
    with model.plastic():
        logits(model, IDS)
    model.reset_keys()
    assert same(keys(model), trained)


def test_reset_forgets_evidence_that_waits() -> None:
    model = plastic_model(use_decay=False).train()
    before = keys(model)
    model(IDS)
    model.reset_keys()
    assert waiting(model) == [0, 0]
    model.lifecycle_step()
    assert same(keys(model), before)


def test_a_snapshot_is_restored_bit_for_bit_and_usage_stays() -> None:
    model = living_model()
    with model.plastic(**STRONG):
        logits(model, IDS)
        snapshot, there = model.key_snapshot(), keys(model)
        logits(model, IDS)
    hits = total_hits(model)
    assert all_moved(there, model)
    model.restore_keys(snapshot)
    assert same(keys(model), there) and total_hits(model) == hits
    snapshot[0][0].fill_(7.0)
    assert same(keys(model), there), "a snapshot shares memory with the model"


def test_a_snapshot_finds_its_experts_after_events() -> None:
    model = living_model()
    snapshot = model.key_snapshot()
    newborn = model.split_expert(0, 2).children[0]
    model.remove_expert(0, 5)
    model.freeze_expert(0, 1)
    drift(model, 0)
    before = model.key_snapshot()
    model.restore_keys(snapshot)
    after = model.key_snapshot()
    assert torch.equal(after[0][newborn], before[0][newborn]) and 5 not in after[0]
    for uid in set(after[0]) - {newborn}:
        assert torch.equal(after[0][uid], snapshot[0][uid]) and not torch.equal(before[0][uid], snapshot[0][uid])


def test_a_snapshot_of_another_model_is_refused_and_changes_nothing() -> None:
    model = living_model()
    before = keys(model)
    good = model.key_snapshot()
    moved = [{uid: key + 1 for uid, key in rows.items()} for rows in good]
    with pytest.raises(PopulationError, match="1 layers, the model 2"):
        model.restore_keys(moved[:1])
    short = [moved[0], {uid: key[:-1] for uid, key in moved[1].items()}]
    with pytest.raises(PopulationError, match=r"layer 1: .*keys of uid 0 have shape"):
        model.restore_keys(short)
    assert same(keys(model), before)


# -- saving and loading ------------------------------------------------------------------------------------------------


def moved_model(family: str = "mixtral", preset: str = "grow") -> LivingMoeForCausalLM:
    model = living_model(family, preset)
    with model.plastic(**STRONG):
        for seed in range(2):
            logits(model, mixed_text(2, 10, seed))
    return model


@pytest.mark.parametrize("shards", ["5GB", "25KB"])
@every_family
def test_moved_keys_and_their_past_are_saved_and_loaded(family: str, shards: str, tmp_path: Path) -> None:
    first = keys(living_model(family))
    model = moved_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.plasticity.enabled and not loaded.config.plasticity.training
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    assert same(memory(loaded), memory(model)) and min(total_hits(loaded)) > 0
    for layer in range(2):
        assert torch.equal(loaded.key_distances(layer), model.key_distances(layer))
    for each in (loaded, model):
        with each.plastic(**STRONG):
            logits(each, IDS)
    assert same(memory(loaded), memory(model))
    loaded.reset_keys()
    assert same(keys(loaded), first)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@every_family
def test_after_ten_events_too(family: str, preset: str, tmp_path: Path) -> None:
    model = moved_model(family, preset)
    happened = 0
    for seed in range(400):
        if happened < 10:
            happened += try_event(model, sorted(EVENTS)[seed % len(EVENTS)], seed, seed) is not None
    assert happened == 10
    with model.plastic(**STRONG):
        logits(model, IDS)
    # The grouped product rounds otherwise where a slab has spare slots, which a loaded one has not.
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    other = living_model(family, preset, seed=4, experts="eager")
    with other.plastic():
        logits(other, IDS)
    other.load_state_dict(model.state_dict())
    for twin in (loaded, other):
        assert torch.equal(logits(twin, IDS), logits(model, IDS))
        for layer, (mine, theirs) in enumerate(zip(twin.living_blocks, model.living_blocks, strict=True)):
            assert remembered(mine).keys() == remembered(theirs).keys()
            for uid, past in remembered(theirs).items():
                assert all(torch.equal(*pair) for pair in zip(remembered(mine)[uid], past, strict=True))
            assert torch.equal(twin.key_distances(layer), model.key_distances(layer))
    for each in (model, loaded, other):
        each.reset_keys()
    assert torch.equal(logits(loaded, IDS), logits(model, IDS)) and torch.equal(logits(other, IDS), logits(model, IDS))


def test_a_model_that_has_not_moved_takes_up_a_past_and_one_that_has_loses_it() -> None:
    model, other = moved_model(), plastic_model()
    fresh = copy.deepcopy(other.state_dict())
    assert not other.key_distances(0).any()
    other.load_state_dict(model.state_dict())
    assert model.key_distances(0).any() and torch.equal(other.key_distances(0), model.key_distances(0))
    other.load_state_dict(fresh)
    assert not other.key_distances(0).any() and total_hits(other) == [0, 0]


def test_a_model_without_plasticity_names_what_it_cannot_take(tmp_path: Path) -> None:
    model = moved_model()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*plasticity.trainable.hits"):
        living_model().load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*plasticity.trainable.hits"):
        plastic_model().load_state_dict(living_model().state_dict())
    model.config.plasticity.enabled = False
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected tensors: .*plasticity"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# -- events ------------------------------------------------------------------------------------------------------------


Past = tuple[Tensor, Tensor, Tensor]


def remembered(block: LivingMoeBlock) -> dict[int, Past]:
    """Start, hits and use per uid."""
    tables = {slab: block.plasticity.table(slab) for slab in block.population.slabs}
    return {
        m.uid: tuple(getattr(tables[m.slab], name)[m.row].clone() for name in ("start", "hits", "use"))
        for m in block.population.members
    }


def witnesses(block: LivingMoeBlock) -> list[tuple[Tensor, list[list[int]]]]:
    """The evidence that waits: queries, and per token the uids that served it (-1: the pair does not count)."""
    uids = [*block.population.uids, -1]
    return [
        (p.query_TD, [[uids[index] for index in row] for row in p.index_TK.tolist()]) for p in block.plasticity.evidence
    ]


def old_past(block: LivingMoeBlock, seed: int) -> None:
    """A past of its own for every expert, as of a long life."""
    generator = torch.Generator().manual_seed(seed)
    for slab, count in block.population.alive.items():
        table = block.plasticity.table(slab)
        table.start[:count] = torch.randn(count, table.start.shape[1], generator=generator)
        table.hits[:count] = torch.randint(1, 1000, (count,), generator=generator)
        table.use[:count] = torch.rand(count, generator=generator) + 0.1


@functools.cache
def cached_model(family: str, preset: str) -> LivingMoeForCausalLM:
    return moved_model(family, preset)


lives = st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.integers(0, 10_000)), min_size=4, max_size=14)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@settings(max_examples=25)
@given(life=lives, family=st.sampled_from(FAMILIES))
def test_past_and_evidence_follow_their_experts_through_events(
    preset: str, family: str, life: list[tuple[str, int]]
) -> None:
    model = copy.deepcopy(cached_model(family, preset))
    model.config.plasticity.training = True
    block = model.living_blocks[0]
    old_past(block, seed=len(life))
    model.train()
    for seed in range(2):
        model(mixed_text(2, 8, seed))
    for kind, seed in life:
        before, seen = remembered(block), witnesses(block)
        members = {m.uid: m for m in block.population.members}
        event = try_event(model, kind, 0, seed)
        after = remembered(block)
        expected = {uid: past for uid, past in before.items() if uid in after}
        gone = set(before) - set(after)
        if event is not None and event.kind == "split":
            expected[event.children[0]] = before[event.parents[0]]
        elif event is not None and event.kind == "merge":
            places = [(members[uid].clade, members[uid].field) for uid in event.parents]
            (survivor,) = event.children
            if places.count((members[survivor].clade, members[survivor].field)) > 1:
                expected[survivor] = after[survivor]  # see the test below
        assert after.keys() == expected.keys()
        for uid, past in expected.items():
            assert all(torch.equal(*pair) for pair in zip(after[uid], past, strict=True)), (event, uid)
        wanted = [(query, [[-1 if uid in gone else uid for uid in row] for row in rows]) for query, rows in seen]
        for (query, rows), (wanted_query, wanted_rows) in zip(witnesses(block), wanted, strict=True):
            assert query is wanted_query and rows == wanted_rows
        for table, slab in zip(pasts(block), block.population.slabs, strict=True):
            alive = block.population.alive.get(slab, 0)
            assert {len(buffer) for buffer in table.buffers()} == {block.population.capacity(slab)}
            assert not any(buffer[alive:].any() for buffer in table.buffers()), "a spare row holds something"
    pairs = sum(uid >= 0 for _, rows in witnesses(block) for row in rows for uid in row)
    hits = total_hits(model)[0]
    model.lifecycle_step()
    assert total_hits(model)[0] == hits + pairs and waiting(model) == [0, 0]
    check_invariants(model)
    assert all(tensor.isfinite().all() for tensor in memory(model).values())


@pytest.mark.parametrize("loads", [(0.0, 0.0), (3.0, 1.0)])
def test_a_merge_joins_the_pasts_of_siblings_only(loads: tuple[float, float]) -> None:
    share = [load / sum(loads) if sum(loads) else 0.5 for load in loads]
    for survivor in (2, 5):
        model = copy.deepcopy(cached_model("mixtral", "grow"))
        block = model.living_blocks[0]
        newborn = model.split_expert(0, 2).children[0]
        old_past(block, seed=1)
        for uid, load in zip((2, newborn), loads, strict=True):
            block.vitals.table("trainable").load[block.population.find(uid, 0).row] = load
        before = remembered(block)
        model.merge_experts(0, [2, newborn, 5] if survivor == 2 else [5, 2, newborn])
        start, hits, use = remembered(block)[survivor]
        if survivor == 5:
            assert all(torch.equal(*pair) for pair in zip((start, hits, use), before[5], strict=True))
        else:
            assert int(hits) == int(before[2][1]) + int(before[newborn][1])
            torch.testing.assert_close(start, before[2][0] * share[0] + before[newborn][0] * share[1])
            torch.testing.assert_close(use, before[2][2] * share[0] + before[newborn][2] * share[1])


# -- two processes -----------------------------------------------------------------------------------------------------

STEPS = 3


def two_halves(step: int) -> list[Tensor]:
    return [token_ids(2, 10, seed=2 * step), token_ids(2, 10, seed=2 * step + 1)]


def train_and_read(family: str, rank: int | None) -> list[dict[str, Tensor]]:
    """Memories after training steps, and after plastic passes; rank None reads both halves in one process."""
    model = plastic_model(family, "some" if family == "mixtral" else "grow").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SGD(trained, lr=0.05)
    wrapped = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)

    def mine(step: int) -> Tensor:
        halves = two_halves(step)
        return torch.cat(halves) if rank is None else halves[rank]

    found = []
    for step in range(STEPS):
        ids = mine(step)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()
        found.append(memory(model))
    model.eval()
    for step in range(2):
        with model.plastic(**STRONG):
            logits(model, mine(STEPS + step))
        found.append(memory(model))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Tensor]]]]:
    """What either rank remembers, by family."""
    return two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@every_family
def test_two_ranks_move_keys_as_one_process_that_sees_both_halves(
    family: str, ranks: list[dict[str, list[dict[str, Tensor]]]]
) -> None:
    alone = train_and_read(family, None)
    first, second = (seen[family] for seen in ranks)
    assert len(first) == len(alone) == STEPS + 2
    for one, other, whole in zip(first, second, alone, strict=True):
        assert same(one, other), "the ranks have parted"
        assert_close(one, whole)
    assert not any(same(now, then) for now, then in itertools.pairwise(first))


if __name__ == "__main__":
    one_of_two_ranks(lambda rank: {family: train_and_read(family, rank) for family in FAMILIES})
