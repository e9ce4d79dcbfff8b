"""Find the format of a row by its columns, and read the columns beside them that have a meaning.

docs/data.md is the table for users: which columns are read, refused, or named as not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sftmix.data.hashing import digest
from sftmix.data.messages import (
    BadField,
    Masks,
    Messages,
    carries,
    checked,
    conversation,
    from_json,
    kind,
    learnt,
    listed,
    text_of,
)
from sftmix.data.token_rows import COLUMNS as TOKEN_COLUMNS
from sftmix.data.token_rows import LOSS_MASKS, read_tokens

_Found = tuple[Messages, Masks]

# Columns that change what is said or learnt, whatever the format, and what to do instead.
REFUSED = {
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos", "pixel_values"),
        "only text is learnt from",
    ),
    "functions": "name them 'tools'",
    "function_call": "give it as 'tool_calls' of a message",
    "documents": "write them into the prompt",
    "chat_template_kwargs": "give a --chat_template that needs none",
}
# Weights of a whole row: every row has 1.
WEIGHTS = ("weight", "loss_weight", "sample_weight", "train", "trainable")
# Parts of a prompt in one format, or of a comparison: beside another format's text they would be
# lost. Beside whole messages they are where those came from, and are only named.
OF_A_PAIR = {
    "instruction": "write it into the prompt",
    "input": "write it into the prompt",
    "context": "write it into the prompt",
    "rejected": "it is what not to learn; give only rows of what to learn",
}


@dataclass(frozen=True)
class Content:
    """The content of an example: messages, or tokens with labels."""

    messages: Messages | None = None
    tools: list[Any] | None = None
    learnt: tuple[bool, ...] | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None

    def digest(self) -> str:
        """Return the SHA-256 of the content as canonical JSON."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        return digest(found)


def field(row: dict[str, Any], name: str) -> Any:
    """Return the value of a column.

    Raises:
        BadField: the row has no such column.
    """
    if name not in row:
        raise BadField(f"'{name}' is missing")
    return row[name]


def _pair(row: dict[str, Any], prompt: str, response: str) -> _Found:
    texts = [*_history(row.get("history")), (prompt, response)]
    messages = tuple(
        {"role": role, "content": content}
        for turn in texts
        for role, content in zip(("user", "assistant"), turn, strict=True)
    )
    return messages, [None] * len(messages)


