"""Φ: how far a layer's experts are different functions *and* make their tokens' outputs together. In [0, 1].

Named after integrated information (Tononi 2004, BMC Neuroscience 5:42), of which it keeps one idea: a system is more
than its parts where these differ (differentiation) and act as one (integration). It is an engineering measure over
outputs on a sample of tokens, never over weights: hidden units may be reordered and scaled without changing a function.

    Φ             = sqrt(differentiation * integration)
    differentiation = S(ρ) / log M,    ρ = Σ_e p_e u_e u_eᵀ,    S(ρ) = -Σ λ log λ over the eigenvalues λ of ρ
    integration     = mean over tokens of (-Σ_k q_k log q_k) / log K

`u_e` is the unit vector of expert e's outputs on all sampled tokens, one after the other, where a token's outputs are
first divided by their root mean square over the experts (weighted by p), so that no token drowns the others; `p` are
the experts' shares of the load. S is the von Neumann entropy of the mixture: how much an output says about which expert
made it (its Holevo bound, as each `u_e` is pure). `q_k` is the share of place k in the summed lengths of a token's
weighted outputs, |w_k f_k(x)|: how evenly its output is made of several experts.

What follows. S(ρ) <= H(p) <= log M and H(q) <= log K, so both factors, and Φ, are in [0, 1]. Φ = 0: one expert, all
functions equal up to a factor, or every token served by one expert (top-1 integrates nothing). Φ = 1: functions
orthogonal, equally loaded, each token's output made of K equal parts. Multiplying all outputs, or the order of slots,
changes nothing. A split at zero noise leaves ρ and every q as they were, so Φ falls by exactly
sqrt(log M / log (M + 1)). Experts whose output is zero, or no number, have no state: ρ is made of the others.

The module must not decide when to measure (modeling_living_moe.py), nor what a low Φ leads to (escape/, policies).

S sampled tokens, K places per token, M measured experts, H hidden.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from living_moe.modeling_living_moe.vitals import count_dtype

if TYPE_CHECKING:
    from living_moe.modeling_living_moe.experts import ExpertPool


#: Φ below which experts are as good as alike: its changes there are the noise of samples, and no collapse.
ALIKE = 0.01


class Phi(NamedTuple):
    """0-dim fp32 tensors, each in [0, 1]."""

    phi: Tensor
    differentiation: Tensor
    integration: Tensor


def measured_experts(load_E: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The (at most) `most` most loaded experts, ties by slot, int64 (M,) ascending, and their shares of the load (M,).

    Shares are equal before any load was measured. From tables that are alike on every rank, so is the choice.
    """
    if len(load_E) > most:
        picked_M = load_E.argsort(descending=True, stable=True)[:most].sort().values
    else:
        picked_M = torch.arange(len(load_E), device=load_E.device)
    load_M = load_E[picked_M].to(count_dtype(load_E.device))
    total = load_M.sum()
    return picked_M, torch.where(total > 0, load_M / total.clamp_min(1e-30), torch.full_like(load_M, 1 / len(load_M)))


