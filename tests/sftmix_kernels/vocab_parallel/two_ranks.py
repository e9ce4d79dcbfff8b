"""What two ranks of a shared head are called with, and what each writes down.

A module of its own: the ranks are processes that import it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sftmix_kernels import (
    Clipped,
    Power,
    RowChunks,
    Threshold,
    VocabShard,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
    reference,
)
from sftmix_kernels.vocab_parallel import losses

from ..budget import DTYPES, FAR, HEADS, Tensors, assert_same_bits, head_inputs, run, some_labels

HALVES = ((0, 258), (258, 515))
OURS = {"ntp": fused_cross_entropy, "mixup": fused_mixup_loss, "sftmix": fused_sftmix_loss}
DENSE = {
    "ntp": reference.cross_entropy,
    "mixup": reference.mixup_loss,
    "sftmix": reference.sftmix_loss,
}
BAD_LABELS = (515, *FAR)


class Case(NamedTuple):
    """A call, the same on both ranks but for the rows of the head."""

    loss: str = "sftmix"
    dtype: torch.dtype = torch.float32
    bounds: tuple[tuple[int, int], ...] = HALVES
    padding: tuple[int, int] = (0, 5)  # rows of NaN beyond each rank's tokens
    options: dict[str, Any] = {}  # noqa: RUF012
    inputs: str = "random"
    frozen: tuple[str, ...] = ()
    schedule: RowChunks | str = "auto"


class Inputs(NamedTuple):
    """What a case is called with: tensors that may need a gradient, the others, upstream."""

    tensors: Tensors
    constants: dict[str, Any]
    upstream: float | Tensor


def make_inputs(case: Case) -> Inputs:
    """The same numbers in every process."""
    torch.manual_seed(1)
    names = ("hidden_c", "hidden_u") if case.loss == "mixup" else ("hidden",)
    vocab_size, options = max(stop for _, stop in case.bounds), dict(case.options)
    tensors = head_inputs(
        (205, 64), vocab_size, case.dtype, names=names, bias=options.pop("bias", False)
    )
    ignored = {"random": 0.2, "ignored": 1.0}.get(case.inputs, 0.0)
    labels = some_labels((205,), vocab_size, ignored=ignored)
    if case.inputs == "confident":
        eye, labels = 20.0**0.5 * torch.eye(vocab_size, 64).to(case.dtype), labels.sort().values
        tensors = {**dict.fromkeys(names, eye[labels]), "weight": eye}
    if case.inputs == "masked":
        start, stop = case.bounds[1]
        tensors["bias"][start:stop] = -torch.inf
        labels %= case.bounds[0][1]
    if case.inputs.startswith("bad"):
        labels[7] = int(case.inputs.split()[1])
    if case.inputs == "none":
        labels, tensors = labels[:0], {k: v[:0] if k in names else v for k, v in tensors.items()}
    constants: dict[str, Any] = {"labels": labels, **options}
    if case.loss == "mixup":
        other = labels if case.inputs == "confident" else labels.roll(1)
        constants |= {"labels_c": constants.pop("labels"), "labels_u": other}
    if case.loss == "sftmix":
        rows = torch.randperm(205)[:160] if labels.numel() else labels
        if case.inputs == "confident":
            rows = torch.arange(160)
        constants |= {"pair_c": rows[::2].clone(), "pair_u": rows[1::2].clone()}
    if case.loss != "ntp":
        constants.setdefault("lam", torch.rand(constants.get("pair_c", labels).shape))
    upstream = torch.randn(205) if options.get("reduction") == "none" else 0.37
    return Inputs(tensors, constants, upstream)


def of(loss: Any, constants: dict[str, Any], frozen: Tensors, **more: Any) -> Any:
    """A function of the tensors that need gradients."""

    def call(**tensors: Tensor) -> Tensor:
        found = loss(**tensors, **frozen, **constants, **more)
        return found if isinstance(found, Tensor) else found.loss

    return call


def frozen_of(case: Case, tensors: Tensors) -> Tensors:
    return {name: tensors.pop(name) for name in case.frozen}


def run_case(case: Case, shard: VocabShard, rank: int) -> dict[str, Any]:
    """One rank's loss, gradients, row losses, and how many collectives it took."""
    tensors, constants, upstream = make_inputs(case)
    for name in ("weight", "bias"):
        if name in tensors:
            own = tensors[name][shard.start : shard.stop]
            nan = own.new_full((case.padding[rank], *own.shape[1:]), torch.nan)
            tensors[name] = torch.cat((own, nan))
    more: dict[str, Any] = {"vocab_parallel": shard, "schedule": case.schedule}
    if case.loss == "sftmix":
        more["row_ntp_out"] = torch.empty(constants["labels"].shape)
    call = of(OURS[case.loss], constants, frozen_of(case, tensors), **more)
    collectives: list[str] = []
    plain = losses.all_reduce_

    def recorded(tensor: Tensor, operation: str, group: str) -> None:
        assert tensor.dtype == torch.float32
        collectives.append(operation)
        plain(tensor, operation, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "all_reduce_", recorded)
        found = run(call, tensors, upstream)
    assert_same_bits(run(call, tensors, upstream), found)
    gradients = dict(found.gradients)
    for name in ("weight", "bias"):
        gradient = gradients.get(name)
        if gradient is not None:
            width = shard.stop - shard.start
            assert not gradient[width:].any(), name
            gradients[name] = gradient[:width].clone()
    row_ntp = more.get("row_ntp_out")
    return {
        "loss": found.loss,
        "gradients": gradients,
        "row_ntp": row_ntp,
        "collectives": collectives,
    }


