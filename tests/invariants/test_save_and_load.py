"""What is saved is what is loaded: after any life, the same logits bit for bit, and the same population."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import FAMILIES, check_invariants, live, living_model, logits, mixed_text
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.trainer_utils import load_sharded_checkpoint

from living_moe import LivingMoeForCausalLM, LivingMoeModel
from living_moe.configuration.slabs import tier_of
from living_moe.modeling_living_moe.gradient_sketch import SKETCH

IDS = mixed_text(3, 12)
EVENTS = 50
LIVES = [(family, preset) for family in FAMILIES for preset in ("grow", "frozen-graft")]
LIVES += [("mixtral", "synaptic-router"), ("deepseek_v3", "synaptic-router")]
#: Synapses that are at work from the start.
SECTIONS = {"synaptic-router": {"synapse": {"chunk": 4, "strength": 1.5}}}


@functools.cache
def lived(family: str, preset: str) -> LivingMoeForCausalLM:
    """After training passes that leave vitals, and 50 random events with drift between."""
    model = living_model(family, preset, sections=SECTIONS.get(preset)).train()
    for seed in range(3):
        model(mixed_text(4, 10, seed))
        model.lifecycle_step()
    live(model, EVENTS, seed=11)
    model(mixed_text(4, 10, 9))
    model.lifecycle_step()
    return model.eval()


def same_life(ours: Any, theirs: Any) -> None:
    """Populations, vitals, densities, steps and the config's record of them are equal."""
    check_invariants(ours)
    assert ours.expert_counts == theirs.expert_counts
    assert ours.steps_lived == theirs.steps_lived > 0
    for layer, (mine, his) in enumerate(zip(ours.living_blocks, theirs.living_blocks, strict=True)):
        assert ours.expert_uids(layer) == theirs.expert_uids(layer)
        assert mine.population.members == his.population.members
        assert mine.population.leaves == his.population.leaves
        assert mine.population.tombstones == his.population.tombstones
        assert int(mine.vitals.last_event) == int(his.vitals.last_event)
        vitals = theirs.vitals(layer)
        assert float(vitals["tokens"].sum()) > 0
        for name, value in ours.vitals(layer).items():
            assert torch.equal(value, vitals[name]), name
    assert (ours.base_model.fields is None) == (theirs.base_model.fields is None)
    if ours.base_model.fields is not None:
        for name, counts in ours.base_model.fields.state_dict().items():
            assert torch.equal(counts, theirs.base_model.fields.state_dict()[name]), name


def tensors_in(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_logits(ours: LivingMoeForCausalLM, theirs: LivingMoeForCausalLM) -> bool:
    return torch.equal(logits(ours, IDS), logits(theirs, IDS))


@pytest.mark.parametrize("shards", ["5GB", "25KB"])
@pytest.mark.parametrize(("family", "preset"), LIVES)
def test_a_life_of_fifty_events_is_saved_and_loaded_bit_for_bit(
    family: str, preset: str, shards: str, tmp_path: Path
) -> None:
    model = lived(family, preset)
    populations = copy.deepcopy(model.config.populations)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert model.config.populations == populations
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards != "5GB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_logits(loaded, model)
    same_life(loaded, model)
    assert loaded.lineage == model.lineage and len(loaded.lineage) >= EVENTS
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == flags
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shards)
    first, second = tensors_in(tmp_path), tensors_in(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert (tmp_path / "lineage.jsonl").read_bytes() == (tmp_path / "again" / "lineage.jsonl").read_bytes()


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_the_bytes_on_disk_are_those_of_the_living(preset: str, tmp_path: Path) -> None:
    wide = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, vocab_size=256)
    fields = dict(attention_rank=8, head_rank=8, calibration_tokens=512)
    sections = {"receptive_field": fields} if preset == "frozen-graft" else {}
    model = living_model("mixtral", preset, sections=sections, calibrated=False, **wide)
    live(model, EVENTS, seed=2)
    while sum(model.living_block(0).capacities().values()) == model.expert_counts[0]:
        model.split_expert(0, model.expert_uids(0)[-1])  # a slab that grows has spare slots
    model.save_pretrained(tmp_path)
    slots = {id(slot.parameter) for slot in model.slot_parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in slots)
    members = [member for block in model.living_blocks for member in block.population.members]
    experts = sum(3 * 64 * 256 * 4 ** tier_of(member.slab) + 64 for member in members)
    fields_bytes = sum(b.numel() * b.element_size() for b in model.model.fields.buffers()) if model.model.fields else 0
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size == pytest.approx(4 * (experts + len(members) * SKETCH + rest) + fields_bytes, rel=0.01)
    assert sum(slot.parameter.numel() for slot in model.slot_parameters()) > experts, "no spare slots to leave out"


def test_no_spare_slot_and_no_dead_expert_is_written(tmp_path: Path) -> None:
    model = lived("mixtral", "grow")
    model.save_pretrained(tmp_path)
    populations = AutoConfig.from_pretrained(tmp_path).populations
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for layer, block in enumerate(model.living_blocks):
            prefix = f"model.backbone.layers.{layer}.mlp."
            for slab in ("frozen", "trainable"):
                alive = block.population.alive.get(slab, 0)
                assert populations[layer].get(slab, 0) == alive
                for name in ("experts.{}.gate_up_proj", "experts.{}.down_proj", "router.keys.{}", "population.{}.uid"):
                    key = prefix + name.format(slab)
                    assert (key in file.keys()) == bool(alive)  # noqa: SIM118  (safe_open has no `in`)
                    if alive:
                        assert file.get_slice(key).get_shape()[0] == alive


