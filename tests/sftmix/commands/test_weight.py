"""`--weight` from end to end: read, said, trained with, recorded, and refused where it is other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix.cli import main
from sftmix.data.examples import load_examples
from sftmix.pairs.partition import from_scores, write_partition

NUMBER = 8
WEIGHTS = [0.5, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0, 3.0]


@pytest.fixture
def rows(toy_data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in toy_data.read_text().splitlines()[:NUMBER]]


@pytest.fixture
def words(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a short training over `rows.jsonl`, of which the test writes the rows."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(toy_model), "--data", "rows.jsonl", "--use_cpu", "true", "--seed", "3"]
    words += ["--disable_tqdm", "true", "--learning_rate", "0.01", "--logging_steps", "1"]
    return [*words, "--num_train_epochs", "1", "--save_strategy", "no"]


def write(rows: list[dict[str, Any]], name: str = "", weights: list[Any] = WEIGHTS) -> None:
    """Write the rows, and their weights under a name."""
    if name:
        rows = [{**row, name: weight} for row, weight in zip(rows, weights, strict=True)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(words: list[str], run: str, *more: str) -> list[float]:
    """The losses of a training."""
    assert main(["train", *words, "--output", run, *more]) == 0
    log = json.loads((Path(run) / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in log if "loss" in line]


def partition(confidence: list[float]) -> list[str]:
    """The options that name a partition of the rows with this confidence."""
    read = load_examples(["rows.jsonl"], quiet=True)
    nll = np.log(-np.array(confidence))[:, None] * 2
    made = from_scores(read.ids, read.content_hashes, [2] * len(read), nll)
    write_partition(Path("confidence.parquet"), made)
    return ["--partition", "confidence.parquet"]


def test_a_column_of_weights(
    words: list[str], rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--method", "ntp"]
    write(rows)
    plain = train(words, "plain")
    assert "weights" not in capsys.readouterr().out
    write(rows, "weight")
    weighted = train(words, "weighted")
    out = capsys.readouterr().out
    assert "  weights     column 'weight': 0 to 3, mean 1.188; 1 of 8 weigh 0\n" in out
    assert "not used" not in out
    assert weighted != plain
    assert train(words, "none", "--weight", "none") == plain
    assert "  not used    'weight' 4\n" in capsys.readouterr().out
    write(rows, "quality")
    assert train(words, "column", "--weight", "column:quality") == weighted
    out = capsys.readouterr().out
    assert "  weights     column 'quality': 0 to 3, mean 1.188; 1 of 8 weigh 0\n" in out
    assert "not used" not in out
    assert train(words, "unnamed") == plain
    assert "  not used    'quality' 8\n" in capsys.readouterr().out


def test_what_a_run_was_weighted_by(
    words: list[str], rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Other weights are another recipe, and the same ones under another name are not."""
    words += ["--method", "ntp"]
    write(rows, "weight")
    losses = train(words, "run")
    recorded = json.loads(Path("run/manifest.json").read_text())
    assert recorded["weight"] is None
    assert len(recorded["weight_hash"]) == 32
    assert "| weight | - |" in Path("run/README.md").read_text()
    resume = ["--resume", "true"]
    write(rows, "quality")
    assert train(words, "run", *resume, "--weight", "column:quality") == losses
    capsys.readouterr()
    for name, weights, more, was in (
        ("weight", WEIGHTS[::-1], [], "now it is '"),
        ("weight", WEIGHTS, ["--weight", "none"], "now it is None (weight was None, now 'none')"),
        ("", WEIGHTS, [], "now it is None"),
    ):
        write(rows, name, weights)
        assert main(["train", *words, "--output", "run", *resume, *more]) == 2
        error = capsys.readouterr().err
        assert "resume: run was started with weight_hash = '" in error
        assert was in error


def test_weights_by_confidence(
    words: list[str], rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the ranks, as a column of the same numbers; the partition fits all of them."""
    confidence = [-2.0, -9.0, -3.0, -4.0, -8.0, -5.0, -7.0, -6.0]
    write(rows)
    words += partition(confidence)
    ranked = train(words, "ranked", "--weight", "confidence:0.3:1.7")
    out = capsys.readouterr().out
    assert "weights by confidence: 0.3 to 1.7, mean 1\n" in out
    ranks = np.argsort(np.argsort(confidence))
    write(rows, "weight", (0.3 + 1.4 * ranks / 7).tolist())
    assert train(words, "column") == ranked
    again = ["--weight", "confidence:1.7:0.3"]
    assert train(words, "reversed", *again) != ranked
    assert "  not used    'weight' 8\n" in capsys.readouterr().out
    assert json.loads(Path("reversed/manifest.json").read_text())["weight"] == again[1]


def test_rows_without_a_weight_weigh_1(
    words: list[str], rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--method", "ntp"]
    write(rows, "weight", [0.5] + [1] * 7)
    whole = train(words, "whole")
    lines = [json.dumps({**rows[0], "weight": 0.5}), *map(json.dumps, rows[1:])]
    Path("rows.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    assert train(words, "part") == whole
    out = capsys.readouterr().out
    assert "  weights     column 'weight': 0.5 to 1, mean 0.9375; 7 have none and weigh 1\n" in out


def test_a_preview_shows_weights(
    words: list[str], rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    write([{**row, "source": "web"} for row in rows], "weight")
    words = [*words, *partition([-2.0, -9.0, -3.0, -4.0, -8.0, -5.0, -7.0, -6.0])]
    capsys.readouterr()
    assert main(["preview", *words, "--number", "2", "--html", "page.html"]) == 0
    out = capsys.readouterr().out
    assert "\n  weight 0.5; not used: 'source'\n" in out
    assert "\n  weight 2; not used: 'source'\n" in out
    assert "  weights     column 'weight': 0 to 3" in out
    assert "weight 0.5; not used: &#39;source&#39;" in Path("page.html").read_text()
    assert main(["preview", *words, "--number", "1", "--weight", "confidence:0:2"]) == 0
    out = capsys.readouterr().out
    assert "weights by confidence: 0 to 2, mean 1; 1 of 8 weigh 0\n" in out
    assert "\n  weight 2; not used: 'source', 'weight'\n" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weight", "column:rate"], "--weight column:rate: no row has a column 'rate', only ["),
        (["--weight", "quality"], "--weight: expected column:NAME, confidence:A:B or none, got"),
        (["--weight", "confidence:1:2"], "--weight: expected --partition RUN/confidence.parquet"),
        ([], "rows.jsonl:4: 'weight' must be a weight, a finite number of at least 0, got '0.5'"),
        (["--on_bad_row", "skip"], "--weight: expected a weight above 0, got 0 for all 7 examples"),
    ],
)
def test_refusals(
    flags: list[str],
    message: str,
    words: list[str],
    rows: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(rows, "weight", [0, 0, 0, "0.5", 0, 0, 0, 0])
    assert main(["train", *words, "--method", "ntp", "--output", "run", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_methods_without_weights(
    words: list[str], rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    write(rows, "weight")
    words = [*words, "--method", "ir_dro"]
    assert main(["train", *words, "--output", "run"]) == 2
    error = capsys.readouterr().err
    assert "--weight: the loss of --method ir_dro has no weights of examples, expected one" in error
    assert "--weight none" in error
    train(words, "run", "--weight", "none")
