"""No token knows its future, no text its neighbours: changing tokens from position t on changes no logits before t, and
what the other rows of a batch hold changes nothing in a row. Over the whole model, for every way to choose experts.

Logits stay within 1e-6 of the largest, in fp32: which experts other tokens go to decides the shapes of matrix
products, and with them how the last bit is rounded.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import (
    VOCAB,
    drift,
    fast_model,
    live,
    living_model,
    logits,
    mixed_text,
    prime_searches,
    relative_difference,
    token_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.sections import PlasticityConfig
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.escape.module import Escape
from living_moe.modeling_living_moe.plasticity import consolidate
from living_moe.modeling_living_moe.receptive_field import ReceptiveFields

EXACT = 1e-6
ROWS, LENGTH = 3, 12


def searched(**sections: Any) -> dict[str, dict[str, Any]]:
    """Of so few keys that the search finds all that it should."""
    return {"router": {"search": "two_stage", **sections}}


def top_any(**router: Any) -> dict[str, dict[str, Any]]:
    return {"router": {"selection": "top_any", "max_experts_per_token": 5, **router}}


def grown(family: str, preset: str = "grow", **router: Any) -> LivingMoeForCausalLM:
    """With newborns, facets and tombstones, whose keys and weights have parted."""
    model = living_model(family, preset, sections={"router": router})
    live(model, 16, seed=3)
    for layer in range(len(model.expert_counts)):
        for uid in model.expert_uids(layer)[:6]:
            model.split_expert(layer, uid)
    drift(model, 4, std=0.1, frozen=True)
    for layer in range(len(model.expert_counts)):
        model.remove_expert(layer, model.expert_uids(layer)[-1])
    return model


def newborns_in_fields(family: str) -> LivingMoeForCausalLM:
    model = living_model(family, "frozen-graft")
    for layer in range(len(model.expert_counts)):
        for uid in model.expert_uids(layer):
            model.split_expert(layer, uid)
    drift(model, 5, std=0.2)
    return model


def grown_fast(family: str) -> LivingMoeForCausalLM:
    model = fast_model(family)
    live(model, 12, seed=3)
    return model


def untrained_mlp(family: str) -> LivingMoeForCausalLM:
    """An MLP query network that has left its start at zero."""
    model = living_model(family, sections={"router": {"query_network": "mlp", "d_key": 24, "query_hidden": 20}})
    drift(model, 6, std=0.1)
    return model


def escaped(family: str, space: str) -> LivingMoeForCausalLM:
    """Every block works in another space, by a map that has learned."""
    model = living_model(family, sections={"escape": {"space": space}})
    generator = torch.Generator().manual_seed(8)
    for block in model.living_blocks:
        block.escape.open(0)
        for parameter in block.escape.parameters():
            parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def synaptic(family: str, preset: str = "grow", chunk: int = 3, grows: bool = False) -> LivingMoeForCausalLM:
    """Synapses at work, no two of one expression."""
    model = living_model(family, preset, sections={"synapse": {"router": True, "chunk": chunk}})
    if grows:
        for layer in range(len(model.expert_counts)):
            for uid in model.expert_uids(layer)[:6]:
                model.split_expert(layer, uid)
        drift(model, 4, std=0.1, frozen=True)
        for layer in range(len(model.expert_counts)):
            model.remove_expert(layer, model.expert_uids(layer)[-1])
    else:
        drift(model, 4, std=0.1)
    for block in model.living_blocks:
        block.router.synapse.strength.data.fill_(1.5)
    return model


def both_sides(family: str) -> LivingMoeForCausalLM:
    """Synapses at work in routers and in experts, with a past."""
    model = fast_model(family, sections={"synapse": {"router": True, "chunk": 3, "strength": 1.5}})
    drift(model, 4, std=0.1)
    live(model, 12, seed=3)
    return model


CASES: dict[str, Callable[[], LivingMoeForCausalLM]] = {
    "mixtral": lambda: living_model("mixtral"),
    "qwen": lambda: living_model("qwen3_moe"),
    "qwen not renormalised": lambda: living_model("qwen3_moe", norm_topk_prob=False),
    "deepseek, 1 of 2 groups": lambda: living_model("deepseek_v3"),
    "deepseek, 2 of 4 groups": lambda: living_model("deepseek_v3", n_group=4, topk_group=2, num_experts_per_tok=3),
    "deepseek without groups": lambda: living_model("deepseek_v3", n_group=1, topk_group=1),
    "top-any, straight through": lambda: living_model("mixtral", sections=top_any(threshold=0.5)),
    "top-any, relu": lambda: living_model("qwen3_moe", sections=top_any(gate="relu")),
    "linear queries": lambda: living_model("mixtral", sections={"router": {"query_network": "linear", "d_key": 24}}),
    "mlp queries": lambda: untrained_mlp("qwen3_moe"),
    "cosine": lambda: living_model("mixtral", sections={"router": {"similarity": "cosine", "temperature": 0.1}}),
    "two-stage search": lambda: living_model("mixtral", sections=searched()),
    "two-stage search, top-any": lambda: living_model(
        "mixtral", sections=searched(selection="top_any", max_experts_per_token=5)
    ),
    "two-stage search, grown": lambda: grown("mixtral", search="two_stage"),
    "fields, mixtral": lambda: newborns_in_fields("mixtral"),
    "fields, deepseek": lambda: newborns_in_fields("deepseek_v3"),
    "grown, mixtral": lambda: grown("mixtral"),
    "grown, qwen": lambda: grown("qwen3_moe"),
    "grown, deepseek": lambda: grown("deepseek_v3"),
    "grown, fields": lambda: grown("qwen3_moe", "frozen-graft"),
    "escaped, poincare": lambda: escaped("mixtral", "poincare"),
    "escaped, fourier": lambda: escaped("qwen3_moe", "fourier"),
    "synaptic": lambda: synaptic("mixtral"),
    "synaptic, step size 1": lambda: synaptic("qwen3_moe", chunk=1),
    "synaptic, grown": lambda: synaptic("deepseek_v3", grows=True),
    "synaptic, fields": lambda: synaptic("qwen3_moe", "frozen-graft", grows=True),
    "plastic, synaptic, two timescales": lambda: both_sides("mixtral"),
    "plastic": lambda: living_model("mixtral"),
    "two timescales": lambda: fast_model("mixtral"),
    "plastic, two timescales": lambda: fast_model("qwen3_moe"),
    "plastic, grown, two timescales": lambda: grown_fast("mixtral"),
    "plastic, some": lambda: living_model("qwen3_moe", "some"),
}
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def model_of(case: str) -> LivingMoeForCausalLM:
    return CASES[case]()


def read(case: str, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of a model that has read nothing else: not what moved keys or a search's memory of earlier calls."""
    model = copy.deepcopy(model_of(case))
    if "two-stage" in case:
        prime_searches(model)
    plastic = model.plastic(alpha=0.5, beta=0.3) if case.startswith("plastic") else contextlib.nullcontext()
    with plastic:
        found = logits(model, ids, **inputs)
    if "two-stage" in case:
        assert {block.router.search.mode for block in model.living_blocks} == {"two_stage"}
    return found


