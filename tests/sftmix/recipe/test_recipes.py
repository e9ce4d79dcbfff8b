"""Every recipe runs as it stands: the commands' own parsers, tiny models and rows, two steps.

The recipes' folders lie below the working directory, their data sets are put in the hub's place,
and `--model` names a tiny model of the same family.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from transformers import AutoTokenizer

from sftmix.cli import main
from sftmix.commands.evaluate import EvaluateArguments
from sftmix.commands.generate import GenerateArguments
from sftmix.pairs.partition import read_partition
from sftmix.recipe.arguments import parse_alone
from sftmix.recipe.config_file import read_config
from sftmix.report.paper import ROWS
from sftmix.toy import build_toy_model
from tools import families
from tools.recipes_page import page

pytest.importorskip("peft")
# PEFT asks for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

FOLDER = Path(__file__).parents[3] / "recipes"
SHARED = {"paper", "medalpaca"}  # included by others, no recipes
RECIPES = sorted({path.stem for path in FOLDER.glob("*.yaml")} - SHARED)

MODELS = {
    "meta-llama/Llama-3.1-8B": "llama",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "Qwen/Qwen2.5-14B": "qwen2",
    "google/gemma-2-2b": "gemma2",
}
MEDICAL = (
    *("medical_flashcards", "wikidoc", "wikidoc_patient_information", "medqa", "mediqa"),
    *("mmmlu", "health_advice", "pubmed_causal"),
)
DATA = {
    "Alpaca-52K": ["tatsu-lab/alpaca"],
    "MedAlpaca-263K": [f"medalpaca/medical_meadow_{name}" for name in MEDICAL],
}
# What the paper says, and a batch of 32 on 8 GPUs.
PAPER = {
    "learning_rate": 2e-6,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "optim": "adamw_torch_fused",
    "per_device_train_batch_size": 4,
    "mu": 0.2,
    "alpha": 0.5,
}
OURS = {"max_length": 2048, "bf16": True, "seed": 0, "lambda_scope": "pair", "dtype": "float32"}
LORA = {
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_targets": ["all-linear"],
    "learning_rate": 2e-4,
    "dtype": "bfloat16",
}
# What a recipe selects from, and how many rows that leaves.
SELECTED = {"long": (["longest:18"], 18), "alpagasus": (["keys:chatgpt_9k.json"], 20)}
# The first is empty, as some of Alpaca's are. Rows of one length are scored together.
REPLIES = ["", *(f"bee {n:02}" if n % 3 else f"a bee sees boat {n:02}" for n in range(24))]


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows with the columns that the set has on the hub."""
    if name == "HuggingFaceH4/ultrachat_200k":
        return [
            {
                "prompt": f"say {n:02}",
                "prompt_id": str(n),
                "messages": turns(f"say {n:02}", reply, "and", reply),
            }
            for n, reply in enumerate(REPLIES)
        ]
    if name == "allenai/tulu-3-sft-mixture":
        return [
            {"id": f"x_{n}", "messages": turns(f"say {n:02}", reply), "source": "x"}
            for n, reply in enumerate(REPLIES)
        ]
    if name == "tatsu-lab/alpaca":
        rows = [
            {"instruction": f"say {n:02}", "input": "", "output": reply}
            for n, reply in enumerate(REPLIES)
        ]
        return [{**row, "text": f"{row['instruction']} {row['output']}"} for row in rows]
    assert name.startswith("medalpaca/medical_meadow_")
    return [
        {"input": f"what is {name} {reply}", "output": reply, "instruction": "Answer this question"}
        for reply in REPLIES[:4]
    ]


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [
        {"content": content, "role": role} for content, role in zip(contents, roles, strict=False)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with models in it, and data sets in the hub's place."""
    folder = tmp_path_factory.mktemp("recipes")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows_of("tatsu-lab/alpaca")[1:]))
    for number, family in enumerate(MODELS.values()):
        toy, model = folder / f"toy-{family}", folder / family
        sizes = {"hidden_size": 4, "num_layers": 1, "num_heads": 1}
        build_toy_model(toy, [text], vocab_size=260 + 4 * number, **sizes)
        tokenizer = AutoTokenizer.from_pretrained(toy)
        # Qwen's class of tokenizers adds a token when the tokenizer is loaded as that of the model.
        tiny = families.build(family, vocab_size=len(tokenizer) + 1, num_hidden_layers=1)
        tiny.save_pretrained(model)
        tokenizer.save_pretrained(model)
    kept = rows_of("tatsu-lab/alpaca")[3:23]
    (folder / "chatgpt_9k.json").write_text(json.dumps(kept))

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        assert split == ("train_sft" if "ultrachat" in name else "train")
        return datasets.Dataset.from_list(rows_of(name))

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(datasets, "load_dataset", load_dataset)
        patched.setattr("sftmix.data.hub.is_reached", lambda path, revision: True)
        yield folder


