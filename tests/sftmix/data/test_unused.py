"""What of single rows is not used."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from sftmix.data.examples import load_examples
from sftmix.data.unused import unused_of


def test_rows_are_found_again_by_line_and_content(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "completion": "b", f"more{n}": n + 1, "score": 2} for n in range(4)]
    rows.insert(2, {"prompt": 7, "completion": "of another kind", "id": 3})
    one, many = tmp_path / "one:line.json", tmp_path / "many.jsonl"
    one.write_text(json.dumps(rows))
    many.write_text("\n".join(map(json.dumps, rows)))
    examples = load_examples([one, many], on_bad_row="skip", numbers=["score"], quiet=True)
    assert [example.id for example in examples] == [0, 1, 3, 4, 5, 6, 8, 9]
    found = unused_of([examples[1], examples[2], examples[7]], examples.reading, ["score"])
    assert found == {1: ["more1"], 3: ["more2"], 9: ["more3"]}


def test_rows_are_read_in_the_format_of_their_file(tmp_path: Path) -> None:
    """The last row has the columns of a format that comes first, as no other row has."""
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
    rows = [{"prompt": "p", "completion": "c", "id": n} for n in range(1, 4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "messages": turns}])))
    examples = load_examples([path], quiet=True)
    found = unused_of(examples, examples.reading)
    assert found == {0: ["id"], 1: ["id"], 2: ["id"], 3: ["id", "messages"]}
    assert examples.reading.unused == {"id": 4, "messages": 1}


COLUMNS = [f"{name}{n}" for name in ("train", "test") for n in range(4)]


@pytest.mark.parametrize("split", ["test[1:3]", "train[-1:]+test[2:]", "train+test"])
@pytest.mark.parametrize("saved", [True, False])
def test_rows_of_a_part_of_a_split(tmp_path: Path, split: str, saved: bool) -> None:
    parts = {}
    for name in ("train", "test"):
        rows = [{"question": f"{name} {n}", "answer": "a", f"{name}{n}": n + 1} for n in range(4)]
        parts[name] = datasets.Dataset.from_list([{**dict.fromkeys(COLUMNS), **r} for r in rows])
        if not saved:
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if saved:
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    examples = load_examples([tmp_path], split=split, quiet=True)
    found = unused_of(examples, examples.reading)
    assert found == {
        one.id: [(one.messages or ())[0]["content"].replace(" ", "")] for one in examples
    }
