"""Export: a uniform population leaves as a plain checkpoint of its source family, its outputs unchanged.

The inverse of a graft. A source family knows one number of experts for all layers, one key per expert, and a top-k over
single experts; so what can leave is a population in which every clade is one address that one expert serves, as many in
each layer. Anything else is refused: rounding a population down to a plain model is no export. Tokens of one receptive
field see one such plain model, with the low-rank deltas of that field merged into the linear maps.

Writes what the family's own class writes, hub names included; never changes a living model that it was given.

T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import os
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from living_moe.configuration.errors import ConversionError
from living_moe.configuration.slabs import tier_of
from living_moe.conversion.convert import (
    copy_tokenizer,
    free_directory,
    living_block_names,
    name_here_outside,
    place,
)
from living_moe.conversion.tables import BLOCK_TENSORS
from living_moe.modeling_living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.checkpoint import staged_directory
from living_moe.modeling_living_moe.deltas import FIELD_DELTAS, FieldDelta
from living_moe.modeling_living_moe.escape.module import CLOSED
from living_moe.modeling_living_moe.families import FAMILIES, Family, family_of
from living_moe.modeling_living_moe.population import NOBODY, ROOT_FIELD, Address
from living_moe.modeling_living_moe.receptive_field import FieldGate
from living_moe.modeling_living_moe.synapse.attention import SYNAPTIC, attention_layers

#: Largest difference of logits, over the largest |logit|, that an export may have. Looser than a graft's: sums over two
#: slabs and merged deltas round otherwise. DeepSeek-V3 routes in fp32 in a float64 model too.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}
LOW_PRECISION_TOLERANCE = 5e-2


def export(
    model_or_path: LivingMoeForCausalLM | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    to: str = "auto",
    field: int = ROOT_FIELD,
    verify: bool = True,
) -> PreTrainedModel:
    """Write a living model as a checkpoint of its source family (`MixtralForCausalLM`, ...), with the same outputs.

    Args:
        model_or_path: A living model, which stays as it is, or a living checkpoint's directory or hub id.
        output_dir: Takes the checkpoint, and the tokenizer found beside the living one (or its source); must not exist
            yet, or be empty. Appears when complete.
        to: The family to write, by its `model_type`; "auto" is the backbone's, and the only one there is.
        field: Whose function to write, where the model has receptive fields: 0 is what the source knew; 1 is what
            tokens of the newborn field see, its experts in place of their parents and its deltas merged.
        verify: Compare logits on sample tokens, all of them in that field, and print the largest difference.

    Returns:
        The exported model, of the family's own class, in evaluation mode.

    Raises:
        ConversionError: `to` or `field` is unknown; `output_dir` is in use; the population is not uniform (the message
            names the layers); adapters are still attached; or the exported logits differ.
        CheckpointError: The living checkpoint is damaged.
    """
    target = free_directory(output_dir)
    path = os.fspath(model_or_path) if isinstance(model_or_path, (str, os.PathLike)) else None
    living = load_living(path) if path is not None else model_or_path
    if not isinstance(living, LivingMoeForCausalLM):
        raise ConversionError(
            f"only a LivingMoeForCausalLM can be exported, got {type(living).__name__}; unwrap it (PEFT: "
            f"merge_and_unload; Accelerate: unwrap_model), or give a living checkpoint's directory."
        )
    if getattr(living, "_hf_peft_config_loaded", False):
        raise ConversionError("adapters are attached to the model; merge or delete them before exporting.")
    escaped = [b.layer for b in living.living_blocks if b.escape is not None and b.escape.now.state != CLOSED]
    if escaped:
        raise ConversionError(
            f"layers {escaped} work in another space ({living.config.escape.space}), which the source family does not "
            f"know; let them return first (model.leave_escape, then escape.leave_steps lifecycle steps)."
        )
    for block in living.living_blocks:
        if block.postsynaptic is not None and block.postsynaptic.has_fast_weights(block.population.alive):
            raise ConversionError(
                f"layer {block.layer}: experts have fast weights, which their source family does not know; call "
                f"model.fold_fast_weights() first, or model.forget_fast()."
            )
    family = family_of(living.config.backbone_config)
    if to not in ("auto", family.model_type):
        raise ConversionError(
            f"to={to!r}: this model's backbone is of the family {family.model_type!r} and leaves as that; use 'auto' "
            f"or {family.model_type!r}. Known families: {', '.join(sorted(FAMILIES))}."
        )
    num_fields = living.model.fields.num_fields if living.model.fields is not None else 0
    if not isinstance(field, int) or not 0 <= field <= num_fields:
        raise ConversionError(f"field={field!r}: this model has the fields {list(range(num_fields + 1))}.")
    addresses = uniform_addresses(living, family, field)
    config = exported_config(living, family, len(addresses[0]), field)

    # Before assembling, which takes a model of our own apart.
    expected = sample_logits(living, field) if verify else None
    exported = assemble(living, config, addresses, field, copy_tensors=path is None)
    origin = path or living.name_or_path or living.config.provenance.get("base_model")
    report = f"export of {origin or type(living).__name__} as {type(exported).__name__}"
    if field == ROOT_FIELD and num_fields:
        newborn = sum(m.field != ROOT_FIELD for block in living.living_blocks for m in block.population.members)
        report += f" (field 0: {newborn} newborn experts and the deltas stay behind; field=1 takes them)"
    if expected is not None:
        difference, largest = require_equal(sample_logits(exported), expected, exported.dtype)
        report += f": max |logits - living logits| = {difference:.3g} (largest |logit| {largest:.3g})"
    with staged_directory(target) as stage:
        exported.save_pretrained(stage)
        if origin:
            copy_tokenizer(origin, stage)
    print(report)
    return exported


def load_living(path: str) -> LivingMoeForCausalLM:
    """The living checkpoint at `path`.

    Raises:
        ConversionError: There is no model.
    """
    try:
        return LivingMoeForCausalLM.from_pretrained(path).eval()
    except OSError as error:
        raise ConversionError(f"cannot read a living model from {path}: {error}") from error


def uniform_addresses(living: LivingMoeForCausalLM, family: Family, field: int) -> list[list[Address]]:
    """Per living layer the one address of each clade that tokens of `field` see, in the order the family needs.

    That is the order in which the living router scores them (so that ties fall as they did), expert groups together.

    Raises:
        ConversionError: The layers are no layers of the family; the message names them.
    """
    layers: list[list[Address]] = []
    problems = []
    for block in living.living_blocks:
        cells = block.population.visible_cells(field)
        if shared := [[address.uid for address in cell] for cell in cells if len(cell) > 1]:
            problems.append(
                f"layer {block.layer}: {len(shared)} of {len(cells)} clades have several members or addresses "
                f"(uids {', '.join(map(str, shared))})"
            )
        if closed := [cell[0].uid for cell in cells if cell[0].server == NOBODY]:
            problems.append(f"layer {block.layer}: the dead uids {closed} are still scored, though never chosen")
        servers = {cell[0].server for cell in cells if cell[0].server != NOBODY}
        if wide := [m.uid for m in block.population.members if m.index in servers and tier_of(m.slab) > 0]:
            problems.append(
                f"layer {block.layer}: uids {', '.join(map(str, wide))} are wider than the family's experts"
            )
        quantised = {
            m.slab for m in block.population.members if m.index in servers and block.experts.is_ternary(m.slab)
        }
        synapse = block.router.synapse
        if synapse is not None and bool(synapse.strength.any()):
            problems.append(f"layer {block.layer}: its router has synapses (strength {synapse.strength.item():.3g})")
        if quantised:
            problems.append(f"layer {block.layer}: the experts of {', '.join(sorted(quantised))} are ternary")
        layers.append(sorted((cell[0] for cell in cells), key=lambda address: address.group))
        num_groups = block.router.scoring.num_groups
        sizes = [sum(address.group == group for address in layers[-1]) for group in range(num_groups)]
        if num_groups > 1 and (len(set(sizes)) > 1 or sizes[0] < 2):
            problems.append(
                f"layer {block.layer}: expert groups of {sizes} clades (equal ones of 2 or more are needed)"
            )
    for layer in attention_layers(living):
        attention: Any = getattr(layer, "synapse", None)
        if attention is not None and bool(attention.strength.any()):
            most = attention.strength.abs().max().item()
            problems.append(f"attention of layer {attention.layer} has synapses (strengths up to {most:.3g})")
    counts = [len(addresses) for addresses in layers]
    if len(set(counts)) > 1:
        problems.append(f"the layers have {counts} clades (one number for all is needed)")
    if problems:
        raise ConversionError(
            f"field {field} of this population is not a plain {family.model_type} model. {'; '.join(problems)}. "
            f"merge_experts the members of a clade, or part_clade them (not exact), and even out the layers with "
            f"remove_expert; or keep the living format (save_pretrained)."
        )
    return layers


def exported_config(living: LivingMoeForCausalLM, family: Family, num_experts: int, field: int) -> PreTrainedConfig:
    config = copy.deepcopy(living.config.backbone_config)
    setattr(config, family.experts_field, num_experts)
    if config._attn_implementation == SYNAPTIC:
        config._attn_implementation = None
    if field != ROOT_FIELD and living.head_delta is not None:
        # The merged head is no longer the embedding.
        config.tie_word_embeddings = False
    return config


@torch.no_grad()
def assemble(
    living: LivingMoeForCausalLM,
    config: PreTrainedConfig,
    layers: list[list[Address]],
    field: int,
    *,
    copy_tensors: bool,
) -> PreTrainedModel:
    """The family's model with the tensors that tokens of `field` see.

    Args:
        living: Left alone if `copy_tensors`; otherwise its other tensors are shared and its experts given up layer by
            layer, so that no more than one layer's are held twice.
        config: Of the model to build.
        layers: See `uniform_addresses`.
        field: Whose deltas are merged.
    """
    family = family_of(config)
    with torch.device("meta"):
        exported = family.causal_lm_class(config)
    blocks = zip(living_block_names(exported, family), living.living_blocks, layers, strict=True)
    for prefix, block, addresses in blocks:
        for name, name_in_block in BLOCK_TENSORS[family.model_type].items():
            rows = [tensor_row(block, name_in_block, address) for address in addresses]
            place(exported, prefix + name, torch.stack(rows))
        if not copy_tensors:
            block.experts = nn.Module()  # type: ignore[assignment]
    tensors = [*exported.named_parameters(remove_duplicate=False), *exported.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if tensor.is_meta:
            value = tensor_outside(living, name_here_outside(name), field)
            place(exported, name, value.clone() if copy_tensors else value)
    exported.tie_weights()
    exported.requires_grad_(True)
    exported.generation_config = copy.deepcopy(living.generation_config)
    return exported.eval()


def tensor_row(block: LivingMoeBlock, name: str, address: Address) -> Tensor:
    """One row of a tensor named as in `BLOCK_TENSORS`: keys and biases are the address's own, weights its server's."""
    members = block.population.members
    index = address.server if name.startswith("experts.") else address.index
    if index < len(members):
        member = members[index]
        return attrgetter(name.format(slab=member.slab))(block).detach()[member.row]
    population, number = block.population, index - len(members)
    if name.startswith("population."):
        return population.tombstone_bias[number]
    return population.tombstone_key[number].to(next(iter(block.router.keys.values())).dtype)


def tensor_outside(living: LivingMoeForCausalLM, name: str, field: int) -> Tensor:
    """A tensor outside the blocks' tables, by its living name, with the delta of `field` merged if it has one."""
    try:
        tensor: Tensor = attrgetter(name)(living).detach()
    except AttributeError as error:
        raise ConversionError(f"the living model has no tensor {name}, which its source family needs.") from error
    delta = delta_of(living, name)
    if field == ROOT_FIELD or delta is None:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    update = delta.up[field - 1].to(wide) @ delta.down[field - 1].to(wide)
    return (tensor.to(wide) + update).to(tensor.dtype)


