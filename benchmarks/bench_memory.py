"""Weigh forward and backward of the losses against N and V: ours beside its formula and others.

Weighed is `step` of `bench_loss.py`, for the same providers, by the highest sum of tensor bytes
alive at once; ours must be within `LIMIT` of its formula (`sftmix_kernels.peaks`).
Figures: "memory" in RESULTS.md, `cpu-memory.svg`.

Legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import os
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from sftmix_kernels import RowChunks, VocabTiles
from sftmix_kernels.peaks import Shape, peak_bytes
from sftmix_kernels.schedules import runs_triton
from tools.peak_memory import peak_extra_bytes, tidy_launches

from .bench_loss import OURS, SCHEDULES, Provider, find_providers, step
from .errors import ROWS, Oracle
from .inputs import FILTER_EPS, make_inputs
from .records import BOTH, FILTERED, NTP, ROW_CHUNKS, VOCAB_TILES
from .result_file import Results
from .settings import Settings

TASKS = (NTP, BOTH)
LIMIT = 1.05  # of measured / formula
CHECKED_ROWS = 256


class Place(NamedTuple):
    """The sizes of one measurement, and which of them is varied."""

    sweep: str
    rows: int
    hidden_size: int
    vocab_size: int
    interpreted: bool = False

    @property
    def name(self) -> str:
        """Return the sizes in words."""
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
    """Return the places of a device: the first N is held where V is varied, and the other way."""
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


def measure(settings: Settings, results: Results) -> None:
    """Weigh everyone at every place, and ours by kernels in Triton's interpreter."""
    found, left_out = find_providers(settings, compiled=False)
    results.leave_out(left_out)
    # The interpreter is asked for when the process starts, and used only at the end.
    interpreter = os.environ.pop("TRITON_INTERPRET", None)
    for place in places(settings.device, settings.quick):
        for task in TASKS:
            for one in found:
                if one.task == task:
                    weigh(one, place, SCHEDULES.get(one.who), settings, results)
    if settings.device == "cpu" and not settings.quick:
        with patch.dict(os.environ, {"TRITON_INTERPRET": interpreter or "1"}), tidy_launches():
            for who, (place, schedule) in INTERPRETED.items():
                for task in TASKS:
                    one = Provider(who, task, partial(OURS[task], schedule=schedule), ours=True)
                    weigh(one, place, schedule, settings, results)


def weigh(
    one: Provider,
    place: Place,
    schedule: RowChunks | VocabTiles | None,
    settings: Settings,
    results: Results,
) -> None:
    """Add the peak of one provider at one place, if it is right; ours must meet its formula."""
    name = f"{one.who}, {one.task}, {place.name}"
    found = results.attempt(name, partial(checked_peak, one, place, settings), one.ours)
    if found is None:
        return
    peak, kernels = found
    formula = None
    if schedule is not None:
        shape = Shape(place.rows, place.hidden_size, place.vocab_size, settings.dtype.itemsize)
        formula = peak_bytes(one.task, schedule, shape, kernels)
        if peak > LIMIT * formula:
            results.miss("failed", name, f"{peak} bytes, {peak / formula:.3f} of the formula")
    results.add(
        measure="memory",
        case=place.name,
        sweep=place.sweep,
        task=one.task,
        who=one.who,
        ours=one.ours,
        **settings.sizes(place.rows, place.hidden_size, place.vocab_size),
        peak_bytes=peak,
        formula_bytes=formula,
        interpreted=place.interpreted,
    )
    over = "" if formula is None else f", {peak / formula:.3f} of the formula"
    print(f"{peak / 2**20:9,.1f} MiB{over}: {name}", flush=True)


def checked_peak(one: Provider, place: Place, settings: Settings) -> tuple[int, bool]:
    """Return the peak of one that is right, and whether it ran Triton kernels.

    Raises:
        SuiteError: it is wrong.
    """
    sizes = (place.hidden_size, place.vocab_size, settings.dtype, settings.device)
    oracle = oracle_of(one.task, one.one_lam, min(place.rows, CHECKED_ROWS) // 2, *sizes)
    oracle.check(step(one.loss, oracle.x), one.limit)
    x = make_inputs(place.rows // 2, *sizes).given(one.one_lam)
    peak = peak_extra_bytes(lambda: step(one.loss, x), settings.device)
    return peak, runs_triton(x.hidden)


@functools.lru_cache(maxsize=2)
def oracle_of(
    task: str, one_lam: bool, pairs: int, hidden: int, vocab: int, dtype: torch.dtype, device: str
) -> Oracle:
    """Return the oracle, made once for all who are held to it one after the other."""
    return Oracle(ROWS[task], make_inputs(pairs, hidden, vocab, dtype, device).given(one_lam))
