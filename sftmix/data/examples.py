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

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sftmix.data.columns import FORMATS, digest, field, format_of, read_content
from sftmix.data.messages import BadField, Messages, kind
from sftmix.data.rows import BadRowError, BadRows, OnBadRow, Row
from sftmix.data.sources import open_sources
from sftmix.runs.failures import printable

__all__ = [
    "BadRowError",
    "BadRows",
    "Example",
    "Messages",
    "OnBadRow",
    "content_hash",
    "data_hash",
    "load_examples",
    "rows_by_file",
]

logger = logging.getLogger(__name__)

NAMES_SHOWN = 20  # columns in a warning; files in a line


@dataclass(frozen=True)
class Example:
    """One line of data to learn from: a conversation, or a sequence of tokens.

    `id` is the example's number over all files in order, from 0, bad ones counted. `source` is
    "path:line". `content_hash` is the SHA-256 of the content as canonical JSON, so it depends
    neither on the tokenizer nor on the order of keys. Either `messages` is set, or `input_ids` and
    `labels` are. Messages have the keys that chat templates read: `role`, `content` and, if given,
    `reasoning_content`, `thinking`, `tool_calls` and the like. `tools` describes the tools that the
    template writes. `learnt` says for each message whether it carries loss; None means that every
    assistant turn does. `numbers` holds the values of the columns that were asked for.
    """

    id: int
    source: str
    content_hash: str
    messages: Messages | None = None
    tools: list[Any] | None = None
    learnt: tuple[bool, ...] | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    numbers: dict[str, float] | None = None


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
    encoding: str = "utf-8",
    streaming: bool = False,
    disable_progress: bool | None = False,
) -> list[Example]:
    """Read examples from files, folders of them, or `datasets` by name.

    `sources` says how files, a folder and a name (`someone/name`, `someone/name:config`) are read,
    and how `split` chooses among what they hold. `encoding` is that of text files; `streaming`
    reads data sets of the hub without a copy on disk. The formats are those of this module's
    docstring. `on_bad_row="skip"` leaves bad rows out and logs one warning; another one for each
    file names columns and fields that are not used. `numbers` names columns whose numbers examples
    keep; a row that lacks one is bad.

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
    bad = BadRows(on_bad_row)
    bar = functools.partial(tqdm, unit="row", delay=2, disable=disable_progress)
    examples: list[Example] = []
    empty: list[str] = []
    number = 0
    for name in data:
        for source, read in open_sources(
            name, split, encoding=encoding, numbers=numbers, streaming=streaming
        ):
            rows = list(bar(read, desc=printable(f"Reading {source}")))
            if not rows and Path(name).is_dir():
                empty.append(source)
                continue
            checking = bar(rows, desc=printable(f"Checking {source}"))
            examples += _examples(checking, rows, source, number, bad, numbers)
            number += len(rows)
    bad.report(number)
    if empty and not number:
        raise ValueError(f"{', '.join(empty[:NAMES_SHOWN])}: holds no rows")
    if empty:
        logger.warning("%s", printable(f"no rows in {', '.join(empty[:NAMES_SHOWN])}"))
    if not examples:
        raise ValueError(f"data: no examples are left: all {number} rows are bad")
    return examples


def rows_by_file(examples: Iterable[Example]) -> str:
    """Return one line with the number of examples in all and in each file."""
    counts = Counter(example.source.rpartition(":")[0] for example in examples)
    files = [f"{file!r} {count:,}" for file, count in counts.items()]
    more = f", and {len(files) - NAMES_SHOWN} more files" if len(files) > NAMES_SHOWN else ""
    return f"read {counts.total():,} rows: {', '.join(files[:NAMES_SHOWN])}{more}"


def _examples(
    checking: Iterable[Row],
    rows: Sequence[Row],
    source: str,
    number: int,
    bad: BadRows,
    numbers: Sequence[str],
) -> Iterator[Example]:
    """Yield the good examples of a file, whose first row has the number `number`."""
    columns = _columns(rows, source)
    unused: Counter[str] = Counter()
    for place, row in enumerate(checking, start=number):
        try:
            yield _example(row, columns, place, source, numbers, unused)
        except BadRowError as error:
            bad.add(error)
    if unused:
        names = [f"{name!r} ({count:,} rows)" for name, count in unused.most_common(NAMES_SHOWN)]
        more = f" and {len(unused) - NAMES_SHOWN} more" if len(unused) > NAMES_SHOWN else ""
        logger.warning("%s", printable(f"{source}: not used: {', '.join(names)}{more}"))


def _columns(rows: Sequence[Row], source: str) -> tuple[str, ...]:
    if not rows:
        raise ValueError(f"{source}: holds no rows")
    objects = [row.value for row in rows if isinstance(row.value, dict)]
    if not objects:
        first = rows[0]
        reason = first.problem or f"a row must be an object, got {kind(first.value)}"
        raise BadRowError(source, first.line, f"{reason}; no row of the file can be read")
    try:
        return format_of(objects)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _example(
    row: Row,
    columns: tuple[str, ...],
    number: int,
    source: str,
    numbers: Sequence[str],
    unused: Counter[str],
) -> Example:
    try:
        if row.problem is not None:
            raise BadField(row.problem)
        if not isinstance(row.value, dict):
            raise BadField(f"a row must be an object, got {kind(row.value)}")
        content = read_content(row.value, columns, unused, numbers)
        found = {column: _number(row.value, column) for column in numbers}
    except BadField as error:
        raise BadRowError(source, row.line, str(error)) from None
    return Example(
        id=number,
        source=f"{source}:{row.line}",
        content_hash=content.digest(),
        **vars(content),
        numbers=found or None,
    )


def _number(row: dict[str, Any], name: str) -> float:
    value = field(row, name)
    if type(value) not in (int, float) or value != value:  # a bool is an int to isinstance
        raise BadField(f"'{name}' must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise BadField(f"'{name}' is an integer beyond any float") from None


def data_hash(content_hashes: Iterable[str]) -> str:
    """Return the SHA-256 of content hashes in order: equal for equal content in equal order."""
    return hashlib.sha256("\n".join(content_hashes).encode("ascii")).hexdigest()
