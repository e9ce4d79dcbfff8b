"""`sftmix report` from end to end: toy runs, what is kept of them, and what is missing."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.cli import main
from sftmix.recipe.arguments import TrainRunArguments, parse
from sftmix.recipe.manifest import RECIPE_FIELDS
from sftmix.report import measured as measuring
from sftmix.report import report_runs, tables
from sftmix.report.findings import find
from sftmix.report.measured import ScoresAndMeans, measured, sample_examples
from sftmix.report.runs import read_run, read_runs
from sftmix.runs.folders import lock_run
from sftmix.training.config import SFTMixConfig
from tests.sftmix.report_runs import Page

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_data: Path, held_out: Path
) -> Path:
    """A scored run, and two methods of two seeds; tests that change one take a copy."""
    folder = tmp_path_factory.mktemp("study")
    common = ["--model", str(toy_model), "--data", str(toy_data), *QUIET]
    words = [*common, "--output", str(folder / "scored"), "--num_scorings", "1"]
    assert main(["score", *words]) == 0
    common += ["--partition", str(folder / "scored" / "confidence.parquet"), "--max_steps", "4"]
    common += ["--eval_data", str(held_out), "--save_strategy", "no", "--logging_steps", "2"]
    common += ["--learning_rate", "0.01"]
    for method in ("ntp", "sftmix"):
        for seed in (0, 1):
            words = [*common, "--method", method, "--seed", str(seed)]
            assert main(["train", *words, "--output", str(folder / f"{method}{seed}")]) == 0
    return folder


RUNS = ("scored", "ntp0", "ntp1", "sftmix0", "sftmix1")


def test_a_whole_report(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(study, tmp_path / "study")
    folders = [str(copy / name) for name in RUNS]
    output = tmp_path / "new" / "report.html"
    assert main(["report", *folders, "--output", str(output), "--title", "<b>Mine</b>"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {output}" in printed
    assert "left out" not in printed
    html = output.read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("figure") == 6 + 1 + 2 + 3 + 2
    assert "<b>Mine</b>" in page.texts
    assert "SFTMix: held-out loss" in page.texts
    assert not [link for link in page.values("src", "href") if not link.startswith(("#", "data:"))]
    assert "http" not in "".join(page.values("src", "href", "action"))
    assert any("Training logged a mean of" in text for text in page.texts)
    # Again: from what is kept, without a model.
    for name in ("load_model", "load_trained_model"):
        monkeypatch.setattr(measuring, name, None)
    again = find(read_runs(folders), 1000)
    assert not again.failures
    assert again.after["SFTMix"].keys() == {0, 1}


def test_the_command_that_is_shown_gives_the_recipe(study: Path) -> None:
    run = read_run(study / "sftmix1")
    text = tables.command(run)
    assert all(len(line) < 100 or str(study) in line for line in text.splitlines())
    words = shlex.split(text.replace("\\\n", " "))
    assert words[:4] == ["python", "-m", "sftmix", "train"]
    arguments, config = parse(words[4:] + QUIET, TrainRunArguments, SFTMixConfig, "sftmix train")
    for name in RECIPE_FIELDS:
        if hasattr(config, name):
            assert json.loads(json.dumps(getattr(config, name))) == run.recipe[name], name
    assert (arguments.model, arguments.data) == (run.recipe["model"], run.recipe["data"])
    assert arguments.partition == str(study / "scored" / "confidence.parquet")
    assert (arguments.on_bad_row, arguments.eval_split) == ("error", "train")
    assert {"--on_bad_row", "--eval_split"} <= set(words)


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"task": "Add {0}.", "reply": "{0}"}, ["--columns", "prompt=task,response=reply"]),
        ({"text": "One and {0}."}, ["--train_on", "all"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "Add {0}."},
                    {"role": "user", "content": "Now."},
                    {"role": "assistant", "content": "{0}"},
                ]
            },
            ["--on_bad_row", "mend"],
        ),
    ],
    ids=["columns", "train_on", "mend"],
)
def test_examples_are_read_as_the_run_read_them(
    row: dict[str, Any], flags: list[str], toy_model: Path, tmp_path: Path
) -> None:
    text, data = json.dumps(row), tmp_path / "rows.jsonl"
    data.write_text("\n".join(text.replace("{0}", str(n)) for n in range(8)))
    words = ["--model", str(toy_model), "--data", str(data), *QUIET, "--method", "ntp", *flags]
    words += ["--max_steps", "1", "--save_strategy", "no", "--output", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert len(sample_examples(read_run(tmp_path / "run"), None, None)) == 8


def test_scores_and_means_are_the_models(study: Path, toy_data: Path) -> None:
    run = read_run(study / "sftmix0")
    examples = sample_examples(run, None, 7)
    assert [one.id for one in examples] == [one.id for one in sample_examples(run, None, 7)]
    found = measured(run, "after", examples)
    model = AutoModelForCausalLM.from_pretrained(run.folder).eval()
    tokens = measuring.tokenize_examples(examples, AutoTokenizer.from_pretrained(run.folder))
    for row, example in enumerate(tokens):
        ids, labels = (torch.tensor(example[name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            output = model(ids[None], output_hidden_states=True)
        loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[1:])
        assert found.scores.confidence[row] == pytest.approx(-float(loss.exp()), rel=1e-5)
        # Of the last layer, after the norm: what the head reads to predict a response token.
        mean = output.hidden_states[-1][0, :-1][labels[1:] != -100].mean(dim=0)
        assert found.representations is not None
        assert found.representations[row] == pytest.approx(mean.numpy(), rel=1e-4, abs=1e-5)
    assert found.places is None  # too few for t-SNE
    shutil.rmtree(run.folder / "report")


def test_what_is_kept_belongs_to_its_model_and_examples(study: Path, tmp_path: Path) -> None:
    run = read_run(shutil.copytree(study / "ntp0", tmp_path / "run"))
    cache = run.folder / "report"
    examples = sample_examples(run, None, 5)
    first = measured(run, "after", examples)
    kept = measured(run, "after", examples)
    assert (kept.scores.nll_sum == first.scores.nll_sum).all()
    assert sorted(path.name for path in cache.iterdir()) == [
        ".lock",
        "after.parquet",
        "after.safetensors",
    ]
    assert len(measured(run, "after", examples[:4]).scores.id) == 4
    (cache / "after.safetensors").write_bytes(b"damaged")
    assert len(measured(run, "after", examples).scores.id) == 5
    other = study / "ntp1" / "model.safetensors"
    (run.folder / "model.safetensors").write_bytes(other.read_bytes())
    assert (measured(run, "after", examples).scores.nll_sum != first.scores.nll_sum).any()


def test_what_is_kept_was_made_alike(study: Path, tmp_path: Path) -> None:
    """Of runs from one model: scores in another dtype, or without representations, are others."""
    first, second = (
        read_run(shutil.copytree(study / name, tmp_path / name)) for name in ("ntp0", "ntp1")
    )
    examples = sample_examples(first, None, 5)
    measured(first, "before", examples)
    again = measured(second, "before", examples, [first])
    assert again.representations is not None
    assert not (second.folder / "report").exists()
    slow = replace(second, recipe={**second.recipe, "head": "logits"})
    assert measured(slow, "before", examples, [first]).representations is None
    rounded = replace(second, recipe={**second.recipe, "dtype": "bfloat16"})
    found = measured(rounded, "before", examples, [first])
    assert (found.scores.nll_sum != again.scores.nll_sum).any()


def test_scores_that_cannot_be_kept_are_shown(
    study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = read_run(shutil.copytree(study / "ntp0", tmp_path / "run"))
    examples = sample_examples(run, None, 3)
    cache = run.folder / "report"
    cache.mkdir()
    with lock_run(cache):
        assert len(measured(run, "before", examples).scores.id) == 3
    assert "scores of run are not kept: path: another process is writing" in caplog.text
    assert not list(cache.glob("before.*"))


def test_missing_things_are_sentences(study: Path, tmp_path: Path) -> None:
    names = ("ntp0", "sftmix0", "sftmix1")
    lost, moved, killed = (shutil.copytree(study / name, tmp_path / name) for name in names)
    # Trained by a process that was killed, on data and a partition that are elsewhere now.
    (killed / "config.json").unlink()
    for run in (lost, moved):
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["files"] = {"folder": "/nowhere", "partition": "gone.parquet"}
        if run is lost:
            manifest |= {"model": "runs/x/gone", "data": ["gone.jsonl"]}
        (run / "manifest.json").write_text(json.dumps(manifest))
    (moved / "model.safetensors").write_bytes(b"")
    page = report_runs([lost, moved, killed], tmp_path / "r.html", examples=5)
    reasons = "\n".join(f"{one.title}: {one.reason}" for s in page.sections for one in s.left_out)
    assert "gone.jsonl" in reasons
    assert "sftmix1 is not finished: it has no final model" in reasons
    assert "the partition of ntp0 was not found at gone.parquet" in reasons
    assert "damaged" in reasons
    assert "Truncation losses" in reasons
    assert "Representations" in (tmp_path / "r.html").read_text()
    bare = report_runs([lost], tmp_path / "r.html", examples=0)
    assert any("--examples 0" in one.reason for s in bare.sections for one in s.left_out)
    scored = report_runs([study / "scored"], tmp_path / "r.html")
    assert [section.title for section in scored.sections] == [
        "Results",
        "The partition",
        "Commands, recipes and versions",
    ]


def test_other_data_are_refused(study: Path, tmp_path: Path) -> None:
    run = shutil.copytree(study / "ntp0", tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    text = Path(manifest["data"][0]).read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("owl", "fox", 1))
    manifest["data"] = [str(tmp_path / "rows.jsonl")]
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"rows\.jsonl are not those that run was trained on"):
        sample_examples(read_run(run), None, 5)


# PEFT 0.21 asks a model by a name that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter(study: Path, toy_model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = shutil.copytree(study / "ntp0", tmp_path / "run")
    for name in ("model.safetensors", "config.json"):
        (run / name).unlink()
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(toy_model), settings)
    model.save_pretrained(run)
    found = read_run(run)
    examples = sample_examples(found, None, 3)
    before, after = (measured(found, when, examples).scores for when in ("before", "after"))
    assert (before.nll_sum != after.nll_sum).all()
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")
    with pytest.raises(OSError, match=r"has no adapter_model\.safetensors"):
        measured(found, "after", examples)


def test_rows_that_begin_alike_are_scored_once(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [shutil.copytree(study / name, tmp_path / name) for name in ("ntp0", "sftmix0")]
    scored: list[str] = []
    score = measuring._score
    monkeypatch.setattr(
        measuring,
        "_score",
        lambda run, when, examples: (scored.append(when), score(run, when, examples))[1],
    )
    findings = find(read_runs(folders), 4)
    assert scored == ["before", "after", "after"]
    assert not findings.failures
    assert set(findings.after["SFTMix"]) == {0}


def test_means_without_a_fused_head() -> None:
    sums = ScoresAndMeans(2, "cpu")
    sums.add(torch.ones(2), torch.tensor([0, 1]))
    sums.end_checkpoint()
    assert sums.means() is None
    assert np.isfinite(sums.nll_sum.numpy()).all()


def test_wrong_arguments(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(study / "ntp0")
    for words, message in (
        ([str(tmp_path)], "is no run of sftmix: it has no manifest.json"),
        ([run, "--examples", "-1"], "examples: expected at least 0, got -1"),
        ([run, "--output", str(tmp_path)], "output: expected a file, got the folder"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err
