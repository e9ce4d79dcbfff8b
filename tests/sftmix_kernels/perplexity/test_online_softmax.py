"""The compiled ops beside the same in PyTorch operations, on the CPU and on a CUDA device."""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sftmix_kernels
from sftmix_kernels.extension import build_info
from sftmix_kernels.perplexity import online_softmax
from sftmix_kernels.perplexity.online_softmax import LOSS_STEPS, new_state

from ..budget import DTYPES, HEADS, check

OPS = torch.ops.sftmix_kernels
PACKAGE = Path(sftmix_kernels.__file__).parent
pytestmark = pytest.mark.skipif(build_info() is None, reason="the extension is not built")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _silent() -> Any:
    """The plain versions warn, once in a process, that they are slow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sftmix_kernels: losses run on PyTorch operations")
        yield


def chunk(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Logits whose rows begin at multiples of 16 bytes; what lies between rows is NaN."""
    room = torch.full((rows, -(-columns // 16) * 16 + 16), torch.nan, dtype=dtype, device=device)
    logits = room[:, :columns]
    return logits.copy_(torch.randn(rows, columns) * 3)


def fold(
    op: Any,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    *,
    start: int = 0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """One call; returns the state."""
    op(logits, bias, labels, start, logit_scale, softcap, state)
    return state


def losses(state: Tensor) -> Tensor:
    """``log s - (t - m)`` in float64."""
    peak, total, target = state.double()
    return total.log() - (target - peak)


def dense_losses(
    logits: Tensor,  # of the dtype to compute in
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The same from all logits at once."""
    values = logits if bias is None else logits + bias.to(logits.dtype)
    values = values * logit_scale
    if softcap is not None:
        values = softcap * torch.tanh(values / softcap)
    return torch.nn.functional.cross_entropy(values, labels, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("columns", [1, 15, 123, 1025, 2049, 5000])
def test_two_chunks_give_the_loss(
    device: str, dtype: torch.dtype, head: dict[str, Any], columns: int
) -> None:
    options = dict(head)
    logits = [chunk(211, width, dtype, device) for width in (columns, 77)]
    biases: list[Tensor | None] = [None, None]
    if options.pop("bias", False):
        biases = [torch.randn(x.shape[1], dtype=dtype, device=device) for x in logits]
    labels = torch.randint(0, columns + 77, (211,), device=device)
    labels[:3] = torch.tensor([0, columns - 1, columns])
    compiled, plain = (new_state(211, logits[0]) for _ in range(2))
    for start, values, bias in zip((0, columns), logits, biases, strict=True):
        fold(OPS.fold_logits, values, labels, compiled, start=start, bias=bias, **options)
        fold(online_softmax.fold_logits, values, labels, plain, start=start, bias=bias, **options)
    whole_bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    dense, truth = (
        dense_losses(torch.cat(logits, 1).to(to), labels, whole_bias, **options)
        for to in (torch.float32, torch.float64)
    )
    # Both are held to float32, in which plain PyTorch computes losses of logits of any dtype.
    for state in (compiled, plain):
        check("loss", losses(state).float(), truth, dense - truth)
    # The maximum and the label's logit are no sums: both are single logits, transformed.
    torch.testing.assert_close(compiled[[0, 2]], plain[[0, 2]], rtol=1e-6, atol=1e-6)


def test_numbers_of_the_head_arrive_as_they_are(device: str) -> None:
    """A schema's float read as an integer, or two swapped, would show here."""
    logits, labels = torch.tensor([[8.0, -4.0]], device=device), torch.tensor([12], device=device)
    logits = torch.nn.functional.pad(logits, (0, 2))[:, :2]
    state = fold(
        OPS.fold_logits,
        logits,
        labels,
        new_state(1, logits),
        start=11,
        logit_scale=0.25,
        softcap=7.0,
    )
    expected = 7.0 * torch.tanh(torch.tensor([2.0, -1.0], dtype=torch.float64) / 7.0)
    torch.testing.assert_close(state[0, 0].double().cpu(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(state[2, 0].double().cpu(), expected[1], rtol=1e-6, atol=0)
    assert float(state[1, 0]) == pytest.approx(1 + float((expected[1] - expected[0]).exp()))


@pytest.mark.parametrize("label", [-100, -1, 50, 2**31, 2**63 - 1, -(2**63)])
def test_label_in_no_chunk_leaves_its_target_nan(device: str, label: int) -> None:
    logits = chunk(3, 50, torch.float32, device)
    labels = torch.tensor([4, label, 49], device=device)
    state = fold(OPS.fold_logits, logits, labels, new_state(3, logits))
    assert state[2].isnan().tolist() == [False, True, False]
    assert state[:2].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [slice(5, 6), slice(None)])
def test_a_bad_row_stays_alone(device: str, value: float, where: slice) -> None:
    logits = chunk(9, 1500, torch.float32, device)
    labels = torch.arange(9, device=device)
    good = fold(OPS.fold_logits, logits, labels, new_state(9, logits))
    logits[4, where] = value
    bad = fold(OPS.fold_logits, logits, labels, new_state(9, logits))
    rest = torch.arange(9) != 4
    assert torch.equal(bad[:, rest], good[:, rest])
    lost = value != -torch.inf or where == slice(None)
    assert bool(losses(bad)[4].isnan()) == lost


def test_a_masked_chunk_changes_nothing(device: str) -> None:
    logits = chunk(5, 300, torch.float32, device)
    labels = torch.arange(5, device=device)
    state = fold(OPS.fold_logits, logits, labels, new_state(5, logits))
    before = state.clone()
    masked = torch.full((5, 64), -torch.inf, device=device)
    assert torch.equal(fold(OPS.fold_logits, masked, labels, state, start=300), before)
    late = fold(OPS.fold_logits, masked, labels, new_state(5, logits), start=300)
    assert torch.equal(fold(OPS.fold_logits, logits, labels, late), before)


def test_rows_do_not_depend_on_their_neighbours(device: str) -> None:
    """Bits of a row: alone, among others, on one thread, on several."""
    logits = chunk(64, 3000, torch.float32, device)
    labels = torch.randint(0, 3000, (64,), device=device)
    whole = fold(OPS.fold_logits, logits, labels, new_state(64, logits))
    for row in (0, 31, 63):
        part = slice(row, row + 1)
        alone = fold(OPS.fold_logits, logits[part], labels[part], new_state(1, logits))
        assert torch.equal(alone, whole[:, part])
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        again = fold(OPS.fold_logits, logits, labels, new_state(64, logits))
        torch.set_num_threads(threads)
        assert torch.equal(again, whole)


def tokens(count: int, device: str) -> tuple[Tensor, ...]:
    """States, labels, ids (some outside) and the order of tokens; sums of six examples."""
    state = torch.rand(3, count, device=device) * 5
    labels = torch.randint(0, 9, (count,), device=device)
    labels[::7] = -100
    ids = torch.randint(-1, 7, (count,), device=device)
    sums = torch.rand(6, dtype=torch.float64, device=device).mul(LOSS_STEPS).round() / LOSS_STEPS
    return state, labels, ids, ids.argsort(stable=True), sums, torch.arange(6, device=device)


@pytest.mark.parametrize("count", [0, 1, 31, 500])
def test_token_losses_are_added_to_their_examples(device: str, count: int) -> None:
    state, labels, ids, order, sums, counts = tokens(count, device)
    expected_sums, expected_counts = sums.tolist(), counts.tolist()
    for row in range(count):
        sample = int(ids[row])
        if labels[row] != -100 and 0 <= sample < 6:
            loss = float((losses(state)[row] * LOSS_STEPS).round() / LOSS_STEPS)
            expected_sums[sample] += loss
            expected_counts[sample] += 1
    plain_sums, plain_counts = sums.clone(), counts.clone()
    OPS.add_token_losses(state, labels, -100, ids, order, sums, counts)
    online_softmax.add_token_losses(state, labels, -100, ids, order, plain_sums, plain_counts)
    for found_sums, found_counts in ((sums, counts), (plain_sums, plain_counts)):
        assert found_counts.tolist() == expected_counts
        # Exact in any order, but for a logarithm that ends on the other side of a step.
        assert found_sums.tolist() == pytest.approx(expected_sums, rel=0, abs=count / LOSS_STEPS)


def test_order_changes_no_bit(device: str) -> None:
    state, labels, ids, order, sums, counts = tokens(500, device)
    shuffle = torch.randperm(500, device=device)
    shuffled = (state[:, shuffle], labels[shuffle], ids[shuffle])
    other_sums, other_counts = sums.clone(), counts.clone()
    OPS.add_token_losses(state, labels, -100, ids, order, sums, counts)
    OPS.add_token_losses(
        *shuffled[:2], -100, shuffled[2], shuffled[2].argsort(stable=True), other_sums, other_counts
    )
    assert torch.equal(sums, other_sums)
    assert torch.equal(counts, other_counts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 8, dtype=torch.float64)}, "logits: expected float32"),
        ({"logits": torch.zeros(8, 4).t()}, "logits: expected shape"),
        ({"logits": torch.zeros(4)}, "logits: expected shape"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            "labels: expected a contiguous vector of 4",
        ),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "labels: wrong dtype"),
        ({"bias": torch.zeros(7)}, "bias: expected a contiguous vector of 8"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "bias: wrong dtype"),
        ({"state": torch.zeros(3, 5)}, r"state: expected shape \(3, 4\)"),
        ({"state": torch.zeros(3, 4, dtype=torch.float64)}, "state: expected float32"),
    ],
)
def test_misfits_are_refused_by_the_compiled_op(change: dict[str, Tensor], message: str) -> None:
    good: dict[str, Any] = {
        "logits": torch.zeros(4, 8),
        "bias": None,
        "labels": torch.zeros(4, dtype=torch.int64),
        "start": 0,
        "logit_scale": 1.0,
        "softcap": None,
        "state": torch.zeros(3, 4),
    }
    with pytest.raises(RuntimeError, match=message):
        OPS.fold_logits(**{**good, **change})


def test_opcheck(device: str) -> None:
    logits = chunk(5, 300, torch.float32, device)
    labels = torch.arange(5, device=device)
    state = new_state(5, logits)
    torch.library.opcheck(OPS.fold_logits, (logits, None, labels, 3, 0.5, 2.5, state))
    torch.library.opcheck(OPS.fold_logits, (logits, logits[0], labels, 3, 0.5, None, state))
    state, labels, ids, order, sums, counts = tokens(50, device)
    torch.library.opcheck(OPS.add_token_losses, (state, labels, -100, ids, order, sums, counts))


def test_kernels_are_registered_for_what_was_built() -> None:
    info = build_info()
    assert info is not None
    keys = ["CPU", "CUDA"] if info["cuda"] else ["CPU"]
    for op in ("fold_logits", "add_token_losses"):
        for key in keys:
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"sftmix_kernels::{op}", key)
            assert has, f"{op} on {key}"


