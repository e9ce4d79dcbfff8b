"""Search the launch of the pair-row kernel: columns, warps, stages, registers, direction.

Timed is `launch`, the kernel under other constants, beside a copy of its logits. No figure is
committed; the comments beside the constants have what was chosen.

Legend: V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from .bench_row_chunks import CHUNK_ROWS, PASSES, RowKernels
from .measure import interleaved_samples
from .records import COPY, PAIR_ROWS
from .result_file import Results
from .settings import HEADS, QUICK_HEAD, Settings

# Columns, warps, blocks on their way, programs that fit on an SM at once.
BLOCKS, WARPS, STAGES, PROGRAMS = (1024, 2048, 4096), (4, 8, 16), (3, 4, 5, 6), range(1, 6)
# The name of the option by which the second pass runs from the last block to the first.
REVERSED = "REVERSED"
# Each has to be compiled: a quick run takes no more.
QUICK_LAUNCHES = 3


class Launch(NamedTuple):
    """The constants of one launch."""

    columns: int
    warps: int
    stages: int
    registers: int
    backwards: bool | None = None  # None leaves the direction as it is

    def options(self, known: dict[str, int | bool]) -> dict[str, int | bool]:
        """Return the options of the kernel, of which those are ``known`` that it has."""
        names = ("BLOCK", "num_warps", "STAGES", "maxnreg")
        mine = dict(zip(names, self[:4], strict=True))
        if self.backwards is not None and REVERSED in known:
            mine[REVERSED] = self.backwards
        return known | mine

    @property
    def name(self) -> str:
        """Return the launch in words."""
        said = f"{self.columns} columns, {self.warps} warps, {self.stages} stages, "
        said += f"{self.registers} registers"
        direction = {None: "", True: ", backwards", False: ", forwards"}
        return said + direction[self.backwards]


# 4, 2 or 1 programs on an SM, of 16 warps together.
SHORT = tuple(
    Launch(columns, warps, 5, 128, backwards)
    for columns, warps in ((1024, 4), (2048, 8), (4096, 16))
    for backwards in (False, True)
)


def launches() -> list[Launch]:
    """Return all of four or eight columns a thread, in both directions."""
    found = set[Launch]()
    for block, warps, stages, programs in itertools.product(BLOCKS, WARPS, STAGES, PROGRAMS):
        registers = min(255, 65536 // (32 * warps * programs) // 8 * 8)
        if block // (32 * warps) in (4, 8) and registers >= 64:
            one = Launch(block, warps, stages, registers)
            found |= {one._replace(backwards=backwards) for backwards in (False, True)}
    return sorted(found)


def chosen(settings: Settings) -> list[Launch]:
    """Return the launches of a run."""
    found = list(SHORT) if settings.short else launches()
    return found[: QUICK_LAUNCHES if settings.quick else None]


def launch(values: Launch, rows: RowKernels) -> list[torch.Tensor]:
    """Run the pair-row kernel with other constants; return both losses and the gradients."""
    from sftmix_kernels.row_chunks.kernels import launch_options, pair_rows_kernel, width_of

    mixup = torch.empty_like(rows.pair_weight)
    ntp = torch.empty_like(rows.row_weight)
    options = values.options(launch_options(rows.logits))
    pair_rows_kernel[(mixup.numel(),)](
        rows.logits,
        rows.logits.stride(0),
        width_of(rows.logits),
        rows.labels,
        rows.row_weight,
        rows.share,
        rows.pair_weight,
        rows.mix_ratio,
        ntp,
        mixup,
        mixup.numel(),
        rows.logits.shape[1],
        None,
        None,
        HAS_BIAS=False,
        NEEDS_GRADIENT=True,
        **options,
    )
    return [ntp, mixup, rows.logits]


def measure(settings: Settings, results: Results) -> None:
    """Search launches, which need a GPU."""
    if settings.device == "cpu":
        results.miss("left_out", f"{PAIR_ROWS} launch", "Triton kernels need a CUDA device")
        return
    vocab_size = (QUICK_HEAD if settings.quick else HEADS["Llama-3.1-8B"])[1]
    count = 64 if settings.quick else CHUNK_ROWS[settings.device]
    rows = RowKernels(count, vocab_size, settings.dtype, settings.device)
    work = partial(measure_launches, rows, chosen(settings), settings, results)
    results.attempt(f"{PAIR_ROWS} launch", work, ours=True)


def measure_launches(
    rows: RowKernels, wanted: list[Launch], settings: Settings, results: Results
) -> None:
    """Time the kernel under each launch in turns with a copy, on logits fresh every time."""
    what = f"{PAIR_ROWS} launch"
    rows.restore()
    expected = [t.clone() for t in (*rows.pair_rows(), rows.logits)]

    def is_right(values: Launch) -> bool:
        rows.restore()
        for mine, theirs in zip(launch(values, rows), expected, strict=True):
            # Sums in another order: a last digit of the dtype may be another.
            rtol = max(1e-4, 2 * torch.finfo(mine.dtype).eps)
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-4)
        return True

    steps: dict[str, Callable[[], object]] = {COPY: rows.copy}
    for values in wanted:
        name = values.name
        if results.attempt(f"{what}, {name}", partial(is_right, values), ours=True):
            steps[name] = partial(launch, values, rows)
    samples = interleaved_samples(
        steps, settings.repeats, settings.device, rows.restore, "launches"
    )
    copied = median(samples.pop(COPY)) * PASSES[PAIR_ROWS] / PASSES[COPY]
    for name, seconds in samples.items():
        fields = {"case": what, "what": what, "who": name, "ours": True}
        results.add_times(seconds, measure="tuning", **fields, share=copied / median(seconds))
