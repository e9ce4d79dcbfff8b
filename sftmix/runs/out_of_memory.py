"""Say what to do when memory does not suffice, instead of showing the allocator's message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size

# What helps if not even the model fits.
MODEL_WAYS = (
    "--dtype bfloat16",
    "--lora_rank 16 with a larger --learning_rate",
    "more GPUs with --fsdp",
    "`sftmix plan` says what fits",
)
# What helps if a model only answers.
ANSWERING_WAYS = ("a smaller --batch_size", "--dtype bfloat16")


class OutOfMemory(MemoryError):
    """Memory did not suffice; the message says what helps."""


@contextlib.contextmanager
def advising(*ways: str) -> Iterator[None]:
    """Turn an allocator's error into one message that lists `ways` out.

    This is also a decorator. If one is inside another, the inner one's message stays.

    Raises:
        OutOfMemory: memory did not suffice, of the device or of the host.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or "the host has no more"
        raise OutOfMemory(f"out of memory: {reason}; what helps: {'; '.join(ways)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory did not suffice, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # accelerate knows only some of the messages of CUDA's own libraries.
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "not enough memory")
    known = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return known or (isinstance(error, Exception) and should_reduce_batch_size(error))
