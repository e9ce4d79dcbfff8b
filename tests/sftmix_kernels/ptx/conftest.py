"""Where the executor is compiled, and what Triton compiles is kept: pytest's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from .executor import compiler
from .launch import Run, on_executor

Executor = Callable[..., AbstractContextManager[Run]]


@pytest.fixture(scope="session")
def folder(pytestconfig: pytest.Config) -> Path:
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("ptx")


@pytest.fixture
def accused(folder: Path) -> Executor:
    """`on_executor`, with findings to look at."""
    return partial(on_executor, folder)


@pytest.fixture
def executed(folder: Path) -> Executor:
    """`on_executor`, without a finding."""

    @contextmanager
    def run(seed: int = 0) -> Iterator[Run]:
        with on_executor(folder, seed=seed) as found:
            yield found
        # What ptxas mends: Triton writes the next left operand of `soft_tile` a little too early.
        assert [one for one in found.findings if one.kind != "overwritten"] == []

    return run
