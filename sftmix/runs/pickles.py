"""Run no code from a run's folder: check a checkpoint's pickles before anything loads them.

Trainer loads its own `*.pt`, `*.pth` and `*.bin` files with `torch.load(weights_only=True)`, which
builds only tensors and plain values; this module reads them the same way first.
`torch.distributed.checkpoint` unpickles FSDP's sharded checkpoints without limits, so
`training.parallelism.check_parallelism` refuses those.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

TORCH_FILES = (".pt", ".pth", ".bin")


def refuse_code(checkpoint: Path) -> None:
    """Check every file of a checkpoint that resuming may unpickle; execute nothing.

    `training_args.bin` is not checked: Trainer writes it and never reads it.

    Raises:
        ValueError: a file holds more than tensors and plain values, or cannot be read as either.
    """
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix in TORCH_FILES and path.name != TRAINING_ARGS_NAME:
                _check(path)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"resume: {path} holds more than tensors and plain values, and loading it could "
                f"run code: refused ({_reason(error)})"
            ) from error


def _check(path: Path) -> None:
    # Mapped, a file's tensors are not read. NumPy's and Python's random states are plain values.
    with safe_globals():
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _reason(error: Exception) -> str:
    """Return the sentence of torch's page-long message that names what it found."""
    text = str(error)
    start = max(text.find("Unsupported "), text.find("WeightsUnpickler error: "), 0)
    return text[start:].split("\n")[0].split(" was not an allowed")[0]
