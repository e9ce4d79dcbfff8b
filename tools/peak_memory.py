"""Measure the memory that tensors hold at once, for tests and benchmarks."""

from __future__ import annotations

import bisect
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import numpy as np
import torch

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def peak_extra_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Return the highest sum of tensor bytes alive at once that ``step`` allocated.

    Its results are included, and every allocation of PyTorch's allocator, inside of registered ops
    too. On the CPU, scratch memory that a BLAS library takes for itself is not counted, for any
    provider, whether by an allocator of its own, as MKL, or by PyTorch's, as oneDNN's products in
    bfloat16 do; on CUDA it is PyTorch's, made once, in the warm-up here.
    """
    # What is garbage already must not be freed, and so subtracted, while the step is measured.
    gc.collect()
    if device != "cpu":
        return peak_extra_cuda_bytes(step)
    # Not `torch.profiler.profile`, which makes Python objects of all events: most of its time.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = step()
    del kept
    results = profile.kineto_results
    assert results is not None
    events = results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    products = sorted((e.start_ns(), e.end_ns()) for e in events if e.name() in PRODUCTS)
    alive = peak = 0
    for _, change in without_scratch(changes, products):
        alive += change
        peak = max(peak, alive)
    return peak


def without_scratch(
    changes: Sequence[tuple[int, int]],  # when, and bytes; in the order of time
    products: Sequence[tuple[int, int]],  # begin and end of each matrix product, likewise
) -> list[tuple[int, int]]:
    """Return the changes of memory without what a matrix product takes and gives back itself."""
    found: list[tuple[int, int]] = []
    for when, change in changes:
        at = bisect.bisect_right(products, (when, sys.maxsize)) - 1
        if change < 0 and at >= 0 and when <= products[at][1]:
            first = bisect.bisect_left(found, (products[at][0], -sys.maxsize))
            taken = [place for place in range(first, len(found)) if found[place][1] == -change]
            if taken:
                del found[taken[-1]]
                continue
        found.append((when, change))
    return found


def peak_extra_cuda_bytes(step: Callable[[], object]) -> int:
    """Return `peak_extra_bytes` by the caching allocator's own count, in the step's second run."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def tidy_launches() -> Iterator[None]:
    """Make Triton's interpreter hold memory as a GPU does: a launch leaves nothing behind.

    The interpreter leaves a launch's tensors in a cycle of references; a GPU holds none. Frozen,
    all older objects need not be searched for cycles after every launch; they stay frozen.
    """
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_and_collect(self: GridExecutor, *arguments: object, **options: object) -> None:
        launch(self, *arguments, **options)
        gc.collect()

    gc.collect()
    gc.freeze()
    # It computes with NumPy, which warns of infinity; a GPU does not.
    with patch.object(GridExecutor, "__call__", launch_and_collect), np.errstate(all="ignore"):
        yield
