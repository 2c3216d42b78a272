"""Collapse instruments: values computed by hand, blindness to units and order, metrics that agree, logs that tell."""

import json
import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lives import build, busy_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from living_moe.configuration.errors import ConfigurationError, TrainingError
from living_moe.training import collapse
from living_moe.training.collapse import (
    COLLAPSE_METRIC,
    MUTUAL_INFORMATION_METRIC,
    TOKEN_CLASSES,
    class_of_text,
    collapse_report,
    dead_share,
    effective_experts,
    gini,
    key_silhouette,
    load_of_choices,
    max_violation,
    measures_of_load,
    routing_mutual_information,
    shannon_entropy,
    summary,
    token_classes,
)
from living_moe.training.reporting import LOGGED_ROUTING, JsonLog, Progress

MEASURES = (gini, shannon_entropy, effective_experts, max_violation, dead_share)
LOADS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=12)


# -- loads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "expected"),
    [  # gini, entropy, effective experts, MaxVio, dead share
        ([5, 5, 5, 5], (0.0, math.log(4), 4.0, 0.0, 0.0)),
        ([0, 0, 7, 0], (0.75, 0.0, 1.0, 3.0, 0.75)),
        ([1, 0, 1, 0], (0.5, math.log(2), 2.0, 1.0, 0.5)),
        # The absolute differences of all 16 ordered pairs sum to 20; 20 / (2 * 16 * 2.5) = 0.25.
        ([4, 2, 1, 3], (0.25, math.log(10) - (4 * math.log(4) + 2 * math.log(2) + 3 * math.log(3)) / 10, None, 0.6, 0)),
        ([3], (0.0, 0.0, 1.0, 0.0, 0.0)),
        ([0, 0, 0], (0.0, math.log(3), 3.0, 0.0, 0.0)),
    ],
)
def test_measures_of_loads_are_those_computed_by_hand(load: list[int], expected: tuple[float | None, ...]) -> None:
    kinds: list[Any] = [load, np.array(load, dtype=np.float32), torch.tensor(load), torch.tensor(load).bfloat16()]
    for kind in kinds:
        for measure, value in zip(MEASURES, expected, strict=True):
            if value is not None:
                assert measure(kind) == pytest.approx(value, abs=1e-12), measure.__name__


@given(LOADS)
@example([0.1] * 7)
@example([1e-6, 1e6])
def test_gini_is_the_mean_difference_of_pairs_and_all_measures_keep_their_range(load: list[float]) -> None:
    count, mean = len(load), sum(load) / len(load)
    pairs = sum(abs(one - other) for one in load for other in load)
    assert gini(load) == pytest.approx(pairs / (2 * count**2 * mean) if mean else 0.0, abs=1e-9)
    assert 0.0 <= gini(load) <= 1.0 - 1.0 / count
    assert 0.0 <= shannon_entropy(load) <= math.log(count)
    assert effective_experts(load) == pytest.approx(math.exp(shannon_entropy(load)))
    assert max_violation(load) == pytest.approx(max(load) / mean - 1.0 if mean else 0.0, abs=1e-9)
    assert dead_share(load) == (load.count(0.0) / count if mean else 0.0)


@given(LOADS, st.floats(1e-200, 1e200), st.randoms(use_true_random=False))
def test_neither_unit_nor_order_matters(load: list[float], scale: float, random: Any) -> None:
    shuffled = random.sample(load, len(load))
    for measure in MEASURES:
        value = measure(load)
        assert measure(shuffled) == value, measure.__name__  # bit for bit
        assert measure([one * scale for one in load]) == pytest.approx(value, rel=1e-9, abs=1e-9), measure.__name__
        assert measure([one * 2.0 for one in load]) == value, measure.__name__


@given(LOADS, st.integers(0, 11), st.integers(0, 11), st.floats(0.0, 1.0))
def test_a_gift_to_the_poorer_never_looks_like_collapse(load: list[float], i: int, j: int, part: float) -> None:
    """The principle of transfers (Pigou 1912, Dalton 1920), which any measure of inequality must keep."""
    rich, poor = sorted((i % len(load), j % len(load)), key=lambda place: -load[place])
    fairer = list(load)
    gift = part * (load[rich] - load[poor]) / 2
    fairer[rich], fairer[poor] = fairer[rich] - gift, fairer[poor] + gift
    assert gini(fairer) <= gini(load) + 1e-9
    assert effective_experts(fairer) >= effective_experts(load) - 1e-9
    assert max_violation(fairer) <= max_violation(load) + 1e-9
    assert dead_share(fairer) <= dead_share(load)


