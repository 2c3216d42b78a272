"""Knowledge gravity: how a step of routing moves the keys of all layers.

From the self-organizing mixture of experts (SOME): a query pulls the keys of the experts it reached, experts that
served one token pull each other, both the less the more an expert has been used (its mass), and dark energy keeps the
keys from falling into one point. Pure functions of tensors; no gradients, no modules, no state, and on a single device
no host sync. Keys are computed in fp32, logarithms of what hits leave too, and added up over many hits in fp64.

A hit is an expert serving a token. Each is an affine map of the key, so the hits of a step compose in closed form: a
hit weighs its own share times what later hits leave of it, a suffix product, which is a sum of logarithms over the
pairs sorted by expert. `reference_consolidate` is the same step, hit by hit.

A step is some eighty small operations, which would take longer than the arithmetic if each layer had its own. So the
pairs of all layers are sorted and weighed together: every layer has a place of its own for pairs that do not count,
hence as many sorted pairs as tokens x K, and its part of them is known without waiting for the device.

T tokens in hit order, K places per token, P = T * K pairs, E experts of a layer in slot order, D length of a key,
F = 2 forces (query pull, peer pull), S places: each layer's experts, then one for what does not count. T and P are over
all layers, layer by layer, where nothing else is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, combinations, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from living_moe.configuration.sections import PlasticityConfig
from living_moe.modeling_living_moe.distributed import gather_tensors, rank, sum_over_ranks
from living_moe.modeling_living_moe.plasticity.contrast import COINCIDENT, TINY, company, push_apart


@dataclass(frozen=True)
class Evidence:
    """Who served which query, in one layer, on one rank, in one step.

    Attributes:
        query_TD: Queries in hit order, any float dtype.
        index_TK: int64, the experts of each token, in slot order and all different; -1 marks a pair that does not count
            (padding, a place that was not used). The query of a token without a pair that counts may be anything.
        full: Whether every pair is known to count, which saves looking.
    """

    query_TD: Tensor
    index_TK: Tensor
    full: bool = False


@dataclass(frozen=True)
class LayerKeys:
    """The keys of one layer and their past.

    Attributes:
        keys_ED: Keys, any float dtype; shape (E, D).
        start_ED: Where they started; decay may lead back there.
        hits_E: int64, hits of each expert so far.
        load_E: fp32, moving average of hits as multiples of the uniform share.
        uid_E: int64, identities; coincident keys part in directions drawn from them.
    """

    keys_ED: Tensor
    start_ED: Tensor
    hits_E: Tensor
    load_E: Tensor
    uid_E: Tensor

    @classmethod
    def cat(cls, parts: Sequence[LayerKeys]) -> LayerKeys:
        """The slabs of a layer, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class LayerSpan:
    """Where one layer's part lies: its `experts` places from `place` on, its tokens, its sorted pairs."""

    experts: int
    place: int
    tokens: slice
    pairs: slice


