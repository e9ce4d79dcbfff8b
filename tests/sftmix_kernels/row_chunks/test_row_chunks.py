"""The proof of the ``row_chunks`` kernels: losses and gradients against dense PyTorch in float64.

The three losses are held to the error budget, for every dtype and option of the head: the root
mean square error is at most twice that of dense PyTorch (`sftmix_kernels/reference.py`) in the same
dtype, plus one rounding (`sftmix_kernels/budget.py`). `test_rows.py` holds `pair_rows_` and
`soft_rows_` to it on raw logits; here come large offsets, and `mixed_rows`.
A GPU runs all dtypes; the interpreter, without one, runs float16, and float32 for one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from sftmix_kernels.mixup_loss import mixup_rows
from sftmix_kernels.row_chunks.kernels import pair_rows_, soft_rows_
from sftmix_kernels.row_chunks.mixing import mixed_rows
from sftmix_kernels.sftmix_loss import sftmix_rows

from ..budget import check
from ..conftest import DTYPES, ROW_CHUNKS
from ..kernel_cases import (
    RAGGED,
    confident_tokens_in_budget,
    cross_entropy_in_budget,
    every_case,
    mixup_in_budget,
    other_upstreams_in_budget,
    ragged_in_budget,
    sftmix_in_budget,
)
from .row_cases import (
    INF,
    NAN,
    PLAIN,
    Found,
    amid_nan,
    as_rows,
    assert_same_bits,
    run_pairs,
    run_rows,
    shares,
    some_pairs,
)


@every_case((torch.float16,))
def test_cross_entropy_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    cross_entropy_in_budget(device, dtype, head, ROW_CHUNKS)


@every_case((torch.float16,))
def test_mixup_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    mixup_in_budget(device, dtype, head, ROW_CHUNKS)


@every_case(DTYPES["cpu"])
def test_sftmix_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    sftmix_in_budget(device, dtype, head, ROW_CHUNKS)


@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_shapes_in_budget(device: str, shape: tuple[int, int, int]) -> None:
    ragged_in_budget(device, shape, ROW_CHUNKS)


def test_upstream_gradients_not_uniform_in_budget(device: str) -> None:
    other_upstreams_in_budget(device, ROW_CHUNKS)


def test_confident_tokens_and_equal_labels_in_budget(device: str) -> None:
    confident_tokens_in_budget(device, ROW_CHUNKS)


@pytest.fixture
def _overflow_asserts() -> Iterator[None]:
    """The interpreter's own switch; without it int32 arithmetic wraps as on a GPU."""
    options = interpreter.interpreter_builder.options
    before = options.debug
    object.__setattr__(options, "debug", True)
    yield
    object.__setattr__(options, "debug", before)


def far_apart(rows: Tensor, device: str) -> Tensor:
    """The rows 2^30 + 8 elements apart: the third begins past 2^31. What is never touched takes no
    memory on the CPU. No multiple of 16, like the rows amid NaN: a GPU sums both in one order."""
    stride = 2**30 + 8
    buffer = torch.empty((rows.shape[0] - 1) * stride + 4096, dtype=rows.dtype, device=device)
    return buffer.as_strided(tuple(rows.shape), (stride, 1)).copy_(rows)


@pytest.mark.usefixtures("_overflow_asserts")
def test_offsets_past_int32(device: str) -> None:
    pairs = some_pairs(2, 123, torch.float16)
    rows = as_rows(pairs)
    labels, row_weight = pairs.labels.to(device), pairs.row_weight.to(device)
    logits = far_apart(pairs.logits, device)
    ntp, mixup = pair_rows_(
        logits, labels, row_weight, *(t.to(device) for t in pairs[3:]), PLAIN, True
    )
    found = Found(ntp.cpu(), mixup.cpu(), logits.cpu())
    assert_same_bits(found, run_pairs(pairs, PLAIN, device))
    logits.copy_(rows.logits)
    loss = soft_rows_(logits, labels.unsqueeze(-1), None, row_weight, PLAIN, True)
    found = Found(loss.cpu(), torch.empty(0), logits.cpu())
    assert_same_bits(found, run_rows(rows, PLAIN, device))


@pytest.mark.usefixtures("_overflow_asserts")
def test_offsets_of_hidden_states_past_int32(device: str) -> None:
    first, second = torch.randn(4, 33).half(), torch.randn(4, 33).half().to(device)
    rows, ones = torch.tensor([3, 0]).to(device), torch.ones(4, device=device)
    share = shares(torch.rand(4)).to(device)
    expected = mixed_rows(first.to(device), second, share, rows, ones)
    assert torch.equal(mixed_rows(far_apart(first, device), second, share, rows, ones), expected)


@pytest.mark.parametrize("size", [1, 1024, 1030])
def test_mixed_rows_of_every_dtype(device_and_dtype: tuple[str, torch.dtype], size: int) -> None:
    """Some rows in some order; one of weight 0 is exactly 0 whatever it holds."""
    device, dtype = device_and_dtype
    first, second = torch.randn(2, 9, size).to(dtype)
    weight, share = torch.ones(9), shares(torch.rand(9))
    rows = torch.tensor([8, 3, 0, 5])
    weight[3], first[3], second[0] = 0.0, NAN, INF
    weight[0] = 0.0
    found = mixed_rows(
        amid_nan(first, device, columns=5),
        amid_nan(second, device, columns=3),
        amid_nan(share, device),
        rows.to(device),
        amid_nan(weight, device),
    ).cpu()

    def mixed(first: Tensor, second: Tensor) -> Tensor:
        share_1, share_2 = share.to(first.dtype)[[8, 5]].tensor_split(2, dim=-1)
        return share_1 * first[[8, 5]] + share_2 * second[[8, 5]]

    assert not found[[1, 2]].any()
    truth = mixed(first.double(), second.double())
    plain = mixed(first.float(), second.float()).to(dtype)
    check("mixed", found[[0, 3]], truth, plain.double() - truth)


def test_opcheck(device: str) -> None:
    """Nothing given is written to, and what comes back is what the fake ops say."""
    utils = ("test_schema", "test_faketensor")
    hidden, weight, bias = (torch.randn(size, device=device) for size in ((5, 8), (50, 8), (50,)))
    labels, ones = torch.arange(5, device=device), torch.ones(5, device=device)
    ones[2] = 0.0
    share, rest = shares(torch.rand(5)).to(device), (1.5, 3.0, 16, [True, True, True])
    targets = torch.stack((labels, labels.flip(0)), -1)
    torch.library.opcheck(
        mixup_rows,
        (hidden, hidden + 1, weight, bias, targets, share, ones, *rest),
        test_utils=utils,
    )
    pairs = (labels[:2], labels[2:4], 1.0 - ones[2:4], share[:2], labels[4:])
    rest = (torch.tensor(0.2, device=device), *rest)
    torch.library.opcheck(
        sftmix_rows, (hidden, weight, bias, labels, ones, *pairs, *rest), test_utils=utils
    )
