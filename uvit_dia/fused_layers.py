"""A block's layers with few passes over the tokens, in Triton, for compiled networks on GPUs.

A compiler reads the tokens once for their own gradient and again for a sum that is a weight's, a gate's or a
pool. Norms that are not pooled are left to it: it makes them one with the residual sum before.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

# log2(1 - Phi(a)) by falling powers of a >= 0: 1 - Phi to a relative 6e-5 up to 5.5, and falling on beyond.
TAIL = (-1.302623e-6, 5.265118e-5, -8.726065e-4, 0.00832637, -0.05367626, -0.4586686, -1.151198, -0.9999975)
T7, T6, T5, T4, T3, T2, T1, T0 = map(tl.constexpr, TAIL)  # Triton 3.3 has no tuples of them
MIXED = torch.__version__ >= "2.11"  # products take an out_dtype; compilers before do not trace it
EPS = tl.constexpr(1e-5)  # of nn.LayerNorm
PROGRAMS, ROWS = 1024, tl.constexpr(4)  # about so many; tokens that one reads at a time: enough are under way
B2, B0 = tl.constexpr(-math.log2(math.e) / 2), tl.constexpr(-math.log2(2 * math.pi) / 2)  # log2 of the bell


@triton.jit
def tokens_kernel(
    x, y, weight, bias, before, after, gate, out, mean, scale, result, tokens, rows, skipped,
    D: tl.constexpr, COLS: tl.constexpr, POOL: tl.constexpr, APPLY: tl.constexpr,
):  # fmt: skip
    """What is done with n, the norm of z = x + y + before, and with a gate (B, D) that depends on its pool.

    POOL: out = z + after, the mean and 1 / std of each z, and as result the parts (B, programs, D) of the sum
    of n over tokens. APPLY: n gate. Neither: the parts of the sum of x n, where x is the gradient of n gate.
    """
    image, begin = tl.program_id(1), tl.program_id(0) * rows
    if not APPLY:  # in turns from the first and from the last image, which is still in cache
        image = tl.num_programs(1) - 1 - image
    first, cols = image.to(tl.int64) * tokens + begin, tl.arange(0, COLS)[None]
    mask, end = cols < D, tl.minimum(tokens - begin, rows)
    w, b = tl.load(weight + cols, mask, 0.0), tl.load(bias + cols, mask, 0.0)
    a, more = tl.load(after + cols, mask, 0.0), tl.load(before + cols, mask, 0.0)
    dw, db = tl.zeros((1, COLS), tl.float32), tl.zeros((1, COLS), tl.float32)
    if APPLY:
        factor = tl.load(gate + image * D + cols, mask, 0.0)
        w, b = w * factor, b * factor
    for i in range(0, end, ROWS):
        row = i + tl.arange(0, ROWS)[:, None]
        is_row, row, to = row < end, first + row, (first + row) * D + cols
        here = is_row & mask
        if POOL:
            g = tl.where(is_row & (row - first + begin >= skipped), 1.0, 0.0)
            z = tl.load(x + to, here, 0.0).to(tl.float32) + tl.load(y + to, here, 0.0).to(tl.float32) + more
            m = tl.sum(z, 1, keep_dims=True) / D
            v = tl.where(here, z - m, 0.0)
            s = tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / D + EPS)
            tl.store(out + to, (z + a).to(out.dtype.element_ty), here)
            tl.store(mean + row, m, is_row)
            tl.store(scale + row, s, is_row)
        else:
            m, s = tl.load(mean + row, is_row, 0.0), tl.load(scale + row, is_row, 0.0)
            v = tl.load(out + to, here, 0.0).to(tl.float32) - a - m
        if APPLY:
            tl.store(result + to, (v * s * w + b).to(result.dtype.element_ty), here)
        else:
            if not POOL:
                g = tl.load(x + to, here, 0.0).to(tl.float32)
            dw += tl.sum(g * v * s, 0, keep_dims=True)
            db += tl.sum(g, 0, keep_dims=True)
    if not APPLY:
        to = (image * tl.num_programs(0) + tl.program_id(0)) * D + cols
        tl.store(result + to, dw * w + db * b, mask)


@triton.jit
def norm_kernel(
    grad, more, x, after, weight, mean, scale, gate, dpool, dx, parts, tokens, rows, skipped,
    D: tl.constexpr, COLS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dx (B, tokens, D) = more + the gradient through the norm of x - after, of its gate and its pool.

    parts (B, programs, 4, D): what each program's rows add to those of weight, bias, before and after.
    """
    image, begin = tl.program_id(1), tl.program_id(0) * rows
    first, cols, mask = image.to(tl.int64) * tokens + begin, tl.arange(0, COLS), tl.arange(0, COLS) < D
    grad, x, dx, more = grad + first * D, x + first * D, dx + first * D, more + first * D
    w, a = tl.load(weight + cols, mask, 0.0), tl.load(after + cols, mask, 0.0)
    if GATED:
        factor = tl.load(gate + image * D + cols, mask, 0.0)
        pooled = tl.load(dpool + image * D + cols, mask, 0.0)
    dw, db = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    dbefore, dafter = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for i in tl.range(0, tl.minimum(tokens - begin, rows).to(tl.int32), num_stages=3):
        g, y = tl.load(grad + i * D + cols, mask, 0.0).to(tl.float32), tl.load(x + i * D + cols, mask, 0.0)
        rest, z = tl.load(more + i * D + cols, mask, 0.0).to(tl.float32), tl.load(scale + first + i)
        y = (y.to(tl.float32) - a - tl.load(mean + first + i)) * z
        if GATED:
            g = g * factor + tl.where(begin + i >= skipped, pooled, 0.0)
        gw = g * w
        d = rest + z * (gw - (tl.sum(gw) + y * tl.sum(gw * y)) / D)
        tl.store(dx + i * D + cols, d.to(dx.dtype.element_ty), mask)
        dw, db, dbefore, dafter = dw + g * y, db + g, dbefore + d, dafter + rest
    at = parts + (image * tl.num_programs(0) + tl.program_id(0)) * 4 * D + cols
    tl.store(at, dw, mask)
    tl.store(at + D, db, mask)
    tl.store(at + 2 * D, dbefore, mask)
    tl.store(at + 3 * D, dafter, mask)


