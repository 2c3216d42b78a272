"""Tiny models of the three source families, living ones grafted from them, and random lives for them to lead.

Weights are drawn wide enough that routers prefer, attention attends and a wrong expert shows in the logits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import living_moe
from living_moe import LifecycleEvent, LivingMoeForCausalLM
from living_moe.configuration.errors import PopulationError
from living_moe.configuration.slabs import SLABS, tier_of
from living_moe.modeling_living_moe.population import Population
from living_moe.modeling_living_moe.receptive_field import FieldGate

VOCAB = 67
HIDDEN = 32
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")

_SHARED = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_attention_heads=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": dict(intermediate_size=16, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=8),
    "qwen3_moe": dict(
        intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=2, num_key_value_heads=2, head_dim=8,
        num_experts=8, norm_topk_prob=True,
    ),
    # A dense first layer, two groups of which one is open, latent attention with query compression.
    "deepseek_v3": dict(
        intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=3, first_k_dense_replace=1,
        num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1, n_shared_experts=1, kv_lora_rank=16,
        q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip
CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "deepseek_v3": DeepseekV3Config,
}
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "mixtral": MixtralForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
}
#: How each family names its number of experts.
EXPERT_COUNT = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}


def source_config(family: str, **overrides: Any) -> PreTrainedConfig:
    return CONFIG_CLASSES[family](**{**_SHARED, **_OWN[family], **overrides})


def source_model(
    family: str, *, seed: int = 0, attention: str = "sdpa", experts: str = "grouped_mm", **overrides: Any
) -> PreTrainedModel:
    """A pretrained-looking model of the family's own class, in evaluation mode."""
    config = source_config(family, **overrides)
    config._attn_implementation = attention
    model = MODEL_CLASSES[family](config)
    model.set_experts_implementation(experts)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wide = 0.5 if ".gate.weight" in name or "embed_tokens" in name else 0.15
        if tensor.dim() > 1:
            tensor.data.normal_(0, wide, generator=generator)
        elif "norm" in name:
            tensor.data.normal_(1, 0.1, generator=generator)
        elif "e_score_correction_bias" in name:
            tensor.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def save_source(model: PreTrainedModel, path: Path, **options: Any) -> Path:
    """A checkpoint as the hub has it: written by the family's own class, one tensor per expert and projection."""
    model.save_pretrained(path, **options)
    return path


def living_model(
    family: str = "mixtral",
    preset: str = "grow",
    *,
    sections: dict[str, dict[str, Any]] | None = None,
    calibrated: bool = True,
    **overrides: Any,
) -> LivingMoeForCausalLM:
    """A graft of `source_model`, in evaluation mode; with receptive fields it knows tokens below VOCAB / 2."""
    sections = dict(sections or {})
    sections["experts"] = {"max_tier": 2, **sections.get("experts", {})}
    if preset == "frozen-graft":
        small = dict(attention_rank=4, head_rank=4, calibration_tokens=256, prior_tokens=20.0, decay=0.8)
        sections["receptive_field"] = {**small, **sections.get("receptive_field", {})}
    model = living_moe.convert(source_model(family, **overrides), preset=preset, verify=False, **sections)
    if preset == "frozen-graft" and calibrated:
        model.calibrate(old_text(600))
        for text in new_text(400).view(2, -1):  # a field wakes once it could take what it has counted
            model.model.fields.observe(text[None])
            model.model.fields.fold(model.model.fields.pending())
        assert bool(model.model.fields.awake)
    return model


