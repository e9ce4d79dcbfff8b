"""Render conversations with a chat template and find the responses in the text.

An assistant turn is learnt from the end of its prompt to the end of turn that the template writes
after it. The first of these rules that applies finds it (docs/templates.md):

1. The template marks what the assistant writes with `{% generation %}`: the marked text is learnt.
2. The conversation's text begins with the prompt of the turn (the messages before it and the
   generation prompt) and goes on with the turn as the template writes a last message. Earlier turns
   that a template writes differently once others follow (it drops their thoughts, say) carry no
   loss, and a line says how many: no prompt is ever answered like that.
3. The prompt opens a thought that the conversation's text lacks: the last turn is put after the
   prompt itself, its thought closed in the template's own form.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from sftmix.data.examples import Example, Messages
from sftmix.data.rows import BadRowError
from sftmix.templates.form import ANSWER, PROBE, Form, added_tokens, form_of
from sftmix.templates.rendering import (
    RenderError,
    Span,
    is_marked,
    reads_the_date,
    reasoning_of,
    render,
    shown,
    today,
)

logger = logging.getLogger(__name__)

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

# Tags around a thought: <think>, [THINK], <|thinking|>, <reasoning>.
_TAG = r"(?P<left>[<\[]\|?){}(?P<name>[\w:]*(?:think|thought|reason)\w*)(?P<right>\|?[>\]])"
OPENED_THOUGHT = re.compile(rf"{_TAG.format('')}\s*$", re.IGNORECASE)
_WITH_THOUGHT = re.compile(rf"\s*{_TAG.format('')}", re.IGNORECASE)
_THOUGHT_END = re.compile(_TAG.format("/"), re.IGNORECASE)

NOTES = {
    "turns": "%d assistant turns carry no loss (the first in %s): the chat template writes them "
    "differently once later messages follow, so no prompt is answered like that. Train them as "
    "examples of their own, or give --chat_template FILE with one that marks what the assistant "
    "writes ({%% generation %%})",
    "marks": "the marked responses of %d examples (the first in %s) do not follow the prompt that "
    "the chat template asks with, so the model will be asked for what it has not learnt: give "
    "--chat_template FILE with one whose generation prompt begins what it marks",
    "reasoning": "the reasoning of %d messages is not used (the first in %s): the chat template "
    "writes none",
    "tools": "the tools of %d examples are not used (the first in %s): the chat template writes "
    "none",
}


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template, or `PLAIN_TEMPLATE` if it has none.

    Raises:
        ValueError: the plain template is needed and the tokenizer has no eos_token, or it has
            several templates and none is the default.
    """
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    if not tokenizer.eos_token:
        raise ValueError(
            "chat_template: expected one, as the tokenizer has none, nor the eos_token that ends "
            "a response of the plain one; give --chat_template FILE or set tokenizer.chat_template"
        )
    return PLAIN_TEMPLATE


def adopt_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template the plain one, to be saved with it.

    Raises:
        ValueError: as `chat_template` does.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template(tokenizer)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the chat templates in use and of the bos and eos tokens.

    Raises:
        ValueError: as `chat_template` does.
    """
    template = chat_template(tokenizer)
    parts = [template, tokenizer.bos_token, tokenizer.eos_token]
    with_tools = _tool_template(tokenizer)
    if with_tools not in (None, template):
        parts.append(with_tools)
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def _tool_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that transformers takes for conversations with tools, if there is one."""
    templates = tokenizer.chat_template
    return templates.get("tool_use") if isinstance(templates, dict) else None


