"""Read rows from tables: CSV, parquet and Arrow."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from sftmix.data.rows import BadRowError, Row, not_utf8

PARQUET = b"PAR1"
ARROW_FILE, ARROW_STREAM, FEATHER_1 = b"ARROW1", b"\xff\xff\xff\xff", b"FEA1"
DELIMITERS = ",;\t|"
# Rows become Python objects so many at a time: of 10 kB each, 10 MB.
BATCH = 1_000


class _Lines:
    """The lines of a CSV file as text; `problem` says what was wrong with one of them."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream = stream
        self.problem: str | None = None

    def __iter__(self) -> Iterator[str]:
        # Lines end with \n, \r\n or \r, and keep their ends: a cell in quotes may hold them.
        with io.TextIOWrapper(self.stream, "utf-8-sig", "surrogateescape", newline="") as text:
            for line in text:
                if line.isascii():
                    yield line
                    continue
                data = line.encode("utf-8", "surrogateescape")
                try:
                    data.decode("utf-8")
                except UnicodeDecodeError as error:
                    self.problem = not_utf8(error)
                yield data.decode("utf-8", "replace")


def read_csv(
    stream: io.BufferedReader, path: Path, *, tabs: bool, numbers: Collection[str] = ()
) -> Iterator[Row]:
    """Yield the rows of a CSV file with the lines that they begin on; the first names the columns.

    All cells are text: an answer of 42 is no number, and an empty cell is an empty string. Columns
    of `numbers` are numbers where they can be. The delimiter is a tab, or of commas, semicolons,
    tabs and bars the one that makes the most columns of the header. Lines end with \\n, \\r\\n or
    \\r.

    Raises:
        BadRowError: a quotation does not end, or text follows it.
        ValueError: two columns have one name.
    """
    lines = _Lines(stream)
    text = iter(lines)
    first = next(text, "")
    delimiter = "\t" if tabs else _delimiter(first)
    rows = _reader(itertools.chain([first], text), delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            reason = f"invalid CSV: {error} (on line {rows.line_num})"
            if "unexpected end" in str(error):
                reason += "; a cell that begins with a quotation mark does not end with one"
            raise BadRowError(str(path), line, reason) from None
        if cells is None:
            return
        problem, lines.problem = lines.problem, None
        if header is None and cells:
            header = cells
            _check_header(header, path, problem)
        elif cells and header is not None:
            if problem is None and len(cells) != len(header):
                problem = f"expected {len(header)} cells, as in the header, got {len(cells)}"
            value = (
                None if problem else _with_numbers(dict(zip(header, cells, strict=True)), numbers)
            )
            yield Row(line, value, problem)
        line = rows.line_num + 1


def _delimiter(line: str) -> str:
    return max(DELIMITERS, key=lambda one: _width(line, one))


def _width(line: str, delimiter: str) -> int:
    return len(next(_reader([line], delimiter), []))


def _reader(lines: Iterable[str], delimiter: str, *, strict: bool = False) -> Any:
    # A process has one limit, of 131,072 characters, which a text may well exceed.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    return csv.reader(lines, delimiter=delimiter, strict=strict)


def is_table(head: bytes) -> bool:
    """Tell whether text begins as a CSV file does: with names, and as many cells below them.

    >>> is_table(b"question,answer\\n1 + 2,3\\n")
    True
    """
    lines = head.decode("utf-8-sig", "replace").splitlines()[:2]
    if len(lines) < 2 or any(line.lstrip()[:1] in ("{", "[", "") for line in lines):
        return False
    delimiter = _delimiter(lines[0])
    names = next(_reader(lines[:1], delimiter))
    are_names = all(re.fullmatch(r"[^\W\d][\w .-]{,60}", name) for name in names)
    # A cell with a line break in it ends on a later line.
    width = _width(lines[1], delimiter)
    return are_names and 1 < width <= len(names) == len({*names})


def _check_header(header: list[str], path: Path, problem: str | None) -> None:
    if problem is not None:
        raise BadRowError(str(path), 1, problem)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        names = ", ".join(map(repr, twice))
        raise ValueError(f"{path}: expected a name for each column, the header has {names} twice")


def _with_numbers(row: dict[str, Any], numbers: Collection[str]) -> dict[str, Any]:
    for name in numbers:
        try:
            row[name] = float(row[name])
        except (KeyError, ValueError):
            continue  # the reader of numbers says that it is missing, or none
    return row


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file, by number.

    Raises:
        ValueError: the file is broken.
    """
    return _by_number(path, "parquet", lambda: pq.ParquetFile(path).iter_batches(BATCH))


def read_arrow(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow file or stream, or of a Feather file, by number.

    Raises:
        ValueError: the file is broken.
    """
    return _by_number(path, "Arrow", lambda: _arrow_batches(path))


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as source:
        magic = source.read(len(ARROW_FILE))
        source.seek(0)
        if magic.startswith(FEATHER_1):
            yield from pyarrow.feather.read_table(source).to_batches()
        elif magic == ARROW_FILE:
            file = pa.ipc.open_file(source)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            yield from pa.ipc.open_stream(source)


def _by_number(
    path: Path, form: str, batches: Callable[[], Iterable[pa.RecordBatch]]
) -> Iterator[Row]:
    number = 0
    try:
        for batch in batches():
            for start in range(0, batch.num_rows, BATCH):
                for value in batch.slice(start, BATCH).to_pylist():
                    number += 1
                    yield Row(number, value)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable {form} file: {error}") from error
