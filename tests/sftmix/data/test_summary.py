"""Refused rows are counted by kind of reason, each with its first address."""

import json

from sftmix.data.rows import BadRowError
from sftmix.data.summary import Reading, kind_of


def test_reasons_that_differ_in_numbers_and_values_are_one_kind() -> None:
    alike = [
        (
            "'messages[3].role' must be a role, got 'usr'",
            "'messages[12].role' must be a role, got ''",
        ),
        ("'labels[0]' is 7, outside 0..5", "'labels[88]' is -7,000, outside 0..5"),
        ("invalid JSON: Expecting value at column 1", "invalid JSON: Expecting value at column 29"),
        ("not valid UTF-8: byte 0xff (x)", "not valid UTF-8: byte 0xe4 (x)"),
        ("'n' must be a number, got \"it's\"", "'n' must be a number, got 'two \\' words'"),
        ("the role 'a' is unknown", "the role 'b' is unknown"),
    ]
    for one, other in alike:
        assert kind_of(one) == kind_of(other)
    assert kind_of("'prompt' is missing") != kind_of("'output' is missing")
    assert kind_of("the row doesn't end, it's 'x'") == "the row doesn't end, it's '...'"


def test_reading_counts_refused_rows_and_shows_the_most_frequent_reasons_first() -> None:
    reading = Reading()
    reading.rows["a.jsonl"] += 4
    reading.refuse(BadRowError("a.jsonl", 1, "'n' is missing"))
    for line in (2, 3):
        reading.refuse(BadRowError("a.jsonl", line, f"'n' must be a number, got '{line}'"))
    first, second = reading.top_reasons()
    assert (first.count, first.first) == (2, "a.jsonl:2: 'n' must be a number, got '2'")
    assert (second.count, second.first) == (1, "a.jsonl:1: 'n' is missing")
    assert reading.top_reasons(1) == [first]
    assert json.loads(json.dumps(reading.numbers())) == {
        "rows": {"a.jsonl": 4}, "refused": 3, "forgiven": {}, "unused": {}, "duplicates": 0
    }  # fmt: skip
