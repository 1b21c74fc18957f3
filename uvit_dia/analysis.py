"""What the unit does in a trained run: numbers and pictures, after the figures of arXiv 2210.16101.

Gates are read before gate_scale, over a fixed batch of the run's training images at several timesteps:
(L, T, n, D) for L equipped blocks, T timesteps, n images, D channels.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from einops import rearrange, reduce
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.ensemble import RandomForestRegressor
from torch import Tensor, nn
from tqdm import tqdm

from uvit_dia import trainer
from uvit_dia.attention_units import UnitConfig
from uvit_dia.checkpoint import RunFolder
from uvit_dia.config import Config, load
from uvit_dia.data import Batches, ImageSet, load_images
from uvit_dia.diffusion import denoising_loss
from uvit_dia.errors import ConfigError, UserError, one_of
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.random_keys import Stream, numpy_generator, torch_generator
from uvit_dia.sampling import load_pipeline
from uvit_dia.uvit import UViT

Found = tuple[dict[str, Any], Figure]  # an analysis: its numbers, and its picture
NO_SPREAD = 1e-7  # float32 rounding of a gate: a standard deviation below it is none
EDGES = torch.linspace(-12, 4, 161)  # log10 |gradient|, ten bins a decade
NO_SKIPS, NO_RESIDUALS, NO_NORM = {"long_skips": False}, {"residuals": False}, {"block_norm": False}


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Which analyses, and over what."""

    only: str | None = None  # of gates,correlation,importance,gradients,stability, with commas; null: all
    num_images: int = 64  # the run's training images, each at every timestep
    timesteps: list[int] = field(default_factory=lambda: [50, 250, 500, 750, 950])  # 0 is the clean end
    seed: int = 0  # of the choice of images, their noise, untrained weights and forests
    num_steps: int = 300  # stability: of each brief training
    batch_size: int = 32  # stability: images a step
    learning_rate: float | None = None  # stability: null: the run's; a higher one is a harder trial
    max_seconds: float = 600.0  # stability: for all brief trainings together

    def __post_init__(self) -> None:
        for name in self.only.split(",") if self.only else []:
            if name not in ANALYSES:
                raise ConfigError("only", name, one_of(name, list(ANALYSES)))
        for name, least in {"num_images": 2, "num_steps": 1, "batch_size": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"{least} or more")


class Subject(NamedTuple):
    """A trained run and the inputs it is looked at with."""

    options: AnalyzeConfig
    run: Config
    about: dict[str, Any]  # what the run's training.json says
    accelerator: Accelerator
    pipeline: UViTPipeline  # with the averaged weights
    images: ImageSet
    x0: Tensor  # (n, C, H, W)
    labels: Tensor | None  # (n,)
    noisy: list[tuple[Tensor, Tensor, Tensor]]  # noise, t (n,) and x_t of x0, a timestep each

    def fresh(self, **changes: Any) -> UViT:
        """The run's model, some arguments changed, as the seed makes it; batch norms read the batch."""
        torch.manual_seed(self.options.seed)
        return UViT(**self.run.model | changes).to(self.accelerator.device).train()


