"""Tokens and labels: which tokens are the response's, under several templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from sftmix.data.examples import BadRowError, Example, load_examples
from sftmix.templates.chat import PLAIN_TEMPLATE, chat_template, template_hash
from sftmix.templates.tokenizing import tokenize_examples
from tests.sftmix.chats import byte_level_bpe

REAL_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{%- for message in messages %}
{%- if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Drops what the assistant thought in earlier turns, as some models' templates do.
FORGETFUL = """\
{%- for message in messages %}
{{- message['role'] + ': ' }}
{%- if loop.last %}{{ message['content'] }}
{%- else %}{{ message['content'].split('|')[-1] }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

SPACED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}{% if \
add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

STRICT = "{{ raise_exception('no chats today') }}"

CONTROL = ("im_start", "im_end", "start_header_id", "end_header_id", "eot_id")
SPECIAL = ["<s>", "</s>", *(f"<|{name}|>" for name in CONTROL)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    text = "### Instruction:\nsay hello there\n\n### Response:\nhello there, user and assistant"
    tokenizer = byte_level_bpe(text, SPECIAL, 400)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _wrap(bpe: Tokenizer, template: str | None = None, **tokens: Any) -> PreTrainedTokenizerFast:
    tokens = tokens or {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def _example(*contents: str, system: str | None = None, number: int = 0) -> Example:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Example(number, f"data.jsonl:{number + 1}", "hash", messages=tuple(messages))


def _tokens(input_ids: list[int], labels: list[int], number: int = 0) -> Example:
    return Example(number, f"data.jsonl:{number + 1}", "hash", input_ids=input_ids, labels=labels)


def _responses(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of labels."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


TEMPLATES = [
    pytest.param(None, "</s>", id="plain"),
    pytest.param(CHATML, "<|im_end|>", id="chatml"),
    pytest.param(LLAMA3, "<|eot_id|>", id="llama3"),
]


@pytest.mark.parametrize(("template", "end"), TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_labels_are_the_assistant_turns(
    bpe: Tokenizer, template: str | None, end: str, system: str | None
) -> None:
    tokenizer = _wrap(bpe, template)
    examples = [
        _example("say hello", "hello there", system=system),
        _example(
            "hello", "one \N{SNOWMAN}\n\ntwo", "hello there", " three", system=system, number=1
        ),
    ]
    data = tokenize_examples(examples, tokenizer)
    assert data.column_names == ["id", "content_hash", "input_ids", "labels"]
    assert data["id"][:] == [0, 1]
    assert _responses(data[0], tokenizer) == ["hello there" + end]
    third = "three" if template == LLAMA3 else " three"
    assert _responses(data[1], tokenizer) == ["one \N{SNOWMAN}\n\ntwo" + end, third + end]
    for example, row in zip(examples, data, strict=True):
        text = tokenizer.apply_chat_template(
            list(example.messages or ()), chat_template=chat_template(tokenizer), tokenize=False
        )
        assert tokenizer.decode(row["input_ids"]) == text


def test_plain_text(bpe: Tokenizer) -> None:
    messages = list(_example("Hi", "Ho", "He", system="Sys").messages or ())
    render = _wrap(bpe).apply_chat_template
    text = render(
        messages, chat_template=PLAIN_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<s>Sys\n\n### Instruction:\nHi\n\n### Response:\nHo</s>\n\n"
        "### Instruction:\nHe\n\n### Response:\n"
    )
    without_bos = _wrap(bpe, eos_token="</s>").apply_chat_template
    assert without_bos(messages[1:3], chat_template=PLAIN_TEMPLATE, tokenize=False) == (
        "### Instruction:\nHi\n\n### Response:\nHo</s>"
    )


def test_a_lone_space_before_the_response_is_the_prompt_s(bpe: Tokenizer) -> None:
    tokenizer = _wrap(bpe, SPACED)
    [row] = tokenize_examples([_example("hello", "\nhello")], tokenizer)
    assert _responses(row, tokenizer) == ["\nhello</s>"]


def test_rendering_in_batches_keeps_order(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftmix.templates.tokenizing.BATCH_ROWS", 2)
    tokenizer = _wrap(bpe)
    examples = [_example("hello", f"there {i}", number=7 - i) for i in range(5)]
    examples[3] = _tokens([5, 6], [-100, 6], number=4)
    data = tokenize_examples(examples, tokenizer)
    assert data["id"][:] == [7, 6, 5, 4, 3]
    assert data["input_ids"][3] == [5, 6]
    assert _responses(data[4], tokenizer) == ["there 4</s>"]


def test_the_tail_is_cut_and_counted(bpe: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = _wrap(bpe)
    examples = [_example("hello", "hello there"), _example("hello", "x y z " * 20, number=1)]
    whole = tokenize_examples(examples, tokenizer)
    short = len(whole["input_ids"][0])
    assert not caplog.records
    cut = tokenize_examples(examples, tokenizer, max_length=short)
    assert cut[0] == whole[0]
    assert cut[1]["input_ids"] == whole[1]["input_ids"][:short]
    assert cut[1]["labels"] == whole[1]["labels"][:short]
    [record] = caplog.records
    assert f"1 of 2 rows were longer than max_length={short}" in record.getMessage()


def test_a_prompt_that_fills_the_row_is_bad(
    bpe: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    examples = [_example("hello", "yes", number=1), _example("hello " * 60, "yes", number=2)]
    with pytest.raises(
        BadRowError, match="no response token is left within max_length=50"
    ) as caught:
        tokenize_examples(examples, _wrap(bpe), max_length=50)
    assert (caught.value.file, caught.value.line) == ("data.jsonl", 3)
    data = tokenize_examples(examples, _wrap(bpe), max_length=50, on_bad_row="skip")
    assert data["id"][:] == [1]
    assert "left out 1 of 2 rows" in caplog.text
    with pytest.raises(ValueError, match="no examples are left of 1"):
        tokenize_examples(examples[1:], _wrap(bpe), max_length=50, on_bad_row="skip")


def test_pretokenised_rows_are_cut_and_checked(bpe: Tokenizer) -> None:
    tokenizer = _wrap(bpe)
    size = len(tokenizer)
    data = tokenize_examples([_tokens([1, 2, size - 1], [-100, 2, 0])], tokenizer, max_length=2)
    assert (data["input_ids"][0], data["labels"][0]) == ([1, 2], [-100, 2])
    for ids, labels, reason in (
        ([1, size], [1, 2], rf"data\.jsonl:1: 'input_ids\[1\]' is {size}, outside"),
        ([1, -100], [1, 2], r"'input_ids\[1\]' is -100, outside"),
        ([1, 2], [1, size], rf"'labels\[1\]' is {size}, outside"),
        ([1, 2], [-1, 2], r"'labels\[0\]' is -1, outside"),
        ([1, 2, 3], [1, -100, 3], "no response token is left within max_length=2"),
    ):
        with pytest.raises(BadRowError, match=reason):
            tokenize_examples([_tokens(ids, labels)], tokenizer, max_length=2)


def test_templates_that_do_not_fit(bpe: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """What a template writes otherwise later on carries no loss, and a line says so."""
    several, one = _example("a", "b|c", "d", "e"), _example("a", "b|c")
    tokenizer = _wrap(bpe, FORGETFUL)
    data = tokenize_examples([several, one], tokenizer)
    assert [_responses(row, tokenizer) for row in data] == [["e"], ["b|c"]]
    assert "1 assistant turns carry no loss (the first in data.jsonl:1)" in caplog.text
    with pytest.raises(BadRowError, match="refuses this conversation: no chats today"):
        tokenize_examples([_example("a", "b")], _wrap(bpe, STRICT))


def test_wrong_arguments(bpe: Tokenizer) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"tokenizer: expected a fast one.*got Slow"):
        tokenize_examples([_example("a", "b")], Slow())  # type: ignore[arg-type]
    for length in (1, 2.5, True):
        with pytest.raises(ValueError, match="max_length: expected an integer of at least 2, got"):
            tokenize_examples([_example("a", "b")], _wrap(bpe), max_length=length)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_bad_row"):
        tokenize_examples([_example("a", "b")], _wrap(bpe), on_bad_row="")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no examples are left of 0"):
        tokenize_examples([], _wrap(bpe))
    with pytest.raises(
        ValueError,
        match=r"^chat_template: expected one, as the tokenizer has no",
    ):
        tokenize_examples([_example("a", "b")], _wrap(bpe, bos_token="<s>"))


def test_template_and_hash(bpe: Tokenizer) -> None:
    plain, chatml = _wrap(bpe), _wrap(bpe, CHATML)
    assert chat_template(plain) == PLAIN_TEMPLATE
    assert chat_template(chatml) == CHATML
    several = _wrap(bpe)
    several.chat_template = {"default": LLAMA3, "tool_use": CHATML}
    assert chat_template(several) == LLAMA3
    no_bos = _wrap(bpe, eos_token="</s>")
    hashes = {template_hash(t) for t in (plain, chatml, several, no_bos)}
    assert len(hashes) == 4
    assert template_hash(plain) == template_hash(_wrap(bpe, PLAIN_TEMPLATE))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real data beside the project")
def test_real_rows(bpe: Tokenizer) -> None:
    examples = load_examples([REAL_DATA / "gsm8k_train.jsonl"])[:1200]
    tokenizer = _wrap(bpe, CHATML)
    data = tokenize_examples(examples, tokenizer)
    assert len(data) == 1200
    for i in (0, 1199):
        messages = examples[i].messages
        assert messages is not None
        assert _responses(data[i], tokenizer) == [messages[1]["content"] + "<|im_end|>"]
