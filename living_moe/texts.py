"""Text that every Python interpreter carries, so that examples need no download: documentation, and source code."""

from __future__ import annotations

import ast
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from living_moe.configuration.errors import TrainingError

_SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
#: Shorter docstrings are labels, not prose.
_MIN_DOCSTRING = 200


def standard_library() -> list[Path]:
    """Python files of the running interpreter's standard library, tests and data tables left out, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    return [file for file in sorted(root.rglob("*.py")) if not _SKIPPED & set(file.relative_to(root).parts)]


def documentation(limit: int) -> str:
    """English prose: the interpreter's help topics and its library's longer docstrings, up to `limit` characters."""
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions split it off
        parts = []
    else:
        parts = [topics.topics[name] for name in sorted(topics.topics)]
    for file in standard_library():
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        docstrings = [ast.get_docstring(node) or "" for node in _documented(tree)]
        parts += [docstring for docstring in docstrings if len(docstring) >= _MIN_DOCSTRING]
    return "\n\n".join(parts)[:limit]


def source_code(limit: int) -> str:
    """Python source of the standard library, whole files in a fixed random order, up to `limit` characters.

    Docstrings are left out: they are the prose of `documentation`, and a text must not be in both domains.
    """
    files = standard_library()
    random.Random(0).shuffle(files)
    parts: list[str] = []
    length = 0
    for file in files:
        try:
            text = without_docstrings(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        parts.append(text)
        length += len(text)
        if length >= limit:
            break
    return "\n".join(parts)[:limit]


def without_docstrings(source: str) -> str:
    """Python source without the lines of its docstrings.

    Raises:
        SyntaxError: Not Python source of this interpreter's version.
    """
    lines = source.splitlines(keepends=True)
    for node in _documented(ast.parse(source)):
        first = node.body[0]
        assert first.end_lineno is not None
        for number in range(first.lineno - 1, first.end_lineno):
            lines[number] = ""
    return "".join(lines)


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The nodes of a module that have a docstring, the module itself included."""
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node):
            yield node


def read_text(path: Path, limit: int | None = None) -> str:
    """A text file.

    Raises:
        TrainingError: It cannot be read, is empty, or is no UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read text from {path}: {error}") from error
    if not text.strip():
        raise TrainingError(f"{path} is empty; give a text file.")
    return text[:limit]


def calibration_ids(source: str | os.PathLike[str], path: Path) -> Tensor:
    """Token ids, int64 (tokens,), of a text file under a checkpoint's own tokenizer.

    Raises:
        TrainingError: The text cannot be read, or the checkpoint has no tokenizer.
    """
    text = read_text(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read a tokenizer from {source}: {error}") from error
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
