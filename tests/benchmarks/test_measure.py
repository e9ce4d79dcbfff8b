"""Times in turns, peaks, and facts."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import benchmarks.measure
from benchmarks.measure import SLOW_ROUNDS, facts, interleaved_samples
from tools.peak_memory import peak_extra_bytes


class Clock:
    """Stands in for the module `time`: it goes on only where a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class HostEvent:
    """Stands in for a CUDA event."""

    clock: Clock

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_times_are_of_the_step_and_not_of_what_prepares_it(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HostEvent.clock = Clock()
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(benchmarks.measure, "time", clock)
    order = []

    def step(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds

    steps = {"a": partial(step, "a", 1.0), "b": partial(step, "b", 2.0)}
    prepare = partial(step, "prepare", 64.0)

    samples = interleaved_samples(steps, 2, device, prepare)
    # A round to warm up, then two in turns.
    assert order[::2] == ["prepare"] * 6
    assert [sorted(order[first : first + 4 : 2]) for first in (1, 5, 9)] == [["a", "b"]] * 3
    assert samples == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    order.clear()
    assert len(interleaved_samples(steps, 3, device, prepare, warm=True)["b"]) == 3
    assert len(order) == 12


def test_who_is_slow_sits_out_when_its_time_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(benchmarks.measure, "time", clock)
    seconds = {"fast": 1.0, "four": 4.0, "slow": 4.5}

    def step(name: str) -> None:
        clock.now += seconds[name]

    samples = interleaved_samples({name: partial(step, name) for name in seconds}, 9)
    assert {name: len(found) for name, found in samples.items()} == {
        "fast": 9,
        "four": 9,
        "slow": SLOW_ROUNDS,
    }


def test_peak_counts_what_is_alive_at_once() -> None:
    def step() -> None:
        for _ in range(3):
            torch.empty(1000, 1000)

    assert peak_extra_bytes(step) == 4_000_000


def test_facts_name_the_machine_and_the_versions() -> None:
    found = facts()
    named = {"date", "commit", "machine", "cpu", "threads", "python", "torch", "triton"}
    assert named <= found.keys()
    assert found["torch"] == torch.__version__
    assert "transformers" in found["packages"]
    assert all(found["packages"].values())
