"""`living-moe space`: a folder that shows a saved model's population as a Space of the Hugging Face hub.

The folder stands on its own: the model, the records of its run if it has any, this package as it is installed here, and
a Docker image that serves the live page of `living-moe watch` (training/observatory/watch.py). Versions are those of
this environment, where the page was seen to work. `python app.py` in it shows the same page on loopback.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.errors import CheckpointError
from living_moe.conversion.convert import free_directory
from living_moe.model_cards.card import HUB_LICENSES, is_hub_id
from living_moe.modeling_living_moe.checkpoint import check_files
from living_moe.modeling_living_moe.lifecycle.lineage import LINEAGE_NAME
from living_moe.training.checkpointing import FINAL_MODELS, newest_model
from living_moe.training.observatory.records import LOG_NAME, RUN_NAME
from living_moe.training.observatory.vitals_log import VITALS_NAME
from living_moe.training.observatory.watch import PORT

MODEL = "model"
#: Rooms of the package, which an editable install keeps elsewhere than under `living_moe`.
ROOMS = ("configuration", "conversion", "model_cards", "modeling_living_moe", "training")
#: What the page is served with, from the extra `watch`.
SERVED_WITH = ("starlette", "uvicorn")
RECORDS = (RUN_NAME, LOG_NAME, LINEAGE_NAME, VITALS_NAME)
#: What concerns this machine only.
_PRIVATE = ("host", "pid")

APP = '''"""Serves the live page of the model in `{model}`: on every address in a Space, else on loopback."""

import os
from pathlib import Path

from living_moe.training.observatory.watch import serve

if __name__ == "__main__":
    serve(
        Path(__file__).resolve().parent / "{model}",
        title={title!r},
        port=int(os.environ.get("PORT", "{port}")),
        public="SPACE_ID" in os.environ,
        announce=lambda url: print(f"serving at {{url}}", flush=True),
    )
'''

DOCKERFILE = """FROM python:{python}-slim
RUN useradd --create-home --uid 1000 user
USER user
ENV HOME=/home/user PATH=/home/user/.local/bin:$PATH HF_HUB_OFFLINE=1
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY --chown=user . .
EXPOSE {port}
CMD ["python", "app.py"]
"""

README = """---
{metadata}---

# {title}

The experts of a mixture-of-experts model that live: they split, merge, freeze and die while it trains. This page shows
who is alive and how they are, their lineage, what happened, and which of them serve the tokens of a text you type. It
was written by `living-moe space` from the model in `{model}/`, which it only reads.

On your own machine: `pip install -r requirements.txt`, `python app.py`, http://127.0.0.1:{port}/.
"""


def write_space(source: str | Path, target: str | Path, *, title: str | None = None) -> Path:
    """Write the folder; all of it or nothing.

    Args:
        source: Directory of a checkpoint, or of a run, whose newest saved model is taken with the run's records.
        target: Must not exist or be empty.
        title: Of the Space; default the model's name.

    Returns:
        `target`.

    Raises:
        CheckpointError: There is no complete living model in `source`.
        ConversionError: Something is in `target`.
    """
    source, target = Path(source), free_directory(target)
    model = newest_model(source)
    if model is None:
        raise CheckpointError(
            f"{source} holds no saved model (config.json, or final or checkpoint-N in a run's directory); give a "
            f"living checkpoint's directory."
        )
    check_files(model)
    config = LivingMoeConfig.from_pretrained(model)
    title = " ".join((title or source.resolve().name).split())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        staged = Path(folder) / target.name
        staged.mkdir()
        _copy_model(model, source, staged / MODEL)
        _copy_package(staged / "living_moe")
        texts = {
            "README.md": README.format(
                metadata=yaml.safe_dump(metadata(config, title), sort_keys=False, allow_unicode=True),
                title=title,
                model=MODEL,
                port=PORT,
            ),
            "app.py": APP.format(model=MODEL, title=title, port=PORT),
            "Dockerfile": DOCKERFILE.format(python=f"{sys.version_info.major}.{sys.version_info.minor}", port=PORT),
            "requirements.txt": "".join(f"{line}\n" for line in requirements()),
            # Weights beyond 10 MB are taken by the hub in this form only.
            ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            "*.jsonl filter=lfs diff=lfs merge=lfs -text\n",
        }
        for name, text in texts.items():
            (staged / name).write_text(text, encoding="utf-8")
        staged.replace(target)
    return target


def metadata(config: LivingMoeConfig, title: str) -> dict[str, Any]:
    """The front matter of the Space's README.md."""
    provenance = config.provenance
    found: dict[str, Any] = {
        "title": title,
        "emoji": "🧫",
        "colorFrom": "green",
        "colorTo": "blue",
        "sdk": "docker",
        "app_port": PORT,
        "pinned": False,
        "short_description": "A mixture of experts as a living population",
        "tags": ["mixture-of-experts", "living-moe"],
    }
    if str(provenance.get("license", "")).lower() in HUB_LICENSES:
        found["license"] = str(provenance["license"]).lower()
    if is_hub_id(base := str(provenance.get("base_model") or "")):
        found["models"] = [base]
    return found


def requirements() -> list[str]:
    """What the page needs, in the versions of this environment; torch from its index without CUDA."""
    try:
        declared = [Requirement(line) for line in requires("living-moe") or ()]
    except PackageNotFoundError:
        declared = []
    names = [each.name for each in declared if each.marker is None or each.marker.evaluate({"extra": ""})]
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    for name in dict.fromkeys((*names, *SERVED_WITH)):
        try:
            # A local part, as in 2.13.0+cpu, names a build that an index may not have.
            lines.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            lines.append(name)
    return lines


def _copy_model(model: Path, source: Path, target: Path) -> None:
    """The model's files, without what only training needs; in a folder beside the records of its run if it has any."""
    records = [path for name in RECORDS if (path := source / name).is_file()] if model != source else []
    place = target / FINAL_MODELS[0] if records else target
    place.mkdir(parents=True)
    for entry in model.iterdir():
        if entry.is_file():
            shutil.copyfile(entry, place / entry.name)
    for entry in records:
        shutil.copyfile(entry, target / entry.name)
    header = target / RUN_NAME
    if header.is_file():
        try:
            told = json.loads(header.read_bytes())
            kept = {name: value for name, value in told.items() if name not in _PRIVATE}
        except (ValueError, AttributeError):
            # Half written: its readers do without it.
            header.unlink()
        else:
            header.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _copy_package(target: Path) -> None:
    """This package as a Space can import it: rooms under the door."""
    import living_moe

    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for module, place in ((living_moe, target), *((import_module(f"living_moe.{r}"), target / r) for r in ROOMS)):
        assert module.__file__ is not None
        shutil.copytree(Path(module.__file__).parent, place, ignore=ignored, dirs_exist_ok=True)


__all__ = ["metadata", "requirements", "write_space"]