@dataclass(frozen=True)
class Hits:
    """The pairs of a step, sorted by place, and in hit order at each.

    Attributes:
        token_P: The token of each pair.
        place_P: Its expert's place, or the last of its layer if it does not count.
        bounds: (S + 1,), where the pairs of each place begin, then their number.
        peers_P: How many other experts served the token; one number if all pairs count.
        layers: Where the part of each layer lies.
        full: Whether all pairs count.
    """

    token_P: Tensor
    place_P: Tensor
    bounds: Tensor
    peers_P: Tensor | int
    layers: list[LayerSpan]
    full: bool

    @property
    def count_S(self) -> Tensor:
        return self.bounds.diff()

    def sums(self, values_P: Tensor) -> Tensor:
        """Per place, fp64 (S,)."""
        return F.pad(values_P.cumsum(0, dtype=torch.float64), (1, 0)).index_select(0, self.bounds).diff()

    def sums_and_later(self, values_P: Tensor) -> tuple[Tensor, Tensor]:
        """Per place, fp64 (S,), and for each pair over the later pairs of its place, fp32 (P,)."""
        until_P = values_P.cumsum(0, dtype=torch.float64)
        ends_S = F.pad(until_P, (1, 0)).index_select(0, self.bounds)
        return ends_S.diff(), (ends_S[1:].index_select(0, self.place_P) - until_P).float()

    def weighted(self, vectors: Sequence[Tensor], weight_P: Tensor) -> Tensor:
        """Per place the weighted sum of its tokens' vectors, (S, D); zero for what does not count.

        Args:
            vectors: One per token, (tokens of the layer, D), for each layer: queries are large and stay where they are.
        """
        weight_P = weight_P.to(vectors[0].dtype)
        sums = []
        for span, vectors_TD in zip(self.layers, vectors, strict=True):
            bags = F.embedding_bag(
                self.token_P[span.pairs] - span.tokens.start,
                vectors_TD,
                self.bounds[span.place : span.place + span.experts + 1] - span.pairs.start,
                mode="sum",
                per_sample_weights=weight_P[span.pairs],
            )
            bags[-1] = 0.0
            sums.append(bags)
        return torch.cat(sums)

    def weighted_company(self, keys_SD: Tensor, indices: list[Tensor], weight_P: Tensor) -> Tensor:
        """Per place the weighted sum, over its tokens, of the sum of all the token's keys, (S, D)."""
        keys = [keys_SD[span.place : span.place + span.experts + 1] for span in self.layers]
        if not self.full:
            indices = [
                torch.where(index_TK >= 0, index_TK, span.experts)
                for span, index_TK in zip(self.layers, indices, strict=True)
            ]
        width = max(len(keys_ED) for keys_ED in keys)
        if width > keys_SD.shape[1]:
            company = [F.embedding_bag(*pair, mode="sum") for pair in zip(indices, keys, strict=True)]
            return self.weighted(company, weight_P)
        # Few experts: how much each weighs for each, then one product with the keys.
        with_PK = torch.cat(indices).index_select(0, self.token_P)
        bond_SE = keys_SD.new_zeros(len(keys_SD), width)
        add_at(
            bond_SE.view(-1),
            (self.place_P.unsqueeze(1) * width + with_PK).view(-1),
            weight_P.to(bond_SE.dtype).unsqueeze(1).expand_as(with_PK).reshape(-1),
        )
        bonds = bond_SE.split([len(keys_ED) for keys_ED in keys])
        return torch.cat([mine[:, : len(keys_ED)] @ keys_ED for mine, keys_ED in zip(bonds, keys, strict=True)])


def add_at(sums_N: Tensor, index_M: Tensor, values_M: Tensor) -> None:
    """`sums[index] += values`, in an order that is the same each time."""
    if sums_N.device.type == "cpu":
        # In one dimension this is a plain loop; index_put_ would divide it among threads.
        sums_N.scatter_add_(0, index_M, values_M)
    else:
        # Sorts by index first; scatter_add_ would add atomically.
        sums_N.index_put_((index_M,), values_M, accumulate=True)


