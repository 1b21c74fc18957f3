"""What the unit does in a trained run: numbers and pictures, after the figures of arXiv 2210.16101.

Gates are read before gate_scale, over a fixed batch of the run's training images at several timesteps:
(L, T, n, D) for L equipped blocks, T timesteps, n images, D channels. An analysis is a function of a Subject
that returns its numbers and its picture; `analyze` writes them.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
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
    max_seconds: float = 600.0  # stability: for all brief trainings together, in equal shares

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in ANALYSES:
                raise ConfigError("only", name, one_of(name, list(ANALYSES)))
        for name, least in {"num_images": 2, "num_steps": 1, "batch_size": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"{least} or more")

    @property
    def names(self) -> list[str]:
        return self.only.split(",") if self.only else list(ANALYSES)


class Subject(NamedTuple):
    """A trained run and the inputs it is looked at with."""

    config: AnalyzeConfig
    settings: Config  # the run's
    about: dict[str, Any]  # what its training.json says
    accelerator: Accelerator
    pipeline: UViTPipeline  # with the averaged weights
    images: ImageSet
    x0: Tensor  # (n, C, H, W)
    labels: Tensor | None  # (n,)
    noisy: list[tuple[Tensor, Tensor, Tensor]]  # noise, t (n,) and x_t of x0, a timestep each

    def fresh(self, **changes: Any) -> UViT:
        """The run's model, some arguments changed, as the seed makes it; batch norms read the batch."""
        torch.manual_seed(self.config.seed)
        return UViT(**self.settings.model | changes).to(self.accelerator.device).train()


