"""An export computes what the living model computes, as a plain model of the source family; or it is refused."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    EXPERT_COUNT,
    FAMILIES,
    MODEL_CLASSES,
    drift,
    living_model,
    logits,
    mixed_text,
    relative_difference,
    source_model,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerFast

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.cli import main
from living_moe.configuration.errors import CheckpointError, ConversionError
from living_moe.modeling_living_moe.receptive_field import FieldGate

EXACT = 1e-6
IDS = mixed_text(2, 14)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def learn(model: LivingMoeForCausalLM, steps: int = 4) -> None:
    """A few AdamW steps on everything that trains, then eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(steps):
        ids = mixed_text(2, 12, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@contextmanager
def all_in_field(model: LivingMoeForCausalLM, field: int) -> Iterator[None]:
    """Put every token in one field, whatever the densities say."""
    read_context = model.model.read_context

    def forced(*args: Any) -> Any:
        context = read_context(*args)
        context.gate = FieldGate(torch.full_like(context.gate.index, field), context.gate.evidence)
        return context

    model.model.read_context = forced  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.model.read_context = read_context  # type: ignore[method-assign]


def assert_exported(directory: Path, expected: Tensor, family: str, num_experts: int, tolerance: float = EXACT) -> Any:
    """The checkpoint loads in Transformers alone, as its family's class, and gives these logits on `IDS`."""
    plain, info = MODEL_CLASSES[family].from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(AutoModelForCausalLM.from_pretrained(directory)) is MODEL_CLASSES[family]
    assert getattr(plain.config, EXPERT_COUNT[family]) == num_experts
    assert relative_difference(logits(plain, IDS), expected) <= tolerance
    return plain


# -- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {}) for family in FAMILIES),
        ("mixtral", dict(tie_word_embeddings=True)),
        ("qwen3_moe", dict(num_hidden_layers=3, mlp_only_layers=[1])),
        ("deepseek_v3", dict(n_group=1, topk_group=1, q_lora_rank=None)),
    ],
)
def test_a_graft_comes_back_bit_for_bit(
    family: str, overrides: dict[str, Any], from_path: bool, tmp_path: Path
) -> None:
    source = source_model(family, **overrides)
    source.save_pretrained(tmp_path / "source")
    model = living_moe.convert(tmp_path / "source", tmp_path / "living", preset="grow")
    exported = living_moe.export(tmp_path / "living" if from_path else model, tmp_path / "plain")
    assert type(exported) is MODEL_CLASSES[family] and not exported.training
    assert all(parameter.requires_grad for parameter in exported.parameters())
    assert torch.equal(logits(exported, IDS), logits(source, IDS))
    assert_same_tensors(tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "source"))
    assert exported.config.to_diff_dict() == source.config.to_diff_dict()
    assert exported.generation_config.to_dict() == source.generation_config.to_dict()


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_population_that_learned_and_froze_gives_the_same_logits(
    family: str, from_path: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = living_model(family, "grow")
    for layer, uids in enumerate(([1, 6], [0, 3])):
        for uid in uids:
            model.freeze_expert(layer, uid)
    learn(model)
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path / "living")
    living_moe.export(tmp_path / "living" if from_path else model, tmp_path / "plain")
    assert_exported(tmp_path / "plain", expected, family, 8)
    assert "max |logits - living logits|" in capsys.readouterr().out
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_parted_clades_leave_as_experts_of_their_own(family: str, tmp_path: Path) -> None:
    model = living_model(family, "grow")
    for layer in range(2):
        for uid in (2, 7):  # one of each of DeepSeek's groups, so newborns belong between older experts
            newborn = model.split_expert(layer, uid).children[0]
            drift(model, seed=layer)
            model.part_clade(layer, newborn)
    learn(model)
    expected = logits(model, IDS)
    living_moe.export(model, tmp_path / "plain")
    assert_exported(tmp_path / "plain", expected, family, 10)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("mixtral", {}), ("qwen3_moe", {}), ("deepseek_v3", dict(n_group=1, topk_group=1))],
)
def test_deaths_in_every_layer_and_merges_across_clades_are_exported(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = living_model(family, "grow", **overrides)
    for layer in range(2):
        model.remove_expert(layer, 3)
    model.merge_experts(1, [5, 2, 6])  # three addresses, one function
    expected = logits(model, IDS)
    assert model.expert_counts == [7, 5]
    plain = assert_exported(living_moe_export(model, tmp_path), expected, family, 7)
    experts = [block for block in plain.modules() if hasattr(block, "gate_up_proj") and hasattr(block, "act_fn")]
    assert [len(torch.unique(slab.down_proj, dim=0)) for slab in experts] == [7, 5]


def living_moe_export(model: LivingMoeForCausalLM, tmp_path: Path, **options: Any) -> Path:
    living_moe.export(model, tmp_path / "plain", **options)
    return tmp_path / "plain"


# -- receptive fields ----------------------------------------------------------------------------------------------


def newborn_model(family: str, **overrides: Any) -> LivingMoeForCausalLM:
    """Newborns in the place of some experts, that learned together with the deltas."""
    model = living_model(family, "frozen-graft", **overrides)
    for layer, uids in enumerate(([1, 4], [6])):
        for uid in uids:
            model.split_expert(layer, uid)
    with all_in_field(model, 1):
        learn(model)
    return model


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_field_0_is_the_source_bit_for_bit_whatever_newborns_learned(
    family: str, from_path: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = newborn_model(family)
    model.save_pretrained(tmp_path / "living")
    source_model(family).save_pretrained(tmp_path / "source")
    living_moe.export(tmp_path / "living" if from_path else model, tmp_path / "plain")
    assert_same_tensors(tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "source"))
    assert "3 newborn experts and the deltas stay behind" in capsys.readouterr().out


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_field_1_is_what_tokens_of_that_field_see(family: str, tied: bool, from_path: bool, tmp_path: Path) -> None:
    model = newborn_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "living")
    with all_in_field(model, 0):
        old = logits(model, IDS)
    with all_in_field(model, 1):
        expected = logits(model, IDS)
    assert relative_difference(old, expected) > 0.1, "the newborns learned nothing, so the test shows nothing"
    living_moe.export(tmp_path / "living" if from_path else model, tmp_path / "plain", field=1)
    plain = assert_exported(tmp_path / "plain", expected, family, 8)
    assert not plain.config.tie_word_embeddings
    assert model.config.tie_word_embeddings is tied


