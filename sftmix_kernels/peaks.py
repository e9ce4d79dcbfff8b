"""How much memory a loss holds at its peak: formulas of shapes, to which measurements are held.

Peak extra memory is the highest sum of tensor bytes allocated at once in one forward and backward,
gradients and results included, inputs not. hidden and weight need gradients, no label is ignored,
there is neither bias nor softcap. In NTP + Mixup every row is in a pair; Mixup takes two halves of
N / 2 rows.

Legend: N rows of hidden, R rows of logits (N / 2 for Mixup, N otherwise), K rows of one chunk or
group, C columns of the tiles at hand, D hidden size, V vocabulary, w bytes of a number of the
inputs, f bytes of numbers a row of hidden.

dW in float32, dH and numbers of rows are kept all the time: ``4 V D + w R D + f N`` bytes. The
largest of these moments comes on top:

| schedule | moment | bytes |
|---|---|---|
| ``row_chunks``, kernels | a chunk; V padded to 16 | ``w K V + w K D`` |
| | ... of NTP + Mixup: its dH is put in order | ``w K V + 2 w K D`` |
| ``row_chunks``, CPU | a chunk: its rows gathered or mixed, its dH | ``l K V + 2 l K D`` |
| | ... of half precision, slow: a tile of the weight | ``l K V + 2 l K D + t`` |
| | ... of half precision, fast: a tile of dW | ``l K V + l K D + t w / 4 + t`` |
| | ... bfloat16, fast, one chunk: dW has w bytes | ``l K V + 2 l K D`` (Mixup: 5) |
| ``vocab_tiles`` | a group; filtered or not | ``w K C + (4 + w) K D`` |
| | ... its dH rounded, half precision | ``w K C + (4 + 2 w) K D`` |
| all, kernels | gradients handed out | half precision: ``w V D``; Mixup: ``w N D`` |
| ``row_chunks``, CPU | ... | Mixup: ``w N D``; half precision, several chunks: also ``w V D + t`` |

Where kernels make all logits at once (`keeps_gradients`), dW has w bytes a number, K is R, and the
chunk is kept to the end, so that Mixup's dH comes on top: ``w R V + w V D + 2 w R D``. At N = 8192,
D = 4096, V = 128,256 in bfloat16 NTP + Mixup has 2.10 GB of gradient rows, 1.05 of dW and 0.13 of
dH and hidden: 3.29 GB. Two chunks have 2.10 GB of dW, 0.07 of dH, and 1.05 + 0.07 of a chunk or
1.05 of what is handed out: 3.29 GB, too.

On the CPU l is the width of logits: 4 where products of half precision are slow
(`schedules.FAST_DTYPES`), else w; t are the bytes of a tile, ``min(8 MiB, 4 V D)``. There the op
has divided by the loss's divisor already, and where the upstream gradient is 1, float32 gradients
are handed out as they are (float16 is divided late, and dH copied: ``w N D`` more). Rows are worked
on by the compiled ops; PyTorch operations in their place hold some cache blocks of 2 MiB more.

Forward of ``vocab_tiles`` keeps LSEs of tiles, half of ``max_bytes``, but no gradients: it is less.
`streaming_perplexity`, forward only: a block of logits, and 12 bytes a token (20 on the CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .gradients import TILE_BYTES
from .perplexity.streaming import block_rows, chunk_columns, round_up
from .row_chunks.chunks import chunk_sizes
from .schedules import (
    BLOCK_P,
    BLOCK_R,
    BLOCK_V,
    PADDING,
    RowChunks,
    VocabTiles,
    keeps_gradients,
    logits_dtype,
    rounds_once,
)
from .vocab_tiles.groups import groups

NTP, MIXUP, BOTH = "NTP", "Mixup", "NTP + Mixup"

# f: labels, weights, shares, order, losses; for tiles also the state that backward needs. Measured
# while chunks or groups are at work: when gradients are handed out some are gone.
CHUNK_NUMBERS = {NTP: 28, MIXUP: 16, BOTH: 40}
TILE_NUMBERS = {NTP: 44, MIXUP: 36, BOTH: 64}


# The names of ops that multiply with the head, or begin with these.
LOSS_OPS = ("sftmix_", "mixup_")


class Shape(NamedTuple):
    """The shape of one call. For MIXUP, ``rows`` counts both hidden states of every pair."""

    rows: int
    hidden_size: int
    vocab_size: int
    itemsize: int  # bytes of a number of hidden and weight: 4 or 2


def peak_bytes(task: str, schedule: RowChunks | VocabTiles, shape: Shape, kernels: bool) -> int:
    """Return the peak extra bytes of one forward and backward of ``task``: NTP, MIXUP or BOTH.

    ``kernels`` says that Triton kernels run, on CUDA or in float32 in the interpreter, and not
    the compiled ops of the CPU. `VocabTiles` knows no other way.
    """
    if isinstance(schedule, VocabTiles):
        during, kernels = group_bytes(task, schedule, shape), True
    elif kernels:
        during = chunk_bytes(task, schedule, shape)
    else:
        during = cpu_chunk_bytes(task, schedule, shape)
    kept = kept_bytes(task, schedule, shape, kernels)
    handed_out = handed_out_bytes(task, schedule, shape, kernels)
    if kernels and keeps(task, schedule, shape):
        # dW is made in the dtype in which it is handed out; Mixup's dH goes to two inputs.
        of_both = shape.itemsize * shape.rows * shape.hidden_size
        return kept + during + (of_both if task == MIXUP else 0)
    return kept + max(during, handed_out)


def keeps(task: str, schedule: RowChunks | VocabTiles, shape: Shape) -> bool:
    """Say whether kernels make all logits at once and keep their gradients for backward."""
    if isinstance(schedule, VocabTiles):
        return False
    weight = torch.empty(0, shape.hidden_size, dtype=dtype_of(shape), device="meta")
    most = schedule.rows_for(weight, shape.vocab_size)
    return keeps_gradients(logit_rows(task, shape), most, weight)


def rounds(task: str, schedule: RowChunks | VocabTiles, shape: Shape) -> bool:
    """Say whether the CPU makes dW in bfloat16 at once: see `rounds_once`."""
    weight = torch.empty(0, shape.hidden_size, dtype=dtype_of(shape), device="cpu")
    if isinstance(schedule, VocabTiles):
        return False
    return rounds_once(logit_rows(task, shape), schedule.rows_for(weight, shape.vocab_size), weight)


def logit_rows(task: str, shape: Shape) -> int:
    """Return R: MIXUP interpolates hidden states before it projects them."""
    return shape.rows // 2 if task == MIXUP else shape.rows


def kept_bytes(
    task: str, schedule: RowChunks | VocabTiles, shape: Shape, kernels: bool = False
) -> int:
    """Return the bytes of dW and dH before they are scaled, and of the numbers of rows."""
    numbers = TILE_NUMBERS if isinstance(schedule, VocabTiles) else CHUNK_NUMBERS
    # float32, since sums over many chunks diverge in half precision. A row of dH is one sum.
    own = keeps(task, schedule, shape) if kernels else rounds(task, schedule, shape)
    width = shape.itemsize if own else 4
    dw = width * shape.vocab_size * shape.hidden_size
    dh = shape.itemsize * logit_rows(task, shape) * shape.hidden_size
    return dw + dh + numbers[task] * shape.rows


def handed_out_bytes(
    task: str, schedule: RowChunks | VocabTiles, shape: Shape, kernels: bool
) -> int:
    """Return the bytes of the gradients in the inputs' dtype, beside those kept.

    A gradient that is kept in its dtype is multiplied in place, or on the CPU by 1; Mixup's dH goes
    to two inputs.
    """
    num_rows, size, vocab_size, width = shape
    dw, dh = width * vocab_size * size, width * num_rows * size
    if task != MIXUP:
        dh = 0
    if width == 4 or (not kernels and rounds(task, schedule, shape)):
        return dh
    return dh + dw if kernels else dh + dw + tile_bytes(shape)


def tile_bytes(shape: Shape) -> int:
    """Return the bytes of a tile of the weight, or of its gradient, in float32."""
    return min(TILE_BYTES, 4 * shape.vocab_size * shape.hidden_size)


def chunk_rows(task: str, schedule: RowChunks, shape: Shape, kernels: bool) -> int:
    """Return K, the rows of the largest chunk."""
    # The schedule asks hidden for its dtype, and whether it is on the CPU.
    hidden = torch.empty(0, dtype=dtype_of(shape), device="meta" if kernels else "cpu")
    most = schedule.rows_for(hidden, shape.vocab_size)
    return max(chunk_sizes(logit_rows(task, shape), most))


def dtype_of(shape: Shape) -> torch.dtype:
    """Return a dtype of the shape's itemsize."""
    return torch.float32 if shape.itemsize == 4 else torch.bfloat16


