"""Time NTP, Mixup and NTP + Mixup: ours beside what a user would write or pick instead.

`providers.py` has what is timed. Each provider is checked against float64 and weighed, then all
that are right take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tools.peak_memory import peak_extra_bytes

from .errors import Oracle, step
from .inputs import Inputs, make_inputs, peakedness
from .measure import SuiteError, interleaved_samples
from .providers import Products, Provider, find_providers, operations
from .records import BARE, COMPILED, FORWARD, NTP, STEP
from .result_file import OUT_OF_TIME, Results
from .settings import TRAINED, Case, Settings

# Bytes of the float64 logits that errors are held to: at any size here two of our chunks at least.
CHECKED_BYTES = 2**33
GRID_REPEATS = 5


def measure(settings: Settings, results: Results) -> None:
    """Time everyone on every case."""
    providers, left_out = find_providers(settings, compiled=not settings.quick)
    results.leave_out(left_out)
    for case in settings.cases():
        if settings.out_of_time:
            results.miss("left_out", case.name, OUT_OF_TIME)
        else:
            work = partial(race, case, providers, settings, results)
            results.attempt(case.name, work, ours=True)


def race(case: Case, providers: list[Provider], settings: Settings, results: Results) -> None:
    """Check everyone on one case, then time all that are right, with gradients and without."""
    x, figures = case_inputs(case, settings), dict[Provider, dict[str, Any]]()
    checked_rows = CHECKED_BYTES // (8 * x.weight.shape[0]) // 128 * 128
    few = x if checked_rows >= case.rows else case_inputs(case, settings, checked_rows)
    oracles: dict[tuple[str, bool], Oracle] = {}
    for one in providers:
        if not in_race(one, case, STEP):
            continue
        name = f"{one.who}, {one.task}, {case.name}"
        if settings.out_of_time:
            results.miss("left_out", name, OUT_OF_TIME)
            continue
        kind = (one.task, one.one_lam)
        if kind not in oracles:
            oracles[kind] = Oracle(one.task, one.inputs(few))
        work = partial(checked, one, oracles[kind], x, settings.device)
        found = results.attempt(name, work, one.ours)
        if found is not None:
            figures[one] = found
    del few, oracles
    for direction in (STEP, FORWARD) if case.full else (STEP,):
        if settings.out_of_time:
            results.miss("left_out", f"{case.name}, {direction}", OUT_OF_TIME)
        else:
            time_direction(case, direction, x, figures, settings, results)


def time_direction(
    case: Case,
    direction: str,
    x: Inputs,
    figures: Mapping[Provider, dict[str, Any]],
    settings: Settings,
    results: Results,
) -> None:
    """Time everyone in one direction in turns, with the bare products."""
    products, backward = Products(x), direction == STEP
    products.all_three()
    steps: dict[tuple[str, str], Callable[[], object]] = {
        (BARE, NTP): products.all_three if backward else products.forward
    }
    own: dict[tuple[str, str], dict[str, Any]] = {(BARE, NTP): {"ours": False}}
    for one, found in figures.items():
        if not in_race(one, case, direction):
            continue
        timed = call(one, x, direction)
        # With gradients it was run to be checked; on a GPU memory is another now.
        warm = backward and settings.device == "cpu"
        name = f"{one.who}, {one.task}, {case.name}, {direction}"
        if warm or results.attempt(name, partial(runs, timed), one.ours):
            steps[one.key] = timed
            own[one.key] = {n: v for n, v in found.items() if backward or n != "peak_bytes"}
    samples = interleaved_samples(
        steps,
        settings.repeats if case.full else min(settings.repeats, GRID_REPEATS),
        settings.device,
        says=f"{case.name}, {direction}",
        warm=True,
        stop=lambda: settings.out_of_time,
    )
    shared = {
        "measure": direction,
        "case": case.name,
        "head": case.head,
        **settings.sizes(case.rows, *case.sizes),
        "inputs": case.inputs,
        **peakedness(x),
    }
    for (who, task), seconds in samples.items():
        amount = operations(task, x, backward)
        results.add_times(
            seconds, **shared, task=task, who=who, operations=amount, **own[who, task]
        )


def call(one: Provider, x: Inputs, direction: str) -> Callable[[], object]:
    """Return what is timed: with gradients the loss and both of them, else only the loss."""
    values = one.inputs(x)
    if direction == STEP:
        return lambda: step(one.loss, values)
    # Some peers look at the inputs to know whether gradients are wanted.
    constant = values._replace(hidden=values.hidden.detach(), weight=values.weight.detach())

    def forward() -> object:
        with torch.no_grad():
            return one.loss(constant)

    return forward


def runs(work: Callable[[], object]) -> bool:
    """Run once; what cannot run raises."""
    work()
    return True


def case_inputs(case: Case, settings: Settings, most: int | None = None) -> Inputs:
    """Return all rows of a case, or at most as many."""
    rows = case.rows if most is None else min(case.rows, most)
    like = (settings.dtype, settings.device)
    return make_inputs(rows // 2, *case.sizes, *like, trained=case.inputs == TRAINED)


def checked(one: Provider, oracle: Oracle, x: Inputs, device: str) -> dict[str, Any]:
    """Return errors against float64, and the timed step's peak over inputs and gradients.

    Raises:
        SuiteError: the errors are too large.
    """
    run, kept = call(one, x, STEP), list[Any]()

    def keep() -> None:
        kept[:] = [run()]

    peak = peak_extra_bytes(keep, device)
    if oracle.x.labels.shape != x.labels.shape:
        kept[:] = [step(one.loss, oracle.x)]
    found = oracle.errors(kept.pop())
    if not found.passed(one.limit):
        raise SuiteError(found.says(one.limit))
    return {
        "ours": one.ours,
        "loss_error": found.largest[0],
        "relative_error": max(found.relative[1:]),
        "error_of_dense": found.of_dense(),
        "peak_bytes": peak - x.hidden.nbytes - x.weight.nbytes,
    }


def in_race(one: Provider, case: Case, direction: str) -> bool:
    """Tell whether it takes part: few do in the grid, and one compilation a task is enough."""
    if not case.full:
        return one.in_grid() and direction == STEP
    return direction == STEP or one.who != COMPILED
