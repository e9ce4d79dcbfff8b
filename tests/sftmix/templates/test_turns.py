"""Where responses are found, under templates in the form of well known models'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sftmix.data.examples import BadRowError
from sftmix.templates.chat import end_of_turn, prompt_tokens
from sftmix.templates.tokenizing import tokenize_examples
from tests.sftmix import chats
from tests.sftmix.chats import ONE, TWO, example, responses, said, tokenizer_of, user

DOCS = Path(__file__).resolve().parents[3] / "docs" / "templates.md"
CALL = {"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "looks"}}]

# Writes what a message calls and which tools there are.
CALLING = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    "{% for call in m.tool_calls %}<|call|>{{ call.function | tojson }}{% endfor %}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rows_of(template: str, *examples: Any, **tokens: str) -> list[list[str]]:
    tokenizer = tokenizer_of(template, **tokens)
    return [responses(row, tokenizer) for row in tokenize_examples(examples, tokenizer)]


@pytest.mark.parametrize("name", chats.FAMILIES)
def test_one_turn_and_two(name: str) -> None:
    """What is learnt is what the prompt asks for, to the end of the turn."""
    family = chats.FAMILIES[name]
    tokenizer = tokenizer_of(family.template)
    data = tokenize_examples([ONE, TWO], tokenizer)
    assert responses(data[0], tokenizer) == [family.one]
    assert tuple(responses(data[1], tokenizer)) == family.two
    assert end_of_turn(tokenizer) == family.end
    for asked, row in zip((ONE, TWO), data, strict=True):
        assert asked.messages is not None
        prompt = prompt_tokens(asked.messages[:-1], tokenizer)
        *_, begin = (
            i
            for i in range(1, len(row["labels"]))
            if row["labels"][i] != -100 and row["labels"][i - 1] == -100
        )
        # In the midst of a conversation a prompt's last space is parted from the answer before.
        if asked is ONE or name not in ("Vicuna", "Llama 3, 3.1", "Llama 3.2 (dated)"):
            assert row["input_ids"][:begin] == prompt
        else:
            assert tokenizer.decode(row["input_ids"][:begin]) == tokenizer.decode(prompt)


def test_the_page_has_these_families() -> None:
    """The table of docs/templates.md is what these tests find."""
    page = DOCS.read_text()

    def code(text: str) -> str:
        return f"`{text.encode('unicode_escape').decode()}`"

    for name, family in chats.FAMILIES.items():
        turns = "all" if len(family.two) == 2 else "the last"
        line = f"| {name} | {code(family.one)} | {code(family.end)} | {turns} |"
        assert line.replace("<|", "<\\|").replace("|>", "\\|>") in page, line


def test_what_is_not_learnt_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert rows_of(chats.QWEN3, ONE, TWO, TWO) == [
        ["<think>\n\n</think>\n\nthe answer<|im_end|>"],
        ["<think>\n\n</think>\n\nthen here<|im_end|>"],
        ["<think>\n\n</think>\n\nthen here<|im_end|>"],
    ]
    (record,) = caplog.records
    assert "2 assistant turns carry no loss (the first in rows.jsonl:1)" in record.getMessage()
    assert "--chat_template FILE" in record.getMessage()


@pytest.mark.parametrize(
    ("template", "thought"),
    [
        (chats.QWEN3, "<think>\nlet me see\n</think>\n\n"),
        (chats.QWEN36, "let me see\n</think>\n\n"),
        (chats.R1, "let me see\n</think>\n\n"),
        (chats.NEMOTRON, "let me see\n</think>\n"),
        (chats.GLM_MOE, "\n<think>let me see</think>\n"),
        (
            chats.GPT_OSS,
            "<|channel|>analysis<|message|>let me see<|end|>"
            "<|start|>assistant<|channel|>final<|message|>",
        ),
    ],
    ids=["qwen3", "qwen3.6", "r1", "nemotron", "glm-moe", "gpt-oss"],
)
@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_a_thought_is_learnt(
    template: str, thought: str, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    row = example(user("one"), said("the answer", **{field: "let me see"}))
    ((learnt,),) = rows_of(template, row)
    assert learnt == thought + chats.FAMILIES[_name_of(template)].one.removeprefix(
        _thoughtless(template)
    )
    assert not caplog.records


def _name_of(template: str) -> str:
    return next(name for name, one in chats.FAMILIES.items() if one.template == template)


def _thoughtless(template: str) -> str:
    return chats.FAMILIES[_name_of(template)].one.partition("the answer")[0]


@pytest.mark.parametrize("template", [chats.QWEN3, chats.QWEN36, chats.R1])
def test_a_thought_inside_the_content_is_learnt(template: str) -> None:
    inside = example(user("one"), said("<think>\nlet me see\n</think>\n\nthe answer"))
    beside = example(user("one"), said("the answer", reasoning_content="let me see"))
    first, second = rows_of(template, inside, beside)
    assert first == second


def test_a_thought_that_the_template_does_not_write_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    row = example(user("one"), said("the answer", reasoning_content="let me see"))
    assert rows_of(chats.CHATML, row, ONE) == [["the answer<|im_end|>"]] * 2
    (record,) = caplog.records
    assert "the reasoning of 1 messages is not used (the first in rows.jsonl:1)" in record.message


def test_a_prompt_that_closes_the_thought_cannot_ask_for_one() -> None:
    silent = chats.QWEN36.replace(
        "<think>{{ '\n' }}{% endif %}", "<think>\n\n</think>{{ '\n\n' }}{% endif %}"
    )
    assert rows_of(silent, ONE) == [["the answer<|im_end|>"]]
    row = example(user("one"), said("the answer", reasoning_content="let me see"))
    with pytest.raises(BadRowError, match=r"rows\.jsonl:1: .*not prefix-consistent: it asks for"):
        rows_of(silent, row)


# Masks


@pytest.mark.parametrize(
    "template", [chats.CHATML, chats.MARKED, chats.QWEN3, chats.R1, chats.PHI3]
)
def test_a_masked_turn_carries_no_loss(template: str) -> None:
    messages = (user("one"), said("first there"), user("two"), said("then here"))
    first = example(*messages, learnt=(False, True, False, False))
    last = example(*messages, learnt=(False, False, False, True))
    learnt = rows_of(template, first, last)
    assert [len(turns) for turns in learnt] == [1, 1]
    assert "first there" in learnt[0][0]
    assert "then here" in learnt[1][0]
    with pytest.raises(BadRowError, match="no message is learnt"):
        rows_of(template, example(*messages, learnt=(False,) * 4))


def test_marks_are_taken_as_they_are() -> None:
    """As transformers' own mask, with the white space inside and without the end outside."""
    template = chats.MARKED.replace(
        "{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}",
        "{{ m.content + '\n' }}{% endgeneration %}<|im_end|>{{ '\n' }}",
    )
    tokenizer = tokenizer_of(template)
    data = tokenize_examples([TWO], tokenizer)
    mask: Any = tokenizer.apply_chat_template(
        list(TWO.messages or ()), return_assistant_tokens_mask=True, return_dict=True
    )
    assert data[0]["input_ids"] == mask["input_ids"]
    assert [label != -100 for label in data[0]["labels"]] == [
        bool(m) for m in mask["assistant_masks"]
    ]
    assert responses(data[0], tokenizer) == ["first there\n", "then here\n"]
    assert end_of_turn(tokenizer) == ""


