"""How a schedule is chosen, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftmix_kernels import RowChunks, VocabTiles
from sftmix_kernels.schedules import Schedule, resolve_schedule

ANYTHING = torch.empty(1, 1)


@pytest.mark.parametrize(
    ("schedule", "vocab_size", "rows"),
    [
        (RowChunks(), 1000, 512),
        (RowChunks(rows=1), 1000, 16),
        (RowChunks(rows=41), 1000, 40),
        (RowChunks(rows=300), 1000, 256),
        (RowChunks(max_bytes=4 * 1000 * 200), 1000, 128),
        (RowChunks(max_bytes=1), 1000, 16),
    ],
)
def test_rows_of_a_chunk(schedule: RowChunks, vocab_size: int, rows: int) -> None:
    assert schedule.rows_for(ANYTHING, vocab_size) == rows


def test_auto_is_row_chunks() -> None:
    whole = RowChunks().rows_for(ANYTHING, 1000)
    assert resolve_schedule("auto", ANYTHING, 1000) == whole
    assert resolve_schedule("row_chunks", ANYTHING, 1000) == whole
    assert resolve_schedule(RowChunks(rows=32), ANYTHING, 1000) == 32


@pytest.mark.parametrize("schedule", ["vocab_tiles", VocabTiles()])
def test_vocabulary_tiles_need_a_device_for_them(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="schedule: 'vocab_tiles' needs a CUDA device, got cpu"):
        resolve_schedule(schedule, ANYTHING, 9)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_schedule(schedule, ANYTHING, 9) == VocabTiles()


@pytest.mark.parametrize("schedule", ["foo", None, 3])
def test_unknown_schedule_is_refused(schedule: Any) -> None:
    with pytest.raises(ValueError, match=f"schedule: .*{schedule}"):
        resolve_schedule(schedule, ANYTHING, 9)


@pytest.mark.parametrize("arguments", [{"rows": 0}, {"max_bytes": -1}])
def test_chunks_of_nothing_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RowChunks(**arguments)


@pytest.mark.parametrize("schedule", [RowChunks, VocabTiles])
@pytest.mark.parametrize("size", [float("nan"), 4096.0, True, "1GiB"])
def test_sizes_are_integers(schedule: Any, size: Any) -> None:
    with pytest.raises(TypeError, match="max_bytes must be an integer, got"):
        schedule(max_bytes=size)


@pytest.mark.parametrize(
    "arguments",
    [{"filter_eps": -0.1}, {"filter_eps": 1.0}, {"filter_eps": float("nan")}, {"max_bytes": 0}],
)
def test_tiles_of_nothing_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        VocabTiles(**arguments)
