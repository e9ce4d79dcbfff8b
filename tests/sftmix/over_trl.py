"""TRL's trainer with the loss and the pairs of this project, over tokens that are there already."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, PrinterCallback

from sftmix.integrations.trl import SFTMixSFTConfig, SFTMixSFTTrainer
from tests.sftmix import tiny


def options(folder: Path, size: int, **changes: Any) -> dict[str, Any]:
    """Two quiet epochs of batches of ``size`` in float32, without learning anything."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": size,
        "num_train_epochs": 2,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **changes,
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """One of as few words as will do."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<s>")), pad_token="<pad>", eos_token="</s>"
    )


def trainer(
    model: Any,
    folder: Path,
    data: datasets.Dataset,
    size: int,
    *,
    callbacks: Sequence[Any] = (),
    **changes: Any,
) -> SFTMixSFTTrainer:
    """The trainer, paired by `tiny.halves`."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
        patched.setenv("CI", "1")  # TRL tells its makers of every other trainer
        # TRL's own defaults use a name that transformers gives up.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
        made = SFTMixSFTTrainer(
            model,
            SFTMixSFTConfig(**options(folder, size, **changes)),
            train_dataset=data,
            eval_dataset=tiny.examples(7, seed=5),
            confident=tiny.halves(len(data)),
            processing_class=tokenizer(),
            callbacks=list(callbacks),
        )
    made.remove_callback(PrinterCallback)
    return made
