"""Time the row kernels of ``row_chunks``, which turn logits into gradients.

Timed are `RowKernels.pair_rows` and `soft_rows` beside a copy of the same logits: Triton kernels on
a GPU, compiled ops on the CPU, there beside the same in PyTorch operations. Figures: "Rows of
logits" in RESULTS.md.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels.row_chunks import cpu, pytorch
from sftmix_kernels.schedules import runs_triton
from sftmix_kernels.transform import LogitTransform

from .bench_loss import PEER_LIMIT
from .measure import SuiteError, interleaved_samples
from .records import COPY, PAIR_ROWS, PAIR_ROWS_OPERATIONS, SOFT_ROWS
from .result_file import Results
from .settings import HEADS, QUICK_HEAD, Settings

# Rows of logits read or written: a copy reads and writes each once; the kernels read each twice
# (once for the LSEs, once for the gradients) and write it once. Where L2 still holds some of what
# is read a second time, a kernel's share of a copy's rate can pass 1.
PASSES = {COPY: 2, PAIR_ROWS: 3, SOFT_ROWS: 3, PAIR_ROWS_OPERATIONS: 3}
CHUNK_ROWS, CHECKED_ROWS = {"cpu": 512, "cuda": 4096}, 64


class RowKernels:
    """The logits of one chunk, what the kernels take with them, and a buffer to copy to."""

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
        self.ops: ModuleType = cpu
        if runs_triton(self.raw):
            from sftmix_kernels.row_chunks import kernels

            self.ops = kernels

    def restore(self) -> None:
        """Put raw logits in place of the last gradients."""
        self.logits.copy_(self.raw)

    def pair_rows(self, ops: ModuleType | None = None) -> tuple[Tensor, Tensor]:
        """Run the kernel of pairs: losses, and gradients in place of the logits."""
        options = (self.mix_ratio, self.transform, True)
        rows = (self.logits, self.labels, self.row_weight)
        found = (ops or self.ops).pair_rows_(*rows, self.share, self.pair_weight, *options)
        return found  # type: ignore[no-any-return]

    def soft_rows(self) -> Tensor:
        """Run the kernel of single rows: losses, and gradients in place of the logits."""
        rows = (self.logits, self.labels.unsqueeze(-1), None, self.row_weight)
        return self.ops.soft_rows_(*rows, self.transform, True)  # type: ignore[no-any-return]

    def copy(self) -> Tensor:
        """Copy the logits."""
        return self.copied.copy_(self.raw)

    def expected(self, who: str) -> tuple[Tensor, Tensor]:
        """Return losses and logit gradients of a kernel, by PyTorch operations in float32."""
        logits = self.raw.float().detach().requires_grad_()
        losses = F.cross_entropy(logits, self.labels, reduction="none")
        total = losses.sum()
        if who == PAIR_ROWS:
            (logits_c, logits_u), share = logits.chunk(2), self.share.unsqueeze(-1)
            mixed = share[:, 0] * logits_c + share[:, 1] * logits_u
            for part, labels in zip(self.share.t(), self.labels.chunk(2), strict=True):
                mixup = part * F.cross_entropy(mixed, labels, reduction="none")
                total = total + self.mix_ratio * mixup.sum()
        return losses.detach(), torch.autograd.grad(total, logits)[0]

    def check(self, who: str) -> bool:
        """Hold a kernel to PyTorch operations.

        Raises:
            SuiteError: it finds something else.
        """
        self.restore()
        found = self.pair_rows()[0] if who == PAIR_ROWS else self.soft_rows()
        expected = self.expected(who)
        for name, mine, theirs in zip(
            ("losses", "gradient"), (found, self.logits), expected, strict=True
        ):
            off = float((mine.float() - theirs).norm() / theirs.norm())
            if not off <= PEER_LIMIT:
                raise SuiteError(f"{who}: {name} are off by {off:.3g} of their norm")
        return True


def measure(settings: Settings, results: Results) -> None:
    """Time the row kernels."""
    results.attempt("row kernels", partial(measure_rows, settings, results), ours=True)


def measure_rows(settings: Settings, results: Results) -> None:
    """Time the kernels that are right and a copy, in turns, on logits that are fresh every time."""
    vocab_size = (QUICK_HEAD if settings.quick else HEADS["Llama-3.1-8B"])[1]
    like = (vocab_size, settings.dtype, settings.device)
    few = RowKernels(CHECKED_ROWS, *like)
    right = [
        who
        for who in (PAIR_ROWS, SOFT_ROWS)
        if results.attempt(f"{who}, row kernel", partial(few.check, who), ours=True)
    ]
    num_rows = CHECKED_ROWS if settings.quick else CHUNK_ROWS[settings.device]
    kernels = RowKernels(num_rows, *like)
    calls = {PAIR_ROWS: kernels.pair_rows, SOFT_ROWS: kernels.soft_rows}
    steps: dict[str, Callable[[], object]] = {COPY: kernels.copy}
    steps |= {who: calls[who] for who in right}
    if settings.device == "cpu":
        steps[PAIR_ROWS_OPERATIONS] = partial(kernels.pair_rows, pytorch)
    samples = interleaved_samples(
        steps, settings.repeats, settings.device, kernels.restore, "row kernels"
    )
    for who, seconds in samples.items():
        results.add_times(
            seconds,
            measure="row kernel",
            who=who,
            ours=who in calls,
            rows=kernels.raw.shape[0],
            vocab_size=vocab_size,
            dtype=settings.dtype_name,
            bytes=PASSES[who] * kernels.raw.nbytes,
        )
