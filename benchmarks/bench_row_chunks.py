"""The row kernels of ``row_chunks`` beside a copy of as many logits, and the device's ceilings.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from sftmix_kernels.row_chunks import LogitTransform, cross_entropy_, pair_cross_entropy_

from .group import Group
from .measure import SuiteError, interleaved_samples
from .providers import PEER_LIMIT
from .settings import HEADS, QUICK_HEAD, Settings

COPY, PAIR_ROWS, SOFT_ROWS = "copy", "pair_rows_", "soft_rows_"
# Rows of logits read or written: a copy reads and writes each once; the kernels read each twice
# (once for the LSEs, once for the gradients) and write it once. Where L2 still holds some of what
# is read a second time, a kernel's share of a copy's rate can pass 1.
PASSES = {COPY: 2, PAIR_ROWS: 3, SOFT_ROWS: 3}
CHUNK_ROWS, CHECKED_ROWS = 4096, 64
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

    def in_operations(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Losses and logit gradients of both kernels, by PyTorch operations in float32."""
        first = [half.to(torch.float32, copy=True) for half in self.raw.chunk(2)]
        share, weights = self.share, self.row_weight.chunk(2)
        workspace = torch.empty_like(first[0])
        ntp_c, ntp_u, _ = pair_cross_entropy_(
            (first[0], first[1]),
            self.labels.chunk(2),
            share,
            weights,
            self.pair_weight * self.mix_ratio,
            self.transform,
            workspace,
            needs_gradient=True,
        )
        alone = self.raw.to(torch.float32, copy=True)
        ntp = cross_entropy_(alone, self.labels, self.row_weight, self.transform, True)
        pairs = (torch.cat((ntp_c, ntp_u)), torch.cat(first))
        return {PAIR_ROWS: pairs, SOFT_ROWS: (ntp, alone)}

    def check(self, who: str) -> bool:
        """Whether a kernel finds the same.

        Raises:
            SuiteError: it does not.
        """
        self.restore()
        found = self.pair_rows()[0] if who == PAIR_ROWS else self.soft_rows()
        expected = self.in_operations()[who]
        for name, mine, theirs in zip(
            ("losses", "gradient"), (found, self.logits), expected, strict=True
        ):
            off = float((mine.float() - theirs).norm() / theirs.norm())
            if not off <= PEER_LIMIT:
                raise SuiteError(f"{who}: {name} are off by {off:.3g} of their norm")
        return True


def measure_rows(settings: Settings) -> Group:
    """The kernels that are right and a copy, in turns, on logits that are fresh every time."""
    vocab_size = (QUICK_HEAD if settings.quick else HEADS["Llama-3.1-8B"])[1]
    like = (vocab_size, settings.dtype, settings.device)
    group, few = Group(), RowKernels(CHECKED_ROWS, *like)
    right = [
        who
        for who in (PAIR_ROWS, SOFT_ROWS)
        if group.attempt(who, partial(few.check, who), ours=True)
    ]
    kernels = RowKernels(CHECKED_ROWS if settings.quick else CHUNK_ROWS, *like)
    steps = {who: step for who, step in kernels.steps().items() if who in (COPY, *right)}
    samples = interleaved_samples(
        steps, settings.repeats, settings.device, kernels.restore, "row kernels"
    )
    for who, seconds in samples.items():
        group.add(
            who,
            seconds,
            measure="row kernel",
            who=who,
            ours=who != COPY,
            rows=kernels.raw.shape[0],
            vocab_size=vocab_size,
            dtype=str(settings.dtype).removeprefix("torch."),
            bytes=PASSES[who] * kernels.raw.nbytes,
        )
    return group


@pytest.fixture(scope="module")
def row_kernels(settings: Settings) -> Group:
    """All of them, measured at once."""
    if settings.device == "cpu":
        pytest.skip("Triton kernels need a CUDA device")
    return measure_rows(settings)


@pytest.mark.parametrize("who", PASSES)
def test_row_kernels(who: str, row_kernels: Group, request: pytest.FixtureRequest) -> None:
    row_kernels.write(who, f"{who}, row kernel", request)


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
