"""The configuration of a living MoE: a backbone's own config, the populations, and one section per concern.

Composition: `backbone_config` is the untouched config of the source family (`MixtralConfig`, `DeepseekV3Config`, ...)
and the only place where a fact about the backbone is stored. `config.vocab_size` reads it there and
`config.use_cache = False` writes it there; nothing is kept twice.

Validation is strict and raises `ConfigurationError`, on construction and on load alike. The class is therefore not
decorated with `huggingface_hub.dataclasses.strict`, as Transformers' own are: that wraps every error of a validator
in a `StrictDataclassError`, which is no `ValueError`. `validate` and `validate_architecture` keep the meaning
they have there; `validate_architecture` is cheap and may be called after every event.

This module holds choices, never state: of the model it knows only how many experts each layer has.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.presets import known_preset, preset_sections
from living_moe.configuration.sections import (
    SECTIONS,
    EscapeConfig,
    ExpertsConfig,
    LifecycleConfig,
    PlasticityConfig,
    ReceptiveFieldConfig,
    RouterConfig,
    SynapseConfig,
    TrainableConfig,
    VitalsConfig,
    did_you_mean,
)
from living_moe.configuration.slabs import SLABS

#: Version of the checkpoint format this code writes, and the newest it reads.
FORMAT_VERSION = 1

#: What else `populations` holds per layer: sizes of the tables that divide clades among their members.
FACET_TABLES = ("facets", "leaves", "tombstones")

#: Keywords that `PreTrainedConfig` consumes or writes besides its dataclass fields.
_TRANSFORMERS_KEYWORDS = frozenset(
    {
        "model_type", "name_or_path", "num_labels", "torch_dtype", "output_attentions", "attn_implementation",
        "experts_implementation", "per_layer_config", "allow_global_per_layer_attribute_access",
        "serialize_explicit_per_layer_config",
    }
)  # fmt: skip

#: Facts about a checkpoint rather than an architecture: the living config's own, whatever the source's were.
_CHECKPOINT_ATTRIBUTES = frozenset(
    {
        "auto_map", "custom_pipelines", "distributed_config", "fusion_config", "quantization_config",
        "transformers_weights",
    }
)  # fmt: skip

#: Attributes of the backbone that may be given to a living config even if the source family has no such field.
_BACKBONE_KEYWORDS = frozenset(
    {
        "bos_token_id", "eos_token_id", "num_experts_per_tok", "output_router_logits", "pad_token_id",
        "tie_word_embeddings", "use_cache",
    }
)  # fmt: skip

#: What a dense backbone, which has no such fields, reads as: its MLP is one expert that serves every token.
_DENSE_DEFAULTS: dict[str, Any] = {"num_experts_per_tok": 1, "output_router_logits": False}

#: Fields of `PreTrainedConfig` that a model and its backbone both read, each from its own config: kept equal.
_MIRRORED = ("dtype", "output_hidden_states", "_output_attentions")


#: Fields of the backbone that PEFT reads from a config's dict.
_SHOWN_TO_PEFT = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


class LivingMoeConfig(PreTrainedConfig):
    """Configuration of `LivingMoeModel` and `LivingMoeForCausalLM`.

    Attributes the class does not define itself (`vocab_size`, `hidden_size`, `num_hidden_layers`, `head_dim`,
    `sliding_window`, `tie_word_embeddings`, `use_cache`, `pad_token_id`, `num_experts_per_tok`, ...) are those of
    `backbone_config`, for reading and for writing. Checkpoint facts (`auto_map`, `quantization_config`, ...) are not
    delegated.

    Args:
        backbone_config: Config of the source family, as an instance or a dict with its `model_type`. It is copied, so
            the source's is never changed; its `quantization_config` is dropped, because slabs hold plain weights.
            Required: only `LivingMoeConfig()`, which Transformers calls to learn the defaults, takes a default
            `MixtralConfig`.
        format_version: Of the checkpoint; newer than `FORMAT_VERSION` is refused.
        preset: Name of the preset the sections came from: a record, read by nobody.
        populations: One dict per living layer, from slab name ("frozen", "trainable") to its number of experts, each
            > 0; a slab without experts is left out. Layers with a past also hold "facets", "leaves" and "tombstones",
            the sizes of those tables. None until a model fills it.
        num_fields: Newborn receptive fields the checkpoint holds, the sleeping one included (see `receptive_field`).
        router, experts, trainable, vitals, plasticity, receptive_field, lifecycle, escape, synapse: The sections (see
            sections.py), as an instance (kept as one) or a dict of the fields that differ from the defaults.
        provenance: Where the model comes from and what was measured, as its model card tells it: base_model, family,
            datasets, perplexities, ... A record, read by nobody else.
        **kwargs: What `PreTrainedConfig` takes, and fields of the backbone, which are written to `backbone_config`.

    Raises:
        ConfigurationError: A keyword is unknown, a value is of the wrong type, or the values make no sense together.
    """

    model_type = "living_moe"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The other families' names of the expert count: the populations are the truth, never the source's count.
    attribute_map = {"num_experts": "num_local_experts", "n_routed_experts": "num_local_experts"}
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="mixtral")}

    # First, because a file of a newer format is to be told so before any of its fields is called unknown.
    format_version: int = FORMAT_VERSION
    backbone_config: PreTrainedConfig = None  # type: ignore[assignment]  # set by the time __post_init__ returns
    preset: str | None = None
    populations: list[dict[str, int]] | None = None
    num_fields: int = 1
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    trainable: TrainableConfig = dataclasses.field(default_factory=TrainableConfig)
    vitals: VitalsConfig = dataclasses.field(default_factory=VitalsConfig)
    plasticity: PlasticityConfig = dataclasses.field(default_factory=PlasticityConfig)
    receptive_field: ReceptiveFieldConfig = dataclasses.field(default_factory=ReceptiveFieldConfig)
    lifecycle: LifecycleConfig = dataclasses.field(default_factory=LifecycleConfig)
    escape: EscapeConfig = dataclasses.field(default_factory=EscapeConfig)
    synapse: SynapseConfig = dataclasses.field(default_factory=SynapseConfig)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    if TYPE_CHECKING:

        def __init__(self, **kwargs: Any) -> None: ...

    def __post_init__(self, **kwargs: Any) -> None:
        model_type = kwargs.pop("model_type", self.model_type)
        if model_type != self.model_type:
            raise ConfigurationError(
                f"model_type is {model_type!r}, not {self.model_type!r}: this is no living checkpoint. "
                f"Graft it first (living_moe.convert), or load it with its own class."
            )
        if self.__dict__.get("backbone_config") is None:
            self.backbone_config = self._default_backbone(kwargs)
        backbone = self.backbone_config

        for_backbone = {}
        for key in list(kwargs):
            name = self.attribute_map.get(key, key)
            if name in _TRANSFORMERS_KEYWORDS or name in _CHECKPOINT_ATTRIBUTES or name.startswith("_"):
                continue
            if self._is_own(name):
                raise ConfigurationError(
                    f"{key} cannot be given, got {kwargs[key]!r}: it is derived, or belongs in backbone_config."
                )
            if name in _BACKBONE_KEYWORDS or name in _field_names(backbone):
                for_backbone[name] = kwargs.pop(key)
            # What is left of generation in configs of old: Transformers drops it, and so do we.
            elif name not in GenerationConfig._get_default_generation_params():
                raise ConfigurationError(f"unknown field {key}.{did_you_mean(key, self._known_names())}")

        # A graft goes on with the source's dtype and kernels unless told otherwise.
        for name in ("attn_implementation", "experts_implementation"):
            if kwargs.get(name) is None and kwargs.get(f"_{name}") is None:
                kwargs[name] = getattr(backbone, f"_{name}")
        kwargs.setdefault("output_attentions", backbone.output_attentions)
        self.dtype = self.dtype if self.dtype is not None else backbone.dtype
        self.output_hidden_states = self.output_hidden_states or backbone.output_hidden_states

        super().__post_init__(**kwargs)
        for name, value in for_backbone.items():
            setattr(self, name, value)
        self.validate()

    def _default_backbone(self, kwargs: dict[str, Any]) -> PreTrainedConfig:
        """The backbone of `LivingMoeConfig()`; an error if anything was given, for then a backbone was forgotten."""
        given = list(kwargs)
        for field in dataclasses.fields(self):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if self.__dict__.get(field.name) != default:
                given.append(field.name)
        if given:
            raise ConfigurationError(
                f"backbone_config is missing (given: {', '.join(given)}); pass the config of the model family to "
                f"graft, as an instance or as a dict with its model_type."
            )
        return CONFIG_MAPPING["mixtral"]()

    @classmethod
    def from_backbone(
        cls,
        backbone_config: PreTrainedConfig | dict[str, Any],
        preset: str = "frozen-graft",
        **overrides: dict[str, Any],
    ) -> LivingMoeConfig:
        """A config for grafting that backbone, after a preset.

        Args:
            backbone_config: As for the constructor.
            preset: A key of `PRESETS`.
            **overrides: Per section, a dict of the fields to set otherwise, such as `lifecycle={"interval": 5}`.

        Raises:
            ConfigurationError: The preset, a section or a field is unknown, or the values make no sense together.
        """
        return cls(backbone_config=backbone_config, preset=preset, **preset_sections(preset, overrides))

    # -- one truth: what is ours, and what is the backbone's -----------------------------------------------------------

    @classmethod
    def _is_own(cls, name: str) -> bool:
        return (
            name.startswith("_")
            or name in cls.__dataclass_fields__
            or name in _CHECKPOINT_ATTRIBUTES
            or hasattr(cls, name)
        )

    def _known_names(self) -> set[str]:
        own = {field.name for field in dataclasses.fields(self)}
        backbone = {name for name in _field_names(self.backbone_config) if not self._is_own(name)}
        return own | backbone | _TRANSFORMERS_KEYWORDS | _CHECKPOINT_ATTRIBUTES | _BACKBONE_KEYWORDS

    def __getattr__(self, name: str) -> Any:
        # Called for what normal look-up did not find; by copy and pickle also before there is a backbone.
        backbone = self.__dict__.get("backbone_config")
        if backbone is None or self._is_own(name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if name in _DENSE_DEFAULTS:
            return getattr(backbone, name, _DENSE_DEFAULTS[name])
        return getattr(backbone, name)

    def __setattr__(self, name: str, value: Any) -> None:
        name = type(self).attribute_map.get(name, name)
        with _as_configuration_error(name):
            if not self._is_own(name):
                self._set_on_backbone(name, value)
                return
            if name in SECTIONS:
                value = SECTIONS[name].from_value(value)
            elif name == "dtype":
                value = _torch_dtype(value)
            elif name == "format_version":
                _check_format_version(value)
            elif name == "preset" and value is not None:
                known_preset(value)
            elif name == "provenance" and not isinstance(value, dict):
                raise ConfigurationError(f"provenance must be a dict of plain values, got {value!r}.")
            elif name == "num_fields" and (type(value) is not int or value < 1):
                raise ConfigurationError(f"num_fields must be a whole number >= 1, got {value!r}.")
            elif name == "populations":
                value = _in_slot_order(value)
            elif name == "backbone_config":
                value = self._adopted(value)
            elif isinstance(getattr(type(self), name, None), property) and getattr(type(self), name).fset is None:
                raise ConfigurationError(f"{name} is derived and cannot be set, got {value!r}.")
            super().__setattr__(name, value)
            if name in _MIRRORED and self.__dict__.get("backbone_config") is not None:
                setattr(self.backbone_config, name, value)

    def _set_on_backbone(self, name: str, value: Any) -> None:
        """Write through. Like any Transformers config the backbone's takes new names, but not a slip of ours."""
        if not hasattr(self.backbone_config, name):
            own = [field.name for field in dataclasses.fields(LivingMoeConfig)]
            if slip := difflib.get_close_matches(name, own, n=1, cutoff=0.8):
                raise ConfigurationError(f"unknown field {name}. Did you mean {slip[0]!r}?")
        setattr(self.backbone_config, name, value)

    def _adopted(self, value: Any) -> PreTrainedConfig | None:
        """A backbone config of our own; one that replaces another takes over what both configs hold."""
        if value is None and "_post_init_done" not in self.__dict__:
            return None
        if value is self.__dict__.get("backbone_config"):
            return value
        backbone = _backbone_from(value)
        if "_post_init_done" in self.__dict__:
            for name in _MIRRORED:
                setattr(backbone, name, getattr(self, name))
            for name in ("_attn_implementation", "_experts_implementation"):
                if getattr(backbone, name) is None:
                    setattr(backbone, name, getattr(self, name))
        return backbone

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's config, as for any composite model.

        Caches, masks, generation, resizing of embeddings and weight conversions take from here the fields that decide
        their shapes. Several read it as a dict, or per layer, where delegated attributes do not show; and it makes
        `DynamicCache(config=...)` build just the layers that the backbone asks for (sliding windows, chunks).
        """
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def num_local_experts(self) -> list[int]:
        """Experts of each living layer; empty while `populations` is None.

        Always a list: no single number is true of a population, and a reader that wants one should fail rather than
        size a tensor by it. The source's own count stays in `backbone_config`. `num_experts` and `n_routed_experts`
        read the same.
        """
        return [sum(sizes.get(slab, 0) for slab in SLABS) for sizes in self.populations or []]

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the load-balancing loss: `router.aux_loss_coef`, else the backbone's, else 0. Sets the former."""
        if self.router.aux_loss_coef is not None:
            return self.router.aux_loss_coef
        return float(getattr(self.backbone_config, "router_aux_loss_coef", None) or 0.0)

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float | None) -> None:
        self.router = dataclasses.replace(self.router, aux_loss_coef=value)

    @property
    def per_layer_config(self) -> Any:
        """Transformers' per-layer overrides are the backbone's."""
        return self.backbone_config.per_layer_config

    @per_layer_config.setter
    def per_layer_config(self, value: dict[int | str, dict[str, Any]] | None) -> None:
        self.backbone_config.per_layer_config = value

    # Rotary parameters, too, are the backbone's, standardised by its own rules: DeepSeek-V4's are nested by names that
    # only its config knows.

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        return kwargs

    def standardize_rope_params(self) -> None:
        self.backbone_config.standardize_rope_params()

    # -- validation ----------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check everything, the backbone's config by its own rules.

        Raises:
            ConfigurationError: The first thing found wrong.
        """
        with _as_configuration_error("output_attentions"):
            self.validate_output_attentions()
        with _as_configuration_error("backbone_config"):
            self.backbone_config.validate()
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check that sections, populations and backbone make sense together.

        Raises:
            ConfigurationError: The first thing found wrong: field, value, remedy.
        """
        for name, section in SECTIONS.items():
            section.from_value(getattr(self, name))  # built anew, so fields assigned since are checked as well
        if self.receptive_field.enabled and not self.experts.freeze_pretrained:
            raise ConfigurationError(
                "receptive_field.enabled is True but experts.freeze_pretrained is False: newborns of a field copy "
                "frozen parents. Set experts.freeze_pretrained, or turn receptive_field.enabled off (preset 'grow')."
            )
        if self.synapse.postsynaptic and self.experts.ternary_tiers:
            raise ConfigurationError(
                f"synapse.postsynaptic is True but experts.ternary_tiers is {self.experts.ternary_tiers}: fast weights "
                f"are no multiples of a ternary expert's scale. Turn one of the two off."
            )
        if self.synapse.router and self.router.search not in ("auto", "exact"):
            raise ConfigurationError(
                f"synapse.router is True but router.search is {self.router.search!r}: every score drives synapses, so "
                f"candidates will not do. Set router.search to 'exact' or 'auto', or turn synapse.router off."
            )
        top_k = self.num_experts_per_tok or 1
        if self.escape.enabled:
            self._validate_escape()
        if self.lifecycle.phi_trigger is not None and not self.vitals.phi_every:
            raise ConfigurationError(
                f"lifecycle.phi_trigger is {self.lifecycle.phi_trigger} but vitals.phi_every is 0, so Φ is never "
                f"measured; set vitals.phi_every, or leave the trigger out."
            )
        if self.lifecycle.phi_trigger is not None:
            self._require_company(f"lifecycle.phi_trigger is {self.lifecycle.phi_trigger}, but")
        for name in ("min_experts", "max_experts"):
            bound = getattr(self.lifecycle, name)
            if bound is not None and bound < top_k:
                raise ConfigurationError(
                    f"lifecycle.{name} is {bound} but every token needs num_experts_per_tok = {top_k} experts; "
                    f"raise lifecycle.{name} or lower num_experts_per_tok."
                )
        # Until a model is built, nothing here knows which layers have experts.
        self.experts.require_layers(self.num_hidden_layers if self.populations is None else len(self.populations))
        if self.populations is not None:
            self._validate_populations(self.populations, top_k)

    def _require_company(self, where: str) -> None:
        """Raise where no token is ever served by two experts."""
        name, most = "num_experts_per_tok", self.num_experts_per_tok or 1
        if self.router.selection == "top_any":
            name, most = "router.max_experts_per_token", self.router.max_experts_per_token or 2 * most
        if most < 2:
            raise ConfigurationError(
                f"{where} {name} is {most}: with one expert per token Φ is always 0 and cannot collapse; raise {name}."
            )

    def _validate_escape(self) -> None:
        where = f"escape.space is {self.escape.space!r}, but"
        if self.receptive_field.enabled:
            raise ConfigurationError(
                f"{where} receptive_field.enabled protects the outputs on old text, which an escape changes; turn one "
                f"of them off."
            )
        self._require_company(where)
        for name in ("grad_norm_every", "phi_every"):
            every = getattr(self.vitals, name)
            if not 1 <= every <= self.escape.window:
                raise ConfigurationError(
                    f"{where} vitals.{name} is {every}: it must be measured in every window of {self.escape.window} "
                    f"steps; set it from 1 to escape.window."
                )

    def _validate_populations(self, populations: list[dict[str, int]], top_k: int) -> None:
        _in_slot_order(populations)
        layers = self.num_hidden_layers
        if not 1 <= len(populations) <= layers:
            raise ConfigurationError(
                f"populations has {len(populations)} entries but the backbone has {layers} layers; "
                f"give one entry per living layer."
            )
        for layer, count in enumerate(self.num_local_experts):
            if count < top_k:
                raise ConfigurationError(
                    f"populations[{layer}] is {populations[layer]}: {count} experts, but every token needs "
                    f"num_experts_per_tok = {top_k}; give the layer more or lower num_experts_per_tok."
                )

    # -- JSON ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config from a dict. A dict given for a section updates it, as one for `backbone_config` does.

        Returns:
            The config; with `return_unused_kwargs=True` the pair of the config and the keywords it does not have.

        Raises:
            ConfigurationError: As for the constructor.
        """
        config_dict = dict(config_dict)  # the base class writes into it
        if kwargs.get("dtype") == "auto":
            del kwargs["dtype"]  # the checkpoint's own, as without it
        for name, section in SECTIONS.items():
            if isinstance(kwargs.get(name), dict):
                config_dict[name] = {**section.from_value(config_dict.get(name)).to_dict(), **kwargs.pop(name)}
        loaded: Any = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate()  # keywords were assigned after the constructor's own check
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, sections as dicts.

        A few fields are shown on top although they are the backbone's: PEFT looks for them there, before it merges and
        to size prompts and prefixes.
        """
        output = super().to_dict()
        for name in SECTIONS:
            output[name] = getattr(self, name).to_dict()
        output["tie_word_embeddings"] = bool(getattr(self, "tie_word_embeddings", False))
        output.update({name: getattr(self, name) for name in _SHOWN_TO_PEFT if hasattr(self, name)})
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What goes to config.json: like `to_dict`, less the defaults of Transformers, and every fact once."""
        output = super().to_diff_dict()
        for name in ("tie_word_embeddings", *_SHOWN_TO_PEFT):
            output.pop(name, None)
        return output

    def __eq__(self, other: object) -> bool:
        """Whether both would write the same config.json (kernels in use and the path loaded from do not count)."""
        return isinstance(other, LivingMoeConfig) and self.to_diff_dict() == other.to_diff_dict()


def _field_names(config: PreTrainedConfig) -> set[str]:
    """What a backbone config calls its fields, under any of their names; not what Python adds to it."""
    declared = {field.name for field in dataclasses.fields(config)}
    return {name for name in declared | set(vars(config)) | set(config.attribute_map) if not name.startswith("_")}


@contextmanager
def _as_configuration_error(name: str) -> Iterator[None]:
    """Turn what Transformers' validators raise into a `ConfigurationError` that names the field."""
    try:
        yield
    except ConfigurationError:
        raise
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{name}: {error.__cause__ or error}") from error


