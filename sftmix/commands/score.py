"""Train the reference model for an epoch, score it, and split the data (`sftmix score`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftmix.conventions import PARTITION
from sftmix.model.source import check_model
from sftmix.pairs.partition import Partition, from_scores, read_partition, summary, write_partition
from sftmix.recipe.arguments import RunArguments, parse
from sftmix.recipe.loading import load_data, load_model, load_tokenizer, refuse_misfits
from sftmix.recipe.lora import add_lora, check_lora, four_bit
from sftmix.recipe.manifest import kept_date, recipe, start_manifest
from sftmix.runs import interrupts
from sftmix.runs.checkpoints import remove_checkpoints
from sftmix.runs.out_of_memory import MODEL_WAYS, advising
from sftmix.runs.ranks import is_main, on_main, opened_run, refuse_differences, together
from sftmix.templates.chat import set_template_date
from sftmix.templates.rendering import today
from sftmix.training.config import ScoreConfig
from sftmix.training.parallelism import check_device, check_processes
from sftmix.training.reference import finished_scores, reference_trainer
from sftmix.training.scoring import scoring_steps
from sftmix.training.trainer import make_collator

ARGUMENTS = (RunArguments, ScoreConfig)


@advising(*MODEL_WAYS)
def main(words: Sequence[str]) -> None:
    """Run the command."""
    arguments, config = parse(words, RunArguments, ScoreConfig, "sftmix score")
    check_lora(arguments, config)
    check_processes(config)
    check_device(config)
    interrupts.advise("before training began: nothing is lost; start it again")
    with opened_run(arguments.output, resume=arguments.resume) as run:
        interrupts.advise("before training began: nothing is lost; go on with --resume")
        finished = on_main(lambda: (run / PARTITION).exists())
        partition = score(run, arguments, config)
        if is_main():
            print(summary(partition))
            print(
                f"{run / PARTITION} was finished already"
                if finished
                else f"wrote {run / PARTITION}"
            )
        interrupts.advise(f"when all was done: {run / PARTITION} is whole")
        interrupts.end_if_requested()


def score(run: Path, arguments: RunArguments, config: ScoreConfig) -> Partition:
    """Train the reference model, score, split, and write `confidence.parquet`.

    A run that has the file already is finished, and nothing is trained again. Its checkpoints are
    then deleted, unless a `save_strategy` asks for some.

    Raises:
        ValueError: bad data, fewer steps than scorings, a resumed run of another recipe, or a
            `confidence.parquet` that is damaged or not of this run.
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
        quiet = config.disable_tqdm
        dataset, found = load_data(arguments, tokenizer, disable_progress=quiet)
        # Before the model is loaded, which takes minutes for a large one.
        scoring_steps(config.num_steps(len(dataset)), config.num_scorings)
        numbers = recipe(arguments, config, dataset, tokenizer, reading=found)
    refuse_differences(numbers)
    if not on_main(lambda: (run / PARTITION).exists()):
        with together():
            model = load_model(
                arguments, arguments.attn_implementation, **four_bit(arguments, config.device)
            )
            model = add_lora(model, arguments, config.seed)
            collator = make_collator(tokenizer, config)
            trainer, scores = reference_trainer(model, dataset, collator, config, tokenizer)
        on_main(lambda: start_manifest(run, numbers))
        trainer.train(resume_from_checkpoint=arguments.resume or None)
        ids, hashes = dataset["id"][:], dataset["content_hash"][:]
        partition = from_scores(ids, hashes, *finished_scores(scores, config.num_scorings))
        on_main(lambda: write_partition(run / PARTITION, partition))
    else:
        on_main(lambda: start_manifest(run, numbers))
        partition = read_finished(run / PARTITION, dataset, config.num_scorings)
    if config.save_strategy == "no":
        on_main(lambda: remove_checkpoints(run))
    return partition


def read_finished(path: Path, dataset: Any, num_scorings: int) -> Partition:
    """Return the partition of a run that is finished already.

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
