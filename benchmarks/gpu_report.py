"""What the GPU's figures say: ours against each target, and the tables.

A result is the dictionary that `bench_gpu.run` fills section by section; a section that is not
there was not measured, and a target that hangs on it is neither reached nor missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .bench_row_kernels import PAIR_ROWS, PRODUCTS
from .perplexity_providers import BARE_CHUNKS, FOLD, OURS
from .providers import BOTH, FILTERED, NTP, ROW_CHUNKS, VOCAB_TILES

Result = Mapping[str, Any]
BARE = "three bare products"
RANDOM, PEAKED = "random inputs", "peaked inputs"
ONE_PRODUCT = "bare product, one call"
# Where the logits lie that a fold reads.
IN_HBM, IN_HBM_CHUNK, IN_L2 = "all logits in HBM", "chunk in HBM", "chunk in L2"
NOT_MEASURED = "not measured"


class Target(NamedTuple):
    """One promise; ``reached`` is None where a figure is missing."""

    says: str
    value: float | None
    limit: float
    reached: bool | None
    note: str = ""


def at_most(says: str, value: float | None, limit: float, note: str = "") -> Target:
    return Target(says, value, limit, None if value is None else value <= limit, note)


def at_least(says: str, value: float | None, limit: float, note: str = "") -> Target:
    return Target(says, value, limit, None if value is None else value >= limit, note)


def median(result: Result, inputs: str, name: str) -> float | None:
    """Seconds of a provider, None where it was not measured."""
    found = result.get(inputs, {}).get("providers", {}).get(name)
    return None if found is None else found["median"]


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def best_peer(result: Result) -> str | None:
    """The fastest on NTP alone that is not ours."""
    rows = result.get(RANDOM, {}).get("providers", {})
    peers = {
        row["who"]: row["median"] for row in rows.values() if row["task"] == NTP and not row["ours"]
    }
    return min(peers, key=peers.__getitem__, default=None)


def targets(result: Result) -> list[Target]:
    """All of them, measured or not."""
    ours = median(result, RANDOM, f"{BOTH}: {ROW_CHUNKS}")
    peer = best_peer(result)
    note = f"best peer: {peer}" if peer else "no peer measured"
    peer_ntp = median(result, RANDOM, f"{NTP}: {peer}")
    peer_both = median(result, RANDOM, f"{BOTH}: {peer}")
    rows = result.get("row kernels", {}).get(PAIR_ROWS, {})
    memory = result.get("memory", {}).get(f"{BOTH}: {VOCAB_TILES}")
    forward = result.get("forward", {})
    product = forward.get(PRODUCTS[0], {}).get("tflops")
    slowest = min(
        (row["tflops"] for row in forward.values() if row["who"] == VOCAB_TILES), default=None
    )
    tiles, filtered = (
        ratio(median(result, kind, f"{BOTH}: {who}"), median(result, kind, f"{BOTH}: {ROW_CHUNKS}"))
        for kind, who in ((RANDOM, VOCAB_TILES), (PEAKED, FILTERED))
    )
    return [
        at_most(f"fused_sftmix_loss / {BARE}", ratio(ours, median(result, RANDOM, BARE)), 1.05),
        at_most(
            "fused_cross_entropy / best peer on NTP",
            ratio(median(result, RANDOM, f"{NTP}: {ROW_CHUNKS}"), peer_ntp),
            1.0,
            note,
        ),
        at_most("fused_sftmix_loss / NTP + Mixup of that peer", ratio(ours, peer_both), 0.67, note),
        at_least("pair-row kernel, share of copy bandwidth", rows.get("share_of_copy"), 0.85),
        at_most(
            "workspace of vocab_tiles, MiB",
            None if memory is None else memory["workspace_bytes"] / 2**20,
            64.0,
            "" if memory is None else f"N = {memory['rows']}, forward + backward",
        ),
        at_least(
            "forward of vocab_tiles, share of the product's rate",
            ratio(slowest, product),
            0.60,
            "the slowest of the three ops",
        ),
        at_most("exact vocab_tiles / row_chunks", tiles, 1.6),
        at_most("filtered vocab_tiles / row_chunks, peaked inputs", filtered, 1.0),
    ]


def perplexity_targets(result: Result) -> list[Target]:
    """Those of perplexity, measured or not."""
    seconds = {
        name: row["median"]
        for name, row in result.get("perplexity", {}).get("providers", {}).items()
    }
    whole = ratio(seconds.get(OURS), seconds.get(BARE_CHUNKS))
    shares = {
        row["place"]: row.get("share_of_copy")
        for row in result.get("perplexity fold", {}).values()
        if row["step"] == FOLD and row["dtype"] == "bfloat16"
    }
    note = "bytes moved a second: a fold reads, a copy in HBM reads and writes"
    return [
        at_most(f"{OURS} / {BARE_CHUNKS}", whole, 1.05),
        *(
            at_least(f"{FOLD}, {place}, share of copy bandwidth", shares.get(place), 0.85, note)
            for place in (IN_HBM, IN_L2)
        ),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, with the first column left and the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None, form: str = ".3f") -> str:
    return NOT_MEASURED if value is None else format(value, form)


def milliseconds(row: Mapping[str, float]) -> list[str]:
    """Median and quartiles."""
    median, low, high = (1e3 * row[name] for name in ("median", "low", "high"))
    return [f"{median:.3f}", f"{low:.3f}-{high:.3f}"]


def target_table(found: Sequence[Target]) -> str:
    verdict = {None: "-", True: "reached", False: "MISSED"}
    rows = [
        [
            target.says,
            number(target.value),
            f"{target.limit:g}",
            verdict[target.reached],
            target.note,
        ]
        for target in found
    ]
    return table(("target", "value", "limit", "verdict", "note"), rows)


def race_table(race: Result) -> str:
    """Providers by time."""
    bare = race["providers"].get(BARE, {}).get("median")
    rows = []
    for name, row in sorted(race["providers"].items(), key=lambda item: item[1]["median"]):
        known = (row.get("workspace_bytes"), row.get("error_of_dense"), row.get("relative_error"))
        workspace, of_dense, relative = known
        rows.append(
            [
                name,
                *milliseconds(row),
                number(ratio(row["median"], bare), ".2f"),
                "-" if workspace is None else f"{workspace / 2**20:.0f}",
                "-" if of_dense is None else f"{of_dense:.2f}",
                "-" if relative is None else f"{relative:.2g}",
            ]
        )
    head = ("provider", "median ms", "quartiles", f"/ {BARE}", "workspace MiB")
    return table((*head, "gradient error / dense", "relative"), rows)


def rate_table(rows: Mapping[str, Mapping[str, float]], column: str, form: str = ".1f") -> str:
    """A time and one figure made of it."""
    lines = [
        [name, *milliseconds(row), number(row.get(column), form)] for name, row in rows.items()
    ]
    return table(("", "median ms", "quartiles", column.replace("_", " ")), lines)


def perplexity_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Providers by time."""
    bare = rows.get(BARE_CHUNKS, {}).get("median")
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["median"]):
        space, error = row.get("workspace_bytes"), row.get("loss_error")
        lines.append(
            [
                name,
                *milliseconds(row),
                number(ratio(row["median"], bare), ".3f"),
                number(row.get("tflops"), ".1f"),
                "-" if space is None else f"{space / 2**20:.0f}",
                "-" if error is None else f"{error:.2g}",
            ]
        )
    head = ("provider", "median ms", "quartiles", f"/ {BARE_CHUNKS}", "TFLOP/s of the product")
    return table((*head, "workspace MiB", "loss error"), lines)


