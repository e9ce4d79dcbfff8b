"""Time a whole training step: SFTMix beside NTP, by our trainer and as a user would write them.

`step_methods.py` has the models and the methods, which are checked against each other first.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from functools import partial

import torch

from tools.peak_memory import peak_extra_bytes

from .measure import SuiteError, interleaved_samples
from .result_file import OUT_OF_TIME, Results
from .settings import Settings
from .step_methods import ModelSize, check, is_ours, limit, make_steps, models


def measure(settings: Settings, results: Results) -> None:
    """Time the steps of every model."""
    for name, size in models(settings.device, settings.quick).items():
        if settings.out_of_time:
            results.miss("left_out", f"steps of {name}", OUT_OF_TIME)
            continue
        gc.collect()
        if settings.device != "cpu":
            torch.cuda.empty_cache()
        work = partial(measure_steps, name, size, settings, results)
        results.attempt(f"steps of {name}", work, ours=True)


def measure_steps(name: str, size: ModelSize, settings: Settings, results: Results) -> None:
    """Time all methods on one model that agree with the dense one, in turns."""
    device = settings.device
    difference = check(size, device, results)
    with tempfile.TemporaryDirectory() as folder:
        steps, left_out, facts = make_steps(size, device, folder)
        results.leave_out(left_out)
        peaks = {}
        for who in difference:
            if settings.peers or is_ours(who):
                work = partial(weighed, who, steps[who], difference[who], device)
                peaks[who] = results.attempt(f"{who}, {name}", work, ours=is_ours(who))
        samples = interleaved_samples(
            {who: steps[who] for who, peak in peaks.items() if peak is not None},
            settings.repeats * size.turns,
            device,
            says=f"step of {name}",
            stop=lambda: settings.out_of_time,
        )
    for who, seconds in samples.items():
        results.add_times(
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


def weighed(who: str, step: Callable[[], object], difference: float, device: str) -> int:
    """Return the peak of one step.

    Raises:
        SuiteError: the method differs from the dense one, or by NaN.
    """
    if not difference <= limit(who, device):
        raise SuiteError(f"off by {difference:.3g}, allowed {limit(who, device):.3g}")
    return peak_extra_bytes(step, device)