def _history(value: object) -> list[tuple[str, str]]:
    """Return earlier turns from pairs of a prompt and a response, as Alpaca's files have them."""
    pairs = listed(value, "history")
    turns = []
    for i, pair in enumerate(pairs or ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadField(f"'history[{i}]' must be a list of a prompt and a response")
        prompt, response = (text_of(text, f"history[{i}][{j}]") for j, text in enumerate(pair))
        turns.append((prompt, response))
    return turns


def _from_messages(row: dict[str, Any], unused: Counter[str]) -> _Found:
    messages, masks = conversation(field(row, "messages"), "messages", unused)
    if carries(row.get("history")):
        raise BadField("'history' beside 'messages' is not read; write it into the messages")
    return checked(messages, "messages"), masks


def _from_prompt(row: dict[str, Any], unused: Counter[str]) -> _Found:
    prompt, completion = field(row, "prompt"), field(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before, before_masks = conversation(prompt, "prompt", unused)
        replies, reply_masks = conversation(completion, "completion", unused)
        if not replies:
            raise BadField("'completion' is empty")
        if carries(row.get("history")):
            raise BadField("'history' beside a 'prompt' of messages is not read; write it into it")
        # Only the completion is learnt, unless the prompt's own masks say otherwise.
        before_masks = [bool(mask) for mask in before_masks]
        return checked(before + replies, "prompt + completion"), before_masks + reply_masks
    if isinstance(prompt, list) or isinstance(completion, list):
        raise BadField(
            "'prompt' and 'completion' must both be strings or both be lists of messages, "
            f"got {kind(prompt)} and {kind(completion)}"
        )
    return _pair(row, text_of(prompt, "prompt"), text_of(completion, "completion"))


def _from_instruction(row: dict[str, Any], unused: Counter[str]) -> _Found:
    prompt = text_of(field(row, "instruction"), "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadField(f"'input' must be a string, got {kind(extra)}")
    if extra and extra.strip():
        prompt = f"{prompt}\n\n{text_of(extra, 'input')}"
    return _pair(row, prompt, text_of(field(row, "output"), "output"))


def _from_question(row: dict[str, Any], unused: Counter[str]) -> _Found:
    prompt = text_of(field(row, "question"), "question")
    context = row.get("context")
    if carries(context) and text_of(context, "context", empty=True).strip():
        prompt = f"{context}\n\n{prompt}"
    return _pair(row, prompt, text_of(field(row, "answer"), "answer"))


@dataclass(frozen=True)
class _Format:
    """The reader of a row with some columns, and the columns that it reads besides."""

    read: Callable[[dict[str, Any], Counter[str]], _Found]
    besides: tuple[str, ...] = ()


_TEXT_FORMATS = {
    ("messages",): _Format(_from_messages, tuple(OF_A_PAIR)),
    ("prompt", "completion"): _Format(_from_prompt),
    ("instruction", "output"): _Format(_from_instruction, ("input",)),
    ("question", "answer"): _Format(_from_question, ("context",)),
}
FORMATS = (
    *_TEXT_FORMATS,
    ("input_ids", "labels"),
    *(("input_ids", mask) for mask in LOSS_MASKS),
)
_READ_BESIDES = ("history", "system", "system_prompt", "tools")


def read_content(
    row: dict[str, Any],
    columns: tuple[str, ...],
    unused: Counter[str],
    asked: Collection[str] = (),
) -> Content:
    """Return the content to learn from a row of the format `columns`.

    `unused` counts the columns and the fields of messages that carry a value and are not read,
    except the columns in `asked`, which something else reads.

    Raises:
        BadField: the row is malformed, or has a column whose meaning would be lost.
    """
    try:
        return _read(row, columns, unused, asked)
    except RecursionError:
        raise BadField("a value is nested too deep") from None


def _read(
    row: dict[str, Any], columns: tuple[str, ...], unused: Counter[str], asked: Collection[str]
) -> Content:
    if columns not in _TEXT_FORMATS:
        input_ids, labels = read_tokens(row)
        _refuse_or_count(row, {*TOKEN_COLUMNS, *asked}, {}, unused)
        return Content(input_ids=input_ids, labels=labels)
    form = _TEXT_FORMATS[columns]
    messages, masks = form.read(row, unused)
    messages, masks = _with_system(row, messages, masks)
    content = Content(messages, _tools(row.get("tools")), learnt(messages, masks))
    refused = {name: way for name, way in OF_A_PAIR.items() if name not in form.besides}
    used = {*columns, *_READ_BESIDES, *asked}
    if columns != ("messages",):
        used |= set(form.besides)
    _refuse_or_count(row, used, refused, unused)
    return content


def _with_system(row: dict[str, Any], messages: Messages, masks: Masks) -> _Found:
    """Return the messages, preceded by the row's system prompt if only the row has one."""
    texts = {
        name: text_of(row[name], name, empty=True)
        for name in ("system", "system_prompt")
        if carries(row.get(name))
    }
    found = {text for text in texts.values() if text.strip()}
    if not found:
        return messages, masks
    if len(found) > 1:
        raise BadField("'system' and 'system_prompt' differ; leave one of them out")
    [text] = found
    if messages[0]["role"] not in ("system", "developer"):
        return ({"role": "system", "content": text}, *messages), [None, *masks]
    if messages[0]["content"] != text:
        raise BadField(
            f"'{next(iter(texts))}' is another text than the messages' own system prompt; "
            "leave one of them out"
        )
    return messages, masks


def _tools(value: object) -> list[Any] | None:
    """Return descriptions of tools, given as a list of objects or JSON texts, or as JSON text."""
    tools = listed(value, "tools")
    if tools is None:
        return None
    found = [
        from_json(tool, f"tools[{i}]") if isinstance(tool, str) else tool
        for i, tool in enumerate(tools)
    ]
    for i, tool in enumerate(found):
        if not isinstance(tool, dict):
            raise BadField(f"'tools[{i}]' must be an object, or JSON text of one, got {kind(tool)}")
    return found


def _refuse_or_count(
    row: dict[str, Any], used: Collection[str], refused: dict[str, str], unused: Counter[str]
) -> None:
    for name, value in row.items():
        if name in used or not carries(value):
            continue
        instead = REFUSED.get(name, refused.get(name))
        if instead is not None and value is not False:
            raise BadField(f"'{name}' is not read; {instead}")
        if name in WEIGHTS and isinstance(value, bool | int | float):
            if value != 1:
                raise BadField(
                    f"'{name}' is {value!r}: rows have no weights here; leave out what is not "
                    "learnt, and the column"
                )
        elif name == "label" and (value is False or (value == 0 and "completion" in row)):
            raise BadField("'label' is false: an answer that is not wanted; leave such rows out")
        else:
            unused[str(name)] += 1


def format_of(rows: Sequence[Iterable[str]]) -> tuple[str, ...]:
    """Return the format whose columns are all present in the most rows; the first on a tie.

    Args:
        rows: the names of the columns of each row.

    Raises:
        ValueError: no row has all columns of any format.
    """
    counts = [sum(set(columns) <= set(row) for row in rows) for columns in FORMATS]
    if max(counts) > 0:
        return FORMATS[counts.index(max(counts))]
    found = sorted({str(column) for row in rows for column in row})
    if {"chosen", "rejected"} <= set(found):
        raise ValueError(
            f"columns {found} are preferences, of which one answer is not to be learnt; give the "
            "chosen ones as 'messages', or as 'prompt' and 'completion'"
        )
    known = "; ".join(" + ".join(columns) for columns in FORMATS)
    raise ValueError(f"columns {found} are no known format; the formats known are {known}")
