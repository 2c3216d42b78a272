"""Search of a large store of routing keys, for a router of up to 100,000 and more experts per layer.

The scale is that of product keys (Lample et al. 2019, arXiv:1907.05242) and PEER (He 2024, arXiv:2407.04153), but keys
here are free vectors that move, come and go, so the index is an inverted file (IVF): centroids first, then the keys of
the few nearest clusters. It follows the store row by row instead of being built anew. Clusters come of spherical
k-means: keys of one lineage point the same way, whatever their lengths.

A search proposes rows and never scores for the model: the router scores the candidates again, differentiably. Nothing
here takes gradients, is saved, or changes a key; an index is derived from the keys, so copies build their own.

T queries, N keys, D length of a key, C clusters, P pairs of a query and a cluster it probes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import RouterConfig

logger = logging.get_logger(__name__)

#: Centroids per square root of N. Four halve the recall lost with one, at the same time on a CPU.
CLUSTERS_PER_ROOT = 4
KMEANS_ITERATIONS = 8
KMEANS_SAMPLES_PER_CLUSTER = 32
#: A cluster larger than this multiple of the mean is split, so that a probe costs a bounded number of products.
LARGEST_TO_MEAN = 4
FIRST_PROBES, MOST_PROBES = 2, 16
#: Rows scored or compared at once where all of them together would need too much memory.
CHUNK = 8192
#: Multiply-adds per cluster, in the mean, below which a CPU multiplies with one thread (about 0.1 ms).
SMALL_PRODUCT = 2**22
#: Queries per small matrix product, and floats of keys gathered at once, on an accelerator.
TILE_QUERIES, TILE_FLOATS = 16, 2**26

#: Calls from one measurement of recall to the next, and queries that one measurement looks at.
MEASURE_EVERY, MEASURED_QUERIES = 8, 16
#: Weight of the past in the moving average, and measurements from which it is taken at its word.
RECALL_MEMORY, SURE_AFTER = 0.95, 8
#: Calls on the exact path before the index is tried again.
RETRY_AFTER = 64


class KeySearch(Protocol):
    """Finds the keys that have the largest dot products with a query. Searches the keys of the last `sync`."""

    def search(self, query_TD: Tensor, count: int) -> Tensor:
        """Rows of candidate keys, best first: int64 (T, count), -1 where fewer were found."""

    def sync(self, keys_ND: Tensor) -> None:
        """Make the index follow the store `keys_ND`: rows that changed, were appended or removed."""

    def widen(self) -> bool:
        """Look at more keys per query from now on; False if it cannot."""


class ExactSearch:
    """Scores every key: the oracle of the others."""

    def __init__(self) -> None:
        self.keys_ND = torch.empty(0, 0)

    @torch.no_grad()
    def search(self, query_TD: Tensor, count: int) -> Tensor:
        if not len(self.keys_ND):
            return torch.full((len(query_TD), count), -1, device=query_TD.device)
        found = (query_TD.detach().float() @ self.keys_ND.T).topk(min(count, len(self.keys_ND)))[1]
        return F.pad(found, (0, count - found.shape[1]), value=-1)

    def sync(self, keys_ND: Tensor) -> None:
        self.keys_ND = keys_ND.detach().float()

    def widen(self) -> bool:
        return False


class Watch:
    """Tells whether a tensor is the one seen last and was not written to since, without reading it.

    Fused optimizers write without counting a version, so a tensor that takes gradients is never known to be unchanged
    where gradients are taken, nor at the first call after that. Ask outside of `no_grad`.
    """

    def __init__(self) -> None:
        self.owner: weakref.ref[Tensor] | None = None
        self.stamp: tuple[Any, ...] = ()

    def unchanged(self, keys_ND: Tensor) -> bool:
        """Also remembers the tensor. A slice is new at every call: its base and place say whether it is the same."""
        if (keys_ND.requires_grad and torch.is_grad_enabled()) or keys_ND.is_inference():  # those have no version
            self.owner = None
            return False
        base = keys_ND if keys_ND._base is None else keys_ND._base
        stamp = (keys_ND.data_ptr(), keys_ND.shape, keys_ND.stride(), keys_ND.dtype, keys_ND._version)
        same = self.owner is not None and self.owner() is base and self.stamp == stamp
        self.owner, self.stamp = weakref.ref(base), stamp
        return same


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that meet after every small product cost more than they save, many times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TwoStageSearch:
    """Inverted file in plain torch: scores queries against centroids, then against the keys of the best clusters.

    Keys lie sorted by cluster, so a cluster is a slice and a probe a small matrix product; that copy is also what
    `sync` compares the store with. A first-stage score is the product with the cluster's direction, times the
    largest norm of its keys: with keys of one length the cosine, with others the best dot product to hope for.

    Args:
        seed: Of the sample and the start of k-means. Same keys, edits and seed: same index.

    Attributes:
        probes: Clusters scored per query.
        builds: How often all clusters were made anew.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.probes = FIRST_PROBES
        self.builds = 0
        self.watch = Watch()
        self.packed_ND = torch.empty(0, 0)
        self.row_N = self.position_N = self.cluster_N = torch.empty(0, dtype=torch.int64)
        self.norm_N = torch.empty(0)
        self.sum_CD = torch.empty(0, 0)
        self.relocated = 0

    # -- following the store -------------------------------------------------------------------------------------------

    def sync(self, keys_ND: Tensor) -> None:
        """Take over what changed in `keys_ND` (N, D), any float dtype.

        Changed and new keys are assigned to their best clusters and the sums behind the centroids updated. All clusters
        are made anew once more than half of the keys came, went or changed cluster: drift within a cluster does not
        make a clustering worse.
        """
        if not self.watch.unchanged(keys_ND):
            # Tables made in inference mode could not be changed outside of it.
            with torch.inference_mode(False):
                self._follow(keys_ND.detach().float())

    @torch.no_grad()
    def _follow(self, keys_ND: Tensor) -> None:
        if not len(self.packed_ND) or not len(keys_ND) or keys_ND.shape[1] != self.packed_ND.shape[1]:
            return self._build(keys_ND)
        if keys_ND.device != self.packed_ND.device:
            return self._build(keys_ND)

        before, now = len(self.packed_ND), len(keys_ND)
        changed = self._changed_rows(keys_ND)
        fresh = torch.cat([changed, torch.arange(before, max(before, now), device=keys_ND.device)])
        stale = torch.cat([changed, torch.arange(min(before, now), before, device=keys_ND.device)])
        if not len(fresh) and not len(stale):
            return
        target = assign(unit(keys_ND[fresh]), self.centroids())
        self.relocated += int((target[: len(changed)] != self.cluster_N[changed]).sum()) + abs(now - before)
        if 2 * self.relocated > now:
            return self._build(keys_ND)

        self.sum_CD.index_add_(0, self.cluster_N[stale], unit(self.packed_ND[self.position_N[stale]]), alpha=-1)
        self.sum_CD.index_add_(0, target, unit(keys_ND[fresh]))
        cluster_N = self.cluster_N.new_empty(now)
        kept = min(before, now)
        cluster_N[:kept] = self.cluster_N[:kept]
        cluster_N[fresh] = target
        norm_N = self.norm_N.new_empty(now)
        norm_N[:kept] = self.norm_N[:kept]
        norm_N[fresh] = keys_ND[fresh].norm(dim=1)
        self.cluster_N, self.norm_N = cluster_N, norm_N
        self._pack(keys_ND)

    def _changed_rows(self, keys_ND: Tensor) -> Tensor:
        """Rows of both stores whose keys differ, ascending."""
        parts = [torch.empty(0, dtype=torch.bool, device=keys_ND.device)]
        for start in range(0, min(len(keys_ND), len(self.packed_ND)), CHUNK):
            chunk = keys_ND[start : start + CHUNK]
            position = self.position_N[start : start + len(chunk)]
            parts.append((self.packed_ND.index_select(0, position) != chunk[: len(position)]).any(dim=1))
        return torch.cat(parts).nonzero()[:, 0]

    def _build(self, keys_ND: Tensor) -> None:
        count = max(1, min(len(keys_ND), round(CLUSTERS_PER_ROOT * math.sqrt(len(keys_ND)))))
        self.builds += 1
        self.relocated = 0
        self.norm_N = keys_ND.norm(dim=1)
        if not len(keys_ND):
            self.cluster_N, self.sum_CD = keys_ND.new_empty(0, dtype=torch.int64), torch.zeros_like(keys_ND)
            return self._pack(keys_ND)
        generator = torch.Generator().manual_seed(self.seed)
        sample = torch.randperm(len(keys_ND), generator=generator)[: KMEANS_SAMPLES_PER_CLUSTER * count]
        centroid_CD = spherical_kmeans(unit(keys_ND[sample.to(keys_ND.device)]), count)
        self.cluster_N = assign(unit(keys_ND), centroid_CD)
        self.sum_CD = torch.zeros_like(centroid_CD).index_add_(0, self.cluster_N, unit(keys_ND))
        self._pack(keys_ND)

    def _pack(self, keys_ND: Tensor) -> None:
        """Split what is too large, and lay the keys out by cluster."""
        self._split_large(keys_ND)
        size_C = torch.bincount(self.cluster_N, minlength=len(self.sum_CD))
        self.sum_CD[size_C == 0] = 0.0  # not what rounding left of keys that went
        self.row_N = self.cluster_N.argsort(stable=True)
        self.position_N = torch.empty_like(self.row_N)
        self.position_N[self.row_N] = torch.arange(len(self.row_N), device=self.row_N.device)
        self.packed_ND = keys_ND.index_select(0, self.row_N)
        self.size_C, self.start_C = size_C, size_C.cumsum(0) - size_C
        self.sizes = size_C.tolist()
        norm_C = self.norm_N.new_zeros(len(size_C)).scatter_reduce_(0, self.cluster_N, self.norm_N, "amax")
        self.probe_CD = self.centroids() * norm_C.unsqueeze(1)
        self.empty_C = norm_C.new_zeros(len(size_C)).masked_fill_(size_C == 0, -math.inf)

    def _split_large(self, keys_ND: Tensor) -> None:
        if not len(keys_ND):
            return
        # Against the number of clusters aimed at: against their present number every split would call for more.
        aimed_at = max(1.0, CLUSTERS_PER_ROOT * math.sqrt(len(keys_ND)))
        bound = max(8, math.ceil(LARGEST_TO_MEAN * len(keys_ND) / aimed_at))
        size_C = torch.bincount(self.cluster_N, minlength=len(self.sum_CD))
        queue = (size_C > bound).nonzero()[:, 0].tolist()
        members = {cluster: (self.cluster_N == cluster).nonzero()[:, 0] for cluster in queue}
        added: list[Tensor] = []
        while queue:
            cluster = queue.pop()
            rows = members.pop(cluster)
            unit_MD = unit(keys_ND[rows])
            right = split_in_two(unit_MD)
            newborn = len(self.sum_CD) + len(added)
            self.cluster_N[rows[right]] = newborn
            added.append(torch.zeros_like(self.sum_CD[0]))
            for part, side in ((cluster, ~right), (newborn, right)):
                total = unit_MD[side].sum(dim=0)
                if part < len(self.sum_CD):
                    self.sum_CD[part] = total
                else:
                    added[part - len(self.sum_CD)] = total
                if int(side.sum()) > bound:
                    queue.append(part)
                    members[part] = rows[side]
        if added:
            self.sum_CD = torch.cat([self.sum_CD, torch.stack(added)])

    def centroids(self) -> Tensor:
        """Directions of the clusters, (C, D)."""
        return unit(self.sum_CD)

    # -- searching -----------------------------------------------------------------------------------------------------

    def widen(self) -> bool:
        if self.probes >= min(MOST_PROBES, len(self.sum_CD)):
            return False
        self.probes *= 2
        return True

    @torch.no_grad()
    def search(self, query_TD: Tensor, count: int) -> Tensor:
        query_TD = query_TD.detach().float()
        tokens, probes = len(query_TD), min(self.probes, len(self.sum_CD))
        if not tokens or not len(self.packed_ND):
            return torch.full((tokens, count), -1, device=query_TD.device)
        probed_TC = torch.addmm(self.empty_C, query_TD, self.probe_CD.T).topk(probes, sorted=False)[1]
        # Pairs in the order of their clusters: the queries of a cluster are a slice, too.
        cluster_P, order_P = probed_TC.flatten().sort(stable=True)
        query_PD = query_TD[order_P // probes]
        scan = self._scan_slices if query_TD.device.type == "cpu" else self._scan_tiles
        score_PK, column_PK = scan(query_PD, cluster_P, min(count, max(self.sizes)))
        position_PK = self.start_C[cluster_P].unsqueeze(1) + column_PK
        # Padding may point past the last key; its score says that it is none.
        row_PK = self.row_N[position_PK.clamp_max(len(self.row_N) - 1)].masked_fill_(score_PK == -math.inf, -1)
        back_P = torch.empty_like(order_P)
        back_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        score_TJ, row_TJ = score_PK[back_P].view(tokens, -1), row_PK[back_P].view(tokens, -1)
        best = score_TJ.topk(min(count, score_TJ.shape[1]))[1]
        found = row_TJ.gather(1, best)
        return F.pad(found, (0, count - found.shape[1]), value=-1)

    def _scan_slices(self, query_PD: Tensor, cluster_P: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Best scores and their columns within the cluster, (P, count): one matrix product per cluster, for a CPU."""
        score_PM = query_PD.new_full((len(query_PD), max(self.sizes)), -math.inf)
        queries = torch.bincount(cluster_P, minlength=len(self.sizes)).tolist()
        keys = self.packed_ND.split(self.sizes)
        small = query_PD.numel() * len(self.packed_ND) < SMALL_PRODUCT * len(keys) ** 2
        with one_thread() if small else nullcontext():
            for asked, query_QD, score_QM, key_MD in zip(
                queries, query_PD.split(queries), score_PM.split(queries), keys, strict=True
            ):
                if asked and len(key_MD):
                    torch.mm(query_QD, key_MD.T, out=score_QM[:, : len(key_MD)])
        score_PK, column_PK = score_PM.topk(count, sorted=False)
        return score_PK, column_PK

    def _scan_tiles(self, query_PD: Tensor, cluster_P: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The same by batched products over tiles of queries of one cluster: few launches, for an accelerator."""
        device = query_PD.device
        queries_C = torch.bincount(cluster_P, minlength=len(self.sizes))
        tiles_C = (queries_C + TILE_QUERIES - 1) // TILE_QUERIES
        cluster_L = torch.repeat_interleave(torch.arange(len(tiles_C), device=device), tiles_C)
        nth_L = torch.arange(len(cluster_L), device=device) - (tiles_C.cumsum(0) - tiles_C)[cluster_L]
        first_L = (queries_C.cumsum(0) - queries_C)[cluster_L] + nth_L * TILE_QUERIES
        pair_LQ = first_L.unsqueeze(1) + torch.arange(TILE_QUERIES, device=device)
        asked_LQ = pair_LQ < queries_C.cumsum(0)[cluster_L].unsqueeze(1)
        column_M = torch.arange(max(self.sizes), device=device)
        score_PK = query_PD.new_empty(len(query_PD), count)
        column_PK = cluster_P.new_empty(len(query_PD), count)
        step = max(1, TILE_FLOATS // (len(column_M) * query_PD.shape[1]))
        for start in range(0, len(cluster_L), step):
            tile = slice(start, start + step)
            key_LM = (self.start_C[cluster_L[tile]].unsqueeze(1) + column_M).clamp_max(len(self.packed_ND) - 1)
            query_LQD = query_PD[pair_LQ[tile].clamp_max(len(query_PD) - 1)]
            score_LQM = torch.bmm(query_LQD, self.packed_ND[key_LM].transpose(1, 2))
            padding_LM = column_M >= self.size_C[cluster_L[tile]].unsqueeze(1)
            score, column = score_LQM.masked_fill_(padding_LM.unsqueeze(1), -math.inf).topk(count, sorted=False)
            asked = asked_LQ[tile]
            pair = pair_LQ[tile][asked]
            score_PK[pair], column_PK[pair] = score[asked], column[asked]
        return score_PK, column_PK


def unit(x_ND: Tensor) -> Tensor:
    return F.normalize(x_ND, dim=-1)


def assign(unit_ND: Tensor, centroid_CD: Tensor) -> Tensor:
    """int64 (N,): the centroid of the largest cosine."""
    parts = [(chunk @ centroid_CD.T).argmax(dim=1) for chunk in unit_ND.split(CHUNK)]
    return torch.cat(parts)


def spherical_kmeans(unit_SD: Tensor, count: int) -> Tensor:
    """Directions (count, D) of clusters of `unit_SD`, whose order is random: the first rows are the start.

    A cluster that runs empty starts again from a row that its own centroid fits worst.
    """
    centroid_CD = unit_SD[:count].clone()
    for _ in range(KMEANS_ITERATIONS):
        best = [(chunk @ centroid_CD.T).max(dim=1) for chunk in unit_SD.split(CHUNK)]
        cosine_S, cluster_S = torch.cat([b[0] for b in best]), torch.cat([b[1] for b in best])
        centroid_CD = unit(torch.zeros_like(centroid_CD).index_add_(0, cluster_S, unit_SD))
        empty = (torch.bincount(cluster_S, minlength=count) == 0).nonzero()[:, 0]
        centroid_CD[empty] = unit_SD[cosine_S.argsort(stable=True)[: len(empty)]]
    return centroid_CD


def split_in_two(unit_MD: Tensor) -> Tensor:
    """Bool (M,), true for the second part: 2-means, or halves along its axis where one part would be small.

    The halves also end the splitting of keys that are all the same.
    """
    left, right = unit_MD[0], unit_MD[(unit_MD @ unit_MD[0]).argmin()]
    for _ in range(3):
        height_M = unit_MD @ (right - left)
        side_M = height_M > 0
        left, right = unit(unit_MD[~side_M].sum(dim=0)), unit(unit_MD[side_M].sum(dim=0))
    smaller = min(int(side_M.sum()), int((~side_M).sum()))
    if 8 * smaller < len(unit_MD):
        side_M = torch.zeros_like(side_M)
        side_M[height_M.argsort(stable=True)[len(unit_MD) // 2 :]] = True
    return side_M


class FaissSearch:
    """An index of the FAISS library (Douze et al. 2024, arXiv:2401.08281) on the CPU, for comparison.

    FAISS cannot move or remove keys of an HNSW graph: a changed key is added again and its old entry no longer counts.
    More than half of the entries dead: the index is built anew.

    Args:
        kind: "hnsw" (Malkov & Yashunin 2016, arXiv:1603.09320) or "ivf".

    Raises:
        ConfigurationError: FAISS is not installed, or the kind is unknown.
    """

    def __init__(self, kind: str, seed: int = 0) -> None:
        if kind not in ("hnsw", "ivf"):
            raise ConfigurationError(f"kind of a FAISS index is {kind!r}; choose 'hnsw' or 'ivf'.")
        try:
            import faiss  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise ConfigurationError(
                f"router.search = 'faiss_{kind}' needs FAISS, which is not installed; "
                "`pip install living_moe[search]`, or choose router.search = 'auto'."
            ) from error
        self.faiss: Any = faiss
        self.kind, self.seed = kind, seed
        self.watch = Watch()
        self.index: Any = None
        self.keys_ND = torch.empty(0, 0)
        self.row_of_entry = self.entry_of_row = torch.empty(0, dtype=torch.int64)
        self.width = FIRST_PROBES if kind == "ivf" else 32
        self.builds = 0

    def sync(self, keys_ND: Tensor) -> None:
        if not self.watch.unchanged(keys_ND):
            self._follow(keys_ND.detach().to("cpu", torch.float32, copy=True).contiguous())

    def _follow(self, keys_ND: Tensor) -> None:
        if self.index is None or keys_ND.shape[1] != self.keys_ND.shape[1] or not len(keys_ND):
            return self._build(keys_ND)
        kept = min(len(keys_ND), len(self.keys_ND))
        changed = (keys_ND[:kept] != self.keys_ND[:kept]).any(dim=1).nonzero()[:, 0]
        fresh = torch.cat([changed, torch.arange(kept, len(keys_ND))])
        stale = torch.cat([changed, torch.arange(kept, len(self.keys_ND))])
        entries = len(self.row_of_entry) + len(fresh)
        if entries > 2 * len(keys_ND):
            return self._build(keys_ND)
        self.row_of_entry[self.entry_of_row[stale]] = -1
        entry = torch.arange(len(self.row_of_entry), entries)
        self.row_of_entry = torch.cat([self.row_of_entry, fresh])
        self.entry_of_row = F.pad(self.entry_of_row[:kept], (0, len(keys_ND) - kept))
        self.entry_of_row[fresh] = entry
        self.keys_ND = keys_ND
        if len(fresh):
            self.index.add(keys_ND[fresh].numpy())

    def _build(self, keys_ND: Tensor) -> None:
        self.builds += 1
        self.keys_ND = keys_ND
        self.row_of_entry, self.entry_of_row = torch.arange(len(keys_ND)), torch.arange(len(keys_ND))
        self.index = None
        if not len(keys_ND):
            return
        metric, length = self.faiss.METRIC_INNER_PRODUCT, keys_ND.shape[1]
        if self.kind == "hnsw":
            self.index = self.faiss.IndexHNSWFlat(length, 32, metric)
        else:
            self.quantizer = self.faiss.IndexFlatIP(length)  # FAISS keeps no reference to it
            lists = max(1, min(len(keys_ND), round(CLUSTERS_PER_ROOT * math.sqrt(len(keys_ND)))))
            self.index = self.faiss.IndexIVFFlat(self.quantizer, length, lists, metric)
            self.index.cp.seed = self.seed
            self.index.cp.min_points_per_centroid = 1
            self.index.train(keys_ND.numpy())
        self.index.add(keys_ND.numpy())

    def widen(self) -> bool:
        if self.width >= (MOST_PROBES if self.kind == "ivf" else 256):
            return False
        self.width *= 2
        return True

    @torch.no_grad()
    def search(self, query_TD: Tensor, count: int) -> Tensor:
        if self.index is None or not len(query_TD):
            return torch.full((len(query_TD), count), -1, device=query_TD.device)
        # Dead entries take places, in the mean as many as their share.
        asked = min(len(self.row_of_entry), math.ceil(count * len(self.row_of_entry) / len(self.keys_ND)))
        if self.kind == "hnsw":
            self.index.hnsw.efSearch = max(self.width, asked)
        else:
            self.index.nprobe = self.width
        _, entry = self.index.search(query_TD.detach().to("cpu", torch.float32).contiguous().numpy(), asked)
        entry_TA = torch.from_numpy(entry)
        row_TA = self.row_of_entry[entry_TA.clamp_min(0)].masked_fill_(entry_TA < 0, -1)
        # The living to the front, in their order.
        row_TA = row_TA.gather(1, (row_TA < 0).to(torch.uint8).argsort(dim=1, stable=True))[:, :count]
        return F.pad(row_TA, (0, count - row_TA.shape[1]), value=-1).to(query_TD.device)


class KeyStoreSearch:
    """What a router holds, one per layer: the search its config names, as long as that finds what it should.

    Recall of the `top_k` best keys is measured every eighth call. Below `min_recall` the index looks at more keys per
    query, then gives way to the exact path, with one warning; after 64 exact calls it is tried again. What is measured
    are queries of earlier calls: if those of a call decided how it is answered, later tokens would reach earlier ones.
    So the first call only remembers, and compares every key. A copy of this object (deepcopy, pickle) starts anew.

    Attributes:
        mode: What the last call used: exact, two_stage, faiss_hnsw or faiss_ivf.
        recall: Moving average; None before the first measurement.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.mode = "exact"
        self.recall: float | None = None
        self.index: KeySearch | None = None
        if config.search.startswith("faiss_"):
            self.index = FaissSearch(config.search.removeprefix("faiss_"))
        self.gave_up = self.warned = False
        self._start_over()

    def __reduce__(self) -> tuple[type[KeyStoreSearch], tuple[RouterConfig]]:
        return KeyStoreSearch, (self.config,)

    def _start_over(self) -> None:
        self.calls = self.exact_calls = self.measured = 0
        self.recall = None
        self.past_SD: Tensor | None = None

    def candidates(self, query_TD: Tensor, keys_ND: Tensor, count: int, top_k: int = 1) -> Tensor | None:
        """Rows of the keys worth scoring.

        Args:
            query_TD: Queries (T, D), any float dtype; with cosine similarity the caller normalises queries and keys.
            keys_ND: The store. One without gradients (or a slice of one) that was not written to since the last call
                costs nothing to follow.
            count: Candidates per query.
            top_k: Experts finally chosen, whose recall is measured; at most `count`.

        Returns:
            int64 (T, count), best first, -1 where fewer were found. None: score all keys, there are too few for a
            search to be faster, or it misses too many.
        """
        config = self.config
        if config.search == "exact" or (config.search == "auto" and keys_ND.shape[0] < config.search_from):
            self.mode = "exact"
            return None
        return self._candidates(query_TD, keys_ND, count, top_k)

    @torch.compiler.disable
    def _candidates(self, query_TD: Tensor, keys_ND: Tensor, count: int, top_k: int) -> Tensor | None:
        # Gradient checkpointing runs a forward pass again during backward: it must find what it found the first time.
        again = torch._C._current_graph_task_id() != -1
        if self.gave_up:
            self.exact_calls += not again
            if again or self.exact_calls <= RETRY_AFTER:
                return None
            self.gave_up = False
            self._start_over()
        if self.index is None:
            self.index = TwoStageSearch()
        self.index.sync(keys_ND)
        if not again and query_TD.shape[0]:
            if self.past_SD is not None and self.calls % MEASURE_EVERY == 1:
                self._measure(self.past_SD, keys_ND, count, min(top_k, count, keys_ND.shape[0]))
            self.calls += 1
            self._remember(query_TD)
        if self.gave_up or self.calls <= 1:
            self.mode = "exact"
            return None
        self.mode = "two_stage" if self.config.search == "auto" else self.config.search
        return self.index.search(query_TD, count)

    @torch.no_grad()
    def _remember(self, query_TD: Tensor) -> None:
        """Keep a few queries for the next measurement, the newest first."""
        sampled = torch.linspace(0, len(query_TD) - 1, min(MEASURED_QUERIES, len(query_TD))).round().long()
        query_SD = query_TD.detach()[sampled.to(query_TD.device)].float()
        if self.past_SD is not None and self.past_SD.shape[1:] == query_SD.shape[1:]:
            query_SD = torch.cat([query_SD, self.past_SD.to(query_SD.device)])
        self.past_SD = query_SD[:MEASURED_QUERIES].clone()

    @torch.no_grad()
    def _measure(self, query_SD: Tensor, keys_ND: Tensor, count: int, top_k: int) -> None:
        """Update the recall, and decide before the call answers, so that its recomputation answers alike."""
        assert self.index is not None
        if not top_k or query_SD.shape[1] != keys_ND.shape[1]:
            return
        query_SD = query_SD.to(keys_ND.device)
        keys_ND = keys_ND.detach().float()
        wanted_SK = (query_SD @ keys_ND.T).topk(top_k)[0]
        while True:
            recall = recall_of(self.index.search(query_SD, count), query_SD, keys_ND, wanted_SK)
            past = RECALL_MEMORY if self.measured >= SURE_AFTER else self.measured / (self.measured + 1)
            self.recall = recall if self.recall is None else past * self.recall + (1 - past) * recall
            self.measured += 1
            if not self._too_low(wanted_SK.numel()):
                return
            too_low = self.recall
            if not self.index.widen():
                break
            self.measured, self.recall = 0, None
        self.gave_up, self.exact_calls = True, 0
        if not self.warned:
            self.warned = True
            logger.warning(
                f"key search: recall of the top {top_k} of {len(keys_ND):,} keys is {too_low:.3f}, below "
                f"router.min_recall = {self.config.min_recall}; all keys are scored instead. Keys without clusters "
                "cannot be searched; lower router.min_recall or set router.search = 'exact' to silence this."
            )

    def _too_low(self, wanted: int) -> bool:
        """A few measurements count only where chance does not explain them (two standard deviations)."""
        assert self.recall is not None
        bound = self.config.min_recall
        doubt = 0.0
        if self.measured < SURE_AFTER:
            doubt = 2 * math.sqrt(bound * (1 - bound) / (wanted * self.measured))
        return self.recall < bound - doubt


def recall_of(found_SC: Tensor, query_SD: Tensor, keys_ND: Tensor, wanted_SK: Tensor) -> float:
    """Share of the K best scores that candidates reach. By score, not row: twins share a key, and either will do.

    Args:
        found_SC: int64 rows of candidates, -1 for none.
        query_SD, keys_ND: fp32.
        wanted_SK: The K largest scores of each query, descending.
    """
    score_SC = torch.einsum("sd,scd->sc", query_SD, keys_ND[found_SC.clamp_min(0)])
    lowest_S1 = wanted_SK[:, -1:]
    reached_SC = (score_SC >= lowest_S1 - 1e-5 * lowest_S1.abs()) & (found_SC >= 0)
    return float(reached_SC.sum(dim=1).clamp_max(wanted_SK.shape[1]).sum()) / wanted_SK.numel()
