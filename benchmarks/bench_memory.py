"""Peak memory of forward + backward against N and V, ours beside its formula (`peaks.py`).

Legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from sftmix_kernels import RowChunks, VocabTiles
from sftmix_kernels.peaks import Shape, peak_bytes
from sftmix_kernels.schedules import runs_triton

from .errors import Oracle, step
from .group import FAILURES
from .inputs import FILTER_EPS, make_inputs
from .interpreter import tidy_launches
from .measure import peak_extra_bytes
from .providers import (
    BOTH,
    FILTERED,
    NTP,
    OURS,
    ROW_CHUNKS,
    VOCAB_TILES,
    Provider,
    find_providers,
)
from .result_file import Results
from .settings import Settings

TASKS = (NTP, BOTH)
LIMIT = 1.05  # of measured / formula
CHECKED_ROWS = 256
SCHEDULES: dict[str, RowChunks | VocabTiles] = {
    ROW_CHUNKS: RowChunks(),
    VOCAB_TILES: VocabTiles(),
    FILTERED: VocabTiles(filter_eps=FILTER_EPS),
}


class Place(NamedTuple):
    """Sizes, and what is varied between them."""

    sweep: str
    rows: int
    hidden_size: int
    vocab_size: int
    interpreted: bool = False

    @property
    def name(self) -> str:
        how = ", interpreted" if self.interpreted else ""
        return f"N = {self.rows}, D = {self.hidden_size}, V = {self.vocab_size}{how}"


# In Triton's interpreter kernels get the memory that they get on a GPU. It is slow: chunks and
# workspaces are small here, so that there are several, as in real sizes.
INTERPRETED: dict[str, tuple[Place, RowChunks | VocabTiles]] = {
    ROW_CHUNKS: (Place("N", 72, 16, 1001, True), RowChunks(rows=24)),
    VOCAB_TILES: (Place("N", 384, 32, 300, True), VocabTiles(max_bytes=2**16)),
    FILTERED: (Place("N", 384, 32, 300, True), VocabTiles(FILTER_EPS, max_bytes=2**16)),
}


def places(device: str, quick: bool) -> list[Place]:
    # The first of each is held where the other is varied.
    if quick:
        sizes: dict[str, Any] = {"D": 32, "N": (512, 256), "V": (1003, 2006)}
    elif device == "cpu":
        sizes = {"D": 128, "N": (2048, 512, 8192), "V": (8192, 16384, 32768)}
    else:
        sizes = {"D": 4096, "N": (8192, 2048, 32768, 131072), "V": (128256, 32768, 256000)}
    rows, vocab_size = sizes["N"][0], sizes["V"][0]
    found = [Place("N", n, sizes["D"], vocab_size) for n in sizes["N"]]
    found += [Place("V", rows, sizes["D"], v) for v in sizes["V"] if v != vocab_size]
    # The largest, for which time may not last, at the end.
    return found[:1] + sorted(found[1:], key=lambda place: place.rows * place.vocab_size)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device, quick = option("device"), option("quick")
    found, left_out = find_providers(Settings(device, peers=option("peers")), compiled=False)
    names = dict.fromkeys([one.who for one in found] + list(left_out))
    cases = [
        (place, task, who) for place in places(device, quick) for task in TASKS for who in names
    ]
    if device == "cpu" and not quick:
        cases += [(place, t, who) for who, (place, _) in INTERPRETED.items() for t in TASKS]
    ids = [f"{place.name}-{task}-{who}" for place, task, who in cases]
    metafunc.parametrize(("place", "task", "who"), cases, ids=ids)


@pytest.fixture(scope="module")
def providers(settings: Settings) -> tuple[dict[tuple[str, str], Provider], dict[str, str]]:
    """Those that do not compile, and why one is left out."""
    found, left_out = find_providers(settings, compiled=False)
    return {(one.who, one.task): one for one in found}, left_out


@pytest.fixture
def provider(
    place: Place,
    task: str,
    who: str,
    providers: tuple[dict[tuple[str, str], Provider], dict[str, str]],
    settings: Settings,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Provider]:
    if settings.out_of_time:
        pytest.skip(f"out of time: {settings.seconds} s are over")
    found, left_out = providers
    alone = who in left_out and not place.interpreted
    name = who if alone else f"{who}, {task}, {place.name}"
    request.node.user_properties.append(("name", name))
    if place.interpreted:
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs TRITON_INTERPRET=1 from the start")
        with tidy_launches():
            yield Provider(who, task, OURS[task](INTERPRETED[who][1]), ours=True)
        return
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if alone:
        pytest.skip(left_out[who])
    yield found[who, task]


def test_memory(
    place: Place, task: str, provider: Provider, settings: Settings, results: Results
) -> None:
    """Right first, then weighed; ours within 5 % of its formula."""
    sizes = (place.hidden_size, place.vocab_size, settings.dtype, settings.device)
    try:
        oracle = oracle_of(task, provider.one_lam, min(place.rows, CHECKED_ROWS) // 2, *sizes)
        found = oracle.errors(step(provider.loss, oracle.x))
        x = provider.inputs(make_inputs(place.rows // 2, *sizes))
        peak = peak_extra_bytes(lambda: step(provider.loss, x), settings.device)
        kernels = runs_triton(x.hidden)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"does not fit: {str(error).splitlines()[0]}")
    except FAILURES as error:
        if provider.ours:
            raise
        pytest.skip(f"FAILED {type(error).__name__}: {error}")
    if not found.passed(provider.limit):
        (pytest.fail if provider.ours else pytest.skip)(f"FAILED {found.says(provider.limit)}")
    formula = formula_bytes(provider, place, settings, kernels) if provider.ours else None
    results.add(
        measure="memory",
        case=place.name,
        sweep=place.sweep,
        task=task,
        who=provider.who,
        ours=provider.ours,
        rows=place.rows,
        hidden_size=place.hidden_size,
        vocab_size=place.vocab_size,
        dtype=str(settings.dtype).removeprefix("torch."),
        peak_bytes=peak,
        formula_bytes=formula,
        interpreted=place.interpreted,
    )
    assert formula is None or peak <= LIMIT * formula


@functools.lru_cache(maxsize=2)
def oracle_of(
    task: str, one_lam: bool, pairs: int, hidden: int, vocab: int, dtype: torch.dtype, device: str
) -> Oracle:
    """Made once for all who are held to it one after the other."""
    x = make_inputs(pairs, hidden, vocab, dtype, device)
    return Oracle(task, Provider("", task, OURS[task](), one_lam=one_lam).inputs(x))


def formula_bytes(provider: Provider, place: Place, settings: Settings, kernels: bool) -> int:
    """What `peaks.py` says of ours."""
    schedule = INTERPRETED[provider.who][1] if place.interpreted else SCHEDULES[provider.who]
    shape = Shape(place.rows, place.hidden_size, place.vocab_size, settings.dtype.itemsize)
    return peak_bytes(provider.task, schedule, shape, kernels)
