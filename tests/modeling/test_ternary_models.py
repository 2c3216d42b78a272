"""Models with ternary experts: chosen by the config, made by calibrated conversion, and packed.

Exact comparisons between different batches of tokens are made in fp64: in fp32 another order of adding can move a unit
to the next of its 255 levels.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    EVENTS,
    HIDDEN,
    check_invariants,
    live,
    living_model,
    logits,
    mixed_text,
    relative_difference,
    source_config,
    source_model,
    token_ids,
)
from lives import BUSY, assert_same_life, build, kinds, life
from oracles import assert_equals_oracle
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import living_moe
from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.configuration.errors import CheckpointError, ConfigurationError, ConversionError, PopulationError
from living_moe.configuration.slabs import tier_of
from living_moe.inspection import inspect_checkpoint
from living_moe.modeling_living_moe import ternary_api
from living_moe.modeling_living_moe.experts import ExpertSlab
from living_moe.modeling_living_moe.ternary import (
    PackedTernary,
    TernarySlab,
    fake_quantize,
    packed_bytes,
    quantize_activations,
    ternarize_,
)
from living_moe.records import parameter_counts
from living_moe.training.checkpointing import load_model
from living_moe.training.optimizers import LivingAdamW

IDS = mixed_text(3, 12)
WIDTH = 16
ALL_TIERS = {"ternary_tiers": [0, 1, 2]}


def ternary_model(preset: str = "grow", experts: dict[str, Any] | None = None, **sections: Any) -> LivingMoeForCausalLM:
    """A graft whose pretrained weights are latents."""
    return living_model(preset=preset, sections={"experts": experts or ALL_TIERS, **sections})


def slabs(model: LivingMoeForCausalLM) -> dict[tuple[int, str], Any]:
    return {
        (block.layer, name): block.experts.slab(name)
        for block in model.living_blocks
        for name in block.population.slabs
    }


def kinds_of(model: LivingMoeForCausalLM) -> set[type]:
    return {type(slab) for slab in slabs(model).values()}


def weights_of(model: LivingMoeForCausalLM, uid: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    block = model.living_block(layer)
    member = block.population.find(uid, layer)
    slab = block.experts.weights(member.slab)
    return slab.gate_up_proj.detach()[member.row], slab.down_proj.detach()[member.row]


def values_of(model: LivingMoeForCausalLM, uid: int) -> tuple[Tensor, Tensor]:
    gate_up, down = weights_of(model, uid)
    return torch.cat([fake_quantize(part) for part in gate_up.chunk(2)]), fake_quantize(down)


def ternary_function(model: LivingMoeForCausalLM, uid: int, inputs: Tensor) -> Tensor:
    gate_up, down = values_of(model, uid)
    gate, up = (quantize_activations(inputs) @ gate_up.T).chunk(2, dim=-1)
    return quantize_activations(torch.nn.functional.silu(gate) * up) @ down.T


def train_step(model: LivingMoeForCausalLM, optimizer: Any, seed: int = 0) -> float:
    ids = token_ids(4, 12, seed)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    model.lifecycle_step(optimizer)
    optimizer.zero_grad()
    return float(loss)


def same_tensors(model: LivingMoeForCausalLM, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in now.items())


# -- chosen by the config ----------------------------------------------------------------------------------------------


def test_ternary_experts_are_off_unless_asked_for() -> None:
    assert kinds_of(living_model()) == {ExpertSlab}


@pytest.mark.parametrize("layers", [None, [1]])
def test_the_tiers_and_layers_of_the_config_are_ternary_whatever_happens(layers: list[int] | None) -> None:
    model = ternary_model(experts={"ternary_tiers": [0, 2], "ternary_layers": layers})
    for layer in (0, 1):
        newborn = model.split_expert(layer, 0).children[0]
        model.freeze_expert(layer, 3)
        model.merge_experts(layer, [1, 2], tier_up=True)
        model.merge_experts(layer, [1, newborn])
        model.merge_experts(layer, [4, 5], tier_up=True)
    found = {place: type(slab) for place, slab in slabs(model).items()}
    assert len(found) == 8
    for (layer, name), kind in found.items():
        ternary = tier_of(name) in (0, 2) and (layers is None or layer in layers)
        assert kind is (TernarySlab if ternary else ExpertSlab), (layer, name)
    check_invariants(model)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "active"])
def test_a_layer_with_ternary_experts_of_several_widths_equals_the_oracle(preset: str, implementation: str) -> None:
    model = ternary_model(preset, {"ternary_tiers": [0, 2]})
    model.merge_experts(0, [0, 1], tier_up=True)
    model.merge_experts(0, [2, 3], tier_up=True)
    model.merge_experts(0, [0, 4])
    model.split_expert(0, 5)
    assert_equals_oracle(model.double(), implementation)


def test_fp32_kernels_agree_in_a_whole_model() -> None:
    """Up to units that move to the next of their levels."""
    model = ternary_model()
    wanted = None
    for implementation in ("eager", "batched_mm", "grouped_mm", "active"):
        model.set_experts_implementation(implementation)
        found = logits(model, IDS)
        wanted = found if wanted is None else wanted
        assert relative_difference(found, wanted) < 1e-2


def test_a_model_from_scratch_learns() -> None:
    backbone = source_config("mixtral")
    config = LivingMoeConfig.from_backbone(backbone, preset="grow", experts=ALL_TIERS, lifecycle={"enabled": False})
    torch.manual_seed(0)
    model = LivingMoeForCausalLM(config)
    assert kinds_of(model) == {TernarySlab}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".experts." in name}
    optimizer = LivingAdamW(model, lr=1e-2)
    losses = [train_step(model, optimizer) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_life_with_ternary_experts_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = ternary_model("frozen-graft")
    live(model, 15, seed=3)
    check_invariants(model)
    model.save_pretrained(tmp_path)
    for options in ({"device_map": "auto"}, {"dtype": torch.bfloat16}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert loaded.config.experts.ternary_tiers == [0, 1, 2] and kinds_of(loaded) == {TernarySlab}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(loaded.dtype)
        assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_a_resumed_run_with_ternary_experts_is_the_uninterrupted_run(tmp_path: Path) -> None:
    def save(trainer: Any, record: Any) -> None:
        if record.step == 7:
            trainer.save(tmp_path / "checkpoint-7")

    torch.manual_seed(0)
    whole = build(ternary_model(lifecycle=BUSY), max_steps=12, hooks=[save])
    whole.run()
    assert "split" in kinds(whole.records[:7])
    torch.manual_seed(999)
    again = build(load_model(tmp_path / "checkpoint-7"), max_steps=12)
    again.resume(tmp_path / "checkpoint-7")
    again.run()
    assert again.records == whole.records[7:]
    assert_same_life(life(again.model, again.optimizer), life(whole.model, whole.optimizer))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"ternary_tiers": [4]}, r"experts.ternary_tiers must be different tiers from 0 to 3, got \[4\]"),
        ({"ternary_tiers": [1, 1]}, "different tiers"),
        ({"ternary_tiers": 1}, "experts.ternary_tiers must be a list of int, got 1"),
        ({"ternary_tiers": [True]}, "a list of int"),
        ({"ternary_layers": []}, "experts.ternary_layers must be None or different living layers"),
        ({"ternary_layers": [-1]}, "different living layers"),
        ({"ternary_layers": [0, 7]}, r"experts.ternary_layers must be None or of the living layers 0..1, got \[0, 7\]"),
        ({"packed": True}, "experts.packed must be False without ternary_tiers"),
    ],
)
def test_a_choice_without_sense_is_refused(experts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LivingMoeForCausalLM(LivingMoeConfig.from_backbone(source_config("mixtral"), experts=experts))


def test_a_layer_without_experts_is_no_living_layer() -> None:
    backbone = source_config("deepseek_v3")  # three layers, two with experts
    config = LivingMoeConfig.from_backbone(backbone, experts={"ternary_tiers": [0], "ternary_layers": [2]})
    with pytest.raises(ConfigurationError, match=r"living layers 0..1, got \[2\]"):
        LivingMoeForCausalLM(config)


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_splits_freezes_and_thaws_of_ternary_experts_change_no_output(preset: str) -> None:
    model = ternary_model(preset).double()
    model.set_experts_implementation("batched_mm")  # grouped_mm has no fp64
    before = logits(model, IDS)
    newborn = model.split_expert(0, 3).children[0]
    assert relative_difference(logits(model, IDS), before) <= 1e-6
    model.freeze_expert(0, newborn)
    model.thaw_expert(0, newborn)
    model.split_expert(1, 2)
    assert relative_difference(logits(model, IDS), before) <= 1e-6


def test_a_merge_averages_latents_as_it_does_weights() -> None:
    ternary, plain = ternary_model(), living_model()
    for model in (ternary, plain):
        model.merge_experts(0, [1, 6, 3])
    for ours, theirs in zip(weights_of(ternary, 1), weights_of(plain, 1), strict=True):
        assert torch.equal(ours, theirs)


def test_ternary_experts_that_become_part_of_a_float_one_keep_their_function() -> None:
    model = ternary_model(experts={"ternary_tiers": [0]}).double()
    inputs = torch.randn(50, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = sum(0.5 * ternary_function(model, uid, inputs) for uid in (2, 5))
    values = [values_of(model, uid) for uid in (2, 5)]
    model.merge_experts(0, [2, 5], tier_up=True)
    assert type(model.living_block(0).experts.slab("trainable_tier1")) is ExpertSlab
    gate_up, down = weights_of(model, 2)
    for number, (own_gate_up, own_down) in enumerate(values):
        first = number * WIDTH
        for half, own in zip(gate_up.chunk(2), own_gate_up.chunk(2), strict=True):
            assert torch.equal(half[first : first + WIDTH], own)
        assert torch.equal(down[:, first : first + WIDTH], own_down * 0.5)
    gate, up = (inputs @ gate_up.T).chunk(2, dim=-1)
    found = (torch.nn.functional.silu(gate) * up) @ down.T
    assert (found - wanted).norm() < 2e-2 * wanted.norm()  # the rounding of activations, which float experts leave out


@pytest.mark.parametrize("from_tiers", [[1], [0, 1]])
def test_a_merge_into_a_ternary_tier_is_nearer_than_plain_absmean(from_tiers: list[int]) -> None:
    """One scale serves the hidden units of both, so it is no exact event; half of the wider units are zeros, which
    would halve the scale if it were their mean magnitude."""
    model = ternary_model(experts={"ternary_tiers": from_tiers})
    twin = ternary_model(experts={"ternary_tiers": [0] if 0 in from_tiers else []})
    inputs = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0))
    for each in (model, twin):
        each.merge_experts(0, [2, 5], tier_up=True)
    assert type(model.living_block(0).experts.slab("trainable_tier1")) is TernarySlab
    gate_up, down = weights_of(twin, 2)  # the exact sum of the two, as the float tier holds it
    gate, up = (inputs @ gate_up.T).chunk(2, dim=-1)
    wanted = (torch.nn.functional.silu(gate) * up) @ down.T
    plain = ternary_function(twin, 2, inputs)
    found = ternary_function(model, 2, inputs)
    assert (found - wanted).norm() < min(0.9 * float((plain - wanted).norm()), 0.8 * float(wanted.norm()))
    assert logits(model, IDS).isfinite().all()
    check_invariants(model)


def test_lives_of_ternary_models_keep_every_invariant_and_train_on() -> None:
    model = ternary_model("grow", {"ternary_tiers": [0, 1]}, lifecycle=BUSY)
    live(model, 25, seed=1)
    optimizer = LivingAdamW(model, lr=1e-2)
    for seed in range(4):
        train_step(model, optimizer, seed)
    check_invariants(model)


# -- calibrated conversion ---------------------------------------------------------------------------------------------


def inputs_of(model: LivingMoeForCausalLM, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's pool receives in evaluation mode: hidden states and experts of each token."""
    seen: list[tuple[Tensor, Tensor]] = []
    pool = model.living_block(layer).experts
    hook = pool.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), args[1].clone())))
    logits(model, ids)
    hook.remove()
    return seen[0]


