"""Answers to benchmark questions: what is asked, how tokens are drawn, and the files written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sftmix.answering import Answerer, Decoding, Draws, draw, stops
from sftmix.cli import main
from sftmix.data import load_examples
from sftmix.generate import GenerateArguments
from sftmix.questions import Answer, Question, read_questions
from sftmix.templates import PLAIN_TEMPLATE, prompt_tokens, tokenize_examples
from tests.sftmix import tiny

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTIONS = [
    {"instruction": " one owl\n", "dataset": "helpful_base"},
    {"instruction": "five herons and a lantern, " * 4, "dataset": "koala"},
    {"instruction": "two"},
    {"instruction": "Wie heißt „Boot“? 船", "dataset": "vicuna"},
    {"instruction": "four apples in a boat"},
]
CATEGORIES = ["writing", "math", "stem", "gardening"]
MT_QUESTIONS = [
    {
        "question_id": 81 + i,
        "category": category,
        "turns": [f"three {category} owls" * (i + 1), "and an apple?"],
    }
    for i, category in enumerate(CATEGORIES)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Path:
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


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(INSTRUCTIONS))
    return path


@pytest.fixture
def mt_bench(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MT_QUESTIONS))
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs `sftmix generate` with short answers; flags come last and override."""

    def command(form: str, questions: Path, output: str, *flags: str, model: Path = folder) -> int:
        words = ["--model", str(model), "--format", form, "--questions", str(questions)]
        words += ["--output", str(tmp_path / output), "--max_new_tokens", "6", "--batch_size", "2"]
        quiet = ["--name", "toy", "--use_cpu", "--disable_tqdm"]
        return main(["generate", *words, *quiet, *flags])

    return command


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def answerer(folder: Path, tokenizer: PreTrainedTokenizerBase, **decoding: Any) -> Answerer:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Answerer(model, tokenizer, Decoding(**{"max_new_tokens": 6, **decoding}))


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """What a refused command printed, in one line."""
    error = capsys.readouterr().err
    assert code == 1
    lines = [line for line in error.splitlines() if line.startswith("sftmix generate: error: ")]
    assert len(lines) == 1, error
    assert error.endswith(lines[0] + "\n")
    return lines[0]


def asked(number: int, turns: int = 2, temperature: float = 0.0) -> list[Question]:
    words = [" ".join(["owl", "boat", "heron"][: 1 + i % 3] * (1 + i)) for i in range(number)]
    return [
        Question(i, tuple(f"{word} {t}" for t in range(turns - i % turns)), temperature)
        for i, word in enumerate(words)
    ]


def without_times(answers: Sequence[Answer]) -> list[Answer]:
    return [dataclasses.replace(answer, time=0.0) for answer in answers]


