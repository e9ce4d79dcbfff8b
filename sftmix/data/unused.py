"""Name the columns and fields of single rows that nothing reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from sftmix.data.columns import format_of, read_content
from sftmix.data.rows import Row
from sftmix.data.sources import open_sources


def unused_of(addresses: Iterable[str], split: str, asked: Collection[str]) -> dict[str, list[str]]:
    """Return by address ("file:line") what carries a value in the row there and is not read.

    The rows have been read before, and are read again: to keep this for all rows would take memory
    for what a few of them are asked. Columns in `asked` are read by something else.

    Raises:
        OSError, ValueError: as `open_sources`.
    """
    lines: dict[str, set[int]] = {}
    for address in addresses:
        source, _, line = address.rpartition(":")
        lines.setdefault(source, set()).add(int(line))
    found: dict[str, list[str]] = {}
    for source, wanted in lines.items():
        last = max(wanted)
        for _, rows in open_sources(source, split):
            for row in _until(last, rows):
                if row.line in wanted:
                    unused: Counter[str] = Counter()
                    read_content(row.value, format_of([row.value]), unused, asked)
                    found[f"{source}:{row.line}"] = list(unused)
    return found


def _until(last: int, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows up to a line, and read no further."""
    for row in rows:
        yield row
        if row.line >= last:
            return
