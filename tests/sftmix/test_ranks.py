"""Two gloo processes train, score and stop as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import tiny
from .ranks_worker import CASES, RANKS, TRAININGS

ROOT = Path(__file__).parents[2]
# In float32: gradients relative to the largest of their tensor, losses relative to themselves.
CLOSE = 1e-6
# With updates in between, gradients part by more than one rounding.
LEARNING = ("ddp, learning", "fsdp, learning")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What every rank found, and what one process finds meanwhile."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.sftmix.ranks_worker", str(folder)]
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launched:
        alone = {name: case(folder / f"alone, {name}") for name, case in CASES.items()}
        output, _ = launched.communicate(timeout=240)
    assert launched.returncode == 0, output
    return [torch.load(folder / f"rank{number}.pt") for number in range(RANKS)], alone


Both = tuple[list[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("scoring", *LEARNING)])
def test_gradients_are_those_of_one_process(name: str, both: Both) -> None:
    ranks, alone = both
    expected = alone[name]["gradients"]
    for found in ranks:
        assert len(found[name]["gradients"]) == len(expected)
        for step, expected_step in zip(found[name]["gradients"], expected, strict=True):
            assert step.keys() == expected_step.keys()
            for weight, gradient in expected_step.items():
                assert tiny.relative_difference(step[weight], gradient) <= CLOSE, weight
        if "loss" in alone[name]:
            assert found[name]["loss"] == pytest.approx(alone[name]["loss"], rel=CLOSE)


@pytest.mark.parametrize("name", [*TRAININGS, *LEARNING])
def test_logs_and_evaluation_are_those_of_one_process(name: str, both: Both) -> None:
    """Steps, epochs, losses, lam and truncated tokens: what fills up a batch is not counted."""
    ranks, alone = both
    for found in ranks:
        for line, expected in zip(found[name]["logs"], alone[name]["logs"], strict=True):
            assert line == pytest.approx(expected, rel=CLOSE)
        assert found[name]["eval_loss"] == pytest.approx(alone[name]["eval_loss"], rel=CLOSE)


@pytest.mark.parametrize("name", LEARNING)
def test_weights_are_those_of_one_process(name: str, both: Both) -> None:
    ranks, alone = both
    assert not tiny.same(alone[name]["weights"], tiny.weights(tiny.build("Llama")))
    for found in ranks:
        for weight, expected in alone[name]["weights"].items():
            difference = tiny.relative_difference(found[name]["weights"][weight], expected)
            assert difference <= CLOSE, weight


def test_shared_scores_are_those_of_one_process(both: Both) -> None:
    ranks, alone = both
    for found in ranks:
        for sums in ("nll", "tokens", "resumed"):
            assert torch.equal(found["scoring"][sums], alone["scoring"][sums])
        assert torch.equal(found["scoring"]["resumed"], found["scoring"]["nll"])
    # Each has called the model as often as the other, and none scored what was scored already.
    calls = [found["scoring"]["forwards"] for found in ranks]
    assert calls[0] == calls[1] == -(-alone["scoring"]["forwards"] // 2)


@pytest.mark.parametrize("name", ["ddp, resumed", "fsdp, resumed"])
def test_a_resumed_training_is_the_unbroken_one(name: str, both: Both) -> None:
    for found in both[0]:
        (losses, weights), (losses_after, weights_after) = found[name].values()
        assert losses_after == losses
        assert tiny.same(weights_after, weights)


def test_a_loss_that_is_not_finite_stops_all_ranks(both: Both) -> None:
    first, second = (found["stopped"] for found in both[0])
    assert first["nan"] == (
        "RankError: the loss of another rank is not finite at step 2; the model was not updated"
    )
    expected = f"FloatingPointError: loss is nan at step 2, examples {second['ids']}; the model"
    assert second["nan"].startswith(expected)
    for told in (first, second):
        assert told["untouched"]
        assert told["steps"] == 1


@pytest.mark.parametrize(
    ("name", "message"), [("mu", "got 0.25 on rank 0 and 0.75 on rank 1"), ("train_dataset", "got")]
)
def test_ranks_that_differ_are_refused(name: str, message: str, both: Both) -> None:
    first, second = (found["stopped"][name.removeprefix("train_")[:4]] for found in both[0])
    said = f"{name}: expected the same on all ranks, {message}"
    assert first.startswith(f"ValueError: {said}")
    assert second.startswith(f"RankError: rank 0: {said}")
