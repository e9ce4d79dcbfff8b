"""What pyproject.toml allows, what tests/versions.py found by running, and the page agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from sftmix.model.known_types import NEEDED
from tests import versions
from tests.versions import LIBRARIES, SETS, requirements

RECORD = versions.read_record()
REPORT = """<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="fails"><failure>no</failure></testcase>
<testcase classname="b" name="breaks"><error>no</error></testcase>
<testcase classname="b" name="waits"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("name", LIBRARIES[1:])
def test_every_library_has_a_lowest_version_and_it_has_run(name: str) -> None:
    one = RECORD["sets"]["axolotl 0.19.0" if name == "trl" else "lowest"]
    assert Version(one["versions"][name]) == Version(versions.lowest(name))


@pytest.mark.parametrize("name", RECORD["sets"])
def test_a_recorded_set_is_allowed_and_no_test_failed(name: str) -> None:
    one, found = SETS[name], RECORD["sets"][name]
    ranges = requirements()
    for library, version in found["versions"].items():
        if library in LIBRARIES and (library != "trl" or one.trl):
            assert ranges[library].specifier.contains(version), library
    for wanted in map(Requirement, one.wants):
        version = found["versions"].get(wanted.name)
        assert version is None or wanted.specifier.contains(version), wanted
    assert found["failed"] == []
    assert found["passed"] > 100


@pytest.mark.parametrize("name", RECORD["sets"])
def test_every_imported_name_was_found_in_every_set(name: str) -> None:
    """Of a new import nobody knows that: `python -m tests.versions --record` looks it up."""
    found, with_trl = RECORD["sets"][name]["names"], SETS[name].trl
    for module, names in versions.imported().items():
        if with_trl or not module.startswith("trl"):
            assert set(names) <= set(found.get(module, "").split()), module


def test_there_are_versions_for_every_python() -> None:
    assert tuple(RECORD["newest"]) == versions.PYTHONS
    for found in RECORD["newest"].values():
        for name in LIBRARIES[1:]:
            assert requirements()[name].specifier.contains(found[name]), name


def test_the_page_shows_what_is_recorded() -> None:
    text = versions.PAGE.read_text(encoding="utf-8")
    begin, end = f"{versions.BEGIN}\n", f"\n{versions.END}\n"
    assert text.partition(begin)[2].partition(end)[0] == versions.tables(RECORD)


def test_types_that_need_a_newer_transformers_are_newer_than_the_lowest() -> None:
    lowest = Version(versions.lowest("transformers"))
    assert all(Version(version) > lowest for version in NEEDED.values())


def test_tests_that_are_named_are_there() -> None:
    assert all((versions.ROOT / path).exists() for path in (*versions.TESTS, versions.KERNELS))
    assert versions.tests_of(SETS["torch 2.14"]) == [versions.KERNELS, *versions.TESTS]
    assert not any("trl" in path for path in versions.tests_of(SETS["LLaMA-Factory 0.9.5"]))


def test_a_report_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    expected = {"passed": 1, "skipped": 1, "failed": ["a::fails", "b::breaks"]}
    assert versions.counted(path) == expected
