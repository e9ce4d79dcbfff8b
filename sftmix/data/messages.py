"""Read conversations: roles, contents, tool calls, thoughts and masks.

A message keeps the keys that chat templates read: `role`, `content`, `reasoning_content`,
`thinking`, `tool_calls`, `tool_call_id` and `name`. Masks (`weight`, `train` and the like) say
which assistant messages are learnt and never reach the template. Fields that would change what is
said or learnt, and that nothing reads, are refused; all other fields with a value are counted, and
named later. What is read under another name than the usual one is counted, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sftmix.data.spelling import bare, spellings, unquoted

Messages = tuple[dict[str, Any], ...]
Masks = list[bool | None]  # of each message: learnt, not learnt, or not said

ROLES = ("system", "developer", "user", "assistant", "tool")
# Names that public data sets have for these roles; `CALLING` marks a call given as the content.
CALLING = ("function_call", "tool_call")
SYNONYMS = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "ai", *CALLING), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
    "ipython": "tool",  # Llama 3's
}
# Keys of an object that holds a whole turn, besides the roles.
TURN_KEYS = {
    **dict.fromkeys(("input", "prompt", "question"), "user"),
    **dict.fromkeys(("output", "response", "answer"), "assistant"),
}
# Fields of a message's role and content, the first that says something; Gemini has `parts`.
ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value", "parts")
TEXTS = ("reasoning_content", "thinking", "tool_call_id", "name")
TEXT_PARTS = ("text", "input_text", "output_text")
# OpenAI, Mistral, axolotl, ms-swift and slime have these names for the same mask.
MASKS = (
    *("weight", "loss_weight", "loss", "loss_mask", "step_loss_mask"),
    *("train", "training", "trainable"),
)
_AS_CALLS = "give it as 'tool_calls' of the message"
_AS_RESULT = "give it as the content of a message of the role 'tool'"
# Fields that change what is said or learnt, and what to do instead.
REFUSED = {
    **dict.fromkeys(("tools", "functions"), "give them in the row's column 'tools'"),
    **dict.fromkeys(("function_calls", "tool_call", "tool_use"), _AS_CALLS),
    **dict.fromkeys(("tool_result", "tool_results"), _AS_RESULT),
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
# Parts of a content by their type, or by the field that holds them, and what to do instead.
PARTS = {
    **dict.fromkeys(("tool_use", "tool_call", "function_call"), _AS_CALLS),
    **dict.fromkeys(("tool_result", "tool_response", "function_response"), _AS_RESULT),
    **dict.fromkeys(
        ("thinking", "reasoning", "reasoning_content", "thought", "redacted_thinking"),
        "give it as 'reasoning_content' of the message",
    ),
    **dict.fromkeys(
        (
            *("image", "image_url", "input_image", "audio", "input_audio", "video", "document"),
            *("file", "inline_data", "file_data"),
        ),
        "only text is learnt from",
    ),
}
_CALLS = ("tool_calls", "function_call")
_FIELDS = frozenset((*ROLE_FIELDS, *CONTENT_FIELDS, *_CALLS, "reasoning", *TEXTS, *MASKS, *REFUSED))
_PART_FIELDS = frozenset(("type", "text", *MASKS, *REFUSED, *PARTS))
_OTHER_ARGUMENTS = ("parameters", "args", "input")
_CALL_FIELDS = frozenset(("type", "id", "function", "name", "arguments", *_OTHER_ARGUMENTS))


class BadField(ValueError):
    """A row is malformed; the caller that knows its place adds it."""


@dataclass
class Notes:
    """What was found while rows were read and is not in their content.

    `unused` counts the columns and fields that carry a value and are not read, `forgiven` what was
    read under another name, or was mended. `mend` lets conversations be mended (see `shapes.py`).
    """

    unused: Counter[str] = field(default_factory=Counter)
    forgiven: Counter[str] = field(default_factory=Counter)
    mend: bool = False

    def add(self, other: Notes) -> None:
        """Add the counts of another row."""
        for own, others in ((self.unused, other.unused), (self.forgiven, other.forgiven)):
            if others:
                own.update(others)


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


def conversation(
    value: object,
    name: str,
    notes: Notes,
    fields: Mapping[str, str] | None = None,
    *,
    texts: bool = False,
) -> tuple[Messages, Masks]:
    """Return the messages and their masks.

    The value is a list of messages, as such or as JSON text. A message is an object with a role and
    a content, or with roles as its keys. `texts` allows a list of strings, in which the user
    begins. `fields` gives the names of role and content if they are not usual.

    Raises:
        BadField: it is no list of messages, or one of them is malformed.
    """
    items = _items(value, name)
    if texts and items and all(isinstance(item, str) for item in items):
        items = [
            {"role": ("user", "assistant")[i % 2], "content": item} for i, item in enumerate(items)
        ]
        fields = None
    messages: list[dict[str, Any]] = []
    masks: Masks = []
    for i, item in enumerate(items):
        if not fields and (simple := _simple(item)):
            messages.append(simple)
            masks.append(None)
            continue
        for one in _turns(item):
            message, mask = _message(one, f"{name}[{i}]", notes, fields or {})
            messages.append(message)
            masks.append(mask)
    return tuple(messages), masks


def _simple(item: Any) -> dict[str, Any] | None:
    """Return the message of an object with no more than a role and a text; None of any other.

    Most messages are so, and `_message` takes three times as long.
    """
    if type(item) is not dict or len(item) != 2:
        return None
    said, text = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if type(said) is not str or type(text) is not str or said in CALLING or not text.strip():
        return None
    role = said if said in ROLES else SYNONYMS.get(said)
    if role is None or not (text.isascii() or _is_text(text)):
        return None
    return {"role": role, "content": text}


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _items(value: object, name: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, name)
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        # `datasets` reads a sequence of objects as an object of sequences.
        lengths = {len(part) for part in value.values()}
        if len(lengths) > 1:
            raise BadField(f"'{name}' has lists of {' and '.join(map(str, sorted(lengths)))} items")
        value = [
            dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)
        ]
    if not isinstance(value, list):
        raise BadField(f"'{name}' must be a list of messages, got {kind(value)}")
    return value


def _turns(item: Any) -> list[Any]:
    """Return one message for each role that is a key of the object, else the object itself."""
    if not isinstance(item, dict) or not item:
        return [item]
    said = {key: text for key, text in item.items() if text is not None}
    if said and all(key in ROLES or key in SYNONYMS or key in TURN_KEYS for key in said):
        turns = [{"role": TURN_KEYS.get(key, key), "content": text} for key, text in said.items()]
        return sorted(turns, key=lambda one: ROLES.index(SYNONYMS.get(one["role"], one["role"])))
    return [item]


def role_of(value: object, name: str, notes: Notes) -> str:
    """Return the role that a text names; count capitals and blanks as forgiven.

    Raises:
        BadField: it names none.
    """
    if isinstance(value, str) and (value in ROLES or value in SYNONYMS):
        return SYNONYMS.get(value, value)
    known = _spelt(value)
    role = known if known in ROLES else SYNONYMS.get(known)
    if role is None:
        raise BadField(f"'{name}' must be one of {', '.join(ROLES)}, got {value!r:.60}")
    notes.forgiven[f"role {value!r:.60} as {role!r}"] += 1
    return role


def _spelt(value: object) -> str:
    """Return a name in small letters, without blanks around it."""
    return "_".join(value.lower().replace("-", " ").split()) if isinstance(value, str) else ""


def _respelt(
    value: dict[str, Any],
    known: frozenset[str],
    name: str,
    notes: Notes,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """Return an object whose known fields have their own names; count the others as forgiven.

    `given` are names that stay, whatever they spell.

    Raises:
        BadField: two fields of one name differ.
    """
    if known.issuperset(value):
        return value
    found = dict(value)
    for key, part in value.items():
        usual = spellings(known).get(bare(key), key)
        if usual == key or key in given:
            continue
        del found[key]
        if not carries(part):
            found.setdefault(usual, part)
            continue
        if carries(found.get(usual)) and found[usual] != part:
            raise BadField(f"'{name}' has {key!r:.60} beside {usual!r}; leave one of them out")
        found[usual] = part
        notes.forgiven[f"field {key!r:.60} as {usual!r}"] += 1
    return found


def _field(value: dict[str, Any], side: str, fields: Mapping[str, str]) -> str:
    """Return the name of the field that holds a message's role or content."""
    if side in fields:
        return fields[side]
    usual = ROLE_FIELDS if side == "role" else CONTENT_FIELDS
    there = [name for name in usual if name in value]
    return next((name for name in there if carries(value[name])), (*there, side)[0])


