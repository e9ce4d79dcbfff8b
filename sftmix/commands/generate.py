"""Answer benchmark questions in the files that their judges read (`sftmix generate`).

While the command runs, and for a later `--resume`, `OUTPUT.run` beside the file keeps a manifest
and the answers so far, a line for each batch. The answers are deleted once the file is written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from sftmix.conventions import MANIFEST
from sftmix.evaluation.answering import Answerer, Decoding
from sftmix.evaluation.questions import (
    FORMATS,
    Answer,
    Question,
    answers_file,
    questions_hash,
    read_questions,
    write_answers,
)
from sftmix.model.source import check_model
from sftmix.recipe.arguments import CHAT_TEMPLATE_HELP, REVISION_HELP, parse_alone
from sftmix.recipe.loading import load_tokenizer, load_trained_model
from sftmix.recipe.manifest import kept_date, start_manifest
from sftmix.runs import interrupts
from sftmix.runs.failures import Naming
from sftmix.runs.out_of_memory import ANSWERING_WAYS, advising
from sftmix.runs.provenance import provenance
from sftmix.runs.ranks import opened_run
from sftmix.templates.chat import set_template_date, template_date, template_hash
from sftmix.training.config import option

logger = logging.getLogger(__name__)

PARTIAL = "answers.jsonl"


@dataclasses.dataclass
class GenerateArguments:
    """The options of the command."""

    model: str = dataclasses.field(
        metadata={"help": "Folder or hub name of the model, or folder of an adapter"}
    )
    format: Literal["alpaca_eval", "mt_bench"] = dataclasses.field(
        metadata={"help": "The benchmark, whose files are read and written"}
    )
    questions: str = dataclasses.field(
        metadata={"help": "alpaca_eval's instructions or MT-Bench's question.jsonl"}
    )
    output: str = dataclasses.field(
        metadata={
            "help": "alpaca_eval: the .json file; mt_bench: the folder of model_answer/NAME.jsonl"
        }
    )
    name: str | None = option(
        None, "Name of the model in the file, by default the last part of --model", "ours"
    )
    chat_template: str | None = option(None, CHAT_TEMPLATE_HELP, "ours")
    resume: bool = option(False, "Go on with a killed run", "ours")
    batch_size: int = option(8, "Questions answered together; changes rounding only", "ours")
    max_new_tokens: int | None = option(
        None, "Longest answer of a turn; by default the judges' own 2048 and 1024", "ours"
    )
    temperature: float | None = option(
        None,
        "0: the likeliest token; by default 0 for alpaca_eval, FastChat's for each category of "
        "mt_bench",
        "ours",
    )
    top_k: int = option(50, "Tokens that sampling draws from, the likeliest; 0: all", "ours")
    seed: int = option(0, "Seed of sampling, with the question and the turn", "ours")
    dtype: Literal["float32", "bfloat16", "auto"] = option(
        "auto", "Dtype of the weights; auto: as they were saved", "ours"
    )
    revision: str | None = option(None, REVISION_HELP, "ours")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model", "ours")
    use_cpu: bool = option(False, "Use the CPU even if there is an accelerator", "ours")
    disable_tqdm: bool = option(False, "Show no progress bars", "ours")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.name is None:
            self.name = Path(self.model).resolve().name


ARGUMENTS = (GenerateArguments,)


@advising(*ANSWERING_WAYS)
def main(words: Sequence[str]) -> None:
    """Run the command."""
    arguments = parse_alone(words, GenerateArguments, "sftmix generate")
    path = answers_file(arguments.output, arguments.format, arguments.name)
    if path.exists() and not arguments.resume:
        raise ValueError(f"output: {path} exists; delete it or choose another")
    run = path.with_name(f"{path.name}.run")
    with opened_run(str(run), resume=arguments.resume):
        interrupts.advise("before it was done: what is answered is kept; go on with --resume")
        finished = path.exists()
        generate(path, run, arguments)
        print(f"{path} was finished already" if finished else f"wrote {path}")


def generate(path: Path, run: Path, arguments: GenerateArguments) -> None:
    """Answer what is not answered yet, and write the judging tool's file.

    Raises:
        ValueError: bad questions, one that has no room in the model, or a resumed run of other
            settings.
        OSError: the model cannot be read, or the answers cannot be written.
        FloatingPointError: the model's logits are not numbers.
    """
    check_model(
        arguments.model,
        arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    form = FORMATS[arguments.format]
    with Naming("questions", other="data"):
        questions = read_questions(arguments.questions, arguments.format)
    decoding = Decoding(
        form.max_new_tokens if arguments.max_new_tokens is None else arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.seed,
    )
    tokenizer = load_tokenizer(arguments)
    set_template_date(tokenizer, kept_date(run))
    numbers = {
        "model": arguments.model,
        **provenance(
            arguments.model,
            tokenizer,
            arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        ),
        "template_hash": template_hash(tokenizer),
        "template_date": template_date(tokenizer),
        "dtype": arguments.dtype,
        "format": arguments.format,
        "questions_hash": questions_hash(questions),
        "name": arguments.name,
        **dataclasses.asdict(decoding),
    }
    begun = path.exists() or (run / MANIFEST).exists()
    if begun:
        start_manifest(run, numbers)
    if path.exists():
        (run / PARTIAL).unlink(missing_ok=True)
        return
    answers = read_partial(run / PARTIAL)
    if len(answers) < len(questions):
        answerer = Answerer(
            load_trained_model(arguments).to(device(arguments)), tokenizer, decoding
        )
        lengths = {question.key: answerer.check(question) for question in questions}
        if not begun:  # a run that is refused before needs no --resume
            start_manifest(run, numbers)
        rest = sorted(questions, key=lambda question: -lengths[question.key])
        answers += answer_all(answerer, rest, answers, run / PARTIAL, arguments)
    write_answers(path, arguments.format, str(arguments.name), questions, answers)
    (run / PARTIAL).unlink()
    report(answers, decoding.max_new_tokens)


def device(arguments: GenerateArguments) -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    found = None if arguments.use_cpu else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


def read_partial(path: Path) -> list[Answer]:
    """Return the answers that a killed run has left; delete a line that was cut off.

    Raises:
        ValueError: a line is not what this command writes.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    try:
        return [Answer(**answer) for line in whole.splitlines() for answer in json.loads(line)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"resume: {path} is damaged: {error}") from None


