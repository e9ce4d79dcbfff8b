"""Time a training step with entropy and accuracy of every token, and one without.

Timed is `bench_step.one_step` of NTP by `SFTMixTrainer`, twice with one trainer: as it is, and with
a loss that is asked for no `TokenStats`. What the trainer adds up of them for its log is in the
time. Figures: "objectives" in RESULTS.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import sftmix.training.loss
from sftmix_kernels import TokenStats, fused_cross_entropy

from . import records as names
from .bench_step import (
    LIMITS,
    MODELS,
    NTP,
    QUICK,
    Method,
    ModelSize,
    difference,
    loss_and_gradients,
    make_batch,
    make_model,
    one_step,
    our_trainer,
)
from .measure import SuiteError, interleaved_samples
from .result_file import Results
from .settings import Settings

# Rounds of each model: what is judged is a percent.
ROUNDS = {"quick": 3, "1M": 60, "60M": 15, "0.27B": 30, "1B": 20}


def without_stats(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, stats: bool, **options: Any
) -> tuple[Tensor, TokenStats]:
    """Compute the loss alone, and say that nothing is known of tokens; of their NLL that it is 0,
    which the trainer cannot do without."""
    assert stats, "the trainer asks for them"
    loss = fused_cross_entropy(hidden, weight, labels, **options)
    nothing: Any = None
    return loss, TokenStats(labels.new_zeros(labels.shape, dtype=torch.float32), nothing, nothing)


class Unwatched(Method):
    """A method whose loss finds neither entropy nor accuracy."""

    def backward(self) -> Tensor:
        """Run forward and backward as the trainer does, without stats of the loss."""
        with patch.object(sftmix.training.loss, "fused_cross_entropy", without_stats):
            return super().backward()


def measure(settings: Settings, results: Results) -> None:
    """Time the steps of every model."""
    sizes = {"quick": QUICK} if settings.quick else MODELS[settings.device]
    for name, size in sizes.items():
        if name in ROUNDS:
            work = partial(measure_steps, name, size, settings, results)
            results.attempt(f"watched steps of {name}", work, ours=True)


def measure_steps(name: str, size: ModelSize, settings: Settings, results: Results) -> None:
    """Time both steps on one model in turns, if they train alike."""
    model, batch = make_model(size, settings.device), make_batch(size, settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6, weight_decay=0.1, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "per_device_train_batch_size": size.batch,
            "use_cpu": settings.device == "cpu",
            "disable_tqdm": True,
            "report_to": "none",
        }
        trainer = our_trainer(model, size, options, method="ntp")
        watched = Method(NTP, trainer, batch)
        methods = {names.OUR_NTP: watched, names.UNWATCHED: Unwatched(NTP, trainer, batch)}
        found = [loss_and_gradients(model, method) for method in methods.values()]
        far = difference(*found)
        if not far <= LIMITS[settings.device]:
            raise SuiteError(f"the two steps are {far:.3g} apart")
        del found
        steps: dict[str, Callable[[], object]] = {
            who: partial(one_step, method, optimizer) for who, method in methods.items()
        }
        samples = interleaved_samples(
            steps,
            ROUNDS[name],
            settings.device,
            says=f"watched step of {name}",
            stop=lambda: settings.out_of_time,
        )
    size_of = {"model": name, "batch": size.batch, "length": size.length}
    for who, seconds in samples.items():
        results.add_times(
            seconds,
            measure=names.WATCHING,
            case=name,
            **size_of,
            who=who,
            ours=True,
        )