def lived_model(preset: str) -> LivingMoeForCausalLM:
    """With frozen experts, newborns, spare slots and a second tier in layer 0."""
    model = living_model(preset=preset)
    model.split_expert(0, 1)
    model.merge_experts(0, [2, 3], tier_up=True)
    if preset == "grow":
        model.freeze_expert(0, 4)
    return model


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_each_layer_is_fitted_to_what_it_receives_after_the_layers_before_it(preset: str) -> None:
    model = lived_model(preset)
    reference, ids = copy.deepcopy(model), mixed_text(3, 16)
    reports = model.ternarize(ids)
    wanted = []
    for block in reference.living_blocks:
        hidden_TH, index_TK = inputs_of(reference, block.layer, ids)
        for name in block.population.slabs:
            members = {m.index: m.row for m in block.population.members if m.slab == name}
            slab = block.experts.weights(name)
            rows = [[members.get(index, slab.num_experts) for index in pair] for pair in index_TK.tolist()]
            wanted.append(ternarize_(slab, hidden_TH, torch.tensor(rows)))
            slab.__class__ = TernarySlab
    assert same_tensors(model, reference.state_dict())
    assert [report.slab for report in reports] == [n for b in model.living_blocks for n in b.population.slabs]
    for report, expected in zip(reports, wanted, strict=True):
        count = len(report.uids)
        assert torch.equal(report.calibrated_E, expected.calibrated_C[:count])
        assert torch.equal(report.absmean_E, expected.absmean_C[:count])
        assert (report.calibrated_E <= report.absmean_E).all()
    tokens = sum(int(report.tokens_E.sum()) for report in reports if report.layer == 0)
    assert tokens == ids.numel() * model.config.num_experts_per_tok
    assert torch.equal(logits(model, IDS), logits(reference, IDS))


