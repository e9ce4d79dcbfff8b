"""What is logged reaches the reporters, and a resumed run's log is one log."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

import sftmix.data.examples
import sftmix.templates.tokenizing
import sftmix.training.metrics
from sftmix.cli import main
from sftmix.training.metrics import MEASURED
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny

TRAINED = (
    "loss",
    "ntp_loss",
    "mixup_loss",
    "ntp_loss_confident",
    "ntp_loss_unconfident",
    "entropy",
    "entropy_confident",
    "entropy_unconfident",
    "mean_token_accuracy",
    "mean_token_accuracy_confident",
    "mean_token_accuracy_unconfident",
    "unmixed_fraction",
    "lam_mean",
    "num_tokens",
    "tokens_per_second",
    "trained_tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "learning_rate",
    "grad_norm",
)
EVALUATED = (
    "eval_loss",
    "eval_perplexity",
    "eval_entropy",
    "eval_mean_token_accuracy",
    "eval_num_tokens",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
)


class StopAt(TrainerCallback):
    """Ends a run as a crash does, right before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def make(folder: Path, stop: int | None = None) -> SFTMixTrainer:
    """Ten steps, a log line after each second; checkpoints at 3, 6 and 9, evaluations at 5, 10."""
    return tiny.trainer(
        tiny.build("Llama"),
        folder,
        tiny.examples(40),
        eval_dataset=tiny.examples(7, seed=5),
        callbacks=[] if stop is None else [StopAt(stop)],
        report_to="tensorboard",
        save_strategy="steps",
        save_steps=3,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=5,
    )


def tag(name: str) -> str:
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar, as TensorBoard shows them.

    Files are named by second and by the number of the process's writers. In the order of names the
    tenth of a second comes before the ninth, and TensorBoard leaves out steps that go back.
    """
    with tempfile.TemporaryDirectory() as ordered:
        for number, path in enumerate(sorted(folder.glob("events*"), key=written)):
            shutil.copy(path, Path(ordered, f"{number:03}.tfevents"))
        read = EventAccumulator(ordered, size_guidance={"scalars": 0})
        read.Reload()
        return {
            name: [(event.step, event.value) for event in read.Scalars(name)]
            for name in read.Tags()["scalars"]
        }


def written(path: Path) -> tuple[int, int]:
    """The second in which a file of events was begun, and the number of its writer."""
    _, _, _, second, *_, writer = path.name.split(".")
    return int(second), int(writer)


def test_tensorboard_gets_everything_that_is_logged(tmp_path: Path) -> None:
    made = make(tmp_path)
    made.train()
    found = events(tmp_path / "tensorboard")
    for names, steps in ((TRAINED, [2, 4, 6, 8, 10]), (EVALUATED, [5, 10])):
        for name in names:
            logged = [(line["step"], line[name]) for line in made.state.log_history if name in line]
            assert [step for step, _ in logged] == steps
            assert [step for step, _ in found[tag(name)]] == steps
            values = [value for _, value in found[tag(name)]]
            assert values == pytest.approx([value for _, value in logged], rel=1e-6), name


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    """Stopped in step 9, after the log line of step 8, and resumed from checkpoint 6."""
    whole, broken, resumed = make(tmp_path / "whole"), make(tmp_path / "run", stop=8), None
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    found, expected = (events(tmp_path / run / "tensorboard") for run in ("run", "whole"))
    assert found[tag("loss")][-2][0] == 8
    for name in (*TRAINED, *EVALUATED):
        if name in MEASURED:
            steps = [step for step, _ in expected[tag(name)]]
            assert [step for step, _ in found[tag(name)]] == steps
        else:
            assert found[tag(name)] == expected[tag(name)], name
    files = {path.parent for path in (tmp_path / "run").rglob("*tfevents*")}
    assert files == {tmp_path / "run" / "tensorboard"}


def test_speed_counts_the_time_of_the_killed_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window that a checkpoint cut in two: tokens and seconds of both its parts."""
    now = [1000.0]
    monkeypatch.setattr(
        sftmix.training.metrics, "time", SimpleNamespace(perf_counter=lambda: now[0])
    )
    window = make(tmp_path).window
    now[0] += 200
    window.reset(0, 0)
    now[0] += 100
    window.add({"input_tokens": 1000.0})
    window.save(tmp_path)
    resumed = make(tmp_path).window
    resumed.load(tmp_path)
    logged = resumed.report(resumed.sums, 1, paired=False, mixed=False)
    assert logged["tokens_per_second"] == 10
    assert resumed.seconds == window.seconds == 300
    now[0] += 7
    resumed.add({})
    assert (window.seconds, resumed.seconds) == (300, 307)
    resumed.begin()
    assert resumed.seconds == 0
    assert resumed.sums.sum() == 0


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars that come after two seconds come at once."""
    for module in (sftmix.data.examples, sftmix.templates.tokenizing):
        own = module.tqdm

        def at_once(*arguments: Any, own: Any = own, **keywords: Any) -> Any:
            return own(*arguments, **{**keywords, "delay": 0})

        monkeypatch.setattr(module, "tqdm", at_once)


BARS = ("Reading", "Tokenising", "Loading weights", "8/8", "evaluate")


def commands(model: Path, data: Path, held_out: Path, folder: Path) -> tuple[list[str], list[str]]:
    words = ["--model", str(model), "--data", str(data), "--use_cpu", "true"]
    words += ["--logging_steps", "3", "--num_train_epochs", "1"]
    train = ["train", *words, "--output", str(folder / "run"), "--eval_data", str(held_out)]
    return ["score", *words, "--output", str(folder / "scored")], train


@pytest.mark.usefixtures("no_delay")
def test_what_a_command_shows_and_logs(
    toy_model: Path,
    toy_data: Path,
    held_out: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    score, train = commands(toy_model, toy_data, held_out, tmp_path)
    assert main([*score, "--disable_tqdm", "false", "--report_to", "tensorboard"]) == 0
    assert "score 5" in capfd.readouterr().err
    assert events(tmp_path / "scored" / "tensorboard")["train/ntp_loss"]
    train += ["--partition", str(tmp_path / "scored" / "confidence.parquet")]
    assert main([*train, "--disable_tqdm", "false", "--report_to", "tensorboard"]) == 0
    shown = capfd.readouterr().err
    assert all(bar in shown for bar in BARS), shown
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    found = events(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["train/mixup_loss"]] == [3, 6]
    for name in (*TRAINED, *EVALUATED):
        logged = [line[name] for line in log if name in line]
        assert logged
        assert [value for _, value in found[tag(name)]] == pytest.approx(logged, rel=1e-6), name


@pytest.mark.usefixtures("no_delay")
def test_no_bar_where_none_is_wanted(
    toy_model: Path,
    toy_data: Path,
    held_out: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, train = commands(toy_model, toy_data, held_out, tmp_path)
    assert main([*train, "--method", "ntp", "--disable_tqdm", "true"]) == 0
    shown = capfd.readouterr().err
    assert not any(bar in shown for bar in BARS), shown
    assert "it/s" not in shown
