"""How significant the differences between runs are."""

import warnings
from typing import Any

import pandas as pd
from scipy.stats import ttest_ind, ttest_rel


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
