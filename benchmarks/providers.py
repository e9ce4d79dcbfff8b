"""Who is measured on what: ours under each schedule, dense PyTorch, peers, and the error check.

Legend: P pairs, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import (
    VocabTiles,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
    reference,
)
from sftmix_kernels.schedules import Schedule

MU = 0.2
NTP, MIXUP, BOTH = "NTP", "Mixup", "NTP + Mixup"
ROW_CHUNKS, VOCAB_TILES, FILTERED = "row_chunks", "vocab_tiles", "vocab_tiles, filter 2^-12"
FILTER_EPS = 2.0**-12
DENSE = "dense PyTorch"
# Of a gradient, by norms against float64. A filter leaves out what is small; a peer that sums dW
# in bfloat16 is rough: both count as right up to here, and the error stands beside the time.
FILTER_LIMIT, PEER_LIMIT = 0.05, 0.02


class Inputs(NamedTuple):
    """Rows [c | u]: row p is mixed with row P + p."""

    hidden: Tensor  # (2P, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (2P,)
    lam: Tensor  # (P,)


Loss = Callable[[Inputs], Tensor]
HardLabelLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels: the mean


class Provider(NamedTuple):
    """One implementation of one task."""

    who: str
    task: str
    loss: Loss
    ours: bool = False
    one_lam: bool = False  # one share for the whole batch: without weights of tokens no other
    limit: float | None = None  # relative error of gradients; None holds it to the error budget

    @property
    def name(self) -> str:
        return f"{self.task}: {self.who}"

    def inputs(self, x: Inputs) -> Inputs:
        """What this provider is given in place of ``x``."""
        return x._replace(lam=torch.full_like(x.lam, 0.3)) if self.one_lam else x


def make_inputs(
    pairs: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    peaked: bool = False,
) -> Inputs:
    """Random, seeded; lam from Beta(0.5, 0.5); logits of about unit size.

    ``peaked`` turns each hidden state towards the weight of its label, each row by another amount,
    as training does; random ones give every token a probability of about 1 / V, which flatters
    whoever skips small probabilities.
    """
    torch.manual_seed(0)
    half = torch.tensor(0.5)
    hidden = torch.randn(2 * pairs, hidden_size, device=device)
    weight = torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5
    labels = torch.randint(0, vocab_size, (2 * pairs,), device=device)
    lam = torch.distributions.Beta(half, half).sample((pairs,)).to(device)
    if peaked:
        # Towards a target whose probability without it is 1 / V: from rare to sure.
        strength = torch.empty(2 * pairs, 1, device=device).uniform_(0.6, 2.0)
        strength *= torch.tensor(float(vocab_size)).log().to(device)
        hidden += strength * F.normalize(weight[labels], dim=-1)
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, lam)


def peakedness(x: Inputs) -> dict[str, float]:
    """Of the first rows: mean probability of the label, and tokens above the filter in a row."""
    with torch.no_grad():
        rows = slice(0, min(512, x.labels.numel()))
        p = F.linear(x.hidden[rows], x.weight).float().softmax(-1)
        at_label = p.gather(-1, x.labels[rows].unsqueeze(-1))
        tokens = (p > FILTER_EPS).sum(-1).float()
        return {
            "mean_target_probability": float(at_label.mean()),
            "mean_tokens_above_filter": float(tokens.mean()),
        }


def fused(schedule: Schedule = "auto") -> Loss:
    """NTP + Mixup in one op."""

    def loss(x: Inputs) -> Tensor:
        rows_c, rows_u = torch.arange(x.labels.numel(), device=x.labels.device).chunk(2)
        head = (x.hidden, x.weight, x.labels)
        return fused_sftmix_loss(*head, rows_c, rows_u, x.lam, mu=MU, schedule=schedule).loss

    return loss


def fused_ntp(schedule: Schedule = "auto") -> Loss:
    return lambda x: fused_cross_entropy(x.hidden, x.weight, x.labels, schedule=schedule)


def fused_mixup(schedule: Schedule = "auto") -> Loss:
    def loss(x: Inputs) -> Tensor:
        hidden, labels = x.hidden.chunk(2), x.labels.chunk(2)
        return fused_mixup_loss(*hidden, x.weight, *labels, x.lam, schedule=schedule)

    return loss


def dense(x: Inputs) -> Tensor:
    """What a user writes: logits of both halves and of the mixture; two hard-label losses."""
    (hidden_c, hidden_u), (labels_c, labels_u) = x.hidden.chunk(2), x.labels.chunk(2)
    share = x.lam.unsqueeze(-1)
    mixed = (share * hidden_c + (1 - share) * hidden_u).to(hidden_c.dtype)
    logits = F.linear(mixed, x.weight).float()
    loss_c = F.cross_entropy(logits, labels_c, reduction="none")
    loss_u = F.cross_entropy(logits, labels_u, reduction="none")
    mixup = (x.lam * loss_c + (1 - x.lam) * loss_u).mean()
    ntp_c = F.cross_entropy(F.linear(hidden_c, x.weight).float(), labels_c)
    ntp_u = F.cross_entropy(F.linear(hidden_u, x.weight).float(), labels_u)
    return (ntp_c + ntp_u) / 2 + MU * mixup


def dense_ntp(x: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.labels)


def alone(ntp: HardLabelLoss) -> Loss:
    return lambda x: ntp(x.hidden, x.weight, x.labels)


def composed(ntp: HardLabelLoss) -> Loss:
    """NTP + Mixup from a loss with hard labels alone: each mixed row twice, once for each label."""

    def loss(x: Inputs) -> Tensor:
        (hidden_c, hidden_u), (labels_c, labels_u) = x.hidden.chunk(2), x.labels.chunk(2)
        lam = x.lam[0]
        mixed = lam * hidden_c + (1 - lam) * hidden_u
        mixup = lam * ntp(mixed, x.weight, labels_c) + (1 - lam) * ntp(mixed, x.weight, labels_u)
        return ntp(x.hidden, x.weight, x.labels) + MU * mixup

    return loss


def torch_chunked() -> HardLabelLoss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options)


def liger(rows: int | None = None, sums: torch.dtype | None = None) -> HardLabelLoss:
    """As it comes, or with chunks of at least ``rows`` rows and sums of dW in another dtype."""
    # Named here and not at the top: nothing of ours needs the package.
    functional = importlib.import_module("liger_kernel.transformers.functional")
    call = functional.liger_fused_linear_cross_entropy
    if rows is None:
        return lambda h, w, y: call(h, w, y)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # It rounds rows / ceil(V / (budget D)) up to a power of two.
        chunks = max(1, hidden.shape[0] // rows)
        budget = -(-weight.shape[0] // (chunks * hidden.shape[1]))
        return call(hidden, weight, labels, accum_dtype=sums, chunk_mem_const=budget)

    return loss


def cut_cross_entropy(filter_eps: str | None = "high") -> HardLabelLoss:
    """As it comes, with a filter of 2^-12 in bfloat16, or exact with None."""
    call = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, y: call(h, w, y, filter_eps=filter_eps)


# Name, what makes it, and whether it skips what is small.
PEERS: tuple[tuple[str, Callable[[], HardLabelLoss], bool], ...] = (
    ("torch linear_cross_entropy, chunked", torch_chunked, False),
    ("Liger-Kernel", liger, False),
    ("Liger-Kernel, 4096 rows", lambda: liger(4096), False),
    ("Liger-Kernel, 4096 rows, float32 dW", lambda: liger(4096, torch.float32), False),
    ("cut-cross-entropy", cut_cross_entropy, True),
    ("cut-cross-entropy, no filter", lambda: cut_cross_entropy(None), False),
)


def our_schedules(device: str) -> tuple[dict[str, Schedule], dict[str, str]]:
    """Schedules by name, and why one is left out."""
    if device == "cpu":
        reason = "measured on CUDA alone"
        return {ROW_CHUNKS: ROW_CHUNKS}, {VOCAB_TILES: reason, FILTERED: reason}
    filtered = VocabTiles(filter_eps=FILTER_EPS)
    return {ROW_CHUNKS: ROW_CHUNKS, VOCAB_TILES: VOCAB_TILES, FILTERED: filtered}, {}


def our_providers(device: str) -> tuple[list[Provider], dict[str, str]]:
    """Every task under every schedule."""
    found = []
    schedules, left_out = our_schedules(device)
    for who, schedule in schedules.items():
        limit = FILTER_LIMIT if who == FILTERED else None
        for task, make in ((BOTH, fused), (NTP, fused_ntp), (MIXUP, fused_mixup)):
            found.append(Provider(who, task, make(schedule), ours=True, limit=limit))
    return found, left_out


def peer_providers(device: str, compile_dense: bool) -> tuple[list[Provider], dict[str, str]]:
    """NTP alone and NTP + Mixup by others, and why one is left out."""
    found = [
        Provider(DENSE, NTP, dense_ntp, limit=PEER_LIMIT),
        Provider(DENSE, BOTH, dense, limit=PEER_LIMIT),
    ]
    left_out = {}
    if compile_dense:
        for task, loss in ((NTP, dense_ntp), (BOTH, dense)):
            compiled = torch.compile(loss, dynamic=False)
            found.append(Provider("torch.compile of dense", task, compiled, limit=PEER_LIMIT))
    else:
        left_out["torch.compile of dense"] = "not asked for"
    for who, make, filters in PEERS:
        if device == "cpu" and make is not torch_chunked:
            left_out[who] = "needs CUDA"
            continue
        try:
            ntp = make()
        except (ImportError, AttributeError, RuntimeError) as reason:
            left_out[who] = f"{type(reason).__name__}: {reason}"
            continue
        limit = FILTER_LIMIT if filters else PEER_LIMIT
        found.append(Provider(who, NTP, alone(ntp), limit=limit))
        found.append(Provider(who, BOTH, composed(ntp), one_lam=True, limit=limit))
    return found, left_out


def ntp_rows(x: Inputs) -> Tensor:
    """The reference, as what adds up to the loss."""
    rows = reference.cross_entropy(x.hidden, x.weight, x.labels, reduction="none")
    return rows / rows.numel()


def mixup_rows(x: Inputs) -> Tensor:
    """The reference, as what adds up to the loss."""
    hidden, labels = x.hidden.chunk(2), x.labels.chunk(2)
    rows = reference.mixup_loss(*hidden, x.weight, *labels, x.lam, reduction="none")
    return rows / rows.numel()


def sftmix_rows(x: Inputs) -> Tensor:
    """The reference, as what adds up to the loss."""
    return torch.cat((ntp_rows(x), MU * mixup_rows(x)))


ORACLES: dict[str, Loss] = {NTP: ntp_rows, MIXUP: mixup_rows, BOTH: sftmix_rows}


def step(loss: Loss, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward: the loss and two gradients."""
    value = loss(x)
    return value.detach(), *torch.autograd.grad(value, (x.hidden, x.weight))


