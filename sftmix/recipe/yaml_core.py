"""Read YAML by the core rules of YAML 1.2, which are those of JSON with less to type.

PyYAML follows YAML 1.1, where `no` and `on` are booleans, `1e-7` is text, `010` is 8,
`1:30` is 90 and `2024-01-01` a date. Here `true` and `false` are the booleans, `null` and
`~` nothing, every decimal number a number; all else is text. Names are text, each given once.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

# Nodes are counted with aliases written out: ten aliases of ten aliases and so on would fill any
# memory. A recipe has 50 nodes.
MAX_NODES = 10_000
MERGE = "tag:yaml.org,2002:merge"
# Long quotations in PyYAML's messages may show a file's content, so they are cut out.
QUOTED = re.compile(r"'[^']{7,}'")


class Whole(int):
    """An integer that is printed as it was written: `007` may be a name."""

    written = ""

    def __str__(self) -> str:
        return self.written


class Real(float):
    """A number that is printed as it was written: `12e4567` may be a commit."""

    written = ""

    def __str__(self) -> str:
        return self.written


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with only the types of the core schema, and merge keys (`<<`)."""


CoreLoader.yaml_implicit_resolvers = {}
CoreLoader.yaml_constructors = {
    tag: made
    for tag, made in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "str", "seq", "map")
}


def _resolve(kind: str, pattern: str, *first: str) -> None:
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), list(first))


_resolve("null", r"^(?:~|null|Null|NULL|)$", *"~nN", "")
_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", *"tTfF")
_resolve("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", *"-+0123456789")
_resolve(
    "float",
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|"
    r"\.(?:nan|NaN|NAN))$",
    *"-+.0123456789",
)
_resolve("merge", r"^<<$", "<")


def _integer(loader: CoreLoader, node: ScalarNode) -> Whole:
    text = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    number = Whole(text[2:] if base != 10 else text, base)
    # argparse reads decimal numbers.
    number.written = text if base == 10 else int.__repr__(number)
    return number


def _real(loader: CoreLoader, node: ScalarNode) -> Real:
    text = node.value.lower()
    number = Real(text.replace(".inf", "inf").replace(".nan", "nan"))
    number.written = text if text[-1].isdigit() or text[-1] == "." else float.__repr__(number)
    return number


CoreLoader.add_constructor("tag:yaml.org,2002:int", _integer)
CoreLoader.add_constructor("tag:yaml.org,2002:float", _real)


def load_yaml(text: str, place: str) -> Any:
    """Return the value of a YAML document; `place` begins the messages, which quote none of it.

    Raises:
        ValueError: it is not YAML, or more than one document; it has a name twice, a name that is
            no text, a type besides the core schema's, or more nodes than `MAX_NODES`.
    """
    try:
        loader = CoreLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, place, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        problem = QUOTED.sub("'...'", error.problem or "")
        raise ValueError(f"{place} is not YAML{where}: {problem}") from None
    except yaml.YAMLError:
        raise ValueError(f"{place} is not YAML: it holds characters that are no text") from None
    except RecursionError:
        raise ValueError(f"{place}: lists and mappings are nested too deep") from None
    except (ValueError, OverflowError) as error:
        # A tag does not fit its value (`!!int a`), or a number has thousands of digits.
        if str(error).startswith(place):
            raise
        raise ValueError(f"{place} is not YAML: a value is not of the type it is given") from None


def _check(node: Node, place: str, sizes: dict[int, int | None]) -> int:
    """Return the node's size with aliases written out; raise as `load_yaml` does."""
    known = sizes.get(id(node), 0)
    if known is None:
        raise ValueError(f"{place}: an alias in line {_line(node)} stands for what it is part of")
    if known:
        return known
    sizes[id(node)] = None
    size = 1
    if isinstance(node, MappingNode):
        _check_names(node, place)
        size += sum(
            _check(key, place, sizes) + _check(one, place, sizes) for key, one in node.value
        )
    elif isinstance(node, SequenceNode):
        size += sum(_check(one, place, sizes) for one in node.value)
    if size > MAX_NODES:
        raise ValueError(f"{place}: expected at most {MAX_NODES:,} values, aliases written out")
    sizes[id(node)] = size
    return size


def _check_names(node: MappingNode, place: str) -> None:
    """Refuse a name that is given twice, since one value would be lost, or that is no text."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = _line(key)
        if key.tag == MERGE:
            continue
        if not isinstance(key, ScalarNode) or not key.tag.endswith(":str"):
            raise ValueError(
                f'{place}: the name in line {line} is no text; write it in quotes ("")'
            )
        # Flags are taken with dashes or underscores.
        name = key.value.replace("-", "_")
        if name in lines:
            raise ValueError(
                f"{place}: {key.value!r} is given twice, in lines {lines[name]} and {line}"
            )
        lines[name] = line


def _line(node: Node) -> int:
    line: int = node.start_mark.line
    return line + 1
