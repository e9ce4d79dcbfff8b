"""A scored run that was killed, resumed, ends in the bytes of an unbroken one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import sftmix.training.scoring
from sftmix.cli import main
from sftmix.runs.checkpoints import STAGING, fault, list_checkpoints
from sftmix.training.scoring import ScoringCallback
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix.conftest import write_gpt2_with_dropout

ROOT = Path(__file__).parents[3]

# Two of the toy data's examples: padded or not, so many batches make up one scoring.
MOST_TOKENS, BATCHES = 108, 15

# Runs the command line again and again, each time in a process of its own, forked where everything
# is imported and nothing has run. The plan gives each its words and where it kills itself: at which
# call of which function. Every batch scored is noted in a file, and the progress saved after it.
RUNS = """
import json, os, signal, sys
from pathlib import Path
import sftmix.commands.score, sftmix.training.scoring
from sftmix.cli import main
from transformers import Trainer

PLACES = {
    "batch": (sftmix.training.scoring, "score_batch"),
    "progress": (sftmix.training.scoring, "save_file"),
    "step": (Trainer, "training_step"),
    "checkpoint": (Trainer, "_save_rng_state"),
    "removal": (sftmix.commands.score, "remove_checkpoints"),
}

def kill_at(place, number):
    owner, name = PLACES[place]
    own, calls = getattr(owner, name), []

    def killing(*arguments):
        calls.append(arguments)
        if len(calls) < number:
            return own(*arguments)
        if place == "progress":
            own(*arguments)
            os.truncate(arguments[1], 20)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, killing)

def note_batches(path):
    own = sftmix.training.scoring.score_batch

    def noting(model, head, batch, examples, perplexity, watched):
        own(model, head, batch, examples, perplexity, watched)
        finished = perplexity.nll_sum.shape[1]
        with open(path, "a") as file:
            file.write(json.dumps([finished, examples.tolist()]) + "\\n")

    sftmix.training.scoring.score_batch = noting

def run(words, notes, place, number):
    sftmix.training.scoring.SAVE_SECONDS = 0
    sftmix.training.scoring.most_tokens = lambda device: MOST_TOKENS
    note_batches(notes)
    if place is not None:
        kill_at(place, number)
    os._exit(main(["--traceback", *words]))

