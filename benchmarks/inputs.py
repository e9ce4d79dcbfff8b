"""Make inputs of the losses: trained-like, where tokens are predicted well, and random ones.

Legend: P pairs, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MU = 0.2  # the weight of Mixup in NTP + Mixup
# The threshold under which schedules that filter leave probabilities out.
FILTER_EPS = 2.0**-12


class Inputs(NamedTuple):
    """Rows [c | u]: row p is mixed with row P + p."""

    hidden: Tensor  # (2P, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (2P,)
    lam: Tensor  # (P,)

    def given(self, one_lam: bool) -> Inputs:
        """Return what a provider is given that takes a single lam for the batch, or one a pair."""
        return self._replace(lam=torch.full_like(self.lam, 0.3)) if one_lam else self


Loss = Callable[[Inputs], Tensor]


def make_inputs(
    pairs: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trained: bool = False,
) -> Inputs:
    """Return seeded inputs; lam is from Beta(0.5, 0.5), logits are of about unit size.

    ``trained`` turns each hidden state towards the weight of its label, each row by another amount,
    as training does. Random inputs give every token a probability of about 1 / V, which flatters
    whoever skips small probabilities.
    """
    torch.manual_seed(0)
    half = torch.tensor(0.5)
    hidden = torch.randn(2 * pairs, hidden_size, device=device)
    weight = torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5
    labels = torch.randint(0, vocab_size, (2 * pairs,), device=device)
    lam = torch.distributions.Beta(half, half).sample((pairs,)).to(device)
    if trained:
        # Towards a target whose probability without it is 1 / V: from rare to sure.
        strength = torch.empty(2 * pairs, 1, device=device).uniform_(0.6, 2.0)
        strength *= torch.tensor(float(vocab_size)).log().to(device)
        hidden += strength * F.normalize(weight[labels], dim=-1)
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, lam)


def peakedness(x: Inputs) -> dict[str, float]:
    """Return the label's mean probability, and a row's tokens above the filter."""
    with torch.no_grad():
        rows = slice(0, min(512, x.labels.numel()))
        p = F.linear(x.hidden[rows], x.weight).float().softmax(-1)
        at_label = p.gather(-1, x.labels[rows].unsqueeze(-1))
        tokens = (p > FILTER_EPS).sum(-1).float()
        return {
            "mean_target_probability": float(at_label.mean()),
            "mean_tokens_above_filter": float(tokens.mean()),
        }
