"""Checkpoints are complete or not there, and going on from one changes no number."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from sftmix.runs.checkpoints import (
    LIST,
    STAGING,
    fault,
    latest_checkpoint,
    list_checkpoints,
    rotate_checkpoints,
)
from sftmix.runs.failures import RunFailure
from sftmix.runs.folders import remove_leftovers
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny
from tests.sftmix.full_disk import small_disk

LOGGED = ("loss", "step", "ntp_loss", "mixup_loss", "unmixed_fraction", "lam_mean", "grad_norm")

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "loss_window.json",
    "config.json",
    "training_args.bin",
)


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


def test_a_checkpoint_may_be_given_as_a_path(unbroken: Any, tmp_path: Path) -> None:
    checkpoint = copy_of(unbroken[0], tmp_path / "copy", 3) / "checkpoint-3"
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]
    (checkpoint / "scheduler.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"scheduler\.pt .* could run code"):
        make(tmp_path).train(resume_from_checkpoint=checkpoint)


def test_resuming_in_the_middle_of_a_log_window(unbroken: Any, tmp_path: Path) -> None:
    """Checkpoint 3 lies between the log lines of steps 2 and 4, in the first epoch."""
    resumed = make(copy_of(unbroken[0], tmp_path, 3))
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]
    assert tiny.same(tiny.weights(resumed.model), unbroken[2])


def test_the_lam_of_a_step_goes_on(tmp_path: Path) -> None:
    """Steps have two micro-batches, and an epoch's last one has one."""
    options = {"lambda_scope": "batch", "gradient_accumulation_steps": 2}
    options |= {"save_steps": 2, "logging_steps": 1}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "broken", stop=5, **options).train()
    resumed = make(tmp_path / "broken", **options)
    resumed.train(resume_from_checkpoint=True)
    lines = tiny.losses(whole, "lam_mean", "step", "loss")
    assert tiny.losses(resumed, "lam_mean", "step", "loss") == lines
    assert [step for _, step, _ in lines] == [1, 2, 3, 4, 5, 6]
    assert len({lam for lam, *_ in lines}) == 6
    assert tiny.same(tiny.weights(resumed.model), tiny.weights(whole.model))


def test_packed_rows_are_packed_again_as_they_were(tmp_path: Path) -> None:
    def packed(stop: int | None = None) -> SFTMixTrainer:
        made = SFTMixTrainer(
            model=dropout_model(),
            args=tiny.config(
                tmp_path / str(stop is None),
                save_strategy="steps",
                save_steps=3,
                layout="packed",
                row_length=24,
            ),
            train_dataset=tiny.examples(20),
            confident=tiny.halves(20),
            callbacks=[] if stop is None else [StopAt(stop)],
        )
        made.remove_callback(PrinterCallback)
        return made

    whole = packed()
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        packed(stop=4).train()
    resumed = packed(stop=99)
    torch.manual_seed(1234)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed, *LOGGED) == tiny.losses(whole, *LOGGED)
    assert tiny.same(tiny.weights(resumed.model), tiny.weights(whole.model))


def test_resuming_from_a_named_checkpoint(unbroken: Any, tmp_path: Path) -> None:
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(unbroken[0] / "checkpoint-9"))
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]


