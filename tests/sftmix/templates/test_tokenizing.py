"""Long texts are tokenised as far as needed and no further; refusals name the true reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sftmix.data.examples import BadRowError, Example, load_examples
from sftmix.templates import tokenizing
from sftmix.templates.tokenizing import BATCH_CHARACTERS, tokenize_examples

SPECIAL = ["<s>", "</s>", "<unk>"]
WORDS = [
    "hello",
    "there",
    "Straße",
    "雪が降る",
    "\N{SNOWMAN}",
    "1234",
    "don't",
    "  ",
    "\n\n",
    "aaaa",
    "</s>",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def one_word() -> Tokenizer:
    """As Llama 2: spaces become a letter, and the whole text is one word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """Its trainer is not deterministic: pieces by hand, a run of letters in fours."""
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), ("▁", -3.0), ("aaaa", -4.0)]
    letters = sorted({*"".join(WORDS), *"### Instruction:Response"} - {"▁", " ", "\n"})
    pieces += [(letter, -9.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


KINDS: dict[str, tuple[Any, Any]] = {
    "byte_level": (byte_level, trainers.BpeTrainer),
    "one_word": (one_word, trainers.BpeTrainer),
    "unigram": (unigram, None),
    "word_piece": (word_piece, trainers.WordPieceTrainer),
}


def words(number: int, seed: int = 0) -> str:
    chosen = random.Random(seed).choices(WORDS, k=number)
    return "".join(word + " " * (i % 3 > 0) for i, word in enumerate(chosen))


def build(kind: str) -> PreTrainedTokenizerFast:
    make, trainer = KINDS[kind]
    tokenizer = make()
    if trainer is not None:
        training = trainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
        # A text of one word teaches nothing: give it in pieces.
        tokenizer.train_from_iterator([words(5, seed) for seed in range(200)], training)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return build("byte_level")


def example(prompt: str, reply: str, number: int = 0) -> Example:
    texts = (("user", prompt), ("assistant", reply))
    messages = tuple({"role": role, "content": content} for role, content in texts)
    return Example(number, f"data.jsonl:{number + 1}", "hash", messages=messages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", [words(6000), "a" * 30_000, "a" * 30_001, " " * 30_000 + "end", "snow " * 6000]
)
def test_the_beginning_of_a_long_text_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, kind: str, text: str
) -> None:
    tokenizer = build(kind)
    rows = [example("hello", text), example("hello", "there", 1)]
    longest = 0
    tokenized = tokenizing._tokenized

    def measured(texts: Any, tokenizer: Any) -> Any:
        nonlocal longest
        longest = max(longest, *map(len, texts)) if texts else longest
        return tokenized(texts, tokenizer)

    monkeypatch.setattr(tokenizing, "_tokenized", measured)
    heads = tokenize_examples(rows, tokenizer, max_length=150)
    shortened = longest
    monkeypatch.setattr(tokenizing, "CHARACTERS_PER_TOKEN", 10_000)
    whole = tokenize_examples(rows, tokenizer, max_length=150)
    assert heads[:] == whole[:]
    # How a run of one letter is parted may depend on its end: then the whole is tokenised.
    assert shortened < longest or set(text[:9]) in ({"a"}, {" "})


def test_what_is_tokenised_at_once_is_bounded(
    monkeypatch: pytest.MonkeyPatch, bpe: PreTrainedTokenizerFast
) -> None:
    sizes: list[int] = []
    tokenized = tokenizing._tokenized

    def measured(texts: Any, tokenizer: Any) -> Any:
        sizes.append(sum(map(len, texts)))
        return tokenized(texts, tokenizer)

    monkeypatch.setattr(tokenizing, "_tokenized", measured)
    lengths = [100_000] * 12 + [3_000_000, *[900] * 1200]
    rows = [example("hello", "there " * (n // 6), i) for i, n in enumerate(lengths)]
    data = tokenize_examples(rows, bpe, max_length=64)
    assert data["id"][:] == list(range(len(rows)))
    assert max(sizes) < BATCH_CHARACTERS + 2_000
    # Of a row of 3 MB no more is tokenised than of one of 100 kB.
    assert sum(sizes) < 13 * 5_000 + 1200 * 1_000


def test_rows_that_lost_their_end_are_counted(
    bpe: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenize_examples([example("hello", words(5000)), example("hello", "a", 1)], bpe, max_length=64)
    assert "1 of 2 rows were longer than max_length=64 and lost their end" in caplog.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (example("hello " * 60, "yes"), r"max_length=50: the prompt has \d\d+ tokens; r"),
        (example("hello " * 9000, "yes"), r"the prompt has more than 200 tokens; raise -"),
        (
            Example(0, "data.jsonl:1", "", input_ids=[5] * 90, labels=[-100] * 80 + [5] * 10),
            r"is left within max_length=50: the first label is of token 81 of 90",
        ),
    ],
)  # fmt: skip
def test_a_row_without_a_target_is_refused_for_the_true_reason(
    bpe: PreTrainedTokenizerFast, row: Example, reason: str
) -> None:
    with pytest.raises(BadRowError, match=reason):
        tokenize_examples([row], bpe, max_length=50)


def test_only_what_the_masks_leave_carries_loss(
    bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    turns = [("user", "hi", None), ("assistant", "hello", 0), ("user", "hi", None)]
    turns.append(("assistant", "there don't", 1))
    messages = [{"role": r, "content": c, "weight": w} for r, c, w in turns]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages, "system": "hello"}]))
    [row] = tokenize_examples(load_examples([tmp_path / "data.json"]), bpe)
    learnt = [label for label in row["labels"] if label != -100]
    assert bpe.decode(learnt) == "there don't</s>"
    assert bpe.decode(row["input_ids"]).startswith("<s>hello\n\n")


def test_ids_are_held_against_the_largest_of_the_tokenizer(bpe: PreTrainedTokenizerFast) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "far": 50}  # with a gap
    gap = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gap, eos_token="</s>")
    assert len(tokenizer) == 4
    ids = [0, 50]
    data = tokenize_examples([Example(0, "x:1", "", input_ids=ids, labels=ids)], tokenizer)
    assert data["input_ids"][0] == ids
    with pytest.raises(BadRowError, match=r"'input_ids\[1\]' is 51, outside the tokenizer's voc"):
        tokenize_examples([Example(0, "x:1", "", input_ids=[0, 51], labels=ids)], tokenizer)