def _message(
    value: object, name: str, notes: Notes, fields: Mapping[str, str]
) -> tuple[dict[str, Any], bool | None]:
    if not isinstance(value, dict):
        raise BadField(f"'{name}' must be an object with a role and a content, got {kind(value)}")
    value = _respelt(value, _FIELDS, name, notes, fields.values())
    who, what = (_field(value, side, fields) for side in ("role", "content"))
    role = role_of(value.get(who), f"{name}.{who}", notes)
    is_call = _spelt(value.get(who)) in CALLING and not carries(value.get("tool_calls"))
    content = None if is_call else _content(value.get(what), f"{name}.{what}", notes)
    calls = _calls(value, what if is_call else "function_call", name, notes)
    if calls and role != "assistant":
        raise BadField(f"'{name}.tool_calls' are of the {role}; only the assistant calls tools")
    if content is None and notes.mend and not calls:
        content = ""
    # A call needs no words beside it, and a tool may have nothing to say.
    if content is not None or not calls:
        empty = bool(calls) or role == "tool" or notes.mend
        content = text_of(content, f"{name}.{what}", empty=empty)
    message: dict[str, Any] = {"role": role, "content": content, **_texts(value, name, notes)}
    if calls:
        message["tool_calls"] = calls
    mask = _mask(value, name, notes)
    if mask and role != "assistant":
        raise BadField(
            f"'{name}' is of the {role} and marked as learnt; only assistant messages are learnt, "
            "so leave its mask out"
        )
    used = (who, what, *_CALLS, "reasoning", *TEXTS, *MASKS)
    _count_unused(value, name, used, notes.unused)
    return message, mask


