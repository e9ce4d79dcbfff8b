"""The checks of the public functions' arguments, and what an error says.

Shapes, dtypes and numbers held by the host are always checked. The *values* of tensors are checked
where that is free, on the CPU outside of a compiled graph, or where ``validate=True`` asks for it;
otherwise a bad value makes its row NaN on the device and the host never waits.
"""

from __future__ import annotations

import numbers
import warnings
from typing import TypeGuard

import torch
from torch import Tensor

from .number_checks import LARGEST, SMALLEST, check_number, check_real, is_finite
from .reference import expand_lam
from .schedules import is_fake
from .terms import filled

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT64 = torch.iinfo(torch.int64)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    name: str = "hidden",
    fewest_tokens: int = 1,
) -> None:
    """Check hidden (..., D), weight (V, D), bias (V,), and the two numbers of the head."""
    check_tensor(name, hidden)
    check_tensor("weight", weight)
    check_no_transform(name)
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16 or float16, got {hidden.dtype}"
            + ("; sftmix_kernels.reference takes it" if hidden.dtype == torch.float64 else "")
        )
    if weight.dim() != 2 or weight.shape[0] < fewest_tokens or weight.shape[1] < 1:
        raise ValueError(
            f"weight: expected shape (V, D) with V >= {fewest_tokens} and D >= 1, "
            f"got {tuple(weight.shape)}"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: expected shape (..., {weight.shape[1]}) to match weight, "
            f"got {tuple(hidden.shape)}"
        )
    check_same("weight", weight, name, hidden)
    if bias is not None:
        check_same("bias", bias, name, hidden)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_real("logit_scale", logit_scale)
    if not is_finite(logit_scale):
        raise ValueError(f"logit_scale: expected a finite float32 number, got {logit_scale}")
    if softcap is None:
        return
    check_real("softcap", softcap)
    if not SMALLEST <= softcap <= LARGEST:
        raise ValueError(
            "softcap: expected None or a finite float32 number of at least "
            f"{SMALLEST:.3g}, got {softcap}"
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse what is not a Tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")


def check_no_transform(name: str) -> None:
    """Refuse to run inside of `torch.func`'s transforms, which cannot enter the kernels."""
    # A compiler's graph breaks at the question, and has no kernels to enter.
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    transform = torch._C._functorch.peek_interpreter_stack().key().name.lower()
    raise TypeError(
        f"{name}: expected a plain tensor, got one inside of torch.func's {transform}; its leading "
        "dimensions may be any, reduction='none' gives a loss of each token, and .backward() the "
        "gradients; the losses of sftmix_kernels.reference can be transformed"
    )


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse what is not a Tensor of the same dtype and device as another argument."""
    check_tensor(name, tensor)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected {other_name}'s device {other.device}, got {tensor.device}"
        )


def check_ids(name: str, ids: Tensor, hidden: Tensor, other_name: str = "hidden") -> None:
    """Refuse what is not an int64 tensor of hidden's leading shape, on hidden's device."""
    check_tensor(name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {ids.dtype}")
    if ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {tuple(hidden.shape[:-1])} to match {other_name}, "
            f"got {tuple(ids.shape)}"
        )
    if ids.device != hidden.device:
        raise ValueError(f"{name}: expected device {hidden.device}, got {ids.device}")


def check_ignore_index(ignore_index: int) -> None:
    """Refuse what is not an integer of int64."""
    if not isinstance(ignore_index, numbers.Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not INT64.min <= ignore_index <= INT64.max:
        raise ValueError(f"ignore_index: expected an int64 number, got {ignore_index}")


# Arguments whose labels outside of the vocabulary have been told of.
TOLD: set[str] = set()


def check_label_values(
    name: str, labels: Tensor, vocab_size: int, ignore_index: int, *, validate: bool
) -> None:
    """Look for labels outside ``[0, V)`` other than ``ignore_index``, whose rows become NaN.

    With ``validate`` they are refused, and the host waits for the device to see them. Without, a
    warning tells of the first one where their values are free, once in the process.
    """
    if validate and labels.device.type == "meta":
        raise ValueError(
            "validate: expected False for tensors on the meta device, which have no values"
        )
    if not (validate or values_are_free(labels)):
        return
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if not bad.any():
        return
    position = bad.nonzero()[0].tolist()
    label = int(labels[tuple(position)])
    found = (
        f"{name}: expected values in [0, {vocab_size}) or {ignore_index}, "
        f"got {label} at position {position}"
    )
    if validate:
        raise ValueError(found)
    if name not in TOLD:
        TOLD.add(name)
        way = f"ignore_index={label} leaves such tokens out" if label < 0 else "mend the labels"
        warnings.warn(
            f"{found}: its loss and gradients are NaN, and so is a mean; {way}, validate=True "
            "makes this an error (it is said once)",
            RuntimeWarning,
            stacklevel=3,
        )


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r:.60}")


def check_constant(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that waits for a gradient, where none will come."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without requires_grad, since no gradient reaches it; "
            f"pass {name}.detach()"
        )


def check_count(name: str, value: int, low: int) -> None:
    """Refuse what is not a Python integer of at least ``low``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    check_number(name, value, low)


def check_divisor(name: str, divisor: float | Tensor | None) -> None:
    """Refuse what is neither None, nor a number above 0, nor a scalar tensor."""
    if isinstance(divisor, Tensor):
        if divisor.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {tuple(divisor.shape)}")
        check_constant(name, divisor)
        return
    if divisor is None:
        return
    check_real(name, divisor)
    if not 0 < divisor <= LARGEST:
        raise ValueError(f"{name}: expected a finite float32 number above 0, got {divisor}")


def check_reduction(reduction: str) -> None:
    """Refuse what is none of mean, sum and none."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")


def values_are_free(tensor: Tensor) -> bool:
    """Say whether a tensor's values can be read without waiting and without breaking a graph."""
    on_cpu = tensor.device.type == "cpu" and not is_fake(tensor)
    if not on_cpu or torch.compiler.is_compiling():
        return False
    # Nor while `make_fx` traces, for inputs with other values.
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def checked_lam(lam: float | Tensor, labels: Tensor, *, validate: bool) -> Tensor:
    """Return ``lam`` spread over labels' shape, in float32.

    Values outside ``[0, 1]`` are refused where they are read, and become NaN where they are not.
    """
    if not isinstance(lam, Tensor):
        check_number("lam", lam, 0.0, 1.0)
        return filled(labels.shape, lam, labels.device)
    if not lam.is_floating_point():
        raise TypeError(f"lam: expected a floating-point tensor or a float, got {lam.dtype}")
    if lam.device != labels.device:
        raise ValueError(f"lam: expected device {labels.device}, got {lam.device}")
    if lam.shape != labels.shape[: lam.dim()]:
        raise ValueError(
            f"lam: expected a shape that is a prefix of {tuple(labels.shape)}, "
            f"got {tuple(lam.shape)}"
        )
    check_constant("lam", lam)
    inside = (lam >= 0) & (lam <= 1)
    if (validate or values_are_free(lam)) and not inside.all():
        raise ValueError(f"lam: expected values in [0, 1], got {lam[~inside][0].item()}")
    return expand_lam(lam.detach().masked_fill(~inside, float("nan")), labels, torch.float32)


def check_pairs(pair_c: Tensor, pair_u: Tensor, labels: Tensor, *, validate: bool) -> None:
    """Refuse what are not two int64 tensors (P,) of rows that hold each row at most once."""
    num_rows = labels.numel()
    for name, pair in (("pair_c", pair_c), ("pair_u", pair_u)):
        check_tensor(name, pair)
        if pair.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {pair.dtype}")
        if pair.device != labels.device:
            raise ValueError(f"{name}: expected device {labels.device}, got {pair.device}")
        if pair.dim() != 1 or pair.shape != pair_c.shape:
            raise ValueError(
                f"{name}: expected shape (P,) for both pair_c and pair_u, "
                f"got {tuple(pair_c.shape)} and {tuple(pair_u.shape)}"
            )
        if pair.shape[0] * 2 > num_rows:
            raise ValueError(
                f"{name}: expected each of {num_rows} rows at most once, got {pair.shape[0]} pairs"
            )
    if not (validate or values_are_free(pair_c)):
        return
    rows = torch.cat((pair_c, pair_u))
    outside = (rows < 0) | (rows >= num_rows)
    if outside.any():
        raise ValueError(
            f"pair_c, pair_u: expected rows in [0, {num_rows}), got {int(rows[outside][0])}"
        )
    twice = torch.bincount(rows, minlength=1) > 1
    if twice.any():
        raise ValueError(
            "pair_c, pair_u: expected each row at most once, "
            f"got row {int(twice.nonzero()[0])} twice"
        )


def check_row_out(name: str, out: Tensor | None, labels: Tensor) -> None:
    """Refuse what is neither None nor a float32 tensor of labels' shape and device."""
    if out is None:
        return
    check_tensor(name, out)
    if out.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {out.dtype}")
    if out.shape != labels.shape or out.device != labels.device:
        raise ValueError(
            f"{name}: expected labels' shape {tuple(labels.shape)} on {labels.device}, "
            f"got {tuple(out.shape)} on {out.device}"
        )


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as ``F.linear`` would inside ``torch.autocast``; outside, return tensors as they are.

    Anything else than a tensor of one of our dtypes is returned too, for the checks to refuse.
    """
    device_types = [t.device.type for t in tensors if takes_part(t)]
    # The meta device, whose tensors have no values, knows no autocast.
    if device_types[:1] in ([], ["meta"]) or not torch.is_autocast_enabled(device_types[0]):
        return tensors
    dtype = torch.get_autocast_dtype(device_types[0])
    return tuple(t.to(dtype) if takes_part(t) else t for t in tensors)


def takes_part(tensor: object) -> TypeGuard[Tensor]:
    """Say whether ``torch.autocast`` casts this argument."""
    return isinstance(tensor, Tensor) and tensor.dtype in FLOAT_DTYPES