def words(command: str, recipe: str, *flags: str) -> list[str]:
    """A command as the recipe has it, but for the model, the device and the flags."""
    content = read_config(FOLDER / f"{recipe}.yaml")
    model = content[command].get("model", content["model"])
    tiny = ["--model", MODELS[model], "--use_cpu", "true", "--disable_tqdm", "true"]
    if "longest:1000" in content.get("select", []):
        tiny += ["--select", "longest:18"]
    return [command, "--config", str(FOLDER / f"{recipe}.yaml"), *tiny, *flags]


def manifest(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "manifest.json").read_text())


@pytest.fixture
def scored(place: Path) -> Callable[[str], dict[str, Any]]:
    """Scores as a recipe says, once for all that share the run; gives its manifest."""

    def score(recipe: str) -> dict[str, Any]:
        output = read_config(FOLDER / f"{recipe}.yaml")["score"]["output"]
        if not os.path.exists(output):
            assert main(words("score", recipe, "--checkpoint_scorings", "false")) == 0
        return manifest(output)

    return score


def assert_has(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_scores_and_trains(recipe: str, scored: Callable[[str], dict[str, Any]]) -> None:
    content = read_config(FOLDER / f"{recipe}.yaml")
    reference = scored(recipe)
    run = content["train"]["output"]
    assert main(words("train", recipe, "--max_steps", "2", "--save_strategy", "no")) == 0
    target = manifest(run)
    numbers = PAPER | OURS | (LORA if "lora" in recipe else {})
    assert_has(target, numbers)
    mixup = ("mu", "alpha", "lambda_scope")
    assert_has(reference, {name: numbers[name] for name in numbers if name not in mixup})
    assert_has(reference, {"method": "ntp", "num_scorings": 5, "num_train_epochs": 1})
    epochs = 1 if "ultrachat" in recipe or "tulu3" in recipe else 3
    assert_has(target, {"method": content["train"]["method"], "num_train_epochs": epochs})
    for name in ("data", "data_split", "select", "data_hash"):
        assert target[name] == reference[name]
    select, rows = SELECTED.get(recipe.rpartition("-")[2], (None, 24))
    assert_has(target, {"select": select, "num_examples": rows})
    assert len(read_partition(Path(content["train"]["partition"])).id) == rows
    assert target["partition"] is not None
    assert ("lora_rank" in target) == Path(run, "adapter_config.json").exists()
    assert Path(run, "README.md").exists()


def test_the_papers_rows_are_recipes() -> None:
    for row in ROWS:
        content = read_config(FOLDER / f"{row.recipe}.yaml")
        assert content["model"] == row.model
        assert content["data"] == DATA[row.data]
        assert content["train"]["method"] == row.method
        score, train = content["score"], content["train"]
        assert train["partition"] == f"{score['output']}/confidence.parquet"
        assert "model" not in score


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_trained_is_what_is_evaluated(recipe: str) -> None:
    path = FOLDER / f"{recipe}.yaml"
    run = read_config(path)["train"]["output"]
    config = ["--config", str(path)]
    if "medalpaca" in recipe:
        evaluated = parse_alone(config, EvaluateArguments, "sftmix evaluate")
        assert evaluated.model == run
        return
    files = ["--format", "mt_bench", "--questions", "question.jsonl", "--output", "answers"]
    answering = parse_alone([*config, *files], GenerateArguments, "sftmix generate")
    assert (answering.model, answering.name) == (run, recipe)


def test_no_two_recipes_write_the_same_run() -> None:
    outputs = [read_config(FOLDER / f"{recipe}.yaml")["train"]["output"] for recipe in RECIPES]
    assert len(set(outputs)) == len(outputs)


def test_another_model_is_one_flag(scored: Callable[[str], dict[str, Any]], place: Path) -> None:
    scored("qwen2.5-14b-alpaca")
    recipe = ["train", "--config", str(FOLDER / "qwen2.5-14b-alpaca.yaml"), "--use_cpu", "true"]
    flags = ["--model", "gemma2", "--output", "runs/other", "--max_steps", "1"]
    assert main([*recipe, *flags, "--disable_tqdm", "true"]) == 0
    config = json.loads((place / "runs/other/config.json").read_text())
    assert config["architectures"] == [transformers.Gemma2ForCausalLM.__name__]


def test_the_page_of_recipes() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == page(), "run: python -m tools.recipes_page"
    for recipe in RECIPES:
        base = recipe.removesuffix("-ntp")
        assert f"`{recipe}`" in text or f"| `{base}`, `-ntp` |" in text, recipe
