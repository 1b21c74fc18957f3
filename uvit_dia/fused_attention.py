"""Attention of 2^n patches and the few tokens before them, in Triton, for compiled networks on GPUs.

Time and label make 257 or 258 tokens of 256 patches, and general kernels spend a tile of 64 or 128 on the
one or two over. Here patches fill their tiles and the tokens before them have a narrow one. The equations are
flash attention's (Dao 2023, arXiv 2307.08691, sec. 2.3): S = Q K^T / sqrt(D), P = exp(S - lse), O = P V,
dV = P^T dO, delta = sum(dO O), dS = P (dO V^T - delta), dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

D = tl.constexpr(64)  # width of a head, as in all official models up to L
TILE = tl.constexpr(64)  # queries or keys of one program
STEP = tl.constexpr(32)  # keys or queries that it reads at a time
FEW = tl.constexpr(16)  # rows of the tile of the tokens before the patches
LOG2E = tl.constexpr(1.4426950408889634)  # exponents and lse are to base 2


@triton.jit
def start(H: tl.constexpr, E: tl.constexpr, N: tl.constexpr):
    """Where this program's head starts in qkv, out and lse, and its tokens: some patches, or the E before."""
    part, i = tl.program_id(0) % (N // TILE + 1), (tl.program_id(0) // (N // TILE + 1)).to(tl.int64)
    image, head = i // H * (E + N) * H * D, i % H * D
    first, end = tl.where(part > 0, E + (part - 1) * TILE, 0), tl.where(part > 0, E + N, E)
    return 3 * image + head, image + head, i * (E + N), first, end


@triton.jit
def at(base, first, row, n: tl.constexpr):
    """Pointers (n, D) to the rows from the first on, so many elements apart."""
    return base + (first + tl.arange(0, n))[:, None] * row + tl.arange(0, D)[None]


@triton.jit
def forward_kernel(qkv, out, lse, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr):
    """out (B, L, H D) and lse (B, H, L) of qkv (B, L, 3 H D)."""
    in_qkv, in_out, in_lse, first, end = start(H, E, N)
    q, to_k, to_v, row = qkv + in_qkv, H * D, 2 * H * D, 3 * H * D
    own, few, scale = first + tl.arange(0, TILE), (tl.arange(0, FEW) < E)[:, None], LOG2E / D**0.5
    mask = (own < end)[:, None]
    x = tl.load(at(q, first, row, TILE), mask, 0.0)
    k0, v0 = tl.load(at(q + to_k, 0, row, FEW), few, 0.0), tl.load(at(q + to_v, 0, row, FEW), few, 0.0)
    s0 = tl.where(tl.trans(few), tl.dot(x, tl.trans(k0)), float("-inf")) * scale
    top = tl.max(s0, 1)
    p0 = tl.exp2(s0 - top[:, None])
    total, y = tl.sum(p0, 1), tl.dot(p0.to(x.dtype), v0)
    for j in range(E, E + N, STEP):  # softmax as it goes: `top` is the largest exponent so far
        kj, vj = tl.load(at(q + to_k, j, row, STEP)), tl.load(at(q + to_v, j, row, STEP))
        s = tl.dot(x, tl.trans(kj))  # (TILE, STEP)
        new = tl.maximum(top, tl.max(s, 1) * scale)
        p, decay = tl.exp2(s * scale - new[:, None]), tl.exp2(top - new)
        total, top = total * decay + tl.sum(p, 1), new
        y = tl.dot(p.to(x.dtype), vj, y * decay[:, None])
    tl.store(at(out + in_out, first, H * D, TILE), (y / total[:, None]).to(x.dtype), mask)
    tl.store(lse + in_lse + own, top + tl.log2(total), own < end)


@triton.jit
def queries_kernel(qkv, out, lse, grad, dqkv, delta, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr):
    """delta, and the gradient of the queries."""
    in_qkv, in_out, in_lse, first, end = start(H, E, N)
    q, to_k, to_v, row = qkv + in_qkv, H * D, 2 * H * D, 3 * H * D
    own, few, scale = first + tl.arange(0, TILE), (tl.arange(0, FEW) < E)[:, None], LOG2E / D**0.5
    mask = (own < end)[:, None]
    x = tl.load(at(q, first, row, TILE), mask, 0.0)
    y = tl.load(at(out + in_out, first, H * D, TILE), mask, 0.0)
    dy = tl.load(at(grad + in_out, first, H * D, TILE), mask, 0.0)
    z = tl.load(lse + in_lse + own, own < end, 0.0)[:, None]
    inner = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(delta + in_lse + own, inner, own < end)
    k0, v0 = tl.load(at(q + to_k, 0, row, FEW), few, 0.0), tl.load(at(q + to_v, 0, row, FEW), few, 0.0)
    s0 = tl.where(tl.trans(few), tl.dot(x, tl.trans(k0)), float("-inf")) * scale
    ds0 = tl.exp2(s0 - z) * (tl.dot(dy, tl.trans(v0)) - inner[:, None])
    dx = tl.dot(ds0.to(x.dtype), k0)
    for j in range(E, E + N, STEP):
        kj, vj = tl.load(at(q + to_k, j, row, STEP)), tl.load(at(q + to_v, j, row, STEP))
        ds = tl.exp2(tl.dot(x, tl.trans(kj)) * scale - z) * (tl.dot(dy, tl.trans(vj)) - inner[:, None])
        dx = tl.dot(ds.to(x.dtype), kj, dx)
    tl.store(at(dqkv + in_qkv, first, row, TILE), (dx / D**0.5).to(x.dtype), mask)


@triton.jit
def add_queries(q, grad, lse, delta, first, end, k, v, dk, dv, H: tl.constexpr, n: tl.constexpr):
    """What n queries add to the gradients of the keys and values."""
    rows = first + tl.arange(0, n)
    here = (rows < end) | (n > FEW)  # patches fill their tiles
    x = tl.load(at(q, first, 3 * H * D, n), here[:, None], 0.0)
    dy = tl.load(at(grad, first, H * D, n), here[:, None], 0.0)
    z, inner = tl.load(lse + rows, here, 0.0), tl.load(delta + rows, here, 0.0)
    p = tl.exp2(tl.dot(k, tl.trans(x)) * (LOG2E / D**0.5) - z[None])  # (TILE, n): transposed
    ds = p * (tl.dot(v, tl.trans(dy)) - inner[None])
    return tl.dot(ds.to(x.dtype), x, dk), tl.dot(p.to(x.dtype), dy, dv)


@triton.jit
def keys_kernel(qkv, lse, grad, delta, dqkv, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr):
    """The gradients of the keys and values."""
    in_qkv, in_out, in_lse, first, end = start(H, E, N)
    q, dk_at, row = qkv + in_qkv, dqkv + in_qkv + H * D, 3 * H * D
    mask = (first + tl.arange(0, TILE) < end)[:, None]
    k = tl.load(at(q + H * D, first, row, TILE), mask, 0.0)
    v = tl.load(at(q + 2 * H * D, first, row, TILE), mask, 0.0)
    dk, dv = tl.zeros((TILE, D), tl.float32), tl.zeros((TILE, D), tl.float32)
    grad, lse, delta = grad + in_out, lse + in_lse, delta + in_lse
    dk, dv = add_queries(q, grad, lse, delta, 0, E, k, v, dk, dv, H, FEW)
    for i in range(E, E + N, STEP):
        dk, dv = add_queries(q, grad, lse, delta, i, E + N, k, v, dk, dv, H, STEP)
    tl.store(at(dk_at, first, row, TILE), (dk / D**0.5).to(k.dtype), mask)
    tl.store(at(dk_at + H * D, first, row, TILE), dv.to(k.dtype), mask)


def launch(kernel: Any, qkv: Tensor, *others: Tensor, num_heads: int) -> None:
    patches = 1 << (qkv.shape[1].bit_length() - 1)
    programs = len(qkv) * num_heads * (patches // TILE.value + 1)
    kernel[(programs,)](qkv, *others, H=num_heads, E=qkv.shape[1] - patches, N=patches)


class FusedAttention(torch.autograd.Function):
    """The heads' output (B, L, H D) of qkv (B, L, 3 H D), contiguous; L is 2^n, 64 or more, plus 1 to 16."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        lse = qkv.new_empty(len(qkv), num_heads, qkv.shape[1], dtype=torch.float32)
        launch(forward_kernel, qkv, out, lse, num_heads=num_heads)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (qkv, out, lse), grad = ctx.saved_tensors, grad.contiguous()
        dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
        launch(queries_kernel, qkv, out, lse, grad, dqkv, delta, num_heads=lse.shape[1])
        launch(keys_kernel, qkv, lse, grad, delta, dqkv, num_heads=lse.shape[1])
        return dqkv, None
