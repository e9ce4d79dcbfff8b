"""`sftmix` under a launcher, whose second rank fails in the midst of the second epoch."""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer

from sftmix.cli import main
from sftmix.runs.ranks import rank

OWN = Trainer.training_step


def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
    """The trainer's own, up to the fifth step."""
    if rank() == 1 and self.state.global_step == 4:
        raise KeyError("the second rank fails")
    return OWN(self, *args, **kwargs)


def crashing(words: list[str]) -> int:
    """Run the command, and fail on its way."""
    Trainer.training_step = training_step  # type: ignore[method-assign]
    return main(words)


if __name__ == "__main__":
    sys.exit(crashing(sys.argv[1:]))
