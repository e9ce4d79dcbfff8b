"""The compiled row kernels against dense PyTorch in float64, by the error budget.

Among the rows of each case are some of weight 0, of lam 0 and 1, with two targets that are one
token, and with targets in the first and the last column.
"""

from __future__ import annotations

import pytest
import torch

from sftmix_kernels.row_chunks.chunks import logits_workspace
from sftmix_kernels.row_chunks.kernels import pair_rows_, soft_rows_
from sftmix_kernels.row_chunks.mixing import mixed_rows
from sftmix_kernels.transform import LogitTransform

from ..budget import check
from ..row_chunks.row_cases import (
    NAN,
    PLAIN,
    Found,
    Pairs,
    Rows,
    assert_in_budget,
    assert_same_bits,
    run_pairs,
    run_rows,
    shares,
    some_pairs,
    some_rows,
)
from .conftest import Executor

pytestmark = pytest.mark.ptx

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING = LogitTransform(1.5, 3.0, has_bias=True)
BIASED, SCALED, CAPPED = LogitTransform(1.0, None, True), PLAIN._replace(scale=0.5), 5.0
COUNT = 9


def pairs_of(vocab_size: int, dtype: torch.dtype) -> Pairs:
    pairs = some_pairs(COUNT, vocab_size, dtype)
    pairs.labels[[3, COUNT + 4]] = vocab_size - 1
    pairs.labels[[5, COUNT + 5]] = 0
    pairs.row_weight[[4, COUNT + 6]] = 0.0
    pairs.pair_weight[7] = 0.0
    return pairs


def rows_of(vocab_size: int, targets: int, dtype: torch.dtype) -> Rows:
    rows = some_rows(COUNT, vocab_size, targets, dtype)
    rows.targets[3] = vocab_size - 1
    rows.targets[4, 0] = 0
    rows.weight[5] = 0.0
    return rows


def padded(logits: torch.Tensor) -> torch.Tensor:
    """A copy in a workspace whose padding is NaN."""
    room = logits_workspace(torch.empty(logits.shape[1], 1, dtype=logits.dtype), len(logits))
    torch.empty(0, dtype=room.dtype).set_(room.untyped_storage()).fill_(NAN)
    return room.copy_(logits)


# Each dtype with and without padding, each option somewhere.
CASES = [
    pytest.param(BF16, PLAIN, 2500, True, id="bf16"),
    pytest.param(BF16, EVERYTHING, 4096, True, id="bf16, everything"),
    pytest.param(BF16, SCALED, 1003, False, id="bf16, scale, odd V"),
    pytest.param(FP16, BIASED, 2500, True, id="fp16, bias"),
    pytest.param(FP16, PLAIN._replace(softcap=CAPPED), 515, False, id="fp16, softcap, odd V"),
    pytest.param(FP32, EVERYTHING, 2500, True, id="fp32, everything"),
    pytest.param(FP32, PLAIN, 1003, False, id="fp32, odd V"),
]


@pytest.mark.parametrize(("dtype", "transform", "vocab_size", "pads"), CASES)
def test_pair_rows(
    executed: Executor,
    dtype: torch.dtype,
    transform: LogitTransform,
    vocab_size: int,
    pads: bool,
) -> None:
    pairs = pairs_of(vocab_size, dtype)
    with executed() as run:
        if pads:
            logits = padded(pairs.logits)
            losses = pair_rows_(logits, *pairs[1:], transform, True)
            found = Found(*losses, logits.clone())
        else:
            found = run_pairs(pairs, transform, "cpu")
    assert run.kernels == ["pair_rows_kernel"]
    assert_in_budget(found, pairs, transform)


@pytest.mark.parametrize(("dtype", "transform", "vocab_size", "pads"), CASES)
def test_soft_rows(
    executed: Executor,
    dtype: torch.dtype,
    transform: LogitTransform,
    vocab_size: int,
    pads: bool,
) -> None:
    """One target without a cap, two with one."""
    rows = rows_of(vocab_size, 1 if transform.softcap is None else 2, dtype)
    with executed() as run:
        if pads:
            logits = padded(rows.logits)
            loss = soft_rows_(logits, *rows[1:], transform, True)
            found = Found(loss, torch.empty(0), logits.clone())
        else:
            found = run_rows(rows, transform, "cpu")
    assert run.kernels == ["soft_rows_kernel"]
    assert_in_budget(found, rows, transform)


def test_losses_without_a_gradient_are_the_same_and_leave_the_logits(executed: Executor) -> None:
    pairs = pairs_of(1003, BF16)
    with executed():
        with_gradient = run_pairs(pairs, SCALED, "cpu")
        found = run_pairs(pairs, SCALED, "cpu", needs_gradient=False)
    assert_same_bits(found, with_gradient._replace(gradient=pairs.logits))


def test_other_turns_of_the_warps_give_the_same_bits(executed: Executor) -> None:
    pairs, found = pairs_of(2500, BF16), []
    for seed in (1, 2):
        with executed(seed):
            logits = padded(pairs.logits)
            losses = pair_rows_(logits, *pairs[1:], PLAIN, True)
        found.append(Found(*losses, logits.clone()))
    assert_same_bits(*found)


def test_a_row_without_weight_may_hold_anything(executed: Executor) -> None:
    pairs = pairs_of(1003, BF16)
    pairs.row_weight[[1, COUNT + 1]] = 0.0
    pairs.pair_weight[1] = 0.0
    pairs.logits[[1, COUNT + 1]] = NAN
    with executed():
        found = run_pairs(pairs, SCALED, "cpu")
    assert found.mixup[1] == 0.0
    for row in (1, COUNT + 1):
        assert found.ntp[row] == 0.0
        assert not found.gradient[row].any()
    assert not found.gradient.isnan().any()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_mixed_rows(executed: Executor, dtype: torch.dtype) -> None:
    first, second = (torch.randn(7, 1100).to(dtype) for _ in range(2))
    share, weight = shares(torch.rand(7)), torch.ones(7)
    first[2], weight[2] = NAN, 0.0
    rows = torch.tensor([6, 2, 0, 3])
    with executed() as run:
        mixed = mixed_rows(first, second, share, rows, weight)
    assert run.kernels == ["mixed_rows_kernel"]
    assert not mixed[1].any()
    kept = rows[[0, 2, 3]]
    plain, exact = (
        share.to(kind)[kept, :1] * first[kept].to(kind)
        + share.to(kind)[kept, 1:] * second[kept].to(kind)
        for kind in (FP32, torch.float64)
    )
    check("mixed", mixed[[0, 2, 3]], exact, plain.to(dtype).double() - exact)
