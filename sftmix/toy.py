"""A small model made on the spot: a byte-level BPE tokenizer and a random Llama.

python -m sftmix.toy --output toy-model [--data train.jsonl ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sftmix import demo_data
from sftmix.cli import as_typed
from sftmix.data.examples import OnBadRow, load_examples
from sftmix.runs.failures import OneMessage, OneSpelling
from sftmix.templates.chat import PLAIN_TEMPLATE

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def _texts(data: Sequence[str | Path], on_bad_row: OnBadRow) -> list[str]:
    texts = []
    for example in load_examples(data, on_bad_row=on_bad_row):
        if example.messages is None:
            raise ValueError(f"{example.source}: a tokenizer needs text, this row is tokens")
        texts.append(
            "".join(
                "\n\n### Response:\n" + (message["content"] or "")
                if message["role"] == "assistant"
                else "### Instruction:\n" + message["content"]
                for message in example.messages
            )
        )
    return texts


def _build_model(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    max_length: int,
    seed: int,
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 8) * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def build_toy_model(
    output: str | Path,
    data: Sequence[str | Path],
    *,
    vocab_size: int = 4096,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 1024,
    seed: int = 0,
    on_bad_row: OnBadRow = "error",
) -> None:
    """Train a tokenizer on `data`, build a random Llama for it, and save both into `output`.

    The vocabulary has at most `vocab_size` entries; little text yields fewer, and the model gets as
    many as there are. The same arguments give the same files. Both load with
    `from_pretrained(output)`.

    Raises:
        ValueError: `output` is a file or a folder with something in it, a size does not fit, or an
            example of `data` is tokens instead of text; else as `load_examples` does.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output: expected a new or empty folder, got {folder}, which is neither")
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 3
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size: expected at least {smallest} (all bytes and 3 special tokens), "
            f"got {vocab_size}"
        )
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "max_length": max_length}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if hidden_size < 1 or hidden_size % (2 * num_heads):
        # Rotary embeddings turn pairs of numbers, so a head's size must be even.
        raise ValueError(
            f"hidden_size: expected a multiple of 2 * num_heads = {2 * num_heads}, "
            f"got {hidden_size}"
        )
    tokenizer = _train_tokenizer(_texts(data, on_bad_row), vocab_size)
    tokenizer.model_max_length = max_length
    model = _build_model(tokenizer, hidden_size, num_layers, num_heads, max_length, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(
        f"{folder}: a random Llama with {model.num_parameters():,} parameters, "
        f"{num_layers} layers of {hidden_size}, a vocabulary of {len(tokenizer):,}"
    )


def spellings(name: str) -> list[str]:
    """Return a flag in both forms, as the command line of sftmix takes them."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `build_toy_model`; exit with 2 and a message on wrong input."""
    parser = OneMessage(
        prog="python -m sftmix.toy",
        description="Build a small random Llama with its tokenizer.",
        formatter_class=OneSpelling,
    )
    parser.add_argument("--output", required=True, help="a new or empty folder")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[str(demo_data.TRAIN)],
        help="files to train the tokenizer on (default: the bundled demo data)",
    )
    numbers = {
        "vocab_size": (4096, "entries of the vocabulary at most"),
        "hidden_size": (128, "size of the hidden states"),
        "num_layers": (2, "layers"),
        "num_heads": (4, "attention heads"),
        "max_length": (1024, "positions"),
        "seed": (0, "seed of the weights"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(
            *spellings(name), type=int, default=default, help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        *spellings("on_bad_row"),
        choices=("error", "skip"),
        default="error",
        help="a malformed row stops, or is left out and counted (default: error)",
    )
    options = vars(parser.parse_args(arguments))
    try:
        build_toy_model(options.pop("output"), options.pop("data"), **options)
    except (OSError, ValueError) as error:
        parser.error(as_typed(str(error), {*options, "output", "data"}, parser.words))


if __name__ == "__main__":
    main()
