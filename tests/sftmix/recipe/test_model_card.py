"""The model card: metadata that the Hub reads, figures that were measured, no local paths."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from sftmix.cli import main
from sftmix.recipe.model_card import LAST, model_card, public_name
from sftmix.training.saving import save_final_model
from tests.sftmix import tiny

RECIPE = {
    "model": "org/base",
    "data": ["org/instructions", "/home/someone/secret/more.jsonl"],
    "method": "ntp",
    "mu": 0.2,
    "learning_rate": 2e-6,
    "data_hash": "0123abcd",
}


def table(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ((?:[^|]|\\\|)+) \|$", card, re.MULTILINE))


def test_the_card_of_a_run(toy_model: Path, toy_data: Path, held_out: Path, tmp_path: Path) -> None:
    words = ["--model", str(toy_model), "--data", str(toy_data), "--use_cpu", "true"]
    words += ["--disable_tqdm", "true", "--learning_rate", "0.01", "--logging_steps", "2"]
    scored, run = tmp_path / "scored", tmp_path / "run"
    assert main(["score", *words, "--output", str(scored)]) == 0
    train = ["train", *words, "--output", str(run), "--num_train_epochs", "1", "--mu", "0.3"]
    train += ["--partition", str(scored / "confidence.parquet"), "--eval_data", str(held_out)]
    assert main(train) == 0
    card = ModelCard.load(run / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["sftmix", "sft"]
    assert card.data.base_model is card.data.datasets is card.data.license is None
    cells = table(card.content)
    manifest = json.loads((run / "manifest.json").read_text())
    for name in ("data_hash", "template_hash", "partition"):
        assert cells[name] == manifest[name]
    for name in ("mu", "alpha", "learning_rate", "seed", "num_examples"):
        assert float(cells[name]) == manifest[name]
    assert (cells["mu"], cells["lr_scheduler_type"]) == ("0.3", "cosine")
    assert cells["confident, unconfident examples"] == "16, 15"
    assert cells["torch"] == manifest["versions"]["torch"]
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    for name in LAST:
        value = [line[name] for line in log if name in line][-1]
        assert float(cells[name]) == pytest.approx(value, rel=1e-5), name
    speeds = [line["tokens_per_second"] for line in log if "tokens_per_second" in line]
    assert float(cells["tokens per second, median"]) == pytest.approx(
        statistics.median(speeds), rel=1e-5
    )
    assert float(cells["peak memory, GiB"]) > 0
    assert 0 < float(cells["seconds of training"]) < 600
    assert "@inproceedings{xiao-etal-2026-sftmix" in card.content
    assert f"`{toy_data.name}`" in card.content
    for path in (tmp_path, toy_model.parent, toy_data.parent):
        assert str(path) not in card.content


def test_names_of_the_hub_stay_and_paths_go(tmp_path: Path) -> None:
    card = ModelCard(model_card(RECIPE, {"torch": "2"}, [], seconds=1.5))
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["org/instructions"]
    assert card.data.tags == ["sft"]
    assert "`org/instructions`, `more.jsonl`" in card.content
    assert "someone" not in card.content
    cells = table(card.content)
    assert cells["learning_rate"] == "2e-06"
    assert "mu" not in cells
    assert "@inproceedings" not in card.content
    levels = {"level 1": 3, "level 2": 3, "level 3": 2}
    mixed = model_card({**RECIPE, "method": "sftmix"}, {}, [], seconds=1.5, subsets=levels)
    assert "| level 1, level 2, level 3 examples | 3, 3, 2 |" in mixed
    for name, shown in (
        ("gpt2", "gpt2"),
        ("org/name-1.5", "org/name-1.5"),
        (str(tmp_path), tmp_path.name),
        ("./models/own", "own"),
        ("~/models/own", "own"),
        ("rows.jsonl", "rows.jsonl"),
        ("a/b/c", "c"),
    ):
        assert public_name(name) == shown


# Names that others gave

HOSTILE = (
    "![x](https://host/pixel.png)",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "line\nbreak\r\n---\n# heading",
    "```\nfence",
    "tick ` and `` two",
    "`",
    "***",
    "[link](javascript:alert(1))",
    "&lt;script&gt;",
    "\x1b[31mred\u202etxt\u2028x",
    "\\`*[]<>|",
)


def rendered(card: str) -> str:
    """The card's body as HTML."""
    markdown_it = pytest.importorskip("markdown_it")
    html: str = markdown_it.MarkdownIt("commonmark").enable("table").render(ModelCard(card).content)
    return html


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text(name: str) -> None:
    recipe = {
        **{
            "model": name,
            "data": [name, f"x{name}"],
            "method": "sftmix",
            "select": [f"keys:{name}"],
        },
        **{"attn_implementation": name, "lora_targets": [name], "revision": name},
    }
    plain_names = {key: "./name" for key in ("model", "attn_implementation", "revision")}
    calm = {**recipe, **plain_names, "data": ["./a", "./b"], "select": ["c"], "lora_targets": ["d"]}
    versions, subsets = {name: name}, {name: 3}
    card = model_card(recipe, versions, [], seconds=1.5, subsets=subsets)
    other = model_card(calm, {"torch": "2"}, [], seconds=1.5, subsets={"level 1": 3})
    assert ModelCard(card).data.to_dict() == ModelCard(other).data.to_dict()
    assert card.count("\n") == other.count("\n")
    assert "\x1b" not in card
    assert "\u202e" not in card
    html = rendered(card)
    tags = [re.findall(r"<(/?\w+)", text) for text in (html, rendered(other))]
    assert tags[0] == tags[1]
    assert "<img" not in html


