"""Whole ops through compiled PTX: loss and gradients of both schedules, by the error budget.

Between the kernels stands PyTorch, whose products on a GPU are cuBLAS: the executor says nothing
of those.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftmix_kernels.schedules import Schedule
from sftmix_kernels.vocab_tiles.backward import add_live_product_

from ..budget import HEADS, check, head_inputs, some_labels
from ..conftest import ROW_CHUNKS, VOCAB_TILES
from ..kernel_cases import (
    confident_tokens_in_budget,
    cross_entropy_in_budget,
    mixup_in_budget,
    sftmix_in_budget,
)
from ..test_mixup_loss import NAMES, assert_mixup_in_budget, pair_labels
from ..test_sftmix_loss import assert_sftmix_in_budget, random_pairs
from ..vocab_tiles import test_vocab_tiles
from .conftest import Executor

pytestmark = pytest.mark.ptx

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN, BIASED, SCALED, CAPPED, EVERYTHING = HEADS

# Weights before the rows, and gradients handed out after them.
AROUND = {"label_terms_kernel", "scaled_rows_kernel"}
AROUND_PAIRS = AROUND | {"pair_terms_kernel"}
ROWS = {"pair_rows_kernel", "soft_rows_kernel"}
PAIR_TILES = {"pair_lse_kernel", "pair_combine_kernel", "pair_gradient_kernel"}
SOFT_TILES = {"soft_lse_kernel", "soft_combine_kernel", "soft_gradient_kernel"}

# Each dtype with few options and with many, for each kernel of tiles.
TILE_CASES = [(BF16, PLAIN), (BF16, EVERYTHING), (FP16, BIASED), (FP32, CAPPED)]


@pytest.mark.parametrize(("dtype", "head"), TILE_CASES)
def test_sftmix_by_tiles(executed: Executor, dtype: torch.dtype, head: dict[str, Any]) -> None:
    with executed() as run:
        sftmix_in_budget("cpu", dtype, head, VOCAB_TILES)
    assert set(run.kernels) == PAIR_TILES | AROUND_PAIRS


@pytest.mark.parametrize(("dtype", "head"), [(BF16, SCALED), (FP16, EVERYTHING), (FP32, PLAIN)])
def test_cross_entropy_by_tiles(
    executed: Executor, dtype: torch.dtype, head: dict[str, Any]
) -> None:
    with executed() as run:
        cross_entropy_in_budget("cpu", dtype, head, VOCAB_TILES)
    assert set(run.kernels) == SOFT_TILES | AROUND


@pytest.mark.parametrize(("dtype", "head"), [(BF16, EVERYTHING), (FP16, CAPPED), (FP32, BIASED)])
def test_mixup_by_tiles(executed: Executor, dtype: torch.dtype, head: dict[str, Any]) -> None:
    with executed() as run:
        mixup_in_budget("cpu", dtype, head, VOCAB_TILES)
    assert set(run.kernels) == SOFT_TILES | AROUND | {"mixed_rows_kernel"}


@pytest.mark.parametrize(("dtype", "head"), [(BF16, EVERYTHING), (FP32, PLAIN)])
def test_sftmix_by_chunks(executed: Executor, dtype: torch.dtype, head: dict[str, Any]) -> None:
    with executed() as run:
        sftmix_in_budget("cpu", dtype, head, ROW_CHUNKS)
    assert set(run.kernels) == ROWS | AROUND_PAIRS


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_mixup_by_chunks(executed: Executor, dtype: torch.dtype) -> None:
    with executed() as run:
        mixup_in_budget("cpu", dtype, BIASED, ROW_CHUNKS)
    assert set(run.kernels) == AROUND | {"mixed_rows_kernel", "soft_rows_kernel"}


@pytest.mark.parametrize("schedule", [ROW_CHUNKS, VOCAB_TILES], ids=["row_chunks", "vocab_tiles"])
@pytest.mark.parametrize("shape", [(35, 65, 700), (18, 1, 1), (131, 40, 130)])
def test_ragged_shapes(executed: Executor, schedule: Schedule, shape: tuple[int, int, int]) -> None:
    """Rows, hidden size and vocabulary that no block divides; the last label in the last block."""
    rows, size, vocab_size = shape
    tensors = head_inputs((rows, size), vocab_size, BF16)
    labels = some_labels((rows,), vocab_size, ignored=0.1)
    labels[-1] = vocab_size - 1
    plan = {**random_pairs(rows, rows // 3), "lam": 0.3}
    with executed():
        assert_sftmix_in_budget(tensors, labels, plan, schedule=schedule)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_share_of_nothing_by_tiles(executed: Executor, lam: float) -> None:
    tensors = head_inputs((5, 7, 64), 300, BF16, names=NAMES)
    with executed():
        assert_mixup_in_budget(tensors, pair_labels((5, 7), 300, 0.1), lam, schedule=VOCAB_TILES)


@pytest.mark.parametrize("schedule", [ROW_CHUNKS, VOCAB_TILES], ids=["row_chunks", "vocab_tiles"])
def test_confident_tokens_and_equal_labels(executed: Executor, schedule: Schedule) -> None:
    with executed():
        confident_tokens_in_budget("cpu", schedule)


def test_the_filter(executed: Executor) -> None:
    """By the live product, in float32."""
    with executed() as run:
        test_vocab_tiles.test_backward_leaves_out_the_tiles_below_the_filter_and_no_other("cpu")
    assert set(run.kernels) == SOFT_TILES | AROUND | {"live_product_kernel"}


@pytest.mark.parametrize("transposed", [False, True], ids=["dH", "dW"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_live_product(executed: Executor, dtype: torch.dtype, transposed: bool) -> None:
    """Both forms, whose operands lie in memory one way and the other, over live blocks alone."""
    rows, depth, columns = 250, 200, 136
    left = torch.randn(depth, rows).t() if transposed else torch.randn(rows, depth)
    left, right = left.to(dtype), torch.randn(depth, columns).to(dtype)
    live = torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)
    before, total = torch.randn(rows, columns), torch.empty(rows, columns)
    total.copy_(before)
    with executed() as run:
        add_live_product_(total, left, right, live, 128, 128, overwrite=False)
        overwritten = torch.full((rows, columns), torch.nan)
        add_live_product_(overwritten, left, right, live, 128, 128, overwrite=True)
    assert set(run.kernels) == {"live_product_kernel"}
    counts = live.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :depth]
    exact = (left.double() * counts) @ right.double()
    plain = (left.float() * counts) @ right.float()
    check("overwritten", overwritten, exact, plain - exact)
    check("total", total, before + exact, before + plain - (before + exact))
