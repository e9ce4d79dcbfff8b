"""Make the runs of the study, one after the other, each into a file of its own."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from benchmarks.study.fetch import file_hash
from benchmarks.study.measures import on_held_out, on_training_data
from benchmarks.study.parts import write_messages
from benchmarks.study.runs import config_options, facts
from benchmarks.study.settings import SYSTEMS
from sftmix.data.examples import Example
from sftmix.model.head import HeadAdapter
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.partition import (
    Partition,
    from_scores,
    partition_hash,
    read_partition,
    split,
    write_partition,
)
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_model, load_tokenizer
from sftmix.recipe.lora import add_lora
from sftmix.runs.folders import write_json
from sftmix.templates.tokenizing import tokenize_examples
from sftmix.toy import build_toy_model
from sftmix.training.config import ScoreConfig, SFTMixConfig
from sftmix.training.reference import reference_trainer
from sftmix.training.scoring import batches_by_length
from sftmix.training.trainer import SFTMixTrainer

from .answers import answers_of, of_responses
from .data import FILES, Prepared, as_rows, read_material, read_prepared, write_prepared
from .frozen import PAD, activations, put_back, upper_part
from .plan import MU, OTHER, PREPARE, RATE, REFERENCE, Plan, Run
from .settings import ANOTHER_MU, BASE, BY_OTHER, NOISE, NOISE_ALPHA, REGIMES, RESULTS

COLLATOR = PairedCollator(PAD)
# Of a batch of an evaluation: 1,024 x V logits are held at most, 200 MB of V = 49,152.
BATCHES: Any = {"max_tokens": 1024, "padding": 0.12}
WAIT_SECONDS = 20.0  # for a run that others need and another process makes


@dataclass(frozen=True)
class Study:
    """A plan, and what its runs are made of."""

    plan: Plan
    model: str
    data_folder: Path | None
    lora_rank: int | None = None
    other: Study | None = None  # finished, of the model whose halves `BY_OTHER` uses
    max_new_tokens: int | None = None  # None: no answers are written

    def identity(self, run: Run) -> str:
        """Return what a prepared file belongs to: the model, the seed's data and the sizes."""
        files = [] if self.data_folder is None else FILES.get(run.data, ())
        sizes = self.plan.sizes
        shape = {name: getattr(sizes, name) for name in ("trained_layers", "train_examples")}
        shape |= {name: getattr(sizes, name) for name in ("held_out_examples", "kept_examples")}
        shape |= {"questions": sizes.questions, "max_length": sizes.max_length[run.data]}
        shape |= {"files": [file_hash(Path(self.data_folder or "") / name)[:16] for name in files]}
        return json.dumps(
            {"model": weights_hash(self.model), "data": run.data, "seed": run.seed, **shape}
        )

    def prepared(self, run: Run) -> Prepared:
        """Return the data of a run's seed."""
        path = self.plan.kept(Run(run.data, run.seed, PREPARE))
        assert path is not None
        return read_prepared(path, self.identity(run))

    def partition(self, run: Run, by: str = REFERENCE) -> Partition:
        """Return the scored partition of a run's seed.

        Raises:
            ValueError: it is not the one that the scoring's result belongs to.
        """
        scoring = Run(run.data, run.seed, by)
        path = self.plan.kept(scoring)
        assert path is not None
        partition = read_partition(path)
        # Results from before it was recorded have none.
        expected = self.plan.record(scoring).get("partition")
        if expected not in (None, partition_hash(partition)):
            raise ValueError(
                f"--cache: {path} is not what {self.plan.file(scoring)} was made with; give "
                "another folder"
            )
        return partition

    def upper(self, read: Tensor, seed: int | None = None) -> Any:
        """Return a copy of the upper part of the model, and with a seed what is trained of it."""
        arguments = RunArguments(self.model, [], "", lora_rank=self.lora_rank)
        upper = upper_part(load_model(arguments), self.plan.sizes.trained_layers, read)
        return upper if seed is None else add_lora(upper, arguments, seed)

    def held_out(self, run: Run) -> list[Example]:
        """Return the held-out examples of a run's seed."""
        chosen = self.prepared(run).parts["held_out"]["id"][:]
        source = read_material(run.data, self.data_folder).source
        known = {example.id: example for example in source.held_out}
        return [known[number] for number in chosen]

    def answers(self, run: Run, upper: Any) -> dict[str, float]:
        """Return what is measured of a finished model's answers to held-out examples."""
        if self.max_new_tokens is None:
            return {}
        arguments = RunArguments(self.model, [], "")
        whole = load_model(arguments)
        put_back(whole, upper)
        return answers_of(whole, load_tokenizer(arguments), self.held_out(run), self.max_new_tokens)

    def learning_rate(self, data: str) -> float:
        """Return the rate with which NTP reached the lowest loss, at whichever evaluation."""
        return self._chosen(data, RATE, "held_out_loss_min")

    def another_mu(self, data: str) -> float:
        """Return the mu with which SFTMix ended at the lowest loss."""
        return self._chosen(data, MU, "held_out_loss")

    def _chosen(self, data: str, kind: str, measure: str) -> float:
        runs = self.plan.searched(data, kind)
        return min(runs, key=lambda run: self.plan.record(run)["measures"][measure]).number


