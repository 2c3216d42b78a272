"""Knowledge gravity of one layer: how a step of routing moves the keys.

From the self-organizing mixture of experts (SOME): a query pulls the keys of the experts it reached, experts that
served one token pull each other, both the less the more an expert has been used (its mass), and dark energy keeps the
keys from falling into one point. Pure functions of tensors; no gradients, no modules, no state, and on a single device
no host sync. Keys are computed in fp32, what multiplies up over many hits in fp64.

A hit is an expert serving a token. Each is an affine map of the key, so the hits of a step compose in closed form: a
hit weighs its own share times what later hits leave of it, a suffix product, which is a sum of logarithms over the
pairs sorted by expert. `reference_consolidate` is the same step, hit by hit.

T tokens in hit order, K places per token, P = T * K pairs, E experts in slot order, D length of a key, F = 2 forces
(query pull, peer pull).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from living_moe.configuration.sections import PlasticityConfig
from living_moe.modeling_living_moe.distributed import gather_tensors, rank, sum_over_ranks


@dataclass(frozen=True)
class Evidence:
    """Who served which query, on one rank, in one step.

    Attributes:
        query_TD: Queries in hit order, any float dtype.
        index_TK: int64, the experts of each token, in slot order and all different; -1 marks a pair that does not count
            (padding, a place that was not used). The query of a token without a pair that counts may be anything.
    """

    query_TD: Tensor
    index_TK: Tensor


@dataclass(frozen=True)
class Hits:
    """The pairs of a step, sorted by expert, and in hit order for each expert.

    Attributes:
        token_P: The token of each pair.
        expert_P: Its expert; E for pairs that do not count, which come last.
        bounds: (E + 1,), where the pairs of each expert begin, then where those that do not count begin.
        peers_P: How many other experts served the token.
    """

    token_P: Tensor
    expert_P: Tensor
    bounds: Tensor
    peers_P: Tensor

    @property
    def count_E(self) -> Tensor:
        return self.bounds.diff()

    def sums(self, values_FP: Tensor) -> tuple[Tensor, Tensor]:
        """Per expert (F, E), and for each pair over the later pairs of its expert (F, P)."""
        total_FP = values_FP.cumsum(-1)
        until_FE = F.pad(total_FP, (1, 0))[:, self.bounds]
        return until_FE.diff(dim=-1), F.pad(until_FE[:, 1:], (0, 1))[:, self.expert_P] - total_FP

    def weighted(self, vectors_TD: Tensor, weight_P: Tensor) -> Tensor:
        """Per expert the weighted sum of its tokens' vectors, (E, D)."""
        # The last bag, of what does not count, is dropped.
        return F.embedding_bag(
            self.token_P, vectors_TD, self.bounds, mode="sum", per_sample_weights=weight_P.to(vectors_TD.dtype)
        )[:-1]

    def weighted_company(self, keys_ED: Tensor, index_TK: Tensor, weight_P: Tensor) -> Tensor:
        """Per expert the weighted sum, over its tokens, of the sum of all the token's keys, (E, D)."""
        num_experts, width = keys_ED.shape
        index_TK = index_TK.where(index_TK >= 0, num_experts)
        if num_experts < width:
            # Fewer numbers per token: who was there. The keys are multiplied in after the sum over tokens.
            there_TE = keys_ED.new_zeros(len(index_TK), num_experts + 1).scatter_(1, index_TK, 1.0)
            return self.weighted(there_TE, weight_P)[:, :-1] @ keys_ED
        return self.weighted(F.embedding_bag(index_TK, F.pad(keys_ED, (0, 0, 0, 1)), mode="sum"), weight_P)


