"""Graft: a pretrained mixture-of-experts becomes a living model, its outputs unchanged.

The source is loaded by its own Transformers class; its tensors are then handed over, never copied twice, to a living
model built without memory of its own (on the meta device). The result is compared with the source before it is
returned or written.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.errors import ConversionError
from living_moe.configuration.sections import RouterConfig
from living_moe.configuration.slabs import slab_name
from living_moe.conversion.tables import BLOCK_TENSORS
from living_moe.modeling_living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.alignment import align
from living_moe.modeling_living_moe.deltas import FieldDelta
from living_moe.modeling_living_moe.drift import DriftDetector
from living_moe.modeling_living_moe.escape.detector import StagnationDetector
from living_moe.modeling_living_moe.escape.module import Escape
from living_moe.modeling_living_moe.families import Family, family_of
from living_moe.modeling_living_moe.modeling_living_moe import Clock
from living_moe.modeling_living_moe.plasticity.state import KeyPlasticity
from living_moe.modeling_living_moe.population import Population
from living_moe.modeling_living_moe.receptive_field import ReceptiveFields
from living_moe.modeling_living_moe.router import LearnedTemperature
from living_moe.modeling_living_moe.selection import selection_rule
from living_moe.modeling_living_moe.synapse.attention import AttentionSynapse, attention_layers
from living_moe.modeling_living_moe.synapse.postsynaptic import Postsynapse
from living_moe.modeling_living_moe.synapse.router import RouterSynapse
from living_moe.modeling_living_moe.trend import LossTrend
from living_moe.modeling_living_moe.vitals import Vitals

#: Largest |difference of logits| over the largest |logit| that a graft may have, by dtype. fp32 grafts measure 0; of a
#: source in memory, rounding where its weights are not aligned (`alignment.py`) and the copies are.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
LOW_PRECISION_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Verification:
    """Comparison of a living model with its source on sample tokens."""

    max_difference: float
    max_logit: float
    tokens: int


def convert(
    source: str | os.PathLike[str] | PreTrainedModel,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    preset: str = "frozen-graft",
    calibration: Tensor | None = None,
    verify: bool = True,
    **overrides: Any,
) -> LivingMoeForCausalLM:
    """Graft a pretrained MoE: the same outputs, and from then on a population.

    Args:
        source: A checkpoint directory, a hub id, or a model in memory (which is copied and stays as it is).
        output_dir: Write the living checkpoint (and the source's tokenizer, if it has one) here; must not exist yet, or
            be empty.
        preset: Name of a preset, see `living_moe.configuration.PRESETS`.
        calibration: int64 token ids of text the source knows, (tokens,) or (documents, tokens): what newborn
            receptive fields tell new text from. Can be given later, `model.calibrate(ids)`.
        verify: Compare logits on sample tokens with the source, and print the largest difference.
        **overrides: Per section a dict of fields, e.g. `lifecycle={"interval": 5}`; and for a path or hub id the
            keywords `dtype`, `revision`, `token`, `attn_implementation`, `experts_implementation`.

    Returns:
        The living model, in evaluation mode. `model.graft_verification` holds the comparison.

    Raises:
        ConversionError: No adapter for the family; the source cannot be read; `output_dir` is in use; or the living
            model's logits differ from the source's.
        ConfigurationError: Unknown preset, section or field.
    """
    target = None if output_dir is None else free_directory(output_dir)
    loading: dict[str, Any] = {
        name: overrides.pop(name)
        for name in ("dtype", "revision", "token", "attn_implementation", "experts_implementation")
        if name in overrides
    }
    if isinstance(source, PreTrainedModel):
        if loading:
            raise ConversionError(f"{sorted(loading)} apply to a path or hub id; set them on the model instead.")
        model, owned, name = source, False, source.name_or_path or None
    else:
        model, owned, name = load_source(source, loading), True, os.fspath(source)
    family = family_of(model.config)
    if not isinstance(model, family.causal_lm_class):
        raise ConversionError(
            f"the source is a {type(model).__name__}; a graft needs a {family.causal_lm_class.__name__} "
            f"(with its language-model head)."
        )
    config = LivingMoeConfig.from_backbone(model.config, preset=preset, **overrides)
    config.experts.init = "pretrained"
    config.provenance = {"base_model": name, "family": family.model_type}
    require_float_experts(config, verify)
    if verify:
        require_exact_router(config)
    living = graft(model, config, copy_tensors=not owned)
    if calibration is not None:
        living.calibrate(calibration)
    if verify:
        living.graft_verification = verification = compare(model, living)
        print(
            f"graft of {name or type(model).__name__}: max |logits - source logits| = "
            f"{verification.max_difference:.3g} on {verification.tokens} tokens "
            f"(largest |logit| {verification.max_logit:.3g})"
        )
        living.config.provenance["graft_max_logit_difference"] = verification.max_difference
    if target is not None:
        living.save_pretrained(target)
        copy_tokenizer(source, target)
    return living


def require_exact_router(config: LivingMoeConfig) -> None:
    """Raise `ConversionError` if the configured router computes other scores or choices than the source's."""
    router, plain = config.router, RouterConfig()
    for name in ("similarity", "temperature", "normalise_keys", "selection"):
        if getattr(router, name) != getattr(plain, name):
            raise ConversionError(
                f"router.{name}={getattr(router, name)!r} makes another model of the source, so its outputs "
                f"cannot stay as they are; leave it out, or pass verify=False to convert all the same and train it."
            )


def require_float_experts(config: LivingMoeConfig, verify: bool) -> None:
    """Raise `ConversionError` if the pretrained experts would be quantised: then no output can stay as it is."""
    if config.experts.packed:
        raise ConversionError(
            "experts.packed=True: a graft takes float experts; convert without it, then model.ternarize(token_ids) and "
            "model.pack_experts()."
        )
    if verify and 0 in config.experts.ternary_tiers:
        raise ConversionError(
            f"experts.ternary_tiers={config.experts.ternary_tiers} quantises the pretrained experts, so the outputs "
            f"cannot stay as they are; convert without it and call model.ternarize(token_ids), which fits them to "
            f"text, or pass verify=False to take the weights as latents and train."
        )


def free_directory(path: str | os.PathLike[str]) -> Path:
    """`path`, if it does not exist or is an empty directory.

    Raises:
        ConversionError: Something is there; a converter never overwrites.
    """
    target = Path(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConversionError(
            f"{target} exists and is not empty; a conversion never overwrites. Choose another directory."
        )
    return target


def load_source(source: str | os.PathLike[str], loading: dict[str, Any]) -> PreTrainedModel:
    """The source model, by its family's own class.

    Raises:
        ConversionError: Unknown family, or the checkpoint cannot be read completely.
    """
    hub = {name: loading[name] for name in ("revision", "token") if name in loading}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, **hub)
    except (OSError, ValueError) as error:
        raise ConversionError(f"cannot read a model config from {source}: {error}") from error
    family = family_of(config)
    try:
        # Sizes that do not match are reported by name, and refused below.
        loaded: Any = family.causal_lm_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **loading
        )
        model, info = loaded
    except Exception as error:  # safetensors, zip, OS and shape errors alike mean: this source cannot be read
        raise ConversionError(f"cannot load {source} as {family.causal_lm_class.__name__}: {error}") from error
    incomplete = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])})
    if incomplete:
        raise ConversionError(
            f"{source} lacks {len(incomplete)} tensors of its architecture: {', '.join(incomplete[:8])}."
        )
    align(model)  # as the living checkpoint will be when it is loaded
    return model.eval()


