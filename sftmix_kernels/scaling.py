"""One Triton kernel that copies rows: gathered, times a factor, in another dtype.

It takes ignored rows out of hidden states on their way to a product, and brings gradients to what
backward hands out. Bytes moved: what is read and written, once.

Legend: R rows read, K rows written, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import load_float32

# A tile is 16-byte accesses of every thread of 4 warps, four each in half precision. PyTorch's own
# product across dtypes takes numbers one by one: a predicted 1.2 to 1.6 ms where the 3.15 GB of a
# float32 dW that becomes bfloat16 take 0.73 (V = 128,256, D = 4096). Not measured on a GPU yet.
ROWS, COLUMNS, NUM_WARPS = 8, 512, 4
# Programs that go from tile to tile: about eight on each SM. As many as there are tiles would take
# longer to begin than to find that there is nothing to do.
PROGRAMS = 1024


@triton.jit
def scaled_rows_kernel(
    source_ptr,  # (R, D)
    stride,
    rows_ptr,  # (K,) int64, or None for all in their order
    weight_ptr,  # (K,) float32, or None; a row of weight 0 becomes 0, whatever it holds
    factor_ptr,  # (K,) or () float32, or None for 1
    factor_stride,
    out_ptr,  # (K, D), perhaps the source itself
    num_rows,
    num_columns,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ``out[k] = factor[k] * source[rows[k]]``, tile after tile."""
    across = tl.cdiv(num_columns, COLUMNS)
    num_tiles = tl.cdiv(num_rows, ROWS) * across
    if IN_PLACE:
        # Where the factor is 1 there is nothing to do.
        num_tiles = tl.where(tl.load(factor_ptr) == 1.0, 0, num_tiles)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = tile // across * ROWS + tl.arange(0, ROWS)
        column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        exists, inside = row < num_rows, (column < num_columns)[None, :]
        reads, from_row = exists, row.to(tl.int64)
        if rows_ptr is not None:
            from_row = tl.load(rows_ptr + row, mask=exists, other=0)
        if weight_ptr is not None:
            reads = tl.load(weight_ptr + row, mask=exists, other=0.0) != 0.0
        source = source_ptr + from_row[:, None] * stride + column[None, :]
        value = load_float32(source, mask=reads[:, None] & inside, other=0.0)
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + row * factor_stride, mask=exists, other=0.0)
            value = value * factor[:, None]
        out = out_ptr + row.to(tl.int64)[:, None] * num_columns + column[None, :]
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside)


def scaled_rows(
    source: Tensor,  # (R, D)
    factor: Tensor | None = None,  # () or (K, 1) float32
    *,
    out: Tensor,  # (K, D)
    rows: Tensor | None = None,  # (K,) int64
    weight: Tensor | None = None,  # (K,) float32
) -> Tensor:
    """Write ``factor * source[rows]`` into ``out``, rounded once; 0 where the weight is 0.

    ``out`` may be the source itself, for a factor of one number.
    """
    assert out.is_contiguous()
    source = source if source.stride(-1) == 1 else source.contiguous()
    num_rows, num_columns = out.shape
    num_tiles = triton.cdiv(num_rows, ROWS) * triton.cdiv(num_columns, COLUMNS)
    if num_tiles:
        with torch.cuda.device_of(out):
            scaled_rows_kernel[(min(num_tiles, PROGRAMS),)](
                source,
                source.stride(0),
                rows,
                weight,
                factor,
                0 if factor is None or factor.numel() == 1 else factor.stride(0),
                out,
                num_rows,
                num_columns,
                IN_PLACE=out.data_ptr() == source.data_ptr(),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                num_warps=NUM_WARPS,
            )
    return out
