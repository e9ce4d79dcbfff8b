"""Weights of examples: which column holds them, what is refused, and weights by confidence."""

from __future__ import annotations

import csv
import doctest
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sftmix.data import weighting
from sftmix.data.examples import BadRowError, content_hash, load_examples
from sftmix.data.unused import unused_of
from sftmix.data.weighting import (
    ByConfidence,
    WeightColumn,
    parse_weight,
)

TURNS = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}]
FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "prompt": {"prompt": "Add 1 and 2.", "completion": "3"},
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
}
ROW = FORMATS["prompt"]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weights(file: Path, column: WeightColumn, **more: Any) -> list[float]:
    found: list[float] = load_examples([file], weight=column, **more).numbers(column.name).tolist()
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, WeightColumn("weight")),
        ("none", None),
        ("column:my score", WeightColumn("my score", required=True)),
        ("confidence:0.5:2", ByConfidence(0.5, 2.0)),
        ("confidence:1:0", ByConfidence(1.0, 0.0)),
    ],
)
def test_what_can_be_chosen(text: str | None, found: Any) -> None:
    assert parse_weight(text) == found


@pytest.mark.parametrize(
    "text",
    [
        *("", "weight", "column", "column:", "None", "confidence", "confidence:1"),
        *("confidence:1:2:3", "confidence:a:2", "confidence:-1:2", "confidence:nan:1"),
        *("confidence:0:inf", "confidence:0:0", "confidence:0:1e39"),
    ],
)
def test_other_choices_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^weight: expected .*, got '"):
        parse_weight(text)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_every_format_has_weights(form: str, kind: str, tmp_path: Path) -> None:
    rows = [{**FORMATS[form], "weight": weight} for weight in (0.5, 2.0, 0.0)]
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(file, *rows)
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(file)
    found = load_examples([file], weight=WeightColumn())
    assert found.numbers("weight").tolist() == [0.5, 2, 0]
    assert not found.reading.unused
    assert set(map(tuple, unused_of(found, found.reading, ["weight"]).values())) == {()}
    # A weight is no content: a partition fits whatever the weights.
    plain = load_examples([write(tmp_path / "plain.jsonl", FORMATS[form])])
    assert set(found.content_hashes) == {plain[0].content_hash}
    assert content_hash({**FORMATS[form], "weight": 0.5}) == plain[0].content_hash


def test_cells_of_csv_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerows([["prompt", "completion", "weight"], ["a", "b", "0.25"], ["c", "d", "3"]])
    assert weights(file, WeightColumn()) == [0.25, 3]
    file.write_text(file.read_text() + "e,f,much\ng,h,\n")
    with pytest.raises(BadRowError, match=r"rows.csv:4: 'weight' must be a weight, .*, got 'much'"):
        weights(file, WeightColumn())
    assert weights(file, WeightColumn(), on_bad_row="skip") == [0.25, 3]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0.5", "'0.5'"), (None, "None"), (True, "True"), (math.nan, "nan"), (-0.5, "-0.5"),
        (math.inf, "inf"), ([1], "[1]"), (10**40, "1" + 39 * "0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", [WeightColumn(), WeightColumn("weight", required=True)])
def test_a_bad_weight_is_a_bad_row(
    value: Any, shown: str, column: WeightColumn, tmp_path: Path
) -> None:
    file = write(tmp_path / "rows.jsonl", {**ROW, "weight": 1}, {**ROW, "weight": value})
    with pytest.raises(BadRowError) as error:
        weights(file, column)
    assert (error.value.file, error.value.line) == (str(file), 2)
    said = f"'weight' must be a weight, a finite number of at least 0, got {shown}"
    assert error.value.reason.startswith(said)
    assert weights(file, column, on_bad_row="skip") == [1]


def test_rows_without_a_weight(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {**ROW, "quality": 2}, ROW)
    found = weights(file, WeightColumn("quality"))
    assert found[0] == 2
    assert math.isnan(found[1])
    with pytest.raises(BadRowError, match=r"rows.jsonl:2: 'quality' is missing"):
        weights(file, WeightColumn("quality", required=True))
    message = r"--weight column:rate: no row has a column 'rate', only \['completion', 'prompt', 'q"
    with pytest.raises(ValueError, match=message):
        weights(file, WeightColumn("rate", required=True), on_bad_row="skip")
    # The first rows of a file tell its format, and the column comes later.
    late = write(tmp_path / "late.jsonl", *[ROW] * 120, {**ROW, "rate": 3})
    with pytest.raises(BadRowError, match=r"late.jsonl:1: 'rate' is missing"):
        weights(late, WeightColumn("rate", required=True))


def test_other_columns_of_weights(tmp_path: Path) -> None:
    row = {**ROW, "weight": 0.5, "loss_weight": 2}
    file = write(tmp_path / "rows.jsonl", row)
    message = r"'loss_weight' is 2, and weights are read from 'weight'; --weight column:loss_weight"
    with pytest.raises(BadRowError, match=message):
        weights(file, WeightColumn())
    assert weights(file, WeightColumn("loss_weight", required=True)) == [2]
    for column, unused in (
        (WeightColumn("loss_weight", required=True), {"weight": 1}),
        (None, {"weight": 1, "loss_weight": 1}),
    ):
        assert load_examples([file], weight=column, quiet=True).reading.unused == unused
    same = write(tmp_path / "same.jsonl", {**ROW, "weight": 0.5, "train": True})
    assert weights(same, WeightColumn()) == [0.5]


def test_a_row_of_no_format_has_a_hash_without_its_weight() -> None:
    row = {"text": "without any marks"}
    assert content_hash({**row, "weight": 0.5}) == content_hash(row) != content_hash({"text": "x"})


def test_weights_by_confidence() -> None:
    """Least to most, and the same for the same confidence: the mean of ranks 1 and 2 of 0 to 4."""
    confidence = np.array([-2.0, -5.0, -2.0, -np.inf, -1.0])
    found = ByConfidence(1.0, 3.0).of(confidence)
    assert found.dtype == np.float32
    assert found.tolist() == [2.25, 1.5, 2.25, 1.0, 3.0]
    assert ByConfidence(3.0, 1.0).of(confidence).tolist() == [1.75, 2.5, 1.75, 3.0, 1.0]
    assert ByConfidence(0.0, 1.0).of(np.array([-7.0, -7.0])).tolist() == [0.5, 0.5]


def test_the_examples_of_the_module() -> None:
    assert doctest.testmod(weighting) == (0, 2)
