"""Follows a file of JSON lines that another process appends to: every whole line is read once.

What a crash cut off in the middle stays unread and is counted. A resumed run rewrites its files, shorter or other than
they were; that is noticed by the last bytes read, so that a reader can begin anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

#: Bytes remembered of what was read last.
_REMEMBERED = 256


class Tail:
    """Reads the lines of a file, and later those that were appended since.

    Args:
        path: Of the file; it may come later.

    Attributes:
        lines: Read so far.
        cut: Bytes behind the last whole line, as a crash (or a write in progress) leaves them.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = 0
        self.cut = 0
        self._offset = 0
        self._before = b""
        self._looked: tuple[int, int] | None = None

    @property
    def changed(self) -> bool:
        """Whether the file is another than when it was read last, by its size and time."""
        return self._look() != self._looked

    def rewritten(self) -> bool:
        """Whether what was read is no longer what the file begins with: it was begun anew, or removed."""
        if not self._offset or not self.changed:
            return False
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._before))
                return file.read(len(self._before)) != self._before
        except FileNotFoundError:
            return True

    def new_lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number (from 1), first byte and text of each line appended since; empty ones are passed over.

        A last line without its newline counts as whole if it is a JSON object.
        """
        looked = self._look()
        if looked in (None, self._looked):
            return
        self.cut = 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n") and not _is_object(line):
                    self.cut = len(line)
                    break
                start = self._offset
                self.lines += 1
                self._offset += len(line)
                self._before = (self._before + line[-_REMEMBERED:])[-_REMEMBERED:]
                if line.strip():
                    yield self.lines, start, line
        self._looked = looked

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_size, found.st_mtime_ns


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


__all__ = ["Tail"]
