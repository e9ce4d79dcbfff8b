"""Model, tokenizer and data of a command, and its final model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sftmix.arguments import RunArguments
from sftmix.checkpoints import STAGING, writing
from sftmix.data import load_examples
from sftmix.model_card import FILE as CARD
from sftmix.runs import sync_folder
from sftmix.templates import tokenize_examples

CONFIGS = ("config.json", "adapter_config.json")


def load_model(arguments: RunArguments) -> Any:
    """The model, from safetensors alone: a pickle would run code on loading.

    Raises:
        OSError: there is no such model, or it has no safetensors, or they are cut off.
        ValueError: it is an adapter.
    """
    if (Path(arguments.model) / "adapter_config.json").exists():
        raise ValueError(
            f"model: {arguments.model} is an adapter of a model; merge the two, or train it with "
            "SFTMixTrainer in a script of your own"
        )
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(
            arguments.model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=arguments.trust_remote_code,
        )
    except SafetensorError as error:
        raise OSError(f"model: the weights of {arguments.model} are damaged: {error}") from error


def load_tokenizer(arguments: RunArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        arguments.model, trust_remote_code=arguments.trust_remote_code
    )
    return tokenizer


def load_data(
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: list[str] | None = None,
    *,
    disable_progress: bool | None = False,
) -> datasets.Dataset:
    """The examples of ``--data`` (or of other files) as tokens."""
    examples = load_examples(
        data or arguments.data, on_bad_row=arguments.on_bad_row, disable_progress=disable_progress
    )
    return tokenize_examples(
        examples,
        tokenizer,
        max_length=arguments.max_length,
        on_bad_row=arguments.on_bad_row,
        disable_progress=disable_progress,
    )


def save_final_model(model: Any, tokenizer: PreTrainedTokenizerBase, run: Path, card: str) -> None:
    """Put the model and its card into the run folder, each file renamed into place.

    What makes the folder a model comes last: ``config.json``, or an adapter's.
    """
    staging = run / STAGING
    with writing(staging):
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    (staging / CARD).write_text(card, encoding="utf-8")  # PEFT writes one of its own
    sync_folder(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name in CONFIGS):
        os.replace(path, run / path.name)
    staging.rmdir()
