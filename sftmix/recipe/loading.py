"""Load the model, tokenizer and data of a command."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sftmix.conventions import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sftmix.data.columns import parse_columns
from sftmix.data.examples import Examples, load_examples
from sftmix.data.examples_check import check_command
from sftmix.data.mixture import mixed, mixture_line
from sftmix.data.selection import columns_of, parse_selection, select
from sftmix.data.summary import Reading
from sftmix.data.weighting import WEIGHT, WeightColumn, described
from sftmix.model.four_bits import keep_four_bits
from sftmix.model.source import ReadingModel
from sftmix.model.weights import refuse_not_finite, refuse_other_tensors, without_message
from sftmix.recipe.arguments import RunArguments, TrainRunArguments
from sftmix.recipe.preview import Lengths, Screen, numbers_of, summary
from sftmix.runs.failures import Naming
from sftmix.runs.ranks import is_main
from sftmix.templates.chat import adopt_template
from sftmix.templates.files import use_template
from sftmix.templates.tokenizing import tokenize_examples
from sftmix.templates.view import view

logger = logging.getLogger(__name__)


class ModelArguments(Protocol):
    """The arguments that loading a model needs."""

    @property
    def model(self) -> str:
        """Folder or hub name."""

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of a model on the hub."""

    @property
    def dtype(self) -> str:
        """Dtype of the weights, or auto."""

    @property
    def chat_template(self) -> str | None:
        """File or folder of the chat template; None: the model's own."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the model is run."""


def load_model(
    arguments: ModelArguments, attn_implementation: str | None = None, **keywords: Any
) -> Any:
    """Return the model, loaded only from safetensors: a pickle would run code.

    `attn_implementation` and further `keywords` are those of `from_pretrained`.

    Raises:
        OSError: there is no such model; it has no safetensors, or they are cut off, lack tensors,
            hold others, or hold NaN or infinities.
        ValueError: it is an adapter, or a folder with a revision, or transformers does not know the
            attention.
        ImportError: the attention's package is not installed.
    """
    if (Path(arguments.model) / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"model: {arguments.model} is an adapter of a model; merge the two, or train it with "
            "SFTMixTrainer in a script of your own"
        )
    refuse_revision(arguments)
    keywords["attn_implementation"] = attn_implementation
    return _from_safetensors(arguments.model, arguments, arguments.revision, **keywords)


def load_trained_model(arguments: ModelArguments, base: str | None = None) -> Any:
    """Return the model of a folder, or of an adapter's folder on top of its base model.

    `base` is the base model's folder or hub name, if it is not the one that the adapter names.

    Raises:
        ImportError: it is an adapter and PEFT is not installed.
        OSError: as `load_model`; or the adapter has no safetensors, or does not say of which model.
    """
    folder = Path(arguments.model)
    if not (folder / ADAPTER_CONFIG).exists():
        return load_model(arguments)
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{folder} is an adapter, which needs PEFT: pip install peft")
    from peft import PeftModel

    # Without this file PEFT opens adapter_model.bin, a pickle.
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise OSError(f"model: {folder} has no {ADAPTER_WEIGHTS}")
    refuse_revision(arguments)
    found, revision = base_model(folder)
    if base is not None:
        found, revision = base, None if Path(base).exists() else revision
    model = _from_safetensors(found, arguments, revision)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())
        raise OSError(
            f"model: the adapter {folder} is damaged or not one of {found}: {reason:.300}"
        ) from error
    refuse_other_tensors(str(folder), _adapter_info(adapted, folder))
    refuse_not_finite(str(folder), adapted)
    return adapted


