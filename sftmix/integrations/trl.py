"""SFTMix in TRL: `trl.SFTConfig` and `trl.SFTTrainer` with SFTMix's options, loss and pairs.

TRL prepares the data as ever (chat template, end token, ``completion_only_loss``,
``assistant_only_loss``, ``max_length``), but prompts are learnt only where that is asked for
(`trl_data.py`). What the loss or the sampler would not heed is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import EarlyStoppingCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from sftmix.data.examples import content_hash
from sftmix.data.weighting import WEIGHT
from sftmix.integrations.tokens import has_targets, named_rows
from sftmix.integrations.trl_data import ROW, TOKENS, with_ids, with_responses
from sftmix.model.head import HeadAdapter, without_peft
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.partition import Partition, from_scores, match, read_partition
from sftmix.pairs.pools import Confident, chosen, halves
from sftmix.runs.failures import Naming
from sftmix.training.config import SFTMixOptions
from sftmix.training.example_weights import weights_of
from sftmix.training.reference import finished_scores, refuse_optimizers, score_while_training
from sftmix.training.reporters import REFERENCE, own_runs, reporters_apart
from sftmix.training.trainer import SFTMixMixin

# Options of TRL that the loss, the pairs or the collator would not heed: what they may be, and why
# they may be nothing else.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing": ((False,), "it cuts pairs apart; layout='packed' packs them whole"),
    "eval_packing": (
        (False, None),
        "evaluation fills its batches by their tokens; leave it out",
    ),
    "padding_free": ((False,), "pairs are laid out here; take layout='padding_free'"),
    "loss_type": (("nll", "dft"), "expected 'nll' or 'dft'; other losses are a method"),
    "parallelism_config": (
        (None,),
        "a pair's tokens would be on several devices; fsdp with version 2 shards the weights",
    ),
}
# Arguments of TRL's trainer that would not be heeded, and why.
ARGUMENTS = {
    "compute_loss_func": "the loss is that of method",
    "compute_metrics": "evaluation makes no logits; a callback's on_evaluate gets its metrics",
    "preprocess_logits_for_metrics": "evaluation makes no logits; leave it out",
    "data_collator": "pairs are laid out by a collator of their own, as layout says; leave it out",
}


@dataclasses.dataclass
class SFTMixSFTConfig(SFTMixOptions, SFTConfig):
    """`trl.SFTConfig` with SFTMix's options; defaults of TRL's stay, but that of one option.

    ``assistant_only_loss`` is None by default: of conversations the responses are learnt.
    ``loss_type="dft"`` is ``method="dft"``, also where ``method`` is left at its default.
    ``activation_offloading`` is ``activation_offload``.
    """

    assistant_only_loss: bool | None = dataclasses.field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "None: of conversations the responses are learnt, found as by `sftmix train`; "
            "True: what the chat template marks, or TRL's own template for training; False: whole "
            "conversations, prompts too."
        },
    )

    def __post_init__(self) -> None:
        if self.loss_type == "dft":
            if self.method not in (SFTMixOptions.method, "ntp", "dft"):
                raise ValueError(
                    f"loss_type: expected 'nll' with method={self.method!r}, got 'dft', which is a "
                    "method of its own, method='dft'"
                )
            self.method = "dft"
        self._take_offloading()
        super().__post_init__()
        if self.loss_type == "chunked_nll":  # the default until TRL 1.14, and "nll" by another name
            self.loss_type = "nll"
        for name, (allowed, why) in UNSUPPORTED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: not supported here, got {value!r}: {why}")
        if isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get(
            "skip_prepare_dataset"
        ):
            raise ValueError(
                "dataset_kwargs: skip_prepare_dataset is not supported; data that have input_ids "
                "are only cut at max_length"
            )

    def _take_offloading(self) -> None:
        """Take TRL's name for the offloading of activations, whose own hooks are not used."""
        if self.activation_offloading:
            # What FSDP's own file says is read, and checked, with all other options.
            known = not (self.fsdp and self.fsdp_config)
            if known and not self.checkpoints_activations and self.memory != "lean":
                raise ValueError(
                    "activation_offloading: expected gradient_checkpointing=True with it, or every "
                    "activation would go to the host"
                )
            self.activation_offload, self.activation_offloading = True, False