def test_the_threshold_of_death_is_in_uniform_shares() -> None:
    load = [0.0, 1.0, 2.0, 5.0]  # the uniform share is 2
    shares = {0.0: 0.25, 0.49: 0.25, 0.5: 0.5, 1.0: 0.75, 2.4: 0.75, 2.5: 1.0}
    assert {threshold: dead_share(load, threshold) for threshold in shares} == shares
    assert dead_share([3.0, 3.0, 3.0], 1.0) == 1.0
    for threshold in (-0.1, math.nan):
        with pytest.raises(TrainingError, match="threshold is .*give a multiple of the uniform share"):
            dead_share(load, threshold)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ([], "shape"),
        ([[1.0, 2.0]], r"shape \(1, 2\)"),
        (3.0, r"shape \(\)"),
        ([1.0, -2.0], "a load is -2.0"),
        ([1.0, math.nan], "a load is nan"),
        (torch.tensor([1.0, math.inf]), "a load is inf"),
    ],
)
@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_no_load_is_refused(measure: Any, load: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        measure(load)


def test_choices_are_counted() -> None:
    assert load_of_choices(torch.tensor([[0, 2], [2, 1]]), 5).tolist() == [1, 1, 2, 0, 0]
    with pytest.raises(TrainingError, match="expert 5 was chosen, but num_experts is 5"):
        load_of_choices([0, 5], 5)
    with pytest.raises(TrainingError, match="experts have -1 among them.*Leave padding out"):
        load_of_choices([0, -1], 5)
    with pytest.raises(TrainingError, match="there are no experts"):
        load_of_choices([], 5)
    with pytest.raises(TrainingError, match="dtype float"):
        load_of_choices([0.5], 5)


# -- a model -----------------------------------------------------------------------------------------------------------


def give_loads(model: Any, loads: list[list[float]]) -> None:
    for block, load in zip(model.living_blocks, loads, strict=True):
        block.vitals.table("trainable").load[: len(load)] = torch.tensor(load)


def test_the_report_has_a_row_per_living_layer_and_a_summary() -> None:
    model = busy_model()
    assert {row["gini"] for row in collapse_report(model)} == {0.0}, "nothing seen yet"
    first = [8.0, 0, 0, 0, 0, 0, 0, 0]
    second = [2.0, 2.0, 2.0, 1.995, 0.001, 0.001, 0.001, 0.001]
    give_loads(model, [first, second])
    report = collapse_report(model)
    assert report[0] == {
        "gini": 0.875, "effective_experts": 1.0, "effective_share": 0.125, "max_violation": 7.0, "dead_share": 0.875,
    }  # fmt: skip
    assert report[1] == pytest.approx(measures_of_load(second, collapse.DEAD_LOAD), abs=1e-6)
    assert report[1]["dead_share"] == 0.5, "moving averages are never quite zero"
    assert collapse_report(model, threshold=0.0)[1]["dead_share"] == 0.0
    means = summary(report)
    assert set(means) == {f"routing/{name}" for name in report[0]}
    assert means["routing/dead_share"] == (0.875 + 0.5) / 2
    assert means["routing/gini"] == pytest.approx((0.875 + gini(second)) / 2)


def test_layers_of_different_sizes_keep_their_own_loads() -> None:
    model = busy_model()
    give_loads(model, [[1.0] * 8, [8.0] + [0.0] * 7])
    model.split_expert(0, model.expert_uids(0)[3])
    model.freeze_expert(0, model.expert_uids(0)[3])  # in another slab now
    assert model.expert_counts == [9, 8]
    rows = collapse_report(model)
    assert [row["gini"] > 0 for row in rows] == [True, True]
    for layer, row in enumerate(rows):
        assert row == measures_of_load(model.vitals(layer)["load"], collapse.DEAD_LOAD)
    assert rows[1]["effective_experts"] == 1.0


def test_a_report_costs_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, transfers = busy_model(), []
    collapse_report(model)  # who is alive is read once, and then known until an event
    lists, items = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append("tolist") or lists(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: transfers.append("item") or items(self))
    collapse_report(model)
    assert transfers == ["tolist"]


def test_a_model_that_does_not_live_has_no_report() -> None:
    with pytest.raises(TrainingError, match="Linear has no living layers; convert it"):
        collapse_report(torch.nn.Linear(2, 2))


def test_logs_tell_the_routing_every_so_many_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    expected: list[dict[str, float]] = []
    hooks = [
        JsonLog(path, every=3),
        JsonLog(tmp_path / "never.jsonl", every=0),
        Progress(6, every=3),
        lambda trainer, record: expected.append(summary(collapse_report(trainer.model), prefix="")),
    ]
    build(busy_model(), max_steps=6, hooks=hooks).run()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["step"] for entry in entries if "routing" in entry] == [3, 6]
    for step in (3, 6):
        routing = entries[step - 1]["routing"]
        assert routing == {name: expected[step - 1][name] for name in LOGGED_ROUTING}
        assert routing["gini"] > 0.0 and 2 / 14 <= routing["effective_share"] < 1.0
    assert "routing" not in (tmp_path / "never.jsonl").read_text()
    shown = [line for line in capsys.readouterr().err.splitlines() if "lr " in line]
    assert len(shown) == 2 and all(" effective), events " in line for line in shown)


