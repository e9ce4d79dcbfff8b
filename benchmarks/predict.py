"""Predict what a GPU takes for each step of each schedule: bytes, operations, milliseconds.

Nothing here is measured. A step takes its bytes over the rate of a copy, its products over the rate
of a large product, or its instructions over the rate at which they are issued; where two of these
bound it, a little more than the larger. What is known only roughly is given from low to high.

Legend: N rows, D hidden size, V vocabulary, K rows of one chunk or group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sftmix_kernels.peaks import BOTH, NTP, Shape, chunk_rows
from sftmix_kernels.perplexity.streaming import (
    GEMM_COLUMNS,
    GEMM_TILE,
    wave_columns,
    wave_rows,
)
from sftmix_kernels.schedules import BLOCK_R, BLOCK_V, RowChunks
from sftmix_kernels.vocab_tiles.groups import groups

from . import records as names
from .settings import Case
from .tables import cell, table

# What an H200 was seen to reach of its data sheet: a copy of 8.6 GB moved 4.3 TB/s, a product of
# 8192 x 8192 x 8192 numbers in bfloat16 ran at 769 to 798 TFLOP/s. Other GPUs are taken to reach as
# much of theirs.
COPY_SHARE, PRODUCT_SHARE = 4.3 / 4.8, 785 / 989


class Gpu(NamedTuple):
    """A GPU, and the rates that a large copy and a large product are taken to reach on it."""

    name: str
    processors: int  # SMs
    cache: int  # bytes of L2, as PyTorch reports them
    copy_rate: float  # bytes a second, read and written
    product_rate: float  # operations a second, bfloat16


def by_data_sheet(name: str, processors: int, cache: int, memory: float, products: float) -> Gpu:
    """Return a GPU by the bytes and dense operations a second that its data sheet promises."""
    return Gpu(name, processors, cache, memory * COPY_SHARE, products * PRODUCT_SHARE)


# Rates: NVIDIA's data sheets of H100 SXM, H200 SXM and HGX B200, where those of products count
# zeros left out and are halved here. SMs and L2: tuning guides of Hopper and Blackwell; of the H200
# what PyTorch said on one.
GPUS = {
    "H100": by_data_sheet("NVIDIA H100", 132, 50 * 10**6, 3.35e12, 989e12),
    "H200": by_data_sheet("NVIDIA H200", 132, 60 * 10**6, 4.8e12, 989e12),
    "B200": by_data_sheet("NVIDIA B200", 148, 126 * 10**6, 8.0e12, 2250e12),
}

# Instructions are issued at 4 a cycle by each SM, at the clock of a busy H200.
ISSUE, CLOCK = 4, 1.755e9
# Of two bounds a and b a kernel takes (a^p + b^p)^(1/p), with p from high to low.
OVERLAP = (3.0, 2.0)
# Bytes a second of L2, by those of a copy, from high to low: 7 and 5.5 TB/s on an H200.
CACHE_RATE = (7 / 4.3, 5.5 / 4.3)
# Seconds of a small kernel, its launch included.
LAUNCH = (4e-6, 7e-6)
# Share of copy bandwidth that gathers, fills and scatters of hidden states reach.
SMALL_SHARE = 0.65
# How much of the traffic of float32 dW does not hide behind its product.
DW_SHARE = (0.4, 1.0)
# Instructions of the compiled fold for a logit, of one thread.
FOLD_INSTRUCTIONS = 9.4
# The best that another package was seen to take for NTP of N = 8192, D = 4096, V = 128256 in
# bfloat16 on an H200: Liger-Kernel's Triton row kernel with two chunks of 4096 rows.
BEST_PEER, BEST_PEER_SHAPE = 35.07e-3, Shape(8192, 4096, 128256, 2)


class Code(NamedTuple):
    """What the code does that a shape does not tell."""

    # Warp instructions for 512 logits in bfloat16, both loops of a row kernel (SASS, sm_90): the
    # figures of a pair's block of 1,024 columns, and of two rows' blocks for single rows.
    pair_rows: int
    soft_rows: int
    one_chunk: bool  # all logits are kept where they take no more than float32 dW and a chunk
    scale: tuple[float, float]  # time of scaling float32 dW, by that of a copy of its bytes
    hidden_passes: int  # times that hidden states are read or written beside products
    launches: dict[str, int]  # of small kernels, by task
    forward_columns: int  # of a tile of vocab_tiles' forward
    max_bytes: int  # vocab_tiles' workspace


# The code when its SASS was first counted, and PyTorch scaled dW one number at a time.
COUNTED = Code(330 + 261, 260 + 196, False, (1.65, 2.2), 10, {NTP: 40, BOTH: 40}, 128, 2**26)
# A test holds the instructions to the table of what the compiler makes of the kernels.
TODAY = Code(203 + 171, 2 * (84 + 74), True, (1.0, 1.15), 6, {NTP: 18, BOTH: 44}, 256, 2**28)


# The same for rows with one target, by the objective of NTP (`TODAY.soft_rows` is NTP's own), and
# the programs of `compiled.json` that have its loops: what is done once a row does not count.
OBJECTIVE_ROWS = {
    "bf16, PSFT": (90 + 74, (names.DFT, names.POWER, names.THRESHOLD)),
    "bf16, threshold, stats": (120 + 74, (names.EAFT, names.WATCHED)),
    "bf16, GEM": (129 + 82, (names.GEM,)),
    "bf16, smoothed": (108 + 82, (names.SMOOTHED,)),
    "bf16, one target": (84 + 74, (names.WEIGHTED,)),
}


class Step(NamedTuple):
    """What one step moves and computes, and the least and most seconds it may take."""

    name: str
    bytes: float
    operations: float
    low: float
    high: float


class Plan(NamedTuple):
    """The steps of one schedule for one task."""

    schedule: str
    task: str
    steps: list[Step]

    @property
    def low(self) -> float:
        """Return the least seconds of all steps."""
        return sum(step.low for step in self.steps)

    @property
    def high(self) -> float:
        """Return the most seconds of all steps."""
        return sum(step.high for step in self.steps)


def copying(gpu: Gpu, num_bytes: float, low: float = 1.0, high: float = 1.0) -> tuple[float, float]:
    """Return the seconds of moving bytes as a copy does, times ``low`` and ``high``."""
    seconds = num_bytes / gpu.copy_rate
    return low * seconds, high * seconds


def multiplying(gpu: Gpu, operations: float, share: float = 1.0) -> float:
    """Return the seconds of products that reach a share of a large product's rate."""
    return operations / (gpu.product_rate * share)


