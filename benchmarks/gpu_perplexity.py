"""Perplexity on a GPU: the whole beside its products, the fold beside copy bandwidth, a search.

Legend: N tokens, D hidden size, V vocabulary, K rows and C columns of a chunk of logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from sftmix_kernels import perplexity

from .bench_row_kernels import COPY
from .gpu_report import IN_HBM, IN_HBM_CHUNK, IN_L2, ONE_PRODUCT
from .measure import L2Scrub, Seconds, SuiteError, interleaved_seconds, peak_extra_bytes
from .perplexity_providers import (
    BARE_CHUNKS,
    FOLD,
    OURS,
    VOCAB_CHUNK,
    Fold,
    Tokens,
    bare,
    check,
    make_fold,
    make_tokens,
    ours,
    providers,
    require_compiled,
)

if TYPE_CHECKING:
    from .bench_gpu import Settings

DTYPES = ("bfloat16", "float16", "float32")
SOFTCAP = 30.0
# Launches of one measurement where logits stay in L2: one alone takes microseconds, about as long
# as the events around it.
LAUNCHES = 20
# What `tune` searches: MiB of the workspace, and vocabulary entries of a chunk.
WORKSPACES = (8, 16, 25, 32, 64, 128, 256)
CHUNKS = (2048, 4096, 8192, 16384, 32768)

Attempt = Callable[[str, Callable[[], Any]], Any]


def tokens_of(settings: Settings, rows: int) -> Tokens:
    sizes = (rows, settings.hidden_size, settings.vocab_size)
    return make_tokens(*sizes, getattr(torch, settings.dtype), settings.device)


@torch.no_grad()
def measure_whole(settings: Settings, attempt: Attempt) -> dict[str, Any]:
    """All who are right on fewer tokens, in turns with the products alone.

    Raises:
        SuiteError: the extension is not built for the device, or ours is wrong.
    """
    build = require_compiled(settings.device)
    calls, left_out = providers()
    small = tokens_of(settings, settings.check_rows)
    errors = {}
    for name, call in list(calls.items()):
        found = attempt(f"{name}, check", partial(check, call, small))
        if found is not None and found.passed:
            errors[name] = found.error
            continue
        left_out[name] = "its check failed" if found is None else found.says
        del calls[name]
    if OURS not in calls:
        raise SuiteError(f"{OURS}: {left_out[OURS]}")
    x = tokens_of(settings, settings.rows)
    logits = x.hidden.new_empty(x.labels.shape[0], x.weight.shape[0])
    steps: dict[str, Callable[[], object]] = {
        BARE_CHUNKS: partial(bare, x),
        ONE_PRODUCT: lambda: torch.mm(x.hidden, x.weight.t(), out=logits),
    }
    peaks = {}
    for name, call in calls.items():
        step = partial(call, x)
        peak = attempt(name, partial(peak_extra_bytes, step, settings.device))
        if peak is not None:
            steps[name], peaks[name] = step, peak
    seconds = interleaved_seconds(steps, settings.repeats, settings.device)
    rows = {
        name: {
            **time._asdict(),
            "tflops": 2 * logits.numel() * settings.hidden_size / time.median / 1e12,
            "workspace_bytes": peaks.get(name),
            "loss_error": errors.get(name),
        }
        for name, time in seconds.items()
    }
    return {"build": build, "providers": rows, "left_out": left_out}


def places(settings: Settings) -> dict[str, tuple[int, int]]:
    """Rows and columns of the logits that are folded, by where they lie."""
    chunk = min(VOCAB_CHUNK, settings.vocab_size)
    hidden = tokens_of(settings, settings.rows).hidden
    return {
        IN_HBM: (settings.rows, settings.vocab_size),
        IN_HBM_CHUNK: (settings.rows, chunk),
        IN_L2: (perplexity.block_rows(hidden, chunk), chunk),
    }


@torch.no_grad()
def measure_folds(settings: Settings, attempt: Attempt) -> dict[str, dict[str, Any]]:
    """The compiled fold beside a copy of the same logits, by bytes moved a second.

    The fold reads each logit once; a copy reads and writes each, and so moves twice the bytes.

    Raises:
        SuiteError: the extension is not built for the device.
    """
    require_compiled(settings.device)
    found: dict[str, dict[str, Any]] = {}
    for place, (rows, columns) in places(settings).items():
        for dtype in DTYPES:
            name = f"{place}, {rows} x {columns} {dtype}"
            times = attempt(name, partial(fold_times, place, rows, columns, dtype, settings))
            bytes_once = rows * columns * getattr(torch, dtype).itemsize
            for step, time in (times or {}).items():
                moved = bytes_once * (2 if step == COPY else 1)
                found[f"{step}, {name}"] = {
                    **time._asdict(),
                    "step": step,
                    "place": place,
                    "dtype": dtype,
                    "bytes": moved,
                    "gb_per_second": moved / time.median / 1e9,
                }
            if settings.device != "cpu":
                torch.cuda.empty_cache()
    return with_shares(found, settings.dtype)


def with_shares(found: dict[str, dict[str, Any]], dtype: str) -> dict[str, dict[str, Any]]:
    """Rates also as shares of the copy of all logits, in HBM: the device's own rate."""
    copies = [
        row["gb_per_second"]
        for row in found.values()
        if (row["step"], row["place"], row["dtype"]) == (COPY, IN_HBM, dtype)
    ]
    if not copies:
        return found
    return {
        name: {**row, "share_of_copy": row["gb_per_second"] / copies[0]}
        for name, row in found.items()
    }