def base_model(adapter: Path) -> tuple[str, str | None]:
    """Return the folder or hub name of an adapter's base model, and its revision.

    Raises:
        OSError: its config does not say, or is damaged.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (ValueError, AttributeError) as error:
        raise OSError(f"model: {path} is damaged: {error}") from error
    if not base:
        raise OSError(f"model: {path} has no base_model_name_or_path")
    # PEFT writes a revision also for folders.
    return str(base), None if Path(base).exists() else revision


def refuse_revision(arguments: ModelArguments) -> None:
    """Refuse a revision of a folder, which has none.

    Raises:
        ValueError: the model is a folder.
    """
    if arguments.revision is not None and Path(arguments.model).exists():
        raise ValueError(
            f"revision: expected the name of a model on the hub with it, got the folder "
            f"{arguments.model}; leave --revision out"
        )


def _adapter_info(model: Any, folder: Path) -> dict[str, set[str]]:
    """Return the tensors that an adapter's file lacks or has besides, as `from_pretrained` does."""
    from peft import get_peft_model_state_dict

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        found = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # Embeddings of a changed vocabulary are saved with the adapter, under the model's own names.
    whole = {f"base_model.model.{name}" for name in model.get_base_model().state_dict()}
    return {"missing_keys": expected - found, "unexpected_keys": found - expected - whole}


def _from_safetensors(
    model: str,
    arguments: ModelArguments,
    revision: str | None,
    **keywords: Any,
) -> Any:
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    found: Any
    try:
        # transformers prints a table of tensors that do not fit; `refuse_other_tensors` names them.
        silent = without_message("transformers.modeling_utils", "LOAD REPORT")
        with ReadingModel(model, "the model"), silent:
            found = AutoModelForCausalLM.from_pretrained(
                model,
                revision=revision or "main",
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=arguments.trust_remote_code,
                output_loading_info=True,
                # `refuse_other_tensors` refuses them by name.
                ignore_mismatched_sizes=True,
                **keywords,
            )
    except SafetensorError as error:
        raise OSError(f"model: the weights of {model} are damaged: {error}") from error
    loaded, info = found
    refuse_other_tensors(model, info)
    refuse_not_finite(model, loaded)
    keep_four_bits(loaded)
    return loaded


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer with the chat template in use: named, its own, or the plain one.

    Raises:
        ValueError: `--chat_template` names no template; there is none, and no eos_token to end a
            response of the plain one with; or there is a revision and the model is a folder.
        OSError: there is no such model.
    """
    refuse_revision(arguments)
    with ReadingModel(arguments.model, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            arguments.model,
            revision=arguments.revision or "main",
            trust_remote_code=arguments.trust_remote_code,
        )
    if arguments.chat_template is not None:
        use_template(tokenizer, arguments.chat_template)
    adopt_template(tokenizer)
    return tokenizer


def refuse_misfits(arguments: RunArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the model's sizes before any data is read, on an empty model made from its config.

    Raises:
        ValueError: the tokenizer has ids beyond the model's embeddings, or `max_length` is more
            than the model has positions for.
        OSError: the model's config is not found.
    """
    if (Path(arguments.model) / ADAPTER_CONFIG).exists():
        return  # `load_model` says what to do
    remote = arguments.trust_remote_code
    with ReadingModel(arguments.model, "the config"):
        config = AutoConfig.from_pretrained(
            arguments.model, revision=arguments.revision or "main", trust_remote_code=remote
        )
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    check_command(empty, tokenizer, arguments.max_length)


def read_data(
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weight: WeightColumn | None = None,
    disable_progress: bool | None = False,
) -> tuple[Examples, datasets.Dataset]:
    """Return the examples of `--data` that `--select` keeps, as they are and as tokens.

    Of several data each example has the name of its `source`, and `--weights` adds copies to the
    tokens. With a column `weight` that the data have, tokens have it, too.
    """
    selections = {
        text: parse_selection(text, split=arguments.data_split, **how_read(arguments))
        for text in arguments.select or ()
    }
    with Naming("data"):
        examples = load_examples(
            arguments.data,
            split=arguments.data_split,
            numbers=columns_of(selections),
            weight=weight,
            streaming=arguments.streaming,
            quiet=True,
            disable_progress=disable_progress,
            **how_read(arguments),
        )
    examples = select(examples, selections)
    dataset = _tokenized(examples, arguments, tokenizer, disable_progress=disable_progress)
    if weight is not None:
        dataset = _weighted(dataset, examples, weight)
    sources = examples.reading.sources
    if len(sources) == 1:
        return examples, dataset
    if arguments.weights is not None:
        line = mixture_line(dataset["id"][:], sources, arguments.weights)
        examples.reading.mixture = line
    return examples, mixed(dataset, sources, arguments.weights)