def test_calibration_brings_a_model_nearer_to_what_it_was() -> None:
    ids, unseen = token_ids(8, 40, 3), token_ids(8, 40, 4)
    models = [living_model() for _ in range(3)]
    exact = logits(models[0], unseen)
    models[1].ternarize(ids)
    models[2].config.experts.ternary_tiers = [0]
    for slab in slabs(models[2]).values():
        slab.__class__ = TernarySlab
    calibrated, absmean = (float((logits(model, unseen) - exact).norm()) for model in models[1:])
    assert calibrated < 0.97 * absmean


def test_an_optimizer_goes_on_with_the_same_parameters() -> None:
    model = living_model(sections={"lifecycle": {"enabled": False}})
    optimizer = LivingAdamW(model, lr=1e-2)
    train_step(model, optimizer)
    parameters = list(model.parameters())
    model.ternarize(token_ids(4, 20))
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True)) and model.training
    before = [weight.clone() for weight in weights_of(model, 0)]
    losses = [train_step(model, optimizer) for _ in range(10)]
    assert not any(torch.equal(now, then) for now, then in zip(weights_of(model, 0), before, strict=True))
    assert losses[-1] < losses[0]


def test_without_tokens_the_weights_decide() -> None:
    model, reference = living_model(), living_model()
    reports = model.ternarize()
    for (place, slab), report in zip(slabs(reference).items(), reports, strict=True):
        expected = ternarize_(slab)
        assert torch.equal(report.calibrated_E, expected.calibrated_C) and not report.tokens_E.any()
        assert place == (report.layer, report.slab)
    assert same_tensors(model, reference.state_dict())


