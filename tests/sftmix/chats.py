"""Chat templates in the form of well known models', a small tokenizer for them, and conversations.

The templates are written for these tests: what they write has the models' form, they do not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sftmix.data.examples import Example

_TURN = "im_start im_end start_header_id end_header_id eot_id end endoftext user assistant system"
_CHANNELS = "observation start message channel return call start_of_role end_of_role end_of_text"
SPECIAL = [
    *("<s>", "</s>"),
    *(f"<|{name}|>" for name in f"{_TURN} {_CHANNELS}".split()),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[gMASK]", "<sop>"),
    *("<U>", "<A>", "<E>", "<|TURN|>", "<|END|>", "<think>", "</think>"),
]


def byte_level_bpe(text: str, special: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer as GPT-2's, trained on a line."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    return tokenizer


@functools.cache
def _bpe() -> Tokenizer:
    text = "hello there, one two three\n\nASSISTANT: hello\n\nthe answer is four\n\n"
    return byte_level_bpe(text, SPECIAL, 420)


def tokenizer_of(template: str | None, **tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the special tokens of all these templates."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(), **{"bos_token": "<s>", "eos_token": "</s>", **tokens}
    )
    made.chat_template = template
    return made


def user(content: str) -> dict[str, Any]:
    """A question."""
    return {"role": "user", "content": content}


def said(content: str | None, **more: Any) -> dict[str, Any]:
    """An answer."""
    return {"role": "assistant", "content": content, **more}


def example(*messages: dict[str, Any], line: int = 1, **more: Any) -> Example:
    """The row of a conversation."""
    return Example(line - 1, f"rows.jsonl:{line}", f"{line:04}", messages=messages, **more)


ONE = example(user("one"), said("the answer"))
TWO = example(user("one"), said("first there"), user("two"), said("then here"))


def responses(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of labels."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [str(tokenizer.decode(run)) for run in runs if run]


def _each(user_turn: str, answer: str, asked: str, *, begin: str = "", end: str = "") -> str:
    """A template that writes each message by itself."""
    return (
        f"{begin}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}"
        f"{{% else %}}{user_turn}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{asked}{{% else %}}{end}{{% endif %}}"
    )


CHATML = _each(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}",
    "<|im_start|>assistant\n{{ m.content }}<|im_end|>{{ '\n' }}",
    "<|im_start|>assistant{{ '\n' }}",
)
LLAMA3 = _each(
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}",
    begin="{{ bos_token }}",
)
# Says which day it is, unless it is told another.
DATED = LLAMA3.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{% if date_string is not defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date_string }}<|eot_id|>",
)
# The thought of the last question's answers alone, even where there is none.
QWEN3 = (
    "{% set asked = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set asked.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% set inside = parts[0].split('<think>')[-1] if parts[1:] else '' %}"
    "{% set thought = m.reasoning_content or inside %}"
    "{% if loop.index0 > asked.last %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>{{ '\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
QWEN36 = QWEN3.replace("assistant{{ '\n' }}{% endif %}", "assistant\n<think>{{ '\n' }}{% endif %}")
# Thoughts are dropped; the prompt opens one.
R1 = _each(
    "<U>{{ m.content }}",
    "<A>{{ m.content.split('</think>')[-1] }}<E>",
    "<A><think>{{ '\n' }}",
    begin="{{ bos_token }}",
)
# Writes an empty thought as one tag after the other, where the prompt opens one with a line break.
NEMOTRON = _each(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}",
    "<|im_start|>assistant\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>{{ '\n' }}{% else %}<think></think>{% endif %}{{ m.content }}<|im_end|>{{ '\n' }}",
    "<|im_start|>assistant\n<think>{{ '\n' }}",
)
GPT_OSS = (
    "<|start|>system<|message|>Date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "<|start|>user<|message|>{{ m.content }}<|end|>{% elif loop.last %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
PHI3 = _each(
    "<|user|>\n{{ m.content }}<|end|>{{ '\n' }}",
    "<|assistant|>\n{{ m.content }}<|end|>{{ '\n' }}",
    "<|assistant|>{{ '\n' }}",
    end="{{ eos_token }}",
)
GLM4 = _each(
    "<|user|>\n{{ m.content }}",
    "<|assistant|>\n{{ m.content }}",
    "<|assistant|>{{ '\n' }}",
    begin="[gMASK]<sop>",
)
GLM_MOE = _each(
    "<|user|>\n{{ m.content }}",
    "<|assistant|>\n<think>{{ m.reasoning_content or '' }}</think>\n{{ m.content }}",
    "<|assistant|>",
    begin="[gMASK]<sop>",
)
GEMMA = _each(
    "<start_of_turn>user\n{{ m.content | trim }}<end_of_turn>{{ '\n' }}",
    "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>{{ '\n' }}",
    "<start_of_turn>model{{ '\n' }}",
    begin="{{ bos_token }}",
)
MISTRAL = _each(
    "[INST] {{ m.content }}[/INST]", " {{ m.content }}{{ eos_token }}", "", begin="{{ bos_token }}"
)
ZEPHYR = _each(
    "<|user|>\n{{ m.content }}{{ eos_token + '\n' }}",
    "<|assistant|>\n{{ m.content }}{{ eos_token + '\n' }}",
    "<|assistant|>{{ '\n' }}",
)
VICUNA = _each("USER: {{ m.content }} ", "ASSISTANT: {{ m.content }}{{ eos_token }}", "ASSISTANT: ")
GRANITE = _each(
    "<|start_of_role|>user<|end_of_role|>{{ m.content }}<|end_of_text|>{{ '\n' }}",
    "<|start_of_role|>assistant<|end_of_role|>{{ m.content }}<|end_of_text|>{{ '\n' }}",
    "<|start_of_role|>assistant<|end_of_role|>",
)
COMMAND_R = _each(
    "<|TURN|>user<|message|>{{ m.content }}<|END|>",
    "<|TURN|>chatbot<|message|>{{ m.content | trim }}<|END|>",
    "<|TURN|>chatbot<|message|>",
    begin="{{ bos_token }}",
)
# No token and no word ends a turn.
ENDLESS = _each("user: {{ m.content }}{{ '\n' }}", "bot: {{ m.content }}{{ '\n' }}", "bot: ")
# Words end a turn.
WORDS = _each("Q: {{ m.content }}{{ '\n' }}", "A: {{ m.content }}\n### End{{ '\n' }}", "A: ")
MARKED = _each(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}",
    "<|im_start|>assistant{{ '\n' }}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{{ '\n' }}",
    "<|im_start|>assistant{{ '\n' }}",
)


@dataclass(frozen=True)
class Family:
    """A template, and what is learnt of `ONE` and of `TWO` under it."""

    template: str
    end: str
    one: str
    two: tuple[str, ...]


def _plain(template: str, end: str, before: str = "") -> Family:
    one, *two = (f"{before}{text}{end}" for text in ("the answer", "first there", "then here"))
    return Family(template, end, one, tuple(two))


def _last(template: str, end: str, before: str) -> Family:
    one, two = (f"{before}{text}{end}" for text in ("the answer", "then here"))
    return Family(template, end, one, (two,))


FAMILIES = {
    "ChatML (Qwen2.5, SmolLM2, Phi-4)": _plain(CHATML, "<|im_end|>"),
    "Llama 3, 3.1": _plain(LLAMA3, "<|eot_id|>"),
    "Llama 3.2 (dated)": _plain(DATED, "<|eot_id|>"),
    "Qwen3, SmolLM3": _last(QWEN3, "<|im_end|>", "<think>\n\n</think>\n\n"),
    "Qwen3.5, Qwen3.6": _last(QWEN36, "<|im_end|>", "\n</think>\n\n"),
    "DeepSeek-R1 distilled, DeepSeek-V3": _last(R1, "<E>", "\n</think>\n\n"),
    "Nemotron-3": Family(
        NEMOTRON,
        "<|im_end|>",
        "\n</think>\nthe answer<|im_end|>",
        ("\n</think>\nthen here<|im_end|>",),
    ),
    "gpt-oss (dated)": _last(GPT_OSS, "<|return|>", "<|channel|>final<|message|>"),
    "Phi-3, Phi-3.5": Family(
        PHI3,
        "<|end|>\n</s>",
        "the answer<|end|>\n</s>",
        ("first there<|end|>", "then here<|end|>\n</s>"),
    ),
    "GLM-4": _plain(GLM4, "<|user|>"),
    "GLM-4-MoE": _plain(GLM_MOE, "<|user|>", "\n<think></think>\n"),
    "Gemma 2, 3": _plain(GEMMA, "<end_of_turn>"),
    "Mistral": _plain(MISTRAL, "</s>", " "),
    "Zephyr": _plain(ZEPHYR, "</s>"),
    "Vicuna": _plain(VICUNA, "</s>"),
    "Granite": _plain(GRANITE, "<|end_of_text|>"),
    "Command-R": _plain(COMMAND_R, "<|END|>"),
    "marked with `{% generation %}`": _plain(MARKED, "<|im_end|>"),
}
