"""The loss of a batch, and what a method makes it of: NTP, its objectives, Mixup, single tokens.

`batch_loss` calls the model with such a head in the place of its LM head. `FusedHead` calls the
fused losses on what the LM head reads, and never makes logits. `DenseHead` takes the model's own
logits: slow, and right for any head. A method's loss (`sftmix.methods`) is one function of either.

Legend: N response tokens of B examples, P mixed pairs of them, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftmix.methods import Method, method_of
from sftmix.model.head import HeadAdapter
from sftmix.runs.ranks import joined_ranks, rank
from sftmix.training.config import SFTMixOptions
from sftmix_kernels import (
    Entropy,
    Power,
    TokenStats,
    VocabTiles,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
    reference,
)

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
# The gates of `Head.cross_entropy`, by the names under which a method asks for them.
GATES = {"power": Power, "entropy": Entropy}


class Counts(NamedTuple):
    """The divisors of a loss: counts over a step's micro-batches on all ranks, 0-dim tensors."""

    tokens: Tensor
    pairs: Tensor
    examples: Tensor
    micro_batches: Tensor
    learnt: Tensor  # tokens of examples whose weight is not 0


class Pairs(NamedTuple):
    """Places of the two partners among the response tokens, and lam, the weight of the first."""

    c: Tensor  # (P,) int64
    u: Tensor  # (P,) int64
    lam: Tensor  # (P,) float32


class BatchLoss(NamedTuple):
    """Scalars in nats, of which ``loss`` is differentiable, and what is watched of every token.

    ``ntp`` and ``row_ntp`` are the plain negative log-likelihood, whatever ``loss`` makes of it.
    What is watched of a token is 0 where its example's weight is.
    """

    loss: Tensor
    ntp: Tensor | None  # None for Mixup without NTP
    mixup: Tensor | None  # None without Mixup
    row_ntp: Tensor | None  # (N,) float32 or better; None for Mixup without NTP
    router: Tensor | None = None  # a router's auxiliary loss, differentiable, not in ``loss``
    entropy: Tensor | None = None  # (N,) in nats; None where the loss does not find it
    is_top: Tensor | None = None  # (N,) bool: the label is the most likely token; None likewise


