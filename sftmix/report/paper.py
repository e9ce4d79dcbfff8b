"""The results that the paper reports (arXiv 2410.05248), and the recipe that repeats each.

Scores of MT-Bench are from 1 to 10, all others are in percent. A row's recipe is
`recipes/NAME.yaml` of the repository. The paper names no version of Mistral-7B; 0.1 is our choice.

python -m sftmix.report.paper --markdown recipes/README.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEADING = """# Recipes

Each is one YAML file for several commands: the reference model scores the data, the target is
trained, and answers questions or, in medicine, is evaluated.

```sh
sftmix score --config recipes/llama-3.1-8b-alpaca.yaml
sftmix train --config recipes/llama-3.1-8b-alpaca.yaml
sftmix generate --config recipes/llama-3.1-8b-alpaca.yaml \\
    --format mt_bench --questions question.jsonl --output answers
sftmix evaluate --config recipes/llama-3.1-8b-medalpaca.yaml
```

On the paper's 8 GPUs, the weights sharded over them:

```sh
torchrun --nproc_per_node 8 -m sftmix score --config recipes/llama-3.1-8b-alpaca.yaml --fsdp
torchrun --nproc_per_node 8 -m sftmix train --config recipes/llama-3.1-8b-alpaca.yaml --fsdp
```

With fewer, `--gradient_accumulation_steps` keeps the batch at 32. Runs go to `runs/`. Recipes of
one model and data share the scored run, so score once: `-ntp`, `-equal`, `-mixup` and `-ir-dro`
train on the same batches. Flags override a recipe: another model is `--model`, with `--output` and
`--partition` of its own where the recipe's runs are there already. `paper.yaml` holds what all
share, a comment on each value saying whether it is the paper's or ours; `medalpaca.yaml` says what
is not known of those data.

The tests run every recipe on the CPU with a tiny model of its family. Nobody has trained the models
below with them yet: the figures are the paper's.

## The paper's results
"""
OTHERS = """## Others

| recipe | what |
|---|---|
| `llama-3.1-8b-ultrachat`, `-ntp` | UltraChat-200K |
| `llama-3.1-8b-tulu3`, `-ntp` | Tulu3-939K |
| `llama-3.1-8b-alpaca-ir-dro` | IR-DRO, a relative that weights examples |
| `llama-3.1-8b-alpaca-alpagasus` | SFTMix on the rows that AlpaGasus keeps |
| `llama-3.1-8b-alpaca-long` | SFTMix on the 1,000 longest responses |
| `llama-3.1-8b-alpaca-weak` | Gemma 2 2B scores, Llama 3.1 8B is trained |
| `llama-3.1-8b-alpaca-lora`, `-ntp` | LoRA |
"""

INSTRUCTION_FOLLOWING = "instruction following"
MEDICINE = "medicine"
ROLES = "roles"

LLAMA = "meta-llama/Llama-3.1-8B"
MISTRAL = "mistralai/Mistral-7B-v0.1"
QWEN = "Qwen/Qwen2.5-14B"

MT_BENCH = "MT-Bench"
WIN_RATE = "AlpacaEval-2 WR"
CONTROLLED_WIN_RATE = "AlpacaEval-2 LC WR"  # length-controlled


@dataclass(frozen=True)
class PaperRow:
    """A row of one of the paper's tables."""

    table: str  # "instruction following", "medicine" or "roles"
    model: str  # name on the hub
    data: str  # as the paper calls it
    method: str  # as --method
    recipe: str  # file in recipes/, without .yaml
    figures: Mapping[str, float]  # {"MT-Bench": 4.3625, ...}


def _alpaca(model: str, method: str, recipe: str, *figures: float) -> PaperRow:
    names = (MT_BENCH, WIN_RATE, CONTROLLED_WIN_RATE)
    values = dict(zip(names, figures, strict=True))
    return PaperRow(INSTRUCTION_FOLLOWING, model, "Alpaca-52K", method, recipe, values)


def _medicine(model: str, method: str, recipe: str, *figures: float) -> PaperRow:
    names = ("MedQA", "MedQA-5", "PubMedQA", "MedMCQA", "mean")
    values = dict(zip(names, figures, strict=True))
    return PaperRow(MEDICINE, model, "MedAlpaca-263K", method, recipe, values)


def _role(method: str, recipe: str, *figures: float) -> PaperRow:
    values = dict(zip((MT_BENCH, CONTROLLED_WIN_RATE), figures, strict=True))
    return PaperRow(ROLES, LLAMA, "Alpaca-52K", method, recipe, values)


ROWS: tuple[PaperRow, ...] = (
    _alpaca(LLAMA, "ntp", "llama-3.1-8b-alpaca-ntp", 4.3625, 4.0714, 8.6528),
    _alpaca(LLAMA, "sftmix", "llama-3.1-8b-alpaca", 4.5825, 4.9031, 10.3195),
    _alpaca(MISTRAL, "ntp", "mistral-7b-alpaca-ntp", 4.6163, 4.3560, 9.1759),
    _alpaca(MISTRAL, "sftmix", "mistral-7b-alpaca", 4.9100, 4.5386, 9.4994),
    _alpaca(QWEN, "ntp", "qwen2.5-14b-alpaca-ntp", 6.1930, 7.0764, 13.9508),
    _alpaca(QWEN, "sftmix", "qwen2.5-14b-alpaca", 6.5247, 7.8810, 15.0235),
    _medicine(LLAMA, "ntp", "llama-3.1-8b-medalpaca-ntp", 59.31, 54.52, 75.40, 53.65, 60.72),
    _medicine(LLAMA, "sftmix", "llama-3.1-8b-medalpaca", 60.88, 55.38, 77.80, 54.15, 62.05),
    _medicine(MISTRAL, "ntp", "mistral-7b-medalpaca-ntp", 49.10, 44.62, 75.40, 48.15, 54.32),
    _medicine(MISTRAL, "sftmix", "mistral-7b-medalpaca", 51.77, 45.72, 77.40, 49.03, 55.98),
    _role("ntp", "llama-3.1-8b-alpaca-ntp", 4.3625, 8.6528),
    _role("sftmix", "llama-3.1-8b-alpaca", 4.5825, 10.3195),
    _role("equal", "llama-3.1-8b-alpaca-equal", 4.4062, 8.2856),
    _role("mixup", "llama-3.1-8b-alpaca-mixup", 4.5062, 7.2964),
)


def table(rows: Sequence[PaperRow]) -> str:
    """Rows of one table of the paper, in Markdown."""
    names = list(rows[0].figures)
    lines = [f"| model | data | method | {' | '.join(names)} | recipe |"]
    lines.append("|---|---|---|" + "---:|" * len(names) + "---|")
    digits = 2 if rows[0].table == MEDICINE else 4
    for row in rows:
        figures = " | ".join(f"{figure:.{digits}f}" for figure in row.figures.values())
        lines.append(f"| {row.model} | {row.data} | {row.method} | {figures} | `{row.recipe}` |")
    return "\n".join(lines)


def page() -> str:
    """`recipes/README.md`."""
    parts = [HEADING]
    for name in (INSTRUCTION_FOLLOWING, MEDICINE, ROLES):
        rows = [row for row in ROWS if row.table == name]
        parts.append(f"{name.capitalize()}:\n\n{table(rows)}\n")
    return "\n".join([*parts, OTHERS])


def main(words: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m sftmix.report.paper",
        description="What the paper reports, and the recipe of each.",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write it there")
    arguments = parser.parse_args(words)
    if arguments.markdown is None:
        print(page(), end="")
    else:
        arguments.markdown.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
