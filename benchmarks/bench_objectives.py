"""Time the objectives of NTP beside NTP alone: gates, GEM, label smoothing, row weights, stats.

Timed is `bench_loss.step`, forward and backward of `fused_cross_entropy` with each of `OPTIONS`, in
turns, beside DFT as users of LLaMA-Factory get it. There are two cases: all rows have labels, and
half of them are of prompts. Dense DFT makes logits of those, too; ours leaves them out. Each is
checked against float64 first. Figures: "objectives" in RESULTS.md.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import Entropy, Power, Threshold, fused_cross_entropy, reference

from . import records as names
from .bench_loss import PEER_LIMIT, Provider, call, case_inputs, checked
from .errors import Oracle
from .inputs import Inputs
from .measure import interleaved_samples
from .result_file import Results
from .settings import PROMPTS, Case, Settings

IGNORED = -100
# Rows that are checked: the reference in float64 takes three times as long as what is timed.
CHECKED_ROWS = 128
OPTIONS: dict[str, dict[str, Any]] = {
    names.NTP: {},
    names.DFT: {"gate": Power(1.0)},
    names.POWER: {"gate": Power(2.0)},
    names.THRESHOLD: {"gate": Threshold(0.1)},
    names.EAFT: {"gate": Entropy(1.0)},
    names.GEM: {"gem_beta": 0.7},
    names.SMOOTHED: {"label_smoothing": 0.1},
    names.WEIGHTED: {},
    names.WATCHED: {"stats": True},
}
# Who takes part where half of the rows are of prompts.
FEW = (names.NTP, names.DFT)


def options_of(objective: str, x: Inputs) -> dict[str, Any]:
    """Return the options of an objective, with weights from 0.5 to 1.5 where it has those."""
    if objective != names.WEIGHTED:
        return OPTIONS[objective]
    size = x.labels.numel()
    return {"row_weight": torch.linspace(0.5, 1.5, size, device=x.labels.device)}


def our_objective(x: Inputs, objective: str) -> Tensor:
    """Compute an objective by our op."""
    options = options_of(objective, x)
    found = fused_cross_entropy(x.hidden, x.weight, x.labels, **options)
    loss: Tensor = found[0] if "stats" in options else found
    return loss


def dense_dft(x: Inputs) -> Tensor:
    """Compute DFT as `use_dft_loss` of LLaMA-Factory does: float32 logits of all rows at once."""
    logits = F.linear(x.hidden, x.weight).float()
    losses = F.cross_entropy(logits, x.labels, ignore_index=IGNORED, reduction="none")
    counted = losses[x.labels != IGNORED]
    return (counted * torch.exp(-counted.detach())).mean()


def objective_rows(x: Inputs, objective: str) -> Tensor:
    """Return the reference of an objective, as what adds up to the loss."""
    options = {k: v for k, v in options_of(objective, x).items() if k != "stats"}
    rows: Tensor = reference.cross_entropy(
        x.hidden, x.weight, x.labels, reduction="none", **options
    )
    return rows / (x.labels != IGNORED).sum()


def find_providers(case: Case, settings: Settings) -> list[Provider]:
    """Return who takes part in a case."""
    found = [
        Provider(names.OUR_OBJECTIVES[one], one, partial(our_objective, objective=one), ours=True)
        for one in (FEW if case.prompts else names.OBJECTIVES)
    ]
    if settings.peers:
        dense = Provider(names.DENSE_DFT, names.DFT, dense_dft, limit=PEER_LIMIT)
        found.append(dense._replace(holds_logits=True))
    return found


def find_cases(settings: Settings) -> list[Case]:
    """Return the headline of losses, and on the CPU the same with prompts.

    Elsewhere all rows are multiplied, since the host would wait to know which have labels.
    """
    first = settings.cases()[0]
    if settings.device != "cpu":
        return [first]
    return [first, first._replace(prompts=True) if settings.quick else PROMPTS]


def inputs_of(case: Case, settings: Settings, most: int | None = None) -> Inputs:
    """Return all rows of a case, or at most as many."""
    x = case_inputs(case, settings, most)
    if case.prompts:
        x.labels[: x.labels.numel() // 2] = IGNORED
    return x


def measure(settings: Settings, results: Results) -> None:
    """Time all objectives on every case."""
    for case in find_cases(settings):
        work = partial(race, case, settings, results)
        results.attempt(case.name, work, ours=True)


def race(case: Case, settings: Settings, results: Results) -> None:
    """Check everyone on one case, then time all that are right, in turns."""
    x, few = inputs_of(case, settings), inputs_of(case, settings, CHECKED_ROWS)

    @functools.cache
    def oracle(objective: str, _: bool) -> Oracle:
        return Oracle(partial(objective_rows, objective=objective), few)

    figures, steps = dict[str, dict[str, Any]](), {}
    for one in find_providers(case, settings):
        work = partial(checked, one, oracle, x, settings.device)
        found = results.attempt(f"{one.who}, {case.name}", work, one.ours)
        if found is not None:
            figures[one.who], steps[one.who] = found, call(one, x, names.STEP)
    samples = interleaved_samples(
        steps,
        settings.repeats,
        settings.device,
        says=case.name,
        warm=settings.device == "cpu",
        stop=lambda: settings.out_of_time,
    )
    shared = {
        "measure": names.OBJECTIVE,
        "case": case.name,
        "head": case.head,
        **settings.sizes(case.rows, *case.sizes),
        "inputs": case.inputs,
    }
    for who, seconds in samples.items():
        results.add_times(seconds, **shared, who=who, **figures[who])
