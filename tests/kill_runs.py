"""Kills scoring and training at random moments, resumes them, and compares the ends bit by bit.

    python -m tests.kill_runs [--kills 50] [--seed 0] [--folder DIR]

Unbroken runs of `sftmix score` and `sftmix train` come first. Then runs of both are killed with
SIGKILL and resumed, several times each, until there were enough kills. Half of the moments are
drawn from the time that an unbroken run takes, half lie within 30 ms of the beginning of a save.
After every kill whatever is visible has to be whole; every run that ends has to have the bytes of
the unbroken one: `confidence.parquet`, the logged losses, the weights. Exits with 1 otherwise.

Each process is forked from this one, where everything is imported and nothing has run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import sftmix.commands.score
import sftmix.commands.train
import sftmix.training.scoring
from sftmix.cli import main as sftmix_main
from sftmix.runs.checkpoints import fault, list_checkpoints
from sftmix.runs.folders import TEMPORARY_PREFIX
from sftmix.toy import build_toy_model
from sftmix.training.metrics import MEASURED

WORDS = ["one", "two", "three", "four", "five", "apple", "owl", "heron", "boat", "lantern"]
# Kills of one run before it may end; around a save, the most seconds from its beginning.
MOST_KILLS = 6
AROUND_SAVE = 0.03
LIMIT = 120.0


@dataclass
class Command:
    """A command line without its output, and how an unbroken run of it went."""

    name: str
    words: list[str]
    whole: Path
    compare: Callable[[Path, Path], list[str]]
    seconds: float = 0.0
    saves: int = 0


@dataclass
class Tally:
    """What was seen."""

    kills: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)


def forked(action: Callable[[], object]) -> int:
    """The process id of a child that does it, says nothing, and exits with its result."""
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 1
        try:
            code = int(bool(action()))
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(child: int) -> int | None:
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def run(command: Command, folder: Path, *, resume: bool) -> int:
    """Starts the command in a process of its own."""

    def action() -> int:
        sftmix.training.scoring.SAVE_SECONDS = 0.0  # a saving of the progress after every batch
        more = ["--output", str(folder), *(["--resume"] if resume else [])]
        return sftmix_main([*command.words, *more])

    return forked(action)


def make_inputs(folder: Path) -> None:
    """Data of uneven lengths and a small GPT-2 with dropout."""
    draw = random.Random(0)
    for name, number in (("rows", 31), ("held-out", 9)):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(2 * number)]
        rows = [{"question": q, "answer": a} for q, a in zip(texts[::2], texts[1::2], strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_toy_model(folder / "toy", [folder / "rows.jsonl"], vocab_size=300, max_length=256)
    tokenizer = AutoTokenizer.from_pretrained(folder / "toy")
    special = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos")
    }
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    config = GPT2Config(vocab_size=len(tokenizer), **size, **special)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def commands(folder: Path) -> list[Command]:
    """`score`, and `train` on its partition."""
    common = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    common += [
        "--max_length",
        "256",
        "--use_cpu",
        "true",
        "--disable_tqdm",
        "true",
        "--learning_rate",
        "0.01",
    ]
    saves = ["--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "2"]
    partition = ["--partition", str(folder / "score" / "confidence.parquet")]
    held_out = ["--num_train_epochs", "2", "--eval_data", str(folder / "held-out.jsonl")]
    return [
        Command("score", ["score", *common, "--num_scorings", "3"], folder / "score", same_scores),
        Command(
            "train",
            ["train", *common, *saves, *partition, *held_out],
            folder / "train",
            same_training,
        ),
    ]


def history(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what the clock and the memory say."""
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in lines
        if "loss" in line or "eval_loss" in line
    ]


def same_scores(found: Path, whole: Path) -> list[str]:
    """What of a scored run's end is not that of the unbroken run."""
    name = "confidence.parquet"
    return [] if (found / name).read_bytes() == (whole / name).read_bytes() else [name]


