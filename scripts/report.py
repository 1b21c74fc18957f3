"""Write the report.html of a run or of a grid of runs: python scripts/report.py RUN_OR_GRID.

It is one self-contained file; report.md is the same in Markdown, and report.csv has the numbers of a grid.
The words are in uvit_dia/templates: a page is written as Markdown, of which the HTML is made.
"""

import base64
import re
import shutil
from pathlib import Path
from typing import Any

import jinja2
import markdown
import pandas as pd
import seaborn as sns
from exit_codes import leave
from experiments import Run, read_grid, significance
from markupsafe import Markup
from matplotlib.figure import Figure
from run_config import Parser
from run_folder import RunFolder

from uvit_dia import evaluation
from uvit_dia.errors import UserError
from uvit_dia.trainer import SpikeCounter

SEED = "train.seed"  # runs that differ in it alone are repeats of one another, and make a cell
LOGGED = "step images loss grad_norm lr spikes images_per_second memory_gib".split()
OF_A_RUN = dict.fromkeys(LOGGED, "last") | {"images_per_second": "median"}  # as starting is slow


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run's folder, or the grid's")
    print(write_page(Path(parser.parse_args().run)))


def write_page(root: Path) -> Path:
    """Write report.md, figures/ and report.html, which is returned, into the folder of a run or a grid.

    UserError where the folder is neither, or where cards of the grid do not compare.
    """
    template, context = ("grid", grid_context) if (root / "grid.yaml").is_file() else ("run", run_context)
    facts = context(root) | {"title": root.resolve().name, "spike_rule": SpikeCounter.__doc__}
    options = dict(autoescape=True, finalize=literal, trim_blocks=True, lstrip_blocks=True)
    words = jinja2.Environment(loader=jinja2.PackageLoader("uvit_dia"), **options)
    text = words.get_template(f"{template}.md").render(facts)
    (root / "report.md").write_text(text)
    body = markdown.markdown(text, extensions=["tables"])
    for picture in re.findall(r'src="([^"]+\.png)"', body):
        encoded = base64.b64encode((root / picture).read_bytes()).decode()
        body = body.replace(f'src="{picture}"', f'src="data:image/png;base64,{encoded}"')
    page = root / "report.html"
    page.write_text(words.get_template("page.html").render(facts, body=Markup(body)))
    return page


def literal(value: Any) -> Markup:
    """A value in a template, as it reads both in Markdown and in HTML; what is marked safe stays."""
    escaped = re.sub(r"[&<>|*`\[\]]", lambda found: f"&#{ord(found[0])};", str(value))
    return value if isinstance(value, Markup) else Markup(escaped)


def run_context(root: Path) -> dict[str, Any]:
    """What run.md tells of a run; writes its figure. UserError where the folder holds no run."""
    folder = RunFolder(root)
    if not folder.config.is_file():
        raise UserError(f"{root}: no run, as it has no config.yaml")
    (root / "figures").mkdir(exist_ok=True)
    if records := folder.read_metrics():
        lines = pd.DataFrame(records).assign(run=root.name, series=root.name)
        save(root, "curves", curves(lines, [root.name], "loss", "grad_norm", "lr"))
    cards = [path.read_text() for path in sorted(folder.evaluation.glob("step_*.md"))]
    grids = sorted(folder.samples.glob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True)
    return {"records": records, "grids": grids[:2], "cards": cards, "config": folder.config}


def grid_context(root: Path) -> dict[str, Any]:
    """What grid.md tells of a grid; writes its figures and report.csv."""
    facts, runs = read_grid(root)
    cards = [card for run in runs if (card := run.card())]
    evaluation.check_comparable(cards)
    (root / "figures").mkdir(exist_ok=True)
    frame, lines = outcomes(runs)
    frame.to_csv(root / "report.csv")
    axes = [axis for axis in runs[0].labels if axis != SEED]
    heads = [axis.split(".")[-1].replace("_", " ") for axis in axes] or ["runs"]
    cells = dict(iter(frame.groupby(axes or ["series"], sort=False)))
    metrics = [key for key in evaluation.LABELS if key in frame]
    metrics.sort(key=lambda key: key != cards[0]["headline"])
    training, previews, names = {}, {}, frame["series"].unique().tolist()
    for x, found in lines.groupby("x", sort=False):
        training[x] = save(root, f"curves {x}", curves(found, names, "loss", "grad_norm"))
    for one in runs:
        if newest := max(one.folder.samples.glob("step_*.png"), default=None):
            previews[one.name] = shutil.copy(newest, root / "figures" / f"{one.name}.png").name
    return {
        "facts": facts, "frame": frame, "heads": heads, "cells": cells, "cards": cards,
        "training": training, "previews": previews, "labels": evaluation.LABELS,
        "num_seeds": min(cell["state"].eq("scored").sum() for cell in cells.values()),
        "pictures": {key: save(root, key, scores(frame, key, "".join(heads[1:2]))) for key in metrics},
        "tests": {key: significance(cells, key) for key in metrics},
    }  # fmt: skip