@torch.no_grad()
def consolidate(
    keys_ED: Tensor,
    start_ED: Tensor,
    hits_E: Tensor,
    load_E: Tensor,
    uid_E: Tensor,
    evidence: Sequence[Evidence],
    config: PlasticityConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the keys of one layer by what its experts served in one step.

    In this order: in hit order, each query pulls the keys it reached, `k += a (q - k)`; then, in token order, the m
    other experts of a token pull each of its experts, from where they were before the step: they decay its key by
    `(1 - b)^m` and divide the rest of the weight equally; then usage is updated; then dark energy acts. `a` and `b` are
    alpha and beta over 1 + usage, usage being the hits so far (those of this step too), the load, or 0. Pulls are
    convex combinations, so no rates in [0, 1) make a key diverge.

    Every rank of the data-parallel world must call it, with empty evidence if it saw nothing. All get the result of one
    process with the evidence of all ranks in rank order.

    Args:
        keys_ED: Keys, any float dtype; shape (E, D).
        start_ED: Where they started; decay may lead back there.
        hits_E: int64, hits of each expert so far.
        load_E: fp32, moving average of hits as multiples of the uniform share.
        uid_E: int64, identities; coincident keys part in directions drawn from them.
        evidence: This rank's evidence, in order; the same K in all of it.
        config: Forces and rates.

    Returns:
        New keys in their dtype, new hits, new load. The arguments are left as they are.
    """
    keys = keys_ED.float()
    query_TD, index_TK = join(evidence, keys)
    hits = sort_pairs(index_TK, keys.shape[0])
    counts = gather_tensors(hits.count_E)
    if alpha_of(config) or beta_of(config):
        earlier_E = hits_E + sum(counts[: rank()])
        keys = keys + pull(keys, query_TD, index_TK, hits, usage(hits, earlier_E, load_E, config), config)
    new_E = torch.stack(counts).sum(dim=0)
    load = update_load(load_E, new_E, config)
    if config.use_decay:
        keys = dark_energy(keys, start_ED, load, uid_E, config)
    return (keys.clone() if keys is keys_ED else keys.to(keys_ED.dtype)), hits_E + new_E, load


def alpha_of(config: PlasticityConfig) -> float:
    return config.alpha if config.use_alpha else 0.0


def beta_of(config: PlasticityConfig) -> float:
    return config.beta if config.use_beta else 0.0


def join(evidence: Sequence[Evidence], keys_ED: Tensor) -> tuple[Tensor, Tensor]:
    """All queries (T, D), fp32, and all indices (T, K)."""
    if not evidence:
        return keys_ED.new_zeros(0, keys_ED.shape[1]), torch.zeros(0, 1, dtype=torch.int64, device=keys_ED.device)
    if len(evidence) == 1:
        return evidence[0].query_TD.detach().float(), evidence[0].index_TK
    return (
        torch.cat([piece.query_TD.detach().float() for piece in evidence]),
        torch.cat([piece.index_TK for piece in evidence]),
    )


def sort_pairs(index_TK: Tensor, num_experts: int) -> Hits:
    counts_TK = index_TK >= 0
    expert_P, order_P = torch.where(counts_TK, index_TK, num_experts).flatten().sort(stable=True)
    token_P = order_P.div(index_TK.shape[1], rounding_mode="floor")
    peers_T = (counts_TK.sum(dim=1) - 1).clamp(min=0)
    experts = torch.arange(num_experts + 1, device=index_TK.device)
    return Hits(token_P, expert_P, torch.searchsorted(expert_P, experts), peers_T[token_P])


def usage(hits: Hits, earlier_E: Tensor, load_E: Tensor, config: PlasticityConfig) -> Tensor:
    """The usage of its expert before each pair, fp64 (P,). `earlier_E`: its hits before those of this rank."""
    if not config.use_inertia:
        return torch.zeros_like(hits.expert_P, dtype=torch.float64)
    if config.usage == "ema":
        return F.pad(load_E, (0, 1))[hits.expert_P].double()
    first_E = F.pad(earlier_E - hits.bounds[:-1], (0, 1))
    return (first_E[hits.expert_P] + torch.arange(len(hits.expert_P), device=first_E.device)).double()


def pull(
    keys_ED: Tensor, query_TD: Tensor, index_TK: Tensor, hits: Hits, usage_P: Tensor, config: PlasticityConfig
) -> Tensor:
    """How far the queries and then the peers, on all ranks, pull each key: (E, D)."""
    mass_P = 1 + usage_P
    query_rate_P, length_T = alpha_of(config) / mass_P, None
    if config.pull == "direction":
        length_T = torch.linalg.vector_norm(query_TD, dim=1)
        query_rate_P = query_rate_P * (length_T > 0)[hits.token_P]
    # What a hit leaves of the key it finds, as a logarithm: 1 - a of a query, (1 - b)^m of m peers together.
    left_FP = torch.stack([torch.log1p(-query_rate_P), torch.log1p(-beta_of(config) / mass_P) * hits.peers_P])
    left_FE, later_FP = hits.sums(left_FP)
    weight_FP = -torch.expm1(left_FP) * later_FP.exp()

    left_RFE = torch.stack(gather_tensors(left_FE))
    query_E, peer_E = left_RFE[rank() + 1 :].sum(dim=0).exp()
    total_query_E, total_peer_E = left_RFE.sum(dim=0)

    pulled_ED = torch.zeros_like(keys_ED)
    if alpha_of(config):
        weight_P, scale_E = weight_FP[0], query_E * total_peer_E.exp()
        if length_T is not None:
            # A pair of a query without a length weighs nothing, so what it is divided by does not matter.
            weight_P = weight_P / torch.where(length_T > 0, length_T, 1.0)[hits.token_P]
            scale_E = scale_E * torch.linalg.vector_norm(keys_ED, dim=1)
        pulled_ED += hits.weighted(query_TD, weight_P) * scale_E.float().unsqueeze(1)
    if beta_of(config):
        weight_P = weight_FP[1] / hits.peers_P.clamp(min=1)
        own_E = hits.sums(weight_P.unsqueeze(0))[0][0]
        # The peers of a token's expert are all the token's experts without that one.
        peers_ED = hits.weighted_company(keys_ED, index_TK, weight_P) - keys_ED * own_E.float().unsqueeze(1)
        pulled_ED += peers_ED * peer_E.float().unsqueeze(1)
    lost_E = -torch.expm1(total_query_E + total_peer_E)
    return sum_over_ranks(pulled_ED) - keys_ED * lost_E.float().unsqueeze(1)


def update_load(load_E: Tensor, new_E: Tensor, config: PlasticityConfig) -> Tensor:
    """The moving average of hits as multiples of the uniform share; a step without any hit changes nothing."""
    total = new_E.sum()
    share_E = new_E * (len(new_E) / total.clamp(min=1)).float()
    return torch.where(total > 0, load_E + (1 - config.usage_decay) * (share_E - load_E), load_E)


def dark_energy(keys_ED: Tensor, start_ED: Tensor, load_E: Tensor, uid_E: Tensor, config: PlasticityConfig) -> Tensor:
    """Keys after the force that counters the pulls; all move at once.

    Decay to the start restores what is not used. Decay to the origin restores nothing: forgotten keys meet there.
    Repulsion keeps the keys from becoming one point, but not pairs of them; it is not scaled by mass, so keys that
    nothing pulls, or that are too heavy to be pulled, go outwards without end: it suits keys whose length does not
    count (cosine similarity, keys of unit length).
    """
    if config.dark_energy == "repulsion":
        return repel(keys_ED, uid_E, config.repulsion)
    forgotten_E1 = (load_E < config.forgetting_threshold).unsqueeze(1)
    target_ED = start_ED.float() if config.decay_target == "start" else torch.zeros_like(keys_ED)
    return torch.where(forgotten_E1, keys_ED + config.decay_rate * (target_ED - keys_ED), keys_ED)


def repel(keys_ED: Tensor, uid_E: Tensor, length: float) -> Tensor:
    """A step of `length` away from the centroid of all other keys; a key that is there has a direction of its own."""
    num_experts, width = keys_ED.shape
    if num_experts == 1:
        return keys_ED
    # In fp64 the sum of equal fp32 keys is exact, so that coincident keys are told from those that are only near.
    keys = keys_ED.double()
    away_ED = num_experts * keys - keys.sum(dim=0)
    length_E1 = torch.linalg.vector_norm(away_ED, dim=1, keepdim=True)
    away_ED = away_ED / torch.where(length_E1 > 0, length_E1, 1.0)
    return keys_ED + length * torch.where(length_E1 > 0, away_ED.float(), unit_directions(uid_E, width))


def unit_directions(uid_E: Tensor, width: int) -> Tensor:
    """A unit vector for each uid, fp32 (E, width): pseudo-random, the same on every device and in every process."""
    # Multiply, shift and mix (the finaliser of splitmix64) in int64, which wraps around.
    mixed_ED = uid_E.unsqueeze(1) * 0x1E3779B97F4A7C15 + torch.arange(1, width + 1, device=uid_E.device)
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        mixed_ED = (mixed_ED ^ ((mixed_ED >> 31) & 0x1FFFFFFFF)) * factor
    # 24 bits, as many as a fp32 number holds, evenly over (-1, 1) and never 0.
    uniform_ED = (((mixed_ED >> 38) & 0xFFFFFF).float() + 0.5) / 2**23 - 1
    return F.normalize(uniform_ED, dim=1)


@torch.no_grad()
def reference_consolidate(
    keys_ED: Tensor,
    start_ED: Tensor,
    hits_E: Tensor,
    load_E: Tensor,
    uid_E: Tensor,
    evidence: Sequence[Evidence],
    config: PlasticityConfig,
    peers: str = "before",
) -> tuple[Tensor, Tensor, Tensor]:
    """`consolidate` hit by hit in Python, in fp64 and one process: the oracle, for tests.

    Args:
        peers: "before": the other experts of a token pull an expert together, from where they were before the step, as
            in `consolidate`. "live": each two experts of a token in turn pull each other, from where they are.
    """
    num_experts = len(keys_ED)
    before = list(keys_ED.double())
    keys = list(before)
    hits = hits_E.tolist()
    rates: list[tuple[list[int], list[float]]] = []
    for query, index in ((q, i) for piece in evidence for q, i in zip(piece.query_TD, piece.index_TK, strict=True)):
        experts = [expert for expert in index.tolist() if expert >= 0]
        bonds = []
        for expert in experts:
            used = {"count": hits[expert], "ema": float(load_E[expert])}[config.usage] if config.use_inertia else 0
            hits[expert] += 1
            bonds.append(beta_of(config) / (1 + used))
            point = query.double()
            if config.pull == "direction":
                if not point.norm():
                    continue
                point = point * (before[expert].norm() / point.norm())
            keys[expert] = keys[expert] + alpha_of(config) / (1 + used) * (point - keys[expert])
        rates.append((experts, bonds))
    for experts, bonds in rates:
        if peers == "live":
            for i, j in combinations(range(len(experts)), 2):
                one, other = experts[i], experts[j]
                gap = keys[other] - keys[one]
                keys[one], keys[other] = keys[one] + bonds[i] * gap, keys[other] - bonds[j] * gap
        elif len(experts) > 1:
            for place, (expert, bond) in enumerate(zip(experts, bonds, strict=True)):
                others = experts[:place] + experts[place + 1 :]
                left = (1 - bond) ** len(others)
                middle = torch.stack([before[other] for other in others]).mean(dim=0)
                keys[expert] = left * keys[expert] + (1 - left) * middle
    new = [now - then for now, then in zip(hits, hits_E.tolist(), strict=True)]
    load = load_E.tolist()
    if sum(new):
        load = [
            config.usage_decay * old + (1 - config.usage_decay) * count * num_experts / sum(new)
            for old, count in zip(load, new, strict=True)
        ]
    if config.use_decay and config.dark_energy == "decay":
        for expert in range(num_experts):
            if load[expert] < config.forgetting_threshold:
                target = start_ED[expert].double() if config.decay_target == "start" else torch.zeros_like(keys[expert])
                keys[expert] = keys[expert] + config.decay_rate * (target - keys[expert])
    elif config.use_decay and num_experts > 1:
        pulled = torch.stack(keys)
        for expert in range(num_experts):
            rest = torch.cat([pulled[:expert], pulled[expert + 1 :]])
            away = pulled[expert] - rest.mean(dim=0)
            direction = away / away.norm() if away.norm() else unit_directions(uid_E[expert : expert + 1], len(away))[0]
            keys[expert] = pulled[expert] + config.repulsion * direction
    return torch.stack(keys).to(keys_ED.dtype), torch.tensor(hits).to(hits_E), torch.tensor(load).to(load_E)
