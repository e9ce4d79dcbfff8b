"""What only a CUDA device can show: graphs, waiting, memory, real sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import (
    RowChunks,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
    reference,
)

from .budget import (
    Result,
    Tensors,
    assert_same_bits,
    check,
    exact,
    head_inputs,
    run,
    some_labels,
)
from .conftest import DTYPES, SCHEDULES
from .test_sftmix_loss import assert_sftmix_in_budget, random_pairs

pytestmark = pytest.mark.gpu
# Rows of one chunk and of several, and tiles.
every_schedule = pytest.mark.parametrize(
    "schedule", [*SCHEDULES, pytest.param(RowChunks(), id="one_chunk")]
)


def on_cuda(tensors: Tensors) -> Tensors:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def leaves(rows: int, size: int, vocab_size: int, dtype: torch.dtype) -> Tensors:
    """Hidden states and a weight on the device that want a gradient."""
    tensors = on_cuda(head_inputs((rows, size), vocab_size, dtype))
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def batch(rows: int, vocab_size: int) -> Tensors:
    """Labels, some of them ignored, and a pair plan, on the device."""
    num_pairs = 2 * rows // 5
    plan = {**random_pairs(rows, num_pairs), "lam": torch.rand(num_pairs)}
    return on_cuda({"labels": some_labels((rows,), vocab_size, ignored=0.2), **plan})


def sftmix_step(tensors: Tensors, batch: Tensors, schedule: Any) -> Result:
    """Loss and gradients, without a pass through ``Tensor.grad``."""
    loss = fused_sftmix_loss(**tensors, **batch, schedule=schedule).loss
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return Result(loss.detach(), dict(zip(tensors, gradients, strict=True)))


@every_schedule
@pytest.mark.parametrize("dtype", DTYPES["cuda"])
@pytest.mark.parametrize("vocab_size", [128256, 151936])
def test_large_vocabularies(vocab_size: int, dtype: torch.dtype, schedule: Any) -> None:
    tensors = on_cuda(head_inputs((211, 64), vocab_size, dtype))
    inputs = batch(211, vocab_size)
    assert_sftmix_in_budget(tensors, inputs.pop("labels"), inputs, schedule=schedule)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_replays_on_new_inputs(dtype: torch.dtype, schedule: Any) -> None:
    tensors, inputs = leaves(100, 64, 515, dtype), batch(100, 515)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sftmix_step(tensors, inputs, schedule)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sftmix_step(tensors, inputs, schedule)
    with torch.no_grad():
        tensors["hidden"].copy_(torch.randn(100, 64))
        for name, values in batch(100, 515).items():
            inputs[name].copy_(values)
    graph.replay()
    assert_same_bits(captured, sftmix_step(tensors, inputs, schedule))


# PyTorch says that it may miss some waits.
@pytest.mark.filterwarnings("ignore:.*ynchronization debug mode")
@every_schedule
def test_the_host_never_waits_for_the_device(schedule: Any) -> None:
    tensors, inputs = leaves(100, 64, 515, torch.bfloat16), batch(100, 515)
    hidden, weight, labels = tensors["hidden"], tensors["weight"], inputs["labels"]
    ones = torch.ones(100, device="cuda")

    def step() -> None:
        sftmix_step(tensors, inputs, schedule)
        mixed = fused_mixup_loss(hidden, hidden, weight, labels, labels, 0.3, schedule=schedule)
        rows = fused_cross_entropy(hidden, weight, labels, reduction="none", schedule=schedule)
        torch.autograd.grad((mixed, rows), (hidden, weight), (ones[0], ones))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# PyTorch's own tracing of an autograd.Function, and inductor, use what PyTorch deprecates; inductor
# also recommends TF32.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")
@every_schedule
def test_compiled_by_inductor_is_in_budget(schedule: Any) -> None:
    tensors = on_cuda(head_inputs((211, 64), 515, torch.bfloat16))
    inputs = batch(211, 515)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_sftmix_loss(hidden, weight, **inputs, schedule=schedule).loss

    compiled = run(torch.compile(loss, fullgraph=True), tensors)
    plain = run(lambda **t: reference.sftmix_loss(**t, **inputs).loss, tensors)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    truth = run(lambda **t: reference.sftmix_loss(**t, **inputs).loss, doubles)
    for name, gradient in compiled.gradients.items():
        dense, true = plain.gradients[name], truth.gradients[name]
        assert gradient is not None
        assert dense is not None
        assert true is not None
        check(name, gradient, true, dense - true)
    # The sum over rows and one division may be ordered otherwise than in eager mode.
    eager = run(loss, tensors).loss
    assert abs(compiled.loss - eager) <= 4 * torch.finfo(torch.float32).eps * eager


@every_schedule
def test_a_row_that_does_not_exist_and_a_bad_lam_make_the_loss_nan(schedule: Any) -> None:
    """Values are not read back from a GPU, so nothing is raised; nor read out of bounds."""
    tensors, inputs = leaves(100, 64, 515, torch.float32), batch(100, 515)
    for name, values in (("pair_c", (100, -1)), ("lam", (float("nan"), 1.5, -0.5))):
        for value in values:
            bad = {**inputs, "labels": torch.ones_like(inputs["labels"])}
            bad[name] = bad[name].clone()
            bad[name][3] = value
            assert sftmix_step(tensors, bad, schedule).loss.isnan()
    assert sftmix_step(tensors, inputs, schedule).loss.isfinite()


@pytest.mark.parametrize("schedule", [RowChunks(rows=17408, max_bytes=2**33)])
def test_logits_of_more_than_int32_elements(schedule: Any) -> None:
    """The last rows' losses to the bit, since their logits are exact, and their gradients."""
    rows, vocab_size, last = 17000, 128256, 20
    weight = exact(vocab_size, 16).half().cuda()
    hidden, labels = exact(rows, 16).half().cuda(), some_labels((rows,), vocab_size).cuda()

    def losses(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor) -> Result:
        y = labels[-hidden.shape[0] :]
        ones = torch.ones((), device="cuda")
        return run(
            lambda hidden: loss(hidden, weight, y, reduction="none"), {"hidden": hidden}, ones
        )

    def fused(*arguments: Tensor, **options: Any) -> Tensor:
        return fused_cross_entropy(*arguments, **options, schedule=schedule)

    many, few = losses(fused, hidden, weight), losses(fused, hidden[-last:], weight)
    assert torch.equal(many.loss[-last:], few.loss)
    plain = losses(reference.cross_entropy, hidden[-last:], weight).gradients["hidden"]
    truth = losses(reference.cross_entropy, hidden[-last:].double(), weight.double())
    gradient, true = many.gradients["hidden"], truth.gradients["hidden"]
    assert gradient is not None
    assert plain is not None
    assert true is not None
    check("hidden", gradient[-last:], true, plain - true)


