"""Time per-example perplexity without gradients: ours, its bare products, and what others pick.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from sftmix_kernels.budget import Budget
from tools.peak_memory import peak_extra_bytes

from .measure import interleaved_samples
from .perplexity_providers import (
    Perplexity,
    Tokens,
    bare,
    check,
    make_tokens,
    passed,
    providers,
    require_compiled,
)
from .records import BARE_CALL, BARE_CHUNKS, STREAMING
from .result_file import Results
from .settings import QUICK, Case, Settings

CHECKED_TOKENS = 256
# Head and tokens of each device.
SIZES = {"cpu": ("small", 4096), "cuda": ("Llama-3.1-8B", 8192)}


def size_of(settings: Settings) -> Case:
    """Return the head and tokens that a run measures."""
    return Case(QUICK, 256) if settings.quick else Case(*SIZES[settings.device])


def tokens_of(case: Case, settings: Settings, most: int | None = None) -> Tokens:
    """Return all tokens of a case, or at most as many."""
    rows = case.rows if most is None else min(case.rows, most)
    return make_tokens(rows, *case.sizes, settings.dtype, settings.device)


def measure(settings: Settings, results: Results) -> None:
    """Time everyone."""
    calls, left_out = providers()
    if not settings.peers:
        left_out |= dict.fromkeys(set(calls) - {STREAMING}, "--no-peers")
        calls = {STREAMING: calls[STREAMING]}
    results.leave_out({f"{who}, perplexity": why for who, why in left_out.items()})
    measure_whole(settings, size_of(settings), calls, results)


@torch.no_grad()
def measure_whole(
    settings: Settings, case: Case, calls: Mapping[str, Perplexity], results: Results
) -> None:
    """Check everyone on the first tokens, then weigh and time in turns those who are right."""
    few, device = tokens_of(case, settings, CHECKED_TOKENS), settings.device
    own: dict[str, dict[str, Any]] = {BARE_CHUNKS: {}}
    for who, call in calls.items():
        work = partial(checked, who, call, few, device)
        found = results.attempt(f"{who}, perplexity", work, who == STREAMING)
        if found is not None:
            own[who] = {"loss_error": found.largest}
    del few
    x = tokens_of(case, settings)
    steps: dict[str, Callable[[], object]] = {}
    for who, figures in own.items():
        step = partial(bare if who == BARE_CHUNKS else calls[who], x)
        weigh = partial(peak_extra_bytes, step, device)
        peak = results.attempt(f"{who}, perplexity", weigh, who == STREAMING)
        if peak is not None:
            figures["peak_bytes"], steps[who] = peak, step
    if device == "cpu":
        results.miss("left_out", f"{BARE_CALL}, perplexity", "holds all logits: only on a GPU")
    else:
        room = partial(x.hidden.new_empty, case.rows, case.sizes[1])
        logits = results.attempt(f"{BARE_CALL}, perplexity", room, ours=False)
        if logits is not None:
            own[BARE_CALL] = {}
            steps[BARE_CALL] = lambda: torch.mm(x.hidden, x.weight.t(), out=logits)
    samples = interleaved_samples(steps, settings.repeats, device, says=case.size)
    for who, seconds in samples.items():
        results.add_times(
            seconds,
            measure="perplexity",
            case=case.size,
            **settings.sizes(case.rows, *case.sizes),
            operations=2 * case.rows * math.prod(case.sizes),
            who=who,
            ours=who == STREAMING,
            **own[who],
        )


def checked(who: str, call: Perplexity, x: Tokens, device: str) -> Budget:
    """Return the error of one that is right.

    Raises:
        SuiteError: it is wrong, or ours and not compiled.
    """
    if who == STREAMING:
        require_compiled(device)
    return passed(check(call, x))
