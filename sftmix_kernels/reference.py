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

**Weights.** ``row_weight`` multiplies the loss of a token, and is not differentiated; 0 leaves the
token out. The mean's divisor stays the count of valid labels, weights of 0 among them: as
``num_items_in_batch`` of transformers and TRL, it does not depend on weights. For a weighted mean
pass ``divisor=row_weight.sum()``.

**Objectives.** `token_losses` has those of `gates.py`: a detached gate times the NLL, label
smoothing, GEM.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .gates import Clipped, Entropy, Gate, Power, Threshold, objective_of

Reduction: TypeAlias = Literal["mean", "sum", "none"]


class SFTMixLoss(NamedTuple):
    """The three terms of a loss, ``loss = ntp + mu * mixup``: float32 scalars in nats.

    ``loss`` is what goes backward; ``ntp`` and ``mixup`` are detached.

    Example:
        >>> loss, ntp, mixup = SFTMixLoss(*torch.tensor([1.7, 1.5, 1.0]))
        >>> torch.allclose(loss, ntp + 0.2 * mixup)
        True
    """

    loss: Tensor  # ()
    ntp: Tensor  # ()
    mixup: Tensor  # ()


class TokenStats(NamedTuple):
    """What people watch of each token, in labels' shape (...) and detached; 0 where left out.

    - ``nll`` (...) float32: ``-log p`` of the label in nats, unweighted and ungated;
    - ``entropy`` (...) float32: in nats, over the whole vocabulary;
    - ``is_top`` (...) bool: no other token has a larger logit than the label.

    Example:
        >>> stats = TokenStats(torch.ones(4), torch.ones(4), torch.tensor([True, False] * 2))
        >>> stats.is_top.float().mean()  # the accuracy
        tensor(0.5000)
    """

    nll: Tensor  # (...)
    entropy: Tensor  # (...)
    is_top: Tensor  # (...)


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
    losses: Tensor, weight: Tensor, reduction: Reduction, divisor: float | Tensor | None
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


def weighted_labels(label_weight: Tensor, row_weight: Tensor | None) -> Tensor:
    """Return the weights of labels times those of rows: 0 where either is 0, else NaN where the
    second is negative or infinite."""
    if row_weight is None:
        return label_weight
    row_weight = row_weight.detach()
    is_weight = (row_weight >= 0) & (row_weight < torch.inf)
    return both(label_weight, row_weight.masked_fill(~is_weight, torch.nan))


def present(weight: Tensor) -> Tensor:
    """Return 0 where a weight is 0, NaN where it is NaN, and 1 elsewhere."""
    return weight / weight.masked_fill(weight == 0, 1.0)


def gate_of(gate: Gate, log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return the gate of each row; NaN where the label's NLL is."""
    log_p = -nll(log_probs, labels)
    if isinstance(gate, Power):  # DFT, arXiv 2508.05629; -p^k / k, arXiv 2510.00526
        factor = log_p.exp() ** gate.k
    elif isinstance(gate, Threshold):
        factor = ((log_p.exp() >= gate.tau) == (gate.keep == "above")).to(log_p)
    elif isinstance(gate, Entropy):  # EAFT; 1 token has no entropy
        factor = (entropy(log_probs) / math.log(max(2, log_probs.shape[-1]))) ** gate.alpha
    elif isinstance(gate, Clipped):  # PSFT, arXiv 2508.17784
        ratio = (log_p - gate.old_log_probs.to(log_p)).exp()
        factor = ratio.masked_fill(ratio >= 1 + gate.eps, 0.0)
    return factor.masked_fill(log_p.isnan(), torch.nan)


def entropy(log_probs: Tensor) -> Tensor:
    """Return ``-sum_j p_j log p_j``, to which an impossible token adds nothing."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def token_losses(
    log_probs: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    weight: Tensor,  # (...): of labels and of rows
    *,
    gate: Gate | None = None,
    label_smoothing: float = 0.0,
    gem_beta: float | None = None,
) -> Tensor:  # (...)
    """Return the weighted losses of tokens by one of the objectives of `gates.py`."""
    losses = nll(log_probs, labels)
    if gate is not None:
        weight = both(weight, gate_of(gate, log_probs, labels).detach())
    if label_smoothing:  # transformers' LabelSmoother: the target keeps e / V of its own, too
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(-1)
    if gem_beta is not None:  # GEM, arXiv 2408.16673, with h linear
        q = (log_probs / gem_beta).softmax(-1).detach()
        losses = losses + (q * log_probs.masked_fill(q == 0, 0.0)).sum(-1)
    return weighted_loss(weight, losses)


def token_stats(log_probs: Tensor, labels: Tensor, weight: Tensor) -> TokenStats:
    """Return what people watch of each token: 0 where its weight is, NaN where that is NaN."""
    counts = present(weight)
    own = -nll(log_probs, labels)
    is_top = (own >= log_probs.amax(-1)) & (counts == 1)
    losses, entropies = weighted_loss(counts, -own), weighted_loss(counts, entropy(log_probs))
    return TokenStats(losses.detach(), entropies.detach(), is_top)


def cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    divisor: float | Tensor | None = None,
    row_weight: Tensor | None = None,  # (...)
    gate: Gate | None = None,
    label_smoothing: float = 0.0,
    gem_beta: float | None = None,
    stats: bool = False,
) -> Any:
    """Return NTP: ``LSE(a) - a[y]``, or another objective, reduced over the tokens that count.

    With ``stats`` it is ``(loss, TokenStats)``.
    """
    objective_of(gate, label_smoothing, gem_beta)  # refuses what no objective is
    log_probs = log_probabilities(
        hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap
    )
    counts = label_weight(labels, weight.shape[0], ignore_index)
    weights = weighted_labels(counts, row_weight)
    losses = token_losses(
        log_probs,
        labels,
        weights,
        gate=gate,
        label_smoothing=label_smoothing,
        gem_beta=gem_beta,
    )
    loss = reduce(losses, counts, reduction, divisor)
    return (loss, token_stats(log_probs, labels, weights)) if stats else loss


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
    reduction: Reduction = "mean",
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
    row_weight: Tensor | None = None,  # (...)
    gate: Gate | None = None,
    stats: bool = False,
) -> Any:
    """Return ``NTP(all tokens) + mu * Mixup(pairs)``, composed from the two functions above.

    Gate and weights are NTP's; a pair with a token of weight 0 is not mixed.
    """
    head = {
        "bias": bias,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "ignore_index": ignore_index,
    }
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    weights = None if row_weight is None else row_weight.reshape(-1)
    if isinstance(gate, Clipped):
        gate = Clipped(gate.old_log_probs.reshape(-1), gate.eps)
    options = {"row_weight": weights, "gate": gate, "divisor": ntp_divisor, **head}
    ntp, of_tokens = cross_entropy(rows, weight, targets, stats=True, **options)  # type: ignore[arg-type]
    if weights is not None:
        targets = targets.masked_fill(weights == 0, ignore_index)
        targets = targets.masked_fill(weighted_labels(weights, weights).isnan(), weight.shape[0])
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
    loss = SFTMixLoss(ntp + mu * mixup, ntp.detach(), mixup.detach())
    of_tokens = TokenStats(*(number.reshape(labels.shape) for number in of_tokens))
    return (loss, of_tokens) if stats else loss


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
