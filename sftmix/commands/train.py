"""Train the target model, with SFTMix or a method it is compared with (`sftmix train`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase, TrainerState

from sftmix.conventions import CONFIGS, MANIFEST, MODEL_CARD, TRAINER_STATE
from sftmix.data.examples import data_hash
from sftmix.data.selection import naming_choices
from sftmix.data.weighting import (
    WEIGHT,
    ByConfidence,
    WeightColumn,
    described,
    parse_weight,
)
from sftmix.methods import method_of
from sftmix.model.source import check_model
from sftmix.pairs.partition import Partition, match, partition_hash, read_partition, subset_counts
from sftmix.pairs.pools import pools_of
from sftmix.recipe.arguments import TrainRunArguments, parse
from sftmix.recipe.loading import (
    load_data,
    load_held_out,
    load_model,
    load_tokenizer,
    refuse_misfits,
    warn_of_overlap,
)
from sftmix.recipe.lora import add_lora, check_lora, four_bit
from sftmix.recipe.manifest import (
    LENGTHENED,
    kept_date,
    lengthen,
    recipe,
    start_manifest,
    versions,
    warn_of_other_template,
)
from sftmix.recipe.model_card import model_card
from sftmix.runs import interrupts
from sftmix.runs.checkpoints import list_checkpoints, step_of
from sftmix.runs.failures import USER_ERRORS, Naming, RankError, RunFailure
from sftmix.runs.folders import atomic_write, read_manifest
from sftmix.runs.out_of_memory import MODEL_WAYS, advising
from sftmix.runs.ranks import array_hash, on_main, opened_run, refuse_differences, say, together
from sftmix.templates.chat import set_template_date
from sftmix.templates.rendering import today
from sftmix.training.config import SFTMixConfig
from sftmix.training.example_weights import training_weights
from sftmix.training.hub import Repository, model_files, repository
from sftmix.training.parallelism import check_device, check_processes
from sftmix.training.saving import save_final_model
from sftmix.training.trainer import SFTMixTrainer, make_collator

ARGUMENTS = (TrainRunArguments, SFTMixConfig)
NOT_PUSHED = "it could not be pushed to the hub"


class Saved:
    """Say in whatever fails inside that the model is saved, since what comes after can be redone.

    No error of a card, an evaluation or the hub is worth a trained model: each becomes one line
    that says where the model is.
    """

    def __init__(self, run: Path, lost: str) -> None:
        """Take in `lost` what is missing after a failure, as a clause."""
        self.run, self.lost = run, lost

    def __enter__(self) -> None:
        """Nothing has to be set up."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Raise the error again, with the words."""
        if isinstance(error, interrupts.Interrupted):
            text = f"after the last step: the model is in {self.run}; go on with --resume"
            raise interrupts.Interrupted(error.signum, text) from None
        if isinstance(error, Exception) and not isinstance(error, RankError):
            reason = str(error) if isinstance(error, USER_ERRORS) else repr(error)
            raise RunFailure(f"the model is in {self.run}; {self.lost}: {reason}") from error


@advising(*MODEL_WAYS)
def main(words: Sequence[str]) -> None:
    """Run the command."""
    arguments, config = parse(words, TrainRunArguments, SFTMixConfig, "sftmix train")
    interrupts.advise("before training began: nothing is lost; start it again")
    if method_of(config.method).mixed and arguments.partition is None:
        raise ValueError(
            f"partition: expected RUN/confidence.parquet of `sftmix score`, which --method "
            f"{config.method} needs, got none"
        )
    check_lora(arguments, config)
    check_processes(config)
    check_device(config)
    hub = repository(config)
    with opened_run(arguments.output, resume=arguments.resume) as run:
        interrupts.advise("before training began: nothing is lost; go on with --resume")
        hub = hub and on_main(hub.created)
        train(run, arguments, config, hub)


