"""The part of a trainer that writes checkpoints and goes on from them; see `checkpoints.py`."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sftmix.conventions import CONFIGS, MODEL_CARD, TRAINER_STATE
from sftmix.model.saved_config import config_to_save
from sftmix.model.weights import without_message
from sftmix.runs import interrupts
from sftmix.runs.checkpoints import (
    PREFIX,
    STAGING,
    latest_checkpoint,
    list_checkpoints,
    refuse_damaged,
    rotate_checkpoints,
    seal,
    writing,
)
from sftmix.runs.folders import atomic_write, publish_folder, sync_folder, write_json
from sftmix.runs.pickles import refuse_code
from sftmix.runs.ranks import is_main, num_ranks, on_main
from sftmix.templates.turn_ends import TurnEnds
from sftmix.training.guards import GuardedSteps
from sftmix.training.metrics import LossWindow

logger = logging.getLogger(__name__)


class DueEvaluation:
    """An evaluation that a signal has put off: a file in the checkpoint says so."""

    FILE = "due.json"

    def __init__(self) -> None:
        self.is_due = False

    def save(self, folder: Path) -> None:
        """Note in a checkpoint that an evaluation is due."""
        if self.is_due and is_main():
            write_json(folder / self.FILE, {"evaluate": True})

    def load(self, folder: Path) -> None:
        """Read from a checkpoint whether an evaluation is due."""
        self.is_due = (folder / self.FILE).exists()


class Resumption(TrainerCallback):
    """Makes the evaluation that the resumed checkpoint has put off, before the first step."""

    def __init__(self, trainer: WholeCheckpoints) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let signals wait for the end of a step from now on."""
        self.trainer.begun_at = state.global_step
        interrupts.end_if_requested()
        interrupts.defer()
        self.trainer.make_up()


