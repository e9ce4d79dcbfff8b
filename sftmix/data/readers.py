"""Read the columns of a row as a conversation, one function for each shape that rows have."""

from __future__ import annotations

from typing import Any

from sftmix.data.columns import PROMPTS, RESPONSES, Cells
from sftmix.data.marked_text import marked_turns
from sftmix.data.messages import (
    BadField,
    Masks,
    Messages,
    Notes,
    carries,
    conversation,
    from_json,
    kind,
    listed,
    role_of,
    text_of,
)
from sftmix.data.shapes import shaped
from sftmix.data.spelling import unquoted

Found = tuple[Messages, Masks]


def read_conversation(cells: Cells, notes: Notes, *, names: tuple[str, ...]) -> Found:
    """Return the conversation of one of the columns `names`.

    Where it ends with a question that another column answers as text, it is the prompt, and only
    that answer is learnt, unless masks say otherwise.

    Raises:
        BadField: it is none, or a history stands beside it.
    """
    name, value = cells.one("messages", names)
    fields = {side: cells.given[side] for side in ("role", "content") if side in cells.given}
    texts = names != ("messages",)
    messages, masks = conversation(value, name, notes, fields, texts=texts)
    _refuse_history(cells, f"'{name}' is not read; write it into the messages")
    if messages and messages[-1]["role"] in ("user", "tool"):
        found = cells.telling("response", RESPONSES)
        if found and isinstance(cells.row[found[0]], str):
            by, answer = cells.one("response", RESPONSES)
            messages = (*messages, {"role": "assistant", "content": text_of(answer, by)})
            masks = [*map(bool, masks), None]
    return shaped(messages, masks, name, notes)


def read_text(cells: Cells, notes: Notes) -> Found:
    """Return the turns of a text with markers.

    Raises:
        BadField: it has none that are known.
    """
    name, value = cells.one("text", ("text",))
    messages, masks = marked_turns(text_of(value, name), name, notes)
    _refuse_history(cells, f"'{name}' is not read; write it into the text")
    return shaped(messages, masks, name, notes)


def read_turn(
    cells: Cells,
    notes: Notes,
    *,
    prompt: tuple[str, ...],
    before: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
) -> Found:
    """Return a prompt, with the texts of the columns before and after it, and its response.

    Raises:
        BadField: one is missing, or no text, or two columns may be meant.
    """
    asked_by, asked = cells.one("prompt", prompt)
    by, answer = cells.one("response", RESPONSES)
    if not ("prompt" in cells.given or cells.exact):
        others = tuple(one for one in PROMPTS if one not in (*prompt, "instruction", "input"))
        cells.refuse_others("prompt", [asked_by, *cells.telling("prompt", others)])
    _refuse_columns(cells, asked_by, by)
    if isinstance(asked, list) and isinstance(answer, list | str):
        return _read_lists(cells, notes, asked_by, by)
    if isinstance(answer, list):
        if "response" in cells.given:
            return _read_lists(cells, notes, asked_by, by)
        raise BadField(f"'{asked_by}' must be a list of messages, as '{by}' is, got {kind(asked)}")
    text = text_of(asked, asked_by)
    if earlier := _beside(cells, "context", before):
        text = f"{earlier}\n\n{text}"
    if more := _beside(cells, "input", after):
        text = f"{text}\n\n{more}"
    turns = [*_history(cells), (text, text_of(answer, by))]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    if thoughts := _beside(cells, "reasoning", ()):
        messages[-1]["reasoning_content"] = thoughts
    return tuple(messages), [None] * len(messages)


def _refuse_columns(cells: Cells, *names: str) -> None:
    """Refuse lists of texts, which are columns of many rows."""
    lists = {
        name: value
        for name in names
        if isinstance(value := cells.row[name], list)
        and value
        and all(isinstance(one, str) for one in value)
    }
    if len(lists) == len(names):
        raise BadField(
            f"{' and '.join(f'{name!r} has {len(value)}' for name, value in lists.items())} texts, "
            "expected one each; columns of lists are read from a .json file, where all must be of "
            "one length"
        )


def read_response(cells: Cells, notes: Notes) -> Found:
    """Return a conversation that `--columns response=NAME` names, prompt and all.

    It is a list of messages, or a text with markers; only its last answer is learnt.

    Raises:
        BadField: it is neither.
    """
    name, value = cells.one("response", ())
    if isinstance(value, list):
        return _read_lists(cells, notes, None, name)
    messages, masks = marked_turns(text_of(value, name), name, notes)
    messages, masks = shaped(messages, masks, name, notes)
    return messages, _last_answer(messages, masks)


