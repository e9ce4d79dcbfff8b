"""Select which examples of the data are scored and learnt.

    score>=4.5:COLUMN   rows whose number in COLUMN is so (also > <= <): AlpaGasus (Chen et al.
                        2024, arXiv 2307.08701) keeps what a judge scored at least 4.5
    longest:1000        the rows with the longest responses (Zhao et al. 2024, arXiv 2402.04833)
    keys:FILE           rows that FILE allows: data in a format that `examples` reads, matched by
                        content; or a .txt with the id or the content hash of a row in each line

Several selections are applied one after another. An example keeps its id, its number in the whole
data. Its length is the number of characters of all its learnt responses, so every tokenizer
selects the same examples (ours); the length of an example of tokens is its number of labels. Of
equal lengths the smaller id comes first.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.conventions import IGNORE_INDEX, MANIFEST
from sftmix.data.examples import Example, Examples, TrainOn, load_examples
from sftmix.data.rows import OnBadRow
from sftmix.data.splits import names_of
from sftmix.runs.failures import Naming
from sftmix.runs.folders import read_manifest
from sftmix.runs.ranks import say

COMPARISONS: dict[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
EXPECTED = "expected score>=NUMBER:COLUMN (or > <= <), longest:NUMBER or keys:FILE"


@dataclass(frozen=True)
class Score:
    """Keep rows by the number in a column."""

    column: str
    comparison: str
    threshold: float

    def __call__(self, examples: Examples) -> Examples:
        """Return the examples whose number passes the comparison."""
        holds = COMPARISONS[self.comparison]
        return examples.take(np.flatnonzero(holds(examples.numbers(self.column), self.threshold)))


@dataclass(frozen=True)
class Longest:
    """Keep the rows with the longest responses."""

    number: int

    def __call__(self, examples: Examples) -> Examples:
        """Return the `number` longest examples, in the order of the data.

        Raises:
            ValueError: there are fewer, or some are text and some tokens.
        """
        if len(examples) < self.number:
            raise ValueError(
                f"select: longest:{self.number} of {len(examples)} rows; ask for at most as many"
            )
        of_tokens, lengths = zip(
            *((one.input_ids is not None, response_length(one)) for one in examples), strict=True
        )
        if len(set(of_tokens)) > 1:
            raise ValueError(
                "select: longest: expected rows of text or rows of tokens, got both, whose lengths "
                "do not compare"
            )
        longest = np.lexsort((examples.ids, -np.array(lengths)))[: self.number]
        return examples.take(np.sort(longest))


@dataclass(frozen=True)
class Keys:
    """Keep the rows on an allow-list."""

    file: str
    split: str = "train"
    on_bad_row: OnBadRow = "error"
    columns: Mapping[str, str] | None = None
    train_on: TrainOn = "responses"
    encoding: str = "utf-8"

    def __call__(self, examples: Examples) -> Examples:
        """Return the examples whose id or content hash is listed; print how many keys were found.

        Raises:
            ValueError: none of the keys is found, or a line of a .txt is no key.
            OSError: the file cannot be read.
        """
        with Naming("select", other="data"):
            keys = self.read()
        ids, hashes = examples.ids.tolist(), examples.content_hashes
        found = keys & {*ids, *hashes}
        if not found:
            raise ValueError(f"select: keys:{self.file}: none of {len(keys)} keys is in the data")
        say(f"found {len(found):,} of {len(keys):,} keys of {self.file}")
        pairs = enumerate(zip(ids, hashes, strict=True))
        return examples.take([place for place, (id, key) in pairs if id in found or key in found])

    def read(self) -> set[int | str]:
        """Return the ids and content hashes of the file."""
        path = Path(self.file)
        if path.suffix.lower() == ".txt":
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not valid UTF-8: {error.reason}") from None
            lines = enumerate(text.splitlines(), start=1)
            return {_key(line.strip(), f"{path}:{n}") for n, line in lines if line.strip()}
        rows = load_examples(
            [self.file],
            on_bad_row=self.on_bad_row,
            # All keys select, where --data_split is a part: train[:1000].
            split=names_of(self.split)[0],
            columns=self.columns,
            train_on=self.train_on,
            encoding=self.encoding,
            disable_progress=True,
        )
        return set(rows.content_hashes)


Selection = Score | Longest | Keys


def parse_selection(
    text: str,
    *,
    split: str = "train",
    on_bad_row: OnBadRow = "error",
    columns: Mapping[str, str] | None = None,
    train_on: TrainOn = "responses",
    encoding: str = "utf-8",
) -> Selection:
    """Return the selection that `text` describes; the keywords are for reading a file of keys.

    Raises:
        ValueError: it is none of the forms of this module's docstring.
    """
    kind, _, rest = text.partition(":")
    if match := re.fullmatch(r"score(>=|>|<=|<)(-?\d+(?:\.\d+)?)", kind):
        if rest:
            return Score(rest, match[1], float(match[2]))
    elif kind == "longest" and re.fullmatch(r"[1-9]\d*", rest):
        return Longest(int(rest))
    elif kind == "keys" and rest:
        return Keys(rest, split, on_bad_row, columns, train_on, encoding)
    raise ValueError(f"select: {EXPECTED}; got {text!r}")


def columns_of(selections: Mapping[str, Selection]) -> list[str]:
    """Return the columns whose numbers decide."""
    return [one.column for one in selections.values() if isinstance(one, Score)]


def select(examples: Examples, selections: Mapping[str, Selection]) -> Examples:
    """Return the examples that all selections keep, and print how many.

    Raises:
        ValueError: nothing is left, or a selection does not fit the data.
    """
    kept = examples
    for text, selection in selections.items():
        before, kept = len(kept), selection(kept)
        if not kept:
            raise ValueError(f"select: {text} leaves none of {before} rows")
        say(f"selected {len(kept):,} of {before:,} rows ({text})")
    return kept


def response_length(example: Example) -> int:
    """Return the characters of all that is learnt; for tokens, the number of labels."""
    if example.text is not None:
        return len(example.text)
    if example.messages is None:
        assert example.labels is not None
        return sum(label != IGNORE_INDEX for label in example.labels[1:])
    learnt = example.learnt or [one["role"] == "assistant" for one in example.messages]
    replies = itertools.compress(example.messages, learnt)
    return sum(len(one["content"] or "") for one in replies)


@contextlib.contextmanager
def naming_choices(
    partition: Path, **given: Sequence[str] | Sequence[float] | None
) -> Iterator[None]:
    """Add to a refused partition's message which of its options for the data were others.

    `given` are this run's, `select` and `weights`; the `manifest.json` beside the partition has
    those that it was scored with. Without one nothing is added.
    """
    try:
        yield
    except ValueError as error:
        manifest = partition.with_name(MANIFEST)
        if not manifest.exists():
            raise
        scored = read_manifest(manifest)
        others = [
            f"it was scored with --{name} {_shown(scored.get(name))}, this run has --{name} "
            f"{_shown(value)}"
            for name, value in given.items()
            if scored.get(name) != value
        ]
        if not others:
            raise
        raise ValueError("; ".join([str(error), *others])) from error


def _shown(chosen: Any) -> str:
    return " ".join(map(repr, chosen)) if chosen else "not given"


def _key(line: str, place: str) -> int | str:
    if re.fullmatch(r"[0-9a-f]{64}", line):
        return line
    if re.fullmatch(r"\d{1,18}", line):
        return int(line)
    raise ValueError(f"{place}: expected a row's id or its content hash, got {line!r}")
