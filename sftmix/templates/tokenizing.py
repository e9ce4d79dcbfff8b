"""Turn examples into tokens: each conversation is rendered and tokenised once, as a whole.

A token that would join a prompt with its response is split (see `boundaries.py`).

Labels are not shifted: `labels[i]` is `input_ids[i]` if token i belongs to a response (see
`chat.py`), and -100 otherwise.

Only the beginning of a text far longer than `max_length` is tokenised. A tokenizer may look ahead,
so the text is cut at two places; if both cuts agree on the first `max_length + 1` tokens and their
places, these are taken, else both cuts are moved twice as far, up to the whole text.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from tokenizers import Encoding
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sftmix.conventions import IGNORE_INDEX
from sftmix.data.examples import Example
from sftmix.data.examples_check import largest_id
from sftmix.data.rows import BadRowError, BadRows, OnBadRow
from sftmix.data.summary import Reading
from sftmix.templates.boundaries import parted_at_responses
from sftmix.templates.chat import Turns, adopt_template, bad_row
from sftmix.templates.rendering import Span

logger = logging.getLogger(__name__)

# Texts are tokenised together up to either limit: enough to keep the tokenizer's threads busy, and
# few enough to keep its own memory, about 150 bytes a token, small beside the tokens kept.
BATCH_ROWS = 1000
BATCH_CHARACTERS = 500_000
# A long text is first tokenised up to so many characters for each token of max_length: English has
# 4 to 5 a token, and twice as many suffice for most others.
CHARACTERS_PER_TOKEN = 8
SPARE_CHARACTERS = 1024
# Characters from one cut to the other. It is a prime, since how a run of one letter is split may
# depend on its length modulo a token's length, which then differs between the cuts.
BETWEEN_CUTS = 1009

_COLUMNS = datasets.Features(
    {
        "id": datasets.Value("int64"),
        "content_hash": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)


@dataclass(frozen=True, slots=True)
class _Row:
    """An example; its conversation as the template writes it, and where the responses stand."""

    example: Example
    text: str | None = None  # None: the example is tokens already
    turns: Sequence[Span] = ()


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A row's first tokens and labels, and whether there were more."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    truncated: bool


def _labels(input_ids: Sequence[int], offsets: Sequence[Span], turns: Sequence[Span]) -> list[int]:
    """Return the tokens that start inside a span, and -100 for all others."""
    labels = [IGNORE_INDEX] * len(input_ids)
    for begin, end in turns:
        first, last = (bisect_left(offsets, place, key=lambda o: o[0]) for place in (begin, end))
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
            ignored = name == "labels" and value == IGNORE_INDEX
            if not (0 <= value < vocab_size or ignored):
                raise bad_row(
                    example,
                    f"'{name}[{position}]' is {value}, outside the tokenizer's vocabulary of "
                    f"{vocab_size}",
                )


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    on_bad_row: OnBadRow = "error",
    reading: Reading | None = None,
    disable_progress: bool | None = False,
) -> datasets.Dataset:
    """Tokenise examples into a dataset of `id`, `content_hash`, `input_ids` and `labels`.

    A conversation is rendered with `chat_template(tokenizer)`, which a tokenizer without one is
    given, and tokenised as a whole, as far as `max_length` needs; a token is a response token if it
    starts inside an assistant turn. Sequences longer than `max_length` are cut from the right, so a
    response loses its tail; one log line says how many were. Labels are not shifted and the first
    token is never predicted, so an example needs a label after it. With a `reading`, examples that
    are refused or cut are counted there, and not logged.

    Raises:
        BadRowError: no response token is left within `max_length`; the template refuses the
            conversation, leaves out a text of it or does not show where its response is; or given
            `input_ids` or `labels` lie outside the vocabulary. `on_bad_row="skip"` leaves such
            examples out.
        ValueError: `max_length` or `on_bad_row` is wrong, no example is left, or the tokenizer is a
            slow one, which gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer: expected a fast one, which says where in the text each token lies, "
            f"got {type(tokenizer).__name__}"
        )
    if type(max_length) is not int or max_length < 2:
        raise ValueError(f"max_length: expected an integer of at least 2, got {max_length!r}")
    turns_of = None
    if any(example.messages is not None for example in examples):
        adopt_template(tokenizer)
        turns_of = Turns(tokenizer)
    bad = BadRows(on_bad_row, None if reading is None else reading.refuse)
    making = _Dataset(tokenizer, turns_of, max_length, bad)
    with tqdm(
        total=len(examples),
        desc="Tokenising",
        unit="row",
        delay=2,
        disable=disable_progress,
    ) as bar:
        for example in examples:
            making.add(example)
            bar.update()
    made = making.finished()
    if reading is None:
        bad.report(len(examples))
    if turns_of is not None:
        turns_of.report()
    if not made:
        why = "; ".join([f"data: no examples are left of {len(examples)}", *bad.reasons[:1]])
        raise ValueError(why)
    if reading is not None:
        reading.kept += sum(map(len, made))
        reading.cut += making.truncated
    elif making.truncated:
        logger.warning(
            "%d of %d rows were longer than max_length=%d and lost their end",
            making.truncated,
            len(examples),
            max_length,
        )
    return datasets.concatenate_datasets(made)


