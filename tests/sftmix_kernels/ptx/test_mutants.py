"""What the executor must find: kernels with a fault put into their text.

Without these the other tests could pass because nothing is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from sftmix_kernels.row_chunks.chunks import logits_workspace
from sftmix_kernels.row_chunks.kernels import pair_rows_, soft_rows_
from sftmix_kernels.vocab_tiles.backward import add_live_product_

from ..budget import HEADS
from ..conftest import VOCAB_TILES
from ..kernel_cases import sftmix_in_budget
from ..row_chunks.row_cases import PLAIN, Found, assert_in_budget, some_pairs, some_rows
from .conftest import Executor

pytestmark = pytest.mark.ptx

Mutation = Callable[[str], str]
WRONG = "wrong result"


def changed(pattern: str, by: str, which: slice = slice(None), kernel: str = "") -> Mutation:
    """Replace some of a pattern's occurrences, in one kernel or in all."""

    def mutate(ptx: str) -> str:
        if f".entry {kernel}" not in ptx:
            return ptx
        found = list(re.finditer(pattern, ptx))[which]
        if not found:
            raise LookupError(f"{pattern} is not in {kernel or 'the kernel'}")
        for match in reversed(found):
            ptx = ptx[: match.start()] + match.expand(by) + ptx[match.end() :]
        return ptx

    return mutate


def pair_rows() -> None:
    pairs = some_pairs(4, 2500, torch.bfloat16)
    logits = logits_workspace(torch.empty(2500, 1, dtype=torch.bfloat16), 8).copy_(pairs.logits)
    losses = pair_rows_(logits, *pairs[1:], PLAIN, True)
    assert_in_budget(Found(*losses, logits.clone()), pairs, PLAIN)


def soft_rows() -> None:
    """Without padding, so that what is beyond the last column is not there."""
    rows = some_rows(4, 1003, 2, torch.bfloat16)
    logits = rows.logits.clone()
    loss = soft_rows_(logits, *rows[1:], PLAIN, True)
    assert_in_budget(Found(loss, torch.empty(0), logits), rows, PLAIN)


def pair_tiles() -> None:
    sftmix_in_budget("cpu", torch.bfloat16, HEADS[0], VOCAB_TILES)


def live_product() -> None:
    left, right = torch.randn(130, 256).bfloat16(), torch.randn(256, 64).bfloat16()
    total, live = torch.zeros(130, 64), torch.ones(2, 2, dtype=torch.uint8)
    add_live_product_(total, left, right, live, 128, 128, overwrite=False)
    torch.testing.assert_close(total, left.float() @ right.float(), rtol=1e-5, atol=1e-4)


BARRIER = r"bar\.sync\s+0;"
FIRST, LAST = slice(0, 1), slice(-1, None)
UNSWIZZLED = rf"\g<1>, {0x0000004000010000};"  # rows of eight 1,024 bytes apart
PAST_THE_BARRIER = """
{ .reg .pred %skips; .reg .b32 %thread; mov.u32 %thread, %tid.x;
setp.eq.b32 %skips, %thread, 3; @%skips bra $past; }
bar.sync 0;
$past:
"""
MUTANTS = {
    "no barrier before the targets' gradients": (
        pair_rows, changed(BARRIER, "", slice(-4, None)), "race",
    ),
    "no barrier at all": (pair_rows, changed(BARRIER, ""), "race"),
    "no barrier in a reduction": (
        pair_tiles, changed(BARRIER, "", LAST, "pair_lse_kernel"), "race",
    ),
    "no barrier before a stage is filled again": (
        pair_tiles, changed(BARRIER, "", slice(1, 4), "pair_lse_kernel"), "race",
    ),
    "waits for too few copies": (
        pair_rows, changed(r"(cp\.async\.wait_group\s+)\d+;", r"\g<1>8;", FIRST), "undefined",
    ),
    "waits for too few copies of a tile": (
        pair_tiles,
        changed(r"(cp\.async\.wait_group\s+)\d+;", r"\g<1>8;", FIRST, "pair_lse_kernel"),
        "undefined",
    ),
    "a copy is left out": (
        pair_rows, changed(r"cp\.async\.cg[^;]*;", "", slice(2, 3)), "undefined",
    ),
    "a group of copies is not closed": (
        pair_rows, changed(r"cp\.async\.commit_group;", "", slice(1, 2)), "undefined",
    ),
    "no wgmma.fence": (
        pair_tiles, changed(r"wgmma\.fence[^;]*;", "", kernel="pair_lse_kernel"), "fence",
    ),
    "no fence.proxy.async": (
        pair_tiles, changed(r"fence\.proxy[^;]*;", "", kernel="pair_lse_kernel"), "fence",
    ),
    "does not wait for products": (
        pair_tiles, changed(r"wgmma\.wait_group[^;]*;", "", kernel="pair_lse_kernel"), "undefined",
    ),
    "reads an operand of which a copy is on its way": (
        live_product, changed(r"(wgmma\.wait_group\S+) \d", r"\g<1> 7", slice(0, 1)), "flight",
    ),
    "a descriptor without its swizzle": (
        pair_tiles,
        changed(r"(or\.b64\s+%rd\d+, %rd\d+), -?\d{19};", UNSWIZZLED, kernel="pair_lse_kernel"),
        WRONG,
    ),
    "a product that does not add": (
        live_product, changed(r"mov\.pred(\s+%p\d+), -1;", r"mov.pred\g<1>, 0;"), WRONG,
    ),
    "a mask that lets one column more in": (
        soft_rows, changed(r"setp\.lt\.s32", "setp.le.s32"), WRONG,
    ),
    "a mask of rows that lets one more in": (
        pair_tiles,
        changed(r"setp\.lt\.s32", "setp.le.s32", kernel="pair_combine_kernel"),
        "bounds",
    ),
    "a store one number further": (
        soft_rows, changed(r"(st\.global\.b16 \[ %rd\d+) \+ 0", r"\g<1> + 2"), "bounds",
    ),
    "a load one byte further": (
        pair_rows, changed(r"(ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+) \+ 0", r"\g<1> + 1"),
        "alignment",
    ),
    "another place in shared memory": (
        pair_tiles,
        changed(r"(st\.shared\.b32 \[ %r\d+) \+ 0", r"\g<1> + 262144", kernel="pair_lse_kernel"),
        "bounds",
    ),
    "every block writes the first one's rows": (
        pair_rows, changed(r"%ctaid\.x", "0"), "race",
    ),
    "halves of a pair exchanged": (
        pair_rows,
        changed(r"(cvt\.rn\.bf16x2\.f32 \s*%r\d+), (%r\d+), (%r\d+)", r"\g<1>, \g<3>, \g<2>"),
        WRONG,
    ),
    "a barrier that not every lane comes to": (
        soft_rows,
        changed(BARRIER, PAST_THE_BARRIER, LAST),
        "divergence",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(accused: Executor, name: str) -> None:
    call, mutate, kind = MUTANTS[name]
    kinds = set()
    with accused(mutate) as run:
        try:
            call()
        except AssertionError:
            kinds.add(WRONG)
    assert run.kernels
    assert kind in kinds | run.kinds, run.findings


@pytest.mark.parametrize("call", [pair_rows, soft_rows, pair_tiles, live_product])
def test_without_a_fault_nothing_is_found(executed: Executor, call: Callable[[], None]) -> None:
    with executed():
        call()