def test_a_head_without_a_delta_stays_tied(tmp_path: Path) -> None:
    sections = {"receptive_field": dict(head_rank=0)}
    model = living_model("mixtral", "frozen-graft", sections=sections, tie_word_embeddings=True)
    assert living_moe.export(model, tmp_path / "plain", field=1).config.tie_word_embeddings
    assert "lm_head.weight" not in tensors_of(tmp_path / "plain")


# -- precision, devices, kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_comes_back_bit_for_bit(family: str, from_path: bool, tmp_path: Path) -> None:
    source_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = living_moe.convert(tmp_path / "source", tmp_path / "living", preset="grow")
    exported = living_moe.export(tmp_path / "living" if from_path else model, tmp_path / "plain")
    source, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "plain"))
    assert exported.dtype == plain.dtype == source.dtype == torch.bfloat16
    assert torch.equal(logits(plain, IDS), logits(source, IDS))
    ours, theirs = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "source")
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_exports_field_1_to_float64_precision(family: str, tmp_path: Path) -> None:
    model = newborn_model(family, experts="eager").double()
    with all_in_field(model, 1):
        expected = logits(model, IDS)
    exported = living_moe.export(model, tmp_path / "plain", field=1)
    assert exported.dtype == torch.float64
    # DeepSeek-V3 routes in fp32 whatever the model's dtype; a product rounds by the keys that are in it.
    bound = 1e-6 if family == "deepseek_v3" else 1e-12
    assert relative_difference(logits(exported, IDS), expected) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_exports_field_1_up_to_rounding(family: str, tmp_path: Path) -> None:
    model = newborn_model(family).to(torch.bfloat16)
    with all_in_field(model, 1):
        expected = logits(model, IDS).float()
    exported = living_moe.export(model, tmp_path / "plain", field=1)
    difference = (logits(exported, IDS).float() - expected).abs().amax(-1)
    assert float(difference.median() / expected.abs().max()) < 0.03


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "active"])
def test_kernels_of_the_living_model_run_the_exported_one(experts: str, tmp_path: Path) -> None:
    model = living_model("mixtral", "grow", attention="eager")
    model.set_experts_implementation(experts)
    exported = living_moe.export(model, tmp_path / "plain")
    assert exported.config._experts_implementation == experts
    assert exported.config._attn_implementation == "eager"
    assert relative_difference(logits(exported, IDS), logits(model, IDS)) <= EXACT