#: Of which tokens a change may be: fields open by the new ones and close by the old.
DOMAINS = {"any": (3, VOCAB), "old": (3, VOCAB // 2), "new": (VOCAB // 2, VOCAB)}


def other_tokens(ids: Tensor, seed: int, domain: str = "any") -> Tensor:
    low, high = DOMAINS[domain]
    return token_ids(*ids.shape, seed=seed + 20_000, low=low, high=high)


def text(seed: int) -> Tensor:
    """Rows of one domain each, and rows that change domain, so that fields open and close."""
    return torch.cat([mixed_text(ROWS - 1, LENGTH, seed), token_ids(1, LENGTH, seed, low=VOCAB // 2)])


def leak_from_the_future(case: str, t: int, seed: int, domain: str = "any") -> float:
    """How far logits before t move when the tokens from t on are others."""
    ids = text(seed)
    changed = torch.cat([ids[:, :t], other_tokens(ids[:, t:], seed, domain)], dim=1)
    before, after = read(case, ids), read(case, changed)
    assert relative_difference(after[:, t:], before[:, t:]) > 1e-3, "the change changes nothing"
    return relative_difference(after[:, :t], before[:, :t])


def leak_from_other_rows(case: str, row: int, seed: int, padded: bool) -> float:
    """How far a row's logits move when the others hold other tokens, more or less of them padding."""
    ids = text(seed)
    others = [number for number in range(ROWS) if number != row]
    changed, mask, changed_mask = ids.clone(), torch.ones_like(ids), torch.ones_like(ids)
    changed[others] = other_tokens(ids[others], seed)
    mask[row, : 1 + seed % 4] = changed_mask[row, : 1 + seed % 4] = 0
    if padded:
        changed_mask[others[0], : 2 + seed % 6] = 0
    real = mask[row].bool()
    before, after = read(case, ids, attention_mask=mask)[row], read(case, changed, attention_mask=changed_mask)[row]
    return relative_difference(after[real], before[real])


@every_case
@settings(max_examples=8)
@given(t=st.integers(1, LENGTH - 1), seed=st.integers(0, 10_000), domain=st.sampled_from(sorted(DOMAINS)))
def test_the_future_changes_no_logits_of_the_past(case: str, t: int, seed: int, domain: str) -> None:
    assert leak_from_the_future(case, t, seed, domain) <= EXACT


@every_case
@settings(max_examples=6)
@given(row=st.integers(0, ROWS - 1), seed=st.integers(0, 10_000), padded=st.booleans())
def test_other_rows_change_nothing_in_a_row(case: str, row: int, seed: int, padded: bool) -> None:
    assert leak_from_other_rows(case, row, seed, padded) <= EXACT


def read_after(earlier: Tensor, model: LivingMoeForCausalLM, ids: Tensor) -> Tensor:
    """Logits of a copy whose searches remember `earlier`."""
    model = copy.deepcopy(model)
    logits(model, earlier)
    return logits(model, ids)


SEARCHES: dict[str, tuple[int, float, bool]] = {
    # Experts, recall asked for, and whether clades share addresses, which a search may find in place of the right one.
    "too few candidates serve": (64, 0.1, True),
    "recall is measured": (128, 0.97, False),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_that_misses_keys_still_leaks_nothing(name: str) -> None:
    experts, recall, grows = SEARCHES[name]
    sizes = dict(num_local_experts=experts, intermediate_size=8)
    model = living_model("mixtral", sections=searched(min_recall=recall), **sizes)
    if grows:
        for layer in range(2):
            for uid in model.expert_uids(layer)[: experts // 3]:
                model.split_expert(layer, uid)
        drift(model, 3, std=0.1)
    for seed in range(16):
        ids = text(seed)
        t = 1 + seed % (LENGTH - 1)
        changed = torch.cat([ids[:, :t], other_tokens(ids[:, t:], seed)], dim=1)
        before, after = (read_after(other_tokens(ids, seed + 1), model, each)[:, :t] for each in (ids, changed))
        assert relative_difference(after, before) <= EXACT


# -- the cases are what they are called, and the checks can fail -------------------------------------------------------


def test_the_cases_hold_what_they_are_named_for() -> None:
    for case in CASES:
        model = model_of(case)
        populations = [block.population for block in model.living_blocks]
        if "grown" in case:
            assert all(population.leaves for population in populations), case
            assert any(population.tombstones for population in populations), case
        if "fields" in case:
            fields = model.model.fields
            gate = fields(text(0))
            assert 0 < int((gate.index > 0).sum()) < gate.index.numel(), case
            assert any(member.field for population in populations for member in population.members)
        if "escaped" in case:
            away = logits(model, text(0))
            home = copy.deepcopy(model)
            for block in home.living_blocks:
                block.escape.gate.data.zero_()
            assert relative_difference(away, logits(home, text(0))) > 1e-2, case
        if "top-any" in case:
            chosen = chosen_by(model)
            assert (chosen < 0).any() and (chosen[:, 1] >= 0).any(), case


def chosen_by(model: LivingMoeForCausalLM) -> Tensor:
    """What the first router chooses: (T, K)."""
    found: list[Tensor] = []
    hook = model.living_blocks[0].router.register_forward_hook(lambda *args: found.append(args[2][2]))
    logits(model, text(0))
    hook.remove()
    return found[0]


def test_a_block_that_mixes_in_the_mean_of_the_sequence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LivingMoeBlock.forward
    monkeypatch.setattr(
        LivingMoeBlock, "forward", lambda self, hidden: honest(self, hidden) + 1e-4 * hidden.mean(dim=1, keepdim=True)
    )
    assert leak_from_the_future("mixtral", 6, seed=1) > EXACT
    assert leak_from_other_rows("mixtral", 0, seed=1, padded=False) <= EXACT


def test_a_block_that_mixes_in_the_mean_of_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LivingMoeBlock.forward
    monkeypatch.setattr(
        LivingMoeBlock, "forward", lambda self, hidden: honest(self, hidden) + 1e-4 * hidden.mean(dim=0, keepdim=True)
    )
    assert leak_from_other_rows("mixtral", 0, seed=1, padded=False) > EXACT
    assert leak_from_the_future("mixtral", 6, seed=1) <= EXACT


def test_an_escape_along_the_sequence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of the sequence, say, in place of those of the features."""
    honest = Escape.forward

    def along(self: Escape, x_TH: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x_TH, dim=0)
        return honest(self, x_TH) + 1e-3 * torch.fft.irfft(spectrum * spectrum.abs(), n=len(x_TH), dim=0)

    monkeypatch.setattr(Escape, "forward", along)
    assert leak_from_the_future("escaped, fourier", 6, seed=1) > EXACT


def test_a_gate_that_opens_by_the_whole_text_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ReceptiveFields.forward

    def hasty(self: ReceptiveFields, *args: Any, **kwargs: Any) -> Any:
        gate = honest(self, *args, **kwargs)
        gate.index = gate.index.amax(dim=1, keepdim=True).expand_as(gate.index)
        return gate

    monkeypatch.setattr(ReceptiveFields, "forward", hasty)
    # Until t all is old: what comes after opens the field, or does not.
    assert leak_from_the_future("fields, mixtral", LENGTH // 2, seed=1, domain="old") > EXACT


def test_keys_that_move_before_a_layer_has_routed_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LivingMoeBlock.forward

    def hasty(self: LivingMoeBlock, hidden: Tensor) -> Tensor:
        honest(self, hidden)
        place = (self.router.keys, self.population)
        layer, evidence = self.plasticity.read(*place), self.plasticity.take_evidence()
        [moved] = consolidate([layer], [evidence], PlasticityConfig(alpha=0.5))
        with torch.no_grad():
            for old, new in self.plasticity.pairs(moved, *place):
                old.copy_(new)
        return honest(self, hidden)

    monkeypatch.setattr(LivingMoeBlock, "forward", hasty)
    assert leak_from_the_future("plastic", 6, seed=1) > EXACT
