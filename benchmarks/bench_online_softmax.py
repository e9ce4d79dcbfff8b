"""Time the fold of a chunk of logits into the softmax state: the op that ours spends its time in.

Timed is `Fold.compiled`, with and without options. On the CPU it is timed beside the same in
PyTorch operations, on a GPU beside a copy of the logits. It is checked against float64 first.
Figures: "Fold of logits" in RESULTS.md.

Legend: K rows and C columns of a chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels.budget import Budget, budget
from sftmix_kernels.perplexity import online_softmax
from sftmix_kernels.perplexity import streaming as perplexity
from sftmix_kernels.schedules import PADDING

from . import records as names
from .bench_perplexity import passed, require_compiled, size_of, unwarned
from .measure import L2Scrub, interleaved_samples
from .result_file import Results
from .settings import Settings

SOFTCAP = 30.0
# A fold on the CPU takes milliseconds; all else that its suite measures takes about a second.
FOLDS_OF_A_REPEAT = 10
# Launches of one measurement where logits stay in L2: one takes microseconds, about as long as the
# events around it.
LAUNCHES = 20


class Fold(NamedTuple):
    """A chunk of logits in memory, and the states that it is folded into."""

    logits: Tensor  # (K, C), in rows as ours pads them
    bias: Tensor | None  # (C,)
    labels: Tensor  # (K,)
    softcap: float | None
    state: Tensor  # (3, K)

    def compiled(self, times: int = 1) -> None:
        """Run the compiled op."""
        for _ in range(times):
            torch.ops.sftmix_kernels.fold_logits(*self.arguments())

    @unwarned()
    def operations(self) -> None:
        """Run the same by PyTorch operations."""
        online_softmax.fold_logits(*self.arguments())

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, int, float, float | None, Tensor]:
        """Return the op's arguments."""
        return self.logits, self.bias, self.labels, 0, 1.0, self.softcap, self.state

    def check(self) -> Budget:
        """Return the error of the compiled op's token losses on the first rows, from new states."""
        rows = slice(0, 256)
        small = self._replace(logits=self.logits[rows], labels=self.labels[rows])
        found = []
        for one in (Fold.compiled, Fold.operations):
            state = online_softmax.new_state(small.labels.shape[0], small.logits)
            one(small._replace(state=state))
            peak, total, target = state.double()
            found.append((total.log() + peak - target).float())
        logits = small.logits.double()
        if self.bias is not None:
            logits = logits + self.bias.double()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        truth = F.cross_entropy(logits, small.labels, reduction="none")
        compiled, plain = found
        return budget(compiled, truth, plain - truth)


