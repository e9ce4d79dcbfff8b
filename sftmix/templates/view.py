"""Show an example as the model reads it: token by token, what is learnt, what is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sftmix.conventions import IGNORE_INDEX
from sftmix.data.examples import Example
from sftmix.runs.redaction import HIDDEN, secrets_in
from sftmix.templates.tokenizing import first_tokens

# So many times max_length tokens are read, to show what is cut; a book behind it is only named.
READ_ON = 4
# A character has at most four bytes, each of which may be a token of its own.
TOKENS_OF_A_CHARACTER = 4
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Token(NamedTuple):
    """A token: its text is empty while the character that it begins is not whole."""

    id: int
    text: str
    learnt: bool
    special: bool


@dataclass(frozen=True)
class View:
    """An example's tokens, of which the model reads the first `kept`; `more` follow after them."""

    example: Example
    tokens: Sequence[Token]
    kept: int
    more: bool

    @property
    def learnt(self) -> int:
        """The number of tokens that carry loss."""
        return sum(token.learnt for token in self.tokens[: self.kept])


def view(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> View:
    """Return an example's tokens, those that `max_length` cuts off too, as far as `READ_ON`.

    Secrets in the text are replaced, as everywhere on the screen.

    Raises:
        BadRowError: as `tokenize_examples` does.
    """
    ids, labels, more = first_tokens(example, tokenizer, READ_ON * max_length)
    special = tokenizer.added_tokens_decoder
    texts = without_secrets(texts_of(ids, tokenizer))
    tokens = [
        # Nothing predicts the first token.
        Token(token, text, place > 0 and label != IGNORE_INDEX, token in special)
        for place, (token, text, label) in enumerate(zip(ids, texts, labels, strict=True))
    ]
    return View(example, tokens, min(max_length, len(tokens)), more)


def texts_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token; of several tokens that make a character the last has it.

    A tokenizer may write a token otherwise at the beginning (without its space, say), so each is
    decoded behind the ones before it.
    """

    def decoded(begin: int, end: int) -> str:
        text = tokenizer.decode(
            ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    texts: list[str] = []
    begin = shown = 0  # the tokens of the last text, and those after it
    for end in range(1, len(ids) + 1):
        before, text = decoded(begin, shown), decoded(begin, end)
        is_whole = end - shown >= TOKENS_OF_A_CHARACTER or end == len(ids)
        if text.endswith(_UNFINISHED) and not is_whole:
            texts.append("")
            continue
        texts.append(text[len(before) :])
        begin, shown = shown, end
    return texts


def without_secrets(texts: Sequence[str]) -> list[str]:
    """Return the texts without the secrets in all of them together.

    A secret has several tokens, none of which looks like one by itself.
    """
    characters = list("".join(texts))
    for begin, end in secrets_in("".join(texts)):
        characters[begin:end] = [HIDDEN, *[""] * (end - begin - 1)]
    ends = list(itertools.accumulate(map(len, texts)))
    begins = [0, *ends[:-1]]
    return ["".join(characters[begin:end]) for begin, end in zip(begins, ends, strict=True)]
