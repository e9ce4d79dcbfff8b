"""Weights of 4 bits (bitsandbytes), which stay as they were quantised."""

from __future__ import annotations

from torch import nn

PACKS = "support_avx512bf16_for_cpu"


def keep_four_bits(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking a model's weights of 4 bits.

    On a CPU with AVX512-BF16 it packs a layer's weight for inference at the first forward pass
    without gradients, such as a scoring's: scales are rounded to bfloat16, and no gradient passes
    through the layer from then on. Widths that 32 or 64 does not divide fail there.

    Raises:
        ValueError: a weight is packed already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, PACKS):
            continue
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: bitsandbytes has packed the weight of {name} for inference, through which "
                "no gradient passes; expected a model that was not evaluated yet: load it again"
            )
        setattr(module, PACKS, False)
