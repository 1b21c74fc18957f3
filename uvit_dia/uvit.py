"""U-ViT: a vision transformer with long UNet-style skips (Bao et al. 2023, arXiv 2209.12152).

Parameter names and initialisation are those of the official pixel-space code, so that its checkpoints load as
they are. The shared attention unit sits between norm2 and the MLP of every block (arXiv 2210.16101, Fig. 7).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uvit_dia.attention_units import Grid, SharedUnit, State, UnitConfig
from uvit_dia.errors import ConfigError, UserError


@dataclass
class UViTOutput(BaseOutput):
    """sample: (B, C, H, W), the network's prediction; penalty: what the unit adds to the loss, or None."""

    sample: Tensor
    penalty: Tensor | None = None


class Linear(nn.Linear):
    """nn.Linear born as the official code's: trunc_normal(std .02), zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, L, D / heads)
        return self.proj(rearrange(x, "b h l d -> b l (h d)"))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals; an out-block first merges the skip from its in-block.

    x, skip: (B, L, D). `unit` is what the blocks share, or None; the model owns it. `number` is this block's,
    counted in the order they run.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        norm: bool = True,
        residuals: bool = True,
        has_skip: bool = False,
    ) -> None:
        super().__init__()
        self.residuals = residuals
        self.skip_linear = Linear(2 * dim, dim) if has_skip else None
        self.norm1 = nn.LayerNorm(dim) if norm else nn.Identity()
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim) if norm else nn.Identity()
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(
        self, x: Tensor, skip: Tensor | None, unit: SharedUnit | None, state: State, number: int, grid: Grid
    ) -> tuple[Tensor, State]:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        y = self.attn(self.norm1(x))
        x = x + y if self.residuals else y
        n = self.norm2(x)
        if unit is not None:
            n, state = unit(n, state, number, grid)
        y = self.mlp(n)
        return x + y if self.residuals else y, state


class SkipGate(nn.Module):
    """ScaleLong's learnable scaling (LS; Huang et al. 2023, arXiv 2310.13545), shared by all long skips.

    As the official code: squeeze and excitation over tokens: mean of the channels, L -> L/16 -> L with bias,
    torch's default init. x: (B, L, D) -> (B, L, 1).
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        hidden = max(1, num_tokens // 16)
        self.reduce, self.expand = nn.Linear(num_tokens, hidden), nn.Linear(hidden, num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean(2)))))
        return rearrange(gate, "b l -> b l 1")


