"""SIGINT and SIGTERM: a checkpoint, one line, 130 or 143; a resumed run is like an unbroken one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import sftmix.commands.generate
import sftmix.commands.train
import sftmix.training.scoring
from sftmix.cli import main
from sftmix.runs import interrupts
from sftmix.runs.checkpoints import fault, list_checkpoints
from sftmix.runs.interrupts import Interrupted
from sftmix.training.metrics import MEASURED
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny

SIGNALS = [signal.SIGINT, signal.SIGTERM]
QUIET = ["--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "0.01"]
MODEL = "model.safetensors"


@pytest.fixture(autouse=True)
def _in_the_main_thread() -> None:
    """Or the signals would end the test process."""
    assert threading.current_thread() is threading.main_thread()


@pytest.fixture(autouse=True)
def _listening() -> Iterator[None]:
    """A job in the background begins with SIGINT ignored, and what it starts ignores it, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def words(toy_model: Path, toy_data: Path) -> list[str]:
    return ["--model", str(toy_model), "--data", str(toy_data), *QUIET]


@pytest.fixture(scope="module")
def train(words: list[str], held_out: Path) -> list[str]:
    """Eight steps of an epoch, two evaluations on the way, one at the end."""
    more = ["--method", "ntp", "--num_train_epochs", "1", "--logging_steps", "3"]
    more += ["--save_strategy", "no", "--eval_data", str(held_out)]
    return ["train", *words, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train: list[str]) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert (
        main([*train, "--eval_strategy", "steps", "--eval_steps", "4", "--output", str(run)]) == 0
    )
    return run


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    run = tmp_path_factory.mktemp("scored") / "run"
    assert main(["score", *words, "--num_scorings", "2", "--output", str(run)]) == 0
    return run


