"""A step far above those before it is named, with the examples that it was made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from sftmix.training import spikes
from sftmix.training.spikes import FEWEST, WINDOW, Spikes
from sftmix.training.trainer import SFTMixTrainer
from tests.sftmix import tiny

STEP = 4


def after(values: list[float], threshold: float = 3.0) -> Spikes:
    """What has seen losses of these values, and norms of 1."""
    found = Spikes(threshold)
    for value in values:
        found.add(loss=value, norm=1.0)
    return found


def test_a_spike_is_more_than_k_deviations_above_the_mean() -> None:
    values = np.random.default_rng(0).normal(2.0, 0.5, FEWEST).tolist()
    limit = float(np.mean(values) + 3.0 * np.std(values, ddof=1))
    assert after(values).add(loss=limit - 1e-6, norm=1.0) == ""
    says = after(values).add(loss=limit + 1e-6, norm=1.0)
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    assert says == f"loss {limit:.4g} (mean {mean:.4g}, sd {deviation:.3g} of 20 steps)"
    assert after(values).add(loss=-50.0, norm=1.0) == ""


def test_the_norm_is_held_beside_its_own() -> None:
    found = Spikes(2.0)
    for step in range(FEWEST):
        found.add(loss=5.0 + step % 2, norm=1.0 + step % 2)
    assert found.add(loss=5.0, norm=9.0).startswith("gradient norm 9 (mean 1.5, sd 0.513 ")
    assert re.fullmatch(r"loss 50 \(.*\), gradient norm 60 \(.*\)", found.add(loss=50, norm=60))


def test_few_steps_say_nothing() -> None:
    assert after([1.0, 2.0] * (FEWEST // 2))._spike("loss", 1e6)
    assert not after([1.0, 2.0] * (FEWEST // 2 - 1))._spike("loss", 1e6)


def test_the_window_moves_on_and_keeps_spikes() -> None:
    found = after([0.0, 1000.0] * 30 + [1.0, 2.0] * (WINDOW // 2))
    assert found.add(loss=20.0, norm=1.0).startswith("loss 20 (mean 1.5, sd 0.503 of 100 steps)")
    assert found.add(loss=19.0, norm=1.0).startswith("loss 19 (mean 1.69, ")


def test_a_step_that_the_scaler_leaves_out_is_not_kept() -> None:
    found = after([1.0, 2.0] * FEWEST)
    found.add(loss=1.0, norm=float("inf"))
    assert max(found.seen["gradient norm"]) == 1.0


def test_it_travels_with_checkpoints(tmp_path: Path) -> None:
    whole, resumed = after([1.0, 2.0] * 70), Spikes(3.0)
    whole.save(tmp_path)
    resumed.load(tmp_path)
    assert resumed.seen == whole.seen
    assert resumed.seen["loss"].maxlen == WINDOW
    nothing = Spikes(3.0)
    nothing.load(tmp_path / "of a training without")
    assert not nothing.seen["loss"]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps are enough to hold a third beside."""
    monkeypatch.setattr(spikes, "FEWEST", 2)


def make(folder: Path, factor: float, **changes: Any) -> tuple[SFTMixTrainer, dict[int, list[int]]]:
    """A training of which one step has gradients ``factor`` times as large; ids of each step."""
    options = {"method": "ntp", "spike_threshold": 8.0, "learning_rate": 0.0, **changes}
    made = tiny.trainer(tiny.build("Llama"), folder, tiny.examples(24), **options)
    seen: dict[int, list[int]] = {}
    own = made.training_step

    def noting(model: Any, inputs: Any, *rest: Any) -> Tensor:
        seen.setdefault(made.state.global_step + 1, []).extend(inputs["ids"].tolist())
        return own(model, inputs, *rest)

    def hook(gradient: Tensor) -> Tensor:
        return gradient * factor if made.state.global_step + 1 == STEP else gradient

    made.training_step = noting  # type: ignore[method-assign]
    for weight in made.model.parameters():
        weight.register_hook(hook)
    return made, seen


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[int, list[int]]]:
    """Steps and examples of the warnings."""
    pattern = r"spike at step (\d+): gradient norm [\d.e+]+ \(mean .*\); examples \[([\d, ]+)\]"
    found = re.findall(pattern, caplog.text)
    return [(int(step), [int(one) for one in ids.split(",")]) for step, ids in found]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("windows", [1, 2])
def test_a_training_names_the_examples(
    windows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of all micro-batches of the step, and of no other."""
    options = {"gradient_accumulation_steps": windows, "num_train_epochs": windows}
    made, seen = make(tmp_path, 1e3, **options)
    made.train()
    assert told(caplog) == [(STEP, seen[STEP])]
    assert len(seen[STEP]) == 4 * windows


@pytest.mark.usefixtures("soon")
def test_a_resumed_training_holds_steps_beside_those_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    make(tmp_path, 1.0, **options)[0].train()
    assert not told(caplog)
    resumed, seen = make(tmp_path, 1e3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert told(caplog) == [(STEP, seen[STEP])]


@pytest.mark.usefixtures("soon")
def test_it_is_off_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, _ = make(tmp_path, 1e3, spike_threshold=None, save_strategy="steps", save_steps=3)
    made.train()
    assert "spike" not in caplog.text
    assert not list(tmp_path.rglob(Spikes.FILE))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_out_of_range(value: float, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^spike_threshold: expected a finite number above 0, got"
    ):
        tiny.config(tmp_path, spike_threshold=value)
