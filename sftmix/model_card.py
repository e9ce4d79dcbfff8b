"""The model card of a run: what the model was made from, what was measured, how to cite.

It is `README.md` in the run's folder, with the metadata that the Hugging Face Hub reads. Local
paths are reduced to their last name.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sftmix.config import MIXED, OF_MIXUP

FILE = "README.md"
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
    "between a confident and an unconfident part of the data, `lam ~ Beta(alpha, alpha)` for each "
    "`lambda_scope`"
)
METHODS = {
    "sftmix": f"[SFTMix]({PAPER}): next-token prediction plus `mu` times Mixup {PAIRS}",
    "equal": f"an ablation of [SFTMix]({PAPER}): next-token prediction plus Mixup {PAIRS}",
    "mixup": f"an ablation of [SFTMix]({PAPER}): Mixup alone, {PAIRS}",
    "ntp": "next-token prediction",
    "ir_dro": "IR-DRO: next-token prediction, each example weighted by the softmax over the batch "
    "of its mean token loss, divided by `kl_reg`",
}
NAMES = {
    "sftmix": "SFTMix",
    "ntp": "NTP",
    "ir_dro": "IR-DRO",
    "equal": "NTP and Mixup",
    "mixup": "Mixup",
}
# Of the last log line that has them.
LAST = (
    "loss",
    "ntp_loss",
    "mixup_loss",
    "ntp_loss_confident",
    "ntp_loss_unconfident",
    "eval_loss",
    "eval_perplexity",
)
OF_MU = ("mu", "mu_schedule", "mu_warmup_ratio")


def idle_options(method: str) -> tuple[str, ...]:
    """The options that a method does not heed."""
    return (
        *(() if method == "sftmix" else OF_MU),
        *(() if method in MIXED else set(OF_MIXUP) - set(OF_MU)),
        *(() if method == "ir_dro" else ("kl_reg",)),
    )


def model_card(
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    log: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    subsets: Mapping[str, int] | None = None,
    adapter: bool = False,
) -> str:
    """The card of a trained model as Markdown, with metadata in YAML before it.

    ``recipe`` is that of `sftmix.manifest.recipe`, ``log`` the trainer's log history, ``seconds``
    the time trained, ``subsets`` the numbers of examples in the partition's halves or levels;
    ``adapter`` says that the folder holds a PEFT adapter and not a whole model.
    """
    method = recipe["method"]
    hidden = ("method", "model", "data", *idle_options(method))
    options = {name: value for name, value in recipe.items() if name not in hidden}
    if selected := options.get("select"):
        options["select"] = ", ".join(map(_public_selection, selected))
    counts = {}
    if subsets:
        counts = {f"{', '.join(subsets)} examples": ", ".join(map(str, subsets.values()))}
    by = METHODS.get(method, f"the method `{method}`")
    model, data = public_name(recipe["model"]), [public_name(name) for name in recipe["data"]]
    return (
        "\n\n".join(
            [
                f"---\n{_metadata(recipe, adapter=adapter).to_yaml()}\n---",
                f"# {model}, fine-tuned with {NAMES.get(method, method)}",
                f"{'An adapter of' if adapter else 'Made from'} `{model}` on "
                f"{', '.join(f'`{name}`' for name in data)} by {by}.",
                "## Recipe",
                _table(("option", "value"), {**options, **counts}),
                "## Measured",
                _table(("figure", "value"), figures(log, seconds)),
                "Losses are means over response tokens, in nats; those of training are of the last "
                "log line.",
                "## Versions",
                _table(("package", "version"), versions),
                *(("## Citation", f"```bibtex\n{CITATION}\n```") if method in MIXED else ()),
            ]
        )
        + "\n"
    )


def figures(log: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """What was measured: last losses, median speed, peak memory, time trained."""
    found = {name: line[name] for name in LAST for line in log if name in line}
    speeds = [line["tokens_per_second"] for line in log if "tokens_per_second" in line]
    peaks = [line["peak_memory_gib"] for line in log if "peak_memory_gib" in line]
    if speeds:
        found["tokens per second, median"] = statistics.median(speeds)
        found["peak memory, GiB"] = max(peaks)
    return {**found, "seconds of training": seconds}


def public_name(name: str) -> str:
    """A hub name as it is; of a path its last part alone."""
    return Path(name).name if _is_local(name) else name


def _public_selection(text: str) -> str:
    kind, _, file = text.partition(":")
    return f"{kind}:{public_name(file)}" if kind == "keys" else text


def _is_local(name: str) -> bool:
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    is_file = name.endswith((".json", ".jsonl", ".parquet"))
    return not on_hub or is_file or Path(name).exists()


def _metadata(recipe: Mapping[str, Any], *, adapter: bool) -> ModelCardData:
    return ModelCardData(
        base_model=None if _is_local(recipe["model"]) else recipe["model"],
        datasets=[name for name in recipe["data"] if not _is_local(name)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*(["sftmix"] if recipe["method"] in MIXED else []), "sft"],
    )


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {_shown(value)} |" for name, value in rows.items()])


def _shown(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return "-" if value is None else text.replace("|", "\\|").replace("\n", " ")