def delta_of(living: LivingMoeForCausalLM, name: str) -> FieldDelta | None:
    """The delta of the linear map whose weight is called `name`."""
    if name == "lm_head.weight":
        return living.head_delta
    if not name.endswith(".weight"):
        return None
    attention, _, linear = name.removesuffix(".weight").rpartition(".")
    deltas = getattr(living.get_submodule(attention), FIELD_DELTAS, None)
    return getattr(deltas, f"{linear}_delta", None)


@torch.no_grad()
def sample_logits(model: PreTrainedModel, field: int = ROOT_FIELD, *, tokens: int = 64, seed: int = 0) -> Tensor:
    """Logits (T, V), fp32 or wider, on random tokens in two rows, one of them padded; all tokens are put in `field`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (2, tokens // 2), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, : tokens // 8] = 0
    fields = model.model.fields if isinstance(model, LivingMoeForCausalLM) else None
    hook = None
    if fields is not None:
        hook = fields.register_forward_hook(
            lambda module, args, gate: FieldGate(torch.full_like(gate.index, field), gate.evidence)
        )
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    finally:
        model.train(training)
        if hook is not None:
            hook.remove()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def require_equal(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Largest difference and largest |logit|, if the former is small enough.

    Raises:
        ConversionError: It is not.
    """
    difference_T = (actual - expected).abs().amax(dim=-1)
    largest = float(expected.abs().max())
    # In low precision near-ties of a router may fall otherwise for a token here and there, so most tokens must agree.
    judged = float(difference_T.max() if dtype in TOLERANCE else difference_T.median())
    allowed = TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE) * max(largest, 1e-30)
    if not judged <= allowed:
        raise ConversionError(
            f"the exported logits differ from the living model's by {judged:.3g} (largest logit {largest:.3g}); "
            f"allowed is {allowed:.3g}. Nothing was written; please report the model family and its config "
            f"(verify=False writes it all the same)."
        )
    return float(difference_T.max()), largest


__all__ = ["export"]
