"""Where the Triton kernels are tested: in Triton's interpreter on the CPU, and on a CUDA device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sftmix_kernels import RowChunks, VocabTiles

from .bounds import checked_bounds

# Triton exists only on Linux; the package works without it.
NEEDS_TRITON = [
    "ptx",
    "row_chunks/test_row_chunks.py",
    "vocab_tiles",
    "test_both_schedules.py",
    "test_compile.py",
]
collect_ignore = [] if importlib.util.find_spec("triton") else NEEDS_TRITON

INTERPRETER = pytest.param("cpu", marks=pytest.mark.interpret)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# The interpreter truncates float32 where it stores bfloat16, so that there bfloat16 says nothing.
DTYPES = {
    "cpu": (torch.float32, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

# Small ones: several chunks, and several groups of rows and of tiles.
ROW_CHUNKS, VOCAB_TILES = RowChunks(rows=32), VocabTiles(max_bytes=2**15)
SCHEDULES = [
    pytest.param(ROW_CHUNKS, id="row_chunks"),
    pytest.param(VOCAB_TILES, id="vocab_tiles"),
]


@pytest.fixture(params=[INTERPRETER, CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[
        pytest.param((place.values[0], dtype), marks=place.marks, id=f"{place.values[0]}-{dtype}")
        for place in (INTERPRETER, CUDA)
        for dtype in DTYPES[str(place.values[0])]
    ]
)
def device_and_dtype(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def _silent_infinities() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of NaN and infinity; a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _bounds() -> Iterator[None]:
    """In the interpreter, what a kernel reads or writes outside of its tensors is an error."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    with checked_bounds():
        yield
