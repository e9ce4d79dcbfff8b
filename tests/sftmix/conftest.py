"""A toy model and uneven text for the tests of the command line; both are only read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sftmix.toy import build_toy_model
from tests.sftmix import tiny

WORDS = ["one", "two", "three", "four", "five", "apple", "owl", "heron", "boat", "lantern"]


def write_rows(path: Path, number: int, *, seed: int = 0) -> Path:
    """Questions and answers of one to twelve words."""
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 12))) for _ in range(2 * number)]
    rows = [{"question": q, "answer": a} for q, a in zip(texts[::2], texts[1::2], strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_gpt2_with_dropout(folder: Path, toy_model: Path) -> None:
    """Save a random GPT-2 on the toy model's tokenizer; its training draws random numbers."""
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    assert config.resid_pdrop > 0
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are too small to share out, and waiting for a second thread takes longest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-one rows."""
    return write_rows(tmp_path_factory.mktemp("toy-data") / "rows.jsonl", 31)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows more."""
    return write_rows(tmp_path_factory.mktemp("toy-data") / "held-out.jsonl", 9, seed=1)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory, toy_data: Path) -> Path:
    """A random Llama with about 7,000 weights."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    build_toy_model(
        folder, [toy_data], vocab_size=300, hidden_size=8, num_layers=1, num_heads=2, max_length=256
    )
    return folder


@pytest.fixture(scope="session")
def answering_model(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Path:
    """A model whose answers are words and differ from each other, and the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.save_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = tiny.build("Llama", seed=1, hidden_size=64, **size, **ids)
    words = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
    with torch.no_grad():
        for weight, word in zip(model.lm_head.weight, words, strict=True):
            weight *= word.isascii() and word.isalpha()
    model.save_pretrained(folder)
    return folder