# -- metrics -----------------------------------------------------------------------------------------------------------


def metric(path: Path) -> Any:
    return evaluate.load(str(path), keep_in_memory=True)


def test_the_collapse_metric_is_the_functions_of_the_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(torch.tensor([8.0, 4, 2, 1, 1, 0, 0, 0]), 200, replacement=True, generator=generator)
    expected = measures_of_load(torch.bincount(chosen, minlength=8))
    assert expected["dead_share"] == 3 / 8 and expected["gini"] > 0.4
    module = metric(COLLAPSE_METRIC)
    assert module.compute(predictions=chosen, num_experts=8) == expected
    assert module.compute(predictions=chosen.tolist(), references=8) == expected
    assert module.compute(predictions=chosen, references=[8] * 200) == expected
    assert module.compute(predictions=chosen, num_experts=8, threshold=10)["dead_share"] == 1.0
    for part in chosen.split(70):
        module.add_batch(predictions=part)
    assert module.compute(num_experts=8) == expected
    with pytest.raises(TrainingError, match="the number of experts is missing; give num_experts"):
        module.compute(predictions=chosen)
    with pytest.raises(TrainingError, match=r"the number of experts is \[7, 8\]"):
        module.compute(predictions=chosen, num_experts=8, references=7)
    with pytest.raises(TrainingError, match="expert 4 was chosen, but num_experts is 3"):
        module.compute(predictions=[4, 0], num_experts=3)


def test_the_mutual_information_metric_is_the_function() -> None:
    pytest.importorskip("sklearn")
    experts, classes = [0, 0, 1, 1, 2, 2, 0, 1], [0, 0, 1, 1, 1, 1, 1, 0]
    module = metric(MUTUAL_INFORMATION_METRIC)
    for normalised in (True, False):
        found = module.compute(predictions=experts, references=classes, normalised=normalised)
        assert found == {"routing_mutual_information": routing_mutual_information(experts, classes, normalised)}
    assert module.compute(predictions=experts, references=classes) != found, "adjusted unless told otherwise"


# -- choices -----------------------------------------------------------------------------------------------------------


def test_mutual_information_by_hand() -> None:
    pytest.importorskip("sklearn")
    # Experts 0 and 1 are the two classes, expert 2 takes one token of each: H(class) - H(class | expert).
    experts, classes = [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 0, 1]
    expected = math.log(2) - 2 / 6 * math.log(2)
    assert routing_mutual_information(experts, classes, normalised=False) == pytest.approx(expected)
    renamed = [[7, 3, 5][expert] for expert in experts]
    assert routing_mutual_information(renamed, classes) == pytest.approx(routing_mutual_information(experts, classes))