@torch.no_grad()
def consolidate(
    layers: Sequence[LayerKeys], evidence: Sequence[Sequence[Evidence]], config: PlasticityConfig
) -> list[LayerKeys]:
    """Move the keys of every layer by what its experts served in one step.

    In this order: in hit order, each query pulls the keys it reached, `k += a (q - k)`; then, in token order, the m
    other experts of a token pull each of its experts, from where they were before the step: they decay its key by
    `(1 - b)^m` and divide the rest of the weight equally; then usage is updated; then dark energy acts, then contrast
    (`contrast.py`). `a` and `b` are alpha and beta over 1 + usage, usage being the hits so far (those of this step
    too), the load, or 0. Pulls are convex combinations, so no rates in [0, 1) make a key diverge.

    Every rank of the data-parallel world must call it, with empty evidence if it saw nothing. All get the result of one
    process with the evidence of all ranks in rank order.

    Args:
        layers: All on one device, of one D.
        evidence: For each layer this rank's evidence, in order.
        config: Forces and rates.

    Returns:
        The layers with new keys in their dtype, new hits, new load. The arguments are left as they are.
    """
    keys_SD = in_places([layer.keys_ED.float() for layer in layers])
    queries, indices, full = join(layers, evidence)
    hits = sort_pairs(indices, [len(layer.keys_ED) for layer in layers], full)
    counts = gather_tensors(hits.count_S)
    moved_SD = keys_SD
    if alpha_of(config) or beta_of(config):
        hits_S, load_S = in_places([layer.hits_E for layer in layers]), in_places([layer.load_E for layer in layers])
        mass_P = mass(hits, hits_S + sum(counts[: rank()]), load_S, config)
        moved_SD = keys_SD + pull(keys_SD, queries, indices, hits, mass_P, config)
    new_S = torch.stack(counts).sum(dim=0)
    together = companies(layers, indices) if config.contrast else [None] * len(layers)
    result: list[LayerKeys] = []
    # Layers of one size that follow each other go together: N of them.
    for experts, group in groupby(zip(layers, hits.layers, together, strict=True), lambda part: part[1].experts):
        some, spans, companies_NEE = zip(*group, strict=True)
        mine = slice(spans[0].place, spans[-1].place + experts + 1)
        keys_NED = moved_SD[mine].unflatten(0, (-1, experts + 1))[:, :experts]
        new_NE = new_S[mine].unflatten(0, (-1, experts + 1))[:, :experts]
        load_NE = update_load(torch.stack([layer.load_E for layer in some]), new_NE, config)
        if config.use_decay:
            start_NED = torch.stack([layer.start_ED for layer in some]).float()
            uid_NE = torch.stack([layer.uid_E for layer in some])
            keys_NED = dark_energy(keys_NED, start_NED, load_NE, uid_NE, config)
        hits_NE = torch.stack([layer.hits_E for layer in some]) + new_NE
        for layer, keys_ED, hits_E, load_E, together_EE in zip(
            some, keys_NED, hits_NE, load_NE, companies_NEE, strict=True
        ):
            if together_EE is not None:
                own_ED = unit_directions(layer.uid_E, keys_ED.shape[1])
                keys_ED = push_apart(keys_ED, own_ED, together_EE, config.contrast, config.contrast_cosine)
            result.append(replace(layer, keys_ED=keys_ED.to(layer.keys_ED.dtype), hits_E=hits_E, load_E=load_E))
    return result


def companies(layers: Sequence[LayerKeys], indices: Sequence[Tensor]) -> list[Tensor | None]:
    """Who served whose tokens on all ranks, (E, E) of each layer; one collective."""
    parts = [company(index_TK, len(layer.keys_ED)) for layer, index_TK in zip(layers, indices, strict=True)]
    sums = sum_over_ranks(torch.cat([part.flatten() for part in parts]))
    flat = sums.split([part.numel() for part in parts])
    return [summed.view_as(part) for summed, part in zip(flat, parts, strict=True)]


def alpha_of(config: PlasticityConfig) -> float:
    return config.alpha if config.use_alpha else 0.0


def beta_of(config: PlasticityConfig) -> float:
    return config.beta if config.use_beta else 0.0


def in_places(columns: Sequence[Tensor]) -> Tensor:
    """Each layer's rows (E, ...), then a zero for what does not count: (S, ...)."""
    nothing = torch.zeros_like(columns[0][:1])
    return torch.cat([part for column in columns for part in (column, nothing)])


