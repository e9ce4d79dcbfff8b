"""Search constants: launches of the pair-row kernel, workspaces of perplexity.

Legend: N tokens, V vocabulary, K rows of a chunk of logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sftmix_kernels.perplexity import streaming as perplexity

from .bench_perplexity import size_of, tokens_of
from .bench_row_chunks import CHUNK_ROWS, PASSES, RowKernels
from .measure import SuiteError, interleaved_samples
from .perplexity_providers import Tokens, bare, ours, require_compiled
from .records import COPY, PAIR_ROWS
from .result_file import Results
from .settings import HEADS, QUICK_HEAD, Settings

# Columns, warps, blocks on their way, programs that fit on an SM at once.
BLOCKS, WARPS, STAGES, PROGRAMS = (1024, 2048, 4096), (4, 8, 16), (3, 4, 5, 6), range(1, 6)
# The constants of `sftmix_kernels.row_chunks.kernels` that they go into.
LAUNCH = ("BLOCK", "NUM_WARPS", "num_stages", "MAX_REGISTERS")
# Each has to be compiled: a quick run takes no more.
QUICK_LAUNCHES = 3
# MiB of the workspace, and vocabulary entries of a chunk.
WORKSPACES = (8, 16, 25, 32, 64, 128, 256)
VOCAB_CHUNKS = (2048, 4096, 8192, 16384, 32768)
# At most so many rounds: there are tens of settings, each measured twice.
MOST_REPEATS = {"cpu": 3, "cuda": 7}
# How far log-perplexities may be off under another workspace, where sums are rounded elsewhere.
AGREE = 1e-4

Launch = tuple[int, ...]  # in the order of `LAUNCH`
Workspace = tuple[int, int]  # MiB, vocabulary entries of a chunk


def launches() -> list[Launch]:
    """Return columns, warps, stages and registers a thread, of four or eight columns a thread."""
    found = set()
    for block, warps, stages, programs in itertools.product(BLOCKS, WARPS, STAGES, PROGRAMS):
        registers = min(255, 65536 // (32 * warps * programs) // 8 * 8)
        if block // (32 * warps) in (4, 8) and registers >= 64:
            found.add((block, warps, stages, registers))
    return sorted(found)


def launch_name(values: Launch) -> str:
    """Return a launch in words."""
    return ", ".join(f"{name} {value}" for name, value in zip(LAUNCH, values, strict=True))


def under(values: Launch, kernels: RowKernels) -> tuple[Tensor, Tensor]:
    """Run the pair-row kernel with other launch constants."""
    from sftmix_kernels.row_chunks import kernels as row_chunks

    block, warps, stages, registers = values
    constants = dict(zip(LAUNCH, (block, warps, lambda logits: stages, registers), strict=True))
    with patch.multiple(row_chunks, **constants):
        return kernels.pair_rows()


def measure(settings: Settings, results: Results) -> None:
    """Search launches, which need a GPU, and workspaces."""
    if settings.device == "cpu":
        results.miss("left_out", f"{PAIR_ROWS} launch", "Triton kernels need a CUDA device")
    else:
        results.attempt(f"{PAIR_ROWS} launch", partial(all_launches, settings, results), ours=True)
    case = size_of(settings)
    chosen_rooms = workspaces(case.sizes[1], settings.dtype.itemsize)
    measure_workspaces(tokens_of(case, settings), chosen_rooms, settings, results)


def all_launches(settings: Settings, results: Results) -> None:
    """Time every launch on the logits of one chunk."""
    rows = 64 if settings.quick else CHUNK_ROWS
    vocab_size = (QUICK_HEAD if settings.quick else HEADS["Llama-3.1-8B"])[1]
    kernels = RowKernels(rows, vocab_size, settings.dtype, settings.device)
    chosen = launches()[: QUICK_LAUNCHES if settings.quick else None]
    measure_launches(kernels, chosen, settings, results)


def add(results: Results, what: str, who: str, seconds: Sequence[float], share: float) -> None:
    """Add the times of one setting, and its share of what bounds it."""
    fields = {"case": what, "what": what, "who": who, "ours": True, "share": share}
    results.add_times(seconds, measure="tuning", **fields)


def measure_launches(
    kernels: RowKernels, chosen: list[Launch], settings: Settings, results: Results
) -> None:
    """Time the kernel under each launch in turns with a copy, on logits fresh every time."""
    what = f"{PAIR_ROWS} launch"
    kernels.restore()
    expected = [t.clone() for t in (*kernels.pair_rows(), kernels.logits)]

    def first(values: Launch) -> bool:
        kernels.restore()
        found = [*under(values, kernels), kernels.logits]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return True

    steps: dict[str, Callable[[], object]] = {COPY: kernels.copy}
    for values in chosen:
        name = launch_name(values)
        if results.attempt(f"{what}, {name}", partial(first, values), ours=True):
            steps[name] = partial(under, values, kernels)
    samples = interleaved_samples(
        steps, settings.repeats, settings.device, kernels.restore, "launches"
    )
    copied = median(samples.pop(COPY)) * PASSES[PAIR_ROWS] / PASSES[COPY]
    for name, seconds in samples.items():
        add(results, what, name, seconds, copied / median(seconds))


def workspaces(vocab_size: int, element_size: int) -> list[Workspace]:
    """Return the workspaces that hold the logits of a tile of rows and a chunk."""
    chunks = [chunk for chunk in VOCAB_CHUNKS if chunk <= vocab_size] or [vocab_size]
    return [
        (size, chunk)
        for size, chunk in itertools.product(WORKSPACES, chunks)
        if size * 2**20 >= chunk * element_size * perplexity.GEMM_TILE
    ]


def workspace_name(setting: Workspace) -> str:
    """Return a workspace in words."""
    return "{} MiB, chunks of {}".format(*setting)


def within(room: int, call: Callable[[Tokens, int], Any], x: Tokens, vocab_chunk: int) -> Any:
    """Return what the call returns with a workspace of at most ``room`` bytes."""

    def block_rows(hidden: Tensor, chunk: int) -> int:
        most = max(1, room // (chunk * hidden.element_size()))
        blocks = -(-hidden.shape[0] // most)
        rows = perplexity.round_up(-(-hidden.shape[0] // blocks), perplexity.GEMM_TILE)
        return min(hidden.shape[0], rows)

    with patch.object(perplexity, "block_rows", block_rows):
        return call(x, vocab_chunk)


@torch.no_grad()
def measure_workspaces(
    x: Tokens, chosen: list[Workspace], settings: Settings, results: Results
) -> None:
    """Time perplexity in each workspace, in turns with the bare products in the same."""
    what = "perplexity workspace"
    expected = ours(x).log()

    def first(call: Callable[[], Tensor]) -> bool:
        require_compiled(settings.device)
        found = float((call().log() / expected - 1).abs().max())
        if not found <= AGREE:
            raise SuiteError(f"log-perplexities differ by {found:.3g} of themselves")
        return True

    steps: dict[tuple[str, bool], Callable[[], object]] = {}
    for size, chunk in chosen:
        name, room = workspace_name((size, chunk)), size * 2**20
        call = partial(within, room, ours, x, chunk)
        if results.attempt(f"{what}, {name}", partial(first, call), ours=True):
            steps[name, True] = call
            steps[name, False] = partial(within, room, bare, x, chunk)
    repeats = min(settings.repeats, MOST_REPEATS[settings.device])
    samples = interleaved_samples(steps, repeats, settings.device, says="workspaces")
    for (name, whole), seconds in samples.items():
        if whole:
            add(results, what, name, seconds, median(seconds) / median(samples[name, False]))
