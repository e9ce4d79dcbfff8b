"""Name the columns of a row: which name means what, and what happens to those that nothing reads.

A column is found under its own name, or with other capitals, blanks or dashes in it, or under the
name that `--columns` gives. docs/data.md is the table for users.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sftmix.data.messages import BadField, Notes, carries
from sftmix.data.spelling import bare, spellings, unquoted
from sftmix.data.token_rows import COLUMNS as TOKEN_COLUMNS
from sftmix.data.token_rows import REFUSED as REFUSED_TOKENS
from sftmix.data.weighting import WEIGHT

CONVERSATIONS = ("conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question", "query", "problem", "inputs", "input")
RESPONSES = (
    *("completion", "output", "answer", "response"),
    *("targets", "solution", "generated_solution"),
)
SYSTEMS = ("system", "system_prompt", "custom_instruction")

# Columns that change what is said or learnt, whatever the format, and what to do instead.
REFUSED = {
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos", "pixel_values"),
        "only text is learnt from",
    ),
    "system_instruction": "give it as text, and name it 'system'",
    "functions": "name them 'tools'",
    "function_call": "give it as 'tool_calls' of a message",
    "documents": "write them into the prompt",
    "chat_template_kwargs": "give a --chat_template that needs none",
}
# Weights of a whole row, of which `--weight` reads one.
WEIGHTS = (WEIGHT, "loss_weight", "sample_weight", "train", "trainable")
# Parts of a prompt in one format, or of a comparison: beside another format's text they would be
# lost. Beside whole messages they are where those came from, and are only named.
OF_A_PAIR = {
    "instruction": "write it into the prompt",
    "input": "write it into the prompt, or give --columns input=input",
    "context": "write it into the prompt, or give --columns context=context",
    "rejected": "it is what not to learn; give only rows of what to learn",
}

# What --columns can name, and for which help.
SIDES = {
    "messages": "a list of messages",
    "role": "the field of a message that holds its role",
    "content": "the field of a message that holds its text",
    "prompt": "the question: text, or a list of messages",
    "response": "the answer that is learnt: text, or a list of messages",
    "input": "text that follows the prompt",
    "context": "text that precedes the prompt",
    "reasoning": "the thoughts before the response",
    "system": "the system prompt",
    "history": "earlier turns, as pairs",
    "tools": "the tools that can be called",
    "text": "a text with markers of turns in it",
}
TURN_SIDES = ("prompt", "response", "input", "context", "reasoning")
WAY_OUT = "--columns prompt=NAME,response=NAME"

_KNOWN = {
    *("messages", *CONVERSATIONS, *PROMPTS, *RESPONSES, *SYSTEMS, "context", "history", "tools"),
    *("data", "text", "replies", "message_tree_id", *REFUSED, "rejected"),
    *(*TOKEN_COLUMNS, *REFUSED_TOKENS),
}
_SPELLINGS = spellings(frozenset((*_KNOWN, *WEIGHTS, "label", "chosen", "message_id", "parent_id")))


def parse_columns(text: str) -> dict[str, str]:
    """Return the columns that `--columns` names: `prompt=problem,response=solution`, or JSON.

    Raises:
        ValueError: a name on the left is unknown or there twice, one on the right is missing, or
            they do not go together.
    """
    if text.lstrip().startswith("{"):
        try:
            # A name that is there twice must not be lost.
            pairs = json.loads(text, object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise ValueError(f"columns: {text!r} is no JSON: {error}") from None
    else:
        pairs = [tuple(one.partition("=")[::2]) for one in text.split(",")]
    found: dict[str, str] = {}
    for left, right in pairs:
        side, name = str(left).strip(), right.strip() if isinstance(right, str) else ""
        if side not in SIDES:
            raise ValueError(
                f"columns: expected NAME=COLUMN with {', '.join(SIDES)} as NAME, got {side!r}"
            )
        if not name:
            raise ValueError(f"columns: expected a column's name after '{side}='")
        if side in found or name in found.values():
            raise ValueError(
                f"columns: expected each name once, got {side}={name} beside "
                f"{', '.join('='.join(item) for item in found.items())}"
            )
        found[side] = name
    kinds: list[str] = [name for name in ("messages", "text") if name in found]
    kinds += [name for name in TURN_SIDES if name in found][:1]
    if len(kinds) > 1:
        raise ValueError(
            f"columns: expected messages, a text, or a prompt and a response, got "
            f"{' and '.join(kinds)}; leave one of them out"
        )
    if {"role", "content"} & found.keys() and kinds not in ([], ["messages"]):
        raise ValueError(
            f"columns: role and content are of messages; beside {kinds[0]} leave them out"
        )
    return found


def spelt(name: str) -> str:
    """Return the known name that a column's name spells; its own in small letters if there is none.

    Capitals, blanks, dashes and underscores make no other name.
    """
    return _SPELLINGS.get(bare(name)) or name.strip().lower()


@functools.lru_cache(maxsize=1024)
def known_names(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the columns of each name that formats know; under its own name it comes first."""
    found: dict[str, list[str]] = {name: [name] for name in names if name in _KNOWN}
    for name in names:
        if name not in _KNOWN and spelt(name) in _KNOWN:
            found.setdefault(spelt(name), []).append(name)
    return found


