"""Run the whole method on a small model, with the commands that a user would type.

Every training runs in a process of its own, through the command line, so its peak memory is its
own. This process imports torch only after them, and leaves them the memory until then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.conventions import PARTITION
from sftmix.demo_data import HELD_OUT, TRAIN
from sftmix.pairs.partition import Partition, read_partition
from sftmix.report import Section, Table, report_runs, require_plots
from sftmix.report.confidence import groups_picture
from sftmix.runs.failures import OneMessage
from sftmix.runs.folders import lock_run, open_run, write_json

DESCRIPTION = """\
The whole method on a small model: build a tokenizer and a random Llama of 0.9 million parameters,
train a base model on a third of the bundled data, score the rest with a reference model, split it
at the median confidence, and train with NTP and with SFTMix from the same base, on the same
batches, side by side. The demo ends with a table, DIR/results.json and DIR/report.html.

The demo takes two to three minutes on two cores, without a network or a GPU. The numbers of
the recipe (steps, learning rates, sizes) are the demo's, not the paper's. It needs the
extra plots: pip install matplotlib scikit-learn scipy."""

EXPECT = (
    "One seed of a tiny model on synthetic data: the demo shows how the method runs, and a "
    "difference between NTP and SFTMix here is not significant and says nothing about large models."
)
COLUMNS = (
    "model",
    "held-out loss (nats/token)",
    "held-out perplexity",
    "confidence, mean",
    "confidence, std. dev.",
    "training tokens/s",
    "peak memory (GiB)",
)
# Of the training examples, as `sftmix report` samples by default: to score and map all 1,733 under
# three models takes 49 s of a core, and 25 s for these.
SAMPLE = 1000
NOTES = (
    "Held-out loss: NTP over the response tokens of the held-out rows.",
    "Confidence: minus the perplexity of training examples, a sample of 1,000 at most, under the "
    "finished model, one scoring; the base model has not been trained on them, the others have.",
    "Tokens/s: median over the log lines, of two trainings side by side, each on half of the "
    "cores; it counts prompts, and swings with what else the machine does.",
    "Peak memory: of the whole process. At this size most of it is Python and its libraries.",
)
BASE, NTP, SFTMIX = "base", "NTP", "SFTMix"
FOLDERS = {BASE: "base", NTP: "ntp", SFTMIX: "sftmix"}


@dataclass(frozen=True)
class DemoSizes:
    """The sizes that decide how long the demo takes; the defaults are the real demo's."""

    max_rows: int | None = None  # of each bundled file; None takes all
    vocab_size: int = 2000
    hidden_size: int = 128
    num_layers: int = 2
    max_length: int = 256
    batch_size: int = 16
    base_steps: int = 200
    base_learning_rate: float = 3e-3
    num_scorings: int = 3
    epochs: int = 2
    learning_rate: float = 1e-3
    logging_steps: int = 20


