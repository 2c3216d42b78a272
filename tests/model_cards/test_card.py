"""A card states what the records say, nothing else, and its metadata passes the Hub's check.

The Hub checks a card by a request; `hub_complaints` is that check's documented rules, written down independently of
the builder (https://huggingface.co/docs/hub/model-cards and the model-index specification of hub-docs).
"""

import json
import math
import re
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from hypothesis import given
from hypothesis import strategies as st

from living_moe.configuration.errors import ConfigurationError
from living_moe.model_cards import CardRecords, build_model_card
from living_moe.model_cards.card import HUB_LICENSES, is_hub_id

FULL = CardRecords(
    model_name="ada/tiny-living",
    family="mixtral",
    base_model="mistralai/Mixtral-8x7B-v0.1",
    license="Apache-2.0",
    languages=["en", "code"],
    datasets=["Salesforce/wikitext", "corpora/python.txt"],
    preset="frozen-graft",
    populations=[{"frozen": 8, "trainable": 2}, {"frozen": 7, "trainable": 0}],
    parameters={"total": 3_900_123, "active": 1_200_456, "trainable": 98_765},
    lineage_summary={"events": {"split": 13, "death": 4}, "first_step": 120, "last_step": 480},
    perplexities=[
        {"dataset": "Salesforce/wikitext", "before": 81.25, "after": 81.5},
        {"dataset": "Python source", "before": None, "after": 12.375},
    ],
    library_versions={"living_moe": "9.8.7", "torch": "6.5.4"},
)
BARE = CardRecords(model_name="tiny-living", family="qwen3_moe")


def hub_complaints(data: dict[str, Any]) -> list[str]:
    """What the Hub would refuse in a card's metadata."""
    wrong = []
    repo_id = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

    def strings(key: str) -> list[str]:
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            wrong.append(f"{key} must be a list of strings, got {value!r}")
            return []
        return value

    if "license" in data and data["license"] not in HUB_LICENSES:
        wrong.append(f"license {data['license']!r} is not an identifier of the Hub")
    if "license_name" in data and not re.fullmatch(r"[a-z0-9._-]+", data["license_name"]):
        wrong.append(f"license_name {data['license_name']!r}")
    wrong += [
        f"language {code!r}" for code in strings("language") if not re.fullmatch("[a-z]{2,3}|code|multilingual", code)
    ]
    wrong += [f"dataset {name!r}" for name in strings("datasets") if not repo_id.fullmatch(name)]
    if "base_model" in data and not (isinstance(data["base_model"], str) and repo_id.fullmatch(data["base_model"])):
        wrong.append(f"base_model {data['base_model']!r}")
    strings("tags"), strings("metrics")
    for entry in data.get("model-index", []):
        if not (isinstance(entry.get("name"), str) and entry["name"] and entry.get("results")):
            wrong.append(f"model-index entry {entry!r}")
        for result in entry["results"]:
            needed = [result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name")]
            needed += [metric.get("type") for metric in result["metrics"]]
            if not (result["metrics"] and all(isinstance(value, str) and value for value in needed)):
                wrong.append(f"model-index result {result!r}")
            values = [metric.get("value") for metric in result["metrics"]]
            if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
                wrong.append(f"model-index values {values!r}")
    return wrong


def metadata(card: ModelCard) -> dict[str, Any]:
    """The metadata as a reader of the file sees it."""
    block = str(card).split("\n---\n", 1)[0].removeprefix("---\n")
    data = yaml.safe_load(block)
    json.dumps(data, allow_nan=False)  # The Hub keeps it as JSON.
    return data


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0].strip()


def test_metadata_of_full_records_is_what_the_hub_wants() -> None:
    data = metadata(build_model_card(FULL))
    assert hub_complaints(data) == []
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"mixture-of-experts", "living-moe", "mixtral"} <= set(data["tags"])
    assert data["base_model"] == "mistralai/Mixtral-8x7B-v0.1"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "code"]
    assert data["datasets"] == ["Salesforce/wikitext"]
    assert data["metrics"] == ["perplexity"]


