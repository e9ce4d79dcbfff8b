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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sftmix.arguments import RunArguments, TrainRunArguments
from sftmix.checkpoints import STAGING, writing
from sftmix.data import Example, load_examples
from sftmix.model_card import FILE as CARD
from sftmix.runs import sync_folder
from sftmix.selection import columns_of, parse_selection, select
from sftmix.template_files import use_template
from sftmix.templates import adopt_template
from sftmix.tokenizing import tokenize_examples
from sftmix.turn_ends import TurnEnds

CONFIGS = ("config.json", "adapter_config.json")


class ModelArguments(Protocol):
    """What loading a model takes of a command's arguments."""

    @property
    def model(self) -> str:
        """Folder or hub name."""

    @property
    def dtype(self) -> str:
        """Dtype of the weights, or auto."""

    @property
    def chat_template(self) -> str | None:
        """File or folder of the chat template; None: the model's own."""

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
    """The model's tokenizer, with the chat template that is used: named, its own, or the plain one.

    Raises:
        ValueError: ``--chat_template`` names no template; or there is none, and no eos_token to
            end a response of the plain one with.
        OSError: there is no such model.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        arguments.model, trust_remote_code=arguments.trust_remote_code
    )
    if arguments.chat_template is not None:
        use_template(tokenizer, arguments.chat_template)
    adopt_template(tokenizer)
    return tokenizer


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
    examples = load_examples(
        arguments.data,
        on_bad_row=on_bad_row,
        split=split,
        numbers=columns_of(selections),
        disable_progress=disable_progress,
    )
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
    examples = load_examples(
        arguments.eval_data,
        on_bad_row=arguments.on_bad_row,
        split=arguments.eval_split,
        disable_progress=disable_progress,
    )
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
    card: str,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Put the model and its card into the run folder, each file renamed into place.

    What makes the folder a model comes last: ``config.json``, or an adapter's. ``state``: its
    weights, where the model has but shards of them.
    """
    TurnEnds(tokenizer).align(model)
    staging = run / STAGING
    with writing(staging):
        model.save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)
    (staging / CARD).write_text(card, encoding="utf-8")  # PEFT writes one of its own
    sync_folder(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name in CONFIGS):
        os.replace(path, run / path.name)
    staging.rmdir()
