"""Contrast: keys of experts that serve other tokens turn away from each other.

The push of the synaptic MoE's contrastive router embeddings; the pull, between experts that serve a token together, is
the peer pull of `gravity.py`. Of two experts that both served this step, s is the share of the tokens of the one with
fewer that reached both; they push each other with

    w = (1 - s) * max(cos - margin, 0),

along the arc between them. Each key turns by `rate * min(|sum of pushes|, 1)` radians and keeps its length: so scores
stay in bounds, a step is at most `rate`, and what is further apart than the margin is left alone, for good. Members of
a clade never serve a token together, so twins part; keys that coincide do so by directions of their own. An expert
without tokens neither pushes nor moves.

Pure functions, in fp64, no gradients. E experts of a layer, D length of a key, T tokens, K places per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Squared sine below which rounding would say where the arc between two keys leads.
COINCIDENT = 1e-6
TINY = 1e-12


@torch.no_grad()
def company(index_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens that reached both of two experts, fp32 (E, E); on the diagonal those that reached one.

    Args:
        index_TK: int64, different experts of each token; negative where a place does not count.
    """
    places = index_TK.shape[1]
    index_TK = torch.where(index_TK < 0, num_experts, index_TK)
    pairs_N = (index_TK.repeat_interleave(places, 1) * (num_experts + 1) + index_TK.repeat(1, places)).flatten()
    counts = torch.bincount(pairs_N, minlength=(num_experts + 1) ** 2).view(num_experts + 1, -1)
    return counts[:-1, :-1].float()


@torch.no_grad()
def push_apart(keys_ED: Tensor, own_ED: Tensor, together_EE: Tensor, rate: float, margin: float) -> Tensor:
    """Keys after a push, in their dtype.

    Args:
        keys_ED: Any float dtype.
        own_ED: A direction of its own for each expert, by which coincident keys part.
        together_EE: As `company`, of all ranks.
        rate: Largest angle, radians.
        margin: Cosine up to which keys are left alone, >= 0.
    """
    keys = keys_ED.double()
    length_E1 = torch.linalg.vector_norm(keys, dim=1, keepdim=True)
    unit_ED = keys / torch.where(length_E1 > 0, length_E1, 1.0)
    cosine_EE = (unit_ED @ unit_ED.T).clamp(-1.0, 1.0)
    alone_E = together_EE.diagonal().double()
    fewer_EE = torch.minimum(alone_E, alone_E[:, None])
    weight_EE = (1.0 - together_EE / fewer_EE.clamp_min(1.0)) * torch.relu(cosine_EE - margin) * (fewer_EE > 0)
    weight_EE.fill_diagonal_(0.0)
    square_EE = 1.0 - cosine_EE.square()
    is_near = square_EE < COINCIDENT
    along_EE = torch.where(is_near, 0.0, weight_EE * square_EE.clamp_min(COINCIDENT).rsqrt())
    push_ED = (along_EE * cosine_EE).sum(1, keepdim=True) * unit_ED - along_EE @ unit_ED
    own_ED = own_ED.double() - (own_ED.double() * unit_ED).sum(1, keepdim=True) * unit_ED
    apart_EE = torch.where(is_near, weight_EE / torch.cdist(own_ED, own_ED).clamp_min(TINY), 0.0)
    push_ED = push_ED + apart_EE.sum(1, keepdim=True) * own_ED - apart_EE @ own_ED
    size_E1 = torch.linalg.vector_norm(push_ED, dim=1, keepdim=True)
    angle_E1 = rate * size_E1.clamp(max=1.0)
    turned_ED = angle_E1.cos() * unit_ED + angle_E1.sin() * push_ED / torch.where(size_E1 > 0, size_E1, 1.0)
    turned_ED = turned_ED * (length_E1 / torch.linalg.vector_norm(turned_ED, dim=1, keepdim=True).clamp_min(TINY))
    return torch.where(size_E1 > 0, turned_ED.to(keys_ED.dtype), keys_ED)


__all__ = ["company", "push_apart"]
