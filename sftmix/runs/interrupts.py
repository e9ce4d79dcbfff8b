"""SIGINT and SIGTERM: how a command ends when it is asked to, and what is kept.

The commands install the handlers, so that a script keeps its own. A signal ends at once whatever
has nothing to lose, such as reading data. From the first step on it waits: training ends its step
and scoring its batch, a checkpoint is written, and `Interrupted` ends the command. A second signal
ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher of several processes passes on the signal that a job's manager has sent to all of them.
LAUNCHED = "TORCHELASTIC_RUN_ID"
ECHO_SECONDS = 3.0


class Interrupted(SystemExit):
    """A signal asked the process to end; ``str`` of it says what was kept and how to go on.

    It is no `Exception`, so that nothing on the way takes it for a failure to recover from, and a
    process that does not catch it exits with 130 after SIGINT and 143 after SIGTERM.
    """

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.text = text

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name} {self.text}"


class _Watch:
    """What the handlers know: one for the process, as signals are."""

    def __init__(self) -> None:
        self.installed = False
        self.requested: int | None = None
        self.waits = False
        self.advice = ""
        self.process = os.getpid()
        self.since = 0.0


_watch = _Watch()


@contextlib.contextmanager
def handled(advice: str = "") -> Iterator[None]:
    """Handle signals inside, as the module says; ``advice`` is `advise`'s first.

    Only the main thread can, and once: else nothing is changed. A signal that the process was
    started to ignore (``nohup``) stays ignored.
    """
    global _watch
    if _watch.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _watch = _watch, _Watch()
    _watch.advice, _watch.installed = advice, True
    own = {
        signum: signal.signal(signum, _handle)
        for signum in SIGNALS
        if signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in own.items():
            signal.signal(signum, handler)
        _watch = outer


def requested() -> int | None:
    """The signal that has asked this process to end, None where none has."""
    return _watch.requested


def wait(*, wait: bool = True) -> None:
    """Have signals wait from now on for somebody to ask for them, or end the command at once."""
    _watch.waits = wait


def advise(text: str) -> None:
    """Set what the user is told where a signal ends the command at once."""
    _watch.advice = text


def end_if_requested() -> None:
    """End here where a signal has come.

    Raises:
        Interrupted: one has.
    """
    if _watch.requested is not None:
        raise Interrupted(_watch.requested, _watch.advice)


def _handle(signum: int, frame: FrameType | None) -> None:
    forked = os.getpid() != _watch.process  # a worker, which is nobody's to save
    if not forked and _watch.requested is None:
        _watch.requested, _watch.since = signum, time.monotonic()
        if not _watch.waits:
            end_if_requested()
        return
    if not forked and LAUNCHED in os.environ and time.monotonic() < _watch.since + ECHO_SECONDS:
        return
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
