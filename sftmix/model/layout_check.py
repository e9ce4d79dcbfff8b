"""Whether a model keeps apart examples that a layout puts together, and leaves padding unread."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sftmix.model.head import HeadAdapter, without_peft
from sftmix.model.probe import evaluating, some_tokens
from sftmix.pairs.layouts import Integers, Layout

# Three short examples: in packed rows the second and third share one, and a slot is left over.
CHECKED_LENGTHS = (12, 7, 4)


def check_layout(model: nn.Module, layout: str) -> None:
    """Find out whether a model keeps apart examples that are laid out together.

    Three short random examples go through the model's own forward, up to its head, in eval mode:

    - The gradient of the last one's hidden states with respect to the embeddings of the others has
      to be zero. It is exactly that, in any dtype, where none is read: attention's share of a
      masked token is 0. (Values do not tell: in bfloat16 what a state-space layer of a fresh
      model carries over can be less than rounding.)
    - Its hidden states have to be those of each example alone, or positions are counted on. The
      largest ``|h' - h| / |h|`` of a token is held to twice that of the same examples padded, which
      is rounding, plus ``sqrt(eps)`` of the dtype computed in: rounding is some ``eps``, another
      position changes a token by a share of order one, and this is the geometric mean of the two.

    Gradients of parameters, modes of modules and the state of random generators stay as they are.

    Read one by one, examples are apart; there the model's forward has to call its backbone as one
    does that knows only tokens: its logits have to be those of each example alone.

    Raises:
        ValueError: the model fails one of them, or takes no ``position_ids`` where there are some.
    """
    laid_out, padded = Layout(layout), Layout()
    if laid_out == padded:
        return
    model = without_peft(model)
    refusal = f"layout: {type(model).__name__} cannot take {layout!r} batches, use 'padded'"
    if layout == "sequential":
        return check_one_by_one(model, refusal)
    backbone: Any = model.base_model
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise ValueError(f"{refusal}: it takes no position_ids")
    random = np.random.default_rng(0)
    vocab_size = model.config.get_text_config().vocab_size
    examples = [random.integers(vocab_size, size=length) for length in CHECKED_LENGTHS]
    with evaluating(backbone):
        with torch.no_grad():
            alone = torch.cat([read(backbone, padded, [one]).hidden for one in examples])
            rounding = relative_error(read(backbone, padded, examples).hidden, alone)
        with torch.enable_grad():
            reading = read(backbone, laid_out, examples)
            if reads_others(reading, CHECKED_LENGTHS[-1]):
                raise ValueError(f"{refusal}: an example reads the one before it in its row")
    error, allowed = relative_error(reading.hidden, alone), 2 * rounding + epsilon(alone) ** 0.5
    if not error <= allowed:
        raise ValueError(
            f"{refusal}: a token's hidden state is {error:.3g} off what it is alone, relative to "
            f"its norm; rounding explains {allowed:.3g}"
        )


@torch.no_grad()
def check_one_by_one(model: Any, refusal: str) -> None:
    """Check the layout "sequential" of a model whose forward knows ``parts``."""
    vocab_size = model.config.get_text_config().vocab_size
    random = np.random.default_rng(0)
    tokens = torch.from_numpy(random.integers(vocab_size, size=(1, sum(CHECKED_LENGTHS))))
    tokens = tokens.to(model.device)
    options: dict[str, Any] = {"use_cache": False}
    with evaluating(model):
        examples = tokens.split(CHECKED_LENGTHS, dim=1)
        alone = torch.cat([model(one, **options).logits[0] for one in examples])
        options.update(parts=CHECKED_LENGTHS, head_input=lambda hidden: hidden)
        found = model(tokens, **options).value
    if found.shape != alone.shape or not relative_error(found, alone) <= epsilon(alone) ** 0.5:
        raise ValueError(f"{refusal}: its logits are not those of each example alone")


@torch.no_grad()
def ignores_padding(
    model: nn.Module, head: HeadAdapter, device: torch.device, longest: int, pad_token_id: int
) -> bool:
    """Return whether padding behind an example, without a mask, leaves what the head reads of it.

    ``longest`` is the most tokens of a row. In eval mode, a few tokens' hidden states have to be

    - the same bits with padding behind them and with other tokens there: none of those is read.
      All products have the same shapes, so that nothing may round differently. (An expert's number
      of rows differs, and a mixture of experts may fail for it.)
    - those that the tokens have without padding, when it fills a row of ``longest`` tokens, up to
      the ``sqrt(eps)`` of `check_layout`: nothing hangs on the length of a row, as it does where
      rotary embeddings stretch with it.
    """
    tokens = some_tokens(head.model, device)[:, : longest // 2]
    size = tokens.shape[1]
    padding = torch.full((1, longest), pad_token_id, device=device)

    def read(*parts: Tensor) -> Tensor:  # (size, D)
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden)
            return hidden

        rows = torch.arange(size, device=device)
        model(input_ids=torch.cat(parts, 1), use_cache=False, rows=rows, head_input=keep)
        return kept[0]

    with evaluating(model):
        alone, filled = read(tokens), read(tokens, padding[:, size:])
        unread = torch.equal(*(read(tokens, end) for end in (padding[:, :size], tokens.flip(1))))
    return unread and relative_error(filled, alone) <= epsilon(alone) ** 0.5


class Reading(NamedTuple):
    """A forward: hidden states of the tokens (T, D), the embeddings, and where tokens lie there."""

    hidden: Tensor
    embedded: Tensor  # (R, L, any)
    flat: Tensor  # (T,)


def read(backbone: Any, layout: Layout, examples: Sequence[Integers]) -> Reading:
    """Return what the head would read of examples laid out, as a function of embeddings."""
    slots = layout.place(np.array([len(example) for example in examples]))
    inputs = layout.inputs(np.concatenate(examples), slots, pad_token_id=0)
    tensors = {name: torch.from_numpy(array).to(backbone.device) for name, array in inputs.items()}
    leaves: list[Tensor] = []

    def make_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0].clone()  # which the model may change in place

    hook = backbone.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        hidden: Tensor = backbone(**tensors, use_cache=False)[0]
    finally:
        hook.remove()
    flat = torch.from_numpy(slots.flat).to(hidden.device)
    return Reading(hidden.flatten(0, 1)[flat], leaves[0], flat)


def reads_others(reading: Reading, length: int) -> bool:
    """Return whether the last ``length`` hidden states depend on the others' embeddings."""
    last = reading.hidden[-length:]
    # Not ones: what a layer norm gives adds up to the same whatever it reads.
    weights = np.random.default_rng(1).choice([-1.0, 1.0], size=last.shape)
    upstream = torch.from_numpy(weights).to(last)
    (gradient,) = torch.autograd.grad(last, reading.embedded, upstream)
    others = reading.flat[:-length].to(gradient.device)
    return bool(gradient.flatten(0, 1)[others].any())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest ``|found - expected| / |expected|`` of a row."""
    found, expected = found.detach().float(), expected.float()
    smallest = torch.finfo(torch.float32).tiny
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(smallest)).max())


def epsilon(hidden: Tensor) -> float:
    """Return eps of the dtype computed in; a GPU may round float32 products to TF32."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.finfo(torch.get_autocast_dtype(device)).eps
    return max(torch.finfo(hidden.dtype).eps, 2.0**-10 if hidden.is_cuda else 0.0)