def train(
    run: Path,
    arguments: TrainRunArguments,
    config: SFTMixConfig,
    hub: Repository | None = None,
) -> SFTMixTrainer:
    """Train, save the model into the run folder, then evaluate if there is held-out data.

    Raises:
        ValueError: bad data, a partition of other data, or a resumed run of another recipe.
        FloatingPointError: a loss, a gradient or a weight is not finite.
        RunFailure: what comes after saving the model failed, or the disk is full.
        Interrupted: a signal asked for it; what was trained is in a checkpoint.
    """
    scored = Path(arguments.partition).parent if arguments.partition is not None else None
    date = on_main(lambda: kept_date(run, scored) or today())
    with together():
        check_model(
            arguments.model,
            arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        tokenizer = load_tokenizer(arguments)
        set_template_date(tokenizer, date)
        refuse_misfits(arguments, tokenizer)
        quiet = config.disable_tqdm
        # The short data are read first, which tells a wrong name in them at once.
        held_out, found = load_held_out(arguments, tokenizer, disable_progress=quiet)
        dataset, more = load_data(
            arguments, tokenizer, weight=weight_column(arguments), disable_progress=quiet
        )
        warn_of_overlap(dataset, held_out)
        confident, scores_hash, subsets = read_subsets(arguments, dataset, tokenizer)
        dataset, chosen = weighted(arguments, config.method, dataset, confident)
        # What makes no pair or no batch is refused before the model is loaded, which takes minutes.
        if confident is not None:
            pools_of(confident, config.pairing)
        config.num_batches(len(dataset))
        model = load_model(
            arguments, arguments.attn_implementation, **four_bit(arguments, config.device)
        )
        trainer = SFTMixTrainer(
            model=add_lora(model, arguments, config.seed),
            args=config,
            train_dataset=dataset,
            eval_dataset=held_out,
            data_collator=make_collator(tokenizer, config),
            confident=confident,
            processing_class=tokenizer,
        )
        hashes = {
            "partition": scores_hash,
            "eval_data_hash": None if held_out is None else data_hash(held_out["content_hash"][:]),
            **chosen,
        }
        found = {**more, **found}
        numbers = recipe(arguments, config, dataset, tokenizer, reading=found, **hashes)
    refuse_differences(numbers)
    files = {"partition": arguments.partition, "eval_data": arguments.eval_data}
    if arguments.eval_data:
        files["eval_split"] = arguments.eval_split
    if on_main(lambda: start_manifest(run, numbers, **files)):
        say(on_main(lambda: lengthen(run, numbers)))
    if arguments.resume and on_main(lambda: is_finished(run)):
        say(f"{run} is finished already: all steps are trained, and the model is saved")
        with Saved(run, NOT_PUSHED):
            push(run, model_files(run), hub)
        return trainer
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    if trainer.begun_at == trainer.state.global_step:
        say(f"all {trainer.begun_at} steps were trained already")
    finish(trainer, run, numbers, subsets, hub)
    return trainer


def read_subsets(
    arguments: TrainRunArguments, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Partition | None, str | None, dict[str, int] | None]:
    """Return the partition in the order of the data, its hash and its counts; None without one.

    Raises:
        ValueError: the partition is damaged, or of other data.
    """
    if arguments.partition is None:
        return None, None, None
    path = Path(arguments.partition)
    with Naming("partition"):
        partition = read_partition(path)
    warn_of_other_template(path, tokenizer)
    with naming_choices(path, select=arguments.select, weights=arguments.weights):
        matched = match(partition, dataset["id"][:], dataset["content_hash"][:])
    return matched, partition_hash(partition), subset_counts(partition)


def weight_column(arguments: TrainRunArguments) -> WeightColumn | None:
    """Return the column of the data that `--weight` names, or the default one; None for others."""
    chosen = parse_weight(arguments.weight)
    return chosen if isinstance(chosen, WeightColumn) else None


def weighted(
    arguments: TrainRunArguments,
    method: str,
    dataset: datasets.Dataset,
    partition: Partition | None,
) -> tuple[datasets.Dataset, dict[str, str | None]]:
    """Return the data set with the weights by confidence that are asked for, and what to record.

    Raises:
        ValueError: as `training_weights`.
    """
    chosen = parse_weight(arguments.weight)
    if isinstance(chosen, ByConfidence) and partition is not None:
        found = chosen.of(partition.confidence)
        say(f"weights by confidence: {described(found)}")
        dataset = dataset.add_column(WEIGHT, found)
    weights = training_weights(dataset, method)
    hashed = None if weights is None else array_hash(weights)
    return dataset, {"weight": arguments.weight, "weight_hash": hashed}


def is_finished(run: Path) -> bool:
    """Tell whether all is done: the card is written last, once the model and its log are there."""
    if not (run / MODEL_CARD).exists() or not any((run / name).exists() for name in CONFIGS):
        return False
    if not (run / TRAINER_STATE).exists():
        return False
    state = TrainerState.load_from_json(str(run / TRAINER_STATE))
    newest = next((step_of(path) for path in list_checkpoints(run)), 0)
    return bool(newest <= state.global_step >= state.max_steps)


def finish(
    trainer: SFTMixTrainer,
    run: Path,
    numbers: dict[str, Any],
    subsets: dict[str, int] | None,
    hub: Repository | None,
) -> None:
    """Save the model before anything else that could fail; then log, evaluation, card and hub."""
    names = save_model(trainer, run)
    say(f"wrote the model to {run}")
    with Saved(run, "its log could not be written"):
        trainer.save_state()
    if trainer.eval_dataset is not None:
        with Saved(run, "the evaluation failed"), resumable(trainer):
            interrupts.end_if_requested()
            trainer.evaluate()
            trainer.save_state()
    with Saved(run, "its card could not be written"):
        card = functools.partial(write_card, trainer, run, numbers, subsets)
        on_main(card)
    with Saved(run, NOT_PUSHED), resumable(trainer):
        push(run, names, hub)


def push(run: Path, names: list[str], hub: Repository | None) -> None:
    """Push the model's files and its card if a repository is named; a signal ends it at once."""
    # An upload may take long, and loses nothing if it ends early.
    interrupts.defer(until_asked=False)
    interrupts.end_if_requested()
    if hub is not None:
        say(f"pushed it to {on_main(lambda: hub.push(run, [*names, MODEL_CARD]))}")


@contextlib.contextmanager
def resumable(trainer: SFTMixTrainer) -> Iterator[None]:
    """If a signal ends what is inside, leave a checkpoint for the run that makes up for it."""
    try:
        yield
    except interrupts.Interrupted:
        # The best model's weights may be loaded by now, and then there are checkpoints.
        if not trainer.args.load_best_model_at_end:
            trainer.checkpoint()
        raise


def save_model(trainer: SFTMixTrainer, run: Path) -> list[str]:
    """Write the final model on the main process, gathered from all ranks if it is sharded.

    Returns:
        The names of its files.

    Raises:
        FloatingPointError: a weight is NaN or infinite.
        RunFailure: the disk is full.
    """
    trainer.refuse_weights("no final model was written, checkpoints stay")
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    tokenizer: Any = trainer.processing_class
    with trainer.saved_config():
        return on_main(lambda: save_final_model(model, tokenizer, run, state))


def write_card(
    trainer: SFTMixTrainer,
    run: Path,
    numbers: dict[str, Any],
    subsets: dict[str, int] | None,
) -> None:
    """Write the model card, all of it or nothing."""
    tokenizer = trainer.processing_class
    manifest = read_manifest(run / MANIFEST)
    lengths = {LENGTHENED: manifest[LENGTHENED]} if LENGTHENED in manifest else {}
    card = model_card(
        {**numbers, **lengths},
        versions(),
        trainer.state.log_history,
        seconds=trainer.window.seconds,
        subsets=subsets,
        adapter=hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"),
        tokenizer=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
    )
    atomic_write(run / MODEL_CARD, lambda path: path.write_text(card, encoding="utf-8"))
