"""Read chat templates from the files that `--chat_template` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftmix.runs.reading import read_small
from sftmix.templates.rendering import RenderError, check_template, shown

# Where a model's folder keeps its template, in the order in which transformers looks.
IN_FOLDER = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def use_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make a tokenizer use the template of a file or folder.

    Raises:
        ValueError: there is no template there, or several without a default, or one that is no
            Jinja template.
        OSError: the file cannot be read.
    """
    tokenizer.chat_template = read_template(name)


def read_template(name: str) -> str:
    """Return the template of a Jinja file, of a tokenizer's JSON file, or of a model's folder.

    Raises:
        ValueError: as `use_template`.
        OSError: the file cannot be read.
    """
    path = _file(name)
    text = read_small(path, "chat_template")
    template = _of_json(text, path, name) if path.suffix == ".json" else text
    if not template.strip():
        raise ValueError(f"chat_template: expected a template, {shown(str(path))} is empty")
    try:
        check_template(template)
    except RenderError as error:
        raise ValueError(
            f"chat_template: {shown(str(path))} is no Jinja template: {error}"
        ) from None
    return template


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        found = [path / inside for inside in IN_FOLDER if (path / inside).exists()]
        if not found:
            raise ValueError(
                f"chat_template: the folder {shown(name)} has none of {', '.join(IN_FOLDER)}"
            )
        return found[0]
    if not path.exists():
        raise ValueError(f"chat_template: there is no file or folder {shown(name)!r}")
    return path


def _of_json(text: str, path: Path, name: str) -> str:
    """Return the template of `chat_template.json` or `tokenizer_config.json`."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"chat_template: {shown(str(path))} is not JSON: {error}") from None
    found: Any = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(found, list):  # as transformers wrote several before it had files for them
        found = {
            one["name"]: one["template"]
            for one in found
            if isinstance(one, dict) and {"name", "template"} <= one.keys()
        }
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(sorted(map(str, found))) or "none"
            raise ValueError(
                f"chat_template: {shown(str(path))} has no template named default, but "
                f"{shown(names)}; put the one that is meant into a file of its own"
            )
        found = found["default"]
    if not isinstance(found, str):
        raise ValueError(f"chat_template: {shown(name)} has no chat_template in it")
    return found
