"""Read examples from files, check them and bring them to one form.

A file's format is found by its columns (`formats.py` has the table). Other columns are read if they
have a meaning (`tools`, `system`, `history`, masks), refused if a meaning would be lost, and
otherwise named once for each file (docs/data.md).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from sftmix.data.formats import Form, format_of, read_content
from sftmix.data.hashing import data_hash, digest
from sftmix.data.messages import BadField, Messages, Notes, kind
from sftmix.data.rows import BadRowError, BadRows, OnBadRow, Row
from sftmix.data.sources import open_sources
from sftmix.data.splits import Source
from sftmix.data.store import Example, Examples
from sftmix.data.summary import Reading
from sftmix.data.weighting import WEIGHT, WeightColumn
from sftmix.runs.failures import printable

__all__ = [
    "BadRowError",
    "BadRows",
    "Example",
    "Examples",
    "Messages",
    "OnBadRow",
    "TrainOn",
    "content_hash",
    "data_hash",
    "load_examples",
]

logger = logging.getLogger(__name__)

TrainOn = Literal["responses", "all"]

NAMES_SHOWN = 20  # columns in a warning; empty files
# The first rows of a file tell its format, nearly always: if all rows tell another one, the file is
# read again.
FIRST_ROWS = 100


def content_hash(row: dict[str, Any]) -> str:
    """Return the `Example.content_hash` of a row.

    A row of no known format is hashed as a whole, without its weight.
    """
    try:
        return read_content(row, format_of([row]), Notes()).digest()
    except ValueError:
        return digest({name: value for name, value in row.items() if name != WEIGHT})


def load_examples(
    data: Sequence[str | Path],
    *,
    on_bad_row: OnBadRow = "error",
    split: str = "train",
    numbers: Sequence[str] = (),
    weight: WeightColumn | None = None,
    columns: Mapping[str, str] | None = None,
    train_on: TrainOn = "responses",
    encoding: str = "utf-8",
    streaming: bool = False,
    quiet: bool = False,
    disable_progress: bool | None = False,
) -> Examples:
    """Read examples from files, folders of them, or `datasets` by name.

    `sources` says how files, a folder and a name (`someone/name`, `someone/name:config`) are read,
    and how `split` chooses among what they hold. `encoding` is that of text files; `streaming`
    reads data sets of the hub without a copy on disk. `formats.py` has the table of formats.
    `on_bad_row="skip"` leaves bad rows out and logs one warning; another one for each file names
    columns and fields that are not used. `on_bad_row="mend"` mends conversations by the rules of
    `shapes.py`, and leaves out the rest. `numbers` names columns whose numbers examples keep; a row
    that lacks one is bad. `weight` is a column of weights, which are kept among the numbers, NaN
    for a row without one; a row whose value is no weight is bad. `columns` names the columns of a
    format that is not known, as in `{"prompt": "problem"}`; `train_on="all"` learns the whole text
    of the column `text`. `quiet` logs nothing of what the examples' `reading` tells.

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
    if train_on not in ("responses", "all"):
        raise ValueError(f"train_on: expected 'responses' or 'all', got {train_on!r}")
    find = functools.partial(format_of, columns=columns, whole=train_on == "all")
    reader = _Reader(BadRows(on_bad_row), numbers, weight, find, quiet, disable_progress)
    for name in data:
        reader.read(
            name,
            open_sources(name, split, encoding=encoding, numbers=reader.asked, streaming=streaming),
        )
    return reader.finished()


_Find = Callable[[Iterable[Iterable[str]]], Form]


