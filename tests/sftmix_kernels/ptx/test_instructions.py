"""The executor's own arithmetic and order, beside PyTorch's and by hand-written PTX.

Kernels of `tl.dot` come with operands in every layout that the compiler chooses by their shape:
swizzles of 32, 64 and 128 bytes, either side transposed, the left one in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from .conftest import Executor
from .executor import Finding, Program, Unsupported, build

pytestmark = pytest.mark.ptx

Load = Callable[..., Program]

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 from,
	.param .u64 .ptr .global .align 1 to
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<19>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [from];
	ld.param.b64 %rd2, [to];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	ld.global.b32 %r2, [%rd4];
"""
# From %r2 of each thread to %r3.
TAIL = "st.global.b32 [%rd5], %r3;\nret;\n}\n"


@pytest.fixture(scope="session")
def load(folder: Path) -> Load:
    def program(body: str, threads: int = 32) -> Program:
        return Program(build(folder), HEAD.format(threads=threads) + body + TAIL, "kernel")

    return program


def run(program: Program, values: Tensor, shared: int = 1024) -> tuple[Tensor, list[Finding]]:
    found = torch.empty_like(values)
    _, findings = program.launch((1, 1, 1), [values, found], shared)
    return found, findings


def numbers() -> Tensor:
    """Numbers of all sizes, halves between two of bfloat16 and of float16, infinities, NaN."""
    halves = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0])
    small = torch.tensor([2**-24, 2**-25, 3 * 2**-25, 6e-8, 1e-40, -0.0])
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    return torch.cat([halves, small, ends, torch.randn(16) * 10.0 ** torch.arange(-8, 8)])


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_half_precision_is_pytorchs(load: Load, kind: str, dtype: torch.dtype) -> None:
    body = f"cvt.rn.{kind}.f32 %rs1, %r2;\ncvt.f32.{kind} %r3, %rs1;\n"
    x = numbers()
    found, findings = run(load(body), x)
    assert findings == []
    torch.testing.assert_close(found, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_exponentials_are_as_far_off_as_they_may_be(load: Load) -> None:
    x = torch.linspace(-140, 120, 32)
    found, _ = run(load("ex2.approx.ftz.f32 %r3, %r2;\n"), x)
    exact = x.double().exp2()
    normal = exact > 2**-126
    error = (found.double() / exact - 1)[normal].abs()
    assert 2**-23 < error.max() < 2**-22
    assert not found[~normal].any()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("bfe.u32 %r3, %r2, 4, 14;\n", lambda x: (x >> 4) & 0x3FFF),
        ("shr.s32 %r3, %r2, 31;\n", lambda x: x >> 31),
        ("prmt.b32 %r3, %r2, %r2, 0x0123U;\n", lambda x: x.view(torch.uint8).view(-1, 4).flip(1)
         .contiguous().view(torch.int32).view(-1)),
        ("lop3.b32 %r3, %r2, 0xff, 0xff00, 0xf8;\n", lambda x: x | (0xFF & 0xFF00)),
        ("shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;\n", lambda x: x.roll(16)),
        ("shfl.sync.idx.b32 %r3, %r2, 5, 31, -1;\n", lambda x: x[5].expand(32)),
        ("shfl.sync.down.b32 %r3, %r2, 1, 31, -1;\n", lambda x: torch.cat([x[1:], x[-1:]])),
        ("redux.sync.max.s32 %r3, %r2, -1;\n", lambda x: x.max().expand(32)),
        ("mov.b32 {%rs1, %rs2}, %r2;\nmov.b32 %r3, {%rs2, %rs1};\n",
         lambda x: x.view(torch.int16).view(-1, 2).flip(1).contiguous().view(torch.int32).view(-1)),
        ("cvt.s64.s32 %rd6, %r2;\nshr.s64 %rd6, %rd6, 32;\ncvt.u32.u64 %r3, %rd6;\n",
         lambda x: x >> 31),
    ],
)  # fmt: skip
def test_integers_and_lanes(load: Load, body: str, expected: Callable[[Tensor], Tensor]) -> None:
    x = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32)
    found, findings = run(load(body), x)
    assert findings == []
    assert torch.equal(found, expected(x).to(torch.int32))


