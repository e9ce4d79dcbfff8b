"""What was promised of each suite, beside what a run found.

A report is what a suite writes as JSON; a record is one of its measurements. A figure that is not
there is neither reached nor missed, and of a quick run, whose sizes are too small, none is judged.
A figure that is not a number counts as missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Report = Mapping[str, Any]
Record = Mapping[str, Any]

# Names that the suites write.
STEP, FORWARD = "forward + backward", "forward"
NTP, MIXUP, BOTH = "NTP", "Mixup", "NTP + Mixup"
ROW_CHUNKS, VOCAB_TILES = "sftmix, row_chunks", "sftmix, vocab_tiles"
FILTERED = "sftmix, vocab_tiles, filter 2^-12"
DENSE, BARE = "dense PyTorch", "bare matrix products"
TORCH = "torch linear_cross_entropy, chunked"
COPY, PAIR_ROWS = "copy", "pair_rows_"
STREAMING, BARE_CHUNKS = "streaming_perplexity", "bare product, same chunks"
BARE_CALL = "bare product, one call"
DENSE_PERPLEXITY = "dense cross_entropy"
FOLD, FOLD_OPERATIONS = "fold_logits", "PyTorch operations"
IN_HBM, IN_L2 = "all logits in HBM", "chunk in L2"
SCORE, SCORE_FORWARD = "score_examples", "forward with logits, same batches"
SCORE_LOOP = "obvious loop, losses of examples"
OUR_SFTMIX, OUR_NTP = "SFTMixTrainer, sftmix", "SFTMixTrainer, ntp"
THEIR_NTP = "transformers.Trainer, ntp"

# What tells one training step, or one size of logits, from another.
STEP_SIZE = ("model", "batch", "length")
LOGITS_SIZE = ("rows", "vocab_size", "dtype")
COPY_SIZE = ("place", "dtype", "rows", "columns")
FOLD_SIZE = (*COPY_SIZE, "kind")  # with which options; a copy has none
TOO_SMALL = "sizes too small"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Target(NamedTuple):
    """One promise; ``reached`` is None where a figure is missing or must not be judged."""

    says: str
    value: float | None
    limit: float
    reached: bool | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """In words."""
        if self.reached is None:
            return "not measured" if self.value is None else "not judged"
        return "reached" if self.reached else "MISSED"


def at_most(says: str, value: float | None, limit: float, note: str = "") -> Target:
    return Target(says, value, limit, None if value is None else value <= limit, note)


def at_least(says: str, value: float | None, limit: float, note: str = "") -> Target:
    return Target(says, value, limit, None if value is None else value >= limit, note)


def find(report: Report, measure: str, **fields: object) -> list[Record]:
    """Records of a measure whose fields have these values, in the file's order."""
    wanted = {"measure": measure, **fields}
    return [
        record
        for record in report["records"]
        if all(record.get(name) == value for name, value in wanted.items())
    ]


def first(report: Report, measure: str, **fields: object) -> Record | None:
    """The first of `find`, None where there is none."""
    return next(iter(find(report, measure, **fields)), None)


def values(report: Report, measure: str, name: str) -> list[Any]:
    """What a field of a measure's records is, each once, in the file's order."""
    return list(dict.fromkeys(record[name] for record in find(report, measure)))


def same(record: Record, names: Sequence[str]) -> dict[str, Any]:
    """Some fields of a record, to `find` another that shares them."""
    return {name: record.get(name) for name in names}


def figure(record: Record | None, name: str = "median") -> float | None:
    """A number of a record that may not be there."""
    return None if record is None else record.get(name)


def ratio(one: float | None, other: float | None) -> float | None:
    """Their quotient, None where one is missing and NaN where the other is 0."""
    if one is None or other is None:
        return None
    return one / other if other else math.nan


def rate(record: Record | None, amount: str) -> float | None:
    """Operations or bytes a second."""
    return ratio(figure(record, amount), figure(record))