def load_subject(root: Path, options: AnalyzeConfig, accelerator: Accelerator) -> Subject:
    """A run and its fixed inputs; UserError or ConfigError where it can't be analysed."""
    if not RunFolder(root).config.is_file():
        raise UserError(f"{root}: no run, as it has no config.yaml")
    run = load(RunFolder(root).config)
    if run.model["unit"] is None:
        raise UserError(f"{root}: the run has no attention unit (model.unit is null), so no gates to analyse")
    last = run.diffusion.num_train_timesteps - 1
    if not options.timesteps or not all(0 <= t <= last for t in options.timesteps):
        raise ConfigError("timesteps", options.timesteps, f"numbers from 0 to {last}")
    pipeline, about = load_pipeline(str(root), accelerator.device)
    model = pipeline.unet.config
    images = load_images(run.data, "train", model.sample_size, model.in_channels)
    batches = Batches(images, run.data, options.num_images, options.seed, accelerator.device)
    _, x0, labels = next(batches.from_step(0))
    labels, noisy = None if model.num_classes is None else labels, []
    for t in options.timesteps:
        generator = torch_generator(options.seed, Stream.NOISE, t, x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        steps = torch.full((len(x0),), t, device=x0.device)
        noisy.append((noise, steps, pipeline.scheduler.add_noise(x0, noise, steps)))
    return Subject(options, run, about, accelerator, pipeline, images, x0, labels, noisy)


def analyze(root: Path, options: AnalyzeConfig, accelerator: Accelerator) -> Iterator[Path]:
    """Write RUN/analysis/<name>.json and .png for each analysis that is asked for; yields each path."""
    subject = load_subject(root, options, accelerator)
    about = {"run": str(root), **subject.about, "unit": subject.run.model["unit"]}
    about |= {"images": options.num_images, "timesteps": options.timesteps, "analysis seed": options.seed}
    (root / "analysis").mkdir(exist_ok=True)
    for name in options.only.split(",") if options.only else ANALYSES:
        numbers, figure = ANALYSES[name](subject)
        text = json.dumps({"about": about, **numbers}, default=Tensor.tolist)
        without_nan = json.loads(text, parse_constant=lambda constant: None)  # which JSON has not
        target = root / "analysis" / f"{name}.json"
        target.write_text(json.dumps(without_nan, indent=1) + "\n")
        figure.suptitle(f"{root.name}, step {subject.about.get('step', '?')}: {name}")
        figure.savefig(target.with_suffix(".png"), dpi=110)
        yield from (target, target.with_suffix(".png"))


def blocks_of(model: UViT) -> dict[str, nn.Module]:
    """Blocks by name in the order of the forward pass: in 0, in 1, ..., mid, out 0, ..."""
    ins, outs = ({f"{s} {i}": b for i, b in enumerate(getattr(model, f"{s}_blocks"))} for s in ("in", "out"))
    return ins | {"mid": model.mid_block} | outs


@torch.no_grad()
def read_gates(model: UViT, subject: Subject) -> tuple[list[str], Tensor]:
    """Names of the equipped blocks, and gates (L, T, n, D), float64; spatial ones averaged over tokens."""
    gates: list[Tensor] = []

    def read(unit: nn.Module, args: Any, output: Any) -> None:
        gate = reduce(output[0].double(), "b n d -> b d", "mean")  # b is 1 if the gate is constant
        gates.append(gate.expand(len(subject.x0), -1).cpu())

    hooks = [unit.register_forward_hook(read) for unit in model.shared_unit.units]
    for _, t, x_t in subject.noisy:
        model(x_t, t, subject.labels)
    for hook in hooks:
        hook.remove()
    names = [list(blocks_of(model))[block] for block in sorted(model.shared_unit.route)]
    return names, rearrange(torch.stack(gates), "(t l) n d -> l t n d", t=len(subject.noisy))


def gate_statistics(gates: Tensor, unit: UnitConfig) -> dict[str, Tensor]:
    """(L, T) each, of gates (L, T, n, D); the ends are the lowest and highest 5% of the gate's range.

    That is 0 to 1; with tanh -1 to 1; with relu it has no upper end.
    """
    low, high = {"tanh": (-0.9, 0.9), "relu": (0.05, math.inf)}.get(unit.activation, (0.05, 0.95))
    return {
        "mean": gates.mean((-1, -2)),
        "spread over channels": gates.mean(-2).std(-1),
        "spread over images": gates.std(-2).mean(-1),
        "share at the low end": (gates < low).double().mean((-1, -2)),
        "share at the high end": (gates > high).double().mean((-1, -2)),
    }


def gates(subject: Subject) -> Found:
    """Mean, spread and saturation of the gates by block and timestep."""
    names, values = read_gates(subject.pipeline.unet, subject)
    statistics = gate_statistics(values, UnitConfig.of(subject.run.model["unit"]))
    figure = Figure(figsize=(17, 2.2 + 0.25 * len(names)), layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, len(statistics)), statistics.items(), strict=True):
        style = {"vmin": 0} if title.startswith("share") else {}
        heat_map(axes, table, names, [str(t) for t in subject.options.timesteps], title, **style)
        axes.set_xlabel("timestep")
    return {"blocks": names, **statistics}, figure


