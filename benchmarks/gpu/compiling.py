"""Fill Triton's cache for a GPU that is not here: what a run launches is compiled, and not run.

`kit.py` calls it beside the GPU machine's torch and Triton, with TRITON_CACHE_DIR set. Kernels are
launched by their own launchers on CPU tensors, of sizes that are specialised as the real ones are.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime import build
from triton.runtime.jit import JITFunction

from benchmarks import bench_launches
from benchmarks.bench_loss import OURS, SCHEDULES, step
from benchmarks.bench_row_chunks import RowKernels
from benchmarks.inputs import make_inputs
from benchmarks.settings import HEADS, Settings
from tests.sftmix_kernels import kernel_cases, test_smoke_gpu
from tests.sftmix_kernels.compile_cases import CASES, Chip
from tests.sftmix_kernels.conftest import DTYPES, ROW_CHUNKS, VOCAB_TILES

CHIP = 90


class Count:
    """How many launches were compiled."""

    launches = 0


@contextmanager
def compiling(libraries: Path) -> Iterator[Count]:
    """Compile launches, and their launchers beside a driver's library, instead of running them."""
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    run, count = JITFunction.run, Count()
    linked = set[str]()

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, warmup=True, **options)
        count.launches += 1
        if compiled.hash not in linked:
            linked.add(compiled.hash)
            CudaLauncher(compiled.src, compiled.metadata)

    with (
        # Losses take the kernels' way on CPU tensors, as in the interpreter.
        mock.patch.dict(os.environ, TRITON_INTERPRET="1", TRITON_LIBCUDA_PATH=str(libraries)),
        mock.patch.object(type(triton.runtime.driver), "active", Chip(CHIP)),
        mock.patch.object(JITFunction, "run", compile_only),
        # What kernels would have written is 0, which is an index as well.
        mock.patch.object(torch, "empty", torch.zeros),
        mock.patch.object(torch, "empty_like", torch.zeros_like),
        mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        mock.patch.object(build, "_load_module_from_path", mock.MagicMock()),
    ):
        CudaUtils()
        yield count


def stand_in(folder: Path) -> None:
    """Write a driver's library without functions: launchers are linked beside it, not loaded."""
    command = ["gcc", "-shared", "-x", "c", "-", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", folder / "libcuda.so.1"], input="", text=True, check=True)


def launches() -> Iterator[Callable[[], object]]:
    """Yield what launches kernels: shipped configurations, smoke tests, benchmarks."""
    for case in CASES:
        yield case.launch
    smoke = test_smoke_gpu
    for schedule in (ROW_CHUNKS, VOCAB_TILES):
        yield partial(smoke.test_cross_entropy_and_mixup, schedule)
        yield partial(smoke.test_softcap_and_scale, schedule)
        yield partial(smoke.test_bias_of_an_even_vocabulary, 0, schedule)
        for dtype in DTYPES["cuda"]:
            yield partial(smoke.test_sftmix, dtype, schedule)
    x = make_inputs(1024, 64, 1280, torch.bfloat16)
    for schedule, ours in itertools.product(SCHEDULES.values(), OURS.values()):
        yield partial(step, partial(ours, schedule=schedule), x)
    rows = RowKernels(16, HEADS["Llama-3.1-8B"][1], torch.bfloat16, "cpu")
    yield rows.pair_rows
    yield rows.soft_rows
    for values in bench_launches.chosen(Settings("cuda", short=True)):
        yield partial(bench_launches.launch, values, rows)


def main() -> int:
    """Return exit status 0, or 1 where nothing was compiled."""
    leading = kernel_cases.leading
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(test_smoke_gpu, "DEVICE", "cpu"),
        mock.patch.object(kernel_cases, "leading", lambda _, dtype: leading("cuda", dtype)),
    ):
        stand_in(Path(folder))
        with compiling(Path(folder)) as count:
            for launch in launches():
                # Kernels that did not run have computed nothing.
                with contextlib.suppress(AssertionError):
                    launch()
    print(f"{count.launches} launches compiled")
    return int(not count.launches)


if __name__ == "__main__":
    sys.exit(main())