def join(
    layers: Sequence[LayerKeys], evidence: Sequence[Sequence[Evidence]]
) -> tuple[list[Tensor], list[Tensor], bool]:
    """For each layer all its queries (T, D), fp32, and indices (T, K), K the largest of any layer; and whether every
    pair is known to count.
    """
    top_k = max((piece.index_TK.shape[1] for pieces in evidence for piece in pieces), default=1)
    full = all(piece.full and piece.index_TK.shape[1] == top_k for pieces in evidence for piece in pieces)
    queries, indices = [], []
    for layer, pieces in zip(layers, evidence, strict=True):
        width, device = layer.keys_ED.shape[1], layer.keys_ED.device
        query_TD = [piece.query_TD.detach().float() for piece in pieces] or [torch.zeros(0, width, device=device)]
        index_TK = [piece.index_TK for piece in pieces] or [torch.zeros(0, top_k, dtype=torch.int64, device=device)]
        if any(part.shape[1] < top_k for part in index_TK):
            index_TK = [F.pad(part, (0, top_k - part.shape[1]), value=-1) for part in index_TK]
        queries.append(query_TD[0] if len(query_TD) == 1 else torch.cat(query_TD))
        indices.append(index_TK[0] if len(index_TK) == 1 else torch.cat(index_TK))
    return queries, indices, full


def sort_pairs(indices: list[Tensor], num_experts: Sequence[int], full: bool) -> Hits:
    """The pairs of all layers. `indices`: (T, K) of each layer, the same K in all; `full`: no index is negative."""
    places = list(accumulate((experts + 1 for experts in num_experts), initial=0))
    tokens = list(accumulate((len(index_TK) for index_TK in indices), initial=0))
    pairs = list(accumulate((index_TK.numel() for index_TK in indices), initial=0))
    layers = [
        LayerSpan(num_experts[i], places[i], slice(*tokens[i : i + 2]), slice(*pairs[i : i + 2]))
        for i in range(len(indices))
    ]
    unsorted_P = torch.cat(
        [
            (
                index_TK + span.place if full else torch.where(index_TK >= 0, index_TK, span.experts) + span.place
            ).flatten()
            for span, index_TK in zip(layers, indices, strict=True)
        ]
    )
    order_P = stable_order(unsorted_P, places[-1])
    place_P = unsorted_P.index_select(0, order_P)
    top_k = indices[0].shape[1]
    token_P = order_P.div(top_k, rounding_mode="floor")
    peers_P: Tensor | int = top_k - 1
    if not full:
        peers_T = ((torch.cat(indices) >= 0).sum(dim=1) - 1).clamp(min=0)
        peers_P = peers_T.index_select(0, token_P)
    bounds = torch.searchsorted(place_P, torch.arange(places[-1] + 1, device=place_P.device))
    return Hits(token_P, place_P, bounds, peers_P, layers, full)


def stable_order(values_N: Tensor, bound: int) -> Tensor:
    """The permutation that sorts values in [0, bound), equal ones in the order they have."""
    if values_N.device.type == "cpu" and bound <= 2**16:
        # NumPy has a radix sort for 16 bits: a sixth of the time of torch's.
        return torch.from_numpy(values_N.to(torch.uint16).numpy().argsort(kind="stable"))
    return values_N.argsort(stable=True)


def mass(hits: Hits, earlier_S: Tensor, load_S: Tensor, config: PlasticityConfig) -> Tensor:
    """One more than the usage of its expert before each pair, fp32 (P,).

    Args:
        earlier_S: Hits before those of this rank.
    """
    if not config.use_inertia:
        return torch.ones_like(hits.place_P, dtype=torch.float32)
    if config.usage == "ema":
        return (1 + load_S).index_select(0, hits.place_P)
    first_S = 1 + earlier_S - hits.bounds[:-1]
    rank_P = torch.arange(len(hits.place_P), device=first_S.device)
    return (first_S.index_select(0, hits.place_P) + rank_P).float()


