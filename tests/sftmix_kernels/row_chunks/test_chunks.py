"""The pieces the losses share: chunk sizes, cached blocks, row gradients, products."""

from __future__ import annotations

import pytest
import torch

from sftmix_kernels.gradients import add_product_, scaled
from sftmix_kernels.row_chunks.chunks import chunk_sizes
from sftmix_kernels.row_chunks.pytorch import cache_blocks, soft_cross_entropy_
from sftmix_kernels.schedules import FEWEST_ROWS
from sftmix_kernels.transform import LogitTransform


@pytest.mark.parametrize("vocab_size", [123, 32000, 50257, 128256, 400000])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 512])
def test_cached_blocks_cover_all_rows_and_leave_none_alone(vocab_size: int, count: int) -> None:
    blocks = list(cache_blocks(5, 5 + count, torch.empty(0, vocab_size)))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(
        range(5, 5 + count)
    )
    assert all(block.stop - block.start > 1 for block in blocks) or count == 1


@pytest.mark.parametrize("num_rows", [0, 1, 15, 31, 33, 100, 1281, 4097])
@pytest.mark.parametrize("chunk_rows", [16, 128, 1024])
def test_chunks_are_about_equal_and_never_tiny(num_rows: int, chunk_rows: int) -> None:
    sizes = chunk_sizes(num_rows, chunk_rows)
    assert sum(sizes) == num_rows
    assert all(size % 2 == 0 for size in sizes[:-1])
    assert all(size >= min(num_rows, FEWEST_ROWS) for size in sizes)
    assert max(sizes, default=0) - min(sizes, default=0) <= 3
    assert max(sizes, default=0) <= max(chunk_rows, 2 * FEWEST_ROWS + 4)


@pytest.mark.parametrize("gap", [5.0, 14.0, 20.0, 40.0])
def test_gradient_of_a_confident_row_is_exact(gap: float) -> None:
    """``p - 1`` of a token with p up to 1 - 4e-18, to float32's own precision."""
    logits = torch.zeros(2, 9)
    logits[:, 3] = gap
    truth = logits.double().softmax(-1)
    truth[:, 3] = 0.0
    truth[:, 3] = -truth.sum(-1)
    found = logits.clone()
    one = torch.ones(2, 1)
    losses = soft_cross_entropy_(
        found,
        torch.full((2, 1), 3),
        one,
        one[:, 0],
        LogitTransform(1.0, None, has_bias=False),
        True,
    )
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)
    expected = torch.log1p(8 * (-logits[:, 3].double()).exp())
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [torch.tensor(1 / 3), torch.rand(50, 1)])
def test_scaled_rounds_once(dtype: torch.dtype, factor: torch.Tensor) -> None:
    gradient = torch.randn(50, 20).to(dtype)
    exact = (gradient.double() * factor.double()).to(dtype)
    assert torch.equal(scaled(gradient, factor, dtype), exact)


def test_products_add_up_in_float32() -> None:
    """4096 products of 1/256: bfloat16 would stop counting at 2."""
    total = torch.full((2, 2), torch.nan)
    left, right = (torch.full((2, 64), 1 / 16).bfloat16() for _ in range(2))
    for index in range(64):
        add_product_(total, left, right.t(), overwrite=index == 0)
    assert torch.equal(total, torch.full((2, 2), 16.0))
