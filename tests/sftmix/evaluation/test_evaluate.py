"""`sftmix evaluate`: what it refuses, writes down and adds to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sftmix.cli import main
from sftmix.commands.evaluate import merge, output_file, table
from sftmix.evaluation.medical import Score, refuse_no_numbers
from tests.sftmix.medical_data import MAKE, needs_harness, write


def test_errors_are_one_line(
    tmp_path: Path,
    toy_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sftmix.commands.evaluate.require_harness", lambda: None)
    file = write(tmp_path, "medqa", [0])["file"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model": "another", "metrics": {}, "details": {}}))
    (tmp_path / "list.json").write_text("[]")
    asked = ["--tasks", "medqa", "--medqa_data"]
    for arguments, message in (
        (["--tasks", "medqa", "usmle"], "expected some of medqa, medqa_5, pubmedqa, medmcqa, got"),
        ([*asked, str(tmp_path / "none.jsonl")], "no such data file: "),
        ([*asked, file, "--limit", "0"], "limit: expected at least 1, got 0"),
        ([*asked, file, "--model", "a/name"], "error: --model: no folder ./a/name, and no such"),
        ([*asked, file, "--model", "./typo"], "error: --model: no folder ./typo; a name on the"),
        ([*asked, file, "--output", str(tmp_path / "no" / "x.json")], "there is no folder"),
        ([*asked, file, "--output", str(other)], "holds the evaluation of 'another'"),
        ([*asked, file, "--output", str(tmp_path / "list.json")], "is no evaluation"),
        ([*asked, file, "--output", file], "is no evaluation"),
    ):
        assert main(["evaluate", "--model", str(toy_model), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match=r"^output: expected a file: there is no folder 'a/name'"):
        output_file("a/name", None)


def test_the_harness_is_asked_for_before_questions_are_fetched(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise ImportError("no harness")

    monkeypatch.setattr("sftmix.commands.evaluate.require_harness", missing)
    monkeypatch.setattr("sftmix.commands.evaluate.read_questions", None)
    assert main(["evaluate", "--model", str(toy_model), "--limit", "2"]) == 2
    assert capsys.readouterr().err == "sftmix evaluate: error: no harness\n"


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


# Results as they come


class Asked:
    """In place of the harness: a score for each task, until ``fail_at`` fails."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fail_at: str | None = None
        self.error: type[BaseException] = KeyboardInterrupt

    def __call__(
        self, model: Any, tokenizer: Any, questions: Mapping[str, Any], **options: Any
    ) -> Iterator[tuple[str, Score]]:
        for name, one in questions.items():
            self.names.append(name)
            if name == self.fail_at:
                raise self.error("interrupted")
            yield name, Score(10.0 * len(name), 1.5, len(one.documents), 0, "hash")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr("sftmix.commands.evaluate.score", asked)
    monkeypatch.setattr("sftmix.commands.evaluate.require_harness", lambda: None)
    monkeypatch.setattr("sftmix.commands.evaluate.version", lambda name: "0")
    return asked


