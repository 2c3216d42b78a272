"""Who is chosen: from a token's scores over clades to the chosen ones and their weights.

Two rules behind one interface. `FamilySelection` is the source family's own: softmax or sigmoid, top-k, groups, bias
(Mixtral, arXiv:2401.04088; DeepSeek-V3, arXiv:2412.19437). `TopAny` takes as many clades as the token needs: all above
a threshold, at least one, at most a bound (top-any gating, DynMoE, arXiv:2405.14297; rectified gates with a sparsity
controller, ReMoE, arXiv:2412.14711). Knows neither keys nor experts.

T tokens, N columns to choose from, K places per token.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import initialization as init

from living_moe.configuration.sections import RouterConfig
from living_moe.modeling_living_moe.families import Scoring
from living_moe.modeling_living_moe.population import KeepsDtype

#: Column of a place that is not used; its weight is 0.
UNUSED = -1
#: Weight, at the threshold, of a clade that is chosen only because a token needs one (gate "relu").
FLOOR = 0.01


class Columns(Protocol):
    """What a rule needs to know of the columns."""

    num_open: int
    """The first `num_open` columns can be chosen; the others are only scored."""
    group_members_GM: Tensor | None
    group_N: Tensor


class Selection(KeepsDtype):
    """Base of the rules."""

    #: Whether tokens may take fewer than K clades.
    leaves_places_unused = False

    def __init__(self, scoring: Scoring):
        super().__init__()
        self.scoring = scoring
        #: K: most clades a token can have.
        self.places = scoring.top_k

    def forward(self, logits_TN: Tensor, bias_TN: Tensor | None, columns: Columns) -> tuple[Tensor, Tensor]:
        """Choose.

        Args:
            logits_TN: Scores.
            bias_TN: Selection biases, (N,) or (T, N): they decide who is chosen and never enter a weight. None is 0.

        Returns:
            weights_TK: Routing weights.
            columns_TK: int64; UNUSED where a place is not used.
        """
        raise NotImplementedError

    def needs_all(self) -> str | None:
        """Why every score must be known, or None if the best candidates suffice."""
        raise NotImplementedError

    def weighs_the_chosen(self) -> bool:
        """Whether weights depend on the scores of the chosen alone, so that no other score has a gradient."""
        raise NotImplementedError

    def weigh(self, logits_TK: Tensor, used_TK: Tensor) -> Tensor:
        """Weights of chosen columns (T, K) from their scores, where `weighs_the_chosen`; 0 where a place is not used.

        Equal to those of `forward`, which may have summed in another order.
        """
        raise NotImplementedError


class FamilySelection(Selection):
    """The source family's top-k."""

    def forward(self, logits_TN: Tensor, bias_TN: Tensor | None, columns: Columns) -> tuple[Tensor, Tensor]:
        rule, num_open = self.scoring, columns.num_open
        if rule.function == "softmax":
            scores_TN = F.softmax(logits_TN, dim=-1, dtype=rule.scores_dtype(logits_TN.dtype))
        else:
            scores_TN = logits_TN.to(rule.scores_dtype(logits_TN.dtype)).sigmoid()
        if bias_TN is None and rule.num_groups == 1:
            weights_TK, chosen_TK = torch.topk(scores_TN[:, :num_open], rule.top_k, dim=-1, sorted=rule.sorted)
        else:
            choice_TN = scores_TN if bias_TN is None else scores_TN + bias_TN
            if rule.num_groups > 1:
                choice_TN = self.limit_to_groups(choice_TN, columns)
            chosen_TK = torch.topk(choice_TN[:, :num_open], rule.top_k, dim=-1, sorted=rule.sorted)[1]
            weights_TK = scores_TN.gather(1, chosen_TK)
        return finish(weights_TK, rule, logits_TN.dtype), chosen_TK

    def limit_to_groups(self, choice_TN: Tensor, columns: Columns) -> Tensor:
        """-inf outside the best `top_groups` groups; a group scores the sum of its two best clades."""
        assert columns.group_members_GM is not None
        padded = F.pad(choice_TN, (0, 1), value=float("-inf"))
        by_group_TGM = padded[:, columns.group_members_GM]
        best_TG2 = by_group_TGM.topk(min(2, by_group_TGM.shape[-1]), dim=-1)[0]
        # Padding of a group of one adds nothing; an empty group stays at -inf.
        best_TG2 = torch.cat(
            [best_TG2[..., :1], best_TG2[..., 1:].masked_fill(best_TG2[..., 1:] == float("-inf"), 0.0)], dim=-1
        )
        groups_TG = torch.topk(best_TG2.sum(dim=-1), k=self.scoring.top_groups, dim=-1, sorted=False)[1]
        kept_TG = torch.zeros_like(best_TG2[..., 0], dtype=torch.bool).scatter_(1, groups_TG, True)
        return choice_TN.masked_fill(~kept_TG[:, columns.group_N], float("-inf"))

    def needs_all(self) -> str | None:
        rule = self.scoring
        if rule.num_groups > 1:
            return "group-limited top-k compares whole groups"
        if rule.function == "softmax" and not rule.normalise:
            return "a softmax that is not renormalised over the chosen"
        return None

    def weighs_the_chosen(self) -> bool:
        return self.scoring.function != "softmax" or self.scoring.normalise

    def weigh(self, logits_TK: Tensor, used_TK: Tensor) -> Tensor:
        dtype = self.scoring.scores_dtype(logits_TK.dtype)
        if self.scoring.function == "softmax":
            weights_TK = F.softmax(logits_TK, dim=-1, dtype=dtype)
        else:
            weights_TK = logits_TK.to(dtype).sigmoid()
        return finish(weights_TK, self.scoring, logits_TK.dtype)


