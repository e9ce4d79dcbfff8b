"""Render chat templates as transformers does, within bounds and on one date.

A template is code that came with a model. transformers' sandbox keeps it from the machine; this
module also counts its steps, its time and its strings, so an endless loop ends with an error, and
lets `strftime_now` tell one date, so a run reads the same tokens on every day.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.visitor import NodeTransformer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from sftmix.runs.failures import printable

Span = tuple[int, int]

# A loop's turn or a macro's call is a step. Templates that look ahead take the square of the number
# of messages in steps: 1,000 messages fit. A million empty steps take about a second.
MAX_STEPS = 1_000_000
MAX_SECONDS = 60.0
# Characters of one string, beside 100 times those of the conversation.
MAX_CHARACTERS = 2**24

# Names that data sets have for a message's reasoning, in transformers' order.
REASONING = ("reasoning_content", "thinking", "reasoning")

# Some templates ask whether a message has a content; DeepSeek's write its calls if it has none.
_ASKS_FOR_NULL = re.compile(r"content['\"]?\s*\]?\s+is\s+(not\s+)?none\b")

# A conversation with a call, to try templates on.
CALL_PROBE: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abcdefghi",  # Mistral's have nine letters
                "type": "function",
                "function": {"name": "f", "arguments": {"a": "b"}},
            }
        ],
    },
)

# A template's code can raise these; `_compiled` and `render` turn them into a RenderError.
_RAISED = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


class RenderError(ValueError):
    """A template could not be compiled or rendered: why, and on which of its lines."""


class _BoundError(TemplateRuntimeError):
    """A template went on for too long, or made too long a string."""


@dataclass
class _Budget:
    characters: int
    steps: int = field(default_factory=lambda: MAX_STEPS)
    ends: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)


_budget: ContextVar[_Budget] = ContextVar("budget")


@jinja2.pass_context
def _step(context: object, value: object = None) -> bool:
    """Count a step of the template that is being rendered.

    Raises:
        TemplateRuntimeError: it was one too many.
    """
    budget = _budget.get()
    budget.steps -= 1
    if budget.steps < 0:
        raise _BoundError(f"it takes more than {MAX_STEPS:,} steps; does it end?")
    if time.monotonic() > budget.ends:
        raise _BoundError(f"it takes more than {MAX_SECONDS:.0f} s; does it end?")
    return True


@jinja2.pass_context
def _sized(context: object, value: Any) -> Any:
    """Return the value after checking that it is not too long a string or list.

    Raises:
        TemplateRuntimeError: it is.
    """
    return _within(value, len(value) if isinstance(value, str | list | tuple) else 0)


@jinja2.pass_context
def _times(context: object, first: Any, second: Any) -> Any:
    """Return the product after checking that it will not be too long a string or list.

    Raises:
        TemplateRuntimeError: it would be.
    """
    for text, number in ((first, second), (second, first)):
        if isinstance(text, str | list | tuple) and isinstance(number, int):
            _within(None, len(text) * number)
    return first * second


@jinja2.pass_context
def _power(context: object, first: Any, second: Any) -> Any:
    """Return the power after checking that it has no more digits than a string may have.

    Raises:
        TemplateRuntimeError: it has.
    """
    if isinstance(first, int) and isinstance(second, int):
        _within(None, first.bit_length() * second)
    return first**second


def _within(value: Any, length: int) -> Any:
    if length > _budget.get().characters:
        raise _BoundError(f"it makes a string or list of {length:,} characters")
    return value


# Filters skip the sandbox's checks and take a tenth of a call's time, and a template cannot give
# their names another meaning.
_FILTERS = {f"sftmix.{f.__name__}": f for f in (_step, _sized, _times, _power)}


class _Counted(NodeTransformer):
    """Make every loop and macro count its steps, and every sum and product its length."""

    def _filter(self, name: str, value: nodes.Expr, *others: nodes.Expr) -> nodes.Filter:
        line = value.lineno
        return nodes.Filter(value, f"sftmix.{name}", list(others), [], None, None, lineno=line)

    def _counting(self, line: int) -> nodes.Filter:
        return self._filter("_step", nodes.Const(None, lineno=line))

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._counting(node.lineno), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = _counted

    def visit_For(self, node: nodes.For) -> nodes.For:
        counted: nodes.For = self._counted(node)
        if counted.test is not None:
            line = node.lineno
            counted.test = nodes.And(self._counting(line), counted.test, lineno=line)
        return counted

    def _measured(self, node: Any) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter("_sized", node)

    visit_Add = visit_Concat = _measured

    def visit_Mul(self, node: nodes.Mul) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter("_times", node.left, node.right)

    def visit_Pow(self, node: nodes.Pow) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter("_power", node.left, node.right)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    # The sandbox, filters and generation marks are those of transformers' empty template.
    environment: jinja2.Environment = _compile_jinja_template("").environment
    environment.filters.update(_FILTERS)
    # These two draw from an unseeded generator: a run would read other text each time.
    environment.filters.pop("random", None)
    environment.globals.pop("lipsum", None)
    try:
        tree = _Counted().visit(environment.parse(template))
        tree.set_environment(environment)
        code = environment.compile(tree)
    except _RAISED as error:
        raise RenderError(_reason(error)) from None
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def check_template(template: str) -> None:
    """Compile a template.

    Raises:
        RenderError: it is none.
    """
    _compiled(template)


def is_marked(template: str) -> bool:
    """Tell whether the template marks with `{% generation %}` what the assistant writes."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def reads_the_date(template: str) -> bool:
    """Tell whether the template asks for today's date."""
    return "strftime_now" in template


