"""Run on a GPU what decides, first things first, in eight minutes at most.

bash benchmarks/gpu.sh --prepare KIT     # before, on any machine: makes the folder to carry
bash benchmarks/gpu.sh OUT --kit KIT     # on the GPU
bash benchmarks/gpu.sh OUT --dry-run     # the same on the CPU, at tiny sizes

OUT gets cuda-SUITE.json as soon as there is a figure, profile.txt, log.txt and parts.md, six files;
`python -m benchmarks plot OUT` makes tables and pictures of them anywhere. Each part is interrupted
at a limit of its own, so that none takes its time from the next; what is left goes to the tests.
A dry run waits ten times as long.
KIT holds the extension for sm_90, Triton's compiled kernels and wheels of peers; without it they
are made or left out there. A part that fails stops no other; the exit status then is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from .kit import Kit, make_kit
from .parts import SECONDS, Part, Run, chosen_parts, names

ROOT = Path(__file__).resolve().parents[2]
# Seconds from an interrupt, after which pytest and suites say what they have, to the end.
GRACE = 4
# A dry run has a CPU, of which others may take most: all limits are so many times as long.
PATIENCE = 10
SANITIZER = "/usr/local/cuda/bin"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit status 0, or 1 where a part failed, or 2 where the call is wrong."""
    options = make_parser().parse_args(arguments)
    if options.prepare:
        return make_kit(options.prepare.resolve())
    if options.out is None:
        make_parser().error("OUT: expected a folder for the results, got none")
    # Whoever ends this ends what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # `long` goes on with what is there.
    for old in () if options.only == "long" else ("cpu-*.json", "cuda-*.json", "*.txt", "parts.md"):
        for file in out.glob(old):
            file.unlink()
    with tempfile.TemporaryDirectory() as folder:
        return run_all(options, out, Path(folder))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; options may stand before OUT or after it."""
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("out", nargs="?", type=Path, metavar="OUT", help="folder for the results")
    add("--only", default="", choices=tuple(names()), metavar="PART", help=", ".join(names()))
    add("--kit", type=folder, metavar="KIT", help="what --prepare has made")
    add("--prepare", type=Path, metavar="KIT", help="make the folder to carry to the GPU")
    add("--dry-run", action="store_true", help="try all of it out on the CPU at tiny sizes")
    add(
        "--commit", default="", help="of the code, where it is no git checkout (default: the kit's)"
    )
    return parser


def folder(text: str) -> Path:
    """Return a folder that is there.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}; --prepare makes one")
    return path


def run_all(options: argparse.Namespace, out: Path, scratch: Path) -> int:
    """Run the parts one after another; return the exit status."""
    device = "cpu" if options.dry_run else "cuda"
    kit = Kit(options.kit) if options.kit else None
    environment = surroundings(scratch)
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        if kit:
            environment |= kit.unpack(scratch, install=device == "cuda")
            say(log, f"== kit: {kit.says}")
        sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{SANITIZER}")
        commit = options.commit or (kit.commit if kit else "")
        found = "" if options.dry_run else sanitizer or ""
        run = Run(out, device, commit, found, scratch / "out")
        ends, parts = dict[str, str](), chosen_parts(run, options.only)
        begin, times = time.monotonic(), PATIENCE if options.dry_run else 1
        for number, part in enumerate(parts):
            limit = times * part.seconds
            if part.name == "tests" or options.only == part.name:
                end = times * (SECONDS - sum(later.seconds for later in parts[number + 1 :]))
                limit = max(limit, int(end - (time.monotonic() - begin)))
            ends[part.name] = run_part(part, limit, environment, log)
            (out / "parts.md").write_text(table_of(ends), encoding="utf-8")
    return int(any(end.startswith("FAILED") for end in ends.values()))


def surroundings(scratch: Path) -> dict[str, str]:
    """Return the environment of every part: what is carried comes first, then this checkout."""
    paths = [str(scratch / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {**os.environ, **own}


def table_of(ends: dict[str, str]) -> str:
    """Return how the parts ended, as Markdown."""
    lines = [f"| {name} | {end} |" for name, end in ends.items()]
    return "\n".join(["| part | end |", "| --- | --- |", *lines, ""])


def say(log: IO[str], text: str) -> None:
    """Print a line and write it down."""
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def run_part(part: Part, limit: int, environment: dict[str, str], log: IO[str]) -> str:
    """Run a part's commands, whatever comes of each; return how it ended."""
    begin, ends = time.monotonic(), []
    for command in part.commands:
        left = limit - (time.monotonic() - begin)
        say(log, f"== {part.name}, {left:.0f} s: {' '.join(command)}")
        ends.append(run_command(command, left, environment, log) if left > GRACE else "not begun")
    failed = [end for end in ends if end]
    spent = f"{time.monotonic() - begin:.0f} s"
    end = f"FAILED: {', '.join(failed)}; {spent} of {limit}" if failed else f"passed, {spent}"
    say(log, f"== {part.name}: {end}")
    return end


def run_command(
    command: Sequence[str], seconds: float, environment: dict[str, str], log: IO[str]
) -> str:
    """Run a command, interrupted `GRACE` before its end; return what failed, or nothing."""
    with heeding_interrupts():
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    assert process.stdout is not None
    reader = threading.Thread(
        target=lambda lines: [say(log, line.rstrip("\n")) for line in lines],
        args=(process.stdout,),
        daemon=True,
    )
    reader.start()
    late = False
    try:
        process.wait(seconds - GRACE)
    except subprocess.TimeoutExpired:
        late = True
        end_group(process, signal.SIGINT)
    finally:
        # What it has started ends with it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE if late else 0)
        end_group(process, signal.SIGKILL)
        process.wait()
        # The pipe ends with the last process that holds it.
        reader.join(1)
        process.stdout.close()
    if late:
        return f"interrupted after {seconds - GRACE:.0f} s"
    return f"exit status {process.returncode}" if process.returncode else ""


@contextlib.contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Let what is started take SIGINT: a job in the background begins with SIGINT ignored.

    A handler of our own ends with exec, and the default takes its place; what is ignored stays so.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_group(process: subprocess.Popen[str], kind: signal.Signals) -> None:
    """Send a signal to a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, kind)


if __name__ == "__main__":
    sys.exit(main())
