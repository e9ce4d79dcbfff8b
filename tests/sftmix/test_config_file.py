"""YAML files that several commands share, and files that include others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftmix.cli import main
from sftmix.config_file import config_words, read_config

OPTIONS = ("model", "data", "bf16", "output", "mu", "lr_scheduler_kwargs")


def written(path: Path, content: Any) -> Path:
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return path


def test_what_commands_share_and_what_is_their_own(tmp_path: Path) -> None:
    content = {
        "model": "m",
        "data": ["a", "b"],
        "bf16": True,
        "mu": None,
        "max_steps": 4,
        "lr_scheduler_kwargs": {"num_cycles": 0.5},
        "score": {"output": "s", "bf16": None},
        "train": {"output": "t", "mu": 0.5, "data": ["c"]},
    }
    path = written(tmp_path / "config.yaml", content)
    shared = ["--model", "m", "--data", "a", "b"]
    kwargs = ["--lr_scheduler_kwargs", '{"num_cycles": 0.5}']
    # max_steps is an option that only other commands have.
    assert config_words(path, "score", OPTIONS, ["max_steps"]) == [
        *(*shared, *kwargs, "--output", "s")
    ]
    assert config_words(path, "train", OPTIONS, ["max_steps"]) == [
        *("--model", "m", "--data", "c", "--bf16", "true", "--mu", "0.5"),
        *(*kwargs, "--output", "t"),
    ]
    # What nobody knows is left to the parser, which refuses it by name.
    words = config_words(path, "generate", OPTIONS)
    assert words == [*shared, "--bf16", "true", "--max_steps", "4", *kwargs]


def test_files_that_include_others(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path / "base.yaml", {"mu": 0.1, "seed": 3, "train": {"output": "t", "alpha": 2}})
    middle = {"include": "../base.yaml", "mu": 0.2, "train": {"alpha": 3}, "score": {"output": "s"}}
    written(tmp_path / "sub" / "middle.yaml", middle)
    top = written(tmp_path / "top.yaml", {"include": "sub/middle.yaml", "train": {"output": "u"}})
    assert read_config(top) == {
        "mu": 0.2,
        "seed": 3,
        "train": {"output": "u", "alpha": 3},
        "score": {"output": "s"},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trian": {"output": "t"}}, "'trian' is no command with --config, expected one of "),
        ({"mu": {"output": "t"}, "tests": {"a": 1}}, "'tests' is no command"),
        # `sftmix split` reads no file.
        ({"split": {"by": "random"}}, "'split' is no command with --config"),
        ({"train": ["output"]}, "'train' is a command and must hold names and values, got "),
        ("train:\n", "'train' is a command and must hold names and values, got None"),
        ({"include": ["a.yaml"]}, r"include: expected a file's name, got \['a.yaml'\]"),
        ({"include": "config.yaml"}, "includes config.yaml, which includes it"),
        ("- a\n", "must hold names and values"),
    ],
)
def test_files_that_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "config.yaml", content)
    with pytest.raises(ValueError, match=f"config: {path}.*{message}"):
        config_words(path, "train", OPTIONS)


def test_an_included_file_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path / "config.yaml", {"include": "nowhere.yaml"})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        read_config(path)


def test_one_file_scores_and_trains(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "model": str(toy_model),
        "data": [str(toy_data)],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        # Options of training alone.
        "partition": str(tmp_path / "score" / "confidence.parquet"),
        "lr_scheduler_kwargs": {"num_cycles": 0.5},
        "score": {"output": str(tmp_path / "score"), "num_scorings": 1},
        "train": {"output": str(tmp_path / "train"), "max_steps": 2, "mu": 0.3},
    }
    config = written(tmp_path / "config.yaml", content)
    assert main(["score", "--config", str(config)]) == 0
    assert main(["train", "--config", str(config), "--mu", "0.4"]) == 0
    found = [
        json.loads((tmp_path / run / "manifest.json").read_text()) for run in ("score", "train")
    ]
    assert [manifest["seed"] for manifest in found] == [5, 5]
    assert found[0]["num_scorings"] == 1
    assert (found[1]["max_steps"], found[1]["mu"]) == (2, 0.4)
    assert all(manifest["lr_scheduler_kwargs"] == {"num_cycles": 0.5} for manifest in found)
    written(config, {**content, "score": {"output": "s", "max_step": 2}})
    assert main(["score", "--config", str(config)]) == 2
    assert "--max_step" in capsys.readouterr().err