def test_resuming_without_a_checkpoint_starts_anew(
    unbroken: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed = make(tmp_path)
    with caplog.at_level(logging.WARNING, logger="sftmix.training.saving"):
        resumed.train(resume_from_checkpoint=True)
    assert f"{tmp_path} has no checkpoint yet: training begins at step 1" in caplog.text
    assert tiny.losses(resumed, *LOGGED) == unbroken[1]


def test_the_newest_is_chosen_by_number(tmp_path: Path, unbroken: Any) -> None:
    for step in (3, 9, 10):
        shutil.copytree(unbroken[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    for other in ("checkpoint-99.bak", "checkpoint-", "checkpoint-x", STAGING):
        (tmp_path / other).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert latest_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_newest_gives_way_to_the_one_before(
    name: str, share: float, unbroken: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(unbroken[0], tmp_path, 6, 9)
    damaged = run / "checkpoint-9" / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(share * len(content))])
    with caplog.at_level(logging.WARNING, logger="sftmix.runs.checkpoints"):
        assert latest_checkpoint(run) == run / "checkpoint-6"
    assert "checkpoint-9 is damaged" in caplog.text


@pytest.mark.parametrize("name", [*FILES, LIST])
def test_a_missing_file_is_a_fault_too(name: str, unbroken: Any, tmp_path: Path) -> None:
    """Without optimizer.pt, say, Trainer would go on with a new optimizer and say nothing."""
    run = copy_of(unbroken[0], tmp_path, 6, 9)
    (run / "checkpoint-9" / name).unlink()
    assert name in (fault(run / "checkpoint-9") or "")
    assert latest_checkpoint(run) == run / "checkpoint-6"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_a_fault_too(name: str, unbroken: Any, tmp_path: Path) -> None:
    """In the middle, where neither a header nor the directory of an archive lies."""
    run = copy_of(unbroken[0], tmp_path, 6, 9)
    damaged = run / "checkpoint-9" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    reason = fault(run / "checkpoint-9")
    assert reason == f"{name} was changed after it was written: its checksum differs"
    assert latest_checkpoint(run) == run / "checkpoint-6"


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 3}', '{"a": [1]}', "null", "{"])
def test_a_list_that_is_none_is_a_fault_too(text: str, unbroken: Any, tmp_path: Path) -> None:
    run = copy_of(unbroken[0], tmp_path, 9)
    (run / "checkpoint-9" / LIST).write_text(text)
    assert (fault(run / "checkpoint-9") or "").startswith(LIST)
    with pytest.raises(ValueError, match=r"got only damaged ones \(checkpoint-9: complete\.json"):
        latest_checkpoint(run)


def test_rotation_goes_by_steps_and_not_by_the_clock(tmp_path: Path) -> None:
    def left(kept: tuple[int, ...], newest: int, limit: int | None, best: int | None) -> list[str]:
        run = tmp_path / f"{newest}-{limit}-{best}"
        for age, step in enumerate(kept):
            folder = run / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            os.utime(folder, (age, age))
        # The path as another working directory saw it.
        best_path = None if best is None else f"elsewhere/checkpoint-{best}"
        rotate_checkpoints(run, newest, limit, best_path)
        assert not list(run.glob(".tmp-*"))
        return [path.name.removeprefix("checkpoint-") for path in list_checkpoints(run)]

    # The later in the list, the newer by the clock.
    assert left((10, 9, 3, 6), 10, 2, None) == ["10", "9"]
    assert left((10, 9, 3, 6), 10, 2, 3) == ["10", "3"]
    assert left((10, 9, 3, 6), 10, 1, 6) == ["10", "6"]
    assert left((10, 9, 3, 6), 10, 1, 5) == ["10"]
    assert left((10, 9, 3, 6), 10, None, None) == ["10", "9", "6", "3"]
    # Training went past a damaged one of step 9 and has come to step 7.
    assert left((9, 6, 7), 7, 2, None) == ["7", "6"]
    assert left((9, 7), 7, 1, None) == ["7"]


def test_what_is_being_deleted_is_no_checkpoint(
    unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(unbroken[0], tmp_path, 3, 6)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path: next(path.glob("*.pt")).unlink())
        rotate_checkpoints(run, 6, 1, None)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-6"]
    assert len(remove_leftovers(run)) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("copied", [None, ["lm_head"]], ids=["alone", "head copied"])
def test_a_checkpoint_of_an_adapter(copied: list[str] | None, tmp_path: Path) -> None:
    """PEFT: neither the model nor its optimizer's states of frozen weights are written."""
    peft = pytest.importorskip("peft")

    def adapted(stop: int | None = None) -> SFTMixTrainer:
        dropping = {"r": 4, "lora_dropout": 0.2, "modules_to_save": copied}
        lora = peft.LoraConfig(task_type="CAUSAL_LM", **dropping)
        torch.manual_seed(0)
        return tiny.trainer(
            peft.get_peft_model(tiny.build("Llama"), lora),
            tmp_path / ("whole" if stop is None else "broken"),
            tiny.examples(20),
            callbacks=[] if stop is None else [StopAt(stop)],
            save_strategy="steps",
            save_steps=2,
            learning_rate=0.01,
        )

    whole = adapted()
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        adapted(stop=3).train()
    resumed = adapted(stop=99)
    torch.manual_seed(1234)
    resumed.train(resume_from_checkpoint=True)
    written = {path.name for path in list_checkpoints(tmp_path / "broken")[0].iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= written
    assert "model.safetensors" not in written
    assert tiny.losses(resumed, *LOGGED) == tiny.losses(whole, *LOGGED)
    assert tiny.same(tiny.weights(resumed.model), tiny.weights(whole.model))
    head = resumed.head.head
    if copied:
        head = head.modules_to_save["default"]
    assert torch.equal(head.weight, tiny.build("Llama").lm_head.weight) == (copied is None)


def test_damaged_checkpoints_alone_are_refused(unbroken: Any, tmp_path: Path) -> None:
    """Training would begin at step 1 and say nothing."""
    run = copy_of(unbroken[0], tmp_path, 3, 6)
    for step in (3, 6):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-6: optimizer\.pt.*; checkpoint-3: .*delete"):
        make(run).train(resume_from_checkpoint=True)
    named = str(run / "checkpoint-3")
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*-3 is damaged \(optimizer"):
        make(run).train(resume_from_checkpoint=named)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected a folder, got .*-99"):
        make(run).train(resume_from_checkpoint=str(run / "checkpoint-99"))


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


@pytest.mark.parametrize("size", [1_000, 50_000])
def test_a_full_disk_leaves_the_old_checkpoints(size: int, unbroken: Any, tmp_path: Path) -> None:
    """The weights do not fit, or they do and the optimizer does not."""
    run = copy_of(unbroken[0], tmp_path, 3, 6)
    sizes = [
        (run / "checkpoint-6" / n).stat().st_size for n in ("model.safetensors", "optimizer.pt")
    ]
    assert 1_000 < sizes[0] < 50_000 < sizes[1]
    made = make(run)
    with small_disk(size), pytest.raises(RunFailure, match="is the disk full"):
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
