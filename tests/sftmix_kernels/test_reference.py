"""The reference: against autograd's finite differences and formulas written another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import Clipped, Entropy, Power, Threshold, reference
from sftmix_kernels.gates import Gate

from .budget import some_labels

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"logit_scale": 0.7},
    {"softcap": 2.0},
    {"logit_scale": 1.3, "softcap": 3.0},
)
V, D = 7, 5


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_gradcheck(options: dict[str, Any], reduction: str) -> None:
    labels = torch.tensor([0, 3, -100, 6])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.cross_entropy(
            hidden, weight, labels, bias=bias, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(loss, (doubles(4, D), doubles(V, D), doubles(V)))


@pytest.mark.parametrize("options", OPTIONS)
def test_mixup_loss_gradcheck(options: dict[str, Any]) -> None:
    labels_c, labels_u = torch.tensor([0, 3, -100, 6]), torch.tensor([0, 1, 2, -100])
    lam = torch.tensor([0.3, 0.9, 0.5, 0.1])

    def loss(hidden_c: Tensor, hidden_u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.mixup_loss(
            hidden_c, hidden_u, weight, labels_c, labels_u, lam, bias=bias, **options
        )

    tensors = (doubles(4, D), doubles(4, D), doubles(V, D), doubles(V))
    assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize("options", OPTIONS)
def test_sftmix_loss_gradcheck(options: dict[str, Any]) -> None:
    labels = torch.tensor([0, 3, -100, 6, 2, 2])
    pair_c, pair_u = torch.tensor([0, 4]), torch.tensor([3, 5])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found = reference.sftmix_loss(
            hidden, weight, labels, pair_c, pair_u, 0.3, mu=0.4, bias=bias, **options
        )
        return found.loss

    assert torch.autograd.gradcheck(loss, (doubles(6, D), doubles(V, D), doubles(V)))


@pytest.mark.parametrize("options", OPTIONS)
def test_mixup_is_cross_entropy_with_dense_soft_labels(options: dict[str, Any]) -> None:
    hidden_c, hidden_u, weight, bias = doubles(9, D), doubles(9, D), doubles(V, D), doubles(V)
    labels_c, labels_u = some_labels((9,), V), some_labels((9,), V)
    labels_u[0] = labels_c[0]
    lam = torch.rand(9)
    share = lam.double().unsqueeze(-1)
    logits = (share * hidden_c + (1 - share) * hidden_u) @ weight.T + bias
    logits = logits * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    soft = share * F.one_hot(labels_c, V) + (1 - share) * F.one_hot(labels_u, V)
    found = reference.mixup_loss(
        hidden_c, hidden_u, weight, labels_c, labels_u, lam, bias=bias, **options
    )
    torch.testing.assert_close(found, F.cross_entropy(logits, soft), rtol=1e-14, atol=0)


def test_cross_entropy_is_pytorchs() -> None:
    hidden, weight, labels = doubles(9, D), doubles(V, D), some_labels((9,), V, ignored=0.3)
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100)
    found = reference.cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_mixing_logits_equals_mixing_hidden_states() -> None:
    """The identity the joint op lives on, for losses and gradients."""
    hidden_c, hidden_u, weight, bias = doubles(6, D), doubles(6, D), doubles(V, D), doubles(V)
    share = torch.rand(6, 1, dtype=torch.float64)
    mixed_first = (share * hidden_c + (1 - share) * hidden_u) @ weight.T + bias
    mixed_last = share * (hidden_c @ weight.T + bias) + (1 - share) * (hidden_u @ weight.T + bias)
    tensors = (hidden_c, hidden_u, weight, bias)
    for first, last in zip(
        (mixed_first, *torch.autograd.grad(mixed_first.logsumexp(-1).sum(), tensors)),
        (mixed_last, *torch.autograd.grad(mixed_last.logsumexp(-1).sum(), tensors)),
        strict=True,
    ):
        torch.testing.assert_close(first, last, rtol=1e-13, atol=1e-14)


def test_gradient_is_the_one_derived() -> None:
    """G_c and G_u of the docstring against autograd."""
    logits_c, logits_u = doubles(4, V), doubles(4, V)
    labels_c, labels_u = some_labels((4,), V), some_labels((4,), V)
    lam, mu = torch.rand(4, 1, dtype=torch.float64), 0.2
    soft = lam * F.one_hot(labels_c, V) + (1 - lam) * F.one_hot(labels_u, V)
    mixed = lam * logits_c + (1 - lam) * logits_u
    loss = F.cross_entropy(logits_c, labels_c, reduction="sum")
    loss = loss + F.cross_entropy(logits_u, labels_u, reduction="sum")
    loss = loss + mu * F.cross_entropy(mixed, soft, reduction="sum")
    gradient_c, gradient_u = torch.autograd.grad(loss, (logits_c, logits_u))
    g_m = mu * (mixed.softmax(-1) - soft)
    expected_c = logits_c.softmax(-1) - F.one_hot(labels_c, V) + lam * g_m
    expected_u = logits_u.softmax(-1) - F.one_hot(labels_u, V) + (1 - lam) * g_m
    torch.testing.assert_close(gradient_c, expected_c, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient_u, expected_u, rtol=1e-13, atol=1e-15)


def test_sftmix_loss_is_its_two_terms() -> None:
    hidden, weight, labels = doubles(2, 3, D), doubles(V, D), some_labels((2, 3), V)
    pair_c, pair_u = torch.tensor([0, 1]), torch.tensor([5, 3])
    found = reference.sftmix_loss(hidden, weight, labels, pair_c, pair_u, 0.25, mu=0.5)
    rows, targets = hidden.reshape(-1, D), labels.reshape(-1)
    ntp = reference.cross_entropy(hidden, weight, labels)
    mixup = reference.mixup_loss(
        rows[pair_c], rows[pair_u], weight, targets[pair_c], targets[pair_u], 0.25
    )
    torch.testing.assert_close(found.loss, ntp + 0.5 * mixup, rtol=1e-14, atol=0)
    assert not found.ntp.requires_grad
    assert not found.mixup.requires_grad


def test_perplexity_is_exp_of_the_mean_loss() -> None:
    hidden, weight, labels = doubles(6, D), doubles(V, D), some_labels((6,), V)
    ids = torch.tensor([0, 0, 2, 2, 2, 0])
    found = reference.perplexity(hidden, weight, labels, ids, 3)
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(found[0], losses[ids == 0].mean().exp())
    torch.testing.assert_close(found[2], losses[ids == 2].mean().exp())
    assert found[1].isnan()


def test_lam_is_not_rounded_in_float64() -> None:
    hidden, weight = torch.randn(2, 5, 8).double(), torch.randn(11, 8).double()
    labels = torch.randint(0, 11, (2, 5))
    logits = (0.3 * hidden[0] + 0.7 * hidden[1]) @ weight.t()
    log_p = logits.log_softmax(-1)
    rows = torch.arange(5)
    expected = -(0.3 * log_p[rows, labels[0]] + 0.7 * log_p[rows, labels[1]]).mean()
    found = reference.mixup_loss(hidden[0], hidden[1], weight, labels[0], labels[1], 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


E2 = math.exp(2.0)
# A gate, and what it is of the softmax and of the label's probability.
GATES: tuple[tuple[Gate, Callable[[Tensor, Tensor], Tensor]], ...] = (
    (Power(1.0), lambda p, q: q),
    (Power(2.5), lambda p, q: q**2.5),
    (Power(0.0), lambda p, q: torch.ones_like(q)),
    (Threshold(0.1), lambda p, q: (q >= 0.1).double()),
    (Threshold(0.1, keep="below"), lambda p, q: (q < 0.1).double()),
    (Entropy(0.5), lambda p, q: (-(p * p.log()).sum(-1) / math.log(V)).sqrt()),
    (Clipped(torch.full((9,), -2.0), 0.3), lambda p, q: q * E2 * (q * E2 < 1.3)),
)


@pytest.mark.parametrize(("gate", "expected"), GATES)
def test_a_gated_gradient_is_the_gate_times_softmax_less_onehot(
    gate: Gate, expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """By autograd, to 1e-15; in which a gate that were differentiated too would be found."""
    logits, labels, head = doubles(9, V), some_labels((9,), V), torch.eye(V).double()
    found = reference.cross_entropy(logits, head, labels, reduction="sum", gate=gate)
    p = logits.detach().softmax(-1)
    onehot = F.one_hot(labels, V)
    factor = expected(p, (p * onehot).sum(-1))
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(
        gradient, factor.unsqueeze(-1) * (p - onehot), rtol=1e-12, atol=1e-15
    )
    value = (factor * F.cross_entropy(logits, labels, reduction="none")).sum()
    torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=0, check_stride=False)


def test_a_gate_that_is_differentiated_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "detach", lambda self: self)
    with pytest.raises(AssertionError):
        test_a_gated_gradient_is_the_gate_times_softmax_less_onehot(*GATES[0])


def test_label_smoothing_is_pytorchs() -> None:
    logits, labels, head = doubles(9, V), some_labels((9,), V, ignored=0.3), torch.eye(V).double()
    found = reference.cross_entropy(logits, head, labels, label_smoothing=0.2)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_gem_has_the_papers_value_and_gradient() -> None:
    """As its authors write it, with h linear: ``-sum_j q_j (log p_t - log p_j)``."""
    logits, labels, head = doubles(9, V), some_labels((9,), V), torch.eye(V).double()
    found = reference.cross_entropy(logits, head, labels, gem_beta=0.7, reduction="sum")
    log_p, q = logits.log_softmax(-1), (logits / 0.7).softmax(-1).detach()
    value = -(q * (log_p.gather(-1, labels[:, None]) - log_p)).sum()
    torch.testing.assert_close(found, value, rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, q - F.one_hot(labels, V), rtol=1e-12, atol=1e-14)


def test_row_weights_do_not_change_the_divisor() -> None:
    logits, labels, head = doubles(4, V), torch.tensor([1, -100, 2, 3]), torch.eye(V).double()
    weight = torch.tensor([2.0, 5.0, 0.0, 0.5])
    found = reference.cross_entropy(logits, head, labels, row_weight=weight)
    rows = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    expected = (2.0 * rows[0] + 0.5 * rows[3]) / 3
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_stats_are_those_of_the_plain_softmax() -> None:
    logits, head = doubles(5, V), torch.eye(V).double()
    labels = logits.argmax(-1)
    labels[1], labels[2] = -100, logits[2].argmin()
    _, stats = reference.cross_entropy(logits, head, labels, gem_beta=0.5, stats=True)
    p, counts = logits.detach().softmax(-1), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(-1) * counts, check_dtype=False)
    nll = F.cross_entropy(logits.detach(), labels, reduction="none")
    torch.testing.assert_close(stats.nll, nll, rtol=1e-14, atol=0)
    assert stats.is_top.tolist() == [True, False, False, True, True]
    assert not any(number.requires_grad for number in stats)
