"""Time the reading of data and weigh its peak memory, beside `datasets.load_dataset`.

    python -m benchmarks.reading run --out benchmarks/reading/results
    python -m benchmarks.reading report benchmarks/reading/results --document docs/data.md

Timed are `read_file`, which gives rows one by one; `load_examples`, which checks and hashes them;
and `load_dataset` into an empty cache, which gives Arrow on disk. Each has a process of its own and
one core, and reads the same chats, made from a seed, as JSON lines, as an array, compressed, and as
parquet. The figures go into `reading.json`, beside the machine's facts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import facts
from benchmarks.tables import cpu_text, show, table
from sftmix.data.examples import load_examples
from sftmix.data.files import read_file

FILE = "reading.json"
PROG = "python -m benchmarks.reading"
BEGIN = (
    f"<!-- reading: begin ({PROG} report benchmarks/reading/results --document docs/data.md) -->"
)
END = "<!-- reading: end -->"
FORMS = ("jsonl", "json", "jsonl.gz", "parquet")


def rows(mib: int) -> Iterator[dict[str, Any]]:
    """Yield chats of about 1.7 kB until their JSON has so many MiB."""
    random.seed(0)
    words = ["".join(random.choices("etaoinshrdlu", k=random.randint(1, 9))) for _ in range(5_000)]
    size = 0
    while size < mib << 20:
        turns = (
            (role, random.choices(words, k=k)) for role, k in (("user", 60), ("assistant", 240))
        )
        chat = [{"role": role, "content": " ".join(text) + ".\n"} for role, text in turns]
        size += len(chat[0]["content"]) + len(chat[1]["content"]) + 90
        yield {"messages": chat}


def write(folder: Path, mib: int) -> dict[str, int]:
    """Write the rows in each form, and return the sizes of the files and of the table in Arrow."""
    chats = list(rows(mib))
    lines = [json.dumps(chat) + "\n" for chat in chats]
    (folder / "data.jsonl").write_text("".join(lines))
    (folder / "data.json").write_text("[" + ",".join(lines) + "]")
    with gzip.open(folder / "data.jsonl.gz", "wt", compresslevel=6) as file:
        file.writelines(lines)
    table = pa.Table.from_pylist(chats)
    pq.write_table(table, folder / "data.parquet")
    sizes = {form: (folder / f"data.{form}").stat().st_size for form in FORMS}
    return {**sizes, "arrow": table.nbytes}


def _rows(path: str) -> int:
    return sum(1 for _ in read_file(Path(path)))


def _examples(path: str) -> int:
    return len(load_examples([path], disable_progress=True))


def _dataset(path: str) -> int:
    form = "parquet" if path.endswith("parquet") else "json"
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        return len(datasets.load_dataset(form, data_files=path, split="train", cache_dir=cache))


READERS: dict[str, Callable[[str], int]] = {
    "read_file": _rows,
    "load_examples": _examples,
    "load_dataset": _dataset,
}


def measure(reader: str, path: Path) -> dict[str, float]:
    """Return what a process of its own takes: see `work`."""
    words = [sys.executable, "-m", "benchmarks.reading", "work", reader, str(path)]
    one_core = {"OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env={**os.environ, **one_core}
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def work(reader: str, path: str) -> None:
    """Read a file, and print seconds, those on a core, peak bytes above those before, and rows."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    before, begin, begin_cpu = peak_bytes(), time.perf_counter(), time.process_time()
    number = READERS[reader](path)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    peak = peak_bytes() - before
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak, "rows": number}))


def peak_bytes() -> int:
    """Return the most memory that this process has had; getrusage counts its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10


def main(words: Sequence[str]) -> None:
    """Measure, or write what was measured as a table."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="{run,report}")
    run = commands.add_parser("run", allow_abbrev=False)
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the result file")
    run.add_argument("--mib", type=int, default=200, help="size of the JSON lines; %(default)s")
    run.add_argument("--rounds", type=int, default=3, help="that each reads; %(default)s")
    report = commands.add_parser("report", allow_abbrev=False)
    report.add_argument("folder", type=Path, metavar="DIR", help="with the result file")
    report.add_argument("--document", type=Path, metavar="FILE", help="whose block to renew")
    worker = commands.add_parser("work")
    worker.add_argument("reader", choices=READERS)
    worker.add_argument("path")
    options = parser.parse_args(words)
    if options.command == "work":
        work(options.reader, options.path)
    elif options.command == "run":
        result = compare(options.mib, options.rounds)
        result["facts"]["command"] = shlex.join([*PROG.split(), *words])
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(markdown(result))
    else:
        result = json.loads((options.folder / FILE).read_text("utf-8"))
        show(markdown(result), options.document, BEGIN, END)


def compare(mib: int, rounds: int) -> dict[str, Any]:
    """Return the medians of every reader on every form, which take turns."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = write(Path(folder), mib)
        for _ in range(rounds):
            for form in FORMS:
                for reader in READERS:
                    taken = measure(reader, Path(folder, f"data.{form}"))
                    found.setdefault((form, reader), []).append(taken)
    records = []
    for (form, reader), runs in found.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        records.append({"form": form, "reader": reader, **middle})
    return {"facts": facts(), "mib": mib, "rounds": rounds, "sizes": sizes, "records": records}


def markdown(result: dict[str, Any]) -> str:
    """Return the table, and what was read where."""
    found, sizes = result["facts"], result["sizes"]
    lines = [
        [
            f"`.{one['form']}`",
            f"`{one['reader']}`",
            f"{one['seconds']:.2f}",
            f"{one['cpu'] / sizes['jsonl'] * 1e9:.1f}",
            f"{one['peak'] / sizes['arrow']:.2f}",
        ]
        for one in result["records"]
    ]
    head = ["file", "reader", "seconds", "core seconds a GB of JSON lines", "peak / Arrow table"]
    origin = (
        f"{result['mib']} MiB of chats of 1.7 kB as JSON lines, {sizes['arrow'] >> 20} MiB as an "
        f"Arrow table; one core of {cpu_text(found)}; medians of {result['rounds']}; "
        f"{found['date'][:10]}; commit {found['commit']}.\n"
    )
    return f"{origin}\n{table(head, lines, left=2)}"


if __name__ == "__main__":
    main(sys.argv[1:])
