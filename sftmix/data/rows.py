"""Read rows from files, each with its place, and decide what happens to bad ones."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sftmix.runs.failures import printable

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]

ENDINGS = (".json", ".jsonl", ".parquet")
REASONS_SHOWN = 5
_BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\r\n]*")
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")


class BadRowError(ValueError):
    """A row that nothing can be learnt from: its `file`, `line` (from 1) and the `reason`."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(file, line, reason)
        self.file = file
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRows:
    """Raise at the first bad row ("error"), or count bad rows and report them once ("skip").

    `refuse` takes the error of each bad row that is left out.

    Raises:
        ValueError: `on_bad_row` is neither.
    """

    def __init__(
        self, on_bad_row: OnBadRow, refuse: Callable[[BadRowError], None] | None = None
    ) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row: expected 'error' or 'skip', got {on_bad_row!r}")
        self.on_bad_row, self.refuse = on_bad_row, refuse
        self.count = 0
        self.reasons: list[str] = []

    def add(self, error: BadRowError) -> None:
        """Count a bad row, or raise it with the way out if bad rows are errors."""
        if self.on_bad_row == "error":
            reason = f"{error.reason} (--on_bad_row skip leaves such rows out)"
            raise BadRowError(error.file, error.line, reason) from error
        if self.refuse is not None:
            self.refuse(error)
        self.count += 1
        if len(self.reasons) < REASONS_SHOWN:
            self.reasons.append(str(error))

    def report(self, total: int) -> None:
        """Log one warning: how many of `total` rows were left out, and the first reasons."""
        if not self.count:
            return
        reasons = list(self.reasons)
        if self.count > len(reasons):
            reasons.append(f"and {self.count - len(reasons)} more")
        logger.warning(
            "left out %d of %d rows as bad:\n  %s",
            self.count,
            total,
            printable("\n".join(reasons)),
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its line, and its value or what made it unreadable."""

    line: int
    value: Any = None
    problem: str | None = None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})"


def _read_lines(path: Path) -> Iterator[Row]:
    """Yield one row per line; blank lines are no rows."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            data = raw.removeprefix(_BOM) if line == 1 else raw
            if not data.strip():
                continue
            try:
                yield Row(line, json.loads(data.decode("utf-8").rstrip("\r\n")))
            except UnicodeDecodeError as error:
                yield Row(line, problem=_not_utf8(error))
            except json.JSONDecodeError as error:
                yield Row(line, problem=f"invalid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:  # a huge integer; nested too deep
                yield Row(line, problem=f"unreadable JSON: {error}")


def _read_array(data: bytes, path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array, each with the line on which it begins.

    Rows after broken syntax cannot be told apart: that raises whatever `on_bad_row` says.
    """
    try:
        text = data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadRowError(str(path), line, _not_utf8(error)) from None
    decoder = json.JSONDecoder()
    line, counted, position = 1, 0, _after_blank(text, text.index("[") + 1)
    mark = "]" if text.startswith("]", position) else ","
    while mark == ",":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason = f"{error.msg}; the row begins on line {line}"
            raise _broken(text, path, error.pos, reason) from None
        except (ValueError, RecursionError) as error:
            raise BadRowError(str(path), line, f"unreadable JSON: {error}") from None
        yield Row(line, value)
        position = _after_blank(text, end)
        mark = text[position : position + 1]
        if mark not in ("]", ","):
            raise _broken(text, path, position, "expecting ',' or ']' after a row")
        if mark == ",":
            position = _after_blank(text, position + 1)
    position = _after_blank(text, position + 1)
    if position != len(text):
        raise _broken(text, path, position, "text after the end of the array")


def _after_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None
    return match.end()


def _broken(text: str, path: Path, position: int, reason: str) -> BadRowError:
    whole = len(text.rstrip())
    position = min(position, whole)
    cut = position == whole or reason.startswith("Unterminated")
    hint = " (is the file cut off?)" if cut else ""
    line = text.count("\n", 0, position) + 1
    return BadRowError(str(path), line, f"invalid JSON: {reason}{hint}")


def _read_parquet(path: Path) -> Iterator[Row]:
    row = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for value in batch.to_pylist():
                row += 1
                yield Row(row, value)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error


def read_file(path: Path) -> Iterator[Row]:
    """Return the rows of a JSON, JSONL or parquet file.

    A line that cannot be read is a row with a `problem`.

    Raises:
        BadRowError: the syntax of a JSON array is broken.
        ValueError: the ending is unknown, or a parquet file is broken.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: a data file must end in {', '.join(ENDINGS)}")
    if ending == ".parquet":
        return _read_parquet(path)
    if ending == ".json":
        data = path.read_bytes()
        if _ARRAY.match(data):
            return _read_array(data, path)
    return _read_lines(path)