@contextlib.contextmanager
def signalled(owner: Any, name: str, call: int, signum: int) -> Iterator[None]:
    """A signal comes in the midst of one call of a function."""
    own: Callable[..., Any] = getattr(owner, name)
    calls: list[bool] = []

    def signalling(*args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return own(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, signalling)
        yield
    assert len(calls) >= call


def stopped(
    words: list[str], place: tuple[Any, str, int], signum: int, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line of a command that a signal ends."""
    capsys.readouterr()
    with signalled(*place, signum):
        assert main(words) == 128 + signum
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if "stopped by" in line]
    assert line.startswith(f"sftmix {words[0]}: stopped by {signal.Signals(signum).name} ")
    return line


def history(run: Path) -> list[dict[str, Any]]:
    """The logged numbers that no clock decides."""
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    kept = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]
    return [line for line in kept if "loss" in line or "eval_loss" in line]


@pytest.mark.parametrize("signum", SIGNALS)
def test_training_ends_its_step_and_goes_on(
    signum: int,
    train: list[str],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twice, the second time in the last step; although no checkpoints were asked for."""
    run = tmp_path / "run"
    evaluated = ["--eval_strategy", "steps", "--eval_steps", "4"]
    words = [*train, *evaluated, "--output", str(run)]
    line = stopped(words, (Trainer, "training_step", 2), signum, capsys)
    assert line.endswith(f"after step 2 of 8: {run}/checkpoint-2 is saved; go on with --resume")
    line = stopped([*words, "--resume"], (Trainer, "training_step", 6), signum, capsys)
    assert f"after step 8 of 8: {run}/checkpoint-8 is saved" in line
    assert all(fault(path) is None for path in list_checkpoints(run))
    assert not (run / "config.json").exists()
    assert main([*words, "--resume"]) == 0
    assert "all 8 steps were trained already" in capsys.readouterr().out
    assert (run / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert history(run) == history(whole)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_evaluation_is_put_off(
    strategy: str,
    train: list[str],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the midst of the training, or of the epoch's end, where it is due as well."""
    run, other = tmp_path / "run", tmp_path / "other"
    words = [*train, "--eval_strategy", strategy, "--eval_steps", "4"]
    if strategy == "epoch":
        assert main([*words, "--output", str(other)]) == 0
        whole = other
    words += ["--output", str(run)]
    step = 4 if strategy == "steps" else 8
    line = stopped(words, (sftmix.training.scoring, "score_batch", 2), signal.SIGTERM, capsys)
    assert f"after step {step} of 8: {run}/checkpoint-{step} is saved" in line
    assert main([*words, "--resume"]) == 0
    assert (run / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert history(run) == history(whole)


def test_an_evaluation_after_training_leaves_the_model(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And, without checkpoints, one of the last step, so that nothing is trained again."""
    run = tmp_path / "run"
    words = [*train, "--output", str(run)]
    place = (sftmix.training.scoring, "score_batch", 2)
    line = stopped(words, place, signal.SIGTERM, capsys)
    assert line.endswith(f"after the last step: the model is in {run}; go on with --resume")
    saved = (run / MODEL).read_bytes()
    assert (run / "config.json").exists()
    assert not (run / "README.md").exists()
    assert main([*words, "--resume"]) == 0
    assert "all 8 steps were trained already" in capsys.readouterr().out
    assert (run / MODEL).read_bytes() == saved
    assert sum("eval_loss" in line for line in history(run)) == 1
    assert (run / "README.md").exists()


def test_saving_the_model_is_not_broken_off(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*train, "--output", str(run)]
    line = stopped(words, (sftmix.commands.train, "save_final_model", 1), signal.SIGINT, capsys)
    assert f"the model is in {run}" in line
    assert {"config.json", MODEL} <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize("checkpointed", ["true", "false"])
@pytest.mark.parametrize("place", ["step", "scoring"])
def test_scoring_goes_on(
    place: str,
    checkpointed: str,
    words: list[str],
    scored: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Never a partition of fewer scorings, with or without checkpoints of its own."""
    run = tmp_path / "run"
    words = ["score", *words, "--num_scorings", "2", "--checkpoint_scorings", checkpointed]
    words += ["--output", str(run), "--enable_jit_checkpoint", "true"]
    where, step = {
        "step": ((Trainer, "training_step", 6), 6),
        "scoring": ((sftmix.training.scoring, "score_batch", 1), 4),
    }[place]
    line = stopped(words, where, signal.SIGTERM, capsys)
    assert line.endswith(
        f"after step {step} of 8: {run}/checkpoint-{step} is saved; go on with --resume"
    )
    assert not (run / "confidence.parquet").exists()
    assert main([*words, "--resume"]) == 0
    name = "confidence.parquet"
    assert (run / name).read_bytes() == (scored / name).read_bytes()
    assert list_checkpoints(run) == []


@pytest.mark.parametrize("signum", SIGNALS)
def test_before_training_nothing_is_lost(
    signum: int, train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*train, "--output", str(run)]
    line = stopped(words, (sftmix.commands.train, "load_data", 1), signum, capsys)
    assert line.endswith("before training began: nothing is lost; go on with --resume")
    line = stopped([*words, "--resume"], (sftmix.commands.train, "parse", 1), signum, capsys)
    assert "stopped by" in line
    assert [path.name for path in run.iterdir() if path.name != ".lock"] == []


def test_other_commands_say_one_line(
    answering_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", str(answering_model), "--questions", "none", "--format"]
    words += ["alpaca_eval", "--output", str(tmp_path)]
    stopped(words, (sftmix.commands.generate, "parse_alone", 1), signal.SIGINT, capsys)


def test_an_interrupt_that_somebody_else_raises(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sftmix.commands.train, "load_data", interrupt)
        assert main([*train, "--output", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "sftmix train: stopped by SIGINT before it was done\n"


def ends(child: Callable[[], object]) -> int:
    """How a forked process ends: its exit code, or minus a signal."""
    process = os.fork()
    if process == 0:
        try:
            child()
        except SystemExit as stop:
            os._exit(int(str(stop.code)))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(*signals: int, waits: bool = True) -> Callable[[], None]:
        def child() -> None:
            with interrupts.handled():
                interrupts.defer(until_asked=waits)
                for signum in signals:
                    os.kill(os.getpid(), signum)

        return child

    assert ends(send(signal.SIGTERM)) == 0
    assert ends(send(signal.SIGTERM, waits=False)) == 143
    assert ends(send(signal.SIGINT, waits=False)) == 130
    assert ends(send(signal.SIGTERM, signal.SIGTERM)) == -signal.SIGTERM
    assert ends(send(signal.SIGTERM, signal.SIGINT)) == -signal.SIGINT
    # A launcher passes on what each of its processes has got already.
    monkeypatch.setenv(interrupts.LAUNCHED, "1")
    assert ends(send(signal.SIGTERM, signal.SIGTERM)) == 0
    monkeypatch.setattr(interrupts, "ECHO_SECONDS", 0.0)
    assert ends(send(signal.SIGTERM, signal.SIGTERM)) == -signal.SIGTERM


def test_what_ignores_a_signal_goes_on_ignoring_it() -> None:
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.handled():
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.requested() is None
    finally:
        signal.signal(signal.SIGINT, own)


def handlers() -> list[Any]:
    return [signal.getsignal(signum) for signum in SIGNALS]


def test_a_script_keeps_its_own_handlers(tmp_path: Path) -> None:
    before, seen = handlers(), []
    made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8))
    own = made.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        seen.append(handlers())
        return own(*args, **kwargs)

    made.compute_loss = compute_loss  # type: ignore[method-assign]
    made.train()
    assert seen == [before] * 2


def test_a_script_may_ask_for_it(tmp_path: Path) -> None:
    """With transformers' option; its own callback would return as if training were finished."""

    def make() -> SFTMixTrainer:
        return tiny.trainer(
            tiny.build("Llama"), tmp_path, tiny.examples(16), enable_jit_checkpoint=True
        )

    before, made = handlers(), make()
    assert made.args.enable_jit_checkpoint
    assert handlers() == before
    with (
        signalled(Trainer, "training_step", 3, signal.SIGTERM),
        pytest.raises(Interrupted, match=r"stopped by SIGTERM after step 3 of 4: .*-3 is s"),
    ):
        made.train()
    assert handlers() == before
    resumed, whole = make(), tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(16))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert tiny.same(tiny.weights(resumed.model), tiny.weights(whole.model))


def test_checkpoints_by_the_clock_change_nothing(tmp_path: Path) -> None:
    """At each step that begins when so much time has passed, here at each."""

    def weights(folder: Path, **changes: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
        made = tiny.trainer(
            tiny.build("Llama"), folder, tiny.examples(16), save_total_limit=2, **changes
        )
        made.train()
        steps = [int(path.name.partition("-")[2]) for path in list_checkpoints(folder)]
        return steps, tiny.weights(made.model)

    without = weights(tmp_path / "without", save_minutes=0)
    often = weights(tmp_path / "often", save_minutes=1e-9)
    assert (without[0], often[0]) == ([], [4, 3])
    assert tiny.same(without[1], often[1])
    assert weights(tmp_path / "no")[0] == []
    config = tiny.config(tmp_path, save_strategy="epoch")
    assert config.save_seconds == 1800
    assert tiny.config(tmp_path, save_strategy="no").save_seconds == float("inf")
    assert tiny.config(tmp_path, save_strategy="no", save_minutes=2).save_seconds == 120