def test_tiers_and_layers_can_be_chosen_one_after_the_other(tmp_path: Path) -> None:
    model = lived_model("grow")
    reports = model.ternarize(IDS, tiers=[0], layers=[0])
    assert {(report.layer, tier_of(report.slab)) for report in reports} == {(0, 0)}
    assert type(model.living_block(0).experts.slab("trainable_tier1")) is ExpertSlab
    with pytest.raises(ConfigurationError, match=r"name tiers \[0, 1\] and layers \[0, 1\]"):
        model.ternarize(IDS, tiers=[1], layers=[1])
    model.ternarize(IDS, tiers=[0], layers=[0, 1])
    assert model.config.experts.ternary_tiers == [0] and model.config.experts.ternary_layers is None
    model.save_pretrained(tmp_path)
    loaded = LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert {place: type(slab) for place, slab in slabs(loaded).items()} == {
        place: type(slab) for place, slab in slabs(model).items()
    }
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    assert {report.slab for report in model.ternarize(IDS)} == {"trainable_tier1"}
    assert model.ternarize(IDS) == []


def test_the_conversion_moves_no_key_and_counts_nothing() -> None:
    sections = {"plasticity": {"enabled": True, "inference": True, "alpha": 0.5}}
    model = living_model(sections=sections).train()
    keys, vitals = model.key_snapshot(), model.vitals(0)
    model.ternarize(token_ids(4, 20))
    assert model.training
    for rows, before in zip(model.key_snapshot(), keys, strict=True):
        assert all(torch.equal(rows[uid], key) for uid, key in before.items())
    assert all(torch.equal(value, vitals[name]) for name, value in model.vitals(0).items())
    assert model.living_block(0).vitals.pending is None and not model.living_block(0).plasticity.evidence


