"""Run the study: a base model and a scored partition for each (data, seed), then every system."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import cpu_name, git_commit
from sftmix.pairs.partition import Partition, from_scores, split
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_model, load_tokenizer
from sftmix.recipe.manifest import versions
from sftmix.runs.folders import write_json
from sftmix.toy import build_toy_model
from sftmix.training.config import ScoreConfig, SFTMixConfig
from sftmix.training.reference import reference_trainer
from sftmix.training.trainer import SFTMixTrainer, make_collator

from .measures import on_held_out, on_training_data
from .parts import Parts, Source, as_tokens, draw, write_messages
from .settings import BASELINE, SEARCH_SEED, SYSTEMS, Sizes, System


def config_options(folder: Path, seed: int, batch_size: int, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a config for one quiet run on the CPU."""
    return {
        "output_dir": str(folder / "trainer"),
        "seed": seed,
        "per_device_train_batch_size": batch_size,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **changes,
    }


@dataclass(frozen=True)
class Case:
    """A base model in ``folder`` and the data beside it, of one seed."""

    folder: Path
    seed: int
    sizes: Sizes
    tokenizer: Any
    train: datasets.Dataset
    held_out: datasets.Dataset

    def load(self) -> Any:
        """Return a copy of the base model."""
        return load_model(RunArguments(str(self.folder / "base"), [], ""))

    def options(self, **changes: Any) -> dict[str, Any]:
        """Return a config's arguments: the paper's, except for the sizes and ``changes``."""
        return config_options(self.folder, self.seed, self.sizes.batch_size, **changes)

    def trainer(
        self, dataset: datasets.Dataset, confident: Partition | None = None, **options: Any
    ) -> SFTMixTrainer:
        """Return a quiet trainer of a copy of the base model."""
        trainer = SFTMixTrainer(
            model=self.load(),
            args=SFTMixConfig(**self.options(**options)),
            train_dataset=dataset,
            data_collator=make_collator(self.tokenizer),
            confident=confident,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def prepare(parts: Parts, seed: int, sizes: Sizes, folder: Path) -> Case:
    """Build a tokenizer and a model from the base part, train it there, tokenise the others."""
    write_messages(folder / "base.jsonl", parts.base)
    build_toy_model(
        folder / "base",
        [folder / "base.jsonl"],
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        max_length=sizes.max_length,
        seed=seed,
    )
    tokenizer = load_tokenizer(RunArguments(str(folder / "base"), [], ""))
    base, train, held_out = (
        as_tokens(examples, tokenizer, number, sizes)
        for examples, number in (
            (parts.base, sizes.base_examples),
            (parts.train, sizes.train_examples),
            (parts.held_out, sizes.held_out_examples),
        )
    )
    case = Case(folder, seed, sizes, tokenizer, train, held_out)
    options = {"learning_rate": sizes.base_learning_rate, "max_steps": sizes.base_steps}
    trainer = case.trainer(base, method="ntp", **options)
    trainer.train()
    trainer.head.detach()
    trainer.model.save_pretrained(folder / "base")
    return case


def score(case: Case, learning_rate: float) -> Partition:
    """Return the training examples' confidence over an epoch of the reference model."""
    config = ScoreConfig(
        **case.options(
            learning_rate=learning_rate,
            num_scorings=case.sizes.num_scorings,
            checkpoint_scorings=False,
        )
    )
    trainer, scores = reference_trainer(
        case.load(), case.train, make_collator(case.tokenizer), config
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return from_scores(
        case.train["id"][:],
        case.train["content_hash"][:],
        scores.num_tokens.numpy(),
        scores.nll_sum.numpy(),
    )


def measure(case: Case, trainer: SFTMixTrainer) -> dict[str, float]:
    """Return all measures of the trainer's model."""
    model, head, collator = trainer.model, trainer.head, trainer.data_collator.padded()
    return {
        **on_held_out(model, head, case.held_out, collator),
        **on_training_data(model, head, case.train, collator),
    }


def tuned(
    case: Case, system: System, learning_rate: float, confident: Partition | None = None
) -> SFTMixTrainer:
    """Return the trainer of a copy of the base model that was tuned."""
    options = {"learning_rate": learning_rate, "num_train_epochs": case.sizes.epochs}
    trainer = case.trainer(case.train, confident, **options, **system.options)
    trainer.train()
    return trainer


def study(
    source: Source, seeds: Sequence[int], systems: Sequence[str], sizes: Sizes, out: Path
) -> None:
    """Run what ``out`` does not have yet; each seed's file is written anew after every system.

    Raises:
        ValueError: a seed is the search's, or a file was made with other sizes or learning rates.
    """
    if SEARCH_SEED in seeds:
        raise ValueError(f"--seeds: {SEARCH_SEED} is the one that the learning rate is chosen on")
    torch.set_num_threads(1)
    disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    learning_rate = choose_learning_rate(source, sizes, out)
    for seed in seeds:
        run_seed(source, seed, systems, sizes, learning_rate, out)


def choose_learning_rate(source: Source, sizes: Sizes, out: Path) -> float:
    """Return the rate with NTP's lowest held-out loss on `SEARCH_SEED`, from ``out`` if known."""
    path = out / f"{source.name}-search.json"
    record = start(path, source, SEARCH_SEED, sizes)
    if "losses" not in record:
        losses = record["losses"] = {}
        with tempfile.TemporaryDirectory() as folder:
            parts = draw(source, SEARCH_SEED, sizes, search=True)
            case = prepare(parts, SEARCH_SEED, sizes, Path(folder))
            for rate in sizes.learning_rates:
                # Of batches without pairs.
                evaluated = tuned(case, SYSTEMS[BASELINE], rate).evaluate(case.held_out)
                loss = losses[f"{rate:g}"] = evaluated["eval_loss"]
                print(f"{source.name}: learning rate {rate:g}, loss {loss:.4f}", flush=True)
        write_json(path, record)
    return float(min(record["losses"], key=record["losses"].__getitem__))


def run_seed(
    source: Source,
    seed: int,
    systems: Sequence[str],
    sizes: Sizes,
    learning_rate: float,
    out: Path,
) -> None:
    """Run the systems of one seed that its file does not have."""
    path = out / f"{source.name}-{seed}.json"
    record = start(path, source, seed, sizes, learning_rate=learning_rate)
    record.setdefault("systems", {})
    missing = [name for name in systems if name not in record["systems"]]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        case = prepare(draw(source, seed, sizes), seed, sizes, Path(folder))
        if "base" not in record:
            record["base"] = measure(case, case.trainer(case.train, method="ntp"))
        partition = score(case, learning_rate)
        for name in missing:
            system = SYSTEMS[name]
            confident = split(partition, system.by, case.seed)
            found = measure(case, tuned(case, system, learning_rate, confident))
            record["systems"][name] = found
            write_json(path, record)
            loss = found["held_out_loss"]
            print(f"{source.name}, seed {seed}: {name}, loss {loss:.4f}", flush=True)


def facts() -> dict[str, str]:
    """Return where numbers come from: commit, processor, versions and threads."""
    found = {"commit": git_commit(), "cpu": cpu_name(), **versions()}
    return {**found, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def start(path: Path, source: Source, seed: int, sizes: Sizes, **more: Any) -> dict[str, Any]:
    """Return what the file has, or a new record of where its numbers come from.

    Raises:
        ValueError: the file is of other sizes, another learning rate or other data.
    """
    identity = {
        "data": source.name,
        "seed": seed,
        "examples": {"pool": len(source.pool), "held_out": len(source.held_out)},
        "sizes": json.loads(json.dumps(asdict(sizes))),
        **more,
    }
    if not path.exists():
        return {**identity, "facts": facts()}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, value in identity.items():
        if record.get(name) != value:
            raise ValueError(
                f"{path}: was made with {name} = {record.get(name)!r}, now it is {value!r}; "
                "give another folder as --out"
            )
    return record
