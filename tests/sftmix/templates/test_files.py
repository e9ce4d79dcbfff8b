"""`--chat_template`: what it may name, and that every command uses it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sftmix.cli import main
from sftmix.templates.chat import template_hash
from sftmix.templates.files import read_template
from tests.sftmix import chats
from tests.sftmix.chats import tokenizer_of

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jinja"
    path.write_text(chats.WORDS)
    return path


def test_files_and_folders(tmp_path: Path, file: Path) -> None:
    assert read_template(str(file)) == chats.WORDS
    file.write_bytes(b"\xef\xbb\xbf" + chats.WORDS.encode())
    assert read_template(str(file)) == chats.WORDS
    tokenizer_of(chats.CHATML).save_pretrained(tmp_path / "model")
    assert read_template(str(tmp_path / "model")) == chats.CHATML
    old = tmp_path / "old"
    old.mkdir()
    config = old / "tokenizer_config.json"
    both = [
        {"name": "default", "template": chats.GEMMA},
        {"name": "tool_use", "template": chats.LLAMA3},
    ]
    for found in (chats.GEMMA, both, {"default": chats.GEMMA, "rag": "x"}):
        config.write_text(json.dumps({"chat_template": found}))
        assert read_template(str(old)) == read_template(str(config)) == chats.GEMMA
    (old / "chat_template.json").write_text(json.dumps({"chat_template": chats.PHI3}))
    assert read_template(str(old)) == chats.PHI3


REFUSED: dict[str, tuple[Any, str]] = {
    "none": (None, "there is no file or folder"),
    "empty": (" \n", "expected a template, .* is empty"),
    "syntax": ("a\n{% if %}", r"is no Jinja template: .*\(line 2 of the template\)"),
    "not UTF-8": (b"\xff", "is not UTF-8"),
    "long": ("a" * 2**21, "expected at most"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_template(name: str, tmp_path: Path) -> None:
    content, reason = REFUSED[name]
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"chat_template: .*{reason}"):
        read_template(str(path))


def test_named_templates_need_a_default(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    both = [{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]
    for found, reason in (
        (both, "no template named default, but rag, tool_use"),
        ({"rag": "a"}, "no template named default, but rag"),
        (None, "has no chat_template in it"),
        (7, "has no chat_template in it"),
    ):
        config.write_text(json.dumps({"chat_template": found}))
        with pytest.raises(ValueError, match=reason):
            read_template(str(tmp_path))
    config.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_template(str(tmp_path))
    config.unlink()
    with pytest.raises(ValueError, match=r"has none of chat_template\.jinja"):
        read_template(str(tmp_path))


def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jinja")
    for name in (str(tmp_path / "pipe.jinja"), "/dev/zero"):
        with pytest.raises(ValueError, match="chat_template: "):
            read_template(name)


def test_a_name_cannot_write_to_the_terminal(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", toy_model, "--data", toy_data, "--output", tmp_path / "run"]
    words += ["--method", "ntp", "--chat_template", "no\x1b[31mred"]
    assert main(["train", *map(str, words), *QUIET]) == 2
    said = capsys.readouterr().err
    assert "chat_template: there is no file or folder" in said
    assert "\x1b" not in said


def test_train_uses_saves_and_compares_it(
    toy_model: Path,
    toy_data: Path,
    tmp_path: Path,
    file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    words = ["train", "--model", str(toy_model), "--data", str(toy_data), "--output", str(run)]
    words += ["--method", "ntp", *QUIET]
    assert main([*words, "--chat_template", str(file)]) == 0
    saved = AutoTokenizer.from_pretrained(run)
    assert saved.chat_template == chats.WORDS
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["template_hash"] == template_hash(saved)
    # What is given a model that has it needs it no more.
    again = tmp_path / "again"
    words[words.index(str(run))], words[words.index(str(toy_model))] = str(again), str(run)
    assert main(words) == 0
    assert AutoTokenizer.from_pretrained(again).chat_template == chats.WORDS
    # Resumed under another template it is refused.
    capsys.readouterr()
    assert main([*words, "--resume", "true", "--chat_template", str(toy_model)]) == 2
    assert "template_hash" in capsys.readouterr().err


def test_generate_asks_in_it(
    answering_model: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps([{"instruction": "owl", "dataset": "x"}]))
    asked: list[str] = []

    def noted(self: Any, batch: Any, prompts: Any, turn: int) -> list[list[int]]:
        asked.extend(self.tokenizer.decode(prompt) for prompt in prompts)
        return [[7]] * len(prompts)

    monkeypatch.setattr("sftmix.evaluation.answering.Answerer.generate", noted)
    words = ["--model", answering_model, "--format", "alpaca_eval", "--questions", questions]
    words += ["--output", tmp_path / "a.json", "--max_new_tokens", 4, "--use_cpu", "true"]
    words += ["--disable_tqdm", "true", "--chat_template", file]
    assert main(["generate", *map(str, words)]) == 0
    assert asked == ["Q: owl\nA: "]
    manifest = json.loads((tmp_path / "a.json.run/manifest.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(answering_model)
    tokenizer.chat_template = chats.WORDS
    assert manifest["template_hash"] == template_hash(tokenizer)


def test_evaluate_wants_it_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", str(tmp_path), "--chat_template", "x.jinja"]
    assert main(words) == 2
    assert "chat_template: expected --apply_chat_template with it" in capsys.readouterr().err


# Days

DAYS = "2026-11-28", "2027-03-04"


def test_score_train_and_resume_on_other_days(
    toy_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All read the tokens of the day on which the scoring began."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + chats.WORDS)
    common = ["--model", str(toy_model), "--data", str(toy_data), *QUIET]
    common += ["--chat_template", str(template)]
    read: list[list[int]] = []

    def on(day: str, *words: str) -> str:
        for module in ("score", "train"):
            monkeypatch.setattr(f"sftmix.commands.{module}.today", lambda: day)
        assert main([*words, *common]) == 0
        folder = Path(words[words.index("--output") + 1])
        return str(json.loads((folder / "manifest.json").read_text())["template_date"])

    def noted(*arguments: Any, **options: Any) -> Any:
        from sftmix.templates.tokenizing import tokenize_examples

        data = tokenize_examples(*arguments, **options)
        read.append(data["input_ids"][0])
        return data

    monkeypatch.setattr("sftmix.recipe.loading.tokenize_examples", noted)
    scored, run = str(tmp_path / "scored"), str(tmp_path / "run")
    partition = ["--partition", f"{scored}/confidence.parquet"]
    epoch = ["--num_train_epochs", "1"]
    assert on(DAYS[0], "score", "--output", scored, "--num_scorings", "1") == DAYS[0]
    assert on(DAYS[1], "train", "--output", run, *partition, *epoch) == DAYS[0]
    assert on(DAYS[1], "train", "--output", run, "--resume", "true", *partition, *epoch) == DAYS[0]
    assert read[0] == read[1] == read[2]
    other = str(tmp_path / "other")
    assert on(DAYS[1], "train", "--output", other, "--method", "ntp", *epoch) == DAYS[1]
    assert read[3] != read[0]
