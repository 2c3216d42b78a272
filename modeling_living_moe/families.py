"""One adapter per source family: where its MoE blocks are, and how it scores, selects and normalises.

Everything else (attention, norms, rotary embeddings, caches, masks) is the family's own Transformers code. What a
family calls its tensors on disk is `conversion/`'s business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from living_moe.configuration.errors import ConversionError


@dataclass(frozen=True)
class Scoring:
    """From router logits to choice and weights. Softmax and sigmoid are computed in fp32, as all families do, or wider.

    Attributes:
        top_k: Clades per token.
        function: "softmax" over all clades, or "sigmoid" of each.
        normalise: Divide the chosen weights by their sum.
        epsilon: Added to that sum.
        scaling: Multiplies the weights at the end.
        num_groups, top_groups: Group-limited routing (arXiv:2405.04434); 1 group is plain top-k.
        fp32_logits: Hidden states and keys are multiplied in fp32.
        cast_weights: Weights are cast back to the logits' dtype.
        sorted: Chosen clades come in descending order of score.
        wide: Scores of float64 logits are float64; the families' are fp32 whatever the dtype.
    """

    top_k: int
    function: str = "softmax"
    normalise: bool = True
    epsilon: float = 0.0
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    fp32_logits: bool = False
    cast_weights: bool = False
    sorted: bool = True
    wide: bool = False

    def scores_dtype(self, logits: torch.dtype) -> torch.dtype:
        """Of softmax and sigmoid."""
        return torch.promote_types(logits, torch.float32) if self.wide else torch.float32


@dataclass(frozen=True)
class Family:
    """A source family. Subclass it for one whose blocks differ; add the instance to `FAMILIES`."""

    model_type: str
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    block_class: type
    experts_field: str
    block_attribute: str = "mlp"
    #: Children of the source's block that are kept and added to the experts' output.
    shared_attribute: str | None = None
    attention_projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def scoring(self, config: PreTrainedConfig) -> Scoring:
        return Scoring(top_k=config.num_experts_per_tok)

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        return int(config.intermediate_size)

    def num_experts(self, config: PreTrainedConfig) -> int:
        return int(getattr(config, self.experts_field))

    def jitter_noise(self, config: PreTrainedConfig) -> float:
        """Uniform multiplicative noise on the block's input while training (0 is none)."""
        return float(getattr(config, "router_jitter_noise", 0.0) or 0.0)

    @contextlib.contextmanager
    def skeleton(self, config: PreTrainedConfig) -> Iterator[None]:
        """While open, `config` describes the smallest model of this family: its experts are replaced anyway."""
        real = getattr(config, self.experts_field)
        setattr(config, self.experts_field, self.scoring(config).num_groups)
        try:
            yield
        finally:
            setattr(config, self.experts_field, real)


@dataclass(frozen=True)
class Qwen3Moe(Family):
    def scoring(self, config: PreTrainedConfig) -> Scoring:
        return Scoring(top_k=config.num_experts_per_tok, normalise=bool(config.norm_topk_prob), cast_weights=True)

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        return int(config.moe_intermediate_size)


@dataclass(frozen=True)
class DeepseekV3(Family):
    def scoring(self, config: PreTrainedConfig) -> Scoring:
        return Scoring(
            top_k=config.num_experts_per_tok,
            function="sigmoid",
            normalise=bool(config.norm_topk_prob),
            epsilon=1e-20,
            scaling=config.routed_scaling_factor,
            num_groups=config.n_group or 1,
            top_groups=config.topk_group or 1,
            fp32_logits=True,
            sorted=False,
        )

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        return int(config.moe_intermediate_size)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="mixtral",
            model_class=modeling_mixtral.MixtralModel,
            causal_lm_class=modeling_mixtral.MixtralForCausalLM,
            block_class=modeling_mixtral.MixtralSparseMoeBlock,
            experts_field="num_local_experts",
        ),
        Qwen3Moe(
            model_type="qwen3_moe",
            model_class=modeling_qwen3_moe.Qwen3MoeModel,
            causal_lm_class=modeling_qwen3_moe.Qwen3MoeForCausalLM,
            block_class=modeling_qwen3_moe.Qwen3MoeSparseMoeBlock,
            experts_field="num_experts",
        ),
        DeepseekV3(
            model_type="deepseek_v3",
            model_class=modeling_deepseek_v3.DeepseekV3Model,
            causal_lm_class=modeling_deepseek_v3.DeepseekV3ForCausalLM,
            block_class=modeling_deepseek_v3.DeepseekV3MoE,
            experts_field="n_routed_experts",
            shared_attribute="shared_experts",
            # Not kv_b_proj: it expands the whole cache at every step, so its rows are not the tokens of this pass.
            attention_projections=("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
        ),
    )
}


def family_of(config: Any) -> Family:
    """The adapter of a backbone config.

    Raises:
        ConversionError: No adapter knows this family; the message lists those that are known.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ConversionError(
            f"no adapter for the model family {model_type!r}; known families: {', '.join(sorted(FAMILIES))}. "
            f"Add one to living_moe.modeling_living_moe.families.FAMILIES."
        )
    return FAMILIES[model_type]