def fold_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rates of the fold and of copies."""
    lines = [
        [
            name,
            *milliseconds(row),
            f"{row['gb_per_second']:.0f}",
            number(row.get("share_of_copy"), ".3f"),
        ]
        for name, row in rows.items()
    ]
    return table(("", "median ms", "quartiles", "GB/s", "share of copy"), lines)


def perplexity_parts(result: Result) -> list[str]:
    """Tables of what was measured of perplexity."""
    parts = []
    if "perplexity" in result:
        whole = result["perplexity"]
        missing = [f"- {name}: left out, {reason}" for name, reason in whole["left_out"].items()]
        found = perplexity_table(whole["providers"])
        parts += ["## Perplexity, no gradients", "", found, *missing, ""]
    if "perplexity fold" in result:
        says = "Bytes moved a second: a fold reads each logit, a copy reads and writes it."
        parts += ["## Fold of logits", "", says, "", fold_table(result["perplexity fold"])]
    if "perplexity tuning" in result:
        found = rate_table(result["perplexity tuning"], "of_products", ".3f")
        parts += ["## Workspaces of perplexity, by times of its products", "", found]
    return parts


def grid_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    lines = [
        [f"{row['model']}: N {row['rows']}, D {row['hidden_size']}, V {row['vocab_size']}"]
        + [number(row["milliseconds"].get(name), ".2f") for name in names]
        for row in rows
    ]
    return table(("milliseconds", *names), lines)


def markdown(facts: Mapping[str, object], result: Result) -> str:
    """Facts, verdicts, and a table for each section that was measured."""
    parts = ["# GPU measurements", ""]
    parts += [f"- {name}: {value}" for name, value in facts.items()]
    parts += [f"- {name}: {value}" for name, value in result["settings"].items()]
    parts += ["", "## Targets", "", target_table([Target(**found) for found in result["targets"]])]
    for kind in (RANDOM, PEAKED):
        if kind in result:
            share = result[kind]["inputs"]
            parts += [
                f"## Forward + backward, {kind}",
                "",
                f"Mean probability of the label {share['mean_target_probability']:.2g}; "
                f"{share['mean_tokens_above_filter']:.1f} tokens of a row above the filter.",
                "",
                race_table(result[kind]),
            ]
    parts += perplexity_parts(result)
    rates = (
        ("products", "Bare matrix products", "tflops", ".1f"),
        ("forward", "Forward alone", "tflops", ".1f"),
        ("row kernels", "Row kernels", "share_of_copy", ".3f"),
        ("tuning", "Launch constants of the pair-row kernel", "share_of_copy", ".3f"),
    )
    for name, title, column, form in rates:
        if name in result:
            parts += [f"## {title}", "", rate_table(result[name], column, form)]
    if "memory" in result:
        lines = [
            [name, str(row["rows"]), f"{row['workspace_bytes'] / 2**20:.1f}"]
            for name, row in result["memory"].items()
        ]
        parts += ["## Workspace", "", table(("provider", "N", "MiB"), lines)]
    if "same bits" in result:
        lines = [[name, str(row["repeats"]), str(row["equal"])] for name, row in
                 result["same bits"].items()]  # fmt: skip
        parts += ["## Same bits", "", table(("provider", "repeats", "equal"), lines)]
    if result.get("grid"):
        parts += ["## Sizes of real models", "", grid_table(result["grid"])]
    for name in ("left_out", "failed"):
        lines = [[who, " ".join(why.split())[:300]] for who, why in result.get(name, {}).items()]
        if lines:
            parts += [f"## {name.replace('_', ' ').capitalize()}", "", table(("", "why"), lines)]
    return "\n".join(parts) + "\n"
