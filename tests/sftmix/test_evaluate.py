"""The medical evaluation: questions as they are put, accuracies by hand, and what is written down.

Without lm-evaluation-harness, what needs it is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.cli import main
from sftmix.evaluate import merge, table
from sftmix.medical import Score, load, make_tasks, read_questions, require_harness, score

from .conftest import WORDS

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)


def words(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(1, 6)))


# A row with the columns of each data set, and its answer by number.
def medqa(random: np.random.Generator, answer: int) -> dict[str, Any]:
    endings = {f"ending{i}": words(random) for i in range(4)}
    return {"id": "x", "sent1": words(random), "sent2": "", **endings, "label": answer % 4}


def medqa_5(random: np.random.Generator, answer: int) -> dict[str, Any]:
    options = [{"key": key, "value": words(random)} for key in "ABCDE"]
    row = {"meta_info": "step1", "question": words(random), "options": options}
    return {**row, "answer_idx": "ABCDE"[answer % 5], "answer": options[answer % 5]["value"]}


def pubmedqa(random: np.random.Generator, answer: int) -> dict[str, Any]:
    contexts = [words(random) for _ in range(random.integers(1, 4))]
    row = {"QUESTION": words(random), "CONTEXTS": contexts, "YEAR": "2011"}
    return {**row, "final_decision": ("yes", "no", "maybe")[answer % 3]}


def medmcqa(random: np.random.Generator, answer: int) -> dict[str, Any]:
    options = {f"op{letter}": words(random) for letter in "abcd"}
    row = {"id": "x", "question": words(random), **options, "cop": answer % 4}
    return {**row, "choice_type": "single", "exp": None, "topic_name": None}


MAKE: dict[str, Callable[[np.random.Generator, int], dict[str, Any]]] = {
    "medqa": medqa,
    "medqa_5": medqa_5,
    "pubmedqa": pubmedqa,
    "medmcqa": medmcqa,
}


def write(folder: Path, name: str, answers: list[int], **changes: Any) -> dict[str, str]:
    """Files of a task with such answers; the names that `read_questions` gives them."""
    random = np.random.default_rng(0)
    rows = [{**MAKE[name](random, answer), **changes} for answer in answers]
    file = folder / f"{name}.json{'' if name == 'pubmedqa' else 'l'}"
    if name != "pubmedqa":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"file": str(file)}
    ids = folder / "ids.json"
    labelled = {str(number): row for number, row in enumerate(rows)}
    file.write_text(json.dumps({**labelled, "train": MAKE[name](random, 0)}))
    ids.write_text(json.dumps({one: row["final_decision"] for one, row in labelled.items()}))
    return {"file": str(file), "ids": str(ids)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Path:
    """The toy model with weights so large that it prefers some answers to others."""
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    made = AutoModelForCausalLM.from_pretrained(toy_model)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(2 * torch.randn(parameter.shape, generator=random))
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy_model).save_pretrained(folder)
    return folder


PROMPTS = {
    "medqa": (
        {"sent1": "Why?", **{f"ending{i}": f"e{i}" for i in range(4)}, "sent2": "", "label": 2},
        "Question: Why?\nA. e0\nB. e1\nC. e2\nD. e3\nAnswer:",
    ),
    "medqa_5": (
        {
            "question": "Why?",
            "options": [{"key": key, "value": f"o{key}"} for key in "ABCDE"],
            "answer_idx": "E",
        },
        "Question: Why?\nA. oA\nB. oB\nC. oC\nD. oD\nE. oE\nAnswer:",
    ),
    "pubmedqa": (
        {"QUESTION": "Do they?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe"},
        "Abstract: One.\nTwo.\nQuestion: Do they?\nAnswer:",
    ),
    "medmcqa": (
        {"question": "Why?", "opa": "a0", "opb": "b0", "opc": "c0", "opd": "d0", "cop": 0},
        "Question: Why?\nChoices:\nA. a0\nB. b0\nC. c0\nD. d0\nAnswer:",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, tmp_path: Path) -> None:
    row, expected = PROMPTS[name]
    questions = read_questions(name, **write(tmp_path, name, [0], **row))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    template = environment.from_string(questions.config["doc_to_text"])
    assert [template.render(one) for one in questions.documents] == [expected]
    if importlib.util.find_spec("lm_eval") is None:
        return
    (task,) = make_tasks({name: questions}).values()
    choices = task.doc_to_choice(task.eval_docs[0])
    answer = row[questions.config["doc_to_target"]]
    assert task.doc_to_text(task.eval_docs[0]) == expected
    assert task.doc_to_target(task.eval_docs[0]) == answer
    assert choices == (
        ["yes", "no", "maybe"] if name == "pubmedqa" else list("ABCDE"[: len(choices)])
    )
    assert len(choices) == {"medqa_5": 5, "pubmedqa": 3}.get(name, 4)


def test_other_files(tmp_path: Path) -> None:
    row, _ = PROMPTS["medqa_5"]
    first_release = {**row, "options": {one["key"]: one["value"] for one in row["options"]}}
    (tmp_path / "array.json").write_text(json.dumps([first_release]))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    prompts = []
    for file in ("array.json", "rows.parquet"):
        questions = read_questions("medqa_5", str(tmp_path / file))
        template = jinja2.Template(questions.config["doc_to_text"])
        prompts.append(template.render(questions.documents[0]))
    assert prompts == [PROMPTS["medqa_5"][1]] * 2


@pytest.mark.parametrize("name", ["medqa", "medqa_5", "medmcqa"])
def test_data_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([PROMPTS[name][0]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_questions(name).documents) == 1
    assert asked == [
        {
            "medqa": ("GBaker/MedQA-USMLE-4-options-hf", None, "test"),
            "medqa_5": ("fzkuji/MedQA", "med_qa_en_source", "test"),
            "medmcqa": ("openlifescienceai/medmcqa", None, "validation"),
        }[name]
    ]

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way out")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match=rf"give a file as --{name}_data \(no way out\)"):
        read_questions(name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("medqa", {"sent1": None}, r"medqa.jsonl:1: no 'sent1'; the task reads ending0, "),
        ("medqa", {"label": True}, r"'label' must be one of .*, or its number from 0, got True"),
        ("medqa_5", {"answer_idx": "F"}, "'answer_idx' must be one of .*got 'F'"),
        ("medqa_5", {"options": {"A": "yes", "B": "no"}}, r"'options' must have texts for \['A'"),
        ("medqa_5", {"options": dict.fromkeys("ABCDE")}, r"'options' must have texts"),
        ("medqa_5", {"options": ["one", "two"]}, r"'options' must have texts"),
        ("medmcqa", {"cop": 4}, "'cop' must be one of .*got 4"),
        ("medmcqa", {"cop": -1}, "got -1"),
        ("pubmedqa", {"CONTEXTS": None}, "no 'CONTEXTS'"),
        ("pubmedqa", {"CONTEXTS": "one"}, "'CONTEXTS' must be a list of paragraphs, got str"),
    ],
)
def test_bad_rows(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions(name, **write(tmp_path, name, [0], **changes))


def test_ids_choose_and_order_the_questions(tmp_path: Path) -> None:
    files = write(tmp_path, "pubmedqa", [0, 1, 2, 1])
    everything = json.loads(Path(files["file"]).read_text())
    Path(files["ids"]).write_text('["3", "0"]')
    chosen = read_questions("pubmedqa", **files).documents
    assert chosen["QUESTION"][:] == [everything[one]["QUESTION"] for one in "30"]
    for ids, message in {
        '["0", "7", "8"]': "2 of 3 ids of .* are not in .*pubmedqa.json, the first is '7'",
        '{"0": "no"}': "the answer to 0 is 'no' in .* and 'yes' in ",
        '"0"': "must hold ids, got str",
        "[": "not a JSON file",
        "[]": "holds no questions",
    }.items():
        Path(files["ids"]).write_text(ids)
        with pytest.raises(ValueError, match=message):
            read_questions("pubmedqa", **files)
    with pytest.raises(ValueError, match="as --pubmedqa_data and"):
        read_questions("pubmedqa", files["file"])


def test_errors_are_one_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "medqa", [0])["file"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model": "another", "metrics": {}, "details": {}}))
    (tmp_path / "list.json").write_text("[]")
    asked = ["--tasks", "medqa", "--medqa_data"]
    for arguments, message in (
        (["--tasks", "medqa", "usmle"], "expected some of medqa, medqa_5, pubmedqa, medmcqa, got"),
        ([*asked, str(tmp_path / "none.jsonl")], "no such data file: "),
        ([*asked, file, "--limit", "0"], "limit: expected at least 1, got 0"),
        ([*asked, file, "--model", "a/name"], "'a/name' is no folder to put evaluation.json into"),
        ([*asked, file, "--output", str(tmp_path / "no" / "x.json")], "there is no folder"),
        ([*asked, file, "--output", str(other)], "holds the evaluation of 'another'"),
        ([*asked, file, "--output", str(tmp_path / "list.json")], "is no evaluation"),
        ([*asked, file, "--output", file], "is no evaluation"),
    ):
        assert main(["evaluate", "--model", str(model), *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_models_come_from_safetensors_alone(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_help_and_a_missing_harness(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.count("[ours]") == 3
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'sftmix\[eval\]'"):
        require_harness()


def test_scores_are_added_to_those_that_are_there() -> None:
    details = {"limit": None, "apply_chat_template": False, "dtype": "auto"}
    names = ["medqa", "medqa_5", "pubmedqa", "medmcqa"]
    scores = {name: Score(10.0 * i, 1.5, 4, 0, "hash") for i, name in enumerate(names)}
    content: dict[str, Any] = {}
    for name in ("medmcqa", "medqa_5", "medqa"):
        content = merge(content, "model", {name: scores[name]}, {name: details})
    assert content["metrics"] == {"MedQA": 0.0, "MedQA-5": 10.0, "MedMCQA": 30.0}
    content = merge(content, "model", {"pubmedqa": scores["pubmedqa"]}, {"pubmedqa": details})
    assert content["metrics"]["mean"] == 15.0
    assert content["num_examples"] == dict.fromkeys(("MedQA", "MedQA-5", "PubMedQA", "MedMCQA"), 4)
    assert [line.split() for line in table(content).splitlines()[1:]] == [
        ["MedQA", "0.00", "1.50", "4"],
        ["MedQA-5", "10.00", "1.50", "4"],
        ["PubMedQA", "20.00", "1.50", "4"],
        ["MedMCQA", "30.00", "1.50", "4"],
        ["mean", "15.00"],
    ]
    again = {"medqa": Score(50.0, None, 1, 0, "hash")}
    content = merge(content, "model", again, {"medqa": {**details, "limit": 1}})
    assert content["metrics"]["MedQA"] == 50.0
    assert "mean" not in content["metrics"]


def preferred(model: Any, tokenizer: Any, prompt: str, choices: list[str]) -> int:
    """The choice with the largest sum of log-probabilities of its tokens."""
    sums = []
    for choice in choices:
        before, tokens = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {choice}"))
        with torch.no_grad():
            found = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        after = torch.tensor(tokens[1:])[:, None]
        sums.append(float(found.gather(1, after)[len(before) - 1 :].sum()))
    best = sorted(sums)
    assert best[-1] - best[-2] > 1e-3
    return int(np.argmax(sums))


@needs_harness
@pytest.mark.parametrize("name", MAKE)
def test_accuracy_is_that_of_likelihoods_by_hand(name: str, model: Path, tmp_path: Path) -> None:
    loaded, tokenizer = load(str(model))
    assert loaded.dtype == torch.float32
    asked = read_questions(name, **write(tmp_path, name, [0] * 9))
    template = jinja2.Template(asked.config["doc_to_text"])
    choices = asked.config["doc_to_choice"]
    answers = [
        preferred(loaded, tokenizer, template.render(one), choices) for one in asked.documents
    ]
    # Right in six of nine, for choices that are not all the same.
    wrong = [answer + (number % 3 == 2) for number, answer in enumerate(answers)]
    assert len(set(answers)) > 1
    questions = {name: read_questions(name, **write(tmp_path, name, wrong))}
    (found,) = score(loaded, tokenizer, questions, batch_size=4).values()
    rights = np.repeat([1.0, 0.0], [6, 3])
    assert found.accuracy == pytest.approx(100 * rights.mean())
    assert found.stderr == pytest.approx(100 * rights.std(ddof=1) / 3)
    assert (found.num_examples, found.num_cut) == (9, 0)


@needs_harness
def test_the_command(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model, run)
    (run / "notes.txt").write_text("stays")
    flags = []
    for name in MAKE:
        for kind, file in write(tmp_path, name, [0, 1, 2, 3]).items():
            flags += [f"--{name}_{'data' if kind == 'file' else kind}", file]
    common = ["evaluate", "--model", str(run), *flags]
    assert main([*common, "--tasks", "medqa", "medmcqa"]) == 0
    first = json.loads((run / "evaluation.json").read_text())
    assert first["metrics"].keys() == {"MedQA", "MedMCQA"}
    assert main([*common, "--tasks", "pubmedqa", "medqa_5", "medqa_5", "--batch_size", "2"]) == 0
    content = json.loads((run / "evaluation.json").read_text())
    for column in ("metrics", "stderr", "num_examples", "details"):
        assert {name: content[column][name] for name in first[column]} == first[column]
    four = [content["metrics"][name] for name in ("MedQA", "MedQA-5", "PubMedQA", "MedMCQA")]
    assert content["metrics"]["mean"] == pytest.approx(sum(four) / 4)
    assert f"mean     {sum(four) / 4:9.2f}" in capsys.readouterr().out
    detail = content["details"]["PubMedQA"]
    assert (detail["task"], detail["batch_size"]) == ("sftmix_pubmedqa", 2)
    assert {"lm_eval", "transformers", "torch"} <= detail["versions"].keys()

    caplog.clear()
    long = write(tmp_path, "medqa", [0, 1], sent1=" ".join(["one"] * 400))["file"]
    again = [*common, "--tasks", "medqa", "--medqa_data", long, "--limit", "1"]
    assert main([*again, "--apply_chat_template"]) == 0
    changed = json.loads((run / "evaluation.json").read_text())
    assert "mean" not in changed["metrics"]
    assert (changed["num_examples"]["MedQA"], changed["stderr"]["MedQA"]) == (1, None)
    assert changed["details"]["MedQA"]["num_cut"] == 1
    assert "MedQA: 1 of 1 prompts exceed the model's context of 256 tokens" in caplog.text
    assert main(again) == 0
    plain = json.loads((run / "evaluation.json").read_text())["details"]["MedQA"]["prompts_hash"]
    assert plain != changed["details"]["MedQA"]["prompts_hash"]
    assert changed["details"]["PubMedQA"] == detail
    expected = {path.name for path in model.iterdir()} | {"notes.txt", "evaluation.json"}
    assert {path.name for path in run.iterdir()} == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(tmp_path: Path, model: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).eval()
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    loaded, tokenizer = load(str(tmp_path))
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected, found = adapted(tokens).logits, loaded(tokens).logits
        assert torch.equal(found, expected)
        assert not torch.allclose(found, load(str(model))[0](tokens).logits)
    if importlib.util.find_spec("lm_eval") is not None:
        questions = {"medqa": read_questions("medqa", **write(tmp_path, "medqa", [0, 1, 2]))}
        (one,) = score(loaded, tokenizer, questions, batch_size=3).values()
        assert one.num_examples == 3
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(OSError, match=r"has no adapter_model\.safetensors"):
        load(str(tmp_path))


def test_real_pubmedqa() -> None:
    file, ids = (REAL_DATA / f"pubmedqa_{name}.json" for name in ("pqal", "test_ground_truth"))
    if not (file.is_file() and ids.is_file()):
        pytest.skip("needs ../shared/data/pubmedqa_*.json")
    questions = read_questions("pubmedqa", str(file), str(ids))
    assert questions.documents["final_decision"][:] == list(json.loads(ids.read_text()).values())
    assert len(questions.documents) == 500
    assert {len(one) > 0 for one in questions.documents["CONTEXTS"]} == {True}
