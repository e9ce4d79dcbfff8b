"""Let a model answer the paper's four medical tasks in EleutherAI's lm-evaluation-harness.

A task is a file of `sftmix/evaluation/tasks` in the harness's own form. Its questions come from the
data set that it names, or from a local file with the same columns; either is checked before a model
runs. The model's answer is the choice that it finds likeliest after the prompt:

    answer = argmax over choices c of log p(" " + c | prompt)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import jinja2.meta
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from sftmix.data.examples_check import check_command
from sftmix.data.hub import read_name
from sftmix.data.rows import BadRowError, Row
from sftmix.data.sources import read_rows
from sftmix.evaluation.tasks import FOLDER, PAPER_NAMES
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_tokenizer, load_trained_model
from sftmix.runs.failures import Naming

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Questions:
    """A task's config for the harness, its documents, and where they come from."""

    config: dict[str, Any]
    documents: datasets.Dataset
    source: str

    @property
    def data_hash(self) -> str:
        """SHA-256 of the documents, in order."""
        digest = hashlib.sha256()
        for row in self.documents:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Score:
    """The accuracy of a model in a task and its standard error, in percent.

    `stderr` is None for a single question. `num_cut` prompts were longer than the model's context.
    `prompts_hash` is the SHA-256 of all prompts, choices and answers.
    """

    accuracy: float
    stderr: float | None
    num_examples: int
    num_cut: int
    prompts_hash: str


def require_harness() -> None:
    """Check that the harness is installed, before a model is loaded for nothing.

    Raises:
        ImportError: lm_eval is not installed, saying how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "evaluation needs lm-evaluation-harness: pip install 'lm_eval[hf]>=0.4.13'"
        )


def read_questions(name: str, file: str | None = None, ids: str | None = None) -> Questions:
    """Return the documents of a task, from a local file or the task's data set on the hub.

    PubMedQA takes two files, the labelled part and the ids of its test questions (with or without
    their answers); the other tasks take the rows of a .json, .jsonl or .parquet file.

    Raises:
        ValueError: no such task; a file is missing for PubMedQA; a row without a column that the
            task reads, or with an answer that is none of the choices; an id that is not there.
        OSError: a file cannot be read, or the data set cannot be had.
    """
    if name not in PAPER_NAMES:
        raise ValueError(f"tasks: expected some of {', '.join(PAPER_NAMES)}, got {name!r}")
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if name == "pubmedqa":
        if file is None or ids is None:
            raise ValueError(
                "pubmedqa_data: no data set of the hub has the test questions; give ori_pqal.json "
                "as --pubmedqa_data and test_ground_truth.json as --pubmedqa_ids"
            )
        source, rows = file, _labelled_rows(Path(file), Path(ids))
    elif file is None:
        source, rows = config["dataset_path"], _hub_rows(name, config)
    else:
        source, rows = file, read_rows(file, split="test")
    checked = list(_checked(rows, config, source))
    if not checked:
        raise ValueError(f"{name}: {source} holds no questions")
    return Questions(config, datasets.Dataset.from_list(checked), source)


def _hub_rows(name: str, config: Mapping[str, Any]) -> Iterator[Row]:
    path, part = config["dataset_path"], config.get("dataset_name")
    try:
        return read_name(f"{path}:{part}" if part else path, config["test_split"])
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix("data: ")
        raise OSError(
            f"{name}_data: the data set {path} could not be had; give a file of its rows ({reason})"
        ) from error


def _labelled_rows(file: Path, ids: Path) -> Iterator[Row]:
    """Yield the rows of PubMedQA that the ids name, in the order of the labelled part.

    The file of ids is sorted by answers: its first 50 questions are all answered with "yes".
    """
    labelled, wanted = _read_json(file, "pubmedqa_data"), _read_json(ids, "pubmedqa_ids")
    if not isinstance(labelled, dict):
        raise ValueError(f"pubmedqa_data: {file} must map ids to questions, as ori_pqal.json does")
    if not isinstance(wanted, dict | list):
        raise ValueError(f"pubmedqa_ids: {ids} must hold ids, got {type(wanted).__name__}")
    missing = [one for one in wanted if one not in labelled]
    if missing:
        raise ValueError(
            f"pubmedqa_ids: {len(missing)} of {len(wanted)} ids of {ids} are not in {file}, "
            f"the first is {missing[0]!r}"
        )
    chosen = [(one, row) for one, row in labelled.items() if one in wanted]
    for number, (one, row) in enumerate(chosen, start=1):
        answer = row.get("final_decision") if isinstance(row, dict) else None
        if isinstance(wanted, dict) and answer != wanted[one]:
            raise ValueError(
                f"pubmedqa_ids: the answer to {one} is {wanted[one]!r} in {ids} and {answer!r} in "
                f"{file}"
            )
        yield Row(number, row)


def _read_json(path: Path, option: str) -> Any:
    with Naming(option, f"{path} is not a JSON file"):
        return json.loads(path.read_text(encoding="utf-8"))


def _checked(
    rows: Iterable[Row], config: Mapping[str, Any], source: str
) -> Iterator[dict[str, Any]]:
    """Yield the columns that the task reads, of rows that have them all."""
    answer, choices = config["doc_to_target"], config["doc_to_choice"]
    template = jinja2.Environment().parse(config["doc_to_text"])
    columns = sorted(jinja2.meta.find_undeclared_variables(template) | {answer})
    for row in rows:
        reason = row.problem or _problem(row.value, columns, answer, choices)
        if reason:
            raise BadRowError(source, row.line, reason)
        yield {name: row.value[name] for name in columns}


def _problem(row: Any, columns: list[str], answer: str, choices: list[str]) -> str | None:
    """Return why a row is no question with one right answer among the choices, or None."""
    if not isinstance(row, dict):
        return f"a row must be an object, got {type(row).__name__}"
    missing = [name for name in columns if row.get(name) is None]
    if missing:
        return f"no {', '.join(map(repr, missing))}; the task reads {', '.join(columns)}"
    right, count = row[answer], len(choices)
    # Choices are numbered from 0; True is no number.
    if right not in choices and not (type(right) is int and 0 <= right < count):
        return f"{answer!r} must be one of {choices}, or its number from 0, got {right!r}"
    if "CONTEXTS" in columns and not isinstance(row["CONTEXTS"], list):
        return f"'CONTEXTS' must be a list of paragraphs, got {type(row['CONTEXTS']).__name__}"
    if "options" in columns and _keys(row["options"]) != choices:
        return f"'options' must have texts for {choices}, got {row['options']}"
    return None


def _keys(options: Any) -> list[str] | None:
    """Return the letters of options in either form; None if one has no text."""
    try:
        pairs = options if isinstance(options, dict) else {o["key"]: o["value"] for o in options}
    except (TypeError, KeyError):
        return None
    return list(pairs) if all(isinstance(text, str) for text in pairs.values()) else None


def load(
    model: str,
    dtype: Dtype = "auto",
    revision: str | None = None,
    chat_template: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a saved model in evaluation mode (on a GPU if there is one) and its tokenizer.

    The model is read only from safetensors, and none of its code runs. An adapter is put on its
    base model.

    Raises:
        OSError: there is no such model, it has no safetensors, or they are damaged.
        ValueError: it is a folder, which has no revision; or `chat_template` names no template.
        ImportError: it is an adapter, and PEFT is not installed.
        ValueError: its tokenizer has ids beyond its embeddings.
    """
    arguments = RunArguments(
        model, [], "", dtype=dtype, revision=revision, chat_template=chat_template
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, tokenizer = load_trained_model(arguments), load_tokenizer(arguments)
    check_command(found, tokenizer)
    return found.eval().to(device), tokenizer


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Questions],
    *,
    batch_size: int,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> Iterator[tuple[str, Score]]:
    """Ask the model the first `limit` questions of each task, or all; yield each task's score.

    A prompt that is longer than the model's context loses its beginning, as in the harness; their
    number is logged and counted.

    Raises:
        ValueError: a chat template is to be applied and the tokenizer has none.
        ImportError: the harness is not installed.
        FloatingPointError: the model's likelihoods are not numbers.
    """
    require_harness()
    if apply_chat_template and tokenizer.chat_template is None:
        raise ValueError("apply_chat_template: the tokenizer has no chat template")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        tasks = make_tasks(questions)
    for name, task in tasks.items():
        with _quiet():
            found = evaluate(
                wrapped,
                {"tasks": {task.task_name: task}},
                limit=limit,
                log_samples=False,
                apply_chat_template=apply_chat_template,
            )
        refuse_no_numbers(name, [response[0] for one in task.instances for response in one.resps])
        one = _score(task, found["results"], wrapped)
        if one.num_cut:
            logger.warning(
                "%s: %d of %d prompts exceed the model's context of %d tokens; their beginning is "
                "cut off",
                PAPER_NAMES[name],
                one.num_cut,
                one.num_examples,
                wrapped.max_length,
            )
        yield name, one


