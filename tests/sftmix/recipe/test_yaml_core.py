"""YAML as its core rules of version 1.2 have it; what is refused is said without quoting it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from sftmix.recipe.yaml_core import MAX_NODES, load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("NO", "NO"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("'null'", "null"),
        ("1e-7", 1e-7),
        ("1E5", 1e5),
        (".5e-3", 0.0005),
        ("-1.", -1.0),
        ("+.5", 0.5),
        ("010", 10),
        ("-007", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("1:30:00", "1:30:00"),
        ("1_000", "1_000"),
        ("0b101", "0b101"),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("=", "="),
        ("1e", "1e"),
        ("12e4567", math.inf),
    ],
)
def test_plain_scalars(text: str, value: Any) -> None:
    for found in (
        load_yaml(f"a: {text}", "x")["a"],
        load_yaml(f"a: {{b: [{text or '~'}]}}", "x")["a"]["b"][0],
    ):
        assert found == value
        assert isinstance(found, type(value))
    assert math.isnan(load_yaml("a: .nan", "x")["a"])


def test_numbers_are_printed_as_they_were_written_and_are_numbers_in_json() -> None:
    values = load_yaml("[010, 1e-7, .5e-3, 12e4567, -0, 0x1F, .inf]", "x")
    assert [str(value) for value in values] == [
        *("010", "1e-7", ".5e-3", "12e4567", "-0", "31", "inf")
    ]
    assert json.dumps(values[:3]) == "[10, 1e-07, 0.0005]"


def test_merge_keys_and_aliases() -> None:
    text = "base: &b {mu: 0.1, seed: 3}\nother: {<<: *b, mu: 0.2}\nlist: [*b, *b]"
    values = load_yaml(text, "x")
    assert values["other"] == {"mu": 0.2, "seed": 3}
    assert values["list"] == [values["base"]] * 2


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGING = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
SECRET = "root-password-of-this-machine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x: 'a' is given twice, in lines 1 and 3"),
        ("{a: 1, a: 2}", "x: 'a' is given twice, in lines 1 and 1"),
        ("on-bad-row: skip\non_bad_row: error", "x: 'on_bad_row' is given twice, in lines 1 and 2"),
        ("b:\n  c: {d: 1,\n   d: 2}", "x: 'd' is given twice, in lines 2 and 3"),
        ("1: a", r'x: the name in line 1 is no text; write it in quotes \(""\)'),
        ("~: a", "the name in line 1 is no text"),
        ("true: a", "the name in line 1 is no text"),
        ("[a]: b", "the name in line 1 is no text"),
        ("? {a: b}\n: c", "the name in line 1 is no text"),
        (BOMB, f"x: expected at most {MAX_NODES:,} values, aliases written out"),
        (MERGING, f"x: expected at most {MAX_NODES:,} values"),
        (f"[{'1,' * MAX_NODES}]", f"x: expected at most {MAX_NODES:,} values"),
        ("a: &a [*a]", "x: an alias in line 1 stands for what it is part of"),
        ("[" * 100_000, "x: lists and mappings are nested too deep"),
        ("a: !!python/object/apply:os.system [ls]", "x is not YAML in line 1, column 4: could not"),
        ("a: !!timestamp 2024-01-01", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !own b", "could not determine a constructor"),
        ("a: !!int b", "a value is not of the type"),
        ("a: " + "9" * 5000, "a value is not of the type"),
        ("a: 1\n---\nb: 2", "x is not YAML in line 2, column 1: but found another document"),
        ("a: [1\n", "x is not YAML in line 2, column 1: "),
        ("a: \tb: c\n", "x is not YAML in line 1"),
        ("a: \x00", "x is not YAML: it holds characters that are no text"),
        (f"{SECRET}:x:0: 0\n  {SECRET}: 1", "x is not YAML in line 2"),
        (f"a: *{SECRET}", "x is not YAML in line 1"),
        (f"a: !{SECRET} b", "x is not YAML in line 1"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(text, "x")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_an_empty_file() -> None:
    assert load_yaml("# nothing\n", "x") is None