class Errors(NamedTuple):
    """Of the loss, dH and dW in turn, against float64."""

    largest: tuple[float, ...]
    dense_largest: tuple[float, ...]  # of the reference in the inputs' own dtype
    relative: tuple[float, ...]  # of norms
    in_budget: bool

    def passed(self, limit: float | None) -> bool:
        """In the error budget, or by ``limit`` close enough. NaN never is."""
        return self.in_budget if limit is None else all(r <= limit for r in self.relative)

    def of_dense(self) -> float:
        """The worst of the gradients' errors, in those of dense PyTorch."""
        pairs = zip(self.largest[1:], self.dense_largest[1:], strict=True)
        return max((own / max(other, 1e-300) for own, other in pairs), default=float("nan"))


def errors(loss: Loss, oracle_rows: Loss, x: Inputs) -> Errors:
    """Loss and gradients against float64.

    The budget of the largest element of each: twice the error of the reference in the inputs' own
    dtype plus one rounding; of the loss, the reference's error is added up row by row without
    cancelling.
    """
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    doubles = x._replace(hidden=hidden, weight=weight)
    found = step(loss, x)
    plain, truth = (step(lambda v: oracle_rows(v).sum(), values) for values in (x, doubles))
    largest = [float((a.double() - t).abs().max()) for a, t in zip(found, truth, strict=True)]
    allowed = [float((p.double() - t).abs().max()) for p, t in zip(plain, truth, strict=True)]
    with torch.no_grad():
        allowed[0] = float((oracle_rows(x).double() - oracle_rows(doubles)).abs().sum())
    limits = [
        2 * a + torch.finfo(f.dtype).eps * float(t.abs().max())
        for a, f, t in zip(allowed, found, truth, strict=True)
    ]
    relative = [
        float((f.double() - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)
    ]
    in_budget = all(error <= limit for error, limit in zip(largest, limits, strict=True))
    return Errors(tuple(largest), tuple(allowed), tuple(relative), in_budget)