@pytest.mark.parametrize(
    ("tokens", "rows", "length"),
    [((9000,), 4, 512), ((100, 700), 3, 600), ((700, 20), 110, 20), ((3, 4000), 3, 600), ((3,), 1, 3)],
)
def test_a_bounded_even_sample_of_a_text_is_read(tokens: tuple[int, ...], rows: int, length: int) -> None:
    model = living_model(max_position_embeddings=600)
    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    ids = torch.arange(torch.Size(tokens).numel()).view(tokens) % 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ternary_api, "ternarize_", lambda slab, *_: ternarize_(slab))
        patch.setattr(ternary_api, "CALIBRATION_TOKENS", 2200)
        model.ternarize(ids)
    assert len(seen) == 1 and seen[0].shape == (rows, length)
    documents = ids if len(tokens) == 2 else ids[: len(ids) // length * length].view(-1, length)
    assert torch.equal(seen[0][0], documents[0, :length]) and torch.equal(seen[0][-1], documents[-1, :length])


@pytest.mark.parametrize("where", [1, 3])
def test_a_conversion_that_fails_leaves_the_model_as_it_was(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lived_model("grow").train()
    before, populations = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.experts)
    calls: list[ExpertSlab] = []

    def failing(slab: ExpertSlab, *arguments: Any) -> Any:
        calls.append(slab)
        report = ternarize_(slab, *arguments)
        if len(calls) > where:
            raise MemoryError("no more")
        return report

    monkeypatch.setattr(ternary_api, "ternarize_", failing)
    with pytest.raises(MemoryError):
        model.ternarize(IDS)
    assert same_tensors(model, before) and kinds_of(model) == {ExpertSlab} and model.training
    assert model.config.experts == populations and not model.living_block(0).experts._forward_pre_hooks
    assert relative_difference(logits(model.eval(), IDS), logits(lived_model("grow"), IDS)) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"token_ids": IDS.float()},
            ConfigurationError,
            r"int64, \(tokens,\) or \(documents, tokens\), got torch.float32",
        ),
        ({"token_ids": IDS[None]}, ConfigurationError, r"got torch.int64 \(1, 3, 12\)"),
        ({"token_ids": IDS[:0]}, ConfigurationError, "got"),
        ({"token_ids": IDS * 100}, ConfigurationError, "the vocabulary has 67 tokens"),
        ({"token_ids": -IDS}, ConfigurationError, "the vocabulary has 67 tokens"),
        ({"tiers": []}, ConfigurationError, "at least one tier"),
        ({"tiers": 0}, ConfigurationError, "ternary_tiers must be a list of int, got 0"),
        ({"tiers": [9]}, ConfigurationError, r"different tiers from 0 to 3, got \[9\]"),
        ({"layers": [2]}, ConfigurationError, r"living layers 0..1, got \[2\]"),
        ({"layers": []}, ConfigurationError, "different living layers"),
    ],
)
def test_a_conversion_that_makes_no_sense_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = living_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        model.ternarize(**arguments)
    assert same_tensors(model, before) and kinds_of(model) == {ExpertSlab} and not model.config.experts.ternary_tiers


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_experts_wrapped_by_peft_are_neither_converted_nor_packed() -> None:
    from peft import LoraConfig, get_peft_model

    for model, change in ((living_model(), "ternarize"), (ternary_model(), "pack_experts")):
        kinds_before = kinds_of(model)
        names = ["experts.trainable.gate_up_proj", "experts.trainable.down_proj"]
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names))
        with pytest.raises(PopulationError, match="wrapped by PEFT.*merge_and_unload"):
            getattr(model, change)()
        assert kinds_of(model) == kinds_before


def test_a_graft_stays_exact_and_says_how_to_go_on(tmp_path: Path) -> None:
    source = source_model("mixtral")
    with pytest.raises(ConversionError, match=r"model.ternarize\(token_ids\).*verify=False"):
        living_moe.convert(source, tmp_path / "x", preset="grow", experts={"ternary_tiers": [0]})
    with pytest.raises(ConversionError, match="experts.packed=True.*pack_experts"):
        living_moe.convert(source, preset="grow", verify=False, experts={"ternary_tiers": [0], "packed": True})
    assert not (tmp_path / "x").exists()
    later = living_moe.convert(source, preset="grow", experts={"ternary_tiers": [1], "max_tier": 1})
    assert later.graft_verification.max_difference == 0
    latents = living_moe.convert(source, preset="grow", verify=False, experts={"ternary_tiers": [0]})
    pretrained = source.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(latents.living_block(0).experts.slab("trainable").gate_up_proj, pretrained)


