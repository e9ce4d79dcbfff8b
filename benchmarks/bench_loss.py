"""Time NTP, Mixup and NTP + Mixup, with gradients and without, on the hidden states of a head.

Timed is `step`, forward and backward of one loss, and its forward alone;
`measure.interleaved_samples` has the turns.
Ours is timed beside dense PyTorch, `torch.compile` of it, the losses of other packages
(`peers.py`), and the bare matrix products, which nobody can beat. Each is checked against float64
first (`errors.py`). Figures: "loss" in RESULTS.md, README's first table, `cpu-loss.svg`.

Legend: P pairs, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import VocabTiles, fused_cross_entropy, fused_mixup_loss, fused_sftmix_loss
from sftmix_kernels.schedules import PADDING, RowChunks, Schedule
from tools.peak_memory import peak_extra_bytes

from . import records as names
from .errors import ROWS, Oracle
from .inputs import FILTER_EPS, MU, Inputs, Loss, make_inputs, peakedness
from .measure import interleaved_samples
from .peers import COMPILES, LIGER_ROWS, HardLabelLoss, find_peers
from .records import BOTH, MIXUP, NTP
from .result_file import Results
from .settings import TRAINED, Case, Settings

# Bytes of the float64 logits that errors are held to: at any size here two of our chunks at least.
CHECKED_BYTES = 2**33
GRID_REPEATS = {"cpu": 9, "cuda": 5}
# The most relative error of a gradient, by norms against float64. A filter leaves out what is
# small; a peer that sums dW in bfloat16 is rough: both count as right up to here, and the error
# stands beside the time.
FILTER_LIMIT, PEER_LIMIT = 0.05, 0.02


def step(loss: Loss, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Run forward and backward: return the loss and two gradients."""
    value = loss(x)
    return value.detach(), *torch.autograd.grad(value, (x.hidden, x.weight))


def our_ntp(x: Inputs, schedule: Schedule = "auto") -> Tensor:
    """Compute our NTP."""
    return fused_cross_entropy(x.hidden, x.weight, x.labels, schedule=schedule)


def our_mixup(x: Inputs, schedule: Schedule = "auto") -> Tensor:
    """Compute our Mixup."""
    hidden, labels = x.hidden.chunk(2), x.labels.chunk(2)
    return fused_mixup_loss(*hidden, x.weight, *labels, x.lam, schedule=schedule)


def our_both(x: Inputs, schedule: Schedule = "auto") -> Tensor:
    """Compute our NTP + Mixup, one op."""
    rows_c, rows_u = torch.arange(x.labels.numel(), device=x.labels.device).chunk(2)
    head = (x.hidden, x.weight, x.labels)
    return fused_sftmix_loss(*head, rows_c, rows_u, x.lam, mu=MU, schedule=schedule).loss


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


def composed_ntp(x: Inputs, ntp: HardLabelLoss) -> Tensor:
    """Compute a peer's NTP."""
    return ntp(x.hidden, x.weight, x.labels)


def composed_mixup(x: Inputs, ntp: HardLabelLoss) -> Tensor:
    """Compute Mixup by a loss that takes only hard labels: each mixed row twice, once a label."""
    (hidden_c, hidden_u), (labels_c, labels_u) = x.hidden.chunk(2), x.labels.chunk(2)
    # Not a scalar, which would be rounded to hidden's dtype before the product.
    mixed = (x.lam[:1] * hidden_c + (1 - x.lam[:1]) * hidden_u).to(hidden_c.dtype)
    lam = x.lam[0]
    return lam * ntp(mixed, x.weight, labels_c) + (1 - lam) * ntp(mixed, x.weight, labels_u)


def composed_both(x: Inputs, ntp: HardLabelLoss) -> Tensor:
    """Compute NTP + Mixup by a loss that takes only hard labels."""
    return composed_ntp(x, ntp) + MU * composed_mixup(x, ntp)


OURS = {NTP: our_ntp, MIXUP: our_mixup, BOTH: our_both}
DENSE = {NTP: dense_ntp, MIXUP: dense_mixup, BOTH: dense_both}
COMPOSED = {NTP: composed_ntp, MIXUP: composed_mixup, BOTH: composed_both}
SCHEDULES: dict[str, RowChunks | VocabTiles] = {
    names.ROW_CHUNKS: RowChunks(),
    names.VOCAB_TILES: VocabTiles(),
    names.FILTERED: VocabTiles(filter_eps=FILTER_EPS),
}


