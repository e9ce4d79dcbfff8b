"""Everyone on one case: checked, then weighed, then timed in turns."""

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
CHECKED_ROWS = 256
GRID_REPEATS = 5

Race = dict[str, Group]  # by measure; in a group by who and task


def run_race(
    case: Case, providers: list[Provider], left_out: Mapping[str, str], settings: Settings
) -> Race:
    """The figures of all who are right."""
    noted = Group({(who, task): why for who, why in left_out.items() for task in TASKS})
    few, figures = case_inputs(case, settings, CHECKED_ROWS), {}
    oracles: dict[tuple[str, bool], Oracle] = {}
    for one in providers:
        if in_race(one, case, BACKWARD):
            kind = (one.task, one.one_lam)
            if kind not in oracles:
                oracles[kind] = Oracle(one.task, one.inputs(few))
            found = noted.attempt(one.key, partial(checked, one, oracles[kind]), one.ours)
            if found is not None:
                figures[one] = found
    del few, oracles
    x = case_inputs(case, settings)
    for one in list(figures):
        peak = noted.attempt(one.key, partial(weighed, one, x, settings.device), one.ours)
        if peak is None:
            del figures[one]
        else:
            figures[one]["peak_bytes"] = peak
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
    runs = {one.key: one for one in figures if in_race(one, case, measure)}
    products = Products(x)
    products.all_three()
    bare = products.all_three if measure == BACKWARD else products.forward
    steps: dict[tuple[str, str], Callable[[], object]] = {(BARE, NTP): bare}
    steps |= {key: call(one, x, measure) for key, one in runs.items()}
    says = f"{case.name}, {measure}"
    repeats = settings.repeats if case.full else min(settings.repeats, GRID_REPEATS)
    # Weighing has run everyone with gradients.
    warm = measure == BACKWARD
    samples = interleaved_samples(steps, repeats, settings.device, says=says, warm=warm)
    shared = {**case_facts(case, settings), **peakedness(x), "measure": measure}
    for (who, task), seconds in samples.items():
        own = dict(figures[runs[who, task]]) if (who, task) in runs else {"ours": False}
        if measure == FORWARD:
            own.pop("peak_bytes", None)
        amount = operations(task, x, measure == BACKWARD)
        group.add((who, task), seconds, **shared, task=task, who=who, operations=amount, **own)
    return group


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


def checked(one: Provider, oracle: Oracle) -> dict[str, Any]:
    """Errors against float64.

    Raises:
        SuiteError: they are too large.
    """
    found = oracle.errors(one.loss)
    if not found.passed(one.limit):
        raise SuiteError(found.says(one.limit))
    return {
        "ours": one.ours,
        "loss_error": found.largest[0],
        "relative_error": max(found.relative[1:]),
        "error_of_dense": found.of_dense(),
    }


def weighed(one: Provider, x: Inputs, device: str) -> int:
    """The peak of the step that is timed, over its inputs and gradients; also its warm-up."""
    peak = peak_extra_bytes(call(one, x, BACKWARD), device)
    return peak - x.hidden.nbytes - x.weight.nbytes


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

    def forward() -> object:
        with torch.no_grad():
            return one.loss(values)

    return forward
