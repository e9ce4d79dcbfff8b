"""Find the format of rows by their columns, and read their content.

`FORMATS` is the table: a format is one entry, with the function of `readers.py` that reads it.
`sftmix data --formats` prints it, and `tools/formats_page.py` writes it into docs/data.md.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sftmix.data.columns import (
    CONVERSATIONS,
    OF_A_PAIR,
    PROMPTS,
    RESPONSES,
    SYSTEMS,
    TURN_SIDES,
    WAY_OUT,
    Cells,
    known_names,
    refuse_or_count,
    spelt,
)
from sftmix.data.hashing import digest
from sftmix.data.messages import (
    BadField,
    Masks,
    Messages,
    Notes,
    carries,
    from_json,
    kind,
    listed,
    text_of,
)
from sftmix.data.readers import (
    Found,
    read_conversation,
    read_response,
    read_text,
    read_tree,
    read_turn,
)
from sftmix.data.shapes import learnt
from sftmix.data.spelling import unquoted
from sftmix.data.token_rows import COLUMNS as TOKEN_COLUMNS
from sftmix.data.token_rows import LOSS_MASKS, read_tokens
from sftmix.data.token_rows import REFUSED as REFUSED_TOKENS


@dataclass(frozen=True)
class Content:
    """The content of an example: messages, a whole text, or tokens with labels."""

    messages: Messages | None = None
    tools: list[Any] | None = None
    learnt: tuple[bool, ...] | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    text: str | None = None

    def digest(self) -> str:
        """Return the SHA-256 of the content as canonical JSON."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        return digest(found)


@dataclass(frozen=True)
class Format:
    """One entry of the table of formats.

    `needs` has the names of each part that a row must have a column for, any of a group; `unless`
    those that it must not have. `earlier` are the exact names that earlier versions knew, which
    come first, so that their rows keep their content. `read` is None where rows are tokens.
    `example` is shown in the documentation, and `says` how it is read.
    """

    name: str
    needs: Mapping[str, tuple[str, ...]]
    read: Callable[[Cells, Notes], Found] | None
    example: dict[str, Any]
    says: str
    earlier: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()

    def fits(self, names: tuple[str, ...], given: Mapping[str, str] = MappingProxyType({})) -> bool:
        """Tell whether rows with these columns are of the format; `given` is what users named."""
        taken = {*given.values()}
        known = {name for name, found in known_names(names).items() if not {*found} <= taken}
        known |= {*names} - taken
        return all(
            given[side] in names if side in given else not known.isdisjoint(group)
            for side, group in self.needs.items()
        )

    def columns(self) -> str:
        """Return the names of the columns as text; RESPONSE stands for any of `RESPONSES`."""
        groups = self.needs.values()
        return " + ".join("RESPONSE" if one is RESPONSES else " or ".join(one) for one in groups)


