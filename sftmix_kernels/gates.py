r"""The objectives of fine-tuning that cost what next-token prediction (NTP) costs.

With p the probability of a token's label and ``nll = -log p``, a **gate** makes the loss of a token
``g * nll`` with ``g`` detached, so that its gradient is ``g * (softmax - onehot)``. The gate is
known once the log-sum-exp of the row is, between the two passes of a row kernel:

| gate | g | known as | source |
|---|---|---|---|
| `Power(k)` | ``p^k`` | DFT for k = 1; the gradient of ``-p^k / k`` | 2508.05629, 2510.00526 |
| `Threshold(tau)` | 1 where ``p >= tau``, else 0 | ProFit | |
| `Entropy(alpha)` | ``(H / log V)^alpha`` | EAFT | axolotl #3366 |
| `Clipped(old, eps)` | ``r = p / p_old`` where ``r < 1 + eps``, else 0 | PSFT | 2508.17784 |

Two more have no gate:

- label smoothing, ``(1 - e) nll - e mean_j log p_j``, with ``softmax - (1 - e) onehot - e / V``
  (as ``torch.nn.functional.cross_entropy`` and transformers have it);
- GEM-linear, ``sum_j q_j (log p_j - log p)`` with ``q = softmax(a / beta)`` detached and
  ``q - onehot`` (2408.16673).

`Objective` is what all paths are told of this, and the only place that numbers the kinds; the row
kernels of ``csrc/row_objectives.h`` follow it, and `reference.py` has each in dense PyTorch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .number_checks import SMALLEST, check_number


@dataclass(frozen=True)
class Power:
    """``p^k``: tokens count the less the less likely they are. ``k = 1`` is DFT.

    For ``gate=`` of `fused_cross_entropy` and `fused_sftmix_loss`, as the other three.

    Its gradient is that of ``-p^k / k`` (arXiv 2510.00526); the value is ``p^k * nll`` as in DFT
    (arXiv 2508.05629). ``k = 0`` is NTP.

    Example:
        >>> Power(1.0)
        Power(k=1.0)

    Raises:
        TypeError, ValueError: k is no finite number of at least 0.
    """

    k: float = 1.0

    def __post_init__(self) -> None:
        check_number("k", self.k, 0.0)


@dataclass(frozen=True)
class Threshold:
    """1 for tokens whose probability is at least ``tau``, else 0; ``keep="below"`` the others.

    Example:
        >>> Threshold(0.1, keep="below")
        Threshold(tau=0.1, keep='below')

    Raises:
        TypeError, ValueError: tau is no number in [0, 1], or keep neither ``"above"`` nor
            ``"below"``.
    """

    tau: float
    keep: Literal["above", "below"] = "above"

    def __post_init__(self) -> None:
        check_number("tau", self.tau, 0.0, 1.0)
        if self.keep not in ("above", "below"):
            raise ValueError(f"keep: expected 'above' or 'below', got {self.keep!r}")


@dataclass(frozen=True)
class Entropy:
    """``(H / log V)^alpha`` (EAFT): tokens of which the model is sure count less.

    H is the entropy of the whole distribution over V tokens, exact. The authors of EAFT take it
    from the 20 most likely tokens, and so do axolotl (``use_eaft``) and LLaMA-Factory
    (``use_eaft_loss``), divided by 3 in one of them: their values differ from ours.

    Example:
        >>> Entropy(alpha=1.0)
        Entropy(alpha=1.0)

    Raises:
        TypeError, ValueError: alpha is no finite number of at least 0.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0.0)


@dataclass(frozen=True, eq=False)
class Clipped:
    """``r = p / p_old`` while ``r < 1 + eps``, else 0 (PSFT, arXiv 2508.17784).

    The gradient is that of ``-min(r, clip(r, 1 - eps, 1 + eps))``. ``old_log_probs`` (...) float32
    are the labels' log-probabilities under an earlier state of the model, in labels' shape; what
    they are at ignored tokens does not matter.

    Example:
        >>> Clipped(torch.zeros(2, 3), eps=0.2).eps
        0.2

    Raises:
        TypeError, ValueError: old_log_probs is no float32 tensor, or eps no finite number of at
            least 0.
    """

    old_log_probs: Tensor
    eps: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.old_log_probs, Tensor):
            got = type(self.old_log_probs).__name__
            raise TypeError(f"old_log_probs: expected a Tensor, got {got}")
        if self.old_log_probs.dtype != torch.float32:
            raise TypeError(f"old_log_probs: expected float32, got {self.old_log_probs.dtype}")
        check_number("eps", self.eps, 0.0)


Gate: TypeAlias = Power | Threshold | Entropy | Clipped


class Kind(enum.IntEnum):
    """What the loss of a token is; ``csrc/row_objectives.h`` has the same numbers."""

    PLAIN = 0
    POWER = 1
    ABOVE = 2
    BELOW = 3
    ENTROPY = 4
    CLIPPED = 5
    SMOOTHED = 6
    GEM = 7


