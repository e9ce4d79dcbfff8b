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

# A file's name, and what reads its rows, from its beginning each time.
Source = tuple[str, Callable[[], Iterator[Row]]]


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


def sliced(places: Callable[[str], Sequence[Source]], split: str) -> Iterator[Source]:
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


class _Part:
    """The rows of a source from `start` to `stop`; `seen` counts those read, skipped ones too."""

    def __init__(self, read: Callable[[], Iterator[Row]], start: int, stop: int) -> None:
        self.read, self.start, self.stop, self.seen = read, start, stop, 0

    def __call__(self) -> Iterator[Row]:
        self.seen = 0
        for row in itertools.islice(self.read(), self.stop):
            self.seen += 1
            if self.seen > self.start:
                yield row


def _between(places: Sequence[Source], start: int, stop: int) -> Iterator[Source]:
    """Yield sources with the rows from `start` to `stop`, counted over all of them."""
    before = 0
    for source, read in places:
        if before >= stop or start >= stop:
            return
        part = _Part(read, start - before, stop - before)
        if any(True for _ in part()):  # a source without rows in the part is none
            yield source, part
        before += part.seen
