"""The shared unit on other backbones: a module's output is rescaled by a unit that its whole stage shares."""

from collections import ChainMap
from contextvars import ContextVar
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby

from einops import rearrange
from torch import Tensor, nn

from uvit_dia.attention_units import SharedUnit, State, UnitConfig
from uvit_dia.errors import ConfigError

# Opened and closed by a model's own hooks; threads and nested models each have their own.
STATES: ContextVar[ChainMap[nn.Module, State]] = ContextVar("states")


def attach(model: nn.Module, pattern: str, config: UnitConfig | dict, num_extra: int = 0) -> nn.ModuleList:
    """Equip the modules whose names match `pattern`, e.g. "blocks.*.norm2"; returns `model.shared_units`.

    The output of each, tokens (B, L, D) with `num_extra` first ones that are no patches or a feature map
    (B, C, H, W), is rescaled: name norm2 for a timm ViT (arXiv 2210.16101, Fig. 7), the branch's last layer,
    before the residual add, for a ResNet (Fig. 5). Neighbours of equal width, the first dimension of their
    weights, are a stage with a SharedUnit of its own, and `config.blocks` counts within it. ConfigError where
    the pattern names no such modules, or the model has units. The state lasts for one call of `model(...)`: a
    part called alone, or again by the model's own gradient checkpointing, is a RuntimeError.
    """
    if hasattr(model, "shared_units") or isinstance(model, nn.Sequential):  # which would run them as a layer
        raise ConfigError("model", type(model).__name__, "no nn.Sequential, and no shared_units: attach once")
    sites = [module for name, module in model.named_modules() if fnmatchcase(name, pattern)]
    if not sites or any(getattr(site, "weight", None) is None for site in sites):
        raise ConfigError("pattern", pattern, "names of modules with a weight, e.g. blocks.*.norm2")
    config = UnitConfig.of(config)
    stages = [list(group) for _, group in groupby(sites, key=lambda site: len(site.weight))]
    units = nn.ModuleList(SharedUnit(config, len(s[0].weight), ["stage"] * len(s), num_extra) for s in stages)
    for shared, stage in zip(units, stages, strict=True):
        for block, site in enumerate(stage):
            site.register_forward_hook(partial(recalibrate, shared, block))
    model.shared_units = units.to(sites[0].weight).train(model.training)
    model.register_forward_pre_hook(partial(begin, units))
    model.register_forward_hook(end, always_call=True)
    return units


def begin(units: nn.ModuleList, model: nn.Module, args: tuple) -> None:
    STATES.set(STATES.get(ChainMap()).new_child(dict.fromkeys(units)))


def end(model: nn.Module, args: tuple, output: object) -> None:
    STATES.set(STATES.get().parents)


def recalibrate(shared: nn.Module, block: int, site: nn.Module, args: tuple, x: Tensor) -> Tensor:
    states = STATES.get(ChainMap())
    if shared not in states:
        raise RuntimeError("a shared unit ran outside a call of the model that it is attached to")
    grid = tuple(x.shape[2:]) if x.ndim == 4 else None
    tokens = rearrange(x, "b c h w -> b (h w) c") if grid else x
    tokens, states[shared] = shared(tokens, states[shared], block, grid)
    return rearrange(tokens, "b (h w) c -> b c h w", h=grid[0]) if grid else tokens
