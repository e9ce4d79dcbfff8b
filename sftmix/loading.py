"""Model, tokenizer and data of a command, and its final model."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sftmix.arguments import RunArguments, TrainRunArguments
from sftmix.checkpoints import STAGING, writing
from sftmix.data import Example, load_examples, rows_by_file
from sftmix.examples_check import check_command
from sftmix.failures import Naming
from sftmix.model_card import FILE as CARD
from sftmix.model_source import CONFIGS, ReadingModel
from sftmix.runs import sync_folder
from sftmix.selection import columns_of, parse_selection, say, select
from sftmix.tokenizing import tokenize_examples


class ModelArguments(Protocol):
    """What loading a model takes of a command's arguments."""

    @property
    def model(self) -> str:
        """Folder or hub name."""

    @property
    def dtype(self) -> str:
        """Dtype of the weights, or auto."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the model is run."""


def load_model(arguments: ModelArguments, attn_implementation: str | None = None) -> Any:
    """The model, from safetensors alone: a pickle would run code on loading.

    ``attn_implementation``: as in `from_pretrained`.

    Raises:
        OSError: there is no such model, or it has no safetensors, or they are cut off.
        ValueError: it is an adapter, or transformers does not know the attention.
        ImportError: the attention's package is not installed.
    """
    if (Path(arguments.model) / "adapter_config.json").exists():
        raise ValueError(
            f"model: {arguments.model} is an adapter of a model; merge the two, or train it with "
            "SFTMixTrainer in a script of your own"
        )
    return _from_safetensors(arguments.model, arguments, attn_implementation)


def load_trained_model(arguments: ModelArguments, base: str | None = None) -> Any:
    """The model as `load_model` reads it, or an adapter's folder on top of its base model.

    ``base``: folder or hub name of that, where it is not what the adapter says.

    Raises:
        ImportError: it is an adapter and PEFT is not installed.
        OSError: as `load_model`; or the adapter has no safetensors, or does not say of which model.
    """
    folder = Path(arguments.model)
    if not (folder / "adapter_config.json").exists():
        return load_model(arguments)
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{folder} is an adapter, which needs PEFT: pip install 'sftmix[peft]'")
    from peft import PeftModel

    # Without this file PEFT opens adapter_model.bin, a pickle.
    if not (folder / "adapter_model.safetensors").exists():
        raise OSError(f"model: {folder} has no adapter_model.safetensors")
    model = _from_safetensors(base or base_model(folder), arguments)
    return PeftModel.from_pretrained(model, str(folder))


def base_model(adapter: Path) -> str:
    """Folder or hub name of the model that an adapter belongs to.

    Raises:
        OSError: its config does not say.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise OSError(f"model: {adapter}/adapter_config.json has no base_model_name_or_path")
    return str(base)


def _from_safetensors(
    model: str, arguments: ModelArguments, attn_implementation: str | None = None
) -> Any:
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    try:
        with ReadingModel(model, "the model"):
            return AutoModelForCausalLM.from_pretrained(
                model,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                trust_remote_code=arguments.trust_remote_code,
            )
    except SafetensorError as error:
        raise OSError(f"model: the weights of {model} are damaged: {error}") from error


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    with ReadingModel(arguments.model, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            arguments.model, trust_remote_code=arguments.trust_remote_code
        )
    return tokenizer


def refuse_misfits(arguments: RunArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the model's sizes before any data is read, on an empty model made from its config.

    Raises:
        ValueError: the tokenizer has ids beyond the model's embeddings, or ``max_length`` is more
            than the model has positions for.
        OSError: the model's config is not found.
    """
    if (Path(arguments.model) / "adapter_config.json").exists():
        return  # `load_model` says what to do
    remote = arguments.trust_remote_code
    config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=remote)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    check_command(empty, tokenizer, arguments.max_length)


def load_data(
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    disable_progress: bool | None = False,
) -> datasets.Dataset:
    """The examples of ``--data`` that ``--select`` keeps, as tokens."""
    split, on_bad_row = arguments.data_split, arguments.on_bad_row
    selections = {
        text: parse_selection(text, split=split, on_bad_row=on_bad_row)
        for text in arguments.select or ()
    }
    with Naming("data"):
        examples = load_examples(
            arguments.data,
            on_bad_row=on_bad_row,
            split=split,
            numbers=columns_of(selections),
            disable_progress=disable_progress,
            argument="--data",
        )
    say(rows_by_file(examples))
    examples = select(examples, selections)
    return _tokenized(examples, arguments, tokenizer, disable_progress=disable_progress)


def load_held_out(
    arguments: TrainRunArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    disable_progress: bool | None = False,
) -> datasets.Dataset | None:
    """The examples of ``--eval_data``, all of them, as tokens; None where none are given."""
    if not arguments.eval_data:
        return None
    with Naming("eval_data", other="data"):
        examples = load_examples(
            arguments.eval_data,
            on_bad_row=arguments.on_bad_row,
            split=arguments.eval_split,
            disable_progress=disable_progress,
            argument="--eval_data",
        )
    say(rows_by_file(examples))
    return _tokenized(examples, arguments, tokenizer, disable_progress=disable_progress)


def _tokenized(
    examples: list[Example],
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    disable_progress: bool | None,
) -> datasets.Dataset:
    return tokenize_examples(
        examples,
        tokenizer,
        max_length=arguments.max_length,
        on_bad_row=arguments.on_bad_row,
        disable_progress=disable_progress,
    )


def save_final_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    run: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> list[str]:
    """Put the model and its tokenizer into the run folder, each file renamed into place.

    What makes the folder a model comes last: ``config.json``, or an adapter's. ``state``: its
    weights, where the model has but shards of them.

    Returns:
        The names of the files.

    Raises:
        RunFailure: the disk is full; the run folder is as it was.
    """
    staging = run / STAGING
    with writing(staging):
        model.save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)
        (staging / CARD).unlink(missing_ok=True)  # PEFT's, which knows nothing of the training
        sync_folder(staging)
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: name in CONFIGS)
    for name in names:
        os.replace(staging / name, run / name)
    staging.rmdir()
    return names
