"""What the Triton kernels of both schedules promise alike: bits, NaN, layouts, autograd, compile.

That they are right is proven in `row_chunks/test_row_chunks.py` and
`vocab_tiles/test_vocab_tiles.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import (
    RowChunks,
    VocabTiles,
    checks,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
)
from sftmix_kernels import reference as dense_torch

from .budget import FAR, Loss, assert_same_bits, exact, head_inputs, run, same_class, some_labels
from .kernel_cases import LAST_HEAD, bits, moved
from .test_mixup_loss import NAMES, pair_labels
from .test_sftmix_loss import PAIRED_TWICE, random_pairs


@pytest.mark.parametrize("head", [{}, LAST_HEAD])
def test_mu_zero_is_bitwise_ntp(device: str, head: dict[str, Any], schedule: Any) -> None:
    options = {**head, "schedule": schedule}
    tensors = head_inputs((24, 16), 123, torch.float32, bias=options.pop("bias", False))
    tensors, labels = moved(tensors, device), some_labels((24,), 123, ignored=0.2).to(device)
    plan = moved(random_pairs(24, 9), device)

    def without_mixup(**t: Tensor) -> Tensor:
        return fused_sftmix_loss(**t, labels=labels, lam=0.3, mu=0.0, **plan, **options).loss

    plain = bits(lambda **t: fused_cross_entropy(**t, labels=labels, **options), tensors, 0.7)
    assert_same_bits(bits(without_mixup, tensors, 0.7), plain)


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("head", [{}, LAST_HEAD])
def test_lam_zero_or_one_is_bitwise_the_plain_cross_entropy(
    device: str, head: dict[str, Any], lam: float, schedule: Any
) -> None:
    options = {**head, "schedule": schedule}
    bias = options.pop("bias", False)
    tensors = moved(head_inputs((12, 16), 123, torch.float32, names=NAMES, bias=bias), device)
    labels = moved(pair_labels((12,), 123), device)
    own, other = ("c", "u") if lam else ("u", "c")
    mixed = bits(
        lambda **t: fused_mixup_loss(**t, **labels, lam=lam, **options), tensors, 0.7
    ).gradients
    alone = {k: v for k, v in tensors.items() if not k.startswith("hidden")}
    alone["hidden"] = tensors[f"hidden_{own}"]
    label = labels[f"labels_{own}"]
    plain = bits(lambda **t: fused_cross_entropy(**t, labels=label, **options), alone, 0.7)
    mixed["hidden"], unused = mixed.pop(f"hidden_{own}"), mixed.pop(f"hidden_{other}")
    assert unused is not None
    assert not unused.any()
    assert_same_bits(plain._replace(gradients=mixed), plain)


def test_swapping_c_and_u_at_one_half_changes_no_bit(device: str, schedule: Any) -> None:
    tensors = moved(head_inputs((24, 32), 123, torch.float16), device)
    labels, plan = some_labels((24,), 123, ignored=0.1).to(device), random_pairs(24, 10)
    swapped = {"pair_c": plan["pair_u"], "pair_u": plan["pair_c"]}
    options = {"labels": labels, "lam": 0.5, "schedule": schedule}
    one, other = (
        bits(lambda p=p, **t: fused_sftmix_loss(**t, **p, **options).loss, tensors)
        for p in (moved(plan, device), moved(swapped, device))
    )
    assert_same_bits(one, other)


def test_bad_labels_make_their_rows_nan_alone(device: str, schedule: Any) -> None:
    """What each is paired with has a NaN gradient too."""
    tensors = moved(head_inputs((30, 8), 123, torch.float32), device)
    labels, plan, far = some_labels((30,), 123), random_pairs(30, 10), torch.tensor([123, *FAR])
    bad, partners = (plan[pair][: len(far)] for pair in ("pair_c", "pair_u"))
    bad_labels = labels.clone()
    bad_labels[bad] = far
    plan, rows = moved(plan, device), torch.empty(2, 30, device=device)

    def gradient(labels: Tensor, row_ntp_out: Tensor) -> Tensor | None:
        options = {"labels": labels, "lam": 0.3, "schedule": schedule, "row_ntp_out": row_ntp_out}
        found = bits(lambda **t: fused_sftmix_loss(**t, **plan, **options).loss, tensors)
        return found.gradients["hidden"]

    good, found = gradient(labels.to(device), rows[0]), gradient(bad_labels.to(device), rows[1])
    assert found is not None
    assert good is not None
    others = torch.ones(30, dtype=torch.bool)
    others[bad] = False
    assert rows[1][~others].isnan().all()
    assert torch.equal(rows[0][others], rows[1][others])
    others[partners] = False
    assert found[~others].isnan().all()
    assert torch.equal(found[others], good[others])


@pytest.mark.parametrize("other_rows", [0, 60])
@pytest.mark.parametrize(("pair_c", "pair_u"), PAIRED_TWICE)
def test_rows_paired_twice_make_all_nan(
    device: str,
    pair_c: list[int],
    pair_u: list[int],
    other_rows: int,
    schedule: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each other's place no row is lost in silence; in one chunk and in several."""
    monkeypatch.setattr(checks, "values_are_free", lambda tensor: False)
    count = 6 + other_rows
    tensors = moved(head_inputs((count, 8), 123, torch.float32, bias=True), device)
    labels, rows = some_labels((count,), 123, ignored=0.2), torch.empty(count, device=device)
    options = moved({"labels": labels, "pair_c": torch.tensor(pair_c)}, device)
    options |= {"pair_u": torch.tensor(pair_u, device=device), "row_ntp_out": rows, "lam": 0.3}
    found = bits(lambda **t: fused_sftmix_loss(**t, **options, schedule=schedule).loss, tensors)
    assert found.loss.isnan()
    assert rows.isnan().all()
    assert all(g is not None and g.isnan().all() for g in found.gradients.values())


