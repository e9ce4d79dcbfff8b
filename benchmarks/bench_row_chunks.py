"""The row kernels of ``row_chunks`` beside a copy of as many logits, and the device's ceilings.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sftmix_kernels.row_chunks import LogitTransform

from .measure import interleaved_samples
from .settings import HEADS, QUICK_HEAD, Settings

COPY, PAIR_ROWS, SOFT_ROWS = "copy", "pair_rows_", "soft_rows_"
# Rows of logits read or written: a copy reads and writes each once; the kernels read each twice
# (once for the LSEs, once for the gradients) and write it once.
PASSES = {COPY: 2, PAIR_ROWS: 3, SOFT_ROWS: 3}
CHUNK_ROWS = 4096
PRODUCT = "matrix product"
# Bytes copied, and rows of the square product, by device.
CEILINGS = {"cpu": (2**28, 2048), "cuda": (2**32, 8192)}


class RowKernels:
    """Logits of one chunk, what the kernels take with them, and a buffer to copy to."""

    def __init__(self, num_rows: int, vocab_size: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.raw = torch.empty(num_rows, vocab_size, dtype=dtype, device=device).normal_()
        self.logits, self.copied = self.raw.clone(), torch.empty_like(self.raw)
        self.labels = torch.randint(0, vocab_size, (num_rows,), device=device)
        self.row_weight = torch.ones(num_rows, device=device)
        lam = torch.rand(num_rows // 2, device=device)
        self.share = torch.stack((lam, 1 - lam), dim=-1)
        self.pair_weight = torch.ones_like(lam)
        self.mix_ratio = torch.full((), 0.4, device=device)
        self.transform = LogitTransform(1.0, None, has_bias=False)

    def restore(self) -> None:
        """Raw logits in place of the last gradients."""
        self.logits.copy_(self.raw)

    def pair_rows(self) -> tuple[Tensor, Tensor]:
        from sftmix_kernels.triton.row_chunks import pair_rows_

        options = (self.mix_ratio, self.transform, True)
        rows = (self.logits, self.labels, self.row_weight)
        return pair_rows_(*rows, self.share, self.pair_weight, *options)

    def soft_rows(self) -> Tensor:
        from sftmix_kernels.triton.row_chunks import soft_rows_

        rows = (self.logits, self.labels.unsqueeze(-1), None, self.row_weight)
        return soft_rows_(*rows, self.transform, True)

    def copy(self) -> Tensor:
        return self.copied.copy_(self.raw)

    def steps(self) -> dict[str, Callable[[], object]]:
        return {COPY: self.copy, PAIR_ROWS: self.pair_rows, SOFT_ROWS: self.soft_rows}


@pytest.fixture(scope="module")
def times(settings: Settings) -> tuple[RowKernels, dict[str, list[float]]]:
    """The kernels and a copy, in turns, on logits that are fresh every time."""
    if settings.device == "cpu":
        pytest.skip("Triton kernels need a CUDA device")
    rows = 64 if settings.quick else CHUNK_ROWS
    vocab_size = (QUICK_HEAD if settings.quick else HEADS["Llama-3.1-8B"])[1]
    kernels = RowKernels(rows, vocab_size, settings.dtype, settings.device)
    steps = kernels.steps()
    found = interleaved_samples(steps, settings.repeats, settings.device, kernels.restore, "rows")
    return kernels, found


@pytest.mark.parametrize("who", PASSES)
def test_row_kernels(
    who: str, times: tuple[RowKernels, dict[str, list[float]]], record: Callable[..., None]
) -> None:
    kernels, samples = times
    rows, vocab_size = kernels.raw.shape
    record(
        samples[who],
        measure="row kernel",
        who=who,
        ours=who != COPY,
        rows=rows,
        vocab_size=vocab_size,
        dtype=str(kernels.raw.dtype).removeprefix("torch."),
        bytes=PASSES[who] * kernels.raw.nbytes,
    )


@pytest.fixture(scope="module")
def ceilings(settings: Settings) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Bytes or operations, and times, of a large copy and of a large product."""
    num_bytes, rows = (2**20, 128) if settings.quick else CEILINGS[settings.device]
    like = {"dtype": settings.dtype, "device": settings.device}
    source = torch.empty(num_bytes // settings.dtype.itemsize, **like).normal_()
    copied = torch.empty_like(source)
    left, right = torch.randn(2, rows, rows, **like).unbind()
    product = torch.empty_like(left)
    steps: dict[str, Callable[[], object]] = {
        COPY: lambda: copied.copy_(source),
        PRODUCT: lambda: torch.mm(left, right, out=product),
    }
    samples = interleaved_samples(steps, settings.repeats, settings.device, says="ceilings")
    return {COPY: 2 * source.nbytes, PRODUCT: 2 * rows**3}, samples


@pytest.mark.parametrize(("who", "counts"), [(COPY, "bytes"), (PRODUCT, "operations")])
def test_ceilings(
    who: str,
    counts: str,
    ceilings: tuple[dict[str, int], dict[str, list[float]]],
    record: Callable[..., None],
) -> None:
    amounts, samples = ceilings
    record(samples[who], measure="ceiling", who=who, ours=False, **{counts: amounts[who]})
