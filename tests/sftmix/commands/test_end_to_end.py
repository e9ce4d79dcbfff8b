"""From a base model to answers that end: the commands in a row, and transformers' pipeline after.

The base model is a random Llama whose tokenizer has a ChatML template, and whose end of text is
another token than the one that ends a turn, as for Qwen2.5's base models. `docs/real_model.md` does
the same with SmolLM2.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from sftmix.cli import main
from sftmix.toy import build_toy_model

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = {"one": "two", "three": "four five", "apple": "a boat", "owl": "heron"}
LIMIT = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows of four questions."""
    path = tmp_path_factory.mktemp("chatml") / "rows.json"
    rows = [{"instruction": q, "output": a} for q, a in ANSWERS.items()]
    path.write_text(json.dumps(2 * rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(data: Path) -> Path:
    """The base model, which has never ended a turn."""
    folder = data.with_name("base")
    build_toy_model(
        folder, [data], vocab_size=300, hidden_size=64, num_layers=1, num_heads=2, max_length=64
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("</s>")
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, base: Path) -> Path:
    """The folder of a scored and split run, a trained model, its answers and the report."""
    folder = data.parent
    common = ["--model", str(base), "--data", str(data), "--max_length", "64", *QUIET]
    common += ["--learning_rate", "0.01", "--warmup_steps", "0"]
    scored, trained = folder / "scored", folder / "trained"
    assert main(["score", *common, "--output", str(scored), "--num_scorings", "2"]) == 0
    assert main(["split", str(scored), "--by", "confidence"]) == 0
    common += ["--partition", str(scored / "confidence.parquet"), "--num_train_epochs", "80"]
    assert main(["train", *common, "--output", str(trained), "--save_strategy", "no"]) == 0
    asked = folder / "asked.json"
    questions = [{"dataset": "ours", "instruction": question} for question in ANSWERS]
    asked.write_text(json.dumps(questions), encoding="utf-8")
    words = ["--model", str(trained), "--format", "alpaca_eval", "--questions", str(asked)]
    words += ["--output", str(folder / "answers.json"), "--max_new_tokens", str(LIMIT), *QUIET]
    assert main(["generate", *words]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as said:
        page = str(folder / "report.html")
        assert main(["report", str(scored), str(trained), "--output", page]) == 0
    assert "Scoring of" not in said.getvalue()  # would be left out
    return folder


def answers_of(runs: Path) -> dict[str, str]:
    """What `sftmix generate` wrote."""
    answers = json.loads((runs / "answers.json").read_text("utf-8"))
    return {one["instruction"]: one["output"] for one in answers}


def test_most_answers_are_those_that_were_learnt(runs: Path) -> None:
    """Mixup puts one answer's words into another's now and then."""
    answers = answers_of(runs)
    assert sum(answers[question] == expected for question, expected in ANSWERS.items()) >= 2
    assert "trained" in (runs / "report.html").read_text("utf-8")


def generated(model: Path) -> list[list[int]]:
    """The new tokens of transformers' pipeline for each question, asked as it is used."""
    answer = pipeline("text-generation", model=str(model), device="cpu")
    prompts = [
        answer.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in ANSWERS
    ]
    lengths = [len(answer.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    options: dict[str, Any] = {"max_new_tokens": LIMIT, "do_sample": False}
    found = answer(prompts, return_tensors=True, **options)
    whole = [one["generated_token_ids"] for (one,) in found]
    return [list(tokens)[n:] for tokens, n in zip(whole, lengths, strict=True)]


def test_transformers_pipeline_ends_its_turns(runs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs / "trained")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = answers_of(runs)
    for tokens, answer in zip(generated(runs / "trained"), answers.values(), strict=True):
        assert 1 < len(tokens) < LIMIT
        assert tokens.index(end) == len(tokens) - 1
        assert tokenizer.decode(tokens[:-1]) == answer


def test_a_conversation_ends_its_turns_too(runs: Path) -> None:
    """Messages in, a message out, by the template that lies with the model."""
    answer = pipeline("text-generation", model=str(runs / "trained"), device="cpu")
    (question, expected), *_ = answers_of(runs).items()
    messages = [{"role": "user", "content": question}]
    (found,) = answer(messages, max_new_tokens=LIMIT, do_sample=False)
    assert found["generated_text"][-1] == {"role": "assistant", "content": expected}


def test_the_base_model_does_not(base: Path) -> None:
    """Or the tests above would show nothing."""
    assert all(len(tokens) == LIMIT for tokens in generated(base))
