"""Describe the files of `--config` as a JSON Schema, for editors and other tools.

Nothing is typed here twice: names, types, defaults, help and choices are those of the commands'
parsers, ranges and names those of `option_checks`. A file's values are read as if they had been
typed (`config_file`), and the schema takes what the parsers take: `4` and `"4"` are a number,
`yes` is true, one value stands for a list of one, and null is the default.

Two things are left to the commands: options that go together, and the range of a number that is
written as text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from transformers.hf_argparser import string_to_bool

from sftmix.recipe.arguments import ELSEWHERE, SEVERAL, config_options, parser_of
from sftmix.recipe.config_file import FLAG_ALONE, INCLUDE, NO_SLASH, NOTHING
from sftmix.training import option_checks
from sftmix.training.config import SFTMixOptions

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Options whose text may be JSON of a mapping.
MAPPINGS = (*option_checks.MAPPINGS, "columns")
# Commands whose options a file for any command may hold beside its own.
TRAINING = ("train", "score")

# What the parsers take for a type; a keyword holds for the type of value that it is about.
KINDS: dict[Any, Schema] = {
    string_to_bool: {
        "type": ["boolean", "integer", "string"],
        "minimum": 0,
        "maximum": 1,
        "pattern": "^([Yy]([Ee][Ss])?|[Tt]([Rr][Uu][Ee])?|1|[Nn][Oo]?|[Ff]([Aa][Ll][Ss][Ee])?|0)$",
    },
    int: {"type": ["integer", "string"], "pattern": "^[-+]?[0-9]+(_[0-9]+)*$"},
    float: {
        "type": ["number", "string"],
        "pattern": r"^[-+]?(([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[Ii][Nn][Ff])$",
    },
    str: {"type": ["string", "number", "boolean"]},
}


def config_schema(
    commands: Mapping[str, Sequence[type[Any]]], command: str | None = None
) -> Schema:
    """Return the schema of a file that `command` reads; None: of one for several commands.

    `commands` has the dataclasses of each command's options, by its name.
    """
    own = {name: command_schema(name, types) for name, types in commands.items()}
    readers = [name for name in own if command in (None, name) or name in TRAINING]
    names = dict.fromkeys(name for reader in readers for name in own[reader]["properties"])
    properties = {
        INCLUDE: {
            "description": "YAML file in this one's folder, whose values come first",
            "type": ["string", "null"],
            "pattern": r"\.[Yy][Aa]?[Mm][Ll]$",
        },
        **{name: {"$ref": f"#/$defs/{name}"} for name in own},
        **{name: _shared(name, readers, own) for name in names},
    }
    title = f"Config file of sftmix {command or ', '.join(own)}"
    return {"$schema": DIALECT, "title": title, **_closed(properties, "#"), "$defs": own}


def command_schema(command: str, types: Sequence[type[Any]]) -> Schema:
    """Return the schema of the values that only one command reads."""
    parser = parser_of(types, f"sftmix {command}")
    trains = {
        field.name
        for kind in types
        if issubclass(kind, SFTMixOptions)
        for field in dataclasses.fields(kind)
    }
    actions = {action.dest: action for action in config_options(parser).values()}
    properties = {
        name: option_schema(action, trains=name in trains)
        for name, action in actions.items()
        if name not in ELSEWHERE
    }
    place = f"#/$defs/{command}"
    return {"description": f"Options of sftmix {command}", **_closed(properties, place)}


def option_schema(action: argparse.Action, *, trains: bool = False) -> Schema:
    """Return the schema of an option; `trains` says that `option_checks` looks at it.

    The first of its types is the option's own.
    """
    found: Schema = {"description": _help(action)}
    if not action.required:
        found["default"] = _plain(action.default)
    return found | _values(action, trains=trains)


def _values(action: argparse.Action, *, trains: bool) -> Schema:
    name = action.dest
    if name == FLAG_ALONE:
        return {"enum": [False, None, 0, *NOTHING]}
    if trains and name in option_checks.UNSUPPORTED:
        return {"enum": list({repr(one): one for one in (*_allowed(name), None)}.values())}
    choices = action.choices or (option_checks.NAMES.get(name) if trains else None)
    if choices:
        return {"enum": [*choices, None]}
    kind = dict(_kind(action.type))
    if not kind:
        return {"type": "null"}
    if trains:
        kind |= _range(name)
    if name in MAPPINGS:
        kind["type"] = [*kind["type"], "object"]
    if name == NO_SLASH:
        kind["pattern"] = "^[^/]*$"
    if action.nargs in SEVERAL:
        kind = {**kind, "type": ["array", *kind["type"]], "items": kind, "minItems": 1}
    return kind | {"type": [*kind["type"], "null"]}


def _kind(of: Any) -> Schema:
    """Return what a parser's type takes; nothing where no text makes a value of it."""
    if isinstance(of, type) and issubclass(of, Enum):
        return {"type": ["string"], "pattern": f"^({'|'.join(one.value for one in of)})$"}
    return KINDS.get(of, {})


def _allowed(name: str) -> Iterable[Any]:
    return option_checks.UNSUPPORTED[name][0]


def _range(name: str) -> Schema:
    """Return the range of a number, where `option_checks` has it in a table."""
    tables = {
        "minimum": option_checks.AT_LEAST,
        "exclusiveMinimum": option_checks.ABOVE,
        "exclusiveMaximum": option_checks.BELOW,
    }
    found: Schema = {key: table[name] for key, table in tables.items() if name in table}
    return found


def _shared(name: str, readers: Iterable[str], own: Mapping[str, Schema]) -> Schema:
    """Return the schema of an option for all commands that have it: what one of them takes."""
    found = {
        json.dumps(own[reader]["properties"][name]): {"$ref": f"#/$defs/{reader}/properties/{name}"}
        for reader in sorted(readers, key=lambda reader: reader != "train")
        if name in own[reader]["properties"]
    }
    kinds = list(found.values())
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _closed(properties: Schema, place: str) -> Schema:
    """Return a mapping that takes these names, with underscores or dashes, and no others.

    `place` is where it stands in the schema.
    """
    dashed = {
        f"^{name.replace('_', '-')}$": {"$ref": f"{place}/properties/{name}"}
        for name in properties
        if "_" in name
    }
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": dashed,
        "additionalProperties": False,
    }


def _help(action: argparse.Action) -> str:
    """Return the help as `--help` shows it."""
    text = (action.help or "") % {**vars(action), "prog": ""}
    return " ".join(text.split())


def _plain(value: Any) -> Any:
    """Return a default as JSON has it."""
    return getattr(value, "value", value)
