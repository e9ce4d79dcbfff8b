"""The model card of a run: what the model was made from, what was measured, how to cite.

It is `README.md` in the run's folder, with the metadata that the Hugging Face Hub reads. Local
paths are reduced to their last name.
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedTokenizerBase

from sftmix.methods import METHODS, Method, title_of
from sftmix.runs.provenance import PARTS
from sftmix.runs.redaction import redacted
from sftmix.templates.chat import chat_template, end_of_turn
from sftmix.templates.turn_ends import stop_advice

PAPER = "https://arxiv.org/abs/2410.05248"
# https://aclanthology.org/2026.acl-long.78
CITATION = """\
@inproceedings{xiao-etal-2026-sftmix,
  title = "{SFTM}ix: Elevating Language Model Instruction Tuning with Mixup Recipe",
  author = "Xiao, Yuxin and Zhang, Shujian and Ghassemi, Marzyeh and Zhou, Wenxuan",
  booktitle = "Proceedings of the 64th Annual Meeting of the Association for Computational
    Linguistics (Volume 1: Long Papers)",
  year = "2026",
  pages = "1705--1718",
}"""
PAIRS = (
    f" ([SFTMix]({PAPER})). Mixup is between a confident and an unconfident part of the data, "
    "`lam ~ Beta(alpha, alpha)` for each `lambda_scope`"
)
# Of the last log line that has them.
LAST = (
    "loss",
    "ntp_loss",
    "mixup_loss",
    "ntp_loss_confident",
    "ntp_loss_unconfident",
    "entropy",
    "mean_token_accuracy",
    "eval_loss",
    "eval_perplexity",
    "eval_entropy",
    "eval_mean_token_accuracy",
)


def described(method: Method | None, name: str) -> str:
    """Return what a model was made by, as the end of a sentence."""
    if method is None:
        return f"the method {code_span(name)}"
    return f"{method.says}{PAIRS if method.mixed else ''}"


def model_card(
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    log: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    subsets: Mapping[str, int] | None = None,
    adapter: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """Return the card of a trained model as Markdown, with metadata in YAML before it.

    ``recipe`` is that of `manifest.recipe`, ``log`` the trainer's log history, ``seconds``
    the time trained, ``subsets`` the numbers of examples in the partition's halves or levels;
    ``adapter`` says that the folder holds a PEFT adapter and not a whole model; the chat template
    and the end of a turn are those of ``tokenizer``. What others have named is shown as text: it is
    neither Markdown nor HTML, and has no secret in it.
    """
    recipe = redacted(dict(recipe))
    name = str(recipe["method"])
    method = METHODS.get(name)
    # A method that is not known may heed all options.
    idle = method.idle_options if method else ()
    hidden = ("method", "model", "data", "sources", "reading", PARTS, *idle)
    options = {name: value for name, value in recipe.items() if name not in hidden}
    if selected := options.get("select"):
        options["select"] = ", ".join(map(_public_selection, selected))
    counts = {}
    if subsets:
        counts = {f"{', '.join(subsets)} examples": ", ".join(map(str, subsets.values()))}
    mixed = method is not None and method.mixed
    model, data = public_name(recipe["model"]), [public_name(name) for name in recipe["data"]]
    return (
        "\n\n".join(
            [
                f"---\n{_metadata(recipe, adapter=adapter, mixed=mixed).to_yaml()}\n---",
                f"# {plain(model)}, fine-tuned with {plain(title_of(name))}",
                f"{'An adapter of' if adapter else 'Made from'} {code_span(model)} on "
                f"{', '.join(map(code_span, data))} by {described(method, name)}.",
                *(() if tokenizer is None else _of_turns(tokenizer)),
                "## Recipe",
                _table(("option", "value"), {**options, **counts}),
                "## Measured",
                _table(("figure", "value"), figures(log, seconds)),
                "Losses and entropies are means over response tokens, in nats; accuracy is the "
                "share of them whose label is the most likely token. Figures of training are of "
                "the last log line.",
                "## Versions",
                _table(("package", "version"), versions),
                *(("## Citation", f"```bibtex\n{CITATION}\n```") if mixed else ()),
            ]
        )
        + "\n"
    )


def _of_turns(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return how the model is asked, and what ends its answers."""
    template = chat_template(tokenizer)
    try:
        end = end_of_turn(tokenizer)
        says = f"It ends its turns with {code_span(end)}. {stop_advice(tokenizer)} " if end else ""
    except ValueError:  # the template wants more than a question and an answer
        says = ""
    return ["## Turns", f"{says}It was trained with this chat template:", fenced(template)]


def figures(log: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Return what was measured: last losses, median speed, peak memory, time trained."""
    found = {name: line[name] for name in LAST for line in log if name in line}
    speeds = [line["tokens_per_second"] for line in log if "tokens_per_second" in line]
    peaks = [line["peak_memory_gib"] for line in log if "peak_memory_gib" in line]
    if speeds:
        found["tokens per second, median"] = statistics.median(speeds)
        found["peak memory, GiB"] = max(peaks)
    return {**found, "seconds of training": seconds}


def public_name(name: str) -> str:
    """Return a hub name as it is, and of a path only the last part."""
    return Path(name).name if _is_local(name) else name


def _public_selection(text: str) -> str:
    kind, _, file = text.partition(":")
    return f"{kind}:{public_name(file)}" if kind == "keys" else text


def _is_local(name: str) -> bool:
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    is_file = name.endswith((".json", ".jsonl", ".parquet"))
    return not on_hub or is_file or Path(name).exists()


def _metadata(recipe: Mapping[str, Any], *, adapter: bool, mixed: bool) -> ModelCardData:
    return ModelCardData(
        base_model=None if _is_local(recipe["model"]) else recipe["model"],
        datasets=[name for name in recipe["data"] if not _is_local(name)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*(["sftmix"] if mixed else []), "sft"],
    )


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join(
        lines + [f"| {plain(name)} | {_shown(value)} |" for name, value in rows.items()]
    )


def _shown(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return "-" if value is None else plain(f"{value:.6g}" if isinstance(value, float) else value)


# What others have named, as text.

# Of Markdown what begins a span, a link, a cell, a tag or an entity within a line.
MARKUP = re.compile(r"[\\`*\[\]|<>&~$]")


def plain(value: Any) -> str:
    r"""Return text that Markdown shows as it is, in one line.

    >>> plain("<b>[x](http://y)|")
    '&lt;b&gt;\\[x\\](http://y)\\|'
    """
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return MARKUP.sub(lambda one: entities.get(one[0], f"\\{one[0]}"), _line(value))


def code_span(value: Any) -> str:
    r"""Return a code span of any text, in one line: its fence is longer than any in the text.

    >>> code_span("a`b")
    '``a`b``'
    """
    text = _line(value)
    fence = "`" * (_longest_run(text) + 1)
    # A space parts the fence from a tick, and is not shown; nothing else is a span of its own.
    space = " " if not text.strip() or text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(text: str) -> str:
    """Return a code block of any text; control characters are shown as �."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}jinja\n{_visible(text)}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _line(value: Any) -> str:
    return " ".join(_visible(str(value)).split("\n"))


def _visible(text: str) -> str:
    """Return the text without what a terminal or a browser would obey and nobody sees."""
    text = re.sub("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]", "\n", text).replace("\t", "    ")
    return "".join(
        "\ufffd" if one != "\n" and unicodedata.category(one) in ("Cc", "Cf", "Cs") else one
        for one in text
    )
