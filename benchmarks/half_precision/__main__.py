"""Train all weights in less than float32: how many of them move, and where the loss ends.

python -m benchmarks.half_precision run --out benchmarks/half_precision/results
python -m benchmarks.half_precision report benchmarks/half_precision/results \\
    --document docs/memory.md

Each way trains a toy on the demo's data for three epochs at the paper's rate. Ways that need
torchao are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measure import facts
from benchmarks.tables import cpu_text, show, table
from sftmix import demo_data
from sftmix.cli import main as sftmix
from sftmix.toy import build_toy_model

FILE = "cpu.json"
PROG = "python -m benchmarks.half_precision"
BEGIN = (
    f"<!-- half precision: begin ({PROG} report benchmarks/half_precision/results"
    " --document docs/memory.md) -->"
)
END = "<!-- half precision: end -->"
ROWS = 512


@dataclass(frozen=True)
class Way:
    """One way to hold and update weights."""

    options: str
    bytes: tuple[float, float, float]  # of each weight: itself, its gradient, AdamW's states
    torchao: bool = False


RANDOM = "--optim_args bf16_stochastic_round=True"
WAYS = (
    Way("--dtype float32", (4, 4, 8)),
    Way("--dtype float32 --bf16 true", (4, 4, 8)),
    Way("--dtype bfloat16", (2, 2, 4)),
    Way("--dtype bfloat16 --bf16 true", (2, 2, 4)),
    Way("--dtype bfloat16 --optim adamw_torch_8bit", (2, 2, 2), torchao=True),
    Way(f"--dtype bfloat16 --optim adamw_torch_8bit {RANDOM}", (2, 2, 2), torchao=True),
    Way(f"--dtype bfloat16 --optim adamw_torch_4bit {RANDOM}", (2, 2, 1), torchao=True),
)


def main(words: Sequence[str]) -> None:
    """Measure, or write what was measured as a table."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", allow_abbrev=False)
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the result file")
    run.add_argument("--rows", type=int, default=ROWS, help="of the demo's data; %(default)s")
    report = commands.add_parser("report", allow_abbrev=False)
    report.add_argument("folder", type=Path, metavar="DIR", help="with the result file")
    report.add_argument("--document", type=Path, metavar="FILE", help="whose block to renew")
    options = parser.parse_args(words)
    if options.command == "run":
        measure(options.out, options.rows, shlex.join([*PROG.split(), *words]))
    else:
        result = json.loads((options.folder / FILE).read_text("utf-8"))
        show(markdown(result), options.document, BEGIN, END)


def measure(folder: Path, rows: int, command: str) -> None:
    """Train in every way that this machine has, and write the result file."""
    records = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for source, path in (("train", demo_data.TRAIN), ("held-out", demo_data.HELD_OUT)):
            with path.open(encoding="utf-8") as lines:
                (scratch / f"{source}.jsonl").write_text("".join(islice(lines, rows)), "utf-8")
        size = {"vocab_size": 600, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
        build_toy_model(scratch / "toy", [scratch / "train.jsonl"], **size, max_length=1024)
        for number, way in enumerate(WAYS):
            if not way.torchao or importlib.util.find_spec("torchao"):
                records.append(trained(way, scratch, scratch / str(number)))
    result = {"facts": {**facts(), "command": command}, "rows": rows, "records": records}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def trained(way: Way, scratch: Path, run: Path) -> dict[str, Any]:
    """Train one way and return its record: share of changed weights, and losses."""
    words = ["--model", str(scratch / "toy"), "--data", str(scratch / "train.jsonl")]
    words += ["--eval_data", str(scratch / "held-out.jsonl"), "--output", str(run)]
    words += ["--method", "ntp", "--max_length", "256", "--save_strategy", "no"]
    words += ["--use_cpu", "true", "--disable_tqdm", "true", *way.options.split()]
    if sftmix(["train", *words]):
        raise RuntimeError(f"the training in {way.options} failed")
    before, after = (load_file(f / "model.safetensors") for f in (scratch / "toy", run))
    changed = [(after[name] != one.to(after[name].dtype)).sum() for name, one in before.items()]
    log = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    losses = {key: [line[key] for line in log if key in line][-1] for key in ("loss", "eval_loss")}
    share = float(torch.stack(changed).sum()) / sum(one.numel() for one in before.values())
    return {"options": way.options, "changed": share, **losses}


def markdown(result: dict[str, Any]) -> str:
    """Return the table, and what was trained where."""
    found, ways = result["facts"], {way.options: way for way in WAYS}
    lines = [
        [
            f"`{record['options']}`",
            " + ".join(f"{part:g}" for part in ways[record["options"]].bytes),
            f"{record['changed']:.1%}",
            f"{record['loss']:.4f}",
            f"{record['eval_loss']:.4f}",
        ]
        for record in result["records"]
    ]
    head = ["all weights trained", "bytes a weight", "changed", "training loss", "held-out loss"]
    origin = (
        f"Toy of 2 layers of 32, {result['rows']} rows of the demo's data, three epochs at 2e-6; "
        f"{cpu_text(found)}; torch {found['torch']}; {found['date'][:10]}; commit "
        f"{found['commit']}. Bytes: the weight, its gradient, AdamW's states.\n"
    )
    return f"{origin}\n{table(head, lines)}"


if __name__ == "__main__":
    main(sys.argv[1:])
