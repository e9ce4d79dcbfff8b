"""Backward kernels of the ``vocab_tiles`` schedule.

`soft_gradient_kernel` and `pair_gradient_kernel` compute a tile's logits again and write its
gradient, for some tiles of the vocabulary at a time; `live_product_kernel` makes ``dH`` and ``dW``
of them, leaving out what the filter found dead. Without a filter vendor GEMMs do that.

Legend: K rows of one group, P pairs of one group, T targets of a row (1 or 2), D hidden size,
V vocabulary, C columns of the tiles at hand, B tiles of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import add_dot, held_targets, mixed_logits, row_gradient, weighted
from ..schedules import BLOCK_P, BLOCK_R, BLOCK_V
from ..transform import LogitTransform
from .groups import PairGroup, RowGroup
from .logits import grouped_tile, load_operand, load_targets, pair_tile, soft_tile, tile_options

# Columns of a program of the live product.
BLOCK_N = 128

# Numbers that change from call to call; each kind of them would be compiled anew.
PLACE = ["first_tile", "num_tiles"]


@triton.jit(do_not_specialize=PLACE)
def soft_gradient_kernel(
    group,  # a RowGroup
    stride,  # of both hidden states
    head_ptr,  # (V, D)
    head_stride,
    bias_ptr,  # (V,), or None
    state_ptr,  # (4, K) float32
    live_ptr,  # (row blocks, B) uint8, or None without a filter
    gradient_ptr,  # (K, C)
    num_rows,
    hidden_size,
    vocab_size,
    first_tile,
    num_tiles,  # of these C columns
    logit_scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the gradient of one tile of rows, or zeros where the tile is dead."""
    row_block, local = grouped_tile(tl.cdiv(num_rows, BLOCK_R), num_tiles, GROUP)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (first_tile + local) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = row < num_rows
    gradient = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    live = True
    if live_ptr is not None:
        live = load_live(live_ptr, row_block, first_tile + local, tl.cdiv(vocab_size, BLOCK_V))
    if live:
        target_1, target_2, share_1, share_2 = load_targets(
            group.targets, group.share, row, num_rows, inside
        )
        raw = soft_tile(
            group, stride, share_1, share_2, row, num_rows, head_ptr, head_stride, bias_ptr, column,
            hidden_size, vocab_size, BLOCK_D,
        )  # fmt: skip
        top = load_state(state_ptr, 0, row, num_rows)
        factor = load_state(state_ptr, 1, row, num_rows)
        gradient = row_gradient(raw, top, factor, logit_scale, softcap)
        held_1, held_2 = held_targets(target_1, target_2, share_1, share_2)
        at_2 = load_state(state_ptr, 3, row, num_rows)
        gradient = tl.where(column[None, :] == held_2[:, None], at_2, gradient)
        at_1 = load_state(state_ptr, 2, row, num_rows)
        gradient = tl.where(column[None, :] == held_1[:, None], at_1, gradient)
        weight = tl.load(group.weight + row, mask=inside, other=0.0)[:, None]
        gradient = weighted(weight, gradient)
        gradient = tl.where((column < vocab_size)[None, :], gradient, 0.0)
    store_gradient(gradient_ptr, gradient, row, inside, local, num_tiles)


@triton.jit
def load_live(live_ptr, block, tile, all_tiles):
    """Say whether any probability of a row block in a tile can be above the filter."""
    return tl.load(live_ptr + tl.cast(block, tl.int64) * all_tiles + tile) != 0


@triton.jit
def load_state(state_ptr, term, row, num_rows):
    """Return one number of each row, as a column."""
    return tl.load(state_ptr + term * num_rows + row, mask=row < num_rows, other=0.0)[:, None]


@triton.jit
def load_term(state_ptr, term: tl.constexpr, pair, num_pairs):
    """Return maximum and factor of c (0), of u (1) or of their mixture (2)."""
    top = load_state(state_ptr, term, pair, num_pairs)
    return top, load_state(state_ptr, 3 + term, pair, num_pairs)


@triton.jit
def row_of_pair(raw, gradient_m, share, at_c, at_u, state_ptr, term: tl.constexpr, pair, num_pairs,
                logit_scale, softcap):  # fmt: skip
    """Return ``d loss / d raw`` of one row of each pair, given that of their mixture."""
    top, factor = load_term(state_ptr, term, pair, num_pairs)
    gradient = row_gradient(raw, top, factor, logit_scale, softcap) + share[:, None] * gradient_m
    gradient = tl.where(at_c, load_state(state_ptr, 6 + 2 * term, pair, num_pairs), gradient)
    return tl.where(at_u, load_state(state_ptr, 7 + 2 * term, pair, num_pairs), gradient)


