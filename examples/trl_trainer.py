"""SFTMix in a script of TRL's: the config and the trainer come from sftmix. Toy model, a CPU.

python examples/trl_trainer.py FOLDER [EXAMPLES]

(This file is not called trl.py: Python would import it in the place of the library.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets

from sftmix.demo_data import TRAIN
from sftmix.integrations.trl import SFTMixSFTConfig, SFTMixSFTTrainer, score
from sftmix.toy import build_toy_model


def main(folder: Path, number: int = 256) -> float:
    """Train into the folder and return the mean training loss."""
    build_toy_model(folder / "toy", [TRAIN], vocab_size=1024, hidden_size=64)
    rows = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()[:number]]
    dataset = datasets.Dataset.from_list(
        [{"prompt": row["instruction"] + "\n", "completion": row["output"]} for row in rows]
    )
    args = SFTMixSFTConfig(
        str(folder / "sftmix"),
        max_length=128,
        learning_rate=1e-3,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    # A partition: which examples are in the confident half, by one epoch that scores them.
    confident = score(str(folder / "toy"), args, train_dataset=dataset)
    trainer = SFTMixSFTTrainer(
        str(folder / "toy"), args, train_dataset=dataset, confident=confident
    )
    result = trainer.train()
    return float(result.training_loss)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(map(str.isdigit, sys.argv[2:])):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