def today() -> str:
    """Return today's date in the form that manifests have."""
    return datetime.date.today().isoformat()


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    date: str,
    *,
    prompt: bool,
    tools: list[Any] | None = None,
) -> tuple[str, list[Span]]:
    """Return a conversation's text and the spans that the template marks as the assistant's.

    Args:
        date: what `strftime_now` tells, as in "2026-11-29"; the time is midnight.
        prompt: whether the beginning of the next response is asked for.
        tools: what the template gets as `tools`.

    Raises:
        RenderError: the template refuses the conversation, or fails, or does not end.
    """
    calls = any(message.get("tool_calls") for message in messages)
    if calls and _reads_text_arguments(template):
        messages = [_with_text_arguments(message) for message in messages]
    tokens = tokenizer.special_tokens_map
    return _rendered(template, messages, tokens, date, prompt=prompt, tools=tools)


def _rendered(
    template: str,
    messages: Sequence[dict[str, Any]],
    tokens: dict[str, Any],
    date: str,
    *,
    prompt: bool = False,
    tools: list[Any] | None = None,
) -> tuple[str, list[Span]]:
    compiled = _compiled(template)
    with_null = _ASKS_FOR_NULL.search(template) is not None
    day = datetime.datetime.fromisoformat(date)
    length = sum(len(str(message)) for message in messages) + len(str(tools))
    token = _budget.set(_Budget(MAX_CHARACTERS + 100 * length))
    blocks: list[str] = []
    marks: list[Span] = []
    characters = 0
    try:
        with compiled.environment.activate_tracker(blocks, marks):  # type: ignore[attr-defined]
            for block in compiled.generate(
                **tokens,
                messages=[_as_transformers_does(message, with_null) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                strftime_now=day.strftime,
            ):
                blocks.append(block)
                characters += len(block)
                _within(None, characters)
        return "".join(blocks), marks
    except _RAISED as error:
        raise RenderError(_reason(error)) from None
    finally:
        _budget.reset(token)


def reasoning_of(message: dict[str, Any]) -> str | None:
    """Return a message's reasoning, under whichever name it goes; None if it has none."""
    found = (message.get(name) for name in REASONING)
    return next((value for value in found if value is not None), None)


def _as_transformers_does(message: dict[str, Any], with_null: bool) -> dict[str, Any]:
    """Return the message without nulls, its reasoning under both names that templates read.

    Calls without words get an empty content, since null would be written as "None"; `with_null`
    keeps null, for a template that asks for it.
    """
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("tool_calls") and not message.get("content"):
        message["content"] = None if with_null else ""
    reasoning = reasoning_of(message)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=16)
def _reads_text_arguments(template: str) -> bool:
    """Tell whether a template takes a call's arguments only as JSON text, as DeepSeek's do."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for change in (dict, _with_text_arguments):
        try:
            _rendered(template, [change(message) for message in CALL_PROBE], tokens, today())
        except RenderError:
            continue
        return change is not dict
    return False


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    def as_text(function: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        return {**function, "arguments": arguments}

    calls = [
        {**call, "function": as_text(call["function"])} if "function" in call else as_text(call)
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


def _reason(error: BaseException) -> str:
    """Return what went wrong and on which line, in characters that a terminal shows as they are."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    text = error.message if isinstance(error, TemplateError) else str(error)
    if not isinstance(error, TemplateError) or isinstance(error, SecurityError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = shown(text or type(error).__name__)
    return text if line is None else f"{text} (line {line} of the template)"


def shown(text: str, longest: int = 500) -> str:
    """Return the text as a terminal may show it, cut if it is long."""
    return printable(text) if len(text) <= longest else f"{printable(text[:longest])}..."
