"""Where the tokens of a batch lie, and whether a model keeps its examples apart there.

- ``padded``: an example a row, padded on the right, with an attention mask.
- ``padding_free``: all examples one after another in one row.
- ``packed``: several rows of a common length, each holding whole examples one after another.
- ``sequential``: as padding-free, but the backbone reads the examples one by one (`backbone.py`),
  each as if it were alone: without padding, mask or positions.

Packed and padding-free rows have no attention mask: ``position_ids`` start again at 0 with each
example, from which transformers' attention masks tell where one ends. An architecture that does not
ask for them lets an example read the one before it; `check_layout` finds that out.

Legend: B examples, T tokens of all examples, R rows of L slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sftmix.head import evaluating, without_peft

Integers = NDArray[np.int64]

LAYOUTS = ("padded", "padding_free", "packed", "sequential")

# Three short examples: in packed rows the second and third share one, and a slot is left over.
CHECKED_LENGTHS = (12, 7, 4)


class Slots(NamedTuple):
    """Where each token lies in the R * L slots of a batch, and which of its example it is."""

    flat: Integers  # (T,)
    positions: Integers  # (T,)
    shape: tuple[int, int]  # R, L

    def fill(self, values: Integers | int, padding: int) -> Integers:
        """``values`` (T,) in their slots (R, L), and ``padding`` in the others."""
        grid = np.full(self.shape, padding)
        grid.reshape(-1)[self.flat] = values
        return grid


@dataclass(frozen=True)
class Layout:
    """How a batch is laid out.

    ``row_length``: the most tokens of a packed row; by default, and wherever that takes no more
    slots, rows are as long as the longest example: attention costs less in short rows.

    Raises:
        ValueError: the name is none of `LAYOUTS`, or a length does not fit the layout.
    """

    name: str = "padded"
    pad_to_multiple_of: int = 1
    row_length: int | None = None

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(f"layout: expected {', '.join(LAYOUTS)}; got {self.name!r}")
        if self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of: expected at least 1, got {self.pad_to_multiple_of}"
            )
        if self.row_length is None:
            return
        if self.name != "packed":
            raise ValueError(f"row_length: only layout='packed' has it, got {self.name!r}")
        if self.row_length < 1 or self.row_length % self.pad_to_multiple_of:
            raise ValueError(
                f"row_length: expected a positive multiple of pad_to_multiple_of "
                f"({self.pad_to_multiple_of}), got {self.row_length}"
            )

    def place(self, lengths: Integers) -> Slots:
        """The slots of examples of those lengths (B,).

        Raises:
            ValueError: an example is longer than ``row_length``.
        """
        longest = int(lengths.max())
        if self.name == "padded":
            rows, offsets = np.arange(len(lengths)), np.zeros_like(lengths)
        elif self.name in ("padding_free", "sequential"):
            rows, offsets = np.zeros_like(lengths), np.cumsum(lengths) - lengths
        else:
            rows, offsets = self.pack(lengths, longest)
        shape = int(rows.max()) + 1, self.rounded(int((offsets + lengths).max()))
        positions = spans(np.zeros_like(lengths), lengths)
        return Slots(spans(rows * shape[1] + offsets, lengths), positions, shape)

    def pack(self, lengths: Integers, longest: int) -> tuple[Integers, Integers]:
        """Row and offset of each example, in the shorter rows or in the longer: no more slots than
        padded.
        """
        limit = self.row_length or longest
        if longest > limit:
            raise ValueError(
                f"row_length: expected at least the longest example's {longest} tokens, got {limit}"
            )
        packings = [first_fit(lengths, self.rounded(longest))]
        if limit > self.rounded(longest):
            fitted = first_fit(lengths, limit)
            packings.append(level(lengths, int(fitted[0].max()) + 1, limit) or fitted)
        return min(packings, key=lambda packing: self.num_slots(lengths, *packing))

    def num_slots(self, lengths: Integers, rows: Integers, offsets: Integers) -> int:
        """R * L of a packing."""
        return (int(rows.max()) + 1) * self.rounded(int((offsets + lengths).max()))

    def rounded(self, length: int) -> int:
        """The length, up to a multiple of ``pad_to_multiple_of``; nothing is padded one by one."""
        if self.name == "sequential":
            return length
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def inputs(self, tokens: Integers, slots: Slots, pad_token_id: int) -> dict[str, Integers]:
        """What the model reads (R, L): ``input_ids``, and what its layout has of
        ``attention_mask`` and ``position_ids``.

        Padding without a mask has position 0 throughout, which makes each slot a segment of its
        own, and no position is beyond the longest example's.
        """
        inputs = {"input_ids": slots.fill(tokens, pad_token_id)}
        if self.name == "padded":
            return {**inputs, "attention_mask": slots.fill(1, 0)}
        if self.name == "sequential":
            return inputs
        return {**inputs, "position_ids": slots.fill(slots.positions, 0)}


def spans(starts: Integers, lengths: Integers) -> Integers:
    """``start, start + 1, ...`` of each start, ``length`` numbers of it, one after another."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])