# -- what stays as it was, and what comes along --------------------------------------------------------------------


def test_a_model_in_memory_stays_as_it_is_and_shares_nothing(tmp_path: Path) -> None:
    model = newborn_model("mixtral").train()
    before = copy.deepcopy(model.state_dict())
    exported = living_moe.export(model, tmp_path / "plain")
    for parameter in exported.parameters():
        parameter.data.zero_()
    assert model.training and model.config.backbone_config.num_local_experts == 8
    assert_same_tensors(model.state_dict(), before)
    assert not model.model.fields._forward_hooks


@pytest.mark.parametrize("given", ["path", "graft", "loaded"])
def test_tokenizer_and_generation_config_come_along(given: str, tmp_path: Path) -> None:
    source = source_model("mixtral")
    source.generation_config.max_new_tokens = 7
    source.save_pretrained(tmp_path / "source")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "cell": 1, "splits": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "source")
    graft = living_moe.convert(tmp_path / "source", tmp_path / "living", preset="grow")
    path = tmp_path / "living"
    model = {"path": path, "graft": graft, "loaded": LivingMoeForCausalLM.from_pretrained(path)}[given]
    living_moe.export(model, tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("cell splits").input_ids == [1, 2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").generation_config.max_new_tokens == 7


# -- refusals ------------------------------------------------------------------------------------------------------


def refused(model: Any, tmp_path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(ConversionError) as caught:
        living_moe.export(model, tmp_path / "out" / "plain", **options)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_clades_of_several_members_are_refused_by_layer_and_uid(tmp_path: Path) -> None:
    model = living_model("mixtral", "grow")
    model.split_expert(1, 3)
    refused(
        model, tmp_path, "layer 1: 1 of 8 clades", "uids [3, 8]", "merge_experts", "remove_expert", "part_clade",
        "save_pretrained",
    )  # fmt: skip
    model.merge_experts(1, [3, 8])
    living_moe.export(model, tmp_path / "plain")


def test_a_dead_sibling_whose_address_is_still_used_is_refused(tmp_path: Path) -> None:
    model = living_model("mixtral", "grow")
    newborn = model.split_expert(0, 3).children[0]
    drift(model, seed=0)
    model.remove_expert(0, newborn)
    assert model.living_blocks[0].population.tombstones
    refused(model, tmp_path, "layer 0: 1 of 8 clades have several members or addresses", "[3, 8]")


def test_unequal_layers_are_refused_with_their_counts(tmp_path: Path) -> None:
    model = living_model("mixtral", "grow")
    model.remove_expert(1, 0)
    refused(model, tmp_path, "[8, 7] clades")


def test_addresses_that_are_scored_but_never_chosen_are_refused(tmp_path: Path) -> None:
    model = living_model("qwen3_moe", "grow", norm_topk_prob=False)
    for layer in range(2):
        model.remove_expert(layer, 5)
    refused(model, tmp_path, "layer 0: the dead uids [5]", "layer 1", "still scored")


def test_unequal_expert_groups_are_refused(tmp_path: Path) -> None:
    model = living_model("deepseek_v3", "grow")
    for layer in range(2):
        model.part_clade(layer, model.split_expert(layer, 0).children[0])
    refused(model, tmp_path, "layer 1: expert groups of [5, 4] clades")


def test_expert_groups_of_one_are_refused(tmp_path: Path) -> None:
    model = living_model("deepseek_v3", "grow", n_group=4, topk_group=2)
    for block in model.living_blocks:
        block.population.trainable.group.copy_(torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]))
    model.living_blocks[0].population.stale()
    living_moe.export(model, tmp_path / "plain")
    for block in model.living_blocks:
        block.router.scoring = dataclasses.replace(block.router.scoring, num_groups=8)
        block.population.trainable.group.copy_(torch.arange(8))
        block.population.stale()
    refused(model, tmp_path, "groups of [1, 1, 1, 1, 1, 1, 1, 1]")


def test_only_the_backbones_own_family_can_be_named(tmp_path: Path) -> None:
    model = living_model("mixtral", "grow")
    for to in ("qwen3_moe", "Mixtral", "llama"):
        refused(model, tmp_path, repr(to), "'mixtral'", "deepseek_v3, mixtral, qwen3_moe", to=to)
    assert isinstance(living_moe.export(model, tmp_path / "plain", to="mixtral"), MixtralForCausalLM)


@pytest.mark.parametrize("field", [1, -1, "1", None])
def test_a_field_that_the_model_does_not_have_is_refused(field: Any, tmp_path: Path) -> None:
    refused(living_model("mixtral", "grow"), tmp_path, f"field={field!r}", "[0]", field=field)
    refused(living_model("mixtral", "frozen-graft"), tmp_path, "[0, 1]", field=2)


def test_only_a_living_model_with_its_head_can_be_exported(tmp_path: Path) -> None:
    refused(source_model("mixtral"), tmp_path, "got MixtralForCausalLM")
    refused(living_model("mixtral", "grow").model, tmp_path, "got LivingMoeModel")
    refused(tmp_path / "nowhere", tmp_path, "nowhere")


def test_attached_adapters_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], r=2)
    model = living_model("mixtral", "grow")
    model.add_adapter(config)
    refused(model, tmp_path, "adapters")
    refused(get_peft_model(living_model("mixtral", "grow"), config), tmp_path, "merge_and_unload")