@triton.jit
def gelu_kernel(
    x, bias, grad, out, parts, tokens, rows, D: tl.constexpr, COLS: tl.constexpr, BACK: tl.constexpr
):
    """out (tokens, D), GELU(x + bias); BACK: its gradient, and parts (programs, D) of the bias's."""
    part = tl.program_id(1)
    if BACK:  # the product before wrote the last rows last: cached
        part = tl.num_programs(1) - 1 - part
    first, cols = part.to(tl.int64) * rows, tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask, b = cols < D, tl.load(bias + cols, cols < D, 0.0)
    grad, x, out, db = grad + first * D, x + first * D, out + first * D, tl.zeros((COLS,), tl.float32)
    for i in tl.range(0, tl.minimum(tokens - first, rows).to(tl.int32), num_stages=3):
        y = tl.load(x + i * D + cols, mask, 0.0).to(tl.float32) + b
        a = tl.abs(y)
        tail = tl.exp2(((((((a * T7 + T6) * a + T5) * a + T4) * a + T3) * a + T2) * a + T1) * a + T0)
        if BACK:
            slope = tl.where(y > 0, 1 - tail, tail) + y * tl.exp2(y * y * B2 + B0)
            d = tl.load(grad + i * D + cols, mask, 0.0) * slope
            db += d
        else:
            d = tl.maximum(y, 0.0) - a * tail
        tl.store(out + i * D + cols, d.to(out.dtype.element_ty), mask)
    if BACK:
        tl.store(parts + part * D + cols, db, mask)


