"""What the unit does in a trained run: the numbers of the figures of arXiv 2210.16101.

Gates are (L, T, n, D), before gate_scale: L equipped blocks, T timesteps, n training images, D channels.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import run_config
import torch
from accelerate import Accelerator
from einops import rearrange
from jsonargparse.typing import NonNegativeInt, PositiveInt
from run_folder import RunFolder
from sklearn.ensemble import RandomForestRegressor
from torch import Tensor, nn

from uvit_dia import sampling
from uvit_dia.attention_units import UnitConfig
from uvit_dia.data import Batches, load_images
from uvit_dia.diffusion import denoising_loss
from uvit_dia.errors import ConfigError, UserError
from uvit_dia.uvit import UViT

Name = Literal["gates", "correlation", "importance", "gradients", "stability"]
Numbers = dict[str, Any]  # of an analysis: tensors and plain values by name
EDGES = torch.linspace(-12, 4, 161)  # log10 |gradient|, ten bins a decade


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Which analyses, and over what."""

    only: list[Name] = field(default_factory=lambda: list(get_args(Name)))  # the analyses to make
    num_images: PositiveInt = 64  # the run's training images, each at every timestep
    timesteps: list[NonNegativeInt] = field(default_factory=lambda: [50, 250, 500, 750, 950])  # 0: clean end
    seed: NonNegativeInt = 0  # of the choice of images, their noise, untrained weights and forests
    num_steps: PositiveInt = 300  # stability: of each brief training


