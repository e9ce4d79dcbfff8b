"""Parse command-line arguments: dataclasses, YAML files and help.

A YAML file (`--config`, see `config_file.py`) is read as if it had been typed before the flags:
flags override it, and both are checked alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from transformers import HfArgumentParser, TrainingArguments
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from sftmix.data.columns import parse_columns
from sftmix.data.files import EXPECTED, check_encoding
from sftmix.data.mixture import check_weights
from sftmix.data.sources import is_file
from sftmix.data.splits import names_of
from sftmix.data.weighting import ByConfidence, parse_weight
from sftmix.methods import OPTIONS, method_of
from sftmix.recipe.config_file import config_words, place_of
from sftmix.runs.failures import Naming, OneMessage, OneSpelling, spelt
from sftmix.training.config import EVALUATED, ScoreConfig, SFTMixConfig, SFTMixOptions, option

logger = logging.getLogger(__name__)

# The commands have flags of their own in place of these of transformers.
ELSEWHERE = {"output_dir": "the folder as --output", "resume_from_checkpoint": "--resume"}

# Names of options in other tools or in other versions of transformers, and ours.
CALLED = {
    "--warmup_ratio": "--warmup_steps, a share of all steps where below 1",
    "--batch_size": "--per_device_train_batch_size",
    "--epochs": "--num_train_epochs",
    "--lr": "--learning_rate",
    "--max_seq_length": "--max_length",
    "--no_cuda": "--use_cpu true",
    # Before transformers 5.23.
    "--activation_checkpointing": "--gradient_checkpointing",
}

# argparse's words for an option that takes several values.
SEVERAL = ("+", "*")

CHAT_TEMPLATE_HELP = (
    "Jinja file of the chat template, or a folder with chat_template.jinja; by default the model's "
    "own, or a plain one"
)
CONFIG_HELP = (
    "YAML file with the names of the flags, which override it. A mapping named after a command "
    "holds values for that command (score: {output: ...}, train: {output: ...}); include: names a "
    "YAML file in the same folder, whose values come first"
)


REVISION_HELP = "Branch, tag or commit of a model on the hub; the manifest keeps the commit"


def check_split(option_name: str, split: str, names: Sequence[str]) -> None:
    """Refuse a split of what has none.

    Raises:
        ValueError: `split` is empty or no split, or is not of the default one and one of `names`
            is a file.
    """
    if not split:
        raise ValueError(f"{option_name}: expected a name, got an empty one")
    with Naming(option_name):
        splits = names_of(split)
    file = next((name for name in names if is_file(name)), None)
    if set(splits) != {"train"} and file is not None:
        raise ValueError(
            f"{option_name}: expected a folder or a data set with splits, got {split!r} of the "
            f"file {file}, which has only 'train'; leave --{option_name} out"
        )


@dataclasses.dataclass
class RunArguments:
    """The arguments of every command that runs a model."""

    model: str = dataclasses.field(metadata={"help": "Folder or hub name of the model"})
    data: list[str] = dataclasses.field(
        metadata={
            "help": f"Data files ({EXPECTED}), patterns or folders of them, or names of data sets: "
            "NAME, NAME@REVISION, or NAME:CONFIG if it has several configs"
        }
    )
    output: str = dataclasses.field(metadata={"help": "Folder of the run; must be new or empty"})
    data_split: str = option(
        "train",
        "Split to read of a folder or a data set in --data, or a part of it, also of a file: "
        "'train[:1000]', 'train[10%%:20%%]', 'train+validation'",
        "ours",
    )
    select: list[str] | None = option(
        None,
        "Examples to keep, one selection after another: score>=NUMBER:COLUMN (or > <= <), "
        "longest:NUMBER (responses, in characters), keys:FILE (data, or a .txt of ids or content "
        "hashes)",
        "ours",
    )
    weights: list[float] | None = option(
        None,
        "Share of each of --data in the mixture, a positive number for each: all examples are "
        "used, and copies fill up the shares; by default the data are taken as they are",
        "ours",
    )
    resume: bool = option(False, "Go on with the run in --output", "ours")
    chat_template: str | None = option(None, CHAT_TEMPLATE_HELP, "ours")
    max_length: int = option(2048, "Longest sequence in tokens; the response's tail is cut", "ours")
    on_bad_row: Literal["error", "skip", "mend"] = option(
        "error",
        "Stop at a malformed row, or leave such rows out, or mend conversations that end with the "
        "user or the like and leave out the rest; what is changed is counted",
        "ours",
    )
    columns: str | None = option(
        None,
        "Names of the columns of data in a format that is not known: "
        "prompt=NAME,response=NAME,system=NAME or messages=NAME,role=FIELD,content=FIELD (a "
        "mapping in YAML); `sftmix data --formats` shows the formats that are known",
        "ours",
    )
    train_on: Literal["responses", "all"] = option(
        "responses",
        "Learn the responses, or every token of the whole text of a column 'text'",
        "ours",
    )
    dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32",
        "Dtype of the weights; --bf16 true adds bfloat16 autocast to float32. Weights in bfloat16 "
        "lose small updates, unless --optim adamw_torch_8bit --optim_args "
        "bf16_stochastic_round=True (torchao) rounds them at random",
        "ours",
    )
    attn_implementation: str | None = option(
        None,
        "Implementation of attention, as in from_pretrained: sdpa, flash_attention_2, eager, ...; "
        "by default transformers' choice",
        "ours",
    )
    lora_rank: int | None = option(
        None,
        "Train LoRA's updates of this rank instead of the model, and save an adapter",
        "ours",
    )
    lora_alpha: float | None = option(
        None, "Scale LoRA's updates by alpha / rank; by default alpha = 2 * rank", "ours"
    )
    lora_dropout: float = option(0.0, "Dropout before LoRA's updates", "ours")
    lora_targets: list[str] | None = option(
        None,
        "Names of the layers that get updates; by default all linear ones except the head",
        "ours",
    )
    load_in_4bit: bool = option(
        False,
        "QLoRA: hold the frozen weights in 4 bits (NF4, bitsandbytes), with --lora_rank; the head "
        "and the embeddings stay in --dtype",
        "ours",
    )
    revision: str | None = option(None, REVISION_HELP, "ours")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model; a config file cannot ask for it", "ours"
    )
    encoding: str = option(
        "utf-8", "Encoding of text files in --data and --eval_data: latin-1, utf-16, ...", "ours"
    )
    streaming: bool = option(
        False,
        "Read data sets of the hub as they arrive, without a copy on disk: for a --data_split "
        "'train[:1000]' of many",
        "ours",
    )

    def __post_init__(self) -> None:
        check_weights(self.weights, self.data)
        check_split("data_split", self.data_split, self.data)
        if self.columns is not None:
            parse_columns(self.columns)
        check_encoding(self.encoding)
        if not 2 <= self.max_length < 2**31:
            raise ValueError(
                f"max_length: expected at least 2, a token of prompt and one of response, and "
                f"below 2^31, got {self.max_length}"
            )


@dataclasses.dataclass
class TrainRunArguments(RunArguments):
    """The arguments of `sftmix train` besides `SFTMixConfig`."""

    partition: str | None = option(
        None, "confidence.parquet of `sftmix score`; needed for a method with Mixup", "ours"
    )
    weight: str | None = option(
        None,
        "Weights of the examples' losses: column:NAME; confidence:A:B, linear in the rank of "
        "confidence in --partition, from A for the least confident to B for the most; none. By "
        "default a column 'weight' where the data have one",
        "ours",
    )
    eval_data: list[str] | None = option(
        None, "Held-out data, named as in --data, to evaluate on at the end", "ours"
    )
    eval_split: str = option(
        "train", "Split to read of a folder or a data set in --eval_data", "ours"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_split("eval_split", self.eval_split, self.eval_data or ())
        self._check_partition()
        if isinstance(parse_weight(self.weight), ByConfidence) and self.partition is None:
            raise ValueError(
                "weight: expected --partition RUN/confidence.parquet of `sftmix score` with it, "
                f"got {self.weight!r} and none"
            )

    def _check_partition(self) -> None:
        if self.partition is not None and not Path(self.partition).is_file():
            is_folder = bool(self.partition) and Path(self.partition).is_dir()
            found = "the folder" if is_folder else "no such file:"
            raise ValueError(
                "partition: expected the confidence.parquet of a run of `sftmix score`, got "
                f"{found} {self.partition!r}"
            )


def parse(
    words: Sequence[str], run_type: type[RunArguments], config_type: type[SFTMixConfig], prog: str
) -> tuple[Any, Any]:
    """Return the run arguments and the training config of a command.

    `--help` shows the options that this project defines or gives another default; `--help-all`
    adds the rest of `transformers.TrainingArguments`.

    Raises:
        ValueError: a value that the config refuses.
        SystemExit: unknown or missing flags, or help was asked for.
    """
    parser = parser_of([run_type, config_type], prog, words)
    typed = {word.partition("=")[0].replace("-", "_") for word in words}
    for name in refused_options(config_type):
        if f"__{name}" in typed:
            raise ValueError(
                f"{name}: expected no such option, {prog} trains with next-token prediction, which "
                "does not use it; leave it out"
            )
    words = with_config(words, parser)
    parser.add_argument("--help-all", action="help", help="also show transformers' own options")
    if "--help-all" not in words:
        _hide_inherited(parser, config_type)
    given = {word.split("=")[0].replace("-", "_") for word in words}
    for name, instead in ELSEWHERE.items():
        if f"__{name}" in given:
            parser.error(f"argument --{name}: give {instead}")
    output = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    output.add_argument("--output", default="")
    folder = output.parse_known_args(words)[0].output
    run, config = parsed(parser, [*words, "--output_dir", folder])
    check_evaluation(run, config)
    idle = method_of(config.method).idle_options
    unused = [f"--{name}" for name in sorted(idle) if f"__{name}" in typed]
    if unused:
        names = spelt(", ".join(unused), parser.words)
        logger.warning("not used by --method %s: %s", config.method, names)
    _show_bars(not config.disable_tqdm)
    return run, config


def check_evaluation(run: RunArguments, config: SFTMixConfig) -> None:
    """Refuse options of an evaluation that there is nothing for.

    Raises:
        ValueError: there is no `--eval_data`, no evaluation while training, or no such metric.
    """
    for name in ("eval_strategy", "eval_on_start"):
        value = getattr(config, name)
        if value not in ("no", False) and not getattr(run, "eval_data", None):
            way_out = "expected --eval_data with it" if "eval_data" in vars(run) else "leave it out"
            value = getattr(value, "value", value)
            raise ValueError(f"{name}: there is nothing to evaluate, got {value}; {way_out}")
    if config.metric_for_best_model is not None and config.eval_strategy == "no":
        raise ValueError(
            "metric_for_best_model: expected --eval_strategy epoch or steps with it, got only "
            f"{config.metric_for_best_model!r}"
        )
    known = [f"{prefix}{name}" for prefix in ("eval_", "") for name in EVALUATED]
    if config.metric_for_best_model not in (None, *known):
        raise ValueError(
            f"metric_for_best_model: expected one of {', '.join(known[: len(EVALUATED)])}, got "
            f"{config.metric_for_best_model!r}"
        )


def parse_alone(words: Sequence[str], arguments_type: type[Any], prog: str) -> Any:
    """Return the arguments of a command that trains nothing: one dataclass with `disable_tqdm`.

    Raises:
        ValueError: a value that the dataclass refuses.
        SystemExit: unknown or missing flags, or help was asked for.
    """
    parser = parser_of([arguments_type], prog, words)
    words = with_config(words, parser)
    (arguments,) = parsed(parser, words)
    _show_bars(not arguments.disable_tqdm)
    return arguments


def parsed(parser: _Parser, words: Sequence[str]) -> list[Any]:
    """Return the parser's dataclasses, filled in.

    Raises:
        ValueError: a word is no option, or a dataclass refuses a value.
    """
    *filled, rest = parser.parse_args_into_dataclasses(
        words, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown := parser.unknown(rest):
        raise ValueError(unknown)
    # The rest is the namespace of --config, which has been read.
    return [one for one in filled if dataclasses.is_dataclass(one)]


def with_config(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the words of the `--config` file followed by the typed ones.

    Raises:
        ValueError: as `config_words` does.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    given, rest = first.parse_known_args(words)
    if given.config is None:
        return rest
    takes = config_options(parser)
    single = [name for name, action in takes.items() if action.nargs not in SEVERAL]
    training = {
        field.name for cls in (TrainRunArguments, ScoreConfig) for field in dataclasses.fields(cls)
    }
    command = parser.prog.split()[-1]
    # `sftmix plan` plans a training, and `sftmix preview` shows what it would read.
    command = "train" if command in ("plan", "preview") else command
    with Naming("config"):
        typed = config_words(given.config, command, takes, training, single=single)
    return [*typed, *rest]


def config_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options that a config file may name, in each spelling."""
    return {
        flag.lstrip("-"): action
        for flag, action in parser._option_string_actions.items()
        # --help and --no_X take no value, and nobody would read another config file.
        if action.nargs != 0 and action.dest != "config"
    }


