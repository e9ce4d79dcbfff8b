"""Settings shared by the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Two wait for each other up to fifty times as long, where other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _no_worker() -> Iterator[None]:
    """pytest-benchmark measures nothing where its environment says that pytest-xdist is at work."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield
