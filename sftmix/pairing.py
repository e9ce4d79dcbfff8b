"""Which examples sit in a batch together, and which of their tokens are mixed.

A confident and an unconfident example form a pair with one ``lam ~ Beta(alpha, alpha)``
(arXiv 2410.05248); the n-th response token of one is mixed with the n-th of the other, up to the
shorter response. Pairs and lam depend on (seed, epoch) alone, so that neither a resumed run nor
another number of processes changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset, Sampler

IGNORE_INDEX = -100
# Tokens of an example without loss that fills up a batch (`ranks.filler`).
FILLER_TOKENS = 2


class PairedSampler(Sampler[tuple[int, float]]):
    """Yields ``(row, lam)`` of c, u, c, u, ...: every example at least once in an epoch.

    Both halves are shuffled anew each epoch. The smaller half starts again from its first example
    when it is used up, so that an odd example is not left out. ``len`` is twice the larger half.
    """

    def __init__(
        self, confident: ArrayLike, unconfident: ArrayLike, *, alpha: float, seed: int
    ) -> None:
        self.halves = (np.asarray(confident), np.asarray(unconfident))
        if not all(map(len, self.halves)):
            raise ValueError(
                f"partition: expected examples in both halves, got {len(self.halves[0])} "
                f"confident and {len(self.halves[1])} unconfident"
            )
        if not (np.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha: expected a finite number above 0, got {alpha}")
        self.alpha, self.seed, self.epoch = alpha, seed, 0

    def __len__(self) -> int:
        return 2 * max(map(len, self.halves))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, float]]:
        random = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
        num_pairs = len(self) // 2
        confident, unconfident = (
            np.resize(random.permutation(half), num_pairs) for half in self.halves
        )
        lam = random.beta(self.alpha, self.alpha, size=num_pairs)
        for c, u, share in zip(confident.tolist(), unconfident.tolist(), lam.tolist(), strict=True):
            yield c, share
            yield u, share


class ShuffledSampler(Sampler[int]):
    """Every example once in an epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, num_examples: int, *, seed: int) -> None:
        self.num_examples, self.seed, self.epoch = num_examples, seed, 0

    def __len__(self) -> int:
        return self.num_examples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
        yield from random.permutation(self.num_examples).tolist()


class PairedExamples(Dataset[dict[str, Any]]):
    """Examples looked up by a `PairedSampler`'s ``(row, lam)``."""

    def __init__(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, float]) -> dict[str, Any]:
        row, lam = key
        return {**self.examples[row], "lam": lam}


class PairedCollator:
    """Pads examples to one length and says which rows carry loss and which are mixed.

    Legend: B examples, L padded length, N tokens with loss, P mixed pairs of tokens.

    The batch holds ``input_ids``, ``attention_mask`` and ``labels`` (B, L), labels unshifted as
    models take them; ``ids`` (B,); ``rows`` (N,) of ``hidden.reshape(B * L, D)`` that predict a
    response token, ``targets`` (N,) what they predict, ``owner`` (N,) whose row it is within the
    batch; and where examples carry ``lam``, taken as pairs (c, u) in order, ``pair_c``, ``pair_u``
    (P,) rows of ``hidden.reshape(B * L, D)`` and ``lam`` (P,) float32. ``fillers`` () says how many
    examples are marked as ``filler``, where there are some: these alone may be without loss.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Build a batch.

        Raises:
            ValueError: an odd number of paired examples, or an example without a response token.
        """
        batch = self.pad(examples)
        length = batch["labels"].shape[1]
        shifted = torch.full_like(batch["labels"], IGNORE_INDEX)
        shifted[:, :-1] = batch["labels"][:, 1:]
        rows = (shifted != IGNORE_INDEX).flatten().nonzero().squeeze(-1)
        owner = rows // length
        counts = torch.bincount(owner, minlength=len(examples))
        fillers = torch.tensor(["filler" in example for example in examples])
        if fillers.any():
            batch["fillers"] = fillers.sum()
        if ((counts == 0) & ~fillers).any():
            empty = int(((counts == 0) & ~fillers).nonzero()[0])
            raise ValueError(f"example {examples[empty].get('id')}: no response token to learn")
        batch.update(rows=rows, targets=shifted.flatten()[rows], owner=owner)
        if "lam" in examples[0]:
            batch.update(self.pair(rows, counts.tolist(), [e["lam"] for e in examples]))
        return batch

    def pad(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` padded on the right, and ``ids``."""
        longest = max(len(example["input_ids"]) for example in examples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(examples), length)
        # In NumPy, which takes lists of numbers eight times as fast as torch does.
        batch = {
            "input_ids": np.full(shape, self.pad_token_id),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORE_INDEX),
        }
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            batch["input_ids"][row, :size] = example["input_ids"]
            batch["attention_mask"][row, :size] = 1
            batch["labels"][row, :size] = example["labels"]
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {**tensors, "ids": torch.tensor([example.get("id", -1) for example in examples])}

    @staticmethod
    def pair(rows: Tensor, counts: list[int], lam: list[float]) -> dict[str, Tensor]:
        """The mixed rows of examples (0, 1), (2, 3), ...: the first ``min`` of both responses."""
        if len(counts) % 2:
            raise ValueError(
                f"batch: expected pairs of examples, an even number, got {len(counts)}; "
                "use an even per-device batch size"
            )
        spans = rows.split(counts)
        kept = [min(c, u) for c, u in zip(counts[::2], counts[1::2], strict=True)]
        return {
            "pair_c": torch.cat([span[:n] for span, n in zip(spans[::2], kept, strict=True)]),
            "pair_u": torch.cat([span[:n] for span, n in zip(spans[1::2], kept, strict=True)]),
            "lam": torch.tensor(lam[::2], dtype=torch.float32).repeat_interleave(
                torch.tensor(kept)
            ),
        }
