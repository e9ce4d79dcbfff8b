"""Answers to batches of questions: what is asked, how tokens are drawn, and where answers end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sftmix.data.examples import load_examples
from sftmix.evaluation.answering import Answerer, Decoding, Draws, sampled, stops
from sftmix.evaluation.questions import Answer, Question
from sftmix.templates.chat import PLAIN_TEMPLATE, prompt_tokens
from sftmix.templates.tokenizing import tokenize_examples
from tests.sftmix import tiny

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(answering_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(answering_model)
    return loaded


def answerer(
    answering_model: Path, tokenizer: PreTrainedTokenizerBase, **decoding: Any
) -> Answerer:
    model = AutoModelForCausalLM.from_pretrained(answering_model)
    return Answerer(model, tokenizer, Decoding(**{"max_new_tokens": 6, **decoding}))


def asked(number: int, turns: int = 2, temperature: float = 0.0) -> list[Question]:
    words = [" ".join(["owl", "boat", "heron"][: 1 + i % 3] * (1 + i)) for i in range(number)]
    return [
        Question(i, tuple(f"{word} {t}" for t in range(turns - i % turns)), temperature)
        for i, word in enumerate(words)
    ]


def without_times(answers: Sequence[Answer]) -> list[Answer]:
    return [dataclasses.replace(answer, time=0.0) for answer in answers]


# Prompts


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML, None])
def test_a_prompt_is_what_training_showed_before_a_response(
    template: str | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    turns = ["one owl", " a heron\n\n", "two,", "Ein Boot 船", "and?", "five"]
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    row = tokenize_examples(load_examples([tmp_path / "rows.jsonl"]), tokenizer)[0]
    labelled = [label != -100 for label in row["labels"]]
    begins = [i for i in range(1, len(labelled)) if labelled[i] and not labelled[i - 1]]
    assert len(begins) == 3
    for turn, begin in enumerate(begins):
        prompt = prompt_tokens(tuple(messages[: 2 * turn + 1]), tokenizer)
        assert prompt == row["input_ids"][:begin]


def test_later_turns_are_asked_with_the_earlier_answers(
    answering_model: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = answerer(answering_model, tokenizer)
    prompts: list[list[int]] = []
    generate = one.generate
    monkeypatch.setattr(
        one, "generate", lambda q, p, turn: (prompts.extend(p), generate(q, p, turn))[1]
    )
    question = Question(1, ("owl", "boat", "heron"), 0.0)
    (answer,) = one.answer([question])
    contents = ["owl", answer.turns[0], "boat", answer.turns[1], "heron"]
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": content}
        for i, content in enumerate(contents)
    ]
    assert prompts == [prompt_tokens(tuple(messages[:n]), tokenizer) for n in (1, 3, 5)]
    assert all(answer.turns)
    assert answer.num_tokens == [6, 6, 6]
    assert answer.ended == [False] * 3


# Drawing tokens


@pytest.mark.parametrize(
    ("family", "temperature"), [("Llama", 0.0), ("Llama", 0.7), ("GPT2", 0.0), ("Gemma2", 0.7)]
)
def test_a_batch_answers_as_each_question_alone(
    family: str,
    temperature: float,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = {"n_positions": 256} if family == "GPT2" else {"max_position_embeddings": 256}
    model = tiny.build(family, vocab_size=300, **size)
    one = Answerer(model, tokenizer, Decoding(8))
    questions = asked(7, temperature=temperature)
    tokens: dict[Any, list[list[int]]] = {}
    generate = one.generate

    def noted(batch: Sequence[Question], *rest: Any) -> list[list[int]]:
        new = generate(batch, *rest)
        for question, row in zip(batch, new, strict=True):
            tokens.setdefault(question.key, []).append([t for t in row if t != one.pad])
        return new

    monkeypatch.setattr(one, "generate", noted)
    alone = [one.answer([question])[0] for question in questions]
    alone_tokens, tokens = tokens, {}
    assert without_times(one.answer(questions)) == without_times(alone)
    assert tokens == alone_tokens
    # Greedy ones beside sampled ones, in another order.
    mixed = [dataclasses.replace(q, key=-1 - i, temperature=0.7) for i, q in enumerate(asked(3))]
    found = without_times(one.answer([*questions[::-1], *mixed]))
    assert found[6::-1] == without_times(alone)
    assert found[7:] == without_times([one.answer([question])[0] for question in mixed])
    assert len({str(turn) for turns in tokens.values() for turn in turns}) > 5


def test_the_seed_the_question_and_the_turn_decide_what_is_drawn(
    answering_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = Question(1, ("owl",), 0.7)
    first = answerer(answering_model, tokenizer).answer([question])[0].turns
    assert answerer(answering_model, tokenizer).answer([question])[0].turns == first
    assert answerer(answering_model, tokenizer, seed=1).answer([question])[0].turns != first
    other = dataclasses.replace(question, key=2)
    assert answerer(answering_model, tokenizer).answer([other])[0].turns != first
    draws = [Decoding(6).draws(question, turn) for turn in (0, 1)]
    assert (draws[0] != draws[1]).all()
    # A temperature for all goes before the questions' own; below 1e-4 nothing is drawn.
    for cold in (0.0, 9e-5):
        greedy = answerer(answering_model, tokenizer, temperature=cold, seed=cold > 0)
        assert greedy.answer([question])[0].turns == greedy.answer([other])[0].turns


def test_draws_follow_the_distribution() -> None:
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    scores[0, 3] = -torch.inf
    number, temperature = 4000, torch.full((4000,), 0.7, dtype=torch.float64)
    grid = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    for top_k in (0, 5):
        exact = scores[0].double() / 0.7
        if top_k:
            exact[exact < exact.sort().values[-top_k]] = -torch.inf
        tokens = sampled(scores.expand(number, -1), temperature, grid, top_k)
        counts = torch.bincount(tokens, minlength=12)
        assert (counts - number * exact.softmax(-1)).abs().max() <= 1
        assert counts[3] == 0
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    tokens = sampled(scores.expand(2, -1), temperature[:2], ends, 0)
    assert tokens[0] == scores.argmax()
    assert tokens[1] == scores[0].masked_fill(scores[0].isinf(), torch.inf).argmin()


def test_logits_that_are_no_numbers() -> None:
    draws = Draws(torch.zeros(1), torch.zeros(1, 1), 0, 1)
    with pytest.raises(FloatingPointError, match="NaN"):
        draws(torch.zeros(1, 1), torch.tensor([[1.0, torch.nan]]))


# Where an answer ends


def test_what_ends_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    assert stops(tokenizer, None) == ({eos}, "")
    assert stops(tokenizer, [7, 8]) == ({7, 8, eos}, "")
    tokenizer.chat_template = CHATML
    assert stops(tokenizer, 7) == ({7, eos}, "<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stops(tokenizer, 7) == ({7, eos, end}, "")


def test_answers_stop_there(answering_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    questions = [Question(1, ("owl",), 0.0), Question(2, ("two boats " * 9,), 0.0)]
    whole = answerer(answering_model, tokenizer, max_new_tokens=12)
    tokens = whole.generate(questions, [whole.prompt(q, []) for q in questions], 0)
    place = next(i for i in range(2, 12) if tokens[0][i] not in [*tokens[0][:i], *tokens[1]])
    decode = tokenizer.decode
    kept = decode(tokens[0][:place]).strip()

    model = AutoModelForCausalLM.from_pretrained(answering_model)
    model.generation_config.eos_token_id = tokens[0][place]
    # What the model's answering_model says of sampling is not heeded.
    model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 9.0
    by_token = Answerer(model, tokenizer, Decoding(12)).answer(questions)
    assert (by_token[0].turns, by_token[0].num_tokens) == ([kept], [place])
    assert by_token[0].ended == [True]
    assert by_token[1].turns == [decode(tokens[1]).strip()]
    assert by_token[1].ended == [False]

    marker = decode(tokens[0][place : place + 2])
    tokenizer.chat_template = PLAIN_TEMPLATE.replace(
        "message['content'] + eos_token", f"message['content'] + {marker.rstrip()!r}"
    )
    by_text = answerer(answering_model, tokenizer, max_new_tokens=12)
    assert by_text.stop_text == marker.rstrip()
    (answer,) = by_text.answer(questions[:1])
    assert answer.turns == [decode(tokens[0]).partition(marker.rstrip())[0].strip()]
    assert answer.ended == [True]


def test_special_tokens_and_white_space_are_no_text(
    answering_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    one = answerer(answering_model, tokenizer)
    answer = Answer(1, [], [], [], 0.0)
    text = "\n one , two .  <s>five\n</s>owl"
    one._append(answer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert answer.turns == ["one , two .  five"]


def test_a_model_whose_answers_change_with_the_batch_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """RWKV reads padding as text, and its state mixes rows even of prompts of equal length."""
    config = transformers.RwkvConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, context_length=256
    )
    torch.manual_seed(0)
    one = Answerer(transformers.RwkvForCausalLM(config), tokenizer, Decoding(4))
    short, long = asked(2, turns=1)
    with pytest.raises(ValueError, match=r"^batch_size: the logits of Rwkv.* at new token 1 "):
        one.answer([short, long])
    equal = dataclasses.replace(short, key=7, turns=("boat 0",))
    assert len(one.prompt(short, [])) == len(one.prompt(equal, []))
    with pytest.raises(ValueError, match=r"at new token 2 .*; use --batch_size 1"):
        one.answer([short, equal])
    assert one.answer([short])[0].turns


def test_an_answer_is_without_its_thought(
    answering_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    opening = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    for template, text, kept in (
        (CHATML, "<think>\none\n</think>\n\ntwo", "two"),
        (CHATML, "two </think> three", "two </think> three"),
        (CHATML, "<think>\none", "<think>\none"),
        (opening, "\n</think>\n\ntwo", "two"),
        (opening, "one\n</think>\n\ntwo </think>", "two </think>"),
        (opening, "one", "one"),
        (opening.replace("<think>", "[THINK]"), "one[/THINK]two", "two"),
    ):
        tokenizer.chat_template = template
        answer = Answer(1, [], [], [], 0.0)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        answerer(answering_model, tokenizer)._append(answer, tokens)
        assert answer.turns == [kept]
