"""The CUDA kernels on CPU threads, under sanitizers: `tests/csrc/online_softmax_test.cpp`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
INCLUDES = (ROOT / "tests/csrc", ROOT / "csrc", Path(torch.__file__).parent / "include")

# What watches each part of the program.
SANITIZERS = {"values": "address,undefined", "races": "thread"}


def run(command: list[str | Path]) -> str:
    """What a command that fails has to say. One that a thread waits for without end fails too."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    return f"exit status {done.returncode}: {done.stderr}" if done.returncode else ""


def build(source: Path, program: Path, sanitizer: str) -> str:
    """Not optimised, so that no read goes away."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    flags = ["-std=c++20", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    includes = [f"-I{folder}" for folder in INCLUDES]
    if shutil.which(compiler[0]) is None:
        return f"{compiler[0]} is not there"
    return run([*compiler, *flags, *includes, source, "-o", program])


@pytest.mark.slow
@pytest.mark.parametrize("part", SANITIZERS)
def test_kernels_on_cpu_threads(part: str, tmp_path: Path) -> None:
    program, probe = tmp_path / "program", tmp_path / "probe.cpp"
    probe.write_text("#include <barrier>\nint main() {}\n")
    # A sanitizer's library may be missing, or not fit the system's layout of memory.
    missing = build(probe, program, SANITIZERS[part]) or run([program])
    if missing:
        pytest.skip(f"needs a C++20 compiler with -fsanitize={SANITIZERS[part]}: {missing}")
    assert build(ROOT / "tests/csrc/online_softmax_test.cpp", program, SANITIZERS[part]) == ""
    assert run([program, part]) == ""
