"""Training of the reference model, which scores its own data on the way."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sftmix.pairs.collator import PairedCollator
from sftmix.runs.failures import RunFailure
from sftmix.training.config import ScoreConfig
from sftmix.training.scoring import ScoringCallback, score_examples, scoring_autocast, scoring_steps
from sftmix.training.trainer import SFTMixMixin, SFTMixTrainer
from sftmix_kernels import StreamingPerplexity


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
