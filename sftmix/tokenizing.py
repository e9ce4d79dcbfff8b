"""Examples to tokens: each conversation is rendered and tokenised once, as a whole.

Labels are not shifted: `labels[i]` is `input_ids[i]` where token i belongs to a response (see
`templates.py`), and -100 elsewhere.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sftmix.boundaries import parted_at_responses
from sftmix.data import IGNORED_LABEL, Example
from sftmix.rendering import Span
from sftmix.rows import BadRowError, BadRows, OnBadRow
from sftmix.templates import Turns, adopt_template, bad_row

logger = logging.getLogger(__name__)

# Rows rendered and tokenised together: enough to keep the tokenizer's threads busy, few enough
# that a batch's offsets stay small beside the tokens kept.
BATCH_ROWS = 1000

_COLUMNS = datasets.Features(
    {
        "id": datasets.Value("int64"),
        "content_hash": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)


def _labels(input_ids: Sequence[int], offsets: Sequence[Span], turns: Sequence[Span]) -> list[int]:
    """The tokens that start inside a span, -100 elsewhere."""
    labels = [IGNORED_LABEL] * len(input_ids)
    starts = [start for start, _ in offsets]
    for begin, end in turns:
        first, last = bisect_left(starts, begin), bisect_left(starts, end)
        # Byte-level tokenizers trim white space from offsets: a lone space before the response
        # gets the empty span (begin, begin) and belongs to the prompt.
        while first < last and offsets[first][1] <= begin:
            first += 1
        labels[first:last] = input_ids[first:last]
    return labels


def _check_range(example: Example, vocab_size: int) -> None:
    for name, values in (("input_ids", example.input_ids), ("labels", example.labels)):
        assert values is not None
        for position, value in enumerate(values):
            ignored = name == "labels" and value == IGNORED_LABEL
            if not (0 <= value < vocab_size or ignored):
                raise bad_row(
                    example,
                    f"'{name}[{position}]' is {value}, outside the tokenizer's vocabulary of "
                    f"{vocab_size}",
                )


def _tokens(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    turns_of: Turns | None,
    bad: BadRows,
) -> dict[int, tuple[list[int], list[int]]]:
    """Whole input_ids and labels by place in the batch, without the bad rows."""
    rows: dict[int, tuple[list[int], list[int]]] = {}
    texts: list[tuple[int, str, list[Span]]] = []
    for place, example in enumerate(examples):
        try:
            if example.messages is not None:
                assert turns_of is not None
                texts.append((place, *turns_of.spans(example)))
            else:
                _check_range(example, len(tokenizer))
                assert example.input_ids is not None
                assert example.labels is not None
                rows[place] = example.input_ids, example.labels
        except BadRowError as error:
            bad.add(error)
    if texts:
        encoded: Any = tokenizer(
            [text for _, text, _ in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        encodings = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for (place, text, turns), *tokens in encodings:
            input_ids, offsets = parted_at_responses(tokenizer, text, turns, *tokens)
            rows[place] = input_ids, _labels(input_ids, offsets, turns)
    return rows


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    on_bad_row: OnBadRow = "error",
    disable_progress: bool | None = False,
) -> datasets.Dataset:
    """Tokenise examples into a dataset of `id`, `content_hash`, `input_ids` and `labels`.

    A conversation is rendered with `chat_template(tokenizer)`, which a tokenizer without one is
    given, and tokenised whole, but for a token that would join a prompt with its response. A token
    is a response token where it starts inside an assistant turn (see `templates.py`). Sequences
    longer than `max_length`
    are cut from the right, so a response loses its tail; one log line says how many were. Labels
    are not shifted and the first token is never predicted, so a row needs a label after it.

    Raises BadRowError (or leaves the row out, with `on_bad_row="skip"`) where no response token is
    left within `max_length`, where the template refuses the conversation, leaves out what it says
    or does not show where its response is, and where given `input_ids` or `labels` lie outside the
    vocabulary; ValueError for a wrong `max_length` or `on_bad_row` and where no example is left;
    ValueError for a tokenizer that gives no offsets (a slow one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer must be a fast one, which says where in the text each token lies, "
            f"got {type(tokenizer).__name__}"
        )
    if type(max_length) is not int or max_length < 2:
        raise ValueError(f"max_length must be an integer of at least 2, got {max_length!r}")
    turns_of = None
    if any(example.messages is not None for example in examples):
        adopt_template(tokenizer)
        turns_of = Turns(tokenizer)
    bad = BadRows(on_bad_row)
    parts: list[datasets.Dataset] = []
    truncated = 0
    with tqdm(
        total=len(examples),
        desc="Tokenising",
        unit="row",
        delay=2,
        disable=disable_progress,
    ) as bar:
        for begin in range(0, len(examples), BATCH_ROWS):
            batch = examples[begin : begin + BATCH_ROWS]
            part, cut = _tokenize_batch(batch, tokenizer, turns_of, max_length, bad)
            parts.append(part)
            truncated += cut
            bar.update(len(batch))
    bad.report(len(examples))
    if turns_of is not None:
        turns_of.report()
    if not any(len(part) for part in parts):
        raise ValueError(f"no examples are left of {len(examples)}")
    if truncated:
        logger.warning(
            "%d of %d rows were longer than max_length=%d and lost their end",
            truncated,
            len(examples),
            max_length,
        )
    return datasets.concatenate_datasets([part for part in parts if len(part)])


def _tokenize_batch(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    turns_of: Turns | None,
    max_length: int,
    bad: BadRows,
) -> tuple[datasets.Dataset, int]:
    """The batch as a dataset, and how many of its rows were cut."""
    rows = _tokens(examples, tokenizer, turns_of, bad)
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    truncated = 0
    for place, example in enumerate(examples):
        if place not in rows:
            continue
        input_ids, labels = rows[place]
        if all(label == IGNORED_LABEL for label in labels[1:max_length]):
            reason = f"no response token is left within max_length={max_length}"
            bad.add(bad_row(example, f"{reason}; the row has {len(input_ids)} tokens"))
            continue
        truncated += len(input_ids) > max_length
        columns["id"].append(example.id)
        columns["content_hash"].append(example.content_hash)
        columns["input_ids"].append(input_ids[:max_length])
        columns["labels"].append(labels[:max_length])
    return datasets.Dataset.from_dict(columns, features=_COLUMNS), truncated
