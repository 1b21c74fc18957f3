"""Pages about a run or a grid of runs: one self-contained HTML file, the same in Markdown, a grid in CSV too.

The words are in templates/: a page is written as Markdown, of which the HTML is made.
"""

import base64
import csv
import json
import math
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jinja2
import markdown
from markupsafe import Markup
from matplotlib.figure import Figure
from scipy.stats import ttest_ind, ttest_rel

from uvit_dia import evaluation
from uvit_dia.checkpoint import RunFolder
from uvit_dia.errors import UserError
from uvit_dia.experiments import Run, read_grid
from uvit_dia.trainer import SpikeCounter

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito 2008
MARKERS, DASHES = "osD^vPX", ("-", "--", ":")
SEED = "train.seed"  # runs that differ in it alone are repeats of one another
Records = list[dict[str, Any]]  # of metrics.jsonl


@dataclass(frozen=True)
class Cell:
    """The runs that differ in the seed alone, by seed; key: their labels on the other axes."""

    key: tuple[str, ...]
    runs: dict[str, Run]

    @property
    def series(self) -> str:
        return " ".join([*self.key[:1], *self.key[2:]]) or "all runs"

    @property
    def x(self) -> str:
        return "".join(self.key[1:2])

    def records(self) -> list[Records]:
        return [found for run in self.runs.values() if (found := run.folder.read_metrics())]

    def of(self, name: str) -> dict[str, float]:
        """One number of each run that has it, by seed."""
        return {seed: run.numbers[name] for seed, run in self.runs.items() if name in run.numbers}

    def summary(self, name: str) -> str:
        """Its mean over seeds, and their standard deviation."""
        values = list(self.of(name).values())
        spread = f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{stdev(values):.2g}" if len(values) > 1 else ""
        return f"{mean(values):.4g}{spread}" if values else "-"


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
        save(root, "curves", curves({root.name: [records]}, ("loss", "grad_norm", "lr")))
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
    cells = cells_of(runs)
    write_csv(root / "report.csv", runs)
    axes = [axis.split(".")[-1].replace("_", " ") for axis in runs[0].labels if axis != SEED]
    training, previews = {}, {}
    for x in dict.fromkeys(cell.x for cell in cells):
        records = {cell.series: cell.records() for cell in cells if cell.x == x}
        if any(records.values()):
            training[x] = save(root, f"curves {x}", curves(records, ("loss", "grad_norm")))
    for cell in cells:
        first = next(iter(cell.runs.values()))
        if newest := max(first.folder.samples.glob("step_*.png"), default=None):
            previews[cell.key] = shutil.copy(newest, root / "figures" / f"{first.name}.png").name
    return {
        "facts": facts, "axes": axes, "cells": cells, "runs": runs, "card": next(iter(cards), None),
        "num_scored": len(cards),
        "num_seeds": min(len(cell.of(metrics[0])) for cell in cells) if metrics else 0,
        "labels": {key: evaluation.LABELS[key] for key in metrics},
        "pictures": {key: save(root, key, scores(cells, key, "".join(axes[1:2]))) for key in metrics},
        "tests": {key: significance(cells, key) for key in metrics},
        "training": training, "previews": previews,
    }  # fmt: skip


def cells_of(runs: Sequence[Run]) -> list[Cell]:
    cells: dict[tuple[str, ...], dict[str, Run]] = {}
    for run in runs:
        labels = dict(run.labels)
        seed = labels.pop(SEED, "")
        cells.setdefault(tuple(labels.values()), {})[seed] = run
    return [Cell(*cell) for cell in cells.items()]


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """A line a run: its name, labels and numbers."""
    rows = [{"run": run.name} | run.labels | run.numbers for run in runs]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(rows)


def significance(cells: Sequence[Cell], metric: str) -> list[dict[str, Any]]:
    """Each cell against its baseline: the cell with the first axis's first value, all else equal.

    "paired": p of the t-test by seed, which fixes the data's order and the noise whatever the unit; "holm":
    that, corrected for all these tests; "two_sample": p of the t-test that ignores pairs. nan: too few seeds.
    """
    values, tests = {cell.key: cell.of(metric) for cell in cells}, []
    for cell in cells:
        ours, theirs = values[cell.key], values.get((*cells[0].key[:1], *cell.key[1:]), {})
        seeds = sorted(ours.keys() & theirs.keys())
        if ours is theirs or not seeds:
            continue
        a, b = ([side[seed] for seed in seeds] for side in (ours, theirs))
        with warnings.catch_warnings(action="ignore"):  # nan says it
            p = {"paired": ttest_rel(a, b).pvalue, "two_sample": ttest_ind(a, b).pvalue}
        tests.append({"cell": cell, "n": len(seeds), "difference": mean(a) - mean(b), **p})
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


def scores(cells: Sequence[Cell], metric: str, x_name: str) -> Figure:
    """A score against the second axis, a colour and marker a series: mean, spread, and a dot a seed."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    panel, places = figure.subplots(), list(dict.fromkeys(cell.x for cell in cells))
    names = list(dict.fromkeys(cell.series for cell in cells))
    for i, name in enumerate(names):
        style = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
        found = {cell.x: list(cell.of(metric).values()) for cell in cells if cell.series == name}
        shift = 0.5 * (i + 0.5) / len(names) - 0.25  # series stand abreast
        points = {places.index(x) + shift: values for x, values in found.items() if values}
        spreads = [stdev(values) if len(values) > 1 else 0 for values in points.values()]
        panel.errorbar(
            list(points), list(map(mean, points.values())), spreads, **style, capsize=4, label=name
        )
        for x, values in points.items():
            panel.scatter([x + 0.03] * len(values), values, 9, style["color"], alpha=0.6)
    panel.set_xticks(range(len(places)), places)
    panel.set(xlabel=x_name, ylabel=evaluation.LABELS[metric])
    panel.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def curves(records: dict[str, list[Records]], keys: Sequence[str]) -> Figure:
    """Logged numbers over images, a colour a series: its mean over runs, and each run thin."""
    figure = Figure(figsize=(6, 1 + 2.6 * len(keys)), layout="constrained")
    for panel, key in zip(figure.subplots(len(keys), sharex=True), keys, strict=True):
        for i, (name, runs) in enumerate(records.items()):
            style = dict(color=COLOURS[i % len(COLOURS)], ls=DASHES[i % len(DASHES)])
            lines = [{record["images"]: record[key] for record in run} for run in runs]
            for line in lines:
                panel.plot(line.keys(), line.values(), **style, lw=0.5, alpha=0.4)
            common = sorted(set.intersection(*map(set, lines))) if lines else []
            panel.plot(common, [mean(line[x] for line in lines) for x in common], **style, label=name)
        panel.set(ylabel=key.replace("_", " "), yscale="linear" if key == "lr" else "log")
        panel.grid(alpha=0.3)
    panel.set_xlabel("images")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def save(root: Path, name: str, figure: Figure) -> str:
    """Write a figure of the page; returns its name among them."""
    path = root / "figures" / (re.sub(r"[^\w.]+", "_", name.strip()) + ".png")
    figure.savefig(path, dpi=150)
    return path.name
