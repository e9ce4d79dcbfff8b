"""`sftmix score`: one epoch of the reference model, C scorings, the partition at the median."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sftmix import interrupts
from sftmix.arguments import RunArguments, ScoreConfig, parse
from sftmix.checkpoints import remove_checkpoints
from sftmix.failures import RunFailure
from sftmix.loading import load_data, load_model, load_tokenizer, refuse_misfits
from sftmix.lora import add_lora, check_lora
from sftmix.manifest import kept_date, recipe, start_manifest
from sftmix.model_source import check_model
from sftmix.out_of_memory import MODEL_WAYS, advising
from sftmix.pairing import PairedCollator
from sftmix.partition import Partition, from_scores, read_partition, summary, write_partition
from sftmix.ranks import check_processes, is_main, on_main, opened_run, refuse_differences, together
from sftmix.rendering import today
from sftmix.scoring import ScoringCallback, score_examples, scoring_autocast, scoring_steps
from sftmix.templates import set_template_date
from sftmix.trainer import SFTMixMixin, SFTMixTrainer, make_collator
from sftmix_kernels import StreamingPerplexity

FILE = "confidence.parquet"


ARGUMENTS = (RunArguments, ScoreConfig)


@advising(*MODEL_WAYS)
def main(words: Sequence[str]) -> None:
    """Run the command."""
    arguments, config = parse(words, RunArguments, ScoreConfig, "sftmix score")
    check_lora(arguments)
    check_processes(config)
    interrupts.advise("before training began: nothing is lost; start it again")
    with opened_run(arguments.output, resume=arguments.resume) as run:
        interrupts.advise("before training began: nothing is lost; go on with --resume")
        finished = on_main(lambda: (run / FILE).exists())
        partition = score(run, arguments, config)
        if is_main():
            print(summary(partition))
            print(f"{run / FILE} was finished already" if finished else f"wrote {run / FILE}")
        interrupts.advise(f"when all was done: {run / FILE} is whole")
        interrupts.end_if_requested()


def score(run: Path, arguments: RunArguments, config: ScoreConfig) -> Partition:
    """Train the reference model, score, split, and write ``confidence.parquet``.

    A run that has it already is finished: nothing is trained again. The checkpoints are deleted
    then, unless a ``save_strategy`` asks for some.

    Raises:
        ValueError: bad data, fewer steps than scorings, a resumed run of another recipe, or a
            ``confidence.parquet`` that is damaged or not of this run.
        RunFailure: training ended before its last scoring.
        Interrupted: a signal asked for it; a checkpoint holds what was trained and scored.
    """
    date = on_main(lambda: kept_date(run) or today())
    with together():
        check_model(
            arguments.model,
            arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        tokenizer = load_tokenizer(arguments)
        refuse_misfits(arguments, tokenizer)
        set_template_date(tokenizer, date)
        dataset = load_data(arguments, tokenizer, disable_progress=config.disable_tqdm)
        numbers = recipe(arguments, config, dataset, tokenizer)
    refuse_differences(numbers)
    if not on_main(lambda: (run / FILE).exists()):
        with together():
            model = add_lora(
                load_model(arguments, arguments.attn_implementation), arguments, config.seed
            )
            collator = make_collator(tokenizer, config)
            trainer, scores = reference_trainer(model, dataset, collator, config, tokenizer)
        on_main(lambda: start_manifest(run, numbers))
        trainer.train(resume_from_checkpoint=arguments.resume or None)
        ids, hashes = dataset["id"][:], dataset["content_hash"][:]
        partition = from_scores(ids, hashes, *finished_scores(scores, config.num_scorings))
        on_main(lambda: write_partition(run / FILE, partition))
    else:
        on_main(lambda: start_manifest(run, numbers))
        partition = read_finished(run / FILE, dataset, config.num_scorings)
    if config.save_strategy == "no":
        on_main(lambda: remove_checkpoints(run))
    return partition


def finished_scores(
    scores: StreamingPerplexity, num_scorings: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The numbers of tokens (S,) and the sums of losses (S, C) of a training that is done.

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


def read_finished(path: Path, dataset: Any, num_scorings: int) -> Partition:
    """The partition of a run that is finished already.

    Raises:
        ValueError: it is damaged, or of other data or another number of scorings.
    """
    try:
        partition = read_partition(path)
    except ValueError as error:
        raise ValueError(f"resume: {error}; delete the file to score again") from error
    found = (len(partition.id), partition.nll_sum.shape[1])
    if found != (len(dataset), num_scorings):
        raise ValueError(
            f"resume: expected {len(dataset)} examples and {num_scorings} scorings in {path}, got "
            f"{found[0]} and {found[1]}; delete the file to score again"
        )
    return partition


def reference_trainer(
    model: Any,
    dataset: Any,
    collator: PairedCollator,
    config: ScoreConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[SFTMixTrainer, StreamingPerplexity]:
    """A trainer that scores its own data on the way, and where the scores add up.

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
    """Have an unpaired trainer of one epoch score its own data; returns where the scores add up.

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