def chunk_bytes(task: str, schedule: RowChunks, shape: Shape, *, frozen_head: bool = False) -> int:
    """Return the bytes of a chunk by kernels: logits, replaced by gradients, and rows of hidden."""
    num_rows = chunk_rows(task, schedule, shape, kernels=True)
    whole = keeps(task, schedule, shape) and not frozen_head
    if whole:
        num_rows = logit_rows(task, shape)
    # Padded so that each row begins where a 16-byte load can.
    logits = shape.itemsize * num_rows * round_up(shape.vocab_size, PADDING)
    # Of NTP + Mixup twice: its dH, too, before that is put in the order of rows. Where G is kept
    # there is no dW yet at that moment, which is more.
    twice = task == BOTH and not whole
    hidden = (1 + twice) * shape.itemsize * num_rows * shape.hidden_size
    return logits + hidden


def cpu_chunk_bytes(task: str, schedule: RowChunks, shape: Shape) -> int:
    """Return the bytes of a chunk on the CPU by the compiled ops."""
    _, size, vocab_size, width = shape
    num_rows = chunk_rows(task, schedule, shape, kernels=False)
    of_logits = logits_dtype(torch.empty(0, dtype=dtype_of(shape))).itemsize
    hidden, tile = of_logits * num_rows * size, 0
    if width < of_logits:
        tile = tile_bytes(shape)
    elif width < 4 and not rounds(task, schedule, shape):
        tile = max(0, tile_bytes(shape) * (width + 4) // 4 - hidden)
    rows = 2 * hidden + tile
    if task == MIXUP and of_logits < 4:
        # Two are mixed in float32 and rounded.
        rows = max(rows, 5 * hidden)
    return of_logits * num_rows * vocab_size + rows


def group_bytes(task: str, schedule: VocabTiles, shape: Shape) -> int:
    """Return the bytes of a group in ``vocab_tiles``' backward, with its gradient in some tiles."""
    _, size, vocab_size, width = shape
    count, block, rows_each = logit_rows(task, shape), BLOCK_R, 1
    if task == BOTH:
        count, block, rows_each = count // 2, BLOCK_P, 2
    row_bytes = rows_each * size * (4 + 2 * width)
    group = next(groups(count, block, row_bytes, schedule.max_bytes * 3 // 4))
    num_rows = rows_each * group.stop
    fitting = schedule.max_bytes // 4 // (num_rows * width) // BLOCK_V * BLOCK_V
    columns = min(max(BLOCK_V, fitting), round_up(vocab_size, BLOCK_V))
    # Rows of hidden, their dH in float32, and that once more where it has to be rounded.
    of_rows = width + 4 + (width if width < 4 else 0)
    total: int = width * num_rows * columns + of_rows * num_rows * size
    return total


def from_needed(args: Sequence[Any]) -> Sequence[Any]:
    """Return a call's arguments from ``needs_gradient`` on; none where it has no such list."""
    for at, arg in enumerate(args):
        if isinstance(arg, list) and isinstance(arg[0], bool):
            return args[at:]
    return ()


def keeps_all(args: Sequence[Any]) -> bool:
    """Say whether an op of rows is called with ``keeps``."""
    # It follows needs_gradient, first_token and group. Stats, further on, may be True as well.
    return any(arg is True for arg in from_needed(args)[3:4])


def needed_gradients(args: Sequence[Any]) -> list[bool]:
    """Return which gradients a call wants, of hidden, weight and bias; none where it cannot say."""
    needed: list[bool] = next(iter(from_needed(args)), [False] * 3)
    return needed


def op_call(name: str, args: Sequence[Any]) -> tuple[str, Shape]:
    """Return the task and shape of a call of a loss's op, by its name and positional arguments."""
    if name.startswith("sftmix"):
        hidden, weight = args[:2]
        mixed = not name.startswith("sftmix_rows") or args[5].shape[0] > 0
        num_rows, size = hidden.shape
        shape = Shape(num_rows, size, weight.shape[0], hidden.itemsize)
        return BOTH if mixed else NTP, shape
    hidden, partner, weight = args[:3]
    task, halves = (NTP, 1) if partner is None else (MIXUP, 2)
    num_rows, size = hidden.shape
    return task, Shape(halves * num_rows, size, weight.shape[0], weight.itemsize)


def op_workspace(
    name: str, args: Sequence[Any], schedule: RowChunks | VocabTiles, kernels: bool
) -> int:
    """Return the bytes that a call of a loss's op holds beside the tensors that it returns."""
    if not name.startswith(LOSS_OPS):
        return 0
    task, shape = op_call(name, args)
    if shape.rows == 0:
        return 0
    if keeps_all(args):
        return shape.itemsize * shape.rows * shape.hidden_size if task == BOTH else 0
    if isinstance(schedule, RowChunks):
        if not kernels:
            return cpu_chunk_bytes(task, schedule, shape)
        frozen_head = not needed_gradients(args)[1]
        chunk = chunk_bytes(task, schedule, shape, frozen_head=frozen_head)
        if frozen_head:
            return chunk
        # A plan for a GPU that is not here: the op returns dW as this host's CPU would, in float32
        # but where it rounds once. What is held beside that is the rest of a float32 dW; or, where
        # all rows go at once, what is kept for backward and the dW made there.
        on_cpu = args[1 if name.startswith("sftmix") else 2].device.type == "cpu"
        returned = shape.itemsize if on_cpu and rounds(task, schedule, shape) else 4
        wanted = shape.itemsize if keeps(task, schedule, shape) else 4
        return max(0, chunk + (wanted - returned) * shape.vocab_size * shape.hidden_size)
    if name.endswith("_backward"):
        return group_bytes(task, schedule, shape)
    # A maximum and a sum in float32 of a row and its mixtures in every tile.
    sums = 12 if task == BOTH else 8
    tiles = -(-shape.vocab_size // BLOCK_V)
    return min(schedule.max_bytes // 2, sums * tiles * logit_rows(task, shape))


def op_products(name: str, args: Sequence[Any]) -> int:
    """Return the operations of a call's products: ``2 R D V`` for logits and for each gradient."""
    if name.startswith("weight_gradient"):
        (num_rows, vocab_size), (_, size) = (tensor.shape for tensor in args)
        return 2 * int(num_rows) * int(vocab_size) * int(size)
    if not name.startswith(LOSS_OPS):
        return 0
    task, shape = op_call(name, args)
    products: int = 1 + sum(needed_gradients(args)[:2]) - keeps_all(args)
    return 2 * logit_rows(task, shape) * shape.hidden_size * shape.vocab_size * products


def perplexity_peak_bytes(shape: Shape, vocab_chunk: int | None = None, device: str = "cpu") -> int:
    """Return the peak extra bytes of `streaming_perplexity` with its compiled ops."""
    # A workspace depends on the size of the device's cache.
    hidden = torch.empty(shape.rows, 0, dtype=dtype_of(shape), device=device)
    chunk = chunk_columns(hidden, shape.vocab_size, vocab_chunk)
    logits = shape.itemsize * block_rows(hidden, chunk) * round_up(chunk, PADDING)
    # Of a token maximum, sum and label's logit; on the CPU also its place among those that count.
    return logits + (12 if device != "cpu" else 20) * shape.rows
