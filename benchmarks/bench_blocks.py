"""Search the blocks of `streaming_perplexity`: tokens and vocabulary entries at a time.

Timed is `folded` of `bench_perplexity.py` in other blocks, in turns with the bare products in the
same. No figure is committed; the comments beside the constants have what was chosen.

Legend: V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from sftmix_kernels.perplexity.streaming import (
    GEMM_TILE,
    block_rows,
    chunk_columns,
    round_up,
)

from .bench_perplexity import Tokens, bare, folded, ours, require_compiled, size_of, tokens_of
from .measure import SuiteError, interleaved_samples
from .result_file import Results
from .settings import Settings

# MiB of the workspace, and vocabulary entries of a chunk.
WORKSPACES = (8, 16, 25, 32, 64, 128, 256)
VOCAB_CHUNKS = (2048, 4096, 8192, 16384, 32768)
# Beside what is shipped: 3, 4 and 3.88 waves of 132 SMs, in 25, 33 and 32 MiB.
SHORT = ((2816, 4608), (4224, 4096), (2048, 8192))
# At most so many rounds: there are tens of settings, each measured twice.
MOST_REPEATS = {"cpu": 3, "cuda": 7}
# How far log-perplexities may be off in other blocks, where sums are rounded elsewhere.
AGREE = 1e-4

Block = tuple[int, int]  # tokens, vocabulary entries


def measure(settings: Settings, results: Results) -> None:
    """Time every block of a run."""
    x = tokens_of(size_of(settings), settings)
    measure_blocks(x, chosen(x, settings), settings, results)


def chosen(x: Tokens, settings: Settings) -> list[Block]:
    """Return the blocks of a run: what is shipped first, then a few or all."""
    num_tokens, vocab_size = x.hidden.shape[0], x.weight.shape[0]
    chunk = chunk_columns(x.hidden, vocab_size, None)
    few = [(rows, columns) for rows, columns in SHORT if rows <= num_tokens]
    found = few if settings.short else blocks(x)
    return list(dict.fromkeys([(block_rows(x.hidden, chunk), chunk), *found]))


def blocks(x: Tokens) -> list[Block]:
    """Return the blocks whose logits fill each workspace, of a tile of rows at least."""
    vocab_size, width = x.weight.shape[0], x.hidden.element_size()
    chunks = [chunk for chunk in VOCAB_CHUNKS if chunk <= vocab_size] or [vocab_size]
    return [
        (rows_within(size * 2**20, x, chunk), chunk)
        for size, chunk in itertools.product(WORKSPACES, chunks)
        if size * 2**20 >= chunk * width * GEMM_TILE
    ]


def rows_within(room: int, x: Tokens, vocab_chunk: int) -> int:
    """Return the rows of a block, of few equal ones whose logits take at most ``room`` bytes."""
    num_tokens = x.hidden.shape[0]
    most = max(1, room // (vocab_chunk * x.hidden.element_size()))
    count = -(-num_tokens // most)
    return min(num_tokens, round_up(-(-num_tokens // count), GEMM_TILE))


@torch.no_grad()
def measure_blocks(x: Tokens, wanted: list[Block], settings: Settings, results: Results) -> None:
    """Time perplexity in each block, in turns with the bare products in the same.

    Raises:
        SuiteError: the extension is not built for the device.
    """
    what = "perplexity block"
    require_compiled(settings.device)
    ops, expected = torch.ops.sftmix_kernels, ours(x).log()

    def is_right(call: Callable[[], torch.Tensor]) -> bool:
        found = float((call().log() / expected - 1).abs().max())
        if not found <= AGREE:
            raise SuiteError(f"log-perplexities differ by {found:.3g} of themselves")
        return True

    steps: dict[tuple[str, bool], Callable[[], object]] = {}
    for rows, chunk in wanted:
        name = f"{rows} tokens, {chunk} columns"
        call = partial(folded, x, ops, chunk, rows)
        if results.attempt(f"{what}, {name}", partial(is_right, call), ours=True):
            steps[name, True] = call
            steps[name, False] = partial(bare, x, chunk, rows)
    repeats = min(settings.repeats, MOST_REPEATS[settings.device])
    samples = interleaved_samples(steps, repeats, settings.device, says="blocks")
    for (name, whole), seconds in samples.items():
        if whole:
            fields = {"case": what, "what": what, "who": name, "ours": True}
            share = median(seconds) / median(samples[name, False])
            results.add_times(seconds, measure="tuning", **fields, share=share)
