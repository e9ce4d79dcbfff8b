"""Questions as they are put, and accuracies by hand.

Without lm-evaluation-harness, what needs it is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
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

from sftmix.evaluation.medical import load, make_tasks, read_questions, require_harness, score
from tests.sftmix.medical_data import MAKE, needs_harness, write

REAL_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


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


@needs_harness
@pytest.mark.parametrize("name", ["medqa", "pubmedqa", "medmcqa"])
def test_tasks_are_those_of_the_harness(name: str, tmp_path: Path) -> None:
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    theirs = load_yaml(Path(tasks.__file__).parent / name / f"{name}.yaml")
    questions = read_questions(name, **write(tmp_path, name, [0, 1, 2]))
    (ours,) = make_tasks({name: questions}).values()
    assert theirs["doc_to_choice"] == questions.config["doc_to_choice"]
    assert theirs["test_split"] == questions.config["test_split"]
    assert name == "pubmedqa" or theirs["dataset_path"] == questions.config["dataset_path"]
    for number, row in enumerate(questions.documents):
        target = theirs["doc_to_target"]
        expected = target(row) if callable(target) else row[target]
        assert (ours.doc_to_text(row), ours.doc_to_target(row)) == (
            theirs["doc_to_text"](row),
            expected,
        )
        assert expected in (number, theirs["doc_to_choice"][number])


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
def test_data_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, config: str | None = None, *, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([PROMPTS[name][0]])

    monkeypatch.setattr("sftmix.data.hub.is_reached", lambda path, revision: True)
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
    with pytest.raises(OSError, match=rf"^{name}_data: .* give a file of its rows .*no way out\)"):
        read_questions(name)
    monkeypatch.setattr("sftmix.data.hub.is_reached", lambda path, revision: False)
    monkeypatch.setattr("sftmix.data.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(OSError, match=rf"^{name}_data: .* the hub is not reached"):
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


def test_ids_choose_the_questions_in_the_order_of_the_data(tmp_path: Path) -> None:
    files = write(tmp_path, "pubmedqa", [0, 1, 2, 1])
    everything = json.loads(Path(files["file"]).read_text())
    Path(files["ids"]).write_text('["3", "0"]')
    chosen = read_questions("pubmedqa", **files).documents
    assert chosen["QUESTION"][:] == [everything[one]["QUESTION"] for one in "03"]
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


def test_models_come_from_safetensors_alone(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


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
        ((_, one),) = score(loaded, tokenizer, questions, batch_size=3)
        assert one.num_examples == 3
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(OSError, match=r"has no adapter_model\.safetensors"):
        load(str(tmp_path))


def test_a_missing_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'lm_eval\[hf\]>=0.4.13'"):
        require_harness()


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
    wrong = [(one + (i % 3 == 2)) % len(choices) for i, one in enumerate(answers)]
    assert len(set(answers)) > 1
    questions = {name: read_questions(name, **write(tmp_path, name, wrong))}
    ((_, found),) = score(loaded, tokenizer, questions, batch_size=4)
    rights = np.repeat([1.0, 0.0], [6, 3])
    assert found.accuracy == pytest.approx(100 * rights.mean())
    assert found.stderr == pytest.approx(100 * rights.std(ddof=1) / 3)
    assert (found.num_examples, found.num_cut) == (9, 0)


def test_real_pubmedqa() -> None:
    file, ids = (REAL_DATA / f"pubmedqa_{name}.json" for name in ("pqal", "test_ground_truth"))
    if not (file.is_file() and ids.is_file()):
        pytest.skip("needs ../shared/data/pubmedqa_*.json")
    questions = read_questions("pubmedqa", str(file), str(ids))
    answers = questions.documents["final_decision"][:]
    assert sorted(answers) == sorted(json.loads(ids.read_text()).values())
    assert set(answers[:50]) == {"yes", "no", "maybe"}
    assert len(questions.documents) == 500
    assert {len(one) > 0 for one in questions.documents["CONTEXTS"]} == {True}
