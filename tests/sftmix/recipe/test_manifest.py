"""The manifest of a run that an earlier version started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sftmix.recipe.manifest import start_manifest

EARLIER = {"method": "ntp", "mu": 0.2}


@pytest.mark.parametrize(
    "more", [{"power_k": 10.0, "gem_beta": 0.7}, {"label_smoothing_factor": 0.0}]
)
def test_new_options_that_change_nothing_are_passed_over(
    more: dict[str, Any], tmp_path: Path
) -> None:
    start_manifest(tmp_path, EARLIER)
    start_manifest(tmp_path, {**EARLIER, **more})


def test_a_new_option_that_is_heeded_is_another_recipe(tmp_path: Path) -> None:
    start_manifest(tmp_path, EARLIER)
    with pytest.raises(ValueError, match=r"with label_smoothing_factor = None, now it is 0.2"):
        start_manifest(tmp_path, {**EARLIER, "label_smoothing_factor": 0.2})
