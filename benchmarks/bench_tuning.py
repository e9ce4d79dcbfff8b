"""Search the constants of kernels: launches of the pair-row kernel, workspaces of perplexity.

Timed are `launch`, the kernel under other constants, beside a copy of its logits, and `folded` of
`bench_perplexity.py` in other blocks and chunks, beside their bare products. No figure is
committed; the comments beside the constants have what was chosen.

Legend: V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from sftmix_kernels.perplexity.streaming import GEMM_TILE, round_up

from .bench_perplexity import Tokens, bare, folded, ours, require_compiled, size_of, tokens_of
from .bench_row_chunks import CHUNK_ROWS, PASSES, RowKernels
from .measure import SuiteError, interleaved_samples
from .records import COPY, PAIR_ROWS
from .result_file import Results
from .settings import HEADS, QUICK_HEAD, Settings

# Columns, warps, blocks on their way, programs that fit on an SM at once.
BLOCKS, WARPS, STAGES, PROGRAMS = (1024, 2048, 4096), (4, 8, 16), (3, 4, 5, 6), range(1, 6)
# As the options of the kernel name the first four, and whether its second pass runs backwards.
LAUNCH = ("BLOCK", "num_warps", "STAGES", "maxnreg", "REVERSED")
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


def launches() -> list[Launch]:
    """Return launches of four or eight columns a thread, each in both directions."""
    found: set[Launch] = set()
    for block, warps, stages, programs in itertools.product(BLOCKS, WARPS, STAGES, PROGRAMS):
        registers = min(255, 65536 // (32 * warps * programs) // 8 * 8)
        if block // (32 * warps) in (4, 8) and registers >= 64:
            found |= {(block, warps, stages, registers, backwards) for backwards in (False, True)}
    return sorted(found)


def launch_name(values: Launch) -> str:
    """Return a launch in words."""
    return ", ".join(f"{name} {value}" for name, value in zip(LAUNCH, values, strict=True))


def launch(values: Launch, rows: RowKernels) -> list[torch.Tensor]:
    """Run the pair-row kernel with other constants; return both losses and the gradients."""
    from sftmix_kernels.row_chunks.kernels import launch_options, pair_rows_kernel, width_of

    mixup = torch.empty_like(rows.pair_weight)
    ntp = torch.empty_like(rows.row_weight)
    options = launch_options(rows.logits) | dict(zip(LAUNCH, values, strict=True))
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
    """Search launches, which need a GPU, and workspaces."""
    if settings.device == "cpu":
        results.miss("left_out", f"{PAIR_ROWS} launch", "Triton kernels need a CUDA device")
    else:
        vocab_size = (QUICK_HEAD if settings.quick else HEADS["Llama-3.1-8B"])[1]
        count = 64 if settings.quick else CHUNK_ROWS
        rows = RowKernels(count, vocab_size, settings.dtype, settings.device)
        chosen = launches()[: QUICK_LAUNCHES if settings.quick else None]
        work = partial(measure_launches, rows, chosen, settings, results)
        results.attempt(f"{PAIR_ROWS} launch", work, ours=True)
    case = size_of(settings)
    chosen_rooms = workspaces(case.sizes[1], settings.dtype.itemsize)
    measure_workspaces(tokens_of(case, settings), chosen_rooms, settings, results)


def measure_launches(
    rows: RowKernels, chosen: list[Launch], settings: Settings, results: Results
) -> None:
    """Time the kernel under each launch in turns with a copy, on logits fresh every time."""
    what = f"{PAIR_ROWS} launch"
    rows.restore()
    expected = [t.clone() for t in (*rows.pair_rows(), rows.logits)]

    def is_right(values: Launch) -> bool:
        rows.restore()
        torch.testing.assert_close(launch(values, rows), expected, rtol=1e-4, atol=1e-4)
        return True

    steps: dict[str, Callable[[], object]] = {COPY: rows.copy}
    for values in chosen:
        name = launch_name(values)
        if results.attempt(f"{what}, {name}", partial(is_right, values), ours=True):
            steps[name] = partial(launch, values, rows)
    samples = interleaved_samples(
        steps, settings.repeats, settings.device, rows.restore, "launches"
    )
    copied = median(samples.pop(COPY)) * PASSES[PAIR_ROWS] / PASSES[COPY]
    for name, seconds in samples.items():
        fields = {"case": what, "what": what, "who": name, "ours": True}
        results.add_times(seconds, measure="tuning", **fields, share=copied / median(seconds))


def workspaces(vocab_size: int, element_size: int) -> list[tuple[int, int]]:  # MiB, chunk
    """Return the workspaces that hold the logits of a tile of rows and a chunk."""
    chunks = [chunk for chunk in VOCAB_CHUNKS if chunk <= vocab_size] or [vocab_size]
    return [
        (size, chunk)
        for size, chunk in itertools.product(WORKSPACES, chunks)
        if size * 2**20 >= chunk * element_size * GEMM_TILE
    ]


def rows_within(room: int, x: Tokens, vocab_chunk: int) -> int:
    """Return the rows of a block, of few equal ones whose logits take at most ``room`` bytes."""
    num_tokens = x.hidden.shape[0]
    most = max(1, room // (vocab_chunk * x.hidden.element_size()))
    blocks = -(-num_tokens // most)
    return min(num_tokens, round_up(-(-num_tokens // blocks), GEMM_TILE))


@torch.no_grad()
def measure_workspaces(
    x: Tokens, chosen: list[tuple[int, int]], settings: Settings, results: Results
) -> None:
    """Time perplexity in each workspace, in turns with the bare products in the same.

    Raises:
        SuiteError: the extension is not built for the device.
    """
    what = "perplexity workspace"
    require_compiled(settings.device)
    ops, expected = torch.ops.sftmix_kernels, ours(x).log()

    def is_right(call: Callable[[], torch.Tensor]) -> bool:
        found = float((call().log() / expected - 1).abs().max())
        if not found <= AGREE:
            raise SuiteError(f"log-perplexities differ by {found:.3g} of themselves")
        return True

    steps: dict[tuple[str, bool], Callable[[], object]] = {}
    for size, chunk in chosen:
        name, rows = f"{size} MiB, chunks of {chunk}", rows_within(size * 2**20, x, chunk)
        call = partial(folded, x, ops, chunk, rows)
        if results.attempt(f"{what}, {name}", partial(is_right, call), ours=True):
            steps[name, True] = call
            steps[name, False] = partial(bare, x, chunk, rows)
    repeats = min(settings.repeats, MOST_REPEATS[settings.device])
    samples = interleaved_samples(steps, repeats, settings.device, says="workspaces")
    for (name, whole), seconds in samples.items():
        if whole:
            fields = {"case": what, "what": what, "who": name, "ours": True}
            share = median(seconds) / median(samples[name, False])
            results.add_times(seconds, measure="tuning", **fields, share=share)
