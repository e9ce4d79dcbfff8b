"""Settings shared by the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.result_file import Results
from benchmarks.settings import Settings


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Two wait for each other up to fifty times as long, where other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def results() -> Results:
    """Return results of a quick run on the CPU, which are not saved."""
    return Results("any", Settings(quick=True))
