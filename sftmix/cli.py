"""The command line: `sftmix COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence

COMMANDS = {
    "score": "score every example during one epoch and split at the median",
    "plan": "memory of a training step, by part, and the longest sequences that fit a GPU",
    "split": "rewrite the halves of a scored run, or make levels of them",
    "train": "train a model with SFTMix or a method it is compared with",
    "generate": "answer the questions of AlpacaEval or MT-Bench, for their judges to read",
    "evaluate": "accuracy of a saved model in the paper's medical tasks",
    "report": "runs beside each other, as one HTML file with tables and pictures",
    "demo": "the whole method on a small model, in minutes, without a GPU or a network",
    "doctor": "what is installed and what would run",
}


TRACEBACK = "--traceback"
# Time for the rank that failed to print its message and end.
RANK_ERROR_SECONDS = 5.0


def usage() -> str:
    """Help of `sftmix` itself."""
    rows = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
    return (
        "usage: sftmix COMMAND ... [--traceback]\n\n"
        "Fine-tune language models with SFTMix (arXiv 2410.05248).\n\n"
        f"{rows}\n\n`sftmix COMMAND --help` shows a command's options."
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    What a user can mend (an option, a row, a file, a model) is printed in one message and gives 2;
    a run that fails on its way (a loss that is not finite, a full disk) gives 1. ``--traceback``,
    anywhere among the words, shows where it came from.
    """
    words = list(sys.argv[1:] if words is None else words)
    traceback = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    command = words[0]
    if command not in COMMANDS:
        print(f"sftmix: error: no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    # A command's module brings transformers with it, which takes seconds to import.
    module = importlib.import_module(f"sftmix.{command}")
    from sftmix.failures import FAILED, USER_ERRORS, exit_code, printable
    from sftmix.ranks import RankError
    from sftmix.redaction import redacted

    try:
        code: int | None = module.main(words[1:])
    except RankError:
        # A launcher ends all ranks with the first that ends, which is to be the one that says why.
        time.sleep(RANK_ERROR_SECONDS)
        if traceback:
            raise
        return FAILED
    except USER_ERRORS as error:
        if traceback:
            raise
        print(f"sftmix {command}: error: {printable(redacted(str(error)))}", file=sys.stderr)
        return exit_code(error)
    return code or 0
