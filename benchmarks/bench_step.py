"""A whole training step: SFTMix beside NTP, by our trainer and as a user would write them.

`step_methods.py` has the models and the methods, which are checked against each other first.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .measure import interleaved_samples, peak_extra_bytes
from .settings import Settings

# Trainers need it; a machine without it has all other suites.
pytest.importorskip("datasets", reason="datasets is not installed")

from .step_methods import (
    DENSE,
    DENSE_NTP,
    LIGER,
    OURS,
    OURS_NTP,
    OURS_TILES,
    ModelSize,
    check,
    limit,
    make_steps,
    models,
)

METHODS = (OURS, OURS_NTP, OURS_TILES, DENSE, DENSE_NTP, LIGER)


class Steps:
    """All methods on one model: how far they are from the dense one, peak memory, and times."""

    def __init__(self, name: str, size: ModelSize, settings: Settings) -> None:
        self.name, self.size = name, size
        self.difference = check(size, settings.device)
        self.limits = {who: limit(who, settings.device) for who in self.difference}
        with tempfile.TemporaryDirectory() as folder:
            steps, self.left_out, self.facts = make_steps(size, settings.device, folder)
            # NaN is not right.
            steps = {who: s for who, s in steps.items() if self.is_right(who)}
            self.peaks = {who: peak_extra_bytes(s, settings.device) for who, s in steps.items()}
            rounds = settings.repeats * size.turns
            says = f"step of {name}"
            self.samples = interleaved_samples(steps, rounds, settings.device, says=says)

    def is_right(self, who: str) -> bool:
        return self.difference[who] <= self.limits[who]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    names = list(models(option("device"), option("quick")))
    metafunc.parametrize("steps", names, indirect=True, scope="module")
    metafunc.parametrize("who", METHODS if option("peers") else (OURS, OURS_NTP, OURS_TILES))


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest, settings: Settings) -> Steps:
    if settings.out_of_time:
        pytest.skip(f"out of time: {settings.seconds} s are over")
    gc.collect()
    if settings.device != "cpu":
        torch.cuda.empty_cache()
    size = models(settings.device, settings.quick)[request.param]
    return Steps(request.param, size, settings)


def test_step(steps: Steps, who: str, request: pytest.FixtureRequest) -> None:
    name = who if who in steps.left_out else f"{who}, {steps.name}"
    request.node.user_properties.append(("name", name))
    if who in steps.left_out:
        pytest.skip(steps.left_out[who])
    if not steps.is_right(who):
        off = f"off by {steps.difference[who]:.3g}, allowed {steps.limits[who]:.3g}"
        (pytest.fail if who.startswith("SFTMix") else pytest.skip)(f"FAILED {off}")
    figures: dict[str, Any] = {
        "measure": "step",
        "case": steps.name,
        "model": steps.name,
        "batch": steps.size.batch,
        "length": steps.size.length,
        **steps.facts,
        "who": who,
        "ours": who.startswith("SFTMix"),
        "difference": steps.difference[who],
        "peak_bytes": steps.peaks[who],
    }
    record: Callable[..., None] = request.getfixturevalue("record")
    record(steps.samples[who], **figures)
