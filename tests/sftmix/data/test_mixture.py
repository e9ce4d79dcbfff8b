"""Mixtures: every source whole, its share as asked, the copies drawn, said and told apart."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.data.examples import load_examples
from sftmix.data.mixture import (
    BATCH_ROWS,
    MOST,
    check_weights,
    copied,
    ids_by_source,
    mixed,
    mixture_line,
    numbers_of,
    sizes,
    with_copies,
)


def of(*counts: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.repeat(np.arange(len(counts)), counts)


def files(folder: Path, *counts: int) -> list[Path]:
    paths = []
    for number, count in enumerate(counts):
        rows = [{"question": f"{number} {i}", "answer": "a"} for i in range(count)]
        paths.append(folder / f"{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ((1000, 1000), (0.7, 0.3), [2333, 1000]),
        ((1000, 1000), (7, 3), [2333, 1000]),
        ((10, 90), (0.5, 0.5), [90, 90]),
        ((10, 90), (0.1, 0.9), [10, 90]),  # as they are
        ((1, 2, 3), (1, 1, 1), [3, 3, 3]),
        ((3, 1), (0.1, 0.9), [3, 27]),
    ],
)
def test_the_smallest_mixture_that_uses_every_source_whole(
    counts: tuple[int, ...], weights: tuple[float, ...], expected: list[int]
) -> None:
    assert sizes(of(*counts), weights) == list(zip(counts, expected, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 1)), min_size=2, max_size=4))
def test_shares_and_copies(parts: list[tuple[int, float]]) -> None:
    counts, weights = zip(*parts, strict=True)
    numbers = of(*counts)
    found = sizes(numbers, weights)
    total = sum(size for _, size in found)
    assert any(count == size for count, size in found)
    for (count, size), weight in zip(found, weights, strict=True):
        assert size >= count
        # A count is rounded, and so is each of the others in the total.
        assert abs(size - total * weight / math.fsum(weights)) <= 0.5 + len(parts) / 2
    copies = Counter(copied(numbers, weights).tolist())
    for number, (count, size) in enumerate(found):
        times = [copies[place] for place in np.flatnonzero(numbers == number).tolist()]
        assert sum(times) == size - count
        assert max(times) - min(times) <= 1


def test_the_drawn_rest_is_no_beginning_and_always_the_same() -> None:
    drawn = copied(of(100, 100), (0.6, 0.4))
    assert len(drawn) == len(set(drawn.tolist())) == 50
    assert drawn.tolist() == sorted(drawn.tolist()) != list(range(50))
    assert drawn[:5].tolist() == copied(of(100, 200), (0.6, 0.8))[:5].tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("weights", "data", "message"),
    [
        ([1.0], ["a"], "at least two, got 1 for 1"),
        ([1.0], ["a", "b"], "as many as --data has names.*got 1 for 2 .a, b."),
        ([1.0, 1.0, 1.0], ["a", "b"], "got 3 for 2"),
        ([0.0, 1.0], ["a", "b"], "positive numbers, got 0 for a; leave out of --data"),
        ([1.0, -0.5], ["a", "b"], "positive numbers, got -0.5 for b"),
        ([1.0, 2.0, 3.0], ["a", "b", "a"], "each of --data once, got a 2 times; name it once"),
        ([1.0, 2.0], ["pyproject.toml", "./pyproject.toml"], "once, got .*pyproject.toml 2 times"),
        ([math.nan, 1.0], ["a", "b"], "positive numbers, got nan for a"),
        ([1.0, math.inf], ["a", "b"], "positive numbers, got inf for b"),
    ],
)
def test_wrong_weights(weights: list[float], data: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^weights: expected .*{message}"):
        check_weights(weights, data)


def test_weights_that_the_data_do_not_fit() -> None:
    check_weights(None, ["a"])
    with pytest.raises(ValueError, match=r"^weights: .* got none of number 2; leave it out"):
        sizes(of(3, 0), (1, 1))
    assert sizes(of(1, MOST - 1), (0.99, 0.01))  # 9,900 of 100
    with pytest.raises(ValueError, match=r"at most 100 times the 100 examples, got 99,000,000"):
        sizes(of(1, MOST - 1), (1 - 1e-6, 1e-6))


def test_a_mixture_of_files(tmp_path: Path) -> None:
    paths = files(tmp_path, 3, 4, 7)
    examples = load_examples(paths)
    weights = (0.25, 0.5, 0.25)
    mixture = with_copies(examples, weights)
    assert mixture.reading.sources == [
        (str(paths[0]), 0, 3),
        (str(paths[1]), 3, 7),
        (str(paths[2]), 7, 14),
    ]
    assert len(mixture) == 28
    assert mixture.ids.tolist() == list(range(28))
    assert list(mixture[:14]) == list(examples)
    by_file = Counter(one.source.rpartition(":")[0] for one in mixture)
    assert list(by_file.values()) == [7, 14, 7]
    assert mixture.counts_by_file() == by_file
    line = mixture_line(examples.ids, mixture.reading.sources, weights)
    assert line == (
        f"mixture of 28 examples: {paths[0]}: 3 examples x 2 + 1 drawn; "
        f"{paths[1]}: 4 examples x 3 + 2 drawn; {paths[2]}: 7 examples"
    )


def test_a_mixture_of_tokens_is_that_of_the_examples(tmp_path: Path) -> None:
    paths = files(tmp_path, 700, 2, 900)
    examples = load_examples(paths)
    examples = examples.take(np.flatnonzero(examples.ids != 5))  # left out, as a selection does
    dataset = datasets.Dataset.from_dict(
        {
            "id": examples.ids,
            "content_hash": examples.content_hashes,
            "input_ids": [[int(id)] * (1 + int(id) % 3) for id in examples.ids],
        }
    )
    weights = (0.5, 0.1, 0.4)
    found = mixed(dataset, examples.reading.sources, weights)
    expected = with_copies(examples, weights)
    assert len(found) > len(dataset) + BATCH_ROWS / 2
    assert found["id"][:] == expected.ids.tolist()
    assert found["content_hash"][:] == expected.content_hashes
    rows = {row["content_hash"]: row["input_ids"] for row in dataset}
    assert all(row["input_ids"] == rows[row["content_hash"]] for row in found)
    assert found["source"][:] == [one.source.rpartition(":")[0] for one in expected]
    ranges = ids_by_source(found)
    assert ranges is not None
    assert ranges[str(paths[0])][0] == [0, 700]
    for name, parts in ranges.items():
        inside = [any(first <= id < end for first, end in parts) for id in found["id"][:]]
        assert inside == [source == name for source in found["source"][:]]


def test_without_weights_only_the_names_are_added(tmp_path: Path) -> None:
    examples = load_examples(files(tmp_path, 2, 1))
    dataset = datasets.Dataset.from_dict({"id": examples.ids})
    assert ids_by_source(dataset) is None
    found = mixed(dataset, examples.reading.sources, None)
    assert found["id"][:] == [0, 1, 2]
    names = [name for name, _, _ in examples.reading.sources]
    assert ids_by_source(found) == {names[0]: [[0, 2]], names[1]: [[2, 3]]}
    assert numbers_of([0, 2, 1], examples.reading.sources).tolist() == [0, 1, 0]
