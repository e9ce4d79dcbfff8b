"""Templates within bounds: errors name row and line, loops end, and it is always the same day."""

from __future__ import annotations

import pytest

from sftmix.data.examples import BadRowError
from sftmix.templates import rendering
from sftmix.templates.chat import prompt_tokens, set_template_date, template_date, template_hash
from sftmix.templates.rendering import render
from sftmix.templates.tokenizing import tokenize_examples
from tests.sftmix import chats
from tests.sftmix.chats import ONE, example, said, tokenizer_of, user

BAD = {
    "undefined": ("{% for m in messages %}\n{{ m.text.x }}{% endfor %}", "no attribute 'text'", 2),
    "type": ("\n\n{{ messages[0].content + 1 }}", "TypeError", 3),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError", 1),
    "key": ("{% set d = {} %}\n{{ d['a'].b }}", "no attribute 'a'", 2),
    "random": ("{{ messages | random }}", "No filter named 'random'", 1),
    "random words": ("{{ lipsum() }}", "'lipsum' is undefined", 1),
    "filter": ("\n{{ messages | nothing }}", "No filter named 'nothing'", 2),
    "syntax": ("a\nb\n{% for %}", "Expected an expression", 3),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError", 1),
    "include": ("{% include '/etc/passwd' %}", "TypeError: no loader", 1),
    "deep": ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", "RecursionError", 1),
    "json": ("\n{{ raise_exception | tojson }}", "TypeError", 2),
    "own": ("{{ raise_exception('no \x1b[31mred\x07') }}", r"no \\x1b\[31mred\\x07", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_row_and_the_line(name: str) -> None:
    template, reason, line = BAD[name]
    pattern = rf"rows\.jsonl:1: the chat template refuses .*{reason}.*\(line {line} of the template"
    with pytest.raises(BadRowError, match=pattern) as caught:
        tokenize_examples([ONE], tokenizer_of(template))
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ValueError, match=reason):
        prompt_tokens((user("one"),), tokenizer_of(template))


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop of nothing": (
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "a macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
    ),
    "a recursive loop": (
        "{% for m in messages recursive %}{% if loop.depth < 40 %}{{ loop(messages) }}{% endif %}"
        "{% endfor %}"
    ),
    "a call": (
        "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n - 1) %}{% endcall %}"
        "{% call f(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{% call f(40) %}{% endcall %}"
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_STEPS", 3000)
    with pytest.raises(BadRowError, match=r"rows\.jsonl:1: .*more than 3,000 steps; does it end"):
        tokenize_examples([ONE], tokenizer_of(ENDLESS[name]))


def test_time_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_SECONDS", -1.0)
    with pytest.raises(BadRowError, match="does it end"):
        tokenize_examples([ONE], tokenizer_of(chats.CHATML))


LONG = {
    "a product": "{{ 'ab' * 10 ** 11 }}",
    "a product of a list": "{{ [1] * 10 ** 11 }}",
    "a power": "{{ 10 ** 10 ** 2 ** 40 }}{{ 7 ** (10 ** 12) }}",
    "doubling": (
        "{% set n = namespace(s='abcdefgh') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}"
    ),
    "sums": (
        "{% set n = namespace(s='abcdefgh') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
        "{% endfor %}"
    ),
    "output": "{% for i in range(9999) %}{{ 'a' * 1000000 }}{% endfor %}",
}


@pytest.mark.parametrize("name", LONG)
def test_strings_are_bounded(name: str) -> None:
    with pytest.raises(BadRowError, match="it makes a string or list of"):
        tokenize_examples([ONE], tokenizer_of(LONG[name]))


def test_counting_changes_no_text() -> None:
    template = (
        "{% for m in messages if m.content %}{{ loop.index ~ '/' ~ loop.length }}{{ m.content }}"
        "{{ 'ab' * 2 }}{{ 2 ** 3 + 1 }}{{ [1] * 2 }}{% if not loop.last %}, {% endif %}{% endfor %}"
        "{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ f('y') }}"
        "{% call f('z') %}in{% endcall %}{% for a in [1] %}{% else %}none{% endfor %}"
        "{% generation %}{{ bos_token }}{% endgeneration %}"
    )
    tokenizer = tokenizer_of(template)
    messages = list(ONE.messages or ())
    text, _ = render(template, messages, tokenizer, "2026-11-29", prompt=False)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith("1/2oneabab9[1, 1], 2/2the answer")


# Dates


@pytest.mark.parametrize("template", [chats.DATED, chats.GPT_OSS], ids=["llama3.2", "gpt-oss"])
def test_a_run_keeps_its_day(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(day: str | None = None) -> tuple[list[int], str | None, str]:
        tokenizer = tokenizer_of(template)
        set_template_date(tokenizer, day)
        ids = tokenize_examples([ONE], tokenizer)["input_ids"][0]
        assert ids[: len(prompt_tokens((user("one"),), tokenizer))] == prompt_tokens(
            (user("one"),), tokenizer
        )
        return ids, template_date(tokenizer), template_hash(tokenizer)

    monkeypatch.setattr("sftmix.templates.chat.today", lambda: "2026-11-28")
    before = read()
    assert before[1] == "2026-11-28"
    monkeypatch.setattr("sftmix.templates.chat.today", lambda: "2027-03-04")
    assert read()[0] != before[0]
    assert read("2026-11-28") == before
    text = tokenizer_of(template).decode(before[0])
    assert ("28 Nov 2026" if template == chats.DATED else "2026-11-28") in text


def test_a_template_without_a_date_has_none() -> None:
    assert template_date(tokenizer_of(chats.CHATML)) is None
    assert template_date(tokenizer_of(None)) is None


def test_tool_templates_count() -> None:
    plain, several = tokenizer_of(chats.CHATML), tokenizer_of(None)
    several.chat_template = {"default": chats.CHATML, "tool_use": chats.DATED}
    assert template_hash(plain) != template_hash(several)
    assert template_date(several) is not None
    several.chat_template = {"tool_use": chats.DATED}
    with pytest.raises(ValueError, match="multiple chat templates"):
        tokenize_examples([example(user("a"), said("b"))], several)
