"""Score the same training examples before and after training, and keep the scores with the run.

RUN/report/before.parquet and after.parquet hold the scores. The .safetensors files beside them hold
the representations (`representations.py`) and what all of it was made from: if that has changed, it
is made again. Legend: S sampled examples, D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from sftmix.conventions import ADAPTER_CONFIG
from sftmix.data.columns import parse_columns
from sftmix.data.examples import Examples, data_hash, load_examples
from sftmix.data.mixture import with_copies
from sftmix.model.head import HeadAdapter
from sftmix.pairs.partition import Partition, from_scores, read_partition, write_partition
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.loading import load_model, load_tokenizer, load_trained_model
from sftmix.report.representations import places_of
from sftmix.report.runs import Run
from sftmix.runs.folders import atomic_write, lock_run
from sftmix.templates.chat import set_template_date
from sftmix.templates.tokenizing import tokenize_examples
from sftmix.training.scoring import score_examples
from sftmix.training.trainer import make_collator
from sftmix_kernels import StreamingPerplexity

logger = logging.getLogger(__name__)

FOLDER = "report"
SAMPLE_SEED = 0
When = Literal["before", "after"]


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores and arrays of the sampled examples under one model; None if they cannot be made."""

    scores: Partition  # one scoring; its subsets are of no meaning
    representations: NDArray[np.float32] | None  # (S, D)
    places: NDArray[np.float32] | None  # (S, 2), their t-SNE


class ScoresAndMeans(StreamingPerplexity):
    """Add up the hidden states that the head reads, besides the losses."""

    hidden_sum: Tensor | None = None  # (S, D) float32; None without a fused head

    def update(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, sample_ids: Tensor, **options: Any
    ) -> None:
        """Update the losses, and add the rows of `hidden` (N, D) to their examples' sums."""
        super().update(hidden, weight, labels, sample_ids, **options)
        if self.hidden_sum is None:
            shape = (self.num_samples, hidden.shape[-1])
            self.hidden_sum = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        self.hidden_sum.index_add_(0, sample_ids, hidden.float())

    def means(self) -> NDArray[np.float32] | None:
        """Return the mean over each example's response tokens: (S, D)."""
        if self.hidden_sum is None:
            return None
        means: NDArray[np.float32] = (self.hidden_sum / self.num_tokens[:, None]).cpu().numpy()
        return means


def sample_examples(run: Run, partition: Partition | None, number: int | None) -> Examples:
    """Return `number` of the run's training examples, alike for all runs on the data; None: all.

    Raises:
        ValueError: the data are not found, or are not those that the run was trained on.
    """
    paths = [run.place(name) for name in run.recipe["data"]]
    names = [
        str(path) if path.exists() else name
        for path, name in zip(paths, run.recipe["data"], strict=True)
    ]
    columns = run.recipe.get("columns")
    examples = load_examples(
        names,
        on_bad_row="mend" if run.recipe.get("on_bad_row") == "mend" else "skip",
        columns=parse_columns(columns) if columns else None,
        train_on=run.recipe.get("train_on", "responses"),
        split=run.recipe.get("data_split", "train"),
        encoding=run.recipe.get("encoding", "utf-8"),
        streaming=run.recipe.get("streaming", False),
    )
    if partition is not None:
        examples = examples.take(np.flatnonzero(np.isin(examples.ids, partition.id)))
    if run.recipe.get("weights"):
        examples = with_copies(examples, run.recipe["weights"])
    if data_hash(examples.content_hashes) != run.recipe["data_hash"]:
        selected = partition is None and run.recipe.get("select")
        hint = "; give its run of sftmix score as a RUN too" if selected else ""
        raise ValueError(
            f"the data {', '.join(names)} are not those that {run.name} was trained on{hint}"
        )
    if number is None or number >= len(examples):
        return examples
    chosen = np.random.default_rng(SAMPLE_SEED).choice(len(examples), number, replace=False)
    return examples.take(np.sort(chosen))


def measured(run: Run, when: When, examples: Examples, others: Sequence[Run] = ()) -> Measured:
    """Return scores and representations under the model before or after training.

    They are read if this run, or one of `others`, has kept them for the same model and examples.

    Raises:
        ValueError: the run is not finished, its model is not found or not understood.
        OSError: the model cannot be read.
        ImportError: it is an adapter and peft is not installed.
    """
    if when == "after" and not run.finished:
        raise ValueError(f"{run.name} is not finished: it has no final model")
    wanted = {
        "examples": hashlib.sha256(
            "\n".join(map("{} {}".format, examples.ids, examples.content_hashes)).encode()
        ).hexdigest(),
        "model": _fingerprint(run, when),
        "max_length": str(run.recipe["max_length"]),
        "template_hash": str(run.recipe.get("template_hash")),
        "template_date": str(run.recipe.get("template_date")),
        "dtype": _dtype(run),
        "head": _head(run),
    }
    kept = (_read(one.folder / FOLDER, when, wanted) for one in (run, *others))
    found = next((one for one in kept if one is not None), None)
    if found is None:
        found = _score(run, when, examples)
        try:
            _write(run.folder / FOLDER, when, wanted, found)
        except (OSError, ValueError) as error:  # ValueError: another report is writing its own
            logger.warning("scores of %s are not kept: %s", run.name, error)
    return found


