"""Read rows from JSON: one on each line, arrays, objects that hold a list, columns of lists.

A file is read piece by piece, whatever its size. orjson decodes a line; Python's `json` decodes
what orjson reads in another way (integers beyond 64 bits, NaN, lone surrogates, deep nesting), says
what is wrong with a line, and decodes everything that is not on a line of its own, since orjson
cannot tell where a value ends.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import logging
import re
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sftmix.data.formats import format_of
from sftmix.data.rows import BadRowError, Row, not_utf8
from sftmix.runs.failures import printable

logger = logging.getLogger(__name__)

BOM = b"\xef\xbb\xbf"
PIECE = 1 << 20  # bytes read at a time: 256 KiB and 4 MiB are as fast
# An object up to this size is looked at as a whole; a larger one is taken for what holds the rows.
LARGE_OBJECT = 16 << 20
# The longest beginning of a word or number that `json` takes for an error: "-Infinity".
_CUT = 16
_BLANK = re.compile(r"[ \t\r\n]*")
BLOCK = 1 << 18  # bytes of lines that are searched for long numbers at once
_DIGITS = 19  # of the smallest integer beyond 64 bits
_DEEP = 500  # brackets: orjson nests to 1,024, Python as deep as its stack


def read_lines(stream: io.BufferedIOBase) -> Iterator[Row]:
    """Yield one row per line; blank lines are no rows."""
    line = 0
    while lines := stream.readlines(BLOCK):
        decode = _decoded if _has_long_number(b"".join(lines)) else _decoded_fast
        for raw in lines:
            line += 1
            data = raw.removeprefix(BOM) if line == 1 else raw
            if not data or data.isspace():
                continue
            try:
                yield Row(line, decode(data))
            except UnicodeDecodeError as error:
                yield Row(line, problem=not_utf8(error))
            except json.JSONDecodeError as error:
                hint = " (it holds NUL bytes: is the file damaged?)" if b"\0" in data else ""
                yield Row(line, problem=f"invalid JSON: {error.msg} at column {error.colno}{hint}")
            except (ValueError, RecursionError) as error:  # a huge integer; nested too deep
                yield Row(line, problem=f"unreadable JSON: {error}")


def _decoded(line: bytes) -> Any:
    return json.loads(line.decode("utf-8").rstrip("\r\n"))


def _decoded_fast(line: bytes) -> Any:
    """Return what `_decoded` does: 1.0 to 2.1 times as fast, twice on code and on tokens."""
    if line.count(b"[") + line.count(b"{") < _DEEP:
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass  # `json` reads it, or says what is wrong
    return _decoded(line)


def _has_long_number(data: bytes) -> bool:
    """Tell whether as many digits stand in a row as orjson may make a float of."""
    digits = (np.frombuffer(data, np.uint8) - ord("0")) < 10
    for step in (1, 2, 4, 8, _DIGITS - 16):  # runs of 2, 4, 8, 16, and of 19
        digits = digits[step:] & digits[:-step]
    return bool(digits.any())


def has_lines(head: bytes, *, is_whole: bool, expected: bool) -> bool:
    """Tell from a file's beginning whether each line is a row, rather than a part of an array.

    Args:
        head: the file's beginning.
        is_whole: whether it is the whole file.
        expected: whether the file's ending says so (.jsonl).
    """
    first, mark, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    second = rest.lstrip().partition(b"\n")[0]
    if first.startswith(b"[") and not expected:
        return False
    if not mark and not is_whole:  # a first line longer than the head
        return expected
    try:
        value = json.loads(first)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(error.doc.rstrip())
        return not is_cut or (not first.rstrip().endswith(b"[") and _is_object(second))
    except (ValueError, RecursionError):
        return True
    if second or not value:
        return True
    if isinstance(value, list):
        return not all(isinstance(one, dict) for one in value)
    return expected or not isinstance(value, dict)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _Text:
    """The text of a file from where it is being read: what lies behind is forgotten."""

    def __init__(self, stream: io.BufferedIOBase, path: Path) -> None:
        self.stream, self.path = stream, path
        self.text, self.position, self.ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._line, self._counted, self._end = 1, 0, 0

    def line(self) -> int:
        """Return the line of the position."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def more(self) -> None:
        """Read on: as much as is kept, so that a long value is not begun too often."""
        self.line()
        self.text, self.position, self._counted = self.text[self.position :], 0, 0
        size = max(PIECE, len(self.text))
        data = self.stream.read(size)
        self.ended = len(data) < size
        try:
            self.text += self._decoder.decode(data, self.ended)
        except UnicodeDecodeError as error:
            lines = self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise BadRowError(str(self.path), self._line + lines, not_utf8(error)) from None

    def next(self) -> str:
        """Return the next character that is no blank, and stop at it; "" at the end."""
        while True:
            blank = _BLANK.match(self.text, self.position)
            assert blank is not None
            self.position = blank.end()
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.more()

    def mark(self, expected: str, reason: str) -> str:
        """Return the next character, and stop behind it.

        Raises:
            BadRowError: it is none of the expected ones.
        """
        found = self.next()
        if not found or found not in expected:
            raise self.broken(self.position, reason)
        self.position += 1
        return found

    def peek(self, limit: int | None = None) -> Any:
        """Return the value that begins here.

        Raises:
            BadRowError: the syntax is broken.
            OverflowError: it is longer than `limit` characters.
        """
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.text) - _CUT or error.msg.startswith("Unterminated")
                if not is_cut or self.ended:
                    reason = f"{error.msg}; the row begins on line {self.line()}"
                    raise self.broken(error.pos, reason) from None
            except (ValueError, RecursionError) as error:
                reason = f"unreadable JSON: {error}"
                raise BadRowError(str(self.path), self.line(), reason) from None
            else:
                # The end of what was read may be the middle of a number.
                if end <= len(self.text) - _CUT or self.ended:
                    self._end = end
                    return value
            if limit is not None and len(self.text) - self.position > limit:
                raise OverflowError
            self.more()

    def value(self) -> Any:
        """Return the value that begins here, and stop behind it.

        Raises:
            BadRowError: the syntax is broken.
        """
        value = self.peek()
        self.position = self._end
        return value

    def broken(self, position: int, reason: str) -> BadRowError:
        """Return the error for broken syntax at a position."""
        whole = len(self.text.rstrip()) if self.ended else len(self.text)
        position = min(position, whole)
        cut = position == whole or reason.startswith("Unterminated")
        hint = " (is the file cut off?)" if cut else ""
        line = self._line + self.text.count("\n", self._counted, position)
        line -= self.text.count("\n", position, self._counted)
        return BadRowError(str(self.path), line, f"invalid JSON: {reason}{hint}")


