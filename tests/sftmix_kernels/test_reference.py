"""The reference: against autograd's finite differences and formulas written another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import reference

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
