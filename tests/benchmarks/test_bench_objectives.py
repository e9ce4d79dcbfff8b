"""Every objective is its reference before it is timed, and its cost is told by rounds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import bench_objectives
from benchmarks.bench_loss import step
from benchmarks.bench_objectives import (
    IGNORED,
    dense_dft,
    find_cases,
    inputs_of,
    measure,
    objective_rows,
    our_objective,
    race,
)
from benchmarks.errors import Oracle
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.records import DENSE_DFT, DFT, NTP, OBJECTIVES, OUR_OBJECTIVES
from benchmarks.result_file import Results
from benchmarks.settings import PROMPTS, SMALL, Case, Settings

QUICK = Settings(quick=True)
TINY = Case("tiny", 64)


def tiny(prompts: bool = False) -> Inputs:
    x = make_inputs(16, 8, 50)
    x.labels[: 16 * prompts] = IGNORED
    return x


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ours_is_the_reference(objective: str, prompts: bool) -> None:
    x = tiny(prompts)
    oracle = Oracle(partial(objective_rows, objective=objective), x)
    oracle.check(step(partial(our_objective, objective=objective), x), 1e-5)
    if objective == DFT:
        oracle.check(step(dense_dft, x), 1e-5)


def test_objectives_differ() -> None:
    losses = {name: our_objective(tiny(), name).item() for name in OBJECTIVES}
    assert losses.pop("stats") == losses[NTP]
    assert len({round(loss, 3) for loss in losses.values()}) == len(losses)


def test_a_race_times_everyone_who_is_right(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Inputs, objective: str) -> Tensor:
        return (1.1 if objective == "EAFT" else 1.0) * our_objective(x, objective)

    monkeypatch.setattr(bench_objectives, "our_objective", wrong)
    race(TINY, QUICK, results)
    (failed,) = results.report["failed"]
    assert failed == f"sftmix, EAFT, {TINY.name}"
    found = {record["who"]: record for record in results.report["records"]}
    assert found.keys() == {*OUR_OBJECTIVES.values(), DENSE_DFT} - {"sftmix, EAFT"}
    for record in found.values():
        assert len(record["seconds"]) == record["rounds"] == 3
        assert record["peak_bytes"] > 0
        assert record["relative_error"] < 1e-5
    assert not found[DENSE_DFT]["ours"]


def test_half_of_the_rows_are_prompts_on_the_cpu(results: Results) -> None:
    assert find_cases(Settings()) == [SMALL, PROMPTS]
    assert [case.head for case in find_cases(Settings("cuda"))] == ["Llama-3.1-8B"]
    case = TINY._replace(prompts=True)
    assert (inputs_of(case, QUICK).labels == IGNORED).tolist() == [True] * 32 + [False] * 32
    measure(Settings(quick=True, peers=False, threads=1), results)
    assert results.report["failed"] == {}
    names = [(r["case"].endswith("prompts"), r["who"]) for r in results.report["records"]]
    ours = list(OUR_OBJECTIVES.values())
    assert names == [(False, who) for who in ours] + [(True, who) for who in ours[:2]]


def test_weights_are_not_all_one() -> None:
    x = tiny()
    plain, weighted = (our_objective(x, name) for name in (NTP, "row weights"))
    assert not torch.allclose(plain, weighted)
