"""One product for the gradient of a weight that many blocks share, once they all have run backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

Affine = tuple[Any, ...]  # weight (..., K, N), bias (..., 1, K) or None; of a late one its two stand-ins


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, *late: Tensor) -> Tensor:
    """x weight' + bias (..., B, K) of x (..., B, N)."""
    return reported(x @ weight.to(x.dtype).mT, x, bias, *late)


def reported(y: Tensor, x: Tensor, bias: Tensor | None, *late: Tensor) -> Tensor:
    """y + bias, where y is such a product with x."""
    y = Report.apply(y, x.detach(), *late) if late else y
    return y if bias is None else y + bias


def late(maps: Sequence[Affine], like: Tensor, count: int) -> list[list[Affine]]:
    """Maps for each of `count` uses by inputs like `like`: their gradients are calculated in one product."""
    uses = [StandIns.apply(weight, bias, like, count) for weight, bias in maps]
    fixed = [(weight.detach(), None if bias is None else bias.detach()) for weight, bias in maps]
    return [
        [(*f, *use[i : i + 2]) for f, use in zip(fixed, uses, strict=True)] for i in range(0, 2 * count, 2)
    ]


class StandIns(torch.autograd.Function):
    """Empty tensors for x and y of `count` products with a weight: Report makes x and dy their gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Any, like: Tensor, count: int) -> tuple[Tensor, ...]:
        *some, outputs, inputs = weight.shape
        ctx.has_bias, shapes = bias is not None, [(*some, len(like), n) for n in (inputs, outputs)]
        return tuple(like.new_empty(1).expand(shape) for shape in shapes * count)

    @staticmethod
    def backward(ctx: Any, *seen: Tensor) -> tuple[Tensor | None, ...]:
        weight, *bias = affine_gradients(list(seen[::2]), list(seen[1::2]), ctx.has_bias)
        return weight, bias[0] if bias else None, None, None


class Report(torch.autograd.Function):
    """y, whose gradient and the x that it was made from are reported to StandIns."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, for_x: Tensor, for_y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *ctx.saved_tensors, grad


def summed(x: list[Tensor], grads: list[Tensor], bias: bool) -> list[Tensor]:
    """Of the weight (..., K, N), and of the bias (..., 1, K) if there is one, float32, over all products."""
    rows, others = torch.cat(x, -2), torch.cat(grads, -2)
    sums = [others.sum(-2, keepdim=True, dtype=torch.float32)] if bias else []
    return [(others.mT @ rows).float(), *sums]


# As one call: a compiler would copy each tensor by itself.
SCHEMA = "(Tensor[] x, Tensor[] grads, bool bias) -> Tensor[]"
affine_gradients = custom_op("uvit_dia::affine_gradients", summed, mutates_args=(), schema=SCHEMA)
affine_gradients.register_fake(summed)
