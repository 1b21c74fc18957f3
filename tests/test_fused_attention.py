"""The Triton kernels against torch's attention: calculated step by step on a CPU, compiled on a GPU."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from uvit_dia import attention_units, uvit
from uvit_dia.uvit import Attention, UViT

pytest.importorskip("triton", reason="this build of torch has no Triton")
from uvit_dia.fused_attention import FusedAttention

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# An interpreter calculates with numpy, which has no bfloat16.
DTYPES = [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)] if HAS_GPU else [(torch.float32, 1e-6)]


def eager(qkv: Tensor, num_heads: int) -> Tensor:
    q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=num_heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())


def check(qkv: Tensor, num_heads: int, few: int, bound: float) -> None:
    """Output and gradients of FusedAttention within the bound of exact ones; of the first tokens too."""
    grad = torch.randn_like(qkv[..., : qkv.shape[2] // 3])
    mine, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, expected = FusedAttention.apply(mine, num_heads), eager(exact, num_heads)
    assert error(out, expected) < bound
    out.backward(grad)
    expected.backward(grad.double())
    for got, wanted in zip(mine.grad.chunk(3, -1), exact.grad.chunk(3, -1), strict=True):
        assert error(got, wanted) < bound
        assert error(got[:, :few], wanted[:, :few]) < bound


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("few", [1, 2, 16])
@pytest.mark.parametrize("patches", [64, 128])
def test_output_and_gradients_equal_those_of_torch(patches: int, few: int, dtype: Any, bound: float) -> None:
    torch.manual_seed(few)
    check(torch.randn(2, few + patches, 3 * 2 * 64, device=DEVICE, dtype=dtype), 2, few, bound)


@pytest.mark.filterwarnings("ignore:overflow|invalid value")  # in keys that are not there, nor stored
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_are_all_large_or_all_very_negative(sign: int, dtype: Any) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 65, 3 * 64, device=DEVICE)
    qkv[..., :64] = 3.5 + 0.1 * qkv[..., :64]
    qkv[..., 64:128] = sign * (3.5 + 0.1 * qkv[..., 64:128])  # scores of about 98: exp(98) is no float32
    if not HAS_GPU:
        check(qkv, 1, 1, 1e-3)
    mine = qkv.to(dtype).requires_grad_()
    out = FusedAttention.apply(mine, 1)
    out.sum().backward()
    assert error(out, eager(mine.double(), 1)) < 1e-2
    assert mine.grad.isfinite().all()


@pytest.mark.skipif(HAS_GPU, reason="as the interpreter on a CPU calculates")
@pytest.mark.parametrize(
    ("settings", "checkpoints"),
    [({}, False), ({"num_classes": 11, "unit": {"kind": "dia_lstm"}}, False), ({"num_classes": 11}, True)],
)
def test_a_network_is_the_same_with_the_kernels(settings: dict, checkpoints: bool) -> None:
    torch.manual_seed(0)
    model = UViT(sample_size=16, embed_dim=128, depth=2, num_heads=2, **settings)
    if checkpoints:
        model.enable_gradient_checkpointing()
    labels = torch.tensor([1, 10]) if settings else None
    images, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])

    def results() -> list[Tensor]:
        model.zero_grad()
        out = model(images, t, labels).sample
        out.square().mean().backward()
        return [out, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = [x.detach().clone() for x in results()]
    with (
        patch.object(attention_units, "in_compiled_gpu_code", lambda x: True),
        patch.object(uvit, "in_compiled_gpu_code", lambda x: True),
        patch.object(Attention, "has_kernels", lambda self, qkv: True),
        patch.object(FusedAttention, "apply", wraps=FusedAttention.apply) as kernels,
    ):
        got = results()
    assert kernels.call_count == 3 * (1 + checkpoints)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_other_lengths_types_heads_and_devices_keep_torch_s_attention() -> None:
    attention = Attention(128, 2, False)
    half = torch.zeros(1, 257, 384, dtype=torch.bfloat16)
    with patch.object(torch.compiler, "is_dynamo_compiling", lambda: True):
        assert not attention_units.in_compiled_gpu_code(half)  # on a CPU
    with patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)):
        assert attention.has_kernels(half)
        assert not attention.has_kernels(half.float())
        assert not Attention(128, 4, False).has_kernels(half)  # heads of 32
        for length in (17, 64, 256, 257 + 16):
            assert not attention.has_kernels(torch.zeros(1, length, 384, dtype=torch.bfloat16))


@pytest.mark.skipif(not HAS_GPU or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_compiled_network_runs_the_kernels_and_agrees_with_the_eager_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    unit, is_half = {"kind": "dia_lstm"}, dtype != torch.float32
    model = UViT(sample_size=16, embed_dim=128, depth=2, num_heads=2, unit=unit).cuda()
    images, t = torch.randn(4, 3, 16, 16, device="cuda"), torch.tensor([0, 9, 99, 999], device="cuda")
    results, names = [], []
    for network in (model, torch.compile(model)):
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            with torch.autocast("cuda", dtype, enabled=is_half):
                out = network(images, t).sample
            out.square().sum().backward()  # a mean's gradients are too small for float16
            torch.cuda.synchronize()
        names.append({event.key for event in seen.key_averages()})
        results.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    kernels = {"norm_kernel", "gelu_kernel", "gate_kernel"}
    kernels |= {"forward_kernel", "queries_kernel", "keys_kernel"} if is_half else set()
    assert not kernels & names[0] and kernels <= names[1]
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs.double()) < (0.03 if is_half else 1e-3)
