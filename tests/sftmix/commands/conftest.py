"""What the tests of refusals share: a short command, and a hub that is not reached."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command asks the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def words(toy_model: Path, toy_data: Path, tmp_path: Path) -> list[str]:
    """`sftmix train` of one step of NTP into RUN."""
    common = ["--model", str(toy_model), "--data", str(toy_data), "--output", str(tmp_path / "run")]
    short = ["--method", "ntp", "--max_steps", "1", "--save_strategy", "no"]
    return ["train", *common, *short, "--use_cpu", "true", "--disable_tqdm", "true"]
