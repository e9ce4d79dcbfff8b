"""The paper's figures are those reported, each typed here once more, and agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sftmix.report.paper import INSTRUCTION_FOLLOWING, MEDICINE, ROLES, ROWS, PaperRow

FACTS = Path(__file__).parents[3] / "../shared/facts.md"

# A line for each table: NTP before SFTMix, columns as in the paper.
REPORTED = {
    INSTRUCTION_FOLLOWING: """
        Llama 4.3625 4.0714 8.6528, 4.5825 4.9031 10.3195;
        Mistral 4.6163 4.3560 9.1759, 4.9100 4.5386 9.4994;
        Qwen 6.1930 7.0764 13.9508, 6.5247 7.8810 15.0235""",
    MEDICINE: """
        Llama 59.31 54.52 75.40 53.65 60.72, 60.88 55.38 77.80 54.15 62.05;
        Mistral 49.10 44.62 75.40 48.15 54.32, 51.77 45.72 77.40 49.03 55.98""",
    ROLES: """
        Llama 4.3625 8.6528, 4.5825 10.3195, 4.4062 8.2856, 4.5062 7.2964""",
}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\b\d+\.\d\d+\b", text)]


def of(table: str, model: str = "") -> list[PaperRow]:
    return [row for row in ROWS if row.table == table and model in row.model]


@pytest.mark.parametrize("table", REPORTED)
def test_the_figures_are_those_reported(table: str) -> None:
    for line in REPORTED[table].split(";"):
        rows = of(table, line.split()[0])
        assert [figure for row in rows for figure in row.figures.values()] == numbers(line)
        methods = ["ntp", "sftmix", "equal", "mixup"]
        assert [row.method for row in rows] == methods[: len(rows)]


def test_all_reported_results_are_there() -> None:
    if not FACTS.is_file():
        pytest.skip("needs ../shared/facts.md")
    section = FACTS.read_text(encoding="utf-8").split("## Reported results")[1]
    reported = numbers(section.split("Other claims")[0])
    found = [figure for row in ROWS for figure in row.figures.values()]
    assert sorted(reported) == sorted(found)


def test_means_and_repeated_rows_agree() -> None:
    for row in of(MEDICINE):
        *parts, mean = row.figures.values()
        assert mean == pytest.approx(sum(parts) / len(parts), abs=0.00501)
    alpaca = {(row.model, row.method): row for row in of(INSTRUCTION_FOLLOWING)}
    for role in of(ROLES)[:2]:
        same = alpaca[role.model, role.method]
        assert role.recipe == same.recipe
        assert role.figures.items() <= same.figures.items()


def test_a_recipe_is_of_one_model_data_set_and_method() -> None:
    of_recipe = {(row.recipe, row.model, row.data, row.method) for row in ROWS}
    assert len(of_recipe) == len({row.recipe for row in ROWS}) == 12