class Head:
    """The response tokens of a micro-batch, with what their loss can be made of.

    Each of ``ntp``, ``mixup`` and ``joint`` is this micro-batch's share of a mean over ``counts``.
    """

    targets: Tensor  # (N,) int64

    def __init__(self, batch: dict[str, Any], counts: Counts, options: SFTMixOptions) -> None:
        self.batch, self.counts, self.options = batch, counts, options
        self.targets = batch["targets"]
        self.stats: TokenStats | None = None  # of `tokens()`, once it was called

    @property
    def pairs(self) -> Pairs:
        """Return the pairs of response tokens that are mixed."""
        return Pairs(self.batch["pair_c"], self.batch["pair_u"], self.batch["lam"].float())

    def tokens(self) -> Tensor:
        """Return every response token's NTP loss, (N,), differentiable."""
        raise NotImplementedError

    def ntp(self) -> BatchLoss:
        """Return NTP, the mean of ``tokens()``."""
        raise NotImplementedError

    def mixup(self) -> BatchLoss:
        """Return Mixup without NTP."""
        raise NotImplementedError

    def joint(self, weight: float) -> BatchLoss:
        """Return ``NTP + weight * Mixup``."""
        raise NotImplementedError

    def cross_entropy(self, **objective: float) -> BatchLoss:
        """Return NTP by one other objective, or NTP where none is given.

        It is a gate of `sftmix_kernels` by its number, ``power=k`` or ``entropy=alpha``; or
        ``label_smoothing`` or ``gem_beta`` of `fused_cross_entropy`.
        """
        raise NotImplementedError

    @property
    def token_weights(self) -> Tensor | None:
        """Return the weight of each token's example, (N,) float32; None where all are 1."""
        weights = self.batch.get("weight")
        return None if weights is None else weights.float()[self.batch["owner"]]

    def of_tokens(self, loss: Tensor, tokens: Tensor) -> BatchLoss:
        """Return a loss that was made of ``tokens()``, whose mean is logged as NTP."""
        return self.watched(BatchLoss(loss, None, None, tokens), self.stats)

    def watched(self, loss: BatchLoss, stats: TokenStats | None = None) -> BatchLoss:
        """Return a loss with the plain NTP that is logged beside it, and with ``stats``."""
        if stats is not None:
            nll, entropy, is_top = stats
            loss = loss._replace(row_ntp=nll, entropy=entropy, is_top=is_top)
        assert loss.row_ntp is not None
        row_ntp = loss.row_ntp.detach()
        if self.token_weights is not None:
            row_ntp = row_ntp.masked_fill(self.token_weights == 0, 0.0)
        return loss._replace(ntp=row_ntp.sum() / self.counts.learnt, row_ntp=row_ntp)

    def of_examples(self, tokens: Tensor) -> Tensor:
        """Return the mean of each example's ``tokens()``, (B,) float64; 0 for a filler."""
        return self._sums(tokens) / self._num_tokens.clamp(min=1)

    def softmax(self, scores: Tensor) -> Tensor:
        """Return the weights of a micro-batch's examples (B,), without gradients.

        The softmax is over the examples of all ranks together; accumulated micro-batches count by
        their examples. Fillers have no weight.
        """
        filler = self._num_tokens == 0
        scores = scores.masked_fill(filler, -torch.inf)
        everyone = joined_ranks(scores)
        mine = everyone.softmax(0)[rank() * scores.numel() :][: scores.numel()]
        share = everyone.isfinite().sum() / self.counts.examples
        return share * mine.masked_fill(filler, 0.0)

    @property
    def _num_tokens(self) -> Tensor:
        return self._sums(torch.ones_like(self.targets))

    def _sums(self, tokens: Tensor) -> Tensor:
        # In float64: a softmax turns absolute errors of losses into relative ones of weights.
        nothing = tokens.new_zeros(self.batch["lengths"].numel(), dtype=torch.float64)
        # Not `bincount`, for whose largest value the host waits.
        return nothing.index_add(0, self.batch["owner"], tokens.double())


