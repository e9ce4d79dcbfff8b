"""The parts of a run on a GPU: what each calls, and the seconds after which it is interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

# All parts together; a machine that is lent for ten minutes is then still there to take files from.
SECONDS = 480
TESTS = "tests/sftmix_kernels"
# Each kernel and dtype, graphs, a host that never waits, more logits than int32 counts.
SMOKE = (
    f"{TESTS}/test_smoke_gpu.py",
    f"{TESTS}/test_cuda.py::test_a_captured_step_replays_on_new_inputs",
    f"{TESTS}/test_cuda.py::test_the_host_never_waits_for_the_device",
    f"{TESTS}/test_cuda.py::test_logits_of_more_than_int32_elements",
    f"{TESTS}/vocab_tiles/test_vocab_tiles.py"
    "::test_backward_leaves_out_the_tiles_below_the_filter_and_no_other",
)
RACECHECK = ("--tool", "racecheck", "--error-exitcode", "9", "--target-processes", "all")
OURS_IN_CUDA = ("--kernel-name", "kns=fold_logits", "--kernel-name", "kns=add_token_losses")


class Part(NamedTuple):
    """Commands that run one after another, in so many seconds together."""

    name: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Run:
    """What every part has to know."""

    out: Path
    device: str = "cuda"
    commit: str = ""
    sanitizer: str = ""  # compute-sanitizer, where it is found
    scratch: Path = Path()  # for what nobody keeps

    @property
    def quick(self) -> tuple[str, ...]:
        """Return the option of tiny sizes where there is no GPU."""
        return ("--quick",) * (self.device == "cpu")

    def suite(self, name: str, only: str, seconds: int, *options: str) -> tuple[str, ...]:
        """Return what measures a benchmark of a suite; it begins no round after so many seconds."""
        words = [sys.executable, "-m", "benchmarks", "run", name, "--keep"]
        words += ["--device", self.device, "--out", str(self.out), "--seconds", str(seconds)]
        words += ["-k", only] * bool(only) + ["--commit", self.commit] * bool(self.commit)
        return (*words, *options, *self.quick)

    def short(self, name: str, only: str, seconds: int) -> tuple[str, ...]:
        """Return what measures only what decides."""
        return self.suite(name, only, seconds, "--short")

    def module(self, name: str, *arguments: str) -> tuple[str, ...]:
        """Return the call of a module beside this one."""
        return (sys.executable, "-m", f"benchmarks.gpu.{name}", "--device", self.device, *arguments)

    def tests(self, processes: int, *where: str) -> tuple[str, ...]:
        """Return the call of pytest that names what failed even when it is interrupted."""
        words = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfE")
        shared = ("-n", str(processes), "--dist", "worksteal") * (self.device != "cpu")
        return (*words, "-m", "gpu", "--durations=5", *shared, *where)


def default_parts(run: Run) -> list[Part]:
    """Return the parts that run without ``--only``, what decides first."""
    parts = [
        Part("extension", 45, (run.module("extension"),)),
        Part("ceilings", 15, (run.short("loss", "ceilings", 8),)),
        Part("smoke", 60, (run.tests(4, *SMOKE),)),
        Part("losses", 115, (run.short("loss", "loss", 95),)),
        Part("profile", 20, (run.module("profiles", "--out", str(run.out)),)),
        Part(
            "rows",
            40,
            (run.short("loss", "row_chunks", 12), run.short("perplexity", "online_softmax", 14)),
        ),
        Part(
            "perplexity",
            60,
            (run.short("perplexity", "perplexity", 25), run.short("tune", "blocks", 20)),
        ),
        Part("launches", 45, (run.short("tune", "launches", 35),)),
        # Whatever those before have left comes on top.
        Part("tests", 50, (run.tests(8, TESTS),)),
    ]
    if run.sanitizer:
        # Our CUDA kernels that share memory between threads.
        folds = replace(run, out=run.scratch).suite("perplexity", "not scoring", 20, "--quick")
        race = (run.sanitizer, *RACECHECK, *OURS_IN_CUDA, *folds)
        parts.append(Part("racecheck", 30, (race,)))
    return parts


def other_parts(run: Run) -> list[Part]:
    """Return the parts that run only when they are named: a suite whole, or long sequences."""
    rest = SECONDS - 45
    suites = [
        Part(name, rest, (run.suite(suite, "", rest * 2 // 3),))
        for name, suite in (
            ("all-losses", "loss"),
            ("objectives", "objectives"),
            ("all-perplexity", "perplexity"),
            ("step", "step"),
            ("memory", "memory"),
            ("tune", "tune"),
        )
    ]
    long = (sys.executable, "-m", "benchmarks.long_sequence")
    out = ("--out", str(run.out))
    measure = (*long, "run", "--model", "8B", "--device", run.device, *out)
    plot = (*long, "plot", str(run.out))
    return [
        *suites,
        Part("long", rest, ((*measure, "--seconds", str(rest - 35), *run.quick), plot)),
    ]


def chosen_parts(run: Run, only: str) -> list[Part]:
    """Return the parts of a run: all by default, or the named one beside what it needs."""
    found = default_parts(run)
    if not only:
        return found
    (part,) = (one for one in (*found, *other_parts(run)) if one.name == only)
    first = [found[0]] if only != found[0].name else []
    return [*first, part._replace(seconds=SECONDS - found[0].seconds if first else part.seconds)]


def names() -> Iterator[str]:
    """Return the names of all parts."""
    run = Run(Path())
    yield from (part.name for part in (*default_parts(run), *other_parts(run)))
