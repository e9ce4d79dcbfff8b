"""What nvcc makes of the CUDA kernels of `online_softmax_cuda.cu`, without a GPU.

``python -m tests.sftmix_kernels.perplexity.test_online_softmax_cuda`` prints the whole table.
"""

from __future__ import annotations

import functools
import re
import runpy
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "csrc/online_softmax_cuda.cu"
CHIPS = (80, 90, 100, 120)

# Of csrc/online_softmax_kernels.cuh: threads of a block, and the blocks that an SM shall hold.
THREADS, BLOCKS = 128, 6
# Registers of an SM; threads are given multiples of eight.
REGISTERS = 65536

ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
ATOMIC = re.compile(r"\b(?:REDG?|ATOM[GS]?)\.")
LOCAL = re.compile(r"\b(?:LDL|STL)\b")

pytestmark = pytest.mark.aot


@dataclass(frozen=True)
class Program:
    """One kernel compiled for one chip."""

    kernel: str
    chip: int
    registers: int
    spilled: int  # bytes, with what lies on the stack
    shared: int  # bytes
    sass: str


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc")
    return found or pytest.skip("needs nvcc")


def cuobjdump() -> str:
    """The CUDA toolkit's, or the one that Triton brings along."""
    found = shutil.which("cuobjdump") or shutil.which(Path(nvcc()).resolve().with_name("cuobjdump"))
    if found:
        return found
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="needs cuobjdump")
    return str(Path(nvidia.__path__[0]) / "bin/cuobjdump")


def build_flags() -> list[str]:
    """What setup.py compiles CUDA sources with where torch has CUDA, but for the chips."""
    with (
        mock.patch("setuptools.setup"),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(cpp_extension, "CUDA_HOME", "/usr/local/cuda"),
    ):
        (module,) = runpy.run_path(str(ROOT / "setup.py"))["extension"]()["ext_modules"]
    flags = cpp_extension.COMMON_NVCC_FLAGS + module.extra_compile_args["nvcc"]
    flags = [flag for flag in flags if not flag.startswith("-arch")]
    macros = [
        f"-D{name}" if value is None else f"-D{name}={value}"
        for name, value in module.define_macros
    ]
    return ["-std=c++20", *macros, *flags]


@functools.cache
def compile_kernels(source: Path, chip: int) -> list[Program]:
    compiler = nvcc()
    chips = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True).stdout
    if f"sm_{chip}" not in chips.split():
        pytest.skip(f"{compiler} does not know sm_{chip}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        include = f"-isystem={Path(torch.__file__).parent / 'include'}"
        output = ["-cubin", "-o", cubin, f"-arch=sm_{chip}", "-Werror=all-warnings"]
        output += ["-Xptxas=-v,-warn-spills"]
        command = [compiler, source, *build_flags(), include, *output]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        command = [cuobjdump(), "-sass", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # As `Function : name`, then its instructions.
    bodies = dict(part.split(maxsplit=1) for part in sass.split("Function :")[1:])
    return [
        Program(
            kernel=entry["kernel"],
            chip=chip,
            registers=int(entry["registers"]),
            spilled=sum(int(entry[name]) for name in ("stack", "stores", "loads")),
            shared=sum(map(int, re.findall(r"(\d+) bytes smem", entry["rest"]))),
            sass=bodies[entry["kernel"]],
        )
        for entry in ENTRY.finditer(done.stderr)
    ]


def faults(program: Program) -> list[str]:
    """Every rule that a compiled kernel breaks."""
    registers = -(-program.registers // 8) * 8
    rules = {
        "too many registers": registers * THREADS * BLOCKS <= REGISTERS,
        "spills": program.spilled == 0,
        "local memory": not LOCAL.search(program.sass),
        "atomics": not ATOMIC.search(program.sass),
        "no 16-byte load": "LDG.E.128" in program.sass or "fold_logits" not in program.kernel,
    }
    return [fault for fault, holds in rules.items() if not holds]


def table(programs: list[Program]) -> str:
    """The programs as a Markdown table."""
    lines = [
        "| kernel | chip | registers | spilled bytes | shared bytes |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {short_name(p.kernel)} | sm_{p.chip} | {p.registers} | {p.spilled} | {p.shared} |"
        for p in programs
    ]
    return "\n".join(lines)


def short_name(mangled: str) -> str:
    """``_ZN6sftmix18fold_logits_kernelIN3c104HalfELb0ELi4EE...``, legibly."""
    found = re.search(r"I(?:N3c10\d+(\w+?)E|f)Lb([01])ELi(\d+)E", mangled)
    if not found:
        return re.sub(r"^_ZN6sftmix\d+(\w+?kernel).*", r"\1", mangled)
    dtype, capped, warps = found[1] or "float", ", capped" * int(found[2]), found[3]
    return f"fold_logits_kernel<{dtype}{capped}, kWarps={warps}>"


# One chip in the gate: nvcc takes 7 s for each, and the same bound on registers holds on all.
@pytest.mark.parametrize(
    "chip", [chip if chip == 90 else pytest.param(chip, marks=pytest.mark.slow) for chip in CHIPS]
)
def test_kernels_keep_to_the_rules(chip: int) -> None:
    programs = compile_kernels(SOURCE, chip)
    # Three dtypes, capped or not, a short row or a long one; and the sums.
    assert len(programs) == 3 * 2 * 2 + 1
    assert [fault for program in programs for fault in faults(program)] == [], table(programs)


FAULTY = """
__global__ void fold_logits_narrowly(const float* x, float* out) {
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = 2 * x[4 * threadIdx.x + i];
}
__global__ void with_atomics(const float* x, float* out) { atomicAdd(out, x[threadIdx.x]); }
__global__ void on_the_stack(const float* x, float* out, int at) {
  float room[64];
  for (int i = 0; i < 64; ++i) room[i * at % 64] = x[i];
  out[threadIdx.x] = room[threadIdx.x];
}
__global__ void __launch_bounds__(128, 5) in_registers(const float* x, float* out) {
  float room[80];
#pragma unroll
  for (int i = 0; i < 80; ++i) room[i] = x[128 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 80; ++i) out[128 * i + threadIdx.x] = room[79 - i] * room[i];
}
"""


def test_faults_are_found(tmp_path: Path) -> None:
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    programs = compile_kernels(source, 90)
    assert {re.sub(r"^_Z\d+|P.*$", "", p.kernel): faults(p) for p in programs} == {
        "fold_logits_narrowly": ["no 16-byte load"],
        "with_atomics": ["atomics"],
        "on_the_stack": ["spills", "local memory"],
        "in_registers": ["too many registers"],
    }


if __name__ == "__main__":
    print(table([program for chip in CHIPS for program in compile_kernels(SOURCE, chip)]))