def refuse_no_numbers(name: str, likelihoods: Sequence[float]) -> None:
    """Refuse answers of which one is NaN: the largest of them would be the first, right or wrong.

    Raises:
        FloatingPointError: saying how many.
    """
    wrong = sum(map(math.isnan, likelihoods))
    if wrong:
        raise FloatingPointError(
            f"{PAPER_NAMES[name]}: {wrong} of {len(likelihoods)} log-likelihoods of the model are "
            "not numbers (NaN): is it damaged? Nothing of this task is written"
        )


def make_tasks(questions: Mapping[str, Questions]) -> dict[str, Any]:
    """Return the harness's task for each of the questions, under the same names."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    made = {}
    for name, one in questions.items():
        splits = {one.config["test_split"]: one.documents}
        config = {**one.config, "custom_dataset": lambda splits=splits, **_: splits}
        made[name] = manager.load([config])["tasks"][one.config["task"]]
    return made


def _score(task: Any, results: Mapping[str, Any], wrapped: Any) -> Score:
    """Return the task's score from the results, with facts about its prompts."""
    longest: dict[int, str] = {}
    digest = hashlib.sha256()
    for instance in task.instances:
        prompt, choice = instance.args
        longest[instance.doc_id] = max(prompt + choice, longest.get(instance.doc_id, ""), key=len)
        line = [prompt, choice, task.doc_to_target(instance.doc)]
        digest.update(json.dumps(line).encode())
    # The last token is only predicted.
    lengths = [len(wrapped.tok_encode(text)) - 1 for text in longest.values()]
    found = results[task.task_name]
    stderr = found["acc_stderr,none"]
    return Score(
        accuracy=100 * found["acc,none"],
        stderr=None if isinstance(stderr, str) else 100 * stderr,
        num_examples=len(longest),
        num_cut=sum(length > wrapped.max_length for length in lengths),
        prompts_hash=digest.hexdigest(),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's warnings of a loaded model and of each prompt that it cuts."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
