"""An example is shown in the tokens that training reads, and its secrets are not."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from sftmix.templates.tokenizing import tokenize_examples
from sftmix.templates.view import READ_ON, texts_of, view, without_secrets
from tests.sftmix.chats import CHATML, TWO, example, said, tokenizer_of, user


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    return tokenizer_of(CHATML)


@pytest.mark.parametrize("max_length", [4096, 60, 36])
@pytest.mark.parametrize(
    "one", [TWO, example(user("one 船の料理人"), said(" two\n\n👩‍👩‍👧 three " * 9))]
)
def test_what_is_kept_is_what_training_reads(
    chatml: PreTrainedTokenizerFast, max_length: int, one: object
) -> None:
    [row] = tokenize_examples([one], chatml, max_length=max_length)
    shown = view(one, chatml, max_length)
    kept = shown.tokens[: shown.kept]
    assert [token.id for token in kept] == row["input_ids"]
    assert [token.learnt for token in kept] == [label != -100 for label in row["labels"]]
    assert shown.learnt == sum(label != -100 for label in row["labels"])
    [whole] = tokenize_examples([one], chatml)
    cut = whole["input_ids"][: READ_ON * max_length]
    assert [token.id for token in shown.tokens] == cut
    assert shown.more == (len(whole["input_ids"]) > len(cut))


def test_texts_are_those_of_the_tokens_and_special_ones_are_marked(
    chatml: PreTrainedTokenizerFast,
) -> None:
    answer = "it's 船\t👩‍👩‍👧 \ufffd done"
    shown = view(example(user("one"), said(answer)), chatml, 4096)
    text = "".join(token.text for token in shown.tokens)
    assert text == f"<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    special = [token.text for token in shown.tokens if token.special]
    assert special == ["<|im_start|>", "<|im_end|>"] * 2
    learnt = "".join(token.text for token in shown.tokens if token.learnt)
    assert learnt == f"{answer}<|im_end|>"
    # A character of several tokens is the text of its last one.
    woman = [token.text for token in shown.tokens].index("👩")
    assert [token.text for token in shown.tokens[woman - 3 : woman]] == [""] * 3


def test_a_character_that_is_cut_in_two(chatml: PreTrainedTokenizerFast) -> None:
    ids = chatml("a👩b", add_special_tokens=False)["input_ids"]
    assert texts_of(ids, chatml) == ["a", "", "", "", "👩", "b"]
    assert texts_of(ids[:3], chatml) == ["a", "", "\ufffd"]
    assert texts_of([*ids[1:3] * 4, ids[0]], chatml)[-1].endswith("a")
    assert texts_of([], chatml) == []


def test_given_tokens_are_shown_too(chatml: PreTrainedTokenizerFast) -> None:
    ids = chatml("one two", add_special_tokens=False)["input_ids"]
    # A label of the first token is of no use: nothing predicts it.
    one = example(line=3)
    one = type(one)(2, "rows.jsonl:3", "", input_ids=ids, labels=ids)
    shown = view(one, chatml, 64)
    assert "".join(token.text for token in shown.tokens) == "one two"
    assert [token.learnt for token in shown.tokens] == [False, *[True] * (len(ids) - 1)]


def test_a_secret_of_several_tokens_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "open sesame")
    texts = ["say hf_", "abcdefgh", "ijklmnopq", "rs now", ", op", "en ses", "ame!"]
    assert without_secrets(texts) == ["say ***", "", "", " now", ", ***", "", "!"]
