"""Read conversations: roles, contents, tool calls, thoughts and masks.

A message keeps the keys that chat templates read: `role`, `content`, `reasoning_content`,
`thinking`, `tool_calls`, `tool_call_id` and `name`. Masks (`weight`, `train` and the like) say
which assistant messages are learnt and never reach the template. Fields that would change what is
said or learnt, and that nothing reads, are refused; all other fields with a value are counted, and
named later.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

Messages = tuple[dict[str, Any], ...]
Masks = list[bool | None]  # of each message: learnt, not learnt, or not said

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("reasoning_content", "thinking", "tool_call_id", "name")
# OpenAI, Mistral, axolotl, ms-swift and slime have these names for the same mask.
MASKS = (
    *("weight", "loss_weight", "loss", "loss_mask", "step_loss_mask"),
    *("train", "training", "trainable"),
)
# Fields that change what is said or learnt, and what to do instead.
REFUSED = {
    "function_call": "give it as 'tool_calls'",
    "reasoning": "name it 'reasoning_content' or 'thinking', as the chat template reads it",
    "refusal": "give its text as 'content'",
    "prefix": "end the row with a whole assistant message",
    "partial": "end the row with a whole assistant message",
    "mask": "say with 'train': true or false whether the message is learnt",
    "masked": "say with 'train': true or false whether the message is learnt",
    "train_detail": "say with 'train' whether the whole message is learnt",
    "training_detail": "say with 'train' whether the whole message is learnt",
    **dict.fromkeys(
        ("image", "images", "image_url", "audio", "audios", "video", "videos"),
        "only text is learnt from",
    ),
}


class BadField(ValueError):
    """A row is malformed; the caller that knows its place adds it."""


def kind(value: object) -> str:
    """Return the name of a value's type, null for None."""
    return "null" if value is None else type(value).__name__


def carries(value: object) -> bool:
    """Tell whether a value says anything: null, an empty string, list or object do not."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def text_of(value: object, name: str, *, empty: bool = False) -> str:
    """Return a string after checking it; `empty` lets it be empty.

    Raises:
        BadField: it is none, empty, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise BadField(f"'{name}' must be a string, got {kind(value)}")
    if not (empty or value.strip()):
        raise BadField(f"'{name}' is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadField(
            f"'{name}' holds a lone surrogate at character {error.start}, which is no text"
        ) from None
    return value


def plain(value: Any, name: str) -> Any:
    """Return a nested value with its strings checked, without keys whose value is null.

    Arrow gives every object of a list the keys of all others, null where they were absent.

    Raises:
        BadField: a string in it holds a lone surrogate.
    """
    if isinstance(value, dict):
        return {
            text_of(key, name, empty=True): plain(part, f"{name}.{key}")
            for key, part in value.items()
            if part is not None
        }
    if isinstance(value, list):
        return [plain(part, f"{name}[{i}]") for i, part in enumerate(value)]
    return text_of(value, name, empty=True) if isinstance(value, str) else value


def listed(value: object, name: str) -> list[Any] | None:
    """Return a list, given as such or as JSON text; None if it is empty.

    Raises:
        BadField: it is neither.
    """
    if isinstance(value, str) and value.strip():
        value = from_json(value, name)
    elif isinstance(value, list):
        value = plain(value, name)
    if not carries(value) or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list):
        raise BadField(f"'{name}' must be a list, or JSON text of one, got {kind(value)}")
    return value


