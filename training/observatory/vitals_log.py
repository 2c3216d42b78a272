"""The vitals log, `vitals.jsonl`: every expert's measurements over a run, one line per snapshot.

A line is a JSON object that begins with its `step`. Its columns are packed: sorted by (layer, uid), measurements are
rounded to a logarithmic scale (by at most 1.1 % of their value, or 1.1e-5 near zero), what was known from the snapshot
before is taken off, and the small integers that remain are deflated, each byte of their four on its own, in base64.
That is about one byte per expert and measurement. A line with `whole` stands on its own; every 64th does, and the first
of every process. Lines are appended in one write each: the file may be read while it grows, and one that was cut off
loses its last line only.

Reads and writes this one file; knows numbers, not models. E experts of a snapshot.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from living_moe.configuration.errors import RecordsError
from living_moe.training.observatory.tail import Tail

Array = npt.NDArray[Any]

VITALS_NAME = "vitals.jsonl"
#: Columns kept as the integers they are: who an expert is. All others are rounded.
EXACT = ("uid", "clade", "field", "tier", "frozen", "parent", "born")
#: Snapshots from one that stands on its own to the next.
WHOLE_EVERY = 64
#: The scale of rounded numbers: steps per octave, and the magnitude below which steps no longer shrink.
_PER_OCTAVE, _SMALLEST = 32, 2.0**-10
_LARGEST = 1e38
_STEP = re.compile(rb'\{"step": (\d+), "whole": (true|false)')


@dataclass(frozen=True)
class Snapshot:
    """All alive experts at one step, sorted by layer, then uid.

    Attributes:
        step: Optimizer steps the model has lived.
        layer_E: int32, living layer.
        columns: By name, (E,): those of `EXACT` (int64; `parent` is -1 for a founder, `frozen` 0 or 1), and
            measurements (float32): those of `model.vitals`, `key_0` ... the key on a few fixed random directions,

            and where keys are plastic `plasticity`, the pull that a hit still has on the key, and `drift`, how far it
            is from its start.
    """

    step: int
    layer_E: Array
    columns: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        try:
            return self.columns[name]
        except KeyError:
            raise RecordsError(
                f"the snapshot of step {self.step} has no column {name!r}; it has {sorted(self.columns)}."
            ) from None

    def __len__(self) -> int:
        return len(self.layer_E)

    @property
    def identity_E(self) -> Array:
        """Layer and uid in one int64, ascending."""
        return identity(self.layer_E, self["uid"])

    def of_layer(self, layer: int) -> Snapshot:
        """Only the experts of one layer."""
        first, end = np.searchsorted(self.layer_E, [layer, layer + 1])
        return Snapshot(
            self.step, self.layer_E[first:end], {name: column[first:end] for name, column in self.columns.items()}
        )


def identity(layer: Any, uid: Any) -> Array:
    """One int64 for a layer and a uid, so that experts of all layers can be sorted and looked up together."""
    return np.asarray(layer, np.int64) << 44 | np.asarray(uid, np.int64)


def rounded(values: Array) -> Array:
    """Numbers on the logarithmic scale, int64. What is no number counts as 0; larger ones than 1e38 as that."""
    values = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    values = values.clip(-_LARGEST, _LARGEST)
    return np.rint(np.copysign(_PER_OCTAVE * np.log2(1.0 + np.abs(values) / _SMALLEST), values)).astype(np.int64)


def unrounded(codes: Array) -> Array:
    """What `rounded` has made of numbers, float32."""
    return np.copysign((np.exp2(np.abs(codes) / _PER_OCTAVE) - 1.0) * _SMALLEST, codes).astype(np.float32)


def packed(numbers: Array) -> str:
    """Integers below 2^31 in magnitude, most of them small, as text."""
    zigzag = ((numbers << 1) ^ (numbers >> 63)).astype("<u4")
    planes = np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, 4).T)
    return base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode("ascii")


def unpacked(text: str) -> Array:
    """The integers in a text of `packed`, int64.

    Raises:
        ValueError: It is none.
    """
    try:
        planes = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), np.uint8).reshape(4, -1)
    except zlib.error as error:
        raise ValueError(f"a packed column is broken: {error}") from error
    zigzag = np.ascontiguousarray(planes.T).view("<u4").reshape(-1).astype(np.int64)
    return (zigzag >> 1) ^ -(zigzag & 1)


class VitalsWriter:
    """Appends snapshots to a vitals log.

    Args:
        path: Of the log.
        after: Keep what is there up to this step; None begins anew.
    """

    def __init__(self, path: Path, *, after: int | None = None):
        self.path = path
        self.bytes = 0
        self._before: dict[str, Array] = {}
        self._identity_E: Array = np.empty(0, np.int64)
        self._since_whole = 0
        kept: list[bytes] = []
        if after is not None and path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n") and (found := _STEP.match(line)) and int(found[1]) <= after:
                    kept.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(kept))
        self.bytes = sum(map(len, kept))

    def write(self, snapshot: Snapshot) -> int:
        """Append a snapshot; returns the bytes it took."""
        identity_E = snapshot.identity_E
        whole = not self._since_whole or {*self._before} != {*snapshot.columns} - {"uid"}
        line: dict[str, Any] = {"step": snapshot.step, "whole": whole}
        if whole or not np.array_equal(identity_E, self._identity_E):
            line["experts"] = np.bincount(snapshot.layer_E).tolist()
            line["uid"] = packed(np.diff(snapshot["uid"], prepend=0))
        carry = _Carry(None if whole else self._identity_E, identity_E)
        codes = {
            name: column.astype(np.int64) if name in EXACT else rounded(column)
            for name, column in snapshot.columns.items()
            if name != "uid"
        }
        line["columns"] = {name: packed(code - carry(self._before.get(name))) for name, code in codes.items()}
        text = (json.dumps(line) + "\n").encode("ascii")
        with self.path.open("ab") as file:
            file.write(text)
        self._before, self._identity_E = codes, identity_E
        self._since_whole = 1 if whole else (self._since_whole + 1) % WHOLE_EVERY
        self.bytes += len(text)
        return len(text)


class _Carry:
    """Brings a column from the experts of one snapshot to those of the next: 0 for newborns."""

    def __init__(self, old_E: Array | None, new_E: Array):
        self._size = len(new_E)
        self._place_E: Array | None = None
        self._known_E: Array = np.empty(0, bool)
        self._same = old_E is not None and np.array_equal(old_E, new_E)
        if old_E is not None and len(old_E) and not self._same:
            self._place_E = np.minimum(np.searchsorted(old_E, new_E), len(old_E) - 1)
            self._known_E = old_E[self._place_E] == new_E

    def __call__(self, column: Array | None) -> Array:
        if column is None or not (self._same or self._place_E is not None):
            return np.zeros(self._size, np.int64)
        return column if self._same else np.where(self._known_E, column[self._place_E], 0)


@dataclass(frozen=True)
class _Line:
    step: int
    whole: bool
    start: int
    length: int


class VitalsLog:
    """Reads a vitals log, snapshot by snapshot, without ever holding all of it.

    Args:
        path: Of the log.
        notes: Gets a line for whatever cannot be read.
    """

    def __init__(self, path: Path, notes: list[str]):
        self.path = path
        self.notes = notes
        self.tail = Tail(path)
        self._lines: list[_Line] = []
        self._cut = ""
        self.follow()

    def follow(self) -> bool:
        """Take notice of what was appended since; whether there are new snapshots."""
        if not self.tail.changed:
            return False
        known = len(self._lines)
        for _, start, line in self.tail.new_lines():
            found = _STEP.match(line)
            if found and line.rstrip(b"\n").endswith(b"}}"):
                self._lines.append(_Line(int(found[1]), found[2] == b"true", start, len(line)))
            else:
                self.notes.append(f"{self.path.name}: {len(line)} bytes at byte {start} are no snapshot; left out.")
        if self._cut:
            self.notes.remove(self._cut)
        cut = self.tail.cut
        self._cut = f"{self.path.name}: cut off in its last line; {cut} bytes left out." if cut else ""
        if self._cut:
            self.notes.append(self._cut)
        return len(self._lines) > known

    @property
    def steps(self) -> list[int]:
        return [line.step for line in self._lines]

    def snapshots(self, columns: Iterable[str] | None = None, *, after: int = -1) -> Iterator[Snapshot]:
        """Snapshots of the steps behind `after`, oldest first, with `uid` and the columns asked for (None: all)."""
        first = next((place for place, line in enumerate(self._lines) if line.step > after), len(self._lines))
        while 0 < first < len(self._lines) and not self._lines[first].whole:
            first -= 1
        decoder = _Decoder(self, columns)
        with self.path.open("rb") as file:
            for line in self._lines[first:]:
                if decoder.decode(file, line) and line.step > after:
                    yield decoder.snapshot()

    def latest(self, columns: Iterable[str] | None = None) -> Snapshot | None:
        """The last snapshot that can be read."""
        before = [line.step for line in self._lines if line.whole]
        for start in reversed([-1, *(step - 1 for step in before[1:])]):
            if found := list(self.snapshots(columns, after=start)):
                return found[-1]
        return None


class _Decoder:
    """Unpacks a log's lines one after the other, each from the one before."""

    def __init__(self, log: VitalsLog, columns: Iterable[str] | None):
        self._log = log
        self._wanted = None if columns is None else set(columns)
        self._step = -1
        self._layer_E: Array = np.empty(0, np.int32)
        self._identity_E: Array | None = None
        self._codes: dict[str, Array] = {}

    def decode(self, file: BinaryIO, line: _Line) -> bool:
        """Go on to a line; False where it cannot be read, or nothing it stands on."""
        if self._identity_E is None and not line.whole:
            return False
        file.seek(line.start)
        try:
            self._layer_E, self._identity_E, self._codes = _next(
                json.loads(file.read(line.length)), self._layer_E, self._identity_E, self._codes, self._wanted
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            note = f"{self._log.path.name}: the snapshot of step {line.step} is broken ({error}); left out."
            if note not in self._log.notes:
                self._log.notes.append(note)
            self._identity_E = None
            return False
        self._step = line.step
        return True

    def snapshot(self) -> Snapshot:
        """What the last line said."""
        assert self._identity_E is not None
        found = {name: code if name in EXACT else unrounded(code) for name, code in self._codes.items()}
        return Snapshot(self._step, self._layer_E, {"uid": self._identity_E & ((1 << 44) - 1), **found})


class NewestSnapshot:
    """The last snapshot of a log that grows; every line is unpacked once, those before the newest whole one never.

    Args:
        log: Followed by its owner.
        columns: To unpack beside `uid`.
    """

    def __init__(self, log: VitalsLog, columns: Iterable[str]):
        self._log = log
        self._decoder = _Decoder(log, columns)
        self._place = 0

    def __call__(self) -> Snapshot | None:
        """The newest snapshot since the last call; None where there is none."""
        lines = self._log._lines
        wholes = (place for place in range(len(lines) - 1, self._place, -1) if lines[place].whole)
        first, good = next(wholes, self._place), False
        if self._place < len(lines):
            with self._log.path.open("rb") as file:
                for line in lines[first:]:
                    good = self._decoder.decode(file, line)
        self._place = len(lines)
        return self._decoder.snapshot() if good else None


def _next(
    line: dict[str, Any],
    layer_E: Array,
    identity_E: Array | None,
    before: Mapping[str, Array],
    wanted: set[str] | None,
) -> tuple[Array, Array, dict[str, Array]]:
    """Layers, identities and codes of a line, from those of the line before."""
    old_E = None if line["whole"] else identity_E
    if "uid" in line:
        counts: Sequence[int] = line["experts"]
        layer_E = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        identity_E = identity(layer_E, np.cumsum(unpacked(line["uid"])))
    assert identity_E is not None
    carry = _Carry(old_E, identity_E)
    codes = {
        name: unpacked(text) + carry(before.get(name))
        for name, text in line["columns"].items()
        if wanted is None or name in wanted
    }
    if any(len(code) != len(identity_E) for code in codes.values()):
        raise ValueError("its columns are not as long as its list of experts")
    return layer_E, identity_E, codes


__all__ = ["EXACT", "VITALS_NAME", "NewestSnapshot", "Snapshot", "VitalsLog", "VitalsWriter", "identity"]
