"""Options of TRL that the loss, the pairs or the collator would not heed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sftmix.integrations.trl import SFTMixSFTConfig

# TRL's own defaults use a name that transformers gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

REFUSED: dict[str, Any] = {
    "packing": True,
    "eval_packing": True,
    "loss_type": "dft",
    "activation_offloading": True,
    "use_liger_kernel": True,
    "padding_free": True,
    "label_smoothing_factor": 0.1,
    "save_only_model": True,
    "train_sampling_strategy": "sequential",
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_not_be_heeded_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        SFTMixSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: REFUSED[name]})
