"""Predictions: they reproduce what was reckoned by hand, and every target on a GPU has its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import records as names
from benchmarks.__main__ import main
from benchmarks.predict import (
    BEST_PEER,
    BEST_PEER_SHAPE,
    COUNTED,
    GPUS,
    OBJECTIVE_ROWS,
    TODAY,
    bare_products,
    first_plan,
    goals,
    in_one_chunk,
    objective_plans,
    perplexity,
    plans,
    predictions,
    wave_share,
)
from benchmarks.records import BOTH, NTP
from benchmarks.report import predicted_section
from benchmarks.targets import PROMISES
from sftmix_kernels.peaks import Shape

H200, SHAPE = GPUS["H200"], BEST_PEER_SHAPE


def test_the_code_as_it_was_counted_takes_what_was_reckoned_by_hand() -> None:
    """By hand: 36.6 to 37.9 ms, 1.11 to 1.15 times the products; NTP 1.04 to 1.07 times a peer."""
    found, bare = plans(H200, SHAPE, COUNTED), bare_products(H200, SHAPE)
    assert 1e3 * bare.low == pytest.approx(32.9, abs=0.05)
    both, ntp = (first_plan(found, "row_chunks", task) for task in (BOTH, NTP))
    assert (1e3 * both.low, 1e3 * both.high) == pytest.approx((36.6, 37.9), abs=0.2)
    assert [round(both.low / bare.low, 2), round(both.high / bare.low, 2)] == [1.11, 1.15]
    assert [round(ntp.low / BEST_PEER, 2), round(ntp.high / BEST_PEER, 2)] == [1.04, 1.07]
    steps = {step.name: step for step in both.steps}
    kernel = steps["kernel of pair rows"]
    assert kernel.bytes / 1e9 == pytest.approx(6.3, abs=0.01)
    assert (1e3 * kernel.low, 1e3 * kernel.high) == pytest.approx((1.8, 2.1), abs=0.15)
    sums, scaled = steps["sums of dW in float32"], steps["dW scaled"]
    tiles = first_plan(found, "vocab_tiles", BOTH)
    assert tiles.steps[0].bytes / 1e9 == pytest.approx(134, abs=1)
    assert 70 < 1e3 * tiles.low < 1e3 * tiles.high < 90
    assert sums.bytes / 1e9 == scaled.bytes / 1e9 == pytest.approx(3.15, abs=0.01)


COMPILED = Path(__file__).parents[1] / "sftmix_kernels/compiled.json"


@pytest.mark.skipif(not COMPILED.exists(), reason="no table of compiled kernels")
@pytest.mark.parametrize(
    ("kernel", "blocks", "counted"),
    [
        ("pair_rows_kernel, bf16, sm_90", 1, TODAY.pair_rows),
        ("soft_rows_kernel, bf16, one target, sm_90", 2, TODAY.soft_rows),
    ],
)
def test_instructions_are_those_of_the_compiled_kernels(
    kernel: str, blocks: int, counted: int
) -> None:
    (program,) = json.loads(COMPILED.read_text("utf-8"))["programs"][kernel]
    ordinary = sum(few for _, few in program["loops"])
    assert counted == pytest.approx(blocks * ordinary, rel=0.03)


@pytest.mark.skipif(not COMPILED.exists(), reason="no table of compiled kernels")
def test_instructions_of_objectives_are_those_of_the_compiled_kernels() -> None:
    programs = json.loads(COMPILED.read_text("utf-8"))["programs"]
    for variant, (counted, _) in OBJECTIVE_ROWS.items():
        (program,) = programs[f"soft_rows_kernel, {variant}, sm_90"]
        assert counted == pytest.approx(sum(few for _, few in program["loops"]), rel=0.03), variant


def test_objectives_cost_what_ntp_does() -> None:
    alone = first_plan(plans(H200, SHAPE), "row_chunks", NTP)
    found = objective_plans(H200, SHAPE)
    assert {NTP, *found} == set(names.OBJECTIVES)
    assert found[names.WEIGHTED] == alone
    for plan in found.values():
        assert 1.0 <= plan.low / alone.low <= plan.high / alone.high <= 1.03
        assert plan.schedule == alone.schedule


def test_one_chunk_is_taken_as_long_as_it_holds_no_more() -> None:
    """N <= D + K in two-byte numbers; float32 never."""
    assert in_one_chunk(SHAPE)
    assert not in_one_chunk(SHAPE._replace(rows=8194))
    assert not in_one_chunk(SHAPE._replace(itemsize=4))
    few, many = (
        first_plan(plans(H200, SHAPE._replace(rows=rows)), "row_chunks", BOTH)
        for rows in (8192, 16384)
    )
    assert few.schedule == "row_chunks, one chunk"
    assert many.schedule == "row_chunks, chunks"
    assert not any("dW" in step.name for step in few.steps)
    assert 1e3 * (many.low - 2 * few.low) > 0.5


def test_perplexity_wastes_no_wave() -> None:
    assert wave_share(H200, 1664, 8192) == pytest.approx(0.788, abs=1e-3)
    for gpu in GPUS.values():
        assert perplexity(gpu, SHAPE).steps[0].low == pytest.approx(
            bare_products(gpu, SHAPE).low / 3
        )


def test_goals_name_the_step_that_holds_the_rest() -> None:
    both, ntp = goals(H200, SHAPE)
    assert "goal 1.08: reached" in both
    assert "goal 1.02: reached" in ntp
    assert both.endswith("ms are the kernel of pair rows.")
    assert all("MISSED" in line for line in goals(H200, SHAPE, COUNTED))
    # The peer was timed on one GPU and one shape.
    assert len(goals(GPUS["B200"], SHAPE)) == len(goals(H200, SHAPE._replace(rows=4096))) == 1


def test_a_faster_machine_is_faster() -> None:
    times = [first_plan(plans(gpu, SHAPE), "row_chunks", BOTH).low for gpu in GPUS.values()]
    assert sorted(times, reverse=True) == times


def test_every_target_on_a_gpu_has_a_line() -> None:
    section = predicted_section([])
    assert "Predicted, not measured" in section
    unknown = []
    for (device, _), promises in PROMISES.items():
        for says, *_ in promises if device == "cuda" else ():
            (line,) = [line for line in section.splitlines() if line.startswith(f"| {says} |")]
            _, _, guess, _, measured, _ = (one.strip() for one in line.split("|"))
            assert measured == "-"
            unknown += [says] * (guess == "-")
    # It depends on the data.
    assert unknown == ["filtered vocab_tiles / row_chunks, trained-like inputs"]
    assert not any("nan" in str(value) for value in predictions(H200, SHAPE).values())


def test_what_was_measured_stands_beside(cuda_loss: dict[str, object]) -> None:
    section = predicted_section([cuda_loss])
    (line,) = [one for one in section.splitlines() if one.startswith(f"| {BOTH} / {names.BARE}")]
    assert line.startswith(f"| {BOTH} / {names.BARE} | 1.0")
    assert line.endswith("| 1.250 |")


@pytest.fixture
def cuda_loss() -> dict[str, object]:
    case = {"measure": names.STEP, "case": "a case"}
    records = [
        {**case, "who": names.ROW_CHUNKS, "task": BOTH, "median": 1.25},
        {**case, "who": names.BARE, "task": NTP, "median": 1.0},
    ]
    settings = {"device": "cuda", "quick": False}
    return {"suite": "loss", "settings": settings, "facts": {}, "records": records}


def test_the_command_prints_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "512", "--hidden", "64", "--vocab", "1003"]
    assert main(["predict", "--gpu", "B200", "--copy", "7000", "--product", "1700", *sizes]) == 0
    told = capsys.readouterr().out
    assert "NVIDIA B200, N = 512, D = 64, V = 1003, bfloat16: predicted, not measured" in told
    for schedule in ("row_chunks, one chunk", "row_chunks, chunks", "vocab_tiles"):
        assert f"### {schedule}, {NTP}" in told
        assert f"### {schedule}, {BOTH}" in told
    assert "### streaming_perplexity, 512 x 1003" in told
    assert f"### row_chunks, one chunk, objectives of {NTP}" in told
    assert f"| {names.EAFT} | " in told
    with pytest.raises(SystemExit):
        main(["predict", "--rows", "0"])
    assert "argument --rows" in capsys.readouterr().err


def test_measured_ceilings_take_the_place_of_the_data_sheets() -> None:
    slow = H200._replace(product_rate=H200.product_rate / 2)
    assert bare_products(slow, SHAPE).low == pytest.approx(2 * bare_products(H200, SHAPE).low)
    assert plans(slow, Shape(16, 64, 99, 2))[0].low > 0
