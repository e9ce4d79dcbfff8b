"""`fused_cross_entropy` against the reference, and what it promises to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import RowChunks, fused_cross_entropy, reference

from .budget import (
    DTYPES,
    FAR,
    HEADS,
    SHAPES,
    assert_in_budget,
    assert_same_bits,
    exact,
    head_inputs,
    run,
    same_class,
    some_labels,
)


def assert_loss_in_budget(
    tensors: dict[str, Tensor], labels: Tensor, upstream: float | Tensor = 0.37, **options: Any
) -> None:
    """Our loss against the dense one; the scalar's PyTorch error counted per row."""
    scalar = options.get("reduction", "mean") != "none"
    divisor = max(1, int((labels != -100).sum())) if "reduction" not in options else 1
    head = {k: v for k, v in options.items() if k not in ("reduction", "schedule")}
    dense = {k: v for k, v in options.items() if k != "schedule"}
    assert_in_budget(
        lambda **t: fused_cross_entropy(**t, labels=labels, **options),
        lambda **t: reference.cross_entropy(**t, labels=labels, **dense),
        tensors,
        upstream=upstream,
        rows=(
            lambda **t: (
                reference.cross_entropy(**t, labels=labels, reduction="none", **head) / divisor
            )
        )
        if scalar
        else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_every_dtype_and_option(dtype: torch.dtype, head: dict[str, Any]) -> None:
    options = dict(head)
    tensors = head_inputs((5, 41, 64), 515, dtype, bias=options.pop("bias", False))
    assert_loss_in_budget(tensors, some_labels((5, 41), 515, ignored=0.3), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_shapes_and_large_vocabularies(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, size, vocab_size = shape
    labels = some_labels((rows,), vocab_size)
    labels[-1] = vocab_size - 1
    assert_loss_in_budget(head_inputs((rows, size), vocab_size, dtype), labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradient_not_uniform(dtype: torch.dtype) -> None:
    labels = some_labels((3, 11), 123, ignored=0.3)
    tensors = head_inputs((3, 11, 16), 123, dtype, bias=True)
    assert_loss_in_budget(tensors, labels, torch.randn(3, 11), reduction="none")
    assert_loss_in_budget(tensors, labels, reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_tokens_keep_their_gradient(dtype: torch.dtype) -> None:
    labels = torch.arange(20)
    tensors = {"hidden": torch.eye(20).to(dtype), "weight": (17.0 * torch.eye(20)).to(dtype)}
    losses = reference.cross_entropy(**tensors, labels=labels, reduction="none")
    assert losses.max() < 1e-6
    assert_loss_in_budget(tensors, labels)


@pytest.mark.parametrize("schedule", [RowChunks(rows=n) for n in (2, 4, 6, 128)])
def test_any_chunk_size_gives_the_same_row_losses(schedule: RowChunks) -> None:
    hidden, weight, labels = exact(150, 32), exact(123, 32), some_labels((150,), 123, ignored=0.2)
    whole = fused_cross_entropy(hidden, weight, labels, reduction="none")
    found = fused_cross_entropy(hidden, weight, labels, reduction="none", schedule=schedule)
    assert torch.equal(found, whole)


def test_small_chunks_are_in_budget() -> None:
    tensors = head_inputs((37, 17), 123, torch.bfloat16)
    assert_loss_in_budget(tensors, some_labels((37,), 123), schedule=RowChunks(rows=2))


@pytest.mark.parametrize("label", [123, *FAR])
def test_one_label_out_of_range_makes_its_row_nan_alone(label: int) -> None:
    hidden, weight = torch.randn(4096, 8), torch.randn(123, 8)
    labels = some_labels((4096,), 123)
    bad = labels.clone()
    bad[1000] = label
    others = torch.arange(4096) != 1000

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return fused_cross_entropy(hidden, weight, labels, reduction="none")

    good = run(lambda hidden: losses(hidden, labels), {"hidden": hidden})
    found = run(lambda hidden: losses(hidden, bad), {"hidden": hidden})
    gradient, good_gradient = found.gradients["hidden"], good.gradients["hidden"]
    assert gradient is not None
    assert good_gradient is not None
    assert found.loss[1000].isnan()
    assert gradient[1000].isnan().all()
    assert torch.equal(found.loss[others], good.loss[others])
    assert torch.equal(gradient[others], good_gradient[others])


def test_nan_hidden_row_leaves_other_rows_alone() -> None:
    hidden, weight, labels = torch.randn(50, 8), torch.randn(123, 8), some_labels((50,), 123)
    good = fused_cross_entropy(hidden, weight, labels, reduction="none")
    hidden[7] = torch.nan
    found = fused_cross_entropy(hidden, weight, labels, reduction="none")
    others = torch.arange(50) != 7
    assert found[7].isnan()
    assert torch.equal(found[others], good[others])


def test_ignored_nan_hidden_row_reaches_nothing() -> None:
    tensors = {"hidden": torch.randn(5, 8), "weight": torch.randn(123, 8)}
    labels = torch.tensor([3, -100, 5, 6, 7])
    clean = run(lambda **t: fused_cross_entropy(**t, labels=labels), tensors)
    tensors["hidden"][1] = torch.nan
    assert_same_bits(run(lambda **t: fused_cross_entropy(**t, labels=labels), tensors), clean)


@pytest.mark.parametrize("shape", [(4, 3), (0,), (2, 0)])
def test_nothing_to_average_is_zero(shape: tuple[int, ...]) -> None:
    labels = torch.full(shape, -100)
    tensors = head_inputs((*shape, 8), 123, torch.float32, bias=True)
    for reduction in ("mean", "sum", "none"):
        found = run(
            lambda reduction=reduction, **t: fused_cross_entropy(
                **t, labels=labels, reduction=reduction
            ),
            tensors,
        )
        assert not found.loss.any()
        assert all(g is not None and not g.any() for g in found.gradients.values())


def test_one_valid_token_of_many_is_the_one_token_result() -> None:
    hidden, weight = torch.randn(16384, 8), torch.randn(123, 8)
    labels = torch.full((16384,), -100)
    labels[9000] = 5
    many = run(
        lambda **t: fused_cross_entropy(**t, labels=labels), dict(hidden=hidden, weight=weight)
    )
    one = run(
        lambda **t: fused_cross_entropy(**t, labels=labels[9000:9001]),
        dict(hidden=hidden[9000:9001], weight=weight),
    )
    assert torch.equal(many.loss, one.loss)
    assert many.gradients["hidden"] is not None
    assert torch.equal(many.gradients["hidden"][9000:9001], one.gradients["hidden"])
    assert torch.equal(many.gradients["weight"], one.gradients["weight"])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 5])
def test_infinite_logits_are_of_dense_torchs_class(value: float, column: int) -> None:
    tensors = head_inputs((6, 8), 123, torch.float32, bias=True)
    tensors["bias"][column] = value
    labels = torch.tensor([5, 6, 7, 8, 9, 5])
    found, dense = (
        run(lambda loss=loss, **t: loss(**t, labels=labels, reduction="none"), tensors)
        for loss in (fused_cross_entropy, reference.cross_entropy)
    )
    assert same_class(found.loss, dense.loss)
    for name, gradient in dense.gradients.items():
        other = found.gradients[name]
        assert gradient is not None
        assert other is not None
        assert same_class(other, gradient), name


def test_common_logit_offset_changes_no_bit() -> None:
    hidden, weight, labels = exact(40, 32), exact(123, 32), some_labels((40,), 123)
    tensors = dict(hidden=hidden, weight=weight, bias=torch.zeros(123))
    plain = run(lambda **t: fused_cross_entropy(**t, labels=labels), tensors)
    tensors["bias"] = torch.full((123,), 1e4)
    assert_same_bits(run(lambda **t: fused_cross_entropy(**t, labels=labels), tensors), plain)


def test_divisor_as_number_and_as_tensor() -> None:
    tensors, labels = head_inputs((9, 8), 123, torch.float32), some_labels((9,), 123)
    number = run(lambda **t: fused_cross_entropy(**t, labels=labels, divisor=20.0), tensors)
    tensor = run(
        lambda **t: fused_cross_entropy(**t, labels=labels, divisor=torch.tensor(20)), tensors
    )
    assert_same_bits(tensor, number)
    assert_loss_in_budget_with_divisor(tensors, labels)


def assert_loss_in_budget_with_divisor(tensors: dict[str, Tensor], labels: Tensor) -> None:
    """A divisor that is not the count."""
    assert_in_budget(
        lambda **t: fused_cross_entropy(**t, labels=labels, divisor=20.0),
        lambda **t: reference.cross_entropy(**t, labels=labels, divisor=20.0),
        tensors,
        rows=lambda **t: reference.cross_entropy(**t, labels=labels, reduction="none") / 20.0,
    )