def is_ours(record: Record) -> bool:
    """Whether it is a provider of this repository; a ceiling is nobody's."""
    return bool(record.get("ours")) and record["who"] not in (COPY, BARE, BARE_CHUNKS, BARE_CALL)


def by_time(records: Sequence[Record]) -> list[Record]:
    """Fastest first; what is not a number last."""
    return sorted(records, key=lambda record: (math.isnan(record["median"]), record["median"]))


def headline(report: Report, measure: str = STEP, **fields: object) -> str | None:
    """The case that stands for all: the first in the file."""
    record = first(report, measure, **fields)
    return None if record is None else record["case"]


def sizes(record: Record) -> str:
    """A case with what its name leaves out."""
    return f"{record['case']}, D = {record['hidden_size']}, V = {record['vocab_size']}"


def cpu_text(facts: Mapping[str, Any]) -> str:
    return f"{facts['cpu']} ({facts['cpu_capability']}), {facts['threads']} threads"


def report_of(reports: Sequence[Report], suite: str, device: str, quick: bool) -> Report | None:
    """The newest report of a suite on a device, of full sizes unless ``quick`` allows others."""
    found = [
        report
        for report in reports
        if report["suite"] == suite
        and report["settings"]["device"] == device
        and (quick or not report["settings"]["quick"])
    ]
    return max(
        found, key=lambda r: (not r["settings"]["quick"], r["facts"].get("date", "")), default=None
    )


def loss_of(report: Report, task: str, who: str, case: str | None = None) -> Record | None:
    """Forward + backward of one provider, by default in the headline case."""
    return first(report, STEP, task=task, who=who, case=case or headline(report))


def best_peer(report: Report) -> str | None:
    """The fastest on NTP alone of the headline case that is neither ours nor the bare products."""
    seconds = {
        record["who"]: record["median"]
        for record in find(report, STEP, case=headline(report), task=NTP, ours=False)
        if record["who"] != BARE and math.isfinite(record["median"])
    }
    return min(seconds, key=seconds.__getitem__, default=None)


def copy_beside(report: Report, record: Record) -> Record | None:
    """The copy that a row kernel or a fold is held to, of the same dtype.

    A row kernel's is of the same size, a fold's in HBM, or where there is none in the same place.
    """
    if record["measure"] != "fold":
        return first(report, record["measure"], who=COPY, **same(record, LOGITS_SIZE))
    places = {
        copy.get("place"): copy for copy in find(report, "fold", who=COPY, dtype=record["dtype"])
    }
    return places.get(IN_HBM, places.get(record["place"]))


def cuda_loss(report: Report) -> list[Target]:
    def seconds(task: str, who: str | None, case: str | None = None) -> float | None:
        return None if who is None else figure(loss_of(report, task, who, case))

    peer = best_peer(report)
    note = f"best peer: {peer}" if peer else "no peer measured"
    ours, ntp = (seconds(task, ROW_CHUNKS) for task in (BOTH, NTP))
    kernel = first(report, "row kernel", who=PAIR_ROWS)
    copy = kernel and copy_beside(report, kernel)
    share, which = forward_share(report)
    trained = headline(report, inputs="trained-like")
    says = "filtered vocab_tiles / row_chunks, trained-like inputs"
    filtered = None
    if trained is not None:
        filtered = ratio(seconds(BOTH, FILTERED, trained), seconds(BOTH, ROW_CHUNKS, trained))
    bare, peers = seconds(NTP, BARE), [seconds(task, peer) for task in (NTP, BOTH)]
    return [
        at_most(f"{BOTH} / {BARE}", ratio(ours, bare), 1.05),
        at_most(f"{NTP} / best peer on {NTP}", ratio(ntp, peers[0]), 1.0, note),
        at_most(f"{BOTH} / {BOTH} of that peer", ratio(ours, peers[1]), 0.67, note),
        at_most(f"{BOTH} / {NTP} of ours", ratio(ours, ntp), 1.10, "SFTMix at the price of NTP"),
        at_least(
            f"{PAIR_ROWS}, share of copy bandwidth",
            ratio(rate(kernel, "bytes"), rate(copy, "bytes")),
            0.85,
        ),
        at_least("forward of vocab_tiles, share of the product's rate", share, 0.60, which),
        at_most("exact vocab_tiles / row_chunks", ratio(seconds(BOTH, VOCAB_TILES), ours), 1.6),
        at_most(says, filtered, 1.0),
    ]


