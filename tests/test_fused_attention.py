"""The Triton kernels against torch's attention: calculated step by step on a CPU, compiled on a GPU."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from uvit_dia import attention_units, uvit
from uvit_dia.attach import attach
from uvit_dia.uvit import Attention, UViT

pytest.importorskip("triton", reason="this build of torch has no Triton")
from uvit_dia import fused_layers
from uvit_dia.fused_attention import FusedAttention
from uvit_dia.fused_layers import BiasGELU, FusedNorm, GatedNorm, PooledNorm
from uvit_dia.late_gradients import StandIns

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


@contextmanager
def as_compiled_for_a_gpu() -> Iterator[Counter]:
    """Networks run the kernels; the count of each Function's calls."""
    calls: Counter = Counter()

    def counted(function: Any) -> Any:
        def apply(*args: Any) -> Any:
            calls[function.__name__] += 1
            return run(*args)

        run = function.apply
        return patch.object(function, "apply", apply)

    with ExitStack() as patches:
        for module in (attention_units, uvit):
            patches.enter_context(patch.object(module, "in_compiled_gpu_code", lambda x: True))
        patches.enter_context(patch.object(Attention, "has_kernels", lambda self, qkv: True))
        patches.enter_context(patch.object(fused_layers, "PROGRAMS", 24))  # the interpreter runs one by one
        for function in (FusedAttention, FusedNorm, PooledNorm, GatedNorm, BiasGELU, StandIns):
            patches.enter_context(counted(function))
        yield calls