@pytest.mark.parametrize("shape", [(4, 3), (0,), (2, 0)])
def test_nothing_to_average_is_zero(device: str, shape: tuple[int, ...], schedule: Any) -> None:
    tensors = moved(head_inputs((*shape, 8), 123, torch.float32, bias=True), device)
    labels = torch.full(shape, -100, device=device)
    plan = moved(random_pairs(labels.numel(), labels.numel() // 2), device)
    losses: tuple[Callable[..., Tensor], ...] = (
        lambda **t: fused_sftmix_loss(**t, labels=labels, lam=0.3, schedule=schedule, **plan).loss,
        lambda **t: fused_cross_entropy(**t, labels=labels, schedule=schedule),
        lambda **t: fused_cross_entropy(**t, labels=labels, schedule=schedule, reduction="none"),
        lambda hidden, **t: fused_mixup_loss(
            hidden, hidden, labels_c=labels, labels_u=labels, lam=0.3, schedule=schedule, **t
        ),
    )
    for loss in losses:
        found = bits(loss, tensors)
        assert not found.loss.any()
        assert all(g is not None and not g.any() for g in found.gradients.values())


def test_one_valid_token_of_many_is_the_one_token_result(device: str, schedule: Any) -> None:
    hidden, weight = exact(300, 8).to(device), exact(123, 8).to(device)
    labels = torch.full((300,), -100, device=device)
    labels[90] = 5
    many, one = (
        bits(
            lambda y=labels[rows], **t: fused_cross_entropy(**t, labels=y, schedule=schedule),
            {"hidden": hidden[rows], "weight": weight},
        )
        for rows in (slice(None), slice(90, 91))
    )
    assert torch.equal(many.loss, one.loss)
    assert torch.equal(many.gradients["weight"], one.gradients["weight"])
    assert many.gradients["hidden"] is not None
    assert many.gradients["hidden"].any(-1).nonzero().tolist() == [[90]]


def test_a_nan_hidden_row_leaves_other_rows_alone(device: str, schedule: Any) -> None:
    """And one that is ignored reaches nothing, the weight's gradient included."""
    tensors = moved(head_inputs((24, 8), 123, torch.float32), device)
    labels = some_labels((24,), 123)
    labels[3] = -100
    options = {"labels": labels.to(device), "schedule": schedule}

    def mean(**t: Tensor) -> Tensor:
        return fused_cross_entropy(**t, **options)

    clean, good = bits(mean, tensors), fused_cross_entropy(**tensors, **options, reduction="none")
    tensors["hidden"][3] = torch.nan
    assert_same_bits(bits(mean, tensors), clean)
    tensors["hidden"][7] = torch.nan
    found = fused_cross_entropy(**tensors, **options, reduction="none")
    assert found[7].isnan()
    found[7] = good[7]
    assert torch.equal(found, good)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_infinite_logits_are_of_dense_torchs_class(
    device: str, value: float, lam: float, schedule: Any
) -> None:
    tensors = head_inputs((6, 8), 123, torch.float32, bias=True)
    tensors["bias"][9] = value
    labels = torch.arange(6, device=device)
    options = {"labels": labels, "pair_c": labels[:3], "pair_u": labels[3:], "lam": lam}
    tensors = moved(tensors, device)
    found = bits(lambda **t: fused_sftmix_loss(**t, **options, schedule=schedule).loss, tensors)
    dense = bits(lambda **t: dense_torch.sftmix_loss(**t, **options).loss, tensors)
    assert same_class(found.loss, dense.loss)
    for name, gradient in dense.gradients.items():
        other = found.gradients[name]
        assert gradient is not None
        assert other is not None
        assert same_class(other, gradient), name


def test_a_common_logit_offset_changes_no_bit(device: str, schedule: Any) -> None:
    tensors = moved({"hidden": exact(24, 32), "weight": exact(123, 32)}, device)
    options = moved({"labels": some_labels((24,), 123), **random_pairs(24, 9)}, device)
    plain, shifted = (
        bits(
            lambda **t: fused_sftmix_loss(**t, **options, lam=0.25, schedule=schedule).loss,
            {**tensors, "bias": torch.full((123,), offset, device=device)},
        )
        for offset in (0.0, 1e4)
    )
    assert_same_bits(shifted, plain)


@pytest.mark.parametrize(
    ("schedule", "other", "count"),
    [(RowChunks(rows=16), RowChunks(rows=128), 60), (VocabTiles(max_bytes=1), VocabTiles(), 300)],
)
def test_any_chunk_size_gives_the_same_row_losses(
    device: str, schedule: Any, other: Any, count: int
) -> None:
    """Of 300 rows, 100 pairs: three groups of 64 pairs of rows, or one."""
    hidden, weight = exact(count, 32).to(device), exact(123, 32).to(device)
    labels = some_labels((count,), 123, ignored=0.2).to(device)
    plan = {**random_pairs(count, count // 3), "lam": torch.randint(0, 5, (count // 3,)) / 4}
    rows = torch.empty(2, count, device=device)
    options = {"labels": labels, **moved(plan, device)}
    one, two = (
        fused_sftmix_loss(hidden, weight, **options, schedule=chosen, row_ntp_out=out)
        for chosen, out in zip((schedule, other), rows, strict=True)
    )
    assert torch.equal(rows[0], rows[1])
    assert one == two


R, D, V = 7, 24, 123
LABELS = torch.tensor([3, 5, -100, 7, 0, 122, 7])
PAIRS = {"pair_c": torch.tensor([0, 2, 6]), "pair_u": torch.tensor([5, 1, 3])}


def cross_entropy(schedule: Any, hidden: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    labels = LABELS.to(hidden.device)
    return fused_cross_entropy(hidden, weight, labels, bias=bias, schedule=schedule)


def row_losses(schedule: Any, hidden: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """With labels that are not contiguous."""
    labels = torch.stack((LABELS, LABELS), -1).to(hidden.device)[:, 0]
    options = {"reduction": "none", "softcap": 4.0, "bias": bias}
    return fused_cross_entropy(hidden, weight, labels, schedule=schedule, **options)


def mixup(schedule: Any, hidden: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """With a partner of the same layout."""
    labels, options = LABELS.to(hidden.device), {"bias": bias, "schedule": schedule}
    return fused_mixup_loss(hidden, hidden, weight, labels, labels.flip(0), 0.3, **options)


def sftmix(schedule: Any, hidden: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    labels, pairs = LABELS.to(hidden.device), moved(PAIRS, hidden.device)
    options = {"bias": bias, "schedule": schedule, **pairs}
    return fused_sftmix_loss(hidden, weight, labels, lam=0.3, **options).loss


@pytest.fixture(params=[cross_entropy, row_losses, mixup, sftmix])
def loss(request: pytest.FixtureRequest, schedule: Any) -> Loss:
    return functools.partial(request.param, schedule)


@pytest.mark.parametrize("layout", ["strided", "offset", "expanded"])
def test_other_layouts_give_the_bits_of_contiguous_inputs(
    device: str, loss: Loss, layout: str
) -> None:
    """A GEMM may add up a gradient's V products, whose absolute values sum to at most 2, in another
    order for another layout; logits are exact in any."""
    if layout == "strided":
        hidden, weight = exact(R, 2 * D).to(device)[:, ::2], exact(2 * V, D).to(device)[::2]
        bias = exact(V, 2).to(device)[:, 0]
    elif layout == "offset":
        hidden, weight = exact(R + 3, D).to(device)[3:], exact(V, D + 5).to(device)[:, 5:]
        bias = exact(V + 1).to(device)[1:]
    else:
        hidden, weight = exact(R, 1).to(device), exact(V, 1).to(device)
        hidden, weight = hidden.expand(R, D), weight.expand(V, D)
        bias = exact(1).to(device).expand(V)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    found = bits(loss, tensors)
    plain = bits(loss, {name: tensor.contiguous() for name, tensor in tensors.items()})
    assert torch.equal(found.loss, plain.loss)
    for name, gradient in plain.gradients.items():
        other = found.gradients[name]
        assert gradient is not None
        assert other is not None
        assert (other - gradient).abs().max() <= 2 * V * torch.finfo(torch.float32).eps, name


def test_second_backward_and_repeats_give_equal_bits(device: str, loss: Loss) -> None:
    tensors = moved(head_inputs((R, D), V, torch.float32), device)
    first = bits(loss, tensors)
    assert_same_bits(bits(loss, tensors), first)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    value = loss(**tensors).sum()
    for keep in (True, False):
        gradients = torch.autograd.grad(value, leaves, retain_graph=keep)
        found = dict(zip(tensors, gradients, strict=True))
        assert_same_bits(first._replace(gradients=found), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_has_no_gradient_and_changes_no_other(
    device: str, loss: Loss, frozen: str
) -> None:
    tensors = moved(head_inputs((R, D), V, torch.float32), device)
    both = bits(loss, tensors)
    constant = tensors.pop(frozen)
    upstream = torch.ones((), device=device)
    one = run(lambda **t: loss(**t, **{frozen: constant}), tensors, upstream)
    gradients = {k: v for k, v in both.gradients.items() if k != frozen}
    assert_same_bits(one, both._replace(gradients=gradients))
    assert constant.grad is None


# PyTorch's own tracing of an autograd.Function uses what PyTorch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_equals_eager_with_ignored_rows(device: str, loss: Loss) -> None:
    tensors = moved(head_inputs((R, D), V, torch.float16), device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(bits(compiled, tensors), bits(loss, tensors))