def both(gates: Tensor) -> dict[str, Tensor]:
    """Gates (L, T, n, D) as they are, and minus their mean over the images: what the image alone changes."""
    return {"gates": gates, "centred gates": gates - gates.mean(-2, keepdim=True)}


def pearson(gates: Tensor) -> Tensor:
    """Correlation over channels of all pairs of blocks, (L, ..., D) -> (L, L, ...); NaN for a flat gate."""
    z = gates - gates.mean(-1, keepdim=True)
    deviation = z.square().mean(-1, keepdim=True).sqrt()
    z = torch.where(deviation > NO_SPREAD, z / deviation, math.nan)
    return torch.einsum("i...d,j...d->ij...", z, z) / z.shape[-1]


def correlation(subject: Subject) -> Found:
    """Correlation of gates across blocks over inputs (Fig. 2); the control is the untrained model."""
    models = {"trained": subject.pipeline.unet, "untrained": subject.fresh()}
    figure, numbers = Figure(figsize=(15, 8), layout="constrained"), {}
    for (who, model), row in zip(models.items(), figure.subplots(2, 3), strict=True):
        names, values = read_gates(model, subject)
        for axes, (kind, x) in zip(row[:2], both(values).items(), strict=True):
            found = pearson(x).flatten(2)  # (L, L, inputs)
            pairs = found[torch.ones(found.shape[:2]).tril(-1).bool()]
            pairs, mean = pairs[pairs.isfinite()], found.nanmean(-1)
            spread = (found - mean[..., None]).square().nanmean(-1).sqrt()
            shares = {f"{q}%": pairs.quantile(q / 100).item() for q in (5, 25, 50, 75, 95) if len(pairs)}
            numbers[f"{who}, {kind}"] = {"mean": mean, "spread": spread, "all pairs and inputs": shares}
            heat_map(axes, mean, names, names, f"{who}, {kind}: mean over inputs", vmin=-1, cmap="RdBu_r")
            row[2].hist(pairs, bins=100, range=(-1, 1), density=len(pairs) > 0, alpha=0.6, label=kind)
        row[2].set(title=f"{who}: all pairs and inputs", xlabel="Pearson over channels", ylabel="density")
        row[2].set_xticks([-1, -0.5, 0, 0.5, 1])
        row[2].legend(loc="upper left")
    return {"blocks": names, **numbers}, figure


def forest_importance(gates: Tensor, seed: int, num_channels: int = 32) -> tuple[Tensor, Tensor]:
    """Gini importance (L, L) of block j for block i > j, and the forests' out-of-bag R² (L,); NaN elsewhere.

    gates: (L, inputs, D). A forest predicts a block's channels from those of all earlier blocks; importances
    add up over a block's channels, of which, to bound the time, at most `num_channels` take part.
    """
    channels = torch.from_numpy(numpy_generator(seed, Stream.ORDER, 0).permutation(gates.shape[-1]))
    x = gates[..., channels[:num_channels]].numpy()  # (L, inputs, C)
    found, r2 = torch.full((len(x), len(x)), math.nan), torch.full((len(x),), math.nan)
    options = {"max_features": 1 / 3, "min_samples_leaf": 3, "oob_score": True, "random_state": seed}
    for i in tqdm(range(1, len(x)), desc="forests", unit="block", leave=False):
        forest = RandomForestRegressor(100, **options, n_jobs=torch.get_num_threads())
        forest.fit(rearrange(x[:i], "l b c -> b (l c)"), x[i])
        found[i, :i] = torch.from_numpy(reduce(forest.feature_importances_, "(l c) -> l", "sum", l=i))
        r2[i] = forest.oob_score_
    return found, r2


