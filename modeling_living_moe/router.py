"""Where experts are found: keys, scores, and the choice of clades.

Row i of a pretrained linear router is the key of expert i, its query network the identity; so every graft starts
exact. Softmax top-k is Shazeer et al. 2017 (arXiv:1701.06538) as in Mixtral (arXiv:2401.04088); sigmoid, bias and
group-limited top-k are DeepSeek-V3's (arXiv:2412.19437). The choice is over clades, not experts: twins that each
took a place in the top-k would push the runner-up out. Reads the population, never changes it.

T tokens, E alive experts, D tombstones, N visible clades, K clades per token, H hidden, F fields.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from living_moe.modeling_living_moe.families import Scoring
from living_moe.modeling_living_moe.population import SLABS, Population, View, sort_slabs


class Keys(nn.ParameterDict):
    """Keys per slab, (C, H) each, listed in slot order whatever the order they came in."""

    # A ParameterDict refuses to be called, but only to what is called does Accelerate bring offloaded weights.
    __call__ = nn.Module.__call__

    def forward(self, alive: dict[str, int]) -> Tensor:
        """Keys of the first rows of each slab, as many as `alive` says, in slot order: (E, H)."""
        # A slab without spare rows is used whole: one autograd node less, and the very product of the source.
        parts = [self[slab] if self[slab].shape[0] == count else self[slab][:count] for slab, count in alive.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __setitem__(self, key: str, value: nn.Parameter) -> None:
        super().__setitem__(key, value)
        for entries in (self._keys, self._parameters):
            sort_slabs(entries)


class LivingRouter(nn.Module):
    """Scores tokens against the keys of alive experts and chooses each token's experts.

    Stages of `forward`: logits of all alive experts; per field, the serving member of each clade; choice among
    clades; each token takes the choice of its own field.
    """

    def __init__(
        self, scoring: Scoring, capacities: dict[str, int], hidden_size: int, *, train_frozen_keys: bool = True
    ):
        super().__init__()
        self.scoring = scoring
        self.hidden_size = hidden_size
        self.train_frozen_keys = train_frozen_keys
        self.keys = Keys()
        for name in SLABS:
            if capacity := capacities.get(name, 0):
                self.keys[name] = self.new_keys(name, capacity)

    def new_keys(self, slab: str, capacity: int) -> nn.Parameter:
        trainable = slab != "frozen" or self.train_frozen_keys
        return nn.Parameter(torch.zeros(capacity, self.hidden_size), requires_grad=trainable)

    def logits(self, hidden_TH: Tensor, keys_EH: Tensor) -> Tensor:
        if self.scoring.fp32_logits:
            return F.linear(hidden_TH.type(torch.float32), keys_EH.type(torch.float32))
        return F.linear(hidden_TH, keys_EH)

    def forward(
        self,
        hidden_TH: Tensor,
        population: Population,
        field_T: Tensor | None = None,
        num_fields: int = 0,
        choices: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send each token to its experts.

        Args:
            hidden_TH: Router input.
            population: Who lives here.
            field_T: int64, the field of each token; None reads every token in the root field.
            num_fields: Newborn fields; fields 0..num_fields are computed and one is picked per token.
            choices: Filled with (clade logits (T, N), chosen clades (T, K)) of each field, if given.

        Returns:
            logits_TE: Raw scores of the alive experts in slot order, as the source's router returns them.
            weights_TK: Routing weights.
            index_TK: int64, the chosen experts in slot order.
        """
        logits_TE = self.logits(hidden_TH, self.keys(population.alive))
        logits_TA = logits_TE
        if population.tombstone_bias.numel():
            left_TD = self.logits(hidden_TH, population.tombstone_key.to(logits_TE.dtype))
            logits_TA = torch.cat([logits_TE, left_TD], dim=1)
        weights_TK, index_TK = self.choose(hidden_TH, logits_TA, population, 0, choices)
        if field_T is not None:
            for field in range(1, num_fields + 1):
                weights, index = self.choose(hidden_TH, logits_TA, population, field, choices)
                mine_T1 = (field_T == field).unsqueeze(-1)
                weights_TK = torch.where(mine_T1, weights, weights_TK)
                index_TK = torch.where(mine_T1, index, index_TK)
        return logits_TE, weights_TK, index_TK

    def choose(
        self,
        hidden_TH: Tensor,
        logits_TA: Tensor,
        population: Population,
        field: int,
        choices: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights and slot-order indices (T, K) of the experts that tokens of `field` go to.

        `logits_TA` scores every address: E of the alive, then D of the tombstones.
        """
        view = population.view(field, logits_TA.device)
        address_TN, server_TN = (None, None) if view.is_identity else served_cells(hidden_TH, population, view)
        logits_TN = logits_TA if address_TN is None else logits_TA.gather(1, address_TN)
        weights_TK, clades_TK = self.select(logits_TN, population, view, address_TN)
        if choices is not None:
            choices.append((logits_TN[:, : view.num_open], clades_TK))
        return weights_TK, clades_TK if server_TN is None else server_TN.gather(1, clades_TK)

    def select(
        self, logits_TN: Tensor, population: Population, view: View, address_TN: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The family's rule over clades: weights and columns (T, K) of the chosen ones."""
        rule, num_open = self.scoring, view.num_open
        if rule.function == "softmax":
            scores_TN = F.softmax(logits_TN, dim=-1, dtype=torch.float32)
            weights_TK, clades_TK = torch.topk(scores_TN[:, :num_open], rule.top_k, dim=-1, sorted=rule.sorted)
        else:
            scores_TN = logits_TN.float().sigmoid()
            bias_A = torch.cat(
                [population.table(slab).bias[:count] for slab, count in population.alive.items()]
                + [population.tombstone_bias]
            )
            choice_TN = scores_TN + (bias_A if address_TN is None else bias_A[address_TN])
            if rule.num_groups > 1:
                choice_TN = self.limit_to_groups(choice_TN, view)
            clades_TK = torch.topk(choice_TN[:, :num_open], rule.top_k, dim=-1, sorted=rule.sorted)[1]
            weights_TK = scores_TN.gather(1, clades_TK)
        if rule.normalise:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + rule.epsilon)
        if rule.scaling != 1.0:
            weights_TK = weights_TK * rule.scaling
        return (weights_TK.to(logits_TN.dtype) if rule.cast_weights else weights_TK), clades_TK

    def limit_to_groups(self, choice_TN: Tensor, view: View) -> Tensor:
        """-inf outside the best `top_groups` groups; a group scores the sum of its two best clades."""
        assert view.group_members_GM is not None
        padded = F.pad(choice_TN, (0, 1), value=float("-inf"))
        by_group_TGM = padded[:, view.group_members_GM]
        best_TG2 = by_group_TGM.topk(min(2, by_group_TGM.shape[-1]), dim=-1)[0]
        # Padding of a group of one adds nothing; an empty group stays at -inf.
        best_TG2 = torch.cat(
            [best_TG2[..., :1], best_TG2[..., 1:].masked_fill(best_TG2[..., 1:] == float("-inf"), 0.0)], dim=-1
        )
        groups_TG = torch.topk(best_TG2.sum(dim=-1), k=self.scoring.top_groups, dim=-1, sorted=False)[1]
        kept_TG = torch.zeros_like(best_TG2[..., 0], dtype=torch.bool).scatter_(1, groups_TG, True)
        return choice_TN.masked_fill(~kept_TG[:, view.group_N], float("-inf"))