def _torch_dtype(value: Any) -> torch.dtype | None:
    dtype = getattr(torch, value, value) if isinstance(value, str) else value
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigurationError(f"dtype must be a torch.dtype or the name of one, such as 'bfloat16', got {value!r}.")
    return dtype


def _check_format_version(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"format_version must be an int >= 1, got {value!r}; leave it out.")
    if value > FORMAT_VERSION:
        raise ConfigurationError(
            f"format_version is {value} but this living_moe reads up to {FORMAT_VERSION}; upgrade living_moe."
        )


def _in_slot_order(populations: Any) -> list[dict[str, int]] | None:
    """A checked copy of `populations`, each layer's slabs in slot order and its table sizes after them."""
    if populations is None:
        return None
    if not isinstance(populations, (list, tuple)):
        raise ConfigurationError(f"populations must be a list of dicts, one per living layer, got {populations!r}.")
    checked = []
    for layer, population in enumerate(populations):
        if not isinstance(population, Mapping):
            raise ConfigurationError(
                f"populations[{layer}] must be a dict from slab name to number of experts, got {population!r}."
            )
        for slab, count in population.items():
            if slab not in (*SLABS, *FACET_TABLES):
                hint = did_you_mean(str(slab), (*SLABS, *FACET_TABLES))
                raise ConfigurationError(f"populations[{layer}] has an unknown entry {slab!r}.{hint}")
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ConfigurationError(
                    f"populations[{layer}][{slab!r}] must be an int > 0, got {count!r}; leave out what is empty."
                )
        checked.append({name: population[name] for name in (*SLABS, *FACET_TABLES) if name in population})
    return checked