def fold_times(
    place: str, rows: int, columns: int, dtype: str, settings: Settings
) -> dict[str, Seconds]:
    """Seconds of one launch; where logits are to lie in L2, of one of many in a row.

    Raises:
        SuiteError: the compiled fold is wrong.
    """
    fold = make_fold(rows, columns, getattr(torch, dtype), settings.device)
    folds = {FOLD: fold, f"{FOLD} with softcap": fold._replace(softcap=SOFTCAP)}
    for name, one in folds.items():
        checked = one.check()
        if not checked.passed:
            raise SuiteError(f"{name}: {checked.says}")
    launches = LAUNCHES if place == IN_L2 and settings.device != "cpu" else 1
    steps: dict[str, Callable[[], object]] = {
        name: partial(launch, one, launches) for name, one in folds.items()
    }
    prepare: Callable[[], object] | None = None
    if place == IN_L2:
        prepare = write_logits(fold, settings.device)
    else:
        copied = torch.empty_like(fold.logits)
        steps[COPY] = lambda: copied.copy_(fold.logits)
    seconds = interleaved_seconds(steps, settings.repeats, settings.device, prepare)
    return {name: Seconds(*(s / launches for s in time)) for name, time in seconds.items()}


def launch(fold: Fold, times: int) -> None:
    for _ in range(times):
        fold.compiled()


def write_logits(fold: Fold, device: str) -> Callable[[], object]:
    """Puts the logits into L2, as their product does, after what keeps the device busy while the
    host launches what is to be timed."""
    scrub = (lambda: None) if device == "cpu" else L2Scrub()

    def prepare() -> None:
        scrub()
        fold.logits.mul_(1.0)

    return prepare


@torch.no_grad()
def tune(settings: Settings, attempt: Attempt) -> dict[str, dict[str, float]]:
    """The whole with other workspaces and chunks beside the products in the same, fastest first."""
    require_compiled(settings.device)
    x = tokens_of(settings, settings.rows)
    steps: dict[str, Callable[[], object]] = {}
    vocab_size = x.weight.shape[0]
    chunks = [chunk for chunk in CHUNKS if chunk <= vocab_size] or [vocab_size]
    for size, chunk in itertools.product(WORKSPACES, chunks):
        room = size * 2**20
        if room < chunk * x.hidden.element_size() * perplexity.GEMM_TILE:
            continue
        name = f"{size} MiB, chunks of {chunk}"
        call = partial(within, room, ours, x, chunk)
        if attempt(name, call) is not None:
            steps[name] = call
            steps[f"{name}: {BARE_CHUNKS}"] = partial(within, room, bare, x, chunk)
    seconds = interleaved_seconds(steps, min(settings.repeats, 7), settings.device)
    found = {
        name: {
            **time._asdict(),
            "of_products": time.median / seconds[f"{name}: {BARE_CHUNKS}"].median,
        }
        for name, time in seconds.items()
        if not name.endswith(BARE_CHUNKS)
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["median"]))


def within(room: int, call: Callable[[Tokens, int], Any], x: Tokens, vocab_chunk: int) -> Any:
    """What the call returns with a workspace of at most ``room`` bytes."""

    def block_rows(hidden: Tensor, chunk: int) -> int:
        most = max(1, room // (chunk * hidden.element_size()))
        blocks = -(-hidden.shape[0] // most)
        rows = perplexity.round_up(-(-hidden.shape[0] // blocks), perplexity.GEMM_TILE)
        return min(hidden.shape[0], rows)

    with patch.object(perplexity, "block_rows", block_rows):
        return call(x, vocab_chunk)
