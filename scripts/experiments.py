"""Grids of runs that scripts/compare.py plans, trains and scores: their folders, and how they differ."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from run_config import Config, load, run_parser
from run_folder import RunFolder
from scipy.stats import ttest_ind, ttest_rel


@dataclass(frozen=True)
class Run:
    """One combination: the name of its folder, a label of its value by axis, and its config."""

    name: str
    labels: dict[str, str]
    config: Config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.output_dir)

    @property
    def card_path(self) -> Path:
        return self.folder.evaluation / f"step_{self.config.train.num_steps:08d}.json"

    def is_trained(self) -> bool:
        try:
            about = json.loads((self.folder.pipeline / "training.json").read_text())
        except OSError:  # none yet, or just being replaced
            return False
        return about["step"] == self.config.train.num_steps

    def card(self) -> dict[str, Any] | None:
        """The score after the last step, as the config asks for it; None before that."""
        if not (self.is_trained() and self.card_path.is_file()):
            return None
        card, wanted = json.loads(self.card_path.read_text()), self.config.evaluate
        found = (card["num_generated"], card["extractor"]["name"])
        return card if found == (wanted.num_images, wanted.extractor) else None


def read_grid(root: Path) -> tuple[dict[str, Any], list[Run]]:
    """The facts of grid.yaml, and its runs, each with the config of its cell.yaml, wherever the folder is."""
    facts, parser = yaml.safe_load((root / "grid.yaml").read_text()), run_parser("")
    configs = {name: load(root / name / "cell.yaml", parser) for name in facts["runs"]}
    moved = {name: replace(config, output_dir=str(root / name)) for name, config in configs.items()}
    return facts, [Run(name, labels, moved[name]) for name, labels in facts.pop("runs").items()]


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
    return [test | {"holm": p} for test, p in zip(tests, holm([x["paired"] for x in tests]), strict=True)]


def holm(p: list[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979); nan is no test, and stays."""
    made = pd.Series(p, dtype=float).dropna().sort_values()
    return (made * pd.RangeIndex(len(made), 0, -1)).cummax().clip(upper=1).reindex(range(len(p))).tolist()
