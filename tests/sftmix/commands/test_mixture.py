"""A mixture from end to end: scored, trained with another seed, told apart in the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sftmix.cli import main
from sftmix.pairs.partition import read_partition
from sftmix.report.findings import find
from sftmix.report.measured import sample_examples
from sftmix.report.runs import read_run, read_runs
from sftmix.report.sections import loss_within, sources_table
from sftmix.report.tables import command
from tests.sftmix.conftest import write_rows

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "8"]


def test_a_mixture(toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_rows(tmp_path / "one.jsonl", 6), write_rows(tmp_path / "two.jsonl", 20, seed=1)
    scored, trained = tmp_path / "scored", tmp_path / "trained"
    words = ["--model", str(toy_model), "--data", str(one), str(two), "--weights", "2", "3", *QUIET]
    assert main(["score", *words, "--output", str(scored), "--num_scorings", "1"]) == 0
    line = f"mixture     33 examples: {one}: 6 examples x 2 + 1 drawn; {two}: 20 examples"
    assert line in capsys.readouterr().out
    sources = {str(one): [[0, 6], [26, 33]], str(two): [[6, 26]]}
    manifest = json.loads((scored / "manifest.json").read_text())
    assert (manifest["weights"], manifest["sources"]) == ([2.0, 3.0], sources)
    partition = read_partition(scored / "confidence.parquet")
    assert partition.id.tolist() == list(range(33))
    # A copy is scored as its original is.
    first = {key: row for row, key in reversed(list(enumerate(partition.content_hash.tolist())))}
    originals = [first[key] for key in partition.content_hash.tolist()]
    np.testing.assert_allclose(partition.confidence[originals], partition.confidence, rtol=1e-4)
    assert originals[26:] == [0, 1, 2, 3, 4, 5, originals[-1]]

    words += ["--partition", str(scored / "confidence.parquet"), "--seed", "7", "--max_steps", "2"]
    words += ["--learning_rate", "0.01", "--save_strategy", "no", "--logging_steps", "1"]
    assert main(["train", *words, "--output", str(trained)]) == 0
    card = (trained / "README.md").read_text()
    assert "| weights | 2.0, 3.0 |" in card
    assert str(tmp_path) not in card
    run = read_run(trained)
    assert run.recipe["sources"] == sources
    assert f"--data {one} {two}" in (text := " ".join(command(run).replace("\\\n", "").split()))
    assert "--weights 2.0 3.0" in text
    assert "--sources" not in text
    for known in (partition, None):
        assert sample_examples(run, known, None).ids.tolist() == list(range(33))

    place = words.index("--weights")
    other = [*words[:place], *words[place + 3 :]]
    assert main(["train", *other, "--output", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "it was scored with --weights 2.0 3.0, this run has --weights not given" in error

    findings = find(read_runs([scored, trained]), None)
    table = sources_table(findings)
    assert table is not None
    assert [row[0] for row in table.rows] == [str(one), str(two)]
    [group] = findings.groups
    after = findings.after[group.name][7].scores
    inside = (after.id < 6) | (after.id >= 26)
    loss = after.nll_sum[inside, 0].sum() / after.num_tokens[inside].sum()
    assert table.rows[0][2] == f"{loss:.4g}"
    assert table.rows[1][2] == f"{loss_within(after, [[6, 26]]):.4g}"
    assert loss_within(after, [[33, 40]]) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "1"], "--weights: expected as many as --data has names"),
        (["--weights", "1", "nan"], "--weights: expected positive numbers, got nan"),
        (["--weights", "0", "1"], "--weights: expected positive numbers, got 0 for"),
        (["--weights", "1", "1e-9"], "--weights: expected a mixture of at most 100 times the 8"),
    ],
)
def test_weights_are_refused_by_name(
    flags: list[str],
    message: str,
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = [str(write_rows(tmp_path / f"{n}.jsonl", 4, seed=n)) for n in range(2)]
    words = ["--model", str(toy_model), "--data", *data, "--output", str(tmp_path / "run"), *QUIET]
    assert main(["score", *words, *flags]) == 2
    assert message in capsys.readouterr().err


def test_examples_of_the_training_data_among_the_held_out_are_named(
    toy_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    held_out = write_rows(tmp_path / "held_out.jsonl", 3, seed=5)
    held_out.write_text(
        held_out.read_text() + "".join(data.read_text().splitlines(keepends=True)[2:4])
    )
    words = ["--model", str(toy_model), "--data", str(data), "--eval_data", str(held_out), *QUIET]
    words += ["--method", "ntp", "--max_steps", "1", "--save_strategy", "no"]
    assert main(["train", *words, "--output", str(tmp_path / "run")]) == 0
    warned = [record.getMessage() for record in caplog.records if "eval_data" in record.msg]
    assert warned == [
        "eval_data: 2 of 5 examples are in --data, too, the first of them example 4: their loss is "
        "that of training"
    ]
