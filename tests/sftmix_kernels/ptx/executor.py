"""Run compiled GPU kernels on the CPU: `executor.cpp` executes their PTX for sm_90a.

What a launch is accused of is a finding, of one of these kinds:

- bounds, alignment: an access outside of every tensor or of shared memory, or not aligned.
- race: two threads at one byte, one of them writing, without a barrier between them; of two blocks
  of one launch at all.
- undefined: an address, a branch or a stored number comes of memory or a register not yet written.
- fence: ``wgmma.fence`` or ``fence.proxy.async`` is missing.
- flight: registers or memory of an asynchronous instruction change before it is waited for.
- overwritten: a register of wgmma's left operand is written before that is waited for. The ISA
  leaves open what happens; ptxas waits by itself, which costs speed.
- divergence: lanes or warps do not meet at an instruction that needs all of them.
- endless: a block has run for too many instructions.
- unsupported: an instruction that the executor does not know.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

FOLDER = Path(__file__).parent
# Floats are as written: no fused multiply-add but `fma`. Signed integers wrap around.
FLAGS = [
    *("-std=c++20", "-O2", "-march=native", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fwrapv", "-fno-strict-aliasing"),
]
BUFFER_SHIFT = 40  # kBufferShift of machine.h
ANSWER_BYTES = 2**16


class Finding(NamedTuple):
    """What is wrong with a launch."""

    kind: str
    message: str


class Unsupported(Exception):
    """The text has what the executor does not know."""


class Buffer(ctypes.Structure):
    """``Buffer`` of executor.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("name", ctypes.c_char_p),
    )


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler, or None where there is none."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    return command if shutil.which(command[0]) else None


def build(folder: Path) -> ctypes.CDLL:
    """Compile the executor into a folder, once for each content and processor, and load it."""
    command = compiler()
    assert command is not None
    sources = [path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*"))]
    processor = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line), ""
    )
    key = hashlib.sha256(b"\0".join([*sources, " ".join([*command, *FLAGS, processor]).encode()]))
    library = folder / f"executor-{key.hexdigest()[:16]}.so"
    if not library.exists():
        mine = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, *FLAGS, FOLDER / "executor.cpp", "-o", mine], check=True)
        mine.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.ptx_load.restype = loaded.ptx_launch.restype = ctypes.c_void_p
    return loaded


class Program:
    """A kernel, decoded once."""

    def __init__(self, library: ctypes.CDLL, ptx: str, name: str) -> None:
        answer = ctypes.create_string_buffer(ANSWER_BYTES)
        self._library = library
        self._program = library.ptx_load(
            ptx.encode(), name.encode(), answer, ctypes.c_int64(ANSWER_BYTES)
        )
        if not self._program:
            raise Unsupported(f"{name}: {answer.value.decode()}")

    def __del__(self) -> None:
        if self._program:
            self._library.ptx_free(ctypes.c_void_p(self._program))

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: list[Tensor | int | bytes],
        shared_bytes: int,
        seed: int = 0,
    ) -> tuple[int, list[Finding]]:
        """Run all blocks; return the number of warp instructions, and what is wrong.

        An argument in bytes is put where it stands, as a float is.
        """
        storages: dict[int, int] = {}
        buffers, words = [], []
        for position, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                storage = argument.untyped_storage()
                if storage.data_ptr() not in storages:
                    storages[storage.data_ptr()] = len(buffers) + 1
                    name = f"argument {position}".encode()
                    buffers.append(Buffer(storage.data_ptr(), storage.nbytes(), name))
                base = storages[storage.data_ptr()] << BUFFER_SHIFT
                words.append(base + argument.storage_offset() * argument.element_size())
            elif isinstance(argument, bytes):
                words.append(int.from_bytes(argument, "little"))
            else:
                words.append(argument & (2**64 - 1))
        answer = ctypes.create_string_buffer(ANSWER_BYTES)
        count = self._library.ptx_launch(
            ctypes.c_void_p(self._program),
            (ctypes.c_int * 3)(*grid),
            (ctypes.c_uint64 * len(words))(*words),
            len(words),
            (Buffer * len(buffers))(*buffers),
            len(buffers),
            shared_bytes,
            seed,
            answer,
            ctypes.c_int64(ANSWER_BYTES),
        )
        lines = [line.partition("\t") for line in answer.value.decode().splitlines()]
        return int(count or 0), [Finding(kind, message) for kind, _, message in lines]