def test_metadata_of_bare_records_names_only_library_task_and_tags() -> None:
    data = metadata(build_model_card(BARE))
    assert hub_complaints(data) == []
    assert set(data) == {"library_name", "pipeline_tag", "tags"}


def test_saved_card_is_read_back_equal_by_the_hub_library(tmp_path) -> None:
    card = build_model_card(FULL)
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert metadata_load(tmp_path / "README.md") == metadata(card)
    assert str(loaded) == str(card)
    assert loaded.data.eval_results == card.data.eval_results
    assert ModelCardData(**metadata(card)).to_dict() == card.data.to_dict()


def test_model_index_holds_the_perplexity_after_of_each_dataset_apart() -> None:
    records = replace(
        FULL,
        perplexities=[*FULL.perplexities, {"dataset": "English prose", "before": 7.0, "after": 8.5}],
    )
    (entry,) = metadata(build_model_card(records))["model-index"]
    assert entry["name"] == FULL.model_name
    found = {
        result["dataset"]["name"]: [metric["value"] for metric in result["metrics"]] for result in entry["results"]
    }
    assert found == {"Salesforce/wikitext": [81.5], "Python source": [12.375], "English prose": [8.5]}


@pytest.mark.parametrize("after", [None, math.nan, math.inf])
def test_perplexity_without_a_finite_value_stays_out_of_the_metadata(after) -> None:
    card = build_model_card(replace(FULL, perplexities=[{"dataset": "a", "before": 3.5, "after": after}]))
    assert "model-index" not in metadata(card)
    assert "| a | 3.5 |" in section(card, "Evaluation")


@pytest.mark.parametrize("spelling", ["absolute", "relative", "gone", "bare name"])
def test_local_base_model_is_mentioned_but_is_no_hub_id(spelling, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    path = {"absolute": f"{tmp_path}/runs/base", "relative": "runs/base", "gone": "../gone/base", "bare name": "base"}
    card = build_model_card(replace(FULL, base_model=path[spelling]))
    assert "base_model" not in metadata(card)
    (line,) = [line for line in card.text.splitlines() if line.startswith("- **Base model:**")]
    assert "base`" in line and "huggingface.co" not in line
    assert str(tmp_path) not in str(card), "a published card must not show the author's folders"


def test_hub_base_model_is_linked() -> None:
    assert f"(https://huggingface.co/{FULL.base_model})" in build_model_card(FULL).text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", True),
        ("gpt2", False),
        ("", False),
        ("/models/mixtral", False),
        ("./mixtral/base", False),
        ("a/b/c", False),
        ("user/data.parquet", False),
        ("user/name\n", False),
        ("user/na me", False),
        ("üser/name", False),
        ("user/na--me", False),
        ("C:\\models\\mixtral", False),
    ],
)
def test_hub_ids_are_told_from_paths(name, expected) -> None:
    assert is_hub_id(name) is expected


def test_license_unknown_to_the_hub_is_other_with_its_name() -> None:
    card = build_model_card(replace(FULL, license="My License (v2)"))
    data = metadata(card)
    assert (data["license"], data["license_name"]) == ("other", "my-license-v2")
    assert "`My License (v2)`" in card.text


def test_language_that_is_no_iso_code_stays_in_the_text() -> None:
    card = build_model_card(replace(FULL, languages=["en", "English"]))
    assert metadata(card)["language"] == ["en"]
    assert "`English`" in card.text


def test_tables_come_from_the_records() -> None:
    card = build_model_card(FULL)
    assert section(card, "Populations").splitlines()[2:] == [
        "| layer | frozen | trainable | experts |",
        "| ---: | ---: | ---: | ---: |",
        "| 0 | 8 | 2 | 10 |",
        "| 1 | 7 | 0 | 7 |",
    ]
    assert "| 3,900,123 | 1,200,456 | 98,765 |" in section(card, "Parameters")
    lineage = section(card, "Lineage")
    assert "| split | 13 |" in lineage and "| death | 4 |" in lineage
    assert "step 120" in lineage and "step 480" in lineage
    assert "| Salesforce/wikitext | 81.25 | 81.5 |" in section(card, "Evaluation")
    assert "| Python source | not measured | 12.38 |" in section(card, "Evaluation")
    assert "| living_moe | 9.8.7 |" in section(card, "Versions")
    assert "`corpora/python.txt`" in section(card, "Training data")