def template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the date that the template tells (today's unless it was set); None if it tells none.

    Raises:
        ValueError: as `chat_template` does.
    """
    templates = chat_template(tokenizer), _tool_template(tokenizer) or ""
    return _date(tokenizer) if any(map(reads_the_date, templates)) else None


def set_template_date(tokenizer: PreTrainedTokenizerBase, date: str | None) -> None:
    """Make the template tell this date ("2026-11-29"); None changes nothing.

    Raises:
        ValueError: it is no date.
    """
    if date is not None:
        datetime.date.fromisoformat(date)
        vars(tokenizer)["template_date"] = date


def _date(tokenizer: PreTrainedTokenizerBase) -> str:
    # A process that runs past midnight goes on with the day that it began on.
    return cast(str, vars(tokenizer).setdefault("template_date", today()))


def bad_row(example: Example, reason: str) -> BadRowError:
    """Return the error of an example, with its file and line."""
    file, _, line = example.source.rpartition(":")
    return BadRowError(file, int(line), reason)


class Turns:
    """Finds the assistant turns in conversations, by the rules of this module's docstring.

    Raises:
        ValueError: as `chat_template` does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.template = tokenizer, chat_template(tokenizer)
        self.tool_template = _tool_template(tokenizer) or self.template
        self.date = _date(tokenizer)
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def spans(self, example: Example) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the span of every learnt assistant turn in it.

        Raises:
            BadRowError: the template refuses the conversation or leaves out a text of it, a turn is
                not found, or none is learnt.
        """
        assert example.messages is not None
        learnt = [
            i
            for i, message in enumerate(example.messages)
            if message["role"] == "assistant" and (example.learnt is None or example.learnt[i])
        ]
        if not learnt:
            raise bad_row(example, "no message is learnt: every assistant message is masked")
        try:
            text, marks = self._rendered(example.messages, example.tools, prompt=False)
            self._refuse_losses(example, learnt, text)
            if is_marked(self._template(example.tools)):
                return text, self._marked(example, learnt, text, marks)
            return self._found(example, learnt, text)
        except RenderError as error:
            reason = f"the chat template refuses this conversation: {error}"
            raise bad_row(example, reason) from None

    def report(self) -> None:
        """Log one line for each kind of thing that was read and is not learnt."""
        for kind, count in self.counts.items():
            logger.warning(NOTES[kind], count, self.first[kind])
        self.counts.clear()

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        """Return the text of a conversation; `prompt` adds the beginning of the next response.

        Raises:
            RenderError: the template refuses it or fails.
        """
        return self._rendered(messages, tools, prompt=prompt)[0]

    def _rendered(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool
    ) -> tuple[str, list[Span]]:
        template = self._template(tools)
        return render(template, messages, self.tokenizer, self.date, prompt=prompt, tools=tools)

    def _template(self, tools: list[Any] | None) -> str:
        return self.template if tools is None else self.tool_template

    def _note(self, kind: str, example: Example, number: int = 1) -> None:
        if number:
            self.counts[kind] += number
            self.first.setdefault(kind, shown(example.source))

    # Rule 1

    def _marked(
        self, example: Example, learnt: list[int], text: str, marks: list[Span]
    ) -> list[Span]:
        assert example.messages is not None
        roles = [message["role"] for message in example.messages]
        turns = [i for i, role in enumerate(roles) if role == "assistant"]
        if learnt != turns:
            before = [
                len(self._rendered(example.messages[:i], example.tools, prompt=True)[1])
                for i in turns
            ]
            ends = [*before[1:], len(marks)]
            owned = dict(zip(turns, zip(before, ends, strict=True), strict=True))
            marks = [mark for i in learnt for mark in marks[slice(*owned[i])]]
        marks = [(begin, end) for begin, end in marks if text[begin:end].strip()]
        if not marks:
            raise bad_row(example, "the chat template's {% generation %} marks hold no response")
        asked = self._tried(example.messages[: learnt[-1]], example.tools, prompt=True)
        if asked is not None and not text.startswith(asked):
            self._note("marks", example)
        return marks

    # Rules 2 and 3

    def _found(self, example: Example, learnt: list[int], text: str) -> tuple[str, list[Span]]:
        messages, tools = example.messages, example.tools
        assert messages is not None
        turns = [self._turn(messages, tools, i, text) for i in learnt]
        if turns[-1] is None and learnt[-1] + 1 < len(messages):
            # Nothing is learnt after the last learnt turn, so it is read as the last message.
            messages = messages[: learnt[-1] + 1]
            text = self.render(messages, tools)
            turns = [self._turn(messages, tools, i, text) for i in learnt]
        if turns[-1] is None:
            text = self._with_thought(example, messages, text)
            turns = [self._turn(messages, tools, i, text) for i in learnt]
        found = [turn for turn in turns if turn is not None]
        self._note("turns", example, len(turns) - len(found))
        is_last = learnt[-1] + 1 == len(messages)
        if is_last and self._form.opening and not messages[-1].get("tool_calls"):
            text += self._form.opening
            found[-1] = found[-1][0], len(text)
        if any(begin >= end for begin, end in found):
            raise bad_row(example, "the chat template writes nothing of a response")
        return text, found

    def _turn(self, messages: Messages, tools: list[Any] | None, i: int, text: str) -> Span | None:
        """Return where message i stands in `text`; None if it is not there as it was asked for."""
        before = self.render(messages[:i], tools, prompt=True)
        if not text.startswith(before):
            return None
        if i + 1 == len(messages):
            return len(before), len(text.rstrip())
        own = self.render(messages[: i + 1], tools)
        form = self._form
        if not text.startswith(own):
            # What ends the conversation does not stand in its midst.
            if not (form.end and form.kept.strip() and own.endswith(form.end)):
                return None
            own = own[: -len(form.end)] + form.kept
            if not text.startswith(own):
                return None
        end = len(own.rstrip())
        if form.end is not None and not form.end.strip():
            opened = self._opening(text[len(own) :])
            end = len(own) + len(opened) if opened else end
        return len(before), end

    def _opening(self, following: str) -> str:
        """Return the token that opens the next turn, if it is a token of its own."""
        found = self._added.match(following)
        return found.group() if found else ""

    @functools.cached_property
    def _added(self) -> re.Pattern[str]:
        return added_tokens(self.tokenizer)

    def _with_thought(self, example: Example, messages: Messages, text: str) -> str:
        """Return the last message's prompt and, after it, the message with its thought closed.

        Raises:
            BadRowError: the prompt opens no thought, or more than that.
        """
        before = self.render(messages[:-1], example.tools, prompt=True)
        opened = OPENED_THOUGHT.search(before)
        if opened is None or not text.startswith(before[: opened.start()]):
            raise bad_row(example, _unlike(before, text, len(messages) - 1))
        tag = opened.group().strip()
        close = f"{opened['left']}/{opened['name']}{opened['right']}"
        thought = re.compile(rf"{re.escape(tag)}(.*?){re.escape(close)}", re.DOTALL)
        answer = text[opened.start() :]
        reasoning = reasoning_of(messages[-1]) or ""
        for place in (answer, str(messages[-1].get("content") or "")):
            if not reasoning.strip() and (found := thought.search(place)):
                reasoning = found[1]
        written = thought.match(answer)
        answer = answer[written.end() :] if written else answer
        closing = self._form.closing or f"\n{close}\n\n"
        return before + reasoning.strip("\n") + closing + answer.lstrip("\n")

    # What a template does with what it is given

    def _refuse_losses(self, example: Example, learnt: list[int], text: str) -> None:
        """Refuse a conversation of which the template leaves out what is learnt or asked.

        Other things that it leaves out are noted.
        """
        messages, tools = example.messages, example.tools
        assert messages is not None
        for i, message in enumerate(messages):
            if self._leaves_out(messages, tools, i, text):
                what = f"message {i} ({message['role']}), which may have to be in parts"
                if message.get("tool_calls"):
                    what = f"message {i}'s content beside its tool_calls; leave the content empty"
                raise bad_row(
                    example,
                    f"the chat template writes nothing of {what}: give --chat_template FILE with "
                    "one that does",
                )
        for i in learnt:
            if messages[i].get("tool_calls"):
                bare = {k: v for k, v in messages[i].items() if k != "tool_calls"}
                bare["content"] = bare.get("content") or ""  # an answer without one is an error
                if self._same((*messages[:i], bare, *messages[i + 1 :]), tools, text):
                    raise bad_row(
                        example,
                        f"the chat template writes nothing of message {i}'s tool_calls: give "
                        "--chat_template FILE with one that does",
                    )
        if tools and self._same(messages, None, text):
            self._note("tools", example)
        by_rule_3 = self.opens_thought and not is_marked(self._template(tools))
        if self._form.closing is None and not by_rule_3:
            unused = sum(bool(reasoning_of(message)) for message in messages)
            self._note("reasoning", example, unused)

    def _leaves_out(self, messages: Messages, tools: list[Any] | None, i: int, text: str) -> bool:
        content = messages[i].get("content")
        if not isinstance(content, str) or not content.strip():
            return False
        if messages[i]["role"] not in self._form.silent and content.strip() in text:
            return False
        other = {**messages[i], "content": ANSWER}
        return self._same((*messages[:i], other, *messages[i + 1 :]), tools, text)

    def _same(self, messages: Messages, tools: list[Any] | None, text: str) -> bool:
        """Tell whether the template writes the same text; what it cannot render is not the same."""
        return self._tried(messages, tools) == text

    def _tried(
        self, messages: Messages, tools: list[Any] | None = None, *, prompt: bool = False
    ) -> str | None:
        try:
            return self.render(messages, tools, prompt=prompt)
        except RenderError:
            return None

    @functools.cached_property
    def opens_thought(self) -> bool:
        """Whether the prompt begins a thought, which the response then ends."""
        try:
            prompt = self.render(PROBE[:1], None, prompt=True)
        except RenderError:
            return False
        return OPENED_THOUGHT.search(prompt) is not None

    @functools.cached_property
    def _form(self) -> Form:
        return form_of(self._tried, self._opening)


def _unlike(before: str, text: str, i: int) -> str:
    same = next(
        (n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b),
        min(len(before), len(text)),
    )
    asked, written = (one[same : same + 40] for one in (before, text))
    return (
        f"the chat template is not prefix-consistent: it asks for message {i} with {asked!r} where "
        f"it writes {written!r} once the message is there, so the response cannot be found. Give "
        "--chat_template FILE with one that marks what the assistant writes ({% generation %})"
    )


def prompt_tokens(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before the next response, as `tokenize_examples` makes them.

    Raises:
        ValueError: the template refuses the conversation; or as `chat_template` does.
    """
    try:
        text = Turns(tokenizer).render(messages, None, prompt=True)
    except RenderError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
    return cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def without_thought(text: str, *, opened: bool) -> str:
    """Return a model's answer without the thought that its text or prompt (`opened`) begins.

    A text without a thought, or with one that does not end, is returned unchanged.
    """
    if not opened and _WITH_THOUGHT.match(text) is None:
        return text
    end = _THOUGHT_END.search(text)
    return text if end is None else text[end.end() :]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that training teaches to write after a response; it may be empty.

    Raises ValueError where the template refuses a question and its answer, and as `chat_template`
    does.
    """
    try:
        text, turns = Turns(tokenizer).spans(Example(0, "probe:1", "", messages=PROBE))
    except BadRowError as error:
        raise ValueError(error.reason) from None
    return text[: turns[-1][1]].rpartition(ANSWER)[2].rstrip()
