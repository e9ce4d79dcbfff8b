"""NTP + Mixup, forward + backward, float32: ours, dense PyTorch, and NTP alone by others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import fused_cross_entropy, fused_sftmix_loss, reference

from .measure import Seconds, interleaved_seconds, peak_extra_bytes

MU = 0.2
DENSE, OURS = "dense PyTorch", "fused_sftmix_loss"
PEER = "linear_cross_entropy (NTP alone)"
# Factors of the provider named that ours must stay under.
TARGETS = (("seconds", DENSE, 0.80), ("seconds", PEER, 0.65), ("peak_bytes", DENSE, 0.30))


class Inputs(NamedTuple):
    """Rows [c | u]: row p is mixed with row P + p."""

    hidden: Tensor  # (2P, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (2P,)
    lam: Tensor  # (P,)


Loss = Callable[[Inputs], Tensor]


def make_inputs(pairs: int, hidden_size: int, vocab_size: int) -> Inputs:
    """Random, seeded; lam from Beta(0.5, 0.5)."""
    torch.manual_seed(0)
    half = torch.tensor(0.5)
    return Inputs(
        torch.randn(2 * pairs, hidden_size, requires_grad=True),
        (torch.randn(vocab_size, hidden_size) / hidden_size**0.5).requires_grad_(),
        torch.randint(0, vocab_size, (2 * pairs,)),
        torch.distributions.Beta(half, half).sample((pairs,)),
    )


def fused(x: Inputs) -> Tensor:
    rows_c, rows_u = torch.arange(x.labels.numel()).chunk(2)
    return fused_sftmix_loss(x.hidden, x.weight, x.labels, rows_c, rows_u, x.lam, mu=MU).loss


def dense(x: Inputs) -> Tensor:
    """What a user writes: logits of both halves and of the mixture; two hard-label losses."""
    (hidden_c, hidden_u), (labels_c, labels_u) = x.hidden.chunk(2), x.labels.chunk(2)
    share = x.lam.unsqueeze(-1)
    mixed = F.linear(share * hidden_c + (1 - share) * hidden_u, x.weight)
    loss_c = F.cross_entropy(mixed, labels_c, reduction="none")
    loss_u = F.cross_entropy(mixed, labels_u, reduction="none")
    mixup = (x.lam * loss_c + (1 - x.lam) * loss_u).mean()
    ntp_c = F.cross_entropy(F.linear(hidden_c, x.weight), labels_c)
    ntp_u = F.cross_entropy(F.linear(hidden_u, x.weight), labels_u)
    return (ntp_c + ntp_u) / 2 + MU * mixup


def fused_ntp(x: Inputs) -> Tensor:
    return fused_cross_entropy(x.hidden, x.weight, x.labels)


def torch_ntp(x: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options)


def ntp_rows(x: Inputs) -> Tensor:
    """The reference, as what adds up to the loss."""
    rows = reference.cross_entropy(x.hidden, x.weight, x.labels, reduction="none")
    return rows / rows.numel()


def sftmix_rows(x: Inputs) -> Tensor:
    """The reference, as what adds up to the loss."""
    hidden, labels = x.hidden.chunk(2), x.labels.chunk(2)
    mixup = reference.mixup_loss(*hidden, x.weight, *labels, x.lam, reduction="none")
    return torch.cat((ntp_rows(x), MU * mixup / mixup.numel()))


def step(loss: Loss, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward: the loss and two gradients."""
    value = loss(x)
    return value.detach(), *torch.autograd.grad(value, (x.hidden, x.weight))


