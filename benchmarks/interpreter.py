"""Triton's interpreter, made to hold memory as a GPU does."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np


@contextlib.contextmanager
def tidy_launches() -> Iterator[None]:
    """Each launch of a kernel leaves nothing behind.

    The interpreter leaves a launch's tensors in a cycle of references; a GPU holds none. Frozen,
    all older objects need not be searched for cycles after every launch.
    """
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_and_collect(self: GridExecutor, *arguments: object, **options: object) -> None:
        launch(self, *arguments, **options)
        gc.collect()

    gc.collect()
    gc.freeze()
    # It computes with NumPy, which warns of infinity; a GPU does not.
    try:
        with patch.object(GridExecutor, "__call__", launch_and_collect), np.errstate(all="ignore"):
            yield
    finally:
        gc.unfreeze()
