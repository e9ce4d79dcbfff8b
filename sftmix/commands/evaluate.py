"""Evaluate a saved model in the paper's medical tasks (`sftmix evaluate`)."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from sftmix.conventions import EVALUATION
from sftmix.evaluation.medical import Questions, Score, load, read_questions, require_harness, score
from sftmix.evaluation.tasks import PAPER_NAMES
from sftmix.model.source import check_model
from sftmix.recipe.arguments import CHAT_TEMPLATE_HELP, REVISION_HELP, RunArguments, parse_alone
from sftmix.recipe.loading import load_tokenizer
from sftmix.recipe.manifest import versions, what_differs
from sftmix.runs.failures import Naming
from sftmix.runs.folders import write_json
from sftmix.runs.out_of_memory import ANSWERING_WAYS, advising
from sftmix.runs.provenance import PARTS, provenance
from sftmix.runs.redaction import redacted
from sftmix.templates.chat import template_hash
from sftmix.training.config import option

logger = logging.getLogger(__name__)

MEAN = "mean"
# A mean over tasks needs results that are alike in these.
COMPARED = ("limit", "apply_chat_template", "dtype")
# --resume keeps a result only if these are the same; batches change only rounding.
DECISIVE = ("task", "data_hash", "template_hash", *COMPARED)


@dataclasses.dataclass
class EvaluateArguments:
    """The options of the command."""

    model: str = dataclasses.field(
        metadata={"help": "Folder of a run or of an adapter, or hub name of a model"}
    )
    tasks: list[str] = dataclasses.field(
        default_factory=lambda: list(PAPER_NAMES),
        metadata={"help": f"Some of {', '.join(PAPER_NAMES)} [paper]"},
    )
    medqa_data: str | None = option(
        None, "Rows of GBaker/MedQA-USMLE-4-options-hf; by default from the hub", "ours"
    )
    medqa_5_data: str | None = option(
        None, "Rows of fzkuji/MedQA, or of the first release; by default from the hub", "ours"
    )
    medmcqa_data: str | None = option(
        None, "Rows of openlifescienceai/medmcqa; by default from the hub", "ours"
    )
    pubmedqa_data: str | None = option(
        None, "ori_pqal.json of github.com/pubmedqa/pubmedqa", "ours"
    )
    pubmedqa_ids: str | None = option(
        None, "Its test_ground_truth.json, or any JSON list of ids", "ours"
    )
    output: str | None = option(
        None, f"File to write or to add to; by default {EVALUATION} in the model's folder", "ours"
    )
    resume: bool = option(False, "Ask only the tasks that have no result in the file yet", "ours")
    batch_size: int = option(8, "Prompts at once", "ours")
    limit: int | None = option(None, "Only the first questions of each task", "ours")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Dtype of the weights; auto: as they were saved", "ours"
    )
    revision: str | None = option(None, REVISION_HELP, "ours")
    apply_chat_template: bool = option(
        False,
        "Ask in the model's chat template, which the harness by default does not",
        "ours",
    )
    chat_template: str | None = option(
        None, f"With --apply_chat_template: {CHAT_TEMPLATE_HELP}", "ours"
    )
    disable_tqdm: bool = option(
        False, "Show no bars while loading; the harness shows its own", "ours"
    )

    def __post_init__(self) -> None:
        if self.chat_template is not None and not self.apply_chat_template:
            raise ValueError(
                "chat_template: expected --apply_chat_template with it; without it, no template is "
                "used"
            )
        for name in self.tasks:
            if name not in PAPER_NAMES:
                raise ValueError(f"tasks: expected some of {', '.join(PAPER_NAMES)}, got {name!r}")
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


ARGUMENTS = (EvaluateArguments,)


@advising(*ANSWERING_WAYS)
def main(words: Sequence[str]) -> None:
    """Run the command: each task's result is written as soon as it is there."""
    arguments = parse_alone(words, EvaluateArguments, "sftmix evaluate")
    check_model(arguments.model, arguments.revision)
    output = output_file(arguments.model, arguments.output)
    earlier = read_evaluation(output, arguments)
    # Before the questions, some of which are fetched.
    require_harness()
    questions = {}
    for name in dict.fromkeys(arguments.tasks):
        ids = arguments.pubmedqa_ids if name == "pubmedqa" else None
        among = {"pubmedqa_ids": "^pubmedqa_ids: "}
        with Naming(f"{name}_data", other="data", among=among):
            questions[name] = read_questions(name, getattr(arguments, f"{name}_data"), ids)
    asking = {"revision": arguments.revision, "chat_template": arguments.chat_template}
    tokenizer = load_tokenizer(RunArguments(arguments.model, [], "", **asking))
    found = provenance(arguments.model, tokenizer, arguments.revision)
    came_from = {"model": arguments.model, **found}
    refuse_another_model(output, earlier, came_from)
    template = template_hash(tokenizer) if arguments.apply_chat_template else None
    details = {name: describe(arguments, one, template) for name, one in questions.items()}
    if arguments.resume:
        questions = {
            name: one
            for name, one in questions.items()
            if not done(output, earlier, name, details[name])
        }
    for name, one in ask(arguments, questions) if questions else ():
        content = merge(read_evaluation(output, arguments), arguments.model, {name: one}, details)
        write_json(output, redacted({**content, **came_from}))
        if len(questions) > 1:
            print(f"{PAPER_NAMES[name]}: {one.accuracy:.2f}, written to {output}", flush=True)
    print(table(read_evaluation(output, arguments)))
    print(f"wrote {output}" if questions else f"{output} was finished already")