def first_tokens(
    example: Example, tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[list[int], list[int], bool]:
    """Return the first `most` tokens of an example, their labels, and whether there are more.

    Raises:
        BadRowError: as `tokenize_examples` does.
    """
    turns_of = None if example.messages is None else Turns(tokenizer)
    making = _Dataset(tokenizer, turns_of, most, BadRows("error"))
    making.add(example)
    [table] = making.finished()
    return table[0]["input_ids"], table[0]["labels"], bool(making.truncated)


class _Dataset:
    """Take examples one by one, tokenise them in batches, and put them into tables."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns_of: Turns | None,
        max_length: int,
        bad: BadRows,
    ) -> None:
        self.tokenizer, self.turns_of = tokenizer, turns_of
        self.max_length, self.bad = max_length, bad
        self.vocab_size = largest_id(tokenizer) + 1
        self.waiting: list[_Row] = []
        self.characters = 0
        self.columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self.tables: list[datasets.Dataset] = []
        self.truncated = 0

    def add(self, example: Example) -> None:
        try:
            if example.messages is not None:
                assert self.turns_of is not None
                text, turns = self.turns_of.spans(example)
                self.waiting.append(_Row(example, text, turns))
                self.characters += len(text)
            else:
                _check_range(example, self.vocab_size)
                self.waiting.append(_Row(example))
        except BadRowError as error:
            self.bad.add(error)
        if self.characters >= BATCH_CHARACTERS or len(self.waiting) >= BATCH_ROWS:
            self._tokenize()

    def finished(self) -> list[datasets.Dataset]:
        """Return the tables that hold examples."""
        self._tokenize()
        self._write_table()
        return self.tables

    def _tokenize(self) -> None:
        waiting, self.waiting, self.characters = self.waiting, [], 0
        texts = [row.text for row in waiting if row.text is not None]
        encoded = iter(_encoded(texts, self.tokenizer, self.max_length))
        for row in waiting:
            example = row.example
            tokens = (
                self._given(example) if row.text is None else self._labelled(row, *next(encoded))
            )
            if all(label == IGNORE_INDEX for label in tokens.labels[1:]):
                self.bad.add(bad_row(example, self._why_nothing_is_learnt(row, tokens)))
                continue
            self.truncated += tokens.truncated
            self.columns["id"].append(example.id)
            self.columns["content_hash"].append(example.content_hash)
            self.columns["input_ids"].append(np.asarray(tokens.input_ids, dtype=np.int32))
            self.columns["labels"].append(np.asarray(tokens.labels, dtype=np.int32))
        if len(self.columns["id"]) >= BATCH_ROWS:
            self._write_table()

    def _write_table(self) -> None:
        if self.columns["id"]:
            self.tables.append(datasets.Dataset.from_dict(self.columns, features=_COLUMNS))
        self.columns = {name: [] for name in _COLUMNS}

    def _labelled(self, row: _Row, encoding: Encoding, truncated: bool) -> _Tokens:
        text, n = row.text, self.max_length
        assert text is not None
        if truncated:
            # So much more text that the place of the cut changes none of the first tokens.
            text = text[: encoding.offsets[-1][1] + SPARE_CHARACTERS]
        turns = [turn for turn in row.turns if turn[0] < len(text)]
        ids, offsets = parted_at_responses(
            self.tokenizer, text, turns, encoding.ids, encoding.offsets
        )
        labels = _labels(ids, offsets, turns)
        return _Tokens(ids[:n], labels[:n], truncated or len(ids) > n)

    def _given(self, example: Example) -> _Tokens:
        ids, labels = example.input_ids, example.labels
        assert ids is not None
        assert labels is not None
        n = self.max_length
        return _Tokens(ids[:n], labels[:n], len(ids) > n)

    def _why_nothing_is_learnt(self, row: _Row, tokens: _Tokens) -> str:
        left = f"no response token is left within max_length={self.max_length}"
        if row.text is None:
            labels = row.example.labels or ()
            learnt = (i for i, label in enumerate(labels) if i and label != IGNORE_INDEX)
            first = next(learnt, None)
            if first is None:
                return f"'labels' has nothing to learn: all are {IGNORE_INDEX} after the first"
            return f"{left}: the first label is of token {first + 1} of {len(labels)}"
        if not tokens.truncated or all(begin >= end for begin, end in row.turns):
            return "the response is empty: the chat template writes no text of it"
        prompt = row.text[: row.turns[0][0]]
        [(encoding, more)] = _encoded([prompt], self.tokenizer, 4 * self.max_length)
        return (
            f"{left}: the prompt has {'more than ' if more else ''}{len(encoding):,} tokens; raise "
            "--max_length"
        )


def _encoded(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[Encoding, bool]]:
    """Return each text's first `max_length` tokens, and whether there are more."""
    size = CHARACTERS_PER_TOKEN * max_length + SPARE_CHARACTERS
    whole = iter(_tokenized([text for text in texts if len(text) <= 2 * size], tokenizer))
    found = []
    for text in texts:
        encoding = next(whole) if len(text) <= 2 * size else _head(text, tokenizer, max_length)
        more = len(encoding) > max_length
        encoding.truncate(max_length)
        found.append((encoding, more))
    return found


def _head(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoding:
    """Return the first `max_length + 1` tokens of a long text; fewer if it has no more."""
    size = CHARACTERS_PER_TOKEN * max_length + SPARE_CHARACTERS
    while 2 * size < len(text):
        heads = _tokenized([text[:size], text[: size + BETWEEN_CUTS]], tokenizer)
        lengths = [len(head) for head in heads]
        for head in heads:
            head.truncate(max_length + 1)
        one, other = heads
        # The last token may have been cut in two.
        if min(lengths) > max_length + 1 and one.ids == other.ids and one.offsets == other.offsets:
            return one
        size *= 2
    return _tokenized([text], tokenizer)[0]


def _tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
    if not texts:
        return []
    encoded: Any = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    encodings: list[Encoding] = encoded.encodings
    return encodings
