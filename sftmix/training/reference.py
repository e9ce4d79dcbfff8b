"""Training of the reference model, which scores its own data on the way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.partition import Partition, from_scores
from sftmix.runs.failures import RunFailure
from sftmix.training.config import ScoreConfig
from sftmix.training.partitions import Examples, identities
from sftmix.training.reporters import own_runs, reporters_apart
from sftmix.training.scoring import ScoringCallback, score_examples, scoring_autocast, scoring_steps
from sftmix.training.trainer import SFTMixMixin, SFTMixTrainer
from sftmix_kernels import StreamingPerplexity


def score(
    model: nn.Module, args: ScoreConfig, *, train_dataset: Examples, **kwargs: Any
) -> Partition:
    """Train a reference model for one epoch of next-token prediction, scoring the data meanwhile.

    It takes what `SFTMixTrainer` takes, and returns what that takes as ``confident``:

        confident = score(model, ScoreConfig("runs/score"), train_dataset=data)
        SFTMixTrainer(model, SFTMixConfig("runs/sftmix"), train_dataset=data, confident=confident)

    What is trained is a copy of the model. `sftmix.write_partition` keeps the partition. Reporters
    get a run of the reference model's own, as `reporters.py` says.

    Args:
        model: the reference model, the target's own base model or another one.
        args: the options of training, with ``num_scorings`` (C) scorings of every example.
        train_dataset: the S examples to score, as the trainer will get them.
        kwargs: ``processing_class``, ``data_collator``, ... of the trainer.

    Returns:
        The partition at the median of ``-(1/C) sum_c perplexity_c`` (arXiv 2410.05248).

    Raises:
        TypeError: ``args`` is no `ScoreConfig`.
        ValueError: fewer steps than scorings, ``optimizers``, an id that is there twice, or an
            argument that `SFTMixTrainer` refuses.
        RunFailure: training ended before its last scoring.
    """
    if not isinstance(args, ScoreConfig):
        raise TypeError(
            f"args: expected ScoreConfig, got {type(args).__name__}; it has the options of "
            "SFTMixConfig, and trains one epoch of next-token prediction"
        )
    refuse_optimizers(kwargs)
    args = copy.copy(args)
    args.checkpoint_scorings = False  # nothing here would go on from one
    args.report_to = reporters_apart(list(args.report_to or ()))
    trainer = SFTMixTrainer(copy.deepcopy(model), args, train_dataset=train_dataset, **kwargs)
    scores = score_while_training(trainer, args.num_scorings)
    ids, hashes = identities(train_dataset)  # refuses what it cannot know before it is trained on
    with own_runs(trainer):
        trainer.train()
    return from_scores(ids, hashes, *finished_scores(scores, args.num_scorings))


def refuse_optimizers(arguments: Mapping[str, Any]) -> None:
    """Refuse a trainer's ``optimizers`` where the model that is trained is another one.

    Raises:
        ValueError: there are some.
    """
    if any(one is not None for one in arguments.get("optimizers") or ()):
        raise ValueError(
            "optimizers: expected none, since score trains a model of its own, whose weights they "
            "do not have; leave them out, or give optim and learning_rate in args"
        )


def reference_trainer(
    model: Any,
    dataset: Any,
    collator: PairedCollator,
    config: ScoreConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[SFTMixTrainer, StreamingPerplexity]:
    """Return a trainer that scores its own data on the way, and where the scores add up.

    Checkpoints hold the ``tokenizer``, too.

    Raises:
        ValueError: fewer steps than scorings, or an argument that `SFTMixTrainer` refuses.
    """
    trainer = SFTMixTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
    )
    return trainer, score_while_training(
        trainer, config.num_scorings, checkpointed=config.checkpoint_scorings
    )


def score_while_training(
    trainer: SFTMixMixin, num_scorings: int, *, checkpointed: bool = False
) -> StreamingPerplexity:
    """Let an unpaired trainer of one epoch score its own data; return where the scores add up.

    Raises:
        ValueError: fewer steps than scorings.
    """
    config = trainer.args
    batches = len(trainer.get_train_dataloader())
    scoring = ScoringCallback(
        StreamingPerplexity(len(trainer.examples), config.device),
        scoring_steps(-(-batches // config.gradient_accumulation_steps), num_scorings),
        functools.partial(
            score_examples,
            trainer.model,
            trainer.head,
            trainer.examples,
            collator=trainer.data_collator.padded(),
            context=scoring_autocast(trainer.head, trainer.accelerator),
            disable_progress=config.disable_tqdm,
            shared=True,
        ),
        checkpointed=checkpointed,
    )
    trainer.add_callback(scoring)
    trainer.checkpoint_extras.append(scoring)
    return scoring.perplexity


def finished_scores(
    scores: StreamingPerplexity, num_scorings: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the numbers of tokens (S,) and sums of losses (S, C) of a finished training.

    Raises:
        RunFailure: there are fewer scorings than were asked for.
    """
    finished = scores.nll_sum.shape[1]
    if finished != num_scorings:
        raise RunFailure(
            f"num_scorings: expected {num_scorings} finished scorings, got {finished}; training "
            "ended early, and no partition is made of fewer"
        )
    return scores.num_tokens.cpu().numpy(), scores.nll_sum.cpu().numpy()
