"""YAML files that several commands share, and files that include others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftmix.cli import main
from sftmix.recipe.config_file import RECIPES, config_words, read_config

OPTIONS = ("model", "data", "bf16", "output", "mu", "lr_scheduler_kwargs")
SINGLE = tuple(name for name in OPTIONS if name != "data")


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
    with pytest.raises(ValueError, match="'max_steps' is no option of generate; "):
        config_words(path, "generate", OPTIONS)


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
        ({"trian": {"output": "t"}}, "'trian' is no command with --config; did you mean train"),
        ({"mu": {"output": "t"}, "tests": {"a": 1}}, "'tests' is no command"),
        # `sftmix split` reads no file.
        ({"split": {"by": "random"}}, "'split' is no command with --config"),
        ({"modle": "m"}, "'modle' is no option of train; did you mean model"),
        ({"xyzzy": "m"}, "'xyzzy' is no option of train; --help-all shows"),
        ({"train": {"ouput": "m"}}, "train: 'ouput' is no option; did you mean output"),
        ({"train": {"max_steps": 3, "beta": 1}}, "train: 'beta' is no option"),
        ({"model=x": "m"}, "'model=x' is no option"),
        ({"model x": "m"}, "'model x' is no option"),
        ({"": "m"}, "'' is no option"),
        ({"train": ["output"]}, "'train' is a command and must hold names and values, got a list"),
        ("train:\n", "'train' is a command and must hold names and values, got nothing"),
        ({"include": ["a.yaml"]}, "include: expected a file's name, got a list"),
        ({"include": ""}, "include: expected a file's name, got text"),
        ({"include": "config.yaml"}, "includes config.yaml, which includes it"),
        ("- a\n", "must hold names and values, got a list"),
        ("secret\n", "must hold names and values, got text$"),
        ("", "must hold names and values, got nothing"),
        ({"model": ["m"]}, "model: expected one value, got a list"),
        ({"data": [["m"]]}, "data: expected text or numbers in the list, got a list"),
        ({"data": [{"m": 1}]}, "data: expected text or numbers in the list, got names and values"),
        ({"data": ["m", None]}, "data: expected text or numbers in the list, got nothing"),
        ({"data": ["m", "--trust_remote_code"]}, "a value in a list cannot begin with a dash"),
        ({"data": ["m", "-x"]}, "a value in a list cannot begin with a dash"),
    ],
)
def test_files_that_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "config.yaml", content)
    with pytest.raises(ValueError, match=f"config: {path}.*{message}"):
        config_words(path, "train", [*OPTIONS, "max_steps"], single=SINGLE)


def test_a_recipe_that_lies_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipes" / "paper.yaml"
    with pytest.raises(FileNotFoundError) as raised:
        read_config(path)
    found = str(raised.value).removeprefix(f"config: no such file: {str(path)!r}; did you mean ")
    assert Path(found.removesuffix("?")) == RECIPES / "paper.yaml"
    assert read_config(RECIPES / "llama-3.1-8b-alpaca.yaml")["train"]


def test_a_value_cannot_pass_for_a_flag(tmp_path: Path) -> None:
    content = {"model": "--trust_remote_code=true", "mu": -1, "data": ["a", -1e-3]}
    path = written(tmp_path / "config.yaml", content)
    assert config_words(path, "train", OPTIONS) == [
        *("--model=--trust_remote_code=true", "--mu=-1", "--data", "a", "-0.001")
    ]


def test_values_are_passed_on_as_they_were_written(tmp_path: Path) -> None:
    text = (
        "model: 007\nmu: 1e-7\noutput: 12e4567\nbf16: on\ndata: [no, 1:30, 2024-01-01, 0x10, ~x]\n"
        "lr_scheduler_kwargs: {min_lr: 1e-7, half: .5e-3, last: no, whole: 010, list: [1e2]}\n"
    )
    words = config_words(written(tmp_path / "config.yaml", text), "train", OPTIONS)
    assert words[:-1] == [
        *("--model", "007", "--mu", "1e-7", "--output", "12e4567", "--bf16", "on", "--data"),
        *("no", "1:30", "2024-01-01", "16", "~x", "--lr_scheduler_kwargs"),
    ]
    assert json.loads(words[-1]) == {
        **{"min_lr": 1e-7, "half": 0.0005, "last": "no", "whole": 10, "list": [100.0]}
    }


def test_a_flag_of_either_form_replaces_the_included_one(tmp_path: Path) -> None:
    written(tmp_path / "base.yaml", {"lr-scheduler_kwargs": {"a": 1}, "mu": 1})
    content = {"include": "base.yaml", "lr_scheduler-kwargs": {"b": 1}, "train": {"mu": 2}}
    path = written(tmp_path / "config.yaml", content)
    options = [*OPTIONS, "lr-scheduler_kwargs", "lr_scheduler-kwargs"]
    assert config_words(path, "train", options) == [
        *("--mu", "2", "--lr_scheduler-kwargs", '{"b": 1}')
    ]


# Code and other files


@pytest.mark.parametrize("name", ["trust_remote_code", "trust-remote-code"])
@pytest.mark.parametrize("place", ["shared", "own", "included"])
@pytest.mark.parametrize("value", ["true", "'yes'", "on", "1", "'true'", "[true]", "{a: b}"])
def test_a_file_cannot_have_code_run(name: str, place: str, value: str, tmp_path: Path) -> None:
    text = f"{name}: {value}\n"
    if place == "included":
        written(tmp_path / "base.yaml", text)
    content = {"shared": text, "own": f"train:\n  {text}", "included": "include: base.yaml\n"}
    path = written(tmp_path / "config.yaml", content[place])
    with pytest.raises(ValueError, match="type --trust_remote_code true if you trust it"):
        config_words(path, "train", [*OPTIONS, name])
    written(path, f"{name}: false\n")
    assert config_words(path, "train", [*OPTIONS, name]) == [f"--{name}", "false"]


def test_a_file_cannot_have_kernels_loaded(tmp_path: Path) -> None:
    options = [*OPTIONS, "attn_implementation"]
    path = written(tmp_path / "config.yaml", {"attn_implementation": "someone/kernels@v1"})
    with pytest.raises(ValueError, match="kernels loaded from the hub; type --attn_implementation"):
        config_words(path, "train", options)
    written(path, {"attn_implementation": "sdpa"})
    assert config_words(path, "train", options) == ["--attn_implementation", "sdpa"]


def test_the_command_refuses_what_only_a_flag_may_say(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(toy_model), "--data", str(toy_data)]
    words += ["--output", str(tmp_path / "run"), "--config", str(tmp_path / "config.yaml")]
    for text, message in (
        ("trust_remote_code: true", "type --trust_remote_code true if you trust it"),
        ("config: other.yaml", "'config' is no option of train"),
        ("help: true", "'help' is no option of train"),
        ("no_skip_memory_metrics: true", "'no_skip_memory_metrics' is no option of train"),
        ("learning_rat: 1", "did you mean learning_rate"),
        ("mu: [0.1, 0.2]", "mu: expected one value, got a list"),
    ):
        written(tmp_path / "config.yaml", text)
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "include",
    [
        "../outside.yaml",
        "sub/../../outside.yaml",
        "{outside}/outside.yaml",
        "/etc/passwd",
        "/dev/zero",
        "link.yaml",
        "folder/outside.yaml",
        "passwd.yaml",
    ],
)
def test_includes_that_lead_out(include: str, tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "outside" / "root"
    (root / "sub").mkdir(parents=True)
    written(outside / "outside.yaml", {"mu": "SECRET"})
    (root / "link.yaml").symlink_to(outside / "outside.yaml")
    (root / "folder").symlink_to(outside)
    (root / "passwd.yaml").symlink_to("/etc/passwd")
    path = written(root / "config.yaml", {"include": include.format(outside=outside)})
    with pytest.raises(ValueError, match="expected a file in the folder of the config") as caught:
        read_config(path)
    for text in ("SECRET", "root:"):
        assert text not in str(caught.value)


def test_includes_of_other_kinds_of_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    (tmp_path / "text.txt").write_text("mu: 1")
    (tmp_path / "hidden.yaml").symlink_to("text.txt")
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, message in (
        ("text.txt", r"expected a name in .yaml or .yml, got 'text.txt'"),
        ("hidden.yaml", r"expected a name in .yaml or .yml"),
        ("folder.yaml", "config: expected a file, got the folder"),
        ("pipe.yaml", "config: expected a file, got the device or a pipe"),
        ("nul\0.yaml", "expected a file's name"),
    ):
        written(path, f'include: "{name}"' if "\0" not in name else 'include: "nul\\0.yaml"')
        with pytest.raises(ValueError, match=message):
            read_config(path)


def test_a_chain_of_includes_ends(tmp_path: Path) -> None:
    for number in range(20):
        written(tmp_path / f"{number}.yaml", {"include": f"{number + 1}.yaml", "mu": number})
    with pytest.raises(ValueError, match="include: expected at most 16 files, one in another"):
        read_config(tmp_path / "0.yaml")
    written(tmp_path / "15.yaml", {"mu": 15, "seed": 1})
    assert read_config(tmp_path / "0.yaml") == {"mu": 0, "seed": 1}


def test_files_without_an_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_text("# " + "x" * 2**20)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfmodel: m\n")
    for path, message in (
        (tmp_path / "pipe.yaml", "expected a file, got the device or a pipe"),
        (tmp_path / "zero.yaml", "expected a file, got the device or a pipe"),
        (Path("/dev/zero"), "expected a file, got the device or a pipe"),
        (tmp_path, "expected a file, got the folder"),
        (tmp_path / "large.yaml", "expected at most 1,048,576 bytes"),
        (tmp_path / "latin.yaml", "is not UTF-8: byte 7 cannot be read"),
    ):
        with pytest.raises(ValueError, match=f"config: .*{message}"):
            read_config(path)
    assert read_config(tmp_path / "marked.yaml") == {"model": "m"}


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
    assert "score: 'max_step' is no option" in capsys.readouterr().err
