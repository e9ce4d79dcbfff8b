"""Hold examples compactly: as JSON one after another, from which each is built when looked up.

A million conversations of 1 kB take 1.1 GB so, and several times as much as Python's dicts.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from sftmix.data.formats import Content
from sftmix.data.hashing import canonical
from sftmix.data.messages import Messages
from sftmix.data.summary import Reading

HASH_BYTES = 32


@dataclass(frozen=True)
class Example:
    """One line of data to learn from: a conversation, a whole text, or a sequence of tokens.

    `id` is the example's number over all files in order, from 0, bad ones counted. `source` is
    "path:line". `content_hash` is the SHA-256 of the content as canonical JSON, so it depends
    neither on the tokenizer nor on the order of keys. Either `messages` is set, or `text`, all of
    which is learnt, or `input_ids` and `labels`. Messages have the keys that chat templates read:
    `role`, `content` and, if given, `reasoning_content`, `thinking`, `tool_calls` and the like.
    `tools` describes the tools that the template writes. `learnt` says for each message whether it
    carries loss; None means that every assistant turn does. `numbers` holds the values of the
    columns that were asked for.
    """

    id: int
    source: str
    content_hash: str
    messages: Messages | None = None
    tools: list[Any] | None = None
    learnt: tuple[bool, ...] | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    text: str | None = None
    numbers: dict[str, float] | None = None


@dataclass
class _Store:
    """Growing columns, a value for each example that was read; `contents` is cut at `ends`."""

    files: list[str] = field(default_factory=list)
    contents: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q"))
    alike: bytearray = field(default_factory=bytearray)  # 1 where `orjson` reads the content
    hashes: bytearray = field(default_factory=bytearray)
    ids: array[int] = field(default_factory=lambda: array("q"))
    file: array[int] = field(default_factory=lambda: array("i"))  # a place in `files`
    lines: array[int] = field(default_factory=lambda: array("q"))
    numbers: dict[str, array[float]] = field(default_factory=dict)


class Examples(Sequence[Example]):
    """The examples of some data, in order; `reading` says what was found while they were read.

    A slice or `take` gives other rows of the same data and copies no text.
    """

    def __init__(self) -> None:
        """Begin without examples; `begin_file` and `append` add them."""
        self.reading = Reading()
        self._store = _Store()
        self._chosen: NDArray[np.int64] | None = None  # rows of the store; None: all
        self._ids: NDArray[np.int64] | None = None  # other ids than theirs

    def __len__(self) -> int:
        return len(self._store.ids) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Examples: ...
    def __getitem__(self, place: int | slice) -> Example | Examples:
        """Return one example, or those of a slice.

        Raises:
            IndexError: there are fewer.
        """
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(f"expected an example below {len(self)}, got {place}")
        place %= len(self)
        row, store = self._row(place), self._store
        content = store.contents[store.ends[row - 1] if row else 0 : store.ends[row]]
        found = (orjson if store.alike[row] else json).loads(content)
        for name in ("messages", "learnt"):
            if name in found:
                found[name] = tuple(found[name])
        return Example(
            id=store.ids[row] if self._ids is None else int(self._ids[place]),
            source=self.address(place),
            content_hash=self._hash(row),
            **found,
            numbers={name: column[row] for name, column in store.numbers.items()} or None,
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[place] for place in range(len(self)))

    def begin_file(self, name: str) -> None:
        """Say that the examples appended from now on are of this file."""
        self._store.files.append(name)

    def append(self, id: int, line: int, content: Content, numbers: dict[str, float]) -> None:
        """Add an example of the last file.

        Raises:
            RecursionError: the content is nested too deep.
        """
        store = self._store
        found = {name: value for name, value in vars(content).items() if value is not None}
        text, alike = canonical(found)
        store.hashes += hashlib.sha256(text).digest()
        # The keys of tools stay in their order, in which templates write them.
        text = orjson.dumps(found) if alike else _as_json(found)
        store.contents += text
        store.ends.append(len(store.contents))
        store.alike.append(alike)
        store.ids.append(id)
        store.file.append(len(store.files) - 1)
        store.lines.append(line)
        for name, value in numbers.items():
            store.numbers.setdefault(name, array("d")).append(value)

    def forget_file(self, length: int) -> None:
        """Remove the last file and its examples, before which there were `length`."""
        store = self._store
        store.files.pop()
        del store.contents[store.ends[length - 1] if length else 0 :]
        del store.hashes[length * HASH_BYTES :]
        columns: tuple[Any, ...] = (store.ends, store.alike, store.ids, store.file, store.lines)
        for column in (*columns, *store.numbers.values()):
            del column[length:]

    def take(self, places: ArrayLike, ids: ArrayLike | None = None) -> Examples:
        """Return the examples at some places, (n,), of these; `ids` gives them other ids."""
        wanted = np.asarray(places, dtype=np.int64)
        taken = Examples()
        taken.reading, taken._store = self.reading, self._store
        taken._chosen = wanted if self._chosen is None else self._chosen[wanted]
        if ids is not None:
            taken._ids = np.asarray(ids, dtype=np.int64)
        elif self._ids is not None:
            taken._ids = self._ids[wanted]
        return taken

    @property
    def ids(self) -> NDArray[np.int64]:
        """Return the ids, (n,)."""
        return self._ids if self._ids is not None else self._column(self._store.ids)

    @property
    def content_hashes(self) -> list[str]:
        """Return the content hashes, n of them."""
        rows = range(len(self)) if self._chosen is None else self._chosen.tolist()
        return [self._hash(row) for row in rows]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return the numbers of a column that was asked for, (n,)."""
        return self._column(self._store.numbers[name])

    def counts_by_file(self) -> Counter[str]:
        """Return how many examples each file has, in the order of reading."""
        counts = np.bincount(self._column(self._store.file), minlength=len(self._store.files))
        found: Counter[str] = Counter()
        for name, count in zip(self._store.files, counts.tolist(), strict=True):
            if count:
                found[name] += count
        return found

    def find_duplicates(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places whose content stands earlier, too, ascending; and where it is first."""
        # The first 64 bits, which differ for different contents: of a billion examples two may
        # share them by chance, with a probability of 3 %.
        digests = self._column(
            np.frombuffer(self._store.hashes, dtype=np.uint64)[:: HASH_BYTES // 8]
        )
        _, first, kind = np.unique(digests, return_index=True, return_inverse=True)
        earliest = first[kind]
        places = np.flatnonzero(earliest != np.arange(len(self)))
        return places, earliest[places]

    def address(self, place: int) -> str:
        """Return "path:line" of an example."""
        row = self._row(place)
        return f"{self._store.files[self._store.file[row]]}:{self._store.lines[row]}"

    def _row(self, place: int) -> int:
        return place if self._chosen is None else int(self._chosen[place])

    def _hash(self, row: int) -> str:
        return self._store.hashes[row * HASH_BYTES : (row + 1) * HASH_BYTES].hex()

    def _column(self, values: Any) -> NDArray[Any]:
        column = np.array(values)
        return column if self._chosen is None else column[self._chosen]


def _as_json(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8")
