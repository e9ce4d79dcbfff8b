"""Models that `sftmix plan` has to treat in another way, or to refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig

from sftmix.plan import plan_step
from sftmix.recipe.arguments import RunArguments
from tests.sftmix import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def peak(folder: Path, dtype: str, length: int, heads: int) -> int:
    """On a GPU, with so many heads of keys and values."""
    config = LlamaConfig(**SIZES, num_key_value_heads=heads)
    arguments = RunArguments(model="", data=[], output="", dtype=dtype)
    return plan_step(config, arguments, tiny.config(folder), length).peak


@pytest.mark.parametrize(
    ("dtype", "heads", "least", "most"),
    [("float32", 4, 1.5, 2.1), ("bfloat16", 2, 1.5, 2.1), ("float32", 2, 3.6, 4.0)],
)
def test_scores_are_made_for_shared_heads_in_float32(
    dtype: str, heads: int, least: float, most: float, tmp_path: Path
) -> None:
    """Twice the tokens take at most twice the memory, or with scores L x L nearly four times."""
    short, long = (peak(tmp_path, dtype, length, heads) for length in (1024, 2048))
    assert least < long / short < most


def test_experts_in_float32_are_refused(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    arguments = RunArguments(model="", data=[], output="")
    with pytest.raises(ValueError, match="dtype: expected bfloat16"):
        plan_step(config, arguments, tiny.config(tmp_path), 64)
    arguments.dtype = "bfloat16"
    assert plan_step(config, arguments, tiny.config(tmp_path), 64).peak > 0
