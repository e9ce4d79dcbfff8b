"""Times in turns, peaks, and facts."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.measure import facts, interleaved_samples, peak_extra_bytes


class HostEvent:
    """Stands in for a CUDA event."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_times_are_of_the_step_and_not_of_what_prepares_it(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}

    def prepare() -> None:
        order.append("prepare")
        time.sleep(0.02)

    samples = interleaved_samples(steps, 2, device, prepare)
    # A round to warm up, then two in turns.
    assert order == ["prepare", "a", "prepare", "b"] * 3
    assert [len(times) for times in samples.values()] == [2, 2]
    assert max(samples["a"]) < 0.02
    order.clear()
    assert len(interleaved_samples(steps, 3, device, prepare, warm=True)["b"]) == 3
    assert len(order) == 12


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
