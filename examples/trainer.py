"""SFTMix from Python: score the data, split them, train. Toy model, a CPU, half a minute.

python examples/trainer.py FOLDER [EXAMPLES]

With a model of yours, leave out `build_toy_model` and give its name to `from_pretrained`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix import SFTMixConfig, SFTMixTrainer, make_collator
from sftmix.data.examples import load_examples
from sftmix.demo_data import TRAIN
from sftmix.pairs.partition import from_scores, summary
from sftmix.templates.tokenizing import tokenize_examples
from sftmix.toy import build_toy_model
from sftmix.training.config import ScoreConfig
from sftmix.training.reference import finished_scores, reference_trainer

SCORINGS = 5


def main(folder: Path, number: int = 256) -> float:
    """Train into the folder and return the mean training loss."""
    build_toy_model(folder / "toy", [TRAIN], vocab_size=1024, hidden_size=64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "toy")
    dataset = tokenize_examples(load_examples([TRAIN])[:number], tokenizer, max_length=128)
    collator = make_collator(tokenizer)

    # One epoch of next-token prediction; every example is scored at 5 points of it.
    reference, scores = reference_trainer(
        AutoModelForCausalLM.from_pretrained(folder / "toy"),
        dataset,
        collator,
        ScoreConfig(str(folder / "score"), num_scorings=SCORINGS, learning_rate=1e-3),
    )
    reference.train()
    partition = from_scores(
        dataset["id"][:], dataset["content_hash"][:], *finished_scores(scores, SCORINGS)
    )
    print(summary(partition))

    trainer = SFTMixTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "toy"),
        args=SFTMixConfig(
            str(folder / "sftmix"), mu=0.2, alpha=0.5, learning_rate=1e-3, num_train_epochs=1
        ),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        confident=partition,
    )
    result = trainer.train()
    trainer.save_model()
    return float(result.training_loss)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(map(str.isdigit, sys.argv[2:])):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