@triton.jit
def store_gradient(gradient_ptr, gradient, row, inside, local, num_tiles):
    """Store a tile's gradient, rounded once."""
    BLOCK_V: tl.constexpr = gradient.shape[1]
    column = local * BLOCK_V + tl.arange(0, BLOCK_V)
    pointers = gradient_ptr + row.to(tl.int64)[:, None] * (num_tiles * BLOCK_V) + column[None, :]
    tl.store(pointers, gradient.to(gradient_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=PLACE)
def pair_gradient_kernel(
    hidden_ptr,  # (R, D)
    stride,
    group,  # a PairGroup
    head_ptr,  # (V, D)
    head_stride,
    bias_ptr,  # (V,), or None
    state_ptr,  # (10, P) float32
    live_ptr,  # (pair blocks, B) uint8, or None without a filter
    gradient_ptr,  # (2 P, C)
    num_pairs,
    hidden_size,
    vocab_size,
    first_tile,
    num_tiles,  # of these C columns
    logit_scale,
    softcap,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the gradients of both rows of pairs in one tile, or zeros where it is dead."""
    pair_block, local = grouped_tile(tl.cdiv(num_pairs, BLOCK_P), num_tiles, GROUP)
    pair = pair_block * BLOCK_P + tl.arange(0, BLOCK_P)
    column = (first_tile + local) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = pair < num_pairs
    live = True
    if live_ptr is not None:
        live = load_live(live_ptr, pair_block, first_tile + local, tl.cdiv(vocab_size, BLOCK_V))
    if live:
        raw_c, raw_u = pair_tile(
            hidden_ptr, stride, group, pair, num_pairs, head_ptr, head_stride, bias_ptr, column,
            hidden_size, vocab_size, BLOCK_D,
        )  # fmt: skip
        target_c, target_u, share_c, share_u = load_targets(
            group.labels, group.share, pair, num_pairs, inside
        )
        at_c = column[None, :] == target_c[:, None]
        at_u = column[None, :] == target_u[:, None]
        exists = (column < vocab_size)[None, :]
        raw_m = mixed_logits(raw_c, raw_u, share_c[:, None], share_u[:, None], bias_ptr is not None)
        top, factor = load_term(state_ptr, 2, pair, num_pairs)
        gradient_m = row_gradient(raw_m, top, factor, logit_scale, softcap)
        # One row after the other, so that both gradients need not be kept together.
        gradient = row_of_pair(
            raw_c, gradient_m, share_c, at_c, at_u, state_ptr, 0, pair, num_pairs, logit_scale,
            softcap,
        )  # fmt: skip
        gradient = tl.where(exists, gradient, 0.0)
        store_gradient(gradient_ptr, gradient, pair, inside, local, num_tiles)
        gradient = row_of_pair(
            raw_u, gradient_m, share_u, at_c, at_u, state_ptr, 1, pair, num_pairs, logit_scale,
            softcap,
        )  # fmt: skip
        gradient = tl.where(exists, gradient, 0.0)
        store_gradient(gradient_ptr, gradient, pair + num_pairs, inside, local, num_tiles)
    else:
        nothing = tl.zeros((BLOCK_P, BLOCK_V), tl.float32)
        store_gradient(gradient_ptr, nothing, pair, inside, local, num_tiles)
        store_gradient(gradient_ptr, nothing, pair + num_pairs, inside, local, num_tiles)


@triton.jit
def live_product_kernel(
    left_ptr,  # (M, K)
    left_stride_m,
    left_stride_k,
    right_ptr,  # (K, N)
    right_stride,
    total_ptr,  # (M, N) float32
    total_stride,
    blocks_ptr,  # (blocks of M, blocks of K) int32: for each block of M its live blocks of K first
    count_ptr,  # (blocks of M,) int32: how many those are
    size_m,
    size_n,
    size_k,
    OVERWRITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Add one block of a product to the total, over the live blocks of its left side."""
    block_m, block_n = grouped_tile(tl.cdiv(size_m, BLOCK_M), tl.cdiv(size_n, BLOCK_N), GROUP)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks_ptr += block_m * tl.cdiv(size_k, BLOCK_K)
    count = tl.load(count_ptr + block_m)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, count * (BLOCK_K // DEPTH)):
        block = tl.load(blocks_ptr + step // (BLOCK_K // DEPTH))
        k = block * BLOCK_K + step % (BLOCK_K // DEPTH) * DEPTH + tl.arange(0, DEPTH)
        left = left_ptr + m.to(tl.int64)[:, None] * left_stride_m
        left += k.to(tl.int64)[None, :] * left_stride_k
        left = tl.load(left, mask=(m < size_m)[:, None] & (k < size_k)[None, :], other=0.0)
        right = load_operand(right_ptr, k, right_stride, k < size_k, n, size_n)
        product = add_dot(left, right, product)
    total = total_ptr + m.to(tl.int64)[:, None] * total_stride + n[None, :]
    inside = (m < size_m)[:, None] & (n < size_n)[None, :]
    if OVERWRITE:
        tl.store(total, product, mask=inside)
    elif count > 0:
        tl.store(total, tl.load(total, mask=inside, other=0.0) + product, mask=inside)


def soft_gradient_(
    gradient: Tensor,  # (K, C), to be filled
    group: RowGroup,
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    state: Tensor,  # (4, K) float32
    live: Tensor | None,  # (row blocks, B) uint8
    transform: LogitTransform,
    first_tile: int,
) -> None:
    """Write ``row_weight * d loss / d raw`` of the columns that begin with a tile."""
    num_rows, num_tiles = gradient.shape[0], gradient.shape[1] // BLOCK_V
    with torch.cuda.device_of(weight):
        soft_gradient_kernel[(triton.cdiv(num_rows, BLOCK_R) * num_tiles,)](
            group, group.hidden_c.stride(0), weight, weight.stride(0), bias, state, live, gradient,
            num_rows, weight.shape[1], weight.shape[0], first_tile, num_tiles, transform.scale,
            transform.softcap, BLOCK_R=BLOCK_R, BLOCK_V=BLOCK_V,
            **tile_options(weight, BLOCK_V, fuses=True, interpolates=group.hidden_u is not None),
        )  # fmt: skip


def pair_gradient_(
    gradient: Tensor,  # (2 P, C), to be filled: rows of c before rows of u
    hidden: Tensor,  # (R, D)
    group: PairGroup,
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    state: Tensor,  # (10, P) float32
    live: Tensor | None,  # (pair blocks, B) uint8
    transform: LogitTransform,
    first_tile: int,
) -> None:
    """Write ``G_c`` and ``G_u`` of the columns that begin with a tile."""
    num_pairs, num_tiles = group.rows.shape[1], gradient.shape[1] // BLOCK_V
    with torch.cuda.device_of(weight):
        pair_gradient_kernel[(triton.cdiv(num_pairs, BLOCK_P) * num_tiles,)](
            hidden, hidden.stride(0), group, weight, weight.stride(0), bias, state, live, gradient,
            num_pairs, weight.shape[1], weight.shape[0], first_tile, num_tiles, transform.scale,
            transform.softcap, BLOCK_P=BLOCK_P, BLOCK_V=BLOCK_V,
            **tile_options(weight, BLOCK_V, fuses=True),
        )  # fmt: skip


def add_live_product_(
    total: Tensor,  # (M, N) float32
    left: Tensor,  # (M, K)
    right: Tensor,  # (K, N)
    live: Tensor,  # (blocks of M, blocks of K) uint8
    block_m: int,
    block_k: int,
    *,
    overwrite: bool,
) -> None:
    """Add ``left @ right`` to ``total``, over the blocks of ``left`` that are live."""
    if not total.numel():
        return
    blocks = live.argsort(dim=1, descending=True, stable=True).int().contiguous()
    with torch.cuda.device_of(total):
        live_product_kernel[(live.shape[0] * triton.cdiv(total.shape[1], BLOCK_N),)](
            left, left.stride(0), left.stride(1), right, right.stride(0), total, total.stride(0),
            blocks, live.sum(1, dtype=torch.int32), total.shape[0], total.shape[1], left.shape[1],
            OVERWRITE=overwrite, BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=block_k,
            **product_options(left),
        )  # fmt: skip


def product_options(left: Tensor) -> dict[str, int | bool]:
    """Return the options of `live_product_kernel`: 64 KiB of operands in flight."""
    options = tile_options(left, BLOCK_N, fuses=True)
    return {"DEPTH": options.pop("BLOCK_D"), **options}