def from_json(text: str, name: str) -> Any:
    """Return the value that a field's JSON text holds.

    Raises:
        BadField: it is not JSON.
    """
    try:
        return json.loads(text_of(text, name))
    except json.JSONDecodeError as error:
        raise BadField(f"'{name}' is no JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise BadField(f"'{name}' is unreadable JSON: {error}") from None


def conversation(value: object, name: str, unused: Counter[str]) -> tuple[Messages, Masks]:
    """Return the messages and their masks; count in `unused` the fields that nothing reads.

    Raises:
        BadField: it is no list of messages, or one of them is malformed.
    """
    if not isinstance(value, list):
        raise BadField(f"'{name}' must be a list of messages, got {kind(value)}")
    messages, masks = [], []
    for i, item in enumerate(value):
        message, mask = _message(item, f"{name}[{i}]", unused)
        messages.append(message)
        masks.append(mask)
    return tuple(messages), masks


def checked(messages: Messages, name: str) -> Messages:
    """Return the messages after checking that they are a conversation that ends with an answer.

    Raises:
        BadField: they have no assistant message, or begin with one, or do not end with one.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise BadField(f"'{name}' has no assistant message")
    if messages[-1]["role"] != "assistant":
        raise BadField(f"'{name}' must end with the assistant, ends with {messages[-1]['role']}")
    if messages[0]["role"] == "assistant":
        raise BadField(f"'{name}' must not begin with the assistant")
    return messages


def learnt(messages: Messages, masks: Masks) -> tuple[bool, ...] | None:
    """Return for each message whether it is learnt; None if exactly the assistant's turns are.

    Raises:
        BadField: none is.
    """
    usual = [message["role"] == "assistant" for message in messages]
    found = [default if mask is None else mask for default, mask in zip(usual, masks, strict=True)]
    if not any(found):
        raise BadField("no assistant message is learnt: the masks of all are 0")
    return None if found == usual else tuple(found)


def _message(value: object, name: str, unused: Counter[str]) -> tuple[dict[str, Any], bool | None]:
    if not isinstance(value, dict):
        raise BadField(f"'{name}' must be an object with a role and a content, got {kind(value)}")
    role = value.get("role")
    if role not in ROLES:
        raise BadField(f"'{name}.role' must be one of {', '.join(ROLES)}, got {role!r}")
    calls = _tool_calls(value.get("tool_calls"), f"{name}.tool_calls")
    if calls and role != "assistant":
        raise BadField(f"'{name}.tool_calls' are of the {role}; only the assistant calls tools")
    content = _content(value.get("content"), f"{name}.content", unused)
    if content is not None or not calls:
        # A call needs no words beside it, and a tool may have nothing to say.
        content = text_of(content, f"{name}.content", empty=bool(calls) or role == "tool")
    message = {"role": role, "content": content}
    for key in TEXTS:
        if carries(value.get(key)) and text_of(value[key], f"{name}.{key}", empty=True).strip():
            message[key] = value[key]
    if calls:
        message["tool_calls"] = calls
    mask = _mask(value, name)
    if mask and role != "assistant":
        raise BadField(
            f"'{name}' is of the {role} and marked as learnt; only assistant messages are learnt, "
            "so leave its mask out"
        )
    _count_unused(value, name, ("role", "content", "tool_calls", *TEXTS, *MASKS), unused)
    return message, mask


def _count_unused(
    value: dict[str, Any], name: str, used: tuple[str, ...], unused: Counter[str]
) -> None:
    """Refuse fields that change the meaning; count the others that carry a value."""
    for key, part in value.items():
        if key in used or not carries(part):
            continue
        if key in REFUSED and part is not False:
            raise BadField(f"'{name}.{key}' is not read; {REFUSED[key]}")
        unused[f"{name.partition('[')[0]}[].{key}"] += 1


def _content(value: Any, name: str, unused: Counter[str]) -> Any:
    """Return a string or null as it is, and a list of text parts as one string."""
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        place = f"{name}[{i}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            found = part.get("type") if isinstance(part, dict) else part
            raise BadField(f"'{place}' must be a part of type 'text', got {found!r:.60}")
        for key in MASKS:
            if part.get(key) is not None:
                raise BadField(f"'{place}.{key}' is not read; only a whole message has a mask")
        _count_unused(part, place, ("type", "text"), unused)
        texts.append(text_of(part.get("text"), f"{place}.text", empty=True))
    return "".join(texts)


def _tool_calls(value: object, name: str) -> list[Any] | None:
    """Return the calls with their arguments as objects; chat templates and servers write JSON."""
    calls = listed(value, name)
    if calls is None:
        return None
    return [_tool_call(call, f"{name}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: object, name: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadField(f"'{name}' must be an object, got {kind(call)}")
    nested = "function" in call
    function = call["function"] if nested else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadField(f"'{name}' must have a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = from_json(arguments, f"{name}.arguments")
    if not carries(arguments) or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadField(
            f"'{name}.arguments' must be an object, or JSON text of one, got {kind(arguments)}"
        )
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if nested else function


def _mask(message: dict[str, Any], name: str) -> bool | None:
    given = {
        key: flag_of(message[key], f"{name}.{key}") for key in MASKS if message.get(key) is not None
    }
    if len(set(given.values())) > 1:
        raise BadField(f"'{name}' is both learnt and not: {', '.join(map(repr, given))} differ")
    return next(iter(given.values()), None)


def flag_of(value: object, name: str) -> bool:
    """Return a mask's value as a bool.

    Raises:
        BadField: it is neither 0 nor 1.
    """
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadField(
            f"'{name}' must be 0 or 1 (false or true), got {value!r:.60}; no weight lies between"
        )
    return bool(value)
