"""The kernel that interpolates hidden states for Mixup alone, before they are projected.

Legend: R rows of hidden, K rows of one chunk, D hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import load_float32, mixed_hidden


@triton.jit
def mixed_rows_kernel(
    first_ptr,  # (R, D)
    second_ptr,  # (R, D)
    rows_ptr,  # (K,) int64
    share_ptr,  # (R, 2) float32
    weight_ptr,  # (R,) float32
    mixed_ptr,  # (K, D)
    hidden_size,
    BLOCK: tl.constexpr,
):
    """Interpolate two rows of hidden states: one program for each row and block."""
    row = tl.load(rows_ptr + tl.program_id(0))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # A row of weight 0 has no columns to read: what it holds, perhaps NaN, must not reach dW.
    counts = column < tl.where(tl.load(weight_ptr + row) == 0.0, 0, hidden_size)
    first = load_float32(first_ptr + row * hidden_size + column, mask=counts, other=0.0)
    second = load_float32(second_ptr + row * hidden_size + column, mask=counts, other=0.0)
    share_1, share_2 = tl.load(share_ptr + 2 * row), tl.load(share_ptr + 2 * row + 1)
    mixed = mixed_hidden(first, second, share_1, share_2)
    mixed = tl.where(counts, mixed, 0.0).to(mixed_ptr.dtype.element_ty)
    out = mixed_ptr + tl.program_id(0).to(tl.int64) * hidden_size + column
    tl.store(out, mixed, mask=column < hidden_size)


def mixed_rows(
    first: Tensor,  # (R, D)
    second: Tensor,  # (R, D)
    share: Tensor,  # (R, 2) float32
    rows: Tensor,  # (K,) int64
    row_weight: Tensor,  # (R,) float32
) -> Tensor:  # (K, D)
    """Return ``share_1 first + share_2 second`` of some rows, rounded once; 0 for weight 0."""
    first, second = first.contiguous(), second.contiguous()
    mixed = first.new_empty(rows.numel(), first.shape[1])
    if mixed.numel():
        with torch.cuda.device_of(mixed):
            mixed_rows_kernel[(rows.numel(), triton.cdiv(first.shape[1], 1024))](
                first,
                second,
                rows,
                share,
                row_weight,
                mixed,
                first.shape[1],
                BLOCK=1024,
                enable_fp_fusion=False,
            )
    return mixed
