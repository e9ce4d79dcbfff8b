"""What is learnt of TRL's data: responses only, unless the user asks for the prompts too.

TRL trains on prompts wherever nothing tells it which tokens are the response's: on conversations
without ``assistant_only_loss``, on text, and on tokens without labels or a mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from sftmix.data.examples import Examples
from sftmix.data.examples_check import BESIDE, check_beside
from sftmix.data.formats import format_of, read_content
from sftmix.data.messages import BadField, Notes
from sftmix.data.rows import BadRowError
from sftmix.data.token_rows import REFUSED
from sftmix.data.weighting import WEIGHT
from sftmix.templates.tokenizing import tokenize_examples

logger = logging.getLogger(__name__)

CONVERSATIONS = ("messages", "conversations")
# What TRL reads of a conversation's row.
READ = (*CONVERSATIONS, "tools", "chat_template_kwargs")
# Columns that tell which tokens are learnt.
TOLD = ("labels", "completion_mask", "assistant_masks")
# TRL cuts what is tokenised here, and leaves out the rows in which nothing is left to learn.
UNCUT = 2**31
ROW = "sftmix_row"  # the column in which a row's number goes through TRL's preparation
TOKENS = ["id", "input_ids", "labels"]


def with_responses(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    formatting_func: Callable[[Any], str] | None,
    name: str,
) -> datasets.Dataset:
    """Return data of which TRL's preparation teaches responses only, or what ``args`` asks for.

    Conversations are tokenised as `sftmix train` does where ``assistant_only_loss`` is None, and
    get the columns ``input_ids`` and ``labels``; other data are returned as they are.
    ``completion_only_loss=False`` asks for whole sequences, of conversations
    ``assistant_only_loss=False`` too.

    Args:
        dataset: the user's data, of which no row is left out.
        tokenizer: gets the plain chat template if it has none.
        args: an `SFTMixSFTConfig`.
        formatting_func: the trainer's own.
        name: the argument that the data came by.

    Raises:
        ValueError: nothing tells responses from prompts, and prompts were not asked for; a
            conversation in which the responses are not found; a ``formatting_func`` that TRL would
            not read; or packed rows of tokens, or masks that learn less than the labels beside
            them.
    """
    columns = set(dataset.column_names)
    is_whole = args.completion_only_loss is False
    is_text = formatting_func is not None and "input_ids" not in columns
    if is_text and not columns.isdisjoint((*CONVERSATIONS, "prompt")):
        raise ValueError(
            "formatting_func: expected data without messages or a prompt, which TRL reads in place "
            f"of its text, got {sorted(columns)} in {name}; leave it out, or the column"
        )
    if "input_ids" in columns:
        # TRL reads no mask beside labels, and takes a packed row for one example.
        check_beside(dataset, name)
        is_told = not columns.isdisjoint(TOLD)
    elif is_text or {"prompt", "completion"} <= columns:
        is_told = not is_text
    else:
        is_told = not columns.isdisjoint(CONVERSATIONS)
        if is_told and args.assistant_only_loss is None and not is_whole:
            return tokenized(dataset, tokenizer, name)
    if not is_told and not is_whole:
        raise ValueError(
            f"{name}: expected data that tell responses from prompts (messages; prompt and "
            "completion; input_ids with labels, completion_mask or assistant_masks), got "
            f"{'the text of formatting_func' if is_text else sorted(columns)}; "
            "completion_only_loss=False learns whole sequences, prompts too"
        )
    return dataset


def tokenized(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, name: str
) -> datasets.Dataset:
    """Return conversations with their ``input_ids``, uncut, and the responses as ``labels``.

    A line names what is not read of messages.

    Raises:
        ValueError: a row in which the responses are not found, by its number.
    """
    examples = Examples()
    examples.begin_file(name)
    read = [column for column in READ if column in dataset.column_names]
    form, notes = format_of([read]), Notes()
    row = 0
    try:
        for row, cells in enumerate(dataset.with_format(None).select_columns(read)):
            examples.append(row, row, read_content(cells, form, notes), {})
        tokens = tokenize_examples(examples, tokenizer, max_length=UNCUT)
    except BadRowError as error:
        # The error that it comes from names no option that only the commands have.
        bare = error.__cause__ if isinstance(error.__cause__, BadRowError) else error
        raise refused(name, bare.line, bare.reason) from None
    except BadField as error:
        raise refused(name, row, str(error)) from None
    if notes.unused:
        unused = (f"{what!r} ({number:,} rows)" for what, number in notes.unused.most_common())
        logger.warning("%s: not used: %s", name, ", ".join(unused))
    kept = dataset.select_columns([one for one in dataset.column_names if one != "labels"])
    return datasets.concatenate_datasets(
        [kept.with_format(None), tokens.select_columns(["input_ids", "labels"])], axis=1
    )


def refused(name: str, row: int, reason: str) -> ValueError:
    """Return the error of a row, with what TRL itself could do with it."""
    own = reason.replace("--chat_template FILE", "chat_template_path=FILE")
    own = own.replace("--chat_template", "chat_template_path")
    return ValueError(
        f"{name}: row {row}: {own}; assistant_only_loss=True takes TRL's own template for "
        "training, where it has one, and assistant_only_loss=False learns prompts too"
    )


def with_ids(prepared: datasets.Dataset, *, is_train: bool) -> datasets.Dataset:
    """Return what TRL prepared with the number of the user's row as ``id``, for the trainer.

    Rows to train on have no other columns than tokens and labels; rows to evaluate keep those that
    callbacks read, such as ``prompt``.
    """
    prepared = prepared.with_format(None)
    names = {*prepared.column_names} - {ROW, *TOKENS[1:]}
    if not is_train:
        # What is said of tokens is in the labels by now; a weight would count, and `id` is taken.
        names &= {*BESIDE, *REFUSED, WEIGHT, "id"}
    return prepared.remove_columns(sorted(names)).rename_column(ROW, "id")
