"""Every shipped configuration of every Triton kernel, compiled without a GPU.

A case calls a kernel's own launcher on small CPU tensors while Triton takes a chip for the current
device and stops short of the launch, so that block sizes, warps, stages, argument types and what is
divisible by 16 are those of a real call, and none of them is written down a second time.

``python -m tests.sftmix_kernels.compile_cases`` prints the table of all of them, and writes it to
``compiled.json``, to which the tests hold the kernels, where it is called with ``--renew``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sftmix_kernels.gates import Kind, Objective
from sftmix_kernels.plan_kernels import label_terms, pair_terms
from sftmix_kernels.row_chunks.chunks import logits_workspace
from sftmix_kernels.row_chunks.kernels import pair_rows_, soft_rows_
from sftmix_kernels.row_chunks.mixing import mixed_rows
from sftmix_kernels.scaling import scaled_rows
from sftmix_kernels.transform import LogitTransform
from sftmix_kernels.vocab_tiles.backward import (
    add_live_product_,
    pair_gradient_,
    soft_gradient_,
)
from sftmix_kernels.vocab_tiles.forward import pair_forward, soft_forward
from sftmix_kernels.vocab_tiles.groups import PairGroup, RowGroup

TOOLS = Path(nvidia.__file__).parent / "bin"
COMMITTED = Path(__file__).with_name("compiled.json")
# What ptxas said of each program. It warns of products of a warp group that run one by one (C7515).
LOGS: dict[str, str] = {}
ADVISORY = re.compile(r"C75\d\d")
LABEL, INSTRUCTION = re.compile(r"(\.L_\w+):"), re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")

# Shared memory that a block may have, in bytes, by compute capability: the CUDA C++ Programming
# Guide, technical specifications per compute capability.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CHIPS = tuple(SHARED_LIMITS)


@dataclass(frozen=True)
class Case:
    """A call whose kernels are compiled."""

    name: str
    launch: partial[None]


@dataclass(frozen=True)
class Program:
    """One kernel compiled for one chip."""

    kernel: str
    variant: str
    chip: int
    half_precision: bool  # whether it has arguments in half precision
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    warps: int
    stages: int
    advisories: tuple[str, ...]
    # Instructions of each loop on sm_90, and those of them that an ordinary block takes: a jump
    # over code without an exponential or a product is taken (it masks), others are not.
    loops: tuple[tuple[int, int], ...]
    ttir: str
    ptx: str

    @property
    def counts(self) -> dict[str, Any]:
        """What `compiled.json` keeps of a program: of sm_90 all, of other chips what decides."""
        kept: dict[str, Any] = {"registers": self.registers, "spilled": self.spilled}
        if self.chip == 90:
            kept |= {"shared": self.shared, "advisories": list(self.advisories)}
            kept |= {"loops": [list(loop) for loop in self.loops]}
        return kept

    @property
    def key(self) -> str:
        return f"{self.kernel}, {self.variant}, sm_{self.chip}"


@dataclass(frozen=True)
class Chip:
    """What Triton asks of the current device before it compiles for it."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device; no machine has eighty of them.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: Case, chip: int) -> list[Program]:
    """Compile every kernel that the case launches, past Triton's cache on disk."""
    run = JITFunction.run
    kernels = []

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernels.append(run(kernel, *args, warmup=True, **options))
        # Triton compiles nothing a second time.
        LOGS[kernels[-1].hash] = log.getvalue() or LOGS[kernels[-1].hash]

    with (
        triton.knobs.nvidia.scope(),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        mock.patch.object(type(triton.runtime.driver), "active", Chip(chip)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        triton.knobs.nvidia.dump_ptxas_log = True
        case.launch()
    assert kernels, f"{case.name} launched no kernel"
    return [_program(case, chip, kernel) for kernel in kernels]


def _program(case: Case, chip: int, kernel: Any) -> Program:
    registers, spilled = _registers_and_spills(kernel.asm["cubin"])
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: v for path, v in kernel.src.constants.items() if len(path) == 1}
    return Program(
        kernel=kernel.metadata.name,
        variant=case.name,
        chip=chip,
        half_precision=not {"*bf16", "*fp16"}.isdisjoint(flat(kernel.src.signature.values())),
        registers=registers,
        spilled=spilled,
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        stages=constants.get("STAGES", kernel.metadata.num_stages),
        advisories=tuple(ADVISORY.findall(LOGS[kernel.hash])),
        loops=tuple(_loops(kernel.asm["cubin"])) if chip == 90 else (),
        ttir=kernel.asm["ttir"],
        # Without the names of source files, which may hold anything.
        ptx="\n".join(line for line in kernel.asm["ptx"].splitlines() if '"' not in line),
    )


def flat(types: Iterable[Any]) -> Iterator[str]:
    """The types of arguments, those of a tuple one by one."""
    for one in types:
        yield from flat(one) if isinstance(one, tuple) else (one,)


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / name, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    usage = _tool("cuobjdump", "-res-usage", cubin)
    (counts,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, counts)
    return registers, stack + local


def _loops(cubin: bytes) -> Iterator[tuple[int, int]]:
    """Instructions of each loop of the disassembled program, and those that are not jumped over."""
    code, places = [], {}
    for line in _tool("nvdisasm", "-c", cubin).splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction[1])
    jumps = {at: places[m[1]] for at, line in enumerate(code) if (m := BRANCH.search(line))}
    for end, start in jumps.items():
        if start < end:
            yield end + 1 - start, sum(1 for _ in _ordinary(code, jumps, start, end))


