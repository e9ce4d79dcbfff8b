"""What of single rows is not used."""

from __future__ import annotations

import json
from pathlib import Path

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
    found = unused_of([examples[1], examples[2], examples[7]], "train", ["score"])
    assert found == {1: ["more1"], 3: ["more2"], 9: ["more3"]}
