"""A killed run, resumed, ends in the bytes of an unbroken one; another recipe is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from sftmix.cli import main
from sftmix.report.runs import read_run
from sftmix.runs.checkpoints import STAGING
from sftmix.training.metrics import MEASURED
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix.conftest import write_gpt2_with_dropout, write_rows

ROOT = Path(__file__).parents[3]

# Runs the command line again and again, each time in a process of its own, forked where everything
# is imported and nothing has run. The plan gives each its words, and the function of Trainer and
# the step at which it kills itself.
RUNS = """
import json, os, signal, sys
from pathlib import Path
import sftmix.commands.train
from sftmix.cli import main
from transformers import GPT2LMHeadModel, Trainer

def kill_inside(name, step):
    own = getattr(Trainer, name)

    def killing(self, *arguments):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, *arguments)

    setattr(Trainer, name, killing)

def run(words, place):
    if place is not None:
        kill_inside(*place)
    os._exit(main(["--traceback", *words]))

for words, place in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run(words, place)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder = Path(words[words.index("--output") + 1])
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    print(json.dumps([status, found]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Path:
    """A random GPT-2 with dropout, on the toy model's tokenizer."""
    folder = tmp_path_factory.mktemp("resume") / "model"
    write_gpt2_with_dropout(folder, toy_model)
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
    return [*words, "--max_length", "256"]


def forked(plan: list[tuple[list[str], tuple[str, int] | None]]) -> list[tuple[int, list[str]]]:
    """How each run of the plan ended, and the files that there were then."""
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(plan)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def checkpoints(files: list[str]) -> set[str]:
    return {name.split("/")[0] for name in files if name.startswith("checkpoint-")}


def history(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what the clock and the memory say."""
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in lines
        if "loss" in line or "eval_loss" in line
    ]


@pytest.mark.slow
def test_a_run_killed_three_times_ends_like_an_unbroken_one(
    command: list[str], held_out: Path, tmp_path: Path
) -> None:
    command = [*command, "--num_train_epochs", "4", "--eval_data", str(held_out)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    resumed = [*command, "--output", str(broken), "--resume"]
    ends = forked(
        [
            ([*command, "--output", str(whole)], None),
            ([*command, "--output", str(broken)], ("training_step", 4)),
            # While a checkpoint is written: weights and optimizer are in the staging folder.
            (resumed, ("_save_rng_state", 24)),
            # Between two checkpoints, and between two log lines: within step 29.
            (resumed, ("training_step", 28)),
            (resumed, None),
        ]
    )
    assert [status for status, _ in ends] == [0, *[-signal.SIGKILL] * 3, 0]
    found = [files for _, files in ends[1:]]
    assert [checkpoints(files) for files in found] == [
        {f"checkpoint-{step}" for step in kept} for kept in ([3], [21, 18], [27, 24], [32, 30])
    ]
    staged = {Path(name).name for name in found[1] if name.startswith(f"{STAGING}/checkpoint-24/")}
    assert {"model.safetensors", "optimizer.pt"} <= staged
    assert "trainer_state.json" not in staged
    assert not any(name.startswith(STAGING) for name in found[2])
    assert ["config.json" in files for files in found] == [False, False, False, True]

    assert [line["step"] for line in history(whole)] == [*range(2, 33, 2), 32]
    assert history(broken) == history(whole)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    for name in names:
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_like_unbroken_ones(tmp_path: Path) -> None:
    """A few of the moments that `tests/kill_runs.py` draws; it says itself what was wrong."""
    script = [sys.executable, "-m", "tests.kill_runs", "--kills", "5", "--folder", str(tmp_path)]
    done = subprocess.run(
        script,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^5 kills, \d+ runs ended, 0 faults$", done.stdout, re.MULTILINE)


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
        (["--head", "logits"], "head = 'fused', now it is 'logits'"),
        (["--adam_beta2", "0.9"], "adam_beta2 = 0.999, now it is 0.9"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps = 1"),
        (["--max_length", "99"], "max_length = 2048, now it is 99"),
        (["--dtype", "bfloat16"], "dtype = 'float32', now it is 'bfloat16'"),
        (["--layout", "packed"], "layout = 'padded', now it is 'packed'"),
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
    assert main([*words, "--resume", *flags]) == 2
    error = capsys.readouterr().err
    assert f"resume: {run} was started with {message}" in error
    assert "Traceback" not in error
    assert contents(run) == before


def test_a_run_goes_on_with_less_memory(
    finished: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one wants to that ran out of it."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    longer = [*finished[1], "--output", str(run), "--resume", "--num_train_epochs", "2"]
    assert main([*longer, "--memory", "lean"]) == 0
    assert "with layout = 'padded', now it is 'sequential': results are not the" in caplog.text
    assert read_run(run).finished


def test_a_run_without_a_whole_checkpoint_is_not_lengthened(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays the finished run that it is."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "complete.json").write_text("{}")
    before, words = contents(run), [*finished[1], "--output", str(run), "--resume"]
    assert main([*words, "--num_train_epochs", "2"]) == 2
    assert "expected a whole checkpoint in" in capsys.readouterr().err
    assert contents(run) == before
    assert read_run(run).finished


def test_a_longer_run_ends_like_one_that_had_this_length_from_the_start(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a constant learning rate, to the bit; also if it ends before its first step."""
    command = [*command, "--lr_scheduler_type", "constant", "--output"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    longer = [*command, str(run), "--num_train_epochs", "2", "--resume"]
    assert main([*command, str(whole), "--num_train_epochs", "2"]) == 0
    assert main([*command, str(run), "--num_train_epochs", "1"]) == 0
    short = (run / "model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SFTMixTrainer, "train", lambda *_, **__: sys.exit(9))
        with pytest.raises(SystemExit):
            main(longer)
    assert "goes on to --num_train_epochs 2, from 1; " in capsys.readouterr().out
    assert not read_run(run).finished
    assert main(longer) == 0
    assert "goes on to" not in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() != short
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert history(run) == history(whole)
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["num_train_epochs"], manifest["lengthened_from"]) == (2, [1])
    assert re.search(r"lengthened.from.*\b1\b", (run / "README.md").read_text())
    assert main(longer) == 0
    assert "run is finished already" in capsys.readouterr().out


def test_no_run_gets_shorter_or_longer_without_a_checkpoint(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    words = [*finished[1], "--output", str(run), "--resume"]
    for flags, message in (
        (["--num_train_epochs", "0.5"], "num_train_epochs = 1.0, now it is 0.5"),
        (["--max_steps", "99"], "max_steps = -1, now it is 99"),
    ):
        assert main([*words, *flags]) == 2
        assert f"was started with {message}" in capsys.readouterr().err
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = contents(run)
    assert main([*words, "--num_train_epochs", "2"]) == 2
    assert "--num_train_epochs: " in (error := capsys.readouterr().err)
    assert error.endswith(
        f"has no checkpoint to go on from; start anew with another --output, or "
        f"train its model further with --model {run}\n"
    )
    assert contents(run) == before


def test_other_data_is_refused(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = finished
    other = write_rows(tmp_path / "other.jsonl", 31, seed=8)
    before = contents(run)
    assert main([*words, "--resume", "--method", "ntp", "--data", str(other)]) == 2
    assert "the data changed after scoring" in capsys.readouterr().err
    place = words.index("--partition")
    without = [*words[:place], *words[place + 2 :], "--method", "ntp", "--resume"]
    assert main([*without, "--data", str(other)]) == 2
    assert "was started with data_hash = " in capsys.readouterr().err
    assert contents(run) == before


def test_a_run_that_exists_is_not_overwritten(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = finished
    before = contents(run)
    assert main(words) == 2
    assert "already holds a run; pass --resume" in capsys.readouterr().err
    assert contents(run) == before
    assert main([*words, "--output", str(tmp_path / "new"), "--resume"]) == 2
    assert "there is no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_leaves_a_run_that_goes_on(
    finished: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A weight goes bad in step 6; the checkpoint of step 4 knows nothing of it."""
    whole, words = finished
    run = tmp_path / "run"
    words = [*words, "--save_strategy", "steps", "--save_steps", "4", "--output", str(run)]
    own = Trainer.training_step

    def spoiling(self: Any, model: Any, *arguments: Any) -> Any:
        if self.state.global_step == 5:
            model.get_output_embeddings().weight.data.fill_(float("nan"))
        return own(self, model, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", spoiling)
        assert main(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: loss is nan at step 6, examples \[\d+(, \d+){3}\]; the model", error)
    assert checkpoints(sorted(contents(run))) == {"checkpoint-4"}
    assert main([*words, "--resume"]) == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