def forward_share(report: Report) -> tuple[float | None, str]:
    """The lowest rate of vocab_tiles without gradients, by that of the product, and its task."""
    case = headline(report, FORWARD)
    product = rate(first(report, FORWARD, case=case, who=BARE), "operations")
    shares = {
        record["task"]: ratio(rate(record, "operations"), product)
        for record in find(report, FORWARD, case=case, who=VOCAB_TILES)
    }
    known = {task: share for task, share in shares.items() if share is not None}
    # NaN is neither lower nor higher than anything: it must not hide behind another task.
    task = min(known, key=lambda name: (not math.isnan(known[name]), known[name]), default=None)
    return (None, "") if task is None else (known[task], f"the slowest: {task}")


def cpu_loss(report: Report) -> list[Target]:
    ours, dense = (loss_of(report, BOTH, who) for who in (ROW_CHUNKS, DENSE))
    ntp, torch_ntp = (figure(loss_of(report, NTP, who)) for who in (ROW_CHUNKS, TORCH))
    peaks = ratio(figure(ours, "peak_bytes"), figure(dense, "peak_bytes"))
    return [
        at_most(f"{BOTH} / {DENSE}", ratio(figure(ours), figure(dense)), 0.80),
        at_most(f"{BOTH} / {DENSE}, extra memory", peaks, 0.30),
        at_most(f"{BOTH} / {TORCH}, {NTP} alone", ratio(figure(ours), torch_ntp), 0.65),
        at_most(f"{BOTH} / {NTP} of ours", ratio(figure(ours), ntp), 1.25),
    ]


def perplexity_of(report: Report, who: str) -> Record | None:
    return first(report, "perplexity", case=headline(report, "perplexity"), who=who)


def cpu_perplexity(report: Report) -> list[Target]:
    ours, chunks, dense = (
        perplexity_of(report, who) for who in (STREAMING, BARE_CHUNKS, DENSE_PERPLEXITY)
    )
    peaks = ratio(figure(ours, "peak_bytes"), figure(dense, "peak_bytes"))
    fold = first(report, "fold", who=FOLD, dtype="float32")
    plain = fold and first(report, "fold", who=FOLD_OPERATIONS, **same(fold, FOLD_SIZE))
    score, forward, loop = (
        figure(first(report, "scoring", who=who)) for who in (SCORE, SCORE_FORWARD, SCORE_LOOP)
    )
    return [
        at_most(f"{STREAMING} / {BARE_CHUNKS}", ratio(figure(ours), figure(chunks)), 1.20),
        at_most(f"{STREAMING} / {DENSE_PERPLEXITY}", ratio(figure(ours), figure(dense)), 0.50),
        at_most(f"{STREAMING} / {DENSE_PERPLEXITY}, extra memory", peaks, 0.10),
        at_most(f"{FOLD} / {FOLD_OPERATIONS}, float32", ratio(figure(fold), figure(plain)), 1 / 3),
        at_most(f"{SCORE} / {SCORE_FORWARD}", ratio(score, forward), 1.10),
        at_most(f"{SCORE} / {SCORE_LOOP}", ratio(score, loop), 1.0),
    ]


def cuda_perplexity(report: Report) -> list[Target]:
    ours, chunks = (figure(perplexity_of(report, who)) for who in (STREAMING, BARE_CHUNKS))
    note = "bytes a second: a fold reads each logit, a copy in HBM reads and writes it"
    shares = {}
    for place in (IN_HBM, IN_L2):
        fold = first(report, "fold", who=FOLD, place=place, dtype="bfloat16")
        copy = fold and copy_beside(report, fold)
        shares[place] = ratio(rate(fold, "bytes"), rate(copy, "bytes"))
    return [
        at_most(f"{STREAMING} / {BARE_CHUNKS}", ratio(ours, chunks), 1.05),
        *(
            at_least(f"{FOLD}, {place}, share of copy bandwidth", share, 0.85, note)
            for place, share in shares.items()
        ),
    ]