class SFTMixSFTTrainer(SFTMixMixin, SFTTrainer):
    """`trl.SFTTrainer` with the loss, the pairs and the checkpoints of `SFTMixMixin`.

    It logs ``entropy``, ``mean_token_accuracy``, ``num_tokens`` and a router's ``aux_loss`` under
    TRL's names; but ``eval_num_tokens`` is the number of tokens that the evaluation's means are
    over. The loss of a mixture of experts' router is added with TRL's ``router_aux_loss_coef``.
    """

    args: SFTMixSFTConfig
    _is_prepared = False  # the data to train on

    _tag_names = ["trl", "sft", "sftmix"]  # noqa: RUF012
    _name = "SFTMix"
    _paper = {  # noqa: RUF012
        "title": "SFTMix: Elevating Language Model Instruction Tuning with Mixup Recipe",
        "id": "2410.05248",
    }

    def __init__(
        self,
        model: Any,
        args: SFTMixSFTConfig,
        *,
        train_dataset: datasets.Dataset | None = None,
        confident: Confident | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what `trl.SFTTrainer` takes, and ``confident``.

        Args:
            model: a name or a model, as TRL takes it.
            args: the options.
            train_dataset: data as TRL takes it; no stream. A column ``weight`` multiplies the
                losses of its rows.
            confident: which rows of ``train_dataset``, as given here, are in the confident half:
                booleans, the `Partition` that `score` returns, or the path of a
                ``confidence.parquet``. A partition is matched with the rows' content.
            kwargs: the trainer's own.

        Raises:
            TypeError: options that are not an `SFTMixSFTConfig`, or a data set that is a stream.
            ValueError: as `SFTMixMixin`; a vision model; an argument that would not be heeded,
                ``router_aux_loss_coef`` of a model without a router's loss too; data that do not
                tell responses from prompts (`with_responses`); a partition of other data; a row's
                weight that is none; or rows that TRL leaves out while ``confident`` has them.
        """
        require_config(args)
        for name, why in ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: not supported here: {why}")
        rows = None
        if confident is not None:
            require_dataset(train_dataset, "train_dataset")
            rows = confident_rows(train_dataset, confident)
        with warnings.catch_warnings():
            # Not of this loss, which smooths labels without full logits.
            warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated")
            super().__init__(
                model=model, args=args, train_dataset=train_dataset, confident=rows, **kwargs
            )

    def _find_head(self, checked: bool) -> HeadAdapter:
        # TRL writes its coefficient into the config, which the model has read already.
        model: Any = without_peft(self._inner_model)
        if hasattr(model, "router_aux_loss_coef"):
            model.router_aux_loss_coef = model.config.get_text_config().router_aux_loss_coef
        head = super()._find_head(checked)
        wanted, found = self.args.router_aux_loss_coef, head.router_coefficient
        # Until TRL 1.12 the default is a number, which means nothing to most models.
        default = SFTConfig.__dataclass_fields__["router_aux_loss_coef"].default
        if wanted not in (None, default) and not math.isclose(wanted, found, rel_tol=1e-5):
            raise ValueError(
                f"router_aux_loss_coef: expected what the loss of {type(model).__name__} adds its "
                f"router's with, {found:.6g}, got {wanted}"
            )
        return head

    def _make_collator(self) -> PairedCollator:
        self._refuse_vision()
        # TRL has found the padding token by now, and made its own collator with it; "auto" is a
        # number by now, or None.
        return PairedCollator(
            self.data_collator.pad_token_id,
            int(self.args.pad_to_multiple_of or 1),
            layout=self.args.layout,
            row_length=self.args.row_length,
        )

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> datasets.Dataset:
        """Return TRL's tokens and labels, with the number of the user's row as ``id``.

        Rows to train on keep their ``weight``, if they have one, and rows to evaluate the columns
        that callbacks read, such as ``prompt``.
        """
        self._refuse_vision()
        # TRL begins with the data to train on; one of several to evaluate may be named like it.
        is_train, self._is_prepared = not self._is_prepared, True
        name = "train_dataset" if is_train else "eval_dataset"
        if not is_train and dataset_name != "eval":
            name += f"[{dataset_name!r}]"
        require_dataset(dataset, name)
        weights = weights_of(dataset) if is_train else None
        dataset = with_responses(dataset, processing_class, args, formatting_func, name)
        # TRL decides by the data to train on, and asks only of data with a mask.
        self.completion_only_loss = args.completion_only_loss is not False
        numbered = dataset.add_column(ROW, np.arange(len(dataset)))
        given = (processing_class, args, packing, formatting_func, dataset_name)
        prepared = with_ids(super()._prepare_dataset(numbered, *given), is_train=is_train)
        if weights is not None:
            prepared = prepared.add_column(WEIGHT, weights[prepared["id"][:]])
        learnt = has_targets(prepared)
        return prepared if learnt.all() else prepared.select(learnt.nonzero()[0])

    def _refuse_vision(self) -> None:
        if self._is_vlm:
            raise ValueError(
                "model: vision-language models are not supported; give a tokenizer as "
                "processing_class, not a processor"
            )

    def _matched(self, confident: Confident | str | Path) -> Confident:
        # It is of the user's rows, in their order, and TRL may have left some out.
        assert not isinstance(confident, str | Path)
        return chosen(confident, require_all(self.examples, len(confident), self.args))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as `SFTMixMixin` does; data given here are prepared like the trainer's own."""
        if isinstance(eval_dataset, str):
            eval_dataset = self._named_eval_dataset(eval_dataset)
        own = self.eval_dataset
        given: Any = own if eval_dataset is None else eval_dataset
        if given is None or isinstance(given, dict):  # evaluated one by one, each by a call of this
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        known = list(own.values()) if isinstance(own, dict) else [own]
        if all(given is not part for part in known):
            given = self._prepare_dataset(
                given, self.processing_class, self.args, False, self._formatting_func, "eval"
            )
        return super().evaluate(given.select_columns(TOKENS), ignore_keys, metric_key_prefix)

    def _log_line(self) -> dict[str, float]:
        line = super()._log_line()
        if "router_loss" in line:
            line["aux_loss"] = line.pop("router_loss")
        return line


def score(
    model: Any,
    args: SFTMixSFTConfig,
    *,
    train_dataset: datasets.Dataset,
    num_scorings: int = 5,
    **kwargs: Any,
) -> Partition:
    """Train a reference model for one epoch of next-token prediction, scoring the data meanwhile.

    It takes what the trainer takes, so that a script calls it with the same arguments. ``model``
    and ``peft_config`` are copied where they are objects: what is trained afterwards starts afresh.
    Nothing is saved but by ``write_partition(path, partition)``. A column ``weight`` is not used,
    nor is `EarlyStoppingCallback`, which waits for evaluations. Reporters get a run of the
    reference model's own (`reporters.py`): TensorBoard the folder ``reference`` in the run's, W&B
    and Trackio a run whose name ends in ``-reference``.

    Args:
        model: the reference model, a name or a model.
        args: the options of training; epochs, evaluation and checkpoints are put aside.
        train_dataset: what is scored, as the trainer will get it.
        num_scorings: C, how often every row is scored, evenly spaced over the epoch.
        kwargs: ``processing_class``, ``peft_config``, ... of the trainer.

    Returns:
        The partition at the median of ``-(1/C) sum_c perplexity_c`` (arXiv 2410.05248), one row for
        each row of ``train_dataset``.

    Raises:
        TypeError: options that are not an `SFTMixSFTConfig`, or a data set that is a stream.
        ValueError: rows without a token to learn, fewer steps than scorings, ``optimizers``, or as
            `SFTMixSFTTrainer`.
        RunFailure: training ended before its last scoring.
    """
    require_config(args)
    require_dataset(train_dataset, "train_dataset")
    refuse_optimizers(kwargs)
    kwargs["callbacks"] = without_early_stopping(kwargs.get("callbacks") or ())
    if WEIGHT in train_dataset.column_names:
        train_dataset = train_dataset.remove_columns(WEIGHT)
    if kwargs.get("peft_config") is not None:
        kwargs["peft_config"] = copy.deepcopy(kwargs["peft_config"])
    trainer = SFTMixSFTTrainer(
        model=model if isinstance(model, str) else copy.deepcopy(model),
        args=reference_options(args),
        train_dataset=train_dataset,
        **kwargs,
    )
    ids = require_all(trainer.train_dataset, len(train_dataset), args)
    hashes = content_hashes(train_dataset)  # before an epoch is spent
    scores = score_while_training(trainer, num_scorings)
    with own_runs(trainer):
        trainer.train()
    found = finished_scores(scores, num_scorings)
    return from_scores(ids, [hashes[row] for row in ids], *found)


def reference_options(args: SFTMixSFTConfig) -> SFTMixSFTConfig:
    """Return the options of a reference model's training: one epoch of NTP that saves nothing."""
    # A signal would write one too, with the versions of transformers that have the option.
    by_signal: dict[str, Any] = {}
    if hasattr(args, "enable_jit_checkpoint"):
        by_signal["enable_jit_checkpoint"] = False
    return dataclasses.replace(
        args,
        method="ntp",
        loss_type="nll",
        label_smoothing_factor=0.0,
        num_train_epochs=1,
        max_steps=-1,
        eval_strategy="no",
        eval_on_start=False,
        save_strategy="no",
        save_minutes=0.0,
        load_best_model_at_end=False,
        push_to_hub=False,
        report_to=reporters_apart(list(args.report_to or ())),
        run_name=f"{args.run_name or args.output_dir}-{REFERENCE}",
        **by_signal,
    )


def without_early_stopping(callbacks: Sequence[Any]) -> list[Any]:
    """Return callbacks, or their classes, but those that need evaluations to train at all."""
    kinds = [one if isinstance(one, type) else type(one) for one in callbacks]
    pairs = zip(callbacks, kinds, strict=True)
    return [one for one, kind in pairs if not issubclass(kind, EarlyStoppingCallback)]


def confident_rows(dataset: datasets.Dataset, confident: Confident | str | Path) -> Confident:
    """Return ``confident`` for each row of the user's data, (S,).

    Raises:
        ValueError: another number of rows, a value that is no boolean, or a partition of other
            data.
    """
    if isinstance(confident, str | Path):
        with Naming("confident"):
            confident = read_partition(Path(confident))
    if not isinstance(confident, Partition):
        return halves(confident, len(dataset))
    with Naming("confident", other="partition"):
        return match(confident, np.arange(len(dataset)), content_hashes(dataset))


def content_hashes(dataset: datasets.Dataset) -> list[str]:
    """Return the content hashes of the user's rows, (S,), whatever format they are looked up in."""
    return [content_hash(row) for row in dataset.with_format(None)]


def require_config(args: Any) -> None:
    """Refuse options without SFTMix's own.

    Raises:
        TypeError: not an `SFTMixSFTConfig`.
    """
    if not isinstance(args, SFTMixSFTConfig):
        raise TypeError(
            f"args: expected an SFTMixSFTConfig, got {type(args).__name__}; it takes the same "
            "options"
        )


def require_dataset(dataset: Any, name: str) -> None:
    """Refuse what has no numbered rows.

    Raises:
        TypeError: not a `datasets.Dataset`.
    """
    if isinstance(dataset, datasets.Dataset):
        return
    way = ""
    if isinstance(dataset, datasets.IterableDataset):
        way = "; datasets.Dataset.from_list(list(stream.take(n))) makes one of a stream"
    elif isinstance(dataset, dict):
        way = f"; pass one of {', '.join(map(str, dataset))}"
    raise TypeError(f"{name}: expected a datasets.Dataset, got {type(dataset).__name__}{way}")


def require_all(prepared: datasets.Dataset, number: int, args: SFTMixSFTConfig) -> list[int]:
    """Return the row numbers of prepared data, after checking that none of ``number`` is missing.

    Raises:
        ValueError: rows that were left out, because nothing in them is learnt.
    """
    ids: list[int] = prepared["id"][:]
    missing = np.setdiff1d(np.arange(number), ids)
    if len(missing):
        raise ValueError(
            f"train_dataset: {len(missing)} of {number} rows have no token to learn within "
            f"max_length={args.max_length}: {named_rows(missing)}; leave them out, "
            "or raise max_length"
        )
    return ids
