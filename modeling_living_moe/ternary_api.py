"""What a model can do about ternary experts: make them of float ones, pack them, and go back to latents.

The quantisers, slabs and the calibration of one slab are `ternary.py`'s; which tiers and layers are ternary is the
config's (`experts.ternary_tiers`, `ternary_layers`, `packed`), and every slab made later is of the kind it says. Events
treat latents as any weights. Decides nothing about populations.

T tokens, E alive experts of a slab, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from living_moe.configuration.errors import ConfigurationError, PopulationError
from living_moe.configuration.sections import ExpertsConfig
from living_moe.configuration.slabs import is_frozen, tier_of
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.experts import ExpertSlab
from living_moe.modeling_living_moe.lifecycle.surgery import require_optimizer, retire
from living_moe.modeling_living_moe.ternary import PackedTernary, TernarySlab, ternarize_

#: Tokens read to calibrate, at most: a thousand for each of eight experts fit a threshold and a scale well.
CALIBRATION_TOKENS = 8192
#: Length of the pieces of a text that is given as one row.
PIECE = 512


@dataclass(frozen=True)
class SlabReport:
    """What a conversion did to one slab's alive experts: relative errors |ternary - float| / |float|, fp32 (E,).

    Attributes:
        layer, slab: Where.
        uids: The experts.
        tokens_E: int64, calibration tokens each received; the errors are of its outputs over them, else of its weights.
        absmean_E: With the plain absmean quantiser.
        calibrated_E: With what was written; never larger.
    """

    layer: int
    slab: str
    uids: list[int]
    tokens_E: Tensor
    absmean_E: Tensor
    calibrated_E: Tensor


class TernaryMixin:
    """Ternary experts of a model with `living_blocks`."""

    config: Any
    living_blocks: list[LivingMoeBlock]
    training: bool
    require_unpacked: Callable[[], None]

    def ternarize(
        self,
        token_ids: Tensor | None = None,
        *,
        tiers: list[int] | None = None,
        layers: list[int] | None = None,
    ) -> list[SlabReport]:
        """Turn float experts into ternary ones: weights of 1.58 bits, activations of 8.

        Thresholds and scales are fitted to what each expert receives when the model reads `token_ids`, layer by layer,
        so that later layers are fitted to what the earlier ones have become. The parameters stay the same objects and
        become latents, so that an optimizer goes on. The config follows: experts that come later, by a split or by a
        merge into such a tier, are ternary as well. Takes a second copy of the experts while it runs; if it fails, they
        are what they were. In a distributed run every rank must call it with the same tokens.

        Args:
            token_ids: int64, (tokens,) or (documents, tokens), of text like what the model will read. An even sample of
                at most `CALIBRATION_TOKENS` is read. Without it the weights' own errors decide, which costs quality.
            tiers: Whose experts; None is all tiers that the model has or may have (`experts.max_tier`).
            layers: Living layers; None is all.

        Returns:
            One report per slab that was float, in the order of layers and slots.

        Raises:
            ConfigurationError: No such tier, layer or token; or the ternary experts would not be all those of some
                tiers in some layers, which is what a config can say.
            PopulationError: Experts are packed, offloaded, or wrapped by PEFT.
        """
        if self.config.synapse.postsynaptic:
            raise ConfigurationError(
                "synapse.postsynaptic is True: fast weights are no multiples of a ternary expert's scale, so these "
                "experts cannot become ternary; make the model without."
            )
        settings = self._ternary_settings(tiers, layers)
        self.require_unpacked()
        blocks = self.living_blocks
        todo = {
            block.layer: [
                name
                for name in block.population.slabs
                if tier_of(name) in settings.ternary_in(block.layer) and not block.experts.is_ternary(name)
            ]
            for block in blocks
        }
        require_whole([(block, name) for block in blocks for name in todo[block.layer]])
        batch = None if token_ids is None else self._calibration_batch(token_ids)
        reports: list[SlabReport] = []
        undo: list[tuple[ExpertSlab, Tensor, Tensor]] = []

        def convert(block: LivingMoeBlock, hidden_TH: Tensor | None, index_TK: Tensor | None) -> None:
            alive = block.population.alive
            rows = {} if index_TK is None else {name: rows for name, rows, _ in block.experts.rows(index_TK, alive)}
            for name in todo[block.layer]:
                slab = block.experts.weights(name)
                undo.append((slab, slab.gate_up_proj.detach().clone(), slab.down_proj.detach().clone()))
                reports.append(_ternarize_slab(block, name, hidden_TH, rows.get(name)))
                # Not a module of its own: hooks, and whoever holds it, go on.
                slab.__class__ = TernarySlab

        try:
            if batch is None:
                for block in blocks:
                    convert(block, None, None)
            else:
                self._read(batch, convert)
        except BaseException:
            with torch.no_grad():
                for slab, gate_up, down in undo:
                    slab.__class__ = ExpertSlab
                    slab.gate_up_proj.copy_(gate_up)
                    slab.down_proj.copy_(down)
            raise
        self.config.experts.ternary_tiers = settings.ternary_tiers
        self.config.experts.ternary_layers = settings.ternary_layers
        for block in blocks:
            block.experts.ternary_tiers = settings.ternary_in(block.layer)
        return reports

    @torch.no_grad()
    def pack_experts(self) -> None:
        """Hold every ternary expert as packed bytes, 1.6 bits a weight, in memory and in checkpoints: for inference.

        Outputs stay what the "eager" implementation computes, bit for bit. Keys still move and other parameters may
        train; experts cannot, until `unpack_experts`. An optimizer that holds latents refuses its next step.

        Raises:
            PopulationError: The model has no ternary experts; or they are offloaded, wrapped by PEFT, or hold NaN or
                infinity. Nothing has changed then.
        """
        if self.config.experts.packed:
            return
        slabs = [(b, name) for b in self.living_blocks for name in b.population.slabs if b.experts.is_ternary(name)]
        if not slabs:
            raise PopulationError("this model has no ternary experts to pack; call model.ternarize(token_ids) first.")
        require_whole(slabs)
        packed = [PackedTernary.from_slab(block.experts.weights(name)) for block, name in slabs]
        for (block, name), slab in zip(slabs, packed, strict=True):
            if not (slab.gate_up_scale.isfinite().all() and slab.down_scale.isfinite().all()):
                raise PopulationError(
                    f"layer {block.layer}, slab {name!r}: an expert holds NaN or infinity, so it cannot be packed; "
                    f"load an earlier checkpoint, or remove the expert."
                )
        for (block, name), slab in zip(slabs, packed, strict=True):
            retire(list(block.experts.weights(name).parameters()), packed=True)
            block.experts.add_module(name, slab.train(block.training))
        self._set_packed(True)

    @torch.no_grad()
    def unpack_experts(self) -> None:
        """Give packed experts latents to train on, of the dtype of their keys.

        Their trits are what they were, their scales are so up to the rounding of a mean in that dtype. Build the
        optimizer anew.
        """
        if not self.config.experts.packed:
            return
        latents: list[tuple[LivingMoeBlock, str, TernarySlab]] = []
        for block in self.living_blocks:
            for name in block.population.slabs:
                slab = block.experts.slab(name)
                if isinstance(slab, PackedTernary):
                    dtype = block.router.keys[name].dtype
                    trainable = not is_frozen(name)
                    latents.append((block, name, slab.to_slab(block.experts.config, dtype, trainable=trainable)))
        for block, name, slab in latents:
            block.experts.add_module(name, slab)
        self._set_packed(False)
        require_optimizer(self, [p for _, _, slab in latents for p in slab.parameters()])  # type: ignore[arg-type]

    def _set_packed(self, packed: bool) -> None:
        self.config.experts.packed = packed
        for block in self.living_blocks:
            block.experts.packed = packed and bool(block.experts.ternary_tiers)

    # -- calibration -----------------------------------------------------------------------------------------------

    def _ternary_settings(self, tiers: list[int] | None, layers: list[int] | None) -> ExpertsConfig:
        """The section `experts` as it will be."""
        now: ExpertsConfig = self.config.experts
        every_layer = list(range(len(self.living_blocks)))
        if tiers is None:
            present = [tier_of(name) for block in self.living_blocks for name in block.population.slabs]
            tiers = list(range(max(now.max_tier, *present) + 1))
        asked = dataclasses.replace(now, ternary_tiers=tiers, ternary_layers=layers)
        asked.require_layers(len(every_layer))
        asked.require("ternary_tiers", bool(asked.ternary_tiers), "at least one tier")
        pairs = {(layer, tier) for layer in every_layer for tier in asked.ternary_in(layer) | now.ternary_in(layer)}
        all_layers, all_tiers = sorted({layer for layer, _ in pairs}), sorted({tier for _, tier in pairs})
        if len(pairs) != len(all_layers) * len(all_tiers):
            raise ConfigurationError(
                f"tiers {asked.ternary_tiers} of layers {layers if layers is not None else every_layer} beside the "
                f"ternary tiers {now.ternary_tiers} of layers {now.ternary_layers or every_layer} are not all of some "
                f"tiers in some layers; name tiers {all_tiers} and layers {all_layers}."
            )
        whole = all_layers == every_layer
        return dataclasses.replace(now, ternary_tiers=all_tiers, ternary_layers=None if whole else all_layers)

    def _calibration_batch(self, token_ids: Tensor) -> Tensor:
        """An even sample of the text in rows that the backbone can read, int64 (rows, tokens)."""
        backbone = self.config.backbone_config
        integers = isinstance(token_ids, Tensor) and token_ids.dtype in (torch.int64, torch.int32)
        if not integers or token_ids.dim() not in (1, 2) or not token_ids.numel():
            what = f"{token_ids.dtype} {tuple(token_ids.shape)}" if isinstance(token_ids, Tensor) else repr(token_ids)
            raise ConfigurationError(f"token_ids must be int64, (tokens,) or (documents, tokens), got {what}.")
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < 0 or highest >= backbone.vocab_size:
            raise ConfigurationError(
                f"token_ids are {lowest} to {highest} but the vocabulary has {backbone.vocab_size} tokens; use the "
                f"model's own tokenizer, and leave padding out."
            )
        longest = min(getattr(backbone, "max_position_embeddings", None) or CALIBRATION_TOKENS, CALIBRATION_TOKENS)
        if token_ids.dim() == 1:
            length = min(len(token_ids), longest, PIECE)
            token_ids = token_ids[: len(token_ids) // length * length].view(-1, length)
        token_ids = token_ids[:, :longest]
        rows = min(len(token_ids), max(1, CALIBRATION_TOKENS // token_ids.shape[1]))
        places = torch.linspace(0, len(token_ids) - 1, rows, device=token_ids.device).long()
        return token_ids[places].to(self.device, torch.int64)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _read(self, ids: Tensor, convert: Callable[[LivingMoeBlock, Tensor, Tensor], None]) -> None:
        """One pass in evaluation mode, which moves no key and counts nothing; each layer's experts are converted right
        before they compute."""
        life = self._life  # type: ignore[attr-defined]
        hooks = []
        for block in self.living_blocks:

            def before(_: nn.Module, args: tuple[Any, ...], block: LivingMoeBlock = block) -> None:
                convert(block, args[0], args[1])

            hooks.append(block.experts.register_forward_pre_hook(before))
        training = self.training
        self.eval()  # type: ignore[attr-defined]
        try:
            context = dataclasses.replace(life.read_context(ids, None, None, None), plastic=False, all_logits=False)
            life(input_ids=ids, living_context=context, use_cache=False)
        finally:
            self.train(training)  # type: ignore[attr-defined]
            for hook in hooks:
                hook.remove()


def _ternarize_slab(block: LivingMoeBlock, name: str, hidden_TH: Tensor | None, rows_TK: Tensor | None) -> SlabReport:
    slab = block.experts.weights(name)
    members = [member for member in block.population.members if member.slab == name]
    count = len(members)
    tokens = torch.zeros(count, dtype=torch.int64)
    if rows_TK is not None:
        tokens = torch.bincount(rows_TK.reshape(-1), minlength=slab.num_experts + 1)[:count].cpu()
    report = ternarize_(slab, None if rows_TK is None else hidden_TH, rows_TK)
    uids = [member.uid for member in members]
    return SlabReport(
        block.layer, name, uids, tokens, report.absmean_C[:count].cpu(), report.calibrated_C[:count].cpu()
    )


def require_whole(slabs: Sequence[tuple[LivingMoeBlock, str]]) -> None:
    """Raise `PopulationError` unless the weights of these slabs are here, and nobody's but their layer's."""
    for block, name in slabs:
        if block.experts.is_wrapped(name):
            raise PopulationError(
                f"layer {block.layer}: slab {name!r} is wrapped by PEFT (target_parameters), so its experts cannot "
                f"change; merge the adapter first (merge_and_unload), or target only attention."
            )
        if any(parameter.is_meta for parameter in block.experts.weights(name).parameters()):
            raise PopulationError(
                f"layer {block.layer} is offloaded (device_map), so its experts cannot change; load the model without "
                f"offload."
            )


__all__ = ["SlabReport", "TernaryMixin"]
