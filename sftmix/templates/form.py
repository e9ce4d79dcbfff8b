"""Find out how a template writes a turn, by trying it on a question and its answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sftmix.data.messages import Messages
from sftmix.templates.rendering import CALL_PROBE

# These words stand for a message's text when a template is tried.
ANSWER, ASKED, THOUGHT = "sftmixanswer", "sftmixasked", "sftmixthought"
PROBE: Messages = (
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": ANSWER},
)
_TOLD = {"content": THOUGHT, "name": "f", "tool_call_id": "abcdefghi"}


@dataclass(frozen=True)
class Form:
    """How a template writes a turn.

    `end` follows an answer that is last; it is None if the template cannot be tried. `kept` is the
    part of `end` that is also there if a message follows. `opening` is the token that opens the
    next turn, if nothing else ends a turn. `closing` stands between a thought and the answer; it is
    None if the template writes no thoughts. `silent` are the roles whose text it does not write.
    """

    end: str | None
    kept: str
    opening: str
    closing: str | None
    silent: frozenset[str]


def form_of(tried: Callable[[Messages], str | None], opening: Callable[[str], str]) -> Form:
    """Return the form of a template.

    Args:
        tried: renders a conversation; None if the template refuses it.
        opening: returns the token that opens the next turn, from the text that follows a turn.
    """
    text = tried(PROBE) or ""
    thinking = tried((PROBE[0], {**PROBE[1], "reasoning_content": THOUGHT})) or ""
    between = thinking.partition(THOUGHT)[2].partition(ANSWER)
    closing = between[0] if between[1] else None
    silent = {
        message["role"]
        for message, asked in zip(PROBE, (ASKED, ANSWER), strict=True)
        if text and asked not in text
    }
    for role, before in (("system", ()), ("developer", ()), ("tool", CALL_PROBE)):
        one = {**_TOLD, "role": role}
        written = tried((*before, one, *(PROBE[1:] if before else PROBE)))
        if written is not None and THOUGHT not in written:
            silent.add(role)
    if ANSWER not in text:
        return Form(None, "", "", closing, frozenset(silent))
    end = text.partition(ANSWER)[2]
    again = {"role": "user", "content": THOUGHT}
    followed = (tried((*PROBE, again)) or "").partition(ANSWER)[2].partition(THOUGHT)[0]
    opened = "" if end.strip() else opening(followed)
    return Form(end, _kept(end, followed), opened, closing, frozenset(silent))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches an added token of the tokenizer, after white space."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    longest_first = sorted(tokens - {""}, key=lambda token: (-len(token), token))
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first))})" if tokens else "(?!)")


def _kept(end: str, followed: str) -> str:
    """Return the words and white space that both texts begin with; `<...>` is a word."""
    kept = ""
    words = (re.findall(r"<[^<>\s]*>|\s|[^\s<]+|<", text) for text in (end, followed))
    for word, other in zip(*words, strict=False):
        if word != other:
            break
        kept += word
    return kept
