"""Content hashes: the fast canonical JSON has the bytes of the slow one, for any value."""

import datetime
import hashlib
import json
import math
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.data.hashing import canonical, digest

# Floats that orjson spells otherwise (1e16), integers beyond 64 bits, control characters, keys that
# differ only beyond the first plane of Unicode.
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.text('\x00\x1f\x7f\x85\u2028\ufffd\U00010000"\\/'),
)
VALUES = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        st.lists(part), st.tuples(part, part), st.dictionaries(st.text(), part, max_size=4)
    ),
    max_leaves=12,
)


def slowly(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(VALUES)
def test_any_value_has_the_canonical_json_of_the_standard_library(value: Any) -> None:
    text, alike = canonical(value)
    assert text == slowly(value)
    assert digest(value) == hashlib.sha256(text).hexdigest()
    if alike:
        assert orjson.loads(orjson.dumps(value)) == json.loads(text)


@pytest.mark.parametrize(
    "value",
    [
        1e16,
        {"a": [1.0, -0.0, 5e-324]},
        math.inf,
        2**64,
        -(2**63) - 1,
        [2**70, "a"],
        {2: "number", 10: "key"},
        datetime.datetime(2024, 1, 2),
        {"call": datetime.date(2024, 1, 2)},
        "\x7f\u2028\u0000",
        {"\uffff": 1, "\U00010000": 2},
        [[[[]]]] * 3,
    ],
)
def test_what_orjson_writes_otherwise(value: Any) -> None:
    assert canonical(value)[0] == slowly(value)


def test_deep_nesting_and_lone_surrogates_are_as_before() -> None:
    deep: Any = []
    for _ in range(400):  # orjson writes 254
        deep = [deep]
    assert canonical(deep) == (slowly(deep), False)
    with pytest.raises(UnicodeEncodeError):
        canonical("\ud800")
