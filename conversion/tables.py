"""What each family calls the tensors of an MoE block, beside what we call them. One table per family.

Names are those of the family's Transformers modules (which read the hub's names themselves), relative to the block.
`{slab}` is the slab that takes the pretrained experts.
"""

from __future__ import annotations

#: Family -> {source name: living name}.
BLOCK_TENSORS: dict[str, dict[str, str]] = {
    "mixtral": {
        "gate.weight": "router.keys.{slab}",
        "experts.gate_up_proj": "experts.{slab}.gate_up_proj",
        "experts.down_proj": "experts.{slab}.down_proj",
    },
    "qwen3_moe": {
        "gate.weight": "router.keys.{slab}",
        "experts.gate_up_proj": "experts.{slab}.gate_up_proj",
        "experts.down_proj": "experts.{slab}.down_proj",
    },
    "deepseek_v3": {
        "gate.weight": "router.keys.{slab}",
        "gate.e_score_correction_bias": "population.{slab}.bias",
        "experts.gate_up_proj": "experts.{slab}.gate_up_proj",
        "experts.down_proj": "experts.{slab}.down_proj",
    },
}
