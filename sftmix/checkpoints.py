"""Checkpoints that are complete or not there, and which of them to go on from."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sftmix.runs import TEMPORARY_PREFIX

logger = logging.getLogger(__name__)

# A name that `runs.remove_leftovers` knows as a killed writer's.
STAGING = f"{TEMPORARY_PREFIX}checkpoint"
PREFIX = "checkpoint-"


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, the newest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]), reverse=True)


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None where nothing is wrong with it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        tensors = sorted(checkpoint.glob("*.safetensors"))
        for path in tensors:
            with safe_open(path, framework="pt") as file:
                file.keys()
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    if not tensors:
        return "no *.safetensors file"
    for name in ("optimizer.pt", "scheduler.pt"):
        if (checkpoint / name).exists() and not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is truncated"
    return None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole; a warning names each one passed over."""
    for checkpoint in list_checkpoints(run):
        reason = fault(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is damaged (%s); trying the one before it", checkpoint, reason)
    return None