def test_layers_that_lack_a_kind_have_none_of_it() -> None:
    card = build_model_card(replace(FULL, populations=[{"trainable": 4}, {"frozen": 3}]))
    assert section(card, "Populations").splitlines()[4:] == ["| 0 | 4 | 0 | 4 |", "| 1 | 0 | 3 | 3 |"]


def test_absent_records_give_sentences_and_no_number() -> None:
    card = build_model_card(BARE)
    said = card.text.split("## How to load")[0] + card.text.split("## Populations")[1]
    assert said.count("recorded.") == 11
    assert "|" not in said
    assert not re.search(r"\d", said.replace("qwen3_moe", ""))


def test_empty_lineage_differs_from_none() -> None:
    empty = {"events": {}, "first_step": None, "last_step": None}
    card = build_model_card(replace(BARE, lineage_summary=empty))
    assert "no lifecycle event" in section(card, "Lineage")
    assert section(build_model_card(BARE), "Lineage") == "No lineage is recorded."


def test_how_to_load_registers_the_model_first() -> None:
    code = section(build_model_card(FULL), "How to load").split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert code.index("import living_moe") < code.index("AutoModelForCausalLM.from_pretrained")
    assert '"ada/tiny-living"' in code


def test_template_is_installed_with_the_package() -> None:
    assert resources.files("living_moe.model_cards").joinpath("template.md").is_file()


@pytest.mark.parametrize("field", ["model_name", "family"])
def test_records_without_a_name_are_refused(field) -> None:
    with pytest.raises(ConfigurationError, match=rf"CardRecords\.{field} .* got '\\t'"):
        replace(FULL, **{field: "\t"})


names = st.text(max_size=20)
counts = st.integers(0, 10**12)


@given(
    records=st.builds(
        CardRecords,
        model_name=names.map("m{}".format),
        family=names.map("f{}".format),
        base_model=st.none() | names | st.sampled_from(["a/b", "no/1e5", "a/b\n"]),
        license=st.none() | names | st.sampled_from(["MIT", "other"]),
        languages=st.lists(names | st.sampled_from(["en", "no", "yue"])),
        datasets=st.lists(names | st.sampled_from(["a/b", "c/d"])),
        preset=st.none() | names,
        populations=st.lists(st.dictionaries(st.sampled_from(["frozen", "trainable"]), counts)),
        parameters=st.none() | st.fixed_dictionaries({"total": counts, "active": counts, "trainable": counts}),
        lineage_summary=st.none()
        | st.fixed_dictionaries(
            {
                "events": st.dictionaries(names, counts, max_size=3),
                "first_step": st.none() | counts,
                "last_step": st.none() | counts,
            }
        ),
        perplexities=st.lists(
            st.fixed_dictionaries(
                {"dataset": names, "before": st.none() | st.floats(), "after": st.none() | st.floats()}
            ),
            max_size=3,
        ),
        library_versions=st.dictionaries(names, names, max_size=3),
    )
)
def test_any_records_give_a_card_the_hub_accepts(records: CardRecords) -> None:
    card = build_model_card(records)
    data = metadata(card)
    assert hub_complaints(data) == []
    assert str(ModelCard(str(card))) == str(card)
    titles = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert len(titles) == 8, "a value opened a section of its own"
    for title in ("Populations", "Evaluation", "Versions"):
        rows = [line for line in section(card, title).splitlines() if line.startswith("|")]
        columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows}
        assert len(columns) <= 1, "a value opened a table cell of its own"