def ask(
    arguments: EvaluateArguments, questions: Mapping[str, Questions]
) -> Iterator[tuple[str, Score]]:
    """Load the model and yield the score of each task.

    Raises:
        OSError: the model cannot be read.
        FloatingPointError: its likelihoods are not numbers.
    """
    model, tokenizer = load(
        arguments.model, arguments.dtype, arguments.revision, arguments.chat_template
    )
    yield from score(
        model,
        tokenizer,
        questions,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
    )


def refuse_another_model(
    path: Path, earlier: Mapping[str, Any], came_from: Mapping[str, Any]
) -> None:
    """Refuse to put results beside those of other weights, or of another tokenizer.

    Raises:
        ValueError: naming what differs.
    """
    if not earlier.get("details"):
        return
    for name in came_from[PARTS]:
        if name not in earlier:
            logger.warning(
                "%s was written by a version that kept no %s: whether its results are of this "
                "model cannot be told",
                path,
                name,
            )
        elif earlier[name] != came_from[name]:
            raise ValueError(
                f"output: {path} was started with {name} = {earlier[name]!r}, now it is "
                f"{came_from[name]!r}{what_differs(name, earlier, came_from)}; delete it, or name "
                "another file as --output"
            )


def done(path: Path, earlier: Mapping[str, Any], name: str, wanted: Mapping[str, Any]) -> bool:
    """Tell whether a task that is to be asked has its result already.

    Raises:
        ValueError: it has one of other questions or settings.
    """
    paper = PAPER_NAMES[name]
    found = earlier.get("details", {}).get(paper)
    if found is None or paper not in earlier["metrics"]:
        return False
    for key in DECISIVE:
        if found.get(key) != wanted[key]:
            raise ValueError(
                f"resume: {path} has {paper} with {key} = {found.get(key)!r}, now it is "
                f"{wanted[key]!r}; leave --resume out to ask it anew"
            )
    return True


def output_file(model: str, output: str | None) -> Path:
    """Return the file that the evaluation is written to.

    Raises:
        ValueError: the model is on the hub, and no file is named; or that file's folder is missing.
    """
    if output is None and not Path(model).is_dir():
        raise ValueError(
            f"output: expected a file: there is no folder {model!r} to put {EVALUATION} into"
        )
    path = Path(model) / EVALUATION if output is None else Path(output)
    if not path.parent.is_dir():
        raise ValueError(f"output: there is no folder {str(path.parent)!r}")
    return path


def read_evaluation(path: Path, arguments: EvaluateArguments) -> dict[str, Any]:
    """Return the content of the file so far; an empty one if it does not exist.

    Raises:
        ValueError: it is no evaluation, or that of another model in a file that was named.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"output: {path} is not JSON: {error}") from error
    # Somebody may have put in a judge's figures by hand, without details.
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise ValueError(f"output: {path} is no evaluation")
    named = arguments.output is not None and "model_hash" not in content
    if named and content.get("model") != arguments.model:
        raise ValueError(
            f"output: {path} holds the evaluation of {content.get('model')!r}, not of "
            f"{arguments.model!r}"
        )
    return content


def describe(
    arguments: EvaluateArguments, questions: Questions, template: str | None
) -> dict[str, Any]:
    """Describe what a score came from, besides the model; `template` is the template's hash."""
    return {
        "task": questions.config["task"],
        "data": questions.source,
        "data_hash": questions.data_hash,
        "template_hash": template,
        "batch_size": arguments.batch_size,
        "versions": {**versions(), "lm_eval": version("lm_eval")},
        **{name: getattr(arguments, name) for name in COMPARED},
    }


def merge(
    earlier: Mapping[str, Any],
    model: str,
    scores: Mapping[str, Score],
    details: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the file's content with the new scores, and the mean if all four were asked alike."""
    columns = ("metrics", "stderr", "num_examples", "details")
    content: dict[str, Any] = {name: dict(earlier.get(name, {})) for name in columns}
    content["model"] = model
    for name, one in scores.items():
        found = (
            one.accuracy,
            one.stderr,
            one.num_examples,
            {**details[name], "num_cut": one.num_cut, "prompts_hash": one.prompts_hash},
        )
        for column, value in zip(columns, found, strict=True):
            content[column][PAPER_NAMES[name]] = value
    metrics, known = content["metrics"], content["details"]
    metrics.pop(MEAN, None)
    names = PAPER_NAMES.values()
    alike = all(name in known for name in names) and all(
        len({known[name][key] for name in names}) == 1 for key in COMPARED
    )
    if alike:
        metrics[MEAN] = sum(metrics[name] for name in names) / len(names)
    return content


def table(content: Mapping[str, Any]) -> str:
    """Return the accuracies as they are printed."""
    rows = [("", "accuracy", "stderr", "questions")]
    for name in (*PAPER_NAMES.values(), MEAN):
        if name in content["metrics"]:
            stderr, number = content["stderr"].get(name), content["num_examples"].get(name, "")
            shown = "" if stderr is None else f"{stderr:.2f}"
            rows.append((name, f"{content['metrics'][name]:.2f}", shown, str(number)))
    return "\n".join(f"{a:<9}{b:>9}{c:>8}{d:>11}" for a, b, c, d in rows)
