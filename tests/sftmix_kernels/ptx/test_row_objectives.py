"""The compiled row kernels with each objective, against dense PyTorch by the error budget."""

from __future__ import annotations

import pytest
import torch

from sftmix_kernels.transform import LogitTransform

from ..row_chunks import test_row_objectives
from ..row_chunks.row_cases import PLAIN
from ..row_chunks.test_row_objectives import OBJECTIVES, assert_in_budget, run, some_rows
from .conftest import Executor

pytestmark = pytest.mark.ptx

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING = LogitTransform(1.5, 3.0, has_bias=False)
COUNT = 7

# Each in bfloat16; those with sums of their own, or tensors, in each dtype and with each option.
CASES = [pytest.param(BF16, PLAIN, 1003, name, id=f"bf16, {name}") for name in OBJECTIVES]
CASES += [
    pytest.param(dtype, transform, vocab_size, name, id=f"{says}, {name}")
    for dtype, transform, vocab_size, says in (
        (FP16, PLAIN, 2500, "fp16"),
        (FP32, EVERYTHING, 515, "fp32, everything"),
    )
    for name in ("power", "eaft", "psft", "smoothed", "gem")
]


@pytest.mark.parametrize(("dtype", "transform", "vocab_size", "name"), CASES)
def test_soft_rows(
    executed: Executor, dtype: torch.dtype, transform: LogitTransform, vocab_size: int, name: str
) -> None:
    """With stats; among the rows is one of which the label is all but certain."""
    rows, options = some_rows(COUNT, vocab_size, dtype), OBJECTIVES[name]
    rows.labels[1] = vocab_size - 1
    with executed() as ran:
        found = run(rows, options, transform, "cpu")
    assert ran.kernels == ["soft_rows_kernel"]
    assert_in_budget(found, rows, options, transform)


@pytest.mark.parametrize("name", ["dft", "eaft", "psft"])
def test_pair_rows(executed: Executor, name: str) -> None:
    with executed() as ran:
        test_row_objectives.test_a_pair_of_weight_zero_is_bitwise_two_rows_of_the_gate("cpu", name)
    assert set(ran.kernels) == {"soft_rows_kernel", "pair_rows_kernel"}