class TopAny(Selection):
    """Every clade whose score is above the layer's threshold; always the best one, never more than `places`.

    The threshold is a buffer: `steer` moves it towards a density, nothing else does.
    """

    leaves_places_unused = True
    threshold: Tensor

    def __init__(self, scoring: Scoring, settings: RouterConfig):
        super().__init__(scoring)
        self.gate = settings.gate
        self.first_threshold = settings.threshold
        self.rate = settings.threshold_rate
        self.places = settings.max_experts_per_token or 2 * scoring.top_k
        self.target = settings.target_experts_per_token or float(scoring.top_k)
        self.register_buffer("threshold", torch.tensor(settings.threshold, dtype=torch.float32))

    def reset_parameters(self) -> None:
        init.constant_(self.threshold, self.first_threshold)

    def forward(self, logits_TN: Tensor, bias_TN: Tensor | None, columns: Columns) -> tuple[Tensor, Tensor]:
        open_TN = logits_TN[:, : columns.num_open].float()
        height_TN = open_TN - self.threshold
        choice_TN = height_TN if bias_TN is None else height_TN + bias_TN[..., : columns.num_open]
        # Sorted, so that the best, which is always chosen, is the first.
        top_TK, chosen_TK = choice_TN.topk(min(self.places, columns.num_open), dim=-1)
        used_TK = top_TK > 0
        used_TK[:, 0] = True
        weights_TK = self.weigh(logits_TN.gather(1, chosen_TK), used_TK)
        # Fields may differ in how many clades they see, and must not in places.
        missing = (0, self.places - chosen_TK.shape[1])
        return F.pad(weights_TK, missing), F.pad(chosen_TK.masked_fill(~used_TK, UNUSED), missing, value=UNUSED)

    def weigh(self, logits_TK: Tensor, used_TK: Tensor) -> Tensor:
        rule = self.scoring
        score_TK = logits_TK.float()
        height_TK = score_TK - self.threshold
        if self.gate == "relu":
            weights_TK = F.relu(height_TK)
            floor_T = FLOOR * height_TK[:, 0].clamp(max=0).exp()
            weights_TK = torch.cat([torch.maximum(weights_TK[:, :1], floor_T[:, None]), weights_TK[:, 1:]], dim=1)
        else:
            if rule.function == "softmax":
                weights_TK = F.softmax(score_TK.masked_fill(~used_TK, float("-inf")), dim=-1)
            else:
                weights_TK = score_TK.sigmoid() * used_TK
                weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + rule.epsilon)
            # One in the forward pass; its gradient is that of a soft step, so that who is chosen is learned too.
            soft_TK = height_TK.sigmoid()
            weights_TK = weights_TK * (1.0 + soft_TK - soft_TK.detach())
        return (weights_TK * used_TK * rule.scaling).to(logits_TK.dtype if rule.cast_weights else weights_TK.dtype)

    def weighs_the_chosen(self) -> bool:
        return True

    @torch.no_grad()
    def steer(self, density: Tensor) -> None:
        """Move the threshold towards the target, by a step's mean number of experts per token (0-dim; 0: no token)."""
        error = density.to(self.threshold.device) / self.target - 1.0
        self.threshold += self.rate * torch.where(density > 0, error, torch.zeros_like(error)).float()

    def needs_all(self) -> str | None:
        return None


def finish(weights_TK: Tensor, rule: Scoring, dtype: torch.dtype) -> Tensor:
    """Normalise, scale and cast the chosen weights as the family does."""
    if rule.normalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + rule.epsilon)
    if rule.scaling != 1.0:
        weights_TK = weights_TK * rule.scaling
    return weights_TK.to(dtype) if rule.cast_weights else weights_TK


def selection_rule(scoring: Scoring, settings: RouterConfig) -> Selection:
    return TopAny(scoring, settings) if settings.selection == "top_any" else FamilySelection(scoring)


__all__ = ["UNUSED", "FamilySelection", "Selection", "TopAny", "selection_rule"]
