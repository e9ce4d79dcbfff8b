"""What is printed of examples, and the summary of what was read."""

from __future__ import annotations

import datasets
import pytest
from rich.cells import cell_len
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from sftmix.data.rows import BadRowError
from sftmix.data.summary import Reading
from sftmix.recipe.preview import RUNS_SHOWN, Lengths, Screen, elided, runs_of, summary
from sftmix.templates.view import view
from tests.sftmix.chats import CHATML, example, said, tokenizer_of, user


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    return tokenizer_of(CHATML)


def printed(
    capsys: pytest.CaptureFixture[str], *messages: dict[str, object], most: int = 4096
) -> str:
    Screen().example(view(example(*messages), tokenizer_of(CHATML), most))
    return capsys.readouterr().out


def test_learnt_text_is_marked_and_special_tokens_and_breaks_are_visible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert printed(capsys, user("one\ntwo"), said("the\tanswer \x1b[31m\u202e")) == (
        "\nExample 0, rows.jsonl:1: 35 tokens, 14 learnt (40%)\n"
        "  <|im_start|>user↵\n  one↵\n  two<|im_end|>↵\n  <|im_start|>assistant↵\n"
        "  ⟦the⇥   answer \\x1b[31m\\u202e<|im_end|>⟧↵\n"
    )


def test_colours_are_for_terminals_that_want_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = printed(capsys, user("one"), said("two"))
    assert "\x1b[" in coloured
    assert "⟦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦two" in printed(capsys, user("one"), said("two"))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = printed(capsys, user("船の料理人 " * 30), said("-" * 300 + " there " * 40))
    _, _, *lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert max(map(cell_len, lines)) > width - 12
    assert not any(line.endswith(" ") for line in lines)


def test_the_midst_of_a_long_text_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    shown = view(example(user("one"), said("there " * 1000)), tokenizer_of(CHATML), 400)
    left = [run for run in elided(runs_of(shown)) if run.kind == "note"]
    [learnt, cut, after] = [run.note for run in left]
    kept = sum(len(run.tokens) for run in elided(runs_of(shown)))
    assert cut.startswith("✂ --max_length 400 cuts off ")
    hidden = [int(note.split()[1].replace(",", "")) for note in (learnt, after)]
    assert kept + sum(hidden) == len(shown.tokens)
    text = printed(capsys, *shown.example.messages, most=400)
    assert [line.strip() for line in text.splitlines() if line[2:3] in {"…", "✂"}] == [
        learnt,
        cut,
        after,
    ]


def test_the_midst_of_many_turns_is_counted() -> None:
    turns = [user("one"), said("two")] * 30
    shown = view(example(*turns), tokenizer_of(CHATML), 4096)
    runs = list(elided(runs_of(shown)))
    assert len(runs) == 2 * RUNS_SHOWN + 1
    left = len(shown.tokens) - sum(len(run.tokens) for run in runs)
    learnt = shown.learnt - sum(token.learnt for run in runs for token in run.tokens)
    assert runs[RUNS_SHOWN].note == f"… {left:,} tokens, {learnt:,} of them learnt …"


def dataset(*lengths: int, prompt: int = 2) -> datasets.Dataset:
    rows = [[1] * length for length in lengths]
    labels = [[7] + [-100] * (prompt - 1) + row[prompt:] for row in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})


def test_lengths_are_counted_without_the_first_label() -> None:
    lengths = Lengths.of(dataset(*range(3, 103)))
    assert lengths == Lengths(5250, 5250 - 200, (7, 52, 97), 102)
    assert lengths.numbers() == {
        "all": 5250, "learnt": 5050, "p5": 7, "p50": 52, "p95": 97, "longest": 102
    }  # fmt: skip
    assert Lengths.of(dataset(5)) == Lengths(5, 3, (5, 5, 5), 5)


def test_a_summary_says_all_that_happened_and_nothing_else() -> None:
    reading = Reading()
    reading.rows.update({f"{i}.jsonl": 5 for i in range(25)})
    lengths = Lengths.of(dataset(4, 6))
    assert summary(reading, 2, lengths, 64) == [
        ("read", "125 rows: " + ", ".join(f"'{i}.jsonl' 5" for i in range(20)) + ", and 5 more"),
        ("tokens", "10 in 2 examples; 5 %: 4, 50 %: 4, 95 %: 6; longest: 6"),
        ("learnt", "6 tokens (60.0%)"),
    ]
    for line in range(1, 8):
        for place in range(line):
            reason = f"{'abcdefg'[line - 1]} is missing at {place}"
            reading.refuse(BadRowError("0.jsonl", 10 * line + place, reason))
    reading.forgiven["role 'GPT'"] = 3
    reading.unused.update({"id": 2, "a\x1b[1m": 5})
    reading.duplicates, reading.first_duplicate, reading.cut = 2, ("0.jsonl:3", "0.jsonl:1"), 1
    reading.kept, reading.mixture = 2, "mixture of 9 examples: a.json"
    lines = summary(reading, 2, lengths, 64)
    assert lines[1:-2] == [
        ("mixture", "9 examples: a.json"),
        ("refused", "28 rows, which are left out"),
        *(
            ("", f"{n} like 0.jsonl:{10 * n}: {'abcdefg'[n - 1]} is missing at 0")
            for n in range(7, 2, -1)
        ),
        ("", "3 for 2 other reasons"),
        ("forgiven", "\"role 'GPT'\" 3"),
        (
            "duplicates",
            "2 of 125 rows have the content of an earlier one, and are learnt again: the first is "
            "0.jsonl:3, with that of 0.jsonl:1",
        ),
        ("not used", r"'a\x1b[1m' 5, 'id' 2"),
        ("tokens", "10 in 2 examples; 5 %: 4, 50 %: 4, 95 %: 6; longest: 6"),
    ]
    assert lines[-2:] == [
        ("cut", "1 of 2 examples (50.0%) lose their end at --max_length 64"),
        ("learnt", "6 tokens (60.0%)"),
    ]


def test_a_summary_is_wrapped_under_its_subjects_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [("read", "one two " * 9), ("", "three")]
    Screen().summary("data", lines)
    assert len(capsys.readouterr().out.splitlines()) == 4
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    Screen().summary("data", lines)
    _, _, first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("  read        one two")
    assert len(others) == 3
    assert all(line.startswith(" " * 14) and len(line) <= 40 for line in others)


@pytest.mark.parametrize("text", ["折り返す" * 60, "user 漢字仮名 " * 20, "a" * 30 + "漢" * 100])
def test_wide_characters_fill_the_lines(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.block(Text(text))
    lines = capsys.readouterr().out.splitlines()
    assert all(cell_len(line) <= screen.console.width for line in lines)
    assert len(lines) <= cell_len(text) // (screen.console.width - 20) + 1