def outputs(model: UViT, count: int = 1) -> list[Tensor]:
    """The prediction for one image or two, then all gradients."""
    labels = None if model.config.num_classes is None else torch.tensor([10, 1])[:count]
    images, t = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)), [700, 3][:count]
    model.zero_grad()
    out = model(images, torch.tensor(t), labels).sample
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def randomized(**settings: Any) -> UViT:
    """A network whose biases are not 0, and weights of norms not 1."""
    torch.manual_seed(0)
    model = UViT(sample_size=16, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2.0, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.skipif(HAS_GPU, reason="as the interpreter on a CPU calculates")
@pytest.mark.parametrize(
    ("settings", "gated", "checkpoints"),
    [
        ({"qkv_bias": True}, 0, False),
        ({"num_classes": 11, "unit": {"kind": "dia_lstm", "gate_scale": 4.0}}, 3, True),
        (
            {"unit": {"kind": "dia_lstm", "sharing": "stage", "num_cells": 2, "blocks": "without mid"}},
            2,
            False,
        ),
        ({"unit": {"kind": "dia_lstm_light"}}, 3, False),
        ({"unit": {"kind": "dia_lstm_light", "sharing": "none"}}, 3, False),
        ({"long_skips": False, "unit": {"kind": "sem", "pool": "all"}}, 3, False),
        ({"unit": {"kind": "cbam"}}, 0, False),
    ],
)
def test_a_network_is_the_same_with_the_kernels(settings: dict, gated: int, checkpoints: bool) -> None:
    model, count = randomized(**settings), 1 + checkpoints
    if checkpoints:
        model.enable_gradient_checkpointing()
    expected = outputs(model, count)
    with as_compiled_for_a_gpu() as calls:
        got = outputs(model, count)
    assert (calls.pop("StandIns", 0) > 0) == ("dia_lstm" in str(settings))
    wanted = Counter(FusedAttention=3, FusedNorm=6 - gated, PooledNorm=gated, GatedNorm=gated, BiasGELU=3)
    assert +calls == {name: count * (1 + checkpoints) for name, count in (+wanted).items()}
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(HAS_GPU, reason="as the interpreter on a CPU calculates")
@pytest.mark.parametrize("kind", [None, "se", "dia_lstm_light"])
def test_under_autocast_too_and_attention_gets_half_types(kind: str | None) -> None:
    model = randomized(qkv_bias=True, unit={"kind": kind} if kind else None)
    with torch.autocast("cpu", torch.float16):
        expected = outputs(model, 2)
    only_half = patch.object(Attention, "has_kernels", lambda self, qkv: qkv.dtype == torch.float16 or 1 / 0)
    with as_compiled_for_a_gpu(), torch.autocast("cpu", torch.float16), only_half:
        got = outputs(model, 2)
    for mine, theirs in zip(got, expected, strict=True):
        assert error(mine, theirs) < 0.03


class Replaced(nn.Module):
    """An adapter around a linear layer, as LoRA's, whose weight is the layer's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.more(x)


def with_adapters(model: UViT) -> None:
    for block in (*model.in_blocks, model.mid_block, *model.out_blocks):
        block.mlp.fc1 = Replaced(block.mlp.fc1)


def with_hooks(model: UViT) -> None:
    attach(model, "*blocks.*.norm2", {"kind": "se"}, model.num_extra)
    model.mid_block.mlp.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.skipif(HAS_GPU, reason="as the interpreter on a CPU calculates")
@pytest.mark.parametrize("change", [with_adapters, with_hooks, None])
def test_blocks_call_their_parts_where_these_are_changed_or_left_out(change: Any) -> None:
    model = randomized(**({} if change else {"residuals": False}))
    if change:
        change(model)
    expected = outputs(model)
    with as_compiled_for_a_gpu() as calls:
        got = outputs(model)
    assert calls["BiasGELU"] == 0 < calls["FusedAttention"]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


ONE_GRAPH = """
import os
from unittest.mock import patch

import torch
import torch.utils._triton

torch.utils._triton.has_triton = lambda *args, **options: True
from uvit_dia import attention_units, uvit


def traced(graph, inputs):
    calls = [(getattr(node.target, "_opname", ""), node.args) for node in graph.graph.nodes]
    low = [args[2] for name, args in calls if name == "product"]  # each weight is rounded, and used once
    print(len(low), len(set(low)), [name for name, _ in calls].count("rounded"), flush=True)
    os._exit(0)  # it runs on GPUs only


model = uvit.UViT(sample_size=16, embed_dim=128, depth=2, num_heads=2, unit={"kind": "dia_lstm_light"})
compiling = lambda x: torch.compiler.is_dynamo_compiling()
with (
    patch.object(attention_units, "in_compiled_gpu_code", compiling),
    patch.object(uvit, "in_compiled_gpu_code", compiling),
    patch.object(uvit.Attention, "has_kernels", lambda self, qkv: False),
    torch.autocast("cpu", torch.bfloat16),
):
    torch.compile(model, fullgraph=True, backend=traced)(torch.randn(2, 3, 16, 16), torch.tensor([3, 700]))
"""


@pytest.mark.skipif(HAS_GPU, reason="a network compiled there must be one graph")
def test_a_network_with_the_kernels_is_one_graph_to_the_compiler() -> None:
    # in a process of its own, since interpreted kernels are no kernels to the compiler
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    seen = subprocess.run([sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True, env=environment)
    if "InternalTorchDynamoError: RuntimeError: 0 active drivers" in seen.stderr:
        pytest.skip("torch 2.6 asks for a GPU even to trace kernels")
    assert seen.stdout == "14 14 1\n", seen.stdout + seen.stderr


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


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_compiled_network_runs_the_kernels_and_agrees_with_the_eager_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    unit, is_half = {"kind": "dia_lstm"}, dtype != torch.float32
    model = UViT(sample_size=16, embed_dim=128, depth=2, num_heads=2, unit=unit).cuda()
    images, t = torch.randn(4, 3, 16, 16, device="cuda"), torch.tensor([0, 9, 99, 999], device="cuda")
    results, names = [], []
    for network in (model, torch.compile(model, fullgraph=True)):
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            with torch.autocast("cuda", dtype, enabled=is_half):
                out = network(images, t).sample
            out.square().sum().backward()  # a mean's gradients are too small for float16
            torch.cuda.synchronize()
        names.append({event.key for event in seen.key_averages()})
        results.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    kernels = {"norm_kernel", "gelu_kernel", "tokens_kernel"}
    if is_half and torch.cuda.get_device_capability() == (9, 0):
        kernels |= {"forward_kernel", "queries_kernel", "keys_kernel"}
    assert not kernels & names[0] and kernels <= names[1]
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs.double()) < (0.03 if is_half else 1e-3)
