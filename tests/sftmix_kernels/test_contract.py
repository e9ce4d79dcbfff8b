"""What the three losses promise alike: layouts, autograd, compilation, autocast; opcheck of ops."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sftmix_kernels import fused_cross_entropy, fused_mixup_loss, fused_sftmix_loss
from sftmix_kernels.mixup_loss import mixup_rows
from sftmix_kernels.perplexity.streaming import add_sample_losses_op
from sftmix_kernels.sftmix_loss import sftmix_rows

from .budget import assert_same_bits, exact, head_inputs, run

R, D, V = 12, 8, 123
LABELS = torch.tensor([3, 5, -100, 7, 7, 9, 11, -100, 0, 122, 60, 61])
OTHER_LABELS = LABELS.flip(0)
PAIRS = {"pair_c": torch.tensor([0, 2, 4, 9]), "pair_u": torch.tensor([1, 3, 11, 8])}


def cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
    return fused_cross_entropy(hidden, weight, LABELS)


def row_losses(hidden: Tensor, weight: Tensor) -> Tensor:
    return fused_cross_entropy(hidden, weight, LABELS, reduction="none", softcap=4.0)


def mixup(hidden: Tensor, weight: Tensor) -> Tensor:
    return fused_mixup_loss(hidden, hidden.detach().flip(0), weight, LABELS, OTHER_LABELS, 0.3)


def sftmix(hidden: Tensor, weight: Tensor) -> Tensor:
    return fused_sftmix_loss(hidden, weight, LABELS, lam=0.3, **PAIRS).loss


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES = (cross_entropy, row_losses, mixup, sftmix)
# PyTorch's own tracing of an autograd.Function, and inductor, use what PyTorch deprecates.
ignore_tracing_warning = pytest.mark.filterwarnings("ignore::DeprecationWarning")
every_loss = pytest.mark.parametrize("loss", LOSSES)


@every_loss
@pytest.mark.parametrize("layout", ["strided", "offset", "expanded"])
def test_other_layouts_give_what_contiguous_inputs_give(loss: Loss, layout: str) -> None:
    """Logits are exact, and so the bits of losses the same; gradients are other products."""
    if layout == "strided":
        hidden, weight = exact(R, 2 * D)[:, ::2], exact(2 * V, D)[::2]
    elif layout == "offset":
        hidden, weight = exact(R + 3, D)[3:], exact(V, D + 5)[:, 5:]
    else:
        hidden, weight = exact(1, D).expand(R, D), exact(V, 1).expand(V, D)
    found = run(loss, {"hidden": hidden, "weight": weight})
    plain = run(loss, {"hidden": hidden.contiguous(), "weight": weight.contiguous()})
    assert torch.equal(found.loss, plain.loss)
    torch.testing.assert_close(found.gradients, plain.gradients, rtol=1e-5, atol=1e-6)


def test_expanded_upstream_gradient() -> None:
    tensors = head_inputs((R, D), V, torch.float32)
    assert_same_bits(
        run(lambda **t: row_losses(**t).sum(), tensors)._replace(loss=torch.zeros(())),
        run(row_losses, tensors, torch.ones(R))._replace(loss=torch.zeros(())),
    )


@every_loss
def test_second_backward_gives_equal_bits_or_a_clear_error(loss: Loss) -> None:
    leaves = [t.requires_grad_() for t in head_inputs((R, D), V, torch.float32).values()]
    value = loss(*leaves).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)


@every_loss
def test_double_backward_is_a_clear_error(loss: Loss) -> None:
    leaves = [t.requires_grad_() for t in head_inputs((R, D), V, torch.float32).values()]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)


@every_loss
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_has_no_gradient_and_changes_no_other(loss: Loss, frozen: str) -> None:
    tensors = head_inputs((R, D), V, torch.float32)
    both = run(loss, tensors)
    constant = tensors.pop(frozen)
    one = run(lambda **t: loss(**t, **{frozen: constant}), tensors)
    gradients = {k: v for k, v in both.gradients.items() if k != frozen}
    assert_same_bits(one, both._replace(gradients=gradients))
    assert constant.grad is None


@every_loss
def test_no_grad_gives_the_same_loss(loss: Loss) -> None:
    tensors = head_inputs((R, D), V, torch.float32)
    with torch.no_grad():
        value = loss(**tensors)
    assert torch.equal(value, run(loss, tensors).loss)


@ignore_tracing_warning
@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager_with_ignored_rows(loss: Loss, dtype: torch.dtype) -> None:
    tensors = head_inputs((R, D), V, dtype)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled, tensors), run(loss, tensors))


@ignore_tracing_warning
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor_equals_eager() -> None:
    # What inductor keeps between processes it also takes where ATEN_CPU_CAPABILITY is another, for
    # which that C++ does not compile (torch 2.13). A plain `setattr` is not undone in torch 2.11.
    inductor = torch._inductor.config.patch(fx_graph_cache=False)
    autograd = torch._functorch.config.patch(enable_autograd_cache=False)
    tensors = head_inputs((R, D), V, torch.float32)
    compiled = torch.compile(sftmix, fullgraph=True, backend="inductor")
    with inductor, autograd:
        found = run(compiled, tensors)
    plain = run(sftmix, tensors)
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-6, atol=0)
    assert_same_bits(found._replace(loss=plain.loss), plain)


def test_opcheck() -> None:
    tensors = head_inputs((R, D), V, torch.float32, bias=True)
    hidden, weight, bias = tensors.values()
    labels, ones = LABELS.clamp(min=0), (LABELS != -100).float()
    targets, share = torch.stack((labels, labels.flip(0)), -1), torch.full((R, 2), 0.5)
    rest = (1.5, 3.0, 4, [True, True, True])
    torch.library.opcheck(
        mixup_rows, (hidden, hidden + 1, weight, bias, targets, share, ones, *rest)
    )
    pairs = (PAIRS["pair_c"], PAIRS["pair_u"], torch.tensor([1.0, 0, 1, 1]), torch.rand(4, 2))
    torch.library.opcheck(
        sftmix_rows, (hidden, weight, bias, labels, ones, *pairs, None, torch.tensor(0.2), *rest)
    )
    sums, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    torch.library.opcheck(
        add_sample_losses_op,
        (hidden, weight, bias, LABELS, torch.arange(R) % 3, 1.5, 3.0, -100, 50, sums, counts),
    )


@every_loss
def test_autocast_casts_as_linear_does(loss: Loss) -> None:
    """Float32 master weights: bfloat16 inside, float32 gradients outside."""
    tensors = head_inputs((R, D), V, torch.float32)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}

    def inside(**t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(**t)

    found, plain = run(inside, tensors), run(loss, rounded)
    gradients = {k: None if g is None else g.float() for k, g in plain.gradients.items()}
    assert_same_bits(found, plain._replace(gradients=gradients))
    assert all(g is not None and g.dtype == torch.float32 for g in found.gradients.values())


@every_loss
def test_a_kept_graph_gives_its_gradients_again_whatever_became_of_them(loss: Loss) -> None:
    """A loss hands its gradients out uncopied only where no other backward will need them."""
    hidden, weight = exact(R, D).requires_grad_(), exact(V, D).requires_grad_()
    total = loss(hidden, weight).sum()
    first = [g.clone() for g in torch.autograd.grad(total, (hidden, weight), retain_graph=True)]
    for keeps in (True, False):
        found = torch.autograd.grad(total, (hidden, weight), retain_graph=keeps)
        for one, other in zip(found, first, strict=True):
            assert torch.equal(one, other)
            one.zero_()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_backward_heeds_other_upstream_gradients(mode: str) -> None:
    def gradient(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
        leaf = hidden.detach().requires_grad_()
        loss = fused_cross_entropy(leaf, weight, labels) * upstream
        return torch.autograd.grad(loss, leaf)[0]

    head = exact(R, D), exact(V, D), LABELS
    traced = make_fx(gradient, tracing_mode=mode)(*head, torch.tensor(1.0))
    for upstream in (torch.tensor(1.0), torch.tensor(0.3)):
        torch.testing.assert_close(traced(*head, upstream), gradient(*head, upstream))
