"""Attention units, and how the blocks of a network share one (DIA: Huang et al. 2024, arXiv 2210.16101).

A unit maps the features of a block to a gate that rescales them: pool, process, recalibrate. It is called as
`gate, state = unit(patches, state)`: patches (B, N, D), gate (B, 1, D) in float32, and a recurrent state that
is None at the start of a forward pass and that only the recurrent units fill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from inspect import Parameter, signature
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from uvit_dia.errors import ConfigError, one_of

State = tuple[tuple[Tensor, Tensor], ...] | None  # (hidden, cell) of each cell: (B, D), float32
ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class Constant(nn.Module):
    """A fixed gate without parameters: the control that tells the scale of a gate from its mechanism."""

    def __init__(self, dim: int, *, value: float = 1.0) -> None:
        super().__init__()
        self.dim, self.value = dim, value

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
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
        if reduction:
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


def reduced(dim: int, reduction: int) -> int:
    """The squeezed width N/r; ConfigError where r does not divide N."""
    if reduction < 1 or dim % reduction:
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

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
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
        if reduction is None:
            raise ConfigError(
                "model.unit.reduction", reduction, "a divisor of the channels: light has no other form"
            )
        super().__init__([LightCell(dim, reduction, activation)])


UNITS = {"constant": Constant, "dia_lstm": DIALSTM, "dia_lstm_light": DIALSTMLight}


@dataclass(frozen=True, kw_only=True)
class UnitConfig:
    """One attention unit and how the blocks share it. Options left at "default" take the kind's own value."""

    kind: Literal["constant", "dia_lstm", "dia_lstm_light"]  # which unit
    sharing: Literal["all"] = "all"  # all: one unit and one state through every block, in order
    pool: Literal["patches", "all"] = "patches"  # the tokens that are pooled; the gate scales all of them
    gate_scale: float = 1.0  # multiplies the gate; 4 starts DIA-LSTM near the identity: sig(0)² is 1/4
    reduction: int | Literal["default"] | None = "default"  # squeeze r; null: the standard LSTM
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
                raise ConfigError(f"model.unit.{name}", value, f"no such option, as {self.kind} takes {known}")
        if self.num_cells != "default" and self.num_cells < 1:
            raise ConfigError("model.unit.num_cells", self.num_cells, "1 or more")

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


class SharedUnit(nn.Module):
    """One unit for all blocks of a network: `x, state = shared(x, state)` in each block, in order.

    x: (B, L, D) tokens, the first `num_extra` of which are no patches; the result has x's shape and dtype.
    """

    def __init__(self, config: UnitConfig, dim: int, num_extra: int) -> None:
        super().__init__()
        self.gate_scale = config.gate_scale
        self.first_pooled = num_extra if config.pool == "patches" else 0
        self.unit = UNITS[config.kind](dim, **config.options())

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        gate, state = self.unit(x[:, self.first_pooled :], state)  # (B, 1, D)
        return (x * (self.gate_scale * gate)).to(x.dtype), state

    def extra_repr(self) -> str:
        return f"gate_scale={self.gate_scale}, first_pooled={self.first_pooled}"