def _ordinary(code: list[str], jumps: dict[int, int], at: int, end: int) -> Iterator[int]:
    """The instructions from one place to another that an ordinary block takes."""
    while at <= end:
        yield at
        to = jumps.get(at, 0)
        skipped = " ".join(code[at + 1 : to])
        masks = at < to <= end and "MUFU" not in skipped and "MMA" not in skipped
        at = to if masks else at + 1


def logits(rows: int, vocab_size: int, dtype: torch.dtype, padded: bool = True) -> Tensor:
    head = torch.zeros(vocab_size, 1, dtype=dtype)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        workspace = logits_workspace(head, rows)
    return workspace if padded else workspace.contiguous()


def pair_rows(
    dtype: torch.dtype,
    softcap: float | None = None,
    *,
    has_bias: bool = False,
    needs_gradient: bool = True,
    vocab_size: int = 32000,
    padded: bool = True,
    kind: Kind = Kind.PLAIN,
    stats: bool = False,
) -> None:
    pair_rows_(
        logits(6, vocab_size, dtype, padded),
        labels=torch.zeros(6, dtype=torch.int64),
        row_weight=torch.zeros(6),
        share=torch.zeros(3, 2),
        pair_weight=torch.zeros(3),
        mix_ratio=torch.zeros(()),
        transform=LogitTransform(1.0 if softcap is None else 0.5, softcap, has_bias),
        needs_gradient=needs_gradient,
        objective=objective(6, kind, stats),
    )


def objective(rows: int, kind: Kind, stats: bool) -> Objective:
    """A kind with what it needs."""
    old = torch.zeros(rows) if kind == Kind.CLIPPED else None
    return Objective(kind, 0.5, old, torch.zeros(3, rows) if stats else None)


def soft_rows(
    dtype: torch.dtype,
    targets: int,
    softcap: float | None = None,
    *,
    needs_gradient: bool = True,
    vocab_size: int = 32000,
    kind: Kind = Kind.PLAIN,
    stats: bool = False,
) -> None:
    share: Tensor | None = None if targets == 1 else torch.zeros(3, targets)
    soft_rows_(
        logits(3, vocab_size, dtype),
        targets=torch.zeros(3, targets, dtype=torch.int64),
        share=share,
        row_weight=torch.zeros(3),
        transform=LogitTransform(1.0 if softcap is None else 0.5, softcap, has_bias=False),
        needs_gradient=needs_gradient,
        objective=objective(3, kind, stats),
    )


