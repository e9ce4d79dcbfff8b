"""The data of a seed, as tokens, and what the lower layers give for it, in one file.

train: scored, split and tuned on. held_out: only measured on; while a learning rate is chosen it is
another part of what may be trained on. kept (Alpaca): rows that a grader kept, none of which is in
the file that the others come from. questions (PubMedQA): prompts of which the last token counts.

Legend: S examples, T tokens of all of them, D hidden size, Q questions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.study import parts
from benchmarks.study.parts import Examples, Source
from sftmix.data.examples import Example, content_hash, load_examples
from sftmix.data.summary import Reading
from sftmix.evaluation.medical import Questions, read_questions
from sftmix.runs.folders import atomic_write
from sftmix.templates.tokenizing import tokenize_examples

from .frozen import activations
from .settings import SEARCH_SEED, Sizes

FILES = {
    "gsm8k": ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
    "alpaca": ("alpaca_9k.json", "alpaca_claude_t45.json"),
    "pubmedqa": ("pubmedqa_pqal.json", "pubmedqa_test_ground_truth.json"),
}
BLOCK = 256  # examples that are tokenised at a time


@dataclass(frozen=True)
class Material:
    """A data set: what may be trained on and what may not, and what else is measured on it."""

    source: Source
    kept: Examples = ()
    questions: Questions | None = None


@functools.cache
def read_material(name: str, folder: Path | None) -> Material:
    """Return a data set from its files in a folder; "demo" is the bundled one.

    Raises:
        ValueError: no folder is given, or it lacks a file.
    """
    if name == "demo":
        return Material(parts.demo())
    if folder is None:
        raise ValueError(f"--data-folder: expected a folder with {' and '.join(FILES[name])}")
    first, second = files = [folder / file for file in FILES[name]]
    for file in files:
        if not file.is_file():
            raise ValueError(f"--data-folder: no file {file}; or leave {name} out of --data")
    if name == "gsm8k":
        return Material(parts.gsm8k(first, second))
    if name == "alpaca":
        source = parts.alpaca(first)
        known = {
            example.content_hash for part in (source.pool, source.held_out) for example in part
        }
        kept = load_examples([second], on_bad_row="skip", disable_progress=True)
        return Material(source, [one for one in kept if one.content_hash not in known])
    return pubmedqa(first, second)


def pubmedqa(file: Path, ids: Path) -> Material:
    """Return the labelled part of PubMedQA: question and long answer; the test ids are held out."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    held_out = json.loads(ids.read_text(encoding="utf-8"))
    found: dict[bool, list[Example]] = {False: [], True: []}
    for number, (name, row) in enumerate(rows.items()):
        turns = {"question": row["QUESTION"], "answer": row["LONG_ANSWER"]}
        messages = [
            {"role": "user", "content": turns["question"]},
            {"role": "assistant", "content": turns["answer"]},
        ]
        example = Example(number, f"{file}:{name}", content_hash(turns), messages)
        found[name in held_out].append(example)
    source = Source("pubmedqa", found[False], found[True])
    return Material(source, questions=read_questions("pubmedqa", str(file), str(ids)))


def draw(
    examples: Examples, number: int, seed: int, tokenizer: Any, max_length: int
) -> datasets.Dataset:
    """Return the first ``number`` examples in a seed's order of at most ``max_length`` tokens.

    Raises:
        ValueError: there are fewer.
    """
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(examples))
    found: list[datasets.Dataset] = []
    for start in range(0, len(order), BLOCK):
        if sum(map(len, found)) >= number:
            break
        block = tokenize_examples(
            [examples[place] for place in order[start : start + BLOCK]],
            tokenizer,
            max_length=max_length + 1,
            on_bad_row="skip",
            reading=Reading(),
            disable_progress=True,
        )
        short = [row for row, ids in enumerate(block["input_ids"]) if len(ids) <= max_length]
        found.append(block.select(short))
    if sum(map(len, found)) < number:
        raise ValueError(
            f"max_length: expected {number} of {len(examples)} examples to have at most "
            f"{max_length} tokens, got {sum(map(len, found))}"
        )
    return datasets.concatenate_datasets(found).select(range(number))


def draw_parts(
    material: Material, seed: int, tokenizer: Any, sizes: Sizes
) -> dict[str, datasets.Dataset]:
    """Return a seed's parts by name, as tokens.

    Raises:
        ValueError: as `draw`.
    """
    source = material.source
    longest = sizes.max_length[source.name]
    train, held_out = sizes.train_examples, sizes.held_out_examples
    if seed == SEARCH_SEED:
        both = draw(source.pool, train + held_out, seed, tokenizer, longest)
        ends = (0, train, train + held_out)
        return {
            "train": both.select(range(*ends[:2])),
            "held_out": both.select(range(*ends[1:])),
        }
    found = {
        "train": draw(source.pool, train, seed, tokenizer, longest),
        "held_out": draw(source.held_out, held_out, seed, tokenizer, longest),
    }
    if material.kept:
        found["kept"] = draw(material.kept, sizes.kept_examples, seed, tokenizer, longest)
    return found