def importance(subject: Subject) -> Found:
    """What random forests need of each earlier block's gate to predict a block's gate (Fig. 11)."""
    names, values = read_gates(subject.pipeline.unet, subject)
    figure, numbers = Figure(figsize=(14, 6), layout="constrained"), {}
    for axes, (kind, x) in zip(figure.subplots(1, 2), both(values).items(), strict=True):
        found, r2 = forest_importance(x.flatten(1, 2), subject.options.seed)
        numbers[kind] = {"importance": found, "out-of-bag R2": r2}
        rows = [f"{name} (R² {r2[i]:.2f})" if i else name for i, name in enumerate(names)]
        heat_map(axes, found, rows, names, kind, vmin=0)
        axes.set(xlabel="source block", ylabel="predicted block")
    return {"blocks": names, **numbers}, figure


def gradient_sizes(model: UViT, subject: Subject) -> dict[str, Tensor]:
    """|dL/d(block output)| of each block over the fixed inputs, in a row; L is the loss of one image."""
    blocks, outputs, pieces = blocks_of(model), [], []
    hooks = [b.register_forward_hook(lambda _, args, out: outputs.append(out[0])) for b in blocks.values()]
    for noise, t, x_t in subject.noisy:
        prediction = model(x_t, t, subject.labels).sample
        gamma, scheduler = subject.run.diffusion.min_snr_gamma, subject.pipeline.scheduler
        loss = denoising_loss(prediction, scheduler, gamma, subject.x0, noise, t)  # a mean over images
        grads = torch.autograd.grad(len(t) * loss, outputs)
        pieces.append([g.abs().flatten().cpu() for g in grads])
        outputs.clear()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(row) for name, row in zip(blocks, zip(*pieces, strict=True), strict=True)}


def distribution(sizes: Tensor) -> dict[str, Any]:
    """Mean, variance, share of zeros, and density over log10 of sizes (k,), by EDGES."""
    variance, mean = (x.item() for x in torch.var_mean(sizes.double(), correction=0))
    density = torch.histc(sizes[sizes > 0].log10(), len(EDGES) - 1, *EDGES[[0, -1]].tolist())
    density /= len(sizes) * (EDGES[1] - EDGES[0])
    return {"mean": mean, "variance": variance, "zeros": 1 - (sizes > 0).double().mean(), "density": density}


def gradients(subject: Subject) -> Found:
    """|dL/d(block output)| by stage (Fig. 13): trained, and untrained, also without skips or the unit."""
    models: dict[str, Any] = {"trained": None}
    for name, changes in {"untrained": {}, "no long skips": NO_SKIPS, "no residuals": NO_RESIDUALS}.items():
        models |= {name: changes, f"{name}, no unit": changes | {"unit": None}}
    figure, numbers = Figure(figsize=(18, 4.5), layout="constrained"), {}
    panels = figure.subplots(1, 4)
    for i, (name, changes) in enumerate(tqdm(models.items(), desc="gradients", unit="model", leave=False)):
        model = subject.pipeline.unet if changes is None else subject.fresh(**changes)
        sizes = gradient_sizes(model, subject)
        means = {block: x.mean().item() for block, x in sizes.items()}
        style = {"color": f"C{(i + 1) // 2}", "ls": "--" if "no unit" in name else "-", "label": name}
        panels[3].plot(list(means), list(means.values()), marker=".", **style)
        numbers[name] = {"mean by block": means}
        for axes, stage in zip(panels[:3], ("in", "mid", "out"), strict=True):
            found = distribution(torch.cat([x for block, x in sizes.items() if block.startswith(stage)]))
            numbers[name][stage] = found
            axes.plot(EDGES[1:], found["density"], **style)
            axes.set(title=f"{stage} blocks", xlabel="log10 |dL/d(output)|", ylabel="density", xlim=(-10, 0))
    panels[3].set(title="mean by block", yscale="log")
    panels[3].tick_params("x", rotation=90)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return {"log10 edges": EDGES, **numbers}, figure


