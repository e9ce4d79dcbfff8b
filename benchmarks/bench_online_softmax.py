"""Time the compiled fold: beside PyTorch operations on the CPU, beside a copy on a GPU.

Legend: N tokens, V vocabulary, K rows and C columns of a chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from sftmix_kernels.budget import Budget
from sftmix_kernels.perplexity import streaming as perplexity

from .bench_perplexity import size_of
from .measure import L2Scrub, interleaved_samples
from .perplexity_providers import VOCAB_CHUNK, Fold, make_fold, passed, require_compiled
from .records import (
    COPY,
    FOLD,
    FOLD_OPERATIONS,
    FOLD_SOFTCAP,
    IN_CACHE,
    IN_HBM,
    IN_HBM_CHUNK,
    IN_L2,
)
from .result_file import OUT_OF_TIME, Results
from .settings import Settings

OUR_FOLDS = (FOLD, FOLD_SOFTCAP)
SOFTCAP = 30.0
# A fold on the CPU takes milliseconds; all else that its suite measures takes about a second.
FOLDS_OF_A_REPEAT = 10
# Launches of one measurement where logits stay in L2: one takes microseconds, about as long as the
# events around it.
LAUNCHES = 20


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

    @property
    def name(self) -> str:
        """Return place and kind in words."""
        return f"{self.place}, {self.kind}"

    @property
    def who(self) -> tuple[str, ...]:
        """Return who is measured there."""
        if self.place == IN_CACHE:
            return FOLD, FOLD_OPERATIONS
        return OUR_FOLDS if self.place == IN_L2 else (*OUR_FOLDS, COPY)

    def size(self, settings: Settings) -> tuple[int, int]:  # K, C
        """Return rows and columns."""
        whole = size_of(settings)
        rows, vocab_size = whole.rows, whole.sizes[1]
        columns = min(VOCAB_CHUNK, vocab_size)
        if self.place == IN_HBM:
            return rows, vocab_size
        if self.place == IN_HBM_CHUNK:
            return rows, columns
        # As many rows as ours takes at a time, so that its logits of this dtype stay in cache.
        like = {"dtype": getattr(torch, self.dtype), "device": settings.device}
        return perplexity.block_rows(torch.empty(rows, 0, **like), columns), columns


CHUNKS = {
    "cpu": (
        Chunk(IN_CACHE, "float32"),
        Chunk(IN_CACHE, "bfloat16"),
        Chunk(IN_CACHE, "float16"),
        Chunk(IN_CACHE, "float32", SOFTCAP, bias=True),
    ),
    "cuda": tuple(
        Chunk(place, dtype)
        for place in (IN_HBM, IN_HBM_CHUNK, IN_L2)
        for dtype in ("bfloat16", "float16", "float32")
    ),
}


def measure(settings: Settings, results: Results) -> None:
    """Time the folds of every chunk of logits."""
    for chunk in CHUNKS[settings.device]:
        if settings.out_of_time:
            results.miss("left_out", chunk.name, OUT_OF_TIME)
            continue
        results.attempt(chunk.name, partial(measure_folds, chunk, settings, results), ours=True)
        if settings.device != "cpu":
            # All logits of one dtype leave little room for those of the next.
            torch.cuda.empty_cache()


@torch.no_grad()
def measure_folds(chunk: Chunk, settings: Settings, results: Results) -> None:
    """Time everyone on one chunk of logits, in turns, by seconds of one fold or copy.

    A fold reads each logit once; a copy reads and writes each, and so moves twice the bytes.
    """
    rows, columns = chunk.size(settings)
    dtype = getattr(torch, chunk.dtype)
    options = {"softcap": chunk.softcap, "bias": chunk.bias}
    fold = make_fold(rows, columns, dtype, settings.device, **options)
    folds = {FOLD: fold, FOLD_SOFTCAP: fold._replace(softcap=SOFTCAP)}
    launches = LAUNCHES if chunk.place == IN_L2 else 1
    steps: dict[str, Callable[[], object]] = {}
    errors = {}
    for who in filter(folds.__contains__, chunk.who):
        work = partial(checked, folds[who], settings.device)
        found = results.attempt(f"{who}, {chunk.name}", work, ours=True)
        if found is not None:
            steps[who], errors[who] = partial(launch, folds[who], launches), found.largest
    if FOLD_OPERATIONS in chunk.who:
        steps[FOLD_OPERATIONS] = fold.operations
    if COPY in chunk.who:
        copied = torch.empty_like(fold.logits)
        steps[COPY] = lambda: copied.copy_(fold.logits)
    prepare = write_logits(fold, settings.device) if chunk.place == IN_L2 else None
    repeats = settings.repeats * (FOLDS_OF_A_REPEAT if chunk.place == IN_CACHE else 1)
    samples = interleaved_samples(steps, repeats, settings.device, prepare, chunk.name)
    for who, seconds in samples.items():
        softcap = SOFTCAP if who == FOLD_SOFTCAP else chunk.softcap
        own = {"loss_error": errors[who]} if who in errors else {}
        results.add_times(
            [spent / launches for spent in seconds],
            measure="fold",
            case=chunk.place,
            who=who,
            ours=who in OUR_FOLDS,
            place=chunk.place,
            dtype=chunk.dtype,
            kind=chunk._replace(softcap=softcap).kind,
            rows=rows,
            columns=columns,
            bytes=rows * columns * dtype.itemsize * (2 if who == COPY else 1),
            **own,
        )


def checked(fold: Fold, device: str) -> Budget:
    """Return the error of a fold that is right.

    Raises:
        SuiteError: it is wrong, or not compiled.
    """
    require_compiled(device)
    return passed(fold.check())


def launch(fold: Fold, times: int) -> None:
    """Run the fold several times."""
    for _ in range(times):
        fold.compiled()


def write_logits(fold: Fold, device: str) -> Callable[[], object]:
    """Return what puts the logits into L2, as their product does.

    Before, it keeps the device busy while the host launches what is to be timed.
    """
    scrub = (lambda: None) if device == "cpu" else L2Scrub()

    def prepare() -> None:
        scrub()
        fold.logits.mul_(1.0)

    return prepare
