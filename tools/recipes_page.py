"""Write `recipes/README.md`: the paper's results, and the recipe that repeats each.

python -m tools.recipes_page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sftmix.report.paper import INSTRUCTION_FOLLOWING, MEDICINE, ROLES, ROWS, PaperRow

PAGE = Path(__file__).parents[1] / "recipes" / "README.md"
HEADING = """# Recipes

Each is one YAML file for several commands: the reference model scores the data, the target is
trained, and answers questions or, in medicine, is evaluated.

<!-- tested: tests/sftmix/recipe/test_recipes.py::test_a_recipe_scores_and_trains -->
```sh
sftmix score --config recipes/llama-3.1-8b-alpaca.yaml
sftmix train --config recipes/llama-3.1-8b-alpaca.yaml
sftmix generate --config recipes/llama-3.1-8b-alpaca.yaml \\
    --format mt_bench --questions question.jsonl --output answers
sftmix evaluate --config recipes/llama-3.1-8b-medalpaca.yaml \\
    --pubmedqa_data ori_pqal.json --pubmedqa_ids test_ground_truth.json
```

On the paper's 8 GPUs, the weights sharded over them:

<!-- not run: needs several GPUs -->
```sh
torchrun --nproc_per_node 8 -m sftmix score --config recipes/llama-3.1-8b-alpaca.yaml --fsdp
torchrun --nproc_per_node 8 -m sftmix train --config recipes/llama-3.1-8b-alpaca.yaml --fsdp
```

With fewer, `--gradient_accumulation_steps` keeps the batch at 32. Runs go to `runs/`. Recipes of
one model and data share the scored run, so score once: `-ntp`, `-equal`, `-mixup` and `-ir-dro`
train on the same batches. Flags override a recipe: another model is `--model`, with `--output` and
`--partition` of its own where the recipe's runs are there already. `paper.yaml` holds what all
share, a comment on each value saying whether it is the paper's or ours; `medalpaca.yaml` says what
is not known of those data. An installed package holds the recipes too:
`sftmix train --config llama-3.1-8b-alpaca.yaml` says where.

The tests run every recipe on the CPU with a tiny model of its family. Nobody has trained the models
below with them yet: the figures are the paper's.

## The paper's results
"""


OTHERS = """## Others

| recipe | what |
|---|---|
| `llama-3.1-8b-ultrachat`, `-ntp` | UltraChat-200K |
| `llama-3.1-8b-tulu3`, `-ntp` | Tulu3-939K |
| `llama-3.1-8b-alpaca-ir-dro` | IR-DRO, which weights examples by their loss |
| `llama-3.1-8b-alpaca-alpagasus` | SFTMix on the rows that AlpaGasus keeps |
| `llama-3.1-8b-alpaca-long` | SFTMix on the 1,000 longest responses |
| `llama-3.1-8b-alpaca-weak` | Gemma 2 2B scores, Llama 3.1 8B is trained |
| `llama-3.1-8b-alpaca-lora`, `-ntp` | LoRA |
"""


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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