def bounded(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the seconds of a kernel with two bounds, each from low to high."""
    low, high = ((a**p + b**p) ** (1 / p) for a, b, p in zip(one, other, OVERLAP, strict=True))
    return low, high


def issuing(gpu: Gpu, instructions: float) -> tuple[float, float]:
    """Return the seconds of issuing the instructions of warps."""
    seconds = instructions / (gpu.processors * ISSUE * CLOCK)
    return seconds, seconds


def wave_share(gpu: Gpu, rows: int, columns: int) -> float:
    """Return how many of the SMs a product keeps busy, by whole waves of its output tiles."""
    waves = -(-rows // GEMM_TILE) * -(-columns // GEMM_COLUMNS) / gpu.processors
    return waves / math.ceil(waves)


def bare_products(gpu: Gpu, shape: Shape) -> Step:
    """Return the three products of NTP, which nobody can do without."""
    operations = 6.0 * shape.rows * shape.hidden_size * shape.vocab_size
    seconds = multiplying(gpu, operations)
    return Step("three products", 0, operations, seconds, seconds)


def row_kernel(gpu: Gpu, shape: Shape, task: str, code: Code) -> Step:
    """Return the kernel that turns logits into gradients: two reads and a write."""
    name, instructions = "pair rows", code.pair_rows
    if task == NTP:
        name, instructions = "single rows", code.soft_rows
    logits = shape.rows * shape.vocab_size
    moved = 3.0 * logits * shape.itemsize
    seconds = bounded(copying(gpu, moved), issuing(gpu, instructions * logits / 512))
    return Step(f"kernel of {name}", moved, 0, *seconds)


def small_kernels(gpu: Gpu, shape: Shape, task: str, code: Code) -> list[Step]:
    """Return what else is done to hidden states, and the many small kernels."""
    moved = code.hidden_passes * shape.rows * shape.hidden_size * shape.itemsize
    hidden = copying(gpu, moved, 1 / SMALL_SHARE, 1 / SMALL_SHARE)
    number = code.launches[task]
    launches = [number * seconds for seconds in LAUNCH]
    return [
        Step("hidden states gathered, dH scattered and scaled", moved, 0, *hidden),
        Step(f"{number} small kernels", 0, 0, *launches),
    ]


def in_one_chunk(shape: Shape) -> bool:
    """Tell whether the logits of all rows take no more than float32 dW and a chunk.

    All logits and dW in w bytes, ``w (N + D) V``, against ``(4 D + w K) V``: N <= D + K for w = 2.
    """
    spare = (4 - shape.itemsize) * shape.hidden_size // shape.itemsize
    return shape.rows <= spare + chunk_rows(NTP, RowChunks(), shape, kernels=True)


def row_chunks(gpu: Gpu, shape: Shape, task: str, code: Code, one_chunk: bool) -> Plan:
    """Return the steps of ``row_chunks``, forward and backward, in chunks or in one."""
    steps = [bare_products(gpu, shape), row_kernel(gpu, shape, task, code)]
    if not one_chunk:
        numbers = shape.hidden_size * shape.vocab_size
        chunks = -(-shape.rows // chunk_rows(task, RowChunks(), shape, kernels=True))
        # Each chunk writes dW, and all but the first read it: over the bytes of dW in w bytes.
        sums = numbers * (4.0 - shape.itemsize) * (2 * chunks - 1)
        low, high = DW_SHARE
        steps.append(Step("sums of dW in float32", sums, 0, *copying(gpu, sums, low, high)))
        scaled = numbers * (4.0 + shape.itemsize)
        steps.append(Step("dW scaled", scaled, 0, *copying(gpu, scaled, *code.scale)))
    name = f"row_chunks, {'one chunk' if one_chunk else 'chunks'}"
    return Plan(name, task, [*steps, *small_kernels(gpu, shape, task, code)])


def tile_products(gpu: Gpu, shape: Shape, columns: int) -> tuple[float, tuple[float, float]]:
    """Return what tiles of logits of some columns read through L2, and the seconds they take."""
    tiles = -(-shape.rows // BLOCK_R) * -(-shape.vocab_size // columns)
    through = tiles * (BLOCK_R + columns) * shape.hidden_size * shape.itemsize
    low, high = (through / (gpu.copy_rate * rate) for rate in CACHE_RATE)
    product = multiplying(gpu, 2.0 * shape.rows * shape.hidden_size * shape.vocab_size)
    return through, (max(low, product), max(high, product))


def vocab_tiles(gpu: Gpu, shape: Shape, task: str, code: Code) -> Plan:
    """Return the steps of ``vocab_tiles``, exact, forward and backward."""
    rows, size, vocab_size, width = shape
    pairs = 2 if task == BOTH else 1
    row_bytes = pairs * size * (4 + 2 * width)
    found = list(groups(rows // pairs, BLOCK_R // pairs, row_bytes, code.max_bytes * 3 // 4))
    group = pairs * found[0].stop
    fitting = code.max_bytes // 4 // (group * width) // BLOCK_V * BLOCK_V
    columns = min(max(BLOCK_V, fitting), vocab_size)
    steps = len(found) * -(-vocab_size // columns)
    forward, forward_tiles = tile_products(gpu, shape, code.forward_columns)
    through, tiles = tile_products(gpu, shape, BLOCK_V)
    product = 2.0 * rows * size * vocab_size
    gradients = 2.0 * rows * vocab_size * width
    numbers = float(size * vocab_size)
    sums = numbers * 4 * (2 * len(found) - 1)
    dh, dw = (
        multiplying(gpu, product, wave_share(gpu, *tile))
        for tile in ((group, size), (columns, size))
    )
    scaled = numbers * (4 + width)
    return Plan(
        "vocab_tiles",
        task,
        [
            Step("forward: tiles of logits", forward, product, *forward_tiles),
            Step("backward: tiles of logits again", through, product, *tiles),
            Step("gradients of logits", gradients, 0, 0.0, copying(gpu, gradients)[1]),
            Step("dH", 0, product, dh, dh),
            Step("dW", 0, product, dw, dw),
            Step("sums of dW in float32", sums, 0, *copying(gpu, sums, *DW_SHARE)),
            Step("dW scaled", scaled, 0, *copying(gpu, scaled, *code.scale)),
            Step(f"{3 * steps} launches", 0, 0, 0.0, 3 * steps * LAUNCH[0]),
            *small_kernels(gpu, shape, task, code),
        ],
    )


def perplexity(gpu: Gpu, shape: Shape) -> Plan:
    """Return the steps of `streaming_perplexity`."""
    rows, size, vocab_size, width = shape
    columns = min(wave_columns(gpu.processors), vocab_size)
    block = min(rows, wave_rows(gpu.cache // 2 // (columns * width), columns, gpu.processors))
    calls = -(-rows // block) * -(-vocab_size // columns)
    operations = 2.0 * rows * size * vocab_size
    product = multiplying(gpu, operations, wave_share(gpu, block, columns))
    moved = float(rows * vocab_size * width)
    return Plan(
        f"streaming_perplexity, {block} x {columns}",
        "no gradients",
        [
            Step("products", 0, operations, product, product),
            Step("folds in L2", moved, 0, *fold(gpu, rows * vocab_size, width, CACHE_RATE)),
            Step(f"{2 * calls} launches", 0, 0, *(2 * calls * seconds for seconds in LAUNCH)),
        ],
    )


def fold(gpu: Gpu, logits: int, width: int, rates: tuple[float, float]) -> tuple[float, float]:
    """Return the seconds of folding logits that are read at rates by that of a copy."""
    low, high = (logits * width / (gpu.copy_rate * rate) for rate in rates)
    return bounded((low, high), issuing(gpu, logits * FOLD_INSTRUCTIONS / 32))


def plans(gpu: Gpu, shape: Shape, code: Code = TODAY) -> list[Plan]:
    """Return every schedule of both tasks, ``row_chunks`` as the rule of memory chooses first."""
    found = []
    for task in (NTP, BOTH):
        ways = [False, True] if code.one_chunk else [False]
        if code.one_chunk and in_one_chunk(shape):
            ways.reverse()
        found += [row_chunks(gpu, shape, task, code, one) for one in ways]
        found.append(vocab_tiles(gpu, shape, task, code))
    return [*found, perplexity(gpu, shape)]


def objective_plans(gpu: Gpu, shape: Shape, code: Code = TODAY) -> dict[str, Plan]:
    """Return ``row_chunks`` for each objective of NTP, as the rule of memory chooses."""
    one_chunk = code.one_chunk and in_one_chunk(shape)
    return {
        name: row_chunks(gpu, shape, NTP, code._replace(soft_rows=2 * instructions), one_chunk)
        for instructions, objectives in OBJECTIVE_ROWS.values()
        for name in objectives
    }


def first_plan(found: Sequence[Plan], schedule: str, task: str) -> Plan:
    """Return the first plan of a task whose schedule begins so."""
    return next(one for one in found if one.task == task and one.schedule.startswith(schedule))


def has_peer(gpu: Gpu, shape: Shape) -> bool:
    """Tell whether the time of another package is known there."""
    return gpu.name == GPUS["H200"].name and shape == BEST_PEER_SHAPE


class Range(NamedTuple):
    """A quotient, from low to high."""

    low: float
    high: float

    def __str__(self) -> str:
        low, high = f"{self.low:.2f}", f"{self.high:.2f}"
        return low if low == high else f"{low}-{high}"


def predictions(gpu: Gpu, shape: Shape, code: Code = TODAY) -> dict[tuple[str, str], Range]:
    """Return what targets on a GPU are predicted to be, by suite and the target's first words."""
    found = plans(gpu, shape, code)
    bare = bare_products(gpu, shape)
    ours, alone = (first_plan(found, "row_chunks", task) for task in (BOTH, NTP))
    tiles, stream = first_plan(found, "vocab_tiles", BOTH), found[-1]
    kernel, rate = row_kernel(gpu, shape, BOTH, code), gpu.copy_rate
    forward, product = tile_products(gpu, shape, code.forward_columns)[1], bare.low / 3
    logits, width = shape.rows * shape.vocab_size, shape.itemsize
    folds = {
        place: [logits * width / rate / seconds for seconds in fold(gpu, logits, width, rates)]
        for place, rates in ((names.IN_HBM, (1.0, 1.0)), (names.IN_L2, CACHE_RATE))
    }
    peer = has_peer(gpu, shape) * BEST_PEER or math.nan
    return {
        ("loss", f"{BOTH} / {names.BARE}"): Range(ours.low / bare.low, ours.high / bare.high),
        ("loss", f"{NTP} / best peer"): Range(alone.low / peer, alone.high / peer),
        # Hard labels alone make a mixed row two: another NTP's work.
        ("loss", f"{BOTH} / {BOTH} of that peer"): Range(ours.low / 2 / peer, ours.high / 2 / peer),
        ("loss", f"{BOTH} / {NTP} of ours"): Range(ours.low / alone.low, ours.high / alone.high),
        ("loss", names.PAIR_ROWS): Range(
            kernel.bytes / rate / kernel.high, kernel.bytes / rate / kernel.low
        ),
        ("loss", "forward of vocab_tiles"): Range(product / forward[1], product / forward[0]),
        ("loss", "exact vocab_tiles"): Range(tiles.low / ours.low, tiles.high / ours.high),
        **{
            ("objectives", names.OUR_OBJECTIVES[name]): Range(
                plan.low / alone.low, plan.high / alone.high
            )
            for name, plan in objective_plans(gpu, shape, code).items()
        },
        ("perplexity", names.STREAMING): Range(stream.low / product, stream.high / product),
        **{
            ("perplexity", f"{names.FOLD}, {place}"): Range(shares[1], shares[0])
            for place, shares in folds.items()
        },
    }


def goals(gpu: Gpu, shape: Shape, code: Code = TODAY) -> list[str]:
    """Return each goal beside what is predicted, and the step that holds most of the rest."""
    found, bare = plans(gpu, shape, code), bare_products(gpu, shape)
    lines = []
    for task, limit, of, says in (
        (BOTH, 1.08, bare.high, "three bare products"),
        (NTP, 1.02, BEST_PEER, "35.07 ms, the best peer"),
    ):
        if of == BEST_PEER and not has_peer(gpu, shape):
            continue
        plan = first_plan(found, "row_chunks", task)
        value = Range(plan.low / of, plan.high / of)
        verdict = "reached" if plan.high <= limit * of else "MISSED"
        rest = max(plan.steps[1:], key=lambda step: step.high)
        lines.append(
            f"{task}, {plan.schedule}: predicted {value} x {says}, goal {limit}: {verdict}. "
            f"Of the {1e3 * (plan.high - bare.high):.2f} ms beside the products, "
            f"{1e3 * rest.high:.2f} ms are the {rest.name}."
        )
    return lines


def plan_table(plan: Plan) -> str:
    """Return the steps of a plan as a Markdown table."""
    rows = [
        [
            step.name,
            f"{step.bytes / 1e9:.2f}" if step.bytes else "-",
            f"{step.operations / 1e12:.2f}" if step.operations else "-",
            f"{1e3 * step.low:.2f}",
            f"{1e3 * step.high:.2f}",
        ]
        for step in plan.steps
    ]
    rows.append(["**all**", "", "", f"**{1e3 * plan.low:.2f}**", f"**{1e3 * plan.high:.2f}**"])
    head = ("predicted", "GB", "TFLOP", "ms, low", "ms, high")
    return f"### {plan.schedule}, {plan.task}\n\n{table(head, rows)}"


def objective_table(gpu: Gpu, shape: Shape) -> str:
    """Return the objectives of NTP as a Markdown table: their row kernel, and all by NTP alone."""
    alone = first_plan(plans(gpu, shape), "row_chunks", NTP)
    kernel = alone.steps[1].name
    rows = []
    for name, plan in {NTP: alone, **objective_plans(gpu, shape)}.items():
        (step,) = (one for one in plan.steps if one.name == kernel)
        times = [f"{1e3 * seconds:.2f}" for seconds in (step.low, step.high, plan.low, plan.high)]
        quotient = f"{plan.low / alone.low:.3f}-{plan.high / alone.high:.3f}"
        rows.append([cell(name), *times, quotient])
    head = ("objective", f"{kernel}, ms, low", "high", "all, ms, low", "high", f"/ {NTP}")
    return f"### {alone.schedule}, objectives of {NTP}\n\n{table(head, rows)}"


def text(gpu: Gpu, shape: Shape) -> str:
    """Return all tables of a GPU and a shape."""
    size = f"N = {shape.rows}, D = {shape.hidden_size}, V = {shape.vocab_size}, bfloat16"
    parts = [f"## {gpu.name}, {size}: predicted, not measured", ""]
    parts += [plan_table(plan) for plan in plans(gpu, shape)]
    parts += [objective_table(gpu, shape)]
    return "\n".join([*parts, *goals(gpu, shape)])


def shape_of(case: Case) -> Shape:
    """Return the shape of a case in bfloat16."""
    return Shape(case.rows, *case.sizes, 2)
