"""A disk that fills up while a command writes: one line, exit code 1, nothing half there."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sftmix.commands.score
import sftmix.commands.train
import sftmix.pairs.partition
import sftmix.recipe.manifest
import sftmix.training.metrics
import sftmix.training.scoring
from sftmix.cli import main
from sftmix.runs.checkpoints import fault, list_checkpoints
from sftmix.runs.folders import TEMPORARY_PREFIX
from sftmix.training.scoring import ScoringCallback
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix.full_disk import small_disk

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "0.01"]


@pytest.fixture
def score(toy_model: Path, toy_data: Path, tmp_path: Path) -> list[str]:
    words = ["score", "--model", str(toy_model), "--data", str(toy_data), *QUIET]
    return [*words, "--num_scorings", "2", "--output", str(tmp_path / "run")]


@pytest.fixture
def train(toy_model: Path, toy_data: Path, tmp_path: Path) -> list[str]:
    words = ["train", "--method", "ntp", "--model", str(toy_model), "--data", str(toy_data), *QUIET]
    words += ["--num_train_epochs", "1", "--save_strategy", "steps", "--save_steps", "3"]
    return [*words, "--output", str(tmp_path / "run")]


def full_inside(
    patched: pytest.MonkeyPatch, owner: Any, name: str, size: int, call: int = 1
) -> None:
    """The disk has no more room than that inside one call of a function."""
    own: Callable[..., Any] = getattr(owner, name)
    calls: list[bool] = []

    @functools.wraps(own)
    def limited(*arguments: Any, **keywords: Any) -> Any:
        calls.append(True)
        if len(calls) != call:
            return own(*arguments, **keywords)
        with small_disk(size):
            return own(*arguments, **keywords)

    patched.setattr(owner, name, limited)


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    capsys.readouterr()
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if ": error: " in line]
    assert "too large" in line or "is the disk full?" in line
    return line


def test_scoring(
    score: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First the manifest does not fit, then a checkpoint, the progress, and the scores."""
    run = tmp_path / "run"
    whole = tmp_path / "whole"
    assert main([*score, "--output", str(whole)]) == 0
    monkeypatch.setattr(sftmix.training.scoring, "SAVE_SECONDS", 0.0)
    places: list[tuple[Any, str, int, int, list[int]]] = [
        (sftmix.commands.score, "start_manifest", 10, 1, []),
        (SFTMixTrainer, "_save_checkpoint", 1_000, 1, []),
        (SFTMixTrainer, "_publish", 0, 1, []),
        (ScoringCallback, "save", 100, 4, [4]),
        (SFTMixTrainer, "_save_checkpoint", 50_000, 1, [4]),
        (sftmix.commands.score, "write_partition", 100, 1, [8]),
    ]
    words = score
    for owner, name, size, call, steps in places:
        with monkeypatch.context() as patched:
            full_inside(patched, owner, name, size, call)
            refused(capsys, words)
        assert [path.name for path in list_checkpoints(run)] == [f"checkpoint-{n}" for n in steps]
        assert all(fault(path) is None for path in list_checkpoints(run))
        assert not (run / "confidence.parquet").exists()
        assert (run / "manifest.json").exists() == (name != "start_manifest")
        words = [*score, "--resume"]
    assert main(words) == 0
    name = "confidence.parquet"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_training(
    train: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First a checkpoint does not fit, then the model, its tokenizer, the log, and the card."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main([*train, "--output", str(whole)]) == 0
    places: list[tuple[Any, str, int, int, list[int]]] = [
        (SFTMixTrainer, "_save_checkpoint", 1_000, 2, [3]),
        (sftmix.commands.train, "save_final_model", 1_000, 1, [8, 6]),
        # Of the last checkpoint's tokenizer, and of the final model's.
        (PreTrainedTokenizerFast, "save_pretrained", 100, 1, [8, 6]),
        (SFTMixTrainer, "save_state", 10, 1, [8, 6]),
        (sftmix.commands.train, "write_card", 10, 1, [8, 6]),
    ]
    words = train
    for owner, name, size, call, steps in places:
        with monkeypatch.context() as patched:
            full_inside(patched, owner, name, size, call)
            error = refused(capsys, words)
        assert [path.name for path in list_checkpoints(run)] == [f"checkpoint-{n}" for n in steps]
        assert all(fault(path) is None for path in list_checkpoints(run))
        is_saved = name in ("save_state", "write_card")
        assert (run / "config.json").exists() == is_saved
        assert (f"the model is in {run}; its" in error) == is_saved
        assert (run / "trainer_state.json").exists() == (name == "write_card")
        words = [*train, "--resume"]
    assert main(words) == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(run)
    json.loads((run / "trainer_state.json").read_text())
    assert not [path for path in run.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]