def test_lanes_that_part_meet_again(load: Load) -> None:
    """Each lane goes round a loop as often as its number says; one arm lies behind the end."""
    body = """
	mov.b32 %r3, 0;
	mov.b32 %r4, 0;
$loop:
	and.b32 %r5, %r4, 1;
	setp.eq.b32 %p1, %r5, 0;
	@%p1 bra $even;
	add.s32 %r3, %r3, 100;
$joined:
	add.s32 %r4, %r4, 1;
	setp.lt.s32 %p2, %r4, %r2;
	@%p2 bra $loop;
	shfl.sync.idx.b32 %r6, %r3, 31, 31, -1;
	add.s32 %r3, %r3, %r6;
	bra.uni $done;
$even:
	add.s32 %r3, %r3, 1;
	bra.uni $joined;
$done:
"""
    turns = torch.arange(1, 33, dtype=torch.int32)
    found, findings = run(load(body), turns)
    assert findings == []
    own = (turns + 1) // 2 + turns // 2 * 100
    assert torch.equal(found, own + own[-1])


def test_lanes_that_do_not_meet_are_found(load: Load) -> None:
    body = """
	setp.lt.u32 %p1, %r1, 5;
	@%p1 bra $past;
	shfl.sync.idx.b32 %r3, %r2, 31, 31, -1;
$past:
	mov.b32 %r3, 0;
"""
    _, findings = run(load(body), torch.zeros(32))
    assert [finding.kind for finding in findings] == ["divergence"]


# A thread writes its number into shared memory, and reads its neighbour's.
EXCHANGE = """
	shl.b32 %r4, %r1, 2;
	mov.b32 %r5, dynamic;
	add.s32 %r5, %r5, %r4;
	st.shared.b32 [%r5], %r2;
	{barrier}
	xor.b32 %r6, %r4, {distance};
	ld.shared.b32 %r3, [%r6];
"""


@pytest.mark.parametrize(
    ("barrier", "distance", "shared", "kinds"),
    [
        ("bar.sync 0;", 128, 256, []),
        ("", 128, 256, ["race"]),
        ("", 4, 256, ["race"]),  # within a warp too
        ("", 0, 256, []),
        ("bar.sync 0;", 256, 512, ["undefined"]),
        ("bar.sync 0;", 256, 256, ["bounds"]),
        ("bar.sync 0;", 2, 256, ["alignment"]),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;", 128, 256, ["divergence"]),
    ],
)
def test_shared_memory(
    load: Load, barrier: str, distance: int, shared: int, kinds: list[str]
) -> None:
    values = torch.randn(64)
    program = load(EXCHANGE.format(barrier=barrier, distance=distance), threads=64)
    found, findings = run(program, values, shared)
    assert set(kinds) <= {finding.kind for finding in findings}
    if not kinds:
        assert findings == []
        assert torch.equal(found, values.roll(32) if distance else values)


def test_what_is_not_known_is_named(load: Load) -> None:
    with pytest.raises(Unsupported, match=r"kernel: line \d+: `tanh.approx.f32 %r3, %r2`"):
        load("tanh.approx.f32 %r3, %r2;\n")
    with pytest.raises(Unsupported, match=r"%rs1 has 16 bits, not 32"):
        load("add.s32 %r3, %r2, %rs1;\n")


@triton.jit
def _product_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    left_0,
    left_1,
    right_0,
    right_1,
    SCALES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(left_ptr + m[:, None] * left_0 + k[None, :] * left_1)
    right = tl.load(right_ptr + k[:, None] * right_0 + n[None, :] * right_1)
    if SCALES:
        left = (left.to(tl.float32) * 2.0).to(left_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(left, right))


@pytest.mark.parametrize(
    ("shape", "turned", "scales", "dtype"),
    [
        ((64, 16, 16), (False, False), False, torch.bfloat16),
        ((64, 32, 32), (False, True), False, torch.float16),
        ((128, 64, 64), (True, False), False, torch.bfloat16),
        ((128, 128, 16), (True, True), False, torch.float16),
        ((64, 64, 128), (False, True), True, torch.bfloat16),
    ],
)
def test_products_of_every_layout(
    executed: Executor,
    shape: tuple[int, int, int],
    turned: tuple[bool, bool],
    scales: bool,
    dtype: torch.dtype,
) -> None:
    m, n, k = shape
    left = torch.randn(k, m).t() if turned[0] else torch.randn(m, k)
    right = torch.randn(n, k).t() if turned[1] else torch.randn(k, n)
    left, right, out = left.to(dtype), right.to(dtype), torch.empty(m, n)
    with executed():
        _product_kernel[(1,)](
            left, right, out, *left.stride(), *right.stride(), SCALES=scales, M=m, N=n, K=k
        )
    exact = (1 + scales) * left.double() @ right.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
