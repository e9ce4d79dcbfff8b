"""`sftmix evaluate`: what it refuses, writes down and adds to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sftmix.cli import main
from sftmix.evaluate import merge, table
from sftmix.medical import Score

from .medical_data import MAKE, needs_harness, write


def test_errors_are_one_line(
    tmp_path: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "medqa", [0])["file"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model": "another", "metrics": {}, "details": {}}))
    (tmp_path / "list.json").write_text("[]")
    asked = ["--tasks", "medqa", "--medqa_data"]
    for arguments, message in (
        (["--tasks", "medqa", "usmle"], "expected some of medqa, medqa_5, pubmedqa, medmcqa, got"),
        ([*asked, str(tmp_path / "none.jsonl")], "no such data file: "),
        ([*asked, file, "--limit", "0"], "limit: expected at least 1, got 0"),
        ([*asked, file, "--model", "a/name"], "'a/name' is no folder to put evaluation.json into"),
        ([*asked, file, "--output", str(tmp_path / "no" / "x.json")], "there is no folder"),
        ([*asked, file, "--output", str(other)], "holds the evaluation of 'another'"),
        ([*asked, file, "--output", str(tmp_path / "list.json")], "is no evaluation"),
        ([*asked, file, "--output", file], "is no evaluation"),
    ):
        assert main(["evaluate", "--model", str(toy_model), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--pubmedqa_ids" in text
    assert "[ours]" in text


def test_scores_are_added_to_those_that_are_there() -> None:
    details = {"limit": None, "apply_chat_template": False, "dtype": "auto"}
    names = ["medqa", "medqa_5", "pubmedqa", "medmcqa"]
    scores = {name: Score(10.0 * i, 1.5, 4, 0, "hash") for i, name in enumerate(names)}
    content: dict[str, Any] = {"metrics": {"MT-Bench": 4.5}}
    for name in ("medmcqa", "medqa_5", "medqa"):
        content = merge(content, "model", {name: scores[name]}, {name: details})
    assert content["metrics"] == {"MT-Bench": 4.5, "MedQA": 0.0, "MedQA-5": 10.0, "MedMCQA": 30.0}
    content = merge(content, "model", {"pubmedqa": scores["pubmedqa"]}, {"pubmedqa": details})
    assert content["metrics"]["mean"] == 15.0
    assert content["num_examples"] == dict.fromkeys(("MedQA", "MedQA-5", "PubMedQA", "MedMCQA"), 4)
    assert [line.split() for line in table(content).splitlines()[1:]] == [
        ["MedQA", "0.00", "1.50", "4"],
        ["MedQA-5", "10.00", "1.50", "4"],
        ["PubMedQA", "20.00", "1.50", "4"],
        ["MedMCQA", "30.00", "1.50", "4"],
        ["mean", "15.00"],
    ]
    again = {"medqa": Score(50.0, None, 1, 0, "hash")}
    content = merge(content, "model", again, {"medqa": {**details, "limit": 1}})
    assert content["metrics"]["MedQA"] == 50.0
    assert "mean" not in content["metrics"]


@needs_harness
def test_the_command(
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_model, run)
    (run / "notes.txt").write_text("stays")
    flags = []
    for name in MAKE:
        for kind, file in write(tmp_path, name, [0, 1, 2, 1]).items():
            flags += [f"--{name}_{'data' if kind == 'file' else kind}", file]
    common = ["evaluate", "--model", str(run), *flags]
    assert main([*common, "--tasks", "medqa", "medmcqa"]) == 0
    first = json.loads((run / "evaluation.json").read_text())
    assert first["metrics"].keys() == {"MedQA", "MedMCQA"}
    assert main([*common, "--tasks", "pubmedqa", "medqa_5", "medqa_5", "--batch-size", "2"]) == 0
    content = json.loads((run / "evaluation.json").read_text())
    for column in ("metrics", "stderr", "num_examples", "details"):
        assert {name: content[column][name] for name in first[column]} == first[column]
    four = [content["metrics"][name] for name in ("MedQA", "MedQA-5", "PubMedQA", "MedMCQA")]
    assert content["metrics"]["mean"] == pytest.approx(sum(four) / 4)
    assert f"mean     {sum(four) / 4:9.2f}" in capsys.readouterr().out
    detail = content["details"]["PubMedQA"]
    assert (detail["task"], detail["batch_size"]) == ("sftmix_pubmedqa", 2)
    assert {"lm_eval", "transformers", "torch"} <= detail["versions"].keys()

    caplog.clear()
    long = write(tmp_path, "medqa", [0, 1], sent1=" ".join(["one"] * 400))["file"]
    again = [*common, "--tasks", "medqa", "--medqa_data", long, "--limit", "1"]
    assert main([*again, "--apply_chat_template"]) == 0
    changed = json.loads((run / "evaluation.json").read_text())
    assert "mean" not in changed["metrics"]
    assert (changed["num_examples"]["MedQA"], changed["stderr"]["MedQA"]) == (1, None)
    assert changed["details"]["MedQA"]["num_cut"] == 1
    assert "MedQA: 1 of 1 prompts exceed the model's context of 256 tokens" in caplog.text
    assert main(again) == 0
    plain = json.loads((run / "evaluation.json").read_text())["details"]["MedQA"]["prompts_hash"]
    assert plain != changed["details"]["MedQA"]["prompts_hash"]
    assert changed["details"]["PubMedQA"] == detail
    expected = {path.name for path in toy_model.iterdir()} | {"notes.txt", "evaluation.json"}
    assert {path.name for path in run.iterdir()} == expected
