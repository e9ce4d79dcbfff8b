"""Check the shape of conversations, and mend it where that is asked for.

A conversation ends with the assistant, does not begin with it, and has no empty turn. After a
message of the system or a tool an answer may come first, a greeting say, which is learnt.
`--on_bad_row mend` mends conversations by these rules, and counts each example it changes:

- an empty system message is left out, and an empty turn ends the conversation before it;
- answers before the first question are left out, and what follows the last answer;
- neighbours of one role become one message, an empty line between their texts. Messages with more
  than a text, such as calls or masks that differ, stay apart, as do tools' results.
"""

from __future__ import annotations

import itertools
from typing import Any

from sftmix.data.messages import BadField, Masks, Messages, Notes

_Turn = tuple[dict[str, Any], bool | None]


def shaped(messages: Messages, masks: Masks, name: str, notes: Notes) -> tuple[Messages, Masks]:
    """Return a conversation that ends with an answer, mended if `notes` says so.

    Raises:
        BadField: there is no assistant message, or it begins with one, or does not end with one.
    """
    if notes.mend:
        messages, masks = _mended(messages, masks, notes)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadField(f"'{name}' has no assistant message")
    if messages[-1]["role"] != "assistant":
        raise BadField(
            f"'{name}' must end with the assistant, ends with {messages[-1]['role']}; "
            f"{_way(messages, masks, notes, 'cuts what follows the last answer')}"
        )
    if messages[0]["role"] == "assistant":
        raise BadField(
            f"'{name}' must not begin with the assistant; "
            f"{_way(messages, masks, notes, 'leaves out what comes before the first question')}"
        )
    return messages, masks


def _way(messages: Messages, masks: Masks, notes: Notes, does: str) -> str:
    """Return how the conversation can be mended, or that it cannot."""
    mended = () if notes.mend else _mended(messages, masks, Notes())[0]
    if mended and mended[0]["role"] != "assistant":
        return f"--on_bad_row mend {does}"
    return "no answer follows a question"


def learnt(messages: Messages, masks: Masks) -> tuple[bool, ...] | None:
    """Return for each message whether it is learnt; None if exactly the assistant's turns are.

    Raises:
        BadField: none is.
    """
    usual = [message["role"] == "assistant" for message in messages]
    if masks.count(None) == len(masks) and True in usual:
        return None
    found = [default if mask is None else mask for default, mask in zip(usual, masks, strict=True)]
    if not any(found):
        raise BadField("no assistant message is learnt: the masks of all are 0")
    return None if found == usual else tuple(found)


def _mended(messages: Messages, masks: Masks, notes: Notes) -> tuple[Messages, Masks]:
    turns: list[_Turn] = list(zip(messages, masks, strict=True))
    rules = {
        "an empty system prompt, left out": _without_empty_system,
        "an empty turn, cut with what follows": _without_empty,
        "answers before the first question, left out": _from_the_question,
        "what follows the last answer, cut": _to_the_answer,
        "neighbours of one role, joined": _joined,
    }
    for what, rule in rules.items():
        mended = rule(turns)
        notes.forgiven[what] += len(mended) != len(turns)
        turns = mended
    notes.forgiven = +notes.forgiven
    return tuple(message for message, _ in turns), [mask for _, mask in turns]


def _is_empty(turn: _Turn, *roles: str) -> bool:
    message = turn[0]
    silent = not (message["content"] or "").strip() and "tool_calls" not in message
    return silent and message["role"] in roles


def _without_empty_system(turns: list[_Turn]) -> list[_Turn]:
    return [turn for turn in turns if not _is_empty(turn, "system", "developer")]


def _without_empty(turns: list[_Turn]) -> list[_Turn]:
    return list(itertools.takewhile(lambda one: not _is_empty(one, "user", "assistant"), turns))


def _from_the_question(turns: list[_Turn]) -> list[_Turn]:
    roles = [message["role"] for message, _ in turns]
    first = roles.index("user") if "user" in roles else 0
    return [turn for i, turn in enumerate(turns) if i >= first or roles[i] != "assistant"]


def _to_the_answer(turns: list[_Turn]) -> list[_Turn]:
    while turns and turns[-1][0]["role"] != "assistant":
        turns = turns[:-1]
    return turns


def _joined(turns: list[_Turn]) -> list[_Turn]:
    joined: list[_Turn] = []
    for message, mask in turns:
        before, earlier_mask = joined[-1] if joined else ({}, None)
        plain = before.keys() == message.keys() == {"role", "content"} and mask == earlier_mask
        if plain and before["role"] == message["role"] != "tool":
            text = f"{before['content']}\n\n{message['content']}"
            joined[-1] = {**message, "content": text}, mask
        else:
            joined.append((message, mask))
    return joined
