r"""The specification of every op, in dense PyTorch: oracle, baseline and fallback.

Legend: N tokens, D hidden size, V vocabulary, P pairs, S examples.

**Logits.** ``a = f(h W^T + b)`` with ``f(x) = cap * tanh(s x / cap)`` (softcap) or ``f(x) = s x``.

**Next-token prediction (NTP).** ``ntp = mean over valid tokens of LSE(a) - a[y]``.

**Mixup of a confident token c and an unconfident token u** (SFTMix, arXiv 2410.05248): the hidden
states are interpolated and so are the one-hot labels,

    z~ = lam z_c + (1 - lam) z_u,      y~ = lam onehot(y_c) + (1 - lam) onehot(y_u)
    mixup = CE(softmax(f(W z~ + b)), y~) = LSE(m) - lam m[y_c] - (1 - lam) m[y_u]

so no dense (N, V) target is ever needed.

**The head is linear, so Mixup is free.** Before ``f``, ``W z~ + b = lam a_c + (1 - lam) a_u``: the
mixed logits are the interpolation of the logits that NTP needs anyway. With
``g_m = mix_weight * (softmax(m) - y~)`` the gradients with respect to the raw logits are

    G_c = ntp_weight * (softmax(a_c) - onehot(y_c)) + lam       * g_m
    G_u = ntp_weight * (softmax(a_u) - onehot(y_u)) + (1 - lam) * g_m
    dH_c = G_c W,   dH_u = G_u W,   dW = G_c^T H_c + G_u^T H_u

each term times ``f'`` of its own raw logit. NTP + Mixup costs the matrix products of NTP.

**Labels.** ``ignore_index`` leaves a token out of loss, gradient and count. A label outside
``[0, V)`` makes its row NaN, and the pair it is mixed in; nothing is read out of bounds. A pair of
which one token is ignored is not mixed. Where there is nothing to average, loss and gradients are
0; a divisor of 0 counts as 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SFTMixLoss(NamedTuple):
    """The three scalars of a loss: ``loss = ntp + mu * mixup``; ``ntp`` and ``mixup`` detached."""

    loss: Tensor
    ntp: Tensor
    mixup: Tensor


def log_probabilities(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (..., V)
    """Return the log-softmax of the scaled, softcapped logits, in float32 or better."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)


def label_weight(labels: Tensor, vocab_size: int, ignore_index: int = -100) -> Tensor:
    """Return 1 where a label counts, 0 where it is ignored, NaN where it is out of range."""
    weight = (labels != ignore_index).float()
    out_of_range = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    return weight.masked_fill(out_of_range, float("nan"))


def both(first: Tensor, second: Tensor) -> Tensor:
    """Return the weight of a pair: 0 where either is 0, else NaN where either is NaN, else 1."""
    return (first * second).masked_fill((first == 0) | (second == 0), 0.0)


def weighted_loss(weight: Tensor, loss: Tensor) -> Tensor:
    """Return ``weight * loss``, exactly 0 where the weight is 0 whatever the loss."""
    return (weight * loss.masked_fill(weight == 0, 0.0)).masked_fill(weight == 0, 0.0)


def nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return ``-log p(label)`` of each row; a label out of range reads its nearest neighbour."""
    safe = labels.clamp(0, log_probs.shape[-1] - 1)
    return -log_probs.gather(-1, safe.unsqueeze(-1)).squeeze(-1)


def reduce(
    losses: Tensor, weight: Tensor, reduction: str, divisor: float | Tensor | None
) -> Tensor:
    """Return ``sum`` or ``mean`` over the rows whose weight is not 0, or the rows as they are."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    divisor = torch.as_tensor((weight != 0).sum() if divisor is None else divisor)
    return losses.sum() / divisor.masked_fill(divisor == 0, 1)


def expand_lam(lam: float | Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Spread ``lam``, whose shape is a prefix of labels' shape, over all positions."""
    lam = torch.as_tensor(lam, device=labels.device, dtype=dtype)
    return lam.reshape(lam.shape + (1,) * (labels.dim() - lam.dim())).expand(labels.shape)


def cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
) -> Tensor:
    """Return NTP: ``LSE(a) - a[y]``, reduced over the tokens that count."""
    log_probs = log_probabilities(
        hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap
    )
    counts = label_weight(labels, weight.shape[0], ignore_index)
    return reduce(weighted_loss(counts, nll(log_probs, labels)), counts, reduction, divisor)


def mixup_loss(
    hidden_c: Tensor,  # (..., D)
    hidden_u: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels_c: Tensor,  # (...) int64
    labels_u: Tensor,  # (...) int64
    lam: float | Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
) -> Tensor:
    """Return Mixup: ``LSE(m) - lam m[y_c] - (1 - lam) m[y_u]`` where both labels count."""
    lam = expand_lam(lam, labels_c, torch.promote_types(hidden_c.dtype, torch.float32))
    share = lam.unsqueeze(-1)
    mixed = (share * hidden_c + (1 - share) * hidden_u).to(hidden_c.dtype)
    log_probs = log_probabilities(
        mixed, weight, bias=bias, logit_scale=logit_scale, softcap=softcap
    )
    vocab_size = weight.shape[0]
    counts = both(
        label_weight(labels_c, vocab_size, ignore_index),
        label_weight(labels_u, vocab_size, ignore_index),
    )
    losses = lam * nll(log_probs, labels_c) + (1 - lam) * nll(log_probs, labels_u)
    return reduce(weighted_loss(counts, losses), counts, reduction, divisor)


def sftmix_loss(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted
    pair_c: Tensor,  # (P,) int64 rows of hidden.reshape(-1, D)
    pair_u: Tensor,  # (P,) int64
    lam: float | Tensor,  # () or (P,)
    *,
    mu: float = 0.2,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    ntp_divisor: float | Tensor | None = None,
    mixup_divisor: float | Tensor | None = None,
) -> SFTMixLoss:
    """Return ``NTP(all tokens) + mu * Mixup(pairs)``, composed from the two functions above."""
    head = {
        "bias": bias,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "ignore_index": ignore_index,
    }
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    ntp = cross_entropy(rows, weight, targets, divisor=ntp_divisor, **head)  # type: ignore[arg-type]
    mixup = mixup_loss(
        rows[pair_c],
        rows[pair_u],
        weight,
        targets[pair_c],
        targets[pair_u],
        lam,
        divisor=mixup_divisor,
        **head,  # type: ignore[arg-type]
    )
    return SFTMixLoss(ntp + mu * mixup, ntp.detach(), mixup.detach())


def perplexity(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64
    sample_ids: Tensor,  # (...) int64: which example each token belongs to
    num_samples: int,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:  # (S,) float64
    """Return ``exp(mean of an example's token losses)``; NaN where no token of it counts."""
    losses = cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        reduction="none",
    )
    total = torch.zeros(num_samples, dtype=torch.float64, device=hidden.device)
    count = torch.zeros_like(total)
    ids = sample_ids.reshape(-1)
    total.index_add_(0, ids, losses.reshape(-1).double())
    count.index_add_(0, ids, (labels.reshape(-1) != ignore_index).double())
    return (total / count).exp()
