"""Lay a batch out, and say which of its tokens are mixed.

A confident and an unconfident example form a pair with one ``lam ~ Beta(alpha, alpha)``
(arXiv 2410.05248); the n-th response token of one is mixed with the n-th of the other, up to the
shorter response. Pairs and lam depend only on (seed, epoch), so that neither a resumed run nor
another number of processes changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftmix.conventions import IGNORE_INDEX
from sftmix.pairs.layouts import Integers, Layout, Slots, spans


class PairedCollator:
    """Lays examples out, and says which tokens carry loss and which are mixed.

    Legend: B examples, R rows of L slots, N response tokens, P mixed pairs of them, D hidden size.

    A batch holds:

    - ``input_ids`` and ``labels`` (R, L), labels not shifted, with ``attention_mask`` (padded) or
      ``position_ids`` (padding_free, packed; see `Layout`), or ``parts`` (sequential);
    - ``ids`` and ``lengths`` (B,), the latter in tokens;
    - ``rows`` (N,): the rows of ``hidden.reshape(R * L, D)`` that predict a response token, example
      by example; ``targets`` (N,), the tokens that they predict; ``owner`` (N,), the example of the
      batch that each belongs to;
    - where examples carry ``lam``, and so are pairs (c, u) in order: ``pair_c`` and ``pair_u``
      (P,), which of the N tokens are mixed (indices of ``rows``, ``targets`` and ``owner``), and
      ``lam`` (P,) float32;
    - where examples carry ``weight``: ``weight`` (B,) float32, 0 for a filler. A pair in which one
      weighs 0 is not mixed.

    From ``targets`` on all of it is the same in every layout. Only an example marked as ``filler``
    may be without a response token; its length is 0.

    >>> c = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "lam": 0.25}
    >>> u = {"input_ids": [8, 9], "labels": [-100, 9], "lam": 0.25}
    >>> batch = PairedCollator(pad_token_id=0)([c, u])
    >>> batch["input_ids"].tolist()
    [[5, 6, 7], [8, 9, 0]]
    >>> batch["rows"].tolist(), batch["targets"].tolist(), batch["owner"].tolist()
    ([0, 1, 3], [6, 7, 9], [0, 0, 1])
    >>> batch["pair_c"].tolist(), batch["pair_u"].tolist(), batch["lam"].tolist()
    ([0], [2], [0.25])
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int = 1,
        *,
        layout: str = "padded",
        row_length: int | None = None,
        weighted: bool = True,
    ) -> None:
        """Take the options of a `Layout`, which says what it refuses; carry weights or not."""
        self.pad_token_id, self.weighted = pad_token_id, weighted
        self.layout = Layout(layout, pad_to_multiple_of, row_length)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build a batch.

        Raises:
            ValueError: an odd number of paired examples, or an example without a response token,
                longer than a row, with another number of labels than of tokens, or without a weight
                where others have one.
        """
        # In NumPy, which takes lists of numbers eight times as fast as torch does.
        lengths = np.array([len(example["input_ids"]) for example in examples])
        tokens, labels = (column_of(examples, name, lengths) for name in ("input_ids", "labels"))
        slots = self.layout.place(lengths)
        batch: dict[str, NDArray[Any]] = {
            **self.layout.inputs(tokens, slots, self.pad_token_id),
            "labels": unshifted(labels, slots),
        }
        # No token comes before an example's first one, whatever lies before it in the row.
        learned = ((labels != IGNORE_INDEX) & (slots.positions > 0)).nonzero()[0]
        owner = np.repeat(np.arange(len(examples)), lengths)[learned]
        counts = np.bincount(owner, minlength=len(examples))
        fillers = np.array(["filler" in example for example in examples])
        if (empty_ones := (counts == 0) & ~fillers).any():
            empty = examples[int(empty_ones.argmax())]
            raise ValueError(f"example {empty.get('id')}: no response token to learn")
        rows = slots.flat[learned] - 1
        batch.update(rows=rows, targets=labels[learned], owner=owner, lengths=lengths * ~fillers)
        weights = batch_weights(examples, fillers) if self.weighted else None
        if weights is not None:
            batch["weight"] = weights
        if "lam" in examples[0]:
            lam = [example["lam"] for example in examples]
            batch.update(mixed_tokens(counts, lam, None if weights is None else weights > 0))
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.layout.name == "sequential":
            tensors["parts"] = tuple(lengths.tolist())
        return {**tensors, "ids": torch.tensor([example.get("id", -1) for example in examples])}

    def padded(self) -> PairedCollator:
        """Return a collator that puts an example in each row without weights, as scoring does."""
        multiple = self.layout.pad_to_multiple_of
        return PairedCollator(self.pad_token_id, multiple, weighted=False)


def check_collator(collator: Any, layout: str, row_length: int | None) -> None:
    """See that a trainer's collator lays batches out as its options say.

    Raises:
        TypeError: it is none of ours.
        ValueError: it does not.
    """
    if not isinstance(collator, PairedCollator):
        raise TypeError(
            f"data_collator: expected a PairedCollator, got {type(collator).__name__}; leave it "
            "out, and the trainer makes one"
        )
    found = collator.layout
    for name, given, wanted in (
        ("layout", found.name, layout),
        ("row_length", found.row_length, row_length),
    ):
        if given != wanted:
            raise ValueError(f"data_collator: expected {name}={wanted!r} as in args, got {given!r}")


def column_of(examples: Sequence[dict[str, Any]], name: str, lengths: Integers) -> Integers:
    """Return one column of all examples, one after another: (T,)."""
    values = [np.asarray(example[name], dtype=np.int64) for example in examples]
    for example, value, length in zip(examples, values, lengths, strict=True):
        if value.shape != (length,):
            raise ValueError(
                f"example {example.get('id')}: expected {length} {name}, one for each of its "
                f"tokens, got {value.size}"
            )
    return np.concatenate(values)


def batch_weights(
    examples: Sequence[dict[str, Any]], fillers: NDArray[np.bool_]
) -> NDArray[np.float32] | None:
    """Return the weights of a batch's examples, (B,), 0 for a filler; None if they carry none."""
    has_one = np.array(["weight" in example for example in examples])
    if not has_one.any():
        return None
    if (without := ~(has_one | fillers)).any():
        nameless = examples[int(without.argmax())]
        raise ValueError(
            f"example {nameless.get('id')}: expected a weight, as other examples of the batch have"
        )
    weights = [0.0 if "filler" in one else one["weight"] for one in examples]
    return np.array(weights, dtype=np.float32)


