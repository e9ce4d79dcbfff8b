"""Conversations rendered by a chat template, and where the responses stand in the text.

Every assistant turn of a conversation is a response: its content and the end-of-turn marker that
the template writes after it, but not the white space after that marker.
"""

from __future__ import annotations

import hashlib
import json
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sftmix.data import Example, Messages
from sftmix.rows import BadRowError

PLAIN_TEMPLATE = """\
{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
    {%- if not loop.first %}{{ '\\n\\n' }}{% endif %}
    {%- if message['role'] == 'system' %}{{ message['content'] }}
    {%- elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\\n' + message['content'] + eos_token }}
    {%- else %}{{ raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"""

Span = tuple[int, int]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own chat template, or `PLAIN_TEMPLATE` where it has none.

    Raises ValueError where the plain template is needed and the tokenizer has no eos_token, or
    where it has several templates and none is the default.
    """
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    if not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has no chat_template, and the plain template needs an eos_token to end "
            "a response with: set tokenizer.eos_token or tokenizer.chat_template"
        )
    return PLAIN_TEMPLATE


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template in use and of the bos and eos tokens it may write.

    Raises ValueError as `chat_template` does.
    """
    parts = [chat_template(tokenizer), tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def bad_row(example: Example, reason: str) -> BadRowError:
    """The error of an example, with its file and line."""
    file, _, line = example.source.rpartition(":")
    return BadRowError(file, int(line), reason)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str, *, prompt: bool
) -> str:
    text = tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    return cast(str, text)


def _turn(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str, i: int, text: str
) -> Span:
    """Where message i, the assistant's, stands in the whole conversation `text`."""
    assert example.messages is not None
    before = _render(tokenizer, example.messages[:i], template, prompt=True)
    after = text
    if i + 1 < len(example.messages):
        after = _render(tokenizer, example.messages[: i + 1], template, prompt=False)
    if not (after.startswith(before) and text.startswith(after)):
        raise bad_row(
            example,
            "the chat template is not prefix-consistent: what it writes up to "
            f"message {i} changes when later messages follow, so the response cannot be found. "
            "Give the tokenizer a chat_template that writes each message by itself",
        )
    return len(before), len(after.rstrip())


def spans(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[Span]]:
    """The rendered conversation and the span of every assistant turn in it.

    Raises BadRowError where the template refuses it or is not prefix-consistent.
    """
    assert example.messages is not None
    try:
        text = _render(tokenizer, example.messages, template, prompt=False)
        turns = [i for i, m in enumerate(example.messages) if m["role"] == "assistant"]
        return text, [_turn(example, tokenizer, template, i, text) for i in turns]
    except TemplateError as error:
        raise bad_row(example, f"the chat template refuses this conversation: {error}") from None


def prompt_tokens(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens before the next response: those that `tokenize_examples` has there.

    Raises ValueError where the template refuses the conversation, and as `chat_template` does.
    """
    text = _refusing(tokenizer, messages, prompt=True)
    return cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after a response and training teaches; empty where it is nothing.

    Raises ValueError as `prompt_tokens` does.
    """
    probe = "end-of-turn-probe"
    messages = {"role": "user", "content": "a"}, {"role": "assistant", "content": probe}
    return _refusing(tokenizer, messages, prompt=False).rpartition(probe)[2].rstrip()


def _refusing(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool) -> str:
    try:
        return _render(tokenizer, messages, chat_template(tokenizer), prompt=prompt)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
