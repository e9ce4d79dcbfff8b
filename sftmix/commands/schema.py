"""Print a JSON Schema of the files that `--config` reads (`sftmix schema`)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from sftmix.recipe.config_file import WITH_CONFIG
from sftmix.runs.failures import Naming, OneMessage
from sftmix.runs.folders import atomic_write

OPTIONS = ("output",)


def main(words: Sequence[str]) -> None:
    """Run the command."""
    parser = OneMessage(
        prog="sftmix schema",
        description="JSON Schema (draft 2020-12) of the YAML files that --config reads: every "
        "option with its type, default, help, choices and range.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=WITH_CONFIG,
        metavar="COMMAND",
        help=f"{', '.join(WITH_CONFIG)}: of a file that this command reads; by default of one for "
        "several commands. `plan` and `preview` read what `train` does",
    )
    parser.add_argument("--output", metavar="FILE", help="write it there; by default print it")
    arguments = parser.parse_args(words)
    text = schema_text(arguments.command)
    if arguments.output is None:
        print(text)
        return
    with Naming("output"):
        atomic_write(Path(arguments.output), lambda path: path.write_text(f"{text}\n", "utf-8"))
    print(f"wrote {arguments.output}")


def schema_text(command: str | None = None) -> str:
    """Return the schema of a command's file, or of one for several commands, as JSON."""
    # They import transformers, which takes seconds.
    from sftmix.recipe.schema import config_schema

    types = {
        name: importlib.import_module(f"sftmix.commands.{name}").ARGUMENTS for name in WITH_CONFIG
    }
    return json.dumps(config_schema(types, command), indent=1, ensure_ascii=False)
