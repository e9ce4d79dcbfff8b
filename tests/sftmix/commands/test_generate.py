"""`sftmix generate`: the files it reads and writes, what it refuses, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sftmix.cli import main
from sftmix.commands.generate import GenerateArguments
from sftmix.evaluation.answering import Answerer, Decoding
from sftmix.evaluation.questions import MT_BENCH_TEMPERATURES, Answer, Question, read_questions

REAL_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
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
def run(answering_model: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs `sftmix generate` with short answers; flags come last and override."""

    def command(
        form: str, questions: Path, output: str, *flags: str, model: Path = answering_model
    ) -> int:
        words = ["--model", str(model), "--format", form, "--questions", str(questions)]
        words += ["--output", str(tmp_path / output), "--max_new_tokens", "6", "--batch_size", "2"]
        quiet = ["--name", "toy", "--use_cpu", "--disable_tqdm"]
        return main(["generate", *words, *quiet, *flags])

    return command


@pytest.fixture
def tokenizer(answering_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(answering_model)
    return loaded


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """What a refused command printed, in one line."""
    error = capsys.readouterr().err
    assert code == 2
    lines = [line for line in error.splitlines() if line.startswith("sftmix generate: error: ")]
    assert len(lines) == 1, error
    assert error.endswith(lines[0] + "\n")
    return lines[0]


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
    assert run("mt_bench", mt_bench, "killed") == 130
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


def test_what_is_refused_leaves_no_run(
    run: Callable[..., int], answering_model: Path, alpaca: Path, tmp_path: Path
) -> None:
    """A model with no weights, and no room for the questions: the next try need not resume."""
    model = tmp_path / "model"
    shutil.copytree(answering_model, model)
    (model / "model.safetensors").write_bytes(b"cut off")
    assert run("alpaca_eval", alpaca, "out.json", model=model) == 2
    assert run("alpaca_eval", alpaca, "out.json", "--max_new_tokens", "250") == 2
    assert run("alpaca_eval", alpaca, "out.json") == 0


def test_a_partial_run_of_something_else_is_refused(
    run: Callable[..., int],
    answering_model: Path,
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
    shutil.copytree(answering_model, model)
    with monkeypatch.context() as patched:
        patched.setattr(Answerer, "answer", interrupted)
        assert run("alpaca_eval", alpaca, "out.json", model=model) == 130
    assert "already holds a run" in again()
    for flag, value in (
        ("--seed", "1"),
        ("--temperature", "0"),
        ("--max_new_tokens", "7"),
        ("--top_k", "0"),
        ("--name", "other"),
        ("--dtype", "float32"),
    ):
        assert f"was started with {flag[2:]} = " in again("--resume", flag, value)
    weights = load_file(model / "model.safetensors")
    changed = {**weights, "lm_head.weight": -weights["lm_head.weight"]}
    save_file(changed, model / "model.safetensors")
    error = again("--resume")
    assert "was started with model_hash = " in error
    assert "(model.safetensors differs)" in error
    shutil.copy(answering_model / "model.safetensors", model)
    alpaca.write_text(json.dumps(INSTRUCTIONS[:4]))
    assert "was started with questions_hash = " in again("--resume")
    alpaca.write_text(json.dumps(INSTRUCTIONS))
    partial = tmp_path / "out.json.run" / "answers.jsonl"
    partial.write_text('{"key": 1}\n')
    assert f"{partial} is damaged" in again("--resume")
    partial.unlink()
    # A model of equal content is the same, wherever it lies.
    assert run("alpaca_eval", alpaca, "out.json", "--resume") == 0
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
        (["--name", "a/b"], "name: expected a name that a file can have, got 'a/b'"),
        (["--output", str(tmp_path / "out.jsonl")], "ends in .json, got"),
        (["--questions", str(tmp_path / "no.json")], "no such data file"),
        (["--questions", str(empty)], "holds no questions"),
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
    need = re.search(r"question 84 needs (\d+) positions with answers of 100 .* has 256", error)
    assert need
    # Written again as text, an answer may be of some more tokens.
    left = str(90 - -(-(int(need[1]) - 256) // 2))
    assert not (tmp_path / "mt").exists()
    assert run("mt_bench", mt_bench, "mt", "--max_new_tokens", left) == 0


def test_empty_answers_and_cut_ones_are_counted(
    run: Callable[..., int],
    answering_model: Path,
    tokenizer: PreTrainedTokenizerBase,
    alpaca: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = Answerer(AutoModelForCausalLM.from_pretrained(answering_model), tokenizer, Decoding(6))
    question = Question("two", ("two",), 0.0)
    first = one.generate([question], [one.prompt(question, [])], 0)[0][0]
    model = tmp_path / "model"
    shutil.copytree(answering_model, model)
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
    answering_model: Path,
    alpaca: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(answering_model)
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    lora = peft.LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(base, lora)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapted.save_pretrained(adapter)
    adapted.merge_and_unload().save_pretrained(merged)
    for path in (adapter, merged):
        AutoTokenizer.from_pretrained(answering_model).save_pretrained(path)
    for name, model in (("adapter", adapter), ("merged", merged), ("base", answering_model)):
        assert run("alpaca_eval", alpaca, f"{name}.json", model=model) == 0
    texts = [(tmp_path / f"{name}.json").read_text() for name in ("adapter", "merged", "base")]
    assert texts[0] == texts[1] != texts[2]
    # Without safetensors PEFT would open a pickle.
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    capsys.readouterr()
    assert "adapter_model.bin is a pickle, which could run code, and is not opened" in refused(
        capsys, run("alpaca_eval", alpaca, "pickled.json", model=adapter)
    )


# The real questions and the real readers


def test_the_real_questions() -> None:
    names = ("alpaca_eval_instructions.json", "mt_bench_question.jsonl")
    if missing := [name for name in names if not (REAL_DATA / name).is_file()]:
        pytest.skip(f"needs ../shared/data/{missing[0]}")
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
    assert common.temperature_config == MT_BENCH_TEMPERATURES
    assert run("mt_bench", mt_bench, "mt") == 0
    questions = common.load_questions(str(mt_bench), None, None)
    answers = common.load_model_answers(str(tmp_path / "mt" / "model_answer"))
    judge = common.Judge("judge", {}, ref_based=False)
    common.check_data(questions, answers, {}, ["toy"], {"default": judge})
    assert all(len(answers["toy"][q["question_id"]]["choices"][0]["turns"]) == 2 for q in questions)
