"""Too little data, or too much of it in one row, through the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sftmix.cli import main
from sftmix.pairs.partition import read_partition
from tests.sftmix.conftest import write_rows


def words(command: str, model: Path, data: Path, run: Path, *flags: str) -> list[str]:
    common = ["--model", str(model), "--data", str(data), "--output", str(run)]
    common += ["--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "0.01"]
    if command == "train":
        common += ["--method", "ntp", "--num_train_epochs", "1", "--save_strategy", "no"]
    return [command, *common, *flags]


@pytest.mark.parametrize("command", ["score", "train"])
def test_too_few_examples(
    command: str, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None, one, and fewer than a batch: an error that says so, and a folder that can be used."""
    run, data = tmp_path / "run", tmp_path / "rows.jsonl"
    for rows, message in (
        (0, f"{data}: holds no rows"),
        (1, "expected at least one batch of 4 examples, got 1"),
        (3, "expected at least one batch of 4 examples, got 3"),
    ):
        write_rows(data, rows)
        assert main(words(command, toy_model, data, run)) == 2
        error = capsys.readouterr().err
        assert f"sftmix {command}: error: " in error
        assert message in error
        assert "Traceback" not in error
    write_rows(data, 5)
    flags = ["--num_scorings", "1"] if command == "score" else []
    assert main(words(command, toy_model, data, run, *flags)) == 0


def test_one_pair_is_enough(toy_model: Path, tmp_path: Path) -> None:
    data, scored = write_rows(tmp_path / "rows.jsonl", 2), tmp_path / "scored"
    batch = ["--per_device_train_batch_size", "2"]
    flags = [*batch, "--num_scorings", "1"]
    assert main(words("score", toy_model, data, scored, *flags)) == 0
    partition = scored / "confidence.parquet"
    assert sorted(read_partition(partition).subset) == ["confident", "unconfident"]
    flags = [*batch, "--method", "sftmix", "--partition", str(partition), "--logging_steps", "1"]
    assert main(words("train", toy_model, data, tmp_path / "run", *flags)) == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "mixup_loss" in line] == [1]


def test_one_scored_example_has_no_other_half(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch of one is training enough for its scores, but there is nothing to mix it with."""
    data, scored = write_rows(tmp_path / "rows.jsonl", 1), tmp_path / "scored"
    flags = ["--per_device_train_batch_size", "1", "--num_scorings", "1"]
    assert main(words("score", toy_model, data, scored, *flags)) == 0
    capsys.readouterr()
    flags = ["--partition", str(scored / "confidence.parquet"), "--method", "sftmix"]
    flags += ["--per_device_train_batch_size", "2"]
    assert main(words("train", toy_model, data, tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err
    assert "both sides of every pair, got 1 confident and 0 unconf" in error
    assert "score at least two examples" in error


def test_rows_longer_than_the_longest(
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A response loses its tail; a prompt that leaves none of it is a malformed row."""
    data = write_rows(tmp_path / "rows.jsonl", 8)
    rows = data.read_text().splitlines()
    long = json.dumps({"question": "one", "answer": "owl " * 300})
    data.write_text("\n".join([*rows, long]))
    flags = ["--max_length", "64"]
    with caplog.at_level(logging.WARNING, logger="sftmix"):
        assert main(words("train", toy_model, data, tmp_path / "run", *flags)) == 0
    assert "1 of 9 examples (11.1%) lose their end at --max_length 64" in capsys.readouterr().out
    assert "lost their end" not in caplog.text  # it is said once
    data.write_text("\n".join([*rows, json.dumps({"question": "owl " * 300, "answer": "one"})]))
    assert main(words("train", toy_model, data, tmp_path / "bad", *flags)) == 2
    error = capsys.readouterr().err
    assert f"{data}:9: no response token is left within --max_length 64" in error
    skip = [*flags, "--on_bad_row", "skip"]
    assert main(words("train", toy_model, data, tmp_path / "bad", *skip)) == 0
    assert json.loads((tmp_path / "bad" / "manifest.json").read_text())["num_examples"] == 8


def test_equal_examples_are_halved_by_their_numbers(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Duplicates stay, each an example by itself; of equal confidences the earlier is confident."""
    data, scored = tmp_path / "rows.jsonl", tmp_path / "scored"
    data.write_text((json.dumps({"question": "one", "answer": "owl"}) + "\n") * 3)
    flags = ["--per_device_train_batch_size", "2", "--num_scorings", "1"]
    assert main(words("score", toy_model, data, scored, *flags)) == 0
    out = capsys.readouterr().out
    line = "2 of 3 rows have the content of an earlier one, and are learnt again: the first is "
    assert f"{line}example 1 ({data}:2), with that of example 0 ({data}:1)" in out
    partition = read_partition(scored / "confidence.parquet")
    assert partition.id.tolist() == [0, 1, 2]
    assert len(set(partition.content_hash.tolist())) == len(set(partition.confidence.tolist())) == 1
    assert partition.subset.tolist() == ["confident", "confident", "unconfident"]
    flags = ["--per_device_train_batch_size", "2", "--method", "sftmix", "--logging_steps", "1"]
    flags += ["--partition", str(scored / "confidence.parquet")]
    assert main(words("train", toy_model, data, tmp_path / "run", *flags)) == 0