def test_a_used_directory_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match="never overwrites"):
        living_moe.export(living_model("mixtral", "grow"), tmp_path / "plain")
    assert [entry.name for entry in (tmp_path / "plain").iterdir()] == ["mine.txt"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    living_model("mixtral", "grow").save_pretrained(tmp_path / "living")
    weights = tmp_path / "living" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        living_moe.export(tmp_path / "living", tmp_path / "plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_export_is_never_written(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_wrong_activation(self: MixtralForCausalLM, config: Any) -> None:
        config.hidden_act = "sigmoid"
        init(self, config)

    model = living_model("mixtral", "grow").to(dtype)
    init = MixtralForCausalLM.__init__
    monkeypatch.setattr(MixtralForCausalLM, "__init__", with_wrong_activation)
    refused(model, tmp_path, "logits differ", "Nothing was written")
    living_moe.export(model, tmp_path / "plain", verify=False)


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(MixtralForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        living_moe.export(living_model("mixtral", "grow"), tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_the_checkpoint_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = newborn_model("mixtral")
    with all_in_field(model, 1):
        expected = logits(model, IDS)
    model.save_pretrained(tmp_path / "living")
    assert main(["export", str(tmp_path / "living"), str(tmp_path / "plain"), "--field", "1"]) == 0
    assert_exported(tmp_path / "plain", expected, "mixtral", 8)
    assert "max |logits" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "living"), str(tmp_path / "other"), "--to", "llama"]) == 1
    error = capsys.readouterr().err
    assert "'llama'" in error and len(error.strip().splitlines()) == 1
