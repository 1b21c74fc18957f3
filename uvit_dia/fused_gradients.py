"""Gradients with sums over tokens, in one pass over them, in Triton, for compiled networks on GPUs.

A compiler reads the tokens once for their own gradient and again for the sum that is a weight's. The forward
passes are left to it, as it makes them one with what comes before and after.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# log2(1 - Phi(a)) by falling powers of a >= 0: 1 - Phi to a relative 6e-5 up to 5.5, and falling on beyond.
TAIL = (-1.302623e-6, 5.265118e-5, -8.726065e-4, 0.00832637, -0.05367626, -0.4586686, -1.151198, -0.9999975)
T7, T6, T5, T4, T3, T2, T1, T0 = map(tl.constexpr, TAIL)  # Triton 3.3 has no tuples of them
B2, B0 = tl.constexpr(-math.log2(math.e) / 2), tl.constexpr(-math.log2(2 * math.pi) / 2)  # log2 of the bell


@triton.jit
def norm_kernel(
    grad, more, x, after, weight, mean, scale, dx, parts, tokens, rows, D: tl.constexpr, COLS: tl.constexpr
):
    """dx (tokens, D) = more + the gradient through the norm of x - after.

    parts (programs, 4, D): what each program's rows add to those of weight, bias, before and after.
    """
    first = tl.program_id(0).to(tl.int64) * rows
    cols, mask = tl.arange(0, COLS), tl.arange(0, COLS) < D
    grad, x, dx, more = grad + first * D, x + first * D, dx + first * D, more + first * D
    w, a = tl.load(weight + cols, mask, 0.0), tl.load(after + cols, mask, 0.0)
    dw, db = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    dbefore, dafter = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for i in tl.range(0, tl.minimum(tokens - first, rows).to(tl.int32), num_stages=3):
        g, y = tl.load(grad + i * D + cols, mask, 0.0).to(tl.float32), tl.load(x + i * D + cols, mask, 0.0)
        rest, z = tl.load(more + i * D + cols, mask, 0.0).to(tl.float32), tl.load(scale + first + i)
        y = (y.to(tl.float32) - a - tl.load(mean + first + i)) * z
        gw = g * w
        d = rest + z * (gw - (tl.sum(gw) + y * tl.sum(gw * y)) / D)
        tl.store(dx + i * D + cols, d.to(dx.dtype.element_ty), mask)
        dw, db, dbefore, dafter = dw + g * y, db + g, dbefore + d, dafter + rest
    at = parts + tl.program_id(0) * 4 * D + cols
    tl.store(at, dw, mask)
    tl.store(at + D, db, mask)
    tl.store(at + 2 * D, dbefore, mask)
    tl.store(at + 3 * D, dafter, mask)


@triton.jit
def gelu_kernel(grad, x, bias, dx, parts, tokens, rows, D: tl.constexpr, COLS: tl.constexpr):
    """dx (tokens, D), and parts (programs, D) of the bias's gradient."""
    part = tl.num_programs(1) - 1 - tl.program_id(1)  # the product before wrote the last rows last: cached
    first = part.to(tl.int64) * rows
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask, b = cols < D, tl.load(bias + cols, cols < D, 0.0)
    grad, x, dx, db = grad + first * D, x + first * D, dx + first * D, tl.zeros((COLS,), tl.float32)
    for i in range(tl.minimum(tokens - first, rows).to(tl.int32)):
        y = tl.load(x + i * D + cols, mask, 0.0).to(tl.float32) + b
        a = tl.abs(y)
        tail = tl.exp2(((((((a * T7 + T6) * a + T5) * a + T4) * a + T3) * a + T2) * a + T1) * a + T0)
        slope = tl.where(y > 0, 1 - tail, tail) + y * tl.exp2(y * y * B2 + B0)
        d = tl.load(grad + i * D + cols, mask, 0.0) * slope
        tl.store(dx + i * D + cols, d.to(dx.dtype.element_ty), mask)
        db += d
    tl.store(parts + part * D + cols, db, mask)


