"""Read examples from files, check them and bring them to one form.

A file's format is found by its columns:

    messages                          a list of {"role", "content", ...}
    prompt, completion                two strings, or two lists of messages
    instruction, [input,] output      three strings; `input` may be missing, null or empty
    question, answer                  two strings; `context`, where there is one, comes first
    input_ids, labels                 two lists of integers, -100 where nothing is learnt
    input_ids, completion_mask        (or assistant_masks, loss_mask) 1 where a token is learnt

A file has the format whose columns are all present in the most rows; on a tie the first in this
list. Other columns are read if they have a meaning (`tools`, `system`, `history`, masks), refused
if a meaning would be lost, and otherwise named once for each file (docs/data.md).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sftmix.data.columns import FORMATS, field, format_of, read_content
from sftmix.data.hashing import data_hash, digest
from sftmix.data.messages import BadField, Messages, kind
from sftmix.data.rows import BadRowError, BadRows, OnBadRow, Row
from sftmix.data.sources import Source, open_sources
from sftmix.data.store import Example, Examples
from sftmix.data.summary import Reading
from sftmix.runs.failures import printable

__all__ = [
    "BadRowError",
    "BadRows",
    "Example",
    "Examples",
    "Messages",
    "OnBadRow",
    "content_hash",
    "data_hash",
    "load_examples",
]

logger = logging.getLogger(__name__)

NAMES_SHOWN = 20  # columns in a warning; empty files
# The first rows of a file tell its format, nearly always: if all rows tell another one, the file is
# read again.
FIRST_ROWS = 100


def content_hash(row: dict[str, Any]) -> str:
    """Return the `Example.content_hash` of a row; a row of no known format is hashed as a whole."""
    try:
        for columns in FORMATS:
            if all(column in row for column in columns):
                return read_content(row, columns, Counter()).digest()
    except BadField:
        pass
    return digest(row)


def load_examples(
    data: Sequence[str | Path],
    *,
    on_bad_row: OnBadRow = "error",
    split: str = "train",
    numbers: Sequence[str] = (),
    quiet: bool = False,
    disable_progress: bool | None = False,
) -> Examples:
    """Read examples from JSON, JSONL and parquet files, folders of them, or `datasets` by name.

    A JSON file holds an array of rows or one row per line. `sources` says how a folder and a
    name (`someone/name`, `someone/name:config`) are read, and how `split` chooses among what they
    hold. The formats are those of this module's docstring. `on_bad_row="skip"` leaves bad rows out
    and logs one warning; another one for each file names columns and fields that are not used.
    `numbers` names columns whose numbers examples keep; a row that lacks one is bad. `quiet` logs
    nothing of what the examples' `reading` tells.

    Raises:
        BadRowError: a row is bad, with its file, line and reason.
        FileNotFoundError: a file is missing.
        ValueError: an ending or the columns are unknown, a file has no rows, or no example is left.
        TypeError: `data` is a single name.
    """
    if isinstance(data, str | Path):
        raise TypeError(f"data: expected a list of files or names, got the single {data!r}")
    if not data:
        raise ValueError("data: expected at least one file or name, got none")
    reader = _Reader(BadRows(on_bad_row), numbers, quiet, disable_progress)
    for name in data:
        reader.read(name, functools.partial(open_sources, name, split))
    return reader.finished()


class _Reader:
    """Reads files one after another into `examples`."""

    def __init__(
        self, bad: BadRows, numbers: Sequence[str], quiet: bool, disable_progress: bool | None
    ) -> None:
        self.bad, self.numbers, self.quiet = bad, numbers, quiet
        self.disable_progress = disable_progress
        self.examples = Examples()
        self.reading = self.examples.reading
        self.empty: list[str] = []

    def read(self, name: str | Path, open_files: Callable[[], Iterator[Source]]) -> None:
        """Read the files behind a name, which `open_files` opens, a second time if need be."""
        begin = self.reading.rows.total()
        for place, (source, rows) in enumerate(open_files()):
            other = self._read(source, rows, None, may_be_empty=Path(name).is_dir())
            if other is not None:
                again = itertools.islice(open_files(), place, place + 1)
                for _, rows in again:
                    other = self._read(source, rows, other)
                if other is not None:
                    raise ValueError(f"{source}: the file changed while it was read")
        self.reading.sources.append((str(name), begin, self.reading.rows.total()))

    def finished(self) -> Examples:
        """Return the examples, and log what was left out.

        Raises:
            ValueError: there are none.
        """
        total, empty = self.reading.rows.total(), ", ".join(self.empty[:NAMES_SHOWN])
        if not self.quiet:
            self.bad.report(total)
        if empty and not total:
            raise ValueError(f"{empty}: holds no rows")
        if empty:
            logger.warning("%s", printable(f"no rows in {empty}"))
        if not self.examples:
            why = self.bad.reasons[0]
            raise ValueError(f"data: no examples are left: all {total} rows are bad; {why}")
        places, first = self.examples.find_duplicates()
        self.reading.duplicates = len(places)
        for one, other in itertools.islice(zip(places.tolist(), first.tolist(), strict=True), 1):
            # A JSON array may stand on a single line.
            later, earlier = (
                f"example {self.examples.ids[place]} ({self.examples.address(place)})"
                for place in (one, other)
            )
            self.reading.first_duplicate = (later, earlier)
        return self.examples

    def _read(
        self,
        source: str,
        rows: Iterable[Row],
        columns: tuple[str, ...] | None,
        *,
        may_be_empty: bool = False,
    ) -> tuple[str, ...] | None:
        """Read a file in one pass as of the format `columns`; None: what its first rows tell.

        If all rows tell another format, return that one, and keep nothing of the file.
        """
        shapes = _Shapes(source)
        bar = tqdm(
            rows,
            desc=printable(f"Reading {source}"),
            unit="row",
            delay=2,
            disable=self.disable_progress,
        )
        counted = shapes.counted(bar)
        head = list(itertools.islice(counted, FIRST_ROWS))
        if not head and may_be_empty:
            self.empty.append(source)
            return None
        if columns is None:
            # Later rows may be of a format if these are of none.
            with contextlib.suppress(ValueError):
                columns = shapes.format()
        before, bad, part = len(self.examples), copy.deepcopy(self.bad), Reading()
        error: BadRowError | None = None
        self.examples.begin_file(source)
        number = self.reading.rows.total()
        for id, row in enumerate(itertools.chain(head, counted), start=number):
            if columns is None or error is not None:
                continue  # the other rows count for the format, whose errors come first
            try:
                self._append(row, columns, id, source, part)
            except BadRowError as bad_row:
                part.refuse(bad_row)
                try:
                    self.bad.add(bad_row)
                except BadRowError as refused:
                    error = refused
        found = shapes.format()
        if found != columns:
            self.examples.forget_file(before)
            self.bad = bad
            return found
        if error is not None:
            raise error
        part.rows[source] = shapes.total
        self.reading.add(part)
        if not self.quiet:
            _name_unused(source, part.unused)
        return None

    def _append(
        self, row: Row, columns: tuple[str, ...], id: int, source: str, part: Reading
    ) -> None:
        try:
            if row.problem is not None:
                raise BadField(row.problem)
            if not isinstance(row.value, dict):
                raise BadField(f"a row must be an object, got {kind(row.value)}")
            content = read_content(row.value, columns, part.unused, self.numbers)
            numbers = {column: _number(row.value, column) for column in self.numbers}
            self.examples.append(id, row.line, content, numbers)
        except BadField as error:
            raise BadRowError(source, row.line, str(error)) from None
        except RecursionError:
            raise BadRowError(source, row.line, "a value is nested too deep") from None


class _Shapes:
    """Counts a file's rows by the names of their columns."""

    def __init__(self, source: str) -> None:
        self.source, self.total = source, 0
        self.first: Row | None = None
        self.counts: Counter[tuple[str, ...]] = Counter()

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows, each after counting it."""
        for row in rows:
            self.first = self.first or row
            self.total += 1
            if isinstance(row.value, dict):
                self.counts[tuple(row.value)] += 1
            yield row

    def format(self) -> tuple[str, ...]:
        """Return the format of the rows counted so far.

        Raises:
            BadRowError: no row is an object.
            ValueError: there are no rows, or they are of no format.
        """
        if self.first is None:
            raise ValueError(f"{self.source}: holds no rows")
        if not self.counts:
            reason = self.first.problem or f"a row must be an object, got {kind(self.first.value)}"
            raise BadRowError(
                self.source, self.first.line, f"{reason}; no row of the file can be read"
            )
        try:
            return format_of(list(self.counts.elements()))
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None


def _name_unused(source: str, unused: Counter[str]) -> None:
    if unused:
        names = [f"{name!r} ({count:,} rows)" for name, count in unused.most_common(NAMES_SHOWN)]
        more = f" and {len(unused) - NAMES_SHOWN} more" if len(unused) > NAMES_SHOWN else ""
        logger.warning("%s", printable(f"{source}: not used: {', '.join(names)}{more}"))


def _number(row: dict[str, Any], name: str) -> float:
    value = field(row, name)
    if type(value) not in (int, float) or value != value:  # a bool is an int to isinstance
        raise BadField(f"'{name}' must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise BadField(f"'{name}' is an integer beyond any float") from None