def bare_products(x: Inputs) -> tuple[Tensor, Tensor]:
    """The three matrix products of NTP with nothing between them, in chunks as ours."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    workspace = weight.new_empty(min(512, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], 512):
        rows = hidden[start : start + 512]
        logits = torch.mm(rows, weight.t(), out=workspace[: rows.shape[0]])
        torch.mm(logits, weight, out=of_hidden[start : start + 512])
        of_weight.addmm_(logits.t(), rows)
    return of_hidden, of_weight


def loss_error(loss: Loss, oracle_rows: Loss, x: Inputs) -> tuple[float, bool]:
    """Error of the loss against float64, and whether loss and gradients hold the error budget.

    The budget of the largest element of each: twice the error of the float32 reference plus one
    rounding; of the loss, the reference's error is added up row by row without cancelling.
    """
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    doubles = x._replace(hidden=hidden, weight=weight)
    found = step(loss, x)
    plain, truth = (step(lambda v: oracle_rows(v).sum(), values) for values in (x, doubles))
    errors = [float((a.double() - t).abs().max()) for a, t in zip(found, truth, strict=True)]
    allowed = [float((p.double() - t).abs().max()) for p, t in zip(plain, truth, strict=True)]
    with torch.no_grad():
        allowed[0] = float((oracle_rows(x).double() - oracle_rows(doubles)).abs().sum())
    eps = torch.finfo(torch.float32).eps
    limits = [2 * a + eps * float(t.abs().max()) for a, t in zip(allowed, truth, strict=True)]
    return errors[0], all(error <= limit for error, limit in zip(errors, limits, strict=True))


def providers() -> tuple[dict[str, tuple[Loss, Loss]], dict[str, str]]:
    """Loss and oracle of each provider, and why one is left out."""
    found = {OURS: (fused, sftmix_rows), DENSE: (dense, sftmix_rows)}
    left_out = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found[PEER] = (torch_ntp, ntp_rows)
    else:
        left_out[PEER] = f"torch {torch.__version__} has no LinearCrossEntropyOptions"
    found["fused_cross_entropy (NTP alone)"] = (fused_ntp, ntp_rows)
    return found, left_out


def run(pairs: int, hidden_size: int, vocab_size: int, repeats: int) -> dict[str, object]:
    """Check every provider on a slice, measure those that pass, print and return the table."""
    losses, left_out = providers()
    small = make_inputs(min(pairs, 64), hidden_size, min(vocab_size, 4096))
    errors = {}
    for name, (loss, oracle) in list(losses.items()):
        errors[name], passed = loss_error(loss, oracle, small)
        if not passed:
            left_out[name] = f"over the error budget on a slice: loss off by {errors[name]:.3g}"
            del losses[name]
    x = make_inputs(pairs, hidden_size, vocab_size)
    steps: dict[str, Callable[[], object]] = {
        name: (lambda loss=loss: step(loss, x)) for name, (loss, _) in losses.items()
    }
    steps["three bare matrix products"] = lambda: bare_products(x)
    seconds = interleaved_seconds(steps, repeats)
    peaks = {name: peak_extra_bytes(one) for name, one in steps.items()}
    print_table(seconds, peaks, errors, left_out)
    verdicts = print_targets({"seconds": {n: s.median for n, s in seconds.items()},
                              "peak_bytes": {n: float(b) for n, b in peaks.items()}})  # fmt: skip
    rows = {
        name: {**seconds[name]._asdict(), "peak_bytes": peaks[name], "loss_error": errors.get(name)}
        for name in steps
    }
    return {"providers": rows, "left_out": left_out, "targets": verdicts}


def print_table(
    seconds: dict[str, Seconds],
    peaks: dict[str, int],
    errors: dict[str, float],
    left_out: dict[str, str],
) -> None:
    """One line for each provider, then those left out."""
    head = f"{'provider':34} {'median s':>9} {'quartiles':>15} {'/ dense':>8}"
    print(f"{head} {'peak MiB':>9} {'loss error':>11}")
    base = seconds[DENSE].median if DENSE in seconds else float("nan")
    for name, time in seconds.items():
        quartiles = f"{time.low:.3f}-{time.high:.3f}"
        error = f"{errors[name]:.2g}" if name in errors else "-"
        print(
            f"{name:34} {time.median:9.3f} {quartiles:>15} {time.median / base:8.2f} "
            f"{peaks[name] / 2**20:9.0f} {error:>11}"
        )
    for name, reason in left_out.items():
        print(f"{name:34} left out: {reason}")
    print(
        "peak: bytes of tensors allocated in one step, in a run of its own; BLAS scratch is not in"
    )
    print("loss error: against float64, on at most 64 pairs and 4096 vocabulary entries")


def print_targets(measured: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """Ours against each target whose provider was measured."""
    verdicts: list[dict[str, object]] = []
    for quantity, other, limit in TARGETS:
        values = measured[quantity]
        if OURS not in values or other not in values:
            print(f"target {quantity} <= {limit} x {other}: not measured")
            continue
        ratio = values[OURS] / values[other]
        met = ratio <= limit
        print(f"target {quantity} <= {limit} x {other}: {ratio:.2f}, {'met' if met else 'MISSED'}")
        verdicts.append({"quantity": quantity, "of": other, "limit": limit, "ratio": ratio})
    return verdicts
