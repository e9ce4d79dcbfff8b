"""A YAML file (``--config``) as command-line words, read as if typed before the flags.

    include: paper.yaml             another file, beside this one, whose values come first
    model: meta-llama/Llama-3.1-8B  shared by the commands that have such an option
    score: {output: runs/score}     a command's own values, which come last

Names are those of the flags. A null leaves the option at its default, whatever was said before.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from sftmix.cli import COMMANDS

INCLUDE = "include"


def config_words(
    path: str | Path, command: str, options: Collection[str], others: Collection[str] = ()
) -> list[str]:
    """The words of a command whose flags have the names ``options``.

    Shared names that only other commands know, ``others``, are left out.

    Raises:
        ValueError: the file is no mapping of names to values, or a mapping in it is neither a
            command's nor an option's value.
        OSError: a file cannot be read.
    """
    content = read_config(Path(path))
    shared = {name: value for name, value in content.items() if name not in COMMANDS}
    for name, value in shared.items():
        if isinstance(value, dict) and name not in {*options, *others}:
            commands = ", ".join(COMMANDS)
            raise ValueError(f"config: {path}: {name!r} is no command, expected one of {commands}")
    kept = {name: value for name, value in shared.items() if name in options or name not in others}
    words: list[str] = []
    for name, value in {**kept, **content.get(command, {})}.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}"]
        words += [json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values]
    return words


def read_config(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file over those that it includes; commands' own are merged name by name.

    Raises:
        ValueError: a file is no mapping of names to values, a command's is none, or one includes
            itself.
        OSError: a file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} must hold names and values, got {content!r}")
    for name in COMMANDS:
        own = content.get(name, {})
        if not isinstance(own, dict):
            raise ValueError(
                f"config: {path}: {name!r} is a command and must hold names and values, got {own!r}"
            )
    included = content.pop(INCLUDE, None)
    if included is None:
        return content
    if not isinstance(included, str):
        raise ValueError(f"config: {path}: include: expected a file's name, got {included!r}")
    files = (*including, path.resolve())
    if (path.parent / included).resolve() in files:
        raise ValueError(f"config: {path} includes {included}, which includes it")
    base = read_config(path.parent / included, files)
    own = {name: {**base.get(name, {}), **content[name]} for name in COMMANDS if name in content}
    return {**base, **content, **own}
