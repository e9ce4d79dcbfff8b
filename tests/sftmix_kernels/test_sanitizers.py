"""The C++ under sanitizers, without PyTorch around it: the programs of `tests/csrc`.

The CUDA kernels run on CPU threads, the loops of the CPU in each version that this processor has.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
INCLUDES = (ROOT / "tests/csrc", ROOT / "csrc", Path(torch.__file__).parent / "include")

# What watches each part of the program.
SANITIZERS = {"values": "address,undefined", "races": "thread"}


def run(command: list[str | Path], **variables: str) -> str:
    """What a command that fails has to say. One that a thread waits for without end fails too."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env={**os.environ, **variables}
    )
    return f"exit status {done.returncode}: {done.stderr}" if done.returncode else ""


def build(source: Path, program: Path, sanitizer: str, *more: str) -> str:
    """Not optimised, so that no read goes away."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    flags = ["-std=c++20", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    includes = [f"-I{folder}" for folder in INCLUDES]
    if shutil.which(compiler[0]) is None:
        return f"{compiler[0]} is not there"
    return run([*compiler, *flags, *more, *includes, source, "-o", program])


def require(folder: Path, sanitizer: str) -> None:
    """Skip where a sanitizer's library is missing, or does not fit the system's memory layout."""
    program, probe = folder / "probe", folder / "probe.cpp"
    probe.write_text("#include <barrier>\nint main() {}\n")
    missing = build(probe, program, sanitizer) or run([program])
    if missing:
        pytest.skip(f"needs a C++20 compiler with -fsanitize={sanitizer}: {missing}")


@pytest.mark.slow
@pytest.mark.parametrize("part", SANITIZERS)
def test_kernels_on_cpu_threads(part: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    require(tmp_path, SANITIZERS[part])
    assert build(ROOT / "tests/csrc/online_softmax_test.cpp", program, SANITIZERS[part]) == ""
    assert run([program, part]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("optimised", [False, True])
def test_rows_of_a_chunk(optimised: bool, tmp_path: Path) -> None:
    """Optimised too, as they are shipped: only then are loops vectors."""
    program, more = tmp_path / "program", ["-O3", "-fopenmp-simd", "-ffp-contract=fast"]
    require(tmp_path, "address,undefined")
    source = ROOT / "tests/csrc/row_chunks_test.cpp"
    assert build(source, program, "address,undefined", *(more if optimised else [])) == ""
    for capability in ("default", "avx2", "avx512"):
        assert run([program], ATEN_CPU_CAPABILITY=capability) == ""


@pytest.mark.slow
def test_rows_are_handed_out_to_threads(tmp_path: Path) -> None:
    program, threads = tmp_path / "program", ROOT / "tests/csrc/threads"
    require(tmp_path, "thread")
    source = ROOT / "tests/csrc/parallel_test.cpp"
    assert build(source, program, "thread", f"-I{threads}") == ""
    assert run([program]) == ""
