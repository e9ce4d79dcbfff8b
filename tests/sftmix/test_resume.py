"""A killed run, resumed, ends in the bytes of an unbroken one; another recipe is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sftmix.checkpoints import STAGING, list_checkpoints
from sftmix.cli import main

from .conftest import write_rows

ROOT = Path(__file__).parents[2]

# The command line, killed by itself: the first word says where, the rest are the command's.
KILL_INSIDE = """
import os, signal, sys
from transformers import Trainer
from sftmix.cli import main

place, step = sys.argv[1].split(":")
own = getattr(Trainer, place)

def killing(self, *arguments):
    if self.state.global_step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return own(self, *arguments)

setattr(Trainer, place, killing)
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Path:
    """A random GPT-2 with dropout, on the toy model's tokenizer."""
    folder = tmp_path_factory.mktemp("resume") / "model"
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    assert config.resid_pdrop > 0
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def partition(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path) -> Path:
    """The halves as another, smaller model sees them."""
    run = tmp_path_factory.mktemp("resume") / "scored"
    words = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    assert main(["score", *words, "--use_cpu", "true", "--disable_tqdm", "true"]) == 0
    return run / "confidence.parquet"


@pytest.fixture
def command(model: Path, partition: Path, toy_data: Path) -> list[str]:
    """`train` without its output: 8 steps an epoch, checkpoints and log lines out of step."""
    words = ["train", "--model", str(model), "--data", str(toy_data), "--partition", str(partition)]
    words += ["--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "0.01"]
    words += ["--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "2"]
    return words


def start(words: list[str], kill_at: str | None = None) -> subprocess.Popen[bytes]:
    program = ["-m", "sftmix"] if kill_at is None else ["-c", KILL_INSIDE, kill_at]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def history(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what the clock and the memory say."""
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    measured = ("tokens_per_second", "peak_memory_gib")
    return [
        {name: value for name, value in line.items() if name not in measured}
        for line in lines
        if "loss" in line or "eval_loss" in line
    ]


@pytest.mark.slow
def test_a_run_killed_three_times_ends_like_an_unbroken_one(
    command: list[str], held_out: Path, tmp_path: Path
) -> None:
    command = [*command, "--num_train_epochs", "4", "--eval_data", str(held_out)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = start([*command, "--output", str(whole)])

    # From outside, once there is a checkpoint: wherever the run is then.
    killed = start([*command, "--output", str(broken)])
    while not (broken / "checkpoint-3").exists():
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (broken / "config.json").exists()

    command = [*command, "--output", str(broken), "--resume"]
    # While a checkpoint is written: weights and optimizer are in the staging folder.
    assert start(command, "_save_rng_state:24").wait() == -signal.SIGKILL
    staged = {path.name for path in (broken / STAGING / "checkpoint-24").iterdir()}
    assert {"model.safetensors", "optimizer.pt"} <= staged
    assert "trainer_state.json" not in staged
    assert [path.name for path in list_checkpoints(broken)] == ["checkpoint-21", "checkpoint-18"]

    # Between two checkpoints, and between two log lines: within step 29.
    assert start(command, "training_step:28").wait() == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(broken)] == ["checkpoint-27", "checkpoint-24"]
    assert not (broken / STAGING).exists()

    assert start(command).wait() == 0
    assert unbroken.wait() == 0
    assert [line["step"] for line in history(whole)] == [*range(2, 33, 2), 32]
    assert history(broken) == history(whole)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    for name in names:
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, toy_model: Path, partition: Path, toy_data: Path
) -> tuple[Path, list[str]]:
    """A run of one epoch that is done, and the command that made it."""
    run = tmp_path_factory.mktemp("resume") / "finished"
    words = ["train", "--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    words += ["--partition", str(partition), "--use_cpu", "true", "--disable_tqdm", "true"]
    words += ["--num_train_epochs", "1", "--learning_rate", "0.01"]
    assert main(words) == 0
    return run, words


def contents(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "trainer_state.json"
    }


def test_resuming_a_finished_run_is_harmless(finished: tuple[Path, list[str]]) -> None:
    run, words = finished
    before, lines = contents(run), history(run)
    assert "model.safetensors" in before
    assert main([*words, "--resume"]) == 0
    assert contents(run) == before
    assert history(run) == lines


def test_a_final_model_that_was_half_saved_is_saved_again(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, words = finished
    run = tmp_path / "run"
    words = [*words, "--output", str(run)]
    own = os.replace

    class Killed(BaseException):
        """Not an exception that anything here may catch."""

    def killing(source: Path, target: Path) -> None:
        if Path(target) == run / "model.safetensors":
            raise Killed
        own(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killing)
        with pytest.raises(Killed):
            main(words)
    # Without its config, what is there does not pass for a model.
    assert not (run / "config.json").exists()
    assert main([*words, "--resume"]) == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "seed = 0, now it is 1"),
        (["--mu", "0.3"], "mu = 0.2, now it is 0.3"),
        (["--adam_beta2", "0.9"], "adam_beta2 = 0.999, now it is 0.9"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps = 1"),
        (["--max_length", "99"], "max_length = 2048, now it is 99"),
        (["--dtype", "bfloat16"], "dtype = 'float32', now it is 'bfloat16'"),
    ],
)
def test_another_recipe_is_refused(
    flags: list[str],
    message: str,
    finished: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, words = finished
    before = contents(run)
    assert main([*words, "--resume", *flags]) == 1
    error = capsys.readouterr().err
    assert f"resume: {run} was started with {message}" in error
    assert "Traceback" not in error
    assert contents(run) == before


def test_other_data_is_refused(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = finished
    other = write_rows(tmp_path / "other.jsonl", 31, seed=8)
    before = contents(run)
    assert main([*words, "--resume", "--method", "ntp", "--data", str(other)]) == 1
    assert "the data changed after scoring" in capsys.readouterr().err
    place = words.index("--partition")
    without = [*words[:place], *words[place + 2 :], "--method", "ntp", "--resume"]
    assert main([*without, "--data", str(other)]) == 1
    assert "was started with data = " in capsys.readouterr().err
    assert contents(run) == before


def test_a_run_that_exists_is_not_overwritten(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = finished
    before = contents(run)
    assert main(words) == 1
    assert "already holds a run; pass --resume" in capsys.readouterr().err
    assert contents(run) == before
    assert main([*words, "--output", str(tmp_path / "new"), "--resume"]) == 1
    assert "there is no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
