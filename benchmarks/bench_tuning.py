"""The search for constants: launches of the pair-row kernel, workspaces of perplexity.

Legend: N tokens, V vocabulary, K rows of a chunk of logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from sftmix_kernels import perplexity

from .bench_perplexity import size_of
from .bench_row_chunks import CHUNK_ROWS, COPY, PAIR_ROWS, PASSES, RowKernels
from .group import Group
from .measure import SuiteError, interleaved_samples
from .perplexity_providers import Tokens, bare, ours, require_compiled
from .settings import HEADS, QUICK_HEAD, Settings

# Columns, warps, blocks on their way, programs that fit on an SM at once.
BLOCKS, WARPS, STAGES, PROGRAMS = (1024, 2048, 4096), (4, 8, 16), (3, 4, 5, 6), range(1, 6)
# The constants of `sftmix_kernels.triton.row_chunks` that they go into.
LAUNCH = ("BLOCK", "NUM_WARPS", "num_stages", "MAX_REGISTERS")
# Each has to be compiled: of a quick run no more.
QUICK_LAUNCHES = 3
# MiB of the workspace, and vocabulary entries of a chunk.
WORKSPACES = (8, 16, 25, 32, 64, 128, 256)
VOCAB_CHUNKS = (2048, 4096, 8192, 16384, 32768)
# Of the rounds of other suites: there are tens of settings, each measured twice.
MOST_REPEATS = {"cpu": 3, "cuda": 7}
# Log-perplexities under another workspace: sums of logits that may be rounded elsewhere.
AGREE = 1e-4

Launch = tuple[int, ...]  # in the order of `LAUNCH`
Workspace = tuple[int, int]  # MiB, vocabulary entries of a chunk


def launches() -> list[Launch]:
    """Columns, warps, stages and registers a thread; four or eight columns a thread."""
    found = set()
    for block, warps, stages, programs in itertools.product(BLOCKS, WARPS, STAGES, PROGRAMS):
        registers = min(255, 65536 // (32 * warps * programs) // 8 * 8)
        if block // (32 * warps) in (4, 8) and registers >= 64:
            found.add((block, warps, stages, registers))
    return sorted(found)


def launch_name(values: Launch) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(LAUNCH, values, strict=True))


def under(values: Launch, kernels: RowKernels) -> tuple[Tensor, Tensor]:
    """What the pair-row kernel finds with other launch constants."""
    from sftmix_kernels.triton import row_chunks

    block, warps, stages, registers = values
    constants = dict(zip(LAUNCH, (block, warps, lambda logits: stages, registers), strict=True))
    with patch.multiple(row_chunks, **constants):
        return kernels.pair_rows()


def measure_launches(kernels: RowKernels, chosen: list[Launch], settings: Settings) -> Group:
    """The kernel under each in turns with a copy, on logits that are fresh every time."""
    group = Group()
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
        if group.attempt(name, partial(first, values), ours=True):
            steps[name] = partial(under, values, kernels)
    samples = interleaved_samples(
        steps, settings.repeats, settings.device, kernels.restore, "launches"
    )
    copied = median(samples.pop(COPY)) * PASSES[PAIR_ROWS] / PASSES[COPY]
    for name, seconds in samples.items():
        share = copied / median(seconds)
        figures = {"what": f"{PAIR_ROWS} launch", "who": name, "ours": True, "share": share}
        group.add(name, seconds, measure="tuning", case=f"{PAIR_ROWS} launch", **figures)
    return group


def workspaces(vocab_size: int, element_size: int) -> list[Workspace]:
    """Those that hold the logits of a tile of rows and a chunk."""
    chunks = [chunk for chunk in VOCAB_CHUNKS if chunk <= vocab_size] or [vocab_size]
    return [
        (size, chunk)
        for size, chunk in itertools.product(WORKSPACES, chunks)
        if size * 2**20 >= chunk * element_size * perplexity.GEMM_TILE
    ]


def workspace_name(setting: Workspace) -> str:
    return "{} MiB, chunks of {}".format(*setting)


def within(room: int, call: Callable[[Tokens, int], Any], x: Tokens, vocab_chunk: int) -> Any:
    """What the call returns with a workspace of at most ``room`` bytes."""

    def block_rows(hidden: Tensor, chunk: int) -> int:
        most = max(1, room // (chunk * hidden.element_size()))
        blocks = -(-hidden.shape[0] // most)
        rows = perplexity.round_up(-(-hidden.shape[0] // blocks), perplexity.GEMM_TILE)
        return min(hidden.shape[0], rows)

    with patch.object(perplexity, "block_rows", block_rows):
        return call(x, vocab_chunk)


@torch.no_grad()
def measure_workspaces(x: Tokens, chosen: list[Workspace], settings: Settings) -> Group:
    """The whole in each, in turns with the products alone in the same."""
    group = Group()
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
        if group.attempt(name, partial(first, call), ours=True):
            steps[name, True] = call
            steps[name, False] = partial(within, room, bare, x, chunk)
    repeats = min(settings.repeats, MOST_REPEATS[settings.device])
    samples = interleaved_samples(steps, repeats, settings.device, says="workspaces")
    what = "perplexity workspace"
    for (name, whole), seconds in samples.items():
        if whole:
            share = median(seconds) / median(samples[name, False])
            figures = {"what": what, "who": name, "ours": True, "share": share}
            group.add(name, seconds, measure="tuning", case=what, **figures)
    return group


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each setting that is searched."""
    given = metafunc.config.getoption
    settings = Settings(device=given("device"), quick=given("quick"))
    if "launch" in metafunc.fixturenames:
        chosen = chosen_launches(settings)
        metafunc.parametrize(
            "launch", chosen or [()], ids=list(map(launch_name, chosen)) or ["all"]
        )
    if "workspace" in metafunc.fixturenames:
        metafunc.parametrize("workspace", chosen_workspaces(settings), ids=workspace_name)


def chosen_launches(settings: Settings) -> list[Launch]:
    """None on the CPU."""
    found = launches() if settings.device != "cpu" else []
    return found[:QUICK_LAUNCHES] if settings.quick else found


def chosen_workspaces(settings: Settings) -> list[Workspace]:
    return workspaces(size_of(settings).vocab_size, settings.dtype.itemsize)


@pytest.fixture(scope="module")
def of_launches(settings: Settings) -> Group:
    """All launches, measured at once."""
    if settings.device == "cpu":
        pytest.skip("Triton kernels need a CUDA device")
    if settings.out_of_time:
        pytest.skip(f"out of time: {settings.seconds} s are over")
    rows = 64 if settings.quick else CHUNK_ROWS
    vocab_size = (QUICK_HEAD if settings.quick else HEADS["Llama-3.1-8B"])[1]
    kernels = RowKernels(rows, vocab_size, settings.dtype, settings.device)
    return measure_launches(kernels, chosen_launches(settings), settings)


@pytest.fixture(scope="module")
def of_workspaces(settings: Settings) -> Group:
    """All workspaces, measured at once."""
    if settings.out_of_time:
        pytest.skip(f"out of time: {settings.seconds} s are over")
    x = size_of(settings).tokens(settings)
    return measure_workspaces(x, chosen_workspaces(settings), settings)


def test_launch(launch: Launch, of_launches: Group, request: pytest.FixtureRequest) -> None:
    name = launch_name(launch)
    of_launches.write(name, f"{PAIR_ROWS}, {name}", request)


def test_workspace(
    workspace: Workspace, of_workspaces: Group, request: pytest.FixtureRequest
) -> None:
    name = workspace_name(workspace)
    of_workspaces.write(name, f"perplexity, {name}", request)
