"""What `test_ranks` runs in two processes and in one."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import TrainerCallback

from sftmix.commands.train import finish
from sftmix.model.head import HeadAdapter
from sftmix.pairs.collator import PairedCollator
from sftmix.recipe.manifest import start_manifest
from sftmix.runs import interrupts
from sftmix.runs.checkpoints import list_checkpoints
from sftmix.runs.failures import RankError
from sftmix.runs.ranks import (
    is_main,
    num_ranks,
    on_main,
    opened_run,
    rank,
    summed,
    together,
)
from sftmix.training import spikes
from sftmix.training.loss import batch_counts, batch_loss
from sftmix.training.metrics import MEASURED
from sftmix.training.scoring import ScoringCallback, score_examples
from sftmix.training.trainer import SFTMixTrainer
from sftmix_kernels import StreamingPerplexity
from tests.sftmix import over_trl, tiny
from tools import families

RANKS = 2
Found = dict[str, Any]


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of it, where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def plain(name: str) -> str:
    """A parameter's name without that of a wrapper for activation checkpointing."""
    return name.replace("_checkpoint_wrapped_module.", "")


class Recorder(TrainerCallback):
    """Keeps the whole gradients of every step before they are used."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({plain(n): whole(p.grad) for n, p in named if p.grad is not None})


def shard(made: SFTMixTrainer, **options: Any) -> None:
    """Have accelerate wrap the model in FSDP2 as on GPUs: on CPUs it takes DDP by itself."""
    state = made.accelerator.state
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="FULL_STATE_DICT",
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **{"cpu_ram_efficient_loading": False, **options},
    )
    made.is_fsdp_enabled = True


def llama() -> Any:
    """The model of most trainings."""
    return tiny.build("Llama")


def lora(**changes: Any) -> Any:
    """The model with an adapter whose second factor is not zero."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own
        torch.manual_seed(3)
        options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
        return get_peft_model(llama(), LoraConfig(r=2, **options, **changes))


def training(
    folder: Path,
    *,
    number: int = 18,
    total: int = 8,
    fsdp: dict[str, Any] | None = None,
    build: Callable[[], Any] = llama,
    in_turn: bool = False,
    weights: Sequence[float] | None = None,
    **changes: Any,
) -> Found:
    """What a training comes to; ``in_turn``: one process takes the ranks' batches in turn."""
    model, recorder, data = build(), Recorder(), tiny.examples(number)
    if weights is not None:
        data = data.add_column("weight", np.resize(weights, number))
    if in_turn:
        changes["gradient_accumulation_steps"] = RANKS // num_ranks()
    made = tiny.trainer(
        model,
        folder,
        data,
        callbacks=[recorder],
        eval_dataset=tiny.examples(7, seed=5),
        per_device_train_batch_size=total // (RANKS if in_turn else num_ranks()),
        **{"num_train_epochs": 2, "max_grad_norm": 0.0, **changes},
    )
    if fsdp is not None and num_ranks() > 1:
        shard(made, **fsdp)
        if made.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading and not is_main():
            for weight in model.parameters():
                weight.data.zero_()
    found = outcome(made, recorder)
    for line in found["logs"] if in_turn else ():
        del line["epoch"]  # counted in micro-batches, of which ranks that wait have more
    return found


def with_trl(folder: Path) -> Found:
    """The same over TRL's trainer."""
    data, size, recorder = tiny.examples(18), 8 // num_ranks(), Recorder()
    return outcome(over_trl.trainer(llama(), folder, data, size, callbacks=[recorder]), recorder)


def outcome(made: Any, recorder: Recorder) -> Found:
    """Gradients of all steps, logs, evaluation and weights of a training."""
    made.train()
    evaluated = made.evaluate()
    logs = [
        {k: v for k, v in line.items() if k not in MEASURED}
        for line in made.state.log_history
        if "loss" in line
    ]
    named = made.model.named_parameters()
    return {
        "gradients": recorder.steps,
        "logs": logs,
        "evaluated": {k: v for k, v in evaluated.items() if k not in MEASURED},
        "weights": {plain(name): whole(weight) for name, weight in named},
    }