def first_fit(lengths: Integers, room: int) -> tuple[Integers, Integers]:
    """Row and offset of each example: the longest first, each in the first row that has room."""

    def choose(used: list[int], length: int) -> int:
        fitting = (row for row, taken in enumerate(used) if taken + length <= room)
        row = next(fitting, len(used))
        if row == len(used):
            used.append(0)
        return row

    return in_rows(lengths, [], choose)


def level(lengths: Integers, num_rows: int, room: int) -> tuple[Integers, Integers] | None:
    """Row and offset of each example: the longest first, each in the emptiest row.

    As few slots are left over at the end of rows as can be; None where a row has no room for it.
    """
    rows, offsets = in_rows(lengths, [0] * num_rows, lambda used, _: used.index(min(used)))
    return (rows, offsets) if (offsets + lengths).max() <= room else None


def in_rows(
    lengths: Integers, used: list[int], choose: Callable[[list[int], int], int]
) -> tuple[Integers, Integers]:
    """Row and offset of each example, ``choose(tokens in each row, length)`` giving the row."""
    rows, offsets = np.zeros_like(lengths), np.zeros_like(lengths)
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        row = choose(used, length)
        rows[example], offsets[example] = row, used[row]
        used[row] += length
    return rows, offsets


def check_layout(model: nn.Module, layout: str) -> None:
    """Find out whether a model keeps apart examples that are laid out together.

    Three short random examples go through the model's own forward, up to its head, in eval mode:

    - The gradient of the last one's hidden states with respect to the embeddings of the others has
      to be zero. It is exactly that, in any dtype, where none is read: attention's share of a
      masked token is 0. (Values alone do not tell: in bfloat16 what a state-space layer of a fresh
      model carries over can be less than rounding.)
    - Its hidden states have to be those of each example alone, or positions are counted on. The
      largest ``|h' - h| / |h|`` of a token is held to twice that of the same examples padded, which
      is rounding, plus ``sqrt(eps)`` of the dtype computed in: rounding is some ``eps``, another
      position changes a token by a share of order one, and this is the geometric mean of the two.

    Gradients of parameters, modes of modules and the state of random generators stay as they are.

    Read one by one, examples are apart; there the model's forward has to call its backbone as one
    does that knows tokens alone: its logits have to be those of each example alone.

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
    """`check_layout` of a model whose forward knows ``parts``."""
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


class Reading(NamedTuple):
    """A forward: hidden states of the tokens (T, D), the embeddings, and where tokens lie there."""

    hidden: Tensor
    embedded: Tensor  # (R, L, any)
    flat: Tensor  # (T,)


def read(backbone: Any, layout: Layout, examples: Sequence[Integers]) -> Reading:
    """What the head would read of examples laid out, as a function of their embeddings."""
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
    """Whether the last ``length`` tokens' hidden states hang on the embeddings of the others."""
    last = reading.hidden[-length:]
    # Not ones: what a layer norm gives adds up to the same whatever it reads.
    weights = np.random.default_rng(1).choice([-1.0, 1.0], size=last.shape)
    upstream = torch.from_numpy(weights).to(last)
    (gradient,) = torch.autograd.grad(last, reading.embedded, upstream)
    others = reading.flat[:-length].to(gradient.device)
    return bool(gradient.flatten(0, 1)[others].any())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest ``|found - expected| / |expected|`` of a row."""
    found, expected = found.detach().float(), expected.float()
    smallest = torch.finfo(torch.float32).tiny
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(smallest)).max())


def epsilon(hidden: Tensor) -> float:
    """Eps of what the hidden states were computed in; a GPU may round float32 products to TF32."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.finfo(torch.get_autocast_dtype(device)).eps
    return max(torch.finfo(hidden.dtype).eps, 2.0**-10 if hidden.is_cuda else 0.0)
