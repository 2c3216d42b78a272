"""Searches find what scoring every key finds, follow a store that changes, and give way where they miss too much.

The oracle is the product of all queries with all keys. With every cluster probed the two-stage search must equal it.
"""

import copy
import importlib.util
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import RouterConfig
from living_moe.modeling_living_moe import key_search
from living_moe.modeling_living_moe.key_search import ExactSearch, FaissSearch, KeyStoreSearch, TwoStageSearch

LENGTH = 16
requires_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="FAISS is not installed")


def clustered(count: int, length: int = LENGTH, roots: int | None = None) -> Tensor:
    """Noisy copies of some directions (one in eight), of different norms."""
    roots = roots or max(1, count // 8)
    keys = F.normalize(torch.randn(roots, length), dim=1)[torch.arange(count) % roots]
    return (keys + 0.5 * F.normalize(torch.randn(count, length), dim=1)) * torch.empty(count, 1).uniform_(0.7, 1.4)


def near(keys: Tensor, count: int = 64) -> Tensor:
    chosen = keys[torch.randint(len(keys), (count,))]
    return chosen + 0.3 * chosen.norm(dim=1, keepdim=True) * F.normalize(torch.randn_like(chosen), dim=1)


def indexed(keys: Tensor, probes: int = 10_000) -> TwoStageSearch:
    search = TwoStageSearch()
    search.probes = probes
    search.sync(keys)
    return search


def best(query: Tensor, keys: Tensor, count: int) -> Tensor:
    return (query @ keys.T).topk(count)[1]


def recall(found: Tensor, wanted: Tensor) -> float:
    return (wanted[:, :, None] == found[:, None]).any(-1).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_every_cluster_probed_it_finds_what_scoring_every_key_finds(dtype: torch.dtype) -> None:
    keys = clustered(700).to(dtype)
    query = near(keys)
    wanted = best(query.float(), keys.float(), 5)
    assert torch.equal(indexed(keys).search(query, 5), wanted)
    exact = ExactSearch()
    exact.sync(keys)
    assert torch.equal(exact.search(query, 5), wanted)


def test_two_probes_find_almost_all_of_clustered_keys_and_few_of_random_ones() -> None:
    for keys, holds in ((clustered(3000, 32), lambda r: r > 0.9), (torch.randn(3000, 32), lambda r: r < 0.7)):
        query = near(keys, 256)
        assert holds(recall(indexed(keys, 2).search(query, 8), best(query, keys, 2)))


def test_long_keys_are_found_although_another_cluster_points_closer() -> None:
    """The largest dot product may belong to a key of another direction."""
    keys = F.normalize(torch.randn(600, LENGTH), dim=1)
    towards, far = F.normalize(torch.randn(2, LENGTH), dim=1)
    keys[:40] = far + 0.02 * torch.randn(40, LENGTH)
    keys[:40] *= 30
    query = F.normalize(towards + 0.5 * far, dim=0)[None]
    assert best(query, keys, 4).max() < 40 < (query @ F.normalize(keys, dim=1).T).argmax()
    assert 0 <= indexed(keys, 1).search(query, 2).min() <= indexed(keys, 1).search(query, 2).max() < 40


@pytest.mark.parametrize("probes", [1, 3, 10_000])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_tiles_of_an_accelerator_find_what_slices_find(probes: int, tokens: int, monkeypatch) -> None:
    keys = clustered(500)
    query = near(keys, tokens)
    search = indexed(keys, probes)
    wanted = search.search(query, 6)
    monkeypatch.setattr(key_search, "TILE_FLOATS", 5000)  # several chunks of tiles
    monkeypatch.setattr(TwoStageSearch, "_scan_slices", TwoStageSearch._scan_tiles)
    assert torch.equal(search.search(query, 6), wanted)


def test_fewer_keys_than_asked_for_are_padded() -> None:
    keys = clustered(5)
    for search in (indexed(keys), ExactSearch()):
        search.sync(keys)
        found = search.search(near(keys, 3), 8)
        assert found.shape == (3, 8) and found.dtype == torch.int64
        assert (found[:, 5:] == -1).all()
        assert all(sorted(row[:5]) == list(range(5)) for row in found.tolist())
        search.sync(keys[:0])
        assert (search.search(near(keys, 3), 2) == -1).all()
        assert search.search(keys[:0], 2).shape == (0, 2)


def test_one_probe_pads_when_its_cluster_is_small() -> None:
    keys = clustered(300)
    found = indexed(keys, 1).search(near(keys), 299)
    assert (found[:, 0] >= 0).all() and (found[:, -1] == -1).all()
    for row in found.tolist():
        rows = [key for key in row if key >= 0]
        assert len(rows) == len(set(rows)) and row[: len(rows)] == rows


def test_keys_that_are_all_the_same_make_no_endless_split() -> None:
    for keys in (torch.zeros(2000, LENGTH), torch.ones(2000, LENGTH)):
        search = indexed(keys, 2)
        assert max(search.sizes) <= 2 * key_search.LARGEST_TO_MEAN * len(keys) / (4 * len(keys) ** 0.5)
        assert (search.search(torch.randn(4, LENGTH), 3) >= 0).all()


def edit(keys: Tensor, kind: str, amount: int) -> Tensor:
    if kind == "move":
        keys = keys.clone()
        rows = torch.randperm(len(keys))[:amount]
        keys[rows] = clustered(len(keys), keys.shape[1])[rows]
    elif kind == "drift":
        keys = keys + 0.01 * torch.randn_like(keys)
    elif kind == "append":
        keys = torch.cat([keys, clustered(amount, keys.shape[1])])
    elif kind == "remove":
        keys = keys[: max(1, len(keys) - amount)]
    elif kind == "twins":
        keys = torch.cat([keys, keys[:1].expand(amount, -1)])
    else:  # a death: the last row moves into the hole
        hole = amount % len(keys)
        keys = keys.clone()
        keys[hole] = keys[-1]
        keys = keys[:-1] if len(keys) > 1 else keys
    return keys


def check_layout(search: TwoStageSearch, keys: Tensor) -> None:
    assert torch.equal(search.packed_ND[search.position_N], keys)
    assert sum(search.sizes) == len(keys)
    assert torch.equal(search.cluster_N[search.row_N], torch.arange(len(search.sizes)).repeat_interleave(search.size_C))
    sums = torch.zeros_like(search.sum_CD).index_add_(0, search.cluster_N, F.normalize(keys, dim=1))
    torch.testing.assert_close(search.sum_CD, sums, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(search.norm_N, keys.norm(dim=1))


EDITS = st.tuples(st.sampled_from(["move", "drift", "append", "remove", "twins", "death"]), st.integers(1, 120))


@given(st.integers(1, 400), st.lists(EDITS, min_size=1, max_size=5))
@settings(max_examples=30)
def test_a_followed_store_answers_like_a_fresh_index(count: int, edits: list[tuple[str, int]]) -> None:
    keys = clustered(count)
    search = indexed(keys)
    for kind, amount in edits:
        keys = edit(keys, kind, amount)
        search.sync(keys)
        check_layout(search, keys)
        query = near(keys, 8)
        scores = query @ keys.T
        found = search.search(query, min(4, len(keys)))
        # Twins tie, so scores are compared, not rows.
        torch.testing.assert_close(scores.gather(1, found), scores.topk(found.shape[1])[0])


@pytest.mark.parametrize("kind", ["move", "drift", "append", "remove", "death", "twins"])
def test_an_edit_of_few_keys_is_followed_without_a_build_and_at_the_recall_of_one(kind: str) -> None:
    keys = clustered(2000, 32)
    search = indexed(keys, 2)
    torch.manual_seed(1)
    for _ in range(4):
        keys = edit(keys, kind, 20) if kind != "move" else moved(keys, 20)
        search.sync(keys)
    assert search.builds == 1
    query = near(keys, 256)
    # By score: twins share a key.
    wanted = (query @ keys.T).topk(2)[0]
    ours, fresh = (
        key_search.recall_of(index.search(query, 8), query, keys, wanted) for index in (search, indexed(keys, 2))
    )
    assert ours > 0.9 and ours > fresh - 0.04


def moved(keys: Tensor, amount: int) -> Tensor:
    keys = keys.clone()
    rows = torch.randperm(len(keys))[:amount]
    keys[rows] = near(keys, amount)
    return keys


def test_a_shuffled_store_is_built_anew_and_found() -> None:
    keys = clustered(1000)
    search = indexed(keys)
    shuffled = keys[torch.randperm(1000)]
    search.sync(shuffled)
    assert search.builds == 2
    query = near(keys)
    assert torch.equal(search.search(query, 3), best(query, shuffled, 3))


def test_a_store_that_was_not_written_to_is_not_read(monkeypatch) -> None:
    keys = clustered(300)
    search = indexed(keys)
    read = []
    plain = TwoStageSearch._changed_rows
    monkeypatch.setattr(TwoStageSearch, "_changed_rows", lambda self, keys: read.append(1) or plain(self, keys))
    search.sync(keys)
    assert not read
    keys[7] += 1
    search.sync(keys)
    assert len(read) == 1 and torch.equal(search.packed_ND[search.position_N], keys)
    store = torch.nn.Parameter(torch.cat([keys, torch.zeros(10, LENGTH)]))
    with torch.no_grad():
        search.sync(store[:300])
        search.sync(store[:300])
        assert len(read) == 2
        search.sync(store[:301])
    assert len(read) == 3


def test_steps_of_a_fused_optimizer_are_seen_although_they_count_no_version() -> None:
    store = torch.nn.Parameter(clustered(200))
    optimizer = torch.optim.AdamW([store], lr=0.1, fused=True)
    search = indexed(store)
    for _ in range(2):
        store.grad = torch.randn_like(store)
        optimizer.step()
        search.sync(store[:150])
        assert torch.equal(search.packed_ND[search.position_N], store.detach()[:150])
    store.grad = torch.randn_like(store)
    optimizer.step()
    with torch.no_grad():
        search.sync(store[:150])
    assert torch.equal(search.packed_ND[search.position_N], store.detach()[:150])


def test_the_same_keys_and_edits_give_the_same_index_whatever_the_global_seed() -> None:
    keys = clustered(1500)
    later = moved(keys, 50)
    query = near(keys)
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        search = indexed(keys, 2)
        search.sync(later)
        answers.append(search.search(query, 6))
    assert torch.equal(*answers)


# -- what a router holds -----------------------------------------------------------------------------------------------


def primed(store: KeyStoreSearch, query: Tensor, keys: Tensor) -> KeyStoreSearch:
    """Past its first call, which compares every key and only remembers."""
    assert store.candidates(query, keys, 4, 2) is None
    assert store.mode == "exact" and store.recall is None
    return store


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(key_search.logger, "warning", found.append)
    return found


def test_few_keys_and_exact_mode_are_scored_whole(warnings: list[str]) -> None:
    keys = clustered(200)
    for config in (RouterConfig(search="exact"), RouterConfig(search_from=201)):
        store = KeyStoreSearch(config)
        assert store.candidates(keys[:9], keys, 4) is None
        assert store.mode == "exact" and store.recall is None and store.index is None
    store = primed(KeyStoreSearch(RouterConfig(search_from=200)), keys[:9], keys)
    found = store.candidates(keys[:9], keys, 4, 2)
    assert found is not None and found.shape == (9, 4)
    assert store.mode == "two_stage" and store.recall > 0.97 and not warnings


def test_a_compiled_model_of_few_keys_is_one_graph() -> None:
    keys = clustered(50)
    store = KeyStoreSearch(RouterConfig())

    def route(x: Tensor) -> Tensor:
        rows = store.candidates(x, keys, 4, 2)
        return (x @ keys.T).topk(4)[1] if rows is None else rows

    compiled = torch.compile(route, backend="eager", fullgraph=True)
    assert torch.equal(compiled(keys[:3]), best(keys[:3], keys, 4))


def test_random_keys_are_scored_whole_after_one_warning_and_tried_again_quietly(warnings: list[str]) -> None:
    keys = torch.randn(3000, 64)
    store = KeyStoreSearch(RouterConfig(search="two_stage"))
    query = torch.randn(64, 64)
    for _ in range(2 * key_search.RETRY_AFTER + 9):
        assert store.candidates(query, keys, 4, 2) is None
        assert store.mode == "exact"
    assert len(warnings) == 1
    assert f"{store.recall:.3f}" in warnings[0] and "3,000 keys" in warnings[0] and "0.97" in warnings[0]
    assert store.recall < 0.9

    better = clustered(3000, 64)
    answers = [store.candidates(near(better), better, 4, 2) for _ in range(key_search.RETRY_AFTER + 1)]
    assert answers[0] is None and answers[-1] is not None
    assert store.mode == "two_stage" and store.recall > 0.97 and len(warnings) == 1


def test_probes_are_doubled_before_the_search_gives_way(warnings: list[str]) -> None:
    keys = clustered(2000, roots=2000)
    query = near(keys, 16)
    store = primed(KeyStoreSearch(RouterConfig(search="two_stage", min_recall=0.9)), query, keys)
    assert store.candidates(query, keys, 4, 2) is not None
    assert key_search.FIRST_PROBES < store.index.probes <= key_search.MOST_PROBES
    assert store.recall > 0.6 and not warnings


def test_recall_is_measured_at_the_second_call_and_every_eighth_after(monkeypatch) -> None:
    keys = clustered(500)
    store = KeyStoreSearch(RouterConfig(search="two_stage"))
    measured = []
    plain = KeyStoreSearch._measure
    monkeypatch.setattr(
        KeyStoreSearch, "_measure", lambda self, *args: measured.append(self.calls) or plain(self, *args)
    )
    for _ in range(17):
        store.candidates(near(keys, 3), keys, 4, 2)
    assert measured == [1, 9]


def test_what_is_measured_are_queries_of_earlier_calls_the_newest_first(monkeypatch) -> None:
    """If those of a call decided how it is answered, later tokens would reach earlier ones."""
    keys = clustered(500)
    store = KeyStoreSearch(RouterConfig(search="two_stage"))
    measured = []
    plain = KeyStoreSearch._measure
    monkeypatch.setattr(KeyStoreSearch, "_measure", lambda self, *args: measured.append(args[0]) or plain(self, *args))
    asked = [near(keys, 5) for _ in range(10)]
    for query in asked:
        store.candidates(query, keys, 4, 2)
    first, second = measured
    assert torch.equal(first, asked[0])
    assert torch.equal(second, torch.cat(asked[8::-1])[: key_search.MEASURED_QUERIES])


def test_a_twin_of_a_missed_key_counts_as_found() -> None:
    keys = clustered(300).repeat(2, 1)
    query = near(keys)
    scores = query @ keys.T
    first = scores.argmax(dim=1)
    twin, worst = (first + 300) % 600, scores.argmin(dim=1)
    for other, recall in ((first, 1.0), (worst, 0.5), (torch.full_like(first, -1), 0.5)):
        found = torch.stack([twin, other], dim=1)
        assert key_search.recall_of(found, query, keys, scores.topk(2)[0]) == recall


def test_a_forward_pass_that_is_run_again_in_backward_finds_what_it_found() -> None:
    keys = clustered(500)
    store = KeyStoreSearch(RouterConfig(search="two_stage"))
    query = near(keys, 5)
    primed(store, query, keys)
    found = []

    def layer(x: Tensor) -> Tensor:
        rows = store.candidates(x, keys, 4, 2)
        found.append(rows)
        return (x * keys[rows[:, 0]]).sum()

    query.requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, query, use_reentrant=False).backward()
    assert len(found) == 2 and torch.equal(*found)
    assert store.calls == 2 and store.measured == 1


def test_copies_build_their_own_index_and_carry_no_gradients() -> None:
    keys = clustered(400).requires_grad_()
    store = primed(KeyStoreSearch(RouterConfig(search="two_stage")), keys[:9], keys)
    found = store.candidates(keys[:9], keys, 4, 2)
    assert not found.requires_grad and not store.index.packed_ND.requires_grad
    for twin in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert twin.index is None and twin.config == store.config
        primed(twin, keys[:9], keys)
        assert torch.equal(twin.candidates(keys[:9], keys, 4, 2), found)


# -- FAISS -------------------------------------------------------------------------------------------------------------


def test_missing_faiss_and_unknown_kinds_are_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigurationError, match=r"pip install living_moe\[search\]"):
        KeyStoreSearch(RouterConfig(search="faiss_ivf"))
    with pytest.raises(ConfigurationError, match="'annoy'"):
        FaissSearch("annoy")


@requires_faiss
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_faiss_follows_the_store(kind: str) -> None:
    keys = clustered(600)
    search = FaissSearch(kind)
    search.width = 10_000
    search.sync(keys)
    for change in ("move", "append", "remove", "death", "drift", "append"):
        keys = edit(keys, change, 30)
        search.sync(keys)
        query = near(keys)
        found = search.search(query, 4)
        assert found.max() < len(keys)
        # Dead entries may take the place of one that lives.
        assert recall(found, best(query, keys, 2)) > 0.95
    assert search.search(near(keys, 3), len(keys) + 5).shape == (3, len(keys) + 5)


@requires_faiss
@pytest.mark.parametrize("kind", ["faiss_hnsw", "faiss_ivf"])
def test_a_router_may_search_with_faiss(kind: str) -> None:
    keys = clustered(600)
    store = primed(KeyStoreSearch(RouterConfig(search=kind)), near(keys), keys)
    found = store.candidates(near(keys), keys, 6, 2)
    assert found is not None and store.mode == kind and store.recall > 0.9
