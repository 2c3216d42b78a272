"""The model card of a living checkpoint: `README.md`, YAML metadata for the Hub and text for the reader.

Mitchell et al. 2018 (arXiv:1810.03993); the metadata follows the Hub's model-card specification. Everything a card
says comes from `CardRecords`: what the records lack, the card says is not recorded. Values the Hub would refuse as
metadata (a local path as base model, a language that is no ISO 639 code) stay in the text and out of the YAML, so a
card built here never blocks a push. The folder part of a local path is dropped: cards are published.

This room must not import the model: whoever saves one fills the records and calls `build_model_card`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TypedDict

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from living_moe.configuration.errors import ConfigurationError

#: Licence identifiers the Hub accepts (https://huggingface.co/docs/hub/repositories-licenses); any other is `other`.
HUB_LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown other
    """.split()
)

#: The metric a card reports, by its Hub name.
PERPLEXITY = "perplexity"


class ParameterCounts(TypedDict):
    """Numbers of parameters: all of them, those one token passes through, those that receive gradients."""

    total: int
    active: int
    trainable: int


class LineageSummary(TypedDict):
    """How many lifecycle events of each kind, and the optimizer steps of the first and the last (None without any)."""

    events: Mapping[str, int]
    first_step: int | None
    last_step: int | None


class Perplexity(TypedDict):
    """Perplexity on one dataset (lower is better); `before` or `after` is None when it was not measured."""

    dataset: str
    before: float | None
    after: float | None


class LeaderboardRow(TypedDict):
    """One expert; contributions in nats per token of the text they were measured on, above 0 where the expert helps."""

    layer: int
    uid: int
    #: Multiples of the uniform share of its layer's tokens.
    load: float
    #: Loss without the expert less the loss with it; None where only its sensitivity is known.
    contribution: float | None
    #: Sum over tokens of the magnitude of the loss's derivative by the expert's weight in the sum.
    sensitivity: float
    #: Divergence of the classes of tokens it reads from those its layer reads, nats.
    specialisation: float
    #: The class that it reads more than its layer does; None where there is none.
    reads: str | None


class Leaderboard(TypedDict):
    """The most valuable experts, best first, of `experts` measured on `tokens` tokens at optimizer step `step`."""

    step: int
    tokens: int
    experts: int
    rows: Sequence[LeaderboardRow]


@dataclass(frozen=True, kw_only=True)
class CardRecords:
    """What a model knows about itself. An absent record is None or empty, never a guess."""

    #: Hub id ("user/name") or folder name of the checkpoint.
    model_name: str
    #: `model_type` of the source family, e.g. "mixtral".
    family: str
    #: Hub id or local path of the checkpoint the model was grafted from.
    base_model: str | None = None
    #: Licence of the weights: an identifier of the Hub, or any other name.
    license: str | None = None
    #: ISO 639 codes ("en"), or "code" and "multilingual".
    languages: Sequence[str] = ()
    #: Hub ids or local paths of the training data.
    datasets: Sequence[str] = ()
    #: Name of the preset the model was built with.
    preset: str | None = None
    #: Per living layer, in order: alive experts by kind, e.g. {"frozen": 8, "trainable": 2}.
    populations: Sequence[Mapping[str, int]] = ()
    parameters: ParameterCounts | None = None
    #: None where no lineage was kept; `events` is empty where one was kept and nothing happened.
    lineage_summary: LineageSummary | None = None
    perplexities: Sequence[Perplexity] = ()
    #: None where nobody measured what experts contribute.
    leaderboard: Leaderboard | None = None
    #: Package name to version, of what wrote the checkpoint.
    library_versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model_name", "family"):
            value = getattr(self, name)
            if not _line(value):
                raise ConfigurationError(f"CardRecords.{name} must name something, got {value!r}; a card needs it.")


