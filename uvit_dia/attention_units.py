"""Attention units, and how the blocks of a network share one (DIA: Huang et al. 2024, arXiv 2210.16101).

A unit makes a gate from the features of a block: `gate, state = unit(patches, state, place, grid)`. patches:
(B, N, D); state: None at the start of a forward pass, only recurrent units fill it; place: the block's among
those that share the unit, as BatchNorm is never shared (sec. VI-B2). gate: float32, (B, 1, D), or (B, N, D).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import getfullargspec
from itertools import groupby
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.library import custom_op

from uvit_dia.errors import ConfigError, check_fields, one_of
from uvit_dia.late_gradients import Affine, affine, late, reported

State = tuple[tuple[Any, ...], ...] | None  # (hidden, cell) of each cell, (B, D), float32; then later maps
Grid = tuple[int, int] | None  # height and width in patches; None: a square
Stages = Sequence[str]  # the stage of each block


class Constant(nn.Module):
    """A fixed gate without parameters: the control that tells the scale of a gate from its mechanism."""

    def __init__(self, dim: int, *, value: float = 1.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        return torch.full_like(x[:1, :1], self.value, dtype=torch.float32), state  # (1, 1, D)


class OfMean(nn.Module):
    """A unit that sees the patches' mean alone: `gate, state = unit.gate_of(mean, state)`, (B, D) both."""

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        gate, state = self.gate_of(x.mean(1), state)
        return rearrange(gate, "b d -> b 1 d"), state

    def gate_of(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        raise NotImplementedError


class LSTMCell(nn.Module):
    """The official DIANet cell (arXiv 2210.16101, Fig. 6 middle); reduction=None: the standard LSTM cell."""

    reduction: Any  # an integer, or None

    def __init__(self, dim: int, reduction: int | None, activation: str) -> None:
        super().__init__()
        self.reduction, self.activation, width = reduction, activation, dim
        if reduction is not None:
            width = reduced(dim, reduction)
            self.input_reduce, self.hidden_reduce = (nn.Linear(dim, width) for _ in range(2))
        self.input_expand, self.hidden_expand = (nn.Linear(width, 4 * dim) for _ in range(2))

    def forward(self, y: Tensor, h: Tensor, c: Tensor, *maps: Affine) -> tuple[Tensor, Tensor]:
        """c = sig(f) c + sig(i) tanh(g), h = sig(o) phi(c); y, h, c: (B, N). maps: own or `late` ones."""
        *squeeze, expand = maps or self.maps()
        x = torch.stack([y, h])  # both paths in one product: launching two costs more
        if squeeze:
            x = torch.relu(affine(x, *squeeze[0])).to(y.dtype)  # (2, B, N/r)
        i, f, g, o = self.gates(rearrange(x, "two b k -> b (two k)"), *expand).float().chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * getattr(torch, self.activation)(c), c

    def gates(self, x: Tensor, weight: Tensor, bias: Tensor, *stand_ins: Tensor) -> Tensor:
        """The affine map of x (B, 2N/r), both paths' squeezed inputs, to the gates (B, 4N)."""
        return affine(x, weight, bias, *stand_ins)

    def maps(self) -> list[Affine]:
        """Both paths' squeeze, if there is one, and their affine map to the gates."""
        if self.reduction is None:
            return [self.expansion()]
        both = self.input_reduce, self.hidden_reduce
        biases = None if both[0].bias is None else torch.stack([layer.bias for layer in both])[:, None]
        return [(torch.stack([layer.weight for layer in both]), biases), self.expansion()]

    def expansion(self) -> Affine:
        a, b = self.input_expand, self.hidden_expand
        return torch.cat([a.weight, b.weight], 1), (a.bias + b.bias)[None]  # (4N, 2N/r), (1, 4N)


class LightCell(LSTMCell):
    """DIA-LSTM (Light): both paths squeezed to N/r, then an affine map a gate. 2N²/r + 16N parameters."""

    def __init__(self, dim: int, reduction: int, activation: str) -> None:
        nn.Module.__init__(self)
        self.reduction, self.activation, width = reduction, activation, reduced(dim, reduction)
        self.input_reduce, self.hidden_reduce = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.input_scale, self.hidden_scale = (nn.Parameter(torch.ones(4, dim)) for _ in range(2))
        self.input_shift, self.hidden_shift = (nn.Parameter(torch.zeros(4, dim)) for _ in range(2))

    def gates(self, x: Tensor, weight: Tensor, bias: Tensor, *stand_ins: Tensor) -> Tensor:
        """The same without the zeros of `expansion`, in fewer launches where a compiler fuses it."""
        if not in_compiled_gpu_code(x):
            return affine(x, weight, bias, *stand_ins)
        scales = torch.stack([self.input_scale, self.hidden_scale])
        tiles = rearrange(x, "b (two k) -> b two 1 k", two=2).repeat(1, 1, 1, self.reduction)
        y = (tiles * (scales.detach() if stand_ins else scales)).sum(1)  # the gradient is weight's
        return reported(y.flatten(1).to(x.dtype), x, bias, *stand_ins)

    def expansion(self) -> Affine:
        """As a product: mostly zeros, whose gradients are one more product, and no sums over the batch."""
        scales = torch.stack([self.input_scale, self.hidden_scale])  # (2, 4, N)
        width = scales.shape[2] // self.reduction
        tiles = scales.new_ones(width).diag().repeat(self.reduction, 1)  # the paper leaves it open
        weight = rearrange(scales[..., None] * tiles, "two four n k -> (four n) (two k)")
        return weight, (self.input_shift + self.hidden_shift).view(1, -1)


def reduced(dim: int, reduction: int | None) -> int:
    """The squeezed width N/r; ConfigError where r does not divide N."""
    if reduction is None or reduction < 1 or dim % reduction:
        raise ConfigError("model.unit.reduction", reduction, f"a divisor of the {dim} channels")
    return dim // reduction


class DIALSTM(OfMean):
    """DIA-LSTM: stacked cells, the first squeezed by `reduction`; the top hidden vector is the gate."""

    def __init__(
        self, dim: int, num_uses: int = 1, *, reduction: int | None = 4, num_cells: int = 1,
        activation: str = "sigmoid",
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_uses = num_uses
        cells = (LSTMCell(dim, None if i else reduction, activation) for i in range(num_cells))
        self.cells = nn.ModuleList(cells)

    def gate_of(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        zeros, dtype, new = torch.zeros_like(y, dtype=torch.float32), y.dtype, []
        trains = in_compiled_gpu_code(y) and torch.is_grad_enabled()
        cell: Any
        for i, cell in enumerate(self.cells):
            begin = (zeros, zeros, *(late(cell.maps(), y, self.num_uses) if trains and not state else ()))
            h, c, *later = state[i] if state else begin
            y, c = cell(y.to(dtype), h.to(dtype), c, *(later[0] if later else ()))
            new.append((y, c, *later[1:]))
        return y, tuple(new)


class DIALSTMLight(DIALSTM):
    def __init__(
        self, dim: int, num_uses: int = 1, *, reduction: int = 4, activation: str = "sigmoid"
    ) -> None:
        super().__init__(dim, num_uses, num_cells=0)
        self.cells.append(LightCell(dim, reduction, activation))


class TwoLinears(nn.Module):
    """Squeeze and expand, with a ReLU between: what SE, CBAM, SPA, SEM and UViT's skip gate share."""

    def __init__(self, inputs: int, hidden: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(inputs, hidden, bias), nn.Linear(hidden, outputs, bias)

    def process(self, y: Tensor) -> Tensor:
        return self.expand(torch.relu(self.reduce(y)))


class SE(OfMean, TwoLinears):
    """Squeeze and excitation (Hu et al. 2018, arXiv 1709.01507, eq. 2-4) of the mean. 2N²/r parameters."""

    def __init__(self, dim: int, *, reduction: int = 16) -> None:
        super().__init__(dim, reduced(dim, reduction), dim, bias=False)

    def gate_of(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.sigmoid(self.process(y).float()), state


class ECA(OfMean):
    """Efficient channel attention (Wang et al. 2020, arXiv 1910.03151) of the mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        k = int((math.log2(dim) + 1) / 2) | 1  # eq. 12: the next odd width if that is even
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def gate_of(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.sigmoid(self.conv(y[:, None])[:, 0].float()), state


class CBAM(TwoLinears):
    """Convolutional block attention (Woo et al. 2018, arXiv 1807.06521): a channel, then a spatial gate."""

    def __init__(self, dim: int, num_norms: int = 1, *, reduction: int = 16) -> None:
        super().__init__(dim, reduced(dim, reduction), dim, bias=True)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(1, momentum=0.01) for _ in range(num_norms))

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        channels = to_gate(self.process(torch.stack([x.mean(1), x.amax(1)])).sum(0))  # (B, 1, D)
        x = x * channels.to(x.dtype)
        maps = torch.stack([x.amax(2), x.mean(2)], 1).unflatten(2, grid_of(x, grid))  # (B, 2, H, W)
        space = torch.sigmoid(self.norms[place](self.conv(maps)).float())  # (B, 1, H, W)
        return channels * rearrange(space, "b 1 h w -> b (h w) 1"), state


class SRM(nn.Module):
    """Style-based recalibration (Lee et al. 2019, arXiv 1903.10829): [mean, std] weighted, then BatchNorm."""

    def __init__(self, dim: int, num_norms: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dim))  # as the official code: the gate starts at 1/2
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(num_norms))

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        style = torch.stack([x.mean(1), x.std(1, correction=0)], 1)  # (B, 2, D)
        return to_gate(self.norms[place]((self.weight * style).sum(1))), state


class SPA(TwoLinears):
    """Spatial pyramid attention (Guo et al. 2020, SPANet, ICME): 1x1, 2x2, 4x4 mean pools."""

    def __init__(self, dim: int, *, reduction: int = 16) -> None:
        super().__init__(21 * dim, reduced(dim, reduction), dim, bias=False)

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        # Pooled by a product, whose gradient is deterministic on GPUs too.
        patches = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).unflatten(1, grid_of(x, grid))
        cells = [F.adaptive_avg_pool2d(patches, k).flatten(1) for k in (1, 2, 4)]  # (N, k²) each
        pools = torch.cat(cells, 1).mT @ x  # (B, 21, D)
        return to_gate(self.process(rearrange(pools, "b cells d -> b (cells d)"))), state


class SEM(OfMean, TwoLinears):
    """Switchable excitation (Zhong et al. 2022, arXiv 2209.05680): FC, convolution, channel-wise branches."""

    def __init__(self, dim: int, *, reduction: int = 16) -> None:
        super().__init__(dim, reduced(dim, reduction), dim, bias=True)
        self.switch, self.conv = nn.Linear(dim, 3), ECA(dim).conv
        self.scale, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.full((dim,), -1.0))

    def gate_of(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        a, b, c = torch.sigmoid(self.switch(y)).split(1, dim=1)  # (B, 1) each
        branches = a * self.process(y), b * self.conv(y[:, None])[:, 0], c * (self.scale * y + self.shift)
        a, b, c = (torch.sigmoid(z.float()) for z in branches)
        return a * b * c, state


class SPEM(nn.Module):
    """Self-adaptive pooling (Zhong et al. 2022, arXiv 2208.10322): a learnt mix of the max and min pools."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((2,), 0.5))
        self.pool_scale, self.mix_scale = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.pool_shift, self.mix_shift = (nn.Parameter(torch.full((dim,), -1.0)) for _ in range(2))

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        u, v = (self.pool_scale * y + self.pool_shift for y in (x.amax(1), x.amin(1)))  # (B, D)
        p, q = self.mix.square() / self.mix.square().sum()
        return to_gate(u + v) * to_gate(self.mix_scale * (p * u + q * v) + self.mix_shift), state

    def penalty(self) -> Tensor:
        return 0.1 * self.mix.square().sum()


def to_gate(z: Tensor) -> Tensor:
    """The sigmoid in float32: (B, D) -> (B, 1, D)."""
    return rearrange(torch.sigmoid(z.float()), "b d -> b 1 d")


def grid_of(x: Tensor, grid: Grid) -> tuple[int, int]:
    """Height and width of the patches x (B, N, D); ConfigError where they are not told and N is no square."""
    side = math.isqrt(x.shape[1])
    if grid is None and side**2 != x.shape[1]:
        raise ConfigError("patch tokens", x.shape[1], "a square number or a known grid: the unit looks at it")
    return grid or (side, side)


# A gate (B, 1, D) in memory: without this, compiled code makes it anew for every token that it scales.
stored = custom_op("uvit_dia::stored", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor")
stored.register_fake(torch.empty_like)
stored.register_autograd(lambda context, gradient: gradient)


def in_compiled_gpu_code(x: Tensor) -> bool:
    """Where kernels of our own may run: compiled code for a GPU has Triton, which not every torch has."""
    return x.is_cuda and x.dtype != torch.float64 and torch.compiler.is_dynamo_compiling()


Kind = Literal["constant", "se", "eca", "cbam", "srm", "spa", "sem", "spem", "dia_lstm", "dia_lstm_light"]
CLASSES = (Constant, SE, ECA, CBAM, SRM, SPA, SEM, SPEM, DIALSTM, DIALSTMLight)
UNITS = dict(zip(get_args(Kind), CLASSES, strict=True))


@dataclass(frozen=True, kw_only=True)
class UnitConfig:
    """One attention unit and how the blocks share it. Options left at "default" take the kind's own value."""

    kind: Kind  # which unit
    sharing: Literal["all", "stage", "none"] = "all"  # one unit for all blocks, a stage, or a block
    blocks: list[int] | str = "all"  # that have a unit: all; a list; "every 3": 0, 3, 6 ...; "without mid"
    pool: Literal["patches", "all"] = "patches"  # the tokens that are pooled; the gate scales all of them
    gate_scale: float = 1.0  # multiplies the gate; 4 starts DIA-LSTM near the identity: sig(0)² is 1/4
    reduction: int | Literal["default"] | None = "default"  # squeeze r; null: dia_lstm as a standard LSTM
    num_cells: int | Literal["default"] = "default"  # stacked LSTM cells
    activation: Literal["sigmoid", "tanh", "relu", "default"] = "default"  # phi of the hidden vector
    value: float | Literal["default"] = "default"  # the constant gate

    def __post_init__(self) -> None:
        check_fields("model.unit", self)
        known, given = getfullargspec(UNITS[self.kind]).kwonlyargs, self.as_dict()
        for name in given.keys() & {"reduction", "num_cells", "activation", "value"} - set(known):
            takes = f"no such option: {self.kind} takes {', '.join(known) or 'none'}"
            raise ConfigError(f"model.unit.{name}", given[name], takes)
        if given.get("num_cells", 1) < 1:
            raise ConfigError("model.unit.num_cells", self.num_cells, "1 or more")
        if self.kind in ("cbam", "spa") and self.pool == "all":
            raise ConfigError("model.unit.pool", self.pool, f"patches, as {self.kind} looks at their grid")

    @classmethod
    def of(cls, settings: "UnitConfig | dict") -> "UnitConfig":
        """Type and check a mapping; an unknown key is a ConfigError."""
        if isinstance(settings, UnitConfig):
            return settings
        known = getfullargspec(cls).kwonlyargs
        for key in settings.keys() - known:
            raise ConfigError(f"model.unit.{key}", settings[key], one_of(key, known))
        return cls(**{"kind": "", **settings})

    def as_dict(self) -> dict[str, Any]:
        """The mapping that makes this config again, without what is at "default"."""
        return {key: value for key, value in asdict(self).items() if value != "default"}


def equipped(blocks: list[int] | str, stages: Stages) -> list[int]:
    """The numbers of the blocks that UnitConfig.blocks names, given each one's stage; ConfigError if none."""
    numbers = range(len(stages))
    rules = {"all": numbers} | {f"without {s}": [i for i in numbers if stages[i] != s] for s in stages}
    if every := re.fullmatch(r"every ([1-9]\d*)", str(blocks)):
        return list(numbers[:: int(every[1])])
    chosen = set(blocks if isinstance(blocks, list) else rules.get(blocks, []))
    if not chosen or not chosen <= set(numbers):
        known = ", ".join([*rules, "every K"])
        raise ConfigError("model.unit.blocks", blocks, f"{known} or a list of 0 to {len(stages) - 1}")
    return sorted(chosen)


class SharedUnit(nn.Module):
    """The units of a network's blocks: `x, state = shared(x, state, block, grid)` in each block, in order.

    x: (B, L, D), the first `num_extra` tokens no patches; its shape and dtype stay. A block without a unit
    passes x and the state on.
    """

    def __init__(self, config: UnitConfig, dim: int, stages: Stages = ("all",), num_extra: int = 0) -> None:
        super().__init__()
        self.config, self.dim, self.stages, self.num_extra = config, dim, list(stages), num_extra
        self.num_skipped = num_extra if config.pool == "patches" else 0
        owner = {"all": ["all"] * len(stages), "stage": stages, "none": range(len(stages))}[config.sharing]
        groups = [list(blocks) for _, blocks in groupby(equipped(config.blocks, stages), owner.__getitem__)]
        self.route = {b: (i, place) for i, blocks in enumerate(groups) for place, b in enumerate(blocks)}
        kind = UNITS[config.kind]
        counts = len(getfullargspec(kind).args) > 2  # it wants to know how many blocks share it
        options = {k: v for k, v in config.as_dict().items() if k in getfullargspec(kind).kwonlyargs}
        self.units = nn.ModuleList(kind(dim, *[len(b)] * counts, **options) for b in groups)

    def forward(self, x: Tensor, state: State, block: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        if block not in self.route:
            return x, state
        unit, place, state = self.begin(block, state)
        gate, state = unit(x[:, self.num_skipped :], state, place, grid)  # (B, 1 or N, D)
        gate = self.config.gate_scale * gate
        if self.config.kind == "cbam":  # a gate of patches: the extra tokens keep factor 1
            gate = F.pad(gate, (0, 0, self.num_extra, 0), value=1.0)
        gate = stored(gate) if torch.compiler.is_compiling() else gate
        return (x * gate).to(x.dtype), state

    def begin(self, block: int, state: State) -> tuple[Any, int, State]:
        """A block's unit, its place among those that share it, and the state that it starts from."""
        i, place = self.route[block]
        return self.units[i], place, None if self.config.sharing == "stage" and place == 0 else state

    def sees_mean(self, block: int) -> bool:
        """Whether the block's unit sees no more of the tokens from `num_skipped` on than their mean."""
        return block in self.route and type(self.units[self.route[block][0]]).forward is OfMean.forward

    def gate_of(self, mean: Tensor, state: State, block: int) -> tuple[Tensor, State]:
        """Such a unit's gate (B, D), float32, of that mean (B, D)."""
        unit, _, state = self.begin(block, state)
        gate, state = unit.gate_of(mean, state)
        return self.config.gate_scale * gate, state

    def penalty(self) -> Tensor | None:
        penalties = [unit.penalty() for unit in self.units if isinstance(unit, SPEM)]
        return torch.stack(penalties).sum() if penalties else None
