"""Grids of runs that scripts/compare.py plans, trains and scores: what is in their folders."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from uvit_dia.checkpoint import RunFolder
from uvit_dia.config import Config, load, run_parser


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
