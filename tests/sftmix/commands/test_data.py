"""`sftmix data`, and the options that say how data are read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sftmix.cli import main
from sftmix.data.columns import SIDES
from sftmix.data.formats import FORMATS
from sftmix.recipe.arguments import RunArguments, parse
from sftmix.training.config import ScoreConfig


def test_data_prints_each_format_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--formats"]) == 0
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    for one in FORMATS:
        assert f"{one.columns()} {json.dumps(one.example)} {one.says}" in text
    assert all(f"  {name} " in printed for name in SIDES)
    assert max(map(len, printed.splitlines())) <= 100


def test_data_without_an_option_says_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2
    assert "sftmix data: error: --formats: expected --formats" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_hears_nothing() -> None:
    words = [sys.executable, "-m", "sftmix", "data", "--formats"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    "line", ["columns: {prompt: ask, response: say}", "columns: prompt=ask,response=say"]
)
def test_columns_are_a_mapping_in_yaml(tmp_path: Path, line: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: m\ndata: [d.jsonl]\noutput: {tmp_path / 'run'}\n{line}\n")
    run, _ = parse(["--config", str(file)], RunArguments, ScoreConfig, "sftmix score")
    assert run.columns in ('{"prompt": "ask", "response": "say"}', "prompt=ask,response=say")


def test_wrong_columns_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "absent", "--data", "absent.jsonl", "--output", str(tmp_path / "run")]
    assert main(["score", *words, "--columns", "promt=a"]) == 2
    assert "score: error: --columns: expected NAME=COLUMN with" in capsys.readouterr().err