def make_fold(
    num_rows: int,
    num_columns: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    softcap: float | None = None,
    bias: bool = False,
) -> Fold:
    """Return a fold of random logits of unit size."""
    torch.manual_seed(0)
    like = {"dtype": dtype, "device": device}
    padded = torch.empty(num_rows, -(-num_columns // PADDING) * PADDING, **like).normal_()
    return Fold(
        padded[:, :num_columns],
        torch.randn(num_columns, **like) if bias else None,
        torch.randint(0, num_columns, (num_rows,), device=device),
        softcap,
        online_softmax.new_state(num_rows, padded),
    )


class Chunk(NamedTuple):
    """The logits that everyone at one place folds, or copies."""

    place: str
    dtype: str
    softcap: float | None = None
    bias: bool = False

    @property
    def kind(self) -> str:
        """Return dtype and options in words."""
        options = ["softcap"] * (self.softcap is not None) + ["bias"] * self.bias
        return ", ".join(filter(None, (self.dtype, " and ".join(options))))

    def size(self, settings: Settings) -> tuple[int, int]:  # K, C
        """Return rows and columns."""
        whole = size_of(settings)
        rows, vocab_size = whole.rows, whole.sizes[1]
        if self.place == names.IN_HBM:
            return rows, vocab_size
        like = {"dtype": getattr(torch, self.dtype), "device": settings.device}
        hidden = torch.empty(rows, 0, **like)
        columns = perplexity.chunk_columns(hidden, vocab_size, None)
        if self.place == names.IN_HBM_CHUNK:
            return rows, columns
        # As many rows as ours takes at a time, so that its logits of this dtype stay in cache.
        return perplexity.block_rows(hidden, columns), columns


CHUNKS = {
    "cpu": (
        Chunk(names.IN_CACHE, "float32"),
        Chunk(names.IN_CACHE, "bfloat16"),
        Chunk(names.IN_CACHE, "float16"),
        Chunk(names.IN_CACHE, "float32", SOFTCAP, bias=True),
    ),
    "cuda": tuple(
        Chunk(place, dtype)
        for place in (names.IN_HBM, names.IN_HBM_CHUNK, names.IN_L2)
        for dtype in ("bfloat16", "float16", "float32")
    ),
}


def measure(settings: Settings, results: Results) -> None:
    """Time the folds of every chunk of logits."""
    for chunk in CHUNKS[settings.device]:
        if settings.short and chunk.dtype != settings.dtype_name:
            continue
        work = partial(measure_folds, chunk, settings, results)
        results.attempt(f"{chunk.place}, {chunk.kind}", work, ours=True)
        if settings.device != "cpu":
            # All logits of one dtype leave little room for those of the next.
            torch.cuda.empty_cache()


@torch.no_grad()
def measure_folds(chunk: Chunk, settings: Settings, results: Results) -> None:
    """Time everyone on one chunk of logits, in turns, by seconds of one fold or copy.

    A fold reads each logit once; a copy reads and writes each, and so moves twice the bytes.
    """
    (rows, columns), dtype = chunk.size(settings), getattr(torch, chunk.dtype)
    fold = make_fold(rows, columns, dtype, settings.device, softcap=chunk.softcap, bias=chunk.bias)
    folds = {names.FOLD: fold}
    if chunk.place != names.IN_CACHE:
        folds[names.FOLD_SOFTCAP] = fold._replace(softcap=SOFTCAP)
    launches = LAUNCHES if chunk.place == names.IN_L2 else 1
    steps, errors = dict[str, Callable[[], object]](), dict[str, float]()
    for who, one in folds.items():
        work = partial(checked, one, settings.device)
        found = results.attempt(f"{who}, {chunk.place}, {chunk.kind}", work, ours=True)
        if found is not None:
            steps[who], errors[who] = partial(one.compiled, launches), found
    if chunk.place == names.IN_CACHE:
        steps[names.FOLD_OPERATIONS] = fold.operations
    elif chunk.place != names.IN_L2:
        steps[names.COPY] = partial(torch.empty_like(fold.logits).copy_, fold.logits)
    prepare = write_logits(fold, settings.device) if chunk.place == names.IN_L2 else None
    repeats = settings.repeats * (FOLDS_OF_A_REPEAT if chunk.place == names.IN_CACHE else 1)
    says = f"{chunk.place}, {chunk.kind}"
    samples = interleaved_samples(steps, repeats, settings.device, prepare, says)
    for who, seconds in samples.items():
        softcap = SOFTCAP if who == names.FOLD_SOFTCAP else chunk.softcap
        own: dict[str, Any] = {"loss_error": errors[who]} if who in errors else {}
        results.add_times(
            [spent / launches for spent in seconds],
            measure="fold",
            case=chunk.place,
            who=who,
            ours=who in folds,
            place=chunk.place,
            dtype=chunk.dtype,
            kind=chunk._replace(softcap=softcap).kind,
            rows=rows,
            columns=columns,
            bytes=rows * columns * dtype.itemsize * (2 if who == names.COPY else 1),
            **own,
        )


def checked(fold: Fold, device: str) -> float:
    """Return the error of a fold that is right.

    Raises:
        SuiteError: it is wrong, or not compiled.
    """
    require_compiled(device)
    return passed(fold.check())


def write_logits(fold: Fold, device: str) -> Callable[[], object]:
    """Return what puts the logits into L2, as their product does.

    Before, it keeps the device busy while the host launches what is to be timed.
    """
    scrub = (lambda: None) if device == "cpu" else L2Scrub()

    def prepare() -> None:
        scrub()
        fold.logits.mul_(1.0)

    return prepare