@torch.no_grad()
def sampled_outputs(
    pool: ExpertPool, hidden_SH: Tensor, index_SK: Tensor, picked_M: Tensor, alive: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """What each measured expert says on each sampled token, and what the token's own experts say.

    One call of the pool itself with one expert per place, as for interference: it follows any kernel and quantiser.

    Returns:
        (M, S, H), and lengths (S, K), 0 where a place is not used.
    """
    asked_SA = torch.cat([picked_M.expand(len(hidden_SH), -1), index_SK], dim=1)
    apart = pool(
        hidden_SH.repeat_interleave(asked_SA.shape[1], 0),
        asked_SA.reshape(-1, 1),
        hidden_SH.new_ones(asked_SA.numel(), 1),
        alive,
        full=False,
    )
    said_SAH = apart.view(*asked_SA.shape, -1)
    own_SKH = said_SAH[:, len(picked_M) :].to(count_dtype(apart.device))
    return said_SAH[:, : len(picked_M)].transpose(0, 1), own_SKH.norm(dim=-1) * (index_SK >= 0)


@torch.no_grad()
def phi_evidence(outputs_MSH: Tensor, share_M: Tensor, part_SK: Tensor, real_S: Tensor | None = None) -> Tensor:
    """What Φ is computed from, (M * M + 2,): it adds up over passes and ranks.

    Args:
        outputs_MSH: Of every measured expert on every sampled token.
        share_M: Of the load; sums to one.
        part_SK: |weight * output| of each token's places, 0 where a place is not used.
        real_S: Bool, tokens that count; None is all.

    Returns:
        The Gram matrix of the experts' outputs, the sum of the tokens' integrations, the number of tokens, those left
        out on which most experts' outputs are not finite.
    """
    dtype = share_M.dtype
    real_S = torch.ones_like(part_SK[:, 0], dtype=torch.bool) if real_S is None else real_S
    finite_MS = outputs_MSH.isfinite().all(dim=-1)
    # A token that overflowed says nothing of the experts, and an expert that did so on others nothing at all.
    real_S = real_S & (2 * finite_MS.sum(dim=0) > len(finite_MS))
    finite_M = finite_MS.logical_or(~real_S).all(dim=-1)
    real_S = real_S & finite_M.any()
    counts_MS1 = (finite_M.unsqueeze(1) & real_S).unsqueeze(2)
    outputs_MSH = outputs_MSH.where(counts_MS1, torch.zeros_like(outputs_MSH)).to(dtype)
    # First into the range where squares neither overflow nor vanish; that scale cancels in the next line.
    largest_S1 = outputs_MSH.abs().amax(dim=(0, 2)).unsqueeze(1)
    outputs_MSH = outputs_MSH / largest_S1.where(largest_S1 > 0, 1.0)
    mean_S1 = (share_M[:, None, None] * outputs_MSH.square()).sum(dim=(0, 2)).sqrt().unsqueeze(1)
    # A token to which no loaded expert has anything to say is no evidence.
    state_MF = (outputs_MSH * (mean_S1 > 0) / mean_S1.where(mean_S1 > 0, 1.0)).flatten(1)
    gram_MM = state_MF @ state_MF.T

    part_SK = part_SK.to(dtype).where(part_SK.isfinite(), 0.0)
    places = part_SK.shape[1]
    if places > 1:
        share_SK = part_SK / part_SK.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        together_S = torch.special.entr(share_SK).sum(dim=1) / math.log(places)
    else:
        together_S = torch.zeros_like(part_SK[:, 0])
    return torch.cat([gram_MM.flatten(), (together_S * real_S).sum().view(1), real_S.sum().to(dtype).view(1)])


@torch.no_grad()
def phi_of(evidence: Tensor, share_M: Tensor) -> Phi:
    """Φ from summed `phi_evidence`; zeros where there is none."""
    experts = len(share_M)
    gram_MM, (together, tokens) = evidence[:-2].view(experts, experts), evidence[-2:]
    length_M = gram_MM.diagonal().clamp_min(0).sqrt()
    heard_M = length_M > 0
    weight_M = share_M.to(evidence) * heard_M
    weight_M = (weight_M / weight_M.sum().clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    scale_M = weight_M / length_M.where(heard_M, 1.0)
    # The eigenvalues of ρ are those of this M x M matrix, whatever the number of features.
    spectrum = torch.linalg.eigvalsh(scale_M[:, None] * gram_MM * scale_M).clamp(0, 1)
    entropy = torch.special.entr(spectrum).sum()
    differentiation = (entropy / math.log(experts)).clamp(0, 1) if experts > 1 else torch.zeros_like(entropy)
    integration = (together / tokens.clamp_min(1)).clamp(0, 1)
    parts = ((differentiation * integration).sqrt(), differentiation, integration)
    return Phi(*(part.float() for part in parts))


def phi_collapsed(phi: Tensor, peak: Tensor, share: float) -> Tensor:
    """Whether Φ (its level) is below `share` of its peak, bool; never where the peak is below `ALIKE`."""
    return (peak >= ALIKE) & (phi < share * peak)


__all__ = ["Phi", "measured_experts", "phi_collapsed", "phi_evidence", "phi_of", "sampled_outputs"]
