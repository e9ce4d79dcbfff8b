"""Checkpoints that are complete or not there, and which of them to go on from."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sftmix.runs import TEMPORARY_PREFIX

logger = logging.getLogger(__name__)

# A name that `runs.remove_leftovers` knows as a killed writer's.
STAGING = f"{TEMPORARY_PREFIX}checkpoint"
PREFIX = "checkpoint-"
REQUIRED = ("trainer_state.json", "loss_window.json")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what safetensors and torch.save raise on a full disk into an OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"cannot write {path}, is the disk full? ({error})") from error


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, the newest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]), reverse=True)


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None where nothing is wrong with it."""
    texts = {checkpoint / name for name in REQUIRED} | set(checkpoint.glob("*.json"))
    # `glob` takes in names that begin with a dot: what a killed process had begun to write.
    written = checkpoint.glob("*.safetensors")
    tensors = sorted(path for path in written if not path.name.startswith(TEMPORARY_PREFIX))
    try:
        for path in sorted(texts):
            json.loads(path.read_text(encoding="utf-8"))
        for path in tensors:
            with safe_open(path, framework="pt") as file:
                file.keys()
    except (OSError, ValueError, SafetensorError) as error:
        return f"{path.name}: {error}"
    if not tensors:
        return "no *.safetensors file"
    # What torch.save wrote is a zip archive, whose directory stands at its end.
    for path in sorted(p for p in checkpoint.iterdir() if p.suffix in (".pt", ".pth", ".bin")):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is truncated"
    return None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole; a warning names each one passed over."""
    for checkpoint in list_checkpoints(run):
        reason = fault(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is damaged (%s); trying the one before it", checkpoint, reason)
    return None


def remove_checkpoints(run: Path) -> None:
    """Delete all checkpoints of a run, the oldest first."""
    for checkpoint in reversed(list_checkpoints(run)):
        shutil.rmtree(checkpoint)