def answer_all(
    answerer: Answerer,
    questions: Sequence[Question],
    answered: Sequence[Answer],
    path: Path,
    arguments: GenerateArguments,
) -> list[Answer]:
    """Answer the other questions in their order, and append each batch.

    A run that was killed and resumed has the batches of one that was not: each is written as a
    line, so the first ones are there whole and no part of another.
    """
    done = {answer.key for answer in answered}
    rest = [question for question in questions if question.key not in done]
    answers: list[Answer] = []
    with (
        path.open("a", encoding="ascii") as file,
        tqdm(
            desc="Answering",
            unit="question",
            total=len(questions),
            initial=len(done),
            disable=arguments.disable_tqdm,
        ) as bar,
    ):
        for begin in range(0, len(rest), arguments.batch_size):
            batch = answerer.answer(rest[begin : begin + arguments.batch_size])
            file.write(json.dumps([dataclasses.asdict(answer) for answer in batch]) + "\n")
            file.flush()
            os.fsync(file.fileno())
            answers += batch
            bar.update(len(batch))
    return answers


def report(answers: Sequence[Answer], max_new_tokens: int) -> None:
    """Print how many answers there are, and warn of those that are empty or cut off."""
    turns = [text for answer in answers for text in answer.turns]
    tokens = [number for answer in answers for number in answer.num_tokens]
    cut = sum(not ended for answer in answers for ended in answer.ended)
    empty = sum(not text for text in turns)
    print(f"{len(turns)} answers of {sum(tokens) / len(tokens):.0f} tokens on average")
    if empty:
        logger.warning("%d of %d answers are empty", empty, len(turns))
    if cut:
        logger.warning(
            "%d of %d answers were cut off at max_new_tokens=%d", cut, len(turns), max_new_tokens
        )
