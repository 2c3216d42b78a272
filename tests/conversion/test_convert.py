"""`convert`: what it writes, what it refuses, and that a refusal changes nothing. Exactness is in tests/invariants."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import FAMILIES, living_model, logits, mixed_text, old_text, save_source, source_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

import living_moe
from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.errors import ConfigurationError, ConversionError
from living_moe.conversion import convert, graft
from living_moe.modeling_living_moe.families import FAMILIES as ADAPTERS


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(source_model("mixtral"), tmp_path / "source")


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_a_conversion_prints_and_records_what_it_measured(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = convert(source)
    assert "max |logits - source logits| = 0 on" in capsys.readouterr().out
    assert model.graft_verification.max_difference == 0.0 and model.graft_verification.tokens > 40
    assert model.config.provenance == {
        "base_model": str(source),
        "family": "mixtral",
        "graft_max_logit_difference": 0.0,
    }
    assert not model.training and model.config.preset == "frozen-graft"


def test_the_written_model_is_the_returned_one_with_the_sources_tokenizer(source: Path, tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate("a b c d".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    model = convert(source, tmp_path / "living", preset="grow", lifecycle={"interval": 7})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "living")
    assert torch.equal(logits(loaded, mixed_text(2, 8)), logits(model, mixed_text(2, 8)))
    assert loaded.config.lifecycle.interval == 7 and loaded.config == model.config
    assert AutoTokenizer.from_pretrained(tmp_path / "living")("b d").input_ids == [1, 3]


def test_the_sources_generation_config_and_special_tokens_come_along(source: Path, tmp_path: Path) -> None:
    file = source / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.3, "do_sample": True}))
    convert(source, tmp_path / "living")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "living")
    assert loaded.generation_config.temperature == 0.3
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frozen_graft_trains_its_deltas_only_and_grow_trains_everything(family: str) -> None:
    frozen = living_model(family, "frozen-graft")
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trained and all("delta" in name for name in trained)
    assert all(block.population.alive == {"frozen": 8} for block in frozen.living_blocks)
    grow = living_model(family, "grow")
    assert all(parameter.requires_grad for parameter in grow.parameters())
    assert all(block.population.alive == {"trainable": 8} for block in grow.living_blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_a_loaded_source_are_handed_over_not_copied(family: str) -> None:
    source = source_model(family)
    addresses = {parameter.data_ptr() for parameter in source.parameters()}
    config = LivingMoeConfig.from_backbone(source.config, preset="grow")
    model = graft(source, config, copy_tensors=False)
    assert {parameter.data_ptr() for parameter in model.parameters()} == addresses


def test_the_skeleton_never_allocates_the_sources_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    zeros = torch.zeros

    def watched(*size: Any, **options: Any) -> Tensor:
        nonlocal largest
        made = zeros(*size, **options)
        largest = max(largest, 0 if made.is_meta else made.numel())
        return made

    source = source_model("mixtral")
    monkeypatch.setattr(torch, "zeros", watched)
    graft(source, LivingMoeConfig.from_backbone(source.config, preset="grow"), copy_tensors=False)
    assert largest < source.model.layers[0].mlp.experts.down_proj.numel()


def test_a_dtype_asked_for_is_the_dtype_of_the_result(source: Path) -> None:
    model = convert(source, preset="grow", dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.graft_verification.max_difference == 0.0


@pytest.mark.parametrize(
    "sections", [{"escape": {"space": "poincare"}}, {"escape": {"space": "fourier"}}, {"synapse": {"router": True}}]
)
def test_what_the_source_lacks_takes_the_dtype_asked_for(source: Path, sections: dict[str, Any]) -> None:
    model = convert(source, preset="grow", dtype=torch.bfloat16, **sections)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_calibration_text_reaches_the_fields_before_the_model_is_written(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "living", calibration=old_text(300), receptive_field={"calibration_tokens": 128})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "living")
    assert bool(loaded.model.fields.calibrated) and int(loaded.model.fields.old_counts.sum()) == 300


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_output_directory_in_use_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="never overwrites"):
        convert("no/such/source", tmp_path)
    with pytest.raises(ConversionError, match="never overwrites"):
        convert("no/such/source", tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_source_is_never_converted_onto_itself(source: Path) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(ConversionError, match="not empty"):
        convert(source, source)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_an_empty_output_directory_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "living").mkdir()
    convert(source, tmp_path / "living", preset="grow")
    assert (tmp_path / "living" / "config.json").is_file()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_family_without_an_adapter_is_told_the_known_ones(in_memory: bool, tmp_path: Path) -> None:
    small = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    for model in (LlamaForCausalLM(LlamaConfig(**small)), OlmoeForCausalLM(OlmoeConfig(**small, num_experts=4))):
        given = model if in_memory else save_source(model, tmp_path / model.config.model_type)
        with pytest.raises(ConversionError) as caught:
            convert(given)
        assert all(name in str(caught.value) for name in (model.config.model_type, *ADAPTERS))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConversionError, match="MixtralModel.*MixtralForCausalLM"):
        convert(source_model("mixtral").model)


def test_a_living_model_is_no_source(tmp_path: Path) -> None:
    model = living_model("mixtral")
    model.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        with pytest.raises(ConversionError, match="living_moe"):
            convert(given)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="nowhere"):
        convert(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage",
    ["truncated", "gate missing", "gate misshapen", "w1 missing", "w1 misshapen", "no weights", "config broken"],
)
def test_a_damaged_source_is_refused_and_nothing_is_written(source: Path, tmp_path: Path, damage: str) -> None:
    weights, what = source / "model.safetensors", damage.split()[0]
    tensors = load_file(weights)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config broken":
        (source / "config.json").write_text("{")
    else:
        (name,) = [
            f"model.layers.1.block_sparse_moe.{end}" for end in ("gate.weight", "experts.3.w1.weight") if what in end
        ]
        tensors[name] = tensors[name][:3].clone()
        if damage.endswith("missing"):
            del tensors[name]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "living")
    if what == "gate":  # of an expert's own tensors Transformers' report, in the log, tells the name
        assert "layers.1." in str(caught.value) and "gate" in str(caught.value)
    assert str(source) in str(caught.value)
    assert not (tmp_path / "living").exists()


def test_a_graft_that_does_not_reproduce_its_source_is_refused_and_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = nn.Embedding.forward

    def off(embedding: nn.Embedding, ids: Tensor) -> Tensor:
        return forward(embedding, ids) * (1 + 1e-4 * off.calls.pop())

    off.calls = [1, 0]  # the source's pass first, then the living model's
    model = source_model("mixtral")
    monkeypatch.setattr(nn.Embedding, "forward", off)
    with pytest.raises(ConversionError, match="logits differ from the source's"):
        convert(model, tmp_path / "living", preset="grow")
    assert not (tmp_path / "living").exists()


def test_unknown_presets_sections_and_fields_are_told(source: Path) -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'frozen-graft'"):
        convert(source, preset="frozen-grafts")
    with pytest.raises(ConfigurationError, match="Did you mean 'lifecycle'"):
        convert(source, lifecyle={"interval": 3})
    with pytest.raises(ConfigurationError, match="lifecycle.intervals"):
        convert(source, lifecycle={"intervals": 3})


def test_keywords_of_loading_do_not_apply_to_a_model_in_memory() -> None:
    with pytest.raises(ConversionError, match="dtype"):
        convert(source_model("mixtral"), dtype=torch.bfloat16)


def test_importing_the_package_registers_the_auto_classes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "living")
    assert type(AutoConfig.from_pretrained(tmp_path / "living")) is living_moe.LivingMoeConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "living")) is living_moe.LivingMoeForCausalLM
