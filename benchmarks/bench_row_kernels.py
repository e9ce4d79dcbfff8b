"""Ceilings of the device, and the row kernels of ``row_chunks`` beside them.

Legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sftmix_kernels.row_chunks import LogitTransform

from .measure import Seconds, interleaved_seconds
from .providers import Inputs

PRODUCTS = ("forward product", "dH product", "dW product")
COPY, PAIR_ROWS, SOFT_ROWS = "copy", "pair_rows_", "soft_rows_"
# Rows of logits read or written: a copy reads and writes each once; the kernels read each twice
# (once for the LSEs, once for the gradients) and write it once.
PASSES = {COPY: 2, PAIR_ROWS: 3, SOFT_ROWS: 3}
# What `tune` searches: columns, warps, blocks on their way, programs that fit on an SM at once.
BLOCKS, WARPS, STAGES, PROGRAMS = (1024, 2048, 4096), (4, 8, 16), (3, 4, 5, 6), range(1, 6)

# The constants of `sftmix_kernels.triton.row_chunks` that they go into.
LAUNCH = ("BLOCK", "NUM_WARPS", "num_stages", "MAX_REGISTERS")

Steps = dict[str, Callable[[], object]]


class Products:
    """The three bare matrix products of NTP, each in one call, into buffers made beforehand.

    The gradients of the logits are real ones, since a product of mostly tiny numbers draws less
    power than one of random numbers, and so runs faster.
    """

    def __init__(self, x: Inputs) -> None:
        self.hidden, self.weight = x.hidden.detach(), x.weight.detach()
        self.logits = self.hidden @ self.weight.t()
        self.gradient = self.logits.clone()
        self.of_hidden = torch.empty_like(self.hidden)
        self.of_weight = torch.empty_like(self.weight)
        for rows, labels in zip(self.gradient.split(1024), x.labels.split(1024), strict=True):
            rows.copy_(rows.float().softmax(-1))
            rows.scatter_add_(-1, labels.unsqueeze(-1), -torch.ones_like(rows[:, :1]))
        self.operations = 2 * self.hidden.shape[0] * self.weight.numel()

    def forward(self) -> Tensor:
        return torch.mm(self.hidden, self.weight.t(), out=self.logits)

    def steps(self) -> Steps:
        """Each alone."""
        return {
            PRODUCTS[0]: self.forward,
            PRODUCTS[1]: lambda: torch.mm(self.gradient, self.weight, out=self.of_hidden),
            PRODUCTS[2]: lambda: torch.mm(self.gradient.t(), self.hidden, out=self.of_weight),
        }

    def all_three(self) -> None:
        for product in self.steps().values():
            product()


def measure_products(x: Inputs, repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Rates of the vendor's matrix products: a ceiling of what is arithmetic."""
    products = Products(x)
    seconds = interleaved_seconds(products.steps(), repeats, device)
    return {
        name: {**time._asdict(), "tflops": products.operations / time.median / 1e12}
        for name, time in seconds.items()
    }


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

    def steps(self) -> Steps:
        return {COPY: self.copy, PAIR_ROWS: self.pair_rows, SOFT_ROWS: self.soft_rows}


def bandwidths(seconds: Mapping[str, Seconds], bytes_once: int) -> dict[str, dict[str, float]]:
    """Bytes moved, bytes a second, and the share of what the copy reaches."""
    found = {}
    for name, time in seconds.items():
        moved = PASSES[name] * bytes_once
        copied = PASSES[COPY] * bytes_once / seconds[COPY].median
        rate = moved / time.median
        found[name] = {
            **time._asdict(),
            "bytes": moved,
            "gb_per_second": rate / 1e9,
            "share_of_copy": rate / copied,
        }
    return found


def measure_row_kernels(
    num_rows: int, vocab_size: int, dtype: torch.dtype, device: str, repeats: int
) -> dict[str, dict[str, float]]:
    """The kernels and a copy of as many rows, in turns, on logits that are fresh every time."""
    kernels = RowKernels(num_rows, vocab_size, dtype, device)
    seconds = interleaved_seconds(kernels.steps(), repeats, device, kernels.restore)
    return bandwidths(seconds, kernels.raw.nbytes)


def launches() -> list[tuple[int, ...]]:
    """Columns, warps, stages and registers a thread; four or eight columns a thread."""
    found = set()
    for block, warps, stages, programs in itertools.product(BLOCKS, WARPS, STAGES, PROGRAMS):
        registers = min(255, 65536 // (32 * warps * programs) // 8 * 8)
        if block // (32 * warps) in (4, 8) and registers >= 64:
            found.add((block, warps, stages, registers))
    return sorted(found)


def tune(
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    attempt: Callable[[str, Callable[[], object]], object],
) -> dict[str, dict[str, float]]:
    """The pair-row kernel under other launch constants, fastest first; wrong ones fail."""
    from sftmix_kernels.triton import row_chunks

    kernels = RowKernels(num_rows, vocab_size, dtype, device)
    expected = [t.clone() for t in kernels.pair_rows()]
    kept = {name: getattr(row_chunks, name) for name in LAUNCH}

    def under(values: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        block, warps, stages, registers = values
        found = (block, warps, lambda logits: stages, registers)
        for name, value in zip(LAUNCH, found, strict=True):
            setattr(row_chunks, name, value)
        return kernels.pair_rows()

    def first(values: tuple[int, ...]) -> bool:
        kernels.restore()
        torch.testing.assert_close(list(under(values)), expected, rtol=1e-4, atol=1e-4)
        return True

    steps: Steps = {COPY: kernels.copy}
    try:
        for values in launches():
            label = ", ".join(f"{n} {v}" for n, v in zip(LAUNCH, values, strict=True))
            if attempt(label, lambda v=values: first(v)):
                steps[label] = lambda v=values: under(v)
        seconds = interleaved_seconds(steps, repeats, device, kernels.restore)
    finally:
        for name, value in kept.items():
            setattr(row_chunks, name, value)
    copied = seconds.pop(COPY).median * PASSES[PAIR_ROWS] / PASSES[COPY]
    ranked = sorted(seconds.items(), key=lambda item: item[1].median)
    return {name: {**t._asdict(), "share_of_copy": copied / t.median} for name, t in ranked}
