"""The Triton kernels that find which rows of a call count, and lay out its pairs: a launch each.

In PyTorch operations, as `terms.py` has them, this takes some forty launches, 0.15 to 0.3 ms of
which the products are not yet made (predicted for an H200: 4 to 8 % of a step of 2,048 rows at
D = 2048).

Legend: R rows, T targets of a row, P pairs, S = R - 2 P rows outside of pairs, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Labels, and rows of the one program that lays out pairs: two a thread, which takes at most 54
# registers; with four ptxas spills 8 bytes (sm_90).
BLOCK, PAIR_BLOCK, PAIR_WARPS = 512, 1024, 16


@triton.jit
def weight_of_label(label, vocab_size, ignore_index):
    """Return 1 where a label counts, 0 where it is ignored, NaN where it is out of range."""
    outside = (label < 0) | (label >= vocab_size)
    return tl.where(label == ignore_index, 0.0, tl.where(outside, float("nan"), 1.0))


@triton.jit
def clamped(label, vocab_size):
    """Return the label, or its nearest neighbour in ``[0, V)``."""
    return tl.where(label < 0, 0, tl.where(label < vocab_size, label, vocab_size - 1))


@triton.jit
def label_terms_kernel(
    first_ptr,  # (R,) int64
    second_ptr,  # (R,) int64, or None for one target
    targets_ptr,  # (R, T) int64 in [0, V)
    weight_ptr,  # (R,) float32
    num_rows,
    vocab_size,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Find the targets of some rows, and the rows' weights."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    label = tl.load(first_ptr + row, mask=inside, other=0)
    weight = weight_of_label(label, vocab_size, ignore_index)
    if second_ptr is None:
        tl.store(targets_ptr + row, clamped(label, vocab_size), mask=inside)
    else:
        tl.store(targets_ptr + 2 * row, clamped(label, vocab_size), mask=inside)
        label = tl.load(second_ptr + row, mask=inside, other=0)
        tl.store(targets_ptr + 2 * row + 1, clamped(label, vocab_size), mask=inside)
        other = weight_of_label(label, vocab_size, ignore_index)
        weight = tl.where((weight == 0.0) | (other == 0.0), 0.0, weight * other)
    tl.store(weight_ptr + row, weight, mask=inside)


@triton.jit
def pair_terms_kernel(
    pair_c_ptr,  # (P,) int64
    pair_u_ptr,  # (P,) int64
    lam_ptr,  # (P,) float32
    place_ptr,  # (R,) int32 room
    row_weight_ptr,  # (R,) float32
    out_weight_ptr,  # (R,) float32: that, or NaN where a row is in two pairs
    order_ptr,  # (R,) int64: lower rows of pairs, upper rows of pairs, rows outside of pairs
    pair_weight_ptr,  # (P,) float32
    share_ptr,  # (P, 2) float32
    num_rows,
    num_pairs,
    BLOCK: tl.constexpr,
):
    """Lay out the rows of a call: one program, since each step needs all of the one before."""
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.store(place_ptr + row, tl.full((BLOCK,), -1, tl.int32), mask=row < num_rows)
    tl.debug_barrier()
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < num_pairs
        row_c = tl.load(pair_c_ptr + pair, mask=inside, other=0)
        row_u = tl.load(pair_u_ptr + pair, mask=inside, other=0)
        low, high = tl.minimum(row_c, row_u), tl.maximum(row_c, row_u)
        missing = (low < 0) | (high >= num_rows)
        low, high = clamped(low, num_rows), clamped(high, num_rows)
        tl.store(place_ptr + low, pair, mask=inside)
        tl.store(place_ptr + high, num_pairs + pair, mask=inside)
        tl.store(order_ptr + pair, low, mask=inside)
        tl.store(order_ptr + num_pairs + pair, high, mask=inside)
        weight_1 = tl.load(row_weight_ptr + low, mask=inside, other=0.0)
        weight_2 = tl.load(row_weight_ptr + high, mask=inside, other=0.0)
        weight = tl.where((weight_1 == 0.0) | (weight_2 == 0.0), 0.0, weight_1 * weight_2)
        weight = tl.where(missing, float("nan"), weight)
        lam = tl.load(lam_ptr + pair, mask=inside, other=0.0)
        share_1 = tl.where(row_c <= row_u, lam, 1.0 - lam)
        share_2 = tl.where(row_c <= row_u, 1.0 - lam, lam)
        # What lam is does not matter where nothing is mixed; not even that it is NaN.
        tl.store(share_ptr + 2 * pair, tl.where(weight == 0.0, 0.5, share_1), mask=inside)
        tl.store(share_ptr + 2 * pair + 1, tl.where(weight == 0.0, 0.5, share_2), mask=inside)
        tl.store(pair_weight_ptr + pair, weight, mask=inside)
    tl.debug_barrier()
    lost = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < num_pairs
        low = tl.load(order_ptr + pair, mask=inside, other=0)
        high = tl.load(order_ptr + num_pairs + pair, mask=inside, other=0)
        place_low = tl.load(place_ptr + low, mask=inside, other=0)
        place_high = tl.load(place_ptr + high, mask=inside, other=0)
        differs = (place_low != pair) | (place_high != num_pairs + pair)
        lost = tl.where(inside & differs, 1, lost)
    # A row that is in two pairs has the place of one of them.
    twice = tl.max(lost, 0) != 0
    num_singles = num_rows - 2 * num_pairs
    before = 0
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        single = (tl.load(place_ptr + row, mask=inside, other=0) < 0).to(tl.int32)
        rank = before + tl.cumsum(single, 0) - 1
        fits = (single != 0) & (rank < num_singles)
        tl.store(order_ptr + 2 * num_pairs + rank, row.to(tl.int64), mask=fits)
        before += tl.sum(single, 0)
        weight = tl.load(row_weight_ptr + row, mask=inside, other=0.0)
        tl.store(out_weight_ptr + row, tl.where(twice, float("nan"), weight), mask=inside)
        tl.store(pair_weight_ptr + row, float("nan"), mask=(row < num_pairs) & twice)


def label_terms(
    first: Tensor,  # (R,) int64
    second: Tensor | None,  # (R,) int64
    vocab_size: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # (R, T) int64, (R,) float32
    """Return targets in ``[0, V)`` and row weights, as `terms.label_terms` says."""
    num_rows = first.numel()
    targets = first.new_empty(num_rows, 1 if second is None else 2)
    weight = torch.empty(num_rows, dtype=torch.float32, device=first.device)
    if num_rows:
        with torch.cuda.device_of(first):
            label_terms_kernel[(triton.cdiv(num_rows, BLOCK),)](
                first.contiguous(),
                None if second is None else second.contiguous(),
                targets,
                weight,
                num_rows,
                vocab_size,
                ignore_index,
                BLOCK=BLOCK,
            )
    return targets, weight


def pair_terms(
    row_weight: Tensor,  # (R,) float32
    pair_c: Tensor,  # (P,) int64
    pair_u: Tensor,  # (P,) int64
    lam: Tensor,  # (P,) float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (R,), (R,) int64, (P,), (P, 2)
    """Return row weights, the order of rows, and pairs' weights and shares: `terms.PairPlan`."""
    num_rows, num_pairs = row_weight.numel(), pair_c.numel()
    order, place = pair_c.new_empty(num_rows), pair_c.new_empty(num_rows, dtype=torch.int32)
    out_weight = torch.empty_like(row_weight)
    pair_weight, share = row_weight.new_empty(num_pairs), row_weight.new_empty(num_pairs, 2)
    if num_rows:
        with torch.cuda.device_of(row_weight):
            pair_terms_kernel[(1,)](
                pair_c.contiguous(),
                pair_u.contiguous(),
                lam.contiguous(),
                place,
                row_weight.contiguous(),
                out_weight,
                order,
                pair_weight,
                share,
                num_rows,
                num_pairs,
                BLOCK=PAIR_BLOCK,
                num_warps=PAIR_WARPS,
            )
    return out_weight, order, pair_weight, share
