"""Let a finished model answer the held-out examples, and measure what it writes.

Answers are greedy, in the model's own chat template, without examples before the question: as
`sftmix generate --temperature 0` answers. They are measured in tokens, without the one that ends an
answer, and in words, which white space parts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from sftmix.data.examples import Example
from sftmix.evaluation.answering import Answerer, Decoding
from sftmix.evaluation.questions import Question

BATCH = 64
# lm-evaluation-harness's gsm8k.yaml, filter "flexible-extract": the last of these, without those.
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
IGNORED = (",", r"\$", r"\.$")
MARK = "#### "  # before the number that ends a response of GSM8K


def last_number(text: str) -> str | None:
    """Return the last number of an answer as lm-evaluation-harness reads it, None without one.

    It reads a point or comma alone as no number, but two of them as one, and so does this.

    >>> last_number("She pays 3 * $400 = $1,200.")
    '1200'
    """
    found = NUMBER.findall(text)
    if not found:
        return None
    number: str = found[-1]
    for one in IGNORED:  # one after another: a point may be last once a comma is gone
        number = re.sub(one, "", number)
    return number


def exact_match(answers: Sequence[str], responses: Sequence[str]) -> float | None:
    """Return the share of answers whose last number is the one that ends the response.

    None if a response has no number after its mark; GSM8K's all have one.
    """
    numbers = [response.partition(MARK)[2].strip().replace(",", "") for response in responses]
    if not all(numbers):
        return None
    right = sum(last_number(a) == number for a, number in zip(answers, numbers, strict=True))
    return right / len(numbers)


def distinct_bigrams(texts: Sequence[str]) -> float | None:
    """Return distinct-2: distinct pairs of adjacent words as a share of all pairs of all texts.

    None where no text has two words. Source: Li et al. 2016, arXiv 1510.03055, where the divisor is
    the number of words.

    >>> distinct_bigrams(["to be or not to be"])
    0.8
    """
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else None


def answers_of(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int
) -> dict[str, float]:
    """Return the measures of a model's answers to the first turns of examples.

    Raises:
        ValueError: a prompt and the new tokens are more than the model has positions.
    """
    answerer = Answerer(model, tokenizer, Decoding(max_new_tokens))
    questions = [Question(one.id, (one.messages[0]["content"],), 0.0) for one in examples]
    answers = [
        answer
        for start in range(0, len(questions), BATCH)
        for answer in answerer.answer(questions[start : start + BATCH])
    ]
    texts = [answer.turns[0] for answer in answers]
    found = {
        "answer_tokens": sum(answer.num_tokens[0] for answer in answers) / len(answers),
        "answers_ended": sum(answer.ended[0] for answer in answers) / len(answers),
        "distinct_bigrams": distinct_bigrams(texts),
        "exact_match": exact_match(texts, responses_of(examples)),
    }
    return {name: value for name, value in found.items() if value is not None}


def of_responses(tokenizer: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return the same of the examples' own responses, as far as it can be said of them."""
    texts = responses_of(examples)
    tokens = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    found = {
        "answer_tokens": sum(tokens) / len(tokens),
        "distinct_bigrams": distinct_bigrams(texts),
    }
    return {name: value for name, value in found.items() if value is not None}


def responses_of(examples: Sequence[Example]) -> list[str]:
    """Return the responses to the examples' first turns."""
    return [one.messages[1]["content"] for one in examples]
