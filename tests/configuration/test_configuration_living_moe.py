"""`LivingMoeConfig`: one truth with its backbone, strict on every way in, exact through JSON, copies and pickles."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from living_moe.configuration import (
    FORMAT_VERSION,
    PRESETS,
    ConfigurationError,
    LifecycleConfig,
    LivingMoeConfig,
    RouterConfig,
)

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=128,
)  # fmt: skip
# Their signatures do not show the keywords that every config takes.
mixtral, qwen3_moe, deepseek_v3, llama = (
    cast(Any, cls) for cls in (MixtralConfig, Qwen3MoeConfig, DeepseekV3Config, LlamaConfig)
)
BACKBONES: dict[str, PreTrainedConfig] = {
    "mixtral": mixtral(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "qwen3_moe": qwen3_moe(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True, head_dim=8
    ),
    "deepseek_v3": deepseek_v3(
        **SIZES | {"num_key_value_heads": 2}, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        first_k_dense_replace=1, n_group=2, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1,
    ),
    "llama": llama(
        **SIZES, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    ),
}  # fmt: skip
EVERY_BACKBONE = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=list(BACKBONES))


def living(**kwargs: Any) -> LivingMoeConfig:
    return LivingMoeConfig(**{"backbone_config": BACKBONES["mixtral"], **kwargs})


@pytest.fixture
def registered() -> None:
    AutoConfig.register("living_moe", LivingMoeConfig, exist_ok=True)


# -- construction ------------------------------------------------------------------------------------------------------


@EVERY_BACKBONE
def test_a_backbone_may_be_an_instance_or_a_dict(backbone: PreTrainedConfig) -> None:
    from_instance = LivingMoeConfig(backbone_config=backbone)
    from_dict = LivingMoeConfig(backbone_config=backbone.to_dict())
    assert type(from_instance.backbone_config) is type(from_dict.backbone_config) is type(backbone)
    assert from_instance == from_dict
    assert from_instance.backbone_config.to_dict() == backbone.to_dict()


def test_the_given_backbone_is_never_changed() -> None:
    source = copy.deepcopy(BACKBONES["mixtral"])
    source._attn_implementation = "sdpa"
    as_dict = source.to_dict()
    before, dict_before = copy.deepcopy(vars(source)), copy.deepcopy(as_dict)
    for given_backbone in (source, as_dict):
        config = LivingMoeConfig(backbone_config=given_backbone, dtype="bfloat16", attn_implementation="eager")
        config.use_cache = False
        config.backbone_config.rope_parameters["rope_theta"] = 1.0
    assert vars(source) == before
    assert as_dict == dict_before


def test_without_any_argument_a_default_stands_in_and_with_one_the_missing_backbone_is_an_error() -> None:
    assert isinstance(LivingMoeConfig().backbone_config, MixtralConfig)
    for given_keywords in (
        {"preset": "grow"},
        {"lifecycle": {"interval": 5}},
        {"dtype": "float32"},
        {"use_cache": True},
    ):
        with pytest.raises(
            ConfigurationError, match=f"backbone_config is missing .given: {next(iter(given_keywords))}.; "
        ):
            LivingMoeConfig(**given_keywords)
    with pytest.raises(ConfigurationError, match="backbone_config is missing"):
        LivingMoeConfig.from_dict({"model_type": "living_moe", "format_version": 1, "preset": "grow"})


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"hidden_size": 16}, "backbone_config has no model_type; add the source family's"),
        ({"model_type": "mixtrall"}, "backbone_config.model_type is 'mixtrall', .* Did you mean 'mixtral'?"),
        ({"model_type": "?"}, "backbone_config.model_type is '\\?', unknown to Transformers. Register it"),
        (7, "backbone_config must be a config or a dict with model_type, got 7"),
        ({"model_type": "living_moe"}, "backbone_config is itself a living config"),
        (LivingMoeConfig(), "backbone_config is itself a living config"),
        ({"model_type": "mixtral", "vocab_size": "many"}, "backbone_config: .*vocab_size.* expected int"),
        ({"model_type": "llama", "hidden_size": 15}, "backbone_config: .*hidden size .15. is not a multiple"),
    ],
)
def test_a_backbone_without_sense_is_refused(backbone: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LivingMoeConfig(backbone_config=backbone)


def test_a_graft_keeps_the_sources_dtype_and_kernels_unless_told_otherwise() -> None:
    source = mixtral(
        **SIZES, dtype="bfloat16", output_hidden_states=True, output_attentions=True, attn_implementation="eager",
        experts_implementation="grouped_mm",
    )  # fmt: skip
    config = LivingMoeConfig(backbone_config=source)
    for each in (config, config.backbone_config):
        assert each.dtype == torch.bfloat16 and each.output_hidden_states is True and each.output_attentions is True
        assert (each._attn_implementation, each._experts_implementation) == ("eager", "grouped_mm")
    with pytest.raises(
        ConfigurationError, match=r"output_attentions: .*not supported .* sdpa\. Please set it to 'eager'"
    ):
        LivingMoeConfig(backbone_config=source, attn_implementation="sdpa")
    source.output_attentions = False
    config = LivingMoeConfig(backbone_config=source, dtype=torch.float16, attn_implementation="sdpa")
    for each in (config, config.backbone_config):
        assert each.dtype == torch.float16
        assert (each._attn_implementation, each._experts_implementation) == ("sdpa", "grouped_mm")


def test_a_sources_quantization_and_remote_code_are_not_the_grafts() -> None:
    source = copy.deepcopy(BACKBONES["mixtral"])
    source.quantization_config = {"quant_method": "fp8"}
    source.auto_map = {"AutoConfig": "somewhere.Else"}
    config = LivingMoeConfig(backbone_config=source)
    for each in (config, config.get_text_config(decoder=True)):
        assert not hasattr(each, "quantization_config")
    assert not hasattr(config, "auto_map")
    assert source.quantization_config == {"quant_method": "fp8"}
    config.quantization_config = {"quant_method": "other"}
    assert json.loads(config.to_json_string())["quantization_config"] == {"quant_method": "other"}
    assert not hasattr(config.backbone_config, "quantization_config")


def test_sections_may_be_instances_or_dicts_and_become_instances() -> None:
    config = living(router=RouterConfig(z_loss_coef=0.5), lifecycle={"interval": 5}, vitals=None)
    assert config.router == RouterConfig(z_loss_coef=0.5)
    assert config.lifecycle == LifecycleConfig(interval=5)
    config.lifecycle = {"interval": 6}  # type: ignore[assignment]
    assert config.lifecycle == LifecycleConfig(interval=6)


def test_provenance_is_a_record_of_the_living_config() -> None:
    config = living()
    assert config.provenance == {}
    config.provenance = {"base_model": "a/b", "family": "mixtral"}
    assert not hasattr(config.backbone_config, "provenance")
    assert LivingMoeConfig.from_dict(json.loads(config.to_json_string())).provenance == config.provenance
    with pytest.raises(ConfigurationError, match="provenance must be a dict of plain values, got 'a/b'"):
        config.provenance = "a/b"  # type: ignore[assignment]


def test_two_configs_share_no_section() -> None:
    router = RouterConfig()
    first, second = living(router=router), living(router=router)
    first.router.z_loss_coef = 0.5
    first.lifecycle.interval = 7
    assert (second.router.z_loss_coef, router.z_loss_coef) == (0.0, 0.0)
    assert second.lifecycle.interval == LifecycleConfig().interval


# -- unknown words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("lifecyle", r"unknown field lifecyle\. Did you mean 'lifecycle'\?"),
        ("vocab_sice", r"unknown field vocab_sice\. Did you mean 'vocab_size'\?"),
        ("use_cahce", r"unknown field use_cahce\. Did you mean 'use_cache'\?"),
        ("qqqqqqqq", r"unknown field qqqqqqqq\. Known: .*lifecycle"),
        ("num_local_experts", r"num_local_experts cannot be given, got 1: it is derived"),
        ("num_experts", r"num_experts cannot be given, got 1: it is derived"),
        ("rope_scaling", r"rope_scaling cannot be given, .* belongs in backbone_config"),
    ],
)
def test_an_unknown_keyword_is_refused_in_code_and_in_a_file(keyword: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        living(**{keyword: 1})
    living().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {keyword: 1}))
    with pytest.raises(ConfigurationError, match=message):
        LivingMoeConfig.from_pretrained(tmp_path)


def test_a_misspelt_field_of_a_section_in_a_file_is_refused(tmp_path: Path) -> None:
    living().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["lifecycle"]["intervall"] = saved["lifecycle"].pop("interval")
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigurationError, match=r"lifecycle\.intervall\. Did you mean 'interval'"):
        LivingMoeConfig.from_pretrained(tmp_path)


def test_all_that_transformers_takes_or_writes_passes_and_comes_back() -> None:
    everything = {
        "architectures": ["LivingMoeForCausalLM"], "dtype": "bfloat16", "transformers_version": "5.0.0",
        "name_or_path": "a/b", "id2label": {"0": "no", "1": "yes", "2": "perhaps"},
        "label2id": {"no": 0, "yes": 1, "perhaps": 2}, "auto_map": {"AutoConfig": "x.Y"},
        "attn_implementation": "eager", "experts_implementation": "eager",
        "output_router_logits": True, "use_cache": False,
        "tie_word_embeddings": True, "pad_token_id": 3, "bos_token_id": 4, "eos_token_id": [5, 6],
        "output_hidden_states": True, "output_attentions": True, "return_dict": True, "is_encoder_decoder": False,
        "problem_type": "regression", "chunk_size_feed_forward": 0, "temperature": 0.5, "max_length": 99, "top_k": 3,
        "custom_pipelines": {}, "model_type": "living_moe", "_commit_hash": "abc",
    }  # fmt: skip
    config = living(**everything)
    assert config.architectures == ["LivingMoeForCausalLM"]
    assert config.dtype == config.backbone_config.dtype == torch.bfloat16
    assert config.name_or_path == "a/b" and config.num_labels == 3 and "perhaps" in (config.id2label or {}).values()
    assert config.auto_map == {"AutoConfig": "x.Y"} and config.custom_pipelines == {}
    assert config._attn_implementation == config.backbone_config._attn_implementation == "eager"
    assert config._experts_implementation == config.backbone_config._experts_implementation == "eager"
    backbone = config.backbone_config
    assert (backbone.output_router_logits, backbone.use_cache, backbone.tie_word_embeddings) == (True, False, True)
    assert (backbone.pad_token_id, backbone.bos_token_id, backbone.eos_token_id) == (3, 4, [5, 6])
    assert backbone.output_hidden_states is True and backbone.output_attentions is True
    # Generation belongs to GenerationConfig: dropped on the way in, as by every config of Transformers.
    assert not hasattr(config, "temperature") and not hasattr(config, "max_length")
    for use_diff in (False, True):
        assert LivingMoeConfig.from_dict(json.loads(config.to_json_string(use_diff=use_diff))) == config


def test_a_slip_in_a_name_of_ours_is_refused_on_assignment_and_a_foreign_name_goes_to_the_backbone() -> None:
    config = living()
    with pytest.raises(ConfigurationError, match=r"unknown field lifecyle\. Did you mean 'lifecycle'\?"):
        config.lifecyle = {}
    config.pretraining_tp = 1  # scripts written for Llama do this
    assert config.backbone_config.pretraining_tp == 1
    assert LivingMoeConfig.from_dict(json.loads(config.to_json_string())).pretraining_tp == 1


def test_a_file_of_another_model_is_told_apart() -> None:
    with pytest.raises(ConfigurationError, match=r"model_type is 'mixtral', .* no living checkpoint\. Graft it first"):
        LivingMoeConfig.from_dict(BACKBONES["mixtral"].to_dict())


def test_a_newer_format_is_refused_before_its_unknown_fields_are(tmp_path: Path) -> None:
    living().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    newer = json.loads(path.read_text())
    newer.update(format_version=FORMAT_VERSION + 1, organs={})
    newer["lifecycle"]["lifespan"] = 3
    path.write_text(json.dumps(newer))
    with pytest.raises(
        ConfigurationError, match=f"format_version is {FORMAT_VERSION + 1} but .* up to {FORMAT_VERSION}"
    ):
        LivingMoeConfig.from_pretrained(tmp_path)
    for value in (0, "1", True, 1.0):
        with pytest.raises(ConfigurationError, match="format_version must be an int >= 1"):
            living(format_version=value)


def test_sections_and_fields_missing_from_an_old_file_take_their_defaults() -> None:
    old = json.loads(living(lifecycle={"interval": 5}, vitals={"decay": 0.5}).to_json_string())
    del old["vitals"], old["router"], old["format_version"], old["lifecycle"]["patience"], old["preset"]
    loaded = LivingMoeConfig.from_dict(old)
    assert loaded == living(lifecycle={"interval": 5})


def test_values_of_the_wrong_type_are_named() -> None:
    for keywords, message in (
        ({"dtype": 5}, "dtype must be a torch.dtype or the name of one, .* got 5"),
        ({"dtype": "bfloat61"}, "dtype must be a torch.dtype or the name of one, .* got 'bfloat61'"),
        ({"torch_dtype": "arange"}, "dtype must be a torch.dtype"),
        ({"preset": "groww"}, "unknown preset 'groww'. Did you mean 'grow'"),
        ({"router": 3}, "router must be a dict of its fields, got 3"),
        ({"use_cache": "yes"}, "use_cache: .*expected bool"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            living(**keywords)


# -- one truth ---------------------------------------------------------------------------------------------------------


@EVERY_BACKBONE
def test_reading_a_fact_of_the_backbone_reads_the_backbone(backbone: PreTrainedConfig) -> None:
    config = LivingMoeConfig(backbone_config=backbone)
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "head_dim", "tie_word_embeddings", "initializer_range", "use_cache", "pad_token_id",
        "bos_token_id", "eos_token_id", "hidden_act", "rms_norm_eps", "rope_parameters", "rope_scaling",
    ):  # fmt: skip
        assert getattr(config, name, "missing") == getattr(backbone, name, "missing"), name
    assert not hasattr(config, "no_such_field")


@EVERY_BACKBONE
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 99), ("use_cache", False), ("pad_token_id", 7), ("eos_token_id", [1, 2]),
        ("output_router_logits", True), ("num_experts_per_tok", 1), ("initializer_range", 0.5),
        ("max_position_embeddings", 64), ("tie_word_embeddings", True), ("tie_word_embeddings", False),
    ],
)  # fmt: skip
def test_a_written_fact_is_stored_once_and_survives_every_way_out(
    backbone: PreTrainedConfig, name: str, value: Any, tmp_path: Path
) -> None:
    config = LivingMoeConfig(backbone_config=backbone)
    setattr(config, name, value)
    assert name not in vars(config)
    config.save_pretrained(tmp_path)
    assert name not in json.loads((tmp_path / "config.json").read_text())
    for each in (
        config,
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        LivingMoeConfig.from_dict(config.to_dict()),
        LivingMoeConfig.from_dict(config.to_diff_dict()),
        LivingMoeConfig.from_pretrained(tmp_path),
        LivingMoeConfig(backbone_config=backbone, **{name: value}),
    ):
        assert getattr(each, name) == getattr(each.backbone_config, name) == value
        assert each == config


def test_a_wrong_value_for_a_fact_of_the_backbone_is_refused_and_changes_nothing() -> None:
    config = living()
    with pytest.raises(ConfigurationError, match=r"vocab_size: .*expected int"):
        config.vocab_size = "many"
    assert config.vocab_size == 64


def test_rotary_parameters_are_standardised_by_the_backbones_own_rules() -> None:
    backbone = DeepseekV4Config(num_hidden_layers=2)  # nests them by names of its own
    assert LivingMoeConfig(backbone_config=backbone).rope_parameters == backbone.rope_parameters
    config, plain = LivingMoeConfig(backbone_config=backbone), copy.deepcopy(backbone)
    for each in (config, plain):
        with pytest.warns(FutureWarning, match="rope_scaling"):
            each.rope_scaling = {"main": {"rope_theta": 7.0}, "compress": {"rope_theta": 9.0}}
    assert config.backbone_config.rope_parameters == plain.rope_parameters


def test_a_dense_backbone_reads_as_one_expert_that_serves_every_token() -> None:
    config = LivingMoeConfig(backbone_config=BACKBONES["llama"])
    assert (config.num_experts_per_tok, config.output_router_logits) == (1, False)
    config.num_experts_per_tok = 2
    assert LivingMoeConfig.from_dict(json.loads(config.to_json_string())).num_experts_per_tok == 2


def test_expert_counts_are_those_of_the_populations_under_every_name() -> None:
    config = living()
    assert config.num_local_experts == []
    config.populations = [{"leaves": 6, "facets": 5, "trainable": 3, "frozen": 4}, {"frozen": 2}]
    assert list(config.populations[0]) == ["frozen", "trainable", "facets", "leaves"]
    assert config.num_local_experts == config.num_experts == config.n_routed_experts == [7, 2]
    assert config.backbone_config.num_local_experts == 4
    for name in ("num_local_experts", "num_experts"):
        with pytest.raises(ConfigurationError, match="num_local_experts is derived and cannot be set, got 8"):
            setattr(config, name, 8)


def test_the_load_balancing_weight_is_the_routers_else_the_backbones_else_none() -> None:
    assert living().router_aux_loss_coef == BACKBONES["mixtral"].router_aux_loss_coef == 0.001
    assert living(router={"aux_loss_coef": 0.5}).router_aux_loss_coef == 0.5
    assert LivingMoeConfig(backbone_config=BACKBONES["deepseek_v3"]).router_aux_loss_coef == 0.0
    config = living()
    config.router_aux_loss_coef = 0.25
    assert config.router.aux_loss_coef == config.router_aux_loss_coef == 0.25


def test_fields_that_model_and_backbone_both_read_stay_equal() -> None:
    config = living()
    config.output_hidden_states = True
    config.output_attentions = True
    config.dtype = torch.bfloat16
    for each in (config, config.backbone_config, LivingMoeConfig.from_dict(json.loads(config.to_json_string()))):
        assert (each.output_hidden_states, each.output_attentions, each.dtype) == (True, True, torch.bfloat16)
    assert config.backbone_config._attn_implementation == "eager"  # output_attentions asks for it


def test_a_dtype_is_a_torch_dtype_by_whatever_way_it_came(tmp_path: Path) -> None:
    config = living(torch_dtype="float16")
    assert config.dtype == torch.float16
    config.dtype = "bfloat16"  # what save_pretrained of a model assigns
    config.save_pretrained(tmp_path)
    for each in (config, *(LivingMoeConfig.from_pretrained(tmp_path, dtype=dtype) for dtype in ("auto", "bfloat16"))):
        assert each.dtype is each.backbone_config.dtype is torch.bfloat16


def test_kernels_chosen_on_the_living_config_reach_the_backbone() -> None:
    config = living()
    config._attn_implementation = "sdpa"
    config._experts_implementation = "batched_mm"
    assert config.backbone_config._attn_implementation == "sdpa"
    assert config.backbone_config._experts_implementation == "batched_mm"
    config._attn_implementation = {"": "sdpa", "backbone_config": "eager"}
    config._experts_implementation = {"": "eager", "backbone_config": "grouped_mm"}
    chosen: list[Any] = [each._attn_implementation for each in (config, config.backbone_config)]
    chosen += [each._experts_implementation for each in (config, config.backbone_config)]
    assert chosen == ["sdpa", "eager", "eager", "grouped_mm"]
    loaded = LivingMoeConfig.from_dict(config.to_dict(), attn_implementation="sdpa", experts_implementation="eager")
    assert loaded.backbone_config._attn_implementation == "sdpa"
    assert loaded.backbone_config._experts_implementation == "eager"


def test_a_replaced_backbone_takes_over_kernels_and_dtype() -> None:
    config = living(attn_implementation="eager", dtype="bfloat16")
    config.backbone_config = BACKBONES["llama"]
    assert isinstance(config.backbone_config, LlamaConfig) and config.backbone_config is not BACKBONES["llama"]
    assert (config.backbone_config._attn_implementation, config.backbone_config.dtype) == ("eager", torch.bfloat16)
    own = config.backbone_config
    config.backbone_config = own  # a backbone model may hold it
    assert config.backbone_config is own
    with pytest.raises(ConfigurationError, match="backbone_config must be a config"):
        config.backbone_config = None  # type: ignore[assignment]


# -- what Transformers asks of a config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backbone",
    [
        *BACKBONES.values(),
        MistralConfig(**SIZES, sliding_window=16),
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ],
    ids=[*BACKBONES, "mistral", "qwen2-mixed"],
)
def test_a_cache_made_from_the_living_config_has_the_backbones_layers(backbone: PreTrainedConfig) -> None:
    def layers(config: PreTrainedConfig) -> list[Any]:
        return [(type(layer), getattr(layer, "sliding_window", None)) for layer in DynamicCache(config=config).layers]

    config = LivingMoeConfig(backbone_config=backbone)
    assert layers(config) == layers(backbone) and len(layers(config)) == 2


def test_a_sliding_window_backbone_gets_sliding_layers() -> None:
    cache = DynamicCache(config=living())
    assert all(isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window == 16 for layer in cache.layers)


@EVERY_BACKBONE
def test_generation_settings_are_those_of_the_backbone(backbone: PreTrainedConfig) -> None:
    config = LivingMoeConfig(backbone_config=backbone, pad_token_id=9)
    plain = copy.deepcopy(backbone)
    plain.pad_token_id = 9
    ours, theirs = (GenerationConfig.from_model_config(each).to_dict() for each in (config, plain))
    assert ours == theirs and ours["eos_token_id"] == backbone.eos_token_id


def test_the_text_config_is_the_backbones_so_that_a_resize_reaches_it() -> None:
    config = living()
    assert config.get_text_config() is config.get_text_config(decoder=True) is config.backbone_config
    config.get_text_config().vocab_size = 80  # what resize_token_embeddings does
    assert config.vocab_size == 80


def test_auto_classes_find_it(registered: None, tmp_path: Path) -> None:
    config = living(populations=[{"frozen": 4}, {"frozen": 4, "trainable": 1}], preset="grow")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LivingMoeConfig and loaded == config
    assert type(AutoConfig.for_model("living_moe")) is LivingMoeConfig
    loaded, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, use_cache=False, other=1)
    assert loaded.backbone_config.use_cache is False and unused == {"other": 1}


def test_a_keyword_of_from_pretrained_updates_a_section_and_is_checked(tmp_path: Path) -> None:
    living(lifecycle={"interval": 5}).save_pretrained(tmp_path)
    loaded = LivingMoeConfig.from_pretrained(
        tmp_path, lifecycle={"patience": 4}, backbone_config={"use_cache": False}, preset="grow", dtype="bfloat16"
    )
    assert loaded.lifecycle == LifecycleConfig(interval=5, patience=4)
    assert loaded.use_cache is False and loaded.vocab_size == 64 and loaded.preset == "grow"
    assert loaded.dtype == loaded.backbone_config.dtype == torch.bfloat16
    with pytest.raises(ConfigurationError, match=r"lifecycle\.patiens\. Did you mean 'patience'"):
        LivingMoeConfig.from_pretrained(tmp_path, lifecycle={"patiens": 4})
    with pytest.raises(ConfigurationError, match=r"receptive_field\.enabled is True"):
        LivingMoeConfig.from_pretrained(tmp_path, receptive_field={"enabled": True})
    with pytest.raises(ConfigurationError, match=r"populations\[0\] is .* 1 experts"):
        LivingMoeConfig.from_pretrained(tmp_path, populations=[{"frozen": 1}])


def test_loading_from_a_dict_leaves_the_dict_alone() -> None:
    saved = json.loads(living().to_json_string())
    before = copy.deepcopy(saved)
    LivingMoeConfig.from_dict(saved, attn_implementation="eager", lifecycle={"interval": 3})
    assert saved == before


def test_a_heterogeneous_backbone_keeps_its_layers_apart() -> None:
    backbone = llama(**SIZES, per_layer_config={1: {"intermediate_size": 8}})
    config = LivingMoeConfig(backbone_config=backbone)
    assert [layer.intermediate_size for layer in config.per_layer_config] == [32, 8]
    loaded = LivingMoeConfig.from_dict(json.loads(config.to_json_string()))
    assert [layer.intermediate_size for layer in loaded.per_layer_config] == [32, 8] and loaded == config


def test_a_real_model_of_the_family_can_be_built_from_the_backbone_config() -> None:
    config = living(attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config.backbone_config)
    assert type(model) is transformers.MixtralForCausalLM and model.config._attn_implementation == "eager"


def test_peft_sees_that_embeddings_are_tied() -> None:
    assert LivingMoeConfig(backbone_config=BACKBONES["llama"]).to_dict()["tie_word_embeddings"] is True
    assert living().to_dict()["tie_word_embeddings"] is False


# -- sense -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("populations", "message"),
    [
        ({"frozen": 4}, "populations must be a list of dicts, one per living layer"),
        ([4, 4], r"populations\[0\] must be a dict from slab name to number of experts, got 4"),
        ([{"frozen": 4}, {"frosen": 4}], r"populations\[1\] has an unknown entry 'frosen'\. Did you mean 'frozen'\?"),
        ([{"frozen": 0, "trainable": 3}], r"populations\[0\]\['frozen'\] must be an int > 0, got 0"),
        ([{"frozen": 2.0}], r"populations\[0\]\['frozen'\] must be an int > 0, got 2\.0"),
        ([{"frozen": True}], r"populations\[0\]\['frozen'\] must be an int > 0, got True"),
        ([{"frozen": 4}, {"frozen": 1}], r"populations\[1\] is .* 1 experts, .* num_experts_per_tok = 2; give"),
        ([{"frozen": 4}, {}], r"populations\[1\] is \{\}: 0 experts"),
        ([], r"populations has 0 entries but the backbone has 2 layers; give one entry per living layer"),
        ([{"frozen": 4}] * 3, r"populations has 3 entries but the backbone has 2 layers"),
        ([{"facets": 3, "leaves": 4}], r"populations\[0\] is .* 0 experts"),
    ],
)
def test_populations_without_sense_are_refused(populations: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        living(populations=populations)


def test_a_population_above_max_experts_is_valid_it_only_grows_no_more() -> None:
    living(populations=[{"frozen": 9}], lifecycle={"max_experts": 8}).validate_architecture()


def test_validation_after_an_event_sees_the_new_population() -> None:
    config = living(populations=[{"frozen": 4}, {"frozen": 4}])
    config.populations = [{"frozen": 4, "trainable": 1}, {"frozen": 3}]
    config.validate_architecture()
    assert config.populations is not None
    config.populations[0] = {"frozen": 1}
    with pytest.raises(ConfigurationError, match=r"populations\[0\] is \{'frozen': 1\}: 1 experts"):
        config.validate_architecture()
    with pytest.raises(ConfigurationError, match=r"populations\[0\]"):
        config.save_pretrained("/nowhere-is-written-to")


@pytest.mark.parametrize(
    ("lifecycle", "message"),
    [
        ({"min_experts": 1}, r"lifecycle\.min_experts is 1 but every token needs num_experts_per_tok = 2 .*; raise"),
        ({"max_experts": 1}, r"lifecycle\.max_experts is 1 but every token needs num_experts_per_tok = 2"),
        ({"min_experts": 4, "max_experts": 3}, r"lifecycle\.max_experts must be None or >= 4, got 3"),
    ],
)
def test_bounds_on_the_population_must_leave_top_k(lifecycle: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        living(lifecycle=lifecycle)


def test_receptive_fields_need_frozen_parents() -> None:
    with pytest.raises(
        ConfigurationError, match=r"receptive_field\.enabled is True but experts\.freeze_pretrained is F"
    ):
        living(receptive_field={"enabled": True})
    living(receptive_field={"enabled": True}, experts={"freeze_pretrained": True})


def test_the_backbone_is_checked_by_its_own_rules() -> None:
    config = LivingMoeConfig(backbone_config=BACKBONES["llama"])
    config.hidden_size = 15
    with pytest.raises(ConfigurationError, match=r"backbone_config: .*hidden size \(15\) is not a multiple"):
        config.validate()


def test_a_section_spoilt_after_construction_is_found() -> None:
    config = living()
    config.lifecycle.interval = 0
    with pytest.raises(ConfigurationError, match=r"lifecycle\.interval must be >= 1, got 0"):
        config.validate_architecture()


def test_a_config_is_equal_to_what_would_write_the_same_file_only() -> None:
    assert living() == living() and living() != living(preset="grow") != "no config"
    assert living() != living(lifecycle={"seed": 1}) and living() != living(use_cache=False)


# -- any config survives -----------------------------------------------------------------------------------------------

fractions = st.floats(0, 0.99, allow_nan=False)
section_values = st.fixed_dictionaries(
    {},
    optional={
        "router": st.fixed_dictionaries(
            {}, optional={"aux_loss_coef": st.none() | fractions, "z_loss_coef": fractions}
        ),
        "experts": st.fixed_dictionaries({}, optional={"memory_budget_mib": st.none() | st.floats(0.1, 1e12)}),
        "vitals": st.fixed_dictionaries({}, optional={"decay": fractions, "grad_norm_every": st.integers(0, 10**9)}),
        "lifecycle": st.fixed_dictionaries(
            {},
            optional={
                "interval": st.integers(1, 10**9),
                "enabled": st.booleans(),
                "max_experts": st.none() | st.integers(16, 2**40),
                "noise_std": fractions,
                "seed": st.integers(0, 2**63),
                "policy": st.text(max_size=5),
            },
        ),
    },
)
layer_sizes = st.dictionaries(st.sampled_from(["facets", "leaves"]), st.integers(1, 99)).flatmap(
    lambda tables: st.dictionaries(st.sampled_from(["frozen", "trainable"]), st.integers(2, 8), min_size=1).map(
        lambda slabs: {**tables, **slabs}
    )
)
populations = st.none() | st.lists(layer_sizes, min_size=1, max_size=2)
facts = st.fixed_dictionaries(
    {},
    optional={
        "use_cache": st.booleans(),
        "output_router_logits": st.booleans(),
        "output_hidden_states": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "pad_token_id": st.none() | st.integers(0, 63),
        "eos_token_id": st.none() | st.lists(st.integers(0, 63), min_size=1, max_size=3),
        "initializer_range": fractions,
        "dtype": st.sampled_from([None, "float32", "bfloat16", torch.float16]),
        "id2label": st.dictionaries(st.integers(0, 9), st.text(max_size=3), min_size=1, max_size=3),
    },
)


@given(
    backbone=st.sampled_from(list(BACKBONES.values())),
    preset=st.none() | st.sampled_from(list(PRESETS)),
    sections=section_values,
    populations=populations,
    facts=facts,
)
def test_any_config_comes_back_from_json_copies_and_pickles_as_it_went(
    backbone: PreTrainedConfig, preset: str | None, sections: Any, populations: Any, facts: Any
) -> None:
    config = LivingMoeConfig(backbone_config=backbone, preset=preset, populations=populations, **sections, **facts)
    for restored in (
        LivingMoeConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        LivingMoeConfig.from_dict(json.loads(config.to_json_string(use_diff=True))),
        LivingMoeConfig.from_dict(config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert restored == config
        assert restored.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
        assert restored.backbone_config.to_dict() == config.backbone_config.to_dict()
        for name in ("router", "experts", "vitals", "receptive_field", "lifecycle", "populations", "preset", "dtype"):
            assert getattr(restored, name) == getattr(config, name), name
        for name, value in facts.items():
            if name not in ("dtype", "id2label"):
                assert getattr(restored, name) == value, name
