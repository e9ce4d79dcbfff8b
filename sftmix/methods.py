"""Every training method, one entry each: the only place that describes them.

`docs/methods.md` says how to add one. Its loss is a function of a `sftmix.training.loss.Head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Options of every method that mixes.
OF_PAIRS = ("alpha", "lambda_scope", "pairing")
# What `label_smoothing` spreads of each label where nobody says how much.
LABEL_SMOOTHING = 0.1
PAPERS_PAIRS = {"alpha": 0.5, "pairing": "outer"}


@dataclass(frozen=True)
class Method:
    """What there is to say of a method, and its loss."""

    title: str  # in tables and model cards
    formula: str  # Markdown
    says: str  # a noun phrase in Markdown, for help and model cards
    source: str  # "paper" (arXiv 2410.05248) and what it is there, another work, or "ours"
    loss: Callable[[Any], Any]  # of a `training.loss.Head`; gives a `BatchLoss`
    mixed: bool = False  # whether the loss reads mixed rows; such a method needs a partition
    ntp: bool = True  # whether the loss reads the rows of response tokens themselves
    weighs: bool = False  # whether weights of examples act on the loss
    # Whether the loss is a function of more than each label's probability, of which alone
    # `--loss_schedule vocab_tiles` knows.
    whole_rows: bool = False
    own_options: tuple[str, ...] = ()  # options that not every method reads, but for `OF_PAIRS`
    papers_options: Mapping[str, Any] = field(default_factory=dict)  # with which the paper ran it

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options that the method reads and some other method does not."""
        return (*self.own_options, *(OF_PAIRS if self.mixed else ()))

    @property
    def idle_options(self) -> set[str]:
        """Return the options that some other method reads, and this one does not."""
        return set(OPTIONS) - set(self.options)


def hard_examples(head: Any) -> Any:
    """Return IR-DRO's loss (Chen et al. 2024), ``sum_i softmax(L / kl_reg)_i L_i``.

    ``L_i`` is the mean token loss of example i; the softmax is not differentiated.
    """
    tokens = head.tokens()
    means = head.of_examples(tokens)
    weights = head.softmax(means / head.options.kl_reg)
    return head.of_tokens((weights * means).sum().float(), tokens)


def smoothed(head: Any) -> Any:
    """Return NTP, with the label smoothing that the options ask for."""
    smoothing = head.options.label_smoothing_factor
    return head.cross_entropy(label_smoothing=smoothing) if smoothing else head.ntp()


METHODS = {
    "sftmix": Method(
        title="SFTMix",
        formula="`NTP + mu * Mixup`, mu = 0.2",
        says="next-token prediction (NTP) plus `mu` times Mixup",
        source="paper: Mixup as a regulariser",
        loss=lambda head: head.joint(head.options.mu),
        mixed=True,
        weighs=True,
        own_options=("mu",),
        papers_options={"mu": 0.2, **PAPERS_PAIRS},
    ),
    "ntp": Method(
        title="NTP",
        formula="`NTP`",
        says="next-token prediction",
        source="paper: the baseline",
        loss=smoothed,
        own_options=("label_smoothing_factor",),
        weighs=True,
    ),
    "equal": Method(
        title="NTP + Mixup, equal",
        formula="`NTP + Mixup`",
        says="next-token prediction plus Mixup, both with weight 1",
        source="paper: both as equal losses; that their weights are 1 and 1 is ours",
        loss=lambda head: head.joint(1.0),
        mixed=True,
        weighs=True,
        papers_options=PAPERS_PAIRS,
    ),
    "mixup": Method(
        title="Mixup alone",
        formula="`Mixup`",
        says="Mixup without next-token prediction",
        source="paper: Mixup alone; tokens that no pair mixes carry no loss",
        loss=lambda head: head.mixup(),
        mixed=True,
        ntp=False,
        papers_options=PAPERS_PAIRS,
    ),
    "ir_dro": Method(
        title="IR-DRO",
        formula="`sum_i w_i L_i`, `w = softmax(L / kl_reg)`, not differentiated; `L_i` the mean "
        "token loss of example i",
        says="next-token prediction, each example weighted by the softmax over the batch of its "
        "mean token loss, divided by `kl_reg`",
        source="paper, for comparison: IR-DRO, kl_reg = 1",
        loss=hard_examples,
        own_options=("kl_reg",),
    ),
    "dft": Method(
        title="DFT",
        formula="mean of `sg(p) nll`",
        says="next-token prediction, each token weighted by its probability (dynamic fine-tuning)",
        source="DFT, arXiv 2508.05629",
        loss=lambda head: head.cross_entropy(power=1.0),
        weighs=True,
    ),
    "power": Method(
        title="NTP by p^k",
        formula="mean of `sg(p^k) nll`, k = 10",
        says="next-token prediction, each token weighted by the power `power_k` of its probability",
        source="arXiv 2510.00526: its -p^k / k has this gradient",
        loss=lambda head: head.cross_entropy(power=head.options.power_k),
        weighs=True,
        own_options=("power_k",),
    ),
    "eaft": Method(
        title="EAFT",
        formula="mean of `sg((H / log V)^alpha) nll`, alpha = 1; `H` the entropy over all V tokens",
        says="next-token prediction, each token weighted by the entropy of the model's prediction "
        "over the whole vocabulary, as a share of the largest, to the power `eaft_alpha`",
        source="EAFT, arXiv 2601.02151: there `H` is that of the 20 most likely tokens",
        loss=lambda head: head.cross_entropy(entropy=head.options.eaft_alpha),
        weighs=True,
        whole_rows=True,
        own_options=("eaft_alpha",),
    ),
    "gem": Method(
        title="GEM",
        formula="mean of `sum_j sg(q_j) (log p_j - log p)`, `q = softmax(z / beta)`, beta = 0.7",
        says="GEM with a linear h, which takes probability from other tokens as the prediction "
        "sharpened by the temperature `gem_beta` has them, and so leaves more of the alternatives",
        source="GEM, arXiv 2408.16673",
        loss=lambda head: head.cross_entropy(gem_beta=head.options.gem_beta),
        weighs=True,
        whole_rows=True,
        own_options=("gem_beta",),
    ),
    "label_smoothing": Method(
        title="Label smoothing",
        formula=f"mean of `(1 - e) nll - e mean_j log p_j`, e = {LABEL_SMOOTHING}",
        says="next-token prediction, with the share `label_smoothing_factor` of each label spread "
        "over the whole vocabulary",
        source="arXiv 1512.00567, as transformers has it",
        loss=smoothed,
        weighs=True,
        whole_rows=True,
        own_options=("label_smoothing_factor",),
    ),
}

# Options that only some methods read.
OPTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.options))


def method_of(name: str) -> Method:
    """Return the method of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected {', '.join(METHODS)}; got {name!r}")
    return METHODS[name]


def title_of(name: str) -> str:
    """Return the title of a method, and of one that this version does not know its name."""
    return METHODS[name].title if name in METHODS else name
