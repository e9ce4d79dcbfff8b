"""Which runs form a row, what the tables say of them, and folders that are not whole."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix.pairs.partition import (
    from_scores,
    partition_hash,
    read_partition,
    split,
    write_partition,
)
from sftmix.report import runs as report_runs
from sftmix.report import tables
from sftmix.report.assembly import introduction
from sftmix.report.curves import TERMS
from sftmix.report.findings import find
from sftmix.report.runs import (
    Group,
    baseline_of,
    find_partition,
    grouped,
    read_run,
    read_runs,
)
from sftmix.report.sections import curves_section
from tests.sftmix.report_runs import log_lines, make_run, write

pytest.importorskip("scipy")

HELD_OUT = {"ntp": (10.0, 12.0, 9.0), "sftmix": (11.0, 14.0, 12.0)}  # differences 1, 2, 3


@pytest.fixture
def study(tmp_path: Path) -> list[Path]:
    """Three seeds of two methods."""
    return [
        make_run(
            tmp_path / f"{method}-{seed}",
            method=method,
            seed=seed,
            partition="2" * 64,
            log=log_lines(value),
            metrics={"MedQA": 50.0 + value},
        )
        for method, values in HELD_OUT.items()
        for seed, value in enumerate(values)
    ]


def rows_of(folders: list[Path]) -> tuple[list[Group], list[dict[str, Any]]]:
    groups = grouped(read_runs(folders))
    return groups, [dict(tables.values_of(group)) for group in groups]


def test_the_table_is_what_one_works_out_by_hand(study: list[Path]) -> None:
    groups, values = rows_of(study[::-1])
    table = tables.results_table(groups, values)
    assert [row[:2] for row in table.rows] == [["NTP", "3 (0, 1, 2)"], ["SFTMix", "3 (0, 1, 2)"]]
    ntp, sftmix = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    # 10, 12, 9: mean 31 / 3, squares of the distances 1/9 + 25/9 + 16/9 = 42/9, over n - 1 = 2.
    assert ntp["held-out loss"] == f"{31 / 3:.4f} ± {math.sqrt(42 / 9 / 2):.4f}"
    assert ntp["MedQA"] == f"{50 + 31 / 3:.2f} ± {math.sqrt(42 / 9 / 2):.2f}"
    assert sftmix["held-out loss"].startswith("12.3333 ± ")
    assert ntp["training NTP loss"] == "1.0000 ± 0.0000"
    training = tables.training_table(groups, values)
    assert training.rows[0] == ["NTP", "1.0000 ± 0.0000", "1,500 ± 0", "0.700 ± 0.000"]


def test_the_difference_to_ntp(study: list[Path]) -> None:
    table = tables.differences_table(*rows_of(study))
    assert table is not None
    lines = {row[0]: row[1:] for row in table.rows}
    verdict, difference, interval, p_value, number = lines["SFTMix: held-out loss"]
    assert (verdict, difference, number) == (
        "no significant difference",
        f"+2.0000 (+{100 * 2 / (31 / 3):.1f} %)",
        "3",
    )
    # t = 2 sqrt(3) with two degrees of freedom; its 97.5 % point is 4.302653.
    assert p_value == f"{1 - math.sqrt(12 / 14):.2g}"
    ends = [float(end) for end in interval.split(" to ")]
    assert ends == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5], abs=1e-4)
    assert lines["SFTMix: training NTP loss"][:2] == ["no difference", "+0.0000 (+0.0 %)"]
    assert "SFTMix: training loss" not in lines
    assert "SFTMix: MedQA" in lines
    assert tables.warnings(rows_of(study)[0]) == []


def test_a_significant_difference_is_called_so(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"{m}{seed}", method=m, seed=seed, log=log_lines(seed + shift * seed))
        for m, shift in (("ntp", 0.0), ("ir_dro", 0.001))
        for seed in range(8, 12)
    ]
    table = tables.differences_table(*rows_of(folders))
    assert table is not None
    assert table.rows[0][:2] == ["IR-DRO: held-out loss", "significant"]


def test_the_held_out_loss_is_drawn_where_it_was_logged_while_training(tmp_path: Path) -> None:
    once = make_run(tmp_path / "once", log=log_lines(2.0))
    log = [*log_lines(3.0, steps=(10,)), *log_lines(2.0, steps=(20,))]
    often = make_run(tmp_path / "often", method="sftmix", log=log)

    def titles(*folders: Path) -> list[str]:
        return [part.title for part in curves_section(find(read_runs(folders), 0)).parts]

    title = TERMS["eval_loss"][0]
    assert title not in titles(once)
    assert titles(once, often)[0] == title


def test_runs_are_counted_in_words(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"{seed}", seed=seed) for seed in range(2)]
    one, both = (introduction(find(read_runs(some), 0))[0] for some in (folders[:1], folders))
    assert one.startswith("1 run of sftmix train in 1 row. ")
    assert both.startswith("2 runs of sftmix train in 1 row. ")


def test_one_seed_is_warned_of(study: list[Path]) -> None:
    groups, values = rows_of([study[0], study[3]])
    said = [warning for warning in tables.warnings(groups) if "n = 1" in warning]
    assert len(said) == 1
    assert all(group.name in said[0] for group in groups)
    table = tables.differences_table(groups, values)
    assert table is not None
    assert table.rows[0][1:] == ["one seed: says nothing", "+1.0000 (+10.0 %)", "-", "-", "1"]
    assert tables.results_table(groups, values).rows[0][2] == "10.0000"
    apart = tables.differences_table(*rows_of([study[0], study[4]]))
    assert apart is not None
    assert apart.rows[0][1] == "no common seed"


def test_unfinished_runs_and_values_that_are_no_numbers_do_not_count(
    study: list[Path], tmp_path: Path
) -> None:
    killed = make_run(
        tmp_path / "killed",
        finished=False,
        seed=3,
        partition="2" * 64,
        log=log_lines(1000.0),
    )
    broken = make_run(
        tmp_path / "nan", seed=4, partition="2" * 64, log=log_lines(math.nan, loss=math.nan)
    )
    empty = make_run(tmp_path / "empty", finished=False, seed=5, partition="2" * 64)
    (empty / "checkpoint-10" / "trainer_state.json").unlink()
    again = make_run(tmp_path / "again", seed=0, partition="2" * 64, log=log_lines(99.0))
    groups, values = rows_of([*study, killed, broken, empty, again])
    assert values[0]["eval_loss"] == {0: 10.0, 1: 12.0, 2: 9.0}
    assert tables.results_table(groups, values).rows[0][1] == "4 (0, 1, 2, 4) + 2 unfinished"
    warnings = "\n".join(tables.warnings(groups))
    assert "killed is not finished (last logged step 20)" in warnings
    assert "empty is not finished (last logged step 0)" in warnings
    assert "several runs have the same recipe and seed" in warnings


def test_rows_are_recipes_and_their_differences_are_shown(tmp_path: Path) -> None:
    held_out = {"eval_data": ["other.jsonl"]}
    folders = [
        make_run(tmp_path / "a", seed=0),
        make_run(tmp_path / "moved" / "a", seed=1, data=["elsewhere/rows.jsonl"]),
        make_run(tmp_path / "b", learning_rate=2e-6, partition="2" * 64),
        make_run(tmp_path / "c", method="sftmix", partition="2" * 64, learning_rate=2e-6, mu=0.5),
        make_run(
            tmp_path / "d", method="sftmix", model="other", partition="2" * 64, files=held_out
        ),
    ]
    groups = grouped(read_runs(folders))
    assert [len(group.runs) for group in groups] == [2, 1, 1, 1]
    assert [run.name for run in groups[0].runs] == [str(folders[0]), str(folders[1])]
    assert groups[2].name == "SFTMix, c"
    assert baseline_of(groups[2], groups) is groups[1]
    assert baseline_of(groups[3], groups) is None
    assert baseline_of(groups[0], groups) is None
    table = tables.differences_in_recipe(groups)
    assert table is not None
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells["learning_rate"] == ["-", "2e-06", "2e-06", "-"]
    assert cells["partition"][:2] == ["-", "22222222..."]
    assert cells["model"] == ["base", "base", "base", "other"]
    assert "seed" not in cells
    warnings = "\n".join(tables.warnings(groups))
    assert "SFTMix, d: no NTP run on the same data from the same model" in warnings
    assert "not all name the same held-out data" in warnings
    assert tables.differences_in_recipe(groups[:1]) is None


def test_what_differs_besides_the_method_is_warned_of(tmp_path: Path) -> None:
    ntp = make_run(tmp_path / "a", learning_rate=0.1)
    sftmix = make_run(tmp_path / "b", method="sftmix", learning_rate=0.2, partition="2" * 64)
    warnings = tables.warnings(grouped(read_runs([ntp, sftmix])))
    assert any("it also differs in learning_rate" in warning for warning in warnings)


def test_what_is_the_same_data_is_no_difference(tmp_path: Path) -> None:
    """Rows that were selected in two ways and have one hash; held-out data of another split."""
    made = {"select": ["keys:ids.txt"], "on_bad_row": "skip"}
    held_out = {"eval_data": ["owner/data"], "eval_split": "test"}
    folders = [
        make_run(tmp_path / "a", select=["longest:9"], on_bad_row="error", files=held_out),
        make_run(tmp_path / "b", **made, seed=1, files=held_out),
        make_run(tmp_path / "c", **made, method="sftmix", partition="2" * 64, files=held_out),
    ]
    groups = grouped(read_runs(folders))
    assert [len(group.runs) for group in groups] == [2, 1]
    assert not any("also differs" in warning for warning in tables.warnings(groups))
    other = {**held_out, "eval_split": "validation"}
    folders.append(make_run(tmp_path / "d", **made, seed=2, files=other))
    warnings = tables.warnings(grouped(read_runs(folders)))
    assert "The runs do not all name the same held-out data; see what differs." in warnings
    assert "--eval_data owner/data --eval_split test" in tables.command(groups[0].runs[0])


def test_an_evaluation_of_some_questions_is_warned_of(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    details = {"MedQA": {"limit": 10}, "MedMCQA": {"limit": None}}
    content = {"metrics": {"MedQA": 60.0, "MedMCQA": 50.0, "MT-Bench": 4.0}, "details": details}
    write(run / "evaluation.json", content)
    warnings = tables.warnings(grouped(read_runs([run])))
    assert "a was not asked all questions of MedQA (the first 10)." in warnings


def test_rows_of_one_method_are_named_after_what_differs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(mu), method="sftmix", mu=mu) for mu in (0.2, 0.5)]
    assert [group.name for group in grouped(read_runs(folders))] == [
        "SFTMix, mu 0.2",
        "SFTMix, mu 0.5",
    ]


def scored_and_trained(folder: Path, seed: int, by: str = "", **changes: Any) -> list[Path]:
    """A run of `sftmix score`, split by its seed too, and SFTMix and NTP on its partition."""
    score = make_run(folder / f"score{seed}", seed=seed, num_scorings=1, **changes)
    nll = np.random.default_rng(seed).random((6, 1))
    partition = from_scores(range(6), list("abcdef"), [1] * 6, nll)
    if by:
        partition = split(partition, by, seed)
        note = {"split": {"by": by, "seed": seed}}
        write(
            score / "manifest.json", {**json.loads((score / "manifest.json").read_text()), **note}
        )
    path = score / "confidence.parquet"
    write_partition(path, partition)
    common = {"seed": seed, "partition": partition_hash(partition)}
    common["files"] = {"partition": str(path)}
    log = [{"step": 1, "eval_loss": 1.0 + seed}]
    return [
        make_run(folder / f"{method}{seed}", method=method, log=log, **common)
        for method in ("sftmix", "ntp")
    ]


def test_a_partition_for_each_seed_is_no_other_recipe(tmp_path: Path) -> None:
    folders = [run for seed in (0, 1, 2) for run in scored_and_trained(tmp_path / "a", seed)]
    groups, values = rows_of(folders)
    assert [group.name for group in groups] == ["NTP", "SFTMix"]
    assert values[1]["eval_loss"] == {0: 1.0, 1: 2.0, 2: 3.0}
    random = scored_and_trained(tmp_path / "b", 3, "random")
    random += scored_and_trained(tmp_path / "b", 4, "random")
    other = scored_and_trained(tmp_path / "c", 5, num_epochs=9)
    assert [len(group.runs) for group in rows_of([*folders, *random, *other])[0]] == [3, 2, 1] * 2
    # Split anew since: how it was scored is not known any more.
    path = tmp_path / "a/score1/confidence.parquet"
    write_partition(path, split(read_partition(path), "reversed"))
    assert [len(group.runs) for group in rows_of(folders)[0]] == [2, 1, 2, 1]


def test_the_papers_figures(tmp_path: Path) -> None:
    model = "meta-llama/Llama-3.1-8B"
    folders = [
        make_run(
            tmp_path / f"m{seed}",
            seed=seed,
            method="sftmix",
            model=f"models/{model}",
            data=["data/medalpaca_medical.jsonl"],
            metrics={"MedQA": 60.0 + seed},
        )
        for seed in (1, 3)
    ]
    folders.append(make_run(tmp_path / "alpaca", model=model, data=["tatsu-lab/alpaca"]))
    groups, values = rows_of(folders)
    table = tables.paper_table(groups, values)
    assert table is not None
    lines = {(row[0], row[1]): row[2:] for row in table.rows}
    assert lines["SFTMix, Llama-3.1-8B: MedQA", "MedAlpaca-263K"] == [
        "60.88",
        "62.00 ± 1.41",
        "SFTMix",
    ]
    assert lines["NTP, Llama-3.1-8B: MT-Bench", "Alpaca-52K"][:2] == ["4.3625", "-"]
    assert not any("SFTMix" in label and data == "Alpaca-52K" for label, data in lines)
    assert "sftmix evaluate --model RUN" in table.notes[1]
    assert tables.paper_table(*rows_of([make_run(tmp_path / "x")])) is None
    hub = {"model": model, "data": ["medalpaca/medical_meadow_medqa"], "lora_rank": 16}
    adapter = tables.paper_table(*rows_of([make_run(tmp_path / "hub", **hub)]))
    assert adapter is not None
    assert adapter.rows[0] == [
        "NTP, Llama-3.1-8B: MedQA",
        "MedAlpaca-263K",
        "59.31",
        "-",
        "NTP (LoRA)",
    ]
    others = (
        {"select": ["longest:1000"]},
        {"method": "sftmix", "mu": 0.5},
        {"method": "sftmix", "pairing": "rank"},
        {"method": "sftmix", "alpha": 1.0},
    )
    for number, changes in enumerate(others):
        run = make_run(tmp_path / f"other {number}", **hub, **changes)
        assert tables.paper_table(*rows_of([run])) is None, changes


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for name in ("nothing", "absent"):
        with pytest.raises(
            ValueError, match=f"{name} is no run of sftmix: it has no manifest.json"
        ):
            read_runs([tmp_path / name])
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="was given more than once"):
        read_runs([run, tmp_path / "nothing" / ".." / "run"])
    manifest = json.loads((run / "manifest.json").read_text())
    for text, message in (
        ("{", "manifest.json is damaged"),
        ("[]", "expected names and values, got list"),
        (json.dumps({**manifest, "seed": "x"}), "expected seed of type int, got 'x'"),
        (json.dumps({**manifest, "data": None}), "expected data of type list, got None"),
    ):
        (run / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_run(run)
    other = make_run(tmp_path / "other", metrics={"MedQA": "high"})
    with pytest.raises(ValueError, match="expected metrics, a number for each name"):
        read_run(other)


def test_the_partition_is_found_wherever_it_is(tmp_path: Path) -> None:
    partition = from_scores(range(4), ["h"] * 4, [1] * 4, [[0.1], [0.2], [0.3], [0.4]])
    wanted = partition_hash(partition)
    scored = make_run(tmp_path / "scored", finished=False, num_scorings=1)
    write_partition(scored / "confidence.parquet", partition)
    files = {"partition": "scored/confidence.parquet", "folder": str(tmp_path)}
    near = read_run(make_run(tmp_path / "near", partition=wanted, files=files))
    assert partition_hash(find_partition(near, [near])) == wanted
    lost_files = {"partition": "gone/confidence.parquet", "folder": "/nowhere"}
    lost = read_run(make_run(tmp_path / "lost", partition=wanted, files=lost_files))
    with pytest.raises(ValueError, match=r"of lost was not found at gone/confidence.parquet; give"):
        find_partition(lost, [lost])
    assert partition_hash(find_partition(lost, [lost, read_run(scored)])) == wanted
    with pytest.raises(ValueError, match="was not found"):
        find_partition(replace(lost, recipe={**lost.recipe, "partition": "4"}), [read_run(scored)])
    other = read_run(make_run(tmp_path / "other", partition="3" * 64, files=files))
    with pytest.raises(ValueError, match="scored or split anew"):
        find_partition(other, [other])
    without = read_run(make_run(tmp_path / "without"))
    with pytest.raises(ValueError, match="trained without a partition"):
        find_partition(without, [without])
    (scored / "confidence.parquet").unlink()
    unfinished = read_run(scored)
    assert not unfinished.finished
    with pytest.raises(ValueError, match="has not finished scoring"):
        find_partition(unfinished, [])


def test_what_is_left_out_of_a_recipe_is_that_of_the_manifest() -> None:
    from sftmix.recipe import manifest

    assert report_runs.NOT_RECIPE == manifest.NOT_RECIPE
    assert set(manifest.RECIPE_FIELDS) >= report_runs.OF_METHOD - {"partition"}
