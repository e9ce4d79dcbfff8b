"""The part of a trainer that writes checkpoints and goes on from them; see `checkpoints.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from sftmix.checkpoints import (
    PREFIX,
    STAGING,
    STATE,
    latest_checkpoint,
    rotate_checkpoints,
    seal,
    writing,
)
from sftmix.metrics import LossWindow
from sftmix.pickles import refuse_code
from sftmix.ranks import on_main
from sftmix.runs import atomic_write, publish_folder

# The mixin goes over any trainer derived from Trainer; type checkers read it as one.
if TYPE_CHECKING:
    TrainerBase = Trainer
else:
    TrainerBase = object


class WholeCheckpoints(TrainerBase):
    """Checkpoints that appear complete or not at all, with the log window and the extras in them.

    Each of the extras has ``save(folder)`` and ``load(folder)``, and ``FILE``, which it may write
    again later.
    """

    window: LossWindow
    staging: Path | None = None
    checkpoint_extras: list[Any]

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes: the staging folder while a checkpoint is being made."""
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, then rename it: it is complete or not there."""
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
        for extra in [self.window, *self.checkpoint_extras]:
            extra.save(staging / name)
        # Every rank loads the best one at the end.
        is_best = self.state.best_model_checkpoint == str(staging / name)
        if is_best:
            self.state.best_model_checkpoint = str(run / name)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(staging / name / STATE))
            self._publish(staging / name, run / name)
        self.accelerator.wait_for_everyone()

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

    def save_state(self) -> None:
        """The log and the counters into ``RUN/trainer_state.json``, all of it or nothing."""
        if self.args.should_save:
            path = Path(str(self.args.output_dir)) / STATE
            atomic_write(path, lambda temporary: self.state.save_to_json(str(temporary)))

    def _load_extras(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None
    ) -> str | bool | None:
        """Go on with the log and the extras of a checkpoint; ``True`` is the newest whole one's.

        Returns:
            the checkpoint, None where there is none.

        Raises:
            ValueError: a file of it could run code when it is loaded.
        """
        if resume_from_checkpoint is True:
            run = Path(str(self.args.output_dir))
            newest = on_main(lambda: latest_checkpoint(run))
            resume_from_checkpoint = None if newest is None else str(newest)
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            refuse_code(Path(resume_from_checkpoint))
            for extra in [self.window, *self.checkpoint_extras]:
                extra.load(Path(resume_from_checkpoint))
        else:
            self.window.begin()
        return resume_from_checkpoint
