"""`benchmarks/gpu.sh`: how it is called, its order and limits, and what is carried."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import kit
from benchmarks.gpu.parts import SECONDS, SMOKE, Part, Run, chosen_parts, default_parts, names
from benchmarks.suites import NAMES, SUITES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"
ORDER = [
    "extension",
    "ceilings",
    "smoke",
    "losses",
    "profile",
    "rows",
    "perplexity",
    "launches",
    "tests",
    "racecheck",
]


@pytest.fixture
def failing_python(tmp_path: Path) -> Path:
    """Take the place of the parts' interpreter: every part fails."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "ran: $*"\nexit 3\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def run_failing(failing_python: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return what runs the driver here with parts that fail, and gives its status and results."""
    monkeypatch.setattr(sys, "executable", str(failing_python))
    monkeypatch.setattr(driver.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        out = tmp_path / "out"
        status = driver.main([word.replace("OUT", str(out)) for word in arguments])
        return status, (out / "parts.md").read_text(), (out / "log.txt").read_text()

    return run


@pytest.mark.parametrize("arguments", [("OUT", "--dry-run"), ("--dry-run", "OUT")])
def test_a_part_that_fails_stops_no_other(run_failing: Any, arguments: tuple[str, ...]) -> None:
    status, table, log = run_failing(*arguments)
    assert status == 1
    ends = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [name for name, _ in ends] == ORDER[:-1]
    assert all(end.startswith("FAILED: exit status 3") for _, end in ends)
    # Without a GPU everything is tiny.
    commands = [line for line in log.splitlines() if line.startswith("ran: -m benchmarks run")]
    assert len(commands) == 7
    assert all(line.endswith("--quick") for line in commands)
    assert "--device cuda" not in log


def test_a_real_run_is_of_the_gpu_and_names_the_commit(run_failing: Any) -> None:
    _, _, log = run_failing("OUT", "--commit", "abc")
    assert "--device cpu" not in log
    assert "--quick" not in log
    commands = [line for line in log.splitlines() if line.startswith("ran: -m benchmarks run")]
    assert commands
    assert all("--commit abc" in line and "--keep" in line for line in commands)


@pytest.mark.parametrize("only", ["tests", "losses", "step", "tune", "long"])
def test_one_part_comes_after_the_extension_and_has_all_the_time(
    run_failing: Any, only: str
) -> None:
    _, table, log = run_failing("OUT", "--dry-run", "--only", only)
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == [
        "extension",
        only,
    ]
    limit = next(line for line in log.splitlines() if line.startswith(f"== {only}, "))
    assert int(limit.split(", ")[1].split()[0]) > 400


def test_what_decides_comes_first_and_all_ends_in_eight_minutes() -> None:
    parts = default_parts(Run(Path("out"), sanitizer="compute-sanitizer"))
    assert [part.name for part in parts] == ORDER
    assert sum(part.seconds for part in parts) == SECONDS == 480
    limits = {part.name: part.seconds for part in parts}
    assert [limits[name] for name in ORDER[1:4]] == [15, 60, 115]
    assert limits["launches"] == 45
    # A suite begins no round in the time that its end and its start take.
    for part in parts:
        own = [
            int(command[command.index("--seconds") + 1])
            for command in part.commands
            if "--seconds" in command
        ]
        assert sum(own) <= part.seconds - 7 * len(own)
    for part in parts:
        for command in part.commands:
            if "run" in command:
                suite = command[command.index("run") + 1]
                only = command[command.index("-k") + 1].removeprefix("not ")
                assert only in SUITES[suite]
                assert only in NAMES


def test_every_part_can_be_named_and_is_called_once() -> None:
    found = list(names())
    assert len(found) == len(set(found))
    assert {"long", "tune", "step", "memory"} <= set(found)
    for name in found:
        parts = chosen_parts(Run(Path("out")), name)
        assert parts[-1].name == name
        assert sum(part.seconds for part in parts) <= SECONDS


def test_the_smoke_tests_are_there() -> None:
    for one in SMOKE:
        file, _, name = one.partition("::")
        text = (ROOT / file).read_text()
        assert "pytest.mark.gpu" in text or "device: str" in text
        assert f"def {name}(" in text or not name


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [name, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "OUT: expected a folder for the results, got none"),
        (["--only", "tests"], "OUT: expected"),
        (["out", "--only", "else"], "argument --only: invalid choice: 'else'"),
        (["out", "--kit", "not there"], "argument --kit: expected a folder, got 'not there'"),
        (["out", "--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_a_wrong_call_is_refused(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        driver.main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_the_script_finds_python3_where_there_is_no_python(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, target in (("python3", sys.executable), ("bash", "/bin/bash")):
        (tools / name).symlink_to(target)
    (tools / "dirname").symlink_to("/usr/bin/dirname")
    done = run_script("/bin/bash", str(SCRIPT), "--help", PATH=str(tools))
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_a_command_that_is_late_is_interrupted_and_says_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what it has started ends with it, though the shell keeps interrupts from it."""
    monkeypatch.setattr(driver, "GRACE", 2)
    # As in a job in the background, of which no child would hear an interrupt.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    late = "trap 'echo summary' INT; sleep 600 & echo child: $!; wait; wait"
    log = io.StringIO()
    part = Part("late", 5, (("sh", "-c", late), ("echo", "never")))
    try:
        end = driver.run_part(part, 5, dict(os.environ), log)
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.startswith("FAILED: interrupted after 3 s, not begun; ")
    lines = log.getvalue().splitlines()
    assert "summary" in lines
    assert "never" not in lines
    (child,) = (int(line.split()[1]) for line in lines if line.startswith("child: "))
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")


def test_what_a_part_leaves_goes_to_the_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits: dict[str, int] = {}

    def run_part(part: Part, limit: int, *_: Any) -> str:
        limits[part.name] = limit
        return "passed, 0 s"

    monkeypatch.setattr(driver, "run_part", run_part)
    monkeypatch.setattr(driver.shutil, "which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert driver.main([str(tmp_path / "out")]) == 0
    fixed = {part.name: part.seconds for part in default_parts(Run(tmp_path, sanitizer="x"))}
    assert {name: limits[name] for name in ORDER if name != "tests"} == {
        name: fixed[name] for name in ORDER if name != "tests"
    }
    # All but the racecheck after them.
    assert limits["tests"] >= SECONDS - fixed["racecheck"] - 1


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    """Return a kit made beside what is here, with a cache of one kernel that was elsewhere."""
    folder = tmp_path / "kit"
    (folder / kit.WHEELS).mkdir(parents=True)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    facts = {"python": python, "commit": "abc"}
    facts |= {name: kit.version(name) for name in ("torch", "triton")}
    (folder / kit.FACTS).write_text(json.dumps(facts))
    with zipfile.ZipFile(folder / kit.WHEELS / "peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "here = True\n")
    (folder / "_extension.cpython-312-x86_64-linux-gnu.so").write_bytes(b"library")
    cache = tmp_path / "elsewhere/KEY"
    cache.mkdir(parents=True)
    (cache / "kernel.cubin").write_bytes(b"program")
    paths = {"kernel.cubin": str(cache / "kernel.cubin")}
    (cache / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    with tarfile.open(folder / kit.CACHE, "w:xz") as held:
        held.add(cache.parent, arcname=".")
    return folder


def test_what_is_carried_is_found_where_it_is_unpacked(
    carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    (tmp_path / "sftmix_kernels").mkdir()
    found = kit.Kit(carried)
    assert (found.fits, found.commit) == (True, "abc")
    environment = found.unpack(tmp_path / "scratch", install=True)
    assert (tmp_path / "scratch/site/peer/__init__.py").read_text() == "here = True\n"
    (extension,) = (tmp_path / "sftmix_kernels").iterdir()
    assert extension.name == "_extension.cpython-312-x86_64-linux-gnu.so"
    cache = Path(environment["TRITON_CACHE_DIR"])
    group = json.loads((cache / "KEY/__grp__kernel.json").read_text())
    assert group["child_paths"] == {"kernel.cubin": str(cache / "KEY/kernel.cubin")}
    assert (cache / "KEY/kernel.cubin").exists()


def test_of_a_kit_for_another_machine_only_wheels_are_used(
    carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    facts = json.loads((carried / kit.FACTS).read_text())
    (carried / kit.FACTS).write_text(json.dumps({**facts, "torch": "1.0"}))
    found = kit.Kit(carried)
    assert "wheels alone" in found.says
    assert found.unpack(tmp_path / "scratch", install=True) == {}
    assert not (tmp_path / "sftmix_kernels").exists()
    assert (tmp_path / "scratch/site/peer").exists()


def test_the_kit_holds_extension_cache_wheels_and_facts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    monkeypatch.setattr(kit, "interpreter", lambda: "/usr/bin/python3.12")
    monkeypatch.setattr(kit, "make_environment", lambda python, where: made.append(python))
    monkeypatch.setattr(kit, "build_extension", lambda _, to: (to / "_extension.so").touch())
    monkeypatch.setattr(kit, "fill_cache", lambda _, to: to.write_bytes(b"cache"))
    monkeypatch.setattr(kit, "fetch_wheels", lambda to: to.mkdir(exist_ok=True))
    folder = tmp_path / "kit"
    assert kit.make_kit(folder) == 0
    assert made == ["/usr/bin/python3.12"]
    assert {file.name for file in folder.iterdir()} == {
        "_extension.so",
        "kit.json",
        "triton.tar.xz",
        "wheels",
    }
    facts = json.loads((folder / "kit.json").read_text())
    assert (facts["torch"], facts["triton"], facts["python"]) == ("2.11.0", "3.6.0", "3.12")
    monkeypatch.setattr(kit, "MOST_BYTES", 10)
    assert kit.make_kit(folder) == 1
    assert "expected at most 10" in capsys.readouterr().err


def test_a_step_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise subprocess.CalledProcessError(3, "pip")

    monkeypatch.setattr(kit, "interpreter", lambda: "/usr/bin/python3.12")
    for step in ("fetch_wheels", "make_environment", "build_extension"):
        monkeypatch.setattr(kit, step, fails)
    monkeypatch.setattr(kit, "fill_cache", lambda _, to: to.write_bytes(b"cache"))
    assert kit.make_kit(tmp_path / "kit") == 1
    assert (tmp_path / "kit/triton.tar.xz").exists()
    assert capsys.readouterr().err.count("returned non-zero exit status 3") == 3


def test_a_python_that_does_not_run_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a version manager's shim that knows of none."""
    for folder, status in (("shims", 127), ("bin", 0)):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "python3.12"
        file.write_text(f"#!/bin/sh\nexit {status}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    assert kit.interpreter() is None
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:{tmp_path / 'bin'}")
    assert kit.interpreter() == str(tmp_path / "bin/python3.12")


def test_without_that_python_the_kit_has_wheels_and_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(kit, "interpreter", lambda: None)
    monkeypatch.setattr(kit, "commit", lambda: "")
    monkeypatch.setattr(kit.subprocess, "run", lambda command, **_: asked.append(command))
    assert kit.make_kit(tmp_path / "kit") == 1
    assert "no python3.12 that runs" in capsys.readouterr().err
    (download,) = asked
    assert {"--no-deps", "--python-version", "3.12"} <= set(download)
    # Each with the version that the tests run on.
    assert "liger-kernel==0.8.5" in download
    assert [word for word in download if word.startswith("cut-cross-entropy==")]