class WholeCheckpoints(GuardedSteps):
    """Checkpoints that appear complete or not at all, with the log window and the extras in them.

    Each of the extras has ``save(folder)`` and ``load(folder)``, and ``FILE``, which it may write
    again later. A signal is heeded here: see `sftmix.runs.interrupts`.
    """

    window: LossWindow
    loaded_config: Mapping[str, Any]
    staging: Path | None = None
    checkpoint_extras: list[Any]
    evaluation: DueEvaluation
    # The step whose end has been seen to: a second time it is the end of its epoch.
    settled: int | None = None
    saved_step: int | None = None
    begun_at = 0

    def _get_output_dir(self, trial: Any) -> str:
        """Return where Trainer writes: the staging folder while it makes a checkpoint."""
        return str(self.staging or super()._get_output_dir(trial))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> Any:
        """Do as Trainer does, with the best checkpoint in this folder, wherever that lay before.

        Raises:
            ValueError: the best model is to be loaded in the end, and its checkpoint is gone.
        """
        with without_message("transformers.trainer", "recorded in the resumed state"):
            found = super()._init_training_state(
                max_steps,
                num_update_steps_per_epoch,
                num_train_epochs,
                resume_from_checkpoint,
                trial,
            )
        state = (
            None if resume_from_checkpoint is None else Path(resume_from_checkpoint) / TRAINER_STATE
        )
        if state is not None and state.is_file():
            self._find_best(TrainerState.load_from_json(str(state)).best_model_checkpoint)
        return found

    def _find_best(self, recorded: str | None) -> None:
        if recorded is None:
            return
        own = Path(str(self.args.output_dir)) / Path(recorded).name
        if own.is_dir():
            self.state.best_model_checkpoint = str(own)
        elif self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            raise ValueError(
                f"load_best_model_at_end: expected the best checkpoint so far, {own}, which is "
                "gone; leave the option out to keep the last model"
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch unless all steps are done; Trainer would make another step first."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        # An evaluation that was put off may have asked for it, too.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, save and evaluate at a step's or an epoch's end, where a signal ends the training.

        Raises:
            Interrupted: after the checkpoint of this step.
        """
        step = self.state.global_step
        ends_epoch, self.settled = step == self.settled, step
        self.saved_step = None
        # Trainer comes here again: then what is due at the epoch's end has been logged, too.
        again = not ends_epoch and (
            self.control.should_training_stop or float(self.state.epoch or 0).is_integer()
        )
        if self.save_is_due:
            self.control.should_save, self.save_is_due = True, False
        if self._stop_signal() is not None:
            self._put_off()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except interrupts.Interrupted as stop:
            self.stop_signal = stop.signum
            # While it scored into the checkpoint that it had just written, or else evaluated.
            if self.saved_step == step and not self.control.should_evaluate and not again:
                raise
            self._put_off()
        if (signum := self._stop_signal()) is not None and not again:
            self.checkpoint()
            raise interrupts.Interrupted(signum, "")

    def _stop_signal(self) -> int | None:
        """Return the signal that all ranks know of; a single process sees it at once."""
        if self.stop_signal is None and num_ranks() == 1:
            self.stop_signal = interrupts.requested()
        return self.stop_signal

    def _put_off(self) -> None:
        """Leave this step's evaluation to the run that resumes."""
        self.evaluation.is_due |= self.control.should_evaluate
        self.control.should_evaluate = self.control.should_save = False

    def make_up(self) -> None:
        """Make the evaluation that the resumed checkpoint put off, and write it anew."""
        if not self.evaluation.is_due:
            return
        self.evaluation.is_due = False
        self.control.should_evaluate = self.control.should_save = True
        super()._maybe_log_save_evaluate(
            self._tr_loss, None, self.model, None, self.state.epoch or 0, None, time.time()
        )
        self.control.should_evaluate = self.control.should_save = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as Trainer does, without the hub's token among the arguments that it pickles."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            with self.saved_config():
                super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, then rename it: it is complete or not there.

        Raises:
            FloatingPointError: a weight is NaN or infinite.
            RunFailure: the disk is full.
        """
        self.refuse_weights("no checkpoint of it was written, earlier ones stay")
        run = Path(str(self.args.output_dir))
        name = f"{PREFIX}{self.state.global_step}"
        self.staging = run / STAGING
        try:
            with writing(self.staging):
                super()._save_checkpoint(model, trial)
        finally:
            staging, self.staging = self.staging, None
        # Every rank writes its random state into the folder that the first one renames.
        self.accelerator.wait_for_everyone()
        for extra in self._extras():
            extra.save(staging / name)
        # Every rank loads the best one at the end.
        is_best = self.state.best_model_checkpoint == str(staging / name)
        if is_best:
            self.state.best_model_checkpoint = str(run / name)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(staging / name / TRAINER_STATE))
            self._publish(staging / name, run / name)
        self.accelerator.wait_for_everyone()
        self.saved_at, self.saved_step = time.monotonic(), self.state.global_step

    def _extras(self) -> list[Any]:
        spikes = [] if self.spikes is None else [self.spikes]
        return [self.window, self.evaluation, *spikes, *self.checkpoint_extras]

    def _publish(self, staging: Path, final: Path) -> None:
        seal(staging, changing=[extra.FILE for extra in self.checkpoint_extras])
        # What is there is damaged, or an earlier training's in the same folder.
        publish_folder(staging, final, replace=True)
        staging.parent.rmdir()
        rotate_checkpoints(
            final.parent,
            self.state.global_step,
            self.args.save_total_limit,
            self.state.best_model_checkpoint,
        )

    def saved_config(self) -> AbstractContextManager[None]:
        """Take out of the model's config what training turned on, while it is written."""
        return config_to_save(self.accelerator.unwrap_model(self.model), self.loaded_config)

    def save_state(self) -> None:
        """Write log and counters into ``RUN/trainer_state.json``, all of it or nothing."""
        if self.args.should_save:
            path = Path(str(self.args.output_dir)) / TRAINER_STATE
            atomic_write(path, lambda temporary: self.state.save_to_json(str(temporary)))

    def _load_extras(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None
    ) -> str | bool | None:
        """Load the log and the extras of a checkpoint; ``True`` means the newest whole one.

        Returns:
            the checkpoint, None where there is none.

        Raises:
            ValueError: the checkpoint, or each that there is, is damaged; or a file of it could run
                code when it is loaded.
        """
        run = Path(str(self.args.output_dir))
        if resume_from_checkpoint is True:
            newest = on_main(lambda: latest_checkpoint(run))
            if newest is None and is_main():
                logger.warning("%s has no checkpoint yet: training begins at step 1", run)
            resume_from_checkpoint = None if newest is None else str(newest)
        self.evaluation = DueEvaluation()
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            named = Path(resume_from_checkpoint)
            refuse_code(named)
            on_main(lambda: refuse_damaged(named))
            for extra in self._extras():
                extra.load(Path(resume_from_checkpoint))
        else:
            self.window.begin()
        return resume_from_checkpoint

    def checkpoint(self) -> None:
        """Write a checkpoint of the last step, unless there is one."""
        if self.state.global_step not in (self.begun_at, self.saved_step):
            self._save_checkpoint(self.model, None)

    def stopped(self, stop: interrupts.Interrupted) -> interrupts.Interrupted:
        """Save this step; return the interruption with words: where, what is there, what next."""
        # It may have been scoring, after a step without a checkpoint of its own.
        self.checkpoint()
        run = Path(str(self.args.output_dir))
        newest = next(iter(list_checkpoints(run)), None)
        kept = "nothing was saved yet" if newest is None else f"{newest} is saved"
        place = f"after step {self.state.global_step} of {self.state.max_steps}"
        return interrupts.Interrupted(stop.signum, f"{place}: {kept}; go on with --resume")


def save_final_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    run: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> list[str]:
    """Put the model and its tokenizer into the run folder, each file renamed into place.

    What makes the folder a model comes last: ``config.json``, or an adapter's. ``state``: its
    weights, where the model has but shards of them.

    Returns:
        The names of the files.

    Raises:
        RunFailure: the disk is full; the run folder is as it was.
    """
    TurnEnds(tokenizer).align(model)
    staging = run / STAGING
    with writing(staging):
        model.save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)
        (staging / MODEL_CARD).unlink(
            missing_ok=True
        )  # PEFT's, which knows nothing of the training
        sync_folder(staging)
    files = [path for path in staging.rglob("*") if path.is_file()]
    # A tokenizer with several chat templates has a folder of them.
    names = sorted(
        (str(path.relative_to(staging)) for path in files), key=lambda name: name in CONFIGS
    )
    for name in names:
        (run / name).parent.mkdir(exist_ok=True)
        os.replace(staging / name, run / name)
    shutil.rmtree(staging)
    return names