def test_ternary_experts_cannot_leave_as_a_float_family(tmp_path: Path) -> None:
    model = living_model()
    model.ternarize(IDS, layers=[1])
    for _ in range(2):
        with pytest.raises(ConversionError, match="layer 1: the experts of trainable are ternary"):
            living_moe.export(model, tmp_path / "out")
        model.pack_experts()


# -- packed ------------------------------------------------------------------------------------------------------------


@functools.cache
def lived_pair(preset: str) -> tuple[LivingMoeForCausalLM, LivingMoeForCausalLM]:
    model = living_model(preset=preset)
    live(model, 10, seed=5)
    model.ternarize(mixed_text(2, 20))
    model.set_experts_implementation("eager")
    packed = copy.deepcopy(model)
    packed.pack_experts()
    assert kinds_of(model) == {TernarySlab} and kinds_of(packed) == {PackedTernary}
    return model, packed


def packed_pair(preset: str = "grow") -> tuple[LivingMoeForCausalLM, LivingMoeForCausalLM]:
    """The same model with latents under "eager", and packed; with spare slots, and experts of several widths."""
    return copy.deepcopy(lived_pair(preset))


@pytest.mark.parametrize(("preset", "dtype"), [("grow", torch.bfloat16), ("frozen-graft", torch.float32)])
def test_packing_changes_no_bit_of_any_output(preset: str, dtype: torch.dtype) -> None:
    model = packed_pair(preset)[0].to(dtype)
    before, written = logits(model, IDS), generated(model)
    model.pack_experts()
    assert model.config.experts.packed
    assert torch.equal(logits(model, IDS), before) and torch.equal(generated(model), written)
    model.set_experts_implementation("grouped_mm")  # which packed experts have no use for
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize(
    ("family", "sections"),
    [("qwen3_moe", {}), ("deepseek_v3", {}), ("mixtral", {"router": {"selection": "top_any"}})],
    ids=["qwen3_moe", "deepseek_v3", "top_any"],
)
def test_every_family_and_places_that_no_expert_takes_can_be_packed(
    family: str, sections: dict[str, Any], tmp_path: Path
) -> None:
    model = living_model(family, sections=sections)
    model.freeze_expert(0, 1)
    reports = model.ternarize(token_ids(4, 20))
    assert [report.slab for report in reports] == ["frozen", "trainable", "trainable"]
    model.set_experts_implementation("eager")
    before = logits(model, IDS)
    model.pack_experts()
    check_invariants(model)
    model.save_pretrained(tmp_path)
    for each in (model, LivingMoeForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(each, IDS), before)


def generated(model: LivingMoeForCausalLM) -> Tensor:
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, pad_token_id=0)


def test_packed_bytes_in_memory_and_on_disk(tmp_path: Path) -> None:
    model = living_model(hidden_size=64, intermediate_size=64)
    model.ternarize()
    model = model.bfloat16()
    weights = sum(model.expert_counts) * 3 * 64 * 64
    assert model.expert_bytes == 2 * weights
    counts, footprint = parameter_counts(model), model.get_memory_footprint()
    model.save_pretrained(tmp_path / "bf16")
    model.pack_experts()
    assert 8 * model.expert_bytes <= 2 * weights and model.expert_bytes == 16 * packed_bytes(64, 64)
    assert footprint - model.get_memory_footprint() == 2 * weights - model.expert_bytes
    assert sum(slab.nbytes for slab in slabs(model).values()) == model.expert_bytes
    model.save_pretrained(tmp_path / "packed")
    assert pool_bytes(tmp_path / "packed") <= 0.14 * pool_bytes(tmp_path / "bf16")
    now = parameter_counts(model)
    assert (now["total"], now["active"]) == (counts["total"], counts["active"])
    assert now["trainable"] == counts["trainable"] - weights
    assert inspect_checkpoint(tmp_path / "packed").parameters == now


def pool_bytes(directory: Path) -> int:
    files = [load_file(path) for path in directory.glob("*.safetensors")]
    return sum(tensor.nbytes for file in files for name, tensor in file.items() if ".experts." in name)


