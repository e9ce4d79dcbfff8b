"""What to do where memory does not suffice, in place of the allocator's own words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size


@contextlib.contextmanager
def advising(*ways: str) -> Iterator[None]:
    """Turn what an allocator raises inside into one message that names ``ways`` out.

    Raises:
        MemoryError: memory did not suffice, of the device or of the host.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or "the host has no more"
        raise MemoryError(f"out of memory: {reason}; what helps: {'; '.join(ways)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory did not suffice, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # CUDA's own libraries, of which accelerate knows but some.
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "not enough memory")
    known = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return known or (isinstance(error, Exception) and should_reduce_batch_size(error))
