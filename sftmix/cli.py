"""The command line: `sftmix COMMAND ...`."""

from __future__ import annotations

import dataclasses
import importlib
import io
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Sequence
from types import ModuleType
from typing import Any

from sftmix import __version__
from sftmix.recipe.config_file import place_of
from sftmix.runs.failures import (
    FAILED,
    USER_ERRORS,
    RankError,
    exit_code,
    near,
    printable,
    spelt,
    told,
)
from sftmix.runs.interrupts import Interrupted, handled

COMMANDS = {
    "score": "score every example during one epoch and split at the median",
    "preview": "examples as the model reads them, and the pairs as they would be mixed",
    "plan": "memory of a training step, by part, and the longest sequences that fit a GPU",
    "split": "rewrite the halves of a scored run, or make levels of them",
    "train": "train a model with SFTMix or a method it is compared with",
    "generate": "answer the questions of AlpacaEval or MT-Bench, for their judges to read",
    "evaluate": "accuracy of a saved model in the paper's medical tasks",
    "report": "runs beside each other, as one HTML file with tables and pictures",
    "schema": "JSON Schema of the files of --config, for editors and other tools",
    "data": "the formats of data that are read, each with an example",
    "demo": "the whole method on a small model, in minutes, without a GPU or a network",
    "doctor": "what is installed and what would run",
}


TRACEBACK = "--traceback"
STOPPED = "before it was done"
# The trainer's names for options of the command line.
TYPED = {
    "train_dataset": "data",
    "eval_dataset": "eval_data",
    "confident": "partition",
    "schedule": "loss_schedule",
}
# Warnings between libraries, about which a user of a command can do nothing: PEFT asks for a name
# that transformers renamed, and torch pins no memory where there is no accelerator.
LIBRARIES_SAY = (
    "`is_gradient_checkpointing` is deprecated",
    "'pin_memory' argument is set as true",
)
# A logger, and its tip for inference on a CPU with AVX512-BF16, given whenever PEFT is imported.
LOGS = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
# The failed rank has so much time to print its message and end.
RANK_ERROR_SECONDS = 5.0


def usage() -> str:
    """Return the help of `sftmix` itself."""
    rows = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
    return (
        "usage: sftmix COMMAND ... [--traceback]\n       sftmix --version\n\n"
        "Fine-tune language models with SFTMix (arXiv 2410.05248).\n\n"
        f"{rows}\n\n`sftmix COMMAND --help` shows a command's options."
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    A mistake that the user can mend (an option, an example, a file, a model) is printed in one
    message and gives 2; a run that fails on its way (a loss that is not finite, a full disk) gives
    1. `--traceback`, anywhere among the words, shows where the message came from. SIGINT gives 130
    and SIGTERM 143, with one line that says what was saved.
    """
    words = list(sys.argv[1:] if words is None else words)
    for stream in (sys.stdout, sys.stderr):
        # Data has letters that a terminal in another encoding than UTF-8 lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with handled(STOPPED):
            return _main(words)
    except Interrupted as stop:
        return _stopped(words, stop)
    except KeyboardInterrupt:
        return _stopped(words, Interrupted(signal.SIGINT, STOPPED))


def _stopped(words: list[str], stop: Interrupted) -> int:
    if os.environ.get("RANK", "0") == "0":
        command = next(word for word in words if word != TRACEBACK)
        print(f"sftmix {command}: {stop}", file=sys.stderr)
    else:
        time.sleep(RANK_ERROR_SECONDS)
    return 128 + stop.signum


def _main(words: list[str]) -> int:
    traceback = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"sftmix {__version__}")
        return 0
    command = words[0]
    if command not in COMMANDS:
        hint = near(command, [*COMMANDS, "--version", "--help"])
        print(
            f"sftmix: error: no command {printable(repr(command))}{hint}\n\n{usage()}",
            file=sys.stderr,
        )
        return 2
    _warn_on_first_rank()
    # A command's module imports transformers, which takes seconds.
    name, says = LOGS
    logging.getLogger(name).addFilter(lambda record: says not in record.getMessage())
    module = importlib.import_module(f"sftmix.commands.{command}")
    try:
        with warnings.catch_warnings():
            for message in LIBRARIES_SAY:
                warnings.filterwarnings("ignore", message)
            code: int | None = module.main(words[1:])
        sys.stdout.flush()
    except RankError:
        # A launcher ends all ranks once one has ended; the one that says why has to be the first.
        time.sleep(RANK_ERROR_SECONDS)
        if traceback:
            raise
        return FAILED
    except BrokenPipeError:
        # What read the output has closed it, as `head` does. Python would say so once more when it
        # writes out what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except USER_ERRORS as error:
        if traceback:
            raise
        text = as_typed(told(error), options_of(module), words[1:])
        print(f"sftmix {command}: error: {printable(text)}", file=sys.stderr)
        return exit_code(error)
    return code or 0


def _warn_on_first_rank() -> None:
    """Let the first rank warn for all, which read the same data and options."""
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("sftmix").setLevel(logging.ERROR)


def options_of(module: ModuleType) -> set[str]:
    """Return the names of a command's options: its dataclasses' fields, and others by name."""
    kinds: Iterable[type[Any]] = getattr(module, "ARGUMENTS", ())
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return {*fields, *(("config",) if fields else ()), *getattr(module, "OPTIONS", ())}


def as_typed(message: str, options: Collection[str], words: Sequence[str] = ()) -> str:
    """Return a message with the options that it names as the user wrote them.

    The one that it begins with becomes a flag, or the file of `--config` among `words` and the name
    in it; `layout='packed'` and `save_total_limit=1`, which are Python's, become `--layout packed`
    and `--save_total_limit 1`.
    """
    name, colon, rest = message.partition(": ")
    name = TYPED.get(name, name)
    if colon and name in options:
        message = f"{place_of(name, words)}: {rest}"
    message = re.sub(
        r"\b(\w+)=(?:'(\w+)'|(\d+))",
        lambda found: f"--{found[1]} {found[2] or found[3]}" if found[1] in options else found[0],
        message,
    )
    return spelt(message, words)
