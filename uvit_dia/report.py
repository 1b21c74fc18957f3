"""What runs came to: a table of their numbers, and how significant the differences between them are."""

import warnings
from typing import Any

import pandas as pd
from scipy.stats import ttest_ind, ttest_rel

from uvit_dia.experiments import Run

SEED = "train.seed"  # runs that differ in it alone are repeats of one another, and make a cell
LOGGED = "step images loss grad_norm lr spikes images_per_second memory_gib".split()
OF_A_RUN = dict.fromkeys(LOGGED, "last") | {"images_per_second": "median"}  # as starting is slow


def outcomes(runs: list[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a run: how it ended, its labels, scores and logged numbers; and a row a record of every run.

    `series`: the label on the first axis (and on a third); `x`: on the second.
    """
    rows = []
    for run in runs:
        card, labels = run.card(), [label for axis, label in run.labels.items() if axis != SEED] or ["all"]
        row = {"run": run.name, "state": "scored" if card else run.last_words(), **run.labels}
        row |= {"series": " ".join(labels[:1] + labels[2:]), "x": "".join(labels[1:2])}
        row |= {"seed": run.labels.get(SEED, ""), "card": run.card_path.name}
        rows.append(row | {"broken": int("not finite" in row["state"])} | (card["metrics"] if card else {}))
    records = [{"run": run.name} | record for run in runs for record in run.folder.read_metrics()]
    lines = pd.DataFrame(records, columns=["run", *LOGGED])
    frame = pd.DataFrame(rows).set_index("run").join(lines.groupby("run").agg(OF_A_RUN))
    return frame, lines.join(frame[["series", "x"]], on="run")


def significance(cells: dict[tuple[str, ...], pd.DataFrame], metric: str) -> list[dict[str, Any]]:
    """Each cell against the one with the first axis's first value, over the seeds that both have.

    "paired": p of the t-test by seed, which fixes the data's order and the noise whatever the unit; "holm":
    that, corrected for all these tests; "two_sample": p of the t-test that ignores pairs. nan: too few seeds.
    """
    baseline, tests = next(iter(cells))[0], []
    for key, cell in cells.items():
        sides = [side.set_index("seed")[metric] for side in (cell, cells[baseline, *key[1:]])]
        ours, theirs = pd.concat(sides, axis=1, join="inner").dropna().to_numpy().T  # (n,)
        if key[0] != baseline and len(ours):
            with warnings.catch_warnings(action="ignore"):  # nan says it
                p = {"paired": ttest_rel(ours, theirs).pvalue, "two_sample": ttest_ind(ours, theirs).pvalue}
            tests.append({"key": key, "n": len(ours), "difference": (ours - theirs).mean(), **p})
    adjusted = holm([test["paired"] for test in tests])
    return [test | {"holm": p} for test, p in zip(tests, adjusted, strict=True)]


def holm(p: list[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979); nan is no test, and stays."""
    made = pd.Series(p, dtype=float).dropna().sort_values()
    adjusted = (made * pd.RangeIndex(len(made), 0, -1)).cummax().clip(upper=1)
    return adjusted.reindex(range(len(p))).tolist()
