"""Made-up questions with the columns of the medical data sets."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sftmix.conftest import WORDS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)


def words(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(1, 6)))


def medqa(random: np.random.Generator, answer: int) -> dict[str, Any]:
    endings = {f"ending{i}": words(random) for i in range(4)}
    return {"id": "x", "sent1": words(random), "sent2": "", **endings, "label": answer}


def medqa_5(random: np.random.Generator, answer: int) -> dict[str, Any]:
    options = [{"key": key, "value": words(random)} for key in "ABCDE"]
    row = {"meta_info": "step1", "question": words(random), "options": options}
    return {**row, "answer_idx": "ABCDE"[answer], "answer": options[answer]["value"]}


def pubmedqa(random: np.random.Generator, answer: int) -> dict[str, Any]:
    contexts = [words(random) for _ in range(random.integers(1, 4))]
    row = {"QUESTION": words(random), "CONTEXTS": contexts, "YEAR": "2011"}
    return {**row, "final_decision": ("yes", "no", "maybe")[answer]}


def medmcqa(random: np.random.Generator, answer: int) -> dict[str, Any]:
    options = {f"op{letter}": words(random) for letter in "abcd"}
    row = {"id": "x", "question": words(random), **options, "cop": answer}
    return {**row, "choice_type": "single", "exp": None, "topic_name": None}


MAKE: dict[str, Callable[[np.random.Generator, int], dict[str, Any]]] = {
    "medqa": medqa,
    "medqa_5": medqa_5,
    "pubmedqa": pubmedqa,
    "medmcqa": medmcqa,
}


def write(folder: Path, name: str, answers: list[int], **changes: Any) -> dict[str, str]:
    """Files of a task with such answers; the names that `read_questions` gives them."""
    random = np.random.default_rng(0)
    rows = [{**MAKE[name](random, answer), **changes} for answer in answers]
    file = folder / f"{name}.json{'' if name == 'pubmedqa' else 'l'}"
    if name != "pubmedqa":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"file": str(file)}
    ids = folder / "ids.json"
    labelled = {str(number): row for number, row in enumerate(rows)}
    file.write_text(json.dumps({**labelled, "train": MAKE[name](random, 0)}))
    ids.write_text(json.dumps({one: row["final_decision"] for one, row in labelled.items()}))
    return {"file": str(file), "ids": str(ids)}