def test_adjusted_information_is_one_for_a_renaming_and_none_for_chance() -> None:
    pytest.importorskip("sklearn")
    classes = torch.randint(0, 6, (600,), generator=torch.Generator().manual_seed(1))
    assert routing_mutual_information((classes * 5 + 3) % 7, classes) == pytest.approx(1.0)
    chance = torch.randint(0, 40, (600,), generator=torch.Generator().manual_seed(2))
    assert abs(routing_mutual_information(chance, classes)) < 0.02
    assert routing_mutual_information(chance, classes, normalised=False) > 0.1, "what the adjustment is for"


def test_collapsed_choices_tell_nothing() -> None:
    pytest.importorskip("sklearn")
    for normalised in (True, False):
        assert routing_mutual_information([4, 4, 4], [0, 1, 2], normalised) == 0.0
        assert routing_mutual_information([4, 4, 4], [1, 1, 1], normalised) == 0.0


def test_choices_and_classes_must_fit() -> None:
    with pytest.raises(TrainingError, match="3 experts but 2 token classes; give one class per choice"):
        routing_mutual_information([0, 1, 2], [0, 1])
    with pytest.raises(TrainingError, match="token classes have -1 among them"):
        routing_mutual_information([0, 1], [0, -1])
    with pytest.raises(TrainingError, match="there are no experts"):
        routing_mutual_information([], [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" ", "whitespace"), ("\n\n", "whitespace"), ("\t", "whitespace"), ("", "other"),
        (" the", "word_lower"), (" The", "word_upper"), (" 中", "word_lower"), ("\nif", "word_lower"),
        ("ing", "continuation"), ("Type", "continuation"), ("_init", "continuation"),
        ("42", "digits"), (" 7", "digits"), ("½", "digits"),
        (".", "punctuation"), (" \"", "punctuation"), ("…", "punctuation"), ("'s", "punctuation"),
        ("(", "operator"), (" ==", "operator"), ("):", "operator"), (" +=", "operator"),
        ("�", "other"), ("😀", "other"), ("€", "other"),
    ],
)  # fmt: skip
def test_the_class_of_a_text(text: str, name: str) -> None:
    assert class_of_text(text) == name