for words, notes, place, number in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run(words, notes, place, number)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder = Path(words[words.index("--output") + 1])
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    print(json.dumps([status, found]))
""".replace("MOST_TOKENS", str(MOST_TOKENS))


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Let a scoring have many batches."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sftmix.training.scoring, "most_tokens", lambda device: MOST_TOKENS)
        yield


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path) -> list[str]:
    """`score` of a GPT-2 with dropout, without its output: 8 steps, scorings at 3, 5 and 8."""
    folder = tmp_path_factory.mktemp("score-resume") / "model"
    write_gpt2_with_dropout(folder, toy_model)
    words = ["score", "--model", str(folder), "--data", str(toy_data), "--use_cpu", "true"]
    words += ["--disable_tqdm", "true", "--learning_rate", "0.01", "--num_scorings", "3"]
    return [*words, "--max_length", "256"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, command: list[str]) -> bytes:
    """What an unbroken run writes."""
    run = tmp_path_factory.mktemp("score-resume") / "whole"
    assert main([*command, "--output", str(run)]) == 0
    return (run / "confidence.parquet").read_bytes()


def checkpoints(files: list[str]) -> set[str]:
    return {name.split("/")[0] for name in files if name.startswith("checkpoint-")}


@pytest.mark.slow
def test_a_run_killed_wherever_it_can_be_ends_like_an_unbroken_one(
    command: list[str], scores: bytes, tmp_path: Path
) -> None:
    whole = [*command, "--output", str(tmp_path / "whole")]
    broken = [*command, "--output", str(tmp_path / "broken")]
    notes = [tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"]
    resumed = [*broken, "--resume"]
    plan: list[tuple[list[str], str, str | None, int]] = [
        (whole, str(notes[0]), None, 0),
        (broken, str(notes[1]), "batch", 4),  # in the first scoring
        (resumed, str(notes[1]), "step", 2),  # in step 5: one was trained since that scoring
        (resumed, str(notes[1]), "checkpoint", 1),  # writing that of step 5
        (resumed, str(notes[1]), "progress", 4),  # writing it after the second scoring's 3rd batch
        (resumed, str(notes[1]), "batch", BATCHES + 3),  # in the last scoring
        (resumed, str(notes[1]), "removal", 1),  # with all done but the checkpoint's removal
        (resumed, str(notes[1]), None, 0),
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(plan)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    found = [files for _, files in lines]
    assert [status for status, _ in lines] == [0, *[-signal.SIGKILL] * 6, 0]

    # One checkpoint is kept at a time, and none when all is done.
    steps = [set(), {3}, {3}, {3}, {5}, {8}, {8}, set()]
    assert [checkpoints(files) for files in found] == [
        {f"checkpoint-{step}" for step in kept} for kept in steps
    ]
    assert f"{STAGING}/checkpoint-5/model.safetensors" in found[3]
    assert f"{STAGING}/checkpoint-5/trainer_state.json" not in found[3]
    assert any(re.match(r"checkpoint-5/\.tmp-\w+-perplexity", name) for name in found[4])
    assert ["confidence.parquet" in files for files in found[1:]] == [False] * 5 + [True] * 2
    assert found[-1] == found[0] == [".lock", "confidence.parquet", "manifest.json"]

    for run in ("whole", "broken"):
        assert (tmp_path / run / "confidence.parquet").read_bytes() == scores
    # No batch was scored twice but the one whose progress was being written.
    expected, batches = (path.read_text().splitlines() for path in notes)
    assert len(expected) == len(set(expected)) == 3 * BATCHES
    assert batches == expected[: BATCHES + 3] + expected[BATCHES + 2 :]


class Stop(BaseException):
    """Not an exception that anything here may catch."""


def count(patched: pytest.MonkeyPatch, owner: Any, name: str, stop_at: int = 0) -> list[bool]:
    """The calls of a function from now on, the last one stopped."""
    own, calls = getattr(owner, name), []

    def counting(*arguments: Any, **keywords: Any) -> Any:
        calls.append(True)
        if len(calls) == stop_at:
            raise Stop
        return own(*arguments, **keywords)

    patched.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize(
    ("flags", "saved", "kept"),
    [
        (
            ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "3"],
            6,
            [8, 6, 5],
        ),
        (["--save_strategy", "epoch"], 3, [8]),
        (["--checkpoint_scorings", "false"], 0, []),
        (["--checkpoint_scorings", "false", "--save_strategy", "epoch"], 1, [8]),
    ],
)
def test_the_checkpoints_of_a_run(
    flags: list[str],
    saved: int,
    kept: list[int],
    command: list[str],
    scores: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saves = count(monkeypatch, SFTMixTrainer, "_save_checkpoint")
    assert main([*command, "--output", str(tmp_path / "run"), *flags]) == 0
    assert (tmp_path / "run" / "confidence.parquet").read_bytes() == scores
    assert len(saves) == saved
    found = list_checkpoints(tmp_path / "run")
    assert [path.name for path in found] == [f"checkpoint-{step}" for step in kept]
    # Each holds the scoring that it was written for.
    for path in found:
        finished = load_file(path / ScoringCallback.FILE)["nll_sum"].shape[1]
        assert finished == {5: 2, 6: 2, 8: 3}[int(path.name.split("-")[1])]


@pytest.mark.parametrize("checkpointed", ["true", "false"])
def test_a_run_goes_on_from_a_step_that_was_not_scored(
    checkpointed: str,
    command: list[str],
    scores: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*command, "--output", str(tmp_path / "run"), "--checkpoint_scorings", checkpointed]
    words += ["--save_strategy", "steps", "--save_steps", "2"]
    with monkeypatch.context() as patched:
        count(patched, SFTMixTrainer, "training_step", stop_at=5)
        with pytest.raises(Stop):
            main(words)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    steps = count(monkeypatch, SFTMixTrainer, "training_step")
    assert main([*words, "--resume"]) == 0
    assert len(steps) == 4
    assert (tmp_path / "run" / "confidence.parquet").read_bytes() == scores


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_broken_scoring_is_finished_without_further_checkpoints(
    seconds: float,
    command: list[str],
    scores: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sftmix.training.scoring, "SAVE_SECONDS", seconds)
    words = [*command, "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        count(patched, sftmix.training.scoring, "score_batch", stop_at=BATCHES + 4)
        with pytest.raises(Stop):
            main(words)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-5"]
    batches = count(monkeypatch, sftmix.training.scoring, "score_batch")
    saves = count(monkeypatch, SFTMixTrainer, "_save_checkpoint")
    assert main([*words, "--resume", "--checkpoint_scorings", "false"]) == 0
    assert (tmp_path / "run" / "confidence.parquet").read_bytes() == scores
    # Those of the second scoring whose sums were not saved are scored again.
    assert len(batches) == 3 * BATCHES - (BATCHES + 3 if seconds == 0 else BATCHES)
    assert saves == []
    assert list_checkpoints(tmp_path / "run") == []


def test_a_finished_run_is_not_trained_again(
    command: list[str],
    scores: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    words = [*command, "--output", str(run)]
    assert main(words) == 0
    steps = count(monkeypatch, SFTMixTrainer, "train")
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    assert "confidence.parquet was finished already" in capsys.readouterr().out
    assert (run / "confidence.parquet").read_bytes() == scores
    # Halves that were split anew stay as well.
    assert main(["split", str(run), "--by", "random"]) == 0
    split = (run / "confidence.parquet").read_bytes()
    assert split != scores
    assert main([*words, "--resume"]) == 0
    assert (run / "confidence.parquet").read_bytes() == split
    assert main([*words, "--resume", "--num_scorings", "2"]) == 2
    assert "was started with num_scorings = 3, now it is 2" in capsys.readouterr().err
    assert steps == []


def test_progress_cut_off_is_a_fault_and_its_leftovers_are_not(
    command: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main([*command, "--output", str(run), "--save_strategy", "epoch"]) == 0
    checkpoint = run / "checkpoint-8"
    progress = checkpoint / ScoringCallback.FILE
    (checkpoint / f".tmp-0123-{ScoringCallback.FILE}").write_bytes(progress.read_bytes()[:20])
    assert fault(checkpoint) is None
    os.truncate(progress, progress.stat().st_size - 1)
    assert (fault(checkpoint) or "").startswith(ScoringCallback.FILE)