class _Help(OneSpelling, argparse.ArgumentDefaultsHelpFormatter):
    pass


class _Parser(OneMessage, HfArgumentParser):
    """A parser that names the config file where a wrong value comes from it."""

    called = CALLED

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        if found := re.match(r"argument --(\w+)(/\S+)?: ", message):
            message = f"{place_of(found[1], self.words)}: {message[found.end() :]}"
        super().error(message)


def parser_of(types: Sequence[type[Any]], prog: str, words: Sequence[str] = ()) -> _Parser:
    """Return the parser of a command's dataclasses, which knows the words that were typed."""
    parser = _Parser(cast(Any, list(types)), prog=prog, formatter_class=_Help)
    parser.words = words
    parser.add_argument("--config", help=CONFIG_HELP)
    for action in parser._actions:
        if action.required:
            action.default = argparse.SUPPRESS
    return parser


def _show_bars(show: bool) -> None:
    # transformers shows bars of its own when it reads and writes weights.
    if show:
        enable_progress_bar()
    else:
        disable_progress_bar()


def refused_options(config_type: type[SFTMixConfig]) -> set[str]:
    """Return the options that a command does not have: a reference model is trained with NTP,
    without smoothing."""
    return set(OPTIONS) if issubclass(config_type, ScoreConfig) else set()


def _hide_inherited(parser: argparse.ArgumentParser, config_type: type[SFTMixConfig]) -> None:
    ours = {
        name
        for base in config_type.__mro__
        if issubclass(base, SFTMixOptions)
        for name in base.__annotations__
    }
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)} - ours
    for action in parser._actions:
        # `--no_X` has the help text of `--X`, which is its opposite.
        negated = action.const is False
        hidden = {*inherited, *refused_options(config_type), "remove_unused_columns"}
        if negated or action.dest in hidden:
            action.help = argparse.SUPPRESS