@triton.jit
def sum_kernel(parts, out, count, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out (images, D): the sums of parts (images, count, D)."""
    at, cols = tl.program_id(1).to(tl.int64) * count, tl.program_id(0) * COLS + tl.arange(0, COLS)[None]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for i in range(0, count, ROWS):
        row = i + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + (at + row) * D + cols, (row < count) & (cols < D), 0.0)
    tl.store(out + tl.program_id(1) * D + cols, tl.sum(total, 0, keep_dims=True), cols < D)


def added(parts: Tensor) -> Tensor:
    """parts.sum(1), which compilers make two launches of, or one as slow."""
    (images, count, dim), rows = parts.shape, min(128, triton.next_power_of_2(parts.shape[1]))
    out, cols = parts.new_empty(images, dim), 2048 // rows
    sum_kernel[(-(-dim // cols), images)](parts, out, count, D=dim, ROWS=rows, COLS=cols, num_warps=8)
    return out


def share(tokens: int, programs: int) -> tuple[int, int]:
    """Rows of each program, where there are about so many programs, and how many it takes."""
    rows = -(-tokens // programs)
    return rows, -(-tokens // rows)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype). In torch 2.11 a compiled Function has no gradient where that changed nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def sizes(x: Tensor) -> dict[str, int]:
    """A row of x, and warps enough for it."""
    cols = triton.next_power_of_2(x.shape[-1])
    return {"D": x.shape[-1], "COLS": cols, "num_warps": max(1, cols // 512)}


def over_tokens(x: Tensor, y: Tensor, *others: Tensor, result: Any = None, skipped: int = -1) -> Tensor:
    """tokens_kernel's `result`, given its first ten arguments; None: sums (B, D), a pool's with `skipped`."""
    (images, tokens, dim), sums = x.shape, result is None
    rows, programs = share(tokens, max(1, PROGRAMS // images))
    result = x.new_empty(images, programs, dim, dtype=torch.float32) if sums else result
    args = (x.contiguous(), y.contiguous(), *others, result, tokens, rows, skipped)
    tokens_kernel[(programs, images)](*args, POOL=skipped >= 0, APPLY=not sums, **sizes(x))
    return added(result) if sums else result


def norm_gradients(
    grad: Tensor, more: Tensor, saved: Any, gate: Any = None, dpool: Any = None, skipped: int = 0
) -> tuple[Tensor, ...]:
    """The gradients of x, weight, bias, before and after by norm_kernel; gate, dpool: (B, D)."""
    x, after, weight, mean, scale = (y.contiguous() for y in saved)
    images, tokens, dim = x.shape if gate is not None else (1, len(x) * x.shape[1], x.shape[2])
    (rows, programs), dx = share(tokens, max(1, PROGRAMS // images)), torch.empty_like(x)
    parts = x.new_empty(images, programs, 4, dim, dtype=torch.float32)
    gates = (weight, weight) if gate is None else (gate.contiguous(), dpool.contiguous())
    args = (grad.contiguous(), more.contiguous(), x, after, weight, mean, scale, *gates, dx, parts)
    norm_kernel[(programs, images)](*args, tokens, rows, skipped, GATED=gate is not None, **sizes(x))
    return dx, *added(parts.view(1, -1, 4 * dim)).view(4, dim)


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
        y, mean, scale = torch.native_layer_norm(x, weight.shape, weight.float(), bias.float(), EPS.value)
        out = cast(x + after, dtype)  # kept for the backward pass, too: one tensor less is written
        ctx.save_for_backward(out, after, weight, mean, scale)
        return out, cast(y, dtype)

    @staticmethod
    def backward(ctx: Any, more: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return norm_gradients(grad, more, ctx.saved_tensors)


class PooledNorm(torch.autograd.Function):
    """z + after, where z = x + y + before, the mean over tokens of LayerNorm(z), (B, D); then GatedNorm's.

    The first `skipped` tokens are not pooled. The last two outputs hold nothing: through their gradients
    GatedNorm gives its own and its gate, which the gradient of the norm needs together with the pool's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, ...]:
        weight, bias, before, after, skipped = others
        out, ctx.skipped, ctx.dtype = x.new_empty(x.shape), skipped, y.dtype
        mean, scale = (x.new_empty(*x.shape[:2], 1, dtype=torch.float32) for _ in range(2))
        given = (x, y, weight, bias, before, after, bias, out, mean, scale)
        pooled = over_tokens(*given, skipped=skipped) / (x.shape[1] - skipped)
        ctx.save_for_backward(out, after, weight, mean, scale)
        return out, pooled, mean, scale, torch.empty_like(out), torch.empty_like(pooled)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        more, dpooled, _, _, grad, gate = given
        dpool = dpooled / (more.shape[1] - ctx.skipped)
        dx, *others = norm_gradients(grad, more, ctx.saved_tensors, gate, dpool, ctx.skipped)
        return dx, cast(dx, ctx.dtype), *others, None


class GatedNorm(torch.autograd.Function):
    """LayerNorm(z) gate in the type of x (B, L, D), of what PooledNorm gave and gate (B, D), float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, *others: Tensor) -> Tensor:
        weight, bias, after, gate, *_ = others
        ctx.save_for_backward(x, mean, scale, weight, bias, after, gate)
        given = (x, x, weight, bias, bias, after, gate.contiguous(), x, mean, scale)
        return over_tokens(*given, result=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight, bias, after, gate = ctx.saved_tensors
        dgate = over_tokens(grad, x, weight, bias, bias, after, gate, x, mean, scale)
        return *[None] * 6, dgate, grad, gate


def gelu(x: Tensor, bias: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, out, (rows, programs) = x.contiguous(), x.new_empty(x.shape), share(x.numel() // len(bias), PROGRAMS)
    parts = x if grad is None else x.new_empty(programs, len(bias), dtype=torch.float32)
    args = (x, bias, x if grad is None else grad.contiguous(), out, parts, x.numel() // len(bias), rows)
    grid = (-(-len(bias) // 256), programs)
    gelu_kernel[grid](*args, D=len(bias), COLS=256, BACK=grad is not None, num_warps=1)
    return out, parts


class BiasGELU(torch.autograd.Function):
    """GELU(x + bias) in x's type, of x (B, L, D); an exact erf would keep a GPU longer than loading does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return gelu(x, bias)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors  # read once: checkpointing allows no more
        dx, parts = gelu(x, bias, grad)
        return dx, added(parts[None])[0]


@custom_op("uvit_dia::rounded", mutates_args=(), schema="(Tensor[] weights, ScalarType dtype) -> Tensor[]")
def rounded(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of this type, in one launch: a compiler makes one a weight, and small ones take as long as larger."""
    out = [weight.new_empty(weight.shape, dtype=dtype) for weight in weights]
    torch._foreach_copy_(out, weights)
    return out


@custom_op("uvit_dia::product", mutates_args=())  # compilers take seconds to trace 58 autograd.Functions
def product(x: Tensor, weight: Tensor, low: Tensor) -> Tensor:
    """x weight' of x (B, L, K) and weight (N, K), given in x's type too: its gradient is not rounded."""
    return F.linear(x, low)


def keep_product(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(inputs[0], inputs[2])


def product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, low = ctx.saved_tensors
    a, b = grad.flatten(0, 1).T, x.flatten(0, 1)
    mixed = MIXED and grad.is_cuda and grad.dtype != ctx.dtype == torch.float32
    return grad @ low, torch.mm(a, b, out_dtype=ctx.dtype) if mixed else cast(a @ b, ctx.dtype), None


rounded.register_fake(lambda weights, dtype: [w.new_empty(w.shape, dtype=dtype) for w in weights])
product.register_fake(lambda x, weight, low: x.new_empty(*x.shape[:2], len(low)))
product.register_autograd(product_gradients, setup_context=keep_product)
