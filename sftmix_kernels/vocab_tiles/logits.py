"""The prologue that forward and backward of the ``vocab_tiles`` schedule share: a tile's logits.

A tile is a block of rows times a block of the vocabulary; its logits live in registers. `soft_*` is
the one-row form, whose hidden state is interpolated as the operand is loaded; `pair_*` the joint
form, with one accumulator for each row of a pair.

Legend: K rows of one group, T targets of a row (1 or 2), D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import add_dot, load_float32, mixed_hidden
from ..schedules import BLOCK_R, BLOCK_V

NUM_WARPS = 8
# Row blocks that go through the vocabulary together: about as many as there are tiles of the head
# in flight beside them (one or two programs, by their registers, on each of 132 SMs).
GROUP = 16


def tile_columns(dtype: torch.dtype, softcap: float | None) -> int:
    """Return the vocabulary entries of a forward tile.

    128 rows by 256 columns read three quarters of the bytes that two tiles of 128 do, and leave
    their LSEs side by side. A softcap's intermediate numbers do not fit beside so many logits: 744
    bytes a thread spilled (two targets, sm_90, triton 3.6.0). Float32 products take so long that
    what they read does not matter.
    """
    return BLOCK_V if dtype == torch.float32 or softcap is not None else 2 * BLOCK_V


def l2_bytes(
    num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, softcap: float | None
) -> int:
    """Return the bytes of hidden states and head that all forward tiles read, most of them from L2.

    For 8,192 rows, D = 4096 and V = 128,256 in bfloat16 100.9 GB, with tiles of 128 columns 134.5.
    """
    columns = tile_columns(dtype, softcap)
    tiles = -(-num_rows // BLOCK_R) * -(-vocab_size // columns)
    return tiles * (BLOCK_R + columns) * hidden_size * dtype.itemsize


def tile_options(
    hidden: Tensor,  # (..., D)
    columns: int,
    *,
    fuses: bool,
    interpolates: bool = False,
) -> dict[str, int | bool]:
    """Return depth and stages of the operands' pipeline for tiles of some columns.

    It takes at most 96 KiB, which every GPU from sm_80 on has; an interpolated operand takes twice
    its share of them. Float32 products have no tensor cores: they need fused multiply-adds, and the
    registers of twice the warps. Without hidden states there is no depth. Not measured on a GPU.
    """
    full = hidden.dtype == torch.float32
    if full:
        depth, stages, warps = 16 if interpolates else 32, 3, 2 * NUM_WARPS
    else:
        depth, stages, warps = 32 if interpolates else 64, 4 if interpolates else 3, NUM_WARPS
        if columns > BLOCK_V:
            depth, stages = 32, 3 if interpolates else 4
    return {
        "BLOCK_D": depth if hidden.shape[-1] else 0,
        "GROUP": GROUP,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": full or fuses,
    }


@triton.jit
def grouped_tile(num_row_blocks, num_tiles, GROUP: tl.constexpr):
    """Return row block and tile of this program.

    `GROUP` row blocks go through the vocabulary together, so that all but the first of them read a
    tile of the head from L2.
    """
    program = tl.program_id(0)
    in_group = program % (GROUP * num_tiles)
    first = program // (GROUP * num_tiles) * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    return first + in_group % size, in_group // size


@triton.jit
def load_operand(pointer, row, stride, counts, depth, size):
    """Load ``pointer[row, depth]`` in its own dtype, 0 where a row does not count."""
    pointers = pointer + row.to(tl.int64)[:, None] * stride + depth[None, :]
    return tl.load(pointers, mask=counts[:, None] & (depth < size)[None, :], other=0.0)


@triton.jit
def load_bias(bias_ptr, column, vocab_size):
    """Load the bias of some columns, 0 without one."""
    if bias_ptr is None:
        return 0.0
    else:
        return load_float32(bias_ptr + column, mask=column < vocab_size, other=0.0)[None, :]


@triton.jit
def soft_tile(
    group,  # a RowGroup
    stride,  # of both hidden states
    share_1,
    share_2,
    row,
    num_rows,
    head_ptr,  # (V, D)
    head_stride,
    bias_ptr,  # (V,), or None
    column,
    hidden_size,
    vocab_size,
    BLOCK_D: tl.constexpr,
):
    """Return the raw logits of a tile, of interpolated hidden states where there are two."""
    counts = tl.load(group.weight + row, mask=row < num_rows, other=0.0) != 0.0
    logits = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    if BLOCK_D > 0:
        # Without a way past the loop its products need not wait for each other: `ptxas` else runs
        # them one by one (C7515).
        tl.assume(hidden_size > 0)
        for start in range(0, hidden_size, BLOCK_D):
            depth = start + tl.arange(0, BLOCK_D)
            hidden = load_operand(group.hidden_c, row, stride, counts, depth, hidden_size)
            if group.hidden_u is not None:
                second = load_operand(group.hidden_u, row, stride, counts, depth, hidden_size)
                hidden = mixed_hidden(
                    hidden.to(tl.float32), second.to(tl.float32), share_1[:, None], share_2[:, None]
                ).to(group.hidden_c.dtype.element_ty)
            inside = column < vocab_size
            head = load_operand(head_ptr, column, head_stride, inside, depth, hidden_size)
            logits = add_dot(hidden, tl.trans(head), logits)
    return logits + load_bias(bias_ptr, column, vocab_size)


@triton.jit
def pair_tile(
    hidden_ptr,  # (R, D)
    stride,
    group,  # a PairGroup
    pair,
    num_pairs,
    head_ptr,  # (V, D)
    head_stride,
    bias_ptr,  # (V,), or None
    column,
    hidden_size,
    vocab_size,
    BLOCK_D: tl.constexpr,
):
    """Return raw logits of both rows of some pairs; a tile of the head is loaded once for both."""
    inside = pair < num_pairs
    row_c = tl.load(group.rows + pair, mask=inside, other=0)
    row_u = tl.load(group.rows + num_pairs + pair, mask=inside, other=0)
    counts_c = tl.load(group.weights + pair, mask=inside, other=0.0) != 0.0
    counts_u = tl.load(group.weights + num_pairs + pair, mask=inside, other=0.0) != 0.0
    logits_c = tl.zeros((pair.shape[0], column.shape[0]), tl.float32)
    logits_u = tl.zeros((pair.shape[0], column.shape[0]), tl.float32)
    if BLOCK_D > 0:
        tl.assume(hidden_size > 0)  # as in `soft_tile`
        for start in range(0, hidden_size, BLOCK_D):
            depth = start + tl.arange(0, BLOCK_D)
            hidden_c = load_operand(hidden_ptr, row_c, stride, counts_c, depth, hidden_size)
            hidden_u = load_operand(hidden_ptr, row_u, stride, counts_u, depth, hidden_size)
            exists = column < vocab_size
            head = load_operand(head_ptr, column, head_stride, exists, depth, hidden_size)
            logits_c = add_dot(hidden_c, tl.trans(head), logits_c)
            logits_u = add_dot(hidden_u, tl.trans(head), logits_u)
    bias = load_bias(bias_ptr, column, vocab_size)
    return logits_c + bias, logits_u + bias


@triton.jit
def load_targets(targets_ptr, share_ptr, row, num_rows, inside):
    """Load both targets of rows and their shares; without shares the first target has all."""
    target_1 = tl.load(targets_ptr + row, mask=inside, other=0).to(tl.int32)
    if share_ptr is None:
        share_1 = tl.full(row.shape, 1.0, tl.float32)
        return target_1, target_1, share_1, tl.zeros(row.shape, tl.float32)
    else:
        target_2 = tl.load(targets_ptr + num_rows + row, mask=inside, other=0).to(tl.int32)
        share_1 = tl.load(share_ptr + row, mask=inside, other=0.0)
        share_2 = tl.load(share_ptr + num_rows + row, mask=inside, other=0.0)
        return target_1, target_2, share_1, share_2
