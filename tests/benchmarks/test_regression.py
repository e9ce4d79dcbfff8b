"""What is called slower, and what is noise."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from benchmarks import records as names
from benchmarks.regression import Interval, Line, compare, print_comparison

Report = dict[str, Any]
CASE = "small, N = 8, trained-like"
BOTH_OVER_BARE = (
    f"forward + backward, {CASE}, NTP + Mixup: sftmix, row_chunks / bare matrix products"
)
BOTH_OVER_DENSE = f"forward + backward, {CASE}, NTP + Mixup: sftmix, row_chunks / dense PyTorch"


def timed(measure: str, who: str, seconds: float, spread: float = 0.01, **fields: Any) -> Report:
    low, high = (1 - spread) * seconds, (1 + spread) * seconds
    times = {"median": seconds, "q1": low, "q3": high, "ours": who.startswith("sftmix")}
    return {"measure": measure, "who": who, **times, **fields}


def report(suite: str, records: list[Report], device: str = "cpu", quick: bool = False) -> Report:
    facts = {"commit": "abc", "cpu": "A", "torch": "2.13"}
    settings = {"device": device, "quick": quick}
    return {"suite": suite, "facts": facts, "settings": settings, "records": records}


def losses(seconds: float = 1.2, spread: float = 0.01) -> Report:
    both, ntp = ({"case": CASE, "task": task} for task in (names.BOTH, names.NTP))
    records = [
        timed(names.STEP, names.ROW_CHUNKS, seconds, spread, **both),
        timed(names.STEP, names.DENSE, 3.0, **both),
        timed(names.STEP, names.ROW_CHUNKS, 1.1, **ntp),
        timed(names.STEP, names.BARE, 1.0, **ntp),
    ]
    return report("loss", records)


def verdicts(run: Report, baseline: Report) -> dict[str, str]:
    return {line.says: line.verdict for line in compare(run, baseline)}


def test_the_same_run_is_as_before() -> None:
    lines = compare(losses(), losses())
    assert {line.verdict for line in lines} == {"as before"}
    found = {line.says: line.now for line in lines}
    assert len(found) == 3
    assert found[BOTH_OVER_BARE] == pytest.approx((1.188 / 1.01, 1.2, 1.212 / 0.99))
    assert found[BOTH_OVER_DENSE] == pytest.approx((1.188 / 3.03, 0.4, 1.212 / 2.97))


@pytest.mark.parametrize(
    ("seconds", "spread", "word"),
    [
        (1.8, 0.01, "slower"),
        (0.8, 0.01, "faster"),
        (1.45, 0.01, "as before"),  # outside of the quartiles, but not by enough
        (1.8, 0.40, "as before"),  # by enough, but within its own quartiles
        (0.8, 0.60, "as before"),
    ],
)
def test_slower_takes_both_quartiles_and_margin(seconds: float, spread: float, word: str) -> None:
    found = verdicts(losses(seconds, spread), losses())
    assert found[BOTH_OVER_BARE] == found[BOTH_OVER_DENSE] == word
    # What did not change is not blamed.
    assert list(found.values()).count("as before") == (3 if word == "as before" else 1)


def test_a_slow_machine_is_no_slow_code() -> None:
    slow = losses()
    for record in slow["records"]:
        for name in ("median", "q1", "q3"):
            record[name] *= 3
    assert set(verdicts(slow, losses()).values()) == {"as before"}


def test_noise_of_the_baseline_counts_too() -> None:
    assert verdicts(losses(1.8), losses(1.2, spread=0.6))[BOTH_OVER_BARE] == "as before"


def test_new_and_gone() -> None:
    fewer = losses()
    del fewer["records"][1]  # dense
    assert verdicts(losses(), fewer)[BOTH_OVER_DENSE] == "new"
    assert verdicts(fewer, losses())[BOTH_OVER_DENSE] == "gone"
    assert compare(report("loss", []), report("loss", [])) == []


@pytest.mark.parametrize("seconds", [math.nan, 0.0])
def test_what_cannot_be_divided_is_gone(seconds: float) -> None:
    broken = losses()
    for name in ("median", "q1", "q3"):
        broken["records"][3][name] = seconds
    assert verdicts(broken, losses())[BOTH_OVER_BARE] == "gone"


def test_the_edges_of_a_verdict() -> None:
    one = Interval(1.0, 1.0, 1.0)
    assert Line("any", Interval(1.25, 1.25, 1.25), one).verdict == "as before"
    assert Line("any", Interval(1.26, 1.26, 1.26), one).verdict == "slower"
    assert Line("any", Interval(0.8, 0.8, 0.8), one).verdict == "as before"
    assert Line("any", Interval(0.79, 0.79, 0.79), one).verdict == "faster"
    assert Line("any", Interval(0.9, 1.3, 1.4), one).verdict == "as before"


def test_ratios_of_the_other_suites() -> None:
    size = {"model": "1M", "batch": 4, "length": 32}
    times = {names.OUR_SFTMIX: 1.1, names.OUR_NTP: 1.0, names.THEIR_NTP: 2.0}
    steps = report("step", [timed("step", who, time, **size) for who, time in times.items()])
    found = {line.says: line.now.middle for line in compare(steps, steps) if line.now}
    where = "step, 1M, 4, 32: SFTMixTrainer"
    assert found == pytest.approx(
        {f"{where}, sftmix / {names.OUR_NTP}": 1.1, f"{where}, ntp / {names.THEIR_NTP}": 0.5}
    )
    chunks = (names.STREAMING, 1.1, "c"), (names.BARE_CHUNKS, 1.0, "c"), (names.BARE_CHUNKS, 9, "d")
    perplexity = report("perplexity", [timed("perplexity", w, t, case=c) for w, t, c in chunks])
    [line] = compare(perplexity, perplexity)
    assert line.now is not None
    assert line.now.middle == pytest.approx(1.1)


def test_memory_has_no_quartiles() -> None:
    size = {"rows": 8, "hidden_size": 4, "vocab_size": 16, "dtype": "float32", "task": names.NTP}
    record = {"measure": "memory", "who": names.ROW_CHUNKS, "formula_bytes": 100, **size}
    runs = [report("memory", [{**record, "peak_bytes": peak}]) for peak in (100, 110, 200)]
    assert set(verdicts(runs[1], runs[0]).values()) == {"as before"}
    assert set(verdicts(runs[2], runs[0]).values()) == {"slower"}


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"quick": True}, {"suite": "step"}])
def test_other_kinds_of_runs_are_refused(change: dict[str, Any]) -> None:
    other = report(**{"suite": "loss", "records": []} | change)
    with pytest.raises(ValueError, match="of the same"):
        compare(other, losses())


def test_printing_never_raises_on_slowness(capsys: pytest.CaptureFixture[str]) -> None:
    slow, before = losses(9.0), losses()
    slow["facts"] = copy.deepcopy(slow["facts"]) | {"torch": "2.14"}
    print_comparison(slow, before)
    text = capsys.readouterr().out
    assert "note: torch: 2.13 in the baseline, 2.14 now" in text
    assert "1 as before, 2 slower, 0 faster, 0 new, 0 gone" in text
    [line] = [line for line in text.splitlines() if BOTH_OVER_BARE in line]
    assert line.split()[:2] == ["slower", "9.000"]
