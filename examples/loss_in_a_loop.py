"""The fused loss in a training loop of your own, such as nanoGPT's: seconds on a CPU.

python examples/loss_in_a_loop.py [STEPS]

A small GPT learns to count on: each row of the data counts up by its own step, and begins with a
prompt whose targets are -1, as in nanoGPT. Rows of a batch come in pairs, [confident, unconfident,
confident, ...]. Here the confident half is simply that of the small steps; `sftmix score` finds it
by perplexity.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sftmix_kernels import SFTMixLoss, fused_sftmix_loss


@dataclass
class GPTConfig:
    """Sizes, under nanoGPT's names."""

    block_size: int = 16
    vocab_size: int = 256
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64


class GPT(nn.Module):
    """A causal transformer whose loss never makes the logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, size)
        self.wpe = nn.Embedding(config.block_size, size)
        block = nn.TransformerEncoderLayer(
            size, config.n_head, 4 * size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.h = nn.TransformerEncoder(block, config.n_layer, enable_nested_tensor=False)
        self.ln_f = nn.LayerNorm(size)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor, lam: Tensor, mu: float = 0.2) -> SFTMixLoss:
        """Return the loss of rows (B, T), of which each pair has its lam (B / 2,)."""
        length = idx.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.h(self.wte(idx) + self.wpe.weight[:length], mask=mask, is_causal=True)
        x = self.ln_f(x)
        # nanoGPT: F.cross_entropy(self.lm_head(x).view(-1, V), targets.view(-1), ignore_index=-1)
        confident, unconfident, counts = mixed_tokens(targets)
        return fused_sftmix_loss(
            x,
            self.lm_head.weight,
            targets,
            confident,
            unconfident,
            lam.repeat_interleave(counts),
            mu=mu,
            ignore_index=-1,
        )


def mixed_tokens(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which tokens are mixed, numbered through the batch, and how many of each pair.

    The n-th target of a confident row goes with the n-th of the row after it, up to the shorter.
    """
    numbers = torch.arange(targets.numel()).view_as(targets)
    responses = [row[target != -1] for row, target in zip(numbers, targets, strict=True)]
    both = list(zip(responses[::2], responses[1::2], strict=True))
    counts = [min(len(c), len(u)) for c, u in both]
    confident = torch.cat([c[:n] for (c, _), n in zip(both, counts, strict=True)])
    unconfident = torch.cat([u[:n] for (_, u), n in zip(both, counts, strict=True)])
    return confident, unconfident, torch.tensor(counts)


def get_batch(config: GPTConfig, pairs: int = 4) -> tuple[Tensor, Tensor]:
    """Return idx and targets (B, T), already shifted; even rows are confident, odd ones are not."""
    steps = torch.stack([torch.randint(1, 4, (pairs,)), torch.randint(4, 32, (pairs,))], 1)
    begins = torch.randint(99, (2 * pairs, 1))
    rows = steps.reshape(-1, 1) * torch.arange(config.block_size + 1) + begins
    rows %= config.vocab_size
    targets = rows[:, 1:].clone()
    prompts = torch.randint(1, config.block_size // 2, (2 * pairs, 1))
    targets[torch.arange(config.block_size) < prompts] = -1
    return rows[:, :-1], targets


def main(steps: int = 100) -> float:
    """Train, and return the last NTP loss."""
    torch.manual_seed(0)
    config = GPTConfig()
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    beta = torch.distributions.Beta(0.5, 0.5)
    for step in range(steps):
        idx, targets = get_batch(config)
        lam = beta.sample((len(idx) // 2,))  # one for each pair of rows
        loss, ntp, mixup = model(idx, targets, lam)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss:.3f}  NTP {ntp:.3f}  Mixup {mixup:.3f}")
    return float(ntp)


if __name__ == "__main__":
    if len(sys.argv) > 2 or not all(map(str.isdigit, sys.argv[1:])):
        sys.exit(__doc__)
    main(*map(int, sys.argv[1:]))
