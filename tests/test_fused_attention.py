"""The Triton kernels against torch's attention: calculated step by step on a CPU, compiled on a GPU."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from uvit_dia.uvit import Attention, UViT

pytest.importorskip("triton", reason="this build of torch has no Triton")
from uvit_dia.fused_attention import FusedAttention

HAS_GPU = torch.cuda.is_available()


def eager(qkv: Tensor, num_heads: int) -> Tensor:
    q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=num_heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("few", [1, 2, 16])
@pytest.mark.parametrize("patches", [64, 128])
def test_output_and_gradient_equal_those_of_torch(patches: int, few: int) -> None:
    torch.manual_seed(few)
    device, dtype, bound = ("cuda", torch.bfloat16, 4e-3) if HAS_GPU else ("cpu", torch.float32, 1e-6)
    qkv = torch.randn(2, few + patches, 3 * 2 * 64, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, few + patches, 2 * 64, device=device, dtype=dtype)
    out = FusedAttention.apply(qkv, 2)
    exact_in = qkv.detach().double().requires_grad_()
    exact = eager(exact_in, 2)
    assert error(out, exact.detach()) < bound
    got, expected = torch.autograd.grad(out, qkv, grad), torch.autograd.grad(exact, exact_in, grad.double())
    for mine, theirs in zip(got[0].chunk(3, -1), expected[0].chunk(3, -1), strict=True):
        assert error(mine, theirs) < bound
        assert error(mine[:, :few], theirs[:, :few]) < bound


def test_large_scores_do_not_overflow() -> None:
    torch.manual_seed(0)
    device, dtype, bound = ("cuda", torch.bfloat16, 4e-3) if HAS_GPU else ("cpu", torch.float32, 1e-5)
    qkv = 30 * torch.randn(1, 65, 3 * 64, device=device).to(dtype)
    assert error(FusedAttention.apply(qkv, 1), eager(qkv.double(), 1)) < bound


@pytest.mark.parametrize("length", [64, 256, 257 + 16])
def test_other_lengths_types_and_devices_keep_torch_s_attention(length: int) -> None:
    attention = Attention(128, 2, False)
    half = torch.zeros(1, 257, 384, dtype=torch.bfloat16)
    assert not attention.has_kernels(half)  # on a CPU
    with (
        patch.object(Tensor, "is_cuda", True),
        patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
    ):
        assert attention.has_kernels(half)
        assert not attention.has_kernels(half.float())
        assert not attention.has_kernels(torch.zeros(1, length, 384, dtype=torch.bfloat16))
        assert not Attention(128, 4, False).has_kernels(half)  # heads of 32


@pytest.mark.skipif(not HAS_GPU or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
def test_a_compiled_network_agrees_with_the_eager_one_to_bfloat16() -> None:
    torch.manual_seed(0)
    model = UViT(sample_size=16, embed_dim=128, depth=2, num_heads=2).cuda()
    images, t = torch.randn(4, 3, 16, 16, device="cuda"), torch.tensor([0, 9, 99, 999], device="cuda")
    compiled = torch.compile(model)
    results = []
    for network in (model, compiled):
        with torch.autocast("cuda", torch.bfloat16):
            out = network(images, t).sample
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs.double()) < 0.03