def brief_training(subject: Subject, model: dict[str, Any]) -> Iterator[float | str]:
    """The losses of the run's recipe from its start, in float32; where it breaks, the reason comes last."""
    options, run, recipe = subject.options, subject.run, subject.run.train
    changes = {"num_steps": options.num_steps, "batch_size": options.batch_size, "num_accumulation_steps": 1}
    changes |= {"learning_rate": options.learning_rate or recipe.learning_rate, "decay": "none"}
    changes |= {"warmup_steps": min(recipe.warmup_steps, options.num_steps // 10)}  # or nothing else is seen
    recipe = replace(recipe, **changes, compile=False, log_every=1)  # a break shows at once
    state = trainer.build(recipe, run.diffusion, model, subject.accelerator)
    batches = Batches(subject.images, run.data, recipe.batch_size, recipe.seed, subject.accelerator.device)
    try:
        yield from (record.loss.item() for record in trainer.fit(state, batches))
    except trainer.TrainingDiverged as error:
        yield str(error)


def verdict(losses: list[float], why: str | None) -> dict[str, Any]:
    """Diverged: broken, or at the end (the mean of the last tenth) twice as bad as at the first step."""
    spikes = trainer.SpikeCounter()
    for loss in losses:
        spikes.add(loss)
    last = fmean(losses[-(1 + len(losses) // 10) :]) if losses else math.nan
    found = {"diverged": why is not None or last > 2 * losses[0], "why": why, "steps": len(losses)}
    return found | {"final loss": last, "spikes": spikes.count, "losses": losses}


def stability(subject: Subject) -> Found:
    """Brief trainings without norm or long skips, each with and without the unit (Table XVI, Fig. 14).

    They take turns, so that all have made as many steps when the time is up.
    """
    figure, numbers = Figure(figsize=(16, 4.5), layout="constrained"), {}
    variants = {"as configured": {}, "no norm": NO_NORM, "no long skips": NO_SKIPS}
    model, units = subject.run.model, {"with the unit": {}, "without": {"unit": None}}
    panels = zip(variants, figure.subplots(1, 3, sharex=True, sharey=True), strict=True)
    keys = [(variant, axes, unit) for variant, axes in panels for unit in units]
    trainings = [brief_training(subject, model | variants[v] | units[u]) for v, _, u in keys]
    items, end = [[] for _ in keys], time.monotonic() + subject.options.max_seconds
    for _ in tqdm(range(subject.options.num_steps), desc="brief trainings", unit="step", leave=False):
        for training, losses in zip(trainings, items, strict=True):
            losses.extend(islice(training, 1))
        if time.monotonic() > end:
            break
    subject.accelerator.free_memory()
    for (variant, axes, unit), losses in zip(keys, items, strict=True):
        why = losses.pop() if losses and isinstance(losses[-1], str) else None
        found = numbers.setdefault(variant, {})[unit] = verdict(losses, why)
        label = f"{unit}: {found['final loss']:.4g}, {found['spikes']} spikes"
        label += f", diverged in {len(losses)} steps" * found["diverged"]
        k = 1 + len(losses) // 30
        smooth = [fmean(losses[i - k : i]) for i in range(k, len(losses) + 1)]
        axes.plot(range(k, len(losses) + 1), smooth, label=label)
        axes.set(title=variant, xlabel="step", ylabel="loss, running mean", yscale="log")
        axes.legend()
        axes.label_outer()
    return numbers, figure


def heat_map(axes: Axes, x: Tensor, rows: list[str], columns: list[str], title: str, **style: Any) -> None:
    """Draw a table (rows, columns) with a colour bar, and numbers where they fit; NaN stays blank."""
    image = axes.imshow(x, aspect="auto", vmax=1 if "vmin" in style else None, **style)
    axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 6 else 0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(image, ax=axes)
    digits = 3 if x.nan_to_num().abs().max() < 0.1 else 2
    for i, j in x.isfinite().nonzero().tolist() if len(columns) <= 9 else []:
        colour = "white" if sum(image.to_rgba(x[i, j].item())[:3]) < 1.5 else "black"
        axes.text(j, i, f"{x[i, j]:.{digits}f}", ha="center", va="center", fontsize=8, color=colour)


ANALYSES = {f.__name__: f for f in (gates, correlation, importance, gradients, stability)}
