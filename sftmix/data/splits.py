"""Read a part of what a name holds: `train[:1000]`, `train[10%:20%]`, `train+test[-50:]`.

The expressions are those of `datasets.load_dataset`, for files and folders, too. A file has one
split, train.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from datasets import ReadInstruction

from sftmix.data.rows import Row

# A file's name and its rows.
Source = tuple[str, Iterator[Row]]
# A file's name, and what reads it, from its beginning each time.
Place = tuple[str, Callable[[], Iterator[Row]]]


def names_of(split: str) -> list[str]:
    """Return the names of the splits that an expression reads.

    Raises:
        ValueError: it is none.

    >>> names_of("train[:10%]+test")
    ['train', 'test']
    """
    if not is_expression(split):
        return [split]
    try:
        ReadInstruction.from_spec(split)
    except (ValueError, AssertionError):
        raise ValueError(
            "expected a split such as train, train[:1000], train[10%:20%] or train+test, "
            f"got {split!r}"
        ) from None
    return [part.partition("[")[0].strip() for part in split.split("+")]


def is_expression(split: str) -> bool:
    """Tell whether a split is more than a name."""
    return bool(re.search(r"[\[+]", split))


def sliced(places: Callable[[str], Sequence[Place]], split: str) -> Iterator[Source]:
    """Yield the sources of an expression's parts, each with its rows within the part.

    Rows are counted first where a bound is a share, or is counted from the end.

    Raises:
        ValueError: nothing is left.
    """
    found = {name: places(name) for name in names_of(split)}
    is_counted = re.search(r"%|-\d", split)
    lengths = {
        name: sum(1 for _, read in found[name] for _ in read()) if is_counted else sys.maxsize
        for name in found
    }
    is_empty = True
    for part in ReadInstruction.from_spec(split).to_absolute(lengths):
        for source, rows in _between(found[part.splitname], part.from_, part.to):
            is_empty = False
            yield source, rows
    if is_empty:
        raise ValueError(f"data: the split {split!r} holds no rows; there are fewer than it skips")


def _between(places: Sequence[Place], start: int, stop: int) -> Iterator[Source]:
    """Yield sources with the rows from `start` to `stop`, counted over all of them."""
    seen = 0

    def within(read: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        nonlocal seen
        for row in read():
            seen += 1
            if seen > start:
                yield row
            if seen >= stop:
                return

    for source, read in places:
        if seen >= stop or start >= stop:
            return
        rows = within(read)
        for first in rows:  # a source without rows in the part is none
            yield source, itertools.chain([first], rows)
            break