def _read_lists(cells: Cells, notes: Notes, asked_by: str | None, by: str) -> Found:
    """Return messages of which only the response is learnt, unless their own masks say otherwise.

    The response is a list, or the text of the answer. One that --columns names may hold the whole
    conversation, its prompt among it.
    """
    asked = cells.row[asked_by] if asked_by else []
    answer = cells.row[by]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": text_of(answer, by)}]
        if thoughts := _beside(cells, "reasoning", ()):
            answer[0]["reasoning_content"] = thoughts
    replies, masks = conversation(answer, by, notes)
    if not replies:
        raise BadField(f"'{by}' is empty")
    _refuse_history(cells, f"a '{asked_by or by}' of messages is not read; write it into it")
    if "response" in cells.given and any(one["role"] == "user" for one in replies):
        _check_prompt(asked, asked_by or by, replies, by)
        replies, masks = shaped(replies, masks, by, notes)
        return replies, _last_answer(replies, masks)
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    before, before_masks = conversation(asked, asked_by or by, notes)
    before_masks = [bool(mask) for mask in before_masks]
    return shaped(before + replies, before_masks + masks, f"{asked_by} + {by}", notes)


def _check_prompt(asked: object, asked_by: str, replies: Messages, by: str) -> None:
    """Refuse a prompt that is not in the conversation which is to hold it."""
    if isinstance(asked, str):
        questions = [one["content"] for one in replies if one["role"] == "user"]
        found = not asked.strip() or asked in questions
    else:
        before, _ = conversation(asked, asked_by, Notes())
        found = before == replies[: len(before)]
    if not found:
        raise BadField(f"'{asked_by}' is not the prompt in '{by}', but another text")


def _last_answer(messages: Messages, masks: Masks) -> Masks:
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return [bool(mask) if i < last else mask for i, mask in enumerate(masks)]


def _beside(cells: Cells, side: str, names: tuple[str, ...]) -> str | None:
    """Return the text of a column beside the prompt; None if it says nothing."""
    found = cells.maybe(side, names)
    if found is None or not carries(found[1]):
        return None
    text = text_of(found[1], found[0], empty=True)
    return text if text.strip() else None


def _history(cells: Cells) -> list[tuple[str, str]]:
    """Return earlier turns from pairs of a prompt and a response, as Alpaca's files have them."""
    found = cells.maybe("history", ("history",))
    turns = []
    if found is not None:
        name, value = found
        for i, pair in enumerate(listed(value, name) or ()):
            if not isinstance(pair, list) or len(pair) != 2:
                raise BadField(f"'{name}[{i}]' must be a list of a prompt and a response")
            prompt, response = (text_of(text, f"{name}[{i}][{j}]") for j, text in enumerate(pair))
            turns.append((prompt, response))
    return turns


def _refuse_history(cells: Cells, reason: str) -> None:
    for name in cells.named("history", ("history",)):
        if carries(cells.row[name]):
            raise BadField(f"'{name}' beside {reason}")


def read_tree(cells: Cells, notes: Notes) -> Found:
    """Return the best path of a tree of messages, as OASST has them.

    It takes the reply with the smallest `rank` each time; one without a rank comes last, of equal
    ones the first is taken, and deleted ones never. It ends with the last answer.

    Raises:
        BadField: a message of it is malformed, or none is an answer.
    """
    node, place = cells.row.get("prompt"), "prompt"
    if not isinstance(node, dict):
        node, place = cells.row, ""
        cells.used |= {"text", "role", "replies"}
    cells.used.add("prompt")
    messages: list[dict[str, Any]] = []
    while node is not None:
        before = f"{place}." if place else ""
        role = role_of(node.get("role"), f"{before}role", notes)
        messages.append({"role": role, "content": text_of(node.get("text"), f"{before}text")})
        replies = node.get("replies")
        replies = from_json(replies, f"{before}replies") if isinstance(replies, str) else replies
        place, node = _best(replies or [], f"{before}replies")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    found: Messages = tuple(messages)
    return shaped(found, [None] * len(found), "replies", notes)


def _best(replies: object, name: str) -> tuple[str, dict[str, Any] | None]:
    """Return the place of the best reply, and the reply; None if there is none."""
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise BadField(f"'{name}' must be a list of messages, got {kind(replies)}")
    ranked = []
    for i, reply in enumerate(replies):
        rank = reply.get("rank")
        if rank is not None and type(rank) not in (int, float):
            raise BadField(f"'{name}[{i}].rank' must be a number, got {rank!r:.60}")
        if not unquoted(reply.get("deleted")):
            ranked.append((rank is None, rank or 0, i))
    if not ranked:
        return name, None
    best = min(ranked)[2]
    return f"{name}[{best}]", replies[best]