@triton.jit
def gate_kernel(grad, x, parts, tokens, rows, D: tl.constexpr, COLS: tl.constexpr):
    """parts (B, programs an image, D) of the gate's gradient."""
    begin, cols, mask = tl.program_id(1) * rows, tl.arange(0, COLS), tl.arange(0, COLS) < D
    first = tl.program_id(0).to(tl.int64) * tokens + begin
    grad, x, dgate = grad + first * D, x + first * D, tl.zeros((COLS,), tl.float32)
    for i in tl.range(0, tl.minimum(tokens - begin, rows), num_stages=3):
        y = tl.load(x + i * D + cols, mask, 0.0).to(tl.float32)
        dgate += tl.load(grad + i * D + cols, mask, 0.0).to(tl.float32) * y
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts + program * D + cols, dgate, mask)


def share(tokens: int, programs: int) -> tuple[int, int]:
    """Rows of each program, where there are about so many programs, and how many it takes."""
    rows = -(-tokens // programs)
    return rows, -(-tokens // rows)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype). In torch 2.11 a compiled Function has no gradient where that changed nothing."""
    return x if x.dtype == dtype else x.to(dtype)


class FusedNorm(torch.autograd.Function):
    """x = x + before, then x + after and LayerNorm(x), both in the type of x (B, L, D).

    before and after are the biases (D) of the products that are added to x before and after the norm: their
    gradients are sums of what the norm's gradient reads and writes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, dtype = x.float() + before, x.dtype
        y, mean, scale = torch.native_layer_norm(x, weight.shape, weight.float(), bias.float(), 1e-5)
        out = cast(x + after, dtype)  # kept for the backward pass, too: one tensor less is written
        ctx.save_for_backward(out, after, weight, mean, scale)
        return out, cast(y, dtype)

    @staticmethod
    def backward(ctx: Any, more: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, *weights = ctx.saved_tensors
        x, more, grad = x.contiguous(), more.contiguous(), grad.contiguous()
        tokens, dim = x.numel() // x.shape[-1], x.shape[-1]
        (rows, programs), dx = share(tokens, 1024), torch.empty_like(x)
        parts = x.new_empty(programs, 4, dim, dtype=torch.float32)
        cols = triton.next_power_of_2(dim)
        args = (grad, more, x, *weights, dx, parts, tokens, rows)
        norm_kernel[(programs,)](*args, D=dim, COLS=cols, num_warps=max(1, cols // 512))
        return dx, *parts.sum(0)


class BiasGELU(torch.autograd.Function):
    """GELU(x + bias) in x's type, of x (B, L, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        y = x.float() + bias
        log2 = TAIL[0] * y.abs() + TAIL[1]  # an exact erf keeps a GPU calculating longer than loading
        for factor in TAIL[2:]:
            log2 = log2 * y.abs() + factor
        return cast(torch.where(y > 0, y, 0.0) - y.abs() * torch.exp2(log2), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        x, grad = x.contiguous(), grad.contiguous()
        tokens, dim = x.numel() // x.shape[-1], x.shape[-1]
        (rows, programs), dx = share(tokens, 512), torch.empty_like(x)
        parts = x.new_empty(programs, dim, dtype=torch.float32)
        args = (grad, x, bias, dx, parts, tokens, rows)
        gelu_kernel[(-(-dim // 256), programs)](*args, D=dim, COLS=256, num_warps=1)
        return dx, parts.sum(0)


class Scale(torch.autograd.Function):
    """x * gate in x's type, of x (B, L, D) and gate (B, 1, D), float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return cast(x * gate, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        x, grad = x.contiguous(), grad.contiguous()
        batch, tokens, dim = x.shape
        rows, programs = share(tokens, max(1, 1024 // batch))
        parts = x.new_empty(batch, programs, dim, dtype=torch.float32)
        args, cols = (grad, x, parts, tokens, rows), triton.next_power_of_2(dim)
        gate_kernel[(batch, programs)](*args, D=dim, COLS=cols, num_warps=max(1, cols // 512))
        return cast(grad * gate, x.dtype), parts.sum(1, keepdim=True)