class FusedHead(Head):
    """A head whose losses are the fused ones of `sftmix_kernels`.

    ``watches`` turns entropy and the most likely token off, to measure what they cost.
    """

    watches = True

    def __init__(
        self,
        batch: dict[str, Any],
        counts: Counts,
        options: SFTMixOptions,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        **keywords: Any,
    ) -> None:
        """Take ``keywords`` for the fused ops: bias, schedule, logit_scale, softcap."""
        super().__init__(batch, counts, options)
        self.hidden, self.weight, self.keywords = hidden, weight, keywords

    @property
    def finds_stats(self) -> bool:
        """Say whether the loss finds entropy and the most likely token on its way."""
        return self.watches and not self.recomputes

    @property
    def recomputes(self) -> bool:
        """Say whether vocabulary tiles make the loss, which find nothing else of a token."""
        schedule = self.keywords["schedule"]
        return schedule == "vocab_tiles" or isinstance(schedule, VocabTiles)

    def tokens(self) -> Tensor:
        """Return every response token's NTP loss; backward makes the logits again."""
        rows = (self.hidden, self.weight, self.targets)
        if not self.finds_stats:
            return fused_cross_entropy(*rows, reduction="none", stats=False, **self.keywords)
        tokens, self.stats = fused_cross_entropy(
            *rows, reduction="none", stats=True, **self.keywords
        )
        return tokens

    def ntp(self) -> BatchLoss:
        """Return NTP."""
        if self.finds_stats:
            return self.cross_entropy()
        nothing = self.targets.new_empty(0)
        return self._joint(Pairs(nothing, nothing, nothing.float()), 0.0)._replace(mixup=None)

    def cross_entropy(self, **objective: float) -> BatchLoss:
        """Return NTP by an objective, at the matrix products of NTP.

        Vocabulary tiles have ``power`` among them, by weights of `tokens`.
        """
        if self.recomputes and objective.keys() == {"power"}:
            return self._powered(objective["power"])
        loss, stats = fused_cross_entropy(
            self.hidden,
            self.weight,
            self.targets,
            row_weight=self.token_weights,
            divisor=self.counts.tokens,
            stats=True,
            **kernels_objective(objective),
            **self.keywords,
        )
        return self.watched(BatchLoss(loss, None, None, None), stats)

    def _powered(self, k: float) -> BatchLoss:
        # Tiles return one number of a token: the NLL, to be logged, of which the gate is made.
        tokens = self.tokens()
        weights = tokens.detach().mul(-k).exp()
        if self.token_weights is not None:
            weights = weights * self.token_weights
        return self.of_tokens((weights * tokens).sum() / self.counts.tokens, tokens)

    def mixup(self) -> BatchLoss:
        """Return Mixup: one row of products for each pair, and none for the other tokens."""
        pairs = self.pairs
        mixup = fused_mixup_loss(
            self.hidden[pairs.c],
            self.hidden[pairs.u],
            self.weight,
            self.targets[pairs.c],
            self.targets[pairs.u],
            pairs.lam,
            divisor=self.counts.pairs,
            **self.keywords,
        )
        return BatchLoss(mixup, None, mixup, None)

    def joint(self, weight: float) -> BatchLoss:
        """Return ``NTP + weight * Mixup`` at the matrix products of NTP."""
        return self._joint(self.pairs, weight)

    def _joint(self, pairs: Pairs, mu: float) -> BatchLoss:
        options = {
            "mu": mu,
            "row_weight": self.token_weights,
            "ntp_divisor": self.counts.tokens,
            "mixup_divisor": self.counts.pairs,
            **self.keywords,
        }
        terms = (self.hidden, self.weight, self.targets, *pairs)
        if self.finds_stats:
            (loss, _, mixup), stats = fused_sftmix_loss(*terms, stats=True, **options)
            return self.watched(BatchLoss(loss, None, mixup, None), stats)
        row_ntp = torch.empty(self.targets.shape, dtype=torch.float32, device=self.targets.device)
        loss, _, mixup = fused_sftmix_loss(*terms, row_ntp_out=row_ntp, **options)
        if self.token_weights is not None:
            row_ntp = row_ntp / self.token_weights.masked_fill(self.token_weights == 0, 1.0)
        return self.watched(BatchLoss(loss, None, mixup, row_ntp))


class DenseHead(Head):
    """A head whose losses are made from the model's own logits, in float32 or better.

    The model's head reads what `rows` gives: `ntp` rows of response tokens, then mixed ones.
    """

    def __init__(
        self, batch: dict[str, Any], counts: Counts, options: SFTMixOptions, method: Method
    ) -> None:
        super().__init__(batch, counts, options)
        self.method = method
        self.logits = torch.empty(0)  # ((N +) P, V), once they are there

    def rows(self, hidden: Tensor) -> Tensor:
        """Return the rows that the method's loss reads, from those of response tokens (N, D).

        Mixed rows are ``lam h_c + (1 - lam) h_u``.
        """
        if not self.method.mixed:
            return hidden
        pairs = self.pairs
        lam = pairs.lam.unsqueeze(-1)
        mixed = (lam * hidden[pairs.c] + (1 - lam) * hidden[pairs.u]).to(hidden.dtype)
        return torch.cat([hidden, mixed]) if self.method.ntp else mixed

    def tokens(self) -> Tensor:
        """Return every response token's NTP loss."""
        assert self.method.ntp, "the method says that it reads no rows of response tokens"
        log_probs = self.logits[: self.targets.numel()].log_softmax(-1)
        every = torch.ones_like(self.targets, dtype=torch.float32)
        with torch.no_grad():
            self.stats = reference.token_stats(log_probs, self.targets, every)
        return F.nll_loss(log_probs, self.targets, reduction="none")

    def ntp(self) -> BatchLoss:
        """Return NTP."""
        return self.cross_entropy()

    def cross_entropy(self, **objective: float) -> BatchLoss:
        """Return NTP by an objective."""
        assert self.method.ntp, "the method says that it reads no rows of response tokens"
        log_probs = self.logits[: self.targets.numel()].log_softmax(-1)
        weights = self.token_weights
        if weights is None:
            weights = torch.ones_like(self.targets, dtype=torch.float32)
        losses = reference.token_losses(
            log_probs, self.targets, weights, **kernels_objective(objective)
        )
        with torch.no_grad():
            stats = reference.token_stats(log_probs, self.targets, weights)
        return self.watched(BatchLoss(losses.sum() / self.counts.tokens, None, None, None), stats)

    def mixup(self) -> BatchLoss:
        """Return Mixup."""
        assert self.method.mixed, "the method says that it reads no mixed rows"
        pairs = self.pairs
        logits = self.logits[self.targets.numel() if self.method.ntp else 0 :]
        loss_c, loss_u = (
            F.cross_entropy(logits, self.targets[places], reduction="none")
            for places in (pairs.c, pairs.u)
        )
        mixup = (pairs.lam * loss_c + (1 - pairs.lam) * loss_u).sum() / self.counts.pairs
        return BatchLoss(mixup, None, mixup, None)

    def joint(self, weight: float) -> BatchLoss:
        """Return ``NTP + weight * Mixup``."""
        mixup, ntp = self.mixup().loss, self.ntp()
        return ntp._replace(loss=ntp.loss + weight * mixup, mixup=mixup)


