"""The CUDA kernels of perplexity, as nvcc compiles them, against PyTorch in float64."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sftmix_kernels.perplexity.online_softmax import new_state

from ..budget import check
from .executor import Finding, Program
from .launch import library

pytestmark = pytest.mark.ptx

ROOT = Path(__file__).parents[3]
THREADS = 128  # kThreads of online_softmax_kernels.cuh
SOURCE = """
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include "online_softmax_kernels.cuh"
#define FOLD(type, capped, warps) \\
  template __global__ void fold_logits_kernel<type, capped, warps>(const Chunk<type>);
namespace sftmix {
FOLD(float, false, 4)
FOLD(c10::BFloat16, false, 4)
FOLD(c10::BFloat16, true, 1)
FOLD(c10::Half, true, 4)
}  // namespace sftmix
"""
TYPES = {torch.float32: "f", torch.bfloat16: "BFloat16", torch.float16: "Half"}

Find = Callable[[str], Program]


@pytest.fixture(scope="module")
def find(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Find:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    place = tmp_path_factory.mktemp("cuda")
    (place / "kernels.cu").write_text(SOURCE)
    includes = [f"-I{path}" for path in (ROOT / "csrc", Path(torch.__file__).parent / "include")]
    options = ["-ptx", "-O3", "-ftz=true", "-arch=sm_90", "-std=c++20"]  # those of setup.py
    command = ["nvcc", *options, *includes, "kernels.cu", "-o", "kernels.ptx"]
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    text = (place / "kernels.ptx").read_text()

    def program(pattern: str) -> Program:
        (name,) = re.findall(rf"\.entry (\w*{pattern}\w*)\(", text)
        return Program(library(folder), text, name)

    return program


def fold(
    program: Program,
    logits: Tensor,  # (K, N), rows a multiple of 16 bytes apart
    bias: Tensor | None,
    labels: Tensor,
    start: int,
    scale: float,
    cap: float,
    state: Tensor,
    warps: int,
) -> list[Finding]:
    """Do what `launch_fold` of online_softmax_cuda.cu does."""
    rows, columns = logits.shape
    blocks = -(-rows * 32 * warps // THREADS)
    chunk = [logits, 0 if bias is None else bias, labels, rows, columns, logits.stride(0), start]
    transform, states = struct.pack("<ff", scale, cap), [state, state.stride(0)]
    return program.launch((blocks, 1, 1), [*chunk, transform, *states], 0)[1]


@pytest.mark.parametrize(
    ("dtype", "scale", "cap", "warps", "has_bias"),
    [
        (torch.float32, 1.0, 0.0, 4, False),
        (torch.bfloat16, 1.0, 0.0, 4, True),
        (torch.bfloat16, 0.5, 5.0, 1, False),
        (torch.float16, 1.5, 3.0, 4, True),
    ],
)
def test_fold_logits(
    find: Find, dtype: torch.dtype, scale: float, cap: float, warps: int, has_bias: bool
) -> None:
    """Two chunks of a vocabulary, the second one ragged, of rows that no block divides."""
    program = find(f"fold_logits_kernel\\w*{TYPES[dtype]}\\w*Lb{int(cap > 0)}ELi{warps}E")
    rows, first, vocab_size = 7, 2048, 3001
    logits = (3.0 * torch.randn(rows, vocab_size)).to(dtype)
    bias = torch.randn(vocab_size).to(dtype) if has_bias else None
    labels = torch.randint(0, vocab_size, (rows,))
    labels[:2] = torch.tensor([vocab_size - 1, 0])
    state, findings = new_state(rows, logits), []
    for start, stop in ((0, first), (first, vocab_size)):
        room = torch.full((rows, 2048), torch.nan, dtype=dtype)
        part = room[:, : stop - start].copy_(logits[:, start:stop])
        part_bias = None if bias is None else bias[start:stop].clone()
        findings += fold(program, part, part_bias, labels, start, scale, cap, state, warps)
    assert findings == []

    def losses(kind: torch.dtype) -> Tensor:
        raw = scale * (logits.to(kind) + (0.0 if bias is None else bias.to(kind)))
        raw = cap * torch.tanh(raw / cap) if cap else raw
        return torch.nn.functional.cross_entropy(raw, labels, reduction="none")

    maximum, total, target = state
    exact = losses(torch.float64)
    check("losses", total.log() - (target - maximum), exact, losses(torch.float32) - exact)


def test_add_token_losses(find: Find) -> None:
    """Examples of one token and of more than a warp has lanes, ignored tokens, an id too large."""
    ids = torch.cat([torch.zeros(40), torch.ones(1), torch.full((5,), 2), torch.tensor([9, 0])])
    ids = ids.long()[torch.randperm(48)]
    labels = torch.where(torch.rand(48) < 0.2, -100, 1)
    state = torch.stack([torch.randn(48), 1 + torch.rand(48), torch.randn(48)])
    sums, counts = torch.ones(3, dtype=torch.float64), torch.tensor([1, 2, 3])
    order, blocks = ids.argsort(stable=True), -(-48 * 32 // THREADS)
    arguments = [state, 48, labels, -100, ids, order, 48, sums, counts, 3]
    _, findings = find("add_token_losses").launch((blocks, 1, 1), arguments, 0)
    assert findings == []
    loss = state[1].double().log() - (state[2] - state[0]).double()
    for sample in range(3):
        counted = (ids == sample) & (labels != -100)
        assert counts[sample] == sample + 1 + counted.sum()
        assert abs(sums[sample] - 1.0 - loss[counted].sum()) < 1e-6 * (
            1 + loss[counted].abs().sum()
        )