def load_data(
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weight: WeightColumn | None = None,
    disable_progress: bool | None = False,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Return the tokens that `read_data` gives, and what was counted.

    One example is printed as the model reads it, and a summary.
    """
    examples, tokens = read_data(
        arguments, tokenizer, weight=weight, disable_progress=disable_progress
    )
    if is_main():
        first = examples[int(np.flatnonzero(examples.ids == tokens[0]["id"])[0])]
        screen = Screen()
        screen.line(screen.legend)
        screen.example(view(first, tokenizer, arguments.max_length))
    return tokens, summed_up("data", examples.reading, tokens, arguments.max_length)


def load_held_out(
    arguments: TrainRunArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    disable_progress: bool | None = False,
) -> tuple[datasets.Dataset | None, dict[str, Any]]:
    """Return all examples of `--eval_data` as tokens, None if it is not given; and their counts."""
    if not arguments.eval_data:
        return None, {}
    with Naming("eval_data", other="data"):
        examples = load_examples(
            arguments.eval_data,
            split=arguments.eval_split,
            streaming=arguments.streaming,
            quiet=True,
            disable_progress=disable_progress,
            **how_read(arguments),
        )
    tokens = _tokenized(examples, arguments, tokenizer, disable_progress=disable_progress)
    return tokens, summed_up("eval_data", examples.reading, tokens, arguments.max_length)


def summed_up(
    name: str, reading: Reading, tokens: datasets.Dataset, max_length: int
) -> dict[str, Any]:
    """Print the summary of what was read under an option, and return its numbers."""
    lengths = Lengths.of(tokens)
    if is_main():
        Screen().summary(name, summary(reading, len(tokens), lengths, max_length))
    return {name: numbers_of(reading, lengths)}


def warn_of_overlap(dataset: datasets.Dataset, held_out: datasets.Dataset | None) -> None:
    """Log one line if examples of `--eval_data` have the content of some in `--data`."""
    if held_out is None:
        return
    learnt = set(dataset["content_hash"][:])
    found = [number for number, key in enumerate(held_out["content_hash"][:], 1) if key in learnt]
    if found:
        logger.warning(
            "eval_data: %d of %d examples are in --data, too, the first of them example %d: their "
            "loss is that of training",
            len(found),
            len(held_out),
            found[0],
        )


def how_read(arguments: RunArguments) -> dict[str, Any]:
    """Return the arguments that say how all data are read."""
    return {
        "on_bad_row": arguments.on_bad_row,
        "columns": parse_columns(arguments.columns) if arguments.columns else None,
        "train_on": arguments.train_on,
        "encoding": arguments.encoding,
    }


def _tokenized(
    examples: Examples,
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
        reading=examples.reading,
        disable_progress=disable_progress,
    )


def _weighted(
    dataset: datasets.Dataset, examples: Examples, column: WeightColumn
) -> datasets.Dataset:
    """Return tokens with the weights of their examples, if any has one; `reading` says which."""
    weights = examples.numbers(column.name)[np.isin(examples.ids, dataset["id"][:])]
    missing = np.isnan(weights)
    if missing.all():
        return dataset
    weights = np.where(missing, 1.0, weights).astype(np.float32)
    text = f"column {column.name!r}: {described(weights)}"
    text += f"; {missing.sum():,} have none and weigh 1" if missing.any() else ""
    examples.reading.weights = text
    return dataset.add_column(WEIGHT, weights)