def _backbone_from(value: Any) -> PreTrainedConfig:
    """A backbone config of our own, from an instance or a dict with its model_type."""
    if not isinstance(value, (dict, PreTrainedConfig)):
        raise ConfigurationError(f"backbone_config must be a config or a dict with model_type, got {value!r}.")
    model_type = value.get("model_type") if isinstance(value, dict) else value.model_type
    if model_type == LivingMoeConfig.model_type:
        raise ConfigurationError("backbone_config is itself a living config; pass its own backbone_config.")
    backbone = copy.deepcopy(value)
    if isinstance(backbone, dict):
        if model_type is None:
            raise ConfigurationError(
                "backbone_config has no model_type; add the source family's (such as 'mixtral') or pass an instance."
            )
        if model_type not in CONFIG_MAPPING:
            close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1, cutoff=0.7)
            hint = f"Did you mean {close[0]!r}?" if close else "Register it with AutoConfig, or pass a config instance."
            raise ConfigurationError(f"backbone_config.model_type is {model_type!r}, unknown to Transformers. {hint}")
        backbone = CONFIG_MAPPING[model_type].from_dict(backbone)
    if hasattr(backbone, "quantization_config"):
        del backbone.quantization_config
    return backbone


__all__ = ["FORMAT_VERSION", "LivingMoeConfig"]
