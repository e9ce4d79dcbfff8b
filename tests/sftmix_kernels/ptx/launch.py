"""Run the shipped kernels through their own launchers, on CPU tensors, in the executor."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from .executor import Finding, Program, build

Mutation = Callable[[str], str]


@dataclass
class Run:
    """What ran: the kernels' names in their order, and what is wrong with them."""

    kernels: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    instructions: int = 0

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}


class Chip:
    """What Triton asks of the current device before it compiles for it: an H200, say."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        # Kernels are kept by device, and these lack what a device would load.
        return 1090

    def get_current_stream(self, device: int) -> int:
        return 0


def without_machine_code(*_: object) -> bytes:
    """Take the place of ptxas, whose program nobody runs."""
    return b""


@cache
def library(folder: Path) -> ctypes.CDLL:
    return build(folder)


@cache
def program(folder: Path, ptx: str, name: str) -> Program:
    return Program(library(folder), ptx, name)


@contextmanager
def on_executor(folder: Path, mutate: Mutation | None = None, seed: int = 0) -> Iterator[Run]:
    """Launch Triton kernels in the executor; what is compiled is kept in a folder.

    `mutate` changes the text of each kernel before it runs.
    """
    run, compile_kernel = Run(), JITFunction.run

    def launch(kernel: Any, *args: Any, warmup: bool, grid: Any, **options: Any) -> None:
        compiled = compile_kernel(kernel, *args, grid=grid, warmup=True, **options)
        name, ptx = compiled.metadata.name, compiled.asm["ptx"]
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        arguments = list(flat((values[n], t) for n, t in compiled.src.signature.items()))
        loaded = program(folder, mutate(ptx) if mutate else ptx, name)
        shape = tuple(grid) + (1,) * (3 - len(grid))
        # Two pointers to memory for Triton's own use, which there is none of.
        count, findings = loaded.launch(shape, [*arguments, 0, 0], compiled.metadata.shared, seed)
        run.kernels.append(name)
        run.findings += findings
        run.instructions += count

    with (
        # The package takes Triton's path on the CPU, as it does where kernels are interpreted.
        mock.patch.dict(os.environ, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(folder / "triton")),
        mock.patch.object(type(triton.knobs.runtime), "interpret", False),
        mock.patch.object(type(triton.runtime.driver), "active", Chip()),
        mock.patch.object(CUDABackend, "make_cubin", without_machine_code),
        mock.patch.object(JITFunction, "run", launch),
    ):
        yield run


def flat(arguments: Iterable[tuple[Any, Any]]) -> Iterator[Tensor | int | bytes]:
    """Yield what is passed at run time: not constants, and of a tuple one by one."""
    for value, kind in arguments:
        if isinstance(kind, tuple):
            yield from flat(zip(value, kind, strict=True))
        elif kind == "fp32":
            yield struct.pack("<f", value)
        elif kind != "constexpr":
            yield value