@functools.cache
def weights_hash(model: str, option: str = "--model") -> str:
    """Return the first 16 digits of the SHA-256 of a model's weights.

    Raises:
        ValueError: the folder has none.
    """
    file = Path(model) / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{option}: no file {file}; `fetch` makes such a folder")
    return file_hash(file)[:16]


@functools.cache
def code() -> dict[str, str]:
    """Return what a process runs, as it was when it began: the checkout may change meanwhile."""
    return facts()


def finished(study: str, model: str, data_folder: Path | None) -> Study:
    """Return a study of which the results are committed.

    Raises:
        ValueError: the folder has no weights, or not those that the results were made with.
    """
    regime = REGIMES[study]
    plan = Plan(regime.data, regime.seeds, regime.sizes, RESULTS / study)
    expected = plan.record(plan.runs()[0])["identity"]["model"]
    if (found := weights_hash(model, "--other-model")) != expected:
        raise ValueError(
            f"--other-model: expected the weights that the results of --study {study} were made "
            f"with (SHA-256 {expected}...), got {found}... in {model}; `fetch {study}` makes them"
        )
    return Study(plan, model, data_folder)


def make_next(study: Study) -> Run | None:
    """Make the next run that nobody makes, and return it; None if there is none to make now."""
    for run in study.plan.ready():
        with study.plan.claimed(run) as free:
            if free:
                make(study, run)
                return run
    return None


def make_all(study: Study) -> None:
    """Make runs until none is left; wait for those that another process has to make first."""
    while any(map(study.plan.wanted, study.plan.runs())):
        if make_next(study) is None:
            time.sleep(WAIT_SECONDS)


def make(study: Study, run: Run) -> None:
    """Make a run and write its file."""
    for other in study.plan.needs(run)[:1]:
        check_alike(study, other)
    made_by = code()
    start, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = MAKERS.get(run.kind, make_system)(study, run, Path(folder))
    record = {
        "data": run.data,
        "seed": run.seed,
        "what": run.what,
        "sizes": json.loads(json.dumps(asdict(study.plan.sizes))),
        "facts": made_by,
        "model": weights_hash(study.model),
        "lora_rank": study.lora_rank,
        "max_new_tokens": study.max_new_tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        **found,
    }
    write_json(study.plan.file(run), record)
    loss = found.get("measures", {}).get("held_out_loss")
    said = "" if loss is None else f", held-out loss {loss:.4f}"
    print(f"{run.name}: {record['seconds']:.0f} s{said}", flush=True)


def check_alike(study: Study, run: Run) -> None:
    """Refuse to go on with results of another study.

    Raises:
        ValueError: the result of a run was made with other sizes than those of the plan, with
            another rank of LoRA, or with other answers.
    """
    record = study.plan.record(run)
    for name, value in (
        ("sizes", asdict(study.plan.sizes)),
        ("lora_rank", study.lora_rank),
        ("max_new_tokens", study.max_new_tokens),
    ):
        expected = json.loads(json.dumps(value))
        if (found := record.get(name)) != expected:
            raise ValueError(
                f"--out: {study.plan.file(run)} was made with {name} = {found}, now it is "
                f"{expected}; give another folder"
            )