@torch.no_grad()
def served_cells(hidden_TH: Tensor, population: Population, view: View) -> tuple[Tensor, Tensor]:
    """Of each token in each cell: the address that is scored, and the slot-order index of who serves; int64 (T, N)."""
    shape = (hidden_TH.shape[0], -1)
    address_TN, server_TN = view.address_N.expand(shape), view.server_N.expand(shape)
    if not len(view.columns_M):
        return address_TN, server_TN
    facets_TP = F.linear(hidden_TH.float(), population.facet_normal, population.facet_offset)
    side_TP = torch.where(facets_TP >= 0, 1.0, -1.0)
    # A leaf is satisfied when every facet on its path agrees; exactly one leaf of a cell is.
    satisfied_TL = ((side_TP @ view.sides_PL) == view.path_length_L).float()
    address_TM = (satisfied_TL @ view.address_LM).round().long()
    server_TM = (satisfied_TL @ view.server_LM).round().long()
    return address_TN.index_copy(1, view.columns_M, address_TM), server_TN.index_copy(1, view.columns_M, server_TM)


def load_balancing_loss(logits_TN: Tensor, clades_TK: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Switch-Transformer load-balancing loss of one layer (arXiv:2101.03961, eq. 4-6), over its own clade count.

    Args:
        logits_TN: Clade logits, any float dtype.
        clades_TK: int64, chosen clades.
        token_mask_T: 1 where the token counts; None counts all.

    Returns:
        Scalar fp32. A balanced layer gives K, whatever its number of clades.
    """
    tokens, num_clades = logits_TN.shape
    mask_T = logits_TN.new_ones(tokens, dtype=torch.float32) if token_mask_T is None else token_mask_T.float()
    probabilities_TN = F.softmax(logits_TN.float(), dim=-1)
    chosen_N = logits_TN.new_zeros(num_clades, dtype=torch.float32)
    chosen_N = chosen_N.scatter_add(0, clades_TK.flatten(), mask_T.repeat_interleave(clades_TK.shape[1]))
    total = mask_T.sum().clamp_min(1.0)
    return num_clades * torch.sum((chosen_N / total) * ((probabilities_TN * mask_T[:, None]).sum(0) / total))