def test_marks_that_hold_nothing() -> None:
    inside = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    outside = "{{ m.content }}<|im_end|>{% generation %}{% endgeneration %}"
    with pytest.raises(BadRowError, match="marks hold no response"):
        rows_of(chats.MARKED.replace(inside, outside), ONE)


def test_marks_that_the_prompt_does_not_ask_for(caplog: pytest.LogCaptureFixture) -> None:
    """As TRL's training templates for reasoning models, whose prompts open a thought."""
    asking = chats.MARKED.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant",
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>",
    )
    assert rows_of(asking, ONE, TWO) == rows_of(chats.MARKED, ONE, TWO)
    (record,) = caplog.records
    assert "the marked responses of 2 examples (the first in rows.jsonl:1)" in record.getMessage()


# Tools


def test_calls_and_tools_go_through_the_template() -> None:
    row = example(
        user("one"),
        said(None, tool_calls=[CALL]),
        {"role": "tool", "content": "42"},
        said("the answer"),
        tools=TOOLS,
    )
    tokenizer = tokenizer_of(CALLING)
    data = tokenize_examples([row], tokenizer)
    call = '<|call|>{"name": "look", "arguments": {"a": 1}}<|end|>'
    assert responses(data[0], tokenizer) == [call, "the answer<|end|>"]
    assert '"description": "looks"' in tokenizer.decode(data[0]["input_ids"])


# As DeepSeek's: calls are written where there is no content, their arguments as they are.
OF_NULL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}<|assistant|>"
    "{% for c in m['tool_calls'] %}{{ '<|call|>' + c['function']['arguments'] }}{% endfor %}<|end|>"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("content", [None, ""])
def test_a_template_that_asks_for_null_and_for_text(content: str | None) -> None:
    told = {"role": "tool", "content": "42"}
    row = example(user("one"), said(content, tool_calls=[CALL]), told, said("the answer"))
    assert rows_of(OF_NULL, row) == [['<|call|>{"a": 1}<|end|>', "the answer<|end|>"]]
    assert "None" not in str(rows_of(CALLING, row))


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize(
    "written", ["{{ m.content + '<|end|>' }}", "{{ m.content | trim }}<|end|>"]
)
def test_calls_that_a_template_leaves_out(content: str | None, written: str) -> None:
    """Also where it fails on a message without a content."""
    template = chats.CHATML.replace("{{ m.content }}<|im_end|>", written)
    with pytest.raises(BadRowError, match="writes nothing of message 1's tool_calls"):
        rows_of(template, example(user("one"), said(content, tool_calls=[CALL])))


