"""Per-example perplexity without gradients, float32: ours, its products alone, and others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sftmix_kernels.perplexity import block_rows

from .measure import Seconds, SuiteError, interleaved_seconds, peak_extra_bytes
from .perplexity_providers import (
    BARE_CHUNKS,
    DENSE,
    FOLD,
    OURS,
    VOCAB_CHUNK,
    Tokens,
    bare,
    check,
    make_fold,
    make_tokens,
    providers,
    require_compiled,
)
from .tables import print_providers, verdicts

# Factors of the provider named that ours must stay under.
TARGETS = (("seconds", BARE_CHUNKS, 1.20), ("seconds", DENSE, 0.50), ("peak_bytes", DENSE, 0.10))
FOLD_OPERATIONS = "PyTorch operations"
FOLD_TARGETS = (("seconds of a fold", FOLD_OPERATIONS, 1 / 3),)
PLAIN = "float32"
# Dtype and options of each chunk of logits that is folded.
FOLDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    PLAIN: (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "float32, softcap and bias": (torch.float32, {"softcap": 30.0, "bias": True}),
}
CHECKED_TOKENS = 256
# A fold takes milliseconds, the rest about a second.
FOLDS_OF_A_REPEAT = 10


def run(tokens: int, hidden_size: int, vocab_size: int, repeats: int) -> dict[str, object]:
    """Measure the whole, then the fold alone.

    Raises:
        SuiteError: the extension is not built, or the compiled fold is wrong.
    """
    info = require_compiled("cpu")
    x = make_tokens(tokens, hidden_size, vocab_size)
    with torch.no_grad():
        whole = measure_whole(x, repeats)
        columns = min(VOCAB_CHUNK, vocab_size)
        folds = measure_folds(block_rows(x.hidden, columns), columns, FOLDS_OF_A_REPEAT * repeats)
    return {
        "build": info,
        **whole,
        "folds": folds["folds"],
        "targets": [*whole["targets"], *folds["targets"]],
    }


def measure_whole(x: Tokens, repeats: int) -> dict[str, Any]:
    """Check every provider on the first tokens, measure those that pass, print the table."""
    calls, left_out = providers()
    small = make_tokens(min(x.labels.shape[0], CHECKED_TOKENS), *reversed(x.weight.shape))
    errors = {}
    for name, call in list(calls.items()):
        found = check(call, small)
        errors[name] = found.error
        if not found.passed:
            left_out[name] = found.says
            del calls[name]
    steps: dict[str, Callable[[], object]] = {n: partial(call, x) for n, call in calls.items()}
    steps[BARE_CHUNKS] = lambda: bare(x)
    seconds = interleaved_seconds(steps, repeats)
    peaks = {name: peak_extra_bytes(step) for name, step in steps.items()}
    print_providers(seconds, peaks, errors, left_out, DENSE)
    print(f"loss error: of log-perplexities of {len(small.labels)} tokens, against float64")
    medians = {name: time.median for name, time in seconds.items()}
    reached = verdicts({"seconds": medians, "peak_bytes": peaks}, OURS, TARGETS)
    rows = {
        name: {**time._asdict(), "peak_bytes": peaks[name], "loss_error": errors.get(name)}
        for name, time in seconds.items()
    }
    return {"providers": rows, "left_out": left_out, "targets": reached}


def measure_folds(num_rows: int, num_columns: int, repeats: int) -> dict[str, Any]:
    """The compiled fold beside PyTorch operations, on one chunk of logits that is there already."""
    print(f"\nfold of {num_rows} x {num_columns} logits")
    print(f"{'logits':26} {'by':19} {'median ms':>9} {'quartiles':>15} {'ns/logit':>9} {'GB/s':>6}")
    found: dict[str, dict[str, Any]] = {}
    for name, (dtype, options) in FOLDS.items():
        fold = make_fold(num_rows, num_columns, dtype, **options)
        checked = fold.check()
        if not checked.passed:
            raise SuiteError(f"{FOLD}, {name}: {checked.says}")
        steps = {FOLD: fold.compiled, FOLD_OPERATIONS: fold.operations}
        times = interleaved_seconds(steps, repeats)
        found[name] = {by: fold_figures(time, num_rows, num_columns, dtype)
                       for by, time in times.items()}  # fmt: skip
        found[name][FOLD]["loss_error"] = checked.error
        for by, row in found[name].items():
            quartiles = f"{1e3 * row['low']:.3f}-{1e3 * row['high']:.3f}"
            print(
                f"{name:26} {by:19} {1e3 * row['median']:9.3f} {quartiles:>15} "
                f"{row['ns_per_logit']:9.3f} {row['gb_per_second']:6.1f}"
            )
    print("GB/s: of the logits, read once")
    medians = {by: row["median"] for by, row in found[PLAIN].items()}
    reached = verdicts({FOLD_TARGETS[0][0]: medians}, FOLD, FOLD_TARGETS)
    return {"folds": found, "targets": reached}


def fold_figures(time: Seconds, num_rows: int, num_columns: int, dtype: torch.dtype) -> dict:
    logits = num_rows * num_columns
    return {
        **time._asdict(),
        "logits": [num_rows, num_columns],
        "ns_per_logit": 1e9 * time.median / logits,
        "gb_per_second": logits * dtype.itemsize / time.median / 1e9,
    }