class Objective(NamedTuple):
    """The objective of some rows, in the order in which the row ops take it."""

    kind: int = Kind.PLAIN
    parameter: float = 0.0  # k, tau, alpha, eps, label_smoothing or gem_beta
    old_log_probs: Tensor | None = None  # (K,) float32
    stats: Tensor | None = None  # (3, K) float32, written: NLL, entropy, 1 where the label is top

    def rows(self, index: Tensor | slice) -> Objective:
        """Return the objective of some rows, with room for their own stats."""
        old, stats = self.old_log_probs, self.stats
        return self._replace(
            old_log_probs=None if old is None else old[index],
            stats=None if stats is None else stats.new_zeros(stats[:, index].shape),
        )

    def put_stats(self, index: Tensor | slice, of_rows: Objective) -> None:
        """Write the stats of some rows, if there are any, where those of all rows are."""
        if self.stats is not None and of_rows.stats is not None:
            self.stats[:, index] = of_rows.stats

    @property
    def is_plain(self) -> bool:
        """Say whether this is NTP, of which nobody wants to know more."""
        return self.kind == Kind.PLAIN and self.stats is None

    @property
    def needs_moment(self) -> bool:
        """Say whether rows need the mean of their logits under a softmax, as entropy does."""
        return self.stats is not None or self.kind in (Kind.ENTROPY, Kind.GEM)

    @property
    def depends_on_p(self) -> bool:
        """Say whether the gate is a function of the label's probability and nothing else."""
        return Kind.POWER <= self.kind <= Kind.BELOW or self.kind == Kind.CLIPPED

    def gate(self, nll: Tensor, evenness: Tensor | None = None) -> Tensor:
        """Return the gate of rows from their NLL (K,) and ``H / log V`` (K,); NaN stays NaN."""
        p, parameter = torch.exp(-nll), self.parameter
        if self.kind == Kind.POWER:
            gate = p.pow(parameter)
        elif self.kind == Kind.ABOVE:
            gate = (p >= parameter).to(p)
        elif self.kind == Kind.BELOW:
            gate = (p < parameter).to(p)
        elif self.kind == Kind.CLIPPED:
            assert self.old_log_probs is not None
            ratio = torch.exp(-nll - self.old_log_probs)
            gate = ratio.masked_fill(ratio >= 1.0 + parameter, 0.0)
        elif self.kind == Kind.ENTROPY:
            assert evenness is not None
            gate = evenness.clamp(min=0.0).pow(parameter)
        else:
            gate = torch.ones_like(p)
        return gate.masked_fill(nll.isnan(), torch.nan)


PLAIN = Objective()


def objective_of_rows(
    old_log_probs: Tensor | None,
    parameter: Tensor | None,  # () on the host
    kind: int,
    stats: Tensor | None,
) -> Objective:
    """Return the objective that an op of rows is told of.

    Its parameter is a tensor: of a number ``torch.compile`` would compile each value anew.
    """
    number = 0.0 if parameter is None else float(parameter)
    return Objective(kind, number, old_log_probs, stats)


def objective_of(
    gate: Gate | None = None,
    label_smoothing: float = 0.0,
    gem_beta: float | None = None,
) -> Objective:
    """Return the objective that a call asks for.

    Raises:
        TypeError, ValueError: a gate that is none, numbers out of range, or more than one of the
            three, which exclude each other.
    """
    check_number("label_smoothing", label_smoothing, 0.0, 1.0, open_end=True)
    if gem_beta is not None:
        # The temperature divides logits in float32.
        check_number("gem_beta", gem_beta, SMALLEST)
    asked = {
        "gate": gate is not None,
        "label_smoothing": label_smoothing != 0.0,
        "gem_beta": gem_beta is not None,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    if len(names) > 1:
        raise ValueError(
            f"{names[0]}: expected None or 0 beside {names[1]}, since the two exclude each other; "
            f"leave one of them out"
        )
    if gem_beta is not None:
        return Objective(Kind.GEM, gem_beta)
    if label_smoothing:
        return Objective(Kind.SMOOTHED, label_smoothing)
    return PLAIN if gate is None else gate_objective(gate)


def gate_objective(gate: Gate) -> Objective:
    """Return the objective of a gate.

    Raises:
        TypeError: it is none of the four.
    """
    if isinstance(gate, Power):
        return Objective(Kind.POWER, gate.k)
    if isinstance(gate, Threshold):
        return Objective(Kind.ABOVE if gate.keep == "above" else Kind.BELOW, gate.tau)
    if isinstance(gate, Entropy):
        return Objective(Kind.ENTROPY, gate.alpha)
    if isinstance(gate, Clipped):
        return Objective(Kind.CLIPPED, gate.eps, gate.old_log_probs)
    raise TypeError(
        "gate: expected None, Power, Threshold, Entropy or Clipped, "
        f"got {gate.__name__ + ' itself' if isinstance(gate, type) else type(gate).__name__}"
    )
