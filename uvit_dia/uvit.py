"""U-ViT: a vision transformer with long UNet-style skips (Bao et al. 2023, arXiv 2209.12152).

Parameter names and initialisation are those of the official pixel-space code, so that its checkpoints load as
they are. The shared attention unit sits between norm2 and the MLP of every block (arXiv 2210.16101, Fig. 7).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend as Backend
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from uvit_dia.attention_units import Grid, SharedUnit, State, TwoLinears, UnitConfig, in_compiled_gpu_code
from uvit_dia.errors import ConfigError, UserError, check_fields

# (B,), dim -> (B, dim) in float32, [cos, sin] as in the official code
timestep_embedding = partial(get_timestep_embedding, flip_sin_to_cos=True, downscale_freq_shift=0)
# Fastest first, and each only where it can: at 257 tokens cuDNN's takes 3/4 of flash attention's time.
BACKENDS = [Backend.CUDNN_ATTENTION, Backend.FLASH_ATTENTION, Backend.EFFICIENT_ATTENTION, Backend.MATH]
Skip = Tensor | None  # (B, L, D)
Unit = SharedUnit | None
Weights = Sequence[Tensor]  # of a block's products
Labels = Tensor | None  # (B,) integers; None for a model without classes


def dtype_of_products(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


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


class Patches(nn.Conv2d):
    """A convolution without overlap, (B, C, H, W) -> (B, D, H / p, W / p), as a product, tokens in order."""

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.kernel_size
        x = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=p, q=q)
        return rearrange(F.linear(x, self.weight.flatten(1), self.bias), "b h w d -> b d h w")


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.heads(self.qkv(x)))

    def heads(self, qkv: Tensor) -> Tensor:
        """What the heads see, side by side (B, L, D), of qkv (B, L, 3D)."""
        if in_compiled_gpu_code(qkv) and self.has_kernels(qkv):
            from uvit_dia.fused_attention import FusedAttention

            return FusedAttention.apply(qkv, self.num_heads)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.num_heads)
        with sdpa_kernel(BACKENDS, set_priority=True):
            x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, L, D / heads)
        return rearrange(x, "b h l d -> b l (h d)")

    def has_kernels(self, qkv: Tensor) -> bool:
        """Whether fused_attention suits qkv (B, L, 3D), on the GPUs where it was measured: Hopper's."""
        few = qkv.shape[1] - (1 << qkv.shape[1].bit_length() - 1)  # tokens beyond a power of two
        fits = 1 <= few <= 16 and qkv.shape[1] > 64 and qkv.shape[2] == 3 * 64 * self.num_heads
        is_half = qkv.dtype in (torch.bfloat16, torch.float16)
        return fits and is_half and torch.cuda.get_device_capability(qkv.device) == (9, 0)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals; an out-block first merges the skip from its in-block.

    x, skip: (B, L, D). `unit` is what the blocks share, or None; `number` counts them in the order they run;
    `low`: `weights()` in the type of products, where kernels take them.
    """

    def __init__(self, config: FrozenDict, has_skip: bool = False) -> None:
        super().__init__()
        dim, norm = config.embed_dim, nn.LayerNorm if config.block_norm else nn.Identity
        self.residuals = config.residuals
        self.skip_linear = Linear(2 * dim, dim) if has_skip else None
        self.norm1 = norm(dim)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(config.mlp_ratio * dim))

    def forward(
        self, x: Tensor, skip: Skip, unit: Unit, state: State, number: int, grid: Grid, low: Weights = ()
    ) -> tuple[Tensor, State]:
        if low:
            return self.fused(x, skip, unit, state, number, grid, low)
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        y = self.attn(self.norm1(x))
        x = x + y if self.residuals else y
        n = self.norm2(x).to(x.dtype)  # autocast makes it float32, twice the bytes for the unit to read
        if unit is not None:
            n, state = unit(n, state, number, grid)
        y = self.mlp(n)
        return x + y if self.residuals else y, state

    def weights(self) -> list[Tensor]:
        """Of its products."""
        layers = self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2, self.skip_linear
        return [layer.weight for layer in layers if layer is not None]

    def is_plain(self, unit: Unit) -> bool:
        """Whether it may run without calling its parts: none is left out, replaced or has a hook."""
        known = (Block, Attention, Mlp, Linear, nn.LayerNorm)
        called = [*self.modules(), *([] if unit is None else unit.modules())]
        hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in called]
        hooks += [(*m._backward_hooks, *m._backward_pre_hooks) for m in called]
        return self.residuals and all(type(m) in known for m in self.modules()) and not any(hooks)

    def fused(
        self, x: Tensor, skip: Skip, unit: Unit, state: State, number: int, grid: Grid, low: Weights
    ) -> tuple[Tensor, State]:
        """The same, with each bias added where its gradient needs no pass of its own."""
        from uvit_dia.fused_layers import BiasGELU, FusedNorm, GatedNorm, PooledNorm, product

        def times(x: Tensor, weight: Tensor, low: Tensor) -> Tensor:
            return product(x.to(low), weight, low) if torch.is_grad_enabled() else F.linear(x.to(low), low)

        norm1, norm2, attn, fc1, fc2 = self.norm1, self.norm2, self.attn, self.mlp.fc1, self.mlp.fc2
        qkv, proj, expand, contract, *merge = list(zip(self.weights(), low, strict=True))
        before, after = (torch.zeros_like(fc2.bias) for _ in range(2))  # compilers take none twice
        if self.skip_linear is not None and skip is not None:
            own, others = zip(*(weight.chunk(2, 1) for weight in merge[0]), strict=True)
            before, x = self.skip_linear.bias, times(x, *own) + times(skip, *others)
        x, n = FusedNorm.apply(x, norm1.weight, norm1.bias, before, after)
        y = times(n, *qkv)
        y = times(attn.heads(y if attn.qkv.bias is None else (y + attn.qkv.bias).to(y.dtype)), *proj)
        parts = (norm2.weight, norm2.bias, attn.proj.bias, fc2.bias)
        if unit is not None and unit.sees_mean(number):
            x, mean, *stats = PooledNorm.apply(x, y, *parts, unit.num_skipped)
            gate, state = unit.gate_of(mean.to(low[0]), state, number)
            n = GatedNorm.apply(x, *stats[:2], norm2.weight, norm2.bias, fc2.bias, gate, *stats[2:])
        else:
            x, n = FusedNorm.apply(x + y, *parts)
            if unit is not None:
                n, state = unit(n, state, number, grid)
        y = times(BiasGELU.apply(times(n, *expand), fc1.bias), *contract)
        return x + y, state


class SkipGate(TwoLinears):
    """ScaleLong's LS (Huang et al. 2023, arXiv 2310.13545): squeeze and excitation over the tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens, max(1, num_tokens // 16), num_tokens, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(torch.sigmoid(self.process(x.mean(2))), "b l -> b l 1")  # of x (B, L, D)