@pytest.fixture
def evaluate(toy_model: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs `sftmix evaluate` of three tasks on a copy of the toy model."""
    folder = shutil.copytree(toy_model, tmp_path / "model")
    names = ("medqa", "medqa_5", "medmcqa")
    files = {name: write(tmp_path, name, [0, 1, 2])["file"] for name in names}
    data = [word for name, file in files.items() for word in (f"--{name}_data", file)]

    def run(*flags: str) -> int:
        words = ["evaluate", "--model", str(folder), "--tasks", *names, *data]
        return main([*words, "--disable_tqdm", *flags])

    return run


def content_of(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    return content


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, OSError])
def test_what_is_done_is_kept_and_not_asked_again(
    error: type[BaseException],
    asked: Asked,
    evaluate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked.fail_at, asked.error = "medqa_5", error
    try:
        assert evaluate() != 0
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    first = content_of(tmp_path)
    assert first["metrics"] == {"MedQA": 50.0}
    assert "MedQA: 50.00, written to " in capsys.readouterr().out
    asked.fail_at, asked.names = None, []
    assert evaluate("--resume") == 0
    assert asked.names == ["medqa_5", "medmcqa"]
    content = content_of(tmp_path)
    assert content["metrics"] == {"MedQA": 50.0, "MedQA-5": 70.0, "MedMCQA": 70.0}
    assert content["details"]["MedQA"] == first["details"]["MedQA"]
    monkeypatch.setattr("sftmix.commands.evaluate.load", None)  # no model is loaded for nothing
    assert evaluate("--resume") == 0
    assert "evaluation.json was finished already" in capsys.readouterr().out
    assert content_of(tmp_path) == content


def test_without_resume_all_are_asked(asked: Asked, evaluate: Callable[..., int]) -> None:
    assert evaluate() == evaluate() == 0
    assert asked.names == ["medqa", "medqa_5", "medmcqa"] * 2


def test_results_of_something_else_are_not_gone_on_with(
    asked: Asked,
    evaluate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert evaluate() == 0
    before = content_of(tmp_path)
    for flags, message in (
        (["--limit", "1"], "has MedQA with limit = None, now it is 1; leave --resume out"),
        (["--dtype", "bfloat16"], "dtype = 'auto', now it is 'bfloat16'"),
    ):
        assert evaluate("--resume", *flags) == 2
        assert message in capsys.readouterr().err
    rows = (tmp_path / "medqa.jsonl").read_text()
    (tmp_path / "medqa.jsonl").write_text(rows.replace("one", "two"))
    assert evaluate("--resume") == 2
    assert "has MedQA with data_hash = " in capsys.readouterr().err
    (tmp_path / "medqa.jsonl").rename(tmp_path / "moved.jsonl")
    (tmp_path / "moved.jsonl").write_text(rows)
    moved = ["--medqa_data", str(tmp_path / "moved.jsonl")]
    assert evaluate("--resume", *moved) == 0

    # The same folder, trained anew: its results would stand beside the old ones.
    model = tmp_path / "model" / "model.safetensors"
    weights = load_file(model)
    other = {**weights, "lm_head.weight": -weights["lm_head.weight"]}
    save_file(other, model, {"format": "pt"})
    for flags in ([], ["--resume"]):
        assert evaluate(*flags, *moved) == 2
        error = capsys.readouterr().err
        assert "was started with model_hash = " in error
        assert "(model.safetensors differs); delete it, or name another file" in error
    assert content_of(tmp_path) == before
    assert evaluate("--output", str(tmp_path / "other.json"), *moved) == 0
    # A file by hand, or one of a version that kept no hashes.
    output = tmp_path / "model" / "evaluation.json"
    output.write_text(json.dumps({"metrics": {"MT-Bench": 4.5}}))
    assert evaluate(*moved) == 0
    assert content_of(tmp_path)["metrics"]["MT-Bench"] == 4.5
    assert "kept no model_hash" not in caplog.text
    old = {name: one for name, one in before.items() if not name.endswith("_hash")}
    output.write_text(json.dumps(old))
    assert evaluate(*moved) == 0
    assert "was written by a version that kept no model_hash" in caplog.text


def test_a_model_that_moved_is_the_same(
    asked: Asked, evaluate: Callable[..., int], tmp_path: Path
) -> None:
    output = ["--output", str(tmp_path / "evaluation.json")]
    assert evaluate(*output) == 0
    moved = shutil.copytree(tmp_path / "model", tmp_path / "moved")
    assert evaluate(*output, "--model", str(moved), "--resume") == 0
    assert asked.names == ["medqa", "medqa_5", "medmcqa"]


def test_likelihoods_that_are_not_numbers() -> None:
    refuse_no_numbers("medqa", [-1.0, float("-inf")])
    with pytest.raises(FloatingPointError, match=r"MedQA: 1 of 2 log-likelihoods .* not numbers"):
        refuse_no_numbers("medqa", [-1.0, float("nan")])


@needs_harness
def test_a_model_whose_forward_gives_no_numbers(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are finite."""
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)
        model.model.norm.weight.fill_(1e38)
    run = tmp_path / "run"
    shutil.copytree(toy_model, run)
    model.save_pretrained(run)
    asked = ["--tasks", "medqa", "--medqa_data", write(tmp_path, "medqa", [0, 1])["file"]]
    assert main(["evaluate", "--model", str(run), *asked]) == 1
    assert "log-likelihoods of the model are not numbers (NaN)" in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()


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
