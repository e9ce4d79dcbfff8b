"""What the LM head does to its raw logits: scale and softcap."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitTransform(NamedTuple):
    """``f(x) = cap * tanh(scale * x / cap)``, or ``scale * x`` where there is no cap."""

    scale: float
    softcap: float | None
    has_bias: bool  # whether raw logits may be -inf, a vocabulary entry masked by its bias

    def tempered(self, beta: float) -> LogitTransform:
        """Return ``f / beta``."""
        softcap = None if self.softcap is None else self.softcap / beta
        return self._replace(scale=self.scale / beta, softcap=softcap)

    def apply_(self, logits: Tensor, needs_slope: bool) -> Tensor | None:
        """Turn raw logits into ``f(raw)`` in place; return ``f' / scale`` where it is not 1."""
        if self.softcap is None:
            if self.scale != 1.0:
                logits.mul_(self.scale)
            return None
        logits.mul_(self.scale / self.softcap).tanh_()
        slope = None
        if needs_slope:
            # (1 - t)(1 + t): 1 - t^2 cancels where the cap is nearly reached.
            slope = logits.neg().add_(1.0)
            slope.addcmul_(slope, logits)
        logits.mul_(self.softcap)
        return slope
