"""Checkpoints are complete or not there, and going on from one changes no number."""

from __future__ import annotations

import contextlib
import io
import logging
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from sftmix.checkpoints import STAGING, fault, latest_checkpoint, list_checkpoints
from sftmix.runs import remove_leftovers
from sftmix.trainer import SFTMixTrainer

from . import tiny

LIMIT = resource.RLIMIT_FSIZE
LOGGED = ("loss", "step", "ntp_loss", "mixup_loss", "truncated_fraction", "lam_mean", "grad_norm")


class StopAt(TrainerCallback):
    """Ends a run as a crash does: by an exception, right after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def dropout_model() -> PreTrainedModel:
    return tiny.build("GPT2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)


def make(folder: Path, *, stop: int | None = None, **changes: Any) -> SFTMixTrainer:
    """Five steps an epoch, ten in all; a checkpoint every third, a log line every second."""
    defaults = {
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "num_train_epochs": 2,
    }
    return tiny.trainer(
        dropout_model(),
        folder,
        tiny.examples(20),
        callbacks=[] if stop is None else [StopAt(stop)],
        **{**defaults, **changes},
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    made = make(folder, save_total_limit=None)
    made.train()
    return folder, tiny.losses(made, *LOGGED), tiny.weights(made.model)


def copy_of(run: Path, folder: Path, *kept: int) -> Path:
    for step in kept:
        shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def test_checkpoints_are_published_and_rotated(unbroken: Any, tmp_path: Path) -> None:
    assert [path.name for path in list_checkpoints(unbroken[0])] == [
        f"checkpoint-{step}" for step in (10, 9, 6, 3)
    ]
    make(tmp_path).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert all(fault(path) is None for path in list_checkpoints(tmp_path))


@pytest.mark.parametrize("stop", [7, 8, 9])
def test_resuming_in_the_middle_of_an_epoch_is_bitwise_the_same(
    stop: int, unbroken: Any, tmp_path: Path
) -> None:
    """From checkpoint 6, in the second epoch and one step before or after a log line."""
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, stop=stop).train()
    assert list_checkpoints(tmp_path)[0].name == f"checkpoint-{stop // 3 * 3}"
    torch.manual_seed(1234)
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]
    assert tiny.same(tiny.weights(resumed.model), unbroken[2])


def test_resuming_in_the_middle_of_a_log_window(unbroken: Any, tmp_path: Path) -> None:
    """Checkpoint 3 lies between the log lines of steps 2 and 4, in the first epoch."""
    resumed = make(copy_of(unbroken[0], tmp_path, 3))
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]
    assert tiny.same(tiny.weights(resumed.model), unbroken[2])


def test_resuming_from_a_named_checkpoint(unbroken: Any, tmp_path: Path) -> None:
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(unbroken[0] / "checkpoint-9"))
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]


def test_resuming_without_a_checkpoint_starts_anew(unbroken: Any, tmp_path: Path) -> None:
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]


def test_the_newest_is_chosen_by_number(tmp_path: Path, unbroken: Any) -> None:
    for step in (3, 9, 10):
        shutil.copytree(unbroken[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    for other in ("checkpoint-99.bak", "checkpoint-", "checkpoint-x", STAGING):
        (tmp_path / other).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert latest_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "loss_window.json",
        "config.json",
        "training_args.bin",
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_newest_gives_way_to_the_one_before(
    name: str, share: float, unbroken: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(unbroken[0], tmp_path, 6, 9)
    damaged = run / "checkpoint-9" / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(share * len(content))])
    with caplog.at_level(logging.WARNING, logger="sftmix.checkpoints"):
        assert latest_checkpoint(run) == run / "checkpoint-6"
    assert "checkpoint-9 is damaged" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "loss_window.json"])
def test_a_missing_file_is_a_fault_too(name: str, unbroken: Any, tmp_path: Path) -> None:
    run = copy_of(unbroken[0], tmp_path, 6, 9)
    (run / "checkpoint-9" / name).unlink()
    assert latest_checkpoint(run) == run / "checkpoint-6"


def test_training_goes_past_a_damaged_checkpoint(unbroken: Any, tmp_path: Path) -> None:
    """The run comes to the damaged one's step again and writes it anew."""
    run = copy_of(unbroken[0], tmp_path, 3, 6)
    weights = run / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    resumed = make(run, save_total_limit=None)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]
    assert [path.name for path in list_checkpoints(run)] == [
        f"checkpoint-{step}" for step in (10, 9, 6, 3)
    ]
    assert all(fault(path) is None for path in list_checkpoints(run))


def test_training_again_in_the_same_folder_writes_anew(tmp_path: Path) -> None:
    first, second = make(tmp_path, max_steps=3), make(tmp_path, max_steps=3, seed=5)
    first.train()
    before = (tmp_path / "checkpoint-3" / "model.safetensors").read_bytes()
    second.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").read_bytes() != before
    assert fault(tmp_path / "checkpoint-3") is None


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, which fails as a full disk does.

    The limit is the process's: what it prints meanwhile is kept from standard output and error,
    which may be files too.
    """
    own, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(LIMIT)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            resource.setrlimit(LIMIT, (size, limits[1]))
            yield
    finally:
        resource.setrlimit(LIMIT, limits)
        signal.signal(signal.SIGXFSZ, own)


@pytest.mark.parametrize("size", [1_000, 50_000])
def test_a_full_disk_leaves_the_old_checkpoints(size: int, unbroken: Any, tmp_path: Path) -> None:
    """The weights do not fit, or they do and the optimizer does not."""
    run = copy_of(unbroken[0], tmp_path, 3, 6)
    sizes = [
        (run / "checkpoint-6" / n).stat().st_size for n in ("model.safetensors", "optimizer.pt")
    ]
    assert 1_000 < sizes[0] < 50_000 < sizes[1]
    made = make(run)
    with small_disk(size), pytest.raises(OSError, match="is the disk full"):
        made.train(resume_from_checkpoint=True)
    assert (run / STAGING).is_dir()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-6", "checkpoint-3"]
    assert latest_checkpoint(run) == run / "checkpoint-6"
    remove_leftovers(run)
    assert not (run / STAGING).exists()


def test_the_best_checkpoint_is_named_by_its_place(tmp_path: Path) -> None:
    data = tiny.examples(20)
    made = tiny.trainer(
        tiny.build("Llama"),
        tmp_path,
        data,
        eval_dataset=data,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    made.train()
    best = made.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{made.state.best_global_step}")
    assert Path(best).is_dir()
    assert STAGING not in (Path(best) / "trainer_state.json").read_text()