def load_subject(root: Path, settings: AnalyzeConfig, accelerator: Accelerator) -> Subject:
    """A run and its fixed inputs; UserError or ConfigError where it can't be analysed."""
    if not RunFolder(root).config.is_file():
        raise UserError(f"{root}: no run, as it has no config.yaml")
    run = load(RunFolder(root).config)
    if run.model["unit"] is None:
        raise UserError(f"{root}: the run has no attention unit (model.unit is null), so no gates to analyse")
    last = run.diffusion.num_train_timesteps - 1
    if not settings.timesteps or not all(0 <= t <= last for t in settings.timesteps):
        raise ConfigError("timesteps", settings.timesteps, f"numbers from 0 to {last}")
    pipeline, about = load_pipeline(str(root), accelerator.device)
    model = pipeline.unet.config
    images = load_images(run.data, "train", model.sample_size, model.in_channels)
    batches = Batches(images, run.data, settings.num_images, settings.seed, accelerator.device)
    batch = next(batches.from_step(0))
    x0, noisy = batch.images, []
    for t in settings.timesteps:
        generator = torch_generator(settings.seed, Stream.NOISE, t, x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        steps = torch.full((len(x0),), t, device=x0.device)
        noisy.append((noise, steps, pipeline.scheduler.add_noise(x0, noise, steps)))
    labels = None if model.num_classes is None else batch.labels
    return Subject(settings, run, about, accelerator, pipeline, images, x0, labels, noisy)


def analyze(root: Path, settings: AnalyzeConfig, accelerator: Accelerator) -> Iterator[Path]:
    """Write RUN/analysis/<name>.json and .png for the analyses that the settings name; yields each path."""
    subject = load_subject(root, settings, accelerator)
    (root / "analysis").mkdir(exist_ok=True)
    for name in settings.names:
        numbers, figure = ANALYSES[name](subject)
        about = {"run": str(root), **subject.about, "unit": subject.settings.model["unit"]}
        about |= {"images": settings.num_images, "timesteps": settings.timesteps, "seed": settings.seed}
        figure.suptitle(f"{root.name}, step {subject.about.get('step', '?')}: {name}")
        target = root / "analysis" / f"{name}.json"
        target.write_text(json.dumps(jsonable({"about": about, **numbers}), indent=1) + "\n")
        figure.savefig(target.with_suffix(".png"), dpi=110)
        yield from (target, target.with_suffix(".png"))


def jsonable(value: Any) -> Any:
    """Tensors as lists, floats of six digits, and null for what is not finite, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | Tensor):
        return [jsonable(item) for item in (value.tolist() if isinstance(value, Tensor) else value)]
    return (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value


def blocks_of(model: UViT) -> dict[str, nn.Module]:
    """Blocks by name in the order of the forward pass: in 0, in 1, ..., mid, out 0, ..."""
    ins, outs = ({f"{s} {i}": b for i, b in enumerate(getattr(model, f"{s}_blocks"))} for s in ("in", "out"))
    return ins | {"mid": model.mid_block} | outs


@torch.no_grad()
def read_gates(model: UViT, subject: Subject) -> tuple[list[str], Tensor]:
    """Names of the equipped blocks, and gates (L, T, n, D), float64; spatial ones averaged over tokens."""
    every, gates = list(blocks_of(model)), []

    def read(unit: nn.Module, args: Any, output: Any) -> None:
        gate = reduce(output[0].double(), "b n d -> b d", "mean")  # b is 1 if the gate is constant
        gates.append(gate.expand(len(subject.x0), -1).cpu())

    hooks = [unit.register_forward_hook(read) for unit in model.shared_unit.units]
    for _, t, x_t in subject.noisy:
        model(x_t, t, subject.labels)
    for hook in hooks:
        hook.remove()
    names = [every[block] for block in sorted(model.shared_unit.route)]
    return names, rearrange(torch.stack(gates), "(t l) n d -> l t n d", t=len(subject.noisy))


def gate_statistics(gates: Tensor, unit: UnitConfig) -> dict[str, Tensor]:
    """(L, T) each, of gates (L, T, n, D). Saturated: in the lowest or the highest 5% of the gate's range.

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
    statistics = gate_statistics(values, UnitConfig.of(subject.settings.model["unit"]))
    figure = Figure(figsize=(17, 2.2 + 0.25 * len(names)), layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, len(statistics)), statistics.items(), strict=True):
        heat_map(axes, table, names, [str(t) for t in subject.config.timesteps], title)
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
            pairs = found[torch.ones(found.shape[:2]).tril(-1).bool()]  # (pairs, inputs)
            pairs, mean = pairs[pairs.isfinite()], found.nanmean(-1)
            spread = (found - mean[..., None]).square().nanmean(-1).sqrt()
            shares = {f"{q}%": pairs.quantile(q / 100).item() for q in (5, 25, 50, 75, 95) if len(pairs)}
            numbers[f"{who}, {kind}"] = {"mean": mean, "spread": spread, "all pairs and inputs": shares}
            heat_map(axes, mean, names, names, f"{who}, {kind}: mean over inputs", signed=True)
            row[2].hist(pairs, bins=100, range=(-1, 1), density=True, alpha=0.6, label=kind)
        row[2].set(title=f"{who}: all pairs and inputs", xlabel="Pearson over channels", ylabel="density")
        row[2].legend(loc="upper left")
    return {"blocks": names, **numbers}, figure


def forest_importance(gates: Tensor, seed: int, num_channels: int = 32) -> tuple[Tensor, Tensor]:
    """Gini importance (L, L) of block j for block i > j, and the forests' out-of-bag R² (L,); NaN elsewhere.

    gates: (L, inputs, D). A forest predicts a block's channels from those of all earlier blocks; importances
    add up over a block's channels, of which, to bound the time, at most `num_channels` take part.
    """
    num_blocks, _, dim = gates.shape
    channels = numpy_generator(seed, Stream.ORDER, 0).permutation(dim)[:num_channels]
    x = gates[:, :, torch.from_numpy(channels)].numpy()  # (L, inputs, C)
    found, r2 = torch.full((num_blocks, num_blocks), math.nan), torch.full((num_blocks,), math.nan)
    options = {"max_features": 1 / 3, "min_samples_leaf": 3, "oob_score": True, "random_state": seed}
    for i in tqdm(range(1, num_blocks), desc="forests", unit="block", leave=False):
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
        found, r2 = forest_importance(x.flatten(1, 2), subject.config.seed)
        numbers[kind] = {"importance": found, "out-of-bag R2": r2}
        rows = [f"{name} (R² {score:.2f})" for name, score in zip(names, r2.tolist(), strict=True)]
        heat_map(axes, found[1:, :-1], rows[1:], names[:-1], kind)
        axes.set(xlabel="source block", ylabel="predicted block")
    return {"blocks": names, **numbers}, figure