def _texts(value: dict[str, Any], name: str, notes: Notes) -> dict[str, str]:
    """Return the other texts of a message; `reasoning` goes by the name that templates read."""
    found: dict[str, str] = {}
    for key in (*TEXTS, "reasoning"):
        if carries(value.get(key)) and text_of(value[key], f"{name}.{key}", empty=True).strip():
            found[key] = value[key]
    if (reasoning := found.pop("reasoning", None)) is None:
        return found
    other = next((key for key in ("reasoning_content", "thinking") if key in found), None)
    if other is not None and found[other] != reasoning:
        raise BadField(f"'{name}.reasoning' and '{name}.{other}' differ; leave one of them out")
    notes.forgiven["field 'reasoning' as 'reasoning_content'"] += 1
    return found if other else {**found, "reasoning_content": reasoning}


def _calls(value: dict[str, Any], key: str, name: str, notes: Notes) -> list[Any] | None:
    """Return a message's `tool_calls`, or those of the field `key`, as such or as JSON text."""
    calls = _tool_calls(value.get("tool_calls"), f"{name}.tool_calls", notes)
    call: Any = value.get(key)
    if not carries(call):
        return calls
    if calls:
        raise BadField(f"'{name}' has both 'tool_calls' and '{key}'; leave one of them out")
    if isinstance(call, str):
        call = from_json(call, f"{name}.{key}")
    notes.forgiven[f"field {key!r} as 'tool_calls'"] += 1
    found = plain(call if isinstance(call, list) else [call], f"{name}.{key}")
    return [_tool_call(one, f"{name}.{key}", notes) for one in found]