class Subject:
    """A trained run and the fixed inputs it is looked at with; UserError or ConfigError where it can't be."""

    def __init__(self, root: Path, options: AnalyzeConfig, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self.run = run_config.load(RunFolder(root).config)
        if self.run.model["unit"] is None:
            raise UserError(f"{root}: the run has no attention unit (model.unit is null), so no gates")
        if not options.timesteps or max(options.timesteps) >= self.run.diffusion.num_train_timesteps:
            expected = f"one or more numbers less than {self.run.diffusion.num_train_timesteps}"
            raise ConfigError("timesteps", options.timesteps, expected)
        self.pipeline, self.about = sampling.load_pipeline(str(root), accelerator.device)
        model = self.pipeline.unet.config
        self.images = load_images(self.run.data, "train", model.sample_size, model.in_channels)
        batches = Batches(self.images, self.run.data, options.num_images, options.seed, accelerator.device)
        _, self.x0, labels = next(batches.from_step(0))  # (n, C, H, W), (n,)
        self.labels = None if model.num_classes is None else labels
        torch.manual_seed(options.seed)
        self.noise = torch.randn_like(self.x0)

    def fresh(self, **changes: Any) -> UViT:
        """The run's model, some arguments changed, as the seed makes it; batch norms read the batch."""
        torch.manual_seed(self.options.seed)
        return UViT(**self.run.model | changes).to(self.accelerator.device).train()

    def forwards(self, model: UViT, modules: Iterable[nn.Module]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """At each timestep: the loss, summed over images, and what calls of the modules returned first."""
        outputs: list[Tensor] = []
        hooks = [m.register_forward_hook(lambda _, args, output: outputs.append(output[0])) for m in modules]
        scheduler, gamma = self.pipeline.scheduler, self.run.diffusion.min_snr_gamma
        for t in torch.tensor(self.options.timesteps, device=self.x0.device):
            outputs.clear()
            prediction = model(scheduler.add_noise(self.x0, self.noise, t), t, self.labels).sample
            loss = denoising_loss(prediction, scheduler, gamma, self.x0, self.noise, t)
            yield len(self.x0) * loss, outputs
        for hook in hooks:
            hook.remove()


def blocks_of(model: UViT) -> dict[str, nn.Module]:
    """Blocks by name in the order of the forward pass: in 0, in 1, ..., mid, out 0, ..."""
    ins, outs = ({f"{s} {i}": b for i, b in enumerate(getattr(model, f"{s}_blocks"))} for s in ("in", "out"))
    return ins | {"mid": model.mid_block} | outs


@torch.no_grad()
def read_gates(model: UViT, subject: Subject) -> tuple[list[str], Tensor]:
    """Names of the equipped blocks, and gates (L, T, n, D), float64; spatial ones averaged over tokens."""
    shared: Any = model.shared_unit
    names = [list(blocks_of(model))[block] for block in sorted(shared.route)]
    gates = [gate for _, outputs in subject.forwards(model, shared.units) for gate in outputs]
    gates = [gate.cpu().double().mean(1).expand(len(subject.x0), -1) for gate in gates]  # a constant is one
    return names, rearrange(gates, "(t l) n d -> l t n d", l=len(names))


def gates(subject: Subject) -> Numbers:
    """Mean, spread and saturation (L, T): the share in the outer 5% of the range, of relu the lower."""
    names, values = read_gates(subject.pipeline.unet, subject)
    activation = UnitConfig.of(subject.run.model["unit"]).activation
    low, high = {"tanh": (-0.9, 0.9), "relu": (0.05, math.inf)}.get(activation, (0.05, 0.95))
    return {
        "blocks": names,
        "mean": values.mean((-1, -2)),
        "spread over channels": values.mean(-2).std(-1),
        "spread over images": values.std(-2).mean(-1),
        "saturated share": ((values < low) | (values > high)).double().mean((-1, -2)),
    }


def pearson(gates: Tensor) -> Tensor:
    """Correlation over channels of all pairs of blocks, (L, ..., D) -> (L, L, ...); 0 for a flat gate."""
    z = nn.functional.normalize(gates - gates.mean(-1, keepdim=True), dim=-1, eps=1e-6)  # eps: rounding
    return torch.einsum("i...d,j...d->ij...", z, z)


def correlation(subject: Subject) -> Numbers:
    """Correlation of gates across blocks (Fig. 2), quantiles over inputs; centred: minus the mean image's."""
    tables: Numbers = {}
    for who, model in {"trained": subject.pipeline.unet, "untrained": subject.fresh()}.items():
        names, values = read_gates(model, subject)
        for kind, x in {"gates": values, "centred": values - values.mean(-2, keepdim=True)}.items():
            found = pearson(x).flatten(2)  # (L, L, inputs)
            tables |= {f"{who}, {kind}: {q}%": found.quantile(q / 100, -1) for q in (5, 50, 95)}
    return {"blocks": names, **tables}


def importance(subject: Subject) -> Numbers:
    """What random forests need of each earlier block's gate to predict a block's (Fig. 11), and their R²."""
    names, values = read_gates(subject.pipeline.unet, subject)
    x = rearrange(values[..., :32], "l t n c -> l (t n) c").numpy()  # 32 channels, to bound the time
    found, r2 = torch.full((len(x), len(x)), math.nan), torch.full((len(x),), math.nan)
    settings = dict(min_samples_leaf=5, oob_score=True, n_jobs=-1, random_state=subject.options.seed)
    for i in range(1, len(x)):
        forest = RandomForestRegressor(**settings).fit(rearrange(x[:i], "l b c -> b (l c)"), x[i])
        found[i, :i] = torch.from_numpy(forest.feature_importances_).view(i, -1).sum(-1)
        r2[i] = forest.oob_score_
    return {"blocks": names, "importance": found, "out-of-bag R2": r2}


def variants(*ablated: str) -> dict[str, dict[str, Any]]:
    """Changed arguments of UViT by name: none, and each ablation; then the same without the unit."""
    found: dict[str, dict[str, Any]] = {"as configured": {}, **{f"no {x}": {x: False} for x in ablated}}
    return found | {f"{name}, no unit": changes | {"unit": None} for name, changes in found.items()}


def gradient_sizes(model: UViT, subject: Subject) -> dict[str, Tensor]:
    """|dL/d(block output)| by stage over the fixed inputs, in a row; L is the loss of one image."""
    blocks = blocks_of(model)
    sizes: dict[str, list[Tensor]] = {"in": [], "mid": [], "out": []}
    for loss, outputs in subject.forwards(model, blocks.values()):
        for name, grad in zip(blocks, torch.autograd.grad(loss, outputs), strict=True):
            sizes[name.split()[0]].append(grad.abs().flatten().cpu())
    return {stage: torch.cat(pieces) for stage, pieces in sizes.items()}


def distribution(sizes: Tensor) -> dict[str, Tensor]:
    """Mean and variance of sizes (k,), and the share of them in each bin of their log10 (EDGES)."""
    variance, mean = torch.var_mean(sizes.double(), correction=0)
    counts = torch.histc(sizes.log10(), len(EDGES) - 1, *EDGES[[0, -1]].tolist())
    return {"mean": mean, "variance": variance, "shares": counts / len(sizes)}


def gradients(subject: Subject) -> Numbers:
    """|dL/d(block output)| by stage (Fig. 13): untrained, without skips, residuals or the unit; trained."""
    numbers = {}
    for name, changes in (variants("long_skips", "residuals") | {"as configured, trained": None}).items():
        model = subject.pipeline.unet if changes is None else subject.fresh(**changes)
        numbers[name] = {stage: distribution(x) for stage, x in gradient_sizes(model, subject).items()}
    return {"log10 edges": EDGES, **numbers}


ANALYSES = {f.__name__: f for f in (gates, correlation, importance, gradients)}