@functools.lru_cache(maxsize=4096)
def _held(
    columns: tuple[str, ...], names: tuple[str, ...], given: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    """Return for each name that a row has the columns that are spelt so, without those given."""
    known = known_names(columns)
    found = (tuple(one for one in known.get(name, ()) if one not in given) for name in names)
    return tuple(group for group in found if group)


class Cells:
    """The columns of a row by what they mean, and which of them were read."""

    def __init__(
        self,
        row: dict[str, Any],
        given: Mapping[str, str],
        notes: Notes,
        exact: tuple[str, ...] = (),
    ) -> None:
        """See the class.

        Args:
            row: the columns and their values.
            given: as `parse_columns` returns them.
            notes: counts columns that were read under another spelling.
            exact: the names by which the file's format was found, if other ones are only named.
        """
        self.row, self.given, self.notes, self.exact = row, given, notes, exact
        self.columns, self.taken = tuple(row), tuple(given.values())
        self.known = known_names(self.columns).keys()
        self.used: set[str] = set()

    def named(self, side: str, names: tuple[str, ...]) -> list[str]:
        """Return the row's columns that hold `side`: the one given, or those of the usual names.

        Raises:
            BadField: two columns of one name differ.
        """
        if side in self.given:
            return [self.given[side]] if self.given[side] in self.row else []
        found: list[str] = []
        if self.known.isdisjoint(names):
            return found
        for columns in _held(self.columns, names, self.taken):
            if len(columns) == 1:
                found += columns
                continue
            told = [one for one in columns if says(self.row[one])]
            if any(self.row[one] != self.row[told[0]] for one in told[1:]):
                raise BadField(
                    f"{' and '.join(map(repr, told))} are one name, and differ; leave one out"
                )
            found.append((*told, *columns)[0])
        return found

    def telling(self, side: str, names: tuple[str, ...]) -> list[str]:
        """Return those of the columns `named` whose value says something."""
        return [name for name in self.named(side, names) if says(self.row[name])]

    def one(self, side: str, names: tuple[str, ...]) -> tuple[str, Any]:
        """Return the name and value of the column that holds `side`.

        Raises:
            BadField: it is missing, or several columns hold it and differ.
        """
        found = self.maybe(side, names)
        if found is None:
            usual = [name for name in names if name in self.exact] or names
            raise BadField(f"'{self.given.get(side, ' or '.join(usual))}' is missing")
        return found

    def maybe(self, side: str, names: tuple[str, ...]) -> tuple[str, Any] | None:
        """Return what `one` returns, or None if there is no such column.

        Raises:
            BadField: several columns hold it and differ.
        """
        found = self.named(side, names)
        if not found:
            return None
        if len(found) == 1:  # nearly always, and the rest takes as long as reading a short text
            self.read(found[0])
            return found[0], self.row[found[0]]
        telling = [name for name in found if says(self.row[name])] or found[:1]
        self.refuse_others(side, telling)
        for name in telling:
            self.read(name)
        return telling[0], self.row[telling[0]]

    def refuse_others(self, side: str, names: Sequence[str]) -> None:
        """Check that columns with one meaning have one value.

        Raises:
            BadField: they differ.
        """
        if any(self.row[name] != self.row[names[0]] for name in names[1:]):
            raise BadField(
                f"{' and '.join(map(repr, names))} differ; say which is the {side} with --columns "
                f"{side}=NAME"
            )

    def read(self, name: str) -> None:
        """Note that a column was read, and that its name was spelt otherwise."""
        if name not in self.used and name not in _KNOWN and name not in self.given.values():
            self.notes.forgiven[f"column {name!r:.60} as {spelt(name)!r}"] += 1
        self.used.add(name)


def says(value: object) -> bool:
    """Tell whether a value carries a meaning; a blank string does not."""
    return bool(value.strip()) if isinstance(value, str) else carries(value)


def refuse_or_count(
    cells: Cells, used: Collection[str], refused: Mapping[str, str], notes: Notes
) -> None:
    """Count the columns that carry a value and that nothing read.

    Where the weights of rows are read from the column `weight`, they may stand in no other.

    Raises:
        BadField: one of them would change what is said or learnt.
    """
    for name, value in cells.row.items():
        if name in used or name in cells.used or not carries(value):
            continue
        known, told = spelt(name), unquoted(value)
        instead = REFUSED.get(known, refused.get(known))
        if instead is not None and told is not False:
            raise BadField(f"'{name}' is not read; {instead}")
        if known in WEIGHTS and isinstance(told, bool | int | float):
            if told != 1 and WEIGHT in used:
                raise BadField(
                    f"'{name}' is {value!r:.60}, and weights are read from '{WEIGHT}'; "
                    f"--weight column:{name} reads its numbers, --weight none no weights"
                )
            if told != 1:
                notes.unused[str(name)] += 1
                continue
            if known != name:
                notes.forgiven[f"column {name!r:.60} as {known!r}"] += 1
            if told is not value:
                notes.forgiven[f"text {value!r:.60} of {name!r:.60} as 1"] += 1
        elif known == "label" and _is_unwanted(told, cells):
            raise BadField(f"'{name}' is false: an answer that is not wanted; leave such rows out")
        else:
            notes.unused[str(name)] += 1


def _is_unwanted(label: object, cells: Cells) -> bool:
    """Tell whether KTO's label marks the answer so; beside other answers 0 may be a class."""
    return label is False or (label == 0 and "completion" in map(spelt, cells.row))
