"""Where experts are found: keys, scores, and the choice of clades.

Row i of a pretrained linear router is the key of expert i, its query network the identity; so every graft starts
exact (SOME separates query network and key store; the linear gate is Shazeer et al. 2017, arXiv:1701.06538). The choice
is over clades, not experts: twins that each took a place in the top-k would push the runner-up out. Reads the
population, never changes it.

T tokens, E alive experts, A addresses (of the alive, then of tombstones), N visible clades, K clades per token,
C candidates of a search, H hidden, D length of queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import RouterConfig, SynapseConfig, TrainableConfig
from living_moe.configuration.slabs import SLABS, is_frozen
from living_moe.modeling_living_moe.families import Scoring
from living_moe.modeling_living_moe.key_search import KeyStoreSearch
from living_moe.modeling_living_moe.population import AddressBook, KeepsDtype, Population, View, sort_slabs
from living_moe.modeling_living_moe.query import query_network
from living_moe.modeling_living_moe.selection import UNUSED, selection_rule
from living_moe.modeling_living_moe.synapse.router import Passage, RouterSynapse

#: A learned temperature stays within this factor of where it started.
TEMPERATURE_RANGE = 16.0


class LearnedTemperature(KeepsDtype):
    """A temperature that is learned, in log space: start * RANGE ** tanh(log_ratio / log RANGE).

    So it is exactly `start` at first (`log_ratio` 0), where a change of `log_ratio` is one of its logarithm, and stays
    between start / 16 and start * 16 whatever an optimizer does: scores can neither explode nor vanish. Weight decay,
    where there is any, pulls towards the start. The parameter is fp32 whatever the model's dtype.
    """

    def __init__(self, start: float):
        super().__init__()
        self.start = start
        self.log_ratio = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self) -> Tensor:
        """0-dim fp32."""
        bound = math.log(TEMPERATURE_RANGE)
        return self.start * torch.exp(bound * torch.tanh(self.log_ratio / bound))

    def reset_parameters(self) -> None:
        """Back to the start; leaves alone what a checkpoint has loaded."""
        init.zeros_(self.log_ratio)


#: Addresses per place from which the gradient of a token's scores is taken at the chosen ones only. Below, two matrix
#: products are as quick as reading and adding keys one by one.
SPARSE_FROM = 64


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

    Stages of `forward`: queries; logits of all alive experts; per field, the serving member of each clade; choice among
    clades; each token takes the choice of its own field. With very many keys the logits are those of the candidates a
    search finds, nothing else changes. With many keys, and where weights depend on the scores of the chosen alone, the
    backward pass reads and writes the keys of the chosen; the others' gradients are zero either way.

    Args:
        scoring: The source family's rule.
        capacities: Slots per slab.
        hidden_size: H.
        settings: Query network, similarity, selection, search.
        trainable: Which keys and expression vectors take gradients.
        synapse: Short-term memory of the router's edges; None is without.
        layer: Number of the living layer, for what the synapse draws.
        num_tombstones: D, of a synapse's own table.
    """

    def __init__(
        self,
        scoring: Scoring,
        capacities: dict[str, int],
        hidden_size: int,
        settings: RouterConfig | None = None,
        trainable: TrainableConfig | None = None,
        synapse: SynapseConfig | None = None,
        layer: int = 0,
        num_tombstones: int = 0,
    ):
        super().__init__()
        settings, trainable = settings or RouterConfig(), trainable or TrainableConfig()
        self.scoring = scoring
        self.hidden_size = hidden_size
        self.d_key = settings.d_key or hidden_size
        self.similarity = settings.similarity
        self.normalise_keys = settings.normalise_keys or settings.similarity == "cosine"
        self.temperature = settings.temperature
        self.learned_temperature = LearnedTemperature(settings.temperature) if settings.learn_temperature else None
        self.balances = settings.bias_update_rate > 0
        self.trainable_keys = {slab: trainable.frozen_keys if is_frozen(slab) else trainable.keys for slab in SLABS}
        self.trainable_expression = {
            slab: trainable.synapses and (trainable.frozen_keys or not is_frozen(slab)) for slab in SLABS
        }
        self.synapse = (
            RouterSynapse(synapse, scoring, capacities, layer, num_tombstones)
            if synapse is not None and synapse.router
            else None
        )
        self.query = query_network(settings, hidden_size)
        self.selection = selection_rule(scoring, settings)
        self.search = self._search(settings)
        self.keys = Keys()
        for name in SLABS:
            if capacity := capacities.get(name, 0):
                self.keys[name] = self.new_keys(name, capacity)

    def _search(self, settings: RouterConfig) -> KeyStoreSearch | None:
        """The search of a router that can do with candidates; None compares every key."""
        reason = self.selection.needs_all() or ("balancing biases" if self.balances else None)
        reason = reason or ("synapses, which every score drives" if self.synapse is not None else None)
        if reason is None:
            return None if settings.search == "exact" else KeyStoreSearch(settings)
        if settings.search not in ("auto", "exact"):
            raise ConfigurationError(
                f"router.search is {settings.search!r} but this router needs every score ({reason}); set "
                f"router.search to 'exact' or 'auto'."
            )
        return None

    def new_keys(self, slab: str, capacity: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(capacity, self.d_key), requires_grad=self.trainable_keys[slab])

    def trains(self, slab: str, role: str) -> bool:
        """Whether a slab's keys, or expression vectors, take gradients."""
        return (self.trainable_keys if role == "key" else self.trainable_expression)[slab]

    def queries(self, hidden_TH: Tensor) -> Tensor:
        """(T, H) -> (T, D), in fp32 where the family compares in fp32."""
        if self.scoring.fp32_logits:
            hidden_TH = hidden_TH.type(torch.float32)
        query_TD = hidden_TH if self.query is None else self.query(hidden_TH)
        return F.normalize(query_TD, dim=-1) if self.similarity == "cosine" else query_TD

    def comparable(self, keys_ED: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys as queries are compared with them."""
        if self.scoring.fp32_logits:
            keys_ED = keys_ED.type(torch.float32)
        elif keys_ED.dtype != dtype:
            keys_ED = keys_ED.to(dtype)
        return F.normalize(keys_ED, dim=-1) if self.normalise_keys else keys_ED

    def logits(self, query_TD: Tensor, keys_ED: Tensor) -> Tensor:
        logits_TE = F.linear(query_TD, self.comparable(keys_ED, query_TD.dtype))
        return self.tempered(logits_TE)

    def tempered(self, logits: Tensor) -> Tensor:
        """Products of queries and keys as scores."""
        if self.learned_temperature is not None:
            return logits / self.learned_temperature()
        return logits if self.temperature == 1.0 else logits / self.temperature

    def forward(
        self,
        hidden_TH: Tensor,
        population: Population,
        field_T: Tensor | None = None,
        fields: Sequence[int] = (),
        choices: dict[int, tuple[Tensor, Tensor]] | None = None,
        all_logits: bool = True,
        may_search: bool = True,
        passage: Passage | None = None,
        record: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send each token to its experts.

        Args:
            hidden_TH: Router input.
            population: Who lives here.
            field_T: int64, the field of each token; None reads every token in the root field.
            fields: Newborn fields that tokens are in.
            choices: Filled with (clade logits (T, N), chosen clades (T, K)) of each field, if given.
            all_logits: Whether somebody reads the logits, so that a search for candidates will not do, and all of them
                need their gradient.
            may_search: Whether a search may serve this layer.
            passage: For a synapse: the texts of this pass; None is one text.
            record: For a synapse: leave in `passage` what a cache must keep.

        Returns:
            logits_TE: Raw scores of the alive experts in slot order, as the source's router returns them; of the
                candidates only where a search found them, and perhaps without gradient unless `all_logits`; with what
                a synapse adds.
            weights_TK: Routing weights.
            index_TK: int64, the chosen experts in slot order; UNUSED where a token needs fewer than K.
        """
        query_TD = self.queries(hidden_TH)
        keys_ED = self.keys(population.alive)
        if self.search is not None and choices is None and may_search and not all_logits:
            found = self._choose_among_candidates(hidden_TH, query_TD, keys_ED, population)
            if found is not None:
                return found
        count = len(keys_ED) + len(population.tombstone_bias)
        sparse = choices is None and not all_logits and self._spares_gradients(count)
        # Detached, not under `no_grad`: autocast would keep the keys that were cast there, without a gradient.
        scored_TD, scored_ED = (query_TD.detach(), keys_ED.detach()) if sparse else (query_TD, keys_ED)
        logits_TE = self._logits_of_members(scored_TD, scored_ED, population.leading_roots)
        logits_TA = logits_TE
        if population.tombstone_bias.numel():
            left_TD = self.logits(scored_TD, population.tombstone_key)
            logits_TA = torch.cat([logits_TE, left_TD], dim=1)
        if self.synapse is not None:

            def served(view: View) -> Tensor | None:
                return None if view.is_identity else served_cells(hidden_TH, population, view)[0]

            logits_TA = self.synapse(logits_TA, population, served, field_T, fields, passage, record)
            logits_TE = logits_TA[:, : logits_TE.shape[1]]
        chosen = self.choose(hidden_TH, logits_TA, population, 0, choices)
        if field_T is not None:
            for field in fields:
                mine_T1 = (field_T == field).unsqueeze(-1)
                others = self.choose(hidden_TH, logits_TA, population, field, choices)
                chosen = Choice(*(torch.where(mine_T1, new, old) for new, old in zip(others, chosen, strict=True)))
        weights_TK = chosen.weights_TK
        if sparse:
            weights_TK = self._with_gradient(chosen, query_TD, keys_ED, population, logits_TA)
        return logits_TE, weights_TK, chosen.index_TK

    def _logits_of_members(self, query_TD: Tensor, keys_ED: Tensor, roots: int) -> Tensor:
        """(T, E); the first `roots` keys have a product of their own.

        Where newborns live in receptive fields it is the source's product, bit for bit: in a common one with their keys
        a kernel may round the source's scores otherwise.
        """
        if not 0 < roots < len(keys_ED):
            return self.logits(query_TD, keys_ED)
        return torch.cat([self.logits(query_TD, keys_ED[:roots]), self.logits(query_TD, keys_ED[roots:])], dim=1)

    def _spares_gradients(self, addresses: int) -> bool:
        """Whether gradients are taken at the chosen addresses only."""
        many = addresses >= SPARSE_FROM * self.selection.places
        # With a synapse every score drives the state, and so the scores to come.
        spared = self.synapse is None and self.selection.weighs_the_chosen()
        return many and spared and torch.is_grad_enabled()

    def _with_gradient(
        self, chosen: Choice, query_TD: Tensor, keys_ED: Tensor, population: Population, logits_TA: Tensor
    ) -> Tensor:
        """The weights of a choice made without gradients, bit for bit, with those they have by the chosen scores."""
        keys_AD = keys_ED
        if population.tombstone_bias.numel():
            keys_AD = torch.cat([keys_ED, population.tombstone_key.to(keys_ED.dtype)])
        keys_AD = self.comparable(keys_AD, query_TD.dtype)
        # Products as they were before the temperature, whose own gradient is that of its division.
        scores_TK = logits_TA.detach().gather(1, chosen.address_TK)
        products_TK = scores_TK / self.tempered(scores_TK.new_ones(())).detach()
        products_TK = _ChosenProducts.apply(query_TD, keys_AD, chosen.address_TK, products_TK)
        weights_TK = self.selection.weigh(self.tempered(products_TK), chosen.index_TK != UNUSED)
        return _ValueOf.apply(chosen.weights_TK, weights_TK)

    def choose(
        self,
        hidden_TH: Tensor,
        logits_TA: Tensor,
        population: Population,
        field: int,
        choices: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> Choice:
        """The experts that tokens of `field` go to.

        `logits_TA` scores every address: E of the alive, then D of the tombstones.
        """
        view = population.view(field, logits_TA.device)
        address_TN, server_TN = (None, None) if view.is_identity else served_cells(hidden_TH, population, view)
        logits_TN = logits_TA if address_TN is None else logits_TA.gather(1, address_TN)
        bias_TN = None
        if self.balances or population.is_biased or self.scoring.function == "sigmoid":
            bias_A = population.address_bias()
            bias_TN = bias_A if address_TN is None else bias_A[address_TN]
        weights_TK, clades_TK = self.selection(logits_TN, bias_TN, view)
        if choices is not None:
            choices[field] = (logits_TN[:, : view.num_open], clades_TK)
        cell_TK = clades_TK.clamp(min=0)
        if address_TN is None or server_TN is None:
            return Choice(weights_TK, clades_TK, cell_TK)
        index_TK = server_TN.gather(1, cell_TK).masked_fill(clades_TK == UNUSED, UNUSED)
        return Choice(weights_TK, index_TK, address_TN.gather(1, cell_TK))

    def _choose_among_candidates(
        self, hidden_TH: Tensor, query_TD: Tensor, keys_ED: Tensor, population: Population
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `forward`, from the addresses that a search finds; None if it does not serve here.

        A candidate that does not serve the token (its clade sends it to another member) leaves; the search is asked
        for more than are needed, and tokens for which still too few serve are compared with every key.
        """
        assert self.search is not None
        if population.is_biased:
            return None
        book = population.address_book(query_TD.device)
        keys_AD = keys_ED
        if population.tombstone_bias.numel():
            keys_AD = torch.cat([keys_ED, population.tombstone_key.to(keys_ED.dtype)])
        keys_AD = self.comparable(keys_AD, query_TD.dtype)
        wanted = self.selection.places
        count = wanted * (1 + min(book.spare, 3))
        candidates_TC = self.search.candidates(query_TD.detach(), keys_AD, count, wanted)
        if candidates_TC is None:
            return None
        serves_TC = book.serves(hidden_TH, candidates_TC)
        # The search finds; what is learned flows through the keys found, by their own product with the query.
        logits_TC = self.tempered(torch.einsum("td,tcd->tc", query_TD, keys_AD[candidates_TC.clamp(min=0)]))
        logits_TC = logits_TC.masked_fill(~serves_TC, float("-inf"))
        enough_T = serves_TC.sum(dim=1) >= wanted
        if bool(enough_T.all()):
            return logits_TC, *self._among(logits_TC, candidates_TC, book)
        few, enough = (~enough_T).nonzero()[:, 0], enough_T.nonzero()[:, 0]
        searched = self._among(logits_TC[enough], candidates_TC[enough], book)
        compared = self.choose(hidden_TH[few], self.tempered(F.linear(query_TD[few], keys_AD)), population, 0)
        parts = [
            one.new_zeros(len(query_TD), one.shape[1]).index_copy(0, enough, one).index_copy(0, few, other)
            for one, other in zip(searched, compared[:2], strict=True)
        ]
        return logits_TC, parts[0], parts[1]

    def _among(self, logits_TC: Tensor, candidates_TC: Tensor, book: AddressBook) -> tuple[Tensor, Tensor]:
        """Weights and slot-order indices (T, K) of the choice among candidates."""
        weights_TK, columns_TK = self.selection(logits_TC, None, CandidateColumns(logits_TC.shape[1]))
        index_TK = book.server_A[candidates_TC].gather(1, columns_TK.clamp(min=0))
        return weights_TK, index_TK.masked_fill(columns_TK == UNUSED, UNUSED)


class Choice(NamedTuple):
    """Whom tokens go to: weights, experts in slot order (UNUSED where a place is not used), their addresses; (T, K)."""

    weights_TK: Tensor
    index_TK: Tensor
    address_TK: Tensor


class _ChosenProducts(torch.autograd.Function):
    """Known products (T, K) of queries and chosen keys, with their gradients."""

    @staticmethod
    def forward(ctx: Any, query_TD: Tensor, keys_AD: Tensor, address_TK: Tensor, products_TK: Tensor) -> Tensor:
        ctx.save_for_backward(query_TD, keys_AD, address_TK)
        return products_TK.view_as(products_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, ...]:
        query_TD, keys_AD, address_TK = ctx.saved_tensors
        grad_query = grad_keys = None
        with torch.autocast(grad_TK.device.type, enabled=False):
            grad_TK = grad_TK.to(query_TD.dtype)
            if ctx.needs_input_grad[0]:
                chosen_TKD = keys_AD[address_TK].to(query_TD.dtype)
                grad_query = torch.bmm(grad_TK.unsqueeze(1), chosen_TKD).squeeze(1)
            if ctx.needs_input_grad[1]:
                pulls_TKD = (grad_TK.unsqueeze(2) * query_TD.unsqueeze(1)).to(keys_AD.dtype)
                grad_keys = torch.zeros_like(keys_AD).index_add_(0, address_TK.flatten(), pulls_TKD.flatten(0, 1))
        return grad_query, grad_keys, None, None


class _ValueOf(torch.autograd.Function):
    """The first argument's value with the gradient of the second, its equal up to rounding."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, differentiable: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


@dataclass(frozen=True)
class CandidateColumns:
    """Candidates as columns: all can be chosen, none is in a group."""

    num_open: int
    group_members_GM: None = None
    group_N: None = None


@torch.no_grad()
def served_cells(hidden_TH: Tensor, population: Population, view: View) -> tuple[Tensor, Tensor]:
    """Of each token in each cell: the address that is scored, and the slot-order index of who serves; int64 (T, N)."""
    shape = (hidden_TH.shape[0], -1)
    address_TN, server_TN = view.address_N.expand(shape), view.server_N.expand(shape)
    if not len(view.columns_M):
        return address_TN, server_TN
    tokens, trees = hidden_TH.shape[0], view.trees
    height_TP = F.linear(hidden_TH.float(), population.facet_normal, population.facet_offset)
    # One-dimensional `index_select` takes a fraction of the time of `gather` and of indexing.
    height, first_S = height_TP.view(-1), torch.arange(tokens, device=height_TP.device) * height_TP.shape[1]
    first_S = first_S.repeat_interleave(len(view.columns_M))
    node_S = view.root_M.repeat(tokens)
    for _ in range(trees.depth):
        node_S = trees.step(node_S, height.index_select(0, first_S + trees.facet_Q.index_select(0, node_S)) >= 0)
    node_TM = node_S.view(tokens, len(view.columns_M))
    address_TM, server_TM = view.address_Q[node_TM], view.server_Q[node_TM]
    return address_TN.index_copy(1, view.columns_M, address_TM), server_TN.index_copy(1, view.columns_M, server_TM)


def load_balancing_loss(logits_TN: Tensor, clades_TK: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Switch-Transformer load-balancing loss of one layer (arXiv:2101.03961, eq. 4-6), over its own clade count.

    Args:
        logits_TN: Clade logits, any float dtype.
        clades_TK: int64, chosen clades; UNUSED places do not count.
        token_mask_T: 1 where the token counts; None counts all.

    Returns:
        Scalar fp32. A balanced layer gives K, whatever its number of clades.
    """
    tokens, num_clades = logits_TN.shape
    mask_T = logits_TN.new_ones(tokens, dtype=torch.float32) if token_mask_T is None else token_mask_T.float()
    probabilities_TN = F.softmax(logits_TN.float(), dim=-1)
    # The last bin takes what UNUSED places would count.
    chosen_N = logits_TN.new_zeros(num_clades + 1, dtype=torch.float32)
    places = torch.where(clades_TK == UNUSED, num_clades, clades_TK).flatten()
    chosen_N = chosen_N.scatter_add(0, places, mask_T.repeat_interleave(clades_TK.shape[1]))[:num_clades]
    total = mask_T.sum().clamp_min(1.0)
    return num_clades * torch.sum((chosen_N / total) * ((probabilities_TN * mask_T[:, None]).sum(0) / total))
