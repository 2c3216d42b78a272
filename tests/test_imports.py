"""Who may import whom: the rooms' import direction, read from the syntax tree of every source file.

    configuration <- modeling_living_moe <- conversion
                                         <- training
    configuration <- model_cards

The door, `living_moe`, imports every room; no room imports the door. The model needs none of the packages that only
training and reporting use. An import inside a function, under TYPE_CHECKING or through importlib counts like any other.
A room is never imported by its bare folder name: that would load its modules a second time under another name.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOOR = "living_moe"
MAY_IMPORT = {
    "configuration": set(),
    "modeling_living_moe": {"configuration"},
    "conversion": {"modeling_living_moe", "configuration"},
    "training": {"modeling_living_moe", "configuration"},
    "model_cards": {"configuration"},
}
BANNED = {
    "modeling_living_moe": (
        "accelerate",
        "datasets",
        "tensorboard",
        "tensorboardX",
        "torch.utils.tensorboard",
        "plotly",
    )
}
FOLDERS = (*MAY_IMPORT, DOOR, "tests", "benchmarks")
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def absolute(name: str, package: str) -> str:
    """The dotted name that `name`, with its leading dots, means inside `package`."""
    rest = name.lstrip(".")
    if rest == name:
        return name
    parents = package.split(".")
    kept = parents[: len(parents) - (len(name) - len(rest)) + 1]
    return ".".join([*kept, rest])


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import; `from a import b` gives "a.b", as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (f"{node.module}." if node.module else "")
            yield from ((node.lineno, absolute(base + alias.name, package)) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, absolute(str(node.args[0].value), package)


def violations(source: str, path: Path) -> list[str]:
    """What the imports of `source`, a file at `path` relative to the root, break."""
    room = path.parts[0]
    package = ".".join(path.parent.parts if room == DOOR else (DOOR, *path.parent.parts))
    found = []
    for line, name in imported_names(ast.parse(source), package):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first in MAY_IMPORT:
            found.append(f"{path}:{line}: bare import of the room {first}; import {DOOR}.{first}")
        elif first == DOOR and room in MAY_IMPORT:
            if target in MAY_IMPORT:
                if target != room and target not in MAY_IMPORT[room]:
                    found.append(f"{path}:{line}: {room} must not import {target}")
            elif target != "version":
                found.append(f"{path}:{line}: {room} imports the door ({name}); import from the room that defines it")
        for banned in BANNED.get(room, ()):
            if f"{name}.".startswith(f"{banned}."):
                found.append(f"{path}:{line}: {room} must not import {banned}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_keep_the_direction(path) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


def test_every_room_is_read() -> None:
    assert {path.parts[0] for path in SOURCES} >= {*MAY_IMPORT, DOOR, "tests"}


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        (
            "configuration/a.py",
            "from living_moe.modeling_living_moe import router",
            "must not import modeling_living_moe",
        ),
        ("modeling_living_moe/a.py", "import living_moe.training.train", "must not import training"),
        ("modeling_living_moe/a.py", "from living_moe import model_cards", "must not import model_cards"),
        ("modeling_living_moe/lifecycle/a.py", "from ...conversion import convert", "must not import conversion"),
        ("modeling_living_moe/lifecycle/policies/a.py", "from .... import training", "must not import training"),
        ("conversion/a.py", "def f():\n    from living_moe.training import train", "must not import training"),
        ("training/a.py", "from ..conversion.tables import TABLE", "must not import conversion"),
        ("model_cards/a.py", "from living_moe.modeling_living_moe import block", "must not import modeling_living_moe"),
        ("modeling_living_moe/a.py", "from living_moe import LivingMoeConfig", "imports the door"),
        ("training/a.py", "import living_moe", "imports the door"),
        ("modeling_living_moe/a.py", "import configuration", "bare import of the room configuration"),
        ("tests/a.py", "from training.train import main", "bare import of the room training"),
        ("living_moe/a.py", "import model_cards as cards", "bare import of the room model_cards"),
        ("modeling_living_moe/a.py", "import accelerate", "must not import accelerate"),
        ("modeling_living_moe/a.py", "def f():\n    from accelerate.utils import x", "must not import accelerate"),
        ("modeling_living_moe/a.py", "if TYPE_CHECKING:\n    from datasets import Dataset", "must not import datasets"),
        (
            "modeling_living_moe/a.py",
            "class A:\n    def f(self):\n        import plotly.graph_objects",
            "import plotly",
        ),
        ("modeling_living_moe/a.py", "from torch.utils import tensorboard", "import torch.utils.tensorboard"),
        ("modeling_living_moe/a.py", "from torch.utils.tensorboard import SummaryWriter", "torch.utils.tensorboard"),
        ("modeling_living_moe/a.py", "import importlib\nimportlib.import_module('plotly')", "must not import plotly"),
        ("modeling_living_moe/a.py", "__import__('living_moe.training')", "must not import training"),
        ("training/a.py", "import_module('..conversion', __package__)", "must not import conversion"),
    ],
)
def test_planted_violation_is_found(path, source, message) -> None:
    (found,) = violations(source, Path(path))
    assert message in found
    assert found.startswith(f"{path}:{len(source.splitlines())}:")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("modeling_living_moe/a.py", "from living_moe.configuration.errors import PopulationError"),
        ("modeling_living_moe/lifecycle/a.py", "from ..router import route\nfrom . import events"),
        ("modeling_living_moe/a.py", "from living_moe.version import __version__"),
        ("modeling_living_moe/a.py", "import torch.utils.checkpoint\nfrom transformers import PreTrainedModel"),
        ("training/a.py", "import accelerate, datasets\nfrom living_moe.modeling_living_moe import block"),
        ("conversion/a.py", "from living_moe import modeling_living_moe, configuration"),
        ("living_moe/cli.py", "from living_moe.training import train\nfrom .conversion import convert"),
        ("tests/a.py", "import living_moe\nfrom living_moe.training import train"),
        ("modeling_living_moe/a.py", "import datasets_of_mine"),
    ],
)
def test_lawful_imports_pass(path, source) -> None:
    assert violations(source, Path(path)) == []
