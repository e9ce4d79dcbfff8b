"""The study's statistics and tables, and that the document and picture are the committed data's."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.findings import MEASURES, PRIMARY, SPREAD, findings, holm, read
from benchmarks.study.report import markdown
from benchmarks.study.settings import QUICK
from benchmarks.study.small import main

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks/study/results"

pytest.importorskip("scipy")


def measures(loss: float, spread: float) -> dict[str, float]:
    return {**dict.fromkeys(MEASURES, 0.5), PRIMARY: loss, SPREAD: spread}


def write(folder: Path, source: str, offset: float, seeds: int = 4, **changes: Any) -> None:
    """Results in which SFTMix is off by about ``offset`` in loss, and by -7 % in spread."""
    common = {"data": source, "sizes": asdict(QUICK), "examples": {}, "learning_rate": 0.001}
    facts = {"commit": "c", "cpu": "x", "cpu_capability": "AVX2", "torch_threads": "1"}
    facts |= {"torch": "2", "transformers": "5"}
    search = {**common, "seed": 1000, "losses": {"0.001": 1.0, "0.002": 2.0}}
    (folder / f"{source}-search.json").write_text(json.dumps(search), encoding="utf-8")
    for seed in range(seeds):
        loss, spread, sign = 3.0 + seed, 10.0 + seed, (-1) ** seed
        systems = {
            "ntp": measures(loss, spread),
            "sftmix": measures(loss + offset * (1 + seed / 100), spread * (0.93 + sign / 1000)),
            "mixup": measures(loss + sign, spread),
        }
        record = {**common, "seed": seed, "facts": facts, "base": measures(5, 5)}
        record |= {"systems": systems, **changes}
        (folder / f"{source}-{seed}.json").write_text(json.dumps(record), encoding="utf-8")


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"expected 0 \.\. 1, got 2"):
        holm([2])


def test_differences_are_paired_and_corrected_over_all_data_sets(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k", -0.1)
    write(tmp_path, "alpaca", 0.2)
    results = read(tmp_path)
    assert [one.source for one in results] == ["gsm8k", "alpaca"]
    found = {(one.source, one.system): one for one in findings(results, PRIMARY)}
    assert len(found) == 4
    one = found["gsm8k", "sftmix"]
    assert one.test.difference == pytest.approx(-0.1015)
    assert one.significant
    assert not found["alpaca", "mixup"].significant
    p_values = [one.test.p_value or 0.0 for one in found.values()]
    assert [one.corrected for one in found.values()] == holm(p_values)
    assert "p < 0.05 in 2, and in 2 after" in markdown(results, "x.svg")
    assert "SFTMix on GSM8K is better by 0.1015 nats/token" in markdown(results, "x.svg")
    assert "SFTMix on Alpaca is worse by 0.2030 nats/token" in markdown(results, "x.svg")


def test_the_spread_is_compared_in_percent_of_ntps(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k", 0.1)
    found = {one.system: one for one in findings(read(tmp_path), SPREAD)}
    assert found["sftmix"].test.difference == pytest.approx(-7)
    assert found["sftmix"].significant
    said = markdown(read(tmp_path), "x.svg")
    assert "std. dev. (% of NTP's, 95 % interval): GSM8K -7.0 (-7.2 to -6.8; significant)" in said
    # Equal differences leave nothing to test.
    assert found["mixup"].test.p_value is None
    assert found["mixup"].corrected is None
    assert not found["mixup"].significant


def test_a_system_that_some_seeds_lack_is_compared_over_the_others(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k", 0.1)
    file = tmp_path / "gsm8k-3.json"
    record = json.loads(file.read_text("utf-8"))
    del record["systems"]["mixup"]
    file.write_text(json.dumps(record), encoding="utf-8")
    found = {one.system: one for one in findings(read(tmp_path), PRIMARY)}
    assert (found["mixup"].test.paired_n, found["sftmix"].test.paired_n) == (3, 4)


def test_results_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no results"):
        read(tmp_path)
    write(tmp_path, "gsm8k", 0.1)
    file = tmp_path / "gsm8k-3.json"
    record = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**record, "learning_rate": 1.0}), encoding="utf-8")
    with pytest.raises(ValueError, match="gsm8k differ in learning_rate"):
        read(tmp_path)
    file.unlink()
    (tmp_path / "gsm8k-search.json").unlink()
    with pytest.raises(ValueError, match="expected one search of gsm8k, got 0"):
        read(tmp_path)


def test_the_document_and_the_picture_are_those_of_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "benchmarks/study/results"
    folder.mkdir(parents=True)
    for file in RESULTS.glob("*.json"):
        shutil.copy(file, folder)
    document = tmp_path / "docs/study_small.md"
    document.parent.mkdir()
    text = (ROOT / "docs/study_small.md").read_text("utf-8")
    document.write_text(text, encoding="utf-8")
    main(["report", str(folder), "--document", str(document)])
    assert document.read_text("utf-8") == text
    assert (folder / "study.svg").read_bytes() == (RESULTS / "study.svg").read_bytes()