def graft(source: PreTrainedModel, config: LivingMoeConfig, *, copy_tensors: bool) -> LivingMoeForCausalLM:
    """A living model that holds the source's tensors (or copies of them).

    Args:
        source: Model of a known family with its head.
        config: Grafting config of that family.
        copy_tensors: Leave the source its own memory; otherwise both models share tensors.
    """
    family = family_of(source.config)
    with torch.device("meta"):
        living = LivingMoeForCausalLM(config)
    slab = slab_name(0, frozen=config.experts.freeze_pretrained)
    blocks = living_block_names(source, family)

    def name_here(name: str) -> str:
        for prefix in blocks:
            if name.startswith(prefix):
                table = BLOCK_TENSORS[family.model_type]
                inside = name.removeprefix(prefix)
                if inside in table:
                    return name_here_outside(prefix) + table[inside].format(slab=slab)
        return name_here_outside(name)

    device = source.device
    handed_over = dict(source.named_parameters(remove_duplicate=False)) | dict(source.named_buffers())
    renew_tables(living, device, source.dtype)
    for name, tensor in handed_over.items():
        value = tensor.detach().clone() if copy_tensors else tensor.detach()
        place(living, name_here(name), value)
    for block in living.living_blocks:
        if block.router.learned_temperature is not None:
            block.router.learned_temperature = LearnedTemperature(block.router.temperature).to(device)
        if block.router.query is not None:
            keys_EH = block.router.keys[slab].detach()
            block.router.keys[slab] = nn.Parameter(block.router.query.take_over(keys_EH))
    for name, parameter in list(living.named_parameters()):
        if parameter.is_meta:
            if "field_deltas." not in name and "head_delta." not in name:
                raise ConversionError(
                    f"no source tensor for {name}; the adapter of {family.model_type!r} is incomplete."
                )
            place(living, name, torch.empty_like(parameter, device=device, dtype=source.dtype))
    for module in living.modules():
        if isinstance(module, FieldDelta):
            module.reset_parameters()
    living.tie_weights()
    living.apply_trainability()
    living.generation_config = copy.deepcopy(source.generation_config)
    return living.eval()