def make_prepared(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Draw a seed's data, and compute what the lower layers give for it."""
    path = study.plan.kept(run)
    assert path is not None
    arguments = RunArguments(study.model, [], "")
    model, tokenizer = load_model(arguments), load_tokenizer(arguments)
    material = read_material(run.data, study.data_folder)
    source = material.source
    tokens = write_prepared(
        path, model, tokenizer, material, run.seed, study.plan.sizes, study.identity(run)
    )
    examples = {"pool": len(source.pool), "held_out": len(source.held_out)}
    return {"tokens": tokens, "examples": examples, "identity": json.loads(study.identity(run))}


def make_reference(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Score the training examples over one epoch of NTP, and write the partition."""
    prepared = study.prepared(run)
    upper = study.upper(prepared.read, run.seed)
    rate = study.learning_rate(run.data)
    return scored(study, run, folder, upper, prepared.parts["train"], rate)


def make_other(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Have the other model score the same examples, with the rate that was best for it."""
    other = study.other
    assert other is not None
    chosen = study.prepared(run).parts["train"]
    arguments = RunArguments(other.model, [], "")
    pool = read_material(run.data, study.data_folder).source.pool
    known = {example.id: example for example in pool}
    tokens = tokenize_examples(
        [known[number] for number in chosen["id"]],
        load_tokenizer(arguments),
        disable_progress=True,
    )
    read = activations(
        load_model(arguments), other.plan.sizes.trained_layers, tokens["input_ids"][:]
    )
    train = as_rows(tokens.remove_columns("content_hash")).add_column(
        "content_hash", chosen["content_hash"][:]
    )
    rate = other.learning_rate(run.data)
    found = scored(study, run, folder, other.upper(read), train, rate)
    return {**found, "other_model": weights_hash(other.model)}


def scored(
    study: Study, run: Run, folder: Path, upper: Any, train: datasets.Dataset, rate: float
) -> dict[str, Any]:
    """Train an upper part by NTP for one epoch, and write the partition that it gives."""
    path, sizes = study.plan.kept(run), study.plan.sizes
    assert path is not None
    options = {"num_scorings": sizes.num_scorings, "checkpoint_scorings": False}
    config = ScoreConfig(
        **config_options(folder, run.seed, sizes.batch_size, learning_rate=rate, **options)
    )
    trainer, scores = reference_trainer(upper, train, COLLATOR, config)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    tokens, nll_sum = scores.num_tokens.numpy(), scores.nll_sum.numpy()
    partition = from_scores(train["id"][:], train["content_hash"][:], tokens, nll_sum)
    write_partition(path, partition)
    return {
        "learning_rate": rate,
        "median_confidence": float(_median(partition)),
        "partition": partition_hash(partition),
    }


def _median(partition: Partition) -> float:
    return float(torch.tensor(partition.confidence).quantile(0.5))


def make_base(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Measure the model before it is tuned."""
    prepared = study.prepared(run)
    model = study.upper(prepared.read)
    head = HeadAdapter(model)
    held_out = on_held_out(model, head, prepared.parts["held_out"], COLLATOR, **BATCHES)
    measures = {**held_out, **at_the_end(model, head, prepared), **study.answers(run, model)}
    if study.max_new_tokens is None:
        return {"measures": measures}
    tokenizer = load_tokenizer(RunArguments(study.model, [], ""))
    return {"measures": measures, "responses": of_responses(tokenizer, study.held_out(run))}


def make_rate(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Train by NTP with one of the learning rates."""
    return trained(study, run, folder, run.number, None, {"method": "ntp"})


def make_mu(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Train by SFTMix with one of the mus."""
    rate = study.learning_rate(run.data)
    return trained(study, run, folder, rate, study.partition(run), {"mu": run.number})


def make_system(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Train one of the systems."""
    system, options = SYSTEMS[run.what], dict(SYSTEMS[run.what].options)
    if run.what == ANOTHER_MU:
        options["mu"] = study.another_mu(run.data)
    by = OTHER if run.what == BY_OTHER else REFERENCE
    confident = split(study.partition(run, by), system.by, run.seed)
    found = trained(study, run, folder, study.learning_rate(run.data), confident, options)
    if run.what == BY_OTHER:
        same = confident.subset == split(study.partition(run), system.by).subset
        found["same_half"] = float(same.mean())
    return found


def trained(
    study: Study,
    run: Run,
    folder: Path,
    learning_rate: float,
    confident: Partition | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Train the upper part, and return its losses by epoch and its measures at the end."""
    sizes, prepared = study.plan.sizes, study.prepared(run)
    model, held_out = study.upper(prepared.read, run.seed), prepared.parts["held_out"]
    if run.what == NOISE:
        options["neftune_noise_alpha"] = NOISE_ALPHA * prepared.scale
    common = {"learning_rate": learning_rate, "num_train_epochs": sizes.epochs}
    trainer = SFTMixTrainer(
        model=model,
        args=SFTMixConfig(
            **config_options(folder, run.seed, sizes.batch_size, **common, **options)
        ),
        train_dataset=prepared.parts["train"],
        data_collator=COLLATOR,
        confident=confident,
    )
    trainer.remove_callback(PrinterCallback)
    curve = Curve(
        sizes.evaluations * sizes.epochs,
        lambda: on_held_out(model, trainer.head, held_out, COLLATOR, **BATCHES),
    )
    trainer.add_callback(curve)
    trainer.train()
    lowest = min(curve.points, key=lambda point: point["held_out_loss"])
    measures = {name: value for name, value in curve.points[-1].items() if name != "epoch"}
    measures |= {"held_out_loss_min": lowest["held_out_loss"], "epoch_of_lowest": lowest["epoch"]}
    if run.kind not in (RATE, MU):
        measures |= at_the_end(model, trainer.head, prepared) | study.answers(run, model)
    return {**common, "options": options, "curve": curve.points, "measures": measures}


class Curve(TrainerCallback):
    """Measures at so many evenly spaced steps of a training, the last at its end."""

    def __init__(self, number: int, measure: Callable[[], dict[str, float]]) -> None:
        self.number, self.measure = number, measure
        self.points: list[dict[str, float]] = []

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if it is time to."""
        due = round(state.max_steps * (len(self.points) + 1) / self.number)
        if state.global_step == due:
            epoch = state.num_train_epochs * (len(self.points) + 1) / self.number
            self.points.append({"epoch": round(epoch, 3), **self.measure()})


def at_the_end(model: Any, head: HeadAdapter, prepared: Prepared) -> dict[str, float]:
    """Return what is measured of a finished model only."""
    found = on_training_data(model, head, prepared.parts["train"], COLLATOR)
    if "kept" in prepared.parts:
        kept = on_held_out(model, head, prepared.parts["kept"], COLLATOR, **BATCHES)
        found["kept_loss"] = kept["held_out_loss"]
    if prepared.questions:
        found["question_accuracy"] = accuracy(model, prepared)
    return found


@torch.no_grad()
def accuracy(model: Any, prepared: Prepared) -> float:
    """Return the share of questions whose right choice is the likeliest after the prompt."""
    model.eval()
    lengths, right = [len(prompt) for prompt in prepared.questions], 0
    for batch in batches_by_length(lengths, 2 * BATCHES["max_tokens"], padding=1.0):
        longest = lengths[batch[0]]
        rows = torch.full((len(batch), longest), PAD)
        for place, number in enumerate(batch):
            rows[place, : lengths[number]] = torch.tensor(prepared.questions[number])
        last = torch.tensor([place * longest + lengths[n] - 1 for place, n in enumerate(batch)])
        logits = model(
            input_ids=rows, use_cache=False, rows=last, head_input=lambda hidden: hidden
        ).value
        chosen = logits[:, prepared.choices].argmax(-1)
        right += int((chosen == prepared.right[torch.tensor(batch)]).sum())
    return right / len(lengths)


def toy_model(folder: Path) -> str:
    """Return the folder of a random model of the bundled data, made if it is not there."""
    if not (folder / "config.json").exists():
        examples = read_material("demo", None).source.pool
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "messages.jsonl"
            write_messages(file, examples)
            sizes = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2}
            build_toy_model(folder, [file], **sizes, max_length=96)
    return str(folder)


MAKERS: dict[str, Callable[[Study, Run, Path], dict[str, Any]]] = {
    PREPARE: make_prepared,
    REFERENCE: make_reference,
    OTHER: make_other,
    BASE: make_base,
    RATE: make_rate,
    MU: make_mu,
}