# Prompts


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML, None])
def test_a_prompt_is_what_training_showed_before_a_response(
    template: str | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    turns = ["one owl", " a heron\n\n", "two,", "Ein Boot 船", "and?", "five"]
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    row = tokenize_examples(load_examples([tmp_path / "rows.jsonl"]), tokenizer)[0]
    labelled = [label != -100 for label in row["labels"]]
    begins = [i for i in range(1, len(labelled)) if labelled[i] and not labelled[i - 1]]
    assert len(begins) == 3
    for turn, begin in enumerate(begins):
        prompt = prompt_tokens(tuple(messages[: 2 * turn + 1]), tokenizer)
        assert prompt == row["input_ids"][:begin]


def test_later_turns_are_asked_with_the_earlier_answers(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = answerer(folder, tokenizer)
    prompts: list[list[int]] = []
    generate = one.generate
    monkeypatch.setattr(
        one, "generate", lambda q, p, turn: (prompts.extend(p), generate(q, p, turn))[1]
    )
    question = Question(1, ("owl", "boat", "heron"), 0.0)
    (answer,) = one.answer([question])
    contents = ["owl", answer.turns[0], "boat", answer.turns[1], "heron"]
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": content}
        for i, content in enumerate(contents)
    ]
    assert prompts == [prompt_tokens(tuple(messages[:n]), tokenizer) for n in (1, 3, 5)]
    assert all(answer.turns)
    assert answer.num_tokens == [6, 6, 6]
    assert answer.ended == [False] * 3


# Drawing tokens


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_batch_answers_as_each_question_alone(
    family: str,
    temperature: float,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = {"n_positions": 256} if family == "GPT2" else {"max_position_embeddings": 256}
    model = tiny.build(family, vocab_size=300, **size)
    one = Answerer(model, tokenizer, Decoding(8))
    questions = asked(7, temperature=temperature)
    tokens: dict[Any, list[list[int]]] = {}
    generate = one.generate

    def noted(batch: Sequence[Question], *rest: Any) -> list[list[int]]:
        new = generate(batch, *rest)
        for question, row in zip(batch, new, strict=True):
            tokens.setdefault(question.key, []).append([t for t in row if t != one.pad])
        return new

    monkeypatch.setattr(one, "generate", noted)
    alone = [one.answer([question])[0] for question in questions]
    alone_tokens, tokens = tokens, {}
    assert without_times(one.answer(questions)) == without_times(alone)
    assert tokens == alone_tokens
    # Greedy ones beside sampled ones, in another order.
    mixed = [dataclasses.replace(q, key=-1 - i, temperature=0.7) for i, q in enumerate(asked(3))]
    found = one.answer([*mixed, *questions[::-1]])[3:]
    assert without_times(found[::-1]) == without_times(alone)
    assert len({str(turn) for turns in tokens.values() for turn in turns}) > 5


def test_the_seed_the_question_and_the_turn_decide_what_is_drawn(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = Question(1, ("owl",), 0.7)
    first = answerer(folder, tokenizer).answer([question])[0].turns
    assert answerer(folder, tokenizer).answer([question])[0].turns == first
    assert answerer(folder, tokenizer, seed=1).answer([question])[0].turns != first
    other = dataclasses.replace(question, key=2)
    assert answerer(folder, tokenizer).answer([other])[0].turns != first
    draws = [Decoding(6).draws(question, turn) for turn in (0, 1)]
    assert (draws[0] != draws[1]).all()
    # A temperature for all goes before the questions' own; below 1e-4 nothing is drawn.
    for cold in (0.0, 9e-5):
        greedy = answerer(folder, tokenizer, temperature=cold, seed=cold > 0)
        assert greedy.answer([question])[0].turns == greedy.answer([other])[0].turns


def test_draws_follow_the_distribution() -> None:
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    scores[0, 3] = -torch.inf
    number, temperature = 4000, torch.full((4000,), 0.7, dtype=torch.float64)
    grid = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    for top_k in (0, 5):
        exact = scores[0].double() / 0.7
        if top_k:
            exact[exact < exact.sort().values[-top_k]] = -torch.inf
        tokens = draw(scores.expand(number, -1), temperature, grid, top_k)
        counts = torch.bincount(tokens, minlength=12)
        assert (counts - number * exact.softmax(-1)).abs().max() <= 1
        assert counts[3] == 0
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    tokens = draw(scores.expand(2, -1), temperature[:2], ends, 0)
    assert tokens[0] == scores.argmax()
    assert tokens[1] == scores[0].masked_fill(scores[0].isinf(), torch.inf).argmin()


def test_logits_that_are_no_numbers() -> None:
    draws = Draws(torch.zeros(1), torch.zeros(1, 1), 0, 1)
    with pytest.raises(FloatingPointError, match="NaN"):
        draws(torch.zeros(1, 1), torch.tensor([[1.0, torch.nan]]))


# Where an answer ends


def test_what_ends_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    assert stops(tokenizer, None) == ({eos}, "")
    assert stops(tokenizer, [7, 8]) == ({7, 8, eos}, "")
    tokenizer.chat_template = CHATML
    assert stops(tokenizer, 7) == ({7, eos}, "<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stops(tokenizer, 7) == ({7, eos, end}, "")


def test_answers_stop_there(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    questions = [Question(1, ("owl",), 0.0), Question(2, ("two boats " * 9,), 0.0)]
    whole = answerer(folder, tokenizer, max_new_tokens=12)
    tokens = whole.generate(questions, [whole.prompt(q, []) for q in questions], 0)
    place = next(i for i in range(2, 12) if tokens[0][i] not in [*tokens[0][:i], *tokens[1]])
    decode = tokenizer.decode
    kept = decode(tokens[0][:place]).strip()

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = tokens[0][place]
    # What the model's folder says of sampling is not heeded.
    model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 9.0
    by_token = Answerer(model, tokenizer, Decoding(12)).answer(questions)
    assert (by_token[0].turns, by_token[0].num_tokens) == ([kept], [place])
    assert by_token[0].ended == [True]
    assert by_token[1].turns == [decode(tokens[1]).strip()]
    assert by_token[1].ended == [False]

    marker = decode(tokens[0][place : place + 2])
    tokenizer.chat_template = PLAIN_TEMPLATE.replace(
        "message['content'] + eos_token", f"message['content'] + {marker.rstrip()!r}"
    )
    by_text = answerer(folder, tokenizer, max_new_tokens=12)
    assert by_text.stop_text == marker.rstrip()
    (answer,) = by_text.answer(questions[:1])
    assert answer.turns == [decode(tokens[0]).partition(marker.rstrip())[0].strip()]
    assert answer.ended == [True]


def test_special_tokens_and_white_space_are_no_text(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    one = answerer(folder, tokenizer)
    answer = Answer(1, [], [], [], 0.0)
    text = "\n one , two .  <s>five\n</s>owl"
    one._append(answer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert answer.turns == ["one , two .  five"]


# Files


def test_alpaca_eval_files(
    run: Callable[..., int], alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("alpaca_eval", alpaca, "out.json") == 0
    assert "5 answers of 6 tokens on average" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text(encoding="ascii"))
    for row, question in zip(rows, INSTRUCTIONS, strict=True):
        assert {name: row[name] for name in question} == question
        assert set(row) == {"instruction", "output", "generator"} | set(question)
        assert row["generator"] == "toy"
        assert row["output"] == row["output"].strip() != ""
    assert {path.name for path in (tmp_path / "out.json.run").iterdir()} == {
        ".lock",
        "manifest.json",
    }
    before = (tmp_path / "out.json").read_bytes()
    assert "exists; delete it" in refused(capsys, run("alpaca_eval", alpaca, "out.json"))
    assert run("alpaca_eval", alpaca, "out.json", "--resume") == 0
    assert "was finished already" in capsys.readouterr().out
    assert (tmp_path / "out.json").read_bytes() == before
    # In a batch of another size the greedy answers are the same.
    assert run("alpaca_eval", alpaca, "again.json", "--batch_size", "5") == 0
    assert (tmp_path / "again.json").read_bytes() == before


def test_mt_bench_files(run: Callable[..., int], mt_bench: Path, tmp_path: Path) -> None:
    def rows(folder: str) -> list[dict[str, Any]]:
        path = tmp_path / folder / "model_answer" / "toy.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]

    assert run("mt_bench", mt_bench, "mt", "--batch_size", "3") == 0
    found = rows("mt")
    assert [row["question_id"] for row in found] == [81, 82, 83, 84]
    for row in found:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "toy"
        assert re.fullmatch("[0-9a-f]{22}", row["answer_id"])
        assert isinstance(row["tstamp"], float)
        (choice,) = row["choices"]
        assert choice["index"] == 0
        assert len(choice["turns"]) == 2
        assert all(choice["turns"])
    assert len({row["answer_id"] for row in found}) == 4
    # Of these, maths alone is asked without sampling.
    assert run("mt_bench", mt_bench, "seeded", "--seed", "1") == 0
    same = [a["answer_id"] == b["answer_id"] for a, b in zip(found, rows("seeded"), strict=True)]
    assert same == [False, True, False, False]
    assert [p.name for p in (tmp_path / "mt").rglob("*.jsonl")] == ["toy.jsonl"]


def test_a_killed_run_goes_on(
    run: Callable[..., int], mt_bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(folder: str) -> list[dict[str, Any]]:
        lines = (tmp_path / folder / "model_answer" / "toy.jsonl").read_text().splitlines()
        return [{**json.loads(line), "tstamp": 0} for line in lines]

    assert run("mt_bench", mt_bench, "whole") == 0
    answer, batches = Answerer.answer, []

    def interrupted(self: Answerer, questions: Sequence[Question]) -> list[Answer]:
        batches.append([question.key for question in questions])
        if len(batches) == 2:
            raise KeyboardInterrupt
        return answer(self, questions)

    monkeypatch.setattr(Answerer, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("mt_bench", mt_bench, "killed")
    partial = tmp_path / "killed/model_answer/toy.jsonl.run/answers.jsonl"
    assert len(partial.read_text().splitlines()) == 1
    assert not (tmp_path / "killed/model_answer/toy.jsonl").exists()
    with partial.open("a") as file:
        file.write('[{"key": 82, "turns": ["cut')
    assert run("mt_bench", mt_bench, "killed", "--resume") == 0
    # The longest come first, and none is asked twice; the batches are those of the whole run.
    assert batches == [[84, 83], [82, 81], [82, 81]]
    assert rows("killed") == rows("whole")
    assert not partial.exists()


def test_a_partial_run_of_something_else_is_refused(
    run: Callable[..., int],
    folder: Path,
    alpaca: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def again(*flags: str) -> str:
        return refused(capsys, run("alpaca_eval", alpaca, "out.json", *flags, model=model))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = tmp_path / "model"
    shutil.copytree(folder, model)
    with monkeypatch.context() as patched:
        patched.setattr(Answerer, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again()
    assert "already holds a run" in again()
    for flag, value in (
        ("--seed", "1"),
        ("--temperature", "0"),
        ("--max_new_tokens", "7"),
        ("--top_k", "0"),
        ("--name", "other"),
        ("--dtype", "float32"),
        ("--model", str(folder)),
    ):
        assert f"was started with {flag[2:]} = " in again("--resume", flag, value)
    weights = load_file(model / "model.safetensors")
    changed = {**weights, "lm_head.weight": -weights["lm_head.weight"]}
    save_file(changed, model / "model.safetensors")
    assert "was started with model_hash = " in again("--resume")
    shutil.copy(folder / "model.safetensors", model)
    alpaca.write_text(json.dumps(INSTRUCTIONS[:4]))
    assert "was started with questions_hash = " in again("--resume")
    alpaca.write_text(json.dumps(INSTRUCTIONS))
    partial = tmp_path / "out.json.run" / "answers.jsonl"
    partial.write_text('{"key": 1}\n')
    assert f"{partial} is damaged" in again("--resume")
    partial.unlink()
    assert run("alpaca_eval", alpaca, "out.json", "--resume", model=model) == 0
    assert "no run to resume" in again("--resume", "--output", str(tmp_path / "none.json"))


# What is refused, and what is warned of


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("alpaca_eval", {"dataset": "koala"}, "'instruction' must be a string"),
        ("alpaca_eval", {"instruction": " "}, "'instruction' must be a string that is not empty"),
        ("alpaca_eval", {"instruction": "a", "input": "b"}, "'input' is no part"),
        ("alpaca_eval", {"instruction": "a", "dataset": 1}, "'dataset' must be a string"),
        ("alpaca_eval", {"instruction": "first"}, "the question of line 1 again"),
        ("alpaca_eval", {"instruction": "\ud800"}, "surrogates not allowed"),
        ("alpaca_eval", ["a"], "a question must be an object"),
        ("mt_bench", {"question_id": None}, "'question_id' must be"),
        ("mt_bench", {"turns": []}, "'turns' must be a list of at least one"),
        ("mt_bench", {"turns": ["a", ""]}, r"'turns\[1\]' must be a string"),
        ("mt_bench", {"category": None}, "'category' must be"),
        ("mt_bench", {"question_id": 1}, "the question of line 1 again"),
    ],
)
def test_bad_questions(form: str, row: Any, message: str, tmp_path: Path) -> None:
    first = {"instruction": "first", "question_id": 1, "turns": ["a"], "category": "math"}
    if form == "mt_bench":
        row = {**first, "question_id": 2, **row}
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=f"questions.jsonl:2: .*{message}"):
        read_questions(str(path), form)


def test_bad_arguments(
    run: Callable[..., int],
    alpaca: Path,
    mt_bench: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for flags, message in (
        (["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        (["--max_new_tokens", "0"], "max_new_tokens: expected at least 1, got 0"),
        (["--temperature", "-1"], "temperature: expected at least 0, got -1.0"),
        (["--top_k", "-1"], "top_k: expected at least 0"),
        (["--name", "a/b"], "name: expected one that a file can have, got 'a/b'"),
        (["--output", str(tmp_path / "out.jsonl")], "ends in .json, got"),
        (["--questions", str(tmp_path / "no.json")], "no such data file"),
        (["--questions", str(empty)], "holds none"),
        (["--questions", str(mt_bench)], "question.jsonl:1: 'instruction' must be"),
    ):
        assert message in refused(capsys, run("alpaca_eval", alpaca, "out.json", *flags))
        shutil.rmtree(tmp_path / "out.json.run", ignore_errors=True)
    with pytest.raises(SystemExit):
        run("arena", alpaca, "out.json")
    assert "invalid choice: 'arena'" in capsys.readouterr().err


def test_no_prompt_is_cut(
    run: Callable[..., int], mt_bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question whose last turn might not fit is refused before the first is answered."""
    mt_bench.write_text(json.dumps(MT_QUESTIONS[3]))
    error = refused(capsys, run("mt_bench", mt_bench, "mt", "--max_new_tokens", "100"))
    need = re.search(r"question 84: .* max_new_tokens=100 need (\d+) positions.* has 256", error)
    assert need
    # Written again as text, an answer may be of some more tokens.
    left = str(90 - -(-(int(need[1]) - 256) // 2))
    shutil.rmtree(tmp_path / "mt")
    assert run("mt_bench", mt_bench, "mt", "--max_new_tokens", left) == 0


def test_empty_answers_and_cut_ones_are_counted(
    run: Callable[..., int],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    alpaca: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = answerer(folder, tokenizer)
    question = Question("two", ("two",), 0.0)
    first = one.generate([question], [one.prompt(question, [])], 0)[0][0]
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": first}))
    assert run("alpaca_eval", alpaca, "out.json", model=model) == 0
    outputs = {
        r["instruction"]: r["output"] for r in json.loads((tmp_path / "out.json").read_text())
    }
    assert outputs["two"] == ""
    empty = sum(not output for output in outputs.values())
    assert f"{empty} of 5 answers are empty" in caplog.text
    assert re.search(r"[1-4] of 5 answers were cut off at max_new_tokens=6", caplog.text)


def test_every_option_has_a_source_and_a_config_file_is_read(
    run: Callable[..., int], alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for field in dataclasses.fields(GenerateArguments):
        required = field.default is dataclasses.MISSING
        assert required or re.search(r"\[(paper|ours)\]$", field.metadata["help"]), field
    config = tmp_path / "config.yaml"
    config.write_text("max_new_tokens: 3\nseed: 4\nname: other\n")
    flags = ["--config", str(config), "--seed", "5"]
    assert run("alpaca_eval", alpaca, "out.json", *flags) == 0
    manifest = json.loads((tmp_path / "out.json.run" / "manifest.json").read_text())
    assert [manifest[name] for name in ("max_new_tokens", "seed", "name")] == [6, 5, "toy"]
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "--top_k" in capsys.readouterr().out


# Adapters


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_answers_as_the_merged_model(
    run: Callable[..., int],
    folder: Path,
    alpaca: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(folder)
    lora = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapted.save_pretrained(adapter)
    adapted.merge_and_unload().save_pretrained(merged)
    for path in (adapter, merged):
        AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    for name, model in (("adapter", adapter), ("merged", merged), ("base", folder)):
        assert run("alpaca_eval", alpaca, f"{name}.json", model=model) == 0
    texts = [(tmp_path / f"{name}.json").read_text() for name in ("adapter", "merged", "base")]
    assert texts[0] == texts[1] != texts[2]
    # Without safetensors PEFT would open a pickle.
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    capsys.readouterr()
    assert "has no adapter_model.safetensors" in refused(
        capsys, run("alpaca_eval", alpaca, "pickled.json", model=adapter)
    )


# The real questions and the real readers


def test_the_real_questions(tokenizer: PreTrainedTokenizerBase) -> None:
    names = ("alpaca_eval_instructions.json", "mt_bench_question.jsonl")
    for name in names:
        if not (REAL_DATA / name).is_file():
            pytest.skip(f"needs ../shared/data/{name}")
    instructions = read_questions(str(REAL_DATA / names[0]), "alpaca_eval")
    assert len(instructions) == 805
    assert all(question.dataset and question.temperature == 0 for question in instructions)
    two_turns = read_questions(str(REAL_DATA / names[1]), "mt_bench")
    assert len(two_turns) == 80
    assert all(len(question.turns) == 2 for question in two_turns)
    temperatures = [question.temperature for question in two_turns]
    assert [temperatures.count(one) for one in (0.0, 0.1, 0.7)] == [40, 20, 20]


@pytest.mark.filterwarnings("ignore")
def test_alpaca_eval_reads_the_file(run: Callable[..., int], alpaca: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("alpaca_eval.utils")
    assert run("alpaca_eval", alpaca, "out.json") == 0
    frame = utils.load_or_convert_to_dataframe(tmp_path / "out.json")
    assert utils.get_generator_name(None, frame) == "toy"
    # How its annotator joins the two models' outputs.
    joined = utils.load_or_convert_to_dataframe(INSTRUCTIONS).merge(frame, on=["instruction"])
    assert joined["instruction"].tolist() == [row["instruction"] for row in INSTRUCTIONS]


@pytest.mark.filterwarnings("ignore")
def test_fastchat_reads_the_file(run: Callable[..., int], mt_bench: Path, tmp_path: Path) -> None:
    common = pytest.importorskip("fastchat.llm_judge.common")
    from sftmix.questions import MT_BENCH_TEMPERATURES

    assert common.temperature_config == MT_BENCH_TEMPERATURES
    assert run("mt_bench", mt_bench, "mt") == 0
    questions = common.load_questions(str(mt_bench), None, None)
    answers = common.load_model_answers(str(tmp_path / "mt" / "model_answer"))
    judge = common.Judge("judge", {}, ref_based=False)
    common.check_data(questions, answers, {}, ["toy"], {"default": judge})
    assert all(len(answers["toy"][q["question_id"]]["choices"][0]["turns"]) == 2 for q in questions)
