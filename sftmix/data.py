"""Examples from files: rows are read, checked and brought to one form.

A file's format is found by its columns:

    messages                          a list of {"role", "content"}; system, user, assistant
    prompt, completion                two strings, or two lists of messages
    instruction, [input,] output      three strings; `input` may be missing, null or empty
    question, answer                  two strings
    input_ids, labels                 two lists of integers, -100 where nothing is learnt

The format is the one whose columns are all present in the most rows; on a tie the first in this
list. Other columns are ignored.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sftmix.rows import BadRowError, BadRows, OnBadRow, Row, read_rows

__all__ = [
    "BadRowError",
    "BadRows",
    "Example",
    "OnBadRow",
    "content_hash",
    "data_hash",
    "load_examples",
]

Messages = tuple[dict[str, Any], ...]

IGNORED_LABEL = -100
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One row to learn from: a conversation, or a sequence that is already tokens.

    `id` is the row's number over all files in order, from 0, bad rows counted. `source` is
    "path:line". `content_hash` is the SHA-256 of what is learnt from, as canonical JSON, so it
    depends neither on the tokenizer nor on the order of keys. Either `messages` is set, or
    `input_ids` and `labels` are. Messages have the keys that chat templates read: `role`, `content`
    and, where the row has them, `reasoning_content`, `thinking`, `tool_calls` and the like.
    `tools` are the descriptions that a template writes for its tools. `learnt` says of each message
    whether it carries loss; None: every assistant turn does. `numbers` are those of the columns
    that were asked for.
    """

    id: int
    source: str
    content_hash: str
    messages: Messages | None = None
    tools: list[Any] | None = None
    learnt: tuple[bool, ...] | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    numbers: dict[str, float] | None = None


class _BadField(ValueError):
    """What is wrong with a row; its place is added where it is known."""


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _BadField(f"'{name}' must be a string, got {_kind(value)}")
    if not value.strip():
        raise _BadField(f"'{name}' is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadField(
            f"'{name}' holds a lone surrogate at character {error.start}, which is no text"
        ) from None
    return value


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _field(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise _BadField(f"'{name}' is missing")
    return row[name]


def _conversation(value: object, name: str) -> Messages:
    if not isinstance(value, list):
        raise _BadField(f"'{name}' must be a list of messages, got {_kind(value)}")
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))