class _Reader:
    """Reads files one after another into `examples`."""

    def __init__(
        self,
        bad: BadRows,
        numbers: Sequence[str],
        weight: WeightColumn | None,
        find: _Find,
        quiet: bool,
        disable_progress: bool | None,
    ) -> None:
        self.bad, self.numbers, self.weight = bad, numbers, weight
        self.find, self.quiet = find, quiet
        self.asked = [*numbers, *([weight.name] if weight else [])]
        self.disable_progress = disable_progress
        self.examples = Examples()
        self.reading = self.examples.reading
        self.empty: list[str] = []

    def read(self, name: str | Path, sources: Iterable[Source]) -> None:
        """Read the files behind a name."""
        begin = self.reading.rows.total()
        for source, rows in sources:
            form = self._read(source, rows, None, may_be_empty=Path(name).is_dir())
            if form is not None and self._read(source, rows, form) is not None:
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
        rows: Callable[[], Iterator[Row]],
        form: Form | None,
        *,
        may_be_empty: bool = False,
    ) -> Form | None:
        """Read a file in one pass as of the format `form`; None: what its first rows tell.

        If all rows tell another format, return that one, and keep nothing of the file.
        """
        shapes = _Shapes(source, self.find, self.weight)
        bar = tqdm(
            rows(),
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
        if form is None:
            # Later rows may be of a format if these are of none.
            with contextlib.suppress(ValueError):
                form = shapes.format()
        before, bad, part = len(self.examples), copy.deepcopy(self.bad), Reading()
        notes = Notes(mend=self.bad.on_bad_row == "mend")
        error: BadRowError | None = None
        self.examples.begin_file(source)
        number = self.reading.rows.total()
        for id, row in enumerate(itertools.chain(head, counted), start=number):
            if form is None or error is not None:
                continue  # the other rows count for the format, whose errors come first
            try:
                self._append(row, form, id, source, notes)
            except BadRowError as bad_row:
                part.refuse(bad_row)
                try:
                    self.bad.add(bad_row)
                except BadRowError as refused:
                    error = refused
        found = shapes.format()
        if found != form:
            self.examples.forget_file(before)
            self.bad = bad
            return found
        if error is not None:
            raise error
        self.reading.files.append((source, rows, found))
        part.rows[source] = shapes.total
        part.unused, part.forgiven = notes.unused, notes.forgiven
        self.reading.add(part)
        if not self.quiet:
            mended = [f"{what} ({n:,})" for what, n in part.forgiven.most_common()]
            unread = [f"{what!r} ({n:,} rows)" for what, n in part.unused.most_common()]
            _name(source, "forgiven", mended)
            _name(source, "not used", unread)
        return None

    def _append(self, row: Row, form: Form, id: int, source: str, notes: Notes) -> None:
        try:
            if row.problem is not None:
                raise BadField(row.problem)
            if not isinstance(row.value, dict):
                raise BadField(f"a row must be an object, got {kind(row.value)}")
            content = read_content(row.value, form, notes, self.asked)
            numbers = {column: _number(row.value, column) for column in self.numbers}
            if self.weight is not None:
                numbers[self.weight.name] = self.weight.weight_of(row.value)
            self.examples.append(id, row.line, content, numbers)
        except BadField as error:
            raise BadRowError(source, row.line, str(error)) from None
        except RecursionError:
            raise BadRowError(source, row.line, "a value is nested too deep") from None


class _Shapes:
    """Counts a file's rows by the names of their columns."""

    def __init__(self, source: str, find: _Find, weight: WeightColumn | None) -> None:
        self.source, self.find, self.weight, self.total = source, find, weight, 0
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

    def format(self) -> Form:
        """Return the format of the rows counted so far.

        Raises:
            BadRowError: no row is an object.
            ValueError: there are no rows, they are of no format, or none has the column of weights.
        """
        if self.first is None:
            raise ValueError(f"{self.source}: holds no rows")
        if not self.counts:
            reason = self.first.problem or f"a row must be an object, got {kind(self.first.value)}"
            raise BadRowError(
                self.source, self.first.line, f"{reason}; no row of the file can be read"
            )
        try:
            form = self.find(self.counts.elements())
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        columns = sorted({str(name) for names in self.counts for name in names})
        if self.weight is not None and self.weight.required and self.weight.name not in columns:
            raise ValueError(
                f"{self.source}: --weight column:{self.weight.name}: no row has a column "
                f"{self.weight.name!r}, only {columns}"
            )
        return form


def _name(source: str, title: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        logger.warning(
            "%s", printable(f"{source}: {title}: {', '.join(names[:NAMES_SHOWN])}{more}")
        )


def _number(row: dict[str, Any], name: str) -> float:
    if name not in row:
        raise BadField(f"'{name}' is missing")
    value = row[name]
    if type(value) not in (int, float) or value != value:  # a bool is an int to isinstance
        raise BadField(f"'{name}' must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise BadField(f"'{name}' is an integer beyond any float") from None