def step_name(record: Record) -> str:
    return f"{record['model']}, {record['batch']} x {record['length']}"


def step_targets(report: Report) -> list[Target]:
    """Two of time and one of memory for each model and size of batch."""
    sizes = {step_name(record): same(record, STEP_SIZE) for record in find(report, "step")}
    found = []
    for name, size in sizes.items():
        records = [
            first(report, "step", who=who, **size) for who in (OUR_SFTMIX, OUR_NTP, THEIR_NTP)
        ]
        sftmix, ntp, theirs = map(figure, records)
        peaks = [record and record.get("peak_bytes") for record in records[1:]]
        found.append(at_most(f"{name}: sftmix / ntp, of ours", ratio(sftmix, ntp), 1.05))
        found.append(at_most(f"{name}: ntp of ours / {THEIR_NTP}", ratio(ntp, theirs), 1.0))
        says = f"{name}: peak of ours / {THEIR_NTP}"
        found.append(at_most(says, ratio(*peaks), 1.0))
    return found


def over_formula(report: Report) -> dict[str, float]:
    """Peak memory by the formula's, for each measurement that has one."""
    return {
        f"{record['who']}, {record['task']}, N = {record['rows']}, D = {record['hidden_size']}, "
        f"V = {record['vocab_size']}, {record['dtype']}"
        + (", interpreted" if record.get("interpreted") else ""): quotient
        for record in find(report, "memory")
        if (quotient := ratio(record.get("peak_bytes"), record.get("formula_bytes"))) is not None
    }


def worst(values: Mapping[str, float]) -> str | None:
    """The name of the largest value; one that is not a number is worse than any."""
    return max(values, key=lambda name: (math.isnan(values[name]), values[name]), default=None)


def memory_targets(report: Report) -> list[Target]:
    quotients = over_formula(report)
    which = worst(quotients)
    value = None if which is None else quotients[which]
    found = [at_most("peak memory / formula, the worst", value, 1.05, which or "")]
    if report["settings"]["device"] == "cuda":
        # Gradients are there twice when backward ends: unscaled, dW in float32, and handed out.
        over = {}
        for record in find(report, "memory", who=VOCAB_TILES):
            rows, columns = record["rows"], record["vocab_size"]
            size = ELEMENT_BYTES[record["dtype"]]
            gradients = record["hidden_size"] * (2 * size * rows + (size + 4) * columns)
            if record.get("peak_bytes") is not None:
                name = f"{record['task']}, N = {rows}, V = {columns}"
                peak = record["peak_bytes"]
                over[name] = peak if math.isnan(peak) else max(0.0, (peak - gradients) / 2**20)
        which = worst(over)
        value = None if which is None else over[which]
        says = "vocab_tiles, peak over its gradients, MiB, the worst"
        # Handing them out can take more than the workspace, which is then hidden behind it: 0.
        found.append(at_most(says, value, 64.0, which or ""))
    return found


TARGETS: dict[tuple[str, str], Callable[[Report], list[Target]]] = {
    ("cpu", "loss"): cpu_loss,
    ("cuda", "loss"): cuda_loss,
    ("cpu", "perplexity"): cpu_perplexity,
    ("cuda", "perplexity"): cuda_perplexity,
    ("cpu", "step"): step_targets,
    ("cuda", "step"): step_targets,
    ("cpu", "memory"): memory_targets,
    ("cuda", "memory"): memory_targets,
}


def targets(report: Report) -> list[Target]:
    """All promises of the report's suite on its device; none where nothing was promised."""
    settings = report["settings"]
    judge = TARGETS.get((settings["device"], report["suite"]))
    found = judge(report) if judge else []
    if settings["quick"]:
        found = [target._replace(reached=None, note=TOO_SMALL) for target in found]
    return found