def refused_bounds(rank: int, group: dist.ProcessGroup) -> list[str]:
    """What both ranks say of bounds that do not fit together."""
    said = []
    for bounds in (
        ((0, 5), (6, 9)),
        ((0, 5), (4, 9)),
        ((1, 5), (5, 9)),
        ((0, 5), (9, 5)),
        ((-1, 5), (5, 9)),
        ((0, 0), (0, 0)),
    ):
        with pytest.raises(ValueError, match="start, stop: expected") as caught:
            VocabShard(*bounds[rank], group)
        said.append(str(caught.value))
    return said


def run_rank(rank: int, folder: str) -> None:
    """All cases on one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=30),
    )
    group = dist.group.WORLD
    assert group is not None
    shards = {
        bounds: VocabShard(*bounds[rank], group)
        for bounds in dict.fromkeys(case.bounds for case in CASES.values())
    }
    found: dict[str, Any] = {
        name: run_case(case, shards[case.bounds], rank) for name, case in CASES.items()
    }
    found["refused"] = refused_bounds(rank, group)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def cases() -> dict[str, Case]:
    found = {}
    for dtype in DTYPES:
        for number, head in enumerate(HEADS):
            found[f"{dtype} head {number}"] = Case(dtype=dtype, options=head)
        found[f"{dtype} confident"] = Case(
            dtype=dtype, bounds=((0, 40), (40, 64)), inputs="confident"
        )
        found[f"{dtype} rows"] = Case(
            "mixup", dtype, options={"reduction": "none", "bias": True, "softcap": 4.0}
        )
        found[f"{dtype} sum"] = Case("ntp", dtype, options={"reduction": "sum", "softcap": 9.0})
    divisors = {"mu": 0.9, "ntp_divisor": 400.0, "mixup_divisor": torch.tensor(30.0)}
    found["divisors"] = Case(options=divisors, schedule=RowChunks(rows=32))
    found["negative scale"] = Case(options={"logit_scale": -0.7, "softcap": 3.0})
    found["divisor"] = Case("mixup", options={"divisor": 50.0}, schedule=RowChunks(rows=32))
    found["confident mixup"] = Case("mixup", bounds=((0, 40), (40, 64)), inputs="confident")
    # Half of the bytes of 32 rows for the widest shard: 16 rows, on the narrow one too.
    found["byte cap"] = Case(
        bounds=((0, 20), (20, 515)), schedule=RowChunks(max_bytes=4 * 495 * 16)
    )
    found["in another order"] = Case(bounds=((300, 515), (0, 300)), padding=(3, 2))
    for number, padding in enumerate(((0, 0), (4, 4))):
        bounds = ((0, 515), (515, 515))
        found[f"empty shard {number}"] = Case(bounds=bounds, padding=padding)
        found[f"empty shard {number}, mixup"] = Case("mixup", bounds=bounds, padding=padding)
    # Gates that the label's probability decides; of ignored tokens and of pairs, too.
    weight = torch.linspace(0.0, 2.0, 205)
    for name, gate in (
        ("power", Power(1.5)),
        ("threshold", Threshold(0.002)),
        ("clipped", Clipped(torch.linspace(-9.0, -4.0, 205), 0.3)),
    ):
        options = {"gate": gate, "row_weight": weight, "softcap": 9.0}
        found[name] = Case("ntp", options={**options, "reduction": "none"})
        found[f"{name}, pairs"] = Case(options=options)
    for lam in (0.0, 1.0):
        found[f"lam {lam}"] = Case(options={"lam": lam, "bias": True})
        found[f"masked {lam}"] = Case(options={"lam": lam, "bias": True}, inputs="masked")
    found["masked"] = Case(options={"bias": True, "softcap": None}, inputs="masked")
    found["mu 0"] = Case(options={"mu": 0.0, "bias": True})
    found["mu 0 is ntp"] = Case("ntp", options={"bias": True})
    for label in BAD_LABELS:
        found[f"bad {label}"] = Case(inputs=f"bad {label}", options={"mu": 0.0})
    found["good"] = Case(inputs="good", options={"mu": 0.0})
    for frozen in (("hidden",), ("weight",), ("weight", "bias")):
        found[f"frozen {frozen}"] = Case(options={"bias": True}, frozen=frozen)
    for inputs in ("ignored", "none"):
        found[inputs] = Case(inputs=inputs, options={"bias": True})
        found[f"{inputs}, mixup"] = Case("mixup", inputs=inputs)
    return found


CASES = cases()