@dataclass(frozen=True)
class Step:
    """One command of the demo, as it is typed after `python`."""

    title: str
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line."""
        return shlex.join(("python", *self.words))

    @property
    def argv(self) -> list[str]:
        """The command as it is run."""
        return [sys.executable, *self.words]


@dataclass(frozen=True)
class ModelResult:
    """The figures measured for one model; None if there is nothing comparable or finite."""

    held_out_loss: float
    confidence_mean: float | None
    confidence_std: float | None
    infinite_perplexities: int  # examples left out of both
    tokens_per_second: float | None
    peak_memory_gib: float | None

    @property
    def held_out_perplexity(self) -> float:
        """The perplexity per token of the held-out data."""
        return math.exp(self.held_out_loss)


OPTIONS = ("output", "seed")


def main(words: Sequence[str]) -> None:
    """Run the command."""
    parser = OneMessage(
        prog="sftmix demo",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    options = parser.parse_args(words)
    run_demo(options.output, options.seed, DemoSizes())


def run_demo(output: str, seed: int, sizes: DemoSizes) -> None:
    """Run all steps, print the table, write `results.json` and `report.html`.

    Raises:
        ImportError: a package for the pictures is not installed.
        ValueError: the folder is not empty or cannot be a run, or a seed out of range.
        ChildProcessError: a command failed.
    """
    started = time.perf_counter()
    require_plots()
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 .. 2^32-1, got {seed}")
    if Path(output).is_dir() and any(Path(output).iterdir()):
        raise ValueError(f"output: {output!r} is not empty; the demo needs a new folder")
    folder = open_run(output, resume=False, name="output")
    with lock_run(folder, name="output"):
        write_data(folder / "data", sizes.max_rows)
        steps = plan(folder, seed, sizes)
        total = len(steps) + 1
        *before, ntp, sftmix = steps
        for number, step in enumerate(before, start=1):
            run_step(step, f"[{number}/{total}]")
        run_together({f"[{total - 2}/{total}]": ntp, f"[{total - 1}/{total}]": sftmix})
        print(f"\n[{total}/{total}] Score the three models once", flush=True)
        results = {
            name: result(read_log(folder / FOLDERS[name]), scores, rates=name != BASE)
            for name, scores in score_models(folder).items()
        }
        finish(folder, seed, sizes, steps, results)
    elapsed = time.perf_counter() - started
    print(f"\nThe report: {folder / 'report.html'}  ({elapsed:.0f} s in all)")


def write_data(folder: Path, max_rows: int | None) -> None:
    """Split the bundled training data: every third row for the base model, the rest to tune on."""
    folder.mkdir()
    rows = TRAIN.read_text(encoding="utf-8").splitlines()[:max_rows]
    parts = {
        "pretrain": rows[::3],
        "train": [row for i, row in enumerate(rows) if i % 3],
        "held_out": HELD_OUT.read_text(encoding="utf-8").splitlines()[:max_rows],
    }
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def plan(folder: Path, seed: int, sizes: DemoSizes) -> list[Step]:
    """Return the commands of the demo, in order."""
    data = folder / "data"
    held_out = ("--eval_data", str(data / "held_out.jsonl"), "--save_strategy", "no")
    common = (
        *("--seed", str(seed), "--per_device_train_batch_size", str(sizes.batch_size)),
        *("--max_length", str(sizes.max_length), "--logging_steps", str(sizes.logging_steps)),
        # Half of a padded batch is padding: a step takes 0.18 s of a core without, 0.21 s with it.
        *("--layout", "padding_free"),
        *("--report_to", "none", "--dataloader_pin_memory", "false"),
    )
    tune = ("--learning_rate", str(sizes.learning_rate), *common)
    confidence = str(folder / "score" / PARTITION)

    def sftmix(command: str, model: str, rows: str, output: str, *more: str) -> tuple[str, ...]:
        paths = ("--model", str(folder / model), "--data", str(data / f"{rows}.jsonl"))
        return ("-m", "sftmix", command, *paths, "--output", str(folder / output), *more)

    def target(method: str) -> tuple[str, ...]:
        how = ("--method", method, "--partition", confidence)
        epochs = ("--num_train_epochs", str(sizes.epochs))
        return sftmix("train", "base", "train", method, *how, *epochs, *tune, *held_out)

    toy = (
        *("-m", "sftmix.toy", "--output", str(folder / "init"), "--seed", str(seed)),
        *("--vocab_size", str(sizes.vocab_size), "--hidden_size", str(sizes.hidden_size)),
        *("--num_layers", str(sizes.num_layers), "--max_length", str(sizes.max_length)),
    )
    base = (
        *("--method", "ntp", "--max_steps", str(sizes.base_steps)),
        *("--learning_rate", str(sizes.base_learning_rate), *common, *held_out),
    )
    score = ("--num_scorings", str(sizes.num_scorings), *tune)
    return [
        Step("Build a tokenizer and a small random Llama", toy),
        Step("Train the base model", sftmix("train", "init", "pretrain", "base", *base)),
        Step("Score and split the data", sftmix("score", "base", "train", "score", *score)),
        Step("Train with NTP", target("ntp")),
        Step("Train with SFTMix", target("sftmix")),
    ]


def run_step(step: Step, number: str) -> None:
    """Print a command and run it; its output and progress bars go to the terminal.

    Raises:
        ChildProcessError: it failed.
    """
    announce(step, number)
    check(step, subprocess.run(step.argv, check=False, env=environment()).returncode)


def run_together(steps: Mapping[str, Step]) -> None:
    """Run the last step as `run_step` does and the others beside it, by their numbers.

    Each gets its share of the cores: steps so small take little less on two threads than on one.
    What the others print is kept until all have ended.

    Raises:
        ChildProcessError: one failed.
    """
    environ = environment(max(1, (os.cpu_count() or 1) // len(steps)))
    *others, (last, shown) = steps.items()
    with contextlib.ExitStack() as stack:
        running = []
        for number, step in others:
            announce(step, f"{number} beside the next,")
            kept = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            process = subprocess.Popen(step.argv, env=environ, stdout=kept, stderr=kept)
            stack.callback(end, process)
            running.append((step, kept, process))
        announce(shown, last)
        status = subprocess.run(shown.argv, check=False, env=environ).returncode
        for step, kept, process in running:
            if status == 0:
                process.wait()
                kept.seek(0)
                print(f"\n{step.title}, done beside it:\n{kept.read()}", flush=True)
                check(step, process.returncode)
    check(shown, status)


def announce(step: Step, number: str) -> None:
    """Print a command's title and its words."""
    print(f"\n{number} {step.title}\n$ {step.command}", flush=True)


