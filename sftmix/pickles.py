"""No code from a run's folder: a checkpoint's pickles are looked at before anything loads them.

Trainer loads its own `*.pt`, `*.pth` and `*.bin` with `torch.load(weights_only=True)`, which builds
tensors and plain values alone. The sharded checkpoints of FSDP are read by
`torch.distributed.checkpoint`, which unpickles its index and all that is no tensor without limits.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

TORCH_FILES = (".pt", ".pth", ".bin")
INDEX = ".metadata"
# What the index of a sharded checkpoint is made of.
_METADATA = "torch.distributed.checkpoint.metadata"
INDEX_CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


def refuse_code(checkpoint: Path) -> None:
    """Look through every file of a checkpoint that resuming may unpickle; nothing is executed.

    ``training_args.bin`` is left alone: Trainer writes it and never reads it.

    Raises:
        ValueError: a file holds more than tensors and plain values, or cannot be read as either.
    """
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.name == INDEX:
                _check_shards(path)
            elif path.suffix in TORCH_FILES and path.name != TRAINING_ARGS_NAME:
                _check(path)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"resume: {path} holds more than tensors and plain values, and loading it could "
                f"run code: refused ({_reason(error)})"
            ) from error


def _check(file: Path | io.BytesIO) -> None:
    # Mapped, a file's tensors are not read. NumPy's and Python's random states are plain values.
    with safe_globals():
        torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path))


def _check_shards(index: Path) -> None:
    with index.open("rb") as file:
        metadata = _IndexUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"an index of {type(metadata).__name__}")
    kinds = metadata.state_dict_metadata
    for key, place in (metadata.storage_data or {}).items():
        if not isinstance(kinds.get(key.fqn), BytesStorageMetadata):
            continue
        if place.transform_descriptors:
            raise pickle.UnpicklingError(f"{key.fqn} is encoded")
        with (index.parent / place.relative_path).open("rb") as shard:
            shard.seek(place.offset)
            _check(io.BytesIO(shard.read(place.length)))


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in INDEX_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _reason(error: Exception) -> str:
    """The sentence of torch's page-long message that names what was found."""
    text = str(error)
    start = max(text.find("Unsupported "), text.find("WeightsUnpickler error: "), 0)
    return text[start:].split("\n")[0].split(" was not an allowed")[0]
