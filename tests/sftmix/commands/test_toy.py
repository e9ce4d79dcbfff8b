"""The toy model: it loads, it is reproducible, and it refuses what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.data.examples import load_examples
from sftmix.templates.tokenizing import tokenize_examples
from sftmix.toy import build_toy_model, main

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text('{"question": "What is one and one?", "answer": "One and one is two."}\n' * 3)
    return path


def test_it_loads_and_trains(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.random.get_rng_state()
    build_toy_model(tmp_path / "toy", [data], max_length=64, **SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "toy")
    assert len(tokenizer) == model.config.vocab_size <= 300
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    assert model.dtype == torch.float32
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.intermediate_size == 48
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out
    assert (tmp_path / "toy" / "model.safetensors").is_file()
    rows = tokenize_examples(load_examples([data]), tokenizer, max_length=64)
    batch = {name: torch.tensor(rows[name][:]) for name in ("input_ids", "labels")}
    loss = model(**batch).loss
    assert abs(loss.item() - torch.tensor(float(len(tokenizer))).log().item()) < 0.5


def test_text_survives_the_tokenizer(tmp_path: Path, data: Path) -> None:
    build_toy_model(tmp_path / "toy", [data], **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "toy")
    text = "Any bytes: \N{SNOWMAN} caf\xe9\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_seed_decides(tmp_path: Path, data: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_toy_model(tmp_path / name, [data], seed=seed, **SMALL)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    tokenizers = {(tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"}
    assert len(tokenizers) == 1


def test_wrong_input(tmp_path: Path, data: Path) -> None:
    for name, value in (
        ("vocab_size", 258),
        ("hidden_size", 15),
        ("num_layers", 0),
        ("num_heads", 0),
        ("max_length", 0),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected .*got {value}"):
            build_toy_model(tmp_path / "toy", [data], **{**SMALL, name: value})
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text('{"input_ids": [1, 2], "labels": [1, 2]}\n')
    with pytest.raises(ValueError, match=r"tokens\.jsonl:1: a tokenizer needs text"):
        build_toy_model(tmp_path / "toy", [tokens], **SMALL)
    assert not (tmp_path / "toy").exists()


def test_a_folder_with_files_is_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"^output: expected a new or empty folder"):
        build_toy_model(data, [data], **SMALL)
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(data.parent)])
    assert caught.value.code == 2
    message = (
        f"python -m sftmix.toy: error: --output: expected a new or empty folder, got {data.parent}"
    )
    assert capsys.readouterr().err.startswith(message)
    assert [path.name for path in data.parent.iterdir()] == ["data.jsonl"]


def test_the_command_line(tmp_path: Path, data: Path) -> None:
    main(["--output", str(tmp_path / "toy"), "--data", str(data), "--vocab-size", "270"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "toy").config.hidden_size == 128
