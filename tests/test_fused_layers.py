"""The Triton gradients against autograd's: calculated step by step on a CPU, compiled on a GPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="this build of torch has no Triton")
from uvit_dia import fused_layers
from uvit_dia.fused_layers import BiasGELU, FusedNorm, GatedNorm, PooledNorm, added, product, rounded

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# An interpreter calculates with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * HAS_GPU]
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs them one by one; so each has several rows, as on a GPU."""
    if not HAS_GPU:
        monkeypatch.setattr(fused_layers, "PROGRAMS", 24)


def results(function: Callable, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of all tensors."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, tensors, grads)]


def check(ours: Callable, exact: Callable, tensors: list[Tensor], grads: list[Tensor]) -> None:
    bound = BOUNDS[tensors[0].dtype]
    tensors[0] = tensors[0].mT.contiguous().mT  # nothing promises memory in order
    expected = results(exact, [x.double() for x in tensors], [x.double() for x in grads])
    for got, wanted, given in zip(results(ours, tensors, grads), expected, [*grads, *tensors], strict=True):
        assert got.dtype == given.dtype
        assert (got.double() - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 65, 128), (1, 3, 1152), *[(9, 257, 512)] * HAS_GPU])
def test_a_norm_between_two_biases(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    def exact(
        x: Tensor, weight: Tensor, bias: Tensor, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = x + before
        return x + after, F.layer_norm(x, weight.shape, weight, bias)

    torch.manual_seed(0)
    x, *grads = 2 + torch.randn(3, *shape, device=DEVICE).to(dtype)
    check(FusedNorm.apply, exact, [x, *torch.rand(4, shape[-1], device=DEVICE)], grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 65, 128), (1, 3, 1152), *[(9, 257, 512)] * HAS_GPU])
def test_gelu_after_a_bias(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad = 2 * torch.randn(2, *shape, device=DEVICE).to(dtype)
    bias = torch.randn(shape[-1], device=DEVICE)
    check(BiasGELU.apply, lambda x, bias: F.gelu(x + bias), [x, bias], [grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 65, 128), (1, 7, 1152), *[(9, 257, 512)] * HAS_GPU])
def test_a_norm_that_is_pooled_and_gated(
    shape: tuple[int, int, int], skipped: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    dim = shape[-1]
    mix = torch.randn(dim, dim, device=DEVICE) / dim**0.5  # what stands for a unit

    def ours(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        out, mean, *stats = PooledNorm.apply(x, y, weight, bias, *others, skipped)
        gate = torch.sigmoid(mean @ mix)
        return out, GatedNorm.apply(out, *stats[:2], weight, bias, others[1], gate, *stats[2:])

    def exact(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        z = x + y + others[0]
        n = F.layer_norm(z, weight.shape, weight, bias)
        return z + others[1], n * torch.sigmoid(n[:, skipped:].mean(1, keepdim=True) @ mix.double())

    x, y, *grads = 2 + torch.randn(4, *shape, device=DEVICE).to(dtype)
    check(ours, exact, [x, y, *torch.rand(4, dim, device=DEVICE)], grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_rounds_its_weight_and_not_that_weight_s_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(3, 65, 40, device=DEVICE).to(dtype), torch.randn(3, 65, 24, device=DEVICE).to(dtype)
    weight = torch.randn(24, 40, device=DEVICE)
    check(lambda x, w: product(x, w, w.detach().to(dtype)), F.linear, [x, weight], [grad])


def test_gelu_is_exact_everywhere() -> None:
    x = torch.linspace(-12, 12, 73 * 137, device=DEVICE).view(1, 73, 137)
    ones, bias = torch.ones_like(x), torch.zeros(137, device=DEVICE)
    ours, theirs = results(BiasGELU.apply, [x, bias], [ones]), results(F.gelu, [x.double()], [ones.double()])
    for got, wanted in zip(ours[:2], theirs, strict=True):  # the value and its slope
        assert torch.allclose(got.double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1000, 512), (3, 129, 40), (2, 5, 137), (4, 1, 7)])
def test_parts_are_added_one_image_at_a_time(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    parts = torch.randn(shape, device=DEVICE)
    assert torch.allclose(added(parts).double(), parts.double().sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    weights = [torch.randn(shape, device=DEVICE) for shape in ((24, 40), (3, 5), (1, 1))]
    for ours, weight in zip(rounded(weights, dtype), weights, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, weight.to(dtype))
