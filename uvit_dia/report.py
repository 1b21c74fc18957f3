"""Pages about a run or a grid of runs: one self-contained HTML file, the same in Markdown, a grid in CSV too.

The words are in templates/: a page is written as Markdown, of which the HTML is made.
"""

import base64
import json
import math
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import markdown
import pandas as pd
import seaborn as sns
from markupsafe import Markup
from matplotlib.figure import Figure
from scipy.stats import ttest_ind, ttest_rel

from uvit_dia import evaluation
from uvit_dia.checkpoint import RunFolder
from uvit_dia.errors import UserError
from uvit_dia.experiments import Run, read_grid
from uvit_dia.trainer import SpikeCounter

MARKERS = "osD^vPX"
SEED = "train.seed"  # runs that differ in it alone are repeats of one another, and make a cell
NUMBERS = ["images", "spikes", "broken", "images_per_second", "memory_gib"]  # that tables show, had or not
Cells = dict[tuple[str, ...], pd.DataFrame]  # rows of `outcomes`, by series (and x)


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

    def inline(found: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((root / found[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="([^"]+\.png)"', inline, markdown.markdown(text, extensions=["tables"]))
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
        save(root, "curves", curves(lines, [root.name], ("loss", "grad_norm", "lr")))
    cards = [json.loads(path.read_text()) for path in sorted(folder.evaluation.glob("step_*.json"))]
    grids = sorted(folder.samples.glob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True)
    texts = [Markup(evaluation.markdown(card).replace("# ", "## ", 1)) for card in cards]
    return {"records": records, "grids": grids[:2], "cards": texts, "config": folder.config}


def grid_context(root: Path) -> dict[str, Any]:
    """What grid.md tells of a grid; writes its figures and report.csv."""
    facts, runs = read_grid(root)
    evaluation.check_comparable(cards := [card for run in runs if (card := run.card())])
    (root / "figures").mkdir(exist_ok=True)
    metrics = [key for key in evaluation.LABELS if cards and key in cards[0]["metrics"]]
    metrics.sort(key=lambda key: key != cards[0]["headline"])
    frame = outcomes(runs)
    frame.to_csv(root / "report.csv")
    axes = [axis.split(".")[-1].replace("_", " ") for axis in runs[0].labels if axis != SEED]
    columns = {"series": ", ".join(axes[:1] + axes[2:]) or "runs"} | ({"x": axes[1]} if axes[1:] else {})
    cells = dict(iter(frame.groupby(list(columns), sort=False)))
    lines = pd.DataFrame(
        {"run": run.name, "series": frame.series[run.name], "x": frame.x[run.name]} | record
        for run in runs
        for record in run.folder.read_metrics()
    )
    names = list(frame["series"].unique())
    return {
        "facts": facts, "columns": columns, "cells": cells, "frame": frame,
        "card": next(iter(cards), None), "num_scored": len(cards),
        "num_seeds": min(cell[metrics[0]].count() for cell in cells.values()) if metrics else 0,
        "labels": {key: evaluation.LABELS[key] for key in metrics},
        "pictures": {key: save(root, key, scores(frame, key, columns.get("x", ""))) for key in metrics},
        "tests": {key: significance(cells, key) for key in metrics},
        "training": {
            x: save(root, f"curves {x}", curves(found, names, ("loss", "grad_norm")))
            for x, found in (lines.groupby("x", sort=False) if len(lines) else ())
        },
        "previews": {
            run.name: shutil.copy(newest, root / "figures" / f"{run.name}.png").name
            for run in runs if (newest := max(run.folder.samples.glob("step_*.png"), default=None))
        },
        "summary": summary,
    }  # fmt: skip


def outcomes(runs: Sequence[Run]) -> pd.DataFrame:
    """A row a run: how it ended, its labels, its numbers (those of its last record, and its scores).

    `series`: the label on the first axis (and on a third); `x`: on the second; `baseline`: the series that
    has the first axis's first value. A run's speed is the median, as starting is slow.
    """
    rows = []
    for run in runs:
        card, records = run.card(), run.folder.read_metrics()
        labels = [label for axis, label in run.labels.items() if axis != SEED]
        first = [label for axis, label in runs[0].labels.items() if axis != SEED][:1]
        row = {"run": run.name, "state": "scored" if card else run.last_words(), **run.labels}
        row |= {"seed": run.labels.get(SEED, ""), "x": "".join(labels[1:2])}
        row |= {"series": " ".join(labels[:1] + labels[2:]), "baseline": " ".join(first + labels[2:])}
        row |= {"card": run.card_path.name, "broken": int(not card and "not finite" in row["state"])}
        if records:
            row |= records[-1] | {"images_per_second": median(r["images_per_second"] for r in records)}
        rows.append(row | (card["metrics"] if card else {}))
    frame = pd.DataFrame(rows).set_index("run")
    return frame.reindex(columns=list(dict.fromkeys([*frame, *NUMBERS])))


def summary(values: pd.Series) -> str:
    """The mean over seeds, and their standard deviation."""
    spread = f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{values.std():.2g}" if values.count() > 1 else ""
    return f"{values.mean():.4g}{spread}" if values.count() else "-"


def significance(cells: Cells, metric: str) -> list[dict[str, Any]]:
    """Each cell against its baseline, at the same x, over the seeds that both have.

    "paired": p of the t-test by seed, which fixes the data's order and the noise whatever the unit; "holm":
    that, corrected for all these tests; "two_sample": p of the t-test that ignores pairs. nan: too few seeds.
    """
    tests = []
    for key, cell in cells.items():
        base = cells.get((cell["baseline"].iloc[0], *key[1:]))
        if base is None or base is cell:
            continue
        sides = [side.set_index("seed")[metric] for side in (cell, base)]
        pairs = pd.concat(sides, axis=1, join="inner").dropna().to_numpy().T  # (2, n)
        if not pairs.size:
            continue
        with warnings.catch_warnings(action="ignore"):  # nan says it
            p = {"paired": ttest_rel(*pairs).pvalue, "two_sample": ttest_ind(*pairs).pvalue}
        difference = float((pairs[0] - pairs[1]).mean())
        tests.append({"key": key, "n": pairs.shape[1], "difference": difference, **p})
    for test, p in zip(tests, holm([test["paired"] for test in tests]), strict=True):
        test["holm"] = p
    return tests


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979); nan is no test, and stays."""
    made = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, largest = list(p), 0.0
    for rank, (value, i) in enumerate(made):
        adjusted[i] = largest = max(largest, min(1.0, value * (len(made) - rank)))
    return adjusted


def scores(frame: pd.DataFrame, metric: str, x_name: str) -> Figure:
    """A score against x, a colour and marker a series: the mean, its standard deviation, a dot a seed."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    panel, n = figure.subplots(), frame["series"].nunique()
    look = dict(data=frame, x="x", y=metric, hue="series", palette="colorblind", ax=panel)
    markers = [MARKERS[i % len(MARKERS)] for i in range(n)]
    abreast = 0.8 - 0.8 / n  # as stripplot does
    sns.pointplot(**look, errorbar="sd", capsize=0.05, dodge=abreast, markers=markers, linewidth=1.5)
    sns.stripplot(**look, dodge=True, jitter=False, size=4, alpha=0.6, legend=False)
    panel.set(xlabel=x_name, ylabel=evaluation.LABELS[metric])
    panel.grid(axis="y", alpha=0.3)
    sns.move_legend(panel, "upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, title=None)
    return figure


def curves(lines: pd.DataFrame, names: Sequence[str], keys: Sequence[str]) -> Figure:
    """Logged numbers over images, a colour a series: its mean over runs, and each run thin."""
    figure = Figure(figsize=(6, 1 + 2.6 * len(keys)), layout="constrained")
    for panel, key in zip(figure.subplots(len(keys), sharex=True), keys, strict=True):
        look = dict(data=lines, x="images", y=key, hue="series", hue_order=names, palette="colorblind")
        look["ax"] = panel
        sns.lineplot(**look, units="run", estimator=None, lw=0.5, alpha=0.4, legend=False)
        sns.lineplot(**look, style="series", style_order=names, errorbar=None)
        panel.set(ylabel=key.replace("_", " "), yscale="linear" if key == "lr" else "log")
        panel.grid(alpha=0.3)
        legend = panel.get_legend_handles_labels()
        panel.get_legend().remove()
    figure.legend(*legend, loc="outside lower center", ncols=2)
    return figure


def save(root: Path, name: str, figure: Figure) -> str:
    """Write a figure of the page; returns its name among them."""
    path = root / "figures" / (re.sub(r"[^\w.]+", "_", name.strip()) + ".png")
    figure.savefig(path, dpi=150)
    return path.name