def _message(value: object, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _BadField(f"'{name}' must be an object with a role and a content, got {_kind(value)}")
    role = value.get("role")
    if role not in ROLES:
        raise _BadField(f"'{name}.role' must be one of {', '.join(ROLES)}, got {role!r}")
    return {"role": role, "content": _text(value.get("content"), f"{name}.content")}


def _checked(messages: Messages, name: str) -> Messages:
    if not any(message["role"] == "assistant" for message in messages):
        raise _BadField(f"'{name}' has no assistant message")
    if messages[-1]["role"] != "assistant":
        raise _BadField(f"'{name}' must end with the assistant, ends with {messages[-1]['role']}")
    if messages[0]["role"] == "assistant":
        raise _BadField(f"'{name}' must not begin with the assistant")
    return messages


def _from_pair(prompt: str, response: str) -> Messages:
    return (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    )


def _from_messages(row: dict[str, Any]) -> Messages:
    return _checked(_conversation(_field(row, "messages"), "messages"), "messages")


def _from_prompt(row: dict[str, Any]) -> Messages:
    prompt, completion = _field(row, "prompt"), _field(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        replies = _conversation(completion, "completion")
        if not replies:
            raise _BadField("'completion' is empty")
        return _checked(_conversation(prompt, "prompt") + replies, "prompt + completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        raise _BadField(
            "'prompt' and 'completion' must both be strings or both be lists of messages, "
            f"got {_kind(prompt)} and {_kind(completion)}"
        )
    return _from_pair(_text(prompt, "prompt"), _text(completion, "completion"))


def _from_instruction(row: dict[str, Any]) -> Messages:
    prompt = _text(_field(row, "instruction"), "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise _BadField(f"'input' must be a string, got {_kind(extra)}")
    if extra and extra.strip():
        prompt = f"{prompt}\n\n{_text(extra, 'input')}"
    return _from_pair(prompt, _text(_field(row, "output"), "output"))


def _from_question(row: dict[str, Any]) -> Messages:
    return _from_pair(
        _text(_field(row, "question"), "question"), _text(_field(row, "answer"), "answer")
    )


def _integers(row: dict[str, Any], name: str) -> list[int]:
    value = _field(row, name)
    if not isinstance(value, list):
        raise _BadField(f"'{name}' must be a list of integers, got {_kind(value)}")
    for i, item in enumerate(value):
        if type(item) is not int:  # a bool is an int to isinstance
            raise _BadField(f"'{name}[{i}]' must be an integer, got {item!r}")
    return value


def _from_tokens(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    input_ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    if len(input_ids) != len(labels):
        raise _BadField(
            "'input_ids' and 'labels' must be of one length, "
            f"got {len(input_ids)} and {len(labels)}"
        )
    # The first token is never predicted, so a label there teaches nothing.
    if all(label == IGNORED_LABEL for label in labels[1:]):
        raise _BadField(f"'labels' has nothing to learn: all are {IGNORED_LABEL} after the first")
    return input_ids, labels


_TOKEN_COLUMNS = ("input_ids", "labels")
_FORMATS: dict[tuple[str, ...], Callable[[dict[str, Any]], Messages]] = {
    ("messages",): _from_messages,
    ("prompt", "completion"): _from_prompt,
    ("instruction", "output"): _from_instruction,
    ("question", "answer"): _from_question,
}


def _format_of(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    formats = (*_FORMATS, _TOKEN_COLUMNS)
    objects = [row.value for row in rows if isinstance(row.value, dict)]
    counts = [sum(all(c in row for c in columns) for row in objects) for columns in formats]
    if max(counts) > 0:
        return formats[counts.index(max(counts))]
    if not objects:
        first = rows[0]
        reason = first.problem or f"a row must be an object, got {_kind(first.value)}"
        raise BadRowError(name, first.line, f"{reason}; no row of the file can be read")
    found = sorted({str(column) for row in objects for column in row})
    known = "; ".join(" + ".join(columns) for columns in formats)
    raise ValueError(f"{name}: columns {found} are no known format; the formats known are {known}")


def _digest(content: object) -> str:
    text = json.dumps(
        content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str
    )
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def content_hash(row: dict[str, Any]) -> str:
    """The `Example.content_hash` of a row; of all its columns where it is of no known format."""
    try:
        for columns, messages_of in _FORMATS.items():
            if all(column in row for column in columns):
                return _digest({"messages": messages_of(row)})
        if all(column in row for column in _TOKEN_COLUMNS):
            return _digest({name: row[name] for name in _TOKEN_COLUMNS})
    except _BadField:
        pass
    return _digest(row)


def _example(row: Row, columns: tuple[str, ...], number: int, name: str) -> Example:
    source = f"{name}:{row.line}"
    try:
        if row.problem is not None:
            raise _BadField(row.problem)
        if not isinstance(row.value, dict):
            raise _BadField(f"a row must be an object, got {_kind(row.value)}")
        if columns == _TOKEN_COLUMNS:
            ids, labels = _from_tokens(row.value)
            digest = _digest({"input_ids": ids, "labels": labels})
            return Example(number, source, digest, input_ids=ids, labels=labels)
        messages = _FORMATS[columns](row.value)
    except _BadField as error:
        raise BadRowError(name, row.line, str(error)) from None
    return Example(number, source, _digest({"messages": messages}), messages=messages)


def _with_numbers(example: Example, row: Row, columns: Sequence[str], name: str) -> Example:
    try:
        return replace(example, numbers={column: _number(row.value, column) for column in columns})
    except _BadField as error:
        raise BadRowError(name, row.line, str(error)) from None


def _number(row: dict[str, Any], name: str) -> float:
    value = _field(row, name)
    if type(value) not in (int, float) or value != value:  # a bool is an int to isinstance
        raise _BadField(f"'{name}' must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise _BadField(f"'{name}' is an integer beyond any float") from None


def load_examples(
    data: Sequence[str | Path],
    *,
    on_bad_row: OnBadRow = "error",
    split: str = "train",
    numbers: Sequence[str] = (),
    disable_progress: bool | None = False,
) -> list[Example]:
    """Read examples from JSON, JSONL and parquet files, or from `datasets` by name.

    A JSON file holds an array of rows or one row per line. A name that is no file and ends in none
    of these goes to `datasets.load_dataset(name, split=split)`. The formats are those of this
    module's docstring. `on_bad_row="skip"` leaves bad rows out and logs one warning. `numbers`:
    columns besides whose numbers examples keep; a row where one is missing is bad.

    Raises BadRowError for a bad row, with its file, line and reason; FileNotFoundError for a
    missing file; ValueError for an unknown ending or unknown columns, for a file without rows and
    where no example is left; TypeError where `data` is a single name.
    """
    if isinstance(data, str | Path):
        raise TypeError(f"data must be a list of files or names, got the single name {data!r}")
    if not data:
        raise ValueError("data must name at least one file, got none")
    bad = BadRows(on_bad_row)
    bar = functools.partial(tqdm, unit="row", delay=2, disable=disable_progress)
    examples: list[Example] = []
    number = 0
    for name in data:
        rows = list(bar(read_rows(name, split), desc=f"Reading {name}"))
        if not rows:
            raise ValueError(f"{name}: holds no rows")
        columns = _format_of(rows, str(name))
        for row in bar(rows, desc=f"Checking {name}"):
            try:
                example = _example(row, columns, number, str(name))
                if numbers:
                    example = _with_numbers(example, row, numbers, str(name))
                examples.append(example)
            except BadRowError as error:
                bad.add(error)
            number += 1
    bad.report(number)
    if not examples:
        raise ValueError(f"no examples are left: all {number} rows are bad")
    return examples


def data_hash(content_hashes: Iterable[str]) -> str:
    """SHA-256 over content hashes in order: equal for equal content in equal order."""
    return hashlib.sha256("\n".join(content_hashes).encode("ascii")).hexdigest()
