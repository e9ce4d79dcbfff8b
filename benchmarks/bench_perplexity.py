"""Per-example perplexity without gradients: ours, its products alone, and what others pick.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from sftmix_kernels.budget import Budget

from .group import Group
from .measure import interleaved_samples, peak_extra_bytes
from .perplexity_providers import (
    BARE_CHUNKS,
    DENSE,
    ONE_PRODUCT,
    OPERATIONS,
    OURS,
    PEER,
    Perplexity,
    Tokens,
    bare,
    check,
    make_tokens,
    passed,
    providers,
    require_compiled,
)
from .settings import HEADS, QUICK, QUICK_HEAD, Settings

EVERYONE = (OURS, BARE_CHUNKS, ONE_PRODUCT, DENSE, OPERATIONS, PEER)
CHECKED_TOKENS = 256
# Head and tokens of each device.
SIZES = {"cpu": ("small", 4096), "cuda": ("Llama-3.1-8B", 8192)}


class Size(NamedTuple):
    """One head and one batch."""

    head: str
    rows: int  # N
    hidden_size: int
    vocab_size: int

    @property
    def case(self) -> str:
        return f"{self.head}, N = {self.rows}"

    def tokens(self, settings: Settings, most: int | None = None) -> Tokens:
        """All of them, or at most as many."""
        rows = self.rows if most is None else min(self.rows, most)
        like = (settings.dtype, settings.device)
        return make_tokens(rows, self.hidden_size, self.vocab_size, *like)


def size_of(settings: Settings) -> Size:
    """What a run measures."""
    if settings.quick:
        return Size(QUICK, 256, *QUICK_HEAD)
    head, rows = SIZES[settings.device]
    return Size(head, rows, *HEADS[head])


@torch.no_grad()
def measure_whole(
    settings: Settings, size: Size, calls: Mapping[str, Perplexity], left_out: Mapping[str, str]
) -> Group:
    """Check everyone on the first tokens, weigh and time in turns those who are right."""
    group = Group(left_out)
    figures = {
        "measure": "perplexity",
        "case": size.case,
        "rows": size.rows,
        "hidden_size": size.hidden_size,
        "vocab_size": size.vocab_size,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "operations": 2 * size.rows * size.hidden_size * size.vocab_size,
    }
    few = size.tokens(settings, CHECKED_TOKENS)
    errors = {}
    for who, call in calls.items():
        found = group.attempt(who, partial(checked, who, call, few, settings.device), who == OURS)
        if found is not None:
            errors[who] = found.largest
    del few
    x = size.tokens(settings)
    steps: dict[str, Callable[[], object]] = {BARE_CHUNKS: partial(bare, x)}
    steps |= {who: partial(calls[who], x) for who in errors}
    peaks = {}
    for who, step in list(steps.items()):
        weigh = partial(peak_extra_bytes, step, settings.device)
        peaks[who] = group.attempt(who, weigh, who == OURS)
        if peaks[who] is None:
            del steps[who]
    if settings.device == "cpu":
        group.left_out[ONE_PRODUCT] = "holds all logits: on a GPU alone"
    else:
        room = partial(x.hidden.new_empty, size.rows, size.vocab_size)
        logits = group.attempt(ONE_PRODUCT, room, ours=False)
        if logits is not None:
            steps[ONE_PRODUCT] = lambda: torch.mm(x.hidden, x.weight.t(), out=logits)
    samples = interleaved_samples(steps, settings.repeats, settings.device, says=size.case)
    for who, seconds in samples.items():
        own: dict[str, Any] = {"who": who, "ours": who == OURS}
        if who in peaks:
            own["peak_bytes"] = peaks[who]
        if who in errors:
            own["loss_error"] = errors[who]
        group.add(who, seconds, **figures, **own)
    return group


def checked(who: str, call: Perplexity, x: Tokens, device: str) -> Budget:
    """The check of one that is right.

    Raises:
        SuiteError: it is wrong, or ours and not compiled.
    """
    if who == OURS:
        require_compiled(device)
    return passed(check(call, x))


@pytest.fixture(scope="module")
def whole(settings: Settings) -> Group:
    """Everyone, measured at once."""
    if settings.out_of_time:
        pytest.skip(f"out of time: {settings.seconds} s are over")
    calls, left_out = providers()
    if not settings.peers:
        left_out |= dict.fromkeys(set(calls) - {OURS}, "--no-peers")
        calls = {OURS: calls[OURS]}
    return measure_whole(settings, size_of(settings), calls, left_out)


@pytest.mark.parametrize("who", EVERYONE)
def test_perplexity(who: str, whole: Group, request: pytest.FixtureRequest) -> None:
    whole.write(who, f"{who}, perplexity", request)
