"""Let tokens end where a prompt ends, so training reads what generation begins with."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftmix.templates.rendering import Span


def parted_at_responses(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    turns: Sequence[Span],
    input_ids: list[int],
    offsets: Sequence[Span],
) -> tuple[list[int], Sequence[Span]]:
    """Return the tokens and their offsets, none of which crosses the beginning of a response.

    If the prompt ends in a space, or the response begins with white space, the tokenizer joins the
    two (" hello" is one token); and GPT-2's tokenizer splits two line breaks before a word, which
    are one token at a text's end. Whoever asks the model has only the prompt's tokens, so such a
    text is tokenised in two parts; all others keep the tokens they have.
    """
    cuts = [
        begin
        for begin, _ in turns
        if _is_joined(offsets, begin) or _is_respaced(tokenizer, text, begin, input_ids, offsets)
    ]
    if not cuts:
        return input_ids, offsets
    ids: list[int] = []
    places: list[Span] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part, found = _tokens(tokenizer, text[begin:end], first=begin == 0)
        ids += part
        places += [(begin + a, begin + b) for a, b in found]
    return ids, places


def _following(offsets: Sequence[Span], begin: int) -> int:
    """Return the first token that has a character at `begin` or behind it."""
    following = bisect_right(offsets, (begin, begin))
    while following and offsets[following - 1][1] > begin:
        following -= 1
    return following


def _is_joined(offsets: Sequence[Span], begin: int) -> bool:
    """Tell whether a token reaches from before `begin` to behind it.

    Byte-level tokenizers may leave the space of " hello" out of its offsets; then no token ends at
    `begin`.
    """
    following = _following(offsets, begin)
    if not 0 < following < len(offsets):
        return False
    return offsets[following][0] < begin or offsets[following - 1][1] < begin


def _is_respaced(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    begin: int,
    input_ids: Sequence[int],
    offsets: Sequence[Span],
) -> bool:
    """Tell whether the white space before `begin` has other tokens than at the end of a text."""
    space = begin - len(text[:begin].rstrip())
    if space < 2:
        return False
    encoded: Any = tokenizer(text[begin - space : begin], add_special_tokens=False, verbose=False)
    following, tokens = _following(offsets, begin), encoded["input_ids"]
    return list(input_ids[max(following - len(tokens), 0) : following]) != list(tokens)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool
) -> tuple[list[int], list[Span]]:
    """Return a part's tokens, without the space that a tokenizer may put before the first word.

    As in transformers' `encode_marked_chat`, the part is read behind a line break, which is taken
    away again.
    """

    def encoded(text: str) -> tuple[list[int], list[Span]]:
        found: Any = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return found["input_ids"], found["offset_mapping"]

    if first:
        return encoded(text)
    line = encoded("\n")[0]
    ids, offsets = encoded("\n" + text)
    if ids[: len(line)] != line or len(ids) == len(line) or offsets[len(line)][0] < 1:
        return encoded(text)
    return ids[len(line) :], [(max(a - 1, 0), b - 1) for a, b in offsets[len(line) :]]