def _count_unused(
    value: dict[str, Any], name: str, used: tuple[str, ...], unused: Counter[str]
) -> None:
    """Refuse fields that change the meaning; count the others that carry a value."""
    for key, part in value.items():
        if key in used or not carries(part):
            continue
        if key in REFUSED and unquoted(part) is not False:
            raise BadField(f"'{name}.{key}' is not read; {REFUSED[key]}")
        unused[f"{name.partition('[')[0]}[].{key}"] += 1


def _content(value: Any, name: str, notes: Notes) -> Any:
    """Return a string or null as it is, and a list of text parts as one string."""
    if not isinstance(value, list):
        return value
    return "".join(_part(part, f"{name}[{i}]", notes) for i, part in enumerate(value))


def _part(part: Any, name: str, notes: Notes) -> str:
    """Return the text of a part, `{"type": "text", "text": ...}` or `{"text": ...}`."""
    if not isinstance(part, dict):
        raise BadField(f"'{name}' must be a part of type 'text', got {part!r:.60}")
    part = _respelt(part, _PART_FIELDS, name, notes)
    # Gemini and Bedrock name a part by the field that holds it.
    told = [key for key in part if key in PARTS and carries(part[key]) and part[key] is not False]
    found = part.get("type") or (told or ["text" if "text" in part else None])[0]
    if found not in TEXT_PARTS or told:
        found = told[0] if found in TEXT_PARTS else found
        way = PARTS.get(spellings(_PART_FIELDS).get(bare(str(found)), ""))
        instead = f"; {way}" if way else ""
        raise BadField(f"'{name}' must be a part of type 'text', got {found!r:.60}{instead}")
    for key in MASKS:
        if part.get(key) is not None:
            raise BadField(f"'{name}.{key}' is not read; only a whole message has a mask")
    _count_unused(part, name, ("type", "text"), notes.unused)
    return text_of(part.get("text"), f"{name}.text", empty=True)


def _tool_calls(value: object, name: str, notes: Notes) -> list[Any] | None:
    """Return the calls with their arguments as objects; chat templates and servers write JSON."""
    calls = listed(value, name)
    if calls is None:
        return None
    return [_tool_call(call, f"{name}[{i}]", notes) for i, call in enumerate(calls)]


def _tool_call(call: object, name: str, notes: Notes) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadField(f"'{name}' must be an object, got {kind(call)}")
    call = _respelt(call, _CALL_FIELDS, name, notes)
    nested = "function" in call
    function = call["function"] if nested else call
    if nested and isinstance(function, dict):
        function = _respelt(function, _CALL_FIELDS, f"{name}.function", notes)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadField(f"'{name}' must have a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = from_json(arguments, f"{name}.arguments")
    if not carries(arguments) or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
        for other in _OTHER_ARGUMENTS:
            if carries(function.get(other)):
                raise BadField(f"'{name}.{other}' is not read; name it 'arguments'")
    if not isinstance(arguments, dict):
        raise BadField(
            f"'{name}.arguments' must be an object, or JSON text of one, got {kind(arguments)}"
        )
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if nested else function


def _mask(message: dict[str, Any], name: str, notes: Notes) -> bool | None:
    given = {
        key: _flag(message[key], f"{name}.{key}", notes)
        for key in MASKS
        if carries(message.get(key))
    }
    if len(set(given.values())) > 1:
        raise BadField(f"'{name}' is both learnt and not: {', '.join(map(repr, given))} differ")
    return next(iter(given.values()), None)


def _flag(value: object, name: str, notes: Notes) -> bool:
    """Return a mask's value as a bool; a text of one is counted as forgiven."""
    told = unquoted(value)
    if not isinstance(told, bool | int | float) or told not in (0, 1):
        raise BadField(
            f"'{name}' must be 0 or 1 (false or true), got {value!r:.60}; no weight lies between"
        )
    if told is not value:
        field = f"{name.partition('[')[0]}[].{name.rpartition('.')[2]}"
        notes.forgiven[f"text {value!r:.60} of {field!r} as {int(told)}"] += 1
    return bool(told)
