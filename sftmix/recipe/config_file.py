"""Read a YAML file (`--config`) as command-line words, as if typed before the flags.

    include: paper.yaml             another file, in this one's folder, whose values come first
    model: meta-llama/Llama-3.1-8B  shared by the commands that have such an option
    score: {output: runs/score}     a command's own values, which come last

Names are those of the flags. A null leaves the option at its default, whatever was said before.
`yaml_core` reads the values: `no`, `on` and `1:30` are text. Whoever sends a file can choose
options, and no more: the file can include only YAML in its own folder, and cannot make code run
(`FLAG_ALONE`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.recipe.yaml_core import load_yaml
from sftmix.runs.failures import near
from sftmix.runs.reading import read_small

# The commands that take --config; nothing would read a mapping for another one.
WITH_CONFIG = ("score", "train", "generate", "evaluate")
INCLUDE = "include"
# The recipes of the paper: a link in a checkout, files where the package is installed.
RECIPES = Path(__file__).parents[1] / "recipes"
ENDINGS = (".yaml", ".yml")
# Most files in a chain of includes; the recipes have 4.
MAX_FILES = 16
# Running code that comes with a model is for the user to type.
FLAG_ALONE = "trust_remote_code"
NOTHING = ("false", "no", "n", "f", "0")
# transformers takes an attention with a slash in it as a repository of compiled kernels.
NO_SLASH = "attn_implementation"


def config_words(
    path: str | Path,
    command: str,
    options: Collection[str],
    others: Collection[str] = (),
    *,
    single: Collection[str] = (),
) -> list[str]:
    """Return the words of a command whose flags have the names `options`.

    Shared names that only other commands know, `others`, are left out. Options that are
    `single` take one value each.

    Raises:
        ValueError: the file is no mapping of names to values; a name in it is none of the
            options, or one that only a flag may give; a value is of no form that a flag takes.
        OSError: a file cannot be read.
    """
    content = read_config(Path(path))
    shared = {name: value for name, value in content.items() if name not in WITH_CONFIG}
    own = content.get(command, {})
    for name, value in shared.items():
        if name not in {*options, *others}:
            form = "command with --config" if isinstance(value, dict) else f"option of {command}"
            raise _unknown(f"config: {path}: {name!r} is no {form}", name, {*options, *others})
    for name in own:
        if name not in options:
            raise _unknown(f"config: {path}: {command}: {name!r} is no option", name, options)
    kept = {name: value for name, value in shared.items() if name in options}
    words: list[str] = []
    for name, value in _merged(kept, own).items():
        _refuse_code(path, name, value)
        if value is not None:
            words += _words(f"config: {path}: {name}", name, value, _flag(name) in single)
    return words


def read_config(path: Path) -> dict[str, Any]:
    """Return the values of a file over those that it includes; commands' own are merged by name.

    Raises:
        ValueError: a file is no mapping of names to values, a command's is none, one includes
            itself, or one outside the first one's folder.
        OSError: a file cannot be read.
    """
    if not path.exists() and (RECIPES / path.name).is_file():
        raise FileNotFoundError(
            f"config: no such file: {str(path)!r}; did you mean {RECIPES / path.name}?"
        )
    return _read(path, path.parent.resolve(), ())


def place_of(option: str, words: Sequence[str]) -> str:
    """Return where an option's value was written: its flag, or its name in the config file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    flags = {_flag(word.partition("=")[0].lstrip("-")) for word in words if word.startswith("--")}
    file = parser.parse_known_args(words)[0].config if option not in flags else None
    if file is not None:
        with contextlib.suppress(ValueError, OSError):
            content = read_config(Path(file))
            names = {*content, *(name for one in WITH_CONFIG for name in content.get(one, ()))}
            if option in map(_flag, names):
                return f"--config: {file}: {option}"
    return f"--{option}"


def _read(path: Path, root: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    place = f"config: {path}"
    content = load_yaml(read_small(path, "config"), place)
    if not isinstance(content, dict):
        raise ValueError(f"{place} must hold names and values, got {_kind(content)}")
    for name in WITH_CONFIG:
        own = content.get(name, {})
        if not isinstance(own, dict):
            raise ValueError(
                f"{place}: {name!r} is a command and must hold names and values, got {_kind(own)}"
            )
    name = content.pop(INCLUDE, None)
    if name is None:
        return content
    included = _included(path, name, root)
    files = (*including, path.resolve())
    if included.resolve() in files:
        raise ValueError(f"{place} includes {included.name}, which includes it")
    if len(files) == MAX_FILES:
        raise ValueError(f"{place}: include: expected at most {MAX_FILES} files, one in another")
    base = _read(included, root, files)
    own = {
        name: _merged(base.get(name, {}), content[name]) for name in WITH_CONFIG if name in content
    }
    return {**_merged(base, content), **own}


def _included(path: Path, name: Any, root: Path) -> Path:
    """Return the file that `path` includes: YAML in the folder `root`, links followed."""
    place = f"config: {path}: {INCLUDE}"
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{place}: expected a file's name, got {_kind(name)}")
    found = path.parent / name
    if Path(name).is_absolute() or not found.resolve().is_relative_to(root):
        raise ValueError(
            f"{place}: expected a file in the folder of the config file, got {name!r}; put it there"
        )
    if {found.suffix.lower(), found.resolve().suffix.lower()} - set(ENDINGS):
        raise ValueError(f"{place}: expected a name in .yaml or .yml, got {name!r}")
    if not found.exists():
        raise FileNotFoundError(f"{place}: no such file: {str(found)!r}")
    return found


def _flag(name: str) -> str:
    return name.replace("-", "_")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return both mappings as one; the second wins, with dashes or underscores in its names."""
    anew = {_flag(name) for name in over} - over.keys()
    return {**{name: base[name] for name in base if _flag(name) not in anew}, **over}


def _refuse_code(path: str | Path, name: str, value: Any) -> None:
    """Refuse what would run code that comes with a model, or from the hub."""
    asked = value is not None and str(value).lower() not in NOTHING
    if _flag(name) == FLAG_ALONE and asked:
        raise ValueError(
            f"config: {path}: {name}: a config file cannot have code run that comes with a model; "
            "type --trust_remote_code true if you trust it"
        )
    if _flag(name) == NO_SLASH and "/" in str(value):
        raise ValueError(
            f"config: {path}: {name}: a config file cannot have kernels loaded from the hub; "
            "type --attn_implementation with its name if you trust them"
        )


def _unknown(message: str, name: str, options: Iterable[str]) -> ValueError:
    known = sorted({*map(_flag, options), *WITH_CONFIG})
    return ValueError(message + near(_flag(name), known, "; --help-all shows the options"))


def _words(place: str, name: str, value: Any, single: bool) -> list[str]:
    """Return a flag and its values; text that begins with a dash cannot pass for another flag."""
    if isinstance(value, list):
        if single:
            raise ValueError(f"{place}: expected one value, got a list")
        for one in value:
            if isinstance(one, list | dict) or one is None:
                raise ValueError(f"{place}: expected text or numbers in the list, got {_kind(one)}")
        texts = [_text(one) for one in value]
        for text in texts:
            if text.startswith("-") and not _is_number(text):
                raise ValueError(f"{place}: a value in a list cannot begin with a dash: {text!r}")
        return [f"--{name}", *texts]
    text = _text(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(value: Any) -> str:
    """Return the kind of a value, never its text, which may be another file's content."""
    names = {dict: "names and values", list: "a list", str: "text", bool: "a boolean"}
    if value is None:
        return "nothing"
    return next((text for kind, text in names.items() if isinstance(value, kind)), "a number")
