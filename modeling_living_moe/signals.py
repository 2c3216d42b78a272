"""What new text does to the experts that must learn it: interference, and the loss their tokens make.

Both are taken on a sample of a forward pass's tokens, evenly spread and without padding, the same in every layer.

- Interference of an expert on a token, |y_i - y_mix| / |y_i|: how far the mixture is pulled away from what the expert
  alone would say, with y_mix the weighted sum over the token's routed experts. 0 for one expert of weight 1.
- Credited loss: the token's next-token loss, shared among the experts that served it by their routing weights.

The module must not decide when to sample, nor what the numbers mean (see vitals.py, drift.py); it keeps no state.

T tokens of a pass, S sampled ones, K places per token, H hidden, E alive experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from living_moe.modeling_living_moe.experts import ExpertPool

#: As Transformers: no loss is computed for such labels.
IGNORED = -100


@dataclass
class TokenSample:
    """The sampled tokens of one forward pass.

    Attributes:
        position_S: int64, places in the flattened (B * T) batch, ascending.
        real_S: Bool, False for places left over where there are fewer real tokens than places.
        served: Living layer -> (experts (S, K) in slot order, negative where a place is not used; weights (S, K)).
    """

    position_S: Tensor
    real_S: Tensor
    served: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def spread(tokens: int, most: int, token_mask_T: Tensor | None, device: torch.device) -> TokenSample:
    """Sample at most `most` of `tokens` tokens, evenly spread over those that `token_mask_T` (None: all) says are real.

    Does not wait for the device: how many are real is known there only.
    """
    size = min(tokens, most)
    odd_S = 2 * torch.arange(size, device=device) + 1
    if token_mask_T is None:
        return TokenSample(odd_S * tokens // (2 * size), torch.ones(size, dtype=torch.bool, device=device))
    seen_T = token_mask_T.to(device).cumsum(0)
    # Ranks among the real tokens; with fewer of them than places, neighbours meet and only the first counts.
    rank_S = odd_S * seen_T[-1] // (2 * size)
    real_S = (rank_S.diff(prepend=rank_S.new_full((1,), -1)) > 0) & (seen_T[-1] > 0)
    return TokenSample(torch.searchsorted(seen_T, rank_S + 1).clamp(max=tokens - 1), real_S)


@torch.no_grad()
def interference(
    pool: ExpertPool, hidden_SH: Tensor, index_SK: Tensor, weights_SK: Tensor, alive: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """How far each expert of each token is from the mixture it is part of, in multiples of its own output's length.

    Runs the pool on the sample with one expert per place, so it needs no kernel of its own and follows any of them.

    Returns:
        ratio_SK: fp32.
        known_SK: Bool; False where a place is not used, or the expert's output is zero or no number.
    """
    places = index_SK.shape[1]
    apart = pool(
        hidden_SH.repeat_interleave(places, 0),
        index_SK.reshape(-1, 1),
        torch.ones_like(weights_SK).reshape(-1, 1),
        alive,
        full=False,
    )
    own_SKH = apart.view(*index_SK.shape, -1).float()
    mixture_SH = (own_SKH * weights_SK.unsqueeze(-1).float()).sum(dim=1)
    length_SK = own_SKH.norm(dim=-1)
    ratio_SK = (own_SKH - mixture_SH.unsqueeze(1)).norm(dim=-1) / length_SK
    known_SK = (index_SK >= 0) & (length_SK > 0) & ratio_SK.isfinite()
    return ratio_SK.where(known_SK, torch.zeros_like(ratio_SK)), known_SK


@torch.no_grad()
def token_losses(
    logits: Tensor, labels: Tensor, sample: TokenSample, shift_labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, fp32 (S,), of what follows each sampled token, and whether it has one.

    Args:
        logits: (B, T, V).
        labels: int64 (B, T), not shifted: the label of a token is the loss of the one before. The last token of a row
            has no successor.
        shift_labels: Labels that are shifted already, in place of `labels`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    position_S = sample.position_S.to(logits.device)
    label_S = shift_labels.to(logits.device).reshape(-1)[position_S]
    rows_SV = logits.detach().reshape(-1, logits.shape[-1])[position_S]
    loss_S = F.cross_entropy(rows_SV.float(), label_S, reduction="none", ignore_index=IGNORED)
    known_S = (label_S != IGNORED) & sample.real_S.to(logits.device) & loss_S.isfinite()
    return loss_S.where(known_S, torch.zeros_like(loss_S)), known_S


def credit_shares(index_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """Each expert's share of its token, fp32 (S, K): routing weights that sum to one over the places in use."""
    used_SK = weights_SK.float() * (index_SK >= 0)
    return used_SK / used_SK.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def load_entropy(received: Tensor) -> Tensor:
    """Entropy, in nats, of shares of tokens (..., E); 0 where there are none."""
    share = received / received.sum(dim=-1, keepdim=True).clamp_min(1.0)
    return torch.special.entr(share).sum(dim=-1)


__all__ = ["TokenSample", "credit_shares", "interference", "load_entropy", "spread", "token_losses"]
