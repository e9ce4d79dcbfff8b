"""Name the columns and fields of single rows that nothing reads."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

from sftmix.data.formats import read_content
from sftmix.data.messages import Notes
from sftmix.data.rows import OnBadRow, Row
from sftmix.data.store import Example
from sftmix.data.summary import Reading


def unused_of(
    examples: Iterable[Example],
    reading: Reading,
    asked: Collection[str] = (),
    *,
    on_bad_row: OnBadRow = "error",
) -> dict[int, list[str]]:
    """Return by id what carries a value in the row of an example and is not read.

    The rows have been read before, as `reading` says, and are read again: to keep this for all rows
    would take memory for what a few of them are asked. Columns in `asked` are read by something
    else.

    Raises:
        OSError, ValueError: a file cannot be read any more.
    """
    wanted: dict[str, dict[tuple[int, str], int]] = {}
    for one in examples:
        source, _, line = one.source.rpartition(":")
        wanted.setdefault(source, {})[int(line), one.content_hash] = one.id
    found: dict[int, list[str]] = {}
    for source, rows, form in reading.files:
        if (places := wanted.get(source)) is None:
            continue
        lines = {line for line, _ in places}
        for row in _until(max(lines), rows()):
            if row.line not in lines or not isinstance(row.value, dict):
                continue
            # Several rows of a JSON array may stand on one line, and others may be bad.
            notes = Notes(mend=on_bad_row == "mend")
            with contextlib.suppress(ValueError):
                content = read_content(row.value, form, notes, asked)
                if (id := places.get((row.line, content.digest()))) is not None:
                    found[id] = list(notes.unused)
    return found


def _until(last: int, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows up to a line, and read no further."""
    for row in rows:
        if row.line > last:
            return
        yield row
