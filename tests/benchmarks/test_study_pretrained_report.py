"""The study of pretrained models: its tables, and that the page is the committed data's."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.__main__ import main
from benchmarks.study.pretrained.plan import Plan
from benchmarks.study.pretrained.report import curves, joined, markdown, points, read
from benchmarks.study.pretrained.settings import (
    ANSWERS,
    BASE,
    DATA,
    GEMMA3,
    OVERFITTING,
    REGIMES,
    RESULTS,
    SEARCH_SEED,
    SEEDS,
    SMOLLM2,
    Sizes,
)

ROOT = Path(__file__).parent.parent.parent
FACTS = {"commit": "c", "cpu": "x", "cpu_capability": "AVX2", "torch_threads": "1"}
FACTS |= {"torch": "2", "transformers": "5"}

pytest.importorskip("scipy")


def write_run(folder: Path, data: str, seed: int, what: str, loss: float, **more: Any) -> None:
    curve = [{"epoch": e, "held_out_loss": loss + off} for e, off in ((1, -0.2), (2, -0.3), (3, 0))]
    measures = {"held_out_loss": loss, "held_out_loss_min": loss - 0.3, "epoch_of_lowest": 2.0}
    measures |= {"confidence_std": 10.0 + seed + loss, "held_out_accuracy": 0.5}
    record = {"data": data, "seed": seed, "what": what, "sizes": asdict(Sizes()), "facts": FACTS}
    record |= {"cpu_seconds": 60.0, "learning_rate": 1e-3, "options": {}, "curve": curve}
    name = "search" if seed == SEARCH_SEED else seed
    text = json.dumps({**record, "measures": measures, **more})
    (folder / f"{data}-{name}-{what}.json").write_text(text, encoding="utf-8")


def some(folder: Path, seeds: int = 4) -> None:
    """Results in which SFTMix ends 0.1 below NTP and 0.05 below random halves."""
    for data in DATA[:2]:
        for rate, loss in ((0.0002, 3.0), (0.0004, 2.5)):
            write_run(folder, data, SEARCH_SEED, f"rate-{rate:g}", loss)
        for mu, loss in ((0.5, 2.6), (2, 2.4)):
            write_run(folder, data, SEARCH_SEED, f"mu-{mu:g}", loss)
        for seed in range(seeds):
            level, chance = 3.0 + seed / 10, (-1) ** seed / 1000
            write_run(folder, data, seed, BASE, level + 1)
            write_run(folder, data, seed, "ntp", level)
            write_run(folder, data, seed, "sftmix", level - 0.1 + chance)
            write_run(folder, data, seed, "sftmix-random", level - 0.05 - chance)


def test_the_block_says_what_the_runs_say(tmp_path: Path) -> None:
    some(tmp_path)
    records = read(tmp_path)
    said = markdown(records, joined(records), ["a.svg", "b.svg"], SMOLLM2)
    planned = len(Plan(DATA, SEEDS, Sizes(), Path()).runs())
    assert (
        f"SmolLM2-135M-Instruct from a file of 4 bits a weight, {len(records)} of {planned}" in said
    )
    assert "- **A gain: yes.** SFTMix ends significantly below NTP on 2 and" in said
    assert "- **Confidence helps: yes.** SFTMix ends significantly below random halves on 2" in said
    assert "negligible" not in said
    assert "minus its lowest (nats/token, mean over seeds): GSM8K 0.3000, Alpaca 0.3000." in said
    assert "confidence, std. dev. (% of NTP's, 95 % interval): GSM8K " in said
    assert "SFTMix beside NTP, held-out loss (nats/token, 95 % interval): GSM8K -0.1000 (" in said
    assert "SFTMix beside SFTMix over random halves" in said
    assert "GSM8K -0.0500 (-0.0537 to -0.0463; significant)" in said
    assert "SFTMix on Alpaca is better by 0.1000 nats/token" in said
    assert "| GSM8K | 2.7000 | **2.2000** |" in said
    assert "| GSM8K | 2.6000 | **2.4000** |" in said
    assert "| base, not tuned | 4.1500 ± 0.1291 | 4 |" in said
    assert "| PubMedQA |" not in said


def test_small_and_opposite_differences_are_no_gain(tmp_path: Path) -> None:
    """SFTMix ends 0.005 below NTP on one data set, and as much above on the other."""
    some(tmp_path)
    for data, off in (("gsm8k", -0.005), ("alpaca", 0.005)):
        for seed in range(4):
            write_run(tmp_path, data, seed, "sftmix", 3.0 + seed / 10 + off + (-1) ** seed * 1e-5)
    records = read(tmp_path)
    said = markdown(records, joined(records), ["a", "b"], SMOLLM2)
    assert (
        "- **A gain: no.** SFTMix ends significantly below NTP on 1 and significantly above" in said
    )
    assert "above it on 1 of 2 data sets." in said
    assert "- **Confidence helps: no.**" in said
    assert "- Its difference to NTP is negligible on GSM8K, Alpaca." in said
    decides_nothing = markdown(records, joined(records), ["a", "b"], GEMMA3)
    assert "A gain" not in decides_nothing
    expected = (
        f"{len(records)} runs of other sizes, or trained otherwise, than the study's of Gemma 3"
    )
    assert expected in decides_nothing


def test_halves_of_another_model_stand_beside_the_models_own(tmp_path: Path) -> None:
    some(tmp_path)
    assert "SmolLM2's halves" not in markdown(read(tmp_path), joined(read(tmp_path)), "ab", GEMMA3)
    for seed in range(4):
        level = 2.9 + seed / 10
        write_run(tmp_path, "gsm8k", seed, "sftmix-other", level, same_half=0.5 + seed / 10)
        # The other model scored with its own rate.
        write_run(tmp_path, "gsm8k", seed, "other", level, learning_rate=2e-3)
    records = read(tmp_path)
    said = markdown(records, joined(records), "ab", GEMMA3)
    line = next(line for line in said.splitlines() if "SmolLM2's halves beside" in line)
    assert "95 % interval): GSM8K +0.0000 (-0.0018 to +0.0018; not significant)." in line
    assert line.endswith("by both models (by chance: 50 %): GSM8K 65 %.")


def test_answers_stand_beside_the_responses(tmp_path: Path) -> None:
    some(tmp_path)
    for seed in range(4):
        own = {"answer_tokens": 70.0 + seed, "distinct_bigrams": 0.5}
        write_run(tmp_path, "gsm8k", seed, BASE, 4.0, responses=own)
        for system, length in (("ntp", 60 + seed % 2), ("sftmix", 62.0 + seed)):
            measured = {"held_out_loss": 3.0 + seed, "held_out_loss_min": 2.0, "exact_match": 0.03}
            measured |= {"answer_tokens": length, "distinct_bigrams": 0.4}
            write_run(tmp_path, "gsm8k", seed, system, 3.0, measures=measured)
    records = read(tmp_path)
    said = markdown(records, joined(records), [], ANSWERS)
    assert "held-out loss" not in said
    assert "own responses: GSM8K 71.5 tokens and 50.0 % distinct bigrams.\n" in said
    assert "length of an answer (tokens, 95 % interval): GSM8K +3.0 (+1.2 to +4.8;" in said
    assert "exact match of answers (%, 95 % interval): GSM8K +0.0 (-; not tested)." in said
    other = "the results differ in their answers"
    write_run(tmp_path, "gsm8k", 0, "dft", 3.0, max_new_tokens=128)
    with pytest.raises(ValueError, match=other):
        read(tmp_path)


def test_a_curve_begins_with_the_base(tmp_path: Path) -> None:
    some(tmp_path)
    found = points(joined(read(tmp_path))[0], "ntp")
    assert found[1] == pytest.approx({0.0: 4.1, 1: 2.9, 2: 2.8, 3: 3.1})


def test_the_picture_shows_what_ends_above_the_base(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    some(tmp_path)
    for seed in range(4):
        write_run(tmp_path, "gsm8k", seed, BASE, 2.5)
        write_run(tmp_path, "gsm8k", seed, "dft", 9.0)
    figure = curves(joined(read(tmp_path)))
    # NTP's loss ends at 3.15 on average, and DFT's out of sight.
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 2.5
    assert 3.15 < top < 3.5


def test_some_runs_of_a_seed_are_enough(tmp_path: Path) -> None:
    some(tmp_path, seeds=1)
    (tmp_path / "gsm8k-0-base.json").unlink()
    (tmp_path / "alpaca-0-ntp.json").unlink()
    records = read(tmp_path)
    (one,) = joined(records)
    assert one.systems == ("ntp", "sftmix", "sftmix-random")
    assert 0.0 not in points(one, "ntp")[0]
    said = markdown(records, [one], ["a", "b"], SMOLLM2)
    assert "held-out loss (nats/token, 95 % interval): GSM8K -0.0990 (-; not tested)." in said
    assert "| SFTMix | 2.9010 | 1 | -0.0990 | - | - | - |" in said


def test_nothing_yet_is_said_and_other_sizes_are_refused(tmp_path: Path) -> None:
    assert ", 0 of " in markdown([], [], [], SMOLLM2)
    some(tmp_path, seeds=1)
    write_run(tmp_path, "gsm8k", 0, "dft", 3.0, learning_rate=2e-3)
    with pytest.raises(ValueError, match="the results of gsm8k differ in their learning rate"):
        read(tmp_path)
    write_run(tmp_path, "gsm8k", 0, "dft", 3.0, sizes={"epochs": 1})
    with pytest.raises(ValueError, match="the results differ in their sizes"):
        read(tmp_path)


@pytest.mark.parametrize("study", REGIMES)
def test_the_page_and_its_pictures_are_those_of_the_committed_results(
    study: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "benchmarks/study/results" / study
    folder.mkdir(parents=True)
    for file in (RESULTS / study).glob("*.json"):
        shutil.copy(file, folder)
    document = tmp_path / "docs/study.md"
    document.parent.mkdir()
    text = (ROOT / "docs/study.md").read_text("utf-8")
    document.write_text(text, encoding="utf-8")
    main(["report", str(folder), "--study", study, "--document", str(document)])
    assert document.read_text("utf-8") == text
    drawn = {file.name: file.read_bytes() for file in folder.glob("*.svg")}
    assert drawn == {file.name: file.read_bytes() for file in (RESULTS / study).glob("*.svg")}


def test_answers_are_those_of_the_other_studies_trainings() -> None:
    compared = 0
    for file in (RESULTS / ANSWERS).glob("*.json"):
        own = json.loads(file.read_text("utf-8"))
        if own["seed"] != SEARCH_SEED and "curve" in own:
            study = SMOLLM2 if own["data"] == "gsm8k" else OVERFITTING
            other = json.loads((RESULTS / study / file.name).read_text("utf-8"))
            for point, beside in zip(own["curve"], other["curve"], strict=True):
                assert point == pytest.approx(beside, abs=1e-6)
            compared += 1
    assert compared == 30


def test_the_answers_figures_are_those_of_the_tables() -> None:
    page = (ROOT / "docs/study.md").read_text("utf-8")
    answer = page.partition("**The answer.**")[2].partition("\n## ")[0]
    tables = page.partition("<!-- smollm2: begin")[2].partition("## Limits")[0]
    figures = re.findall(r"\d\.\d{4}", answer)
    assert len(figures) >= 6
    for figure in figures:
        assert re.search(rf"(?<!\d)-?{re.escape(figure)}\b", tables), figure
    assert "- **A gain: no.**" in tables
    assert "- **A gain: yes.**" not in tables
    assert "- **Confidence helps: yes.**" not in tables