def same_training(found: Path, whole: Path) -> list[str]:
    """The same for a trained run."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    other = [name for name in names if (found / name).read_bytes() != (whole / name).read_bytes()]
    return other + ([] if history(found) == history(whole) else ["the logged losses"])


def half_written(run: Path, whole: Path) -> list[str]:
    """What a killed run shows that is not whole."""
    wrong = [f"{path.name}: {reason}" for path in list_checkpoints(run) if (reason := fault(path))]
    for name in ("manifest.json", "trainer_state.json"):
        if (run / name).exists():
            with contextlib.suppress(ValueError):
                json.loads((run / name).read_text())
                continue
            wrong.append(name)
    for name in ("confidence.parquet", "config.json", "model.safetensors"):
        if (run / name).exists() and (run / name).read_bytes() != (whole / name).read_bytes():
            wrong.append(name)
    if (run / "config.json").exists() and not (run / "model.safetensors").exists():
        wrong.append("config.json without its weights")
    return wrong


def temporaries(run: Path) -> Iterator[str]:
    """Names of what is being written or deleted, in the run and in its checkpoints."""
    for folder in (run, *list_checkpoints(run)):
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(folder):
                if entry.name.startswith(TEMPORARY_PREFIX):
                    yield entry.path


def saves_of(child: int, run: Path, stop_at: int | None = None) -> int:
    """Saves that began until the process ended, or until that many did."""
    seen: set[str] = set()
    before: set[str] = set(temporaries(run)) if run.exists() else set()
    begun = time.monotonic()
    while time.monotonic() - begun < LIMIT:
        now = set(temporaries(run)) if run.exists() else set()
        seen |= {f"{len(seen)}" for _ in now - before}
        before = now
        if stop_at is not None and len(seen) >= stop_at:
            break
        time.sleep(0.0005)
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
    return len(seen)


def unbroken(command: Command) -> None:
    """Runs it and notes how long it took and how often it saved."""
    begun = time.monotonic()
    child = run(command, command.whole, resume=False)
    command.saves = saves_of(child, command.whole)
    if wait(child) != 0:
        raise SystemExit(f"the unbroken run of {command.name} failed")
    command.seconds = time.monotonic() - begun


def kill_at_a_random_moment(command: Command, folder: Path, draw: random.Random) -> bool:
    """Starts or resumes a run and kills it; False where it came to its end before."""
    child = run(command, folder, resume=folder.exists())
    if draw.random() < 0.5:
        time.sleep(draw.uniform(0, command.seconds))
    else:
        saves_of(child, folder, stop_at=draw.randint(1, max(command.saves // 2, 1)))
        time.sleep(draw.uniform(0, AROUND_SAVE))
    code = ended(child)
    if code is None:
        os.kill(child, signal.SIGKILL)
        code = wait(child)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"{command.name} in {folder} exited with {code}")
    return code == -signal.SIGKILL


def torture(command: Command, folder: Path, draw: random.Random, kills: int, tally: Tally) -> None:
    """One run, killed up to so many times, then resumed to its end."""
    for _ in range(kills):
        if not kill_at_a_random_moment(command, folder, draw):
            break
        tally.kills += 1
        tally.seen[f"{command.name}: {place(folder)}"] += 1
        tally.wrong += [f"{folder.name}: {what}" for what in half_written(folder, command.whole)]
    if wait(run(command, folder, resume=folder.exists())) != 0:
        raise SystemExit(f"{command.name} in {folder} could not be resumed")
    tally.finished += 1
    other = command.compare(folder, command.whole)
    left = [path.name for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]
    tally.wrong += [f"{folder.name}: differs in {what}" for what in other]
    tally.wrong += [f"{folder.name}: left {name}" for name in left]


def place(folder: Path) -> str:
    """What the run was doing when it was killed, by what lies there."""
    if not (folder / "manifest.json").exists():
        return "before it began"
    if any(temporaries(folder)):
        return "while it saved or deleted"
    if (folder / "confidence.parquet").exists() or (folder / "config.json").exists():
        return "at its end"
    return "between two saves"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if wait(forked(lambda: make_inputs(folder))) != 0:
            raise SystemExit("the model could not be made")
        both, draw, tally = commands(folder), random.Random(options.seed), Tally()
        for command in both:
            unbroken(command)
            print(f"{command.name}: {command.seconds:.1f} s, {command.saves} saves seen")
        number = 0
        while tally.kills < options.kills:
            command = both[number % 2]
            left = min(draw.randint(1, MOST_KILLS), options.kills - tally.kills)
            torture(command, folder / f"{command.name}-{number}", draw, left, tally)
            number += 1
    for name, count in sorted(tally.seen.items()):
        print(f"{count:4} killed, {name}")
    print(f"{tally.kills} kills, {tally.finished} runs ended, {len(tally.wrong)} faults")
    print("\n".join(tally.wrong))
    return int(bool(tally.wrong))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
