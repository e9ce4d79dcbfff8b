"""The two ways to never hold (N, V) logits, and how a caller chooses one.

`row_chunks/` and `vocab_tiles/` are the schedules themselves; both give the same loss and gradients
within the error budget.
"""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# In float32 the bits of a row's logits depend on how many rows are multiplied with it where those
# are fewer (measured, MKL, AVX-512).
FEWEST_ROWS = 16

# Triton vectorises accesses of rows whose stride 16 divides.
PADDING = 16

# Rows, pairs and vocabulary entries of a tile. 128 x 128 float32 logits over 8 warps are 64
# registers a thread; two accumulators of 64 pairs are as many.
BLOCK_R, BLOCK_P, BLOCK_V = 128, 64, 128


def check_size(name: str, value: int) -> None:
    """Refuse what is not an integer of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class RowChunks:
    """Logits of some rows at a time: ``min(rows, max_bytes / bytes of a row)``.

    ``rows=None`` means 4096 on an accelerator (256-row chunks cost 1.5x there, measured by the
    Liger-Kernel authors on an H200) and 512 on the CPU, where the number hardly matters (NTP of
    2,048 rows at D = 512, V = 32000 on two cores of an AMD EPYC, in turns, medians of 5: 2.23 s
    with 256, 2.00 s with 512, 2.08 s with 1024, 2.16 s with 2048). Rows above 128 are rounded down
    to a multiple of 128, and there are at least 16.

    On an accelerator all rows go at once where that takes no more memory (`keeps_gradients`).

    With V = 151,936 in bfloat16 on a GPU, ``2**30 // (2 * 151936)`` is 3,533 rows, rounded to
    3,456. A batch of 16,384 rows goes in five chunks of 3,276 or 3,278 rows, which hold 1.0 GB of
    logits at a time in place of 5.0 GB.

    Example:
        For ``schedule=``, a quarter of the memory:

        >>> RowChunks(max_bytes=2**28)
        RowChunks(rows=None, max_bytes=268435456)

    Args:
        rows: the most rows of a chunk, at least 1; None for the number above.
        max_bytes: the most bytes of a chunk's logits, at least 1.

    Raises:
        TypeError, ValueError: a number that is no integer of at least 1.
    """

    rows: int | None = None
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("max_bytes", self.max_bytes)):
            if value is not None:
                check_size(f"RowChunks: {name}", value)

    def rows_for(self, hidden: Tensor, vocab_size: int) -> int:
        """Return the rows of one chunk, an even number, for ``hidden``'s dtype and device."""
        rows = self.rows or (512 if hidden.device.type == "cpu" else 4096)
        rows = min(rows, self.max_bytes // (vocab_size * logits_dtype(hidden).itemsize))
        return max(FEWEST_ROWS, rows - rows % (128 if rows > 128 else 2))


@dataclass(frozen=True)
class VocabTiles:
    """Logits that stay in registers. CUDA only.

    ``max_bytes`` bounds the workspace. Not counted: inputs, a few numbers for each row, and
    gradients; ``dH`` and float32 ``dW`` exist twice at the end of backward, unscaled and scaled.
    Backward reads and writes all of ``dW`` once for each group of rows that fits the workspace
    (6,144 rows at D = 4096 in half precision, by default), so that more bytes mean fewer passes:
    8,192 rows take two, of 64 MiB six (predicted for an H200, V = 128,256: 4 ms more of dW alone).

    With ``filter_eps`` backward leaves out, without computing them, the tiles of 128 rows (64
    pairs) by 128 vocabulary entries in which every probability lies below it; 0, the default, is
    exact. A tile that holds a target is never left out.

    In half precision a hidden size that 16 does not divide is right but slow: operands are then
    read 2 bytes at a time in place of 16, with eight times as many loads. Use `RowChunks` there.

    Example:
        For ``schedule=``:

        >>> VocabTiles(filter_eps=2**-12)
        VocabTiles(filter_eps=0.000244140625, max_bytes=268435456)

    Args:
        filter_eps: in [0, 1), the probability below which backward leaves tiles out.
        max_bytes: the most bytes of the workspace, at least 1.

    Raises:
        TypeError, ValueError: a number out of these bounds.
    """

    filter_eps: float = 0.0
    max_bytes: int = 2**28

    def __post_init__(self) -> None:
        if not 0.0 <= self.filter_eps < 1.0:
            raise ValueError(f"VocabTiles: filter_eps must be in [0, 1), got {self.filter_eps}")
        check_size("VocabTiles: max_bytes", self.max_bytes)


Schedule: TypeAlias = Literal["auto", "row_chunks", "vocab_tiles"] | RowChunks | VocabTiles


def resolve_schedule(schedule: Schedule, hidden: Tensor, vocab_size: int) -> int | VocabTiles:
    """Return what a ``schedule`` argument means: rows of one chunk, or vocabulary tiles.

    ``"auto"`` is ``row_chunks`` everywhere: it does three GEMMs' work where recomputing vocabulary
    tiles does four.
    """
    if schedule in ("auto", "row_chunks"):
        schedule = RowChunks()
    elif schedule == "vocab_tiles":
        schedule = VocabTiles()
    if isinstance(schedule, RowChunks):
        return schedule.rows_for(hidden, vocab_size)
    if not isinstance(schedule, VocabTiles):
        raise ValueError(
            "schedule: expected 'auto', 'row_chunks', 'vocab_tiles', RowChunks(...) or "
            f"VocabTiles(...), got {schedule!r}"
        )
    # A fake tensor runs nowhere: it stands for one on any device.
    if not (runs_triton(hidden) or is_fake(hidden)):
        raise ValueError(
            f"schedule: 'vocab_tiles' needs a CUDA device, got {hidden.device}; "
            "'auto' and 'row_chunks' run on any"
        )
    return schedule


def keeps_gradients(num_rows: int, chunk_rows: int, weight: Tensor) -> bool:
    """Say whether an accelerator makes all logits at once and keeps their gradients for backward.

    It does so for a dW where that takes no more memory than a chunk of K rows and a dW added up in
    float32. With w bytes a number ``w N V + w V D <= w K V + 4 V D``, which is

        ``N <= K + (4 - w) D / w``:  K + D rows in bfloat16, K rows in float32

    At D = 4096, V = 128,256 in bfloat16 K is 4,096, and up to 8,192 rows go at once: 2.1 GB of
    logits and 1.05 GB of dW, in place of 1.05 GB of a chunk and 2.1 GB of float32 dW. Predicted to
    save 1.5 to 2.3 ms of 37 on an H200: dW is one product, neither added up nor converted.

    A frozen hidden and a bias change neither side (dH has a number for each of hidden's, db takes
    4 V bytes in both). With a frozen weight the sides are ``w N V <= w K V``: no more than a chunk
    has, and nothing is gained. Float16 has not the range for a loss scale in the rows of hidden.
    """
    width = weight.element_size()
    most = chunk_rows + weight.shape[1] * (4 - width) // width
    return weight.dtype != torch.float16 and bool(0 < num_rows <= most)


def fast_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes in which this CPU multiplies matrices at least as fast as in float32.

    Without instructions for it, products in bfloat16 take 6 to 250 times as long (AMD EPYC, AVX2,
    torch 2.13: 51 GFLOP/s in float32; 8.0, 3.6 and 0.2 for the three products of a loss). They are
    oneDNN's, which ONEDNN_MAX_CPU_ISA may cap below what the processor has.
    """
    has = torch.cpu.get_capabilities()
    fast = {torch.float32}
    if not torch.backends.mkldnn.is_available():
        return frozenset(fast)
    if has.get("amx_bf16") or has.get("avx512_bf16"):
        fast |= {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    if has.get("amx_fp16") or has.get("avx512_fp16"):
        fast |= {torch.float16} if torch.ops.mkldnn._is_mkldnn_fp16_supported() else set()
    return frozenset(fast)


FAST_DTYPES = fast_dtypes()


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of a chunk's logits: float32 where products of hidden's dtype are slow."""
    slow = hidden.device.type == "cpu" and hidden.dtype not in FAST_DTYPES
    return torch.float32 if slow and not runs_triton(hidden) else hidden.dtype


def rounds_once(num_rows: int, chunk_rows: int, weight: Tensor) -> bool:
    """Say whether the CPU makes dW in bfloat16 at once: of one chunk, by a fast product.

    Float32 sums of it would have to be written and converted: at 128 rows, D = 512, V = 32,000 half
    of the time. Float16 is divided late, and would vanish.
    """
    fast = weight.dtype == torch.bfloat16 and weight.dtype in FAST_DTYPES
    on_cpu = weight.device.type == "cpu" and not runs_triton(weight)
    return fast and on_cpu and num_rows <= chunk_rows


def runs_triton(tensor: Tensor) -> bool:
    """Say whether Triton kernels run on this tensor: on CUDA, and anywhere when interpreted."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def is_fake(tensor: Tensor) -> bool:
    """Say whether a tensor has a shape and no values: ops on it show what a step would allocate."""
    return isinstance(tensor, FakeTensor)
