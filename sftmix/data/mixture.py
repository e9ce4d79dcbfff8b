"""Mix several data by weights: each is used whole, and those with too few examples are copied.

The mixture is the smallest in which every source is whole and has its share: of 1,000 examples
with weight 0.7 and 1,000 with weight 0.3, all of the second are 30 %, so it has 3,333, and the
first comes twice and 333 of it a third time. These are drawn from the data alone, not from a seed,
so that a partition fits trainings of every seed. A copy is an example by itself: it has an id of
its own, after all others, and is scored and paired as they are.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from sftmix.data.store import Examples

# A name of `--data`, its first id, and the one after its last.
Source = tuple[str, int, int]

# How many times as many examples a mixture may have as its data: more is a slip in a weight.
MOST = 100
BATCH_ROWS = 1000


def check_weights(weights: Sequence[float] | None, data: Sequence[str]) -> None:
    """Refuse weights that are not one positive number for each of several data.

    Raises:
        ValueError: naming the option.
    """
    if weights is None:
        return
    if len(weights) != len(data) or len(data) < 2:
        names = "as many as --data has names, which are at least two"
        raise ValueError(
            f"weights: expected {names}, got {len(weights)} for {len(data)} ({', '.join(data)})"
        )
    same = Counter(os.path.realpath(name) if os.path.exists(name) else name for name in data)
    if twice := [name for name, count in same.items() if count > 1]:
        raise ValueError(
            f"weights: expected each of --data once, got {twice[0]} {same[twice[0]]} times; name "
            "it once, with the sum of its weights"
        )
    for weight, name in zip(weights, data, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"weights: expected positive numbers, got {weight:g} for {name}; leave out of "
                "--data what is not to be learnt"
            )


def numbers_of(ids: ArrayLike, sources: Sequence[Source]) -> NDArray[np.int64]:
    """Return which of the sources each example is of, (S,), by its id."""
    return np.searchsorted([end for _, _, end in sources], ids, side="right")


def sizes(numbers: NDArray[np.int64], weights: Sequence[float]) -> list[tuple[int, int]]:
    """Return how many examples each source has, and how many it has in the mixture.

    Raises:
        ValueError: a source has no example left, or the mixture would be beyond `MOST` times the
            data.
    """
    counts = np.bincount(numbers, minlength=len(weights)).tolist()
    if not all(counts):
        raise ValueError(
            f"weights: expected an example of each of --data, got none of number "
            f"{counts.index(0) + 1}; leave it out, with its weight"
        )
    whole = math.fsum(weights)
    total = max(count * whole / weight for count, weight in zip(counts, weights, strict=True))
    if total > MOST * sum(counts):
        raise ValueError(
            f"weights: expected a mixture of at most {MOST} times the {sum(counts):,} examples, "
            f"got {total:,.0f}, in which each is used; raise the smallest weight"
        )
    wanted = (round(total * weight / whole) for weight in weights)
    return [(count, max(count, size)) for count, size in zip(counts, wanted, strict=True)]


def copied(numbers: NDArray[np.int64], weights: Sequence[float]) -> NDArray[np.int64]:
    """Return the places of the examples to copy, source by source, each as often as it is copied.

    Raises:
        ValueError: as `sizes` does.
    """
    found = []
    for number, (count, size) in enumerate(sizes(numbers, weights)):
        places = np.flatnonzero(numbers == number)
        # Raw Philox words: numpy keeps them the same in every version, unlike permutation().
        draws = np.random.Philox(key=number).random_raw(count)
        rest = np.sort(np.argsort(draws, kind="stable")[: size % count])
        found += [np.tile(places, size // count - 1), places[rest]]
    return np.concatenate(found)


def with_copies(examples: Examples, weights: Sequence[float]) -> Examples:
    """Return the examples, and then the copies that a mixture by these weights has.

    Raises:
        ValueError: as `sizes` does.
    """
    sources = examples.reading.sources
    places = copied(numbers_of(examples.ids, sources), weights)
    ids = sources[-1][2] + np.arange(len(places))
    return examples.take(
        np.concatenate([np.arange(len(examples)), places]), np.concatenate([examples.ids, ids])
    )


def mixed(
    dataset: datasets.Dataset, sources: Sequence[Source], weights: Sequence[float] | None
) -> datasets.Dataset:
    """Return tokenised examples with the name of the `source` of each, and then the copies.

    Raises:
        ValueError: as `sizes` does.
    """
    numbers = numbers_of(dataset["id"][:], sources)
    names = np.array([name for name, _, _ in sources], dtype=object)
    named = dataset.add_column("source", names[numbers].tolist())
    if weights is None:
        return named
    places = copied(numbers, weights)
    rows = named.with_format("arrow")
    parts: list[Any] = [named]
    for begin in range(0, len(places), BATCH_ROWS):
        part = rows[places[begin : begin + BATCH_ROWS].tolist()]
        ids = sources[-1][2] + begin + np.arange(len(part))
        part = part.set_column(part.column_names.index("id"), "id", pa.array(ids))
        parts.append(datasets.Dataset(part))
    return datasets.concatenate_datasets(parts)


def mixture_line(ids: ArrayLike, sources: Sequence[Source], weights: Sequence[float]) -> str:
    """Return one line that says how often each source's examples come in the mixture."""
    found = sizes(numbers_of(ids, sources), weights)
    parts = []
    for (name, _, _), (count, size) in zip(sources, found, strict=True):
        times, drawn = f" x {size // count}" if size >= 2 * count else "", size % count
        rest = f" + {drawn:,} drawn" if drawn else ""
        parts.append(f"{name}: {count:,} examples{times}{rest}")
    return f"mixture of {sum(size for _, size in found):,} examples: {'; '.join(parts)}"


def ids_by_source(dataset: datasets.Dataset) -> dict[str, list[list[int]]] | None:
    """Return each source's ids as ranges [first, one after the last]; None for a single source.

    Originals are a range, and copies another one.
    """
    if "source" not in dataset.column_names:
        return None
    ids, names = np.array(dataset["id"][:]), np.array(dataset["source"][:], dtype=object)
    found: dict[str, list[list[int]]] = {}
    begins = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        found.setdefault(names[begin], []).append([int(ids[begin]), int(ids[end - 1]) + 1])
    return found
