"""End a command in order when SIGINT or SIGTERM asks it to.

Only the commands install handlers; a script keeps its own. A signal ends at once whatever has
nothing to lose, such as reading data. From the first step on it waits: training finishes its step
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
    """A signal asked the process to end; its `str` says what was saved and how to go on.

    It is no `Exception`, so nothing on the way takes it for a failure to recover from. A process
    that does not catch it exits with 130 after SIGINT and 143 after SIGTERM.
    """

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.text = text

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name} {self.text}"


class _Watch:
    """The state of the signal handlers, of which a process has one set."""

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
    """Handle signals inside this context; `advice` is the first text of `advise`.

    Only the main thread can do this, and only once; otherwise nothing changes. A signal that the
    process was started to ignore (`nohup`) stays ignored.
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
    """Return the signal that asked this process to end; None if no signal came."""
    return _watch.requested


def defer(*, until_asked: bool = True) -> None:
    """Make signals wait until the program asks for them, or (False) end the command at once."""
    _watch.waits = until_asked


def advise(text: str) -> None:
    """Set the text that the user reads if a signal ends the command at once."""
    _watch.advice = text


def end_if_requested() -> None:
    """End the command here if a signal has come.

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
