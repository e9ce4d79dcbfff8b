"""The page of refusals says what the checks say now."""

from __future__ import annotations

import re

import pytest

from sftmix.methods import METHODS
from tools import families, gaps

# What PEFT and transformers say by themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# Each kind of refusal, and none.
ASKED = ("llama", "mixtral", "bloom", "mamba", "bert", "cpmant")


def section(title: str) -> str:
    """The text below a heading of the page."""
    found = re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", gaps.PAGE.read_text(), re.M | re.S)
    assert found is not None, f"no {title}; run python -m tools.gaps"
    return found[1]


def rows(text: str) -> dict[str, dict[str, str]]:
    """The refusals of a section's table, by row and column; what was not asked is left out."""
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    texts = {number: words for number, words in re.findall(r"^(\d+)\. (.*)$", text, re.M)}
    columns = [cell.strip() for cell in head.split("|")[2:-1]]
    found = {}
    for line in lines:
        name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        asked = zip(columns, cells, strict=True)
        found[name] = {one: texts.get(cell, "") for one, cell in asked if cell != "-"}
    return found


@pytest.mark.parametrize("name", ASKED)
def test_a_family_is_refused_what_the_page_says(name: str) -> None:
    found = gaps.of_family(name)
    if any(found.values()):
        assert rows(section("Families"))[name] == found
    else:
        assert f" {name}" in section("Families").split("nothing is refused:")[1]


def test_the_page_has_every_family() -> None:
    text = section("Families")
    others = re.findall(r"[\w-]+", text.split("nothing is refused:")[1])
    assert {*rows(text), *others} == set(families.FAMILIES)
    assert not rows(text).keys() & set(others)


@pytest.mark.parametrize("name", ["all weights", "LoRA", "LoRA on the head", "prompt tuning"])
def test_an_adapter_is_refused_what_the_page_says(name: str) -> None:
    pytest.importorskip("peft")
    assert rows(section("Adapters"))[name] == gaps.of_adapter(gaps.adapters()[name])


def test_weights_of_four_bits_are_refused_what_the_page_says() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    for name in ("QLoRA", "QLoRA, the head in 4 bits too"):
        assert rows(section("Adapters"))[name] == gaps.of_adapter(gaps.adapters()[name])


def test_devices_and_options_are_refused_what_the_page_says() -> None:
    assert gaps.PAGE.read_text().endswith(f"{gaps.of_rest()}\n"), "run python -m tools.gaps"


def test_every_method_and_option_is_asked_about() -> None:
    asked = gaps.switches()
    assert {f"`--method {name}`" for name in METHODS if name != "sftmix"} <= asked.keys()
    assert {"`--head logits`", "`--activation_offload true`", "`--row_length 8`"} <= asked.keys()
    assert not {"`--head fused`", "`--remove_unused_columns true`"} & asked.keys()


def test_a_new_refusal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(config: object) -> None:
        raise ValueError("head: 12.5 is too much; take less")

    monkeypatch.setattr(gaps, "check_device", refused)
    found = gaps.pairs({"`--head logits`": {"head": "logits"}})
    assert found == {("`--head logits`", ""): "head: ... is too much"}
