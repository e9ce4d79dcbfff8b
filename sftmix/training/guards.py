"""The part of a trainer that looks at each step before the optimizer uses it.

Once a step, when its gradients are there and none of them is used, all ranks put together what each
has seen: losses and a gradient's norm that are not finite, a signal, and on the first rank whether
a checkpoint is due. That is one reduction of five numbers and one wait for the device, which was
only for the losses; the norm is the one that clipping and the log have anyway. With
``spike_threshold`` it is two numbers more, the step's loss and the norm (`spikes.py`).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from sftmix.runs import interrupts
from sftmix.runs.failures import RankError
from sftmix.runs.ranks import gathered, is_main, num_ranks, summed
from sftmix.training.config import SFTMixOptions
from sftmix.training.spikes import Spikes

# The mixin goes over any trainer derived from Trainer; type checkers read it as one.
if TYPE_CHECKING:
    TrainerBase = Trainer
else:
    TrainerBase = object

logger = logging.getLogger(__name__)

# Below this scale an overflow does not come from the scale. It is DeepSpeed's limit, too.
LOWEST_SCALE = 1.0
# Optimizers that step during backward, a layer at a time.
IN_BACKWARD = ("lomo", "layerwise")


class GuardedSteps(TrainerBase):
    """Steps that end the training before the optimizer uses anything that is not finite."""

    args: SFTMixOptions
    model: Any
    unchecked: list[tuple[Tensor, Tensor]]
    # What all ranks agreed on in the step that is under way.
    stop_signal: int | None = None
    save_is_due = False
    saved_at: float
    spikes: Spikes | None = None

    def begin_steps(self) -> None:
        """Forget what another training has left."""
        self.unchecked = []
        self.stop_signal, self.save_is_due = None, False
        self.saved_at = time.monotonic()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Make a micro-batch's forward and backward; its loss is checked with those of its step."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.unchecked.append((loss, inputs["ids"]))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients, which Trainer asks for before the optimizer's step.

        Raises:
            FloatingPointError: a loss or a gradient is NaN or infinite, with the step and the ids
                of its examples.
            RankError: another rank says so.
        """
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self._check_step(norm)
        return norm

    def _check_step(self, norm: Any) -> None:
        window, self.unchecked = self.unchecked, []
        losses = torch.stack([loss for loss, _ in window])
        bad = ~losses.isfinite()
        # Summed over the shards, of which each rank has some.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        norm = norm.to(bad.device)
        asked = interrupts.requested()
        due = is_main() and time.monotonic() - self.saved_at >= self.args.save_seconds
        own = [*(asked == signum for signum in interrupts.SIGNALS), due]
        # By fills: a copy from the host would wait for the device once more.
        wishes = [torch.full((), float(wish), device=bad.device) for wish in own]
        seen = [bad.any().float(), (~norm.isfinite()).float(), *wishes]
        if self.spikes is not None:
            seen += [losses.sum().float(), norm.float()]
        bad_losses, bad_norms, *rest = summed(torch.stack(seen)).tolist()
        *asking, due_on_main = rest[: len(wishes)]
        if bad_losses:
            self._refuse_losses(window, bad.tolist())
        if bad_norms and not self._is_scaled_down():
            self._refuse_gradients(window, norm)
        if self.spikes is not None:
            loss, norm_of_all = (total / num_ranks() for total in rest[len(wishes) :])
            self._tell_spikes(window, self.spikes.add(loss=loss, norm=norm_of_all))
        self.save_is_due = bool(due_on_main)
        signals = zip(interrupts.SIGNALS, asking, strict=True)
        self.stop_signal = next((signum for signum, ranks in signals if ranks), None)

    def _tell_spikes(self, window: list[tuple[Tensor, Tensor]], spikes: str) -> None:
        """Name the examples of a step that spikes; all ranks agree on whether one does."""
        if spikes:
            ids = [number for number in examples_of(window) if number >= 0]  # -1: a filler
            if is_main():
                step = self.state.global_step + 1
                logger.warning("spike at step %d: %s; examples %s", step, spikes, ids)

    def _is_scaled_down(self) -> bool:
        """Return whether fp16's scaler leaves this step out and takes a smaller scale next."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > LOWEST_SCALE

    def _refuse_losses(self, window: list[tuple[Tensor, Tensor]], bad: list[bool]) -> None:
        step = f"at step {self.state.global_step + 1}"
        for (loss, ids), is_bad in zip(window, bad, strict=True):
            if is_bad:
                raise FloatingPointError(
                    f"loss is {loss.item()} {step}, examples {ids.tolist()}; {self._unharmed()}"
                )
        raise RankError(f"the loss of another rank is not finite {step}; {self._unharmed()}")

    def _refuse_gradients(self, window: list[tuple[Tensor, Tensor]], norm: Tensor) -> None:
        """Refuse gradients that all ranks share by now: whose examples made them cannot be told."""
        step = f"at step {self.state.global_step + 1}"
        numbers = examples_of(window)
        if not is_main():
            raise RankError(f"the gradients are not finite {step}; {self._unharmed()}")
        losses = ", ".join(f"{loss.item():.6g}" for loss, _ in window)
        raise FloatingPointError(
            f"the norm of the gradients is {norm.item()} {step} (losses {losses}), examples "
            f"{numbers}; {self._unharmed()}"
        )

    def _unharmed(self) -> str:
        """Return in words what this step did to the model, which an earlier one may have spoilt."""
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if any(kind in optimizer for kind in IN_BACKWARD):
            return f"--optim {optimizer} updates weights in backward: the model may be spoilt"
        if name := weight_not_finite(self.model):
            return f"the model was not updated, but {name} was not finite before this step"
        return "the model was not updated"

    def refuse_weights(self, kept: str) -> None:
        """Refuse to save a model that an update has spoilt; every rank has to call this.

        Raises:
            FloatingPointError: a weight is NaN or infinite; ``kept`` says what stays as it is.
            RankError: the same on all ranks but the first.
        """
        names = gathered(weight_not_finite(self.model))
        if not any(names):
            return
        name = next(name for name in names if name)
        if not is_main():
            raise RankError(f"{name} is not finite after step {self.state.global_step}")
        raise FloatingPointError(
            f"{name} is not finite after step {self.state.global_step}: an update was too large "
            f"for its dtype; {kept}; a smaller --learning_rate, or --dtype float32, may help"
        )


def examples_of(window: list[tuple[Tensor, Tensor]]) -> list[int]:
    """Return the ids of a step's examples, of all ranks, which have to call this together."""
    everyone = gathered([number for _, ids in window for number in ids.tolist()])
    return [number for own in everyone for number in own]


def weight_not_finite(model: nn.Module) -> str | None:
    """Return the name of a trained weight that is NaN or infinite here, None where all are finite.

    Looks at the smallest and the largest value, which takes no memory, and waits once.
    """
    names, ends = [], []
    for name, weight in model.named_parameters():
        own = weight.detach()
        own = own.to_local() if isinstance(own, DTensor) else own
        if weight.requires_grad and own.is_floating_point() and own.numel():
            names.append(name)
            ends.append(torch.stack(torch.aminmax(own)).float().isfinite().all())
    if not ends:
        return None
    finite = torch.stack([end.to(ends[0].device) for end in ends]).tolist()
    return next((name for name, whole in zip(names, finite, strict=True) if not whole), None)
