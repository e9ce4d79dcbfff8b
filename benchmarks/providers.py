"""Compute the losses in every way: ours under each schedule, dense PyTorch, and peers.

All do the same work: NTP, Mixup, or NTP + Mixup of the same rows.

Legend: P pairs, D hidden size, V vocabulary.
"""

from __future__ import annotations

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
)
from sftmix_kernels.schedules import PADDING, RowChunks, Schedule

from .inputs import FILTER_EPS, Inputs
from .peers import HardLabelLoss, find_peers
from .records import (
    BOTH,
    COMPILED,
    DENSE,
    FILTERED,
    MIXUP,
    NTP,
    ROW_CHUNKS,
    TASKS,
    VOCAB_TILES,
)
from .settings import Settings

MU = 0.2
# The most relative error of a gradient, by norms against float64. A filter leaves out what is
# small; a peer that sums dW in bfloat16 is rough: both count as right up to here, and the error
# stands beside the time.
FILTER_LIMIT, PEER_LIMIT = 0.05, 0.02

Loss = Callable[[Inputs], Tensor]


class Provider(NamedTuple):
    """One implementation of one task."""

    who: str
    task: str
    loss: Loss
    ours: bool = False
    one_lam: bool = False  # one lam for the whole batch: the loss takes no weights of tokens
    limit: float | None = None  # relative error of gradients; None holds it to the error budget
    holds_logits: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Return what tells it from all others."""
        return self.who, self.task

    def inputs(self, x: Inputs) -> Inputs:
        """Return what this provider is given in place of ``x``."""
        return x._replace(lam=torch.full_like(x.lam, 0.3)) if self.one_lam else x

    def in_grid(self) -> bool:
        """Tell whether it takes part where only a few do: ours on two tasks, others on NTP."""
        return not self.holds_logits and self.task in ((NTP, BOTH) if self.ours else (NTP,))


def fused_ntp(schedule: Schedule = "auto") -> Loss:
    """Return our NTP under a schedule."""
    return lambda x: fused_cross_entropy(x.hidden, x.weight, x.labels, schedule=schedule)


def fused_mixup(schedule: Schedule = "auto") -> Loss:
    """Return our Mixup under a schedule."""

    def loss(x: Inputs) -> Tensor:
        hidden, labels = x.hidden.chunk(2), x.labels.chunk(2)
        return fused_mixup_loss(*hidden, x.weight, *labels, x.lam, schedule=schedule)

    return loss


def fused_both(schedule: Schedule = "auto") -> Loss:
    """Return our NTP + Mixup, one op, under a schedule."""

    def loss(x: Inputs) -> Tensor:
        rows_c, rows_u = torch.arange(x.labels.numel(), device=x.labels.device).chunk(2)
        head = (x.hidden, x.weight, x.labels)
        return fused_sftmix_loss(*head, rows_c, rows_u, x.lam, mu=MU, schedule=schedule).loss

    return loss


def dense_ntp(x: Inputs) -> Tensor:
    """Compute NTP as a user writes it: all logits at once."""
    return F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.labels)


def dense_mixup(x: Inputs) -> Tensor:
    """Compute Mixup as a user writes it: logits of the mixture, and two hard-label losses."""
    (hidden_c, hidden_u), (labels_c, labels_u) = x.hidden.chunk(2), x.labels.chunk(2)
    lam = x.lam.unsqueeze(-1)
    mixed = (lam * hidden_c + (1 - lam) * hidden_u).to(hidden_c.dtype)
    logits = F.linear(mixed, x.weight).float()
    loss_c = F.cross_entropy(logits, labels_c, reduction="none")
    loss_u = F.cross_entropy(logits, labels_u, reduction="none")
    return (x.lam * loss_c + (1 - x.lam) * loss_u).mean()


def dense_both(x: Inputs) -> Tensor:
    """Compute NTP + Mixup as a user writes it: the halves' logits, and those of their mixture."""
    halves = zip(x.hidden.chunk(2), x.labels.chunk(2), strict=True)
    ntp_c, ntp_u = (F.cross_entropy(F.linear(h, x.weight).float(), y) for h, y in halves)
    return (ntp_c + ntp_u) / 2 + MU * dense_mixup(x)


def composed_ntp(ntp: HardLabelLoss) -> Loss:
    """Return a peer's NTP."""
    return lambda x: ntp(x.hidden, x.weight, x.labels)


def composed_mixup(ntp: HardLabelLoss) -> Loss:
    """Return Mixup by a loss that takes only hard labels: each mixed row twice, once a label."""

    def loss(x: Inputs) -> Tensor:
        (hidden_c, hidden_u), (labels_c, labels_u) = x.hidden.chunk(2), x.labels.chunk(2)
        # Not a scalar, which would be rounded to hidden's dtype before the product.
        mixed = (x.lam[:1] * hidden_c + (1 - x.lam[:1]) * hidden_u).to(hidden_c.dtype)
        lam = x.lam[0]
        return lam * ntp(mixed, x.weight, labels_c) + (1 - lam) * ntp(mixed, x.weight, labels_u)

    return loss


