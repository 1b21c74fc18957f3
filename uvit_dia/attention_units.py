"""Attention units, and how the blocks of a network share one (DIA: Huang et al. 2024, arXiv 2210.16101).

A unit maps the features of a block to a gate that rescales them: pool, process, recalibrate. It is called as
`gate, state = unit(patches, state, place, grid)`: patches (B, N, D); a state, None at the start of a forward
pass, that only the recurrent units fill; the block's place among those that share the unit, as BatchNorm is
never shared (sec. VI-B2); the height and width of the patches, for the units that look at their grid. The
gate is (B, 1, D) for all tokens, or (B, N, D) for the patches alone (CBAM), in float32.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from inspect import Parameter, signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from uvit_dia.errors import ConfigError, one_of

Kind = Literal["constant", "se", "eca", "cbam", "srm", "spa", "sem", "spem", "dia_lstm", "dia_lstm_light"]
State = tuple[tuple[Tensor, Tensor], ...] | None  # (hidden, cell) of each cell: (B, D), float32
Grid = tuple[int, int] | None  # height and width in patches; None: a square
ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class Constant(nn.Module):
    """A fixed gate without parameters: the control that tells the scale of a gate from its mechanism."""

    def __init__(self, dim: int, *, value: float = 1.0) -> None:
        super().__init__()
        self.dim, self.value = dim, value

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        return x.new_full((1, 1, self.dim), self.value, dtype=torch.float32), state

    def extra_repr(self) -> str:
        return f"value={self.value}"


class LSTMCell(nn.Module):
    """The official DIANet cell (arXiv 2210.16101, Fig. 6 middle): both paths squeezed to N/r, then gates.

    `reduction=None` is the standard LSTM cell. Input y (B, N), hidden and cell (B, N); returns the new hidden
    and cell. 10N²/r weights and 2(N/r + 4N) biases, or 8N² and 8N.
    """

    def __init__(self, dim: int, reduction: int | None, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.input_reduce = self.hidden_reduce = None
        width = dim
        if reduction is not None:
            width = reduced(dim, reduction)
            self.input_reduce, self.hidden_reduce = (nn.Linear(dim, width) for _ in range(2))
        self.input_expand, self.hidden_expand = (nn.Linear(width, 4 * dim) for _ in range(2))

    def forward(self, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.input_reduce is not None:
            y, h = torch.relu(self.input_reduce(y)), torch.relu(self.hidden_reduce(h))  # (B, N/r)
        return lstm_update(self.input_expand(y) + self.hidden_expand(h), c, self.activation)


class LightCell(nn.Module):
    """DIA-LSTM (Light): a squeezed vector a path, tiled to N, an affine map a gate. 2N²/r + 16N parameters.

    The paper leaves the widening open; here index n takes n mod N/r. Shapes as LSTMCell.
    """

    def __init__(self, dim: int, reduction: int, activation: str) -> None:
        super().__init__()
        self.activation, self.reduction = activation, reduction
        self.input_reduce, self.hidden_reduce = (
            nn.Linear(dim, reduced(dim, reduction), bias=False) for _ in range(2)
        )
        self.input_scale, self.hidden_scale = (nn.Parameter(torch.ones(4, dim)) for _ in range(2))
        self.input_shift, self.hidden_shift = (nn.Parameter(torch.zeros(4, dim)) for _ in range(2))

    def forward(self, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        u, v = torch.relu(self.input_reduce(y)), torch.relu(self.hidden_reduce(h))  # (B, N/r)
        u, v = (repeat(w, "b k -> b 1 (r k)", r=self.reduction) for w in (u, v))  # (B, 1, N)
        gates = (
            self.input_scale * u + self.input_shift + self.hidden_scale * v + self.hidden_shift
        )  # (B, 4, N)
        return lstm_update(rearrange(gates, "b four n -> b (four n)"), c, self.activation)


def reduced(dim: int, reduction: int | None) -> int:
    """The squeezed width N/r; ConfigError where r does not divide N."""
    if reduction is None or reduction < 1 or dim % reduction:
        raise ConfigError("model.unit.reduction", reduction, f"a divisor of the {dim} channels")
    return dim // reduction


def lstm_update(gates: Tensor, c: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """c = sig(f) c + sig(i) tanh(g), h = sig(o) phi(c); gates (B, 4N) in the order i, f, g, o."""
    i, f, g, o = gates.float().chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * ACTIVATIONS[activation](c), c


class Recurrent(nn.Module):
    """Stacked cells that read the pooled features block after block; the top hidden vector is the gate."""

    def __init__(self, cells: Sequence[nn.Module]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        y = x.mean(1, dtype=torch.float32)  # (B, D)
        zeros = torch.zeros_like(y)
        new = []
        for cell, (h, c) in zip(self.cells, state or [(zeros, zeros)] * len(self.cells), strict=True):
            h, c = cell(y, h, c)
            new.append((h, c))
            y = h
        return rearrange(y, "b d -> b 1 d"), tuple(new)


class DIALSTM(Recurrent):
    """DIA-LSTM: the first cell squeezed by `reduction`, later ones standard (None: all standard)."""

    def __init__(
        self, dim: int, *, reduction: int | None = 4, num_cells: int = 1, activation: str = "sigmoid"
    ) -> None:
        super().__init__([LSTMCell(dim, None if i else reduction, activation) for i in range(num_cells)])


class DIALSTMLight(Recurrent):
    """DIA-LSTM (Light), one cell."""

    def __init__(self, dim: int, *, reduction: int = 4, activation: str = "sigmoid") -> None:
        super().__init__([LightCell(dim, reduction, activation)])


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018, arXiv 1709.01507, eq. 2-4): mean, N -> N/r -> N without bias.

    2N²/r parameters.
    """

    def __init__(self, dim: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Linear(dim, reduced(dim, reduction), bias=False)
        self.expand = nn.Linear(dim // reduction, dim, bias=False)

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        return to_gate(self.expand(torch.relu(self.reduce(x.mean(1))))), state


class ECA(nn.Module):
    """Efficient channel attention (Wang et al. 2020, arXiv 1910.03151): a convolution over the channel means.

    k parameters, k the odd width next to (log2 N + 1) / 2 (eq. 12).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = channel_conv(dim)

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        return to_gate(self.conv(rearrange(x.mean(1), "b d -> b 1 d"))[:, 0]), state


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al. 2018, arXiv 1807.06521): a channel gate, then a spatial one.

    As the official code: one N -> N/r -> N with bias for mean and max; then a 7x7 convolution with BatchNorm
    on the [max; mean] of the scaled channels. 2N²/r + N/r + N + 98 parameters and 2 a block.
    """

    def __init__(self, dim: int, num_norms: int = 1, *, reduction: int = 16) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(dim, reduced(dim, reduction)), nn.Linear(dim // reduction, dim)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(1, momentum=0.01) for _ in range(num_norms))

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        height, width = grid_of(x, grid)
        pools = torch.stack([x.mean(1), x.amax(1)])  # (2, B, D)
        channels = to_gate(self.expand(torch.relu(self.reduce(pools))).sum(0))  # (B, 1, D)
        x = x * channels.to(x.dtype)
        maps = torch.stack([x.amax(2), x.mean(2)], 1)  # (B, 2, N)
        maps = self.conv(rearrange(maps, "b two (h w) -> b two h w", h=height, w=width))  # (B, 1, H, W)
        space = torch.sigmoid(self.norms[place](maps).float())
        return channels * rearrange(space, "b 1 h w -> b (h w) 1"), state


class SRM(nn.Module):
    """Style-based recalibration (Lee et al. 2019, arXiv 1903.10829): [mean, std] weighted, BatchNorm.

    The weights start at 0, as in the official code: a gate of 1/2. 2N parameters and 2N a block.
    """

    def __init__(self, dim: int, num_norms: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dim))
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(num_norms))

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        style = torch.stack([x.mean(1), x.std(1, correction=0)], 1)  # (B, 2, D)
        return to_gate(self.norms[place]((self.weight * style).sum(1))), state


class SPA(nn.Module):
    """Spatial pyramid attention (Guo et al. 2020, SPANet, ICME): 1x1, 2x2, 4x4 mean pools, 21N -> N/r -> N.

    Without bias: 22N²/r parameters.
    """

    def __init__(self, dim: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Linear(21 * dim, reduced(dim, reduction), bias=False)
        self.expand = nn.Linear(dim // reduction, dim, bias=False)

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        height, width = grid_of(x, grid)
        cells = [torch.kron(bins(height, k, x), bins(width, k, x)) for k in (1, 2, 4)]  # (k², N) each
        pools = rearrange(torch.cat(cells) @ x, "b cells d -> b (cells d)")  # (B, 21 D)
        return to_gate(self.expand(torch.relu(self.reduce(pools)))), state


class SEM(nn.Module):
    """Switchable excitation (Zhong et al. 2022, arXiv 2209.05680): FC, convolution and channel-wise branches.

    A gate a branch, switched by sigmoid(Linear(mean)); as the official code, the gate is the product of their
    sigmoids. 3N + 3, 2N²/r + N/r + N, k (as ECA) and 2N parameters.
    """

    def __init__(self, dim: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.switch = nn.Linear(dim, 3)
        self.reduce, self.expand = nn.Linear(dim, reduced(dim, reduction)), nn.Linear(dim // reduction, dim)
        self.conv = channel_conv(dim)
        self.scale, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.full((dim,), -1.0))

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        y = x.mean(1)  # (B, D)
        fc = self.expand(torch.relu(self.reduce(y)))
        conv = self.conv(rearrange(y, "b d -> b 1 d"))[:, 0]
        a, b, c = torch.sigmoid(self.switch(y)).split(1, dim=1)  # (B, 1) each
        return to_gate(a * fc) * to_gate(b * conv) * to_gate(c * (self.scale * y + self.shift)), state


class SPEM(nn.Module):
    """Self-adaptive pooling (Zhong et al. 2022, arXiv 2208.10322): a learnt mix of the max and min pools.

    As the official code: u, v = w max + b, w min + b; gate = sigmoid(u + v) sigmoid(w' (p u + q v) + b') with
    p, q the squares of two parameters over their sum. 4N + 2 parameters. The penalty is 0.1 times that sum.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((2,), 0.5))
        self.pool_scale, self.mix_scale = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.pool_shift, self.mix_shift = (nn.Parameter(torch.full((dim,), -1.0)) for _ in range(2))

    def forward(self, x: Tensor, state: State, place: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        u, v = (self.pool_scale * y + self.pool_shift for y in (x.amax(1), x.amin(1)))  # (B, D)
        p, q = self.mix.square() / self.mix.square().sum()
        mixed = self.mix_scale * (p * u + q * v) + self.mix_shift
        return to_gate(u + v) * to_gate(mixed), state

    def penalty(self) -> Tensor:
        return 0.1 * self.mix.square().sum()


def to_gate(z: Tensor) -> Tensor:
    """The sigmoid in float32: (B, D) -> (B, 1, D)."""
    return rearrange(torch.sigmoid(z.float()), "b d -> b 1 d")


def channel_conv(dim: int) -> nn.Conv1d:
    """ECA's convolution over channels (B, 1, D), its width from their number."""
    t = int(abs(math.log2(dim) + 1) / 2)
    k = t if t % 2 else t + 1
    return nn.Conv1d(1, 1, k, padding=k // 2, bias=False)


def grid_of(x: Tensor, grid: Grid) -> tuple[int, int]:
    """Height and width of the patches x (B, N, D); ConfigError where they are not told and N is no square."""
    side = math.isqrt(x.shape[1])
    if grid is None and side**2 != x.shape[1]:
        raise ConfigError("patch tokens", x.shape[1], "a square number or a known grid: the unit looks at it")
    return grid or (side, side)


def bins(size: int, k: int, like: Tensor) -> Tensor:
    """(k, size): row i averages the cells from floor(i size/k) up to ceil((i + 1) size/k).

    A product with it is adaptive average pooling with a deterministic gradient on GPUs too.
    """
    i, cell = torch.arange(k, device=like.device)[:, None], torch.arange(size, device=like.device)
    inside = (cell >= i * size // k) & (cell < ((i + 1) * size + k - 1) // k)
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)


UNITS = {
    "constant": Constant,
    "se": SE,
    "eca": ECA,
    "cbam": CBAM,
    "srm": SRM,
    "spa": SPA,
    "sem": SEM,
    "spem": SPEM,
    "dia_lstm": DIALSTM,
    "dia_lstm_light": DIALSTMLight,
}
GRID_KINDS = ("cbam", "spa")


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
        if self.kind not in UNITS:
            raise ConfigError("model.unit.kind", self.kind, one_of(self.kind, list(UNITS)))
        parameters = signature(UNITS[self.kind]).parameters.values()
        known = [p.name for p in parameters if p.kind == Parameter.KEYWORD_ONLY]
        for name, value in self.options().items():
            if name not in known:
                takes = f"no such option: {self.kind} takes {', '.join(known) or 'none'}"
                raise ConfigError(f"model.unit.{name}", value, takes)
        if self.num_cells != "default" and self.num_cells < 1:
            raise ConfigError("model.unit.num_cells", self.num_cells, "1 or more")
        if self.kind in GRID_KINDS and self.pool == "all":
            raise ConfigError("model.unit.pool", self.pool, f"patches, as {self.kind} looks at their grid")

    @classmethod
    def of(cls, settings: "UnitConfig | Mapping[str, Any] | None") -> "UnitConfig | None":
        """Type and check a mapping; an unknown key is a ConfigError."""
        if settings is None or isinstance(settings, cls):
            return settings
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise ConfigError(f"model.unit.{key}", settings[key], one_of(key, known))
        if "kind" not in settings:
            raise ConfigError("model.unit.kind", None, one_of("", list(UNITS)))
        return cls(**settings)

    def options(self) -> dict[str, Any]:
        """What was set beyond the kind's own values."""
        own = ("reduction", "num_cells", "activation", "value")
        return {name: getattr(self, name) for name in own if getattr(self, name) != "default"}

    def as_dict(self) -> dict[str, Any]:
        """The mapping that makes this config again, without what is at "default"."""
        return {key: value for key, value in asdict(self).items() if value != "default"}


def equipped(blocks: list[int] | str, stages: Sequence[str]) -> list[int]:
    """The numbers of the blocks that UnitConfig.blocks names; ConfigError where there are no such.

    `stages`: the stage of each block, in the order they run.
    """
    numbers, without = range(len(stages)), {f"without {stage}": stage for stage in stages}
    if isinstance(blocks, list):
        chosen = sorted(set(blocks))
    elif every := re.fullmatch(r"every ([1-9]\d*)", blocks):
        chosen = list(numbers[:: int(every[1])])
    else:
        known = blocks == "all" or blocks in without
        chosen = [i for i in numbers if known and stages[i] != without.get(blocks)]
    if not chosen or not set(chosen) <= set(numbers):
        known = ", ".join(["all", "every K", *without])
        raise ConfigError("model.unit.blocks", blocks, f"{known} or a list of 0 to {len(stages) - 1}")
    return chosen


class SharedUnit(nn.Module):
    """The units of a network's blocks: `x, state = shared(x, state, block, grid)` in each block, in order.

    `stages` is the stage of each block; `units` holds one unit, one a stage, or one a block. x: (B, L, D)
    tokens, the first `num_extra` of which are no patches; the result has its shape and dtype. A block without
    a unit passes x and the state on.
    """

    def __init__(
        self, config: UnitConfig, dim: int, stages: Sequence[str] = ("all",), num_extra: int = 0
    ) -> None:
        super().__init__()
        self.config, self.dim, self.stages, self.num_extra = config, dim, list(stages), num_extra
        groups: dict[Any, list[int]] = {}  # the blocks of each unit
        for block in equipped(config.blocks, stages):
            group = {"all": "all", "stage": stages[block], "none": block}[config.sharing]
            groups.setdefault(group, []).append(block)
        shared_by = list(groups.values())
        self.route = {b: (i, place) for i, group in enumerate(shared_by) for place, b in enumerate(group)}
        kind, options = UNITS[config.kind], config.options()
        has_norms = "num_norms" in signature(kind).parameters
        self.units = nn.ModuleList(kind(dim, *[len(b)] * has_norms, **options) for b in shared_by)

    def forward(self, x: Tensor, state: State, block: int = 0, grid: Grid = None) -> tuple[Tensor, State]:
        if block not in self.route:
            return x, state
        i, place = self.route[block]
        if self.config.sharing == "stage" and place == 0:
            state = None
        patches = x[:, self.num_extra if self.config.pool == "patches" else 0 :]
        gate, state = self.units[i](patches, state, place, grid)  # (B, 1 or N, D)
        gate = self.config.gate_scale * gate
        if self.config.kind == "cbam":  # a gate of patches: the extra tokens keep factor 1
            gate = F.pad(gate, (0, 0, self.num_extra, 0), value=1.0)
        return (x * gate).to(x.dtype), state

    def penalty(self) -> Tensor | None:
        """What the units add to the loss, or None."""
        penalties = [unit.penalty() for unit in self.units if isinstance(unit, SPEM)]
        return torch.stack(penalties).sum() if penalties else None

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config.as_dict().items())


def parameter_savings(shared: SharedUnit) -> tuple[int, int]:
    """Parameters as shared, and with a unit a block instead: the paper's shared / unshared."""
    with torch.device("meta"):
        own = SharedUnit(replace(shared.config, sharing="none"), shared.dim, shared.stages)
    return tuple(sum(p.numel() for p in module.parameters()) for module in (shared, own))
