"""`sftmix evaluate`: the paper's medical evaluation of a saved model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.runs import write_json
from sftmix.tasks import PAPER_NAMES

if TYPE_CHECKING:  # brings transformers, which takes seconds to import
    from sftmix.medical import Questions, Score

FILE = "evaluation.json"
MEAN = "mean"
# What two tasks must have in common for a mean over them.
COMPARED = ("limit", "apply_chat_template", "dtype")


def main(words: Sequence[str]) -> None:
    """Run the command."""
    arguments = parse(words)
    output = output_file(arguments.model, arguments.output)
    read_evaluation(output, arguments)
    from sftmix.medical import load, read_questions, require_harness, score

    questions = {}
    for name in dict.fromkeys(arguments.tasks):
        ids = arguments.pubmedqa_ids if name == "pubmedqa" else None
        questions[name] = read_questions(name, getattr(arguments, f"{name}_data"), ids)
    require_harness()
    model, tokenizer = load(arguments.model, arguments.dtype)
    scores = score(
        model,
        tokenizer,
        questions,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
    )
    details = {name: describe(arguments, one) for name, one in questions.items()}
    content = merge(read_evaluation(output, arguments), arguments.model, scores, details)
    write_json(output, content)
    print(table(content))
    print(f"wrote {output}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command's arguments.

    Raises:
        ValueError: an unknown task, or a number below 1.
        SystemExit: unknown or missing flags, or help was asked for.
    """
    parser = argparse.ArgumentParser(
        prog="sftmix evaluate",
        description="Accuracy in the paper's medical tasks, by lm-evaluation-harness, without "
        "examples in the prompt. The tasks asked for are added to those in the file.",
        allow_abbrev=False,
    )

    def add(flag: str, **options: Any) -> None:
        parser.add_argument(*dict.fromkeys((flag, f"--{flag[2:].replace('_', '-')}")), **options)

    add("--model", required=True, help="Folder of a run or hub name; an adapter's folder, too")
    add(
        "--tasks",
        nargs="+",
        default=list(PAPER_NAMES),
        help=f"Some of {', '.join(PAPER_NAMES)} (default: all)",
    )
    add("--medqa_data", help="Rows of GBaker/MedQA-USMLE-4-options-hf (default: from the hub)")
    add("--medqa_5_data", help="Rows of fzkuji/MedQA, or of the first release (default: the hub)")
    add("--medmcqa_data", help="Rows of openlifescienceai/medmcqa (default: from the hub)")
    add("--pubmedqa_data", help="ori_pqal.json of github.com/pubmedqa/pubmedqa")
    add("--pubmedqa_ids", help="Its test_ground_truth.json, or any JSON list of ids")
    add("--output", help=f"File to write or to add to (default: {FILE} in the model's folder)")
    add("--batch_size", type=int, default=8, help="Prompts at once [ours] (default: 8)")
    add("--limit", type=int, help="Only the first questions of each task (default: all)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="Dtype of the weights; auto: as saved [ours] (default: auto)",
    )
    add(
        "--apply_chat_template",
        action="store_true",
        help="Ask in the model's chat template; without, as the harness does by default [ours] "
        "(default: off)",
    )
    arguments = parser.parse_args(words)
    for name in arguments.tasks:
        if name not in PAPER_NAMES:
            raise ValueError(f"tasks: expected some of {', '.join(PAPER_NAMES)}, got {name!r}")
    for name in ("batch_size", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    return arguments


def output_file(model: str, output: str | None) -> Path:
    """Where the evaluation goes.

    Raises:
        ValueError: the model is no folder, and no file is named; or that file's folder is missing.
    """
    if output is None and not Path(model).is_dir():
        raise ValueError(f"output: {model!r} is no folder to put {FILE} into; name a file")
    path = Path(model) / FILE if output is None else Path(output)
    if not path.parent.is_dir():
        raise ValueError(f"output: there is no folder {str(path.parent)!r}")
    return path


def read_evaluation(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file holds so far; nothing where there is none.

    Raises:
        ValueError: it is no evaluation, or that of another model in a file that was named.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"output: {path} is not JSON: {error}") from error
    if not isinstance(content, dict) or "metrics" not in content or "details" not in content:
        raise ValueError(f"output: {path} is no evaluation")
    if arguments.output is not None and content["model"] != arguments.model:
        raise ValueError(
            f"output: {path} holds the evaluation of {content['model']!r}, not of "
            f"{arguments.model!r}"
        )
    return content


def describe(arguments: argparse.Namespace, questions: Questions) -> dict[str, Any]:
    """What a score came from, besides the model."""
    from sftmix.manifest import versions

    return {
        "task": questions.config["task"],
        "data": questions.source,
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
    """The file's content with the new scores; the mean where all four were asked alike."""
    columns = ("metrics", "stderr", "num_examples", "details")
    content: dict[str, Any] = {name: dict(earlier.get(name, {})) for name in columns}
    content["model"] = model
    for name, score in scores.items():
        found = (
            score.accuracy,
            score.stderr,
            score.num_examples,
            {**details[name], "num_cut": score.num_cut, "prompts_hash": score.prompts_hash},
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
    """The accuracies as they are printed."""
    rows = [("", "accuracy", "stderr", "questions")]
    for name in (*PAPER_NAMES.values(), MEAN):
        if name in content["metrics"]:
            stderr, number = content["stderr"].get(name), content["num_examples"].get(name, "")
            shown = "" if stderr is None else f"{stderr:.2f}"
            rows.append((name, f"{content['metrics'][name]:.2f}", shown, str(number)))
    return "\n".join(f"{a:<9}{b:>9}{c:>8}{d:>11}" for a, b, c, d in rows)