@pytest.mark.parametrize("schedule", ["row_chunks"])
def test_a_hundred_repeats_at_real_size_are_bitwise_equal(schedule: Any) -> None:
    tensors, inputs = leaves(4096, 1024, 128256, torch.bfloat16), batch(4096, 128256)
    first = sftmix_step(tensors, inputs, schedule)
    for _ in range(99):
        assert_same_bits(sftmix_step(tensors, inputs, schedule), first)


def peak_cuda_bytes(step: Callable[[], object]) -> int:
    """What ``step`` allocated at its peak; the vendor library's workspace is there already."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    del kept
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_peak_memory_of_row_chunks_is_the_stated_formula(
    dtype: torch.dtype, frozen_head: bool
) -> None:
    """Kept: float32 dW and dH; beside them one chunk, and in backward what is handed out."""
    rows, size, vocab_size, chunk, width = 8192, 1024, 32000, 1024, dtype.itemsize
    tensors, inputs = leaves(rows, size, vocab_size, dtype), batch(rows, vocab_size)
    tensors["weight"].requires_grad_(not frozen_head)
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    head = 0 if frozen_head else vocab_size * size
    kept = 4 * head + width * rows * size
    # A chunk of logits and its hidden rows, twice: hidden and dH.
    forward = width * chunk * (vocab_size + 2 * size)
    handed_out = width * (head + rows * size)

    def step() -> tuple[Tensor, ...]:
        loss = fused_sftmix_loss(**tensors, **inputs, schedule=RowChunks(rows=chunk)).loss
        return torch.autograd.grad(loss, wanted)

    assert peak_cuda_bytes(step) <= 1.05 * (kept + max(forward, handed_out))


@every_schedule
def test_out_of_memory_in_backward_is_forgotten_by_the_next_step(schedule: Any) -> None:
    tensors, inputs = leaves(256, 1024, 32000, torch.bfloat16), batch(256, 32000)
    good = sftmix_step(tensors, inputs, schedule)
    loss = fused_sftmix_loss(**tensors, **inputs, schedule=schedule).loss
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(loss, list(tensors.values()))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same_bits(sftmix_step(tensors, inputs, schedule), good)
