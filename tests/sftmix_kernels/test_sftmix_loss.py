"""`fused_sftmix_loss` against the reference, and what it promises to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sftmix_kernels import RowChunks, checks, fused_cross_entropy, fused_sftmix_loss, reference
from sftmix_kernels.sftmix_loss import sftmix_rows
from sftmix_kernels.terms import ordered_pairs
from tools.peak_memory import peak_extra_bytes

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


def random_pairs(num_rows: int, num_pairs: int) -> dict[str, Tensor]:
    """A pair plan: each row at most once, some rows left over."""
    rows = torch.randperm(num_rows)[: 2 * num_pairs]
    return {"pair_c": rows[::2].clone(), "pair_u": rows[1::2].clone()}


# Pairs of six rows: a row in two of them, on the same side or not, or paired with itself.
PAIRED_TWICE = [([0, 0], [1, 2]), ([0, 3], [1, 0]), ([4, 2], [4, 3])]


def sftmix(tensors: Tensors, upstream: float = 1.0, **options: Any) -> Result:
    return run(lambda **t: fused_sftmix_loss(**t, **options).loss, tensors, upstream)


def assert_sftmix_in_budget(
    tensors: Tensors,
    labels: Tensor,
    plan: dict[str, Any],
    *,
    schedule: str | RowChunks = "auto",
    **options: Any,
) -> None:
    """Our loss against the dense one; PyTorch's error counted per row and per pair."""
    flat, mu = labels.reshape(-1), options.get("mu", 0.2)
    mixed = (flat[plan["pair_c"]] != -100) & (flat[plan["pair_u"]] != -100)
    ntp_divisor = options.get("ntp_divisor", max(1, int((labels != -100).sum())))
    mixup_divisor = options.get("mixup_divisor", max(1, int(mixed.sum())))
    head = {k: options[k] for k in ("logit_scale", "softcap") if k in options}

    def rows(**t: Tensor) -> Tensor:
        hidden, other = t["hidden"].reshape(-1, t["hidden"].shape[-1]), {**t}
        del other["hidden"]
        ntp = reference.cross_entropy(hidden, labels=flat, reduction="none", **other, **head)
        c, u = plan["pair_c"], plan["pair_u"]
        mixup = reference.mixup_loss(
            hidden_c=hidden[c],
            hidden_u=hidden[u],
            labels_c=flat[c],
            labels_u=flat[u],
            lam=plan["lam"],
            reduction="none",
            **other,
            **head,
        )
        return torch.cat((ntp / ntp_divisor, mu * mixup / mixup_divisor))

    assert_in_budget(
        lambda **t: (
            fused_sftmix_loss(**t, labels=labels, schedule=schedule, **plan, **options).loss
        ),
        lambda **t: reference.sftmix_loss(**t, labels=labels, **plan, **options).loss,
        tensors,
        rows=rows,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_every_dtype_and_option(dtype: torch.dtype, head: dict[str, Any]) -> None:
    options = dict(head)
    tensors = head_inputs((5, 41, 64), 515, dtype, bias=options.pop("bias", False))
    plan = {**random_pairs(205, 80), "lam": torch.rand(80)}
    assert_sftmix_in_budget(tensors, some_labels((5, 41), 515, ignored=0.2), plan, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_shapes_and_large_vocabularies(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, size, vocab_size = shape
    plan = {**random_pairs(rows, rows // 2), "lam": 0.3}
    tensors = head_inputs((rows, size), vocab_size, dtype)
    assert_sftmix_in_budget(tensors, some_labels((rows,), vocab_size), plan)


@pytest.mark.parametrize("dtype", DTYPES)
def test_divisors_and_mu(dtype: torch.dtype) -> None:
    tensors, labels = head_inputs((211, 64), 515, dtype), some_labels((211,), 515, ignored=0.2)
    plan = {**random_pairs(211, 90), "lam": torch.tensor(0.7)}
    options = {"mu": 0.9, "ntp_divisor": 400.0, "mixup_divisor": 30.0}
    assert_sftmix_in_budget(tensors, labels, plan, schedule=RowChunks(rows=32), **options)
    number = sftmix(tensors, labels=labels, **plan, **options)
    options |= {"ntp_divisor": torch.tensor(400), "mixup_divisor": torch.tensor([30.0])}
    assert_same_bits(sftmix(tensors, labels=labels, **plan, **options), number)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_tokens_and_equal_labels(dtype: torch.dtype) -> None:
    eye, labels = torch.eye(20).to(dtype), torch.arange(20)
    tensors = {"hidden": eye.repeat(2, 1), "weight": 17.0 * eye}
    plan = {"pair_c": labels, "pair_u": labels + 20, "lam": torch.rand(20)}
    assert_sftmix_in_budget(tensors, labels.repeat(2), plan)


@pytest.mark.parametrize("num_pairs", [0, 15])
def test_mu_zero_is_bitwise_ntp(num_pairs: int) -> None:
    tensors = head_inputs((40, 16), 123, torch.float32, bias=True)
    labels = some_labels((40,), 123, ignored=0.2)
    plan = {**random_pairs(40, num_pairs), "lam": 0.3}
    found = sftmix(tensors, 0.7, labels=labels, mu=0.0, **plan)
    plain = run(lambda **t: fused_cross_entropy(**t, labels=labels), tensors, 0.7)
    assert_same_bits(found, plain)
    terms = fused_sftmix_loss(**tensors, labels=labels, mu=0.0, **plan)
    expected = reference.sftmix_loss(**tensors, labels=labels, mu=0.0, **plan)
    torch.testing.assert_close(terms.mixup, expected.mixup)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_lam_zero_or_one_mixes_in_one_row_alone(lam: float) -> None:
    """The Mixup term is then the plain cross-entropy of c's or of u's rows."""
    tensors, labels = {"hidden": exact(40, 32), "weight": exact(123, 32)}, some_labels((40,), 123)
    plan = random_pairs(40, 20)
    rows = plan["pair_c"] if lam else plan["pair_u"]
    found = fused_sftmix_loss(**tensors, labels=labels, lam=lam, **plan)
    plain = fused_cross_entropy(tensors["hidden"][rows], tensors["weight"], labels[rows])
    assert torch.equal(found.mixup, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapping_c_and_u_at_one_half_changes_no_bit(dtype: torch.dtype) -> None:
    tensors = head_inputs((40, 32), 123, dtype)
    labels, plan = some_labels((40,), 123, ignored=0.1), random_pairs(40, 18)
    one = sftmix(tensors, labels=labels, lam=0.5, **plan)
    swapped = {"pair_c": plan["pair_u"], "pair_u": plan["pair_c"]}
    assert_same_bits(one, sftmix(tensors, labels=labels, lam=0.5, **swapped))


def test_a_pair_with_one_ignored_token_is_not_mixed() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(123, 8)
    labels = torch.tensor([1, -100, 3, 4])
    plan = {"pair_c": torch.tensor([0, 2]), "pair_u": torch.tensor([1, 3]), "lam": 0.3}
    found = fused_sftmix_loss(hidden, weight, labels, **plan)
    expected = reference.sftmix_loss(hidden.double(), weight.double(), labels, **plan)
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mixup.double(), expected.mixup, rtol=1e-6, atol=0)


@pytest.mark.parametrize("label", [123, *FAR])
def test_label_out_of_range_makes_its_row_and_partner_nan_alone(label: int) -> None:
    hidden, weight = torch.randn(50, 8), torch.randn(123, 8)
    labels, plan = some_labels((50,), 123), {**random_pairs(50, 20), "lam": 0.3}
    bad_row, partner = int(plan["pair_c"][4]), int(plan["pair_u"][4])
    bad = labels.clone()
    bad[bad_row] = label
    rows = [torch.empty(50), torch.empty(50)]
    good, found = (
        sftmix({"hidden": hidden}, weight=weight, labels=values, row_ntp_out=out, **plan)
        for values, out in zip((labels, bad), rows, strict=True)
    )
    gradient, expected = found.gradients["hidden"], good.gradients["hidden"]
    assert gradient is not None
    assert expected is not None
    others = torch.ones(50, dtype=torch.bool)
    others[[bad_row, partner]] = False
    assert gradient[~others].isnan().all()
    assert torch.equal(gradient[others], expected[others])
    others[partner] = True
    assert rows[1][bad_row].isnan()
    assert torch.equal(rows[0][others], rows[1][others])


@pytest.mark.parametrize("shape", [(4, 3), (0,), (2, 0)])
def test_nothing_to_average_is_zero(shape: tuple[int, ...]) -> None:
    labels = torch.full(shape, -100)
    tensors = head_inputs((*shape, 8), 123, torch.float32, bias=True)
    plan = random_pairs(labels.numel(), labels.numel() // 2)
    found = sftmix(tensors, labels=labels, lam=0.3, **plan)
    assert found.loss == 0
    assert all(g is not None and not g.any() for g in found.gradients.values())


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_infinite_logits_are_of_dense_torchs_class(lam: float, value: float) -> None:
    """A masked vocabulary entry (bias -inf) leaves everything finite, with lam 0 and 1 too."""
    tensors = head_inputs((6, 8), 123, torch.float32, bias=True)
    tensors["bias"][9] = value
    options = {"labels": torch.arange(6), "pair_c": torch.arange(3), "lam": lam}
    options["pair_u"] = torch.arange(3, 6)
    found = sftmix(tensors, **options)
    dense = run(lambda **t: reference.sftmix_loss(**t, **options).loss, tensors)
    assert same_class(found.loss, dense.loss)
    for name, gradient in dense.gradients.items():
        other = found.gradients[name]
        assert gradient is not None
        assert other is not None
        assert same_class(other, gradient), name


@pytest.mark.parametrize("schedule", [RowChunks(rows=n) for n in (2, 4, 6, 128)])
def test_any_chunk_size_gives_the_same_row_losses(schedule: RowChunks) -> None:
    hidden, weight, labels = exact(150, 32), exact(123, 32), some_labels((150,), 123, ignored=0.2)
    plan = {**random_pairs(150, 60), "lam": torch.randint(0, 5, (60,)) / 4}
    whole, found = torch.empty(150), torch.empty(150)
    one = fused_sftmix_loss(hidden, weight, labels, row_ntp_out=whole, **plan)
    other = fused_sftmix_loss(hidden, weight, labels, row_ntp_out=found, schedule=schedule, **plan)
    assert torch.equal(found, whole)
    assert one == other


def test_second_backward_and_double_backward() -> None:
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels, plan = some_labels((8,), 9), random_pairs(8, 3)
    loss = fused_sftmix_loss(hidden, weight, labels, lam=0.3, **plan).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight))


def test_repeats_are_bitwise_equal() -> None:
    tensors, labels = head_inputs((60, 16), 515, torch.bfloat16), some_labels((60,), 515)
    plan = {**random_pairs(60, 25), "lam": 0.3, "schedule": RowChunks(rows=16)}
    first = sftmix(tensors, labels=labels, **plan)
    for _ in range(100):
        assert_same_bits(sftmix(tensors, labels=labels, **plan), first)


def test_frozen_tensors_get_no_gradient_and_no_memory() -> None:
    hidden, weight, labels = torch.randn(6, 8), torch.randn(123, 8), some_labels((6,), 123)
    plan = random_pairs(6, 2)
    leaf = hidden.clone().requires_grad_()
    fused_sftmix_loss(leaf, weight, labels, lam=0.3, **plan).loss.backward()
    assert weight.grad is None
    assert leaf.grad is not None
    for needs in ([True, False, False], [False, True, False], [False] * 3):
        _, _, *gradients, _ = sftmix_rows(
            hidden, weight, None, labels, torch.ones(6), plan["pair_c"], plan["pair_u"],
            torch.ones(2), torch.rand(2, 2), None, torch.tensor(0.2), 1.0, None, 4, needs,
        )  # fmt: skip
        assert [g.numel() > 0 for g in gradients] == [*needs, False]


def test_divisors_of_zero_count_as_one() -> None:
    """A rank may find that no pair is mixed anywhere: 0, not NaN."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(123, 8)
    nothing, zero = torch.full((4,), -100), torch.tensor(0.0)
    plan = {"pair_c": torch.tensor([0]), "pair_u": torch.tensor([1]), "lam": 0.3}
    found = fused_sftmix_loss(hidden, weight, nothing, ntp_divisor=zero, mixup_divisor=zero, **plan)
    found.loss.backward()
    assert [value.item() for value in found] == [0.0, 0.0, 0.0]
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_divisor_that_is_infinite_makes_all_nan() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(123, 8)
    plan = {"pair_c": torch.tensor([0]), "pair_u": torch.tensor([1]), "lam": 0.3}
    labels, infinite = torch.arange(4), torch.tensor(torch.inf)
    loss = fused_sftmix_loss(hidden, weight, labels, ntp_divisor=infinite, **plan).loss
    loss.backward()
    assert loss.isnan()
    assert hidden.grad is not None
    assert hidden.grad[2:].isnan().all()


def test_a_row_that_does_not_exist_poisons_its_pair_where_values_are_not_read() -> None:
    lam, ones = torch.tensor([0.25, 0.75]), torch.ones(4)
    plan = ordered_pairs(torch.arange(4), ones, torch.tensor([2, 0]), torch.tensor([1, 7]), lam)
    assert (plan.pair_c.tolist(), plan.pair_u.tolist()) == ([1, 0], [2, 3])
    assert plan.share.tolist() == [[0.75, 0.25], [0.75, 0.25]]
    assert plan.pair_weight[0] == 1
    assert plan.pair_weight[1].isnan()


@pytest.mark.parametrize("mu", [0.0, 0.2])
@pytest.mark.parametrize(("pair_c", "pair_u"), PAIRED_TWICE)
def test_rows_paired_twice_make_all_nan_where_values_are_not_read(
    pair_c: list[int], pair_u: list[int], mu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be read here, and refused with their number; in a compiled graph they are not."""
    monkeypatch.setattr(checks, "values_are_free", lambda tensor: False)
    tensors = head_inputs((6, 8), 123, torch.float32, bias=True)
    pairs = {"pair_c": torch.tensor(pair_c), "pair_u": torch.tensor(pair_u), "mu": mu}
    rows = torch.empty(6)
    labels = torch.tensor([3, 5, 7, -100, 0, 122])
    found = sftmix(tensors, labels=labels, lam=0.3, row_ntp_out=rows, **pairs)
    assert found.loss.isnan()
    assert rows.isnan().all()
    assert all(g is not None and g.isnan().all() for g in found.gradients.values())
    with pytest.raises(ValueError, match="pair_c, pair_u: expected each row at most once, got row"):
        sftmix(tensors, labels=labels, lam=0.3, validate=True, **pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_peak_memory_is_the_stated_formula(dtype: torch.dtype, frozen_head: bool) -> None:
    """Kept: float32 dW and dH; beside them one chunk, and in backward what is handed out."""
    rows, size, vocab_size, chunk, mib = 1024, 64, 8000, 256, 2**20
    tensors = head_inputs((rows, size), vocab_size, dtype)
    hidden = tensors["hidden"].requires_grad_()
    weight = tensors["weight"].requires_grad_(not frozen_head)
    labels, plan = some_labels((rows,), vocab_size), random_pairs(rows, 400)
    width, full = dtype.itemsize, dtype == torch.float32
    head = 0 if frozen_head else vocab_size * size
    kept = 4 * head + width * rows * size
    # A chunk of logits and its hidden rows (twice: hidden and dH); cached blocks of 2 MiB: the
    # mixed rows and, where logits are not float32, c and u of this block and of the one before it.
    # A half-precision dW reads float32 copies.
    block = (1 if full else 5) * 2 * mib
    copies = 0 if full or frozen_head else 4 * chunk * (vocab_size + size)
    forward = width * chunk * (vocab_size + 2 * size) + max(block, copies)
    handed_out = width * (head + rows * size)

    def step() -> Tensor:
        loss = fused_sftmix_loss(
            hidden, weight, labels, lam=0.3, schedule=RowChunks(rows=chunk), **plan
        ).loss
        loss.backward()
        return loss

    assert peak_extra_bytes(step) <= 1.05 * (kept + max(forward, handed_out))


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40)),
    rows=st.integers(2, 8),
    seed=st.integers(0, 2**16),
    mu=st.sampled_from([0.0, 0.2, 3.0]),
)
def test_random_pair_plans(shape: tuple[int, int, int], rows: int, seed: int, mu: float) -> None:
    torch.manual_seed(seed)
    count, size, vocab_size = shape
    num_pairs = int(torch.randint(0, count // 2 + 1, ()))
    plan = {**random_pairs(count, num_pairs), "lam": torch.rand(num_pairs)}
    tensors = head_inputs((count, size), vocab_size, torch.bfloat16, bias=True)
    labels = some_labels((count,), vocab_size, ignored=0.3)
    assert_sftmix_in_budget(tensors, labels, plan, schedule=RowChunks(rows=rows), mu=mu)