def fresh(family: str, preset: str) -> LivingMoeForCausalLM:
    """Another model of the same backbone that has lived otherwise."""
    model = living_model(family, preset, sections=SECTIONS.get(preset), seed=5)
    live(model, 8, seed=5)
    return model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("family", "preset"), LIVES)
def test_a_model_of_other_sizes_takes_up_a_state_dict(family: str, preset: str, strict: bool, tmp_path: Path) -> None:
    """Of a checkpoint file, as Trainer's resume reads it, and of a live model with its spare slots."""
    model = lived(family, preset)
    model.save_pretrained(tmp_path)
    for state_dict in (load_file(tmp_path / "model.safetensors"), model.state_dict()):
        other = fresh(family, preset)
        result = other.load_state_dict(state_dict, strict=strict)
        assert not result.missing_keys and not result.unexpected_keys
        assert same_logits(other, model)
        same_life(other, model)


@pytest.mark.parametrize(("family", "preset"), [("mixtral", "grow"), ("deepseek_v3", "frozen-graft")])
def test_shards_are_taken_up_one_by_one_in_any_order(family: str, preset: str, tmp_path: Path) -> None:
    model = lived(family, preset)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    for order in (shards[::-1], shards[::2] + shards[1::2]):
        other = fresh(family, preset)
        for shard in order:
            other.load_state_dict(load_file(shard), strict=False)
        assert same_logits(other, model)
        same_life(other, model)
    other = fresh(family, preset)
    load_sharded_checkpoint(other, str(tmp_path), strict=False)
    assert same_logits(other, model)


def test_a_state_dict_in_another_precision_is_cast_as_torch_does() -> None:
    model = lived("mixtral", "grow")
    other = fresh("mixtral", "grow")
    other.load_state_dict(copy.deepcopy(model).bfloat16().state_dict())
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert logits(other, IDS).isfinite().all()


def test_strict_loading_of_a_state_dict_names_what_is_missing() -> None:
    model = lived("mixtral", "grow")
    state_dict = model.state_dict()
    del state_dict["model.backbone.layers.1.mlp.experts.trainable.down_proj"]
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.experts.trainable.down_proj"):
        fresh("mixtral", "grow").load_state_dict(state_dict)


@pytest.mark.parametrize(("family", "preset"), LIVES)
def test_bfloat16_is_loaded_in_bfloat16_and_tables_keep_their_precision(
    family: str, preset: str, tmp_path: Path
) -> None:
    model = lived(family, preset)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    # Not `.to`, which would cast the rotary frequencies too.
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        parameter.data = parameter.data.bfloat16()
    assert loaded.dtype == torch.bfloat16
    same_life(loaded, model)
    same_life(copy.deepcopy(model).to(torch.bfloat16), model)
    assert same_logits(loaded, expected)
    loaded.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16 and same_logits(again, loaded)


@pytest.mark.parametrize(
    "options",
    [
        dict(device_map="auto"),
        dict(device_map="cpu"),
        dict(low_cpu_mem_usage=True),
        dict(attn_implementation="eager", experts_implementation="eager"),
        dict(dtype="auto"),
        dict(use_safetensors=True),
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_every_way_of_loading_gives_the_same_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = lived("deepseek_v3", "frozen-graft")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    same_life(loaded, model)
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)
    if "experts_implementation" in options:
        assert {block.experts.config._experts_implementation for block in loaded.living_blocks} == {"eager"}
    else:
        assert same_logits(loaded, model)


def test_the_base_model_loads_from_a_causal_checkpoint_and_saves_its_own(tmp_path: Path) -> None:
    model = lived("qwen3_moe", "frozen-graft")
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert type(base) is LivingMoeModel
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
        for loaded in (base, again):
            assert torch.equal(loaded(IDS).last_hidden_state, expected)
            same_life(loaded, model)
            assert loaded.lineage == model.lineage


def test_a_loaded_model_goes_on_living(tmp_path: Path) -> None:
    model = lived("mixtral", "frozen-graft")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = logits(loaded, IDS)
    uids = loaded.expert_uids(0)
    event = loaded.split_expert(0, uids[0])
    assert event.children[0] not in {uid for e in model.lineage for uid in (*e.parents, *e.children) if e.layer == 0}
    torch.testing.assert_close(logits(loaded, IDS), before, rtol=0, atol=1e-6 * float(before.abs().max()))
    live(loaded, 10, seed=4)
    check_invariants(loaded)


def test_tied_embeddings_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    model = living_model("qwen3_moe", tie_word_embeddings=True)
    live(model, 6)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.backbone.embed_tokens.weight
    assert same_logits(loaded, model)


def test_a_model_copied_in_memory_lives_a_life_of_its_own() -> None:
    model = lived("mixtral", "grow")
    before, events = logits(model, IDS), len(model.lineage)
    twin = copy.deepcopy(model)
    live(twin, 6, seed=1)
    assert torch.equal(logits(model, IDS), before) and len(model.lineage) == events
    assert twin.lineage != model.lineage
