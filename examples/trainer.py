"""SFTMix in a script of transformers' Trainer: score the data, train. A toy, half a minute.

python examples/trainer.py FOLDER [EXAMPLES]

With a model of yours, leave out `build_toy_model` and give its name to `from_pretrained`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix import ScoreConfig, SFTMixConfig, SFTMixTrainer, score
from sftmix.data.examples import load_examples
from sftmix.demo_data import TRAIN
from sftmix.pairs.partition import summary
from sftmix.templates.tokenizing import tokenize_examples
from sftmix.toy import build_toy_model


def main(folder: Path, number: int = 256) -> float:
    """Train into the folder and return the mean training loss."""
    build_toy_model(folder / "toy", [TRAIN], vocab_size=1024, hidden_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder / "toy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "toy")
    # input_ids, and labels that are -100 outside of responses.
    dataset = tokenize_examples(load_examples([TRAIN])[:number], tokenizer, max_length=128)

    # One epoch of a copy of the model; every example is scored at 5 points of it.
    confident = score(
        model,
        ScoreConfig(str(folder / "score"), learning_rate=1e-3),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    print(summary(confident))

    trainer = SFTMixTrainer(
        model=model,
        args=SFTMixConfig(str(folder / "sftmix"), learning_rate=1e-3, num_train_epochs=1),
        train_dataset=dataset,
        processing_class=tokenizer,
        confident=confident,
    )
    result = trainer.train()
    trainer.save_model()
    return float(result.training_loss)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(map(str.isdigit, sys.argv[2:])):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