def _turn(
    prompt: str, *, before: tuple[str, ...] = (), after: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {
        "needs": {"prompt": (prompt,), "response": RESPONSES},
        "read": functools.partial(read_turn, prompt=(prompt,), before=before, after=after),
    }


def _conversation(*names: str) -> dict[str, Any]:
    return {
        "needs": {"messages": names},
        "read": functools.partial(read_conversation, names=names),
    }


FORMATS = (
    Format(
        "messages",
        **_conversation("messages"),
        example={
            "messages": [
                {"role": "user", "content": "Add 1 and 2."},
                {"role": "assistant", "content": "3"},
            ]
        },
        says="the conversation, as OpenAI, TRL, UltraChat-200K and Tulu-3 have it",
        earlier=("messages",),
    ),
    Format(
        "conversations",
        **_conversation(*CONVERSATIONS),
        example={
            "conversations": [
                {"from": "human", "value": "Add 1 and 2."},
                {"from": "gpt", "value": "3"},
            ]
        },
        says="the conversation (ShareGPT, OpenHermes, SlimOrca, WizardLM v2, Magpie, "
        "OpenThoughts), or texts by turns, the user's first (LIMA)",
    ),
    Format(
        "prompt",
        **_turn("prompt"),
        example={"prompt": "Add 1 and 2.", "completion": "3"},
        says="one turn; or a list of messages, and the answer as a text or a list of messages, of "
        "which only the answer is learnt (Nemotron, whose columns are input and output)",
        earlier=("prompt", "completion"),
    ),
    Format(
        "instruction",
        **_turn("instruction", after=("input", "context")),
        example={"instruction": "Add.", "input": "1 and 2", "output": "3"},
        says="one turn; an `input` or `context` follows the instruction after an empty line "
        "(Alpaca, MedAlpaca, Dolly)",
        earlier=("instruction", "output"),
    ),
    Format(
        "question",
        **_turn("question", before=("context",)),
        example={"context": "Ann has 3.", "question": "How many?", "answer": "3"},
        says="one turn; a `context` precedes the question, with an empty line between (GSM8K, "
        "OpenOrca, OpenMathInstruct-1)",
        earlier=("question", "answer"),
    ),
    Format(
        "tokens",
        needs={"input_ids": ("input_ids",), "labels": ("labels", *LOSS_MASKS)},
        read=None,
        example={"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        says="tokens; labels are not shifted, -100 is not learnt, nor is a token whose mask is 0",
    ),
    Format(
        "query",
        **_turn("query"),
        example={"query": "Add 1 and 2.", "response": "3"},
        says="one turn (MetaMath)",
    ),
    Format(
        "problem",
        **_turn("problem"),
        example={"problem": "Add 1 and 2.", "generated_solution": "3"},
        says="one turn (MATH, OpenMathInstruct-2)",
    ),
    Format(
        "inputs",
        **_turn("inputs"),
        example={"inputs": "Add 1 and 2.", "targets": "3"},
        says="one turn (FLAN, Aya)",
    ),
    Format(
        "input",
        **_turn("input"),
        example={"input": "Add 1 and 2.", "output": "3"},
        says="one turn",
    ),
    Format(
        "tree",
        needs={"prompt": ("prompt", "text"), "replies": ("message_tree_id", "replies")},
        read=read_tree,
        example={
            "message_tree_id": "t",
            "prompt": {
                "role": "prompter",
                "text": "Add 1 and 2.",
                "replies": [
                    {"role": "assistant", "text": "4", "rank": 1, "replies": []},
                    {"role": "assistant", "text": "3", "rank": 0, "replies": []},
                ],
            },
        },
        says="OASST's tree of messages: the path of the best ranks, down to its last answer",
        unless=("parent_id",),
    ),
    Format(
        "text",
        needs={"text": ("text",)},
        read=read_text,
        example={"text": "### Human: Add 1 and 2.### Assistant: 3"},
        says="the turns between markers of ChatML, Llama 2 and 3, Gemma, Zephyr, Guanaco, Alpaca "
        "or Vicuna; with `--train_on all` the whole text, every token of it",
        unless=("parent_id", *PROMPTS, *RESPONSES),
    ),
    Format(
        "data",
        **_conversation("data"),
        example={"data": ["Add 1 and 2.", "3"]},
        says="texts by turns, the user's first (UltraChat)",
    ),
)
_BY_NAME = {one.name: one for one in FORMATS}
_TEXT = _BY_NAME["text"]
_TURNS = tuple(one for one in FORMATS if "response" in one.needs)
# What --columns response=NAME names may hold the whole conversation, its prompt among it.
_RESPONSE = Format("response", {"response": ()}, read_response, {}, "")


@dataclass(frozen=True)
class Form:
    """The format of a file's rows, as `format_of` found it.

    `given` is what --columns names, `exact` the columns of earlier versions, if it has them, and
    `whole` tells whether a text is learnt as it stands.
    """

    format: Format
    given: Mapping[str, str] = field(default_factory=dict)
    exact: tuple[str, ...] = ()
    whole: bool = False


def format_of(
    rows: Iterable[Iterable[str]],
    columns: Mapping[str, str] | None = None,
    *,
    whole: bool = False,
) -> Form:
    """Return the format whose columns are all present in the most rows; the first on a tie.

    Args:
        rows: the rows, or the names of their columns.
        columns: what --columns names, as `parse_columns` returns it.
        whole: whether to learn the whole text.

    Raises:
        ValueError: no row has all columns of any format, or a given column is in none.
    """
    given = dict(columns or {})
    kinds = Counter(map(tuple, rows))
    found = sorted({str(name) for names in kinds for name in names})
    for side, name in given.items():
        if name not in found and side not in ("role", "content"):
            raise ValueError(f"--columns {side}={name}: no row has a column {name!r}, only {found}")
    forms = _forms(given, whole)
    counts = [sum(number for names, number in kinds.items() if fits(names)) for _, fits in forms]
    if not max(counts):
        raise ValueError(_unknown(found, given, whole))
    form = forms[counts.index(max(counts))][0]
    unread = {*given} - {"text"} if whole or form.format.read is None else set()
    if "messages" not in form.format.needs:
        unread |= {"role", "content"} & given.keys()
    if unread:
        raise ValueError(
            f"--columns: nothing reads {', '.join(sorted(unread))} of the format "
            f"{form.format.name!r} ({form.format.columns()}); leave it out"
        )
    return form


_Fits = Callable[[tuple[str, ...]], bool]


def _forms(given: Mapping[str, str], whole: bool) -> list[tuple[Form, _Fits]]:
    """Return the forms that rows may have, and the check of each, in the order of preference."""
    if whole or "text" in given:
        formats: Iterable[Format] = (_TEXT,)
    elif "messages" in given:
        formats = (_BY_NAME["conversations"],)
    elif "prompt" in given:
        formats = (_BY_NAME["prompt"],)
    elif "response" in given:
        formats = (*_TURNS, _RESPONSE)
    elif not given.keys().isdisjoint(TURN_SIDES):
        formats = _TURNS
    else:
        exact = [
            (Form(one, given, one.earlier), functools.partial(_has, one.earlier))
            for one in FORMATS
            if one.earlier
        ]
        others = [(Form(one, given), functools.partial(_fits, one, given)) for one in FORMATS]
        tokens = [pair for pair in others if pair[0].format.read is None]
        return [*exact, *tokens, *others]
    return [
        (Form(one, given, whole=whole), functools.partial(one.fits, given=given)) for one in formats
    ]


def _has(columns: tuple[str, ...], names: tuple[str, ...]) -> bool:
    return {*columns} <= {*names}


def _fits(one: Format, given: Mapping[str, str], names: tuple[str, ...]) -> bool:
    return one.fits(names, given) and {*map(spelt, names)}.isdisjoint(one.unless)


def _unknown(found: list[str], given: Mapping[str, str], whole: bool) -> str:
    names = {spelt(name) for name in found}
    if whole:
        return f"--train_on all learns a column 'text', got {found}; give --columns text=NAME"
    if {"chosen", "rejected"} <= names:
        return (
            f"columns {found} are preferences, of which one answer is not to be learnt; "
            "--columns response=chosen learns the chosen ones (text=chosen, if they are texts "
            "with markers of turns)"
        )
    if {"message_id", "parent_id"} <= names:
        return (
            f"columns {found} are the messages of trees, each a row, of which none is an example; "
            "give the file of trees instead (OASST has it as *.trees.jsonl.gz)"
        )
    if given:
        needed = "a response" if "prompt" in given else "a prompt and a response"
        return f"columns {found}: --columns does not name {needed}; give {WAY_OUT}"
    known = "; ".join(one.columns() for one in FORMATS)
    return (
        f"columns {found} are no known format; the formats known are {known}, where "
        f"RESPONSE is {' or '.join(RESPONSES)}. For others give {WAY_OUT} or messages=NAME; "
        "`sftmix data --formats` shows examples"
    )


def read_content(
    row: dict[str, Any], form: Form, notes: Notes, asked: Collection[str] = ()
) -> Content:
    """Return the content to learn from a row.

    `notes` counts what is not read and what is forgiven, `asked` are columns that something else
    reads.

    Raises:
        BadField: the row is malformed, or has a column whose meaning would be lost.
    """
    own = Notes(mend=notes.mend)
    try:
        content = _read(row, form, own, asked)
    except RecursionError:
        raise BadField("a value is nested too deep") from None
    notes.add(own)
    return content


def _read(row: dict[str, Any], form: Form, notes: Notes, asked: Collection[str]) -> Content:
    cells = Cells(row, form.given, notes, form.exact)
    one, given = form.format, form.given
    if one.read is None:
        there = known_names(cells.columns)
        known = [side for side in (*TOKEN_COLUMNS, *REFUSED_TOKENS) if side in there]
        found = [(side, cells.maybe(side, (side,))) for side in known]
        input_ids, labels = read_tokens({side: cell[1] for side, cell in found if cell})
        refuse_or_count(cells, asked, {}, notes)
        return Content(input_ids=input_ids, labels=labels)
    if form.whole:
        name, text = cells.one("text", ("text",))
        content = Content(text=text_of(text, name))
        refuse_or_count(cells, asked, {}, notes)
        return content
    messages, masks = one.read(cells, notes)
    messages, masks = _with_system(cells, messages, masks)
    content = Content(messages, _tools(cells), learnt(messages, masks))
    refused = _refused(tuple(one.needs), tuple(given))
    refuse_or_count(cells, asked, refused, notes)
    return content


@functools.cache
def _refused(needs: tuple[str, ...], given: tuple[str, ...]) -> dict[str, str]:
    """Return the columns that the text of a format would lose, and what to do instead."""
    if not {"messages", "text", "replies"}.isdisjoint(needs):
        return {}
    left = {"rejected"} if "prompt" in given else set(OF_A_PAIR)
    left -= {"rejected"} if "response" in given else set()
    return {name: way for name, way in OF_A_PAIR.items() if name in left}


def _with_system(cells: Cells, messages: Messages, masks: Masks) -> tuple[Messages, Masks]:
    """Return the messages, preceded by the row's system prompt if only the row has one."""
    if not (names := cells.named("system", SYSTEMS)):
        return messages, masks
    texts = {}
    for name in names:
        value = cells.row[name]
        # OpenHermes says with a bool whether there is one.
        is_flag = spelt(name) == "custom_instruction" and unquoted(value) in (True, False)
        if carries(value) and not is_flag:
            texts[name] = text_of(value, name, empty=True)
            cells.read(name)
    found = {text for text in texts.values() if text.strip()}
    if not found:
        return messages, masks
    if len(found) > 1:
        raise BadField(f"{' and '.join(map(repr, texts))} differ; leave one of them out")
    [text] = found
    if messages[0]["role"] not in ("system", "developer"):
        return ({"role": "system", "content": text}, *messages), [None, *masks]
    if messages[0]["content"] != text:
        raise BadField(
            f"'{next(iter(texts))}' is another text than the messages' own system prompt; "
            "leave one of them out"
        )
    return messages, masks


def _tools(cells: Cells) -> list[Any] | None:
    """Return descriptions of tools, given as a list of objects or JSON texts, or as JSON text."""
    found = cells.maybe("tools", ("tools",))
    if found is None or (tools := listed(found[1], found[0])) is None:
        return None
    name = found[0]
    read = [
        from_json(tool, f"{name}[{i}]") if isinstance(tool, str) else tool
        for i, tool in enumerate(tools)
    ]
    for i, tool in enumerate(read):
        if not isinstance(tool, dict):
            raise BadField(
                f"'{name}[{i}]' must be an object, or JSON text of one, got {kind(tool)}"
            )
    return read
