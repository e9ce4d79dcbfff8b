"""No code from a run's folder: a checkpoint's pickles are looked at before anything loads them.

Trainer loads its own `*.pt`, `*.pth` and `*.bin` with `torch.load(weights_only=True)`, which builds
tensors and plain values alone; here they are read so first. The sharded checkpoints of FSDP, which
`torch.distributed.checkpoint` unpickles without limits, are refused by `ranks.check_parallelism`.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

TORCH_FILES = (".pt", ".pth", ".bin")


def refuse_code(checkpoint: Path) -> None:
    """Look through every file of a checkpoint that resuming may unpickle; nothing is executed.

    ``training_args.bin`` is left alone: Trainer writes it and never reads it.

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
    """The sentence of torch's page-long message that names what was found."""
    text = str(error)
    start = max(text.find("Unsupported "), text.find("WeightsUnpickler error: "), 0)
    return text[start:].split("\n")[0].split(" was not an allowed")[0]