TEMPLATE = "{%- for m in messages -%}<|{{ m.role }}|>{{ m.content }}<|end|>{%- endfor -%}"


@pytest.mark.parametrize("extra", ["", "{# ``` #}", "{# ````\n# heading #}", "{# \x1b[31m #}"])
def test_the_chat_template_is_shown(extra: str, toy_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.chat_template = TEMPLATE + extra
    card = model_card(RECIPE, {}, [], seconds=1.0, tokenizer=tokenizer)
    assert "It ends its turns with `<|end|>`." in card
    assert ("\x1b" in card) is False
    html = rendered(card)
    assert html.count("<pre>") == 1
    assert html.count("<h2>") == 4
    assert "&lt;|{{ m.role }}|&gt;" in html
    assert "## Turns" not in model_card(RECIPE, {}, [], seconds=1.0)


def test_a_template_that_wants_more_is_shown(toy_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.chat_template = "{{ raise_exception('tools, please') }}"
    card = model_card(RECIPE, {}, [], seconds=1.0, tokenizer=tokenizer)
    assert "raise_exception('tools, please')" in card
    assert "ends its turns" not in card


def test_any_method_has_words() -> None:
    card = model_card({**RECIPE, "method": "a_new`one"}, {}, [], seconds=1.0)
    assert "by the method ``a_new`one``." in card
    assert "fine-tuned with a_new\\`one" in card


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    names = ["https://me:0123456789abcdef@host/rows.jsonl", "s3://k:word@bucket/x?token=abcd"]
    recipe = {**RECIPE, "data": names, "run_name": "0123456789abcdef", "eval_data": names}
    card = model_card(recipe, {}, [], seconds=1.0)
    for secret in ("0123456789abcdef", "word", "abcd"):
        assert secret not in card.replace("0123abcd", "")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_card_that_peft_writes_is_left_out(tmp_path: Path) -> None:
    """It has nothing in it; ours is written after the model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.build("Llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    tokenizer: Any = SimpleNamespace(save_pretrained=lambda folder: None)
    names = save_final_model(model, tokenizer, tmp_path)
    assert names == ["adapter_model.safetensors", "adapter_config.json"]
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_an_adapter_has_a_card_too() -> None:
    card = ModelCard(model_card(RECIPE, {}, [], seconds=1.0, adapter=True))
    assert card.data.library_name == "peft"
    assert card.content.count("An adapter of `org/base`") == 1
