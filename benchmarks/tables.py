"""What the suites for the CPU print alike: a line for each provider, and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .measure import Seconds

# Quantity, of which provider, and the factor of it that ours must stay under.
Targets = Sequence[tuple[str, str, float]]


def print_providers(
    seconds: Mapping[str, Seconds],
    peaks: Mapping[str, int],
    errors: Mapping[str, float],
    left_out: Mapping[str, str],
    dense: str,
) -> None:
    """One line for each provider, then those left out."""
    head = f"{'provider':34} {'median s':>9} {'quartiles':>15} {'/ dense':>8}"
    print(f"{head} {'peak MiB':>9} {'loss error':>11}")
    base = seconds[dense].median if dense in seconds else float("nan")
    for name, time in seconds.items():
        quartiles = f"{time.low:.3f}-{time.high:.3f}"
        error = f"{errors[name]:.2g}" if name in errors else "-"
        print(
            f"{name:34} {time.median:9.3f} {quartiles:>15} {time.median / base:8.2f} "
            f"{peaks[name] / 2**20:9.0f} {error:>11}"
        )
    for name, reason in left_out.items():
        print(f"{name:34} left out: {reason}")
    print(
        "peak: bytes of tensors allocated in one step, in a run of its own; BLAS scratch is not in"
    )


def verdicts(
    measured: Mapping[str, Mapping[str, float]], ours: str, targets: Targets
) -> list[dict[str, object]]:
    """Ours against each target whose provider was measured, printed and returned."""
    found: list[dict[str, object]] = []
    for quantity, other, limit in targets:
        values = measured[quantity]
        if ours not in values or other not in values:
            print(f"target {quantity} <= {limit:.3g} x {other}: not measured")
            continue
        ratio = values[ours] / values[other]
        met = "met" if ratio <= limit else "MISSED"
        print(f"target {quantity} <= {limit:.3g} x {other}: {ratio:.2f}, {met}")
        found.append({"quantity": quantity, "of": other, "limit": limit, "ratio": ratio})
    return found