class UViT(ModelMixin, ConfigMixin):
    """The denoiser. `forward(sample, timestep, class_labels)` predicts what the training objective asked for.

    The defaults are the official CIFAR-10 model, U-ViT-S/2: 44,255,328 parameters.
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
        check(self.config)
        self.num_extra = 1 if num_classes is None else 2  # [label,] time
        self.grid = (sample_size // patch_size, sample_size // patch_size)
        num_tokens = self.num_extra + self.grid[0] * self.grid[1]
        self.patch_embed = nn.ModuleDict({"proj": Patches(in_channels, embed_dim, patch_size, patch_size)})
        self.time_embed: nn.Module = nn.Identity()
        if mlp_time_embed:
            hidden = 4 * embed_dim
            self.time_embed = nn.Sequential(Linear(embed_dim, hidden), nn.SiLU(), Linear(hidden, embed_dim))
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

        self.in_blocks = nn.ModuleList(Block(self.config) for _ in range(depth // 2))
        self.mid_block = Block(self.config)
        self.out_blocks = nn.ModuleList(Block(self.config, long_skips) for _ in range(depth // 2))
        self.skip_gate = SkipGate(num_tokens) if skip_scale == "learnable" else None
        self.shared_unit = None
        if unit is not None:
            stages = ["in"] * (depth // 2) + ["mid"] + ["out"] * (depth // 2)
            self.shared_unit = SharedUnit(UnitConfig.of(unit), embed_dim, stages, self.num_extra)

        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = Linear(embed_dim, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Labels = None, return_dict: bool = True
    ) -> UViTOutput | tuple[Tensor]:
        """sample: (B, C, H, W) floats; timestep: scalar or (B,), 0 to 999; class_labels: (B,) integers."""
        x = self.embed(sample, timestep, class_labels)  # (B, L, D)
        state, middle, kappa = None, len(self.in_blocks), self.config.skip_scale
        blocks = [*self.in_blocks, self.mid_block, *self.out_blocks]
        low = self.rounded_weights(blocks, x)
        skips: list[Tensor] = []
        for number, block in enumerate(blocks):
            skip = skips.pop() if number > middle else None  # (B, L, D), of in-block len(skips)
            if skip is not None and kappa is not None:  # in-block i: times kappa^i (CS) or its own gate (LS)
                skip = skip * (kappa ** len(skips) if self.skip_gate is None else self.skip_gate(skip))
            x, state = self.run_block(block, x, skip, self.shared_unit, state, number, self.grid, low[number])
            if number < middle:
                skips.append(x)
        sample = self.to_pixels(x)
        penalty = None if self.shared_unit is None else self.shared_unit.penalty()
        return UViTOutput(sample=sample, penalty=penalty) if return_dict else (sample,)

    def embed(self, sample: Tensor, timestep: Tensor | float, class_labels: Labels) -> Tensor:
        """Tokens [label,] time, patches: (B, L, D)."""
        if (class_labels is None) != (self.label_emb is None):
            raise ValueError("class_labels go with a model that has num_classes, and only with it")
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))  # (B,)
        embedding = timestep_embedding(timestep, self.config.embed_dim).to(self.pos_embed.dtype)
        tokens = [rearrange(self.time_embed(embedding), "b d -> b 1 d")]
        if self.label_emb is not None:
            tokens.insert(0, rearrange(self.label_emb(class_labels), "b d -> b 1 d"))
        patches = rearrange(self.patch_embed["proj"](sample.to(self.pos_embed.dtype)), "b d h w -> b (h w) d")
        x = torch.cat([*tokens, patches], dim=1) + self.pos_embed
        # Under bf16 the residuals are bf16 too: half the bytes, float32's range, and the same losses to 1e-4.
        return x.bfloat16() if dtype_of_products(x) == torch.bfloat16 else x

    def rounded_weights(self, blocks: list[Any], x: Tensor) -> list[list[Tensor]]:
        """The weights of each block's products in their type; none where blocks call their layers."""
        compiled, dtype = in_compiled_gpu_code(x), dtype_of_products(x)
        weights = [b.weights() if compiled and b.is_plain(self.shared_unit) else [] for b in blocks]
        if not any(weights) or dtype == self.pos_embed.dtype:
            return weights
        from uvit_dia.fused_layers import rounded

        flat = iter(rounded([weight.detach() for some in weights for weight in some], dtype))
        return [[next(flat) for _ in some] for some in weights]  # islice would not go on with torch 2.8

    def run_block(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, State]:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        if torch.compiler.is_compiling():  # takes no contexts, and writes the statistics once anyway
            return checkpoint(block, *inputs, use_reentrant=False)
        contexts = nullcontext(), frozen_statistics(self)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: contexts)

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

        All but the heads, 64 wide in the official models up to L, is read off the shapes. These models saw
        continuous time 999t, the axis of the schedules here. UserError where the file is no such model.
        """
        try:  # weights may come from anyone: nothing in the file is executed
            is_safe = Path(path).suffix == ".safetensors"
            weights = load_file(path) if is_safe else torch.load(path, "cpu", weights_only=True)
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
        except UserError:  # of num_heads or null_label
            raise
        except Exception as error:  # a file of something else fails in every way there is
            what = "plain weights of an official pixel-space U-ViT with its final 3x3 convolution"
            raise UserError(f"{path}: not the {what} ({type(error).__name__})") from error
        model.register_to_config(_trained_on_time="continuous 999t")
        return model.eval()


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm keeps its running statistics, though it normalizes by the batch: no batch counts twice."""
    with ExitStack() as restored:
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                restored.callback(setattr, norm, "momentum", norm.momentum)
                norm.momentum = 0.0
        yield