class UViT(ModelMixin, ConfigMixin):
    """The denoiser. `forward(sample, timestep, class_labels)` predicts what the training objective asked for.

    The defaults are the official CIFAR-10 model, U-ViT-S/2: 44,255,328 parameters. Sizes that do not fit
    are a ConfigError.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,  # height and width of an image
        patch_size: int = 2,  # side of a patch; divides sample_size
        in_channels: int = 3,  # 1: grey, 3: colour
        embed_dim: int = 512,  # width of the tokens
        depth: int = 12,  # blocks besides the middle one; half before it, half after it
        num_heads: int = 8,  # divides embed_dim
        mlp_ratio: float = 4.0,  # hidden width of the MLP over embed_dim
        qkv_bias: bool = False,  # a bias in the query, key and value projection
        mlp_time_embed: bool = False,  # a two-layer MLP on the time embedding
        num_classes: int | None = None,  # rows of the label embedding; null: unconditional
        null_label: int | None = None,  # the row that stands for "no label", for label drop and guidance
        unit: UnitConfig | None = None,  # the attention unit that the blocks share, or a mapping; null: none
        skip_scale: float | Literal["learnable"] | None = None,  # ScaleLong: kappa (CS) or learnable (LS)
        long_skips: bool = True,  # from each in-block to its out-block; false: an ablation
        block_norm: bool = True,  # LayerNorm before attention and before the MLP; false: an ablation
        residuals: bool = True,  # around attention and around the MLP; false: an ablation
    ) -> None:
        super().__init__()
        check_sizes(sample_size, patch_size, embed_dim, depth, num_heads, num_classes, null_label)
        check_skips(skip_scale, long_skips)
        self.num_extra = 1 if num_classes is None else 2  # [label,] time
        self.grid = (sample_size // patch_size, sample_size // patch_size)
        num_tokens = self.num_extra + self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.time_embed = nn.Identity()
        if mlp_time_embed:
            self.time_embed = nn.Sequential(
                Linear(embed_dim, 4 * embed_dim), nn.SiLU(), Linear(4 * embed_dim, embed_dim)
            )
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

        shape = (embed_dim, num_heads, mlp_ratio, qkv_bias, block_norm, residuals)
        self.in_blocks = nn.ModuleList(Block(*shape) for _ in range(depth // 2))
        self.mid_block = Block(*shape)
        self.out_blocks = nn.ModuleList(Block(*shape, has_skip=long_skips) for _ in range(depth // 2))
        self.skip_gate = SkipGate(num_tokens) if skip_scale == "learnable" else None
        self.shared_unit = None
        if unit_config := UnitConfig.of(unit):
            stages = ["in"] * (depth // 2) + ["mid"] + ["out"] * (depth // 2)
            self.shared_unit = SharedUnit(unit_config, embed_dim, stages, self.num_extra)

        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = Linear(embed_dim, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UViTOutput | tuple[Tensor]:
        """sample: (B, C, H, W) floats; timestep: scalar or (B,), 0 to 999; class_labels: (B,) integers."""
        x = self.embed(sample, timestep, class_labels)  # (B, L, D)
        state, skips = None, []
        for block in self.in_blocks:
            x, state = self.run_block(block, x, None, state, len(skips))
            skips.append(x)
        x, state = self.run_block(self.mid_block, x, None, state, len(skips))
        for number, block in enumerate(self.out_blocks, len(skips) + 1):
            skip = self.scale_skip(skips.pop(), len(skips))
            x, state = self.run_block(block, x, skip, state, number)
        sample = self.to_pixels(x)
        penalty = None if self.shared_unit is None else self.shared_unit.penalty()
        return UViTOutput(sample=sample, penalty=penalty) if return_dict else (sample,)

    def scale_skip(self, skip: Tensor, i: int) -> Tensor:
        """The skip (B, L, D) of in-block i, counted from 0, times kappa^i (CS) or a gate of its own (LS)."""
        if self.config.skip_scale is None:
            return skip
        return skip * (self.config.skip_scale**i if self.skip_gate is None else self.skip_gate(skip))

    def embed(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None) -> Tensor:
        """Tokens [label,] time, patches: (B, L, D)."""
        if (class_labels is None) != (self.label_emb is None):
            raise ValueError("class_labels go with a model that has num_classes, and only with it")
        batch = sample.shape[0]
        timestep = torch.as_tensor(timestep, device=sample.device).expand(batch)  # (B,)
        embedding = timestep_embedding(timestep, self.config.embed_dim).to(self.pos_embed.dtype)
        tokens = [rearrange(self.time_embed(embedding), "b d -> b 1 d")]
        if self.label_emb is not None:
            tokens.insert(0, rearrange(self.label_emb(class_labels), "b d -> b 1 d"))
        return torch.cat([*tokens, self.patch_embed(sample)], dim=1) + self.pos_embed

    def run_block(
        self, block: Block, x: Tensor, skip: Tensor | None, state: State, number: int
    ) -> tuple[Tensor, State]:
        inputs = (x, skip, self.shared_unit, state, number, self.grid)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            contexts = {"context_fn": lambda: (nullcontext(), frozen_statistics(self))}
            if torch.compiler.is_compiling():  # takes no contexts, and writes the statistics once anyway
                contexts = {}
            return checkpoint(block, *inputs, use_reentrant=False, **contexts)
        return block(*inputs)

    def to_pixels(self, x: Tensor) -> Tensor:
        x = self.decoder_pred(self.norm(x))[:, self.num_extra :]  # (B, patches, p² C)
        (height, width), p = self.grid, self.config.patch_size
        x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)
        return self.final_layer(x)

    @classmethod
    def from_official(
        cls, path: str | Path, num_heads: int | None = None, null_label: int | None = None
    ) -> "UViT":
        """Read an official pixel-space checkpoint (`.pth`, weights only, or `.safetensors`).

        All but the heads can be read off the shapes; they are 64 wide in the official models up to L. These
        saw continuous time 999t, the axis of the schedules here; `config.trained_on_time` says so. UserError
        where the file is not such a model.
        """
        weights = read_weights(path)
        missing = {"pos_embed", "patch_embed.proj.weight", "final_layer.weight"} - weights.keys()
        if missing:
            why = ", ".join(sorted(missing))
            raise UserError(
                f"{path}: not an official pixel-space U-ViT with its final 3x3 convolution ({why} missing)"
            )
        embed_dim, in_channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
        has_label = "label_emb.weight" in weights
        num_patches = weights["pos_embed"].shape[1] - 1 - has_label
        model = cls(
            sample_size=math.isqrt(num_patches) * patch_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=embed_dim,
            depth=2 * len({key.split(".")[1] for key in weights if key.startswith("in_blocks.")}),
            num_heads=num_heads or max(1, embed_dim // 64),
            mlp_ratio=weights["mid_block.mlp.fc1.weight"].shape[0] / embed_dim,
            qkv_bias="mid_block.attn.qkv.bias" in weights,
            mlp_time_embed="time_embed.0.weight" in weights,
            num_classes=weights["label_emb.weight"].shape[0] if has_label else None,
            null_label=null_label,
        )
        model.load_state_dict(weights)
        model.register_to_config(trained_on_time="continuous 999t")
        return model.eval()


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm keeps its running statistics, though it normalizes by the batch: no batch counts twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a file that may come from anyone: nothing in it is executed."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: can't be read as plain weights ({type(error).__name__})") from error


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal [cos, sin] of timestep (B,) -> (B, dim) in float32, as in the official code; dim is even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timestep.device) / half)
    phase = timestep.float()[:, None] * frequencies  # (B, half)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def check_sizes(
    sample_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    num_classes: int | None,
    null_label: int | None,
) -> None:
    if patch_size < 1 or sample_size % patch_size:
        raise ConfigError("model.patch_size", patch_size, f"a divisor of model.sample_size={sample_size}")
    if num_heads < 1 or embed_dim % num_heads or embed_dim % 2:
        raise ConfigError(
            "model.num_heads", num_heads, f"a divisor of model.embed_dim={embed_dim}, which must be even"
        )
    if depth < 2 or depth % 2:
        raise ConfigError("model.depth", depth, "an even number, 2 or more: half in, half out")
    if null_label is not None and not 0 <= null_label < (num_classes or 0):
        raise ConfigError("model.null_label", null_label, f"null or below model.num_classes={num_classes}")


def check_skips(skip_scale: float | str | None, long_skips: bool) -> None:
    if skip_scale is not None and not long_skips:
        raise ConfigError("model.skip_scale", skip_scale, "null without model.long_skips")
    known = skip_scale in (None, "learnable")
    if not known and not (isinstance(skip_scale, int | float) and 0 < skip_scale <= 1):
        raise ConfigError("model.skip_scale", skip_scale, "null, learnable, or more than 0 and at most 1")