@pytest.mark.parametrize("role", ["tool", "developer"])
def test_what_is_told_and_not_written(role: str) -> None:
    """Whatever else of the text has the same characters."""
    silent = CALLING.replace("{% else %}", f"{{% elif m.role != '{role}' %}}")
    told = {"role": role, "content": "4"}
    row = example(user("4?"), said("4", tool_calls=[CALL]), told, said("it is 4"))
    if role == "developer":
        row = example(told, user("4?"), said("it is 4"))
    with pytest.raises(BadRowError, match=rf"writes nothing of message \d \({role}\)"):
        rows_of(silent, row)
    assert len(rows_of(CALLING, row)) == 1


def test_words_beside_calls_that_are_not_written() -> None:
    silent = CALLING.replace(
        "{{ m.content }}{% for", "{{ '' if m.tool_calls else m.content }}{% for"
    )
    row = example(user("one"), said("the answer", tool_calls=[CALL]))
    with pytest.raises(BadRowError, match="message 1's content beside its tool_calls; leave"):
        rows_of(silent, row)


def test_a_template_for_tools_is_used_where_there_are_tools() -> None:
    tokenizer = tokenizer_of(None)
    tokenizer.chat_template = {"default": chats.CHATML, "tool_use": CALLING}
    messages = (user("one"), said("the answer"))
    data = tokenize_examples([ONE, example(*messages, tools=TOOLS)], tokenizer)
    assert [responses(row, tokenizer) for row in data] == [
        ["the answer<|im_end|>"],
        ["the answer<|end|>"],
    ]


def test_what_a_template_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    call = example(user("one"), said("the answer", tool_calls=[CALL]))
    with pytest.raises(BadRowError, match="writes nothing of message 1's tool_calls"):
        rows_of(chats.CHATML, call)
    assert rows_of(chats.CHATML, example(*(ONE.messages or ()), tools=TOOLS)) == [
        ["the answer<|im_end|>"]
    ]
    assert "the tools of 1 examples are not used (the first in rows.jsonl:1)" in caplog.text
    parts = chats.CHATML.replace(
        "{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"
    )
    with pytest.raises(BadRowError, match=r"writes nothing of message 0 \(user\), which may"):
        rows_of(parts, example(user("o"), said("e")))
    no_system = chats.CHATML.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
    with pytest.raises(BadRowError, match=r"writes nothing of message 0 \(system\)"):
        rows_of(no_system, example({"role": "system", "content": "kind"}, user("o"), said("e")))


# Tokens at the boundary


def test_the_first_token_after_a_space_is_learnt() -> None:
    """ "ASSISTANT: " and "hello" are one token fewer together, but are asked for apart."""
    tokenizer = tokenizer_of(chats.VICUNA)
    row = example(user("one"), said("hello"))
    assert tokenizer("ASSISTANT: hello")["input_ids"] != [
        token for part in ("ASSISTANT: ", "hello") for token in tokenizer(part)["input_ids"]
    ]
    data = tokenize_examples([row], tokenizer)[0]
    assert responses(data, tokenizer) == ["hello</s>"]
    prompt = prompt_tokens((user("one"),), tokenizer)
    assert data["input_ids"] == [*prompt, *tokenizer("hello</s>")["input_ids"]]


def test_two_line_breaks_before_a_word_are_those_of_the_prompt() -> None:
    tokenizer = tokenizer_of(chats.LLAMA3)
    assert len(tokenizer("\n\n")["input_ids"]) == 1 < len(tokenizer("\n\none")["input_ids"]) - 1
    row = tokenize_examples([ONE], tokenizer)[0]
    prompt = prompt_tokens((user("one"),), tokenizer)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][len(prompt) - 1 : len(prompt) + 1] == [-100, row["input_ids"][len(prompt)]]


# The templates that TRL ships, as models have them

OF_PARTS = ("idefics3", "llava_next", "smolvlm")


@pytest.mark.parametrize("kind", ["models", "training"])
def test_the_templates_of_trl(kind: str) -> None:
    """All that write text train one and two turns, the last of which is what was asked for."""
    trl = pytest.importorskip("trl")
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    files = [path for path in files if ("training" in path.stem) == (kind == "training")]
    assert len(files) > 10
    for path in files:
        tokenizer = tokenizer_of(path.read_text())
        if path.stem.startswith(OF_PARTS):
            with pytest.raises(BadRowError, match=r"the chat template (writes nothing|refuses)"):
                tokenize_examples([ONE], tokenizer)
            continue
        for asked, text in ((ONE, "the answer"), (TWO, "then here")):
            (row,) = tokenize_examples([asked], tokenizer)
            assert text in responses(row, tokenizer)[-1], path.stem
            assert end_of_turn(tokenizer), path.stem
            assert asked.messages is not None
            prompt = tokenizer.decode(prompt_tokens(asked.messages[:-1], tokenizer))
            if kind == "models":
                assert tokenizer.decode(row["input_ids"]).startswith(prompt), path.stem
