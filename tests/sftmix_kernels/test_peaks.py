"""Measured peaks meet their formulas from both sides: neither is more held, nor is a bound loose.

Legend: N rows, D hidden size, V vocabulary; one moment, a chunk of rows or the gradients handed
out, is the peak of each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sftmix_kernels import (
    RowChunks,
    VocabTiles,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
    peaks,
    streaming_perplexity,
)
from sftmix_kernels.extension import build_info
from sftmix_kernels.gradients import Gradients
from sftmix_kernels.peaks import BOTH, MIXUP, NTP, Shape, peak_bytes, perplexity_peak_bytes
from tools.peak_memory import peak_extra_bytes, tidy_launches

every_task = pytest.mark.parametrize("task", [NTP, MIXUP, BOTH])


@pytest.fixture
def _tidy_launches() -> Iterator[None]:
    with tidy_launches():
        yield


def head_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D) and labels (N,)."""
    num_rows, size, vocab_size, width = shape
    dtype = torch.float32 if width == 4 else torch.bfloat16
    hidden = torch.randn(num_rows, size).to(dtype)
    weight = torch.randn(vocab_size, size).to(dtype) / size**0.5
    return hidden, weight, torch.randint(0, vocab_size, (num_rows,))


def training_step(
    task: str, schedule: RowChunks | VocabTiles, shape: Shape
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the loss and both gradients."""
    hidden, weight, labels = head_inputs(shape)
    hidden.requires_grad_()
    weight.requires_grad_()
    pairs = torch.arange(shape.rows).chunk(2)

    def step() -> tuple[Tensor, ...]:
        if task == NTP:
            loss = fused_cross_entropy(hidden, weight, labels, schedule=schedule)
        elif task == MIXUP:
            halves = hidden.chunk(2)
            loss = fused_mixup_loss(*halves, weight, *labels.chunk(2), 0.3, schedule=schedule)
        else:
            loss = fused_sftmix_loss(hidden, weight, labels, *pairs, 0.3, schedule=schedule).loss
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return step


def assert_met(step: Callable[[], object], formula: int) -> None:
    assert 0.85 <= peak_extra_bytes(step) / formula <= 1.05


compiled = pytest.mark.skipif(
    build_info() is None, reason="PyTorch operations hold copies of the logits"
)


@compiled
@every_task
@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize(
    ("rows", "size", "vocab_size", "schedule", "chunk_is_peak"),
    [
        (400, 64, 6000, RowChunks(rows=128), True),
        (128, 512, 8000, RowChunks(rows=32), None),
        (500, 96, 5003, RowChunks(rows=130), True),
        (2500, 32, 2000, RowChunks(), True),
        (512, 64, 1000, RowChunks(rows=512), True),
    ],
)
def test_row_chunks_on_the_cpu(
    task: str,
    width: int,
    rows: int,
    size: int,
    vocab_size: int,
    schedule: RowChunks,
    chunk_is_peak: bool | None,
) -> None:
    """Where nothing of dW is copied a chunk is the peak: in float32, or if dW is rounded once."""
    shape = Shape(rows, size, vocab_size, width)
    chunk = peaks.cpu_chunk_bytes(task, schedule, shape)
    copies_nothing = width == 4 or peaks.rounds(task, schedule, shape)
    expected = copies_nothing if chunk_is_peak is None else chunk_is_peak
    assert (chunk > peaks.handed_out_bytes(task, schedule, shape, kernels=False)) == expected
    step = training_step(task, schedule, shape)
    assert_met(step, peak_bytes(task, schedule, shape, kernels=False))


# The interpreter has no GEMM of half precision: PyTorch then makes float32 copies that CUDA does
# not need, so that float32 alone says what CUDA holds.
@pytest.mark.interpret
@pytest.mark.usefixtures("_tidy_launches")
@every_task
@pytest.mark.parametrize(
    ("rows", "size", "vocab_size", "schedule"),
    [(72, 16, 1001, RowChunks(rows=24)), (72, 128, 1001, RowChunks(rows=24))],
)
def test_row_chunks_by_kernels(
    task: str, rows: int, size: int, vocab_size: int, schedule: RowChunks
) -> None:
    """In float32 a chunk is the peak, since gradients are multiplied in place."""
    shape = Shape(rows, size, vocab_size, 4)
    chunk = peaks.chunk_bytes(task, schedule, shape)
    assert chunk > peaks.handed_out_bytes(task, schedule, shape, kernels=True)
    assert not peaks.keeps(task, schedule, shape)
    step = training_step(task, schedule, shape)
    assert_met(step, peak_bytes(task, schedule, shape, kernels=True))


@pytest.mark.interpret
@pytest.mark.usefixtures("_tidy_launches")
@every_task
@pytest.mark.parametrize(("rows", "size", "vocab_size"), [(72, 16, 1001), (72, 512, 300)])
def test_one_chunk_by_kernels(task: str, rows: int, size: int, vocab_size: int) -> None:
    """Where logits or where hidden states and dW are most of it."""
    shape, schedule = Shape(rows, size, vocab_size, 4), RowChunks(rows=128)
    assert peaks.keeps(task, schedule, shape)
    step = training_step(task, schedule, shape)
    assert_met(step, peak_bytes(task, schedule, shape, kernels=True))


@pytest.mark.interpret
@every_task
@pytest.mark.parametrize("size", [1024, 2048, 4096])
def test_one_chunk_takes_no_more_than_two(task: str, size: int) -> None:
    """The last number of rows that go at once, in bfloat16, beside two chunks, each full."""
    schedule, halves = RowChunks(rows=4096), 2 if task == MIXUP else 1
    shape = Shape(halves * (4096 + size), size, 128256, 2)
    in_chunks = shape._replace(rows=halves * 8192 + 2 * (size == 4096))
    assert peaks.keeps(task, schedule, shape)
    assert not peaks.keeps(task, schedule, in_chunks)
    whole = peak_bytes(task, schedule, shape, kernels=True)
    assert whole <= 1.03 * peak_bytes(task, schedule, in_chunks, kernels=True)


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize(("rows", "at_once"), [(6000, True), (16384, False)])
def test_a_plan_holds_what_the_formula_says(rows: int, at_once: bool, frozen_head: bool) -> None:
    """Of an op that a plan for a GPU calls, gradients returned and workspace together."""
    shape, schedule = Shape(rows, 2048, 32000, 2), RowChunks(rows=4096)
    assert peaks.keeps(NTP, schedule, shape) == at_once
    hidden = torch.empty(rows, shape.hidden_size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=torch.bfloat16, device="meta")
    args = (hidden, None, weight, None, None, None, None, 1.0, None, 512)
    needs = [True, not frozen_head, False]
    inside = peaks.op_workspace("mixup_rows", (*args, needs), schedule, kernels=True)
    dh = 2 * hidden.numel()
    if frozen_head:
        # Two chunks or four.
        assert inside == 2 * (3000 if at_once else 4096) * (32000 + 2048)
        return
    held, chunk = inside + dh + 4 * weight.numel(), peaks.chunk_bytes(NTP, schedule, shape)
    assert held == chunk + dh + (2 if at_once else 4) * weight.numel()
    assert peaks.op_products("mixup_rows", (*args, needs)) == 3 * 2 * rows * weight.numel()


@pytest.mark.parametrize("fast", [False, True])
def test_a_plan_for_a_gpu_is_the_same_on_every_cpu(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with fast products in bfloat16 makes dW of few rows in bfloat16, others in float32."""
    dtypes = {torch.float32, torch.bfloat16} if fast else {torch.float32}
    monkeypatch.setattr("sftmix_kernels.schedules.FAST_DTYPES", frozenset(dtypes))
    shape, schedule = Shape(512, 64, 32000, 2), RowChunks()
    with FakeTensorMode():
        hidden = torch.empty(512, 64, dtype=torch.bfloat16)
        weight = torch.empty(32000, 64, dtype=torch.bfloat16)
        args = (hidden, None, weight, None, None, None, None, 1.0, None, 512, [True, True, False])
        inside = peaks.op_workspace("mixup_rows", args, schedule, kernels=True)
        found = Gradients(hidden, weight, [True, True, False], 512, chunk_rows=512)
    assert found.weight.itemsize == (2 if fast else 4)
    dw = found.weight.itemsize * weight.numel()
    assert inside + dw == peaks.chunk_bytes(NTP, schedule, shape) + 2 * weight.numel()


@pytest.mark.parametrize("stats", [False, True])
def test_a_plan_knows_which_argument_keeps_gradients(stats: bool) -> None:
    needs, after = [True, True, False], (None, None, 0, 0.0, stats)
    for keeps in (False, True):
        args = ("tensors", 1.0, None, 512, needs, 0, None, keeps, *after)
        assert peaks.keeps_all(args) == keeps
        assert peaks.needed_gradients(args) == needs
    assert not peaks.keeps_all(("tensors", needs))
    assert not peaks.keeps_all(("tensors", None))


@pytest.mark.interpret
@pytest.mark.usefixtures("_tidy_launches")
@every_task
@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-8])
@pytest.mark.parametrize(("rows", "size", "vocab_size"), [(256, 32, 300), (128, 128, 400)])
def test_vocab_tiles(task: str, filter_eps: float, rows: int, size: int, vocab_size: int) -> None:
    """In float32 a group is the peak, since gradients are multiplied in place."""
    shape, schedule = Shape(rows, size, vocab_size, 4), VocabTiles(filter_eps, max_bytes=2**16)
    group = peaks.group_bytes(task, schedule, shape)
    assert group > peaks.handed_out_bytes(task, schedule, shape, kernels=True)
    step = training_step(task, schedule, shape)
    assert_met(step, peak_bytes(task, schedule, shape, kernels=True))


@compiled
@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize("vocab_chunk", [8192, 2048])
def test_streaming_perplexity(width: int, vocab_chunk: int) -> None:
    shape, num_samples = Shape(4096, 64, 8000, width), 64
    hidden, weight, labels = head_inputs(shape)
    samples = torch.arange(shape.rows) % num_samples

    def step() -> Tensor:
        tokens = (hidden, weight, labels, samples, num_samples)
        return streaming_perplexity(*tokens, vocab_chunk=vocab_chunk)

    assert_met(step, perplexity_peak_bytes(shape, vocab_chunk))
