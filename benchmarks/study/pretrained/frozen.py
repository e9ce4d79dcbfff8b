"""Train the upper layers of a model alone, on what its lower layers give, computed once.

Of n layers the upper k and the final norm are trained; the embeddings, the lower layers and the
head stay as they are, so what the lower layers give for a text never changes. It is computed once
and becomes the embedding table of a model of k layers: a row for each position of each example. The
row's number takes the place of the token. Losses and gradients are those of the whole model with
its lower part frozen, to rounding, and any trainer can train it. Positions are counted as before:
rotary embeddings are applied inside of the layers.

Legend: T tokens of all examples, one after another, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sftmix.model.probe import evaluating
from sftmix.training.scoring import batches_by_length

PAD = 0  # the row of the table that no example has
MAX_TOKENS = 2048  # of a batch


def check_trained_layers(model: Any, trained_layers: int) -> None:
    """Refuse a number of layers that a model cannot be parted at.

    Raises:
        ValueError: it is not between 1 and one below the model's.
    """
    layers = len(model.model.layers)
    if not 1 <= trained_layers < layers:
        raise ValueError(
            f"trained_layers: expected 1 to {layers - 1} of the model's {layers} layers, "
            f"got {trained_layers}"
        )


@contextlib.contextmanager
def lower_part(model: Any, trained_layers: int) -> Iterator[nn.Module]:
    """Hand out the model's backbone without its upper layers and its norm; then put them back."""
    backbone, config = model.model, model.config
    kept = (backbone.layers, backbone.norm, config.num_hidden_layers)
    backbone.layers = backbone.layers[:-trained_layers]
    backbone.norm, config.num_hidden_layers = nn.Identity(), len(backbone.layers)
    try:
        yield backbone
    finally:
        backbone.layers, backbone.norm, config.num_hidden_layers = kept


@torch.no_grad()
def activations(
    model: Any,
    trained_layers: int,
    examples: Sequence[Sequence[int]],  # tokens
) -> Tensor:  # (T, D)
    """Return what the lowest trained layer reads, example by example.

    Raises:
        ValueError: as `check_trained_layers`.
    """
    check_trained_layers(model, trained_layers)
    lengths = [len(tokens) for tokens in examples]
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    with lower_part(model, trained_layers) as backbone, evaluating(model):
        for rows in batches_by_length(lengths, MAX_TOKENS, padding=1.0):
            longest = lengths[rows[0]]
            # Padded on the right, where a causal model does not look.
            tokens = torch.zeros(len(rows), longest, dtype=torch.long)
            for place, row in enumerate(rows):
                tokens[place, : lengths[row]] = torch.tensor(examples[row])
            hidden = backbone(input_ids=tokens, use_cache=False).last_hidden_state
            for place, row in enumerate(rows):
                found[row] = hidden[place, : lengths[row]].clone()
    return torch.cat(found)


def upper_part(model: Any, trained_layers: int, read: Tensor) -> Any:
    """Return a model of the upper layers, which reads rows 1 to T of ``read`` (T, D).

    The given model is cut: its lower layers are gone. Row `PAD` is zero. The table has at least V
    rows (activations over again), as any token is a row then.

    Raises:
        ValueError: as `check_trained_layers`.
    """
    check_trained_layers(model, trained_layers)
    backbone, config = model.model, model.config
    head = model.get_output_embeddings().weight
    rows = max(len(read) + 1, config.vocab_size)
    table = read[torch.arange(-1, rows - 1) % len(read)]
    table[PAD] = 0
    config.tie_word_embeddings = False
    backbone.layers = backbone.layers[-trained_layers:]
    config.num_hidden_layers = trained_layers
    # A layer finds its kind of attention by its place.
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[-trained_layers:]
    backbone.embed_tokens = nn.Embedding.from_pretrained(table, freeze=True)
    model.lm_head.weight = nn.Parameter(head.detach(), requires_grad=False)
    return model


def put_back(model: Any, upper: Any) -> None:
    """Copy what the upper part of a model has learnt into the whole model."""
    trained = upper.model.layers
    model.model.layers[-len(trained) :].load_state_dict(trained.state_dict())
    model.model.norm.load_state_dict(upper.model.norm.state_dict())
