"""Training with NTP + mu * Mixup on top of `transformers.Trainer`.

`SFTMixMixin` holds everything, so that it also sits on other trainers derived from
`transformers.Trainer`; `SFTMixTrainer` is the mixin over the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import TrainOutput

from sftmix.checkpoints import (
    PREFIX,
    STAGING,
    STATE,
    latest_checkpoint,
    rotate_checkpoints,
    seal,
    writing,
)
from sftmix.config import SFTMixOptions
from sftmix.head import HeadAdapter
from sftmix.layouts import check_layout
from sftmix.metrics import LossWindow, RunTensorBoard
from sftmix.objective import BatchLoss, batch_loss
from sftmix.pairing import PairedCollator, PairedExamples, PairedSampler, ShuffledSampler
from sftmix.pickles import refuse_code
from sftmix.runs import atomic_write, publish_folder
from sftmix.scoring import score_examples

# The mixin goes over any trainer derived from Trainer; type checkers read it as one.
if TYPE_CHECKING:
    TrainerBase = Trainer
else:
    TrainerBase = object


class SFTMixMixin(TrainerBase):
    """NTP + mu * Mixup for a trainer derived from `transformers.Trainer`.

    ``train_dataset`` has ``input_ids`` and ``labels`` (-100 outside of responses, not shifted), and
    ``id`` for messages. ``confident`` (S,) says of each row whether it is in the confident half; it
    is needed for ``method="sftmix"``. With ``method="ntp"`` it fixes the same batches and order as
    SFTMix's, so that the loss is all that differs.
    """

    args: SFTMixOptions
    model: Any
    train_dataset: Any
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        confident: Sequence[bool] | np.ndarray[Any, Any] | None = None,
        checkpoint_extras: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        """See the class; other arguments are the trainer's own.

        Args:
            confident: which rows of ``train_dataset`` are in the confident half.
            checkpoint_extras: objects with ``save(folder)`` and ``load(folder)`` whose state
                travels with checkpoints, in the file ``FILE``, which they may write again later.

        Raises:
            ValueError: no partition for SFTMix, one of another length, a model whose head is not
                understood, examples too few for one batch, or an option that would not be heeded.
        """
        for name in ("model_init", "compute_metrics", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: not supported here")
        own_collator = kwargs.get("data_collator") is None and len(args) < 3
        super().__init__(*args, **kwargs)
        if own_collator:
            self.data_collator = self._make_collator()
        self.head = HeadAdapter(self.accelerator.unwrap_model(self.model), self.args.head)
        self._check_layout()
        # The loss is divided by counts over the whole accumulation window, here and not by Trainer.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.window = LossWindow(self.args.device)
        self.checkpoint_extras = list(checkpoint_extras)
        self.staging: Path | None = None
        if "tensorboard" in (self.args.report_to or ()):
            self.pop_callback(TensorBoardCallback)
            self.add_callback(RunTensorBoard(Path(str(self.args.output_dir))))
        self.paired = confident is not None
        if confident is not None:
            self._pair(np.asarray(confident, dtype=bool))
        elif self.args.method == "sftmix":
            raise ValueError("confident: method='sftmix' needs a partition of the training data")
        if self.args.n_gpu > 1:
            raise ValueError("nn.DataParallel is not supported; start one process for each GPU")
        if self.train_dataset is not None:
            self._get_train_sampler()  # refuses data that make no batch

    def _make_collator(self) -> PairedCollator:
        return make_collator(self.processing_class, self.args)

    def _check_layout(self) -> None:
        layout = self.data_collator.layout
        if layout.name != self.args.layout:
            raise ValueError(
                f"data_collator: expected layout={self.args.layout!r} as in args, "
                f"got {layout.name!r}"
            )
        with self.accelerator.autocast():
            check_layout(self.accelerator.unwrap_model(self.model), layout.name)

    def _pair(self, confident: np.ndarray[Any, Any]) -> None:
        dataset = self.train_dataset
        if confident.shape != (len(dataset),):
            raise ValueError(
                f"confident: expected one value for each of {len(dataset)} training examples, "
                f"got shape {confident.shape}"
            )
        if self.args.train_batch_size % 2:
            raise ValueError(
                "per_device_train_batch_size: expected an even number (pairs of examples), "
                f"got {self.args.train_batch_size}"
            )
        self.confident_rows = confident.nonzero()[0]
        self.unconfident_rows = (~confident).nonzero()[0]
        self.train_dataset = PairedExamples(dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        batch = self.args.train_batch_size * self.args.world_size
        examples = len(self.train_dataset)
        if examples < batch:
            raise ValueError(
                f"train_dataset: expected at least one batch of {batch} examples, got {examples}"
            )
        if not self.paired:
            return ShuffledSampler(examples, seed=self.args.seed)
        return PairedSampler(
            self.confident_rows, self.unconfident_rows, alpha=self.args.alpha, seed=self.args.seed
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Tokens with loss and mixed pairs of one accumulation window over all ranks: (2,)."""
        counts = torch.tensor(
            [
                sum(batch["rows"].numel() for batch in batch_samples),
                sum(batch["pair_c"].numel() for batch in batch_samples if "pair_c" in batch),
            ],
            dtype=torch.float32,
            device=device,
        )
        total: Tensor = self.accelerator.reduce(counts, "sum")
        return total.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """This micro-batch's share of ``NTP + mu * Mixup`` over the whole window and all ranks.

        A router's auxiliary loss, times the model's coefficient, is a mean over micro-batches and
        ranks, as in `transformers.Trainer`.
        """
        if not isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        loss = batch_loss(model, self.head, inputs, self.args, *num_items_in_batch)
        # Gradients are averaged over ranks, while the counts are of all ranks together.
        ranks = self.accelerator.num_processes
        total = loss.loss * ranks
        if loss.router is not None:
            router = loss.router / self.current_gradient_accumulation_steps
            total = total + self.head.router_coefficient * router
            loss = loss._replace(loss=total / ranks, router=router / ranks)
        self._measure(inputs, loss)
        return (total, loss) if return_outputs else total

    def _measure(self, inputs: dict[str, Tensor], loss: BatchLoss) -> None:
        values: dict[str, Tensor | float] = {
            "loss": loss.loss,
            "ntp_loss": loss.ntp,
            "mixup_loss": loss.mixup,
            "router_loss": 0.0 if loss.router is None else loss.router,
            "input_tokens": inputs["lengths"].sum(),
            "tokens_confident": float(inputs["rows"].numel()),
        }
        if self.paired:
            unconfident = inputs["owner"] % 2 == 1
            values |= {
                "nll_confident": (loss.row_ntp * ~unconfident).sum(),
                "nll_unconfident": (loss.row_ntp * unconfident).sum(),
                "tokens_confident": (~unconfident).sum(),
                "tokens_unconfident": unconfident.sum(),
                "mixed_pairs": float(inputs["pair_c"].numel()),
                "lam": inputs["lam"].sum(),
            }
        self.window.add(values)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch; a loss that is not finite stops before the optimizer's step.

        Raises:
            FloatingPointError: the loss is NaN or infinite, with the step and the examples' ids.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}, "
                f"examples {inputs['ids'].tolist()}; the model was not updated"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace Trainer's loss by the window's exact mean, and add the terms and rates."""
        if "loss" in logs and self.is_in_train:
            step = self.state.global_step
            sums = self.accelerator.reduce(self.window.sums, "sum")
            mixed = self.args.method == "sftmix"
            router = self.head.router_coefficient != 0
            report = self.window.report(sums, step, paired=self.paired, mixed=mixed, router=router)
            logs = {**logs, **report}
            self.window.reset(step)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """NTP loss of a data set, a mean over its response tokens, and its perplexity.

        Several data sets, given as a dict, are evaluated one by one, as `Trainer` does.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [
                self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, part in dataset.items()
            ]
            return {key: value for part in parts for key, value in part.items()}
        if dataset is None:
            raise ValueError("eval_dataset: expected a data set to evaluate on, got None")
        scores = score_examples(
            self.model,
            self.head,
            dataset,
            collator=self.data_collator.padded(),
            context=self.accelerator.autocast,
            description="evaluate",
            disable_progress=self.args.disable_tqdm,
        )
        loss = float(scores.nll_sum.sum() / scores.num_tokens.sum())
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": float(np.exp(loss)),
        }
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not there: logits are never made.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("predict: this trainer makes no logits; see evaluate")

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes: the staging folder while a checkpoint is being made."""
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, then rename it: it is complete or not there."""
        run = Path(str(self.args.output_dir))
        name = f"{PREFIX}{self.state.global_step}"
        self.staging = run / STAGING
        try:
            with writing(self.staging):
                super()._save_checkpoint(model, trial)
        finally:
            staging, self.staging = self.staging, None
        # Every rank writes its random state into the folder that the first one renames.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish(staging / name, run / name)
        self.accelerator.wait_for_everyone()

    def _publish(self, staging: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(staging):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staging / STATE))
        for extra in [self.window, *self.checkpoint_extras]:
            extra.save(staging)
        seal(staging, changing=[extra.FILE for extra in self.checkpoint_extras])
        # What is there is damaged, or an earlier training's in the same folder.
        publish_folder(staging, final, replace=True)
        staging.parent.rmdir()
        rotate_checkpoints(
            final.parent,
            self.state.global_step,
            self.args.save_total_limit,
            self.state.best_model_checkpoint,
        )

    def save_state(self) -> None:
        """The log and the counters into ``RUN/trainer_state.json``, all of it or nothing."""
        if self.args.should_save:
            path = Path(str(self.args.output_dir)) / STATE
            atomic_write(path, lambda temporary: self.state.save_to_json(str(temporary)))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `transformers.Trainer.train`; ``True`` resumes from the newest whole checkpoint.

        A run that has no checkpoint yet starts from the beginning, which comes to the same.

        Raises:
            ValueError: a file of the checkpoint could run code when it is loaded.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_checkpoint()
        if isinstance(resume_from_checkpoint, str):
            refuse_code(Path(resume_from_checkpoint))
            for extra in [self.window, *self.checkpoint_extras]:
                extra.load(Path(resume_from_checkpoint))
        else:
            self.window.begin()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _newest_checkpoint(self) -> str | None:
        """The first process reads what there is; all go on from the same."""
        found: list[str | None] = [None]
        if self.is_world_process_zero():
            newest = latest_checkpoint(Path(str(self.args.output_dir)))
            found = [None if newest is None else str(newest)]
        broadcast_object_list(found)
        return found[0]


class SFTMixTrainer(SFTMixMixin, Trainer):
    """`transformers.Trainer` with the loss, the pairs and the checkpoints of `SFTMixMixin`."""


def make_collator(tokenizer: Any, options: SFTMixOptions | None = None) -> PairedCollator:
    """The collator that `SFTMixMixin` expects, padding with the tokenizer's token.

    Batches are laid out as ``options`` says, padded without.

    Padding is masked, so that the end token will do where there is none, and 0 without a
    tokenizer.
    """
    tokens = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos"))
    token = next((token for token in tokens if token is not None), 0)
    if options is None:
        return PairedCollator(token)
    return PairedCollator(token, layout=options.layout, row_length=options.row_length)
