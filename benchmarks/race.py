"""Everyone on one case: checked and weighed, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .errors import Oracle, step
from .group import Group
from .inputs import Inputs, make_inputs, peakedness
from .measure import SuiteError, interleaved_samples, peak_extra_bytes
from .providers import BARE, COMPILED, NTP, TASKS, Products, Provider, operations
from .settings import TRAINED, Case, Settings

BACKWARD, FORWARD = "forward + backward", "forward"
MEASURES = (BACKWARD, FORWARD)
# Bytes of the float64 logits that errors are held to: at any size here two of our chunks at least.
CHECKED_BYTES = 2**33
GRID_REPEATS = 5
OUT_OF_TIME = "out of time"

Race = dict[str, Group]  # by measure; in a group by who and task


def run_race(
    case: Case, providers: list[Provider], left_out: Mapping[str, str], settings: Settings
) -> Race:
    """The figures of all who are right."""
    noted = Group({(who, task): why for who, why in left_out.items() for task in TASKS})
    x, figures = case_inputs(case, settings), {}
    checked_rows = CHECKED_BYTES // (8 * x.weight.shape[0]) // 128 * 128
    few = x if checked_rows >= case.rows else case_inputs(case, settings, checked_rows)
    oracles: dict[tuple[str, bool], Oracle] = {}
    for one in providers:
        if not in_race(one, case, BACKWARD):
            continue
        if settings.out_of_time:
            noted.left_out[one.key] = OUT_OF_TIME
            continue
        kind = (one.task, one.one_lam)
        if kind not in oracles:
            oracles[kind] = Oracle(one.task, one.inputs(few))
        work = partial(checked, one, oracles[kind], x, settings.device)
        found = noted.attempt(one.key, work, one.ours)
        if found is not None:
            figures[one] = found
    del few, oracles
    return {
        measure: timed(case, measure, x, figures, noted, settings)
        for measure in (MEASURES if case.full else (BACKWARD,))
    }


def timed(
    case: Case,
    measure: str,
    x: Inputs,
    figures: Mapping[Provider, dict[str, Any]],
    noted: Group,
    settings: Settings,
) -> Group:
    """One direction in turns, with the bare products."""
    group = Group(noted.left_out, noted.failed)
    entered = {one.key: one for one in figures if in_race(one, case, measure)}
    products = Products(x)
    products.all_three()
    bare = products.all_three if measure == BACKWARD else products.forward
    steps: dict[tuple[str, str], Callable[[], object]] = {(BARE, NTP): bare}
    for key, one in entered.items():
        step_of = call(one, x, measure)
        # With gradients it was run to be checked; on a GPU memory is another now.
        warm = measure == BACKWARD and settings.device == "cpu"
        if warm or group.attempt(key, partial(runs, step_of), one.ours):
            steps[key] = step_of
    samples = interleaved_samples(
        steps,
        settings.repeats if case.full else min(settings.repeats, GRID_REPEATS),
        settings.device,
        says=f"{case.name}, {measure}",
        warm=True,
        stop=lambda: settings.out_of_time,
    )
    shared = {**case_facts(case, settings), **peakedness(x), "measure": measure}
    for (who, task), seconds in samples.items():
        own = dict(figures[entered[who, task]]) if (who, task) in entered else {"ours": False}
        if measure == FORWARD:
            own.pop("peak_bytes", None)
        amount = operations(task, x, measure == BACKWARD)
        group.add((who, task), seconds, **shared, task=task, who=who, operations=amount, **own)
    return group


def runs(work: Callable[[], object]) -> bool:
    """Once, or it raises."""
    work()
    return True


def case_inputs(case: Case, settings: Settings, most: int | None = None) -> Inputs:
    """All rows, or at most as many."""
    rows = case.rows if most is None else min(case.rows, most)
    like = (settings.dtype, settings.device)
    return make_inputs(rows // 2, *case.sizes, *like, trained=case.inputs == TRAINED)


def case_facts(case: Case, settings: Settings) -> dict[str, Any]:
    """What is alike in all records of a case."""
    hidden_size, vocab_size = case.sizes
    return {
        "case": case.name,
        "head": case.head,
        "rows": case.rows,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "inputs": case.inputs,
    }


def checked(one: Provider, oracle: Oracle, x: Inputs, device: str) -> dict[str, Any]:
    """Errors against float64, and the peak of the step that is timed, over inputs and gradients.

    Raises:
        SuiteError: the errors are too large.
    """
    run, kept = call(one, x, BACKWARD), []

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


def in_race(one: Provider, case: Case, measure: str) -> bool:
    """Few take part in the grid, and compiling once for each task is long enough."""
    if not case.full:
        return one.in_grid() and measure == BACKWARD
    return measure == BACKWARD or one.who != COMPILED


def call(one: Provider, x: Inputs, measure: str) -> Callable[[], object]:
    """What is timed: with gradients the loss and both of them, else the loss alone."""
    values = one.inputs(x)
    if measure == BACKWARD:
        return lambda: step(one.loss, values)
    # Some peers look at the inputs to know whether gradients are wanted.
    hidden, weight = values.hidden.detach(), values.weight.detach()
    constant = values._replace(hidden=hidden, weight=weight)

    def forward() -> object:
        with torch.no_grad():
            return one.loss(constant)

    return forward
