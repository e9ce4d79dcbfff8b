"""Build the distributions, install them where nothing is, and use them away from the checkout.

    python tests/installation.py [--folder FOLDER]          all of it: minutes, gigabytes
    python -I tests/installation.py --installed [--built]   only use what is installed

The source distribution and a wheel are made in isolation, as `python -m build` and `pip install .`
do; torch is not there then, and no kernel is compiled. The wheel is installed into an empty
environment, then the source distribution over it, without isolation: that compiles the kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "llama-3.1-8b-alpaca.yaml"
TOY = ("--output", "toy", "--vocab_size", "1024", "--hidden_size", "64")


def run(*words: str | Path, folder: Path, **changes: str) -> None:
    """Run a command in a folder and show it.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    print("==", *words, flush=True)
    own = ("PYTHONPATH", "PYTHONSAFEPATH")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    subprocess.run(words, cwd=folder, env={**environment, **changes}, check=True)


def environment(folder: Path) -> Path:
    """Make an empty virtual environment and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin/python"


def check_distributions(folder: Path) -> None:
    """Build, install and use the distributions in `folder`."""
    source, dist = folder / "source", folder / "dist"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)

    python = environment(folder / "building")
    run(python, "-m", "pip", "install", "--quiet", "build", "twine", folder=folder)
    run(python, "-m", "build", "--outdir", dist, source, folder=folder)
    (archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    run(python, "-m", "twine", "check", "--strict", archive, wheel, folder=folder)

    python, pins = environment(folder / "using"), ROOT / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", pins]
    use = [python, "-I", Path(__file__).resolve(), "--installed"]
    run(*install, wheel, folder=folder)
    run(*use, folder=folder)
    run(*install, "setuptools", "ninja", "wheel", folder=folder)
    anew = ["--no-build-isolation", "--no-deps", "--force-reinstall"]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    run(*install, *anew, archive, folder=folder, PATH=path)
    run(*use, "--built", folder=folder)


def check_installed(built: bool) -> None:
    """Use what is installed: README's loss, and the commands on a toy model.

    Raises:
        AssertionError: something is missing, or kernels are compiled and should not be.
    """
    import sftmix
    from sftmix_kernels.extension import build_info

    place = Path(sftmix.__file__).parent
    assert not place.is_relative_to(ROOT), f"expected an installed package, got {place}"
    assert (build_info() is not None) == built, f"compiled kernels: {build_info()}"
    for name in ("evaluation/tasks/medqa.yaml", "report/template.html", "demo_data/train.jsonl"):
        assert (place / name).is_file(), name

    readme = str(metadata("sftmix").get_payload())
    exec(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0], {})

    with tempfile.TemporaryDirectory() as name:
        folder, program = Path(name), Path(sys.executable).with_name("sftmix")
        run(program, "--version", folder=folder)
        run(sys.executable, "-m", "sftmix", "--version", folder=folder)
        run(sys.executable, "-m", "sftmix.toy", *TOY, folder=folder)
        rows = (place / "demo_data/train.jsonl").read_text(encoding="utf-8").splitlines(True)
        (folder / "data.jsonl").write_text("".join(rows[:32]), encoding="utf-8")
        words = ["--model", "toy", "--data", "data.jsonl", "--max_length", "64"]
        words += ["--use_cpu", "true", "--disable_tqdm", "true", "--output"]
        run(program, "score", *words, "score", folder=folder)
        partition = ["--partition", "score/confidence.parquet", "--num_train_epochs", "1"]
        run(program, "train", *words, "run", *partition, folder=folder)
        assert (folder / "run/model.safetensors").is_file()
        hint = [program, "train", "--config", RECIPE]
        found = subprocess.run(hint, cwd=folder, capture_output=True, text=True, check=False)
        assert f"did you mean {place / 'recipes' / RECIPE}?" in found.stderr, found.stderr
        assert (place / "recipes" / RECIPE).is_file()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="an empty one, which is kept")
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--built", action="store_true", help="expect compiled kernels")
    arguments = parser.parse_args()
    if arguments.installed:
        check_installed(arguments.built)
    elif arguments.folder is not None:
        check_distributions(arguments.folder.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            check_distributions(Path(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