def test_the_loops_are_capped_as_pytorchs_kernels_are() -> None:
    """``make test-isa`` caps both with ATEN_CPU_CAPABILITY, and so runs every version of them."""
    info = build_info()
    assert info is not None
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() == "x86_64":
        assert info["vectors"] == {"AVX512": "avx512f", "AVX2": "avx2"}.get(capability, "sse2")
    else:
        assert info["vectors"] == ""


def hold_sums_to_pytorchs() -> None:
    """Hold the errors of the fold's sums to twice PyTorch's own, and no rounding more.

    Added up one after another in the lanes of a vector, 1,024 terms were 2 to 3 times as far off on
    AVX2 and SSE2, and 128,256 terms relative to a maximum far below their own 4 times.
    """
    torch.manual_seed(0)
    for columns in (7, 65, 515, 1003, 1024, 3001, 8192, 128256):
        rows = max(16, min(256, 2**18 // columns))
        for dtype, scale in itertools.product(DTYPES, (0.1, 1.0, 10.0)):
            logits = (scale * torch.randn(rows, columns)).to(dtype)
            truth = logits.double().logsumexp(-1)
            errors = []
            for op in (OPS.fold_logits, online_softmax.fold_logits):
                state = new_state(rows, logits)
                for first in range(0, columns, 8192):
                    labels = torch.zeros(rows, dtype=torch.long)
                    fold(op, logits[:, first : first + 8192], labels, state, start=first)
                errors.append(state[0].double() + state[1].double().log() - truth)
            ours, plain = (float(error.square().mean().sqrt()) for error in errors)
            assert ours <= 2.0 * plain + 1e-9, f"{columns} logits in {dtype} of size {scale}"


ONE_SET = """
import warnings
from sftmix_kernels.extension import build_info
from tests.sftmix_kernels.perplexity import test_online_softmax as fold
from tests.sftmix_kernels.row_chunks import row_cases as rows

print(build_info()["vectors"])
warnings.filterwarnings("ignore", "sftmix_kernels: losses run on PyTorch operations")
fold.hold_sums_to_pytorchs()
for vocab_size in (515, 3001):
    for transform in (rows.PLAIN, rows.TRANSFORMS[-1]):
        few = rows.some_rows(200, vocab_size, 2, rows.torch.float32)
        pairs = rows.some_pairs(100, vocab_size)
        rows.assert_in_budget(rows.run_rows(few, transform, rows.COMPILED), few, transform)
        rows.assert_in_budget(rows.run_pairs(pairs, transform, rows.COMPILED), pairs, transform)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one version")
@pytest.mark.parametrize(
    ("capability", "vectors", "needs"),
    [("default", "sse2", None), ("avx2", "avx2", "avx2"), ("avx512", "avx512f", "avx512_f")],
)
def test_every_instruction_set_is_as_exact(
    capability: str, vectors: str, needs: str | None
) -> None:
    """Chosen on purpose, in a process of its own: the choice is made once."""
    if needs is not None and not torch.cpu.get_capabilities().get(needs):
        pytest.skip(f"needs a processor with {needs}")
    done = subprocess.run(
        [sys.executable, "-c", ONE_SET],
        cwd=PACKAGE.parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [vectors]


RUN = """
import sys, warnings
{before}
import torch
import sftmix_kernels

torch.manual_seed(0)
hidden, weight = torch.randn(40, 8), torch.randn(123, 8)
labels, ids = torch.randint(0, 123, (40,)), torch.arange(40) % 5
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [sftmix_kernels.streaming_perplexity(hidden, weight, labels, ids, 5) for _ in range(3)]
assert found[0].equal(found[1])
print(len(caught), *(str(w.message) for w in caught), sep="|")
print(*found[0].tolist())
"""


def test_an_unbuilt_package_runs_and_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: what was registered in this one, which is built, stays."""
    unbuilt = RUN.format(before="sys.modules['sftmix_kernels._extension'] = None")
    words = [sys.executable, "-c", unbuilt]
    done = subprocess.run(words, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    online_softmax.warn_of_pytorch_operations.cache_clear()
    exec(RUN.format(before=""), {})
    built = capsys.readouterr().out
    (head, numbers), (other_head, others) = (said.splitlines() for said in (built, done.stdout))
    assert head == "0"
    assert other_head.startswith("1|")
    assert "its extension is not built" in other_head
    expected = [float(number) for number in numbers.split()]
    assert [float(number) for number in others.split()] == pytest.approx(expected, rel=1e-6)


def test_a_broken_build_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the op is imported, not when it is called."""
    (tmp_path / f"_extension{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    monkeypatch.delitem(sys.modules, "sftmix_kernels._extension")
    monkeypatch.setattr(sftmix_kernels, "__path__", [str(tmp_path)])
    monkeypatch.setattr(torch.library, "define", lambda *_: None)  # once in a process
    name = "sftmix_kernels.perplexity.imported_again"
    again = importlib.util.spec_from_file_location(name, online_softmax.__file__)
    assert again is not None
    assert again.loader is not None
    with pytest.raises(ImportError, match="_extension") as raised:
        again.loader.exec_module(importlib.util.module_from_spec(again))
    assert not isinstance(raised.value, ModuleNotFoundError)