def mix_rows(dtype: torch.dtype) -> None:
    hidden, rows = torch.zeros(3, 2048, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    mixed_rows(hidden, hidden, share=torch.zeros(3, 2), rows=rows, row_weight=torch.zeros(3))


def scale_rows(dtype: torch.dtype, out: torch.dtype) -> None:
    """As for what is handed out, in place where the dtypes are one, and as for what is gathered."""
    source, ones = torch.zeros(3, 2048, dtype=dtype), torch.zeros(2)
    target = source if dtype == out else torch.zeros(3, 2048, dtype=out)
    scaled_rows(source, torch.zeros(()), out=target)
    gathered = torch.zeros(2, 2048, dtype=dtype)
    scaled_rows(source, out=gathered, rows=torch.zeros(2, dtype=torch.int64), weight=ones)


def lay_out_rows() -> None:
    labels, pairs = torch.zeros(3000, dtype=torch.int64), torch.zeros(2, 70, dtype=torch.int64)
    label_terms(labels, None, 32000, -100)
    label_terms(labels, labels, 32000, -100)
    pair_terms(torch.zeros(3000), *pairs, torch.zeros(70))


def head(dtype: torch.dtype, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    weight = torch.zeros(32000, 512, dtype=dtype)
    return weight, weight[:, 0].contiguous() if has_bias else None


def soft_tiles(
    dtype: torch.dtype, targets: int, softcap: float | None = None, *, has_bias: bool = False
) -> None:
    weight, bias = head(dtype, has_bias)
    hidden, ids = torch.zeros(130, 512, dtype=dtype), torch.zeros(targets, 130, dtype=torch.int64)
    partner, share = (None, None) if targets == 1 else (hidden, torch.zeros(2, 130))
    group = RowGroup(hidden, partner, ids, share, torch.zeros(130))
    transform = LogitTransform(0.5, softcap, has_bias)
    live = torch.zeros(2, 250, dtype=torch.uint8)
    soft_forward(group, weight, bias, transform, live, 1e-4)
    gradient = torch.zeros(130, 256, dtype=dtype)
    soft_gradient_(gradient, group, weight, bias, torch.zeros(4, 130), live, transform, 3)


def pair_tiles(dtype: torch.dtype, softcap: float | None = None, *, has_bias: bool = False) -> None:
    weight, bias = head(dtype, has_bias)
    ids = torch.zeros(2, 70, dtype=torch.int64)
    hidden = torch.zeros(140, 512, dtype=dtype)
    group = PairGroup(ids, ids, torch.zeros(3, 70), torch.zeros(2, 70))
    transform = LogitTransform(0.5, softcap, has_bias)
    live = torch.zeros(2, 250, dtype=torch.uint8)
    pair_forward(hidden, group, torch.zeros(()), weight, bias, transform, live, 1e-4)
    gradient = torch.zeros(140, 256, dtype=dtype)
    pair_gradient_(gradient, hidden, group, weight, bias, torch.zeros(10, 70), live, transform, 3)


def live_product(dtype: torch.dtype) -> None:
    """As for dH, and as for dW, whose left side is transposed."""
    gradient, right = torch.zeros(130, 256, dtype=dtype), torch.zeros(256, 512, dtype=dtype)
    live = torch.zeros(2, 2, dtype=torch.uint8)
    add = partial(add_live_product_, live=live, block_m=128, block_k=128, overwrite=False)
    add(torch.zeros(130, 512), gradient, right)
    add(torch.zeros(256, 512), gradient.t(), right[:130])


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Each option of a kernel somewhere, each dtype where it changes a launch.
CASES = (
    Case("bf16", partial(pair_rows, BF16)),
    Case("bf16, softcap, bias", partial(pair_rows, BF16, 3.0, has_bias=True)),
    Case("fp32, softcap, bias", partial(pair_rows, FP32, 3.0, has_bias=True)),
    Case("fp16, bias", partial(pair_rows, FP16, has_bias=True)),
    Case("bf16, no gradient", partial(pair_rows, BF16, needs_gradient=False)),
    Case("bf16, odd V", partial(pair_rows, BF16, vocab_size=50257)),
    Case("bf16, one target", partial(soft_rows, BF16, 1)),
    Case("bf16, two targets, softcap", partial(soft_rows, BF16, 2, 3.0)),
    Case("fp32, two targets, softcap", partial(soft_rows, FP32, 2, 3.0)),
    Case("fp16, no gradient", partial(soft_rows, FP16, 2, needs_gradient=False)),
    Case("bf16, odd V", partial(soft_rows, BF16, 2, vocab_size=50257)),
    # Each objective, alone or with stats.
    Case("bf16, DFT", partial(pair_rows, BF16, kind=Kind.POWER)),
    Case("bf16, EAFT, stats", partial(pair_rows, BF16, kind=Kind.ENTROPY, stats=True)),
    Case("bf16, PSFT", partial(soft_rows, BF16, 1, kind=Kind.CLIPPED)),
    Case("bf16, threshold, stats", partial(soft_rows, BF16, 1, kind=Kind.ABOVE, stats=True)),
    Case("bf16, smoothed", partial(soft_rows, BF16, 1, kind=Kind.SMOOTHED)),
    Case("bf16, smoothed, softcap", partial(soft_rows, BF16, 1, 3.0, kind=Kind.SMOOTHED)),
    Case("bf16, GEM", partial(soft_rows, BF16, 1, kind=Kind.GEM)),
    Case("bf16, GEM, stats", partial(soft_rows, BF16, 1, kind=Kind.GEM, stats=True)),
    Case("bf16", partial(mix_rows, BF16)),
    Case("fp32", partial(mix_rows, FP32)),
    Case("fp32 to bf16", partial(scale_rows, FP32, BF16)),
    Case("bf16", partial(scale_rows, BF16, BF16)),
    Case("labels and pairs", partial(lay_out_rows)),
    Case("bf16", partial(pair_tiles, BF16)),
    Case("bf16, softcap, bias", partial(pair_tiles, BF16, 3.0, has_bias=True)),
    Case("fp32", partial(pair_tiles, FP32)),
    Case("bf16, one target", partial(soft_tiles, BF16, 1)),
    Case("bf16, two targets", partial(soft_tiles, BF16, 2)),
    Case("fp16, all options", partial(soft_tiles, FP16, 2, 3.0, has_bias=True)),
    Case("fp32, two targets", partial(soft_tiles, FP32, 2)),
    Case("bf16", partial(live_product, BF16)),
    Case("fp32", partial(live_product, FP32)),
)


def table(programs: list[Program]) -> str:
    """The programs as a Markdown table."""
    header = "kernel | variant | chip | registers | spilled bytes | shared bytes | warps | stages"
    lines = [f"| {header} | advisories | loops |", "|---" * 10 + "|"]
    lines += [
        f"| {p.kernel} | {p.variant} | sm_{p.chip} | {p.registers} | {p.spilled} | {p.shared} "
        f"| {p.warps} | {p.stages} | {', '.join(p.advisories)} "
        f"| {', '.join(f'{most} in {all_}' for all_, most in p.loops)} |"
        for p in programs
    ]
    return "\n".join(lines)


Kept: TypeAlias = dict[str, list[dict[str, Any]]]


def kept(programs: list[Program]) -> Kept:
    """What `compiled.json` has of programs, by their keys; a case may launch a kernel twice."""
    counts: Kept = {}
    for program in programs:
        counts.setdefault(program.key, []).append(program.counts)
    return counts


def as_json(counts: Kept) -> str:
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in counts.items())
    return f'{{"triton": "{triton.__version__}", "programs": {{\n{lines}\n}}}}\n'


if __name__ == "__main__":
    print(f"triton {triton.__version__}\n")
    found = [p for case in CASES for chip in CHIPS for p in compile_case(case, chip)]
    print(table(found))
    if "--renew" in sys.argv:
        COMMITTED.write_text(as_json(kept(found)))
