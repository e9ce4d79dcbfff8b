"""The row kernels are held to PyTorch operations before they are timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_row_chunks import RowKernels
from benchmarks.measure import SuiteError
from benchmarks.records import PAIR_ROWS, SOFT_ROWS


# By the compiled ops, and by the Triton kernels in their interpreter.
@pytest.mark.parametrize("where", ["cpu", pytest.param("triton", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("who", [PAIR_ROWS, SOFT_ROWS])
def test_right_kernels_pass_and_wrong_ones_do_not(
    who: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = RowKernels(8, 300, torch.float32, "cpu")
    assert kernels.ops.__name__.endswith("cpu" if where == "cpu" else "kernels")
    assert kernels.check(who)

    def nothing(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.row_weight, kernels.pair_weight

    monkeypatch.setattr(kernels, "pair_rows", nothing)
    monkeypatch.setattr(kernels, "soft_rows", lambda: kernels.row_weight)
    with pytest.raises(SuiteError, match=who):
        kernels.check(who)