def build_model_card(records: CardRecords) -> ModelCard:
    """The card of a checkpoint, ready for `card.save(directory / "README.md")`.

    Args:
        records: What the model knows about itself.

    Returns:
        A card whose metadata passes the Hub's check, and whose text states only what is in `records`. Nothing is sent
        anywhere: `card.validate()` asks the Hub itself.
    """
    base_model = records.base_model or None
    body = _template().render(
        records=records,
        base_model=base_model,
        base_is_hub_id=base_model is not None and is_hub_id(base_model),
        kinds=list(dict.fromkeys(kind for layer in records.populations for kind in layer)),
    )
    return ModelCard(f"---\n{_metadata(records).to_yaml()}\n---\n\n{body}")


def is_hub_id(name: str) -> bool:
    """Whether `name` is the id of a Hub repository, "namespace/name", rather than a local path or a free name.

    A relative path can look like an id, so a name that exists on this disk is a path, as `from_pretrained` has it.
    Names without a namespace are not taken for ids: only a few legacy repositories have such.
    """
    if name.count("/") != 1 or not name.isascii() or os.path.exists(name):
        return False
    if re.search(r"\.(arrow|csv|gz|json|jsonl|parquet|txt|zst)$", name, re.IGNORECASE):
        return False  # A data file that is no longer there.
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _metadata(records: CardRecords) -> ModelCardData:
    hub_datasets = [name for name in dict.fromkeys(records.datasets) if is_hub_id(name)]
    results = [
        EvalResult(
            task_type="text-generation",
            # The Hub reads `type` as a dataset id; text of one's own takes the name of the plain-text loader, and
            # `config` keeps two such texts apart (results of equal type and config are merged).
            dataset_type=name if name in hub_datasets else "text",
            dataset_config=None if name in hub_datasets else name,
            dataset_name=name,
            metric_type=PERPLEXITY,
            metric_value=float(after),
        )
        for name, after in ((_shown(row["dataset"]), row["after"]) for row in records.perplexities)
        if name and after is not None and math.isfinite(after)  # NaN is not JSON, so not metadata either.
    ]
    name = _line(records.model_name)
    base_model = records.base_model or ""
    license_id, license_name = _license(records.license)
    return ModelCardData(
        language=[code for code in dict.fromkeys(records.languages) if _is_language_code(code)] or None,
        license=license_id,
        license_name=license_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag in ("mixture-of-experts", "living-moe", _slug(records.family)) if tag],
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=hub_datasets or None,
        metrics=[PERPLEXITY] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _license(name: str | None) -> tuple[str | None, str | None]:
    """The Hub's `license` and `license_name` of a licence as recorded."""
    if not name:
        return None, None
    if name.lower() in HUB_LICENSES:
        return name.lower(), None
    return "other", _slug(name) or None


def _is_language_code(code: str) -> bool:
    return re.fullmatch("[a-z]{2,3}|code|multilingual", code) is not None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-")


def _line(text: str) -> str:
    """`text` on one line."""
    return " ".join(text.split())


def _shown(name: str) -> str:
    """A name as a card shows it: on one line, and without the folders of a path that leaves the working directory."""
    if re.match(r"[/\\~.]|[A-Za-z]:", name):
        name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return _line(name)


def _cell(value: object) -> str:
    """A value as one cell of a Markdown table."""
    return _line(str(value)).replace("\\", "\\\\").replace("|", "\\|")


def _code(text: str) -> str:
    """Text as a code span, which a backtick would end."""
    return f"`{_line(text).replace('`', chr(39)) or '-'}`"


def _number(value: float | None) -> str:
    """A measured number, e.g. "12.35"; "not measured" for None."""
    return "not measured" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    """A contribution, e.g. "+0.0123"; "not measured" for None."""
    return "not measured" if value is None else f"{value:+.3g}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    filters = {"line": _line, "shown": _shown, "cell": _cell, "code": _code, "number": _number, "hub_id": is_hub_id}
    filters |= {"signed": _signed}
    environment.filters.update(filters)
    return environment.from_string(resources.files(__package__).joinpath("template.md").read_text(encoding="utf-8"))