def composed_both(ntp: HardLabelLoss) -> Loss:
    """Return NTP + Mixup by a loss that takes only hard labels."""
    mixup = composed_mixup(ntp)
    return lambda x: ntp(x.hidden, x.weight, x.labels) + MU * mixup(x)


OURS = {NTP: fused_ntp, MIXUP: fused_mixup, BOTH: fused_both}
DENSE_LOSSES = {NTP: dense_ntp, MIXUP: dense_mixup, BOTH: dense_both}
COMPOSED = {NTP: composed_ntp, MIXUP: composed_mixup, BOTH: composed_both}


def our_schedules(device: str) -> tuple[dict[str, Schedule], dict[str, str]]:
    """Return schedules by name, and why one is left out."""
    if device == "cpu":
        reason = "needs a CUDA device"
        return {ROW_CHUNKS: "row_chunks"}, {VOCAB_TILES: reason, FILTERED: reason}
    filtered = VocabTiles(filter_eps=FILTER_EPS)
    return {ROW_CHUNKS: "row_chunks", VOCAB_TILES: "vocab_tiles", FILTERED: filtered}, {}


def find_providers(
    settings: Settings, compiled: bool = True
) -> tuple[list[Provider], dict[str, str]]:
    """Return everyone on every task, `torch.compile` if ``compiled``, and why one is left out."""
    found = []
    schedules, left_out = our_schedules(settings.device)
    for who, schedule in schedules.items():
        limit = FILTER_LIMIT if who == FILTERED else None
        found += [Provider(who, t, OURS[t](schedule), ours=True, limit=limit) for t in TASKS]
    if not settings.peers:
        return found, left_out
    dense = {"limit": PEER_LIMIT, "holds_logits": True}
    found += [Provider(DENSE, task, loss, **dense) for task, loss in DENSE_LOSSES.items()]
    peers, absent = find_peers(settings.device)
    if not compiled:
        reason = "compiles for long: not in this suite, and not in quick runs"
        absent |= {COMPILED: reason} | {peer.who: reason for peer in peers if peer.compiles}
        peers = {peer: loss for peer, loss in peers.items() if not peer.compiles}
    for peer, ntp in peers.items():
        limit = FILTER_LIMIT if peer.filters else PEER_LIMIT
        for task, compose in COMPOSED.items():
            one_lam = task != NTP
            found.append(Provider(peer.who, task, compose(ntp), one_lam=one_lam, limit=limit))
    if compiled:
        # Last, because where time runs out they are what it is worth the least for.
        losses = {task: torch.compile(f, dynamic=False) for task, f in DENSE_LOSSES.items()}
        found += [Provider(COMPILED, task, loss, **dense) for task, loss in losses.items()]
    return found, {**left_out, **absent}


class Products:
    """The bare matrix products of NTP, into buffers made beforehand: nobody can be faster.

    Their chunks are as large as ours on the CPU, and as a rule all rows on a GPU. The gradients of
    the logits are real ones, since a product of mostly tiny numbers draws less power than one of
    random numbers, and so runs faster.
    """

    def __init__(self, x: Inputs) -> None:
        self.hidden, self.weight = x.hidden.detach(), x.weight.detach()
        rows, vocab_size = self.hidden.shape[0], self.weight.shape[0]
        chunk = min(rows, 8192 if x.hidden.is_cuda else RowChunks().rows_for(x.hidden, vocab_size))
        padded = self.weight.new_empty(2, chunk, vocab_size + -vocab_size % PADDING)
        self.logits, self.gradient = padded[..., :vocab_size].unbind()
        self.of_hidden = torch.empty_like(self.hidden)
        self.of_weight = torch.empty_like(self.weight)
        torch.mm(self.hidden[:chunk], self.weight.t(), out=self.gradient)
        for some, labels in zip(
            self.gradient.split(1024), x.labels[:chunk].split(1024), strict=True
        ):
            some.copy_(some.float().softmax(-1))
            some.scatter_add_(-1, labels.unsqueeze(-1), -torch.ones_like(some[:, :1]))

    def chunks(self) -> list[slice]:
        """Return the rows of each chunk."""
        size, rows = self.logits.shape[0], self.hidden.shape[0]
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def forward(self) -> None:
        """Compute the logits."""
        for rows in self.chunks():
            hidden = self.hidden[rows]
            torch.mm(hidden, self.weight.t(), out=self.logits[: hidden.shape[0]])

    def all_three(self) -> None:
        """Compute the logits and both gradients."""
        for rows in self.chunks():
            hidden = self.hidden[rows]
            gradient = self.gradient[: hidden.shape[0]]
            torch.mm(hidden, self.weight.t(), out=self.logits[: hidden.shape[0]])
            torch.mm(gradient, self.weight, out=self.of_hidden[rows])
            beta = 0 if rows.start == 0 else 1
            torch.addmm(self.of_weight, gradient.t(), hidden, beta=beta, out=self.of_weight)


def operations(task: str, x: Inputs, backward: bool) -> int:
    """Return the operations that a task cannot do without: Mixup needs one row for each pair."""
    rows, hidden_size = x.hidden.shape
    once = 2 * rows * hidden_size * x.weight.shape[0] // (2 if task == MIXUP else 1)
    return 3 * once if backward else once
