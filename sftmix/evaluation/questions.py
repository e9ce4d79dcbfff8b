"""Read benchmark questions, and write answers in the files that the judging tools read.

AlpacaEval (`alpaca_eval --model_outputs FILE`): a JSON list of objects with `instruction`,
`output`, `generator` and, if the question has one, `dataset`. The judge joins it with the
reference's answers on the text of the instruction.

MT-Bench (FastChat's `gen_judgment.py`): `model_answer/NAME.jsonl`, a line for each question with
`question_id`, `answer_id`, `model_id`, `choices` (one, with the answers to all turns) and `tstamp`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.data.rows import BadRowError, Row
from sftmix.data.sources import read_rows
from sftmix.runs.folders import atomic_write

# FastChat 0.2.36, `temperature_config` in fastchat/llm_judge/common.py; gen_model_answer.py asks
# questions of any other category at 0.7.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Question:
    """A question of one turn or more, and the temperature that the benchmark asks it at."""

    key: int | str  # what the judging tool joins on: `question_id`, or the instruction
    turns: tuple[str, ...]
    temperature: float
    dataset: str | None = None

    def __str__(self) -> str:
        return f"question {self.key!r:.60}"


@dataclass
class Answer:
    """The answers to a question's turns."""

    key: int | str
    turns: list[str]
    num_tokens: list[int]  # without the one that ends the turn
    ended: list[bool]  # False: cut off at max_new_tokens
    time: float  # seconds since 1970


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{name}' must be a string that is not empty, got {value!r}")
    value.encode("utf-8")  # a lone surrogate is no text
    return value


def _alpaca_eval(row: dict[str, Any]) -> Question:
    instruction = _text(row.get("instruction"), "instruction")
    if row.get("input"):
        raise ValueError("'input' is no part of AlpacaEval's prompts; put it into 'instruction'")
    dataset = row.get("dataset")
    # alpaca_eval's own configs of 7B models sample at 0.7. Greedy answers leave no noise of
    # sampling in the difference of two models.
    named = None if dataset is None else _text(dataset, "dataset")
    return Question(instruction, (instruction,), temperature=0.0, dataset=named)


def _mt_bench(row: dict[str, Any]) -> Question:
    key, turns = row.get("question_id"), row.get("turns")
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise ValueError(f"'question_id' must be an integer or a string, got {key!r}")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'turns' must be a list of at least one string, got {turns!r}")
    texts = tuple(_text(turn, f"turns[{i}]") for i, turn in enumerate(turns))
    category = _text(row.get("category"), "category")
    return Question(key, texts, MT_BENCH_TEMPERATURES.get(category, OTHER_TEMPERATURE))


def _question(row: Row, read: Callable[[dict[str, Any]], Question]) -> Question:
    if row.problem is not None:
        raise ValueError(row.problem)
    if not isinstance(row.value, dict):
        raise ValueError(f"a question must be an object, got {row.value!r:.60}")
    return read(row.value)


def read_questions(file: str, form: str) -> list[Question]:
    """Return the questions of a file of the format `form`, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no questions; a row is none, or one that an earlier row is already.
    """
    lines: dict[int | str, int] = {}
    questions = []
    for row in read_rows(file, "train"):
        try:
            question = _question(row, FORMATS[form].read)
            first = lines.setdefault(question.key, row.line)
            if first != row.line:
                raise ValueError(f"the question of line {first} again; the judge joins on it")
        except ValueError as error:
            raise BadRowError(file, row.line, str(error)) from None
        questions.append(question)
    if not questions:
        raise ValueError(f"questions: {file} holds no questions")
    return questions


def questions_hash(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of what is asked, in order."""
    asked = [[q.key, q.turns, q.temperature, q.dataset] for q in questions]
    return hashlib.sha256(json.dumps(asked).encode("ascii")).hexdigest()


def _alpaca_eval_text(name: str, questions: Sequence[Question], answers: Sequence[Answer]) -> str:
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        row = {"instruction": question.key, "output": answer.turns[0], "generator": name}
        rows.append(row | ({"dataset": question.dataset} if question.dataset else {}))
    return json.dumps(rows, indent=2) + "\n"


def _mt_bench_text(name: str, questions: Sequence[Question], answers: Sequence[Answer]) -> str:
    lines = []
    for answer in answers:
        # FastChat draws a random id; this one is the same for the same answer.
        content = json.dumps([name, answer.key, answer.turns])
        row = {
            "question_id": answer.key,
            "answer_id": hashlib.sha256(content.encode("ascii")).hexdigest()[:22],
            "model_id": name,
            "choices": [{"index": 0, "turns": answer.turns}],
            "tstamp": answer.time,
        }
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


@dataclass(frozen=True)
class Format:
    """A benchmark's files, and the most new tokens that its own tools ask for."""

    read: Callable[[dict[str, Any]], Question]
    text: Callable[[str, Sequence[Question], Sequence[Answer]], str]
    max_new_tokens: int


# alpaca_eval 0.6.6 asks 7B models (models_configs/alpaca-7b, llama-2-7b-chat-hf) for 2048 tokens,
# FastChat's gen_model_answer.py for 1024.
FORMATS = {
    "alpaca_eval": Format(_alpaca_eval, _alpaca_eval_text, 2048),
    "mt_bench": Format(_mt_bench, _mt_bench_text, 1024),
}


def answers_file(output: str, form: str, name: str) -> Path:
    """Return the file of the answers: the output itself, or FastChat's place in that folder.

    Raises:
        ValueError: the judging tool would not find or not read it there.
    """
    if not name or name.startswith(".") or "/" in name:
        raise ValueError(f"name: expected a name that a file can have, got {name!r}; give --name")
    if form == "mt_bench":
        return Path(output) / "model_answer" / f"{name}.jsonl"
    if not output.endswith(".json"):
        raise ValueError(f"output: alpaca_eval reads a file that ends in .json, got {output!r}")
    return Path(output)


def write_answers(
    path: Path, form: str, name: str, questions: Sequence[Question], answers: Sequence[Answer]
) -> None:
    """Write the judging tool's file, in the questions' order, atomically."""
    by_key = {answer.key: answer for answer in answers}
    text = FORMATS[form].text(name, questions, [by_key[question.key] for question in questions])
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="ascii"))