def pull(
    keys_SD: Tensor,
    queries: Sequence[Tensor],
    indices: list[Tensor],
    hits: Hits,
    mass_P: Tensor,
    config: PlasticityConfig,
) -> Tensor:
    """How far the queries and then the peers, on all ranks, pull each key: (S, D)."""
    query_rate_P, length_P = alpha_of(config) / mass_P, None
    if config.pull == "direction":
        length_T = torch.cat([torch.linalg.vector_norm(query_TD, dim=1) for query_TD in queries])
        length_P = length_T.index_select(0, hits.token_P)
        query_rate_P = query_rate_P * (length_P > 0)
    # What a hit leaves of the key it finds, as a logarithm: 1 - a of a query, (1 - b)^m of m peers together.
    peer_left_P = torch.log1p(-beta_of(config) / mass_P) * hits.peers_P
    query_left_S, query_later_P = hits.sums_and_later(torch.log1p(-query_rate_P))
    peer_left_S, peer_later_P = hits.sums_and_later(peer_left_P)

    left_RFS = torch.stack(gather_tensors(torch.stack([query_left_S, peer_left_S])))
    query_S, peer_S = left_RFS[rank() + 1 :].sum(dim=0).exp()
    total_query_S, total_peer_S = left_RFS.sum(dim=0)

    pulled_SD, held_S = torch.zeros_like(keys_SD), torch.zeros_like(query_S)
    if alpha_of(config):
        weight_P, scale_S = query_rate_P * query_later_P.exp(), query_S * total_peer_S.exp()
        if length_P is not None:
            # A pair of a query without a length weighs nothing, so what it is divided by does not matter.
            weight_P = weight_P / torch.where(length_P > 0, length_P, 1.0)
            scale_S = scale_S * torch.linalg.vector_norm(keys_SD, dim=1)
        pulled_SD = hits.weighted(queries, weight_P).mul_(scale_S.float().unsqueeze(1))
    if beta_of(config):
        sharing = max(1, hits.peers_P) if isinstance(hits.peers_P, int) else hits.peers_P.clamp(min=1)
        weight_P = -torch.expm1(peer_left_P) * peer_later_P.exp() / sharing
        pulled_SD.addcmul_(hits.weighted_company(keys_SD, indices, weight_P), peer_S.float().unsqueeze(1))
        # The peers of a token's expert are all the token's experts without that one.
        held_S = hits.sums(weight_P) * peer_S
    lost_S = sum_over_ranks(held_S) - torch.expm1(total_query_S + total_peer_S)
    return sum_over_ranks(pulled_SD).addcmul_(keys_SD, lost_S.float().unsqueeze(1), value=-1)


def update_load(load_NE: Tensor, new_NE: Tensor, config: PlasticityConfig) -> Tensor:
    """The moving average of hits as multiples of the uniform share; a step without any hit in a layer changes nothing
    there.
    """
    total_N1 = new_NE.sum(dim=1, keepdim=True)
    share_NE = new_NE * (new_NE.shape[1] / total_N1.clamp(min=1))
    return load_NE.lerp(share_NE, (1 - config.usage_decay) * (total_N1 > 0))


def dark_energy(
    keys_NED: Tensor, start_NED: Tensor, load_NE: Tensor, uid_NE: Tensor, config: PlasticityConfig
) -> Tensor:
    """Keys after the force that counters the pulls; all move at once.

    Decay to the start restores what is not used. Decay to the origin restores nothing: forgotten keys meet there.
    Repulsion keeps the keys from becoming one point, but not pairs of them; it is not scaled by mass, so keys that
    nothing pulls, or that are too heavy to be pulled, go outwards without end: it suits keys whose length does not
    count (cosine similarity, keys of unit length).
    """
    if config.dark_energy == "repulsion":
        return repel(keys_NED, uid_NE, config.repulsion)
    target_NED = start_NED if config.decay_target == "start" else torch.zeros_like(keys_NED)
    return keys_NED.lerp(target_NED, config.decay_rate * (load_NE < config.forgetting_threshold).unsqueeze(2))