def tally(g: Tensor) -> Tensor:
    """Of |g|: count, sum, sum of squares, zeros, then a histogram over EDGES; tallies add up. float64."""
    a = g.detach().flatten().abs().double()
    first = torch.stack([a.new_tensor(len(a)), a.sum(), a.square().sum(), (a == 0).sum()])
    return torch.cat([first, torch.histc(a.log10(), len(EDGES) - 1, *EDGES[[0, -1]].tolist())]).cpu()


def moments(tallied: Tensor) -> dict[str, Any]:
    """Mean, variance, share of zeros, and density over log10 |g| (EDGES)."""
    (total, squares, zeros), density = (tallied[1:4] / tallied[0]).tolist(), 10 * tallied[4:] / tallied[0]
    return {"mean": total, "variance": squares - total**2, "zeros": zeros, "density": density}


def gradient_tallies(model: UViT, subject: Subject) -> dict[str, Tensor]:
    """The tally of |dL/d(block output)| of each block over the fixed inputs; L is the loss of one image."""
    tallies = dict.fromkeys(blocks_of(model), torch.zeros(3 + len(EDGES)).double())

    def add(g: Tensor, name: str) -> None:
        tallies[name] = tallies[name] + tally(g)

    def watch(block: nn.Module, args: Any, output: Any, name: str) -> None:
        output[0].register_hook(partial(add, name=name))

    hooks = [b.register_forward_hook(partial(watch, name=n)) for n, b in blocks_of(model).items()]
    gamma = subject.settings.diffusion.min_snr_gamma
    for noise, t, x_t in subject.noisy:
        prediction = model(x_t, t, subject.labels).sample
        loss = denoising_loss(prediction, subject.pipeline.scheduler, gamma, subject.x0, noise, t)
        (len(t) * loss).backward()  # a sum over images, which do not see each other
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return tallies


def gradients(subject: Subject) -> Found:
    """|dL/d(block output)| by stage (Fig. 13): trained, and untrained, also without skips or the unit."""
    models = {"trained": lambda: subject.pipeline.unet}
    for name, changes in {"untrained": {}, "no long skips": NO_SKIPS, "no residuals": NO_RESIDUALS}.items():
        models[name] = partial(subject.fresh, **changes)
        models[f"{name}, no unit"] = partial(subject.fresh, **changes, unit=None)
    figure, numbers = Figure(figsize=(18, 4.5), layout="constrained"), {}
    panels = figure.subplots(1, 4)
    for i, (name, make) in enumerate(tqdm(models.items(), desc="gradients", unit="model", leave=False)):
        tallies = gradient_tallies(make(), subject)
        style = {"color": f"C{(i + 1) // 2}", "ls": "--" if "no unit" in name else "-", "label": name}
        numbers[name] = {"mean by block": {block: moments(t)["mean"] for block, t in tallies.items()}}
        panels[3].plot(list(tallies), list(numbers[name]["mean by block"].values()), marker=".", **style)
        for axes, stage in zip(panels[:3], ("in", "mid", "out"), strict=True):
            found = moments(sum(t for block, t in tallies.items() if block.split()[0] == stage))
            numbers[name][stage] = found
            axes.plot(EDGES[:-1] + 0.05, found["density"], **style)
            axes.set(title=stage, xlabel="log10 |dL/d(block output)|", ylabel="density", xlim=(-9, 1))
    panels[3].set(title="mean by block", yscale="log")
    panels[3].tick_params("x", rotation=90)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return {"log10 edges": EDGES, **numbers}, figure


