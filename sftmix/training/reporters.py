"""Reporters of a training before the user's own: it logs into runs of its own, or not at all."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sftmix.runs.ranks import is_main, on_main
from sftmix.training.metrics import RunTensorBoard

logger = logging.getLogger(__name__)

REFERENCE = "reference"
# What has another run, or another folder, for each training of a process.
APART = ("tensorboard", "trackio", "wandb")


def reporters_apart(report_to: Sequence[str]) -> list[str]:
    """Return the reporters in which the training of a reference model can have a run of its own.

    A line names the others, such as W&B while a run is active.
    """
    found = on_main(lambda: [one for one in report_to if one in APART and not is_taken(one)])
    left_out = [one for one in report_to if one not in found]
    if left_out and is_main():
        logger.warning(
            "report_to: the reference model's training is not reported to %s, where it would be "
            "part of the run that is active, or of the training's own",
            ", ".join(left_out),
        )
    return found


def is_taken(reporter: str) -> bool:
    """Tell whether all trainings of this process log into one run of a reporter's."""
    if reporter != "wandb":
        return False
    return "WANDB_RUN_ID" in os.environ or importlib.import_module("wandb").run is not None


@contextlib.contextmanager
def own_runs(trainer: Any) -> Iterator[None]:
    """Let a trainer log into a folder and runs of its own, which end with the block."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunTensorBoard):
            callback.logging_dir = str(Path(str(callback.logging_dir)) / REFERENCE)
    try:
        yield
    finally:
        # W&B's callback leaves its run open, and the next one would go on in it.
        if "wandb" in trainer.args.report_to and is_main():
            importlib.import_module("wandb").finish()