def check(c: FrozenDict) -> None:
    """ConfigError where UViT's arguments do not fit together."""
    check_fields("model", c, sample_size=1, patch_size=1, in_channels=1, embed_dim=2, depth=2, num_heads=1)
    check_fields("model", c, mlp_ratio=1 / c.embed_dim)
    if c.num_classes is not None:
        check_fields("model", c, num_classes=1)
    if c.sample_size % c.patch_size:
        raise ConfigError("model.patch_size", c.patch_size, f"a divisor of model.sample_size={c.sample_size}")
    if c.embed_dim % c.num_heads or c.embed_dim % 2:
        fits = f"a divisor of model.embed_dim={c.embed_dim}, which must be even"
        raise ConfigError("model.num_heads", c.num_heads, fits)
    if c.depth % 2:
        raise ConfigError("model.depth", c.depth, "an even number, 2 or more: half in, half out")
    if c.null_label is not None and not 0 <= c.null_label < (c.num_classes or 0):
        labels = f"null or below model.num_classes={c.num_classes}"
        raise ConfigError("model.null_label", c.null_label, labels)
    if c.skip_scale is not None and not c.long_skips:
        raise ConfigError("model.skip_scale", c.skip_scale, "null without model.long_skips")
    is_kappa = isinstance(c.skip_scale, int | float) and 0 < c.skip_scale <= 1
    if not is_kappa and c.skip_scale not in (None, "learnable"):
        raise ConfigError("model.skip_scale", c.skip_scale, "null, learnable, or more than 0 and at most 1")