def brief_training(
    subject: Subject, model: dict[str, Any], batches: Batches, seconds: float
) -> dict[str, Any]:
    """The run's recipe from its start in float32, warmed up for a tenth of the steps at most, not decayed.

    Diverged: a loss or gradient that is not finite, or twice the first loss at the end (its last tenth).
    """
    recipe, num_steps = subject.settings.train, subject.config.num_steps
    shape = {"num_steps": num_steps, "batch_size": batches.batch_size, "num_accumulation_steps": 1}
    shape |= {"warmup_steps": min(recipe.warmup_steps, num_steps // 10), "decay": "none"}
    recipe = replace(recipe, **shape, compile=False, log_every=10)
    state = trainer.build(recipe, subject.settings.diffusion, model, subject.accelerator)
    losses, why, spikes, deadline = [], None, trainer.SpikeCounter(), time.perf_counter() + seconds
    try:
        for record in trainer.fit(state, batches):
            losses.append(record.loss.item())
            if time.perf_counter() > deadline:
                break
    except trainer.TrainingDiverged as error:
        why = str(error)
    subject.accelerator.free_memory()
    finite = [loss for loss in losses if math.isfinite(loss)]
    last = finite[-max(1, len(finite) // 10) :]
    final = sum(last) / len(last) if last else math.nan
    for loss in finite:
        spikes.add(loss)
    found = {"diverged": bool(why) or final > 2 * losses[0], "why": why, "steps": len(losses)}
    return found | {"final loss": final, "spikes": spikes.count, "losses": losses}


def stability(subject: Subject) -> Found:
    """Brief trainings without norm or long skips, each with and without the unit (Table XVI, Fig. 14)."""
    run, seconds = subject.settings, subject.config.max_seconds / 6
    device = subject.accelerator.device
    batches = Batches(subject.images, run.data, subject.config.batch_size, run.train.seed, device)
    figure, numbers = Figure(figsize=(15, 4.5), layout="constrained"), {}
    variants = {"as it was": {}, "no norm": NO_NORM, "no long skips": NO_SKIPS}
    with tqdm(total=6, desc="brief trainings", unit="run", leave=False) as bar:
        for axes, (variant, changes) in zip(figure.subplots(1, 3), variants.items(), strict=True):
            numbers[variant] = {}
            for who, model in {"with the unit": run.model, "without": run.model | {"unit": None}}.items():
                found = brief_training(subject, model | changes, batches, seconds)
                numbers[variant][who] = found
                score = f"{found['final loss']:.3f}, {found['spikes']} spikes"
                verdict = f"diverged ({found['why'] or score})" if found["diverged"] else score
                axes.plot(range(1, found["steps"] + 1), found["losses"], label=f"{who}: {verdict}")
                bar.update()
            axes.set(title=variant, xlabel="step", ylabel="loss", yscale="log")
            axes.legend()
    return numbers, figure


def heat_map(
    axes: Axes, table: Tensor, rows: list[str], columns: list[str], title: str, signed: bool = False
) -> None:
    """Draw table (rows, columns) with its names, a colour bar, and numbers where they fit; NaN stays blank.

    Signed: colours from -1 to 1.
    """
    colours = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if signed else {}
    image = axes.imshow(table, **colours, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 6 else 0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(image, ax=axes)
    for i, j in table.isfinite().nonzero().tolist() if len(columns) <= 9 else []:
        dark = torch.tensor(image.to_rgba(table[i, j].item())[:3]).mean() < 0.5
        colour = "white" if dark else "black"
        axes.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)


ANALYSES = {f.__name__: f for f in (gates, correlation, importance, gradients, stability)}
