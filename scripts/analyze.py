"""Look into a trained run's attention unit: python scripts/analyze.py RUN --only "[gates,correlation]".

Writes RUN/analysis/<name>.json, the numbers, and <name>.png, the picture, of: gates, correlation, importance,
gradients, stability (brief trainings, the slow one).
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import seaborn as sns
import torch
from accelerate import Accelerator
from analysis import ANALYSES, EDGES, AnalyzeConfig, Numbers, Subject, variants
from exit_codes import leave
from matplotlib.figure import Figure
from run_config import Parser, make_accelerator
from torch import Tensor
from tqdm import tqdm

from uvit_dia.data import Batches
from uvit_dia.trainer import TrainingDiverged, build, fit


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_settings(AnalyzeConfig)
    given = parser.parse_args().as_dict()
    root = Path(given.pop("run"))
    for path in analyze(root, AnalyzeConfig(**given), make_accelerator("fp32")):
        print(path, flush=True)
    return 0


def analyze(root: Path, options: AnalyzeConfig, accelerator: Accelerator) -> Iterator[Path]:
    """Write RUN/analysis/<name>.json and .png for each analysis that is asked for; yields each path."""
    subject = Subject(root, options, accelerator)
    about = {**subject.about, "run": str(root), "analysis": asdict(options)}
    (root / "analysis").mkdir(exist_ok=True)
    for name in options.only:
        numbers = (stability if name == "stability" else ANALYSES[name])(subject)
        figure = draw(name, numbers, [f"t = {t}" for t in options.timesteps])
        text = json.dumps({"about": about, **numbers}, default=Tensor.tolist)
        without_nan = json.loads(text, parse_constant=lambda constant: None)  # which JSON has not
        target = root / "analysis" / f"{name}.json"
        target.write_text(json.dumps(without_nan, indent=1) + "\n")
        figure.suptitle(f"{root.name}, step {subject.about.get('step', '?')}: {name}")
        figure.savefig(target.with_suffix(".png"), dpi=110, bbox_inches="tight")
        yield from (target, target.with_suffix(".png"))


def brief_training(subject: Subject, changes: dict[str, Any]) -> list[float]:
    """The losses of the run's recipe from its start, in float32; NaN comes last if it broke."""
    run, num_steps = subject.run, subject.options.num_steps
    warmup = min(run.train.warmup_steps, num_steps // 10)  # or nothing else is seen
    recipe = replace(run.train, num_steps=num_steps, warmup_steps=warmup, compile=False)
    state = build(recipe, run.diffusion, run.model | changes, subject.accelerator)
    batches = Batches(subject.images, run.data, recipe.batch_size, recipe.seed, subject.accelerator.device)
    losses = []
    with suppress(TrainingDiverged):
        for record in fit(state, batches):
            losses.append(record.loss.item())
    subject.accelerator.free_memory()
    return losses if len(losses) == num_steps else [*losses, math.nan]


def verdict(losses: list[float]) -> dict[str, Any]:
    """Diverged: broken, or at the end (the mean of the last tenth) twice as bad as at the first step."""
    final = torch.tensor(losses[-(1 + len(losses) // 10) :]).mean().item()
    return {"diverged": not final <= 2 * losses[0], "final loss": final, "losses": losses}


def stability(subject: Subject) -> Numbers:
    """Brief trainings without norm or long skips, each with and without the unit (Table XVI, Fig. 14)."""
    trainings = tqdm(variants("block_norm", "long_skips").items(), "trainings")
    return {name: verdict(brief_training(subject, changes)) for name, changes in trainings}


def draw(name: str, numbers: Numbers, timesteps: list[str]) -> Figure:
    """The picture of an analysis."""
    blocks = numbers.get("blocks", [])
    tables = {title: table for title, table in numbers.items() if title not in ("blocks", "log10 edges")}
    match name:
        case "gates":
            return heat_maps(tables, blocks, timesteps, 4)
        case "correlation":
            return heat_maps(tables, blocks, blocks, 3, vmin=-1, vmax=1, cmap="RdBu_r")
        case "importance":
            tables = {"of column for row": numbers["importance"]}
            return heat_maps(tables, blocks, blocks, 1, vmin=0, vmax=1)
        case "gradients":
            return gradient_curves(
                {title: found for title, found in numbers.items() if title != "log10 edges"}
            )
        case _:
            return loss_curves(numbers)


def heat_maps(tables: dict[str, Tensor], rows: list, columns: list, width: int, **style: Any) -> Figure:
    """A picture of tables (rows, columns), `width` of them abreast; NaN stays blank."""
    height = len(tables) // width
    size = (width * (2 + 0.3 * len(columns)), height * (2 + 0.25 * len(rows)))  # inches
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(height, width, squeeze=False).flat
    for axes, (title, table) in zip(panels, tables.items(), strict=True):
        sns.heatmap(table, xticklabels=columns, yticklabels=rows, ax=axes, **style).set_title(title)
    return figure


def gradient_curves(models: Numbers) -> Figure:
    """The distributions of gradients by stage, a line a model."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    for i, (name, stages) in enumerate(models.items()):
        for axes, (stage, found) in zip(panels, stages.items(), strict=True):
            axes.plot(EDGES[1:], found["shares"], f"C{i % 3}", ls=("-", "--", ":")[i // 3], label=name)
            axes.set(title=f"{stage} blocks", xlabel="log10 |dL/d(output)|", ylabel="share", xlim=(-10, 0))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def loss_curves(trainings: Numbers) -> Figure:
    """The losses of brief trainings: a panel an ablation, with and without the unit."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for i, (name, found) in enumerate(trainings.items()):
        panels[i % 3].plot(found["losses"], lw=0.8, label=f"{name}, diverged: {found['diverged']}")
        panels[i % 3].set(xlabel="step", ylabel="loss", yscale="log")
        panels[i % 3].legend()
    return figure


if __name__ == "__main__":
    leave(main)