def kernels_objective(objective: Mapping[str, float]) -> dict[str, Any]:
    """Return an objective of `Head.cross_entropy` as keywords of `fused_cross_entropy`."""
    gates = [GATES[name](number) for name, number in objective.items() if name in GATES]
    others = {name: number for name, number in objective.items() if name not in GATES}
    return {**others, "gate": gates[0]} if gates else others


def batch_counts(batches: Sequence[dict[str, Tensor]], device: torch.device) -> Counts:
    """Count tokens, pairs, examples and micro-batches; fillers are no examples."""
    known = (
        sum(batch["rows"].numel() for batch in batches),
        sum(batch["pair_c"].numel() for batch in batches if "pair_c" in batch),
        sum(bool(batch["rows"].numel()) for batch in batches),
    )
    tokens, pairs, micro_batches = torch.tensor(known, dtype=torch.float32, device=device)
    # Lengths are on the device: the host does not wait to count them.
    examples, learnt = torch.zeros_like(tokens), tokens
    for batch in batches:
        examples = examples + batch["lengths"].count_nonzero().to(device)
        if "weight" in batch:
            learnt = learnt - (batch["weight"] == 0)[batch["owner"]].sum().to(device)
    return Counts(tokens, pairs, examples, micro_batches, learnt)


def batch_loss(
    model: nn.Module,
    head: HeadAdapter,
    batch: dict[str, Any],
    options: SFTMixOptions,
    counts: Counts,
) -> BatchLoss:
    """Return a micro-batch's share of the loss of ``options.method``.

    ``model`` is what is called: the model that ``head`` was made for, or a wrapper of it.

    Raises:
        ValueError: there is no such method.
    """
    method = method_of(options.method)
    tokens = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    ways = {"parts": batch.get("parts"), "saving": head.saving}
    call = functools.partial(model, **tokens, **ways, use_cache=False, rows=batch["rows"])
    if not head.fused:
        dense = DenseHead(batch, counts, options, method)
        output = call(head_input=dense.rows)
        logits: Tensor = output.value
        dense.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss: BatchLoss = method.loss(dense)
        return detached(loss)._replace(loss=loss.loss, router=output.router_loss)
    found: list[BatchLoss] = []

    def head_function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        keywords = {"bias": bias, "schedule": options.loss_plan, **head.options}
        loss: BatchLoss = method.loss(FusedHead(batch, counts, options, hidden, weight, **keywords))
        # FSDP2's mixed precision rounds what a module returns; these are logged as they are.
        found.append(detached(loss))
        return loss.loss

    output = call(head_function=head_function)
    return found[-1]._replace(loss=output.value, router=output.router_loss)


def detached(loss: BatchLoss) -> BatchLoss:
    """Return the same numbers without gradients."""
    return BatchLoss(*(part if part is None else part.detach() for part in loss))  # type: ignore[arg-type]