def spiking(folder: Path) -> Found:
    """Steps above the mean of two or more before them, and the ids that the first rank names."""
    told: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("sftmix.training.guards")
    handler.emit = told.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    size = {"per_device_train_batch_size": 8 // num_ranks(), "num_train_epochs": 2}
    options = {"spike_threshold": 1e-6, "learning_rate": 0.0, **size}
    with mock.patch.object(spikes, "FEWEST", 2):
        tiny.trainer(llama(), folder, tiny.examples(18), **options).train()
    logger.removeHandler(handler)
    found = [record.args for record in told if isinstance(record.args, tuple)]
    return {"spikes": [(step, sorted(ids)) for step, _, ids in found]}  # type: ignore[call-overload]


def sharded_by_hand(folder: Path, *, own_unit: bool, tied: bool = False) -> Found:
    """Loss and gradients of one batch whose pairs the ranks share, FSDP2 by its own function."""
    model = tiny.build("Llama", tie_word_embeddings=tied)
    head = HeadAdapter(model)
    rows = [{**example, "lam": 0.3} for example in tiny.examples(8)]
    mine = PairedCollator(0)(rows[rank() * 8 // num_ranks() : (rank() + 1) * 8 // num_ranks()])
    all_rows = PairedCollator(0)(rows)
    if num_ranks() > 1:
        if own_unit:
            fully_shard(model.lm_head)
        fully_shard(model)
    counts = batch_counts([all_rows], torch.device("cpu"))
    loss = batch_loss(model, head, mine, tiny.config(folder), counts).loss
    (loss * num_ranks()).backward()
    gradients = {name: whole(weight.grad) for name, weight in model.named_parameters()}
    return {"gradients": [gradients], "loss": float(summed(loss.detach()))}


def scoring(folder: Path) -> Found:
    """Scores of nine examples: at once, and broken off, saved, and gone on with."""
    folder.mkdir(exist_ok=True)
    model, data = tiny.build("Llama"), tiny.examples(9)
    options = {"collator": PairedCollator(0), "max_tokens": 20, "disable_progress": True}
    head = HeadAdapter(model)
    scores = score_examples(model, head, data, shared=True, **options)
    broken, resumed = StreamingPerplexity(9, "cpu"), StreamingPerplexity(9, "cpu")
    part = data.select([0, 4, 8][rank() :: num_ranks()])
    kept = score_examples(model, head, part, **options)
    for row, nll, tokens in zip(
        [0, 4, 8][rank() :: num_ranks()], kept.nll_sum[:, 0], kept.num_tokens, strict=True
    ):
        broken._sum[row], broken._count[row] = nll, tokens
    ScoringCallback(broken, [1], lambda **_: None).save(folder)
    after = ScoringCallback(resumed, [1], lambda **_: None)
    if num_ranks() > 1:
        dist.barrier()
    after.load(folder)
    calls: list[Any] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    score_examples(model, head, data, perplexity=resumed, shared=True, **options)
    return {
        "nll": scores.nll_sum,
        "tokens": scores.num_tokens,
        "resumed": resumed.nll_sum,
        "forwards": len(calls),
    }


def resumed(folder: Path, *, fsdp: bool) -> Found:
    """Losses and weights of a training, and of one that goes on from its first epoch's end."""
    found = []
    for resume in (False, True):
        made = tiny.trainer(
            tiny.build("Llama"),
            folder,
            tiny.examples(18),
            num_train_epochs=2,
            logging_steps=2,
            save_strategy="epoch",
        )
        if fsdp:
            shard(made)
        made.train(resume_from_checkpoint=resume)
        named = made.model.named_parameters()
        weights = {name: whole(weight) for name, weight in named}
        found.append((tiny.losses(made, "loss", "lam_mean", "ntp_loss_confident"), weights))
        if is_main() and not resume:
            shutil.rmtree(folder / "checkpoint-6")
        dist.barrier()
    made.processing_class = SimpleNamespace(save_pretrained=lambda folder: None)
    recipe = {"model": "org/base", "data": ["org/rows"], "method": "sftmix"}
    on_main(lambda: start_manifest(folder, recipe))
    finish(made, folder, recipe, None, None)
    return {"trainings": found, "saved": load_file(folder / "model.safetensors")}


def best(folder: Path) -> Found:
    """Each rank's weights after a training that grows worse, and its best checkpoint's."""
    made = tiny.trainer(
        tiny.build("Llama"),
        folder,
        tiny.examples(16),
        eval_dataset=tiny.examples(5, seed=1),
        learning_rate=0.3,
        warmup_steps=0,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    made.train()
    path = Path(str(made.state.best_model_checkpoint))
    return {"weights": tiny.weights(made.model), "best": load_file(path / "model.safetensors")}


class Poisoned(tiny.SFTMixTrainer):
    """The second rank's first loss of the second step is not a number."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and not self.unchecked:
            self.before = tiny.weights(self.model)
            self.ids = inputs["ids"].tolist()
            if rank() == 1:
                return super().compute_loss(model, inputs, *args, **kwargs) * float("nan")
        return super().compute_loss(model, inputs, *args, **kwargs)


def stopped(folder: Path) -> Found:
    """What each rank is told of a loss that is not finite, and of another config or data."""

    def trainer(cls: type[tiny.SFTMixTrainer], number: int, **changes: Any) -> Any:
        return cls(
            model=tiny.build("Llama"),
            args=tiny.config(folder, gradient_accumulation_steps=2, **changes),
            train_dataset=tiny.examples(number, seed=0 if changes else rank()),
            data_collator=PairedCollator(0),
            confident=tiny.halves(number),
        )

    poisoned = trainer(Poisoned, 40, warmup_steps=0)
    told: Found = {"nan": message(poisoned.train)}
    told["ids"] = poisoned.ids
    told["steps"] = poisoned.state.global_step
    told["untouched"] = tiny.same(poisoned.before, tiny.weights(poisoned.model))
    told["mu"] = message(trainer(tiny.SFTMixTrainer, 8, mu=0.25 + 0.5 * rank()).train)
    told["data"] = message(trainer(tiny.SFTMixTrainer, 8).train)
    return told


def each_step(folder: Path, *, fsdp: bool) -> SFTMixTrainer:
    """A trainer that writes a checkpoint after each of four steps."""
    data, options = tiny.examples(32), {"save_strategy": "steps", "save_steps": 1}
    made = tiny.trainer(tiny.build("Llama"), folder, data, save_total_limit=1, **options)
    if fsdp:
        shard(made)
    return made


def spoilt(folder: Path, *, fsdp: bool) -> Found:
    """What each rank is told of a gradient of the second that is not finite, at step 3."""
    made, ids = each_step(folder, fsdp=fsdp), []
    own = made.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = own(model, inputs, *args, **kwargs)
        if made.state.global_step == 2:
            ids.extend(inputs["ids"].tolist())
            if rank() == 1:
                loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    made.compute_loss = compute_loss  # type: ignore[method-assign]
    told = message(made.train)
    finite = all(whole(weight).isfinite().all() for weight in made.model.parameters())
    names = [path.name for path in list_checkpoints(folder)]
    return {"told": told, "ids": ids, "finite": finite, "checkpoints": names}


def signalled(folder: Path) -> Found:
    """What each rank ends with after a signal that the second alone gets, in its second step."""
    made = tiny.trainer(tiny.build("Llama"), folder, tiny.examples(32))
    own = made.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if made.state.global_step == 1 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(model, inputs, *args, **kwargs)

    made.compute_loss = compute_loss  # type: ignore[method-assign]
    with interrupts.handled():
        told = message(made.train)
    resumed = tiny.trainer(tiny.build("Llama"), folder, tiny.examples(32))
    resumed.train(resume_from_checkpoint=True)
    unbroken = tiny.trainer(tiny.build("Llama"), folder / "unbroken", tiny.examples(32))
    unbroken.train()
    same = tiny.same(tiny.weights(resumed.model), tiny.weights(unbroken.model))
    return {"told": told, "same": same}


def agreed(folder: Path) -> Found:
    """What each rank is told of errors of both, of the second, and of the main process."""
    folder.mkdir(exist_ok=True)

    def fail(numbers: tuple[int, ...]) -> None:
        with together():
            if rank() in numbers:
                raise OSError(f"rank {rank()} cannot")

    def open_twice() -> None:
        with opened_run(str(folder), resume=False):
            raise AssertionError("the folder holds something")

    if is_main():
        (folder / "something").touch()
    return {
        "both": message(lambda: fail((0, 1))),
        "second": message(lambda: fail((1,))),
        "none": message(lambda: fail(())),
        "folder": message(open_twice),
        "main": on_main(lambda: rank()),
    }


def message(action: Callable[[], object]) -> str:
    """The error that an action ends with."""
    try:
        action()
    except (ValueError, OSError, FloatingPointError, RankError, interrupts.Interrupted) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


TIED = functools.partial(tiny.build, "Llama", tie_word_embeddings=True)
COPIED = functools.partial(lora, modules_to_save=["lm_head"])
EXPERTS = functools.partial(families.build, "mixtral", router_aux_loss_coef=8.0)
TRAININGS: dict[str, dict[str, Any]] = {
    # The last batch of an epoch has a pair, so that the second rank has none.
    "ddp": {"num_train_epochs": 2},
    "ddp, accumulated": {"number": 22, "total": 4, "gradient_accumulation_steps": 4},
    "ddp, ntp": {"number": 11, "method": "ntp", "activation_checkpointing": True},
    "fsdp": {"fsdp": {}, "num_train_epochs": 2},
    "fsdp, accumulated": {"fsdp": {}, "number": 22, "total": 4, "gradient_accumulation_steps": 4},
    "fsdp, tied": {"fsdp": {}, "build": TIED},
    "fsdp, loaded by one": {"fsdp": {"cpu_ram_efficient_loading": True}},
    "fsdp, lora": {"fsdp": {"activation_checkpointing": True}, "build": lora},
    "ddp, head copied": {"build": COPIED},
    "fsdp, head copied": {"fsdp": {}, "build": COPIED},
    "ddp, lean": {"memory": "lean", "mlp_tile_tokens": 5, "activation_offload": True},
    "fsdp, lean": {"fsdp": {}, "memory": "lean", "mlp_tile_tokens": 5},
    # The last batch of an epoch has a pair, and is not mixed.
    "ddp, weights": {"weights": [0.5, 0.0, 2.0, 1.0, 3.0], "number": 10},
    # The epoch's last batch leaves the second rank without an example.
    "ddp, ir_dro": {"method": "ir_dro"},
    "ddp, mixup": {"method": "mixup"},
    "ddp, one lam a batch": {"lambda_scope": "batch"},
    # The router's loss is a mean over micro-batches; an epoch's last is the first rank's alone.
    "ddp, experts": {"number": 20, "in_turn": True, "build": EXPERTS},
}


CASES: dict[str, Callable[[Path], Found]] = {
    **{
        # What an option changes, it changes in the first epoch.
        name: functools.partial(training, learning_rate=0.0, **{"num_train_epochs": 1, **options})
        for name, options in TRAININGS.items()
    },
    "ddp, trl": with_trl,
    "ddp, learning": training,
    "fsdp, learning": functools.partial(training, fsdp={}),
    "by hand, root": functools.partial(sharded_by_hand, own_unit=False),
    "by hand, tied": functools.partial(sharded_by_hand, own_unit=False, tied=True),
    "by hand, head": functools.partial(sharded_by_hand, own_unit=True),
    "scoring": scoring,
    "spikes": spiking,
}


def sharded_head(folder: Path) -> Found:
    """What a trainer says of a model whose head was parted over the vocabulary."""
    model, mesh = tiny.build("Llama"), init_device_mesh("cpu", (RANKS,))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    return {"message": message(lambda: tiny.trainer(model, folder, tiny.examples(8)))}


def evaluated_early(folder: Path) -> Found:
    """What a trainer that will shard its model says of an evaluation before it has."""
    made = tiny.trainer(tiny.build("Llama"), folder, tiny.examples(8))
    shard(made)
    return {"message": message(lambda: made.evaluate(tiny.examples(4)))}


# What only several ranks can do.
OF_RANKS: dict[str, Callable[[Path], Found]] = {
    "ddp, resumed": functools.partial(resumed, fsdp=False),
    "fsdp, resumed": functools.partial(resumed, fsdp=True),
    "best": best,
    "stopped": stopped,
    "ddp, spoilt": functools.partial(spoilt, fsdp=False),
    "fsdp, spoilt": functools.partial(spoilt, fsdp=True),
    "signalled": signalled,
    "agreed": agreed,
    "sharded head": sharded_head,
    "evaluated early": evaluated_early,
}