def check(step: Step, status: int) -> None:
    """Refuse a command that failed.

    Raises:
        ChildProcessError: its exit status is not 0.
    """
    if status:
        raise ChildProcessError(
            f"{step.title.lower()!r} failed with exit status {status}, its messages are above"
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, because another failed or the demo was stopped."""
    if process.poll() is None:
        process.terminate()
    process.wait()


def environment(threads: int | None = None) -> dict[str, str]:
    """Return the environment of a command, which is to run on so many threads.

    Threads that spin while they wait make a training several times slower if another process uses
    one of the cores (two cores, 40 steps: 47 s, and 13 s without); results are the same.
    """
    given = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {"OMP_WAIT_POLICY": "PASSIVE", **given, **os.environ}


def score_models(folder: Path) -> dict[str, Partition]:
    """Score the training examples under each of the three models, and keep this for the report."""
    # These import torch, which the module's docstring says to do late.
    from sftmix.report.measured import measured, sample_examples
    from sftmix.report.runs import read_run

    ntp, sftmix = (read_run(folder / FOLDERS[name]) for name in (NTP, SFTMIX))
    examples = sample_examples(ntp, None, SAMPLE)
    return {
        BASE: measured(ntp, "before", examples).scores,
        NTP: measured(ntp, "after", examples).scores,
        SFTMIX: measured(sftmix, "after", examples).scores,
    }


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return `log_history` of a finished run."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    log: list[dict[str, Any]] = state["log_history"]
    return log


def result(log: Sequence[Mapping[str, Any]], scores: Partition, *, rates: bool) -> ModelResult:
    """Return what a run's log and one scoring of its model say; `rates` adds speed and memory.

    Raises:
        ValueError: the log lacks a value.
    """

    def values(key: str) -> list[float]:
        found = [float(line[key]) for line in log if key in line]
        if not found:
            raise ValueError(f"log: expected lines with {key!r}, got none")
        return found

    finite = scores.confidence[np.isfinite(scores.confidence)]
    return ModelResult(
        held_out_loss=values("eval_loss")[-1],
        confidence_mean=float(finite.mean()) if len(finite) else None,
        confidence_std=float(finite.std()) if len(finite) else None,
        infinite_perplexities=len(scores.confidence) - len(finite),
        tokens_per_second=float(np.median(values("tokens_per_second"))) if rates else None,
        peak_memory_gib=max(values("peak_memory_gib")) if rates else None,
    )


def results_table(results: Mapping[str, ModelResult]) -> Table:
    """Return the results as a table with one row for each model."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        (
            name,
            cell(found.held_out_loss, ".4f"),
            cell(found.held_out_perplexity, ".3f"),
            cell(found.confidence_mean, ".3f"),
            cell(found.confidence_std, ".3f"),
            cell(found.tokens_per_second, ",.0f"),
            cell(found.peak_memory_gib, ".3f"),
        )
        for name, found in results.items()
    ]
    return Table(COLUMNS, rows)


def notes(results: Mapping[str, ModelResult]) -> list[str]:
    """Return the notes that a reader of the table needs."""
    infinite = [
        f"{name}: {found.infinite_perplexities} examples have an infinite perplexity and are left "
        "out of the confidence."
        for name, found in results.items()
        if found.infinite_perplexities
    ]
    return [*NOTES, *infinite, EXPECT]


def finish(
    folder: Path,
    seed: int,
    sizes: DemoSizes,
    steps: Sequence[Step],
    results: Mapping[str, ModelResult],
) -> None:
    """Print the table and write both files."""
    table, remarks = results_table(results), notes(results)
    commands = [step.command for step in steps]
    measured = {
        name: {**asdict(found), "held_out_perplexity": found.held_out_perplexity}
        for name, found in results.items()
    }
    write_json(
        folder / "results.json",
        {
            "seed": seed,
            "sizes": asdict(sizes),
            "models": measured,
            "notes": remarks,
            "commands": commands,
        },
    )
    print("\n" + table.text() + "\n\n" + "\n".join(remarks))
    partition = read_partition(folder / "score" / PARTITION)
    rows = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    groups = [f"{row['kind']} ({row['difficulty']})" for row in map(json.loads, rows)]
    report_runs(
        [folder / "score", *(folder / FOLDERS[name] for name in (NTP, SFTMIX))],
        folder / "report.html",
        examples=SAMPLE,
        title="SFTMix demo",
        paragraphs=(
            "A small language model is fine-tuned twice from the same base, on the same batches "
            "in the same order: with next-token prediction (NTP), and with SFTMix, which "
            "adds a Mixup loss between examples that a reference model is sure of and examples "
            "that it is not sure of (arXiv 2410.05248).",
            EXPECT,
            "The numbers of the recipe are the demo's, not the paper's.",
        ),
        first=(
            Section(
                "The demo",
                tables=(Table(table.columns, table.rows, "The three models", notes(results)[:-1]),),
                parts=(groups_picture(partition, groups),),
            ),
        ),
        last=(Section("The demo's commands", commands=commands),),
    )