@pytest.mark.parametrize(
    ("options", "shards"),
    [({}, "5GB"), ({"device_map": "auto"}, "20KB"), ({"device_map": "cpu"}, "5GB"), ({"dtype": "auto"}, "20KB")],
    ids=str,
)
def test_packed_experts_are_saved_and_loaded_bit_for_bit(options: dict[str, Any], shards: str, tmp_path: Path) -> None:
    model, packed = packed_pair("frozen-graft")
    packed.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards != "5GB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert loaded.config.experts.packed and kinds_of(loaded) == {PackedTernary}
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    for (place, slab), capacity in zip(slabs(loaded).items(), alive_counts(loaded), strict=True):
        assert slab.num_experts == capacity, f"{place} has spare slots"
    assert loaded.expert_counts == model.expert_counts and loaded.expert_uids(0) == model.expert_uids(0)


def test_a_packed_checkpoint_loads_in_another_precision_with_its_scales_as_they_are(tmp_path: Path) -> None:
    _, packed = packed_pair()
    packed.save_pretrained(tmp_path)
    loaded = LivingMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for parameter in packed.parameters():
        parameter.data = parameter.data.bfloat16()
    for ours, theirs in zip(slabs(loaded).values(), slabs(packed).values(), strict=True):
        count = ours.num_experts
        for name, buffer in ours.named_buffers():
            assert buffer.dtype in (torch.uint8, torch.float32)
            assert torch.equal(buffer, theirs.get_buffer(name)[:count])
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded, IDS), logits(packed, IDS))


def alive_counts(model: LivingMoeForCausalLM) -> list[int]:
    return [b.population.alive.get(name, 0) for b in model.living_blocks for name in b.population.slabs]


def test_casts_leave_packed_bytes_alone() -> None:
    _, packed = packed_pair()
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items() if ".experts." in name}
    for cast in (packed.bfloat16, packed.half, packed.float):
        cast()
        found = packed.state_dict()
        assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in before.items())
    assert packed.dtype == torch.float32 and logits(packed, IDS).isfinite().all()


@pytest.mark.parametrize("device_map", [{"": "disk"}, None])
def test_packed_experts_read_where_other_weights_are_offloaded(
    device_map: dict[str, str] | None, tmp_path: Path
) -> None:
    model, packed = packed_pair()
    packed.save_pretrained(tmp_path / "packed")
    device_map = device_map or {
        "model.backbone.embed_tokens": "cpu", "model.backbone.layers.0": "cpu", "model.backbone.layers.1": "disk",
        "model.backbone.norm": "disk", "model.backbone.rotary_emb": "cpu", "model.clock": "cpu", "model.drift": "cpu",
        "model.trend": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    loaded = LivingMoeForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_a_packed_model_takes_up_a_packed_state_dict_of_other_sizes(tmp_path: Path) -> None:
    _, packed = packed_pair()
    other = living_model(seed=4)
    live(other, 5, seed=9)
    other.ternarize()
    other.pack_experts()
    packed.save_pretrained(tmp_path)
    for state_dict in (packed.state_dict(), load_file(tmp_path / "model.safetensors")):
        taker = copy.deepcopy(other)
        taker.load_state_dict(state_dict)
        assert torch.equal(logits(taker, IDS), logits(packed, IDS))
        assert taker.expert_counts == packed.expert_counts and kinds_of(taker) == {PackedTernary}


def test_state_dicts_of_the_other_kind_are_refused_before_anything_changes() -> None:
    model, packed = packed_pair()
    for taker, state_dict, remedy in (
        (copy.deepcopy(model), packed.state_dict(), "pack_experts"),
        (copy.deepcopy(packed), model.state_dict(), "unpack_experts"),
    ):
        before = copy.deepcopy(taker.state_dict())
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=remedy):
                taker.load_state_dict(state_dict, strict=strict)
        assert same_tensors(taker, before)


@pytest.mark.parametrize("kind", EVENTS)
def test_no_event_happens_to_packed_experts(kind: str) -> None:
    model = living_model()
    model.split_expert(0, 0)
    model.freeze_expert(0, 7)
    model.ternarize()
    model.pack_experts()
    before = copy.deepcopy(model.state_dict())
    uids = [7, 0] if kind == "thaw" else model.expert_uids(0)[1:]
    with pytest.raises(PopulationError, match=r"layer 0: .* packed .*unpack_experts\(\)"):
        EVENTS[kind](model, 0, uids)
    assert same_tensors(model, before) and len(model.lineage) == 4


