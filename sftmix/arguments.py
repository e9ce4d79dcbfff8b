"""Command-line arguments: dataclasses, YAML files and help.

A YAML file (``--config``, see `config_file.py`) is read as if it had been typed before the flags,
so that flags override it and both are checked alike.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast

from transformers import HfArgumentParser, TrainingArguments
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from sftmix.config import OF_MIXUP, SFTMixConfig, SFTMixOptions, option
from sftmix.config_file import config_words

# Flags of transformers that the commands have flags of their own for.
ELSEWHERE = {"output_dir": "the folder as --output", "resume_from_checkpoint": "--resume"}

CHAT_TEMPLATE_HELP = (
    "Jinja file of the chat template, or a folder with chat_template.jinja; by default the model's "
    "own, or a plain one"
)
CONFIG_HELP = (
    "YAML file with the same names; flags override it. What a mapping named after a command holds "
    "is that command's own (score: {output: ...}, train: {output: ...}); include: names a file "
    "whose values come first"
)


@dataclasses.dataclass
class RunArguments:
    """What every command that runs a model needs."""

    model: str = dataclasses.field(metadata={"help": "Folder or hub name of the model"})
    data: list[str] = dataclasses.field(
        metadata={"help": "Data files (.json, .jsonl, .parquet) or the name of a data set"}
    )
    output: str = dataclasses.field(metadata={"help": "Folder of the run; must be new or empty"})
    data_split: str = option("train", "Split of a data set that --data names", "ours")
    select: list[str] | None = option(
        None,
        "Rows to keep, one selection after another: score>=NUMBER:COLUMN (or > <= <), "
        "longest:NUMBER (responses, in characters), keys:FILE (data, or a .txt of ids or content "
        "hashes)",
        "ours",
    )
    resume: bool = option(False, "Go on with the run in --output", "ours")
    chat_template: str | None = option(None, CHAT_TEMPLATE_HELP, "ours")
    max_length: int = option(2048, "Longest sequence in tokens; the response's tail is cut", "ours")
    on_bad_row: Literal["error", "skip"] = option(
        "error", "A malformed row stops the run, or is left out and counted", "ours"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32", "Dtype of the weights; --bf16 true adds bfloat16 autocast", "ours"
    )
    attn_implementation: str | None = option(
        None,
        "How attention is computed, as in from_pretrained: sdpa, flash_attention_2, eager, ...; "
        "by default transformers' choice",
        "ours",
    )
    lora_rank: int | None = option(
        None,
        "Train LoRA's updates of this rank, the model stays as it is; saves an adapter",
        "ours",
    )
    lora_alpha: float | None = option(
        None, "LoRA's updates are scaled by alpha / rank; by default alpha = 2 * rank", "ours"
    )
    lora_dropout: float = option(0.0, "Dropout before LoRA's updates", "ours")
    lora_targets: list[str] | None = option(
        None,
        "Names of the layers that get updates; by default all linear ones but the head",
        "ours",
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model", "ours")


@dataclasses.dataclass
class TrainRunArguments(RunArguments):
    """`sftmix train` besides `SFTMixConfig`."""

    partition: str | None = option(
        None, "confidence.parquet of `sftmix score`; needed for a method with Mixup", "ours"
    )
    eval_data: list[str] | None = option(None, "Held-out data files, scored at the end", "ours")
    eval_split: str = option("train", "Split of a data set that --eval_data names", "ours")


@dataclasses.dataclass
class ScoreConfig(SFTMixConfig):
    """Training of the reference model: one epoch of next-token prediction."""

    method: Literal["ntp"] = option("ntp", "The reference model is trained with NTP", "paper")
    num_train_epochs: float = option(1.0, "The confidence is that of one epoch", "paper")
    num_scorings: int = option(
        5,
        "C, evenly spaced scorings, the last at the end; on a GPU in bfloat16, also where the "
        "training is in float32",
        "ours",
    )
    checkpoint_scorings: bool = option(
        True,
        "Write a checkpoint before each scoring, so that a killed run goes on in the midst of it",
        "ours",
    )
    save_strategy: str = option(
        "no",
        "When to write other checkpoints: no, steps, epoch; with no, those of the scorings are "
        "deleted once confidence.parquet is there",
        "ours",
    )
    save_total_limit: int | None = option(
        1, "Checkpoints kept, the newest, while the run goes on", "ours"
    )

    def __post_init__(self) -> None:
        if self.method != "ntp" or self.num_train_epochs != 1 or self.max_steps > 0:
            raise ValueError(
                "score: expected method 'ntp', 1 epoch and no max_steps, "
                f"got {self.method!r}, {self.num_train_epochs} and {self.max_steps}"
            )
        super().__post_init__()


def parse(
    words: Sequence[str], run_type: type[RunArguments], config_type: type[SFTMixConfig], prog: str
) -> tuple[Any, Any]:
    """Run arguments and training config of a command.

    ``--help`` shows the options that this project defines or gives another default; ``--help-all``
    adds the rest of `transformers.TrainingArguments`.

    Raises:
        ValueError: a value that the config refuses.
        SystemExit: unknown or missing flags, or help was asked for.
    """
    parser = _parser([run_type, config_type], prog)
    words = with_config(words, parser)
    parser.add_argument("--help-all", action="help", help="also show transformers' own options")
    if "--help-all" not in words:
        _hide_inherited(parser, config_type)
    given = {word.split("=")[0].replace("-", "_") for word in words}
    for name, instead in ELSEWHERE.items():
        if f"__{name}" in given:
            parser.error(f"--{name}: give {instead}")
    output = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    output.add_argument("--output", default="")
    folder = output.parse_known_args(words)[0].output
    run, config, _ = parser.parse_args_into_dataclasses(
        [*words, "--output_dir", folder], look_for_args_file=False
    )
    _show_bars(not config.disable_tqdm)
    return run, config


def parse_alone(words: Sequence[str], arguments_type: type[Any], prog: str) -> Any:
    """The arguments of a command that trains nothing: one dataclass, with ``disable_tqdm`` in it.

    Raises:
        ValueError: a value that the dataclass refuses.
        SystemExit: unknown or missing flags, or help was asked for.
    """
    parser = _parser([arguments_type], prog)
    words = with_config(words, parser)
    arguments, _ = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    _show_bars(not arguments.disable_tqdm)
    return arguments


def with_config(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words, those of the ``--config`` file before the others.

    Raises:
        ValueError: as `config_words` does.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    given, rest = first.parse_known_args(words)
    if given.config is None:
        return rest
    options = {flag.lstrip("-") for flag in parser._option_string_actions}
    training = {
        field.name for cls in (TrainRunArguments, ScoreConfig) for field in dataclasses.fields(cls)
    }
    command = parser.prog.split()[-1]
    # A plan is of a training.
    command = "train" if command == "plan" else command
    return [*config_words(given.config, command, options, training), *rest]


def _parser(types: list[type[Any]], prog: str) -> HfArgumentParser:
    parser = HfArgumentParser(cast(Any, types), prog=prog, allow_abbrev=False)
    parser.add_argument("--config", help=CONFIG_HELP)
    for action in parser._actions:
        if action.required:
            action.default = argparse.SUPPRESS
    return parser


def _show_bars(show: bool) -> None:
    # Reading and writing weights has bars of its own.
    if show:
        enable_progress_bar()
    else:
        disable_progress_bar()


def _hide_inherited(parser: argparse.ArgumentParser, config_type: type[SFTMixConfig]) -> None:
    ours = {
        name
        for base in config_type.__mro__
        if issubclass(base, SFTMixOptions)
        for name in base.__annotations__
    }
    # A reference model is trained with NTP.
    idle = {*OF_MIXUP, "kl_reg"} if issubclass(config_type, ScoreConfig) else set()
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)} - ours
    for action in parser._actions:
        # `--no_X` comes with the help text of `--X`, whose opposite it is.
        negated = action.const is False
        if negated or action.dest in inherited | idle | {"remove_unused_columns"}:
            action.help = argparse.SUPPRESS
