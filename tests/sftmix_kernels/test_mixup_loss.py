"""`fused_mixup_loss` against the reference, and what it promises to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sftmix_kernels import RowChunks, fused_cross_entropy, fused_mixup_loss, reference
from sftmix_kernels.mixup_loss import mixup_rows

from .budget import (
    DTYPES,
    FAR,
    HEADS,
    SHAPES,
    Result,
    Tensors,
    assert_in_budget,
    assert_same_bits,
    exact,
    head_inputs,
    run,
    same_class,
    some_labels,
)

NAMES = ("hidden_c", "hidden_u")


def pair_labels(shape: tuple[int, ...], vocab_size: int, ignored: float = 0.0) -> Tensors:
    labels_c, labels_u = (some_labels(shape, vocab_size, ignored=ignored) for _ in range(2))
    labels_u.reshape(-1)[0] = labels_c.reshape(-1)[0]
    return {"labels_c": labels_c, "labels_u": labels_u}


def mixup(tensors: Tensors, upstream: float | Tensor = 1.0, **options: Any) -> Result:
    return run(lambda **t: fused_mixup_loss(**t, **options), tensors, upstream)


def assert_mixup_in_budget(
    tensors: Tensors,
    labels: Tensors,
    lam: float | Tensor,
    upstream: float | Tensor = 0.37,
    schedule: str | RowChunks = "auto",
    **options: Any,
) -> None:
    """Our loss against the dense one; the scalar's PyTorch error counted per position."""
    both = (labels["labels_c"] != -100) & (labels["labels_u"] != -100)
    divisor = options.get("divisor", max(1, int(both.sum())))
    head = {k: v for k, v in options.items() if k not in ("reduction", "divisor")}

    def rows(**t: Tensor) -> Tensor:
        found = reference.mixup_loss(**t, **labels, lam=lam, reduction="none", **head)
        return found / (1 if options.get("reduction") == "sum" else divisor)

    assert_in_budget(
        lambda **t: fused_mixup_loss(**t, **labels, lam=lam, schedule=schedule, **options),
        lambda **t: reference.mixup_loss(**t, **labels, lam=lam, **options),
        tensors,
        upstream=upstream,
        rows=None if options.get("reduction") == "none" else rows,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_every_dtype_and_option(dtype: torch.dtype, head: dict[str, Any]) -> None:
    options = dict(head)
    bias = options.pop("bias", False)
    tensors = head_inputs((5, 41, 64), 515, dtype, names=NAMES, bias=bias)
    assert_mixup_in_budget(tensors, pair_labels((5, 41), 515, 0.2), torch.rand(5, 41), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_shapes_and_large_vocabularies(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, size, vocab_size = shape
    tensors = head_inputs((rows, size), vocab_size, dtype, names=NAMES)
    assert_mixup_in_budget(tensors, pair_labels((rows,), vocab_size), torch.rand(rows))


@pytest.mark.parametrize("shape", [None, (), (3,), (3, 67)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lam_of_every_shape(shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    tensors = head_inputs((3, 67, 16), 123, dtype, names=NAMES)
    lam = 0.3 if shape is None else torch.rand(shape)
    assert_mixup_in_budget(tensors, pair_labels((3, 67), 123), lam)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradient_not_uniform(dtype: torch.dtype) -> None:
    tensors = head_inputs((3, 11, 16), 123, dtype, names=NAMES, bias=True)
    labels = pair_labels((3, 11), 123, 0.2)
    assert_mixup_in_budget(tensors, labels, 0.3, torch.randn(3, 11), reduction="none")


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"divisor": 50.0}])
def test_sum_and_divisor(options: dict[str, Any]) -> None:
    tensors = head_inputs((37, 16), 123, torch.bfloat16, names=NAMES)
    labels = pair_labels((37,), 123, 0.2)
    assert_mixup_in_budget(tensors, labels, 0.3, schedule=RowChunks(rows=4), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_tokens_and_equal_labels(dtype: torch.dtype) -> None:
    """Both labels the same and nearly certain: each column carries both shares."""
    labels = {"labels_c": torch.arange(20), "labels_u": torch.arange(20)}
    eye = torch.eye(20).to(dtype)
    tensors = {"hidden_c": eye, "hidden_u": eye.clone(), "weight": 17.0 * eye}
    assert_mixup_in_budget(tensors, labels, torch.rand(20))


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("head", HEADS)
def test_lam_zero_or_one_is_bitwise_the_plain_cross_entropy(
    lam: float, head: dict[str, Any]
) -> None:
    options = dict(head)
    bias = options.pop("bias", False)
    tensors = head_inputs((40, 16), 123, torch.float32, names=NAMES, bias=bias)
    labels = pair_labels((40,), 123)
    mixed = mixup(tensors, 0.7, **labels, lam=lam, **options)
    own, other = ("c", "u") if lam else ("u", "c")
    alone = {k: v for k, v in tensors.items() if not k.startswith("hidden")}
    alone["hidden"] = tensors[f"hidden_{own}"]
    plain = run(
        lambda **t: fused_cross_entropy(**t, labels=labels[f"labels_{own}"], **options), alone, 0.7
    )
    renamed = dict(mixed.gradients)
    renamed["hidden"] = renamed.pop(f"hidden_{own}")
    unused = renamed.pop(f"hidden_{other}")
    assert unused is not None
    assert not unused.any()
    assert_same_bits(Result(mixed.loss, renamed), plain)


def test_swapping_c_and_u_at_one_half_changes_no_bit() -> None:
    tensors = head_inputs((40, 16), 123, torch.float32, names=NAMES, bias=True)
    labels = pair_labels((40,), 123, 0.2)
    one = mixup(tensors, **labels, lam=0.5)
    crossed = {"hidden_c": tensors["hidden_u"], "hidden_u": tensors["hidden_c"]}
    other = mixup(
        {**tensors, **crossed},
        labels_c=labels["labels_u"],
        labels_u=labels["labels_c"],
        lam=0.5,
    )
    gradients = dict(other.gradients)
    gradients["hidden_c"], gradients["hidden_u"] = gradients["hidden_u"], gradients["hidden_c"]
    assert_same_bits(Result(other.loss, gradients), one)


def test_one_ignored_label_leaves_the_position_out() -> None:
    tensors = head_inputs((4, 8), 123, torch.float32, names=NAMES)
    labels_c, labels_u = torch.tensor([1, -100, 3, 4]), torch.tensor([5, 6, -100, 8])
    found = mixup(tensors, labels_c=labels_c, labels_u=labels_u, lam=0.3)
    kept = torch.tensor([0, 3])
    fewer = {k: v[kept] if k in NAMES else v for k, v in tensors.items()}
    expected = mixup(fewer, labels_c=labels_c[kept], labels_u=labels_u[kept], lam=0.3)
    assert torch.equal(found.loss, expected.loss)
    assert found.gradients["hidden_c"] is not None
    assert not found.gradients["hidden_c"][1:3].any()
    assert torch.equal(found.gradients["weight"], expected.gradients["weight"])


@pytest.mark.parametrize("label", [123, *FAR])
def test_label_out_of_range_makes_its_position_nan_alone(label: int) -> None:
    tensors = head_inputs((50, 8), 123, torch.float32, names=NAMES)
    labels = pair_labels((50,), 123)
    good = mixup(tensors, **labels, lam=0.3, reduction="none")
    labels["labels_u"][7] = label
    bad = mixup(tensors, **labels, lam=0.3, reduction="none")
    others = torch.arange(50) != 7
    assert bad.loss[7].isnan()
    assert torch.equal(bad.loss[others], good.loss[others])
    for name in NAMES:
        gradient, expected = bad.gradients[name], good.gradients[name]
        assert gradient is not None
        assert expected is not None
        assert gradient[7].isnan().all()
        assert torch.equal(gradient[others], expected[others])


@pytest.mark.parametrize("shape", [(4, 3), (0,), (2, 0)])
def test_nothing_to_average_is_zero(shape: tuple[int, ...]) -> None:
    tensors = head_inputs((*shape, 8), 123, torch.float32, names=NAMES, bias=True)
    ignored = torch.full(shape, -100)
    found = mixup(tensors, labels_c=ignored, labels_u=ignored, lam=0.3)
    assert found.loss == 0
    assert all(g is not None and not g.any() for g in found.gradients.values())


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_masked_vocabulary_entry_is_of_dense_torchs_class(lam: float) -> None:
    tensors = head_inputs((6, 8), 123, torch.float32, names=NAMES, bias=True)
    tensors["bias"][9] = -torch.inf
    labels = {"labels_c": torch.arange(6), "labels_u": torch.arange(1, 7)}
    found = mixup(tensors, **labels, lam=lam)
    dense = run(lambda **t: reference.mixup_loss(**t, **labels, lam=lam), tensors)
    assert same_class(found.loss, dense.loss)
    for name, gradient in dense.gradients.items():
        other = found.gradients[name]
        assert gradient is not None
        assert other is not None
        assert same_class(other, gradient), name


@pytest.mark.parametrize("schedule", [RowChunks(rows=n) for n in (2, 4, 6, 128)])
def test_any_chunk_size_gives_the_same_row_losses(schedule: RowChunks) -> None:
    lam = torch.randint(0, 5, (150,)) / 4
    arguments = (exact(150, 32), exact(150, 32), exact(123, 32), *pair_labels((150,), 123).values())
    whole = fused_mixup_loss(*arguments, lam, reduction="none")
    found = fused_mixup_loss(*arguments, lam, reduction="none", schedule=schedule)
    assert torch.equal(found, whole)


def test_frozen_tensors_get_no_gradient_and_no_memory() -> None:
    tensors = head_inputs((6, 8), 123, torch.float32, names=NAMES)
    labels = pair_labels((6,), 123)
    tensors["hidden_u"].requires_grad_()
    fused_mixup_loss(**tensors, **labels, lam=0.3).backward()
    assert tensors["hidden_c"].grad is None
    assert tensors["weight"].grad is None
    assert tensors["hidden_u"].grad is not None
    hidden = [tensors["hidden_c"], tensors["hidden_u"].detach()]
    targets, share = torch.stack(tuple(labels.values()), -1), torch.full((6, 2), 0.5)
    for needs in ([True, False, False], [False, True, False], [False] * 3):
        _, *gradients, _ = mixup_rows(
            *hidden, tensors["weight"], None, targets, share, torch.ones(6), 1.0, None, 4, needs
        )
        assert [g.numel() > 0 for g in gradients] == [*needs, False]


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 40)),
    rows=st.integers(2, 8),
    seed=st.integers(0, 2**16),
)
def test_random_shapes_and_ignored_positions(
    shape: tuple[int, int, int], rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    count, size, vocab_size = shape
    tensors = head_inputs((count, size), vocab_size, torch.bfloat16, names=NAMES, bias=True)
    labels = pair_labels((count,), vocab_size, ignored=0.3)
    assert_mixup_in_budget(
        tensors, labels, torch.rand(count), schedule=RowChunks(rows=rows), softcap=4.0
    )
