"""`sftmix preview` from end to end, and what `train` prints and keeps of the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sftmix.cli import main
from sftmix.data.examples import load_examples
from sftmix.pairs.partition import from_scores, write_partition
from tests.sftmix.chats import CHATML

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ROWS = [
    {
        "id": "r1",
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "messages": [
            {"role": "user", "content": "one <script>alert(1)</script>", "lang": "en"},
            {"role": "assistant", "content": "two \x1b[31m hf_abcdefghijklmnopqrst"},
        ],
    },
    {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": ""}]},
    {
        "messages": [
            {"role": "user", "content": "five"},
            {"role": "assistant", "content": "owl " * 99},
        ]
    },
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "heron"}]},
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "heron"}]},
]


@pytest.fixture
def words(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command over five rows, of which the second is bad and the third is cut.

    The model's folder has no weights.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copytree(toy_model, "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("chat.jinja").write_text(CHATML)
    model = ["--model", "model", "--chat_template", "chat.jinja", "--data", "rows.jsonl"]
    limits = ["--max_length", "120", "--on_bad_row", "skip", "--disable_tqdm", "true"]
    return ["preview", *model, *limits, "--use_cpu", "true"]


@pytest.fixture
def partition(words: list[str]) -> list[str]:
    """The option that names a partition of the four good rows: 0 and 3, 2 and 4."""
    good = load_examples(["rows.jsonl"], on_bad_row="skip", quiet=True)
    scores = [[1.0], [9.0], [2.0], [3.0]]
    hashes = [one.content_hash for one in good]
    made = from_scores([one.id for one in good], hashes, [2, 2, 2, 2], scores)
    write_partition(Path("confidence.parquet"), made)
    return ["--partition", "confidence.parquet"]


def test_a_preview(
    words: list[str], partition: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ["--per_device_train_batch_size", "4", "--number", "2"]
    assert main([*words, *batch, *partition, "--html", "new/page.html"]) == 0
    text = capsys.readouterr().out
    first = re.search(r"Example 0, rows.jsonl:1: .*\n((?:  .*\n)+)", text)
    assert first is not None
    assert "  one <script>alert(1)</script>" in first[1]
    assert r"⟦two \x1b[31m ***" in first[1]
    assert "not used: 'messages[].lang', 'id'" in first[1]
    assert "Example 2, rows.jsonl:3: 120 tokens, " in text
    assert "✂ --max_length 120 cuts off " in text
    assert "Example 3" not in text
    summary = text[text.index("Summary of --data") :]
    for line in (
        "  read        5 rows: 'rows.jsonl' 5\n",
        "  refused     1 rows, which are left out\n",
        "              1 like rows.jsonl:2: ",
        "  duplicates  1 of 5 rows have the content of an earlier one, and are learnt again: the ",
        "  not used    'messages[].lang' 1, 'id' 1\n",
        "  cut         1 of 4 examples (25.0%) lose their end at --max_length 120\n",
    ):
        assert line in summary
    lam = r"lam 0\.\d{4}: rows.jsonl:\d \(confident\), \d+ tokens to learn"
    assert len(re.findall(rf"  {lam}\n    with rows.jsonl:\d \(unconfident\), \d+; ", text)) == 2
    assert re.search(r"      row \d+ +'.+' +with  row \d+ +'.+'\n", text)
    page = Path("new/page.html").read_text(encoding="utf-8")
    assert page.count('<div class="tokens">') == 2
    assert page.count("<details>") == 2
    assert "<script" not in page
    assert "&lt;" in page
    assert "hf_abc" not in page
    assert "\x1b" not in page
    assert not re.search(r"""(?:src|href)=|url\(|@import""", page)
    # All of the tokens are there, those that are cut off too.
    cut = int(re.search(r"cuts off (\d+) tokens", text)[1])  # type: ignore[index]
    assert len(re.findall(r'<span class="cut', page)) == cut


@pytest.mark.parametrize(
    ("flags", "says", "shown"),
    [
        (["--number", "0"], "No pairs are shown: --partition RUN/confidence.parquet of `sftmix", 0),
        (["--partition", "s/c.parquet"], "--partition s/c.parquet is not there; `sftmix score`", 3),
        (["--number", "99", "--method", "ntp"], "--method ntp mixes no pairs.", 4),
        (["--eval_data", "rows.jsonl"], "Summary of --eval_data read 5 rows: 'rows.jsonl' 5", 3),
        (["--select", "longest:2"], "selected 2 of 4 rows (longest:2)", 2),
        (
            ["--number", "9", "--data", "rows.jsonl", "more.jsonl", "--weights", "2", "1"],
            "mixture 6 examples: rows.jsonl: 4 examples; more.jsonl: 1 examples x 2",
            5,
        ),
    ],
)
def test_other_numbers_and_methods(
    words: list[str], capsys: pytest.CaptureFixture[str], flags: list[str], says: str, shown: int
) -> None:
    Path("more.jsonl").write_text(json.dumps(ROWS[0]))
    assert main([*words, *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert says in text
    assert len(re.findall(r"Example \d", text)) == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--number", "-1"], "--number: expected at least 0, got -1"),
        (["--html", "rows.jsonl"], "--html: rows.jsonl exists; delete it or choose another"),
        (["--html", "."], "--html: expected a file, got the folder '.'"),
        (["--html", ""], "--html: expected a file, got the folder ''"),
        (["--html", "rows.jsonl/page.html"], "--html: file exists: 'rows.jsonl'"),
        (["--on_bad_row", "error"], "--data: rows.jsonl:2: "),
        (["--per_device_train_batch_size", "3"], "--per_device_train_batch_size: expected an even"),
        (["--per_device_train_batch_size", "6"], "--per_device_train_batch_size: expected at mo"),
        (["--eval_data", "typo.jsonl"], "--eval_data: no such data file: typo.jsonl"),
        (["--data", "typo.jsonl"], "--data: no such data file: typo.jsonl"),
        (["--nmber", "1"], "--nmber: sftmix preview has no such option; did you mean --number?"),
    ],
)
def test_refusals(
    words: list[str],
    partition: list[str],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert main([*words, *partition, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sftmix preview: error: {message}")
    assert error.count("\n") == 1


def test_training_prints_one_example_and_keeps_the_numbers(
    toy_model: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", *words[1:], "--model", str(toy_model), "--output", "run", "--max_steps", "1"]
    train += ["--method", "ntp", "--save_strategy", "no", "--eval_data", "rows.jsonl"]
    assert main(train) == 0
    printed = capsys.readouterr()
    assert len(re.findall(r"Example \d", printed.out)) == 1
    assert re.findall(r"Summary of (\S+)", printed.out) == ["--eval_data", "--data"]
    for once in ("refused", "not used", "lose their end"):
        assert printed.out.count(f"  {once} ") + printed.out.count(once + " at") == 2
        assert once not in printed.err
    found = json.loads(Path("run/manifest.json").read_text())["reading"]
    assert found["data"] == found["eval_data"]
    tokens = found["data"].pop("tokens")
    assert found["data"] == {
        "rows": {"rows.jsonl": 5},
        "refused": 1,
        "forgiven": {},
        "unused": {"id": 1, "messages[].lang": 1},
        "duplicates": 1,
        "cut": 1,
    }
    assert tokens["longest"] == 120
    assert 0 < tokens["learnt"] < tokens["all"]