# Who takes part in a short run: ours, a user's own, and the fastest peer that was seen.
SHORT = (names.ROW_CHUNKS, names.VOCAB_TILES, names.DENSE, LIGER_ROWS)


class Provider(NamedTuple):
    """One implementation of one task."""

    who: str
    task: str
    loss: Loss
    ours: bool = False
    one_lam: bool = False  # one lam for the whole batch: the loss takes no weights of tokens
    limit: float | None = None  # relative error of gradients; None holds it to the error budget
    holds_logits: bool = False

    def in_race(self, case: Case, direction: str) -> bool:
        """Tell whether it takes part: few do in the grid, and one compilation a task is enough."""
        if case.full:
            return direction == names.STEP or self.who != names.COMPILED
        if case.busy:
            return self.task != MIXUP and (self.ours or self.who == names.DENSE)
        tasks = (NTP, BOTH) if self.ours else (NTP,)
        return direction == names.STEP and not self.holds_logits and self.task in tasks


def find_providers(
    settings: Settings, compiled: bool = True
) -> tuple[list[Provider], dict[str, str]]:
    """Return everyone on every task, `torch.compile` if ``compiled``, and why one is left out."""
    found, left_out = [], dict[str, str]()
    for who, schedule in SCHEDULES.items():
        if settings.device == "cpu" and who != names.ROW_CHUNKS:
            left_out[who] = "needs a CUDA device"
            continue
        limit = FILTER_LIMIT if who == names.FILTERED else None
        for task, ours in OURS.items():
            loss = partial(ours, schedule=schedule)
            found.append(Provider(who, task, loss, ours=True, limit=limit))
    if not settings.peers:
        return found, left_out
    dense = {"limit": PEER_LIMIT, "holds_logits": True}
    found += [Provider(names.DENSE, task, loss, **dense) for task, loss in DENSE.items()]
    peers, absent = find_peers(settings.device, compiled)
    for peer, ntp in peers.items():
        limit = FILTER_LIMIT if peer.filters else PEER_LIMIT
        for task, composed in COMPOSED.items():
            loss = partial(composed, ntp=ntp)
            found.append(Provider(peer.who, task, loss, one_lam=task != NTP, limit=limit))
    if compiled:
        # Last, because where time runs out they are what it is worth the least for.
        losses = {task: torch.compile(loss, dynamic=False) for task, loss in DENSE.items()}
        found += [Provider(names.COMPILED, task, loss, **dense) for task, loss in losses.items()]
    else:
        absent[names.COMPILED] = COMPILES
    return found, {**left_out, **absent}


class Products:
    """The bare matrix products of NTP, into buffers made beforehand: nobody can be faster.

    Their chunks are 1,024 rows on the CPU, and as a rule all rows on a GPU. The gradients of
    the logits are real ones, since a product of mostly tiny numbers draws less power than one of
    random numbers, and so runs faster.
    """

    def __init__(self, x: Inputs) -> None:
        self.hidden, self.weight = x.hidden.detach(), x.weight.detach()
        rows, vocab_size = self.hidden.shape[0], self.weight.shape[0]
        chunk = min(rows, 8192 if x.hidden.is_cuda else 1024)
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


def measure(settings: Settings, results: Results) -> None:
    """Time everyone on every case."""
    compiled = not (settings.quick or settings.short)
    providers, left_out = find_providers(settings, compiled)
    if settings.short:
        providers = [one for one in providers if one.task != MIXUP and one.who in SHORT]
        left_out = {who: why for who, why in left_out.items() if who in SHORT}
    results.leave_out(left_out)
    for case in settings.cases():
        work = partial(race, case, providers, settings, results)
        results.attempt(case.name, work, ours=True)


def race(case: Case, providers: list[Provider], settings: Settings, results: Results) -> None:
    """Check everyone on one case, then time all that are right, with gradients and without."""
    x, figures = case_inputs(case, settings), dict[Provider, dict[str, Any]]()
    checked_rows = CHECKED_BYTES // (8 * x.weight.shape[0]) // 128 * 128
    few = x if checked_rows >= case.rows else case_inputs(case, settings, checked_rows)
    oracle = functools.cache(partial(oracle_of, few))
    for one in providers:
        if one.in_race(case, names.STEP):
            work = partial(checked, one, oracle, x, settings.device)
            found = results.attempt(f"{one.who}, {one.task}, {case.name}", work, one.ours)
            if found is not None:
                figures[one] = found
    del few, oracle
    for direction in (names.STEP, names.FORWARD) if case.full else (names.STEP,):
        work = partial(time_direction, case, direction, x, figures, settings, results)
        results.attempt(f"{case.name}, {direction}", work, ours=True)


