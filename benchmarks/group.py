"""What is measured at once: figures, times, and of those without them, why."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
import torch
from triton import TritonError

# What may come of a kernel, a compiler or a peer's interface: one that does not run must not take
# the others' figures along.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ImportError,
    NotImplementedError,
    TritonError,
)
Found = TypeVar("Found")


class Group:
    """Kept until the tests that ask for it write it down, one each."""

    def __init__(
        self,
        left_out: Mapping[Hashable, str] | None = None,
        failed: Mapping[Hashable, str] | None = None,
    ) -> None:
        self.figures: dict[Hashable, dict[str, Any]] = {}
        self.samples: dict[Hashable, Sequence[float]] = {}
        self.left_out = dict(left_out or {})
        self.failed = dict(failed or {})

    def attempt(self, name: Hashable, work: Callable[[], Found], ours: bool) -> Found | None:
        """What the work returns; None, and a note, where it fails or does not fit."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            self.left_out[name] = f"does not fit: {str(error).splitlines()[0]}"
        except FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
            if ours:
                traceback.print_exc(file=sys.stdout)
                self.failed[name] = reason
            else:
                self.left_out[name] = f"FAILED {reason}"
        return None

    def add(self, name: Hashable, samples: Sequence[float], **figures: Any) -> None:
        """Seconds of every round, and what is known beside them."""
        self.samples[name], self.figures[name] = samples, figures

    def write(self, name: Hashable, shown: str, request: pytest.FixtureRequest) -> None:
        """The record of a test that requested this group; or its failure, or why it is left out.

        ``shown`` stands beside the reason in the result file.
        """
        request.node.user_properties.append(("name", shown))
        if name in self.samples:
            # Requested here alone: pytest-benchmark warns of a fixture that nothing used.
            request.getfixturevalue("record")(self.samples[name], **self.figures[name])
        elif name in self.failed:
            pytest.fail(self.failed[name], pytrace=False)
        else:
            pytest.skip(self.left_out[name])