def name_here_outside(name: str) -> str:
    """Living name of a source tensor (or prefix) outside the blocks' tables."""
    return "model.backbone." + name.removeprefix("model.") if name.startswith("model.") else name


def living_block_names(source: PreTrainedModel, family: Family) -> list[str]:
    """Prefixes, with a final dot, of the source's MoE blocks."""
    return [f"{name}." for name, module in source.named_modules() if isinstance(module, family.block_class)]


def renew_tables(living: LivingMoeForCausalLM, device: torch.device, dtype: torch.dtype) -> None:
    """Rebuild, on a real device, the tables of our own that a model built on meta lacks; `dtype` is the source's."""
    base = living.model
    for block in living.living_blocks:
        capacities = block.capacities()
        groups = block.router.scoring.num_groups
        router = block.router
        block.population = Population(capacities, router.hidden_size, key_size=router.d_key, num_groups=groups).to(
            device
        )
        router.selection = selection_rule(router.scoring, living.config.router).to(device)
        if router.synapse is not None:
            synapse = RouterSynapse(living.config.synapse, router.scoring, capacities, block.layer)
            router.synapse = synapse.to(device, dtype).train(router.training)
        if block.plasticity is not None:
            block.plasticity = KeyPlasticity(capacities, router.d_key).to(device)
        if block.escape is not None:
            escape = Escape(router.hidden_size, living.config.escape, block.layer)
            block.escape = escape.to(device=device, dtype=dtype)
        if block.postsynaptic is not None:
            block.postsynaptic = Postsynapse(capacities, block.experts, living.config.synapse).to(device)
            block.experts.fast = [block.postsynaptic]
        old = block.vitals
        block.vitals = Vitals(capacities, old.decay, fast_decay=old.fast_decay, slow_decay=old.slow_decay).to(device)
    for layer in attention_layers(base) if living.config.synapse.attention else ():
        old_synapse: Any = layer.synapse
        heads, number = len(old_synapse.strength), old_synapse.layer
        synapse_here = AttentionSynapse(living.config.synapse, heads, number)
        layer.synapse = synapse_here.to(device, dtype).train(layer.training)
    if base.fields is not None:
        settings, vocab_size = base.config.receptive_field, base.config.backbone_config.vocab_size
        base.fields = ReceptiveFields(settings, vocab_size, base.fields.num_fields).to(device)
    base.clock = Clock().to(device)
    base.drift = DriftDetector().to(device)
    base.trend = LossTrend().to(device)
    if base.stagnation is not None:
        base.stagnation = StagnationDetector(base.config.escape).to(device)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where `name` is, as the parameter or buffer it is there."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise ConversionError(f"the source has a tensor {name!r} that the living model does not.") from error
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        raise ConversionError(f"the source has a tensor {name!r} that the living model does not.")


@torch.no_grad()
def compare(source: PreTrainedModel, living: LivingMoeForCausalLM, *, tokens: int = 64, seed: int = 0) -> Verification:
    """Compare logits on random tokens; two rows, one of them padded.

    Raises:
        ConversionError: They differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(source.config.vocab_size, (2, tokens // 2), generator=generator).to(source.device)
    mask = torch.ones_like(ids)
    mask[1, : tokens // 8] = 0
    training, plasticity, synapse = source.training, living.config.plasticity, living.config.synapse
    source.eval()
    # A comparison must leave no trace.
    living.config.plasticity = dataclasses.replace(plasticity, inference=False)
    living.config.synapse = dataclasses.replace(synapse, postsynaptic_inference=False)
    try:
        expected = source(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
        actual = living(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
    finally:
        source.train(training)
        living.config.plasticity, living.config.synapse = plasticity, synapse
    difference = float((expected - actual).abs().max())
    largest = float(expected.abs().max())
    tolerance = TOLERANCE.get(source.dtype, LOW_PRECISION_TOLERANCE) * max(largest, 1e-30)
    if not difference <= tolerance:
        raise ConversionError(
            f"the living model's logits differ from the source's by {difference:.3g} (largest logit {largest:.3g}); "
            f"allowed is {tolerance:.3g}. The graft was not written; please report the model family and its config."
        )
    return Verification(difference, largest, int(mask.sum()))


def copy_tokenizer(source: str | os.PathLike[str] | PreTrainedModel, target: Path) -> None:
    """Put the source's tokenizer beside the living model, if it has one."""
    if not isinstance(source, PreTrainedModel):
        with contextlib.suppress(OSError, ValueError):
            AutoTokenizer.from_pretrained(source).save_pretrained(target)


__all__ = ["Verification", "convert", "graft"]