def time_direction(
    case: Case,
    direction: str,
    x: Inputs,
    figures: Mapping[Provider, dict[str, Any]],
    settings: Settings,
    results: Results,
) -> None:
    """Time everyone in one direction in turns, with the bare products."""
    products, backward = Products(x), direction == names.STEP
    products.all_three()
    steps: dict[tuple[str, str], Callable[[], object]] = {
        (names.BARE, NTP): products.all_three if backward else products.forward
    }
    own: dict[tuple[str, str], dict[str, Any]] = {(names.BARE, NTP): {"ours": False}}
    for one, found in figures.items():
        if not one.in_race(case, direction):
            continue
        timed, key = call(one, x, direction), (one.who, one.task)
        # With gradients it was run to be checked; on a GPU memory is another now.
        warm = backward and settings.device == "cpu"
        name = f"{one.who}, {one.task}, {case.name}, {direction}"
        if warm or results.attempt(name, partial(runs, timed), one.ours):
            steps[key] = timed
            own[key] = {n: v for n, v in found.items() if backward or n != "peak_bytes"}
    with busy_process() if case.busy else nullcontext():
        samples = interleaved_samples(
            steps,
            settings.repeats if case.full else min(settings.repeats, GRID_REPEATS[settings.device]),
            settings.device,
            says=f"{case.name}, {direction}",
            warm=True,
            stop=lambda: settings.out_of_time,
        )
    shared = {
        "measure": direction,
        "case": case.name,
        "head": case.head,
        **settings.sizes(case.rows, *case.sizes, case.dtype),
        "inputs": case.inputs,
        **peakedness(x),
    }
    for (who, task), seconds in samples.items():
        amount = operations(task, x, backward)
        results.add_times(
            seconds, **shared, task=task, who=who, operations=amount, **own[who, task]
        )


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a process that computes on one core all the while, as a data loader or a browser does."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def call(one: Provider, x: Inputs, direction: str) -> Callable[[], object]:
    """Return what is timed: with gradients the loss and both of them, else only the loss."""
    values = x.given(one.one_lam)
    if direction == names.STEP:
        return lambda: step(one.loss, values)
    # Some peers look at the inputs to know whether gradients are wanted.
    constant = values._replace(hidden=values.hidden.detach(), weight=values.weight.detach())
    return torch.no_grad()(lambda: one.loss(constant))


def runs(work: Callable[[], object]) -> bool:
    """Run once; what cannot run raises."""
    work()
    return True


def case_inputs(case: Case, settings: Settings, most: int | None = None) -> Inputs:
    """Return all rows of a case, or at most as many."""
    rows = case.rows if most is None else min(case.rows, most)
    like = (getattr(torch, case.dtype) if case.dtype else settings.dtype, settings.device)
    return make_inputs(rows // 2, *case.sizes, *like, trained=case.inputs == TRAINED)


def oracle_of(x: Inputs, task: str, one_lam: bool) -> Oracle:
    """Return what a task is held to, computed with a single lam or one a pair."""
    return Oracle(ROWS[task], x.given(one_lam))


def checked(
    one: Provider, make: Callable[[str, bool], Oracle], x: Inputs, device: str
) -> dict[str, Any]:
    """Return errors against float64, and the timed step's peak over inputs and gradients.

    Raises:
        SuiteError: the errors are too large.
    """
    oracle = make(one.task, one.one_lam)
    run, kept = call(one, x, names.STEP), list[Any]()

    def keep() -> None:
        kept[:] = [run()]

    peak = peak_extra_bytes(keep, device)
    if oracle.x.labels.shape != x.labels.shape:
        kept[:] = [step(one.loss, oracle.x)]
    figures = oracle.check(kept.pop(), one.limit)
    return {"ours": one.ours, **figures, "peak_bytes": peak - x.hidden.nbytes - x.weight.nbytes}