def test_byte_level_tokens_have_their_class(source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source / "model")
    classes = token_classes(tokenizer)
    assert classes.shape == (len(tokenizer),) and classes.dtype == torch.int64

    def named(text: str) -> list[tuple[str, str]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [(tokenizer.decode([i]), TOKEN_CLASSES[classes[i]]) for i in ids]

    assert named(" cat") == [(" cat", "word_lower")]
    assert dict(named("def f3(x): return x + 1 * (x - 1)\n")) == {
        "def": "continuation", " f": "word_lower", "3": "digits", "(": "operator", "x": "continuation",
        "):": "operator", " return": "word_lower", " x": "word_lower", " +": "operator", " 1": "digits",
        " *": "operator", " (": "operator", " -": "operator", ")": "operator", "\n": "whitespace",
    }  # fmt: skip
    assert [TOKEN_CLASSES[classes[i]] for i in tokenizer.all_special_ids] == ["other"] * 3
    assert TOKEN_CLASSES[classes[tokenizer.convert_tokens_to_ids("Ã")]] == "other", "half a character"


def sentencepiece_like() -> Tokenizer:
    names = ["<unk>", "▁", "a", "▁the", "▁The", "ing", "▁12", "(", "<0x0A>"]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    # The decoder of Llama 2's tokenizer.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def wordpiece() -> Tokenizer:
    names = ["<unk>", "a", "the", "The", "##ing", "12", "(", ".", "walk"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def test_tokens_that_mark_words_in_another_way_have_their_class_too() -> None:
    def classes_of(inner: Tokenizer, tokens: list[str]) -> list[str]:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
        classes = token_classes(tokenizer)
        assert set(tokens) <= set(tokenizer.get_vocab())
        return [TOKEN_CLASSES[classes[tokenizer.convert_tokens_to_ids(token)]] for token in tokens]

    expected = ["word_lower", "word_upper", "continuation", "digits", "operator", "other"]
    assert classes_of(sentencepiece_like(), ["▁the", "▁The", "ing", "▁12", "(", "<unk>"]) == expected
    assert classes_of(wordpiece(), ["the", "The", "##ing", "12", "(", "<unk>"]) == expected
    assert classes_of(sentencepiece_like(), ["▁", "<0x0A>", "a"]) == ["whitespace", "whitespace", "continuation"]
    assert classes_of(wordpiece(), [".", "a", "walk"]) == ["punctuation", "word_lower", "word_lower"]


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # k-means warns when asked for more clusters than there are points
def test_the_silhouette_of_two_pairs_by_hand() -> None:
    pytest.importorskip("sklearn")
    # Cosine distance is 0 within a pair and 1 between pairs: silhouette (1 - 0) / 1. Length does not matter.
    keys = torch.tensor([[1.0, 0.0], [4.0, 0.0], [0.0, 2.0], [0.0, 3.0]])
    assert key_silhouette(keys, [0, 0, 1, 1]) == pytest.approx(1.0)
    # Each key shares a group with a key at distance 1; the other group's are at 0 and 1, mean 0.5: (0.5 - 1) / 1.
    assert key_silhouette(keys, [0, 1, 0, 1]) == pytest.approx(-0.5)
    assert key_silhouette(keys) == pytest.approx(1.0), "k-means finds the pairs"


def test_the_silhouette_is_scikit_learn_s_for_cosine_distance() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    keys = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(12) % 3
    expected = metrics.silhouette_score(keys.numpy(), labels.numpy(), metric="cosine")
    assert key_silhouette(keys, labels) == pytest.approx(expected, abs=1e-6)
    assert key_silhouette(keys.bfloat16() * 64, labels) == pytest.approx(expected, abs=1e-2)


def test_k_means_finds_clusters_where_there_are_some() -> None:
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(4)
    random = torch.randn(24, 64, generator=generator)
    grouped = torch.randn(4, 64, generator=generator).repeat(6, 1) + 0.1 * random
    assert key_silhouette(grouped) > 0.9
    assert key_silhouette(grouped) == pytest.approx(key_silhouette(grouped, torch.arange(24) % 4))
    assert 0.0 < key_silhouette(random) < 0.2
    assert key_silhouette(random, seed=1) == key_silhouette(random, seed=1)


@pytest.mark.filterwarnings("error")
def test_keys_that_point_one_way_have_no_structure() -> None:
    pytest.importorskip("sklearn")
    direction = torch.randn(33, generator=torch.Generator().manual_seed(5))
    keys = direction * torch.linspace(0.1, 3.0, 8).unsqueeze(1)
    assert key_silhouette(keys) == 0.0
    assert key_silhouette(keys, torch.arange(8) % 2) == 0.0
    assert key_silhouette(torch.cat([keys, -keys])) == pytest.approx(1.0), "two different directions"
    assert math.isfinite(key_silhouette(torch.cat([keys, torch.zeros(2, 33)])))


def test_keys_of_a_split_clade_belong_together() -> None:
    pytest.importorskip("sklearn")
    model = busy_model()
    model.split_expert(0, model.expert_uids(0)[2])
    block = model.living_blocks[0]
    clades = [member.clade for member in block.population.members]
    keys = block.router.keys(block.population.alive)
    assert len(set(clades)) == 8 and len(clades) == 9
    # Twins score 1, an only key scores 0.
    assert key_silhouette(keys, clades) == pytest.approx(2 / 9)


@pytest.mark.parametrize(
    ("keys", "labels", "message"),
    [
        (torch.ones(4), None, r"keys of shape \(4,\)"),
        (torch.full((4, 2), math.nan), None, "finite"),
        (torch.ones(2, 2), None, "2 keys have no clusters"),
        (torch.eye(4), [0, 1], "2 labels with 2 groups do not divide 4 keys"),
        (torch.eye(4), [0, 0, 0, 0], "4 labels with 1 groups"),
        (torch.eye(4), [0, 1, 2, 3], "give one label per key and 2 to 3 groups"),
    ],
)
def test_keys_without_a_silhouette_are_refused(keys: Any, labels: Any, message: str) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(TrainingError, match=message):
        key_silhouette(keys, labels)


def test_without_scikit_learn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    remedy = r"pip install living_moe\[analysis\]"
    with pytest.raises(ConfigurationError, match=remedy):
        key_silhouette(torch.eye(4), [0, 0, 1, 1])
    with pytest.raises(ConfigurationError, match=remedy):
        routing_mutual_information([0, 1], [0, 1])
    assert gini([1, 2]) == pytest.approx(1 / 6), "loads need nothing"
