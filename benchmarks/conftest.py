"""Options, the race of a case, and how pytest-benchmark gets times that were measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .providers import BARE, NTP, Provider, find_providers
from .race import BACKWARD, MEASURES, Race, in_race, run_race
from .result_file import Results
from .settings import Case, Settings

RESULTS = pytest.StashKey[Results]()
SETTINGS = pytest.StashKey[Settings]()
PROVIDERS = pytest.StashKey[tuple[list[Provider], dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sftmix", "benchmarks of sftmix: see `python -m benchmarks run --help`")
    group.addoption("--suite", default="all")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--quick", action="store_true")
    group.addoption("--no-peers", dest="peers", action="store_false", default=True)
    group.addoption("--no-grid", dest="grid", action="store_false", default=True)
    group.addoption("--seconds", type=int, default=Settings.seconds)
    group.addoption("--data")
    group.addoption("--examples", type=int, default=Settings.examples)
    group.addoption("--threads", type=int, default=Settings.threads)
    group.addoption("--commit", default="")
    group.addoption("--command", default="")
    group.addoption("--out", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    names = Settings.__dataclass_fields__.keys() - {"begin"}
    settings = Settings(**{name: config.getoption(name) for name in names})
    torch.set_num_threads(settings.threads)
    config.stash[SETTINGS] = settings
    config.stash[RESULTS] = Results(config.getoption("suite"), settings, config.getoption("out"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a race is run for every case, provider and direction, who is left out included."""
    if "race" not in metafunc.fixturenames:
        return
    config = metafunc.config
    settings = config.stash[SETTINGS]
    if PROVIDERS not in config.stash:
        config.stash[PROVIDERS] = find_providers(settings, compiled=not settings.quick)
    providers, left_out = config.stash[PROVIDERS]
    task = metafunc.module.TASK
    names = [one.who for one in providers if one.task == task] + list(left_out)
    cases = settings.cases()
    metafunc.parametrize(
        "race", cases, indirect=True, scope="session", ids=[case.name for case in cases]
    )
    metafunc.parametrize("who", names + [BARE] * (task == NTP))
    metafunc.parametrize("measure", MEASURES)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Write down what got no figure, and why."""
    report: Any = yield
    results = item.config.stash[RESULTS]
    name = dict(item.user_properties).get("name", item.name)
    if report.skipped:
        results.miss("left_out", name, report.longrepr[2].removeprefix("Skipped: "))
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        results.miss("failed", name, crash.message if crash else str(report.longrepr))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """The same of files that cannot be imported."""
    report: Any = yield
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        collector.config.stash[RESULTS].miss("left_out", collector.name, reason)
    elif report.failed:
        collector.config.stash[RESULTS].miss("failed", collector.name, str(report.longrepr))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing to measure is no failure where a result says why."""
    nothing = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
    if nothing and session.config.stash[RESULTS].report["left_out"]:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    return pytestconfig.stash[SETTINGS]


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Results:
    return pytestconfig.stash[RESULTS]


@pytest.fixture(autouse=True, scope="module")
def in_time(settings: Settings, request: pytest.FixtureRequest) -> None:
    """Begin no group once the time is over; what a race has measured is still written down."""
    if settings.out_of_time and not hasattr(request.module, "TASK"):
        pytest.skip(f"out of time: {settings.seconds} s are over")


@pytest.fixture(scope="session")
def race(request: pytest.FixtureRequest, settings: Settings) -> Race:
    """All providers on one case: what is measured at once is shared by the tests of three files."""
    if settings.out_of_time:
        pytest.skip(f"out of time: {settings.seconds} s are over")
    return run_race(request.param, *request.config.stash[PROVIDERS], settings)


class Clock:
    """A clock that stands still until a recorded time is played.

    pytest-benchmark runs all rounds of one benchmark before the next, and a slow minute then falls
    on one of them alone; nor does it know events of a GPU. So times are measured in turns, and
    played to it here: it makes the statistics, tables and comparisons.
    """

    def __init__(self) -> None:
        self.now, self.samples = 0.0, iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, samples: Sequence[float]) -> None:
        self.samples = iter(samples)

    def play(self) -> None:
        self.now += next(self.samples)


CLOCK = Clock()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if takes_part(config, item)]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def takes_part(config: pytest.Config, item: pytest.Item) -> bool:
    """False for a provider that a case or a direction is without on purpose."""
    params = getattr(item, "callspec", None) and item.callspec.params
    if not params or "race" not in params:
        return True
    if not params["race"].full and params["measure"] != BACKWARD:
        return False
    providers, _ = config.stash[PROVIDERS]
    key = (params["who"], item.module.TASK)
    found = [one for one in providers if (one.who, one.task) == key]
    return all(in_race(one, params["race"], params["measure"]) for one in found)


@pytest.fixture
def record(benchmark: BenchmarkFixture, results: Results) -> Callable[..., None]:
    """``record(samples, measure=..., who=..., ...)``: times of one provider, and its figures."""

    def keep(samples: Sequence[float], **figures: Any) -> None:
        benchmark.group = ": ".join(filter(None, (figures["measure"], figures.get("case"))))
        benchmark.extra_info.update(figures)
        CLOCK.load(samples)
        benchmark.pedantic(CLOCK.play, rounds=len(samples))
        stats = benchmark.stats.stats
        times = {"median": stats.median, "q1": stats.q1, "q3": stats.q3, "rounds": stats.rounds}
        results.add(**figures, **times)

    return keep


@pytest.fixture
def record_race(
    request: pytest.FixtureRequest, race: Race, who: str, measure: str
) -> Callable[[str], None]:
    """``record_race(task)``: what the race found of the provider at hand, or why it did not."""
    _, absent = request.config.stash[PROVIDERS]
    case: Case = request.node.callspec.params["race"]

    def of_task(task: str) -> None:
        name = who if who in absent else f"{who}, {task}, {case.name}, {measure}"
        race[measure].write((who, task), name, request)

    return of_task
