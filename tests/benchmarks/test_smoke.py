"""A smoke suite on pytest-benchmark: our losses at a tiny size, in one table.

pytest -n 0 tests/benchmarks/test_smoke.py --benchmark-sort=name
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_loss import OURS, step
from benchmarks.inputs import make_inputs
from benchmarks.records import TASKS


@pytest.mark.parametrize("task", TASKS)
def test_forward_and_backward(task: str, benchmark: BenchmarkFixture) -> None:
    x = make_inputs(64, 32, 1003)
    loss, of_hidden, _ = benchmark.pedantic(step, (OURS[task], x), rounds=5, warmup_rounds=1)
    assert loss.isfinite()
    assert of_hidden.any()