def outcomes(runs: list[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a run: how it ended, its labels, scores and logged numbers; and a row a record of every run.

    `series`: the label on the first axis (and on a third); `x`: on the second.
    """
    rows = []
    for one in runs:
        card, labels = one.card(), [label for axis, label in one.labels.items() if axis != SEED] or ["all"]
        row = {"run": one.name, "state": "scored" if card else last_words(one), **one.labels}
        row |= {"series": " ".join(labels[:1] + labels[2:]), "x": "".join(labels[1:2])}
        row |= {"seed": one.labels.get(SEED, ""), "card": one.card_path.name}
        rows.append(row | {"broken": int("not finite" in row["state"])} | (card["metrics"] if card else {}))
    records = [{"run": one.name} | record for one in runs for record in one.folder.read_metrics()]
    lines = pd.DataFrame(records, columns=["run", *LOGGED])
    frame = pd.DataFrame(rows).set_index("run").join(lines.groupby("run").agg(OF_A_RUN))
    return frame, lines.join(frame[["series", "x"]], on="run")


def last_words(one: Run) -> str:
    """What the log of its processes, which compare.py keeps, says of how it ended: the error or last line."""
    log = one.folder.root / "log.txt"
    text = log.read_text(errors="replace").strip() if log.is_file() else ""
    errors = re.findall(r"\w*error: .+", text, re.IGNORECASE)  # a progress bar may stand before it
    return (errors or text.splitlines() or ["not started"])[-1]


def scores(frame: pd.DataFrame, metric: str, x_name: str) -> Figure:
    """A score against x, a colour and marker a series: the mean, its standard deviation, a dot a seed."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    panel, n = figure.subplots(), frame["series"].nunique()
    look = dict(data=frame, x="x", y=metric, hue="series", palette="colorblind", ax=panel)
    style = dict(markers=list(("osD^vPX" * n)[:n]), dodge=0.8 - 0.8 / n)  # over stripplot's dots
    sns.pointplot(**look, **style, errorbar="sd", capsize=0.05, linewidth=1.5)
    sns.stripplot(**look, dodge=True, jitter=False, size=4, alpha=0.6, legend=False)
    panel.set(xlabel=x_name, ylabel=evaluation.LABELS[metric])
    panel.grid(axis="y", alpha=0.3)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return figure


def curves(lines: pd.DataFrame, names: list[str], *keys: str) -> Figure:
    """Logged numbers over images, a colour a series: its mean over runs, and each run thin."""
    figure = Figure(figsize=(6, 1 + 2.6 * len(keys)), layout="constrained")
    look = dict(data=lines, x="images", hue="series", hue_order=names, palette="colorblind")
    for panel, key in zip(figure.subplots(len(keys), sharex=True), keys, strict=True):
        sns.lineplot(**look, y=key, ax=panel, units="run", estimator=None, lw=0.5, alpha=0.4, legend=False)
        style = dict(style="series", style_order=names, errorbar=None, legend=key == keys[-1])
        sns.lineplot(**look, **style, y=key, ax=panel)
        panel.set(ylabel=key.replace("_", " "), yscale="linear" if key == "lr" else "log")
        panel.grid(alpha=0.3)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def save(root: Path, name: str, figure: Figure) -> str:
    """Write a figure of the page; returns its name among them."""
    path = root / "figures" / (re.sub(r"[^\w.]+", "_", name.strip()) + ".png")
    figure.savefig(path, dpi=150)
    return path.name


if __name__ == "__main__":
    leave(main)