def test_layers_whose_experts_are_not_ternary_live_on() -> None:
    model = living_model()
    model.ternarize(layers=[0])
    model.pack_experts()
    model.split_expert(1, 2)
    model.merge_experts(1, [3, 4], tier_up=True)
    with pytest.raises(PopulationError, match="unpack_experts"):
        model.split_expert(0, 2)
    assert {type(s) for (layer, _), s in slabs(model).items() if layer == 1} == {ExpertSlab}
    assert model.expert_counts == [8, 8]


def test_packed_experts_do_not_train_and_everything_else_may() -> None:
    model = living_model()
    model.ternarize()
    before_packing = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step(model, before_packing)
    model.pack_experts()
    bytes_before = [slab.down_packed.clone() for slab in slabs(model).values()]
    with pytest.raises(PopulationError, match=r"AdamW was built before model.pack_experts\(\)"):
        train_step(model, before_packing)
    with pytest.raises(PopulationError, match="unpack_experts"):
        LivingAdamW(model, lr=1e-2)
    with pytest.raises(PopulationError, match="unpack_experts"):
        train_step(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    model.config.lifecycle.enabled = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [train_step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(s.down_packed, b) for s, b in zip(slabs(model).values(), bytes_before, strict=True))


def test_unpacked_experts_compute_the_same_and_train_again() -> None:
    model = living_model(sections={"lifecycle": {"enabled": False}})
    live(model, 8, seed=2)
    model.ternarize()
    model.set_experts_implementation("eager")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.pack_experts()
    before = logits(model, IDS)
    stale = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.unpack_experts()
    assert not model.config.experts.packed and kinds_of(model) == {TernarySlab}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert relative_difference(logits(model, IDS), before) < 1e-3
    again = copy.deepcopy(model)
    again.pack_experts()
    for ours, theirs in zip(slabs(again).values(), slabs(model).values(), strict=True):
        assert torch.equal(ours.down_packed, PackedTernary.from_slab(theirs).down_packed)
    with pytest.raises(living_moe.LivingMoeError, match="no optimizer holds the new slab"):
        train_step(model, stale)
    optimizer = LivingAdamW(model, lr=1e-2)
    model.split_expert(0, model.expert_uids(0)[0], optimizer=optimizer)
    losses = [train_step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]
    check_invariants(model)


def test_keys_are_plastic_over_packed_experts_as_over_latents() -> None:
    model, packed = packed_pair()
    moved = []
    for each in (model, packed):
        before = each.key_snapshot()
        with each.plastic(alpha=0.2, beta=0.05, pull="direction"):
            moved.append(generated(each))
        assert any(not torch.equal(each.key_snapshot()[0][uid], key) for uid, key in before[0].items())
    assert torch.equal(*moved) and torch.equal(logits(model, IDS), logits(packed, IDS))


@pytest.mark.parametrize("change", ["pack_experts", "unpack_experts"])
def test_packing_twice_and_unpacking_what_is_not_packed_do_nothing(change: str) -> None:
    model = ternary_model()
    if change == "pack_experts":
        model.pack_experts()
    before, held = copy.deepcopy(model.state_dict()), slabs(model)
    getattr(model, change)()
    assert same_tensors(model, before) and all(slab is held[place] for place, slab in slabs(model).items())


def test_what_cannot_be_packed_or_converted_is_refused_and_stays() -> None:
    with pytest.raises(PopulationError, match=r"no ternary experts.*ternarize"):
        living_model().pack_experts()
    diverged = ternary_model()
    diverged.living_block(1).experts.slab("trainable").down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(PopulationError, match="layer 1, slab 'trainable': an expert holds NaN"):
        diverged.pack_experts()
    assert kinds_of(diverged) == {TernarySlab} and not diverged.config.experts.packed
    packed = ternary_model(experts={"ternary_tiers": [0]})
    packed.pack_experts()
    with pytest.raises(PopulationError, match="unpack_experts"):
        packed.ternarize(IDS, tiers=[0, 1])


def test_a_packed_model_without_a_checkpoint_has_experts_of_zeros() -> None:
    config = LivingMoeConfig.from_backbone(
        source_config("mixtral"), preset="grow", experts={"ternary_tiers": [0], "packed": True}
    )
    model = LivingMoeForCausalLM(config)
    assert not any(part.any() for slab in slabs(model).values() for part in slab.values(0, torch.float32))
    assert logits(model, IDS).isfinite().all()
