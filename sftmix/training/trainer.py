"""Training on top of `transformers.Trainer`, with the loss and the pairs of a method.

`SFTMixMixin` sits on any trainer derived from it; `SFTMixTrainer` is the mixin over the plain one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import TrainOutput

from sftmix.data.examples_check import check_examples, require_rows
from sftmix.methods import method_of
from sftmix.model.head import HeadAdapter
from sftmix.model.layout_check import check_layout
from sftmix.model.one_by_one import saved_on_host
from sftmix.model.saved_config import as_loaded, make_savable
from sftmix.model.tiled_mlp import refuse_router, tile_mlps
from sftmix.pairs.collator import PairedCollator, check_collator
from sftmix.pairs.partition import Partition
from sftmix.pairs.pools import Confident, Pool, halves, pools_of
from sftmix.pairs.sampling import (
    FilledExamples,
    FilledSampler,
    PairedExamples,
    PairedSampler,
    ShuffledSampler,
)
from sftmix.runs import interrupts
from sftmix.runs.out_of_memory import advising
from sftmix.runs.ranks import (
    array_hash,
    is_main,
    on_main,
    refuse_differences,
    tokens_hash,
    weights_hash,
)
from sftmix.templates.turn_ends import TurnEnds
from sftmix.training.config import EVALUATED, SFTMixOptions, require_options, require_pairs
from sftmix.training.evaluation import evaluated
from sftmix.training.example_weights import training_weights
from sftmix.training.loss import Counts, batch_counts, batch_loss
from sftmix.training.metrics import LossWindow, RunTensorBoard, micro_batch
from sftmix.training.parallelism import (
    check_parallelism,
    check_processes,
    loads_on_main_alone,
    sharded_weights,
)
from sftmix.training.partitions import matched
from sftmix.training.precision import HalfPrecisionUpdates
from sftmix.training.saving import DueEvaluation, Resumption, WholeCheckpoints
from sftmix.training.spikes import Spikes
from sftmix.training.utilisation import Utilisation, utilisation_of

# Training arguments that do not decide a training's results, or that differ from rank to rank.
OF_RANK = ("local_rank", "output_dir", "logging_dir", "run_name", "disable_tqdm")

# What a trainer takes by position.
POSITIONAL = ("model", "args", "data_collator", "train_dataset", "eval_dataset")


class SFTMixMixin(WholeCheckpoints):
    """Trains by a method of `sftmix.methods` on any trainer derived from `transformers.Trainer`.

    ``train_dataset`` has ``input_ids`` and ``labels`` (-100 outside of responses, not shifted), and
    ``id`` for messages. A column ``weight`` multiplies the losses of its examples' tokens
    (docs/methods.md). ``confident`` says of each of the S examples whether it is in the confident
    half. Methods that mix need it; with the others it fixes the same batches and order, so that
    only the loss differs.

        args = SFTMixConfig(output_dir="run", method="sftmix", mu=0.2)
        confident = score(model, ScoreConfig("score"), train_dataset=data)
        SFTMixTrainer(
            model, args, train_dataset=data, processing_class=tokenizer, confident=confident
        ).train()
    """

    args: SFTMixOptions
    model: Any
    train_dataset: Any
    data_collator: Any
    utilisation: Utilisation | None = None

    def __init__(
        self,
        *args: Any,
        confident: Confident | str | Path | None = None,
        checkpoint_extras: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        """Check everything that can be checked before training; see the class.

        Args:
            confident: which examples of ``train_dataset`` are in the confident half: (S,) booleans
                in their order; or their `Partition`, which may have more levels, or the path of its
                file, ``confidence.parquet``: both are matched by ids and content hashes.
            checkpoint_extras: objects with ``save(folder)`` and ``load(folder)`` whose state
                travels with checkpoints, in the file ``FILE``, which they may write again later.

        Raises:
            ValueError: no partition for a method with Mixup, one of other examples, a model whose
                head is not understood, examples too few for one batch, a row of ``train_dataset``
                or ``eval_dataset`` that the model cannot read or learn from (`check_examples`), a
                column of weights (`training_weights`) or an option that would not be heeded.
            TypeError: a data set that is a stream or has several splits, or ``args`` without
                SFTMix's options.
        """
        for name in ("model_init", "compute_metrics", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: not supported here")
        given = dict(zip(POSITIONAL, args, strict=False)) | kwargs
        own_collator = given.get("data_collator") is None
        self.loaded_config = as_loaded(given.get("model"))
        data = ("train_dataset", "eval_dataset")
        require_rows(**{name: given.get(name) for name in data})
        options = given.get("args")
        self.handles_signals = bool(getattr(options, "enable_jit_checkpoint", False))
        require_options(options)
        check_processes(options)
        with _without_jit_checkpoint(options):
            super().__init__(*args, **kwargs)
        method = method_of(self.args.method)
        self._check_metric()
        check_examples(self.model, **{name: getattr(self, name) for name in data})
        self.weights = training_weights(self.train_dataset, self.args.method)
        if own_collator:
            self.data_collator = self._make_collator()
        make_savable(self.model)
        self.ends = TurnEnds(self.processing_class)
        self.ends.warn()
        self.ends.align(self.model)
        self.head = self._prepare_model()
        # The loss is divided by counts over the whole accumulation window, here and not by Trainer.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.window = LossWindow(self.args.device)
        self.checkpoint_extras = list(checkpoint_extras)
        self.evaluation = DueEvaluation()
        self.begin_steps()
        self.add_callback(Resumption(self))
        self.add_callback(HalfPrecisionUpdates())
        if "tensorboard" in (self.args.report_to or ()):
            self.pop_callback(TensorBoardCallback)
            self.add_callback(RunTensorBoard(Path(str(self.args.output_dir))))
        self.paired, self.pools = confident is not None, list[Pool]()
        self.examples = self.train_dataset
        if self.args.world_size > 1 and self.train_dataset is not None:
            self.train_dataset = FilledExamples(self.train_dataset)
        if confident is not None:
            self._pair(self._matched(confident))
        elif method.mixed:
            raise ValueError(
                f"confident: method={self.args.method!r} needs a partition of the training data"
            )
        if self.train_dataset is not None:
            self._get_train_sampler()  # refuses data that make no batch

    def _make_collator(self) -> PairedCollator:
        return make_collator(self.processing_class, self.args)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Write the model, whose generation stops where training has taught it to end a turn."""
        self.ends.check()
        self.ends.align(self.model)
        super()._save(*args, **kwargs)

    @property
    def _inner_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _prepare_model(self) -> HeadAdapter:
        """Attach a head, check that the layout keeps examples apart, and tile the MLPs."""
        check_parallelism(self.args, self.accelerator, self._inner_model)
        # Where only the first rank loads the weights, the others have none to check.
        checked = is_main() or not loads_on_main_alone(self.accelerator)
        head = self._find_head(checked)
        if checked:
            check_collator(self.data_collator, self.args.layout, self.args.row_length)
            with self.accelerator.autocast():
                check_layout(self._inner_model, self.args.layout)
        if self.args.mlp_tile_tokens is not None:
            refuse_router(head.router_coefficient)
            tile_mlps(self._inner_model, self.args.mlp_tile_tokens, checked=checked)
        return head

    def _find_head(self, checked: bool) -> HeadAdapter:
        """Attach a head; what the first rank finds out about it holds for all of them."""
        saving = saved_on_host if self.args.activation_offload else None
        head = HeadAdapter(self._inner_model, self.args.head, checked=checked, saving=saving)
        if loads_on_main_alone(self.accelerator):
            known = ("logit_scale", "softcap", "router_coefficient")
            vars(head).update(on_main(lambda: {name: vars(head)[name] for name in known}))
        return head

    def _matched(self, confident: Confident | str | Path) -> Confident:
        """Return ``confident`` in the order of the examples to train on."""
        if self.examples is None:
            raise ValueError("confident: expected train_dataset, whose examples it is of, got None")
        return matched(confident, self.examples)

    def _pair(self, confident: Confident) -> None:
        dataset = self.train_dataset
        if not isinstance(confident, Partition):
            confident = halves(confident, len(dataset))
        require_pairs(self.args.train_batch_size)
        self.pools = pools_of(confident, self.args.pairing)
        self.confident_rows = np.concatenate([pool.confident for pool in self.pools])
        self.unconfident_rows = np.concatenate([pool.unconfident for pool in self.pools])
        self.train_dataset = PairedExamples(dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        batch = self.args.train_batch_size * self.args.world_size
        examples = len(self.train_dataset)
        self.args.num_batches(examples)  # refuses too few
        sampler: Sampler[Any]
        if self.paired:
            step = batch * self.args.gradient_accumulation_steps // 2
            sampler = PairedSampler(
                self.pools,
                alpha=self.args.alpha,
                seed=self.args.seed,
                pairs_per_lam=step if self.args.lambda_scope == "batch" else 1,
            )
        else:
            sampler = ShuffledSampler(examples, seed=self.args.seed)
        if self.args.world_size == 1 or self.args.dataloader_drop_last:
            return sampler
        return FilledSampler(sampler, batch, (None, 1.0) if self.paired else None)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the `Counts` of a window over all ranks, (5,)."""
        counts = torch.stack(batch_counts(batch_samples, device))
        total: Tensor = self.accelerator.reduce(counts, "sum")
        return total.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return this micro-batch's share of the loss over the whole window and all ranks.

        A router's auxiliary loss, times the model's coefficient, is a mean over the micro-batches
        of all ranks; those that hold only fillers are left out.
        """
        if not isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        counts = Counts(*num_items_in_batch)
        loss = batch_loss(model, self.head, inputs, self.args, counts)
        # Gradients are averaged over ranks, while the counts are of all ranks together.
        ranks = self.accelerator.num_processes
        total = loss.loss * ranks
        if loss.router is not None:
            router = loss.router * bool(inputs["rows"].numel()) / counts.micro_batches
            total = total + self.head.router_coefficient * router * ranks
            loss = loss._replace(loss=total / ranks, router=router)
        self.window.add(micro_batch(inputs, loss, paired=self.paired))
        return (total, loss) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace Trainer's loss by the window's exact mean, and add what is watched."""
        if "loss" in logs and self.is_in_train:
            report = self._log_line()
            logs = {**logs, **report}
            self.window.reset(self.state.global_step, int(report["num_tokens"]))
        super().log(logs, start_time)

    def _log_line(self) -> dict[str, float]:
        """Return what the steps since the last line were like, over all ranks."""
        method = method_of(self.args.method)
        return self.window.report(
            self.accelerator.reduce(self.window.sums, "sum"),
            self.state.global_step,
            paired=self.paired,
            mixed=method.mixed,
            ntp=method.ntp,
            router=self.head.router_coefficient != 0,
            utilisation=self.utilisation,
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return what `sftmix.training.evaluation.evaluated` finds of a data set.

        Batches are those of `score_examples`; ``per_device_eval_batch_size`` is not used. Several
        data sets, given as a dict, are evaluated one by one, as `Trainer` does; a name stands for
        one of the trainer's own.

        Raises:
            ValueError: no data set, none of that name, or one that the model cannot read.
        """
        if isinstance(eval_dataset, str):
            eval_dataset = self._named_eval_dataset(eval_dataset)
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None:
            raise ValueError("eval_dataset: expected a data set to evaluate on, got None")
        if self.is_fsdp_enabled and not sharded_weights(self.model):
            raise ValueError("evaluate: the model is sharded when training begins; train first")
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            check_examples(self.model, eval_dataset=dataset)
        metrics = evaluated(
            self.model,
            self.head,
            dataset,
            collator=self.data_collator.padded(),
            device=self.args.device,
            context=self.accelerator.autocast,
            disable_progress=self.args.disable_tqdm,
            prefix=metric_key_prefix,
        )
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _named_eval_dataset(self, name: str) -> Any:
        own = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if name not in own:
            raise ValueError(
                "eval_dataset: expected a data set, or the name of one of the trainer's own "
                f"({', '.join(own) or 'none has a name'}), got {name!r}"
            )
        return own[name]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to predict: logits are never made.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("predict: this trainer makes no logits; see evaluate")

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `transformers.Trainer.train` does; ``True`` resumes from the newest checkpoint.

        A run that has no checkpoint yet starts from the beginning, which comes to the same.

        Raises:
            ValueError: the checkpoint is damaged, or a file of it could run code when it is loaded;
                all weights are frozen; or there was no step to make.
            FloatingPointError: a loss, a gradient or a weight is not finite.
            MemoryError: memory does not suffice, with what helps.
            Interrupted: a signal asked for it, and the handlers of `sftmix.runs.interrupts` are on.
        """
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError(
                "model: expected weights to train, got a model whose weights are all frozen; set "
                "requires_grad of some, or add an adapter"
            )
        threshold = self.args.spike_threshold
        self.spikes = None if threshold is None else Spikes(threshold)
        # Before the clock runs: on a CPU it multiplies matrices for a tenth of a second.
        self.utilisation = utilisation_of(self._inner_model, self.head, self.args)
        resume_from_checkpoint = self._load_extras(resume_from_checkpoint)
        if self.args.world_size > 1:
            refuse_differences(self._decisive())
        if not self.is_fsdp_enabled:
            self.head.check_new_hooks(self._inner_model)
        self.begin_steps()
        signals = interrupts.handled("") if self.handles_signals else contextlib.nullcontext()
        with signals, advising(*self._ways_to_save_memory()):
            try:
                output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            except interrupts.Interrupted as stop:
                raise self.stopped(stop) from None
        if self.state.global_step == 0:
            raise ValueError(f"train: expected at least one step, got {self.state.max_steps}")
        return output

    def _ways_to_save_memory(self) -> list[str]:
        """Return what is left to try if memory does not suffice, the cheapest first."""
        args = self.args
        ways = {
            "--memory lean, which changes no result and may be given with --resume": (
                args.memory == "plain"
            ),
            "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps": (
                args.per_device_train_batch_size > 2 and args.layout != "sequential"
            ),
            "--bf16 true": not (args.bf16 or args.fp16),
            "--activation_offload true": args.memory == "lean" and not args.activation_offload,
            "a smaller --max_length": True,
            "--lora_rank 16 with a larger --learning_rate": not hasattr(self.model, "peft_config"),
            "more GPUs with --fsdp": not self.is_fsdp_enabled,
        }
        return [*(way for way, open_ in ways.items() if open_), "`sftmix plan` says what fits"]

    def _check_metric(self) -> None:
        """Refuse a metric that no evaluation has, before anything is trained.

        Raises:
            ValueError: naming those that there are.
        """
        wanted = self.args.metric_for_best_model
        if wanted is None or self.eval_dataset is None:
            return
        own = self.eval_dataset
        kinds = [f"{name}_" for name in own] if isinstance(own, dict) else [""]
        known = [f"eval_{kind}{name}" for kind in kinds for name in EVALUATED]
        if wanted not in known and f"eval_{wanted}" not in known:
            raise ValueError(
                f"metric_for_best_model: expected one of {', '.join(known)}, got {wanted!r}"
            )

    def _decisive(self) -> dict[str, Any]:
        """Return by name what decides a training's results: it has to be the same on all ranks."""
        options: dict[str, Any] = self.args.to_dict()  # type: ignore[no-untyped-call]
        values = {name: value for name, value in options.items() if name not in OF_RANK}
        # DDP begins with the first rank's weights; FSDP2 shards those of each.
        if self.is_fsdp_enabled and not loads_on_main_alone(self.accelerator):
            values["model"] = weights_hash(self.model)
        return {
            **values,
            "train_dataset": tokens_hash(self.examples),
            "weight": None if self.weights is None else array_hash(self.weights),
            "confident": [
                array_hash(side)
                for pool in self.pools
                for side in (pool.confident, pool.unconfident)
            ],
        }


@contextlib.contextmanager
def _without_jit_checkpoint(options: Any) -> Iterator[None]:
    """Keep Trainer's own way with SIGTERM out, after which a run ends as if it were finished.

    Ours (see `sftmix.runs.interrupts`) is always on in the commands, and in a script that sets
    ``enable_jit_checkpoint``.
    """
    wanted = getattr(options, "enable_jit_checkpoint", False)
    if wanted:
        options.enable_jit_checkpoint = False
    try:
        yield
    finally:
        if wanted:
            options.enable_jit_checkpoint = True


class SFTMixTrainer(SFTMixMixin, Trainer):
    """`transformers.Trainer` with the loss, the pairs and the checkpoints of `SFTMixMixin`."""

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        """See `SFTMixMixin`.

        Raises:
            TypeError: the model is no module, such as its name.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a model, got {model!r}; AutoModelForCausalLM.from_pretrained "
                "loads one by its name or folder"
            )
        super().__init__(model, *args, **kwargs)


def make_collator(tokenizer: Any, options: SFTMixOptions | None = None) -> PairedCollator:
    """Return the collator that `SFTMixMixin` expects, padding with the tokenizer's token.

    Padding carries nothing, so that the end token will do where there is none, and 0 without a
    tokenizer. Batches are laid out as ``options`` says, padded without.
    """
    tokens = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos"))
    token = next((token for token in tokens if token is not None), 0)
    if options is None:
        return PairedCollator(token)
    return PairedCollator(token, layout=options.layout, row_length=options.row_length)
