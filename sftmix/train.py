"""`sftmix train`: the target model, with SFTMix or a method it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftmix.arguments import TrainRunArguments, parse
from sftmix.config import MIXED, SFTMixConfig
from sftmix.loading import (
    load_data,
    load_held_out,
    load_model,
    load_tokenizer,
    save_final_model,
)
from sftmix.lora import add_lora
from sftmix.manifest import kept_date, recipe, start_manifest, versions
from sftmix.model_card import model_card
from sftmix.partition import match, partition_hash, read_partition, subset_counts
from sftmix.ranks import is_main, on_main, opened_run, refuse_differences, together
from sftmix.rendering import today
from sftmix.selection import naming_selections
from sftmix.templates import set_template_date
from sftmix.trainer import SFTMixTrainer, make_collator


def main(words: Sequence[str]) -> None:
    """Run the command."""
    arguments, config = parse(words, TrainRunArguments, SFTMixConfig, "sftmix train")
    if config.method in MIXED and arguments.partition is None:
        raise ValueError(
            f"partition: --method {config.method} needs --partition RUN/confidence.parquet"
        )
    with opened_run(arguments.output, resume=arguments.resume) as run:
        train(run, arguments, config)
        if is_main():
            print(f"wrote the model to {run}")


def train(run: Path, arguments: TrainRunArguments, config: SFTMixConfig) -> SFTMixTrainer:
    """Train, evaluate where there is held-out data, and save the model into the run folder.

    Raises:
        ValueError: bad data, a partition of other data, or a resumed run of another recipe.
        FloatingPointError: the loss is not finite.
    """
    scored = [Path(arguments.partition).parent] if arguments.partition is not None else []
    date = on_main(lambda: kept_date(run, *scored) or today())
    with together():
        tokenizer = load_tokenizer(arguments)
        set_template_date(tokenizer, date)
        quiet = config.disable_tqdm
        dataset = load_data(arguments, tokenizer, disable_progress=quiet)
        held_out = load_held_out(arguments, tokenizer, disable_progress=quiet)
        confident, scores_hash, subsets = None, None, None
        if arguments.partition is not None:
            partition = read_partition(Path(arguments.partition))
            with naming_selections(Path(arguments.partition), arguments.select):
                confident = match(partition, dataset["id"][:], dataset["content_hash"][:])
            scores_hash, subsets = partition_hash(partition), subset_counts(partition)
        trainer = SFTMixTrainer(
            model=add_lora(
                load_model(arguments, arguments.attn_implementation), arguments, config.seed
            ),
            args=config,
            train_dataset=dataset,
            eval_dataset=held_out,
            data_collator=make_collator(tokenizer, config),
            confident=confident,
        )
        numbers = recipe(arguments, config, dataset, tokenizer, partition=scores_hash)
    refuse_differences(numbers)
    files = {"partition": arguments.partition, "eval_data": arguments.eval_data}
    if arguments.eval_data:
        files["eval_split"] = arguments.eval_split
    on_main(lambda: start_manifest(run, numbers, **files))
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    if held_out is not None:
        trainer.evaluate()
    trainer.save_state()
    save(trainer, tokenizer, run, numbers, subsets)
    return trainer


def save(
    trainer: SFTMixTrainer,
    tokenizer: PreTrainedTokenizerBase,
    run: Path,
    numbers: dict[str, Any],
    subsets: dict[str, int] | None,
) -> None:
    """The main process writes the final model, gathered from all ranks where it is sharded."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    card = model_card(
        numbers,
        versions(),
        trainer.state.log_history,
        seconds=trainer.window.seconds,
        subsets=subsets,
        adapter=hasattr(model, "peft_config"),
    )
    on_main(lambda: save_final_model(model, tokenizer, run, card, state))