def _fingerprint(run: Run, when: When) -> str:
    """Return the model's name and, of a folder, the sizes and times of its weights."""
    names = [run.recipe["model"]] if when == "before" else [run.recipe["model"], str(run.folder)]
    parts = []
    for name in names:
        place = run.place(name) if name == run.recipe["model"] else run.folder
        stats = [(path.name, path.stat()) for path in sorted(place.glob("*.safetensors"))]
        parts += [place.name if stats else name]
        parts += [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return "; ".join(parts)


def _score(run: Run, when: When, examples: Examples) -> Measured:
    tokenizer = load_tokenizer(_arguments(run, str(run.folder) if run.finished else _base(run)))
    set_template_date(tokenizer, run.recipe.get("template_date"))
    tokens = tokenize_examples(
        examples,
        tokenizer,
        max_length=run.recipe["max_length"],
        on_bad_row="skip",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(run, when).to(device)
    sums = ScoresAndMeans(len(tokens), device)
    score_examples(
        model,
        HeadAdapter(model, _head(run)),
        tokens,
        collator=make_collator(None),
        perplexity=sums,
        context=_context(model, device),
        description=f"score {run.name} {when} training",
    )
    scores = from_scores(
        tokens["id"][:],
        tokens["content_hash"][:],
        sums.num_tokens.cpu().numpy(),
        sums.nll_sum.cpu().numpy(),
    )
    means = sums.means()
    places = None
    if means is not None:
        with contextlib.suppress(ValueError, ImportError):  # the picture says it again
            places = places_of(means)
    return Measured(scores, means, places)


def _context(
    model: Any, device: torch.device
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return bfloat16 autocast on a GPU that has it, as scoring uses; before and after alike."""
    if (
        device.type == "cuda"
        and model.dtype == torch.float32
        and torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return functools.partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext


def _dtype(run: Run) -> Any:
    return run.recipe.get("dtype", "float32")


def _arguments(run: Run, model: str) -> RunArguments:
    at = run.recipe.get("commit") or run.recipe.get("revision")
    revision = None if Path(model).exists() else at
    return RunArguments(model, run.recipe["data"], "", dtype=_dtype(run), revision=revision)


def _head(run: Run) -> str:
    return str(run.recipe.get("head", "fused"))


def _base(run: Run) -> str:
    """Return the model that training began from: an existing folder, or a hub name."""
    name = str(run.recipe["model"])
    place = run.place(name)
    if place.exists():
        return str(place)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"the model {name} that {run.name} began from was not found")
    return name


def _load(run: Run, when: When) -> Any:
    if when == "before":
        return load_model(_arguments(run, _base(run)))
    base = _base(run) if (run.folder / ADAPTER_CONFIG).exists() else None
    return load_trained_model(_arguments(run, str(run.folder)), base)


def _read(cache: Path, when: When, wanted: dict[str, str]) -> Measured | None:
    """Return the kept scores if they were made from the same and are not damaged, else None."""
    try:
        with safe_open(cache / f"{when}.safetensors", framework="numpy") as file:
            if file.metadata() != wanted:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scores = read_partition(cache / f"{when}.parquet")
    except (OSError, ValueError, SafetensorError):
        return None
    if {len(array) for name, array in arrays.items() if name != "none"} - {len(scores.id)}:
        return None
    return Measured(scores, arrays.get("representations"), arrays.get("places"))


def _write(cache: Path, when: When, made_from: dict[str, str], found: Measured) -> None:
    cache.mkdir(exist_ok=True)
    named = {"representations": found.representations, "places": found.places}
    arrays = {name: array for name, array in named.items() if array is not None}
    arrays = arrays or {"none": np.zeros(1, dtype=np.float32)}  # a file has to hold an array
    with lock_run(cache):
        # The file with the scores' origin is written last: without it they do not count.
        (cache / f"{when}.safetensors").unlink(missing_ok=True)
        write_partition(cache / f"{when}.parquet", found.scores)
        atomic_write(
            cache / f"{when}.safetensors", lambda file: save_file(arrays, file, metadata=made_from)
        )