def draw_questions(
    questions: Questions, seed: int, tokenizer: Any, number: int
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Return a seed's prompts (Q) as tokens, and the right choice of each and the choices' tokens.

    Seeds 0, 1, 2 ... take one share of the test questions after the other. A choice is known by its
    first token after a space; with a tokenizer to which each choice is one token that is what
    lm-evaluation-harness compares, the log-likelihood of the choice after the prompt.

    Raises:
        ValueError: two choices begin with the same token.
    """
    config, count = questions.config, len(questions.documents)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(count)
    rows = [int(order[(seed * number + place) % count]) for place in range(number)]
    documents = [questions.documents[row] for row in rows]
    choices = config["doc_to_choice"]
    first = [tokenizer(f" {choice}", add_special_tokens=False).input_ids[0] for choice in choices]
    if len(set(first)) < len(first):
        raise ValueError(f"choices: expected each of {choices} to begin with another token")
    prompt = jinja2.Template(config["doc_to_text"])
    texts = [prompt.render(**document) for document in documents]
    right = [choices.index(document[config["doc_to_target"]]) for document in documents]
    # With the beginning of text, where the tokenizer has one, as the harness asks.
    tokens = tokenizer(texts, verbose=False).input_ids
    return tokens, {
        "questions.right": torch.tensor(right),
        "questions.choices": torch.tensor(first),
    }


def write_prepared(
    path: Path,
    model: Any,
    tokenizer: Any,
    material: Material,
    seed: int,
    sizes: Sizes,
    identity: str,
) -> int:
    """Write a seed's parts and what the lower layers of the model give for them; return T."""
    drawn = draw_parts(material, seed, tokenizer, sizes)
    tensors: dict[str, Tensor] = {}
    sequences: list[list[int]] = []
    for name, part in drawn.items():
        sequences += part["input_ids"][:]
        tensors[f"{name}.id"] = torch.tensor(part["id"][:])
        tensors[f"{name}.lengths"] = torch.tensor([len(ids) for ids in part["input_ids"]])
        tensors[f"{name}.labels"] = torch.tensor([n for row in part["labels"] for n in row])
    if material.questions is not None and seed != SEARCH_SEED:
        prompts, known = draw_questions(material.questions, seed, tokenizer, sizes.questions)
        tensors |= {**known, "questions.lengths": torch.tensor([len(ids) for ids in prompts])}
        sequences += prompts
    read = activations(model, sizes.trained_layers, sequences)
    tokens = torch.tensor([token for ids in sequences for token in ids])
    embedded = model.get_input_embeddings()(tokens).detach()
    tensors["scale"] = read.norm(dim=-1).median() / embedded.norm(dim=-1).median()
    tensors["activations"] = read
    atomic_write(path, lambda file: save_file(tensors, file, {"identity": identity}))
    return len(read)


@dataclass(frozen=True)
class Prepared:
    """A seed's parts, in which tokens are rows of the table that an upper part reads."""

    read: Tensor  # (T, D)
    scale: float  # median norm of activations over that of embeddings
    parts: dict[str, datasets.Dataset]
    questions: list[list[int]]
    right: Tensor  # (Q,), which choice
    choices: Tensor  # tokens


def read_prepared(path: Path, identity: str) -> Prepared:
    """Return what `write_prepared` wrote.

    Raises:
        ValueError: it was written for another model, data or sizes.
    """
    with safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get("identity")
        if found != identity:
            raise ValueError(
                f"--cache: {path} was made for {found}, expected {identity}; give another folder"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows = _rows_of(tensors)
    parts = {name: _dataset(name, rows[name], tensors) for name in rows if name != "questions"}
    nothing = torch.empty(0, dtype=torch.long)
    return Prepared(
        tensors["activations"],
        float(tensors["scale"]),
        parts,
        rows.get("questions", []),
        *(tensors.get(f"questions.{name}", nothing) for name in ("right", "choices")),
    )


def _rows_of(tensors: dict[str, Tensor]) -> dict[str, list[list[int]]]:
    """Return for each part the rows of its examples in the table, which begin at 1."""
    found: dict[str, list[list[int]]] = {}
    start = 1
    for name in ("train", "held_out", "kept", "questions"):
        if f"{name}.lengths" in tensors:
            found[name] = list(_consecutive(start, tensors[f"{name}.lengths"].tolist()))
            start += int(tensors[f"{name}.lengths"].sum())
    return found


def _consecutive(start: int, lengths: Sequence[int]) -> Iterator[list[int]]:
    for length in lengths:
        yield list(range(start, start + length))
        start += length


def as_rows(part: datasets.Dataset) -> datasets.Dataset:
    """Return examples in which tokens are rows of the activations' table, in their order."""
    lengths = [len(ids) for ids in part["input_ids"]]
    return part.remove_columns("input_ids").add_column("input_ids", list(_consecutive(1, lengths)))


def _dataset(name: str, rows: list[list[int]], tensors: dict[str, Tensor]) -> datasets.Dataset:
    labels = tensors[f"{name}.labels"].split(tensors[f"{name}.lengths"].tolist())
    ids = tensors[f"{name}.id"].tolist()
    return datasets.Dataset.from_dict(
        {
            "id": ids,
            "content_hash": [f"{name} {number}" for number in ids],
            "input_ids": rows,
            "labels": [row.tolist() for row in labels],
        }
    )
