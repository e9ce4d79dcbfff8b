"""The table of ways to train in half precision: that the document has what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.half_precision import __main__ as half

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks/half_precision/results"


def test_the_document_has_the_committed_figures(tmp_path: Path) -> None:
    document = tmp_path / "memory.md"
    text = (ROOT / "docs/memory.md").read_text("utf-8")
    document.write_text(text, encoding="utf-8")
    half.main(["report", str(RESULTS), "--document", str(document)])
    assert document.read_text("utf-8") == text


def test_the_figures_say_which_ways_keep_updates() -> None:
    records = json.loads((RESULTS / half.FILE).read_text("utf-8"))["records"]
    found = {record["options"]: record for record in records}
    assert list(found) == [way.options for way in half.WAYS]
    exact = found["--dtype float32"]
    for options, record in found.items():
        kept = "float32" in options or half.RANDOM in options
        off = abs(record["eval_loss"] - exact["eval_loss"])
        assert (record["changed"] > 0.2) == kept, options
        assert (off < 1e-3) == kept, options


def test_every_way_that_is_here_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(half, "WAYS", half.WAYS[2:3])
    half.main(["run", "--out", str(tmp_path), "--rows", "16"])
    capsys.readouterr()
    half.main(["report", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| `")] == ["2 + 2 + 4"]
    assert "16 rows of the demo's data" in lines[0]
