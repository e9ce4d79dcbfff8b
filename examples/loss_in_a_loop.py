"""The fused loss in a training loop of your own, without the rest of sftmix: seconds on a CPU.

python examples/loss_in_a_loop.py [STEPS]

A small transformer learns to count on: each row of the data counts up by its own step. Rows of a
batch come in pairs, [confident, unconfident, confident, ...]. Here the confident half is simply
that of the small steps; `sftmix score` finds it by perplexity.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from sftmix_kernels import fused_sftmix_loss

VOCABULARY, WIDTH, LENGTH, PAIRS = 256, 64, 16, 4


class Model(nn.Module):
    """A causal transformer that returns what its head would read: the loss multiplies the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return hidden states (B, L, D)."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.tokens(tokens) + self.positions.weight[:length]
        hidden = self.layers(hidden, mask=mask, is_causal=True)
        assert isinstance(hidden, Tensor)
        return hidden


def batch() -> tuple[Tensor, Tensor]:
    """Return tokens and labels, already shifted; even rows are confident, odd ones are not."""
    steps = torch.stack([torch.randint(1, 4, (PAIRS,)), torch.randint(4, 32, (PAIRS,))], 1)
    rows = steps.reshape(-1, 1) * torch.arange(LENGTH + 1) + torch.randint(99, (2 * PAIRS, 1))
    rows %= VOCABULARY
    return rows[:, :-1], rows[:, 1:]


def main(steps: int = 100) -> float:
    """Train, and return the last NTP loss."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    beta = torch.distributions.Beta(0.5, 0.5)
    # The n-th token of a confident row is mixed with the n-th of the row after it.
    numbers = torch.arange(2 * PAIRS * LENGTH).view(PAIRS, 2, LENGTH)
    pair_c, pair_u = numbers[:, 0].reshape(-1), numbers[:, 1].reshape(-1)
    for step in range(steps):
        tokens, labels = batch()
        lam = beta.sample((PAIRS,)).repeat_interleave(LENGTH)  # one for each pair of rows
        loss, ntp, mixup = fused_sftmix_loss(
            model(tokens), model.head.weight, labels, pair_c, pair_u, lam, mu=0.2
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss:.3f}  NTP {ntp:.3f}  Mixup {mixup:.3f}")
    return float(ntp)


if __name__ == "__main__":
    if len(sys.argv) > 2 or not all(map(str.isdigit, sys.argv[1:])):
        sys.exit(__doc__)
    main(*map(int, sys.argv[1:]))