def repel(keys_NED: Tensor, uid_NE: Tensor, length: float) -> Tensor:
    """A step of `length` away from the centroid of all other keys of the layer; a key that is there has a direction of
    its own.
    """
    _, num_experts, width = keys_NED.shape
    if num_experts == 1:
        return keys_NED
    # In fp64 the sum of equal fp32 keys is exact, so that coincident keys are told from those that are only near.
    keys = keys_NED.double()
    away_NED = num_experts * keys - keys.sum(dim=1, keepdim=True)
    length_NE1 = torch.linalg.vector_norm(away_NED, dim=2, keepdim=True)
    away_NED = away_NED / torch.where(length_NE1 > 0, length_NE1, 1.0)
    own_NED = unit_directions(uid_NE.flatten(), width).view_as(keys_NED)
    return keys_NED + length * torch.where(length_NE1 > 0, away_NED.float(), own_NED)


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
    layer: LayerKeys, evidence: Sequence[Evidence], config: PlasticityConfig, peers: str = "before"
) -> LayerKeys:
    """`consolidate` for one layer, hit by hit in Python, in fp64 and one process: the oracle, for tests.

    Args:
        peers: "before": the other experts of a token pull an expert together, from where they were before the step, as
            in `consolidate`. "live": each two experts of a token in turn pull each other, from where they are.
    """
    num_experts = len(layer.keys_ED)
    before = list(layer.keys_ED.double())
    keys = list(before)
    hits = layer.hits_E.tolist()
    rates: list[tuple[list[int], list[float]]] = []
    for query, index in ((q, i) for piece in evidence for q, i in zip(piece.query_TD, piece.index_TK, strict=True)):
        experts = [expert for expert in index.tolist() if expert >= 0]
        bonds = []
        for expert in experts:
            used = (
                {"count": hits[expert], "ema": float(layer.load_E[expert])}[config.usage] if config.use_inertia else 0
            )
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
    new = [now - then for now, then in zip(hits, layer.hits_E.tolist(), strict=True)]
    load = layer.load_E.tolist()
    if sum(new):
        load = [
            config.usage_decay * old + (1 - config.usage_decay) * count * num_experts / sum(new)
            for old, count in zip(load, new, strict=True)
        ]
    if config.use_decay and config.dark_energy == "decay":
        for expert in range(num_experts):
            if load[expert] < config.forgetting_threshold:
                start = layer.start_ED[expert].double()
                target = start if config.decay_target == "start" else torch.zeros_like(start)
                keys[expert] = keys[expert] + config.decay_rate * (target - keys[expert])
    elif config.use_decay and num_experts > 1:
        pulled = torch.stack(keys)
        for expert in range(num_experts):
            rest = torch.cat([pulled[:expert], pulled[expert + 1 :]])
            away = pulled[expert] - rest.mean(dim=0)
            own = unit_directions(layer.uid_E[expert : expert + 1], len(away))[0]
            direction = away / away.norm() if away.norm() else own
            keys[expert] = pulled[expert] + config.repulsion * direction
    if config.contrast:
        keys = _reference_push(keys, layer.uid_E, [experts for experts, _ in rates], config)
    return replace(
        layer,
        keys_ED=torch.stack(keys).to(layer.keys_ED.dtype),
        hits_E=torch.tensor(hits).to(layer.hits_E),
        load_E=torch.tensor(load).to(layer.load_E),
    )


def _reference_push(
    keys: list[Tensor], uid_E: Tensor, served: Sequence[list[int]], config: PlasticityConfig
) -> list[Tensor]:
    """`push_apart`, pair by pair."""
    alone = [sum(expert in experts for experts in served) for expert in range(len(keys))]
    after = []
    for i, key in enumerate(keys):
        push = torch.zeros_like(key)
        unit = key / key.norm() if key.norm() else key
        for j, other in enumerate(keys):
            if i == j or not alone[i] or not alone[j]:
                continue
            theirs = other / other.norm() if other.norm() else other
            cosine = unit @ theirs
            share = sum(i in experts and j in experts for experts in served) / min(alone[i], alone[j])
            away = cosine * unit - theirs
            if 1 - cosine**2 < COINCIDENT:
                mine, its = (own - (own @ unit) * unit for own in unit_directions(uid_E[[i, j]], len(key)).double())
                away = mine - its
            if away.norm() > TINY:
                push = push + (1 - share) * max(float(cosine) - config.contrast_cosine, 0.0) * away / away.norm()
        if push.norm():
            angle = config.contrast * min(float(push.norm()), 1.0)
            key = key.norm() * (math.cos(angle) * unit + math.sin(angle) * push / push.norm())
        after.append(key)
    return after
