"""Write checkpoints that are complete or absent, and choose the one to resume from.

A checkpoint is written under a temporary name and renamed into its place. Its `complete.json` lists
its files with their sizes and checksums, which reveal a file that is missing, cut off or changed
since. The checksums (XXH3, 3 GB/s on one core) cost five seconds for 16 GB, once when the
checkpoint is written and once when a run goes on from it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from sftmix.conventions import TRAINER_STATE
from sftmix.runs.failures import DISK_FAULTS, RankError, RunFailure
from sftmix.runs.folders import TEMPORARY_PREFIX, write_json
from sftmix.runs.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

# A name that `runs.remove_leftovers` knows as a killed writer's.
STAGING = f"{TEMPORARY_PREFIX}checkpoint"
PREFIX = "checkpoint-"
LIST = "complete.json"
PIECE = 2**24


class writing:
    """Turn the errors that libraries raise on a full disk into a `RunFailure` that names the path.

    safetensors and torch.save have errors of their own, tokenizers raises a plain `Exception`, and
    Python's error does not say which file was being written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Nothing has to be set up."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Replace the error if it is the disk's."""
        if error is not None and _is_of_disk(error):
            raise RunFailure(f"cannot write {self.path}, is the disk full? ({error})") from error


def _is_of_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_FAULTS
    # These are faults of memory, of another rank or of the run, not of the disk.
    others = (torch.OutOfMemoryError, torch.distributed.DistError, RunFailure, RankError)
    if isinstance(error, SafetensorError | RuntimeError) and not isinstance(error, others):
        return not is_out_of_memory(error)
    return type(error) is Exception and "os error" in str(error)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name[len(PREFIX) :])


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def seal(checkpoint: Path, changing: Collection[str] = ()) -> None:
    """Write the list of a checkpoint's files, which makes the checkpoint complete.

    Files whose names are `changing` will be written anew while the checkpoint stands. The list has
    neither size nor checksum for them, but they have to exist and, if they hold tensors, be whole.
    """
    files = {str(path.relative_to(checkpoint)): path for path in _files(checkpoint)}
    listed = {
        name: None if name in changing else [path.stat().st_size, checksum(path)]
        for name, path in files.items()
    }
    write_json(checkpoint / LIST, listed)


def checksum(path: Path) -> str:
    """Return the XXH3 hash (64 bits) of a file's bytes."""
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            state.update(piece)
    return state.hexdigest()


def fault(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from; None if nothing is wrong with it."""
    path = checkpoint / LIST
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        kept = {checkpoint / name: entry for name, entry in listed.items() if entry is not None}
        sizes = {path: int(size) for path, (size, _) in kept.items()}
        changing = [checkpoint / name for name, entry in listed.items() if entry is None]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{LIST}: {error}"
    if TRAINER_STATE not in listed:
        return f"{LIST} has no {TRAINER_STATE}"
    try:
        # All sizes come first: they cost nothing.
        for path, size in sizes.items():
            if path.stat().st_size != size:
                return f"{path.name} has {path.stat().st_size} bytes, {size} were written"
        for path in changing:
            _read_header(path)
        for path, (_, digest) in kept.items():
            if checksum(path) != digest:
                return f"{path.name} was changed after it was written: its checksum differs"
    except (OSError, SafetensorError) as error:
        return f"{path.name}: {error}"
    return None


def latest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint that is not damaged; None if the run has no checkpoint.

    A warning names each damaged one that is passed over.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    reasons: dict[Path, str] = {}
    for checkpoint in list_checkpoints(run):
        reason = fault(checkpoint)
        if reason is None:
            for passed, why in reasons.items():
                logger.warning("%s is damaged (%s); trying the one before it", passed, why)
            return checkpoint
        reasons[checkpoint] = reason
    if reasons:
        named = "; ".join(f"{path.name}: {reason}" for path, reason in reasons.items())
        raise ValueError(
            f"resume: expected a whole checkpoint in {run}, got only damaged ones ({named}); "
            "delete them to begin again at step 1, or start a new run in another folder"
        )
    return None


def refuse_damaged(checkpoint: Path) -> None:
    """Check a checkpoint that the user named; one of another program has no list of files.

    Raises:
        ValueError: there is none, or a file of it is not what was written.
    """
    if not checkpoint.is_dir():
        raise ValueError(f"resume_from_checkpoint: expected a folder, got {str(checkpoint)!r}")
    if (checkpoint / LIST).exists() and (reason := fault(checkpoint)):
        raise ValueError(f"resume_from_checkpoint: {checkpoint} is damaged ({reason})")


def rotate_checkpoints(run: Path, newest: int, limit: int | None, best: str | None) -> None:
    """Delete a run's checkpoints until `limit` are left, those of the lowest steps first.

    The checkpoint of step `newest`, which was just written, and the `best` one stay. Checkpoints of
    later steps are deleted first: this training has not come so far, so they are damaged or left by
    an earlier one.
    """
    if limit is None or limit < 1:
        return
    found = sorted(list_checkpoints(run), key=lambda path: (step_of(path) <= newest, step_of(path)))
    # Names are compared: a resumed run may have the best one's path of another working directory.
    stays = {f"{PREFIX}{newest}"} | ({Path(best).name} if best else set())
    candidates = [path for path in found if path.name not in stays]
    kept = len(found) - len(candidates)
    excess = len(found) - max(limit, kept)
    for checkpoint in candidates[: max(excess, 0)]:
        remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint: it is renamed first, so it never stands there half deleted."""
    doomed = checkpoint.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def remove_checkpoints(run: Path) -> None:
    """Delete all checkpoints of a run, the oldest first."""
    for checkpoint in reversed(list_checkpoints(run)):
        remove_checkpoint(checkpoint)


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != LIST)


def _read_header(path: Path) -> None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            file.keys()
    else:
        path.stat()