def unshifted(labels: Integers, slots: Slots) -> Integers:
    """Return labels in their slots, without those that another example would predict."""
    grid = slots.fill(labels, IGNORE_INDEX)
    follows = (slots.positions == 0) & (slots.flat % slots.shape[1] > 0)
    grid.reshape(-1)[slots.flat[follows]] = IGNORE_INDEX
    return grid


def mixed_tokens(
    counts: Integers, lam: Sequence[float], learnt: NDArray[np.bool_] | None = None
) -> dict[str, NDArray[Any]]:
    """Return the mixed tokens of examples (0, 1), (2, 3), ... with ``counts`` response tokens.

    The n-th token of one is mixed with the n-th of the other, up to the shorter response. A pair
    whose lam is NaN is not mixed, nor is one with an example that is not ``learnt`` (B,).
    """
    if len(counts) % 2:
        raise ValueError(
            f"batch: expected pairs of examples, an even number, got {len(counts)}; "
            "use an even per-device batch size"
        )
    firsts = np.cumsum(counts) - counts
    of_pairs = np.asarray(lam[::2], dtype=np.float32)
    mixed = np.minimum(counts[::2], counts[1::2]) * ~np.isnan(of_pairs)
    if learnt is not None:
        mixed = mixed * (learnt[::2] & learnt[1::2])
    return {
        "pair_c": spans(firsts[::2], mixed),
        "pair_u": spans(firsts[1::2], mixed),
        "lam": np.repeat(of_pairs, mixed),
    }
