"""A whole training step: SFTMix beside NTP, by our trainer and as a user would write them.

`step_methods.py` has the models and the methods, which are checked against each other first.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from functools import partial

import pytest
import torch

from .group import Group
from .measure import SuiteError, interleaved_samples, peak_extra_bytes
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
    is_ours,
    limit,
    make_steps,
    models,
)

METHODS = (OURS, OURS_NTP, OURS_TILES, DENSE, DENSE_NTP, LIGER)


def measure_steps(name: str, size: ModelSize, settings: Settings) -> Group:
    """All methods on one model: those that agree with the dense one, in turns."""
    group, device = Group(), settings.device
    difference = check(size, device, group)
    with tempfile.TemporaryDirectory() as folder:
        steps, left_out, facts = make_steps(size, device, folder)
        group.left_out |= left_out
        peaks = {}
        for who in difference:
            if settings.peers or is_ours(who):
                work = partial(weighed, who, steps[who], difference[who], device)
                peaks[who] = group.attempt(who, work, ours=is_ours(who))
        samples = interleaved_samples(
            {who: steps[who] for who, peak in peaks.items() if peak is not None},
            settings.repeats * size.turns,
            device,
            says=f"step of {name}",
            stop=lambda: settings.out_of_time,
        )
    for who, seconds in samples.items():
        group.add(
            who,
            seconds,
            measure="step",
            case=name,
            model=name,
            batch=size.batch,
            length=size.length,
            **facts,
            who=who,
            ours=is_ours(who),
            difference=difference[who],
            peak_bytes=peaks[who],
        )
    return group


def weighed(who: str, step: Callable[[], object], difference: float, device: str) -> int:
    """Peak of one step.

    Raises:
        SuiteError: the method is not the dense one's equal; NaN is not either.
    """
    if not difference <= limit(who, device):
        raise SuiteError(f"off by {difference:.3g}, allowed {limit(who, device):.3g}")
    return peak_extra_bytes(step, device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    names = list(models(option("device"), option("quick")))
    metafunc.parametrize("steps", names, indirect=True, scope="module")
    metafunc.parametrize("who", METHODS if option("peers") else (OURS, OURS_NTP, OURS_TILES))


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest, settings: Settings) -> Group:
    """All methods on one model, measured at once."""
    if settings.out_of_time:
        pytest.skip(f"out of time: {settings.seconds} s are over")
    gc.collect()
    if settings.device != "cpu":
        torch.cuda.empty_cache()
    size = models(settings.device, settings.quick)[request.param]
    return measure_steps(request.param, size, settings)


def test_step(steps: Group, who: str, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["steps"]
    steps.write(who, who if who in steps.left_out else f"{who}, {name}", request)