def read_values(stream: io.BufferedIOBase, path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array, of an object that holds them, or of objects in sequence.

    A row's line is the one on which it begins; in columns of lists it is the row's number. Rows
    after broken syntax cannot be told apart: that raises whatever `on_bad_row` says.

    Raises:
        BadRowError: the syntax is broken.
        ValueError: an object holds several lists of objects.
    """
    text = _Text(stream, path)
    mark = text.next()
    if mark == "[":
        yield from _array(text)
    elif mark == "{":
        yield from _objects(text)
    if text.next():
        what = {"[": "array", "{": "object"}.get(mark)
        reason = f"text after the end of the {what}" if what else "expecting '[' or '{'"
        raise text.broken(text.position, reason)


def _array(text: _Text) -> Iterator[Row]:
    text.position += 1
    mark = "," if text.next() != "]" else text.mark("]", "")
    while mark == ",":
        text.next()
        line = text.line()
        yield Row(line, text.value())
        mark = text.mark(",]", "expecting ',' or ']' after a row")


def _objects(text: _Text) -> Iterator[Row]:
    try:
        first = text.peek(LARGE_OBJECT)
    except OverflowError:
        first = None
    if first is not None and (rows := _held(first, text.path)) is not None:
        text.value()
        yield from rows
        return
    has_list = first is None or any(map(_lists_objects, first.values()))
    if has_list and not (first is not None and _fits([first])):
        is_row = yield from _members(text)
        if not is_row:
            return
    while text.next() == "{":
        line = text.line()
        yield Row(line, text.value())


def _members(text: _Text) -> Generator[Row, None, bool]:
    """Yield the rows of the one list of objects that an object holds, without keeping them.

    An object that holds none is a row; return whether it is one.
    """
    begin = text.line()
    text.position += 1
    found: dict[str, Any] = {}
    holder: str | None = None
    mark = ","
    while mark == ",":
        if text.next() != '"':
            raise text.broken(text.position, "Expecting property name enclosed in double quotes")
        name = text.value()
        text.mark(":", "Expecting ':' delimiter")
        if text.next() == "[":
            listed = _array(text)
            first = list(itertools.islice(listed, 1))
            if _lists_objects([row.value for row in first]):
                if holder is not None:
                    raise ValueError(
                        f"{text.path}: expected one list of objects, got {holder!r} and {name!r}; "
                        "write one of them into a file of its own"
                    )
                holder = name
                yield from itertools.chain(first, listed)
            else:
                found[name] = [row.value for row in itertools.chain(first, listed)]
        else:
            found[name] = text.value()
        mark = text.mark(",}", "expecting ',' or '}'")
    if holder is None:
        rows = _held(found, text.path)
        yield from rows or [Row(begin, found)]
        return rows is None
    if found:
        logger.warning(
            "%s",
            printable(f"{text.path}: read {holder!r}; not used: {', '.join(map(repr, found))}"),
        )
    return False


def _lists_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _fits(rows: list[dict[str, Any]]) -> bool:
    """Tell whether objects have the columns of a format."""
    # 'data' of texts is a conversation (UltraChat), of objects it is what holds the rows.
    names = [
        [name for name, value in row.items() if name != "data" or not _lists_objects(value)]
        for row in rows
    ]
    try:
        return bool(format_of(names))
    except ValueError:
        return False


def _held(found: dict[str, Any], path: Path) -> Iterator[Row] | None:
    """Return the rows of columns of lists, or of rows by key; None if the object is neither.

    Raises:
        ValueError: it has a list of conversations beside lists of other lengths.
    """
    values = list(found.values())
    if values and all(isinstance(one, dict) and one for one in values):
        keys = list(values[0])
        if not all(key.isdigit() for key in keys) or any(list(one) != keys for one in values):
            return _numbered(values)
        values = [list(one.values()) for one in values]  # as pandas writes columns
    elif not _are_columns(values):
        if any(isinstance(one, list) and one and _lists_objects(one[0]) for one in values):
            lists = {name: one for name, one in found.items() if isinstance(one, list)}
            sizes = ", ".join(f"{name!r} {len(one)}" for name, one in lists.items())
            raise ValueError(f"{path}: expected columns of one length, got values: {sizes}")
        return None
    return _numbered(dict(zip(found, row, strict=True)) for row in zip(*values, strict=True))


def _are_columns(values: list[Any]) -> bool:
    """Tell whether lists are columns, not the tokens or the messages of a single row."""
    if not all(isinstance(one, list) and one for one in values):
        return False
    hold = str | list if len(values) > 1 else list
    return len({len(one) for one in values}) == 1 and any(
        isinstance(one[0], hold) for one in values
    )


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return (Row(number, row) for number, row in enumerate(rows, start=1))
