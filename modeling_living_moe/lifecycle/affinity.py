"""What experts of a layer have to do with each other, measured on a sample of the tokens it read last.

Two questions before a merge: which experts serve the same tokens (`coactivation`), and how much the layer's output
would change (`displacement`). Decides nothing and changes nothing.

S sampled tokens, K experts per token, E alive experts, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.lifecycle.surgery import LayerDraft
from living_moe.modeling_living_moe.vitals import Sample


@torch.no_grad()
def coactivation(choices_SK: Tensor, num_experts: int) -> Tensor:
    """Sampled tokens that chose both of two experts, fp32 (E, E); on the diagonal those that chose one.

    Args:
        choices_SK: int64, negative where a place was not used.
    """
    chosen_SE = torch.zeros(len(choices_SK), num_experts + 1, device=choices_SK.device)
    chosen_SE.scatter_(1, torch.where(choices_SK < 0, num_experts, choices_SK), 1.0)
    chosen_SE = chosen_SE[:, :num_experts]
    return chosen_SE.T @ chosen_SE


@torch.no_grad()
def displacement(block: LivingMoeBlock, sample: Sample, draft: LayerDraft, survivor: int, merged: list[int]) -> float:
    """How far a merge would move the layer's output, in multiples of the uniform share.

    The mean over sampled tokens of |change| / |output| (routed experts only), times the number of experts: the death of
    an expert of load L, whose tokens would get something unrelated instead, displaces about L.

    Args:
        sample: Of the layer before the merge.
        draft: The layer as it would be.
        survivor: Uid of the expert that the merge would make.
        merged: Uids of those it would be made of, the survivor's among them.
    """
    device = block.population.next_uid.device
    hidden_SH, choices_SK, _, weights_SK = (part.to(device) for part in sample)
    like = next(block.experts.parameters())
    hidden_SH, weights_SK = hidden_SH.to(like.dtype), weights_SK.to(like.dtype)
    real_S = (choices_SK >= 0).any(dim=1)
    if not real_S.any():
        return 0.0
    hidden_SH, choices_SK, weights_SK = hidden_SH[real_S], choices_SK[real_S], weights_SK[real_S]
    members = {member.uid: member for member in block.population.members}
    indices = torch.tensor([members[uid].index for uid in merged], device=device)
    concerned_SK = torch.isin(choices_SK, indices)
    alive = block.population.alive

    def served(choices: Tensor) -> Tensor:
        return block.experts(hidden_SH, choices, weights_SK.masked_fill(choices < 0, 0.0), alive, full=False).float()

    output_SH = served(choices_SK)
    before_SH = served(choices_SK.masked_fill(~concerned_SK, -1))
    slab, number = draft.find(survivor)
    module: nn.Module = block.experts.new_slab(slab, 1).to(device, like.dtype)
    for role in ("gate_up_proj", "down_proj"):
        value = draft.row_value(role, slab, number)
        assert value is not None
        module.get_parameter(role).copy_(value)
    weight_S1 = (weights_SK * concerned_SK).sum(dim=1, keepdim=True)
    after_SH = module(hidden_SH, torch.zeros_like(choices_SK[:, :1]), weight_S1).float()
    change_S = (after_SH - before_SH).norm(dim=1) / output_SH.norm(dim=1).clamp_min(1e-30)
    return float(change_S.mean()) * len(members)


__all__ = ["coactivation", "displacement"]
