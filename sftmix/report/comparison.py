"""Compare a measurement over seeds with a baseline's: means, spreads, and a paired t-test.

Runs of one seed share their batches, so a seed's effect on both cancels in the difference d[s] =
value[s] - baseline[s] over the common seeds s:

    t = mean(d) / (std(d) / sqrt(n))        n - 1 degrees of freedom, two-sided

Standard deviations are those of a sample (n - 1). The test needs scipy, one
of the extra plots.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass

LEVEL = 0.95  # of the confidence interval; a p-value below 1 - LEVEL is called significant


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`, in the unit of the values; None means too few seeds."""

    n: int  # seeds of the values
    mean: float
    std: float | None  # of the values; from two seeds on
    paired_n: int  # seeds that the baseline has too
    difference: float | None  # mean over the common seeds; from one on
    interval: tuple[float, float] | None  # of the difference, at LEVEL
    p_value: float | None

    @property
    def significant(self) -> bool | None:
        """Whether the difference is significant at 1 - LEVEL; None if it was not tested."""
        return None if self.p_value is None else self.p_value < 1 - LEVEL


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison:
    """Compare one finite value for each seed with a baseline's (`scipy.stats.ttest_rel`).

    The test needs two common seeds and differences that are not all the same, up to rounding: the
    spread of equal ones would be estimated as zero. Without it `interval` and `p_value` are
    None.

    Raises:
        ValueError: no value, or one that is not finite.
        ImportError: scipy is not installed and there is something to test.
    """
    if not values:
        raise ValueError("values: expected at least one seed, got none")
    for name, given in (("values", values), ("baseline", baseline)):
        for seed, value in given.items():
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected finite numbers, got {value} for seed {seed}")
    common = sorted(values.keys() & baseline.keys())
    differences = [values[seed] - baseline[seed] for seed in common]
    interval, p_value = None, None
    pairs = [values[seed] for seed in common], [baseline[seed] for seed in common]
    rounding = 4 * sys.float_info.epsilon * max(map(abs, [*pairs[0], *pairs[1]]), default=0.0)
    if len(common) > 1 and max(differences) - min(differences) > rounding:
        interval, p_value = paired_test(*pairs)
    return Comparison(
        n=len(values),
        mean=statistics.fmean(values.values()),
        std=statistics.stdev(values.values()) if len(values) > 1 else None,
        paired_n=len(common),
        difference=statistics.fmean(differences) if common else None,
        interval=interval,
        p_value=p_value,
    )


def paired_test(first: list[float], second: list[float]) -> tuple[tuple[float, float], float]:
    """Return the interval of the mean of `first - second` at LEVEL, and the p-value.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import ttest_rel  # an optional extra
    except ImportError as error:
        raise ImportError("a paired test needs scipy: pip install scipy") from error
    result = ttest_rel(first, second)
    interval = result.confidence_interval(LEVEL)
    return (float(interval.low), float(interval.high)), float(result.pvalue)
