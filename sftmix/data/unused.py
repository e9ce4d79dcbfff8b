"""Name the columns and fields of single rows that nothing reads."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from sftmix.data.columns import format_of, read_content
from sftmix.data.rows import Row
from sftmix.data.sources import open_sources
from sftmix.data.store import Example


def unused_of(
    examples: Iterable[Example], split: str, asked: Collection[str]
) -> dict[int, list[str]]:
    """Return by id what carries a value in the row of an example and is not read.

    The rows have been read before, and are read again: to keep this for all rows would take memory
    for what a few of them are asked. Columns in `asked` are read by something else.

    Raises:
        OSError, ValueError: as `open_sources`.
    """
    wanted: dict[str, dict[tuple[int, str], int]] = {}
    for one in examples:
        source, _, line = one.source.rpartition(":")
        wanted.setdefault(source, {})[int(line), one.content_hash] = one.id
    found: dict[int, list[str]] = {}
    for source, places in wanted.items():
        lines = {line for line, _ in places}
        for _, rows in open_sources(source, split):
            for row in _until(max(lines), rows):
                if row.line not in lines or not isinstance(row.value, dict):
                    continue
                # Several rows of a JSON array may stand on one line, and others may be bad.
                unused: Counter[str] = Counter()
                with contextlib.suppress(ValueError):
                    content = read_content(row.value, format_of([row.value]), unused, asked)
                    if (id := places.get((row.line, content.digest()))) is not None:
                        found[id] = list(unused)
    return found


def _until(last: int, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows up to a line, and read no further."""
    for row in rows:
        if row.line > last:
            return
        yield row