def save_with_words(model: PreTrainedModel, directory: Path) -> None:
    """A checkpoint whose tokenizer knows the words w0 to w59."""
    model.save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(60)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def token_ids(batch: int, length: int, seed: int = 0, low: int = 3, high: int = VOCAB) -> Tensor:
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def old_text(length: int, seed: int = 1) -> Tensor:
    return token_ids(1, length, seed, high=VOCAB // 2)[0]


def new_text(length: int, seed: int = 2) -> Tensor:
    return token_ids(1, length, seed, low=VOCAB // 2)[0]


def mixed_text(batch: int, length: int, seed: int = 0) -> Tensor:
    """Each row begins in the old domain and ends in the new."""
    half = length // 2
    old, new = token_ids(batch, half, seed, high=VOCAB // 2), token_ids(batch, length - half, seed + 1, low=VOCAB // 2)
    return torch.cat([old, new], dim=1)


def some_gate(shape: tuple[int, int], seed: int = 0) -> FieldGate:
    """A gate that puts about half of the tokens in field 1, whatever they are."""
    index = torch.randint(2, shape, generator=torch.Generator().manual_seed(seed))
    return FieldGate(index, torch.zeros(*shape, 1))


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |difference| over max |value|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def prime_searches(model: LivingMoeForCausalLM) -> None:
    """Past the first call of every search, which compares every key and only remembers."""
    for block in model.living_blocks:
        hidden_TH = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            block.router(hidden_TH, block.population, all_logits=False)


def drift(model: LivingMoeForCausalLM, seed: int, std: float = 0.05, *, frozen: bool = False) -> None:
    """Move every expert, key and delta as training would: twins part, keys drift, spare rows stay empty.

    `frozen` moves what does not train too, so that no two keys are left equal.
    """
    generator = torch.Generator().manual_seed(seed)
    alive = {
        id(slot.parameter): model.living_blocks[slot.layer].population.alive.get(slot.slab, 0)
        for slot in model.slot_parameters()
    }
    for parameter in model.parameters():
        if (parameter.requires_grad or frozen) and parameter.dim() > 1:
            rows = parameter.data[: alive.get(id(parameter), len(parameter))]
            rows.add_((torch.randn(rows.shape, generator=generator) * std).to(rows.dtype))


def fast_model(family: str = "mixtral", preset: str = "grow", *, seed: int = 0, **options: Any) -> LivingMoeForCausalLM:
    """A graft whose experts have fast weights, large enough to show, that have been written; `options` of the section
    `synapse`, and of `living_model`."""
    names = {name for name in options if name.startswith("postsynaptic")}
    synapse = {"postsynaptic": True, "postsynaptic_rank": 4, **{name: options.pop(name) for name in names}}
    sections = dict(options.pop("sections", {}))
    sections["synapse"] = {**sections.get("synapse", {}), **synapse}
    model = living_model(family, preset, sections=sections, **options)
    excite(model, seed)
    return model


def excite(model: LivingMoeForCausalLM, seed: int) -> None:
    """Random fast weights and switches in every alive row."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.living_blocks:
        for slab, alive in block.population.alive.items():
            table = block.postsynaptic.table(slab)
            for name, low, high in (
                ("gain", -0.4, 0.4), ("trace", -0.1, 0.1), ("calcium", 0, 3), ("camkii", 0, 1), ("bdnf", 0, 0.5)
            ):  # fmt: skip
                rows = getattr(table, name)[:alive]
                rows.copy_(torch.rand(rows.shape, generator=generator) * (high - low) + low)
        block.postsynaptic.writes.fill_(1)
        block.postsynaptic._is_blank = None


Event = Callable[[LivingMoeForCausalLM, int, list[int]], LifecycleEvent]
EVENTS: dict[str, Event] = {
    "split": lambda model, layer, uids: model.split_expert(layer, uids[0]),
    "noisy split": lambda model, layer, uids: model.split_expert(layer, uids[0], noise_std=0.1),
    "merge": lambda model, layer, uids: model.merge_experts(layer, uids[:2]),
    "merge into a wider tier": lambda model, layer, uids: model.merge_experts(layer, uids[:2], tier_up=True),
    "death": lambda model, layer, uids: model.remove_expert(layer, uids[0]),
    "freeze": lambda model, layer, uids: model.freeze_expert(layer, uids[0]),
    "thaw": lambda model, layer, uids: model.thaw_expert(layer, uids[0]),
    "part": lambda model, layer, uids: model.part_clade(layer, uids[0]),
}


def try_event(model: LivingMoeForCausalLM, kind: str, layer: int, seed: int) -> LifecycleEvent | None:
    """An event of that kind on experts drawn by the seed; None if the population refuses it."""
    layer %= len(model.expert_counts)
    uids = model.expert_uids(layer)
    random.Random(seed).shuffle(uids)
    try:
        return EVENTS[kind](model, layer, uids)
    except PopulationError:
        return None


def live(model: LivingMoeForCausalLM, events: int, seed: int = 0) -> None:
    """Random events, and drift between them, until that many have happened."""
    rng = random.Random(seed)
    happened = 0
    for _ in range(40 * events):
        if happened == events:
            return
        if try_event(model, rng.choice(sorted(EVENTS)), rng.randrange(100), rng.randrange(1000)) is not None:
            happened += 1
            if happened % 5 == 0:
                drift(model, seed + happened)
    raise AssertionError("the population refuses nearly every event")


def check_invariants(model: LivingMoeForCausalLM) -> None:
    """What holds of every population at every time."""
    for block in model.living_blocks:
        population = block.population
        for slab in population.slabs:
            table = population.table(slab)
            alive = population.alive.get(slab, 0)
            assert (table.uid[:alive] >= 0).all() and (table.uid[alive:] == -1).all(), "alive rows are no prefix"
            assert block.experts.slab(slab).intermediate_dim == 16 * 4 ** tier_of(slab)
            sizes = {parameter.shape[0] for parameter in slot_parameters(block, slab)} | {table.uid.numel()}
            assert len(sizes) == 1, f"row-aligned tensors of slab {slab} differ in length: {sizes}"
            assert block.experts.slab(slab).num_experts == table.uid.numel()
            if block.postsynaptic is not None:
                side = block.postsynaptic.table(slab)
                assert {len(buffer) for buffer in side.buffers()} == sizes, f"fast weights of {slab} differ in length"
                assert not side.gain[alive:].any() and not side.trace[alive:].any(), "a spare row has fast weights"
            for parameter in slot_parameters(block, slab):
                assert not parameter[alive:].any(), "a spare row holds something"
                assert parameter.isfinite().all()
        assert len(set(population.uids)) == len(population.uids), "two experts share a uid"
        assert max(population.uids) < int(population.next_uid)
        assert len(population.uids) >= block.router.scoring.top_k
        served_once(population)
    assert [sum(p.values()) for p in sizes_by_slab(model)] == [
        sum(block.capacities().values()) for block in model.living_blocks
    ], "the config's populations are stale"


def slot_parameters(block: Any, slab: str) -> list[Tensor]:
    return [slot.parameter.detach() for slot in block.slot_parameters() if slot.slab == slab]


def sizes_by_slab(model: LivingMoeForCausalLM) -> list[dict[str, int]]:
    return [{k: v for k, v in p.items() if k in SLABS} for p in model.config.populations]


def served_once(population: Population) -> None:
    """In every cell that several addresses divide, each point lies in exactly one leaf."""
    points = torch.randn(64, population.hidden_size, generator=torch.Generator().manual_seed(0)) * 3
    heights = points @ population.facet_normal.T + population.facet_offset
    cells: dict[tuple[int, int], list[int]] = {}
    for address in population.addresses:
        cells.setdefault((address.clade, address.field), []).append(address.uid)
    owned = {leaf.uid for leaf in population.leaves}
    for uids in cells.values():
        if len(uids) == 1:
            assert uids[0] not in owned, "a cell of one address needs no tree"
            continue
        assert set(uids) <= owned, "an address without a leaf serves nobody"
        hits = torch.zeros(len(points))
        for leaf in population.leaves:
            if leaf.uid in uids:
                inside = torch.ones(len(points), dtype=torch.bool)
                for facet, side in leaf.path:
                    inside &= (heights[:, facet] >= 0) == (side > 0)
                hits += inside
        assert (hits == 1).all(), "a token has no server, or two"
    used = {facet for leaf in population.leaves for facet, _ in leaf.path}
    assert used == set(range(population.facet_offset.numel())), "a facet divides nothing"
